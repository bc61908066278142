"""PEFT's add_weighted_adapter."""

from minilora.findings.conditions import parts
from minilora.findings.finding import Finding, Stored
from minilora.findings.peft.release import SEEN
from minilora.findings.stored import StoredAdapter


def _rslora(adapter: StoredAdapter) -> list[str]:
    return ["use_rslora"] if adapter.config.get("use_rslora") else []


FINDINGS = (
    Finding(
        id="peft.combined-scale",
        title="What is combined of rsLoRA has another scale",
        severity="silent",
        seen=SEEN,
        since="0.14.0",
        code="peft/tuners/lora/model.py:866 LoraModel.add_weighted_adapter",
        cause=(
            "add_weighted_adapter (tuners/lora/model.py) gives the combined adapter "
            "lora_alpha = r and the first adapter's use_rslora: with rsLoRA its scale is √r "
            "and not 1"
        ),
        does=r"""
            `add_weighted_adapter` puts all scales into the factors and gives the new adapter
            $\alpha = r$, for $s = 1$. But it takes `use_rslora` over from the first adapter, and
            then $\alpha / \sqrt r = \sqrt r$ ([PEFT
            3449](https://github.com/huggingface/peft/pull/3449),
            [3761](https://github.com/huggingface/peft/issues/3761)).
            """,
        fix="Give the combined adapter use_rslora=False, as its lora_alpha = r means s = 1",
        right="""
            An adapter combined alone at weight 1 is itself.
            """,
        consequence=r"""
            The combination acts $\sqrt r$ times as strongly as the adapters it is made of, in each
            of the types. Divide the weights by it.
            """,
        found_by=(
            "peft",
            "combine.weighted",
            "combine.order",
            "combine.cat",
            "combine.many",
            "combine.linear",
            "combine.ties",
        ),
        stored=Stored(
            _rslora,
            "use",
            "add_weighted_adapter of this adapter acts √r times as strongly as it",
        ),
    ),
    Finding(
        id="peft.combined-parts",
        title="What is combined has neither the bias nor the magnitude",
        severity="silent",
        seen=SEEN,
        since="0.14.0",
        cause=(
            "the new adapter gets A and B, and what else there is of its layers stays as it "
            "was made (tuners/lora/model.py)"
        ),
        code="peft/tuners/lora/model.py:890 LoraModel.add_weighted_adapter",
        does=r"""
            Of an adapter with `lora_bias` or `use_dora` only $A$ and $B$ are combined; the bias is
            0 again and the magnitude $\|W\|$, as at the start of a training ([PEFT
            3761](https://github.com/huggingface/peft/issues/3761)).
            """,
        fix=(
            "Combine the biases of B with the factors, and refuse DoRA and what else cannot be "
            "combined"
        ),
        right=r"""
            As above. A sum of biases is $\sum_i w_i s_i c_i$. Of several DoRA adapters there is no
            exact sum with one magnitude, and an error says so.
            """,
        consequence="""
            The combination is another function than its parts, without a word.
            """,
        not_asked="`combine` is given adapters of A and B alone",
        stored=Stored(
            parts("magnitude", "lora_bias"),
            "use",
            "add_weighted_adapter leaves out these magnitudes and biases of B",
        ),
    ),
    Finding(
        id="peft.combined-weights",
        title="The weights of a combination are rounded to float32",
        severity="rounding",
        seen=SEEN,
        since="0.14.0",
        code="peft/tuners/lora/model.py:740 LoraModel._check_add_weighted_adapter",
        cause=(
            "add_weighted_adapter (tuners/lora/model.py) takes the SVD in float32, and leaves"
            " the factors of a half precision in it; one adapter alone is combined as "
            '"linear", whatever was asked for: by √(w s) on both factors, rounded to float32'
        ),
        does="""
            The types "linear" and "ties" take roots in double precision and put them into a tensor
            of the default dtype, whatever the adapter's is; "svd" does so with the weights. "cat"
            does not.
            """,
        fix=(
            "Take the root of the weight in the dtype of the factors (math.sqrt times a float64 "
            "tensor)"
        ),
        right="""
            Two adapters in float64 have a combination in float64.
            """,
        consequence="""
            A combination of a float64 model is no reference. The comparison here uses weights with
            roots that float32 holds.
            """,
        found_by=("peft", "combine.single"),
    ),
)
