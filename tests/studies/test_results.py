"""Recorded results: short files of reports, what changed between releases, and their page."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minilora.cli.main import main
from minilora.findings import FINDINGS
from minilora.studies.results import summary as summary_module
from minilora.studies.results.changes import changes, common, deviating, latest, releases
from minilora.studies.results.page import page
from minilora.studies.results.summary import (
    joined,
    read_summaries,
    read_summary,
    summary_of,
    write_summary,
)
from minilora.verify.core.dtypes import Precision
from minilora.verify.core.types import Judgement
from minilora.verify.peers import PEERS
from minilora.verify.report.report import Report
from minilora.verify.report.result import Known, Result

RECORDED = Path(__file__).parents[2] / "docs" / "results"


def result(check, status, dtype="float32", **more):
    worst = Judgement(
        "y", "pass" if status == "pass" else "fail", 2, 1, 9, 9, 5, 2, (0, 1), 2, 1, 0.1
    )
    precision = Precision(dtype, dtype)
    level = check.partition(".")[0]
    more |= {} if status in ("pass", "skip") else {"arrays": (worst,), "deviating_cases": 1}
    return Result(check, level, "a title", dtype, precision, status, cases=3, **more)


def test_levels_that_were_asked_apart_are_put_together():
    one = summary("1", linear_one="pass", merge_one="fail")
    other = summary("1", merge_one="pass", module_one="fail")
    wider = replace(other, dtypes=("float64", "float32"), checks={"module": {"module.one": ".F"}})
    both = joined(one, wider)
    assert both.checks == {
        "linear": {"linear.one": "-."},
        "merge": {"merge.one": "-F"},
        "module": {"module.one": ".F"},
    }
    assert [each.check for each in both.deviations] == ["merge.one", "module.one"]
    assert joined(one, other).status("merge", "merge.one") == "pass"
    assert [each.check for each in joined(one, other).deviations] == ["module.one"]
    assert joined(one, replace(other, seed=1)) == replace(other, seed=1)
    assert joined(one, one) == one


def report(version, **statuses):
    """A report on a release, with a status for each check, in the order of their names."""
    results = tuple(result(name.replace("_", "."), each) for name, each in statuses.items())
    return Report("lib", version, ("float32",), {}, {}, "ci", 0, results, 1.0)


def summary(version, **statuses):
    return summary_of(report(version, **statuses))


def test_a_summary_is_read_as_it_was_written(tmp_path):
    known = Known("because", "(finding peft.safe-merge)")
    results = (
        result("merge.two", "known", known=known, smallest={"r": 1, "got": 2, "want": 1}),
        result("merge.two", "pass", "float64"),
        result("linear.forward", "skip"),
    )
    made = Report("a lib", "1.2 (torch 2)", ("float64", "float32"), {}, {}, "ci", 3, results, 1.0)
    written = summary_of(made)
    path = write_summary(tmp_path, written)
    assert path.name == "a-lib-1.2-ci.json"
    assert read_summary(path) == written
    assert written.checks == {"merge": {"merge.two": ".K"}, "linear": {"linear.forward": "-s"}}
    (deviation,) = written.deviations
    assert deviation.findings == ("peft.safe-merge",)
    assert deviation.smallest == "r=1  ->  got 2, want 1"


def test_a_file_that_is_no_summary_is_refused(tmp_path, capsys):
    (tmp_path / "x.json").write_text('{"schema": 2}')
    assert main(["results", str(tmp_path)]) == 3
    assert "expected a summary of schema 1" in capsys.readouterr().err


def test_an_empty_folder_says_how_to_record(tmp_path, capsys):
    assert main(["results", str(tmp_path)]) == 2
    assert "minilora verify TARGET --json FILE" in capsys.readouterr().err


def test_a_report_is_recorded_and_shown(tmp_path, capsys):
    made = tmp_path / "r.json"
    made.write_text(report("1.0", linear_a="pass", merge_b="fail").json())
    folder = tmp_path / "new" / "results"
    assert main(["results", str(folder), "--add", str(made)]) == 0
    out = capsys.readouterr().out
    assert out == "lib 1.0 (ci): 1 hold, 1 fail\n  deviates in merge 1 fail\n"


def test_what_changed_between_two_releases_is_told_by_kind():
    old = summary("1.9", a_x="pass", a_y="fail", a_z="skip", a_w="skip", a_v="pass", a_same="known")
    new = summary(
        "1.10", a_x="fail", a_y="pass", a_z="pass", a_w="known", a_v="skip", a_same="fail"
    )
    (runs,) = releases([new, old]).values()
    assert [run.version for run in runs] == ["1.9", "1.10"]  # as numbers, not as words
    (change,) = changes(runs)
    assert change.new == ("a.x",)
    assert change.mended == ("a.y",)
    assert change.gained == ("a.z",)
    assert change.found == ("a.w",)
    assert change.lost == ("a.v",)
    assert [check for _, check in deviating(runs)] == ["a.x", "a.y", "a.w", "a.same"]
    assert latest([new, old]) == [new]
    other = replace(new, profile="quick", checks={})
    assert latest([new, other, old]) == [new]
    assert [*releases([new, other, old]).values()] == [[old, new]]


def test_runs_are_compared_by_the_checks_that_all_of_them_know():
    runs = [summary("1", a_x="pass", b_y="pass"), summary("2", a_x="fail", a_z="pass")]
    assert [run.checks for run in common(runs)] == [{"a": {"a.x": "."}}, {"a": {"a.x": "F"}}]


def test_a_check_that_one_profile_left_out_is_no_change():
    (change,) = changes([summary("1", a_x="pass"), summary("2", a_x="pass", a_new="fail")])
    assert not change.found
    assert not change.new


class Anchors(HTMLParser):
    """The ids of a page, its links within the page, and how its elements are nested."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.open, self.tables = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        of = dict(attributes)
        self.ids += [of["id"]] if "id" in of else []
        self.links += [of["href"]] if "href" in of else []
        if tag == "th":
            assert of.get("scope") in ("col", "row")
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(text):
    """The page's anchors: every element is closed, every id is one, every link leads somewhere."""
    found = Anchors(text)
    assert not found.open
    assert len(found.ids) == len(set(found.ids))
    inside = {link[1:] for link in found.links if link.startswith("#")}
    assert inside <= set(found.ids)
    return found


