"""Level ``combine``: several adapters as one change of the weight, Σ w s B A."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from minilora.spec.multi_adapter import combine_svd
from minilora.verify.checks.combine_types import CHECKS as TYPES
from minilora.verify.checks.combine_types import svd_slack
from minilora.verify.core.inputs import (
    Layer,
    Several,
    draw_several,
    in_exact_lane,
    long,
    require_several,
    sigma_change,
    too_large,
    wanted_change,
)
from minilora.verify.core.level import VECTOR_SIZES, Level
from minilora.verify.core.tolerance import unit_roundoff
from minilora.verify.core.types import BOUND, Case, Check, Comparison, counter
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray

CASES = {"quick": 4, "ci": 24, "nightly": 480}


def combined(
    subject: GuardedImplementation,
    adapters: Sequence[Layer],
    weights: Sequence[float],
    dtype: str,
    **settings: Any,
) -> Array:
    """The implementation's combined change of the weight."""
    given = [{"A": a.A, "B": a.B, **a.merge_options()} for a in adapters]
    delta = subject.call("combine", given, [float(w) for w in weights], **settings)
    return subject.answer(delta, "ΔW", adapters[0].W.shape, dtype)


def weighted(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ over adapters of unequal ranks and scales, with weights of both signs."""
    several, exact = draw_several(case)
    delta = combined(subject, several.adapters, several.weights, case.dtype)
    sigma = None if exact else sigma_change(several, subject.precision(case.dtype))
    yield Comparison("ΔW", delta, wanted_change(several), sigma)


def single(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """One adapter at weight 1 gives ΔW = s B A, within the rounding of an SVD.

    An adapter of its rank may be found by one. What a sum loses, `weighted` asks.
    """
    several, _ = draw_several(case)
    for i, adapter in enumerate(several.adapters):
        alone = wanted_change(Several([adapter], [1.0], several.index))
        delta = combined(subject, [adapter], [1.0], case.dtype)
        yield _within_svd(subject, case, f"ΔW of adapter {i} alone", delta, alone)


def negative_weight(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Weight -1 gives the negative of weight 1, within the rounding of an SVD."""
    several, _ = draw_several(case)
    for i, adapter in enumerate(several.adapters):
        there, back = (combined(subject, [adapter], [w], case.dtype) for w in (1.0, -1.0))
        label = f"ΔW of adapter {i} at weight -1"
        yield _within_svd(subject, case, label, back, -long(there), 2.0)


def _within_svd(
    subject: GuardedImplementation,
    case: Case,
    label: str,
    got: Array,
    want: Array,
    count: float = 1.0,
) -> Comparison:
    """Two changes, of which ``count`` have the rounding of an SVD."""
    slack = count * svd_slack(want, _roundoff(subject, case.dtype))
    return Comparison(label, got, want, np.full(want.shape, slack), BOUND)


def _roundoff(subject: GuardedImplementation, dtype: str) -> float:
    """The unit roundoff of the coarser of storage and accumulation."""
    precision = subject.precision(dtype)
    return max(unit_roundoff(precision.storage), unit_roundoff(precision.accumulation))


def cat(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """The concatenation, asked for by its name, is Σ w s B A; compared by ==."""
    several, _ = draw_several(in_exact_lane(case))
    delta = combined(subject, several.adapters, several.weights, case.dtype, combination_type="cat")
    yield Comparison("ΔW", delta, wanted_change(several))


def many(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Nine adapters are combined as two are; compared by ==."""
    several, _ = draw_several(in_exact_lane(case))
    nine = _nine_of(several)
    rng = np.random.default_rng(case.number)
    while too_large(nine, case.dtype):
        nine = _nine_of(several := several.sparser(rng))
    delta = combined(subject, nine.adapters, nine.weights, case.dtype)
    yield Comparison("ΔW", delta, wanted_change(nine))


def _nine_of(several: Several) -> Several:
    """Nine of these adapters in turn, with weights of both signs."""
    adapters = [several.adapters[i % len(several.adapters)] for i in range(9)]
    weights = [
        (-1.0) ** (i // 4) * several.weights[i % min(3, len(several.weights))] for i in range(9)
    ]
    return Several(adapters, weights, several.index)


def zero_weight(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """An adapter at weight 0 changes nothing; with all weights 0, ΔW is 0; compared by ==."""
    several, _ = draw_several(in_exact_lane(case))
    require_several(several)
    first, second, *_ = several.adapters
    delta = combined(subject, [first, second], [1.0, 0.0], case.dtype)
    alone = combined(subject, [first], [1.0], case.dtype)
    yield Comparison("ΔW with another at weight 0", delta, alone)
    none = combined(subject, [first, second], [0.0, 0.0], case.dtype)
    yield Comparison("ΔW of weights 0", none, np.zeros_like(none))


def split_weight(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """An adapter four times at weight ¼ is the adapter at weight 1; compared by ==.

    A quarter's root is a power of two and a half's is not: some put √(w s) on both factors.
    """
    several, _ = draw_several(in_exact_lane(case))
    require_several(several)
    for i, adapter in enumerate(several.adapters):
        delta = combined(subject, [adapter] * 4, [0.25] * 4, case.dtype)
        alone = combined(subject, [adapter], [1.0], case.dtype)
        yield Comparison(f"four quarters of adapter {i}", delta, alone)


def order(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """The order of the adapters does not matter; compared by ==."""
    several, _ = draw_several(in_exact_lane(case))
    require_several(several)
    there = combined(subject, several.adapters, several.weights, case.dtype)
    back = combined(subject, several.adapters[::-1], several.weights[::-1], case.dtype)
    yield Comparison("ΔW in the other order", back, there)


def svd(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """The SVD combination is the best approximation of its rank, within the SVD's rounding.

    The best of all changes of a rank has ‖ΔW - answer‖ = √(Σ σ²) over the dropped ones (Eckart and
    Young 1936): what is nearer has a greater rank. An SVD that is stable, in a precision u of its
    arithmetic, is off by at most 4 √k (m + n) u ‖ΔW‖ in this norm (Golub and Van Loan 2013, section
    8.6, with the product formed anew), k = min(m, n), and by no more does the distance change. A
    rank that holds all of ΔW drops none.
    """
    several, _ = draw_several(case)
    wanted = wanted_change(several)
    full = min(*wanted.shape, sum(a.r for a in several.adapters))
    slack = svd_slack(wanted, _roundoff(subject, case.dtype))
    for rank in sorted({1, min(2, full), max(1, full - 1), full}):
        answer = combined(
            subject,
            several.adapters,
            several.weights,
            case.dtype,
            combination_type="svd",
            svd_rank=rank,
        )
        _, _, dropped = combine_svd([wanted.astype(float)], [1.0], rank)
        difference = float(np.sqrt(((long(answer) - wanted) ** 2).sum()))
        got, best = np.array(difference), np.array(float(dropped))
        yield Comparison(f"‖ΔW - ΔW of rank {rank}‖", got, best, np.array(slack), BOUND)


def _law(run: Any, share: float) -> Check:
    title = (run.__doc__ or "").splitlines()[0]
    return Check(
        f"combine.{run.__name__.replace('_', '-')}",
        "combine",
        ("combine",),
        title,
        run,
        counter(CASES, share),
    )


_CHECKS: tuple[Check, ...] = (
    _law(weighted, 1.0),
    _law(single, 0.5),
    _law(negative_weight, 0.25),
    _law(zero_weight, 0.25),
    _law(split_weight, 0.25),
    _law(order, 0.25),
    _law(svd, 0.25),
    _law(cat, 0.25),
    _law(many, 0.25),
    *(
        Check(
            f"combine.{name}",
            "combine",
            ("combine",),
            law,
            run,
            counter(CASES, 0.25, low_precision=False),
        )
        for name, (law, run) in TYPES.items()
    ),
)

LEVEL = Level(
    "combine",
    _CHECKS,
    laws=("dare-by-chance", "negative-weight", "zero-weight", "split-weight", "order"),
    relations=("negative-weight", "zero-weight", "split-weight", "order"),
    vectors={
        "weighted": VECTOR_SIZES,
        "single": VECTOR_SIZES[1:2] + VECTOR_SIZES[4:],
        "zero-weight": (("bfloat16", 0), ("float32", 1)),
        "split-weight": (("bfloat16", 0), ("float32", 1)),
    },
    exact=("zero-weight", "split-weight"),
)
