"""The smallest counterexample: hypothesis shrinks a failing layer, in the exact lane, by ==."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from hypothesis import HealthCheck, Phase, configuration, find, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky, NoSuchExample

from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import Fault, Skip
from minilora.verify.core.inputs import Layer, greatest_sum

if TYPE_CHECKING:
    from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray

MAX_SIZE = 4
"""The largest size of a dimension."""

MAX_EVALUATIONS = 500
"""The maximum number of examples that one search tries."""

Difference = tuple[str, Array, Array]
"""The name of an array, its value and the correct one."""

Kind = Mapping[str, bool | None]
"""Which options a layer has; None is either."""

Differs = Callable[["GuardedImplementation", Layer, str], Difference | None]
Smallest = Callable[["GuardedImplementation", str], dict[str, Any] | None]


@st.composite
def small_layers(draw: st.DrawFn, kind: Kind, dtype: str) -> Layer:
    """Layers of one to three tokens and features with entries -2 … 2, simplest first.

    r and s are powers of two and their roots too, as in the exact lane.
    """
    kind = {name: draw(st.booleans()) if has is None else has for name, has in kind.items()}
    size = st.integers(1, 3)
    tokens, n, m = draw(size), draw(size), draw(size)
    r = 4 if kind.get("use_rslora") else draw(st.sampled_from((1, 2, 4)))

    def array(*shape: int) -> Array:
        # Entries are drawn for the largest size: shrinking a size keeps the other entries.
        entries = draw(st.lists(st.integers(-2, 2), min_size=MAX_SIZE**2, max_size=MAX_SIZE**2))
        square = np.array(entries, DTYPES[dtype]).reshape(MAX_SIZE, MAX_SIZE)
        return square[tuple(slice(size) for size in shape)]

    s = draw(st.sampled_from((1.0, 4.0, 0.25, -1.0)))
    settings = {key: True for key in ("use_rslora", "fan_in_fan_out") if kind.get(key)}
    return Layer(
        x=array(tokens, n),
        W=array(m, n),
        A=array(r, n),
        B=array(m, r),
        dy=array(tokens, m),
        alpha=s * (r**0.5 if kind.get("use_rslora") else r),
        r=r,
        bias=array(m, 1)[:, 0] if kind.get("bias") else None,
        keep=array(tokens, n) > 0 if kind.get("dropout") else None,
        p=0.75 if kind.get("dropout") else 0.0,
        settings=settings,
    )


T = TypeVar("T")


@dataclass
class Budget:
    """Counts evaluations, so that a search ends on a slow machine as it does on a fast one."""

    left: int = MAX_EVALUATIONS

    def spend(self) -> bool:
        """Takes one evaluation; False if none is left."""
        self.left -= 1
        return self.left >= 0


def shrunk(strategy: st.SearchStrategy[T], fails: Callable[[T], bool]) -> None:
    """Tries examples and shrinks those that fail; ``fails`` keeps them."""
    options = settings(
        max_examples=300,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    # Raised where nothing fails, or where a target gives another answer each time.
    with _nothing_left_behind(), contextlib.suppress(NoSuchExample, Flaky):
        find(strategy, fails, settings=options, random=Random(0))


@contextlib.contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """Hypothesis's files are in a folder that is removed, not in the current one."""
    before = vars(configuration).get("__hypothesis_home_directory")
    with TemporaryDirectory(prefix="minilora-") as folder:
        configuration.set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            configuration.set_hypothesis_home_dir(before)


def search(
    subject: GuardedImplementation, dtype: str, kind: Kind, differs: Differs
) -> dict[str, Any] | None:
    """The smallest layer on which ``differs`` finds a difference, as values to show, or None."""
    budget = Budget()
    failing: list[tuple[Layer, Difference]] = []

    def fails(layer: Layer) -> bool:
        if greatest_sum(layer) > 64 or not budget.spend():
            return False
        try:
            difference = differs(subject, layer, dtype)
        except (Fault, Skip):
            return False
        if difference is not None:
            failing.append((layer, difference))
        return difference is not None

    shrunk(small_layers(kind, dtype), fails)
    if not failing:
        return None
    smallest, _ = min(failing, key=lambda pair: _size(pair[0]))
    while smaller := next((part for part in _parts(smallest) if fails(part)), None):
        smallest = smaller
    layer, (name, got, want) = min(failing, key=lambda pair: _size(pair[0]))
    shown: dict[str, Any] = {"array": name, "x": layer.x, "W": layer.W, "A": layer.A, "B": layer.B}
    shown |= {"dy": layer.dy} if name in ("dx", "dA", "dB", "dbias") else {}
    shown |= {} if layer.bias is None else {"bias": layer.bias}
    shown |= {} if layer.keep is None else {"keep": layer.keep, "p": layer.p}
    shown |= {"alpha": layer.alpha, "r": layer.r, **layer.settings}
    return shown | {"got": got, "want": want}


SIDES = {
    "tokens": {"x": 0, "dy": 0, "keep": 0},
    "n": {"x": 1, "W": 1, "A": 1, "keep": 1},
    "m": {"W": 0, "B": 0, "dy": 1, "bias": 0},
    "r": {"A": 0, "B": 1},
}
"""The axis of each array along which a dimension lies."""


def _parts(layer: Layer) -> Iterator[Layer]:
    """The layer without one of its tokens, features or ranks, with the same scale."""
    for side, axes in SIDES.items():
        if side == "r" and (layer.r != 2 or layer.settings.get("use_rslora")):
            continue  # r stays a power of two
        length = _length(layer, side)
        for i in range(length if length > 1 else 0):
            arrays = {
                name: np.delete(array, i, axis)
                for name, axis in axes.items()
                if (array := getattr(layer, name)) is not None
            }
            r = len(arrays["A"]) if side == "r" else layer.r
            yield replace(layer, **arrays, r=r, alpha=layer.alpha * r / layer.r)


def _length(layer: Layer, side: str) -> int:
    name, axis = next(iter(SIDES[side].items()))
    length: int = getattr(layer, name).shape[axis]
    return length


def _size(layer: Layer) -> tuple[int, float]:
    arrays = [layer.x, layer.W, layer.A, layer.B, layer.dy]
    entries = np.concatenate([np.abs(array.astype(np.float64)).ravel() for array in arrays])
    return entries.size, float(entries.sum())
