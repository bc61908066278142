"""How a right merge rounds: the interval of all right merges, entry by entry, and the named ways.

With T = W + Σᵢ ΔWᵢ exact, a right merge computes some Y with |Y - T| ≤ e and stores it rounded:
it lies in [○(T - e), ○(T + e)], ○ the rounding to the dtype of the merged tensor, which is
monotone. `Bound` derives e. A `Way` is one right merge in full, whose bits can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from minilora.audit.floats import F32, format_of, on_grid, rounded
from minilora.audit.low_rank import LowRank
from minilora.spec.ops import Array


@dataclass(frozen=True)
class Dtypes:
    """The dtypes in which a right merge may compute: the base's, and the merged tensor's.

    A quantized tensor's numbers may pass through half precision on their way: bfloat16, the
    coarsest, stands for it.
    """

    base: np.dtype[Any]
    merged: np.dtype[Any]

    @property
    def w(self) -> float:
        """The greater unit roundoff of the two."""
        return max(format_of(self.base).u, format_of(self.merged).u)

    @property
    def merged_u(self) -> float:
        """The merged tensor's unit roundoff."""
        return format_of(self.merged).u

    def smallest(self, adapter: Any) -> float:
        """The greatest of the formats' smallest normal numbers."""
        return max(2.0 ** format_of(d).lowest for d in (adapter, self.base, self.merged))

    def named(self, name: str, adapter: Any) -> np.dtype[Any]:
        """The dtype that a way names: adapter, base, merged or float32."""
        names = {"adapter": adapter, "base": self.base, "merged": self.merged, "float32": F32}
        dtype: np.dtype[Any] = np.dtype(names[name])
        return dtype

    def with_adapter(self, dtype: Any) -> tuple[float, float, bool]:
        """The greatest unit roundoff, the greatest eta, and whether the adapter's is finer."""
        formats = [format_of(d) for d in (dtype, self.base, self.merged)]
        h = max(f.u for f in formats)
        return h, max(f.eta for f in formats), formats[0].u < h


def gamma(k: int) -> float:
    """γ_k = k u / (1 - k u) of float32."""
    u = format_of(F32).u
    return k * u / (1 - k * u)


@dataclass(frozen=True, eq=False)
class Bound:
    """e, by which a right merge may miss T = W + Σ ΔW before its result is stored.

    What a right merge may do, of each change ΔW = s B A of rank r, with P = |s| |B| |A|, h the
    greatest unit roundoff among the adapter's, base's and merged dtype, w that of base and merged:

    - cast A, B and columns to a coarser dtype of these, form s, s B or s A in it, multiply the
      columns in: n roundings of P, each h (n = 2, and 2 casts where the adapter is finer, and for
      each column one more, or two);
    - round B A, or s B A, to such a dtype, and once more to another: 2 h |ΔW|;
    - add the products and W in float32, in any order: γ_{r + 2} (P + |W|);
    - add change after change, each sum rounded to w: w (|W| + Σ |ΔW|) for each but the last;
    - if base and merged differ in dtype: cast W first, and round the sum to the coarser: again
      w (2 |W| + Σ |ΔW|).

    An entry of A, B, s A or s B that is subnormal in one of the dtypes is rounded by eta / 2 each
    time, which the other factor multiplies; B A and ΔW likewise, once with s and twice without. An
    arithmetic that flushes to 0 what is subnormal in float32 adds 2⁻¹²⁶ for each product.

    Source: Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1 (γ_k holds in any
    order, with or without fused multiply-add).
    """

    dtypes: Dtypes
    changes: tuple[LowRank, ...]

    @cached_property
    def products(self) -> tuple[LowRank, ...]:
        """P of each change, with what the roundings of its factors add."""
        return tuple(map(self._product, self.changes))

    @cached_property
    def factors(self) -> tuple[tuple[float, float], ...]:
        """The factor of each |ΔW|, and what it adds in all entries."""
        return tuple(map(self._delta, self.changes))

    def _roundings(self, change: LowRank) -> int:
        _, _, finer = self.dtypes.with_adapter(change.dtype)
        return 2 + 2 * finer + change.columns * (1 + finer)

    def relative(self, change: LowRank) -> float:
        """The roundings of A, B, s and of the sum of r products, as a share of |s| |B| |A|."""
        h, _, _ = self.dtypes.with_adapter(change.dtype)
        return (1 + gamma(change.r + 2)) * float((1 + h) ** self._roundings(change)) - 1

    def _product(self, change: LowRank) -> LowRank:
        """What the roundings of the factors and of the sum of r products add, as factors."""
        _, eta, _ = self.dtypes.with_adapter(change.dtype)
        n, A, B, s = self._roundings(change), abs(change.A), abs(change.B), abs(change.s)
        flat = n * max(1, s) * eta / 2
        smallest = self.dtypes.smallest(change.dtype) / min(1, s or 1)
        of_A, of_B = (flat * ((x < smallest) & (x > 0)) for x in (A, B))
        B_error = self.relative(change) * s * B + of_B
        if of_A.any():
            return replace(change, A=np.concatenate([A, of_A]), B=np.hstack([B_error, B]), s=1.0)
        return replace(change, A=A, B=B_error, s=1.0)

    def _delta(self, change: LowRank) -> tuple[float, float]:
        """The factor of |ΔW| in a change's bound, and what it adds in all entries."""
        h, eta, _ = self.dtypes.with_adapter(change.dtype)
        s = max(1, abs(change.s))
        return 2 * h, (2 + s) * eta / 2 + (change.r + 2) * 2.0**-126 * s + change.slack

    @property
    def drift(self) -> float:
        """By what share the roundings of s and of the factors may move all of a change alike.

        s itself by 2 h, unless it and 1 / r are numbers of each dtype. A, B, s A and s B, rounded
        to each, are longer or shorter than they were: all entries of a factor may be rounded to
        one side, subnormal ones by up to half.
        """
        return max(map(self._drift, self.changes), default=0.0)

    def _drift(self, change: LowRank) -> float:
        h, _, _ = self.dtypes.with_adapter(change.dtype)
        dtypes = {np.dtype(change.dtype), self.dtypes.base, self.dtypes.merged}
        s, power_of_2 = np.array([change.s]), change.r & (change.r - 1) == 0
        exact = power_of_2 and all(rounded(s, dtype)[0] == change.s for dtype in dtypes)
        total = 0.0 if exact else 2 * h
        for dtype in dtypes:
            for x in (change.A, change.B, change.s * change.A, change.s * change.B):
                square = float((x * x).sum())
                if square > 0 and dtype.itemsize < 4:
                    total += abs(float((rounded(x, dtype) * x).sum()) / square - 1)
        return total

    @property
    def sums(self) -> tuple[float, float]:
        """The factors of |W| and of |W| + Σ |ΔW|: the roundings of sums before the last."""
        w, other = self.dtypes.w, self.dtypes.base != self.dtypes.merged
        between = max(0, len(self.changes) - 1 + other)
        k = max((c.r for c in self.changes), default=0) + 2
        return gamma(k) + w * other, w * between + format_of(F32).u

    def e(self, W: Array, deltas: Sequence[Array], products: Sequence[Array]) -> Array:
        """e for entries of W, with each change's ΔW and `products` there; all in float64."""
        of_W, of_sum = self.sums
        total: Array = (of_W + of_sum) * abs(W)
        for delta, product, (of_delta, constant) in zip(
            deltas, products, self.factors, strict=True
        ):
            total = total + product + (of_delta + of_sum) * abs(delta) + constant
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


