"""AdaLoRA's budget: exact over the rationals, and step by step beside PEFT's RankAllocator."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from calculus import (
    GRADIENT,
    UNIT_ROUNDOFF,
    derivative,
    greatest,
    record_worst,
    relative_error,
    same_bits,
)
from extras import optional
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import examples

from minilora import testing as draw
from minilora.spec.adalora import (
    BudgetPlan,
    Importance,
    adalora_scale,
    add_orthogonality,
    advance,
    allocate,
    budget,
    initial_rank,
    orthogonality,
    plan_budget,
    prune,
    sensitivity,
    smooth,
    triplet_scores,
    without_pruned,
)

FEW = examples(5)


# Orthogonality


def turn(a, b):
    """A rotation of rationals: a² + b² = c² of whole numbers."""
    c = math.isqrt(a * a + b * b)
    return np.array([[Fraction(a, c), Fraction(-b, c)], [Fraction(b, c), Fraction(a, c)]])


def test_the_penalty_is_exactly_zero_where_rows_and_columns_are_orthonormal():
    A = np.concatenate([turn(3, 4), 0 * turn(3, 4)], axis=1)  # rows in four dimensions
    B = np.concatenate([0 * turn(5, 12)[:1], turn(5, 12)])
    R, back = orthogonality(A, B)
    assert R == 0
    assert not any(gradient.any() for gradient in back(Fraction(1)))
    for wrong in ((2 * A, B), (A, 2 * B), (A[:, :3] * 0, B)):
        R, back = orthogonality(*wrong)
        assert R > 0
    # Twice an orthonormal A: ‖4I - I‖² = 9 r.
    assert orthogonality(2 * A, B)[0] == 9 * len(A)


@FEW
@given(A=draw.fractions((2, 3)), B=draw.fractions((4, 2)), dA=draw.fractions((2, 3)))
def test_the_penalty_grows_along_a_line_as_its_gradient_says_exactly(A, B, dA):
    """R(A + t dA) has degree 4 in t, so that five of its values give its derivative at 0."""

    def R(t):
        return orthogonality(A + t * dA, B)[0]

    slope = Fraction(8 * (R(1) - R(-1)) - (R(2) - R(-2)), 12)
    found, _ = orthogonality(A, B)[1](1)
    assert (found * dA).sum() == slope
    assert (found * dA).sum() * 2 != slope or slope == 0


@FEW
@given(rng=draw.generators(), r=draw.ranks(), m=st.integers(1, 5), n=st.integers(1, 5))
def test_the_penaltys_gradients_are_its_derivatives(rng, r, m, n):
    point = {"A": rng.standard_normal((r, n)), "B": rng.standard_normal((m, r))}
    found = dict(zip("AB", orthogonality(**point)[1](0.75), strict=True))
    wanted = derivative(lambda p: 0.75 * orthogonality(**p)[0], point)
    scale = max(map(greatest, wanted.values()))
    error = max(relative_error(found[k], wanted[k], scale) for k in point)
    record_worst("budget: orthogonality against a complex step", error)
    assert error <= GRADIENT
    # The gradient of the norm that is not squared is another one.
    R, back = orthogonality(**point)
    rooted = dict(zip("AB", back(0.75 / (2 * np.sqrt(R))), strict=True))
    assert max(relative_error(rooted[k], wanted[k], scale) for k in point) > GRADIENT


def test_the_penaltys_gradients_are_pytorchs():
    torch = optional("torch")
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((3, 5)), rng.standard_normal((4, 3))
    theirs = [torch.tensor(a, requires_grad=True) for a in (A, B)]
    eye = torch.eye(3, dtype=torch.float64)
    tA, tB = theirs
    total = torch.linalg.norm(tB.T @ tB - eye) ** 2 + torch.linalg.norm(tA @ tA.T - eye) ** 2
    total.backward()
    R, back = orthogonality(A, B)
    assert relative_error(R, total.detach().numpy()) <= GRADIENT
    for found, t in zip(back(1.0), theirs, strict=True):
        assert relative_error(found, t.grad.numpy()) <= GRADIENT
        assert relative_error(found / 2, t.grad.numpy()) > GRADIENT


@pytest.mark.parametrize("dtype", [np.float32, np.longdouble])
def test_the_penalty_and_the_scores_keep_the_dtype(dtype):
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((2, 3)).astype(dtype), rng.standard_normal((4, 2)).astype(dtype)
    R, back = orthogonality(A, B)
    E = np.ones((2, 1), dtype)
    mean, spread = smooth(0 * A, 0 * A, sensitivity(A, A), 0.85, 0.85)
    scores = triplet_scores(A, B, E)
    arrays = [R, *back(dtype(1)), mean, spread, scores, prune(E, scores > 0)]
    assert {a.dtype for a in arrays} == {np.dtype(dtype)}


# The schedule


@FEW
@given(
    target=st.integers(0, 40),
    more=st.integers(0, 60),
    times=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 30)),
)
def test_the_budget_falls_by_the_cube_from_the_initial_to_the_target(target, more, times):
    t_initial, t_final, span = times
    total = t_initial + t_final + span
    initial = target + more
    values = [budget(t, initial, target, t_initial, t_final, total) for t in range(total + 3)]
    assert set(values[: t_initial + 1]) == {initial}
    assert set(values[total - t_final :]) == {target}
    assert values == sorted(values, reverse=True)
    wanted = [
        math.floor(target + more * (1 - Fraction(t - t_initial, span)) ** 3)
        for t in range(t_initial, total - t_final + 1)
    ]
    assert values[t_initial : total - t_final + 1] == wanted
    if more >= 1:  # it begins to fall with the first step after the warm-up, not with the next
        assert values[t_initial + 1] < initial


def test_a_schedule_without_a_fall_or_with_a_rising_one_is_refused():
    with pytest.raises(ValueError, match="target 9: expected 0 to 8, the initial budget"):
        budget(0, 8, 9, 0, 0, 10)
    with pytest.raises(ValueError, match="target -1: expected 0 to 8"):
        budget(0, 8, -1, 0, 0, 10)
    for times in ((5, 5, 10), (6, 5, 10), (0, 11, 10), (-1, 0, 10), (0, -1, 10)):
        with pytest.raises(ValueError, match=r"t_initial .*t_final"):
            budget(0, 8, 4, *times)


def their_schedule(initial, target, t_initial, t_final, total, interval=1):
    """PEFT's schedule, without a model: it reads the two budgets and the configuration only."""
    from peft.tuners.adalora.layer import RankAllocator

    config = SimpleNamespace(tinit=t_initial, tfinal=t_final, total_step=total, deltaT=interval)
    allocator = SimpleNamespace(peft_config=config, init_bgt=initial, target_bgt=target)
    return lambda step: RankAllocator.budget_schedule(allocator, step)


