"""What a backward needs: below the lowest trained parameter nothing, and else what is kept.

Blocks in and below which nothing is trained have no backward; the projections that read what
depends on nothing trained form no gradient of their input; and with gradient checkpointing the
other blocks keep their input alone.
"""

from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from minilora.io.lazy_weights import Expanded
from minilora.spec.lora import Params, TrainableSpec, Weights
from minilora.spec.models import Config
from minilora.spec.ops import Array, Back

ABOVE = {True: ("norm", "head"), False: ("pooler", "head")}
"""The modules above the blocks, of a causal model or not; Bert's outer norm is below them."""

FIRST = ("q", "k", "v", "qkv")
"""The projections that read a block's input, through its first norm or as it is."""


@lru_cache(maxsize=8)
def lowest_block(layers: int, causal: bool, trained: frozenset[str]) -> int:
    """How many blocks at the bottom have nothing trained in or below them."""
    lowest = layers
    for name in trained:
        at, index, *_ = name.split(".")
        if at not in ABOVE[causal]:
            lowest = min(lowest, int(index) if at == "layers" else 0)
    return lowest


@lru_cache(maxsize=8)
def constant_inputs(layers: int, causal: bool, trained: frozenset[str]) -> frozenset[str]:
    """The projections that read what depends on nothing trained: `FIRST` of the lowest block.

    Unless something below the blocks is trained, or the norm between.
    """
    first = f"layers.{lowest_block(layers, causal, trained)}."
    outside = ("layers.", *(f"{at}." for at in ABOVE[causal]))
    if any(not name.startswith(outside) or name.startswith(first + "norm1") for name in trained):
        return frozenset()
    return frozenset(first + at for at in FIRST)


class Zero:
    """The gradient by what is constant: 0 of any shape, whatever it is multiplied by."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **_: Any) -> Any:
        first, *rest = inputs
        if ufunc in (np.add, np.subtract) and method == "__call__" and rest[0] is not first:
            return first if first is not self else rest[0] if ufunc is np.add else -rest[0]
        return self

    def _zero(self, other: Any) -> "Zero":
        return self

    def _other(self, other: Any) -> Any:
        return other

    __mul__ = __rmul__ = __matmul__ = __rmatmul__ = __truediv__ = _zero
    __add__ = __radd__ = __rsub__ = _other

    def __sub__(self, other: Any) -> Any:
        return self if other is self else -other

    def __len__(self) -> int:
        return 1


ZERO = Zero()


@dataclass(frozen=True)
class ConstantInput:
    """A weight that multiplies a constant: of the product no gradient by the constant is formed."""

    w: Any
    T = ZERO
    __array_ufunc__ = None

    def __matmul__(self, x: Array) -> Any:
        return self.w @ x


def prepared(W: Params, c: Config, tuning: TrainableSpec) -> Params:
    """W for the backward of the trained tensors; one dict, quick to look up, if all its maps are.

    The weights that read a constant are each a `ConstantInput`, if LoRA itself or nothing adapts
    them: their dx is `ZERO`.
    """
    modules = constant_inputs(c.layers, c.causal, tuning.trained) - tuning.variant.keys()
    names = [f"{at}.{part}" for at in modules for part in ("weight", "A") if f"{at}.{part}" in W]
    if (flat := _flat(W)) is not None:
        return flat | {name: ConstantInput(flat[name]) for name in names}
    lazy = Expanded({name: partial(_read_constant, W, name) for name in names})
    return ChainMap(lazy, W)  # type: ignore[arg-type]


def _read_constant(W: Params, name: str) -> Any:
    return ConstantInput(W[name])


def _flat(W: Params) -> dict[str, Any] | None:
    if not isinstance(W, ChainMap):
        return W if isinstance(W, dict) else None
    flat: dict[str, Any] = {}
    for part in map(_flat, reversed(W.maps)):
        if part is None:
            return None
        flat |= part
    return flat


def stack(
    x: Array,
    layers: int,
    block: Callable[[Array, str], Any],
    constant: int = 0,
    checkpointed: bool = False,
    prefix: tuple[int, Array] | None = None,
) -> tuple[Array, Back]:
    """`blocks.stack`, whose ``back`` frees each block's activations as it passes, so it runs once.

    Of the first ``constant`` blocks nothing is kept, and where there are any, dx is 0. Where blocks
    are ``checkpointed``, a block's input alone is kept, and ``back`` runs its forward again, to the
    same bits. ``prefix``: the lowest block that is run, and what enters it in the place of x.

    Shapes: x (d, b*t) -> y (d, b*t).
    Errors: RuntimeError at a second run, whose activations are gone.
    """
    backs: list[Back] = [_constant] if constant else []

    def run(x: Array, i: int) -> Any:
        at = f"layers.{i}."
        y, back_block = block(x, at)
        if i >= constant:
            backs.append(partial(_again, block, x, at) if checkpointed else back_block)
        return y

    lowest, x = prefix or (0, x)
    for i in range(lowest, layers):
        x = run(x, i)  # whose frame, and so what block i needs no more, is gone by the next

    def back(dy: Array) -> tuple[Array, Weights]:
        if not backs:
            raise RuntimeError("back has run and freed the activations; run the forward again")
        gradients: Weights = {}
        while backs:
            dy, block_gradients = backs.pop()(dy)
            gradients |= block_gradients
        return dy, gradients

    return x, back


def _constant(dy: Array) -> tuple[Array, Weights]:
    return np.zeros_like(dy), {}


def _again(block: Callable[[Array, str], Any], x: Array, at: str, dy: Array) -> Any:
    _, back_block = block(x, at)
    return back_block(dy)
