"""Several adapters of one projection: what they mean together, one by one, per column, combined.

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
    """The parameters of an adapter, its scale s and the variant that says what they mean."""

    parts: tuple[Array, ...]
    s: Any
    variant: Variant = LORA

    def _below(self, W: Array, b: Array | None) -> tuple[Array, Array | None]:
        """The layer that branch and change are taken on: 0 if additive, so that nothing rounds."""
        return (np.zeros_like(W), None) if self.variant.additive else (W, b)

    def branch(
        self, x: Array, W: Array, b: Array | None, K: Array | None = None
    ) -> tuple[Array, Back]:
        """f(x, W, b, P, s, K) - (W x + b): what the adapter adds to the base's output.

        ``back(dy)`` gives the branch's part of dx and a gradient for each of the parameters P.

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
        """ΔW = W' - W and Δb = b' - b of the variant's merge; no Δb where there is no bias.

        Shapes: W (m, n), b (m, 1) -> ΔW (m, n), Δb (m, 1).
        """
        W, b = self._below(W, b)
        merged, bias = self.variant.merge(W, b, *self.parts, self.s)
        return merged - W, bias if b is None or bias is None else bias - b

    def check(self, W: Array) -> None:
        """Raise ValueError unless the parameters are the variant's, in its shapes on W."""
        found = [part.shape for part in self.parts]
        r = found[0][0] if found else 1
        wanted = part_shapes(self.variant, r, *W.shape)
        if found != list(wanted.values()):
            expected = ", ".join(f"{part} {shape}" for part, shape in wanted.items())
            raise ValueError(f"parameters {found} on W {W.shape}: expected {expected}")


def with_changes(
    W: Array, b: Array | None, adapters: Sequence[Adapter]
) -> tuple[Array, Array | None]:
    """W' = W + Σᵢ ΔWᵢ and b' = b + Σᵢ Δbᵢ, each change taken on W itself: no order matters.

    Shapes: W (m, n), b (m, 1) -> W' (m, n), b' (m, 1).
    """
    changes = [adapter.change(W, b) for adapter in adapters]
    biases = [c for c in (b, *(db for _, db in changes)) if c is not None]
    return sum((dW for dW, _ in changes), start=W), sum(biases[1:], biases[0]) if biases else None


