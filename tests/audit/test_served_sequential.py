"""The sequential test of what a server serves: its error rates, its power, its forecasts."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom, norm

from minilora.audit.served.decision import decide
from minilora.audit.served.sequential import CHANCE, Choices, Values, log_evidence

pytestmark = pytest.mark.slow

ERROR = 0.05
RUNS = 100
LOOKS = (5, 10, 20, 40, 80, 160)
MAD = norm.ppf(0.75)
"""The median absolute deviation of a normal number of variance 1."""


def correlated(rng, n):
    e = rng.normal(size=n)
    for i in range(1, n):
        e[i] = 0.5 * e[i - 1] + e[i] * 0.75**0.5
    return e


NOISES = {
    "of float32": lambda rng, n, to: 1e-6 * rng.normal(size=n),
    "of half precision": lambda rng, n, to: 0.01 * rng.normal(size=n),
    "of four bits": lambda rng, n, to: 0.1 * rng.normal(size=n),
    "with heavy tails": lambda rng, n, to: 0.02 * rng.standard_cauchy(n),
    "that is mostly nothing": lambda rng, n, to: rng.normal(size=n) * (rng.random(n) < 0.2) * 0.1,
    "moved by its median deviation": lambda rng, n, to: 0.05 * (rng.normal(size=n) + MAD * to),
    "of which half goes on": lambda rng, n, to: 0.05 * correlated(rng, n),
    "of two digits": lambda rng, n, to: rng.choice([-0.005, 0.005], n) * rng.random(n),
}


NODES = (-1, -0.5, 0, 0.5, 1, 2, 4)


def curve_of(seed, n=160, effect=1.0):
    """The log-probabilities of the base, and of the adapter at a factor."""
    rng = np.random.default_rng((7, seed))
    base = -rng.exponential(2, n)
    change = effect * rng.normal(size=n) * rng.exponential(size=n)
    bend = rng.normal(0, 0.1, n)
    return base, change, lambda f: base + change * (f + bend * f * (f - 1))


def world(seed, truth, noise, n=160, effect=1.0):
    """n tokens of a server that serves ``truth``: a factor, None for the base, or "other".

    ``noise(rng, n, to)``: ``to`` is 1 where the adapter raises the log-probability, else -1.
    """
    rng = np.random.default_rng(seed)
    base, change, curve = curve_of(seed, n, effect)
    if truth == "other":
        y = base + effect * rng.normal(size=n)
    else:
        y = base if truth is None else curve(truth)
    curves = np.array([curve(f) for f in NODES])
    coarse = 0.1 * rng.normal(size=n)
    y = y + noise(rng, n, np.sign(change))
    return Values(y, base, np.array(NODES, float), curves, coarse, 1e-7)


def first(values, n):
    parts = {name: getattr(values, name)[..., :n] for name in ("y", "base", "curves", "coarse")}
    return replace(values, **parts)


def wrong(values, truth, error=ERROR):
    """Whether the truth is ever excluded, at any of many looks."""
    for n in LOOKS:
        part = first(values, n)
        log_e = part.against_base() if truth is None else part.against(np.array([truth]))[0]
        if log_e >= -np.log(error):
            return True
    return False


def fitted(values, curve, n):
    """With a further setting: the factor that explains the first n tokens best."""
    f = first(values, n).estimate()
    order = np.argsort([*values.nodes, f])
    nodes = np.array([*values.nodes, f])[order]
    since = np.array([*np.zeros(len(values.nodes)), n])[order]
    return replace(values, nodes=nodes, since=since, curves=np.array([curve(g) for g in nodes]))


def most(runs, error):
    """More errors than this have a probability below 1e-6, if each has at most ``error``."""
    return binom.isf(1e-6, runs, error)


def test_a_bet_gains_nothing_in_expectation_if_the_setting_is_true():
    for n in (1, 3, 10, 100):
        k = np.arange(n + 1)
        capital = np.exp(log_evidence(k, np.full(n + 1, n)))
        assert (binom.pmf(k, n, CHANCE) @ capital) == pytest.approx(1, rel=1e-12)
        for p in (0.0, 0.3, 0.7):
            assert binom.pmf(k, n, p) @ capital <= 1
        assert binom.pmf(k, n, 0.9) @ capital > 1  # what a false setting pays


QUICK = ("of half precision", "moved by its median deviation")


@pytest.mark.slow
@pytest.mark.parametrize(
    "noise", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NOISES]
)
@pytest.mark.parametrize("truth", [1.0, pytest.param(None, marks=pytest.mark.slow)])
def test_the_truth_is_excluded_no_more_often_than_said_however_often_one_looks(truth, noise):
    errors = sum(wrong(world(i, truth, NOISES[noise]), truth) for i in range(RUNS))
    assert errors <= most(RUNS, ERROR)


@pytest.mark.slow
def test_a_bet_on_what_fits_the_tokens_before_keeps_the_rate_and_finds_a_near_factor():
    noise = NOISES["of half precision"]

    def errs(seed, truth):
        values = fitted(world(seed, truth, noise), curve_of(seed)[2], 40)
        return wrong(values, 1.0)

    assert sum(errs(i, 1.0) for i in range(RUNS)) <= most(RUNS, ERROR)
    assert sum(errs(i, 1.05) for i in range(20)) >= 18


@pytest.mark.slow
def test_the_rate_is_not_kept_where_the_noise_is_not_the_models():
    def moved(rng, n, to):
        return 0.05 * (rng.normal(size=n) + 4 * MAD * to)

    def coarser(rng, n, to):
        return 2.0 * rng.normal(size=n)

    for noise in (moved, coarser):
        assert sum(wrong(world(i, 1.0, noise), 1.0) for i in range(40)) > most(40, ERROR)


def test_a_test_of_a_fixed_size_would_err_more_often_when_looked_at_again_and_again():
    def excluded(y, chance):
        ends = binom.isf(ERROR, np.arange(1, len(y) + 1), chance)
        return (np.cumsum(y) > ends).any()

    rng = np.random.default_rng(0)
    draws = rng.random((RUNS, 1000)) < CHANCE
    assert sum(excluded(y, CHANCE) for y in draws) > most(RUNS, ERROR)
    n = np.full(1000, 1).cumsum()
    ever = [(log_evidence(np.cumsum(y), n) >= -np.log(ERROR)).any() for y in draws]
    assert sum(ever) <= most(RUNS, ERROR)


@pytest.mark.parametrize("noise", ["of float32", "of half precision", "with heavy tails"])
@pytest.mark.parametrize(
    ("truth", "serves"), [(1.0, "adapter"), (None, "base"), (2.0, "factor"), ("other", "other")]
)
def test_it_decides_and_rightly(truth, serves, noise):
    found = [decide(world(i, truth, NOISES[noise], 400), 1e-3) for i in range(10)]
    assert [d.serves for d in found].count(serves) >= 9
    assert {d.serves for d in found} <= {serves, ""}
    if serves == "factor":
        assert all(d.low <= truth <= d.high for d in found)


@pytest.mark.parametrize("truth", [1.0, None])
def test_in_four_bits_it_decides_rightly_or_not_yet(truth):
    found = [decide(world(i, truth, NOISES["of four bits"], 400), 1e-3) for i in range(10)]
    assert {d.serves for d in found} <= {"adapter" if truth else "base", ""}
    assert sum(bool(d.serves) for d in found) >= 8


def test_the_interval_narrows_with_the_noise_and_with_the_tokens():
    def width(noise, n):
        d = decide(first(world(0, 1.0, NOISES[noise], 160), n), 1e-3)
        return d.high - d.low

    assert width("of half precision", 160) < width("of four bits", 160)
    assert width("of half precision", 160) < width("of half precision", 30)


def test_it_says_about_how_many_tokens_are_missing():
    values = world(0, 1.0, NOISES["of half precision"])
    early = decide(first(values, 12), 1e-3)
    assert not early.serves
    needed = 12 + early.more
    assert needed >= 24  # a token multiplies a capital by 4/3 at most
    assert decide(first(values, needed), 1e-3).serves == "adapter"


def test_where_the_adapter_hides_in_the_noise_no_number_of_tokens_tells():
    d = decide(world(0, 1.0, NOISES["of four bits"], effect=0.001), 1e-3)
    assert (d.serves, d.more) == ("", None)


def test_without_an_adapter_it_is_the_base_or_not():
    none = {"nodes": np.zeros(0), "curves": np.zeros((0, 160))}
    for truth, serves in ((None, "base"), ("other", "other")):
        values = replace(world(0, truth, NOISES["of half precision"]), **none)
        assert decide(values, 1e-3).serves == serves
    assert not decide(first(replace(values, curves=none["curves"]), 3), 1e-3).serves


def choices(seed, truth, flips, n=250):
    """The tokens that a server takes: under each setting another of few, flipped by noise."""
    rng = np.random.default_rng(seed)
    nodes = np.array([-0.5, 0.0, 0.5, 1.0, 2.0, 4.0])
    best = rng.integers(0, 3, (7, n))
    best[6] = best[1]  # without an adapter's effect the base
    own = {None: 6, 0.5: 2, 1.0: 3, 2.0: 4}
    taken = rng.integers(0, 3, n) if truth == "other" else best[own[truth]]
    taken = np.where(rng.random(n) < flips, rng.integers(0, 3, n), taken)
    return Choices(best[6] == taken, nodes, best[:6] == taken, rng.random(n) > 0.1)


@pytest.mark.parametrize(
    ("truth", "serves"), [(1.0, "adapter"), (None, "base"), (2.0, "factor"), ("other", "other")]
)
def test_the_tokens_that_it_takes_decide_too(truth, serves):
    found = [decide(choices(i, truth, 0.1), 1e-3).serves for i in range(10)]
    assert found.count(serves) >= 9
    assert {*found} <= {serves, ""}


def test_tokens_exclude_the_truth_no_more_often_than_said():
    def errs(seed):
        return any(
            choices(seed, 1.0, 0.3, n).against(np.array([1.0]))[0] >= -np.log(ERROR) for n in LOOKS
        )

    assert sum(errs(i) for i in range(RUNS)) <= most(RUNS, ERROR)
