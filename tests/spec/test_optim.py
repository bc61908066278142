"""Optimizers: exact over the rationals, by the formula in 40 digits, and through whole models."""

import math
from dataclasses import replace
from fractions import Fraction
from numbers import Rational

import mpmath
import numpy as np
import pytest
from calculus import GRADIENT, OPTIMIZER, greatest, record_worst, relative_error, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import examples
from mpmath import mpf
from number_systems import Real, to_objects

import minilora as ml
from minilora import testing as draw
from minilora.spec import optim

FEW = examples(5)
SHAPES = {"a.A": (2, 3), "a.B": (4, 2), "a.bias": (4, 1)}
N = 10


def exact(entries):
    return all(isinstance(v, Rational) for array in entries.values() for v in array.ravel())


def rationals(rng, shapes=SHAPES):
    return {
        name: to_objects(rng.integers(-20, 21, shape).astype(float), Fraction) / 8
        for name, shape in shapes.items()
    }


def reals(rng, scale=1.0):
    return {name: scale * rng.standard_normal(shape) for name, shape in SHAPES.items()}


@FEW
@given(
    rng=draw.generators(),
    momentum=st.sampled_from((Fraction(0), Fraction(9, 10))),
    decay=st.sampled_from((Fraction(0), Fraction(1, 100))),
)
def test_sgd_over_the_rationals_is_the_sum_that_its_recursion_unrolls_to(rng, momentum, decay):
    lr = Fraction(1, 7)
    params = start = rationals(rng)
    state, pulls = optim.SGDState(), []
    for _ in range(4):
        gradients = rationals(rng)
        pulls.append({name: gradients[name] + decay * params[name] for name in params})
        before, old = dict(params), dict(state.velocity)
        params, state = optim.sgd(params, gradients, state, lr, momentum, decay)
        assert exact(params)
        assert before.keys() == params.keys()
        assert all(state.velocity[name] is not old.get(name) for name in params)
    for name, p in params.items():
        # p_k = p_0 - η Σ_j (1 + μ + … + μ^(k-j)) (g_j + λ p_j)
        weights = [sum(momentum**i for i in range(len(pulls) - j)) for j in range(len(pulls))]
        wanted = start[name] - lr * sum(w * u[name] for w, u in zip(weights, pulls, strict=True))
        assert (p == wanted).all()


def test_plain_sgd_of_rationals_stays_rational_with_the_defaults():
    rng = np.random.default_rng(0)
    params, _ = optim.sgd(rationals(rng), rationals(rng), optim.SGDState(), Fraction(1, 3))
    assert exact(params)


@FEW
@given(rng=draw.generators(), r=draw.ranks(3))
def test_sgd_keeps_the_balance_of_the_factors_exactly(rng, r):
    """A′A′ᵀ - B′ᵀB′ = (1 - ηλ)² (AAᵀ - BᵀB) + η² (dA dAᵀ - dBᵀ dB), from Bᵀ dB = dA Aᵀ."""
    lr, decay, s = Fraction(1, 5), Fraction(1, 30), Fraction(7, 3)
    W = rationals(rng, {"A": (r, 3), "B": (4, r)})
    A, B = W["A"], W["B"]
    dW = rationals(rng, {"dW": (4, 3)})["dW"]
    g = {"A": s * B.T @ dW, "B": s * dW @ A.T}
    new, _ = optim.sgd(W, g, optim.SGDState(), lr, Fraction(0), decay)

    def balance(W):
        return W["A"] @ W["A"].T - W["B"].T @ W["B"]

    wanted = (1 - lr * decay) ** 2 * balance(W) + lr**2 * balance(g)
    assert (balance(new) == wanted).all()
    off, _ = optim.sgd(W, {"A": g["A"], "B": 2 * g["B"]}, optim.SGDState(), lr, Fraction(0), decay)
    wanted = (1 - lr * decay) ** 2 * balance(W) + lr**2 * balance({"A": g["A"], "B": 2 * g["B"]})
    assert not (balance(off) == wanted).all() or not (g["B"].T @ B).any()


