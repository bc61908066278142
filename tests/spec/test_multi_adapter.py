"""Several adapters: what they mean by a second definition, their life as a state machine, combined.

The second definition is a list of what acts, evaluated from scratch entry by entry; it knows of no
merge. Over the rationals the two agree with ``==``, and each state wrong on purpose is refused.
"""

import itertools
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
from calculus import (
    GRADIENT,
    UNIT_ROUNDOFF,
    derivative,
    gamma,
    record_worst,
    relative_error,
    same_bits,
)
from extras import optional
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from marks import examples
from test_guards import captured_and_bound_again, check_shapes
from test_lora import equal

from minilora import testing as draw
from minilora.spec import multi_adapter as module
from minilora.spec.lora import LORA
from minilora.spec.multi_adapter import (
    AdaptedLayer,
    Adapter,
    combine,
    combine_exact,
    combine_linear,
    combine_svd,
    dare,
    factors,
    multi_linear,
    ties,
    trim,
    with_changes,
)
from minilora.spec.ops import linear
from minilora.spec.variants import ADALORA, LORA_BIAS, REGISTRY, VERA, extended, part_shapes

EXACT = examples(3)
RATIONAL = {"lora": LORA, "lora-bias": LORA_BIAS, "vera": VERA, "adalora": ADALORA}
M, N, T = 2, 3, 2


def odd(rng, shape):
    """Odd multiples of ¼: no entry is 0, and none is 1."""
    entries = np.empty(int(np.prod(shape)), object)
    entries[:] = [Fraction(2 * int(k) + 1, 4) for k in rng.integers(-5, 5, entries.size)]
    return entries.reshape(shape)


def adapter(kind, r, seed, m=M, n=N, entries=odd):
    """An adapter of a kind, its entries and its scale drawn."""
    rng = np.random.default_rng(seed)
    variant = RATIONAL[kind] if kind in RATIONAL else REGISTRY[kind].variant
    parts = tuple(entries(rng, shape) for shape in part_shapes(variant, r, m, n).values())
    return Adapter(parts, Fraction(2 * int(rng.integers(1, 6)) + 1, 3), variant)


def normal(rng, shape):
    return rng.standard_normal(shape)


def floating(kind, r, seed, m=M, n=N):
    drawn = adapter(kind, r, seed, m, n, normal)
    return replace(drawn, s=float(drawn.s))


def delta(a, i, k):
    """The entry (i, k) of an adapter's ΔW by its variant's own equation, a product at a time."""
    P = dict(zip(a.variant.parts, a.parts, strict=True))
    total = Fraction(0)
    for p in range(len(P["A"])):
        product = a.s * P["B"][i, p] * P["A"][p, k]
        for name, at in (("E", p), ("lambda_d", p), ("lambda_b", i)):
            product *= P[name][at, 0] if name in P else 1
        total += product
    return total


def offset(a, i):
    """The entry i of an adapter's Δb."""
    return a.s * a.parts[2][i, 0] if a.variant is LORA_BIAS else Fraction(0)


def entrywise(shape, entry):
    array = np.empty(shape, object)
    for at in np.ndindex(*shape):
        array[at] = entry(*at)
    return array


class Plain:
    """A layer, a dict of adapters, a list of those that act, a list of those in the weight."""

    def __init__(self, W, b):
        self.W, self.b = W, b
        self.adapters, self.active, self.merged, self.off = {}, [], [], False

    def layer(self, names):
        acting = [] if self.off else [self.adapters[name] for name in names]

        def weight(i, k):
            return self.W[i, k] + sum(delta(a, i, k) for a in acting)

        def bias(i, _):
            own = Fraction(0) if self.b is None else self.b[i, 0]
            return own + sum(offset(a, i) for a in acting)

        return entrywise((M, N), weight), entrywise((M, 1), bias)

    def output(self, x, keep):
        """y and Wᵀ dy for dy = 1, with the multipliers of those that have one."""
        W, b = self.layer([])
        acting = [] if self.off else self.active

        def factor(i, k, j):
            K = {name: keep[name][k, j] if name in keep else 1 for name in acting}
            return W[i, k] + sum(K[name] * delta(self.adapters[name], i, k) for name in acting)

        def y(i, j):
            branches = sum(offset(self.adapters[name], i) for name in acting)
            return b[i, 0] + branches + sum(factor(i, k, j) * x[k, j] for k in range(N))

        def dx(k, j):
            return sum((factor(i, k, j) for i in range(M)), Fraction(0))

        return entrywise((M, T), y), entrywise((N, T), dx)


def whole(b):
    """A bias that is not there is 0."""
    return entrywise((M, 1), lambda i, _: Fraction(0)) if b is None else b


SEEDS = st.integers(0, 2**16)


LISTS = st.lists(st.sampled_from("abcd"), unique=True)


class Life(RuleBasedStateMachine):
    """Every transition on an `AdaptedLayer` and on `Plain`, which must agree after each."""

    state_of = AdaptedLayer

    @initialize(seed=SEEDS)
    def begin(self, seed):
        rng = np.random.default_rng(seed)
        W, b, self.x = odd(rng, (M, N)), odd(rng, (M, 1)) if seed % 2 else None, odd(rng, (N, T))
        self.K = odd(rng, (N, T))
        self.state, self.plain = self.state_of(W, b), Plain(W, b)
        self.history = []

    @rule(name=st.sampled_from("abc"), seed=SEEDS)
    def add_or_swap(self, name, seed):
        new = adapter(sorted(RATIONAL)[seed % 4], 1 + seed % 2, seed)
        there = name in self.plain.adapters
        refused(self.state.add if there else self.state.swap, name, new)
        self.state = (self.state.swap if there else self.state.add)(name, new)
        self.plain.adapters[name] = new

    @rule(name=st.sampled_from("abcd"))
    def delete(self, name):
        if name in self.plain.adapters:
            self.state = self.state.delete(name)
            del self.plain.adapters[name]
            for names in (self.plain.active, self.plain.merged):
                if name in names:
                    names.remove(name)
        for transition in (self.state.delete, self.state.activate, self.state.unmerge):
            refused(transition, name)

    @rule(old=st.sampled_from("abc"), new=st.sampled_from("abcd"))
    def rename(self, old, new):
        plain = self.plain
        if old not in plain.adapters or (new in plain.adapters and new != old):
            return refused(self.state.rename, old, new)
        self.state = self.state.rename(old, new)
        plain.adapters[new] = plain.adapters.pop(old)
        plain.active = [new if name == old else name for name in plain.active]
        plain.merged = [new if name == old else name for name in plain.merged]

    @rule(names=LISTS)
    def activate(self, names):
        names = [name for name in names if name in self.plain.adapters]
        self.state = self.state.activate(*names)
        self.plain.active = names
        self.plain.merged = [name for name in self.plain.merged if name in names]
        for name in names:
            refused(self.state.activate, name, name)

    @rule(off=st.booleans())
    def switch(self, off):
        self.state = self.state.disable() if off else self.state.enable()
        self.plain.off = off

    @rule(name=st.sampled_from("abc"), s=st.sampled_from([Fraction(7, 2), Fraction(-3, 5)]))
    def set_scale(self, name, s):
        if name not in self.plain.adapters:
            return refused(self.state.set_scale, name, s)
        self.state = self.state.set_scale(name, s)
        self.plain.adapters[name] = replace(self.plain.adapters[name], s=s)

    @rule(names=LISTS)
    def merge(self, names):
        plain = self.plain
        free = [name for name in plain.active if name not in plain.merged]
        names = [name for name in names if name in free]
        for name in {*plain.adapters, "z"} - {*free}:
            refused(self.state.merge, name)
        if not free:
            return refused(self.state.merge)
        self.state = self.state.merge(*names)
        plain.merged += names or free

    @rule(names=LISTS)
    def unmerge(self, names):
        plain = self.plain
        names = [name for name in names if name in plain.merged]
        for name in {*plain.adapters, "z"} - {*plain.merged}:
            refused(self.state.unmerge, name)
        if not plain.merged:
            return refused(self.state.unmerge)
        self.state = self.state.unmerge(*names)
        plain.merged = [name for name in plain.merged if names and name not in names]

    @invariant()
    def the_state_says_what_acts(self):
        assert self.state.active == tuple(self.plain.active)
        assert self.state.merged == tuple(self.plain.merged)
        assert set(self.state.adapters) == set(self.plain.adapters)

    @invariant()
    def the_output_is_that_of_what_acts(self):
        free = [name for name in self.plain.active if name not in self.plain.merged]
        for keep in ({}, dict.fromkeys(free[:1], self.K)):
            y, back = self.state.forward(self.x, keep)
            wanted, wanted_dx = self.plain.output(self.x, keep)
            dx, gradients = back(np.full((M, T), Fraction(1)))
            assert equal(y, wanted)
            assert equal(dx, wanted_dx)
            assert list(gradients) == ([] if self.plain.off else free)
        self.history.append((self.state, keep, wanted))

    @invariant()
    def the_weights_are_those_of_what_is_in_them(self):
        for (W, b), names in (
            (self.state.weight(), self.plain.active), (self.state.stored(), self.plain.merged),
        ):  # fmt: skip
            wanted = self.plain.layer(names)
            assert equal(W, wanted[0])
            assert equal(whole(b), wanted[1])

    def teardown(self):
        """No later transition has changed an earlier state."""
        for state, keep, y in getattr(self, "history", ()):
            assert equal(state.forward(self.x, keep)[0], y)