def off_pefts(settings, ours=budget):
    """The steps at which PEFT's budget, in floating point, is not that of ``ours``."""
    theirs = their_schedule(*settings)
    return [t for t in range(settings[-1] + 2) if theirs(t)[0] != ours(t, *settings)]


@settings(max_examples=40)
@given(
    target=st.integers(0, 99),
    more=st.integers(0, 400),
    times=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 40)),
)
def test_the_budget_is_pefts_at_every_step_unless_the_fall_is_a_whole_number(target, more, times):
    """PEFT rounds q³ (initial - target) + target, and cuts what is rounded to a whole number.

    Where it is no whole number it is at least span⁻³ > 2⁻¹⁶ from one. q is off by 2u, its cube by
    3 · 2u and what pow adds, 2u, and the product and the sum round numbers below 2⁹: 10 · 2⁹ u in
    all, and a little, do not come as far. Where it is one, the cut may be the number below.
    """
    optional("peft")
    t_initial, t_final, span = times
    settings = (target + more, target, t_initial, t_final, t_initial + t_final + span)
    assert 11 * 2**9 * UNIT_ROUNDOFF < 2.0**-16 <= span**-3
    theirs = their_schedule(*settings)
    for t in off_pefts(settings):
        assert (more * (span - (t - t_initial)) ** 3) % span**3 == 0
        assert theirs(t)[0] == budget(t, *settings) - 1


def test_a_budget_counted_one_step_late_is_not_pefts():
    optional("peft")
    settings = (24, 16, 3, 5, 20)
    assert off_pefts(settings) == []
    assert off_pefts(settings, lambda t, *rest: budget(t - 1, *rest)) != []
    assert off_pefts(settings, lambda t, *rest: round(budget(t, *rest) + 0.5)) != []