def test_each_cell_leads_to_the_run_the_finding_and_the_smallest_case():
    known = Known("because", "(finding peft.safe-merge)")
    off = result("merge.two", "known", known=known, smallest={"r": 1, "got": 2, "want": 1})
    made = report("1", linear_a="pass")
    one = summary_of(replace(made, results=(*made.results, off)))
    text = page([one, summary("2", linear_a="pass", merge_two="pass")], lambda id: f"f.html#{id}")
    found = checked(text)
    assert "#lib-1-ci-merge.two" in found.links
    assert "f.html#peft.safe-merge" in found.links
    assert FINDINGS["peft.safe-merge"].title in text
    assert "r=1  -&gt;  got 2, want 1" in text


def test_what_holds_among_what_was_asked_is_no_more_than_that():
    text = page([summary("1", a_x="pass", a_y="skip", a_z="fail", b_x="skip")])
    assert 'title="1 of 2 hold, 1 fail, 1 not asked"' in text
    assert '<td class="skip" data-level="b"' in text
    assert '<td class="fail" data-level="a"' in text


def test_the_page_needs_no_network_and_escapes_what_it_is_told():
    text = page([replace(summary("1", a_x="fail"), target="<b>", beside="</script>")])
    checked(text)
    assert not re.search(r"(src|href)=\"(https?:)?//", text)
    assert "<b>" not in text


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_results_name_findings_that_there_are(path):
    recorded = read_summary(path)
    assert path.stem == recorded.name
    assert {name for each in recorded.deviations for name in each.findings} <= FINDINGS.keys()


def test_the_recorded_results_make_a_page():
    checked(page(read_summaries(RECORDED))) if any(RECORDED.glob("*.json")) else pytest.skip("none")


def test_a_summary_names_no_folder_of_its_run():
    text = (
        "it raises: ValueError: folder/minilora-zf22wjyq/files/adapter: other tensors (peft.py:217)"
    )
    assert (
        summary_module._lasting(text)
        == "it raises: ValueError: files/adapter: other tensors (peft.py:217)"
    )
    assert (
        summary_module._lasting("minilora-is/here: folder/other")
        == "minilora-is/here: folder/other"
    )
    recorded = (Path(__file__).parents[2] / "docs/results").glob("*.json")
    assert not any("/minilora-" in path.read_text(encoding="utf-8") for path in recorded)


def test_every_library_that_can_be_verified_by_name_has_a_recorded_run():
    recorded = {each.target for each in read_summaries(RECORDED)}
    assert PEERS.keys() - recorded == set()