def refused(transition, *arguments):
    with pytest.raises(ValueError, match=r"expected|already|not active|another|add it first"):
        transition(*arguments)


@pytest.mark.slow
def test_a_life_of_adapters_is_what_the_list_of_those_that_act_says():
    run_state_machine_as_test(Life, settings=settings(max_examples=25, stateful_step_count=12))


class MergedTwice(AdaptedLayer):
    """A merged adapter's branch acts beside the weight."""

    def forward(self, x, keep=None):
        y, back = super().forward(x, keep)
        names = () if self.disabled else self.merged
        return sum((self.adapters[n].branch(x, self.W, self.b)[0] for n in names), start=y), back


class DroppedWhileMerged(AdaptedLayer):
    """Beside a merged adapter the other active ones do not act, as in PEFT."""

    def forward(self, x, keep=None):
        alone = self.activate(*self.merged) if self.merged else self
        return AdaptedLayer.forward(alone, x, None if self.merged else keep)


class Subtracting(AdaptedLayer):
    """W holds what is merged; unmerging takes away what the adapter is by then."""

    def changed(self, names, times=1):
        W, b = self.W, self.b
        for name in names:
            dW, db = self.adapters[name].change(W, b)
            W, b = W + times * dW, b if db is None else whole(b) + times * db
        return replace(self, W=W, b=b)

    def merge(self, *names):
        new = super().merge(*names)
        return new.changed(new.merged[len(self.merged) :])

    def unmerge(self, *names):
        return AdaptedLayer.unmerge(self, *names).changed(names or self.merged, -1)

    def activate(self, *names):
        gone = [name for name in self.merged if name not in names]
        return AdaptedLayer.activate(self.unmerge(*gone) if gone else self, *names)

    def stored(self):
        inside = self.changed(self.merged, -1) if self.disabled else self
        return inside.W, inside.b

    def weight(self):
        rest = () if self.disabled else [name for name in self.active if name not in self.merged]
        return with_changes(*self.stored(), [self.adapters[name] for name in rest])


class UnmergedWithoutScale(Subtracting):
    def unmerge(self, *names):
        bare = {name: replace(a, s=1) for name, a in self.adapters.items()}
        new = AdaptedLayer.unmerge(self, *names)
        out = Subtracting.changed(replace(new, adapters=bare), names or self.merged, -1)
        return replace(out, adapters=self.adapters)


class DeletedButMerged(Subtracting):
    """Deleting forgets the name, and the weight keeps the change."""

    def delete(self, name):
        new = AdaptedLayer.delete(self, name) if name not in self.merged else self
        kept = {n: a for n, a in new.adapters.items() if n != name}
        lists = (tuple(n for n in names if n != name) for names in (new.active, new.merged))
        active, merged = lists
        return replace(new, adapters=kept, active=active, merged=merged)


class DisabledButMerged(AdaptedLayer):
    """Disabling stops the branches, and the weight keeps what is merged."""

    def stored(self):
        return replace(self, disabled=False).stored() if self.disabled else super().stored()


class DisabledForGood(AdaptedLayer):
    def disable(self):
        return replace(super().disable(), active=(), merged=())


class ActivatedBesideMerged(AdaptedLayer):
    """What is merged stays merged, whatever is activated."""

    def activate(self, *names):
        return replace(super().activate(*names), merged=self.merged)


class ReplacedByAnother(AdaptedLayer):
    """Where the last active adapter is deleted, the first of the rest acts, as in PEFT."""

    def delete(self, name):
        new = super().delete(name)
        lonely = self.active == (name,) and new.adapters
        return new.activate(min(new.adapters)) if lonely else new


class RenamedToTheEnd(AdaptedLayer):
    def rename(self, old, new):
        after = super().rename(old, new)
        rest = tuple(n for n in after.active if n != new)
        return replace(after, active=rest + (new,) * (new in after.active))


class RenamedAndInactive(AdaptedLayer):
    def rename(self, old, new):
        after = super().rename(old, new)
        return after.activate(*(n for n in after.active if n != new or old == new))


class SwappedPartsOnly(AdaptedLayer):
    """The new parameters under the old scale."""

    def swap(self, name, adapter):
        if name not in self.adapters or adapter.parts is self.adapters[name].parts:
            return super().swap(name, adapter)
        return super().swap(name, replace(adapter, s=self.adapters[name].s))


class ScaledAgain(AdaptedLayer):
    """A scale is a factor on what it was."""

    def set_scale(self, name, s):
        return super().set_scale(name, s * self.adapters[name].s if name in self.adapters else s)


class AddedActive(AdaptedLayer):
    def add(self, name, adapter):
        new = super().add(name, adapter)
        return replace(new, active=(*self.active, name))


class Mutating(AdaptedLayer):
    """The dict of adapters is changed in place."""

    def swap(self, name, adapter):
        super().swap(name, adapter)
        self.adapters[name] = adapter
        return self


class FirstScaleForAll(AdaptedLayer):
    def forward(self, x, keep=None):
        first = self.adapters[self.active[0]].s if self.active else 1
        scaled = {name: replace(a, s=first) for name, a in self.adapters.items()}
        return AdaptedLayer(
            self.W, self.b, scaled, self.active, self.merged, self.disabled
        ).forward(x, keep)


class MaskOnTheBase(AdaptedLayer):
    def forward(self, x, keep=None):
        for K in (keep or {}).values():
            return super().forward(K * x)
        return super().forward(x)


WRONG_STATES = [
    MergedTwice, DroppedWhileMerged, Subtracting, UnmergedWithoutScale, DeletedButMerged,
    DisabledButMerged, DisabledForGood, ActivatedBesideMerged, ReplacedByAnother, RenamedToTheEnd,
    RenamedAndInactive, SwappedPartsOnly, ScaledAgain, AddedActive, Mutating, FirstScaleForAll,
    MaskOnTheBase,
]  # fmt: skip


LIFE = [
    ("add_or_swap", "a", 1), ("add_or_swap", "b", 2), ("activate", "a"), ("merge", ""),
    ("activate", "b"), ("activate", "ab"), ("merge", "b"), ("merge", "a"), ("unmerge", "a"),
    ("switch", True), ("switch", False),
    ("set_scale", "b", Fraction(7, 2)), ("unmerge", "b"), ("set_scale", "a", Fraction(7, 2)),
    ("set_scale", "a", Fraction(-3, 5)), ("merge", "ba"), ("unmerge", "b"), ("unmerge", "a"),
    ("rename", "a", "d"), ("rename", "b", "b"), ("merge", "d"), ("rename", "d", "c"),
    ("rename", "c", "d"), ("add_or_swap", "d", 4),
    ("unmerge", "d"), ("add_or_swap", "b", 7), ("merge", "b"), ("delete", "b"), ("merge", "d"),
    ("add_or_swap", "c", 5), ("delete", "d"),
]  # fmt: skip
"""Each transition after each other that could spoil it."""


