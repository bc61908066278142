"""Several adapters of one projection: active together, one per column, or combined into one.

An `AdaptedLayer` is a value: the frozen layer, its named adapters, which of them act. Its methods
return another value or an answer, and change nothing. Everything follows from one sentence: *y is
the base's output plus the branch of every active adapter, or the base's alone while disabled*, with
each branch y_i - (W x + b) on W itself. A merge changes how that is computed and never what it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from minilora.spec.lora import LORA, Variant
from minilora.spec.ops import Array, Back, linear, python_scalar
from minilora.spec.variants import LORA_BIAS, extended, part_shapes


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter's parameters, its scale s and its variant."""

    parts: tuple[Array, ...]
    s: Any
    variant: Variant = LORA

    def _below(self, W: Array, b: Array | None) -> tuple[Array, Array | None]:
        """The weight for branch and change: 0 if the variant is additive, which rounds nothing."""
        return (np.zeros_like(W), None) if self.variant.additive else (W, b)

    def branch(
        self, x: Array, W: Array, b: Array | None, K: Array | None = None
    ) -> tuple[Array, Back]:
        """f(x, W, b, P, s, K) - (W x + b): what the adapter adds to the base's output.

        ``back(dy)`` returns the branch's part of dx and the gradient of each parameter.

        Shapes: x (n, t), W (m, n), b (m, 1), K (n, t) -> branch (m, t).
        """
        W, b = self._below(W, b)
        y, back_y = self.variant.linear(x, W, b, *self.parts, self.s, K)
        base, back_base = linear(x, W, b)

        def back(dy: Array) -> tuple[Array, ...]:
            dx, *gradients = back_y(dy)
            return dx - back_base(dy), *gradients

        return y - base, back

    def change(self, W: Array, b: Array | None) -> tuple[Array, Array | None]:
        """ΔW = W' - W and Δb = b' - b of the variant's merge; Δb is None without a bias.

        Shapes: W (m, n), b (m, 1) -> ΔW (m, n), Δb (m, 1).
        """
        W, b = self._below(W, b)
        merged, bias = self.variant.merge(W, b, *self.parts, self.s)
        return merged - W, bias if b is None or bias is None else bias - b

    def check(self, W: Array) -> None:
        """Errors: ValueError unless the parameters have the variant's shapes on W."""
        shapes = [part.shape for part in self.parts]
        r = shapes[0][0] if shapes else 1
        expected = part_shapes(self.variant, r, *W.shape)
        if shapes != list(expected.values()):
            text = ", ".join(f"{part} {shape}" for part, shape in expected.items())
            raise ValueError(f"parameters {shapes} on W {W.shape}: expected {text}")


def with_changes(
    W: Array, b: Array | None, adapters: Sequence[Adapter]
) -> tuple[Array, Array | None]:
    """W' = W + Σᵢ ΔWᵢ and b' = b + Σᵢ Δbᵢ, each change taken on W itself: the order is no matter.

    Shapes: W (m, n), b (m, 1) -> W' (m, n), b' (m, 1).
    """
    changes = [adapter.change(W, b) for adapter in adapters]
    biases = [c for c in (b, *(db for _, db in changes)) if c is not None]
    return sum((dW for dW, _ in changes), start=W), sum(biases[1:], biases[0]) if biases else None


