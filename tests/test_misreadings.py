"""Every wrong implementation is caught, every check catches one, and what is right passes."""

from collections import Counter
from dataclasses import replace

import pytest

from minilora.verify import engine
from minilora.verify.checks import CHECKS
from minilora.verify.misreadings import MISREADINGS, Misreading
from minilora.verify.misreadings.plain import but

# What is tested is whether a check sees; the search for the smallest counterexample takes seconds.
BY_ID = {check.id: replace(check, smallest=None) for check in CHECKS}
WRONG = [m for m in MISREADINGS if not m.equivalent]
SAME = [m for m in MISREADINGS if m.equivalent]

FAULTS = {"changes its inputs", "nan", "shape"}
"""An answer, though a wrong one; an exception would only show that the catalogue is broken."""


def of_level(level):
    return [check for check in BY_ID.values() if check.level == level]


def deviating(m, checks, dtype, profile="quick", seed=0):
    """The checks that this implementation does not pass."""
    report = engine.run(checks, m.make(), profile=profile, dtypes=[dtype], seed=seed)
    kinds = {fault.kind: fault.message for r in report.results for fault in r.faults}
    assert kinds.keys() <= FAULTS, kinds
    return {r.check for r in report.results if r.status not in ("pass", "skip")}


def caught(m, dtype, profile, seed):
    """Whether its level fails it: the check that it names is tried first."""
    first = BY_ID[m.caught_by]
    for checks in ([first], [check for check in of_level(m.level) if check.id != first.id]):
        report = engine.run(checks, m.make(), profile=profile, dtypes=[dtype], seed=seed)
        if report.exit_status == 1:
            return True
    return False


def named(misreadings):
    return [pytest.param(m, id=m.id) for m in misreadings]


@pytest.mark.parametrize("m", named(WRONG))
def test_a_misreading_is_caught_by_the_check_that_it_names(m):
    assert deviating(m, [BY_ID[m.caught_by]], "float32") == {m.caught_by}


@pytest.mark.parametrize("m", named(SAME))
def test_what_is_right_passes_however_it_is_written(m):
    for dtype in ("float32", "bfloat16"):
        assert deviating(m, of_level(m.level), dtype) == set()


def test_an_exception_is_not_taken_for_a_catch():
    broken = Misreading("", "", "linear", "", (), but(s=lambda my, c: c.no_such_name))
    with pytest.raises(AssertionError, match="no_such_name"):
        deviating(broken, of_level("linear"), "float32")


def uncontrolled(misreadings):
    """The checks that no misreading names as the one that catches it."""
    return BY_ID.keys() - {m.caught_by for m in misreadings}


def test_every_check_has_a_misreading_that_it_catches():
    assert uncontrolled(WRONG) == set()


def test_a_check_without_a_misreading_is_seen():
    some = [m for m in WRONG if m.caught_by != "linear.balance"]
    assert uncontrolled(some) == {"linear.balance"}


def test_misreadings_have_names_and_formulas_of_their_own():
    assert max(Counter(m.id for m in MISREADINGS).values()) == 1
    for m in MISREADINGS:
        assert m.id.startswith(m.family.lower() + "-")
        assert m.formula
        assert m.equivalent != bool(m.caught_by)
        assert m.level in {check.level for check in CHECKS}


def test_an_edit_that_no_longer_fits_its_source_is_refused():
    from minilora.verify.misreadings.model import model

    with pytest.raises(ValueError, match="expected once"):
        model(rmsnorm=("no such piece", ""))()
