"""Random inputs of a session: a layer, adapters by name, an input and a gradient of the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.inputs import RANKS, ROWS, SIZES, draw_several, in_exact_lane
from minilora.verify.core.types import Case

Array = np.ndarray
Entries = dict[str, Any]
"""A layer or an adapter, as the contract has it."""

NAMES = ("one", "two", "onetwo")
"""The third begins and ends as the others: names must be compared as a whole."""

BASIC_KINDS = {
    "linear": "",
    "conv1d": ", stored (in, out)",
    "embedding": ", of an embedding",
}
SPECIAL_KINDS = {
    "fused": ", of projections fused in one weight",
    "tied": ", of a tied embedding and head",
    "bias": ", with a trained bias",
    "full": ", with modules_to_save",
    "dora": ", of DoRA beside LoRA",
    "lora-bias": ", with a bias of B",
}
KINDS = BASIC_KINDS | SPECIAL_KINDS
"""The kinds of layers and adapters, in words; a session may lack some."""

EXCLUSIVE = ("bias", "full")
"""Kinds whose adapters "one" and "two" may not be active at once: each brings the same module."""

FUSED = (
    ((3, 3, 3), ("101", "111", "010")),
    ((4, 2, 2), ("110", "111", "011")),
    ((3, 3), ("01", "11", "10")),
    ((4, 2), ("10", "11", "01")),
)
"""The rows of a fused layer's projections, and which of these each adapter is on."""


@dataclass(frozen=True)
class SessionInputs:
    """A layer, the adapters by name, an input, and a gradient of the output.

    All are small integers. With |W|, |A|, |B|, |x| ≤ 2, ranks and sides ≤ 5 and s ≤ 4, doubled by a
    factor, no sum of absolute terms reaches 2²¹, and all are multiples of ¼: each is a number of
    float32. A tied table, which is multiplied by itself, has entries of ±1.
    """

    layer: Entries
    adapters: Mapping[str, Entries]
    x: Array
    dy: Array

    def of(self, name: str) -> Entries:
        """The adapter of this name; that of -name has the opposite B."""
        adapter = self.adapters[name.removeprefix("-")]
        return {**adapter, "B": -adapter["B"]} if name.startswith("-") else adapter

    def one_token(self) -> tuple[Array, Array]:
        """x and dy of a step of training: one token, with one entry each, so that all stays small.

        One entry reaches a column of A and a row of B, and leaves the others as they are.
        """
        dy = np.zeros_like(self.dy[:1])
        dy[0, -2] = -1
        if self.x.dtype.kind == "i":
            return self.x[1:2], dy
        x = np.zeros_like(self.x[:1])
        x[0, 1] = 1
        return x, dy


def draw_inputs(kind: str, case: Case, bias: bool) -> SessionInputs:
    """The inputs of a case; ``bias`` is that of a basic kind."""
    if kind in SPECIAL_KINDS:
        inputs = SPECIAL[kind](Draw(case, kind))
        there = dict(list(inputs.adapters.items())[: case.fixed.adapters])
        return replace(inputs, adapters=there)
    several, _ = draw_several(in_exact_lane(case), SIZES[:5], RANKS[:1], ROWS[:1])
    first = several.adapters[0]
    b = case.rng().integers(-2, 3, len(first.W)) if bias and kind != "embedding" else None
    W = np.ascontiguousarray(first.W.T) if kind == "embedding" else first.W
    layer = {"kind": kind, "W": W}
    if b is not None:
        layer["bias"] = b.astype(first.W.dtype)
    x = np.arange(7) * 5 % len(W) if kind == "embedding" else first.x  # some rows twice
    adapters = {
        name: {"A": adapter.A, "B": adapter.B, **adapter.merge_options()}
        for name, adapter in zip(NAMES, several.adapters, strict=False)
    }
    return SessionInputs(layer, adapters, x, first.dy)


class Draw:
    """Draws the arrays of the special kinds."""

    def __init__(self, case: Case, kind: str) -> None:
        self.kind, self.number = kind, case.number
        self.rng, self.dtype, self.fixed = case.rng(), DTYPES[case.dtype], case.fixed

    def integers(self, *shape: int) -> Array:
        """±1, and ±2 where the table is not tied."""
        signs = self.rng.choice([-1, 1], shape)
        most = 1 if self.kind == "tied" else 2
        return (signs * self.rng.integers(1, most + 1, shape)).astype(self.dtype)

    def adapter(self, n: int, m: int, r: int, blocks: int = 1) -> Entries:
        """A, B and a scale that is a power of two, by rsLoRA where r is 4."""
        s = float(self.rng.choice([0.5, 1.0] if self.kind == "tied" else [0.5, 2.0, 4.0]))
        if self.fixed.alpha is not None or self.fixed.ranks:
            r, only = self.fixed.exact(r)
            s = s if only is None else only
        factors = {"A": self.integers(blocks * r, n), "B": self.integers(m, r), "r": r}
        if r == 4 and "use_rslora" not in self.fixed.lacking and self.fixed.alpha is None:
            return factors | {"use_rslora": True, "alpha": 2 * s}
        return factors | {"alpha": s * r}


