"""Every wrong implementation is caught, every check catches one, and what is right passes."""

from collections import Counter

import pytest
from marks import others_slow

from minilora.verify import engine, selftest
from minilora.verify.checks.registry import CHECKS, LEVELS
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.implementation.minilora_impl import Minilora
from minilora.verify.mutants import MUTANTS
from minilora.verify.mutants.linear import LINEAR
from minilora.verify.mutants.model import MODEL

BY_ID = {check.id: check for check in CHECKS}
WRONG = [m for m in MUTANTS if not m.equivalent]

# Less than rounding in both halves, or in one; and rounding no coarser than that of the dtype.
_IN_BOTH = """
    norm-eps-1e-6 norm-eps-1e-8 norm-eps-0 norm-eps-outside norm-eps-1e-5 files-eps-default
    rope-theta-off-1-permille adapter-off-1-permille block-gelu-exact block-gelu-approximate
    loss-z-loss optimizer-decay-default
    form-tf32 rope-bfloat16 adapter-bfloat16 combine-bfloat16
    combine-one-projection
"""
_IN_BFLOAT16 = """
    norm-n-1 rope-theta files-theta-default block-gelu-quick optimizer-amsgrad
    optimizer-beta2-fixed optimizer-decay-after optimizer-sgd-decay-apart
    optimizer-v-coarse unmerge-coarse unmerge-delta-coarse
    combine-one-value-less combine-rank-one combine-rank-four
    scale-bfloat16 form-hidden-bfloat16 merge-bfloat16 files-bfloat16 optimizer-weights-bfloat16
    optimizer-decay-ends
"""
# A generator of a half precision has few numbers, which come again; and float16 holds no ε of 1e-8.
_FEW = {f"init-{name}" for name in ("entries-of-8-bits", "rows-signed", "seeds-mirrored")}
LOST = {
    "float64": set(),
    "float32": set(),
    "bfloat16": {*_IN_BOTH.split(), *_IN_BFLOAT16.split(), *_FEW},
    "float16": {
        *(*_IN_BOTH.split(), *_FEW, "optimizer-correction-ends"),
        *("dora-norm-cut-off", "merge-negligible"),  # whose numbers end before
        *("layout-near-zero", "merge-near-weight"),
    },
}
"""What no check sees in a dtype in which it is asked."""


CHECKS_WITH_MUTANTS = sorted({m.caught_by for m in WRONG})
OF_A_LAYER = [check for check in CHECKS_WITH_MUTANTS if check.startswith("linear.")]


@pytest.mark.parametrize("check", others_slow(CHECKS_WITH_MUTANTS, *OF_A_LAYER))
def test_a_mutant_is_caught_by_the_check_that_it_names(check):
    mutants = [m for m in WRONG if m.caught_by == check]
    asked = {dtype for dtype in ("bfloat16", "float32") if BY_ID[check].cases("ci", dtype)}
    caught = {m.id: selftest.catch(m, max(asked), profile="ci") for m in mutants}
    assert caught == {m.id: (check, "") for m in mutants}


QUICK = [level for level in LEVELS if level.name in ("merge", "optimizer")]


@pytest.mark.slow
@pytest.mark.parametrize("level", others_slow(LEVELS, *QUICK), ids=lambda level: level.name)
def test_what_is_right_passes_however_it_is_written(level):
    """A case in integers and one with rounding; one only where it takes a model or many steps."""
    for dtype, number in (("float32", 0), ("bfloat16", 1))[
        not level.has_exact_lane or level.cases is None :
    ]:
        assert selftest.alarms(level.name, dtype, number) == []


@pytest.mark.slow
def test_minilora_answers_a_case_of_every_check():
    """A check that it skips throughout would be held by nobody."""
    report = engine.run(CHECKS, Minilora(), profile="quick")
    assert {result.check for result in report.results if result.status == "pass"} == {
        check.id for check in CHECKS if any(check.cases("quick", dtype) for dtype in DTYPES)
    }
    assert {result.status for result in report.results} == {"pass"}


def uncontrolled(mutants):
    """The checks that no mutant names as the one that catches it."""
    return {check.id for check in CHECKS} - {m.caught_by for m in mutants}


def test_every_check_has_a_mutant_that_it_catches():
    assert uncontrolled(WRONG) == set()


def test_a_check_without_a_mutant_is_seen():
    others = [m for m in WRONG if m.caught_by != "linear.balance"]
    assert uncontrolled(others) == {"linear.balance"}


def test_mutants_have_names_and_formulas_of_their_own():
    assert max(Counter(m.id for m in MUTANTS).values()) == 1
    for m in MUTANTS:
        assert m.id.startswith(m.family.lower() + "-")
        assert m.formula
        assert m.equivalent != bool(m.caught_by)
        assert m.level in {check.level for check in CHECKS}


@pytest.mark.parametrize(
    ("reference", "edit"),
    [
        (LINEAR, "no such text"),
        (LINEAR, "dx"),
        (MODEL, "rmsnorm: no such text"),
        (MODEL, "no_such_function: text"),
    ],
)
def test_an_edit_whose_text_does_not_stand_once_in_the_reference_is_refused(reference, edit):
    with pytest.raises(ValueError, match=edit.rpartition(": ")[2]):
        reference.edited({edit: ""})()


def test_a_reference_without_edits_is_among_what_is_right():
    assert type(LINEAR.edited({})()).__name__ == "Linear"
    right = {m.id for m in MUTANTS if m.equivalent}
    assert right >= {"same-linear-rows", "same-model-rows", "same-lifecycle-in-place"}


@pytest.mark.very_slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_caught_and_named_is_all_but_what_rounding_hides(dtype):
    """Nine in ten are named: the others keep a state between calls, or break a law alone."""
    reports = [
        selftest.selftest(dtypes=[dtype], seed=seed, cases=selftest.CASES // 3) for seed in range(3)
    ]
    for report in reports:
        print(report.text())
        assert report.exit_status == 0
    assert set.intersection(*(set(r.missed[dtype]) for r in reports)) == LOST[dtype]
