"""How a right merge rounds: the interval of all right merges, entry by entry, and the named ways.

With T = W + Σᵢ ΔWᵢ exact, a right merge computes some Y with |Y - T| ≤ e and stores it rounded:
it lies in [○(T - e), ○(T + e)], ○ the rounding to the dtype of the merged tensor, which is
monotone. `Bound` derives e. A `Way` is one right merge in full, whose bits can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from minilora.audit.change import Change
from minilora.spec.lora import merge_weight
from minilora.spec.ops import Array
from minilora.spec.variants import extended

F32 = np.dtype(np.float32)
F64 = np.dtype(np.float64)


@dataclass(frozen=True)
class Format:
    """A floating-point format: p binary digits, and the exponent of its smallest normal number.

    ``u``: 2⁻ᵖ, the unit roundoff; ``eta``: the distance of the subnormal numbers.
    """

    digits: int
    lowest: int
    largest: float

    @property
    def u(self) -> float:
        """The unit roundoff."""
        return 2.0**-self.digits

    @property
    def eta(self) -> float:
        """The smallest positive number."""
        return 2.0 ** (self.lowest - self.digits + 1)


@cache
def format_of(dtype: Any) -> Format:
    """The format of a floating-point dtype.

    Errors: TypeError for integers.
    """
    dtype = np.dtype(dtype)
    if dtype.kind not in "fV" or dtype.itemsize > 8:
        raise TypeError(f"{dtype}: expected a floating-point dtype of up to 8 bytes")
    info = ml_dtypes.finfo(dtype)
    return Format(int(info.nmant) + 1, int(info.minexp), float(info.max))


def spacing(x: Array, dtype: Any) -> Array:
    """The distance of the dtype's numbers at x: a whole unit in the last place. x in float64."""
    f = format_of(dtype)
    exponent = np.frexp(x)[1]  # |x| in [2ᵉ⁻¹, 2ᵉ)
    gap: Array = np.ldexp(1.0, np.maximum(exponent - f.digits, f.lowest - f.digits + 1))
    return gap


def rounded(x: Array, dtype: Any) -> Array:
    """○(x): x in float64 rounded once to the dtype's nearest number, ties to even; in float64.

    A cast by ml_dtypes would round a float64 twice.
    """
    f = format_of(dtype)
    if f.digits >= 53:
        return x
    gap = spacing(x, dtype)
    y: Array = np.rint(x / gap) * gap  # powers of 2: only rint rounds
    return np.where(abs(y) > f.largest, np.copysign(np.inf, y), y)


def matrix(array: Array) -> Array:
    """A stored tensor, or rows of it, as rows: a kernel is flattened, a vector a column."""
    return array.reshape(len(array), -1)


@dataclass(frozen=True, eq=False)
class LowRank:
    """ΔW = s B A of a change, as factors: the form that `Variant.factors` gives an equation.

    ``columns``: the variant's parameters beside A and B that are multiplied in, each a rounding.
    """

    A: Array
    B: Array
    s: float
    dtype: np.dtype[Any]
    columns: int = 0
    transposed: bool = False
    slack: float = 0.0

    @property
    def r(self) -> int:
        """How many products are added up."""
        return len(self.A)

    def cast(self, dtype: Any) -> LowRank:
        """The same in another dtype."""
        A, B = (np.asarray(part).astype(dtype, copy=False) for part in (self.A, self.B))
        return LowRank(A, B, self.s, self.dtype, self.columns, self.transposed, self.slack)

    def magnitudes(self) -> LowRank:
        """|s| |B| |A|, what roundings are measured by."""
        A, B = abs(self.A), abs(self.B)
        return LowRank(A, B, abs(self.s), self.dtype, self.columns, self.transposed)

    def added(self, W: Array, start: int, stop: int) -> Array:
        """W + ΔW for rows start … stop of the stored matrix, W in the stored layout."""
        s = self.A.dtype.type(self.s)
        if self.transposed:
            return merge_weight(W.T, self.A[:, start:stop], self.B, s).T
        return merge_weight(W, self.A, self.B[start:stop], s)

    def rows(self, start: int, stop: int) -> Array:
        """ΔW itself of these rows."""
        return self.added(self.A.dtype.type(0), start, stop)

    def at(self, i: Array, j: Array) -> Array:
        """ΔW at entries (i, j) of the stored matrix."""
        if self.transposed:
            i, j = j, i
        return self.s * np.einsum("kr,rk->k", self.B[i], self.A[:, j])