@FEW
@given(rng=draw.generators(), counts=st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_accumulated_gradients_are_the_mean_by_tokens_exactly(rng, counts):
    counts[0] += 1
    parts = [(n, rationals(rng)) for n in counts]
    found = optim.accumulate(parts)
    assert exact(found)
    for name, g in found.items():
        assert (g * sum(counts) == sum(n * part[name] for n, part in parts)).all()


def test_the_mean_of_means_is_not_the_mean_by_tokens():
    parts = [(1, {"a": np.array([3.0])}), (2, {"a": np.array([0.0])})]
    assert optim.accumulate(parts)["a"] == 1.0
    assert np.mean([g["a"] for _, g in parts]) == 1.5


def test_nothing_to_accumulate_and_parts_of_different_models_are_refused():
    g = {"a": np.ones(2)}
    with pytest.raises(ValueError, match="0 micro-batches with 0 labels that count"):
        optim.accumulate([])
    with pytest.raises(ValueError, match="2 micro-batches with 0 labels that count"):
        optim.accumulate([(0, g), (0, g)])
    for other in ({"b": np.ones(2)}, g | {"b": np.ones(2)}, {}):
        with pytest.raises(ValueError, match="gradients name different parameters"):
            optim.accumulate([(1, g), (1, other)])


@FEW
@given(model=draw.model_cases(train_base=True))
def test_micro_batches_accumulate_to_the_gradient_of_the_whole_batch(model):
    labels = model.batch.labels[:, 1:] if model.config.causal else model.batch.labels
    counts = (labels != -100).reshape(len(labels), -1).sum(1)
    model = replace(model, tuning=replace(model.tuning, dropout_scale={}))
    parts = []
    for i in np.flatnonzero(counts):
        names = ("ids", "labels", "mask", "positions", "types")
        arrays = {name: getattr(model.batch, name) for name in names}
        row = ml.Batch(**{name: None if a is None else a[[i]] for name, a in arrays.items()})
        parts.append((int(counts[i]), replace(model, batch=row).loss()[1](1.0)))
    found, wanted = optim.accumulate(parts), model.loss()[1](1.0)
    assert found.keys() == wanted.keys()
    # A promise for the whole batch, and one for the weighted mean of promises.
    scale = max(greatest(g) for _, part in [*parts, (1, wanted)] for g in part.values())
    error = max(relative_error(found[n], wanted[n], scale) for n in wanted)
    record_worst("7. accumulated micro-batches against one batch", error)
    assert error <= 2 * GRADIENT


def adamw_by_the_formula(p, gradients, lr, beta1, beta2, eps, decay):
    """Each moment as the weighted sum that its recursion unrolls to, in 40 digits."""
    lr, beta1, beta2, eps, decay = map(mpf, (lr, beta1, beta2, eps, decay))
    for t in range(1, len(gradients) + 1):
        m = (1 - beta1) * sum(beta1 ** (t - i) * gradients[i - 1] for i in range(1, t + 1))
        v = (1 - beta2) * sum(beta2 ** (t - i) * gradients[i - 1] ** 2 for i in range(1, t + 1))
        update = m / (1 - beta1**t) / (mpmath.sqrt(v / (1 - beta2**t)) + eps)
        p = p - lr * decay * p - lr * update
    return p


ADAM = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}


def error_of_adamw(step, rng):
    params = start = reals(rng)
    gradients = [reals(rng, 10.0 ** rng.uniform(-4, 1)) for _ in range(N)]
    state = optim.AdamState()
    for g in gradients:
        params, state = step(params, g, state, **ADAM)
    error = 0.0
    for name, p in params.items():
        for entry in np.ndindex(*p.shape):
            history = [mpf(g[name][entry]) for g in gradients]
            settings = (ADAM["lr"], *ADAM["betas"], ADAM["eps"], ADAM["weight_decay"])
            wanted = adamw_by_the_formula(mpf(start[name][entry]), history, *settings)
            error = max(error, abs(p[entry] - wanted) / greatest(p))
    return float(error)


