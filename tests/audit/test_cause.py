"""The probable cause of what deviates."""

import pytest

from minilora.audit.cause import cause_of
from minilora.audit.result import Entry


def entries(*verdicts, layers=None):
    layers = layers or range(len(verdicts))
    return [
        Entry(f"t{i}", verdict, "", {} if layer is None else {"layer": layer})
        for i, (verdict, layer) in enumerate(zip(verdicts, layers, strict=True))
    ]


OK, NOT = "exact", "not-applied"


@pytest.mark.parametrize(
    ("verdicts", "layers", "words"),
    [
        ((NOT, NOT), (0, 1), "the merged model is the base"),
        ((OK, NOT), (0, 1), "is not applied in layer 1 (the last)"),
        ((OK, NOT, NOT, OK), (0, 1, 2, 3), "is not applied in layers 1 to 2, and"),
        ((NOT, OK, NOT), (0, 1, 2), "is not applied in layers 0, 2, and"),
        ((OK, NOT, NOT), (None, 0, 1), "is not applied in layers 0 to 1 (the last)"),
        ((OK, NOT), (1, 1), "in t1"),
        ((OK, NOT), (0, None), "in t1"),
        ((OK, NOT, "factor"), (0, 1, 2), "in 1 of 2 deviations"),
    ],
)
def test_what_is_not_applied_is_told_by_layers_where_it_is_whole_ones(verdicts, layers, words):
    made = entries(*verdicts, layers=layers)
    cause, remedy = cause_of(made, {entry.subject for entry in made})
    assert words in cause
    assert remedy


def test_a_setting_is_told_in_its_own_words():
    wrong = Entry("vocab_size", "wrong", "256, but the table has 264 rows")
    assert cause_of([wrong])[0].startswith("vocab_size: 256, but the table has 264 rows")


def test_where_nothing_deviates_there_is_no_cause():
    assert cause_of(entries(OK, "rounded-away")) == ("", "")
