"""Right merges by PEFT, mlx-lm, minilora and in other orders of summation: no false alarm."""

import pytest
from extras import needs
from merge_catalogue.right import CASES, WRONG_AS_MADE

from minilora.audit.merged import merged

QUICK = ("unsloth's order bfloat16 usual", "rounded change float16 usual")


def modules_of(name):
    return ("mlx_lm",) if name.startswith("mlx") else ("peft", "transformers")


def cases(names):
    for name in names:
        slow = [] if name in QUICK else [pytest.mark.slow]
        yield pytest.param(name, marks=[needs(*modules_of(name)), *slow])


def said(made):
    report = merged(made.base, made.adapters, made.merged, made.weights)
    return [
        f"{e.verdict} {e.mistake} {e.subject}: {e.text}"
        for e in report.entries
        if e.severity in ("deviation", "undecided")
    ]


@pytest.mark.parametrize("name", [*cases(CASES)])
def test_a_right_merge_is_right(name, tmp_path):
    assert said(CASES[name](tmp_path)) == []


@pytest.mark.parametrize("name", [*cases(WRONG_AS_MADE)])
def test_a_merge_that_its_program_gets_wrong_is_wrong(name, tmp_path):
    make, words = WRONG_AS_MADE[name]
    assert any(words in line for line in said(make(tmp_path)))
