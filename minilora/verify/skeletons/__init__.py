"""What a library needs to be verified: adapter, test, file of known deviations, workflow."""

from __future__ import annotations

from typing import Any

from minilora.verify.skeletons.functions import look_at_function
from minilora.verify.skeletons.guess import Guess
from minilora.verify.skeletons.look import look
from minilora.verify.skeletons.skeleton import KINDS, skeleton
from minilora.verify.skeletons.tried import tried

__all__ = ["KINDS", "look_at", "skeleton", "tried"]


def look_at(found: Any, module: str, name: str, kind: str) -> Guess:
    """Look at a layer's class, or at a function that makes, changes or computes a layer."""
    computes = None if isinstance(found, type) else look_at_function(found, module, name, kind)
    if computes is not None:
        return computes
    if kind == "jax":
        missing = "how the function takes x, W, A and B"
        return Guess((f"{module}.{name}(...)",), (module,), form="function", missing=(missing,))
    return look(found, module, name)