def low_rank(change: Change, dtype: Any = F64) -> LowRank:
    """The change as factors, computed in the dtype from the file's numbers.

    A bias's change s c is that of B = c and A = 1.

    Errors: ValueError if the variant's change is of full rank (DoRA), or no change of this kind.
    """
    stored = np.result_type(*change.parts.values())
    if change.kind == "bias":
        c = np.asarray(change.parts["c"]).reshape(-1, 1)
        one = np.ones((1, 1), dtype)
        return LowRank(one, c.astype(dtype), change.s, c.dtype, 0, False, change.slack)
    values = [np.asarray(part).astype(dtype) for part in change.values]
    factors = extended(change.variant).factors
    if factors is None:
        raise ValueError(f"{change.tensor}: the change of {change.variant.parts} has no factors")
    A, B, _ = factors(*values)
    columns = len([p for p in extended(change.variant).columns if p != "c"])
    return LowRank(A, B, change.s, stored, columns, change.transposed, change.slack)


@dataclass(frozen=True, eq=False)
class Bound:
    """e, by which a right merge may miss T before the result is stored.

    What a right merge may do, of each change ΔW = s B A of rank r, with P = |s| |B| |A|, h the
    greatest unit roundoff among the adapter's, base's and merged dtype, w that of base and merged:

    - cast A, B and columns to a coarser dtype of these, form s, s B or s A in it, multiply the
      columns in: n roundings of P, each h (n = 2, and 2 casts where the adapter is finer, and for
      each column one more, or two);
    - round B A, or s B A, to such a dtype, and once more to another: 2 h |ΔW|;
    - add the products and W in float32, in any order: γ_{r + 2} (P + |W|), γ_k = k u / (1 - k u);
    - add change after change, each sum rounded to w: w (|W| + Σ |ΔW|) for each but the last;
    - if base and merged differ in dtype: cast W first, and round the sum to the coarser: again
      w (2 |W| + Σ |ΔW|).

    Where numbers are subnormal each rounding adds eta / 2, multiplied as what it is part of; and an
    arithmetic that flushes to 0 what is subnormal in float32 adds 2⁻¹²⁶ for each product.

    Source: Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1 (γ_k holds in any
    order, with or without fused multiply-add).
    """

    base: np.dtype[Any]
    merged: np.dtype[Any]
    changes: tuple[LowRank, ...]
    magnitudes: tuple[LowRank, ...] = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "magnitudes", tuple(c.magnitudes() for c in self.changes))

    def _delta(self, i: int) -> tuple[float, float, float]:
        """The factors of P and of |ΔW| in change i's bound, and what it adds in all entries."""
        change, sizes = self.changes[i], self.magnitudes[i]
        formats = [format_of(d) for d in (change.dtype, self.base, self.merged)]
        h, eta = max(f.u for f in formats), max(f.eta for f in formats)
        finer = formats[0].u < h
        n = 2 + 2 * finer + change.columns * (1 + finer)
        k, u = change.r + 2, format_of(F32).u
        of_P = (1 + k * u / (1 - k * u)) * (1 + h) ** n - 1
        # A subnormal rounding of an entry of A, B, s B or s A is multiplied with the other factor.
        b, a = sizes.B.sum(1).max(initial=0), sizes.A.sum(0).max(initial=0)
        inner = (max(1, sizes.s) * (a + b) + change.r * eta) * n + 2 + sizes.s
        return of_P, 2 * h, inner * eta / 2 + k * 2.0**-126 * max(1, sizes.s) + change.slack

    @property
    def _sums(self) -> tuple[float, float]:
        """The factors of |W| and of |W| + Σ |ΔW|: roundings of sums before the last."""
        u = format_of(F32).u
        k = max((c.r for c in self.changes), default=0) + 2
        w = max(format_of(self.base).u, format_of(self.merged).u)
        other = self.base != self.merged
        between = len(self.changes) - 1 + other
        return k * u / (1 - k * u) + w * other, w * max(0, between) + 2.0**-24

    def e(self, W: Array, deltas: Sequence[Array], sizes: Sequence[Array]) -> Array:
        """e for entries of W, each change's ΔW and P there; all in float64."""
        of_W, of_sum = self._sums
        w = abs(W)
        total: Array = (of_W + of_sum) * w
        for i, (delta, P) in enumerate(zip(deltas, sizes, strict=True)):
            of_P, of_delta, constant = self._delta(i)
            total = total + of_P * P + (of_delta + of_sum) * abs(delta) + constant
        return total


@dataclass(frozen=True)
class Way:
    """One way to round in a right merge.

    ``factors``: the dtype that A and B are cast to; ``scaled``: where s goes: "after" B A, on "B"
    or on "A"; ``product``: B A, or s B A where s is on a factor, is rounded to it; ``delta``: s B A
    is rounded to it; ``weight``: W is cast to it; ``total``: each sum is rounded to it. Each is
    "adapter", "base", "merged" or "float32": whose dtype. What is not in half precision is
    float32; the last sum is rounded to the merged tensor's dtype.
    """

    name: str
    source: str
    factors: str = "float32"
    scaled: str = "after"
    product: str = "float32"
    delta: str = "float32"
    weight: str = "float32"
    total: str = "base"
    combined: bool = False


