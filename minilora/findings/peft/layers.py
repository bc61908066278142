"""PEFT's adapters of single kinds of layers."""

from minilora.findings.finding import Finding, Stored
from minilora.findings.peft.release import SEEN
from minilora.findings.stored import StoredAdapter


def _single(adapter: StoredAdapter) -> list[str]:
    """The weights of experts of which there is one alone."""
    return [m.name for m in adapter.modules if m.kind == "expert" and m.shape[:1] == (1,)]


FINDINGS = (
    Finding(
        id="peft.tokens-head-bias",
        title="A head whose tokens are trained loses its bias",
        severity="silent",
        seen=SEEN,
        since="0.20.0",
        cause=(
            "F.linear is called with the new table and no bias (tuners/trainable_tokens/layer.py)"
        ),
        code="peft/tuners/trainable_tokens/layer.py:267 TrainableTokensLayer.forward_adapters",
        does="""
            `trainable_token_indices` trains some rows of an embedding, and of the head that is tied
            to it. The adapted head multiplies by the new table and adds nothing, as was reported in
            [PEFT 3649](https://github.com/huggingface/peft/issues/3649).
            """,
        fix="Pass the base layer's bias to F.linear",
        right="""
            Rows that are as they were change nothing.
            """,
        consequence="""
            Heads without a bias, as those of most language models, are right. A masked BERT is
            trained without the bias and has it again once it is merged.
            """,
        not_asked="no method trains single rows of an embedding",
    ),
    Finding(
        id="peft.conv-dilation",
        title="The adapter of a convolution moves without dilation",
        severity="silent",
        seen=SEEN,
        since="0.15.2",
        code="peft/tuners/lora/layer.py:1625 _ConvNd.update_layer",
        cause=(
            "the A of a convolution (tuners/lora/layer.py) has the kernel, the stride and the"
            " padding of the base, and not its dilation"
        ),
        does="""
            PEFT's $A$ is a convolution with the kernel, the stride and the padding of the base. It
            has neither its dilation nor what its `padding_mode` puts beside the input; LyCORIS,
            which adds up the weight in each forward, pads it with zeros too. [PEFT
            3697](https://github.com/huggingface/peft/issues/3697) reports both, and [PEFT
            3758](https://github.com/huggingface/peft/pull/3758) mends them.
            """,
        fix="Give lora_A the base layer's dilation beside its kernel, stride and padding",
        right="""
            A convolution is $W$ over patches, and $W + sBA$ over the same patches is the adapted
            one: merging changes no output.
            """,
        consequence="""
            With dilation the first forward fails, unless the padding is `"same"`: then, as with any
            other padding mode, one function is trained and another one is merged. Put the padding
            into a module of its own before the convolution.
            """,
        found_by=("peft", "module.conv.dilation.forward", "module.conv.dilation.gradients"),
    ),
    Finding(
        id="peft.conv-padding",
        title="The adapter of a convolution pads with zeros, whatever the padding mode",
        severity="silent",
        seen=SEEN,
        since="0.15.2",
        code="peft/tuners/lora/layer.py:1625 _ConvNd.update_layer",
        cause="the A of a convolution (tuners/lora/layer.py) has not the base's padding mode",
        also={"lycoris-lora": "4.1.3"},
        does="""
            As with dilation: PEFT's $A$ and LyCORIS do not take over the base's `padding_mode`.
            """,
        fix="Give lora_A the base layer's padding_mode",
        right="""
            Merging changes no output.
            """,
        found_by=("peft", "module.conv.padding-mode.forward", "module.conv.padding-mode.gradients"),
    ),
    Finding(
        id="peft.single-expert",
        title="The only expert of a weight stored (in, out) gets the transpose",
        severity="silent",
        seen=SEEN,
        since="0.17.1",
        code="peft/tuners/lora/layer.py:2545 ParamWrapper.get_delta_weight",
        cause=(
            "the one expert of a weight (1, in, out) is taken for a matrix "
            "(tuners/lora/layer.py), and gets the transpose of its change"
        ),
        does="""
            `target_parameters` adapts weights (e, out, in), and (e, in, out) where the module says
            `is_transposed`. One expert alone is taken for a plain matrix (out, in).
            """,
        fix="Ask whether the parameter is stored (in, out) also where there is one expert",
        right="""
            An expert is computed as it is among others.
            """,
        consequence=r"""
            The first forward fails; a square weight gets $A^\top B^\top$ for $BA$.
            """,
        found_by=(
            "peft",
            "module.experts.single.forward",
            "module.experts.single.gradients",
            "module.experts.single.merged",
        ),
        stored=Stored(
            _single,
            "may",
            "one expert alone, stored (in, out), gets the transpose of its change",
        ),
    ),
    Finding(
        id="peft.max-norm",
        title="Embedding with max_norm shortens lora_A in its forward (as loralib's)",
        severity="silent",
        seen=SEEN,
        since="0.9.0",
        code="peft/tuners/lora/layer.py:1478 Embedding._embed",
        cause=(
            "an embedding looks up the columns of A with the max_norm of the table "
            "(tuners/lora/layer.py)"
        ),
        does="""
            The columns of $A$ are looked up with the bound that is meant for the table's rows.
            """,
        fix=(
            "Look up the columns of A without max_norm, and bound the row of W + s B A, or refuse"
            " max_norm"
        ),
        right="""
            The row of $W + sBA$ is within the bound: nothing is to be shortened.
            """,
        consequence="""
            A forward changes what is trained.
            """,
        found_by=(
            "peft",
            "module.embedding.max-norm.forward",
            "module.embedding.max-norm.gradients",
        ),
    ),
    Finding(
        id="peft.attention-output",
        title="The change of an attention's output is added twice",
        severity="silent",
        seen=SEEN,
        since="0.15.2",
        code="peft/tuners/lora/layer.py:2072 MultiheadAttention.merge",
        cause=(
            "MultiheadAttention.merge (tuners/lora/layer.py), which the forward calls too, "
            "adds the change of out_proj to its weight, and merges out_proj itself besides: "
            "the change is added twice"
        ),
        does="""
            PEFT adapts `torch.nn.MultiheadAttention`, which reads its weights itself, by merging
            before the forward. Its `merge` adds $sBA$ to the weight of `out_proj`, and then merges
            `out_proj`, itself an adapted layer, which adds it once more. Unmerging takes both away.
            """,
        fix="Leave out_proj's delta out of orig_weight_out, as out_proj.merge adds it",
        right="""
            With one token attention is $W_o W_v x$, and with an adapter of $W_o$ alone $(W_o + sBA)
            W_v x$.
            """,
        consequence="""
            What is trained, evaluated and merged has twice the change of `out_proj`; its gradient
            is that of one. Files are right, so that other programs, and a merge by hand, compute
            another function.
            """,
        found_by=(
            "peft",
            "module.attention.out.forward",
            "module.attention.out.gradients",
            "module.attention.out.merged",
        ),
    ),
    Finding(
        id="peft.encoder-fast-path",
        title="An adapter in an encoder's layer does not act in evaluation",
        severity="silent",
        seen=SEEN,
        since="0.10.0",
        code="peft/tuners/tuners_utils.py:1943 BaseTunerLayer.weight",
        cause=(
            "torch.nn.TransformerEncoderLayer reads the weights of linear1 and linear2 itself"
            " in evaluation, and the layer that PEFT puts there shows it the base's"
        ),
        does="""
            In evaluation `torch.nn.TransformerEncoderLayer` calls no module, but one kernel with
            the weights that it reads from `linear1` and `linear2`. The layers that PEFT puts in
            their places have a `weight`, the base's.
            """,
        fix=(
            "Let a tuner layer's weight not pass for a plain one there: torch takes its fast path"
            " only for those"
        ),
        right="""
            Without dropout training and evaluation are one function, and a layer whose adapter is
            not 0 is not the base.
            """,
        consequence="""
            In evaluation the base answers, and no error tells. Merge before, or keep PyTorch from
            its fast path: `torch.backends.mha.set_fastpath_enabled(False)`.
            """,
        found_by=("peft", "module.encoder.forward"),
    ),
)
