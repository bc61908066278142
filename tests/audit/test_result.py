"""The report of an audit: its order, its exit status."""

import pytest

from minilora.audit.result import SEVERITIES, VERDICTS, Entry, Report


def report(*verdicts):
    entries = tuple(Entry(f"t{i}", verdict, "") for i, verdict in enumerate(verdicts))
    return Report("merged", {}, entries)


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [
        ((), 4),
        (("exact", "rounded-away"), 0),
        (("exact", "undecided"), 4),
        (("undecided", "factor"), 1),
    ],
)
def test_the_worst_severity_is_the_exit_status(verdicts, status):
    assert report(*verdicts).exit_status == status


def test_the_worst_comes_first_and_the_order_is_kept():
    names = [e.subject for e in report("exact", "factor", "undecided", "missing").worst_first]
    assert names == ["t1", "t3", "t2", "t0"]


def test_each_verdict_has_a_severity():
    assert {severity for severity, _ in VERDICTS.values()} == set(SEVERITIES)