def test_the_scale_is_pefts_and_stays_a_little_below_loras():
    torch = optional("torch")
    peft = optional("peft")
    for alpha, r in ((8, 4), (1, 3), (0, 4), (-2, 5)):
        config = peft.AdaLoraConfig(
            init_r=r, target_r=1, lora_alpha=alpha, total_step=9, target_modules=["q"]
        )
        base = torch.nn.ModuleDict({"q": torch.nn.Linear(1, 1, bias=False)})
        q = peft.get_peft_model(base, config).double().base_model.model.q
        for part, value in (("A", 1.0), ("B", 1.0), ("E", 1 / r)):
            torch.nn.init.constant_(getattr(q, f"lora_{part}")["default"], value)
        s = q.get_delta_weight("default").item()
        # r products 1/r, their sum, α, r + 10⁻⁵ and the quotient: at most 2r + 3 roundings a side.
        assert abs(adalora_scale(alpha, r) / s - 1) <= 2 * (2 * r + 3) * UNIT_ROUNDOFF
        plain = (alpha if alpha > 0 else r) / r
        assert abs(plain / s - 1) > 2 * (2 * r + 3) * UNIT_ROUNDOFF
    with pytest.raises(ValueError, match="rank 0: expected at least 1"):
        adalora_scale(8, 0)


# Importance


def rationals(rng, shape):
    return np.vectorize(lambda k: Fraction(int(k), 8), otypes=[object])(
        rng.integers(-20, 21, shape)
    )


@FEW
@given(rng=draw.generators())
def test_the_sensitivity_of_a_loss_linear_in_an_entry_is_what_pruning_it_changes(rng):
    W, C = rationals(rng, (2, 3)), rationals(rng, (2, 3))
    lost = sensitivity(W, C)  # of the loss ⟨C, W⟩, whose gradient is C
    for entry in np.ndindex(W.shape):
        without = W.copy()
        without[entry] = Fraction(0)
        assert lost[entry] == abs((C * W).sum() - (C * without).sum())
    assert (lost != W * C).any() or not (W * C < 0).any()  # without its sign, that is


@FEW
@given(rng=draw.generators())
def test_smoothing_is_the_weighted_sum_that_its_recursion_unrolls_to(rng):
    beta1, beta2 = Fraction(17, 20), Fraction(2, 3)
    history = [abs(rationals(rng, (2, 3))) for _ in range(4)]
    mean = spread = Fraction(0)
    states = []
    for now in history:
        mean, spread = smooth(mean, spread, now, beta1, beta2)
        states.append((mean, spread))
    means = [
        (1 - beta1) * sum(beta1 ** (t - i) * history[i] for i in range(t + 1)) for t in range(4)
    ]
    off = [abs(now - mean) for now, mean in zip(history, means, strict=True)]
    spreads = [(1 - beta2) * sum(beta2 ** (t - i) * off[i] for i in range(t + 1)) for t in range(4)]
    for (mean, spread), *wanted in zip(states, means, spreads, strict=True):
        assert (mean == wanted[0]).all()
        assert (spread == wanted[1]).all()
    # With the old mean, 0 at first, the spread is another one.
    first = (1 - beta2) * abs(history[0])
    assert (states[0][1] == beta1 * first).all()
    assert (states[0][1] != first).any() or not history[0].any()


@FEW
@given(rng=draw.generators(), r=draw.ranks())
def test_a_triplets_score_is_its_values_and_the_means_of_its_vectors(rng, r):
    m, n = 4, 3
    s = rationals(rng, (r, n)), rationals(rng, (m, r)), rationals(rng, (r, 1))
    S = triplet_scores(*s)
    assert S.shape == (r, 1)
    for i in range(r):
        assert S[i, 0] == s[2][i, 0] + Fraction(s[0][i].sum(), n) + Fraction(s[1][:, i].sum(), m)
    other = triplet_scores(s[0] + 1, s[1], s[2])
    assert (other == S + 1).all()  # a mean, and no sum: that would add n


# Allocation


ANY = st.integers(-3, 3).map(Fraction)


@settings(max_examples=30)
@given(scores=st.lists(st.lists(ANY, min_size=0, max_size=3), max_size=3), data=st.data())
def test_what_stays_has_the_greatest_total_of_all_choices_of_its_size(scores, data):
    scores = {f"x{i}": np.array(S, object).reshape(-1, 1) for i, S in enumerate(scores)}
    every = [(S, (at, i)) for at, part in scores.items() for i, S in enumerate(part[:, 0])]
    b = data.draw(st.integers(0, len(every)))
    before = {at: S.copy() for at, S in scores.items()}
    keep = allocate(scores, b)
    assert {at: k.shape for at, k in keep.items()} == {at: S.shape for at, S in scores.items()}
    chosen = [place for _, place in every if keep[place[0]][place[1], 0]]
    assert len(chosen) == b
    total = sum(S for S, place in every if place in chosen)
    assert total == max(sum(c) for c in itertools.combinations([S for S, _ in every], b))
    # Of equal scores the first: no score that stays comes after an equal one that goes.
    for (S, place), (T, later) in itertools.combinations(every, 2):
        assert not (S == T and later in chosen and place not in chosen)
    assert all((scores[at] == S).all() for at, S in before.items())


