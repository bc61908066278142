"""The oracle's own limits: what lies within passes, and a small multiple of it does not.

Each answer below is right but for an error whose size is derived here, from what rounding may do,
and not from the sigma that the check gives. So a limit that is widened lets the multiple through,
and its test says so. All is answered in float64 with float32's precision declared: then an error of
whatever size is there as it is written.
"""

from typing import ClassVar

import numpy as np
import pytest
from scipy.special import erf

from minilora.verify.checks import combine, init, merge, optimizer
from minilora.verify.core.dtypes import DTYPES, Precision
from minilora.verify.core.tolerance import Draws, noisy, unit_roundoff
from minilora.verify.core.types import Case
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.minilora_impl import Minilora

U = unit_roundoff("float32")
WITHIN = 1 - 2**-20
"""As good as 1: the answers carry float64's own rounding besides."""


class Erring(Minilora):
    """The specification's answers with an error of ``size`` times what the test derives."""

    precision: ClassVar = {"float64": {"storage": "float32", "accumulation": "float32"}}

    def __init__(self, size):
        self.size = size


def verdicts(check, run, implementation):
    """The different verdicts on some cases, those of them that round: the odd ones."""
    subject = GuardedImplementation(implementation)
    cases = [Case(check, "float64", number, seed) for number in (1, 3) for seed in range(5)]
    return {found.judge().verdict for case in cases for found in run(subject, case)}


class Stepping(Erring):
    """A step of SGD with its four roundings: of λ p, of that + dp, of η times it, of p less that.

    At random they err by up to u of what they round, at worst by all of it in one direction.
    """

    def __init__(self, size, at_worst):
        super().__init__(size)
        self.at_worst = at_worst

    def optimizer_steps(self, params, gradients, settings):
        (after,) = super().optimizer_steps(params, gradients, settings)
        eta, decay, rng = settings["lr"], settings["weight_decay"], np.random.default_rng(0)
        for (name, p), away in zip(params.items(), (1, -1), strict=True):
            change = eta * (decay * p + gradients[0][name])
            loses = U * np.array([eta * decay * p, change, change, after[name]])
            share = away * np.sign(loses * after[name]) if self.at_worst else rng.uniform(-1, 1)
            after[name] = after[name] + self.size * (share * loses).sum(0)
        return [after]


def test_a_step_may_round_and_not_lose_four_times_as_much():
    """The worst of n errors of one size is √(3 n) of its sigma, and at least √3 where one is all:
    four times that is beyond 6, and with 12 of them beyond twice 6 as well."""
    judged = [
        verdicts("optimizer.sgd-balance", optimizer.sgd_balance, Stepping(*how))
        for how in ((1, False), (4, True))
    ]
    assert judged == [{"pass"}, {"fail"}]


class Unmerging(Erring):
    """W with all that may be lost of it: W' and W are stored, and W ± s B A is formed twice.

    Of a term s b a the scale, two products and r sums are rounded.
    """

    def unmerge(self, W_merged, A, B, *, alpha, r, **options):
        W = super().unmerge(W_merged, A, B, alpha=alpha, r=r, **options)
        formed = (1 + 2 + r) * (abs(W) + alpha / r * (abs(B) @ abs(A)))
        return W + self.size * U * (abs(W) + abs(W_merged) + 2 * formed)


class Combining(Erring):
    """The best change of its rank, off by what a stable SVD may be: 4 √k (m + n) u ‖ΔW‖.

    It is off where the last singular value lies, and so adds to what a rank less leaves over.
    """

    def combine(self, adapters, weights, **settings):
        change = super().combine(adapters, weights)
        (m, n), k = change.shape, min(*change.shape, sum(a["r"] for a in adapters))
        V, sigma, Ut = np.linalg.svd(change)
        sigma[settings["svd_rank"] :] = 0
        off = 4 * min(m, n) ** 0.5 * (m + n) * U * np.sqrt((change**2).sum())
        sigma[k - 1] -= self.size * off
        return (V[:, : len(sigma)] * sigma) @ Ut[: len(sigma)]


class Starting(Erring):
    """An orthogonal start whose B A is no 0 but, of r² u |b| |a|, the constant that is chosen."""

    def init(self, W, *, r, alpha, seed, **settings):
        constant = 12
        A, B = np.zeros((r, W.shape[1])), np.zeros((len(W), r))
        A[:2], B[:, 0] = 1, 1  # |b| = 1 and |a| = 1, but for the square of what follows
        A[0] = self.size * constant * r * r * U
        return {"A": A, "B": B, "W": W}


@pytest.mark.parametrize(
    ("check", "run", "erring"),
    [
        ("merge.unmerge", merge._unmerge(""), Unmerging),
        ("combine.svd", combine.svd, Combining),
        ("init.orthogonal", init.orthogonal, Starting),
    ],
)
def test_a_bound_is_no_wider_than_what_is_derived(check, run, erring):
    """Twice a bound is loose still; an answer beyond that fails."""
    judged = [verdicts(check, run, erring(size)) for size in (WITHIN, 1.5, 2.5)]
    assert [found - {"pass"} for found in judged] == [set(), {"loose"}, {"fail"}]


UNIT = 2
"""A unit in the last place is at most twice u of the number that it is the last place of."""


@pytest.mark.parametrize(
    ("function", "greatest"),
    [
        (np.sqrt, UNIT / 2),
        (np.square, UNIT / 2),
        (np.exp, 2 * UNIT),
        (np.log, 2 * UNIT),
        (np.tanh, 2 * UNIT),
        (erf, 2 * UNIT),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_noise_is_half_a_unit_in_the_last_place_and_of_a_function_two(function, greatest):
    """Of N errors uniform in ± a none is beyond a, and that none is beyond 3/4 a has the
    probability (3/4)ᴺ, of 2,560 less than 10⁻³⁰⁰."""
    x = np.linspace(1.5, 2, 40)
    draws = Draws(np.random.default_rng(0), 64)
    y = function(noisy(x, Precision("float32", "float32"), draws)).runs
    most = (abs(y - function(x)) / (U * function(x))).max()
    assert 0.75 * greatest < most <= greatest


def test_of_a_million_nightly_runs_of_what_is_right_fewer_than_one_fails_by_chance():
    """And not so few that the limits could be ten times as sure."""
    drawn = ("init.distribution", "init.distribution.gaussian", "init.independent")
    counts = [
        c.cases("nightly", dtype) for c in init.LEVEL.checks if c.id in drawn for dtype in DTYPES
    ]
    assert len(counts) == len(drawn) * len(DTYPES)
    assert sum(counts) * init.FALSE_ALARM < 1e-6 < 10 * sum(counts) * init.FALSE_ALARM