@dataclass(frozen=True, eq=False)
class AdaptedLayer:
    """A layer W, b, its adapters by name, the active ones, the merged ones, and the switch.

    ``active`` and ``merged`` are in the order of the calls, in which the changes are added;
    ``merged`` is a subset of ``active``. W and b never change: the merged weight is formed from
    them, never by subtraction. So unmerging restores the bits, in any order, even if the adapter
    was scaled, replaced or deleted since. There is no training mode: training only adds K, an
    argument of `forward`.
    """

    W: Array
    b: Array | None = None
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    disabled: bool = False

    def _known(self, *names: str) -> tuple[str, ...]:
        for name in names:
            if name not in self.adapters:
                there = ", ".join(map(repr, self.adapters))
                expected = f"expected one of {there}" if there else "the layer has none"
                raise ValueError(f"no adapter {name!r}: {expected}; add it first")
        if len(set(names)) < len(names):
            raise ValueError(f"{names}: expected each adapter once; its weight is in its scale")
        return names

    def add(self, name: str, adapter: Adapter) -> "AdaptedLayer":
        """Add an adapter, inactive: no output changes.

        Errors: ValueError if the name is taken, or the shapes do not fit W.
        """
        if name in self.adapters:
            raise ValueError(f"there is an adapter {name!r} already: swap or delete it")
        adapter.check(self.W)
        return replace(self, adapters={**self.adapters, name: adapter})

    def delete(self, name: str) -> "AdaptedLayer":
        """Delete the adapter. It is unmerged first, and no other becomes active.

        A merged change that stayed could not be undone, since it would have no name.

        Errors: ValueError if there is none of that name.
        """
        self._known(name)
        rest = self.activate(*(other for other in self.active if other != name))
        return replace(rest, adapters={n: a for n, a in self.adapters.items() if n != name})

    def rename(self, old: str, new: str) -> "AdaptedLayer":
        """Rename the adapter, wherever its name stands: no output changes.

        Errors: ValueError if there is none of the old name, or another of the new.
        """
        self._known(old)
        if new != old and new in self.adapters:
            raise ValueError(f"there is an adapter {new!r} already: delete it or choose another")

        def named(names: Sequence[str]) -> tuple[str, ...]:
            return tuple(new if name == old else name for name in names)

        adapters = dict(zip(named(tuple(self.adapters)), self.adapters.values(), strict=True))
        return replace(
            self, adapters=adapters, active=named(self.active), merged=named(self.merged)
        )

    def activate(self, *names: str) -> "AdaptedLayer":
        """Make these adapters, and no others, active; others that are merged are unmerged.

        Errors: ValueError for an unknown name, or one given twice.
        """
        self._known(*names)
        return replace(self, active=names, merged=tuple(n for n in self.merged if n in names))

    def disable(self) -> "AdaptedLayer":
        """Switch all adapters off, merged ones too; `enable` switches them on again."""
        return replace(self, disabled=True)

    def enable(self) -> "AdaptedLayer":
        """Switch the active adapters on."""
        return replace(self, disabled=False)

    def swap(self, name: str, adapter: Adapter) -> "AdaptedLayer":
        """Replace the adapter of this name; it stays merged or active. Rank and variant may differ.

        Errors: ValueError if there is none of that name, or the shapes do not fit W.
        """
        self._known(name)
        adapter.check(self.W)
        return replace(self, adapters={**self.adapters, name: adapter})

    def set_scale(self, name: str, s: Any) -> "AdaptedLayer":
        """Set the adapter's scale to s; it is not multiplied with the old scale.

        Errors: ValueError if there is none of that name.
        """
        self._known(name)
        return self.swap(name, replace(self.adapters[name], s=python_scalar(s)))

    def merge(self, *names: str) -> "AdaptedLayer":
        """Merge these adapters, or all active ones, into the weight: no output changes.

        Errors: ValueError if one is not active or is merged already, or if there is none to merge.
        """
        names = names or tuple(name for name in self.active if name not in self.merged)
        for name in self._known(*names):
            if name not in self.active or name in self.merged:
                why = "merged already" if name in self.merged else "not active; activate it first"
                raise ValueError(f"adapter {name!r} is {why}")
        if not names:
            raise ValueError("no adapter to merge: expected one that is active and not merged")
        return replace(self, merged=self.merged + names)

    def unmerge(self, *names: str) -> "AdaptedLayer":
        """Unmerge these adapters, or all, in any order; without merged ones the weight is W itself.

        Errors: ValueError if one is not merged, or none is.
        """
        gone = self._known(*names) or self.merged
        if not gone or not set(gone) <= set(self.merged):
            there = ", ".join(map(repr, self.merged)) or "there is none"
            raise ValueError(f"unmerge {names or 'all'}: expected merged adapters, {there}")
        return replace(self, merged=tuple(name for name in self.merged if name not in gone))

    def stored(self) -> tuple[Array, Array | None]:
        """The stored weight and bias, with the merged changes; W and b if none, or if disabled."""
        names = () if self.disabled else self.merged
        return with_changes(self.W, self.b, [self.adapters[name] for name in names])

    def weight(self) -> tuple[Array, Array | None]:
        """W' and b' with all active changes: W' x + b' is `forward`'s output without K."""
        names = () if self.disabled else self.active
        return with_changes(self.W, self.b, [self.adapters[name] for name in names])

    def forward(self, x: Array, keep: Mapping[str, Array] | None = None) -> tuple[Array, Back]:
        """The stored layer's output plus the branch of each active adapter that is not merged.

        ``keep`` has the dropout multiplier K of a branch's input, by the adapter's name.
        ``back(dy)`` returns dx and, by name, the gradients of each branch's parameters; merged
        adapters are constant.

        Shapes: x (n, t) -> y (m, t).
        Errors: ValueError if ``keep`` names a merged adapter.
        """
        keep = keep or {}
        for name in self._known(*keep):
            if name in self.merged:
                raise ValueError(f"K of adapter {name!r}, which is merged: unmerge it to train")
        stored, back_stored = linear(x, *self.stored())
        names = () if self.disabled else [n for n in self.active if n not in self.merged]
        branches = {
            name: self.adapters[name].branch(x, self.W, self.b, keep.get(name)) for name in names
        }
        y = sum((branch for branch, _ in branches.values()), start=stored)

        def back(dy: Array) -> tuple[Array, dict[str, tuple[Array, ...]]]:
            dx, gradients = back_stored(dy), {}
            for name, (_, back_branch) in branches.items():
                dx_branch, *parts = back_branch(dy)
                dx, gradients[name] = dx + dx_branch, tuple(parts)
            return dx, gradients

        return y, back