def lead(state_of):
    life = type("Led", (Life,), {"state_of": state_of})()
    life.begin(3)
    for move, *arguments in LIFE:
        getattr(life, move)(*arguments)
        life.the_state_says_what_acts()
        life.the_output_is_that_of_what_acts()
        life.the_weights_are_those_of_what_is_in_them()
    life.teardown()


@pytest.mark.parametrize("wrong", WRONG_STATES, ids=lambda wrong: wrong.__name__)
def test_a_wrong_state_is_refused(wrong):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        lead(wrong)


def test_the_right_state_leads_that_life():
    lead(AdaptedLayer)


@EXACT
@given(seed=SEEDS)
def test_a_branchs_gradients_are_difference_quotients(seed):
    """y is affine in each parameter alone, so that a step of 1 gives the derivative exactly."""
    rng = np.random.default_rng(seed)
    x, dy, state = odd(rng, (N, T)), odd(rng, (M, T)), AdaptedLayer(odd(rng, (M, N)))
    for i, kind in enumerate(RATIONAL):
        state = state.add(kind, adapter(kind, 2, seed + i))
    state = state.activate(*RATIONAL)
    keep = {"vera": odd(rng, (N, T)), "lora": odd(rng, (N, T))}
    y, back = state.forward(x, keep)
    _, gradients = back(dy)
    for name, a in state.adapters.items():
        for i, (part, gradient) in enumerate(zip(a.parts, gradients[name], strict=True)):
            for entry in np.ndindex(*part.shape):
                stepped = part.copy()
                stepped[entry] += 1
                parts = (*a.parts[:i], stepped, *a.parts[i + 1 :])
                moved, _ = state.swap(name, replace(a, parts=parts)).forward(x, keep)
                assert gradient[entry] == (dy * (moved - y)).sum()


def test_the_gradients_of_every_variant_together_are_the_derivative():
    """By a complex step; DoRA's norm is held constant in its gradient, so that it is left out."""
    kinds = ["lora", "lora-bias", "dora-full", "vera", "adalora"]
    rng = np.random.default_rng(0)
    x, dy = normal(rng, (N, T)), normal(rng, (M, T))
    state = AdaptedLayer(normal(rng, (M, N)), normal(rng, (M, 1)))
    for i, kind in enumerate(kinds):
        state = state.add(kind, floating(kind, 2, i))
    state = state.activate(*kinds).merge("vera")
    keep = {"dora-full": normal(rng, (N, T))}

    def value(point):
        moved = state
        for kind in kinds:
            parts = tuple(point.get((kind, i), p) for i, p in enumerate(state.adapters[kind].parts))
            moved = moved.swap(kind, replace(state.adapters[kind], parts=parts))
        return moved.forward(point["x"], keep)

    free = [kind for kind in kinds if kind != "vera"]
    point = {(kind, i): p for kind in free for i, p in enumerate(state.adapters[kind].parts)}
    wanted = derivative(lambda at: (dy * value(at)[0]).sum(), point | {"x": x})
    _, back = value({"x": x})
    dx, gradients = back(dy)
    assert list(gradients) == free
    found = {(kind, i): g for kind in free for i, g in enumerate(gradients[kind])} | {"x": dx}
    for name, want in wanted.items():
        error = relative_error(found[name], want)
        record_worst("adapters: gradients against a complex step", error)
        assert error <= GRADIENT
    assert relative_error(dx, -wanted["x"]) > GRADIENT


def test_one_adapter_is_its_variant_to_the_bit():
    """What is added is the branch alone, so that an additive variant's bits are its own."""
    rng = np.random.default_rng(1)
    x, W, b = normal(rng, (9, 7)), normal(rng, (8, 9)), normal(rng, (8, 1))
    for kind in ("lora", "vera", "adalora"):
        a = floating(kind, 2, 5, 8, 9)
        state = AdaptedLayer(W, b).add("a", a).activate("a")
        y, back = a.variant.linear(x, W, b, *a.parts, a.s)
        found, found_back = state.forward(x)
        assert same_bits(found, y)
        for one, other in zip(back(y), (found_back(y)[0], *found_back(y)[1]["a"]), strict=True):
            assert same_bits(one, other)
        merged, bias = a.variant.merge(W, b, *a.parts, a.s)
        assert same_bits(state.merge().stored()[0], merged)
        assert same_bits(state.merge().stored()[1], bias)
        assert not same_bits(state.set_scale("a", 2 * a.s).forward(x)[0], y)
    a = floating("lora", 2, 5, 8, 9)
    A, B = a.parts
    assert same_bits(a.branch(x, W, b)[0], B @ (a.s * (A @ x)))
    assert same_bits(a.change(W, b)[0], a.s * (B @ A))
    assert not same_bits(AdaptedLayer(W, b).add("a", a).activate("a").forward(x)[0] - (W @ x + b),
                         a.branch(x, W, b)[0])  # fmt: skip


def test_unmerging_in_any_order_gives_back_the_bits():
    rng = np.random.default_rng(2)
    W = normal(rng, (M, N)).astype(np.float32)
    b = normal(rng, (M, 1)).astype(np.float32)
    kinds = ["lora", "lora-bias", "dora"]
    state, subtracting = AdaptedLayer(W, b), Subtracting(W.copy(), b.copy())
    for i, kind in enumerate(kinds):
        a = floating(kind, 2, i)
        a = replace(a, parts=tuple(p.astype(np.float32) for p in a.parts))
        state, subtracting = state.add(kind, a), subtracting.add(kind, a)
    for order in itertools.permutations(kinds):
        merged = state.activate(*kinds).merge()
        while merged.merged:
            merged = merged.unmerge(next(name for name in order if name in merged.merged))
            rest = with_changes(W, b, [merged.adapters[name] for name in merged.merged])
            assert all(same_bits(*pair) for pair in zip(merged.stored(), rest, strict=True))
        assert merged.stored()[0] is W
        assert merged.stored()[1] is b
        assert merged.stored()[0].dtype == np.float32
        drifted = subtracting.activate("lora", "lora-bias").merge().unmerge()
        assert not same_bits(drifted.stored()[0], W)


