"""The contract: the methods that an implementation may have, and what it may declare."""

from __future__ import annotations

from collections.abc import Mapping

METHODS: dict[str, str] = {
    "lora_linear": "x, W, A, B, *, alpha, r, bias=None, keep=None, p=0.0, **settings",
    "lora_linear_vjp": "x, W, A, B, dy, *, alpha, r, bias=None, keep=None, p=0.0, **settings",
    "merge": "W, A, B, *, alpha, r, bias=None, **settings",
    "unmerge": "W_merged, A, B, *, alpha, r, **settings",
    "combine": "adapters, weights, **settings",
    "multi_adapter": "x, W, adapters, index",
    "model_loss": "model_dir, adapter_dir, batch",
    "optimizer_steps": "params, gradients, settings",
    "train": "model_dir, adapter_dir, batches, settings",
    "save": "model_dir, adapter_arrays, settings, out_dir",
    "load": "model_dir, adapter_dir",
    "logits": "model_dir, adapter_dir, input_ids",
    "deltas": "model_dir, adapter_dir",
    "targets": "config, names",
    "trainable": "config, names",
    "session": "layer",
    "init": "W, *, r, alpha, seed, **settings",
    "module": "layer, adapter, x, *, mode, dy=None, index=None",
}
"""The methods that an implementation may have, with the arguments that they are called with."""


LAYER_METHODS = ("lora_linear", "lora_linear_vjp", "merge", "unmerge")
"""Those of one layer with one adapter, whose r is that of A."""


SESSION: dict[str, str] = {
    "add": "name, adapter",
    "activate": "names",
    "disable": "",
    "scale": "name, factor",
    "merge": "",
    "unmerge": "",
    "delete": "name",
    "train": "",
    "eval": "",
    "forward": "x",
    "weight": "",
    "save": "name, folder",
    "load": "name, folder",
    "gradients": "x, dy",
    "step": "x, dy, lr",
    "replace": "name, adapter",
    "rows": "x, names",
    "combine": "name, names, weights",
}
"""The methods of what ``session`` answers, likewise."""


SESSION_NEEDS = ("add", "forward")
"""Those without which it is no session; the others may be absent."""


ANSWERS = ("forward", "gradients", "weight", "rows")
"""Those that are no step."""


COMPUTED = (
    "lora_linear",
    "lora_linear_vjp",
    "merge",
    "unmerge",
    "combine",
    "multi_adapter",
    "model_loss",
    "optimizer_steps",
    "train",
    "forward",
    "gradients",
    "rows",
)
"""Those that answer new arrays, which no later call may change."""


KEEPS = ("session", "add", "replace")
"""The methods whose last argument a session may hold: no later call may change it."""


WRITES = ("save",)
"""The methods whose last argument is a folder that they write to."""


DEFAULT_DTYPES = ("float64", "float32")


TIME_LIMIT = 30.0
"""Seconds that one call may take; generous, because a first call may compile or import."""


START_LIMIT = 300.0
"""Seconds that importing may take, at the start or in a call."""


CONVENTIONS = {
    "dora_norm": ("detached", "differentiated"),
    "dora_dropout": ("difference", "branch"),
}
"""What an implementation may choose, and declares; the first is taken where nothing is declared."""


DECLARATIONS = ("dtypes", "precision", "conventions", "fixed", "known", "mixed")
"""The attributes that an implementation may declare beside its name and version."""


LAYOUTS = {"conv_groups": ("weight", "blocks")}
"""What it may choose and declare likewise: how an adapter lies, which no answer can tell."""


class Remote:
    """An implementation in another process, which is told more than one in this.

    It ends a call that is over the time limit by itself, raises Skip and Fault with its own words,
    and is told the id of the check that calls.
    """

    check = ""
    time_limit = TIME_LIMIT

    def anew(self) -> Remote | None:
        """A new instance, as before any call; None where there is none."""
        return None


def positional(method: str, methods: Mapping[str, str] = METHODS) -> list[str]:
    """The names of the arguments that a method is given without them."""
    before, _, _ = methods.get(method, "").partition(", *")
    return [name for name in before.split(", ") if name]


def has_method(implementation: object, method: str) -> bool:
    """Whether the implementation has this method; one that raises when it is read counts."""
    try:
        return callable(getattr(implementation, method, None))
    except Exception:  # it is there, and calling it will say what is wrong
        return True