def multi_linear(
    x: Array,
    W: Array,
    b: Array | None,
    adapters: Sequence[Adapter],
    index: Array,
    K: Array | None = None,
) -> tuple[Array, Back]:
    """y_j = W x_j + b + branch_i(x_j), i = index_j: an adapter for each column, or -1 for none.

    A column without an adapter has the base's y and dx, bit for bit. ``back(dy)`` returns dx and,
    for each adapter, a tuple of its parameters' gradients, 0 if no column uses it.

    Shapes: x (n, t), W (m, n), b (m, 1), index (t,), K (n, t) -> y (m, t).
    Errors: ValueError if index has another length, or names no adapter.
    Source: ``adapter_names`` of PEFT; Chen et al. 2023, "Punica", for serving.
    """
    if index.shape != x.shape[1:] or not np.isin(index, range(-1, len(adapters))).all():
        expected = f"{x.shape[1]} numbers from -1 to {len(adapters) - 1}"
        raise ValueError(f"index {index.tolist()}: expected {expected}, a column's adapter or -1")
    base, back_base = linear(x, W, b)
    groups = [np.flatnonzero(index == i) for i in range(-1, len(adapters))]
    place = np.argsort(np.concatenate(groups))  # where a column stands, group after group
    pairs = [
        adapter.branch(x[:, group], W, b, None if K is None else K[:, group])
        for adapter, group in zip(adapters, groups[1:], strict=True)
    ]

    def joined(base: Array, parts: Sequence[Array]) -> Array:
        """The sum of base and branch of each group's columns, in the original order."""
        sums = [base[:, group] + part for group, part in zip(groups[1:], parts, strict=True)]
        return np.concatenate([base[:, groups[0]], *sums], axis=1)[:, place]

    def back(dy: Array) -> tuple[Any, ...]:
        branches = [back_i(dy[:, g]) for (_, back_i), g in zip(pairs, groups[1:], strict=True)]
        dx = joined(back_base(dy), [dx for dx, *_ in branches])
        return dx, *(tuple(dP) for _, *dP in branches)

    return joined(base, [branch for branch, _ in pairs]), back