def test_several_dora_adapters_rescale_the_base_each_on_its_own():
    """W' = W + Σ ΔWᵢ in any order; in a row, as PEFT does, the order counts."""
    rng = np.random.default_rng(3)
    W, b, x = normal(rng, (M, N)), normal(rng, (M, 1)), normal(rng, (N, T))
    pair = [floating("dora", 2, seed) for seed in (1, 2)]
    forth, back_ = (with_changes(W, b, order)[0] for order in (pair, pair[::-1]))
    state = AdaptedLayer(W, b).add("a", pair[0]).add("b", pair[1]).activate("a", "b")
    alone = [a.variant.merge(W, b, *a.parts, a.s)[0] for a in pair]
    size = sum(abs(V) + 2 * abs(W) for V in alone)
    for order in (forth, back_, alone[0] + alone[1] - W):
        assert (abs(order - forth) <= 2 * gamma(5) * size).all()
    assert same_bits(state.weight()[1], b)
    for way in (state, state.merge("b"), state.merge()):
        y, _ = way.forward(x)
        error = relative_error(y, forth @ x + b)
        record_worst("adapters: two DoRA adapters, merged and not", error)
        assert error <= GRADIENT
    composed = [
        second.variant.merge(first.variant.merge(W, None, *first.parts, first.s)[0], None,
                             *second.parts, second.s)[0]
        for first, second in (pair, pair[::-1])
    ]  # fmt: skip
    assert min(relative_error(c, forth) for c in composed) > 0.01
    assert relative_error(*composed) > 0.01


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda s: s.add("a", s.adapters["a"]), "already"),
        (lambda s: s.activate("zz"), "no adapter 'zz': expected one of 'a', 'b'; add it first"),
        (lambda s: AdaptedLayer(s.W).activate("a"), "no adapter 'a'"),
        (lambda s: s.activate("a", "a"), "each adapter once"),
        (lambda s: s.rename("a", "b"), "already"),
        (lambda s: s.merge("b"), "not active; activate it first"),
        (lambda s: s.merge("a"), "merged already"),
        (lambda s: s.merge(), "no adapter to merge"),
        (lambda s: s.unmerge("b"), "expected merged adapters, 'a'"),
        (lambda s: s.unmerge().unmerge(), "expected merged adapters, there is none"),
        (lambda s: s.forward(np.ones((N, T)), {"a": np.ones((N, T))}), "unmerge it to train"),
        (lambda s: s.forward(np.ones((N, T)), {"z": np.ones((N, T))}), "no adapter 'z'"),
        (lambda s: s.add("c", floating("lora", 2, 0, m=N, n=M)), r"expected A \(2, 3\), B"),
        (lambda s: s.swap("a", Adapter((np.ones((2, N)),), 1)), r"expected A \(2, 3\), B"),
        (lambda s: s.swap("a", Adapter((), 1)), r"\[\] on W \(2, 3\): expected A \(1, 3\)"),
    ],
)  # fmt: skip
def test_what_a_state_refuses_it_names(wrong, message):
    pair = [floating("lora", 2, seed) for seed in (1, 2)]
    state = AdaptedLayer(np.ones((M, N))).add("a", pair[0]).add("b", pair[1]).activate("a").merge()
    with pytest.raises(ValueError, match=message):
        wrong(state)


def functions_and_shapes(m, n, r, t, q):
    """Every function with a ``Shapes:`` line, its arguments by name, and what it gives."""
    rng = np.random.default_rng(0)
    given = {"x": (n, t), "W": (m, n), "b": (m, 1), "K": (n, t), "D": (m, n), "keep": (m, n)}
    given = {name: normal(rng, shape) for name, shape in given.items()}
    x, W, b, K, D, keep = given.values()
    pair = [floating("lora", r, 1, m, n), floating("lora-bias", q, 2, m, n)]
    yield Adapter.branch, given, pair[1].branch(x, W, b, K)[:1]
    yield Adapter.change, given, pair[1].change(W, b)
    yield with_changes, given, with_changes(W, b, pair)
    yield AdaptedLayer.forward, given, AdaptedLayer(W, b).add("a", pair[0]).forward(x)[:1]
    index = rng.integers(-1, 2, t)
    y, back = multi_linear(x, W, b, pair, index, K)
    dx, *gradients = back(y)
    assert dx.shape == x.shape
    for a, parts in zip(pair, gradients, strict=True):
        assert [g.shape for g in parts] == [p.shape for p in a.parts]
    yield multi_linear, given | {"index": index}, (y,)
    changes = [a.change(W, b)[0] for a in pair]
    given |= {"ΔWᵢ": changes, "Dᵢ": changes, "p": 0.5}
    yield combine_svd, given | {"r": 1}, combine_svd(changes, [1, 2], 1)
    triples = [factors(pair[0])] * 2
    given |= {"Aᵢ": [A for A, _, _ in triples], "Bᵢ": [B for _, B, _ in triples]}
    yield combine_linear, given, combine_linear(triples, [1, 2])
    yield trim, given, (trim(D, 0.5),)
    yield ties, given, (ties(changes, [1, 2], 0.5),)
    yield dare, given, (dare(D, keep, 0.5),)


@EXACT
@given(sizes=draw.sizes(5, smallest=2, greatest=6))
def test_every_shapes_line_is_true(sizes):
    tested = list(functions_and_shapes(*sizes))
    for f, arguments, results in tested:
        check_shapes(f.__doc__, arguments, results)
    documented = [*vars(module).values(), *vars(Adapter).values(), *vars(AdaptedLayer).values()]
    own = {f for f in documented if getattr(f, "__module__", "") == module.__name__}
    lines = {f for f in own if callable(f) and "Shapes:" in (f.__doc__ or "")}
    assert lines - {module.combine} == {f for f, _, _ in tested}  # tested with its kind in guards


def test_a_wrong_shapes_line_is_refused():
    for f, arguments, results in functions_and_shapes(2, 3, 4, 5, 6):
        with pytest.raises(AssertionError):
            check_shapes(f.__doc__, arguments, tuple(np.zeros((9, 9)) for _ in results))


def test_a_name_that_an_inner_function_uses_is_bound_once():
    source = Path(module.__file__).read_text()
    assert captured_and_bound_again(source) == set()
    wrong = source.replace("    branches = {\n", "    branches = {}\n        branches = {\n")
    assert captured_and_bound_again(wrong) == {("forward", "back", "branches")}


# A batch whose columns have adapters of their own


def batch(seed=0, index=(1, -1, 0, 2, 1, -1)):
    rng = np.random.default_rng(seed)
    kinds, ranks = ("lora", "lora-bias", "adalora"), (2, 1, 3)
    adapters = [adapter(k, r, seed + i) for i, (k, r) in enumerate(zip(kinds, ranks, strict=True))]
    t = len(index)
    x, W, b, dy, K = (odd(rng, shape) for shape in ((N, t), (M, N), (M, 1), (M, t), (N, t)))
    return SimpleNamespace(
        x=x, W=W, b=b, adapters=adapters, index=np.array(index), K=K, dy=dy
    )  # fmt: skip


def columns_are_single_layers(multi, c):
    """y, dx and each adapter's gradients from `AdaptedLayer`s of one column and one adapter."""
    y, back = multi(c.x, c.W, c.b, c.adapters, c.index, c.K)
    dx, *gradients = back(c.dy)
    sums = [[p * 0 for p in a.parts] for a in c.adapters]
    for j, i in enumerate(c.index):
        one = AdaptedLayer(c.W, c.b)
        one = one.add("a", c.adapters[i]).activate("a") if i >= 0 else one
        yj, back_j = one.forward(c.x[:, [j]], {"a": c.K[:, [j]]} if i >= 0 else {})
        dxj, parts = back_j(c.dy[:, [j]])
        assert equal(y[:, [j]], yj)
        assert equal(dx[:, [j]], dxj)
        if i >= 0:
            sums[i] = [total + g for total, g in zip(sums[i], parts["a"], strict=True)]
    for found, wanted in zip(gradients, sums, strict=True):
        assert all(equal(f, w) for f, w in zip(found, wanted, strict=True))


def it_is_one_adapter_with_a_masked_hidden_state(multi, c):
    """y = W x + b + B (mask ∘ A x), A and B of the summed rank, a row of the mask 1 for its own."""
    pure = [Adapter(factors(a)[:2], a.s) for a in c.adapters]
    y, _ = multi(c.x, c.W, c.b, pure, c.index)
    A, B = combine([(*a.parts, a.s) for a in pure], [1, 1, 1])
    owner = np.repeat(np.arange(3), [len(a.parts[0]) for a in pure])
    assert equal(y, c.W @ c.x + c.b + B @ ((owner[:, None] == c.index) * (A @ c.x)))


def columns_permute(multi, c):
    order = np.array([3, 0, 5, 1, 4, 2])
    y, back = multi(c.x, c.W, c.b, c.adapters, c.index)
    turned, turned_back = multi(c.x[:, order], c.W, c.b, c.adapters, c.index[order])
    assert equal(turned, y[:, order])
    dx, *gradients = back(c.dy)
    turned_dx, *turned_gradients = turned_back(c.dy[:, order])
    assert equal(turned_dx, dx[:, order])
    for one, other in zip(gradients, turned_gradients, strict=True):
        assert all(equal(g, h) for g, h in zip(one, other, strict=True))


