"""Findings in AdapterHub's adapters."""

from minilora.findings.finding import Finding, Library

SEEN = "1.3.0"

FINDINGS = (
    Finding(
        id="adapters.dora-scale",
        title="DoRA has the norm of W + B A, and merges it, without the scale",
        severity="silent",
        seen=SEEN,
        code="adapters/methods/lora.py:461 compute_dora_norm",
        cause=(
            "LoRALinear (methods/lora.py) hands delta_w = B A to compute_dora_norm and dora_merge, "
            "while the branch that its forward adds is s B A"
        ),
        does=r"""
            The forward computes $m \circ (W + sBA)\,x / \lVert W + BA \rVert$; `merge_adapter`
            makes $m \circ (W + BA) / \lVert W + BA \rVert$ of the weight.
            """,
        fix="Hand s B A on to compute_dora_norm and dora_merge",
        right=r"""
            $W' = m \circ (W + sBA) / \lVert W + sBA \rVert$ with $s = \alpha / r$, in both.
            """,
        consequence=r"""
            Unless $\alpha = r$ this is no DoRA, and a merged model is another function than the one
            that was trained. Set `alpha` to `r`.
            """,
        found_by=("adapters", "variants.dora.forward", "variants.dora.merge"),
    ),
    Finding(
        id="adapters.dora-bias",
        title="DoRA rescales the base's bias",
        severity="silent",
        seen=SEEN,
        code="adapters/methods/lora.py:477 compute_dora_deltaw",
        cause=(
            "LoRALinear.forward (methods/lora.py) rescales the output of the base, in which the "
            "bias is"
        ),
        does=r"""
            $y = g \circ (W x + b + sBAx)$ with $g = m / \lVert W + BA \rVert$.
            """,
        fix="Rescale the output without the bias, and add the bias afterwards",
        right=r"""
            $y = g \circ (W + sBA)\,x + b$, as in the paper, and as it is after merging.
            """,
        consequence="""
            The output of every layer with a bias is another one after `merge_adapter`.
            """,
        found_by=("adapters", "variants.dora.forward", "variants.dora.vjp"),
    ),
    Finding(
        id="adapters.dora-transposed",
        title="DoRA of a transposed weight takes its norms along the other side",
        severity="fails",
        seen=SEEN,
        code="adapters/methods/lora.py:125 LoRA.__init__",
        cause=(
            "LoRA.__init__ and compute_dora_norm (methods/lora.py) take the norm of dim=1 of a "
            "weight that fan_in_fan_out stores as (in, out)"
        ),
        fix="Take the norm of the transposed weight where fan_in_fan_out is set",
        right=r"""
            $\lVert \cdot \rVert$ has an entry for each output, in either storage.
            """,
        consequence="""
            GPT-2 has no DoRA: adding the adapter raises, and a square projection is computed
            with the norms of its inputs.
            """,
        found_by=("adapters", "variants.dora.forward.conv1d"),
    ),
    Finding(
        id="adapters.dora-reset",
        title="reset_adapter leaves DoRA merged",
        severity="silent",
        seen=SEEN,
        code="adapters/methods/lora.py:893 LoRALinear.reset_adapter",
        cause="reset_adapter (methods/lora.py) computes the weight of before and keeps it nowhere",
        does="""
            The inverse is assigned to a local name; the weight stays merged, and the layer notes
            that nothing is merged. The next forward applies the adapter to it once more.
            """,
        fix="Give the layer back dora_w_o, which the merge has kept",
        right="""
            Taking out what was merged leaves $W$, which the layer has kept besides.
            """,
        consequence="""
            After `merge_adapter` and `reset_adapter` the base is another model. Load it anew.
            """,
        not_asked="the peer's session would have one adapter that is never taken out",
    ),
    Finding(
        id="adapters.llama-places",
        title="In Llamas the settings of up and down projections are exchanged",
        severity="training",
        seen=SEEN,
        code="adapters/models/llama/mixin_llama.py:26 LlamaDecoderLayerMixin.init_adapters",
        cause=(
            "mixin_llama.py wraps down_proj as the intermediate and up_proj as the output layer"
        ),
        does="""
            `intermediate_lora=True` adapts `down_proj`, and `output_lora=True` `up_proj`.
            """,
        fix="Wrap up_proj as the intermediate layer and down_proj as the output layer",
        right="""
            The intermediate layer of a feed-forward block makes it wide and the output layer narrow
            again, as in the library's own BERT and GPT-2.
            """,
        consequence="""
            With one of the two another projection is trained than was asked for; an adapter's file
            fits the same release only. Set both, or neither.
            """,
        not_asked="the peer asks one layer, which has no place in a model",
    ),
)

LIBRARY = Library(
    "adapters",
    "AdapterHub's adapters",
    "adapters",
    FINDINGS,
    files="https://github.com/adapter-hub/adapters/blob/v{release}/src/{file}#L{line}",
)