def _fused(draw: Draw) -> SessionInputs:
    """Adapters on some of the projections of one weight."""
    (rows, masks), n = FUSED[draw.number % len(FUSED)], 5
    layer = {"kind": "fused", "W": draw.integers(sum(rows), n), "rows": list(rows)}
    adapters = {}
    for name, mask, r in zip(NAMES, masks, (2, 4, 1), strict=True):
        enable = [digit == "1" for digit in mask]
        m = sum(size for size, on in zip(rows, enable, strict=True) if on)
        adapters[name] = draw.adapter(n, m, r, sum(enable)) | {"enable": enable}
    return SessionInputs(layer, adapters, draw.integers(6, n), draw.integers(6, sum(rows)))


def _tied(draw: Draw) -> SessionInputs:
    """An adapter of the embedding, one of the head, and one of both."""
    v, d = 6, 4
    layer = {"kind": "tied", "W": draw.integers(v, d)}
    adapters = {
        "one": draw.adapter(v, d, 2) | {"on": "embedding"},
        "two": draw.adapter(d, v, 4) | {"on": "head"},
        "onetwo": draw.adapter(v, d, 1) | {"on": "both"},
    }
    return SessionInputs(layer, adapters, np.arange(7) * 5 % v, draw.integers(7, v))


def _with_vector(draw: Draw, kind: str) -> SessionInputs:
    """Adapters of which two bring a vector of this name, on a layer of this kind."""
    n, m = 5, 4
    layer = {"kind": kind, "W": draw.integers(m, n), "bias": draw.integers(m)}
    adapters = {name: draw.adapter(n, m, r) for name, r in zip(NAMES, (2, 4, 1), strict=True)}
    for name in ("one", "two"):
        adapters[name] |= {kind: draw.integers(m)}
    return SessionInputs(layer, adapters, draw.integers(6, n), draw.integers(6, m))


def _with_head(draw: Draw) -> SessionInputs:
    """Adapters of which two bring a head."""
    n, m, out = 5, 4, 3
    layer: Entries = {"kind": "full", "W": draw.integers(m, n), "bias": draw.integers(m)}
    adapters = {name: draw.adapter(n, m, r) for name, r in zip(NAMES, (2, 4, 1), strict=True)}
    layer["head"] = {"W": draw.integers(out, m), "bias": draw.integers(out)}
    for name in ("one", "two"):
        adapters[name] |= {"head": {"W": draw.integers(out, m), "bias": draw.integers(out)}}
    return SessionInputs(layer, adapters, draw.integers(6, n), draw.integers(6, out))


_ROW = np.array([1, 1, 1, 2, 3])
"""A row of norm 4. It keeps it where a 1 becomes -1, and has norm 8 where a 1 becomes ±7, or two
become ±5."""


def _dora(draw: Draw) -> SessionInputs:
    """LoRA as "one", and two of DoRA, whose V = W + s B A has rows of norm 4 or 8, as W of 4.

    Every row of W is `_ROW` in one order with signs, and s B A changes r of its ones: A's rows
    select their columns, and an integer matrix of determinant 1 mixes the ranks. A step of training
    with `SessionInputs.one_token` reaches the magnitude alone, so that the norms stay as they are:
    A takes nothing of its entry of x, and B's row of its entry of dy is 0.
    """
    m, n = 5, len(_ROW)
    order = draw.rng.permutation(n)
    W = np.sign(draw.integers(m, n)) * _ROW[order].astype(draw.integers(1).dtype)
    adapters = {"one": draw.adapter(n, m, 2)}
    for name, r in (("two", 1), ("onetwo", 2)):
        s = float(draw.rng.choice([0.5, 2.0]))
        s = draw.fixed.alpha_of(s * r, r) / r
        ones = np.flatnonzero(_ROW[order] == 1)
        columns = draw.rng.permutation(ones[ones != 1])[:r]
        grows = np.arange(m)[:, None] % 2 == draw.rng.integers(2)
        signs = draw.rng.choice([-1, 1], (m, r))
        V = np.where(grows, (7, 5)[r - 1] * signs, -W[:, columns]).astype(W.dtype)
        V[-2] = W[-2, columns]
        mixed = np.eye(r, dtype=W.dtype) + np.triu(np.ones((r, r), W.dtype), 1)
        A = mixed @ np.eye(n, dtype=W.dtype)[columns]
        B = ((V - W[:, columns]) / s @ np.linalg.inv(mixed).round()).astype(W.dtype)
        adapters[name] = {
            "A": A,
            "B": B,
            "r": r,
            "alpha": s * r,
            "use_dora": True,
            "magnitude": draw.rng.choice([1, 2, 8], m).astype(W.dtype),
        }
    layer = {"kind": "linear", "W": W, "bias": draw.integers(m)}
    return SessionInputs(layer, adapters, draw.integers(6, n), draw.integers(6, m))


SPECIAL: dict[str, Callable[[Draw], SessionInputs]] = {
    "fused": _fused,
    "tied": _tied,
    "bias": partial(_with_vector, kind="bias"),
    "full": _with_head,
    "dora": _dora,
    "lora-bias": partial(_with_vector, kind="lora_bias"),
}


def wide(value: Any) -> Any:
    """The same with its floating-point arrays in float64."""
    if isinstance(value, Mapping):
        return {key: wide(entry) for key, entry in value.items()}
    is_float = isinstance(value, np.ndarray) and value.dtype.kind == "f"
    return value.astype(np.float64) if is_float else value
