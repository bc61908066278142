"""Deviations of transformers, whichever peer puts its layers into its models."""

_LOSS = (
    "transformers computes a causal language model's loss from `logits.float()` (ForCausalLMLoss "
    "in loss/loss_utils.py), so loss and gradients carry float32 rounding"
)
_LLAMA = (
    f"{_LOSS}; and it casts to float32 in models/llama/modeling_llama.py (qwen2 alike): "
    "RMSNorm's input, the RoPE angles and tables, and the attention softmax, so the logits "
    "carry it too. The least float64, which fills the mask, is -inf in that softmax: a row without "
    "any key (padding on the left) is NaN, and with it the loss"
)
TRANSFORMERS = {
    "model.gpt2*:float64": _LOSS,
    "model.llama*:float64": _LLAMA,
    "train.prompt:float64": _LOSS,
    "train.*:float64": _LLAMA,
    "inference.logits.combined:float64": _LLAMA,
}
TRANSFORMERS |= {
    f"files.{law}.{kind}:float64": _LLAMA
    for law in ("outputs", "gradients")
    for kind in ("patterns", "dora", "embedding")
} | {
    "files.outputs.regex:float64": _LLAMA,
    "files.second-adapter:float64": _LLAMA,
    "files.outputs.rslora:float64": _LOSS,
    "files.gradients.rslora:float64": _LOSS,
}
TRANSFORMERS |= {
    f"grad-flow.{check}:float64": _LLAMA
    for check in (
        "all-layers",
        "checkpointing",
        "first-layer",
        "last-layer",
        "first-layer-checkpointing",
        "zero-B",
    )
}