@settings(max_examples=4)
@given(rng=draw.generators())
def test_ten_steps_of_adamw_are_the_formulas_in_40_digits(rng):
    error = error_of_adamw(optim.adamw, rng)
    record_worst("7. ten steps of AdamW by the formula in 40 digits", error)
    assert error <= OPTIMIZER


def test_the_defaults_are_the_papers_and_pytorchs():
    params, small = reals(np.random.default_rng(0)), reals(np.random.default_rng(1), 1e-8)
    states = [optim.AdamState()] * 2
    given_ = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    for g in (small, {name: 3 * a for name, a in small.items()}):
        (one, first), (two, second) = (
            optim.adamw(params, g, state, 0.1, **options)
            for state, options in zip(states, ({}, given_), strict=True)
        )
        assert all(same_bits(one[name], two[name]) for name in params)
        params, states = one, [first, second]
    one, _ = optim.sgd(params, small, optim.SGDState(dict(small)), 0.1)
    assert all(same_bits(one[name], p - 0.1 * small[name]) for name, p in params.items())


def test_eps_under_the_root_is_not_the_formulas():
    def wrong(params, gradients, state, lr, betas, eps, weight_decay):
        new, state = optim.adamw(params, gradients, state, lr, betas, 0.0, weight_decay)
        for name, v in state.v.items():
            v_hat, m_hat = v / (1 - betas[1] ** state.t), state.m[name] / (1 - betas[0] ** state.t)
            update = m_hat / np.sqrt(v_hat + eps**2)
            new[name] = (1 - lr * weight_decay) * params[name] - lr * update
        return new, state

    assert error_of_adamw(wrong, np.random.default_rng(0)) > OPTIMIZER


def test_adamw_runs_on_numbers_of_40_digits():
    rng = np.random.default_rng(0)
    params, g = reals(rng), reals(rng)
    found, _ = optim.adamw(params, g, optim.AdamState(), 0.01)
    digits, _ = optim.adamw(
        *({n: to_objects(a, Real) for n, a in d.items()} for d in (params, g)),
        optim.AdamState(),
        0.01,
    )
    for name, p in found.items():
        assert relative_error(p, np.vectorize(float)(digits[name])) <= OPTIMIZER


def test_the_first_step_of_adam_from_a_zero_b_moves_each_entry_by_the_rate():
    B, dB = np.zeros((4, 2)), np.random.default_rng(0).standard_normal((4, 2))
    new, _ = optim.adamw({"B": B}, {"B": dB}, optim.AdamState(), 0.1, eps=0.5, weight_decay=0.3)
    # Three roundings in each of m̂ and √v̂, one in each of the sum, the quotient and the product.
    assert relative_error(new["B"], -0.1 * dB / (abs(dB) + 0.5)) <= 9 * np.finfo(float).eps / 2
    A = np.ones((2, 3))
    new, _ = optim.adamw({"A": A}, {"A": 0 * A}, optim.AdamState(), 0.5, weight_decay=0.25)
    assert (new["A"] == 0.875).all()


@pytest.mark.parametrize("kind", optim.STEPS)
def test_a_step_changes_neither_its_arguments_nor_its_state(kind):
    step, start = optim.STEPS[kind]
    rng = np.random.default_rng(0)
    params, gradients = reals(rng), reals(rng)
    _, state = step(params, gradients, start(), 0.1)
    moments = [d for d in vars(state).values() if isinstance(d, dict)]
    arrays = [a for d in (params, gradients, *moments) for a in d.values()]
    before = [a.copy() for a in arrays]
    for a in arrays:
        a.setflags(write=False)
    one, after = step(params, gradients, state, 0.1)
    two, _ = step(params, gradients, state, 0.1)
    assert all(same_bits(a, b) for a, b in zip(arrays, before, strict=True))
    assert all(same_bits(one[name], two[name]) for name in one)
    assert after is not state
    assert not any(np.shares_memory(one[name], params[name]) for name in params)


