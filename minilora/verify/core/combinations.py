"""Cases that combine the values of several axes, so that each pair of values occurs in some case.

A bug mostly shows where two things meet: a bias and a storage, a mask and no rate. All combinations
are too many; all pairs are few, and each is in some row of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any
from zlib import crc32

Row = dict[str, Any]
"""A value of each axis."""

Pair = tuple[tuple[str, Any], tuple[str, Any]]
"""Two axes, each with one of its values, in the order of the axes."""

Allowed = Callable[[Mapping[str, Any]], bool]
"""Whether the values of some of the axes may occur together."""


def always(row: Mapping[str, Any]) -> bool:
    """Any values may occur together."""
    return True


def pairs(axes: Mapping[str, Sequence[Any]], allowed: Allowed = always) -> Iterator[Pair]:
    """All pairs of values of two axes that may occur together."""
    for one, other in combinations(axes, 2):
        for a, b in product(axes[one], axes[other]):
            if allowed({one: a, other: b}):
                yield (one, a), (other, b)


def pairwise(axes: Mapping[str, Sequence[Any]], allowed: Allowed = always) -> list[Row]:
    """Rows in which every allowed pair of values occurs, fewer than all combinations.

    Each row begins with the first pair that is missing yet. The other axes have the values that
    bring most of the missing pairs with them.

    >>> rows = pairwise({"a": (1, 2), "b": (1, 2), "c": (1, 2)})
    >>> len(rows)
    4
    """
    missing = dict.fromkeys(pairs(axes, allowed))
    rows: list[Row] = []
    while missing:
        row: Row = dict(next(iter(missing)))
        for axis in (axis for axis in axes if axis not in row):
            fitting = [value for value in axes[axis] if allowed({**row, axis: value})]
            gains = {value: _gain(row, axis, value, axes, missing) for value in fitting}
            # Which of equals is chosen is as good as chance: axes must not go up and down together.
            text = f"{len(rows)} {axis}"
            row[axis] = max(gains, key=lambda v: (gains[v], crc32(f"{text} {v}".encode())))
        rows.append({axis: row[axis] for axis in axes})
        for pair in combinations(rows[-1].items(), 2):
            missing.pop(pair, None)
    return rows


def _gain(
    row: Row, axis: str, value: Any, axes: Mapping[str, Any], missing: Mapping[Pair, None]
) -> int:
    """How many missing pairs the value makes with the values of a row."""
    both = {**row, axis: value}
    placed = [(name, both[name]) for name in axes if name in both]
    return sum(pair in missing for pair in combinations(placed, 2) if (axis, value) in pair)