def factors(adapter: Adapter) -> tuple[Array, Array, Any]:
    """A, B and s with ΔW = s B A.

    Errors: ValueError if ΔW has full rank: combine `Adapter.change` by `combine_svd` instead.
    """
    A, B, _ = _factors(adapter)
    return A, B, adapter.s


def _factors(adapter: Adapter) -> tuple[Array, Array, Array | None]:
    """A, B and c with ΔW = s B A, Δb = s c; c is None without Δb."""
    form = extended(adapter.variant).factors
    if form is None:
        raise ValueError(
            f"the variant with {', '.join(adapter.variant.parts)} changes W by more than s B A: "
            "combine the changes ΔW, not the factors"
        )
    return form(*adapter.parts)


def combine(
    adapters: Sequence[tuple[Array, Array, Any]], weights: Sequence[Any]
) -> tuple[Array, Array]:
    """A, B with B A = Σᵢ wᵢ sᵢ Bᵢ Aᵢ exactly: the Aᵢ stacked, the wᵢ sᵢ Bᵢ side by side.

    The rank is the sum of the ranks; the result's own scale is 1.

    Shapes: Aᵢ (rᵢ, n), Bᵢ (m, rᵢ) -> A (Σ rᵢ, n), B (m, Σ rᵢ).
    Errors: ValueError if there is no adapter, or not one weight for each.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters, {len(weights)} weights: expected one for each")
    A = np.concatenate([A for A, _, _ in adapters])
    scaled = zip(adapters, map(python_scalar, weights), strict=True)
    B = np.concatenate([w * python_scalar(s) * B for (_, B, s), w in scaled], axis=1)
    return A, B


def combine_exact(adapters: Sequence[Adapter], weights: Sequence[Any]) -> Adapter:
    """One adapter with ΔW = Σᵢ wᵢ ΔWᵢ and Δb = Σᵢ wᵢ Δbᵢ, of the summed rank; any sign of w.

    A single adapter keeps its parameters and gets the scale s w; at weight 1 nothing changes.

    Errors: those of `multi_adapter.combine` and of `factors`.
    """
    if len(adapters) == len(weights) == 1 and (weights[0] == 1 or adapters[0].variant.additive):
        return replace(adapters[0], s=python_scalar(weights[0]) * adapters[0].s)
    A, B = combine([factors(adapter) for adapter in adapters], weights)
    biases = [
        python_scalar(w) * adapter.s * c
        for w, adapter in zip(weights, adapters, strict=True)
        if (c := _factors(adapter)[2]) is not None
    ]
    return Adapter((A, B, sum(biases)), 1, LORA_BIAS) if biases else Adapter((A, B), 1)


def _weighted(weights: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
    """The wᵢ Dᵢ."""
    if not arrays or len(arrays) != len(weights):
        raise ValueError(f"{len(arrays)} adapters, {len(weights)} weights: expected one for each")
    return [python_scalar(w) * D for w, D in zip(weights, arrays, strict=True)]


def combine_svd(
    changes: Sequence[Array], weights: Sequence[Any], r: int
) -> tuple[Array, Array, Any]:
    """A and B of rank r with B A nearest to Σᵢ wᵢ ΔWᵢ, and how far: ‖…‖_F = √(Σ_{j>r} σ_j²).

    With Σᵢ wᵢ ΔWᵢ = U σ Vᵀ:   B = U σ, A = Vᵀ of the r greatest σ; s is 1. For every variant.

    Shapes: ΔWᵢ (m, n) -> A (r, n), B (m, r), error ().
    Errors: ValueError if r is not in 1 … min(m, n), or a sum is not finite.
    Source: Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
    """
    D = np.sum(_weighted(weights, changes), axis=0)
    if not np.isfinite(D).all():
        raise ValueError("the changes hold NaN or infinity: their sum has no singular values")
    U, sigma, Vt = np.linalg.svd(D, full_matrices=False)
    if not 1 <= r <= len(sigma):
        raise ValueError(f"rank {r}: expected 1 to {len(sigma)}, the smaller size of the weight")
    return Vt[:r], U[:, :r] * sigma[:r], np.sqrt((sigma[r:] * sigma[r:]).sum())


def combine_linear(
    adapters: Sequence[tuple[Array, Array, Any]], weights: Sequence[Any]
) -> tuple[Array, Array]:
    """A = Σᵢ ±√|wᵢ sᵢ| Aᵢ and B = Σᵢ √|wᵢ sᵢ| Bᵢ, ± the sign of wᵢ sᵢ: one rank, no exact sum.

    B A = Σᵢ wᵢ sᵢ Bᵢ Aᵢ + Σ_{i≠j} ±ⱼ √|wᵢ sᵢ wⱼ sⱼ| Bᵢ Aⱼ: the second sum, the cross terms, pairs
    factors that were never trained together.

    Shapes: Aᵢ (r, n), Bᵢ (m, r) -> A (r, n), B (m, r).
    Errors: ValueError if the ranks differ, or there is not one weight for each.
    Source: "linear" of PEFT's ``add_weighted_adapter``.
    """
    if len({A.shape for A, _, _ in adapters}) != 1:
        raise ValueError(f"ranks {[len(A) for A, _, _ in adapters]}: expected one rank for all")
    products = _weighted(weights, [s for _, _, s in adapters])
    roots = [abs(p) ** 0.5 for p in products]
    signed = [-root if p < 0 else root for p, root in zip(products, roots, strict=True)]
    A = np.sum(_weighted(signed, [A for A, _, _ in adapters]), axis=0)
    return A, np.sum(_weighted(roots, [B for _, B, _ in adapters]), axis=0)


def trim(D: Array, density: Any) -> Array:
    """The ⌊density · size⌋ entries of D of greatest modulus, and 0 for the others.

    Among equal moduli the first ones stay.

    Shapes: D (m, n) -> D' (m, n).
    Errors: ValueError unless 0 ≤ density ≤ 1, and for NaN, which has no modulus.
    Source: Yadav et al. 2023, "TIES-Merging", algorithm 1, step 1; on one array, as in PEFT.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density {density}: expected 0 to 1")
    if (D != D).any():
        raise ValueError("the change holds NaN: expected numbers that can be compared")
    order = np.argsort(-abs(D), axis=None, kind="stable")
    kept = np.zeros(D.size, bool)
    kept[order[: int(density * D.size)]] = True
    return np.where(kept.reshape(D.shape), D, 0)


