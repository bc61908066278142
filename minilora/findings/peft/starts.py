"""PEFT's initializations."""

from minilora.findings.finding import Finding
from minilora.findings.peft.release import SEEN

FINDINGS = (
    Finding(
        id="peft.olora-transposed",
        title="OLoRA starts from the transpose of a weight that is stored (in, out)",
        severity="fails",
        seen=SEEN,
        since="0.12.0",
        code="peft/tuners/lora/layer.py:401 LoraLayer.olora_init",
        cause=(
            "olora_init (tuners/lora/layer.py) factors the weight as it is stored: of a "
            "Conv1D, which has (in, out), A and B get each other's sides, and the first "
            "forward fails"
        ),
        does="""
            GPT-2's `Conv1D` is such a layer. PiSSA's start transposes it since [PEFT
            2103](https://github.com/huggingface/peft/issues/2103); these two do not. The residual
            is right, and the factors are exchanged.
            """,
        fix=(
            "Transpose the weight before and after where fan_in_fan_out is set, as pissa_init does"
        ),
        right="""
            $R + sBA = W$, so that the start leaves the output as it is.
            """,
        consequence="""
            The first forward fails; where the weight is square, as GPT-2's `attn.c_proj`, training
            starts from another model, without a word.
            """,
        found_by=("peft", "init.fresh.olora"),
    ),
    Finding(
        id="peft.embedding-start",
        title="An embedding starts as LoRA's, whatever start is asked for",
        severity="training",
        seen=SEEN,
        since="0.9.0",
        cause=(
            "every start but four goes to reset_lora_parameters, which takes no notice of its"
            " name for a table (tuners/lora/layer.py)"
        ),
        code="peft/tuners/lora/layer.py:1264 Embedding.update_layer",
        does="""
            PEFT's embeddings have one start and take the name of any other one for it, where
            convolutions refuse an unknown name.
            """,
        fix="Refuse a start that an embedding does not have, by its name",
        right="""
            Each of these starts is one of a matrix, and a table is one. What cannot be done is an
            error.
            """,
        consequence="""
            The model trains, with LoRA's start in its embeddings.
            """,
        not_asked="`init` starts the weight of a linear layer alone",
    ),
    Finding(
        id="peft.pissa-tied",
        title="PiSSA in a head takes its part out of the tied embedding too",
        severity="silent",
        seen=SEEN,
        since="0.11.1",
        cause=(
            "the residual is put into the parameter itself, which the embedding shares "
            "(tuners/lora/layer.py)"
        ),
        code="peft/tuners/lora/layer.py:462 LoraLayer.pissa_init",
        does="""
            The residual is put into the weight that the two share. OLoRA and LoftQ do the same.
            """,
        fix="Refuse to start in a tied weight, or untie it first",
        right="""
            $R + sBA = W$ in the head, and the embedding keeps $W$: the start changes no output. The
            tie has to end there.
            """,
        consequence="""
            Training starts from a model whose embedding lacks its greatest singular values, and
            nothing says so.
            """,
        not_asked="`init` starts the weight of a linear layer alone",
    ),
    Finding(
        id="peft.experts-orthogonal",
        title="Experts that start orthogonal share one rank, and do not start at zero",
        severity="silent",
        seen=SEEN,
        since="0.17.1",
        cause=(
            "the start is of rank r, where the experts side by side have r each "
            "(tuners/lora/layer.py)"
        ),
        code="peft/tuners/lora/layer.py:605 LoraLayer.orthogonal_init",
        does="""
            The start makes $A$ and $B$ of one matrix of rank $r$, where there should be one for
            each expert. Cut into the experts' parts, their halves of the rank are no longer
            opposite each other.
            """,
        fix=(
            "Start each expert's A and B of rank r orthogonal, in the shapes (experts r, in) and "
            "(out, r experts)"
        ),
        right="""
            $BA = 0$ in each expert.
            """,
        consequence="""
            Training starts from another model, with rank $r / e$; where $e$ does not divide $r$,
            the first forward fails.
            """,
        not_asked="`init` starts the weight of a linear layer alone",
    ),
    Finding(
        id="peft.loftq-scale",
        title="LoftQ starts without its scale",
        severity="silent",
        seen=SEEN,
        since="0.9.0",
        cause="loftq_init is called without the scale (tuners/lora/layer.py)",
        code="peft/tuners/lora/layer.py:585 LoraLayer.loftq_init",
        does="""
            PEFT hands the weight and the rank to the start, and not $s$. The question is open in
            [PEFT 1982](https://github.com/huggingface/peft/issues/1982). The start asks for a GPU,
            whatever there is:
            """,
        fix="Divide what B and A have to make up by the scale: B A = (W - Q) / s",
        right="""
            What acts is $Q + sBA$, and it should be near $W$. With $BA$ the best for $W - Q$, the
            scale 2 is as far from $W$ as $Q$ alone, and a greater one farther: $W - Q - sBA = (W -
            Q - BA) + (1 - s)BA$, two parts at right angles.
            """,
        consequence=r"""
            With $\alpha = 2r$, as is usual, LoftQ gains nothing over the quantized weight. Start it
            with $\alpha = r$.
            """,
        not_asked="no check starts LoftQ",
    ),
    Finding(
        id="peft.loftq-transposed",
        title="LoftQ starts from the transpose of a weight that is stored (in, out)",
        severity="silent",
        seen=SEEN,
        since="0.9.0",
        cause="the weight is factored as it is stored (tuners/lora/layer.py)",
        code="peft/tuners/lora/layer.py:591 LoraLayer.loftq_init",
        does="""
            As OLoRA does.
            """,
        fix="Transpose the weight before it is factored where fan_in_fan_out is set",
        right="""
            $R + sBA = W$.
            """,
        not_asked="no check starts LoftQ",
    ),
    Finding(
        id="peft.loftq-layers",
        title="LoftQ fails in convolutions and embeddings",
        severity="fails",
        seen=SEEN,
        since="0.19.1",
        cause="loftq_init is called without the configuration that it takes (tuners/lora/layer.py)",
        code="peft/tuners/lora/layer.py:1260 Embedding.update_layer",
        does="""
            They call the start without the configuration that it needs.
            """,
        fix=(
            "Hand the configuration to loftq_init in convolutions and embeddings too, or refuse "
            "them by name"
        ),
        right="""
            The matrix of an embedding is as good as another one; what is not supported is refused
            by name, as in convolutions every other start is.
            """,
        consequence="""
            An error that names an argument of the library's own.
            """,
        not_asked="no check starts LoftQ",
    ),
)