@pytest.mark.parametrize("kind", optim.STEPS)
@pytest.mark.parametrize("dtype", [np.float32, np.longdouble])
@pytest.mark.parametrize("number", [float, np.float64])
def test_steps_and_clipping_keep_the_dtype(kind, dtype, number):
    step, start = optim.STEPS[kind]
    cast = [
        {n: a.astype(dtype) for n, a in reals(np.random.default_rng(i)).items()} for i in (0, 1)
    ]
    params, gradients = cast
    clipped, norm = optim.clip(gradients, number(0.1))
    assert norm.dtype == dtype
    accumulated = optim.accumulate([(np.int64(2), clipped), (1, gradients)])
    how = {"weight_decay": number(0.1)}
    how |= {"betas": (number(0.9), number(0.99))} if kind == "adamw" else {"momentum": number(0.5)}
    for _ in range(2):
        params, state = step(params, accumulated, start(), number(0.1), **how)
    moments = [d for d in vars(state).values() if isinstance(d, dict)]
    assert all(a.dtype == dtype for d in (params, accumulated, *moments) for a in d.values())


def test_a_parameter_that_joins_later_starts_from_nothing():
    rng = np.random.default_rng(0)
    params, g = reals(rng), reals(rng)
    few = {"a.A": params["a.A"]}
    for kind in optim.STEPS:
        step, start = optim.STEPS[kind]
        _, state = step(few, g, start(), 0.1)
        new, _ = step(params, g, state, 0.1)
        assert new.keys() == params.keys()


def test_the_norm_is_that_of_all_gradients_as_one_vector():
    g = {"a": np.array([[2.0, 3.0]]), "b": np.array([6.0])}
    assert optim.global_norm(g) == 7
    with pytest.raises(ValueError, match="no gradients: nothing is trained"):
        optim.global_norm({})


def test_clipping_shortens_what_is_too_long_and_nothing_else():
    g = {"a": np.array([[2.0, 3.0]]), "b": np.array([6.0])}
    short, norm = optim.clip(g, 3.5, eps=0.0)
    assert norm == 7
    assert all((short[name] == g[name] / 2).all() for name in g)
    for at_least in (7.0, 8.0):
        same, norm = optim.clip(g, at_least, eps=0.0)
        assert norm == 7
        assert all(same_bits(same[name], g[name]) for name in g)
    nothing, _ = optim.clip(g, 0.0)
    assert not any(each.any() for each in nothing.values())
    shorter, _ = optim.clip(g, 3.5, eps=7.0)
    assert all((shorter[name] == g[name] / 4).all() for name in g)
    default, _ = optim.clip(g, 3.5)
    assert greatest(default["b"] - 6 * 3.5 / (7 + 1e-6)) <= 6 * np.finfo(float).eps


@FEW
@given(model=draw.model_cases())
def test_clipping_keeps_the_factors_gradients_balanced(model):
    g, _ = optim.clip(model.loss()[1](1.0), 1e-2)
    for at in model.tuning.scale:
        A, B, dA, dB = (d[f"{at}.{part}"] for d in (model.W, g) for part in "AB")
        bound = greatest(dB) * abs(B).sum(0).max() + greatest(dA) * abs(A).sum(1).max()
        assert greatest(B.T @ dB - dA @ A.T) <= GRADIENT * bound