def test_equal_scores_leave_as_many_as_the_budget_says():
    scores = {"q": np.ones((2, 1)), "k": np.ones((3, 1))}
    keep = allocate(scores, 3)
    assert keep["q"].all()
    assert keep["k"].ravel().tolist() == [True, False, False]
    # A threshold, as PEFT has it, would leave none: the score to be passed is that of all.
    threshold = np.sort(np.ones(5))[5 - 3 - 1]
    assert not any((threshold < S).any() for S in scores.values())


def test_of_many_equal_scores_the_first_stay():
    """Many, since a sort that is not stable keeps the order of a few."""
    scores = np.arange(64.0)[:, None] % 2
    keep = allocate({"q": scores}, 40)["q"][:, 0]
    assert keep[1::2].all()
    assert keep[0::2].tolist() == [True] * 8 + [False] * 24
    last = 63 - np.argsort(-scores[::-1, 0], kind="stable")[:40]
    assert set(last) != set(np.flatnonzero(keep))


def test_budgets_that_cannot_be_and_scores_without_an_order_are_refused():
    scores = {"q": np.ones((2, 1))}
    for b in (-1, 3):
        with pytest.raises(ValueError, match=f"a budget of {b}: expected 0 to 2"):
            allocate(scores, b)
    with pytest.raises(ValueError, match="a score is NaN"):
        allocate({"q": np.array([[1.0], [np.nan]])}, 1)
    assert allocate({}, 0) == {}


def test_pruning_keeps_every_bit_of_what_stays_and_takes_even_nan_away():
    E = np.array([[-0.0], [np.nan], [-3.0]])
    keep = np.array([[True], [False], [False]])
    pruned = prune(E, keep)
    assert same_bits(pruned, np.array([[-0.0], [0.0], [0.0]]))
    assert not same_bits(E * keep, pruned)
    assert np.isnan(E[1, 0])


# Beside PEFT

SHAPES = {"k": (2, 5), "q": (4, 3)}  # (m, n)
R = 4


def their_model(torch, peft, plan):
    layers = {at: torch.nn.Linear(n, m, bias=False) for at, (m, n) in SHAPES.items()}
    config = peft.AdaLoraConfig(
        init_r=R,
        target_r=plan.target // len(SHAPES),
        tinit=plan.t_initial,
        tfinal=plan.t_final,
        total_step=plan.total,
        deltaT=plan.interval,
        beta1=plan.beta1,
        beta2=plan.beta2,
        target_modules=[*SHAPES],
    )
    return peft.get_peft_model(torch.nn.ModuleDict(layers), config).double()


def parameters(model):
    """PEFT's parameters by minilora's names."""
    return {
        f"{at}.{part}": getattr(model.base_model.model[at], f"lora_{part}")["default"]
        for at in SHAPES
        for part in "ABE"
    }


def steps_beside_peft(plan, seed, ours=advance):
    """Run both with the same moves and gradients; each step's parameters, moments and state."""
    torch = optional("torch")
    peft = optional("peft")
    rng = np.random.default_rng(seed)
    model = their_model(torch, peft, plan)
    theirs = parameters(model)
    params = {name: rng.standard_normal(p.shape) for name, p in theirs.items()}
    state = Importance()
    for step in range(plan.total + 2):
        # As an optimizer would move them: pruned singular values grow again.
        params = {name: p + rng.standard_normal(p.shape) / 8 for name, p in params.items()}
        gradients = {name: rng.standard_normal(p.shape) for name, p in params.items()}
        with torch.no_grad():
            for name, p in theirs.items():
                p.copy_(torch.tensor(params[name]))
                p.grad = torch.tensor(gradients[name])
        allocator = model.base_model.rankallocator
        model.base_model.update_and_allocate(step)
        params, state = ours(params, gradients, state, step, plan)
        moments = {
            name: (allocator.exp_avg_ipt.get(full), allocator.exp_avg_unc.get(full))
            for name in params
            for at, part in [name.split(".")]
            for full in [f"{at}.lora_{part}.default"]
        }
        yield (
            step,
            {n: p.detach().numpy().copy() for n, p in theirs.items()},
            params,
            moments,
            state,
        )