def slots_relabel(multi, c):
    """The adapters in another order, and the index with them."""
    slots = [2, 0, 1]
    index = np.array([slots.index(i) if i >= 0 else -1 for i in c.index])
    y, back = multi(c.x, c.W, c.b, c.adapters, c.index)
    other, other_back = multi(c.x, c.W, c.b, [c.adapters[i] for i in slots], index)
    assert equal(other, y)
    _, *gradients = back(c.dy)
    _, *other_gradients = other_back(c.dy)
    for slot, i in enumerate(slots):
        assert all(equal(g, h) for g, h in zip(gradients[i], other_gradients[slot], strict=True))


def columns_without_an_adapter_are_the_bases(multi, c):
    y, back = multi(c.x, c.W, c.b, c.adapters, c.index)
    base, back_base = linear(c.x, c.W, c.b)
    none = c.index < 0
    assert equal(y[:, none], base[:, none])
    assert equal(back(c.dy)[0][:, none], back_base(c.dy)[:, none])


def an_unused_adapter_has_no_gradient(multi, c):
    _, back = multi(c.x, c.W, c.b, c.adapters, np.where(c.index == 1, 0, c.index))
    _, *gradients = back(c.dy)
    assert not any(g.any() for g in gradients[1])
    assert all(g.any() for g in gradients[0])


MULTI_LAWS = [
    columns_are_single_layers, it_is_one_adapter_with_a_masked_hidden_state, columns_permute,
    slots_relabel, columns_without_an_adapter_are_the_bases, an_unused_adapter_has_no_gradient,
]  # fmt: skip


@pytest.mark.parametrize("law", MULTI_LAWS)
@EXACT
@given(seed=SEEDS, index=st.lists(st.integers(-1, 2), min_size=6, max_size=6))
def test_of_a_mixed_batch_it_is_exact_that(law, seed, index):
    if law is an_unused_adapter_has_no_gradient:
        index[0] = 0
    law(multi_linear, batch(seed, tuple(index)))


def indexed(change):
    """multi_linear with another index."""
    return lambda x, W, b, adapters, index, K=None: multi_linear(
        x, W, b, adapters, change(index, len(adapters)), K
    )


def stocked(change):
    """multi_linear with other adapters in the slots."""
    return lambda x, W, b, adapters, index, K=None: multi_linear(
        x, W, b, change(adapters), index, K
    )


def stale(adapters):
    """Slots of one rank, whose rows beyond an adapter's own are those of the slot before it."""
    filled = []
    for a in adapters:
        A, B, s = factors(a)
        if filled:
            old_A, old_B = filled[-1].parts
            A = np.concatenate([A, old_A[len(A) :]])
            B = np.concatenate([B, old_B[:, B.shape[1] :]], axis=1)
        filled.append(Adapter((A, B), s))
    return filled


def smallest_rank(adapters):
    r = min(len(a.parts[0]) for a in adapters)
    return [Adapter((A[:r], B[:, :r]), s) for A, B, s in map(factors, adapters)]


def none_rows_zeroed(x, W, b, adapters, index, K=None):
    y, back = multi_linear(x, W, b, adapters, index, K)
    return y * (index >= 0), back


def base_dropped(x, W, b, adapters, index, K=None):
    y, back = multi_linear(x, W, b, adapters, index, K)
    return y - W @ x, back


def branch_twice(x, W, b, adapters, index, K=None):
    y, back = multi_linear(x, W, b, adapters, index, K)
    return 2 * y - (W @ x if b is None else W @ x + b), back


def gradients_to_all(x, W, b, adapters, index, K=None):
    y, back = multi_linear(x, W, b, adapters, index, K)

    def wrong(dy):
        dx, *gradients = back(dy)
        return dx, *(tuple(g + 1 for g in parts) for parts in gradients)

    return y, wrong


WRONG_MULTI = {
    "index off by one": indexed(lambda index, k: np.maximum(index - 1, -1)),
    "the first column's adapter for all": indexed(lambda index, k: index * 0 + index[0]),
    "sorted": indexed(lambda index, k: np.sort(index)),
    "always slot 0": indexed(lambda index, k: index * 0),
    "slot 0 is none": indexed(lambda index, k: np.where(index == 0, -1, index)),
    "-1 is the last": indexed(lambda index, k: np.where(index < 0, k - 1, index)),
    "-1 is the first": indexed(lambda index, k: np.where(index < 0, 0, index)),
    "the first scale for all": stocked(lambda all_: [replace(a, s=all_[0].s) for a in all_]),
    "no scale": stocked(lambda all_: [replace(a, s=1) for a in all_]),
    "stale rows beyond the rank": stocked(stale),
    "the smallest rank": stocked(smallest_rank),
    "none-rows zeroed": none_rows_zeroed,
    "base dropped": base_dropped,
    "branch twice": branch_twice,
    "gradients to all": gradients_to_all,
}


def breaks(law, *arguments):
    try:
        law(*arguments)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("wrong", WRONG_MULTI)
def test_a_wrong_mixed_batch_breaks_the_definition(wrong):
    assert breaks(columns_are_single_layers, WRONG_MULTI[wrong], batch(index=(2, -1, 0, 2, 1, -1)))


def test_every_law_of_mixed_batches_refuses_something():
    for law in MULTI_LAWS:
        assert any(breaks(law, wrong, batch()) for wrong in WRONG_MULTI.values()), law


def test_columns_without_an_adapter_have_the_bases_bits():
    rng = np.random.default_rng(4)
    for dtype in (np.float32, np.float64):
        x, W, b = (normal(rng, shape).astype(dtype) for shape in ((64, 9), (33, 64), (33, 1)))
        adapters = [
            replace(a, parts=tuple(p.astype(dtype) for p in a.parts))
            for a in (floating("lora", 2, i, 33, 64) for i in range(2))
        ]
        index = np.array([0, -1, 1, -1, -1, 0, 1, 1, -1])
        y, back = multi_linear(x, W, b, adapters, index)
        base, back_base = linear(x, W, b)
        assert same_bits(y[:, index < 0], base[:, index < 0])
        assert same_bits(back(y)[0][:, index < 0], back_base(y)[:, index < 0])
        assert y.dtype == dtype
        assert not same_bits(y[:, index == 0], base[:, index == 0])


@pytest.mark.parametrize("index", [[0], [0, 3], [0, -2], [[0, 1]]])
def test_an_index_that_names_no_adapter_is_refused(index):
    c = batch(index=(0, 1))
    with pytest.raises(ValueError, match="expected 2 numbers from -1 to 2"):
        multi_linear(c.x, c.W, c.b, c.adapters, np.array(index))


# Combination


def kinds(seed):
    """An adapter of every kind that has factors, of unequal ranks."""
    return [adapter(kind, 1 + i % 3, seed + i) for i, kind in enumerate(RATIONAL)]


WEIGHTS = [Fraction(3, 2), Fraction(-2), Fraction(1, 3), Fraction(-1, 5)]


def the_sum_is_exact(combined, adapters, weights):
    a = combined(adapters, weights)
    W, b = a.change(np.full((M, N), Fraction(0)), None)
    pairs = list(zip(weights, adapters, strict=True))
    assert equal(W, entrywise((M, N), lambda i, k: sum(w * delta(a, i, k) for w, a in pairs)))
    wanted = entrywise((M, 1), lambda i, _: sum(w * offset(a, i) for w, a in pairs))
    assert equal(whole(b), wanted)


def averaged_factors(adapters, weights):
    """(Σ w s B)(Σ A) of the first rank: what adding factors comes to."""
    triples = [factors(a) for a in adapters]
    r = min(len(A) for A, _, _ in triples)
    B = sum(w * s * B[:, :r] for (_, B, s), w in zip(triples, weights, strict=True))
    return Adapter((sum(A[:r] for A, _, _ in triples), B), 1)


def ranks_added_in_the_scale(adapters, weights):
    """Concatenated, and divided by the summed rank again."""
    a = combine_exact(adapters, weights)
    return replace(a, s=Fraction(1, len(a.parts[0])))