@dataclass(frozen=True, eq=False)
class Replay:
    """A way, ready to merge rows: the factors are cast, and the dtypes known."""

    way: Way
    dtypes: Dtypes
    changes: tuple[LowRank, ...]
    rounds: tuple[tuple[np.dtype[Any], np.dtype[Any]], ...]

    @staticmethod
    def of(way: Way, dtypes: Dtypes, changes: Sequence[LowRank]) -> Replay:
        """The way for these changes, which are in float32."""
        ready, rounds = [], []
        for c in changes:
            factors, product, delta = (
                dtypes.named(name, c.dtype) for name in (way.factors, way.product, way.delta)
            )
            A, B, s = on_grid(c.A, factors), on_grid(c.B, factors), c.s
            if way.scaled == "B":
                B, s = on_grid(F32.type(s) * B, factors), 1.0
            elif way.scaled == "A":
                A, s = on_grid(F32.type(s) * A, factors), 1.0
            ready.append(replace(c, A=A, B=B, s=s))
            rounds.append((product, delta))
        return Replay(way, dtypes, tuple(ready), tuple(rounds))

    @property
    def name(self) -> str:
        """The way's name."""
        return self.way.name

    @property
    def grid(self) -> np.dtype[Any]:
        """The dtype that the merged rows are rounded to at last."""
        return self.dtypes.merged

    def play(self, W: Array, i: int, j: int) -> tuple[Array, list[Array]]:
        """The merged rows before their last rounding, and what each change adds; in float32."""
        deltas = [self._one(k, i, j) for k in range(len(self.changes))]
        total = self.dtypes.named(self.way.total, F32)
        V = on_grid(W, self.dtypes.named(self.way.weight, F32))
        for k, delta in enumerate([sum(deltas[1:], deltas[0])] if self.way.combined else deltas):
            V = V + delta
            if k < len(deltas) - 1 or total != self.dtypes.merged:
                V = on_grid(V, total)
        return V, deltas

    def _one(self, i: int, start: int, stop: int) -> Array:
        change, (product, delta) = self.changes[i], self.rounds[i]
        if product.itemsize >= 4 or change.s == 1:
            return on_grid(on_grid(change.rows(start, stop), product), delta)
        alone = replace(change, s=1.0)
        return on_grid(F32.type(change.s) * on_grid(alone.rows(start, stop), product), delta)


def reach(scheme: str, gap: Array, M: Array) -> Array:
    """How far a right quantizer may leave the numbers M from what it was given.

    ``gap``: the distance of the numbers that it can store. Half of it, and by scheme: Q8_0 keeps
    d rounded to float16, which 127 codes multiply; Q4_0's entry opposite to the greatest may miss
    by a step; Q4_1 rounds d, m too; NF4's scales may be quantized in 8 bits, of whose table two
    neighbours differ by a share of 1/14 at most; MLX rounds the scale to half precision after the
    codes are chosen, and moves the range so that its greater end is met: the other end may miss by
    a step. Of others a whole step.
    """
    half, size = 2.0**-11, abs(M)
    if scheme == "q8_0":
        return (0.5 + 127 * half + 2.0**-16) * gap + 127 * 2.0**-25
    if scheme == "q4_0":
        return (1 + 8 * half + 2.0**-16) * gap + 8 * 2.0**-25
    if scheme == "q4_1":
        return (0.5 + 30 * half + 2.0**-16) * gap + half * size + 16 * 2.0**-25
    if scheme.startswith("nf4"):
        return 0.5 * gap + size / 14
    if scheme.startswith("mlx"):
        b = int("".join(filter(str.isdigit, scheme)) or 4)
        return (1.5 + 2.0 ** (b - 9)) * gap
    return gap
