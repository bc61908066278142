"""Every wrong implementation is caught, every check catches one, and what is right passes."""

from collections import Counter
from dataclasses import replace

import pytest

from minilora.verify import engine
from minilora.verify.checks import CHECKS
from minilora.verify.contract import DTYPES
from minilora.verify.misreadings import MISREADINGS, Misreading
from minilora.verify.misreadings.model import model
from minilora.verify.misreadings.plain import but

# What is tested is whether a check sees; to search and to diagnose would take seconds each.
BY_ID = {check.id: replace(check, smallest=None, diagnose=None) for check in CHECKS}
WRONG = [m for m in MISREADINGS if not m.equivalent]
SAME = [m for m in MISREADINGS if m.equivalent]

FAULTS = {"changes its inputs", "nan", "shape"}
"""What an answer may have. An exception would only show that the catalogue itself is broken."""

# Less than rounding in both halves, or in one; and rounding no coarser than that of the dtype.
_IN_BOTH = """
    norm-eps-1e-6 norm-eps-1e-8 norm-eps-0 norm-eps-outside norm-eps-1e-5 files-eps-default
    rope-theta-off-1-permille adapter-off-1-permille block-gelu-exact block-gelu-approximate
    loss-z-loss optimizer-decay-default
    form-tf32 rope-bfloat16 adapter-bfloat16
"""
_IN_BFLOAT16 = """
    norm-n-1 rope-theta files-theta-default block-gelu-quick optimizer-amsgrad
    optimizer-beta2-fixed optimizer-decay-after optimizer-sgd-decay-apart
    optimizer-v-coarse unmerge-coarse unmerge-delta-coarse
    scale-bfloat16 form-hidden-bfloat16 merge-bfloat16 files-bfloat16 optimizer-weights-bfloat16
"""
LOST = {
    "float64": set(),
    "float32": set(),
    "bfloat16": {*_IN_BOTH.split(), *_IN_BFLOAT16.split()},
    "float16": {*_IN_BOTH.split()},
}
"""What no check sees in a dtype."""


def by_id(m):
    return m.id


def of_level(level):
    return [check for check in BY_ID.values() if check.level == level]


def statuses(m, checks, dtype, profile="quick", seed=0):
    """What becomes of each check, for an implementation that answers whatever it is asked."""
    report = engine.run(checks, m.make(), profile=profile, dtypes=[dtype], seed=seed)
    kinds = {fault.kind: fault.message for r in report.results for fault in r.faults}
    assert kinds.keys() <= FAULTS, kinds
    return {r.check: r.status for r in report.results}


def caught(m, checks, dtype, profile="quick", seed=0):
    """The checks that fail it; loose is not caught."""
    found = statuses(m, checks, dtype, profile, seed).items()
    return {check for check, status in found if status in ("fail", "error")}


@pytest.mark.parametrize("m", WRONG, ids=by_id)
def test_a_misreading_is_caught_by_the_check_that_it_names(m):
    assert caught(m, [BY_ID[m.caught_by]], "float32") == {m.caught_by}


@pytest.mark.parametrize("m", SAME, ids=by_id)
def test_what_is_right_passes_however_it_is_written(m):
    """In float32, or in bfloat16 where it rounds more; without the vectors, which take longer."""
    dtype = "bfloat16" if m.id.endswith("stored") else "float32"
    checks = [check for check in of_level(m.level) if not check.id.endswith(".vector")]
    assert set(statuses(m, checks, dtype).values()) == {"pass"}


def test_an_exception_is_not_taken_for_a_catch():
    broken = Misreading("", "", "linear", "", (), but(s=lambda my, c: c.no_such_name))
    with pytest.raises(AssertionError, match="no_such_name"):
        statuses(broken, of_level("linear"), "float32")


def uncontrolled(misreadings):
    """The checks that no misreading names as the one that catches it."""
    return BY_ID.keys() - {m.caught_by for m in misreadings}


def test_every_check_has_a_misreading_that_it_catches():
    assert uncontrolled(WRONG) == set()


def test_a_check_without_a_misreading_is_seen():
    others = [m for m in WRONG if m.caught_by != "linear.balance"]
    assert uncontrolled(others) == {"linear.balance"}


def test_misreadings_have_names_and_formulas_of_their_own():
    assert max(Counter(m.id for m in MISREADINGS).values()) == 1
    for m in MISREADINGS:
        assert m.id.startswith(m.family.lower() + "-")
        assert m.formula
        assert m.equivalent != bool(m.caught_by)
        assert m.level in {check.level for check in CHECKS}


def test_an_edit_that_no_longer_fits_its_source_is_refused():
    with pytest.raises(ValueError, match="expected once"):
        model(rmsnorm=("no such piece", ""))()


def rates(dtype, seeds):
    """In how many of these seeds each misreading is caught; what it names is tried first."""
    counts = Counter()
    for m in WRONG:
        first, others = BY_ID[m.caught_by], of_level(m.level)
        others.remove(first)
        for seed in seeds:
            counts[m] += any(caught(m, some, dtype, "ci", seed) for some in ([first], others))
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_misreading_that_rounding_does_not_hide_is_caught(dtype):
    counts = rates(dtype, seeds := range(3))
    for family in dict.fromkeys(m.family for m in counts):
        of_family = [n for m, n in counts.items() if m.family == family]
        share = sum(of_family) / len(of_family) / len(seeds)
        print(f"{dtype} {family:10} {len(of_family):3} misreadings, caught {share:.0%}")
    print(f"{dtype} not in all seeds:", *(m.id for m, n in counts.items() if n < len(seeds)))
    assert {m.id for m, n in counts.items() if n == 0} == LOST[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", SAME, ids=by_id)
def test_what_is_right_passes_in_every_dtype_and_seed(m, dtype):
    for seed in range(3):
        found = statuses(m, of_level(m.level), dtype, "ci", seed)
        assert set(found.values()) == {"pass"}, found