WRONG_SUMS = {
    "w squared": lambda a, w: combine_exact(a, [v * v for v in w]),
    "the first weight for all": lambda a, w: combine_exact(a, [w[0]] * len(w)),
    "weights ignored": lambda a, w: combine_exact(a, [1] * len(w)),
    "averaged": lambda a, w: combine_exact(a, [v / len(w) for v in w]),
    "sign lost": lambda a, w: combine_exact(a, [abs(v) for v in w]),
    "the first scale for all": lambda a, w: combine_exact([replace(v, s=a[0].s) for v in a], w),
    "bias forgotten": lambda a, w: Adapter(combine_exact(a, w).parts[:2], 1),
    "factors added": averaged_factors,
    "scaled by the summed rank": ranks_added_in_the_scale,
}


@EXACT
@given(seed=SEEDS, order=st.permutations(range(4)))
def test_the_weighted_sum_is_exact_for_every_kind_and_sign(seed, order):
    adapters = kinds(seed)
    the_sum_is_exact(combine_exact, [adapters[i] for i in order], WEIGHTS)
    the_sum_is_exact(combine_exact, adapters[:1], WEIGHTS[1:2])
    for a in adapters:
        A, B, s = factors(a)
        assert equal(s * (B @ A), entrywise((M, N), lambda i, k, a=a: delta(a, i, k)))
        the_sum_is_exact(combine_exact, [a, a], [Fraction(1, 2)] * 2)
        the_sum_is_exact(combine_exact, [a, adapters[0]], [1, 0])


@pytest.mark.parametrize("wrong", WRONG_SUMS)
def test_a_wrong_sum_is_refused(wrong):
    assert breaks(the_sum_is_exact, WRONG_SUMS[wrong], kinds(0), WEIGHTS)


@pytest.mark.parametrize("kind", REGISTRY)
def test_one_adapter_at_weight_1_is_itself(kind):
    """By the exact sum to the bit, and by the nearest matrix of full rank up to rounding."""
    a = floating(kind, 2, 7)
    alone = combine_exact([a], [1])
    assert alone.parts is a.parts
    assert (alone.s, alone.variant) == (a.s, a.variant)
    rng = np.random.default_rng(8)
    x, W = normal(rng, (N, T)), normal(rng, (M, N))
    assert same_bits(AdaptedLayer(W).add("c", alone).activate("c").forward(x)[0],
                     AdaptedLayer(W).add("c", a).activate("c").forward(x)[0])  # fmt: skip
    if a.variant.additive:
        twice = combine_exact([a], [2])
        assert twice.parts is a.parts
        assert (twice.s, twice.variant) == (2 * a.s, a.variant)
    dW, _ = a.change(W, None)
    assert same_bits(ties([dW], [1], 1), dW)
    assert same_bits(dare(dW, np.ones(dW.shape), 0), dW)
    A, B, error = combine_svd([dW], [1], M)
    assert error == 0
    assert np.linalg.norm(B @ A - dW) <= 2 * dW.size * UNIT_ROUNDOFF * np.linalg.norm(dW)
    assert np.linalg.norm(B @ (-A) - dW) > np.linalg.norm(dW)


def test_what_has_no_factors_is_not_added_by_factors():
    pair = [floating(kind, 2, 1) for kind in ("dora", "lora")]
    for adapters, weights in ((pair, [1, 1]), (pair[:1], [2]), (pair[:1], [-1])):
        with pytest.raises(ValueError, match="combine the changes ΔW, not the factors"):
            combine_exact(adapters, weights)
    with pytest.raises(ValueError, match="2 adapters, 1 weights"):
        combine_exact(pair[1:] * 2, [1])
    without = {kind for kind in REGISTRY if extended(REGISTRY[kind].variant).factors is None}
    assert without == {"dora", "dora-full"}


def nearest_of_low_rank(svd, seed):
    """The error is that of the factors, and the least there is, by singular values of 40 digits.

    Householder transformations of an m by n matrix err by m n u ‖D‖_F at most, up to a small
    constant (Higham 2002, theorem 19.4), which is taken to be 1; for the SVD they come from both
    sides, and what is compared here adds as much: 4 m n u ‖D‖_F.
    """
    rng = np.random.default_rng(seed)
    m, n = 4, 5
    changes, weights = [normal(rng, (m, n)) for _ in range(3)], [0.75, -1.5, 0.25]
    D = sum(w * d for w, d in zip(weights, changes, strict=True))
    sigma = mpmath.svd_r(mpmath.matrix(D.tolist()), compute_uv=False)
    for r in range(1, m + 1):
        A, B, error = svd(changes, weights, r)
        assert (A.shape, B.shape) == ((r, n), (m, r))
        least = float(mpmath.sqrt(sum(v * v for v in list(sigma)[r:])))
        bound = 4 * m * n * UNIT_ROUNDOFF * np.linalg.norm(D)
        off = max(abs(error - least), abs(np.linalg.norm(D - B @ A) - least))
        assert off <= bound
        record_worst("adapters: error of the nearest of rank r, of its bound", off / bound)


def other_singular_values(changes, weights, r):
    """The least ones kept."""
    A, B, error = combine_svd(changes, weights, len(changes[0]))
    return A[-r:], B[:, -r:], error


WRONG_SVD = {
    "the least singular values": other_singular_values,
    "the error squared": lambda d, w, r: (*combine_svd(d, w, r)[:2], combine_svd(d, w, r)[2] ** 2),
    "sigma on both": lambda d, w, r: (
        np.linalg.norm(combine_svd(d, w, r)[1], axis=0)[:, None] * combine_svd(d, w, r)[0],
        *combine_svd(d, w, r)[1:],
    ),
    "sign lost": lambda d, w, r: combine_svd(d, [abs(v) for v in w], r),
}


@pytest.mark.parametrize("seed", range(3))
def test_the_svd_is_nearest_and_says_how_near(seed):
    nearest_of_low_rank(combine_svd, seed)


@pytest.mark.parametrize("wrong", WRONG_SVD)
def test_a_wrong_svd_is_refused(wrong):
    assert breaks(nearest_of_low_rank, WRONG_SVD[wrong], 0)


def test_singular_values_that_are_exact_give_the_exact_error():
    D = np.zeros((3, 4))
    D[2, 1], D[0, 3], D[1, 0] = -12, 4, 3
    for r, wanted in ((1, 5), (2, 3), (3, 0)):
        A, B, error = combine_svd([D], [1], r)
        assert error == wanted
        assert np.array_equal(B @ A, np.where(abs(D) > [4, 3, 0][r - 1], D, 0))
    for r in (0, 4):
        with pytest.raises(ValueError, match=f"rank {r}: expected 1 to 3"):
            combine_svd([D], [1], r)
    with pytest.raises(ValueError, match="expected one for each"):
        combine_svd([], [], 1)
    for combined in (
        lambda w: combine_svd([D, D], w, 1), lambda w: ties([D, D], w, 1),
        lambda w: combine_linear([(D, D.T, 1), (D, D.T, 1)], w),
    ):  # fmt: skip
        for w in ([1], [1, 1, 1]):
            with pytest.raises(ValueError, match=f"2 adapters, {len(w)} weights: expected one"):
                combined(w)


def cross_terms_are_the_formula(combined, seed):
    """B A = Σ wᵢ sᵢ Bᵢ Aᵢ + Σ_{i≠j} ±ⱼ √|wᵢ sᵢ wⱼ sⱼ| Bᵢ Aⱼ, in whole numbers with whole roots."""
    rng = np.random.default_rng(seed)
    roots, signs = [0.5, 3.0, 5.0], [1, -1, -1]
    scales = [0.5, 4.0, -1.0]
    triples = [(rng.integers(-3, 4, (2, N)) + 0.5, rng.integers(-3, 4, (M, 2)) + 0.5, s)
               for s in scales]  # fmt: skip
    weights = [sign * k * k / s for sign, k, s in zip(signs, roots, scales, strict=True)]
    A, B = combined(triples, weights)
    exact = sum(w * s * (B @ A) for (A, B, s), w in zip(triples, weights, strict=True))
    cross = sum(
        signs[j] * roots[i] * roots[j] * (triples[i][1] @ triples[j][0])
        for i, j in itertools.permutations(range(3), 2)
    )
    assert np.array_equal(B @ A, exact + cross)
    assert cross.any()