WAYS = (
    Way("float32", "added in float32, then cast; PEFT with float32 adapters"),
    Way("delta in the adapter's dtype", "PEFT's get_delta_weight on a CPU", delta="adapter"),
    Way("delta in the base's dtype", "PEFT with safe_merge=True", delta="base"),
    Way("scale on B, in the adapter's dtype", "mlx-lm's fuse", "adapter", "B", "adapter", "base"),
    Way("scale on B, in float32", "mlx-lm's fuse of float32", scaled="B"),
    Way("scale on A, in float32", "W + B (s A)", scaled="A"),
    Way("product in the adapter's dtype", "half precision on a GPU", product="adapter",
        delta="adapter"),
    Way("adapter cast to the base's dtype", "PEFT with autocast_adapter_dtype=False", "base",
        delta="base"),
    Way("product in the base's dtype", "a half-precision model on a GPU", "base", product="base",
        delta="base"),
    Way("base cast first, float32", "a model loaded in the merged dtype", weight="merged",
        total="merged"),
    Way("base cast first, delta too", "a model loaded in the merged dtype, safe_merge=True",
        delta="merged", weight="merged", total="merged"),
    Way("combined first", "the changes added up in float32, then to W", combined=True),
)  # fmt: skip
"""The known ways, the commonest first."""


def _dtype(name: str, adapter: Any, base: Any, merged: Any) -> np.dtype[Any]:
    named = {"adapter": adapter, "base": base, "merged": merged, "float32": F32}
    return np.dtype(named[name])


def _to(x: Array, dtype: np.dtype[Any]) -> Array:
    """x in float32, rounded to the dtype where that is narrower."""
    if dtype.itemsize >= 4:
        return x
    with np.errstate(over="ignore"):
        return x.astype(dtype).astype(F32)


@dataclass(frozen=True, eq=False)
class Replay:
    """A way, ready to merge rows: the factors are cast, and the dtypes known."""

    way: Way
    base: np.dtype[Any]
    merged: np.dtype[Any]
    changes: tuple[LowRank, ...]
    dtypes: tuple[tuple[np.dtype[Any], np.dtype[Any]], ...]

    @staticmethod
    def of(way: Way, base: Any, merged: Any, changes: Sequence[LowRank]) -> Replay:
        """The way for these changes, which are in float32."""
        ready, dtypes = [], []
        for c in changes:
            at = {name: _dtype(getattr(way, name), c.dtype, base, merged)
                  for name in ("factors", "product", "delta")}  # fmt: skip
            A, B, s = _to(c.A, at["factors"]), _to(c.B, at["factors"]), c.s
            if way.scaled == "B":
                B, s = _to(F32.type(s) * B, at["factors"]), 1.0
            elif way.scaled == "A":
                A, s = _to(F32.type(s) * A, at["factors"]), 1.0
            ready.append(LowRank(A, B, s, c.dtype, c.columns, c.transposed))
            dtypes.append((at["product"], at["delta"]))
        return Replay(way, np.dtype(base), np.dtype(merged), tuple(ready), tuple(dtypes))

    def deltas(self, start: int, stop: int) -> list[Array]:
        """Each change's rows in float32, rounded as the way does."""
        return [self._one(i, start, stop) for i in range(len(self.changes))]

    def rows(self, W: Array, deltas: Sequence[Array]) -> Array:
        """The merged rows in the merged dtype, of the base's rows in float32 and the changes'."""
        total = _dtype(self.way.total, F32, self.base, self.merged)
        V = _to(W, _dtype(self.way.weight, F32, self.base, self.merged))
        if self.way.combined and deltas:
            deltas = [sum(deltas[1:], deltas[0])]
        for i, delta in enumerate(deltas):
            V = V + delta
            if i < len(deltas) - 1 or total != self.merged:
                V = _to(V, total)
        with np.errstate(over="ignore"):
            return V.astype(self.merged)

    def _one(self, i: int, start: int, stop: int) -> Array:
        change, (product, delta) = self.changes[i], self.dtypes[i]
        if product.itemsize >= 4 or change.s == 1:
            return _to(_to(change.rows(start, stop), product), delta)
        alone = LowRank(change.A, change.B, 1.0, change.dtype, 0, change.transposed)
        return _to(F32.type(change.s) * _to(alone.rows(start, stop), product), delta)