def test_schedules_rise_and_fall_as_their_formulas_say():
    for kind, at_the_half in (("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)):
        factors = [optim.schedule(kind, k, 12, warmup=4) for k in range(15)]
        assert factors[:5] == [0, 0.25, 0.5, 0.75, 1]
        assert math.isclose(factors[8], at_the_half, rel_tol=np.finfo(float).eps)
        end = 1.0 if kind == "constant" else 0.0
        assert factors[12:] == [end] * 3
        assert optim.schedule(kind, 0, 5) == 1
    linear = [optim.schedule("linear", k, 8) for k in range(9)]
    assert linear == [1 - k / 8 for k in range(9)]
    for k in range(9):
        wanted = math.cos(math.pi * k / 16) ** 2
        # The half-angle formula: both sides are off by a few roundings of numbers up to 1.
        assert abs(optim.schedule("cosine", k, 8) - wanted) <= 4 * np.finfo(float).eps
    for total, warmup in ((3, 3), (2, 4)):  # nothing is left after rising: it is over at once
        assert optim.schedule("linear", warmup, total, warmup) == 0
        assert optim.schedule("linear", warmup - 1, total, warmup) == (warmup - 1) / warmup
    with pytest.raises(
        ValueError, match="lr_scheduler 'step': expected one of constant, linear, cos"
    ):
        optim.schedule("step", 0, 1)


def off_the_best(gradient, s, rng):
    """|(s g A - dW) Aᵀ| over s |g| |A| |Aᵀ| + |dW| |Aᵀ|, for dB = s dW Aᵀ."""
    A, dW = rng.standard_normal((3, 5)), rng.standard_normal((4, 5))
    g = gradient(s * dW @ A.T, A, s)
    size = (s * abs(g) @ abs(A) + abs(dW)) @ abs(A).T
    return float((abs((s * g @ A - dW) @ A.T) / size).max())


@FEW
@given(rng=draw.generators(), s=st.sampled_from((0.5, 7 / 3, 16.0)))
def test_lorafas_step_of_b_moves_the_weight_most_like_the_full_gradient(rng, s):
    assert off_the_best(optim.lorafa_gradient, s, rng) <= GRADIENT


@pytest.mark.parametrize(
    "wrong",
    [
        lambda dB, A, s: dB,
        lambda dB, A, s: optim.lorafa_gradient(dB, A, s) * s,
        lambda dB, A, s: optim.lorafa_gradient(dB, A, s) * (1 + 1e-11),
    ],
)
def test_another_step_of_b_does_not(wrong):
    assert off_the_best(wrong, 7 / 3, np.random.default_rng(0)) > GRADIENT


def test_lorafa_with_orthogonal_rows_divides_by_their_squares_exactly():
    A = np.array([[1.0, 1, 1, 1], [2, -2, 2, -2]])
    assert (optim.lorafa_gradient(np.array([[3.0, 5]]), A, 2.0) == [[3 / 16, 5 / 64]]).all()
    with pytest.raises(np.linalg.LinAlgError):
        optim.lorafa_gradient(np.ones((1, 2)), np.ones((2, 3)), 1.0)


def test_loraplus_gives_each_b_a_rate_of_its_own():
    rates = optim.loraplus_rates(["x.A", "x.B", "x.Bias", "B"], 0.5, 16)
    assert rates == {"x.A": 0.5, "x.B": 8.0, "x.Bias": 0.5, "B": 0.5}
    rng = np.random.default_rng(0)
    params, g = reals(rng), reals(rng)
    new, _ = optim.sgd(params, g, optim.SGDState(), optim.loraplus_rates(list(params), 0.5, 4))
    for name, p in params.items():
        assert (new[name] == p - (2.0 if name == "a.B" else 0.5) * g[name]).all()


def test_a_run_accumulates_clips_schedules_and_steps_in_this_order():
    rng = np.random.default_rng(0)
    params = reals(rng)
    items = [reals(rng), [(1, reals(rng)), (3, reals(rng))], reals(rng)]
    settings = {
        "lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.2, "max_grad_norm": 1.5,
        "schedule": "cosine", "warmup_steps": 1, "total_steps": 5, "loraplus_lr_ratio": 4.0,
    }  # fmt: skip
    history = optim.run(params, items, settings)
    assert len(history) == 3
    state = optim.AdamState()
    for k, item in enumerate(items):
        g = item if isinstance(item, dict) else optim.accumulate(item)
        g, _ = optim.clip(g, 1.5)
        rate = 0.1 * optim.schedule("cosine", k, 5, 1)
        rates = {name: rate * (4.0 if name == "a.B" else 1.0) for name in params}
        params, state = optim.adamw(params, g, state, rates, (0.8, 0.9), 1e-3, 0.2)
        for name, p in params.items():
            assert relative_error(history[k][name], p) <= GRADIENT
    assert any((history[2][name] != history[1][name]).any() for name in params)


def test_a_run_without_settings_is_a_constant_rate_without_clipping():
    rng = np.random.default_rng(0)
    params, items = reals(rng), [reals(rng, 100.0) for _ in range(3)]
    for given_settings, step, start in (
        ({"lr": 0.1}, optim.adamw, optim.AdamState()),
        ({"lr": 0.1, "optimizer": "sgd", "momentum": 0.5}, optim.sgd, optim.SGDState()),
        (
            {"lr": 0.1, "max_grad_norm": None, "loraplus_lr_ratio": None},
            optim.adamw,
            optim.AdamState(),
        ),
    ):
        history, expected, state = optim.run(params, items, given_settings), params, start
        for found, g in zip(history, items, strict=True):
            options = {"momentum": 0.5} if step is optim.sgd else {}
            expected, state = step(expected, g, state, 0.1, **options)
            assert all(same_bits(found[name], p) for name, p in expected.items())


def test_a_linear_run_ends_with_its_steps_unless_told_otherwise():
    params = {"a": np.zeros(1)}
    items = [{"a": np.ones(1)}] * 4
    history = optim.run(params, items, {"lr": 1.0, "optimizer": "sgd", "schedule": "linear"})
    assert [p["a"].item() for p in history] == [-1, -1.75, -2.25, -2.5]


def test_settings_that_mean_nothing_to_an_optimizer_are_refused():
    for wrong, message in (
        ({"optimizer": "adam"}, "optimizer 'adam': expected one of adamw, sgd"),
        ({"lr": 1, "momentum": 0.9}, r"settings \['momentum'\] mean nothing to adamw"),
        (
            {"lr": 1, "optimizer": "sgd", "eps": 1, "betas": 1},
            r"\['betas', 'eps'\] mean nothing to",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            optim.run({}, [], wrong)


@FEW
@given(model=draw.model_cases(p=(0.0,)))
def test_training_moves_the_adapters_and_leaves_every_bit_of_the_base(model):
    frozen = ml.disable(model.W)
    before = {name: w.copy() for name, w in frozen.items()}
    params = {name: model.W[name] for name in model.tuning.trained}
    state = optim.AdamState()
    for _ in range(3):
        _, back = model.loss(model.W | params)
        params, state = optim.adamw(params, back(1.0), state, 0.01)
    assert all(same_bits(frozen[name], w) for name, w in before.items())
    assert all((params[name] != model.W[name]).any() for name in params if name.endswith(".B"))


def test_a_rate_that_is_a_scalar_of_numpy_keeps_the_dtype():
    p = {"q.A": np.ones((1, 2), np.float32)}
    for rate in (np.float64(0.1), {"q.A": np.float64(0.1)}):
        assert optim.adamw(p, p, optim.AdamState(), rate)[0]["q.A"].dtype == np.float32
        assert optim.sgd(p, p, optim.SGDState(), rate)[0]["q.A"].dtype == np.float32


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, "expected lr, the learning rate"),
        ({"lr": 0.1, "max_grad_norm": -1.0}, "max_norm -1.0: expected 0 or more"),
        ({"lr": 0.1, "max_grad_norm": np.nan}, "max_norm nan: expected 0 or more"),
        ({"lr": 0.1, "warmup_steps": -1}, "warmup -1: expected 0 steps or more"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, found):
    p = {"q.A": np.ones((1, 2))}
    with pytest.raises(ValueError, match=found):
        optim.run(p, [p], settings)