WRONG_LINEAR = {
    "sign lost": lambda a, w: combine_linear(
        [(A, B, abs(s)) for A, B, s in a], [abs(v) for v in w]
    ),
    "sign on both": lambda a, w: (
        combine_linear(a, w)[0],
        sum(np.sign(v * s) * abs(v * s) ** 0.5 * B for (_, B, s), v in zip(a, w, strict=True)),
    ),
    "weights on A alone": lambda a, w: (
        sum(v * s * A for (A, _, s), v in zip(a, w, strict=True)), sum(B for _, B, _ in a)
    ),
    "averaged": lambda a, w: combine_linear(a, [v / 3 for v in w]),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_the_linear_combination_has_the_cross_terms_that_it_says(seed):
    cross_terms_are_the_formula(combine_linear, seed)
    with pytest.raises(ValueError, match=r"ranks \[1, 2\]: expected one rank"):
        combine_linear([factors(floating("lora", r, r)) for r in (1, 2)], [1, 1])


@pytest.mark.parametrize("wrong", WRONG_LINEAR)
def test_a_wrong_linear_combination_is_refused(wrong):
    assert breaks(cross_terms_are_the_formula, WRONG_LINEAR[wrong], 0)


def plain_ties(changes, weights, density, frequency):
    """By lists: sort, cut, vote and average one place after the other."""
    flat = [list(D.ravel()) for D in changes]
    for D in flat:
        by_size = sorted(range(len(D)), key=lambda i, D=D: (-abs(D[i]), i))
        for i in by_size[int(density * len(D)) :]:
            D[i] = Fraction(0)
    mean = []
    for column in zip(*flat, strict=True):
        votes = [(v > 0) - (v < 0) for v in column] if frequency else column
        up = sum(votes) >= 0
        chosen = [w * v for w, v in zip(weights, column, strict=True) if (v > 0 if up else v < 0)]
        mean.append(sum(chosen, Fraction(0)) / max(len(chosen), 1))
    return entrywise(changes[0].shape, lambda i, k: mean[i * changes[0].shape[1] + k])


def ties_are_the_definition(merged, seed, density, frequency):
    rng = np.random.default_rng(seed)
    changes = [odd(rng, (3, 4)) for _ in range(3)]
    for D in changes[1:]:
        D[0] = -changes[0][0]  # sums and moduli that are equal
    weights = [Fraction(1, 2), Fraction(-3), Fraction(5, 2)]
    found = merged(changes, weights, density, frequency)
    assert equal(found, plain_ties(changes, weights, density, frequency))


@settings(max_examples=20)
@given(seed=SEEDS, density=st.fractions(0, 1, max_denominator=12), frequency=st.booleans())
def test_ties_trims_elects_and_averages(seed, density, frequency):
    ties_are_the_definition(ties, seed, density, frequency)


def test_of_equal_moduli_the_first_stay():
    D = np.where(np.arange(600) % 7 < 3, -2.0, 1.0).reshape(20, 30)
    ones = np.cumsum(D == 1).reshape(D.shape)
    assert np.array_equal(trim(D, 0.5), np.where((D == -2) | (ones <= 300 - (D == -2).sum()), D, 0))
    one = np.array([[3.0]])
    assert ties([one, -one / 3, -one / 3], [1, 1, 1], 1) == 3
    assert ties([one, -one / 3, -one / 3], [1, 1, 1], 1, frequency=True) == -1


def averaged_over_all(D, w, density, frequency):
    return ties(D, [v / 2 for v in w], density, frequency)


def weighted_before(D, w, density, frequency):
    return ties([v * d for v, d in zip(w, D, strict=True)], [1] * 3, density, frequency)


WRONG_TIES = {
    "not trimmed": lambda D, w, density, f: ties(D, w, 1, f),
    "the least kept": lambda D, w, density, f: ties(
        [d - trim(d, 1 - density) for d in D], w, 1, f
    ) if density < 1 else None,
    "votes by number": lambda D, w, density, f: ties(D, w, density, not f),
    "averaged over two": averaged_over_all,
    "weights vote": weighted_before,
    "summed": lambda D, w, density, f: sum(v * trim(d, density) for v, d in zip(w, D, strict=True)),
    "- for a sum of 0": lambda D, w, density, f: -ties([-d for d in D], w, density, f),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_TIES)
def test_wrong_ties_are_refused(wrong):
    implementation = WRONG_TIES[wrong]
    if wrong == "- for a sum of 0":
        one = np.array([[Fraction(1)]])
        pair = [one, -one], [1, 1], 1, False
        assert plain_ties(*pair) == ties(*pair) == 1
        assert implementation(*pair) == -1
    else:
        assert any(
            breaks(ties_are_the_definition, implementation, seed, Fraction(3, 4), False)
            for seed in range(3)
        )


def the_mean_over_all_masks_is_the_change(dared, seed):
    D, p = odd(np.random.default_rng(seed), (2, 2)), Fraction(1, 4)
    mean = 0
    for kept in itertools.product((0, 1), repeat=4):
        weight = (1 - p) ** sum(kept) * p ** (4 - sum(kept))
        mean = mean + weight * dared(D, np.array(kept).reshape(2, 2), p)
    assert equal(mean, D)


@EXACT
@given(seed=SEEDS)
def test_dare_is_the_change_in_the_mean(seed):
    the_mean_over_all_masks_is_the_change(dare, seed)


@pytest.mark.parametrize(
    "wrong", [lambda D, keep, p: keep * D, lambda D, keep, p: keep * D / p,
              lambda D, keep, p: (1 - keep) * D / (1 - p)],
)  # fmt: skip
def test_a_wrong_dare_is_refused(wrong):
    assert breaks(the_mean_over_all_masks_is_the_change, wrong, 0)


# PEFT


def test_trimming_and_electing_are_pefts_to_the_bit():
    torch = optional("torch")
    utils = optional("peft.utils.merge_utils")
    rng = np.random.default_rng(9)
    changes = [normal(rng, (5, 7)) for _ in range(3)]
    weights = [0.5, -0.75, 2.0]
    tensors, ws = [torch.tensor(d) for d in changes], torch.tensor(weights)
    for density in (0.25, 0.5, 0.9):
        trimmed = utils.magnitude_prune(tensors, ws, density).numpy()
        ours = [w * trim(d, density) for w, d in zip(weights, changes, strict=True)]
        assert np.array_equal(trimmed, sum(ours))
        for method in ("total", "frequency"):
            found = utils.ties(tensors, ws, density, method).numpy()
            assert np.array_equal(found, ties(changes, weights, density, method == "frequency"))
        assert not np.array_equal(found, ties(changes, weights, density / 2, frequency=True))

        torch.manual_seed(0)
        keeps = [torch.bernoulli(torch.full_like(d, density)).numpy() for d in tensors]
        dared = [dare(d, keep, 1 - density) for d, keep in zip(changes, keeps, strict=True)]
        torch.manual_seed(0)
        found = utils.dare_linear(tensors, ws, density).numpy()
        wanted = sum(w * d for w, d in zip(weights, dared, strict=True))
        size = sum(abs(w * d) for w, d in zip(weights, dared, strict=True))
        assert (abs(found - wanted) <= 2 * gamma(5) * size).all()
        torch.manual_seed(0)
        found = utils.dare_ties(tensors, ws, density).numpy()
        assert (abs(found - ties(dared, weights, 1)) <= 2 * gamma(6) * size).all()
        assert (abs(found - ties(changes, weights, 1)) > 2 * gamma(6) * size).any()


def peft_model(adapters, W, b, **settings):
    """A PEFT model of one float64 linear layer, with these adapters' parameters and scales."""
    torch = optional("torch")
    peft = optional("peft")
    base = torch.nn.Sequential()
    base.add_module("q", torch.nn.Linear(*W.shape[::-1], dtype=torch.float64))
    base.q.weight.data, base.q.bias.data = torch.tensor(W), torch.tensor(b[:, 0])
    model = None
    for name, a in adapters.items():
        config = peft.LoraConfig(
            r=len(a.parts[0]), lora_alpha=1, target_modules=["q"],
            use_dora="magnitude" in a.variant.parts, lora_bias="c" in a.variant.parts, **settings,
        )  # fmt: skip
        if model is None:
            model = peft.get_peft_model(base, config, name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    layer = model.base_model.model.q
    for name, a in adapters.items():
        parts = {part: torch.tensor(p) for part, p in zip(a.variant.parts, a.parts, strict=True)}
        layer.lora_A[name].weight.data = parts["A"]
        layer.lora_B[name].weight.data = parts["B"]
        if "c" in parts:
            layer.lora_B[name].bias.data = parts["c"][:, 0]
        if "magnitude" in parts:
            layer.lora_magnitude_vector[name].weight.data = parts["magnitude"][:, 0]
        layer.scaling[name] = a.s
    return model.eval(), layer


def answer(model, x, **settings):
    (weight, *_) = model.parameters()
    return model(weight.new_tensor(x.T), **settings).detach().numpy().T


def lora_pair(m, n, seed=3, kinds=("lora", "lora-bias"), ranks=(2, 3)):
    rng = np.random.default_rng(seed)
    pairs = zip(("one", "two"), kinds, ranks, strict=True)
    adapters = {name: floating(kind, r, name.encode()[0], m, n) for name, kind, r in pairs}
    return adapters, *(normal(rng, shape) for shape in ((m, n), (m, 1), (n, 6)))


def moduli(adapters):
    return {
        name: replace(a, parts=tuple(map(abs, a.parts)), s=abs(a.s)) for name, a in adapters.items()
    }


def test_several_active_adapters_are_pefts():
    """Two roundings of one sum: each off by γ(k) Σ|terms|, k the operations on the longest way."""
    adapters, W, b, x = lora_pair(4, 5)
    model, layer = peft_model(adapters, W, b)
    state = AdaptedLayer(W, b, adapters)
    size = AdaptedLayer(abs(W), abs(b), moduli(adapters), ("one", "two")).forward(abs(x))[0]
    bound = 2 * gamma(5 + 3 + 5) * size
    for names in (["one"], ["two"], ["one", "two"], ["two", "one"], []):
        acting = state.activate(*names)
        model.base_model.set_adapter(names)
        ours = [acting.forward(x)[0]]
        theirs = [answer(model, x)]
        if names:
            model.merge_adapter()
            ours.append(acting.merge().forward(x)[0])
            theirs.append(answer(model, x))
            assert (layer.weight != layer.weight.new_tensor(W)).any()
            model.unmerge_adapter()
            with model.disable_adapter():
                ours.append(acting.disable().forward(x)[0])
                base = answer(model, x)
            assert (abs(ours.pop() - base) <= bound).all()
        for y, other in itertools.product(ours, theirs):
            assert (abs(y - other) <= bound).all()
            record_worst("adapters: active in PEFT, of the bound", (abs(y - other) / bound).max())
        both, _ = state.activate("one", "two").forward(x)
        assert (len(names) == 2) == (abs(theirs[0] - both) <= bound).all()


def test_a_mixed_batch_is_pefts():
    adapters, W, b, x = lora_pair(4, 5)
    model, _ = peft_model(adapters, W, b)
    index = np.array([1, -1, 0, 0, -1, 1])
    names = ["two", "__base__", "one", "one", "__base__", "two"]
    found = answer(model, x, adapter_names=names)
    y, _ = multi_linear(x, W, b, list(adapters.values()), index)
    size, _ = multi_linear(abs(x), abs(W), abs(b), list(moduli(adapters).values()), index)
    bound = 2 * gamma(5 + 3 + 5) * size
    assert (abs(y - found) <= bound).all()
    record_worst("adapters: mixed batch of PEFT, of the bound", (abs(y - found) / bound).max())
    wrong, _ = multi_linear(x, W, b, list(adapters.values()), np.roll(index, 1))
    assert (abs(wrong - found) > bound).any()


@pytest.mark.parametrize("weights", [(0.75, -1.5), (-0.25, 2.0), (1.0, 0.0)])
def test_pefts_combinations_of_lora_are_these(weights, monkeypatch):
    """Products of weight and scale with exact roots: PEFT rounds weights to float32."""
    adapters, W, b, _ = lora_pair(4, 5, kinds=("lora", "lora"), ranks=(2, 2))
    scales = (3.0, 1.5) if weights[0] == 0.75 else (9.0, 0.5)
    adapters = {n: replace(a, s=s) for (n, a), s in zip(adapters.items(), scales, strict=True)}
    model, layer = peft_model(adapters, W, b)
    torch = optional("torch")
    triples = [factors(a) for a in adapters.values()]
    roots = [abs(w * s) ** 0.5 for w, s in zip(weights, scales, strict=True)]
    signed = [np.copysign(root, w) for w, root in zip(weights, roots, strict=True)]
    changes = [a.change(W, None)[0] for a in adapters.values()]

    def peft_combined(kind, **settings):
        model.add_weighted_adapter(
            ["one", "two"], list(weights), kind, combination_type=kind, **settings
        )
        assert layer.scaling[kind] == 1
        return (
            layer.lora_A[kind].weight.detach().numpy(),
            layer.lora_B[kind].weight.detach().numpy(),
        )

    exact = combine_exact(list(adapters.values()), weights)
    A, B = peft_combined("cat")
    size = sum(
        abs(w) * (abs(s) * abs(B) @ abs(A)) for w, (A, B, s) in zip(weights, triples, strict=True)
    )
    assert (abs(B @ A - exact.change(W, None)[0]) <= 2 * gamma(4 + 3) * size).all()
    assert (abs(B @ A - sum(changes)) > 2 * gamma(4 + 3) * size).any()

    assert all(map(np.array_equal, peft_combined("linear"), combine_linear(triples, weights)))

    A, B = peft_combined("svd", svd_rank=2)
    D = sum(w * d for w, d in zip(weights, changes, strict=True))
    _, _, error = combine_svd(changes, weights, 2)
    bound = 4 * D.size * UNIT_ROUNDOFF * np.linalg.norm(D)
    assert abs(np.linalg.norm(D - B @ A) - error) <= bound

    pairs = [(A_, B_) for A_, B_, _ in triples]
    found = peft_combined("ties", density=0.5)
    for i, cs in enumerate((signed, roots)):
        assert np.array_equal(found[i], ties([pair[i] for pair in pairs], cs, 0.5))
    A, B = peft_combined("ties_svd", density=0.5, svd_rank=3)
    voted = ties(changes, weights, 0.5)
    assert abs(np.linalg.norm(voted - B @ A) - combine_svd([voted], [1], 3)[2]) <= bound

    masks, bernoulli = [], torch.bernoulli
    monkeypatch.setattr(torch, "bernoulli", lambda p: masks.append(bernoulli(p)) or masks[-1])
    found = peft_combined("dare_linear", density=0.5)
    for i, cs in enumerate((signed, roots)):
        keeps = [mask.numpy() for mask in masks[2 * i : 2 * i + 2]]
        dared = [c * dare(p[i], keep, 0.5) for c, p, keep in zip(cs, pairs, keeps, strict=True)]
        assert np.array_equal(found[i], sum(dared))
        others = [
            c * dare(p[i], keep, 0.5) for c, p, keep in zip(cs, pairs, keeps[::-1], strict=True)
        ]
        assert not np.array_equal(found[i], sum(others))


@pytest.mark.parametrize("density", [-0.25, 1.5, np.nan])
def test_a_density_is_a_share(density):
    with pytest.raises(ValueError, match="expected 0 to 1"):
        trim(np.ones((1, 4)), density)
