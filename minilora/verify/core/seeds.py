"""What a check's cases are drawn from: its id, or the text that stands for it here.

An id may be renamed; its cases, and with them the published vectors, stay.
"""

from __future__ import annotations

SEEDED_AS: dict[str, dict[str, str]] = {
    "linear": {
        "basis-change": "rank-space",
        "token-independence": "tokens-apart",
        "dropout-mean": "mean-of-masks",
        "gradcheck": "derivative",
    },
    "merge": {"forward": "function"},
    "variants": {"init": "start", "unbatched": "vector", "unbatched-vjp": "vector-vjp"},
    "combine": {
        "single": "one",
        "zero-weight": "zero",
        "negative-weight": "negative",
        "split-weight": "halves",
    },
    "multi": {
        "base-rows": "without",
        "base-row-first": "first-without",
        "row-order": "permuted",
        "adapter-order": "relabelled",
        "unused-adapter": "unused",
    },
    "init": {"base-unchanged": "base"},
    "lifecycle": {
        "single-adapter": "lone",
        "random-steps": "machine",
        "isolation": "apart",
        "modules-to-save": "full",
        "load-after-delete": "load-again",
    },
    "optimizer": {
        "linear-schedule": "linear",
        "cosine-schedule": "cosine",
        "past-end": "past",
        "other-params": "others",
        "combined": "together",
        "gradient-accumulation": "accumulate",
    },
    "train": {
        "linear-schedule": "linear",
        "cosine-schedule": "cosine",
        "weight-decay": "decay",
        "no-weight-decay": "no-decay",
        "other-params": "others",
        "combined": "together",
        "gradient-accumulation": "accumulate",
        "repeat": "again",
    },
    "grad-flow": {
        "all-layers": "every",
        "first-layer": "below",
        "last-layer": "above",
        "first-layer-checkpointing": "below-checkpointing",
        "zero-B": "start",
    },
    "files": {
        "resave": "again",
        "second-adapter": "another",
        "outputs": "function",
        "modules-to-save": "trained",
        "regex": "expressions",
    },
}
"""Of each level, the parts of its ids that are drawn as another text."""


def seed_text(check: str) -> str:
    """The text that seeds the cases of a check.

    >>> seed_text("lifecycle.random-steps.modules-to-save")
    'lifecycle.machine.full'
    """
    level, *parts = check.split(".")
    known = SEEDED_AS.get(level, {})
    return ".".join([level, *(known.get(part, part) for part in parts)])