PLANS = [
    BudgetPlan(2 * R, 4, t_initial=2, t_final=3, total=10),
    BudgetPlan(2 * R, 2, t_initial=0, t_final=0, total=9, interval=3, beta1=0.5, beta2=0.75),
    BudgetPlan(2 * R, 2, t_initial=1, t_final=4, total=11, interval=2, beta1=0.9, beta2=0.6),
]


@pytest.mark.parametrize("plan", PLANS)
def test_every_step_is_pefts_bit_for_bit(plan):
    """Singular values, Ī and Ū by ==: the operations are the same. Scores choose; see the gap."""
    chosen, compared = set(), 0
    for step, theirs, ours, moments, state in steps_beside_peft(plan, seed=plan.interval):
        assert all(same_bits(theirs[name], p) for name, p in ours.items())
        if step < plan.total - plan.t_final:
            for name, pair in moments.items():
                assert same_bits(pair[0].numpy(), state.mean[name])
                assert same_bits(pair[1].numpy(), state.spread[name])
                compared += 1
        if not state.keep:
            continue
        kept = sum(int(keep.sum()) for keep in state.keep.values())
        chosen.add(kept)
        every = np.sort(np.concatenate([S.ravel() for S in state.scores().values()]))
        # A score is a sum of means: at most 5 + 4 + 3 roundings, in any order.
        gap = np.diff(every).min()
        assert gap > 2 * 12 * UNIT_ROUNDOFF * every[-1]
    assert compared == (plan.total - plan.t_final) * 6
    assert min(chosen) == plan.target < max(chosen) < plan.initial


@pytest.mark.parametrize(
    "wrong",
    {
        "the steps counted from one": lambda p, g, s, t, plan: advance(p, g, s, t + 1, plan),
        "β₁ and β₂ exchanged": lambda p, g, s, t, plan: advance(
            p, g, s, t, replace(plan, beta1=plan.beta2, beta2=plan.beta1)
        ),
        "the gradient's square": lambda p, g, s, t, plan: advance(
            p, {n: a * a for n, a in g.items()}, s, t, plan
        ),
        "no pruning between the choices": lambda p, g, s, t, plan: (
            (p, s) if t > plan.total - plan.t_final else advance(p, g, s, t, plan)
        ),
        "pruned at every step": lambda p, g, s, t, plan: advance(
            p, g, s, t, replace(plan, interval=1)
        ),
    }.values(),
)
def test_another_algorithm_is_not_pefts(wrong):
    plan = PLANS[2]
    differs = False
    for step, theirs, ours, moments, state in steps_beside_peft(plan, 4, wrong):
        differs |= not all(same_bits(theirs[name], p) for name, p in ours.items())
        if step < plan.total - plan.t_final:
            differs |= not all(
                same_bits(pair[i].numpy(), moment[name])
                for name, pair in moments.items()
                for i, moment in enumerate((state.mean, state.spread))
            )
        if differs:
            return
    raise AssertionError("the wrong algorithm passed")


def test_a_step_changes_neither_its_arguments_nor_its_state():
    rng = np.random.default_rng(0)
    plan = BudgetPlan(3, 1, 0, 1, 4)
    params = {"q.A": (3, 2), "q.B": (4, 3), "q.E": (3, 1)}
    params = {name: rng.standard_normal(shape) for name, shape in params.items()}
    gradients = {name: rng.standard_normal(p.shape) for name, p in params.items()}
    state = Importance()
    for step in range(6):
        arrays = [*params.values(), *gradients.values()]
        arrays += [a for d in (state.mean, state.spread, state.keep) for a in d.values()]
        before = [a.copy() for a in arrays]
        for a in arrays:
            a.setflags(write=False)
        new, after = advance(params, gradients, state, step, plan)
        again, _ = advance(params, gradients, state, step, plan)
        assert all(same_bits(a, b) for a, b in zip(arrays, before, strict=True))
        assert all(same_bits(new[name], again[name]) for name in new)
        params, state = new, after
    assert np.count_nonzero(params["q.E"]) == 1
    assert sum(keep.sum() for keep in state.keep.values()) == 1