@dataclass(frozen=True, eq=False)
class AdaptedLayer:
    """A layer W, b, its adapters by name, those that act, those of them merged, and the switch.

    ``active`` and ``merged`` are in the order of their calls, which is only the order of additions;
    ``merged`` is a part of ``active``. W and b are the base's own for ever, so that what is stored
    is formed from them and never by subtraction: unmerging restores the bits, in any order, also if
    the adapter has since been scaled, replaced or deleted. There is no flag for training: all that
    it changes is K, which whoever trains gives to `forward`.
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
                expected = f"one of {there}" if there else "one that is there, and there is none"
                raise ValueError(f"no adapter {name!r}: expected {expected}; add it first")
        if len(set(names)) < len(names):
            raise ValueError(f"{names}: expected each adapter once; its weight is in its scale")
        return names

    def add(self, name: str, adapter: Adapter) -> "AdaptedLayer":
        """Another adapter, not active yet: adding changes no output.

        Errors: ValueError if the name is taken, or the shapes do not fit W.
        """
        if name in self.adapters:
            raise ValueError(f"there is an adapter {name!r} already: swap or delete it")
        adapter.check(self.W)
        return replace(self, adapters={**self.adapters, name: adapter})

    def delete(self, name: str) -> "AdaptedLayer":
        """Without the adapter; it acts no longer, merged or not, and no other acts in its stead.

        Were a merged change to stay, nothing could name it, and nothing undo it.

        Errors: ValueError if there is none of that name.
        """
        self._known(name)
        rest = self.activate(*(other for other in self.active if other != name))
        return replace(rest, adapters={n: a for n, a in self.adapters.items() if n != name})

    def rename(self, old: str, new: str) -> "AdaptedLayer":
        """The same adapter under another name, in all its places: no output changes.

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
        """Just these act, several or none; a merged one that is not among them is unmerged.

        Errors: ValueError if there is none of a name, or a name comes twice.
        """
        self._known(*names)
        return replace(self, active=names, merged=tuple(n for n in self.merged if n in names))

    def disable(self) -> "AdaptedLayer":
        """The base alone acts, whatever is active or merged; `enable` has it all act again."""
        return replace(self, disabled=True)

    def enable(self) -> "AdaptedLayer":
        """What is active acts."""
        return replace(self, disabled=False)

    def swap(self, name: str, adapter: Adapter) -> "AdaptedLayer":
        """Another adapter under this name, of any rank and variant; merged or active as it was.

        Errors: ValueError if there is none of that name, or the shapes do not fit W.
        """
        self._known(name)
        adapter.check(self.W)
        return replace(self, adapters={**self.adapters, name: adapter})

    def set_scale(self, name: str, s: Any) -> "AdaptedLayer":
        """s itself, no factor on what it was: done twice it is done once.

        Errors: ValueError if there is none of that name.
        """
        self._known(name)
        return self.swap(name, replace(self.adapters[name], s=python_scalar(s)))

    def merge(self, *names: str) -> "AdaptedLayer":
        """These, or all that are active, stored in the weight: no output changes.

        Errors: ValueError if one is not active, since it would begin to act; if one is merged
        already, since it would count twice; if there is none to merge.
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
        """These, or all, no longer in the weight, in any order; what no adapter is in is W itself.

        Errors: ValueError if one is not merged, or none is.
        """
        gone = self._known(*names) or self.merged
        if not gone or not set(gone) <= set(self.merged):
            there = ", ".join(map(repr, self.merged)) or "there is none"
            raise ValueError(f"unmerge {names or 'all'}: expected merged adapters, {there}")
        return replace(self, merged=tuple(name for name in self.merged if name not in gone))

    def stored(self) -> tuple[Array, Array | None]:
        """The layer with what is merged: W and b themselves if nothing is, or while disabled."""
        names = () if self.disabled else self.merged
        return with_changes(self.W, self.b, [self.adapters[name] for name in names])

    def weight(self) -> tuple[Array, Array | None]:
        """W' and b' of all that acts: W' x + b' is `forward`'s output, without K."""
        names = () if self.disabled else self.active
        return with_changes(self.W, self.b, [self.adapters[name] for name in names])

    def forward(self, x: Array, keep: Mapping[str, Array] | None = None) -> tuple[Array, Back]:
        """The stored layer's output and the branch of each active adapter that is not merged.

        ``keep`` has a multiplier K of a branch's input by the adapter's name. ``back(dy)`` gives dx
        and {name: the gradients of its parameters} of those branches; what is merged is constant.

        Shapes: x (n, t) -> y (m, t).
        Errors: ValueError if ``keep`` names an adapter that is merged: a weight has no branch.
        """
        keep = keep or {}
        for name in self._known(*keep):
            if name in self.merged:
                raise ValueError(f"K of adapter {name!r}, which is merged: unmerge it to train")
        own, back_own = linear(x, *self.stored())
        names = () if self.disabled else [n for n in self.active if n not in self.merged]
        branches = {
            name: self.adapters[name].branch(x, self.W, self.b, keep.get(name)) for name in names
        }
        y = sum((branch for branch, _ in branches.values()), start=own)

        def back(dy: Array) -> tuple[Array, dict[str, tuple[Array, ...]]]:
            dx, gradients = back_own(dy), {}
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
    """y_j = W x_j + b + branch_i(x_j), i = index_j: a column has an adapter of its own; -1: none.

    A column without one is the base's to the bit, and so is its dx. ``back(dy)`` gives dx and for
    each adapter a tuple of its parameters' gradients, 0 for one that no column has.

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
        adapter.branch(x[:, own], W, b, None if K is None else K[:, own])
        for adapter, own in zip(adapters, groups[1:], strict=True)
    ]

    def joined(whole: Array, parts: Sequence[Array]) -> Array:
        """Each group's columns of the whole and its part in sum, back in their order."""
        sums = [whole[:, own] + part for own, part in zip(groups[1:], parts, strict=True)]
        return np.concatenate([whole[:, groups[0]], *sums], axis=1)[:, place]

    def back(dy: Array) -> tuple[Any, ...]:
        own = [back_i(dy[:, g]) for (_, back_i), g in zip(pairs, groups[1:], strict=True)]
        return joined(back_base(dy), [dx for dx, *_ in own]), *(tuple(dP) for _, *dP in own)

    return joined(base, [branch for branch, _ in pairs]), back


def factors(adapter: Adapter) -> tuple[Array, Array, Any]:
    """A, B and s with ΔW = s B A.

    Errors: ValueError if the variant has none: work on `Adapter.change`, as `combine_svd` does.
    """
    A, B, _ = _factors(adapter)
    return A, B, adapter.s


def _factors(adapter: Adapter) -> tuple[Array, Array, Array | None]:
    """A, B and c with ΔW = s B A, Δb = s c; c is None without Δb."""
    form = extended(adapter.variant).factors
    if form is None:
        raise ValueError(
            f"a variant of {', '.join(adapter.variant.parts)} changes W by more than s B A: "
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

    One alone keeps its parameters and becomes s w; at weight 1 it is itself, for every variant.

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

    Of equal moduli the first in D's order stay.

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

    Elected is the sign of Σᵢ Dᵢ, or of the sum of signs with ``frequency``; + for a sum of 0, where
    the paper says nothing and its code elects the sign of most entries. The paper's one λ is every
    wᵢ; a weight acts after the election, as in PEFT: one that is to vote, a negative one first of
    all, is to be multiplied into its Dᵢ beforehand.

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
    """D' = keep ∘ D / (1 - p), keep ~ Bernoulli(1 - p) drawn beforehand: D in the mean.

    It is dropout of a change, once. What follows is a weighted sum, or `ties` at density 1.

    Shapes: D (m, n), keep (m, n), p () -> D' (m, n).
    Source: Yu et al. 2023, "Language models are super Mario", its DARE.
    """
    dared: Array = keep * D / (1 - p)
    return dared