def ties(
    changes: Sequence[Array], weights: Sequence[Any], density: Any, frequency: bool = False
) -> Array:
    """The mean, entry by entry, of wᵢ Dᵢ over those trimmed Dᵢ that have the elected sign.

    The elected sign is that of Σᵢ Dᵢ, or of the sum of signs with ``frequency``; it is + for a sum
    of 0, which the paper leaves open (its code elects the sign of most entries). The paper has one
    λ for all wᵢ. Weights apply after the election, as in PEFT; to let a weight vote, a negative
    one above all, multiply it into Dᵢ before.

    Shapes: Dᵢ (m, n) -> D (m, n).
    Errors: those of `trim`; ValueError if there is no change, or not one weight for each.
    Source: Yadav et al. 2023, "TIES-Merging", algorithm 1.
    """
    _weighted(weights, changes)  # before anything is stacked
    D = np.stack([trim(change, density) for change in changes])
    signs = np.where(D > 0, 1, np.where(D < 0, -1, 0))
    elected = np.where((signs if frequency else D).sum(0) >= 0, 1, -1)
    agree = signs == elected
    weighted = np.stack(_weighted(weights, list(D)))
    count = np.maximum(agree.sum(0), 1).astype(D.dtype)  # whole numbers would widen float32
    mean: Array = (weighted * agree).sum(0) / count
    return mean


def dare(D: Array, keep: Array, p: Any) -> Array:
    """D' = keep ∘ D / (1 - p), keep ~ Bernoulli(1 - p) drawn before: its mean is D.

    This is dropout of a change, once. A weighted sum follows, or `ties` at density 1.

    Shapes: D (m, n), keep (m, n), p () -> D' (m, n).
    Source: Yu et al. 2023, "Language models are super Mario", its DARE.
    """
    dared: Array = keep * D / (1 - p)
    return dared