def test_the_steps_run_over_the_rationals():
    rng = np.random.default_rng(0)
    plan = BudgetPlan(3, 1, 0, 0, 2, beta1=Fraction(1, 2), beta2=Fraction(1, 3))
    shapes = {"q.A": (3, 2), "q.B": (4, 3), "q.E": (3, 1)}
    params = {name: rationals(rng, shape) for name, shape in shapes.items()}
    state = Importance()
    for step in range(3):
        gradients = {name: rationals(rng, shape) for name, shape in shapes.items()}
        params, state = advance(params, gradients, state, step, plan)
    assert all(isinstance(v, Fraction) for a in state.mean.values() for v in a.ravel())
    assert all(isinstance(v, Fraction) for v in state.scores()["q"].ravel())
    floats = advance(params, gradients, state, 0, replace(plan, beta1=0.5))[1]
    assert not isinstance(floats.mean["q.A"].ravel()[0], Fraction)
    assert np.count_nonzero(params["q.E"]) == 1


# A run


def triplets(rng, names="qk", r=3):
    sizes = {"A": (r, 5), "B": (4, r), "E": (r, 1)}
    held = {f"{at}.{part}": rationals(rng, size) for at in names for part, size in sizes.items()}
    return held | {"head.weight": rationals(rng, (2, 4)), "head.A": rationals(rng, (2, 4))}


def test_a_runs_gradients_have_the_penaltys_exactly():
    rng = np.random.default_rng(0)
    params, gamma = triplets(rng), Fraction(1, 7)
    gradients = {name: rationals(rng, p.shape) for name, p in params.items()}
    got = add_orthogonality(params, gradients, gamma)
    added = {name for name in params if name[:2] in ("q.", "k.") and name[-1] in "AB"}
    for name in params.keys() - added:
        assert got[name] is gradients[name]
    for at in "qk":
        A, B = params[f"{at}.A"], params[f"{at}.B"]
        for name, dR in zip((f"{at}.A", f"{at}.B"), orthogonality(A, B)[1](gamma), strict=True):
            assert (got[name] - gradients[name] == dR).all()
            assert dR.any()
    without = {name: p for name, p in params.items() if not name.endswith(".E")}
    assert add_orthogonality(without, gradients) == gradients


def test_a_run_begins_with_half_as_much_again_and_ends_at_the_rank():
    for rank, steps in itertools.product((1, 2, 8), range(3, 40)):
        plan = plan_budget(rank, 5, steps)
        budgets = [plan.budget(step) for step in range(steps + 1)]
        assert budgets[0] == 5 * initial_rank(rank)
        assert {*budgets[steps - steps // 2 :]} == {5 * rank}
        assert sorted(budgets, reverse=True) == budgets
        assert initial_rank(rank) == math.ceil(Fraction(3, 2) * rank)


def test_a_runs_penalty_counts_a_tenth():
    params = triplets(np.random.default_rng(0), "q")
    gradients = {name: np.zeros_like(p) for name, p in params.items()}
    of_a_run, a_tenth, a_fifth = (
        add_orthogonality(params, gradients, *g) for g in ((), (0.1,), (0.2,))
    )
    for name in ("q.A", "q.B"):
        assert (of_a_run[name] == a_tenth[name]).all()
        assert (of_a_run[name] != a_fifth[name]).any()


def test_what_is_left_of_a_run_is_the_same_function_and_nothing_that_is_0():
    params = triplets(np.random.default_rng(1), "qkv")
    params["q.E"][[0, 2]] *= 0
    params["k.E"] = params["k.E"] * 0
    kept = without_pruned(params)
    assert {name for name in params if name not in kept} == {"k.A", "k.B", "k.E"}
    assert [len(kept[f"{at}.E"]) for at in "qv"] == [1, 3]
    for at in "qv":
        whole, some = (
            held[f"{at}.B"] @ (held[f"{at}.E"] * held[f"{at}.A"]) for held in (params, kept)
        )
        assert (whole == some).all()
    assert all(kept[name] is params[name] for name in ("head.weight", "head.A"))
    # At the start every singular value is 0, and all are kept.
    fresh = params | {f"{at}.E": 0 * params[f"{at}.E"] for at in "qkv"}
    assert without_pruned(fresh) == fresh


def test_no_interval_is_refused():
    with pytest.raises(ValueError, match="interval 0: expected 1 step or more"):
        BudgetPlan(1, 1, 0, 1, 9, interval=0)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_in_which_nothing_can_be_pruned_is_refused(steps):
    with pytest.raises(ValueError, match=f"{steps} steps: expected 3 or more"):
        plan_budget(8, 5, steps)
