"""Deviations of transformers, whichever peer puts its layers into its models."""

from collections.abc import Iterable, Mapping
from typing import Any

Entry = Mapping[str, Any]
"""A known deviation: its reason, what was seen of it, and in which versions, if not in all."""


def entries(
    checks: Iterable[str], reason: str, *seen: Mapping[str, Any], **more: Any
) -> dict[str, Entry]:
    """One entry for all of these checks."""
    entry = {"reason": reason, "seen": list(seen), **more}
    return dict.fromkeys(checks, entry)


_LOSS = (
    "transformers computes a causal language model's loss from `logits.float()` (ForCausalLMLoss "
    "in loss/loss_utils.py), so loss and gradients carry float32 rounding"
)
_LLAMA = (
    f"{_LOSS}; and it casts to float32 in models/llama/modeling_llama.py (qwen2 alike): "
    "RMSNorm's input, the RoPE angles and tables, and the attention softmax, so the logits "
    "carry it too"
)
_PADDED = (
    f"{_LLAMA}. The least float64, which fills the mask, is -inf in that softmax: a row without "
    "any key (padding on the left) is NaN, and with it the loss"
)
_FLOAT32 = {"rounded_to": "float32"}
_NAN = {"error": ["nan: loss holds 1 NaN*", "nan: logits holds*", "nan: *step*"]}

_OF_LOSS = ("model.gpt2*", "train.prompt", "files.outputs.rslora", "files.gradients.rslora")
_OF_LLAMA = (
    "train.*",
    *(
        f"files.{law}.{kind}"
        for law in ("outputs", "gradients")
        for kind in ("patterns", "dora", "embedding")
    ),
    "files.outputs.regex",
    "files.second-adapter",
    *(
        f"grad-flow.{check}"
        for check in (
            "all-layers",
            "checkpointing",
            "first-layer",
            "last-layer",
            "first-layer-checkpointing",
            "zero-B",
        )
    ),
)


def _in_float64(checks: Iterable[str]) -> list[str]:
    return [f"{check}:float64" for check in checks]


TRANSFORMERS = {
    **entries(_in_float64(_OF_LOSS), _LOSS, _FLOAT32),
    **entries(
        _in_float64(["model.llama*", "train.labels", "train.repeat"]), _PADDED, _FLOAT32, _NAN
    ),
    # AdamW divides by the size of the gradient: what float32 has rounded there may become anything.
    **entries(_in_float64(_OF_LLAMA), _PADDED, _FLOAT32, _NAN, {"arrays": "*after step *"}),
    **entries(
        _in_float64(["model.batches", "model.adapters", "inference.logits.combined"]),
        _LLAMA,
        {"arrays": ["base_model*", "loss*", "logits*", "log-probabilities"]},
        _NAN,
    ),
}
