"""Deviations of transformers, whichever peer puts its layers into its models."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minilora.findings import FINDINGS

Entry = Mapping[str, Any]
"""A known deviation: its reason, what was seen of it, and in which versions, if not in all."""


def entries(
    checks: Iterable[str],
    about: str | Sequence[str],
    *seen: Mapping[str, Any],
    **more: Any,
) -> dict[str, Entry]:
    """One entry for all of these checks.

    ``about``: the ids of the findings that they show, whose causes are the reason; or the reason.
    """
    entry: dict[str, Any] = {"reason": about, "seen": list(seen), **more}
    if not isinstance(about, str):
        entry["reason"] = "; ".join(FINDINGS[id].cause for id in about)
        entry["link"] = f"(finding {', '.join(about)})"
    return dict.fromkeys(checks, entry)


_LLAMA = tuple(f"transformers.float64-{part}" for part in ("loss", "rmsnorm", "rope", "softmax"))
_PADDED = (*_LLAMA, "transformers.float64-padding")
_FLOAT32 = {"rounded_to": "float32"}
_NAN = {"error": ["nan: loss holds 1 NaN*", "nan: logits holds*", "nan: *step*"]}

_OF_LOSS = (
    "model.gpt2*",
    "train.prompt",
    *(
        f"files.{law}.{kind}"
        for law in ("outputs", "gradients")
        for kind in ("rslora", "dora-conv1d")
    ),
)
_OF_LLAMA = (
    "train.*",
    *(
        f"files.{law}.{kind}"
        for law in ("outputs", "gradients")
        for kind in ("patterns", "tables-to-save", "dora", "embedding")
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
    **entries(_in_float64(_OF_LOSS), ("transformers.float64-loss",), _FLOAT32),
    **entries(
        _in_float64(["model.llama*", "train.labels", "train.repeat"]),
        _PADDED,
        _FLOAT32,
        _NAN,
    ),
    # AdamW divides by the size of the gradient: what float32 has rounded there may become anything.
    **entries(
        _in_float64(_OF_LLAMA),
        _PADDED,
        _FLOAT32,
        _NAN,
        {"arrays": "*after step *"},
    ),
    **entries(
        _in_float64(["model.batches", "model.adapters", "inference.logits.combined"]),
        _LLAMA,
        {"arrays": ["base_model*", "loss*", "logits*", "log-probabilities"]},
        _NAN,
    ),
}
