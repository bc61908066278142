"""The forms of a report: every check and deviation in each, whatever a target calls itself."""

import json
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import fake_checks
import numpy as np
import pytest
from colours import contrast
from fake_checks import CHECKS, OnlyMerge, Right, WrongScale

from minilora.cli.main import main
from minilora.forms.markdown import MARKDOWN_BYTES
from minilora.verify.checks import names as names_level
from minilora.verify.core.dtypes import Precision
from minilora.verify.core.errors import UsageError
from minilora.verify.core.types import CELLS, Comparison, Diagnosis, Judgement, Picture
from minilora.verify.engine import run
from minilora.verify.loading import source_file
from minilora.verify.mutants import MUTANTS
from minilora.verify.places import places_in
from minilora.verify.report.annotations import badge, score, workflow_annotations
from minilora.verify.report.html import grade, html, where_words
from minilora.verify.report.junit import junit
from minilora.verify.report.load_report import from_json, read_report
from minilora.verify.report.markdown import markdown
from minilora.verify.report.matrix import matrix
from minilora.verify.report.mistakes import issue_of
from minilora.verify.report.report import Report
from minilora.verify.report.result import FaultSeen, Result
from minilora.verify.report.runs import Runs
from minilora.verify.report.words import cell, grouped_rows, levels

VOID = {"meta", "wbr", "rect", "path", "circle", "br"}


class Page(HTMLParser):
    """The elements of a page, refused where they are not nested or where an id comes twice."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        ids = [value for _, attributes in self.elements if (value := attributes.get("id"))]
        assert len(ids) == len(set(ids)), "an id stands for one element"
        self.ids = set(ids)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.mark.parametrize("page", ["<p><b></p></b>", "<p>", "</p>", "<p id=a></p><p id=a></p>"])
def test_a_page_that_is_not_nested_is_refused_by_these_tests(page):
    with pytest.raises(AssertionError):
        Page(page)


class Hostile(Right):
    """Wrong in one column, and named to break every format."""

    name = "</h1><script>alert(1)</script> | `x` **b** \x1b[31m\ud800"
    version = "1.0 <i>"
    conventions: ClassVar = {"a|b": "<u>"}

    def merge(self, W, A, B, *, alpha, r):
        W = super().merge(W, A, B, alpha=alpha, r=r)
        W[:, 2] += W.dtype.type(1)
        return W

    def lora_linear_vjp(self, *args, **kwargs):
        raise ValueError("<b>```` | no\nanswer")


KNOWN = {
    "sigma.merge:float64": {
        "reason": "a <reason> | `why`",
        "link": "issue 1",
        "seen": {"arrays": "W'"},
    }
}


@pytest.fixture(scope="module")
def hostile():
    return run(CHECKS, Hostile(), known=KNOWN)


@pytest.fixture(scope="module")
def several(hostile):
    return [
        hostile,
        run(CHECKS, Right(), seed=3),
        run(CHECKS, OnlyMerge(), profile="quick"),
        replace(run(CHECKS, Right()), minilora="0.0.9", interrupted=True),
    ]


def through_json(report):
    return from_json(json.loads(report.json()), "r.json")


def test_a_report_is_the_same_when_it_was_read_from_its_json(several, tmp_path):
    path = tmp_path / "r.json"
    for report in several:
        path.write_text(report.json())
        again = read_report(str(path))
        assert again.json() == report.json()
        assert again.text() == report.text()
        assert html([again]) == html([report])
        assert markdown([again], MARKDOWN_BYTES) == markdown([report], MARKDOWN_BYTES)
        assert again.exit_status == report.exit_status


def test_the_list_of_numbers_stands_in_one_line_and_no_string_is_touched(hostile):
    note = "[\n 1,\n 2\n]"
    written = replace(hostile, notes=(note,)).json()
    assert json.loads(written)["notes"] == [note]
    assert re.search(r'"z": \[\n +\[0\.0, 0\.0, null, 0\.0, 0\.0\],\n', written)


def test_a_report_of_an_earlier_version_lacks_what_came_later(hostile):
    document = json.loads(hostile.json())
    del document["notes"], document["minilora"], document["target"]["conventions"]
    for result in document["results"]:
        del result["note"], result["known"], result["skipped_cases"]
        if result["worst"]:
            del result["worst"]["picture"]
    again = from_json(document, "r.json")
    assert [r.check for r in again.results] == [r.check for r in hostile.results]
    assert again.minilora == "unknown"
    assert "<svg role" not in html([again])
    assert "<svg role" in html([hostile])


def changed(document, *path, value):
    document = json.loads(json.dumps(document))
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return document


WHOLE = json.loads(run(CHECKS, WrongScale(), dtypes=["float32"]).json())


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([1], "r.json is not a report: found a list, expected .*schema, target, results"),
        (None, "found a NoneType"),
        ({}, "found an object with nothing"),
        ({"schema": 1, "cells": []}, "found an object with schema, cells, expected"),
        ({**WHOLE, "schema": 2}, "r.json: found schema 2, expected 1; read it with the version"),
        ({**WHOLE, "target": "peft"}, "not a complete report"),
        ({**WHOLE, "results": [3]}, "complete report"),
        (
            changed(WHOLE, "results", 1, "status", value="good"),
            "result 1 has the status 'good', no",
        ),
        (changed(WHOLE, "results", 0, "dtype", value="int8"), "result 0 has the dtype 'int8'"),
        (changed(WHOLE, "results", 0, "worst", value={}), "no 'array'"),
        (changed(WHOLE, "results", 0, "worst", "index", value=[9, 9]), "index .9, 9. lies outside"),
        (
            changed(WHOLE, "results", 0, "worst", "picture", "z", value=[[1], []]),
            "different length",
        ),
        ({**WHOLE, "results": WHOLE["results"] * 2}, "exact.merge in float32 stands in it 2 times"),
        (changed(WHOLE, "results", 0, "counterexample", "smallest", value=[1]), "complete report"),
        ({k: v for k, v in WHOLE.items() if k != "seed"}, "no 'seed'; expected what `minilora ver"),
    ],
)
def test_what_is_no_report_is_refused_by_name_with_what_to_do(document, words):
    with pytest.raises(UsageError, match=words) as refused:
        from_json(document, "r.json")
    assert "--json FILE" in str(refused.value) or "write it again" in str(refused.value)


def test_what_is_no_json_is_refused(tmp_path):
    path = tmp_path / "r.json"
    with pytest.raises(UsageError, match="No such file"):
        read_report(str(path))
    for junk in (b"{", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(junk)
        with pytest.raises(UsageError, match=r"r.json is not JSON: .*; expected what `minilora"):
            read_report(str(path))


def test_a_report_without_results_has_every_form(hostile):
    empty = replace(hostile, results=(), interrupted=True)
    assert through_json(empty).json() == empty.json()
    for reports in ([empty], [empty, empty]):
        assert "Interrupted" in Page(html(reports)).text
        assert "Interrupted" in markdown(reports, MARKDOWN_BYTES)
        assert "INTERRUPTED" in matrix(Runs(reports))
    assert "INTERRUPTED" in empty.text()


# Where a deviation sits


def picture(difference):
    got = np.asarray(difference, float)
    return Comparison("y", got, np.zeros_like(got), np.ones_like(got)).picture()


def test_a_picture_shows_z_and_marks_the_worst_element():
    z = np.arange(12.0).reshape(3, 4)
    drawn = picture(z)
    assert drawn == Picture((3, 4), tuple(map(tuple, z.tolist())))
    assert drawn.cell((2, 3)) == (2, 3)
    assert picture(z.reshape(3, 2, 2)).z == picture(z.reshape(6, 2)).z
    assert picture(z.reshape(3, 2, 2)).cell((1, 0, 1)) == (2, 1)
    assert picture([3.0, 4.0]).z == ((3.0, 4.0),)
    assert picture([3.0, 4.0]).cell((1,)) == (0, 1)
    assert (picture(5.0).z, picture(5.0).cell(())) == (((5.0,),), (0, 0))


@pytest.mark.parametrize("shape", [(1, 33), (70, 5), (100, 1000), (31, 32)])
def test_a_large_array_is_drawn_in_few_cells_and_no_element_is_lost(shape):
    for index in ((0, 0), tuple(n - 1 for n in shape), tuple(n // 2 for n in shape)):
        z = np.zeros(shape)
        z[index] = 9.0
        drawn = picture(z)
        assert (len(drawn.z), len(drawn.z[0])) == tuple(min(n, CELLS) for n in shape)
        off = [(i, j) for i, row in enumerate(drawn.z) for j, v in enumerate(row) if v]
        assert off == [drawn.cell(index)]


def test_only_the_worst_of_what_deviates_has_a_picture(hostile):
    for result in hostile.results:
        assert (result.worst is not None and result.worst.picture is not None) == (
            result.worst is not None and result.worst.verdict != "pass"
        )
    first = hostile.results[0].worst
    assert {z for row in first.picture.z for z in row[:2] + row[3:]} == {0.0}
    assert {row[2] for row in first.picture.z} == {np.inf}
    assert first.picture.cell(first.index)[1] == 2


def test_a_cell_is_graded_by_the_limit_and_by_the_worst():
    zs = (0, 6, 6.1, 59, 61, 5900, 6100, 60000)
    assert [grade(z, 6, 60000) for z in zs] == [0, 1, 2, 2, 3, 3, 4, 4]
    assert [grade(z, 0, np.inf) for z in (0, np.inf)] == [0, 4]


def test_where_a_deviation_sits_is_said_in_words():
    def words(grades):
        return where_words(Picture((), tuple(tuple(map(float, row)) for row in grades)), grades)

    assert words([[1, 4], [0, 4], [1, 2]]) == "beyond the limit in column 1 alone"
    assert words([[1, 1], [4, 4], [1, 1]]) == "beyond the limit in row 1 alone"
    assert words([[4, 4]]) == "beyond the limit everywhere"
    assert words([[0, 0, 0], [0, 4, 0]]) == "beyond the limit in row 1 alone and in column 1 alone"
    assert words([[1, 0]]).startswith("no single element")
    checkered = [[(i + j) % 2 * 4 for j in range(9)] for i in range(9)]
    assert words(checkered) == "beyond the limit in 9 of 9 rows and 9 of 9 columns"


# The page


def test_the_page_has_every_check_and_every_failure_of_the_json(hostile, several):
    for reports in ([hostile], several):
        page = Page(html(list(map(through_json, reports))))
        for i, report in enumerate(reports):
            for entry in json.loads(report.json())["results"]:
                assert {entry["check"], f"{entry['check']}@{i + 1}"} <= page.ids
                assert " ".join(entry["title"].split()) in page.text
                if entry["status"] in ("fail", "error", "loose", "known"):
                    assert entry["reproduce"] in page.text
                    assert entry["counterexample"]["case"] in page.text
                    for fault in entry["faults"]:
                        assert fault["message"] in page.text


def test_the_page_lacks_a_failure_that_the_report_lacks(hostile):
    assert "dict.vjp" in Page(html([hostile])).text
    without = replace(hostile, results=hostile.results[:4])
    assert "dict.vjp" not in Page(html([without])).text


def test_every_link_leads_somewhere_and_nowhere_outside(several):
    whole = html(several)
    page = Page(whole)
    links = {attributes["href"] for attributes in page.named("a")}
    assert links
    assert {link.removeprefix("#") for link in links} <= page.ids
    assert not re.search(r"https?:|//|@import|url\(|<link|<script|<img|<iframe", whole)
    assert not any("src" in attributes for _, attributes in page.elements)


def test_what_a_target_says_is_text_and_no_markup(hostile, several):
    for whole in (html([hostile]), html(several)):
        assert "<script" not in whole
        assert "<b>" not in whole
        assert "&lt;script&gt;alert(1)" in whole
        assert "a &lt;reason&gt; | `why`" in whole
        assert all(c.isprintable() or c == "\n" for c in whole)
        whole.encode()
    forged = replace(hostile, name="a\ud800\x00<b>", notes=("<b>\x07",))
    html([forged]).encode()
    assert "<b>" not in html([forged])


def test_the_page_is_for_phones_for_dark_rooms_and_for_screen_readers(several):
    whole = html(several)
    page = Page(whole)
    assert "prefers-color-scheme: dark" in whole
    assert {"width=device-width, initial-scale=1"} <= {a.get("content") for a in page.named("meta")}
    assert page.named("html")[0]["lang"] == "en"
    assert all(a.get("scope") in ("col", "row") for a in page.named("th"))
    assert len(page.named("caption")) == len(page.named("table"))
    assert len(page.named("summary")) == len(page.named("details"))
    assert len(page.named("h1")) == len(page.named("main")) == 1
    for svg in page.named("svg"):
        assert svg.get("aria-hidden") == "true" or (svg["role"] == "img" and svg["aria-label"])
    # No colour alone: each status has a sign of its own, and its word for who cannot see it.
    assert "✗" in whole
    assert "float32 FAIL" in page.text
    wide = [a for a in page.named("div") if a.get("class") == "wide"]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in wide)


def test_the_picture_on_the_page_marks_the_worst_cell(hostile):
    page = Page(html([hostile]))
    drawn = [svg for svg in page.named("svg") if svg.get("role") == "img"]
    assert "in column 2 alone" in drawn[0]["aria-label"]
    first = hostile.results[0].worst
    row, column = first.picture.cell(first.index)
    ring = page.named("circle")[0]
    assert (int(ring["cx"]), int(ring["cy"])) == (10 * column + 5, 10 * row + 5)
    assert len(page.named("circle")) == len(drawn)


def test_the_worst_level_comes_first_and_is_open(several):
    page = Page(html(several))
    levels = [a for a in page.named("details") if a.get("class") == "level"]
    assert "open" in levels[0]
    assert "open" not in levels[-1], "where all hold, it is folded"
    order = re.findall(r'id="level-(\w+)"', html(several))
    assert order == ["merge", "linear", "optimizer"]


def test_differing_runs_are_told(several):
    says = "The runs differ in profile (ci, quick); seed (0, 3); minilora (0.1.0, 0.0.9)"
    says = says.replace("0.1.0", several[0].minilora)
    assert says in Page(html(several)).text
    assert says in matrix(Runs(several)).replace("\n  ", " ")
    assert says in markdown(several, MARKDOWN_BYTES)
    same = [several[0], several[0]]
    for form in (html(same), matrix(Runs(same)), markdown(same, MARKDOWN_BYTES)):
        assert "The runs differ" not in form
    assert "right 1.2 #2" in Runs([several[1]] * 2).labels
    assert "Interrupted" in html(several)
    assert "INTERRUPTED" in matrix(Runs(several))


def test_what_is_written_and_drawn_stands_out_by_day_and_by_night(hostile):
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#9db4d3", "#f6f8fa") < 3, "this was too faint"
    palettes = re.findall(r":root \{(.*?)\}", html([hostile]), re.S)
    assert len(palettes) == 2
    for palette in palettes:
        colours = dict(re.findall(r"--(\w+): (#\w+)", palette))
        for ground in ("page", "box"):
            for name in ("ink", "soft", "fail", "odd", "pass"):
                assert contrast(colours[name], colours[ground]) >= 4.5
        for name in ("z1", "z2", "z3", "z4", "ink"):
            assert contrast(colours[name], colours["box"]) >= 3


def keys(value):
    """All keys of a document, but those that a target gave."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield key
            if key not in ("conventions", "smallest"):
                yield from keys(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from keys(entry)


def test_every_key_of_the_json_is_documented(several):
    guide = (Path(__file__).parents[2] / "docs" / "verify" / "reports.md").read_text()
    (section,) = re.findall(r"^## Read the JSON$(.*)", guide, re.M | re.S)
    documented = set(re.findall(r"`(\w+)`", section))
    found = {key for report in several for key in keys(json.loads(report.json()))}
    assert {"check", "picture", "no_longer_fails", "versions"} <= found
    assert found <= documented


# Markdown


def cells_of(line):
    return re.split(r"(?<!\\)\|", line.strip())[1:-1]


def test_the_table_of_markdown_has_as_many_cells_in_each_line(hostile, several):
    for reports in ([hostile], several):
        lines = markdown(reports, MARKDOWN_BYTES).splitlines()
        table = [line for line in lines if line.startswith("|")]
        assert len({len(cells_of(line)) for line in table}) == 1
        assert "exact.merge" in table[2]


def test_markdown_takes_nothing_from_a_target_as_markup(hostile):
    whole = markdown([hostile], MARKDOWN_BYTES)
    blocks = re.findall(r"^(`{3,})text\n(.*?)\n\1$", whole, re.M | re.S)
    bad = [r for r in hostile.results if r.status in ("fail", "error", "loose")]
    assert len(blocks) == len(bad)
    assert all(ticks not in body for ticks, body in blocks)
    assert {len(ticks) for ticks, body in blocks if "````" in body} == {5}
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", whole, flags=re.M | re.S)
    assert not re.search(r"<(?!/?(details|summary|code)>)", outside)
    assert not re.search(r"(?<!\\)`", outside)
    assert r"\*\*b\*\*" in outside
    assert r"a &lt;reason&gt; \| \`why\` issue 1" in outside
    for result in bad:
        assert result.reproduce in whole


@pytest.mark.slow
def test_markdown_stays_within_its_room_and_counts_what_is_left_out(hostile):
    whole = markdown([hostile], MARKDOWN_BYTES)
    for limit in (3000, 1500, 100, 0):
        cut = markdown([hostile], limit)
        assert len(cut.encode()) <= limit
    assert re.search(r"^\d+ of \d+ deviations are left out here", markdown([hostile], 3000), re.M)
    assert "left out" not in whole
    assert len(markdown([many_deviations()], MARKDOWN_BYTES).encode()) <= MARKDOWN_BYTES == 2**20
    assert "left out" in markdown([many_deviations()], MARKDOWN_BYTES)


def many_deviations():
    """A report that no summary of a step can hold."""
    result = run(CHECKS, WrongScale(), dtypes=["float32"]).results[0]
    long = replace(result, faults=(FaultSeen("raises", "x y " * 20_000, "c", 1),))
    results = tuple(replace(long, check=f"exact.{i}") for i in range(20))
    return replace(run(CHECKS[:1], Right(), dtypes=["float32"]), results=results)


# The terminal


def result(check, status, dtype="float32", **values):
    level = check.partition(".")[0]
    how = Precision(dtype, dtype)
    return Result(check, level, "a law", dtype, how, status, cases=1, **values)


def folded(report):
    """Its text, what is wrapped in one line."""
    return re.sub(r"\n *", " ", report.text())


ASKED_NAMES = ("names.targets.list", "names.targets.layers")


def report_of(*results):
    return Report("t", "1", ("float32",), {}, {}, "ci", 0, results, 1.0)


def test_a_run_that_asks_nothing_says_why_and_one_that_skips_everything_says_so():
    assert "the profile ci has no case of these levels in float32." in folded(report_of())
    skipped = folded(report_of(result("multi.a", "skip", reason="none")))
    assert "every check was skipped" in skipped
    assert "no case of these levels" not in skipped


def test_an_error_of_names_shows_what_was_asked_and_counts_as_one_cause():
    class Raises(Right):
        def targets(self, config, names):
            raise ValueError("nothing")

    asked = [check for check in names_level.LEVEL.checks if check.id in ASKED_NAMES]
    report = run(asked, Raises(), profile="quick", dtypes=["float32"])
    for found in report.results:
        assert ', asked {"peft_type": "LORA", ' in found.faults[0].message
    assert "2 of 2 failing results show it" in folded(report)


def test_checks_of_a_level_that_do_alike_share_a_line_unless_all_are_asked_for():
    report = report_of(
        *(result(f"linear.{i}", "pass", d) for i in range(3) for d in ("float64", "float32")),
        result("linear.narrow", "pass"),
        result("merge.a", "fail", case="merge.a:float32:0"),
        result("merge.b", "pass"),
        *(result(f"multi.{i}", "skip", reason="none") for i in range(2)),
    )
    names = [name for name, _ in grouped_rows(report)]
    assert names == ["merge.a", "multi: 2 checks", "linear: 3 checks", "linear.narrow", "merge.b"]
    assert "skipped 2, none: multi: 2 checks" in report.text()
    assert "linear.1" not in report.text()
    for i in range(3):
        assert f" linear.{i} " in report.text(verbose=True)


def test_the_table_ends_with_what_was_skipped_and_leaves_out_levels_that_were_not_asked():
    asked = (result("linear.a", "pass"), result("linear.b", "skip", reason="none"))
    unasked = result("multi.a", "skip", reason="none")
    text = report_of(unasked, *asked).text()
    assert "Not asked: multi." in text
    assert re.search(r"^ linear.a +pass\n linear.b +skip$", text, re.M)
    assert not re.search(r"^ multi.a +skip$", text, re.M)
    assert re.search(r"^ multi.a +skip$", report_of(unasked).text(), re.M), "or nothing is shown"


@pytest.mark.parametrize("z", [6.01, 12.345, 999.6, 2.35e6, 7.9e19, 1e150])
@pytest.mark.parametrize("status", ["fail", "loose", "known", "error"])
def test_the_longest_check_and_any_z_stay_within_80_columns(status, z):
    longest = "variants.lora-bias.forward.dropout"
    worst = Judgement("y", "fail", 9, 9, z, z, 6.0, 2.5, (0,), 1.0, 0.0, 1e-9)
    dtypes = ("float64", "float32", "bfloat16", "float16")
    report = report_of(*(result(longest, status, dtype, worst=worst) for dtype in dtypes))
    lines = report.text().splitlines()
    assert all(len(line) <= 80 for line in lines if "REPRODUCE" not in line)
    assert re.search(rf"^ {longest} +{cell(report.results[0])}", report.text(), re.M), "in one line"
    longer = report_of(*(replace(r, check=longest + ".conv1d") for r in report.results))
    assert all(len(line) <= 80 for line in longer.text().splitlines() if "REPROD" not in line)
    assert longest + ".conv1d\n" in longer.text()


def test_what_has_one_diagnosis_is_told_once_and_in_full_where_all_is_asked_for():
    named = (Diagnosis("scale-alpha", "s = α.", 1.0),)
    off = {"case": "c:float32:0", "smallest": {"got": 1, "want": 2}, "diagnosis": named}
    other = {**off, "diagnosis": (Diagnosis("layout", "Aᵀ.", 1.0),)}
    report = report_of(
        result("linear.a", "fail", **off),
        result("linear.b", "fail", **{**off, "case": "linear.b:float32:4"}),
        result("linear.c", "fail", **other),
    )
    assert "  The same cause in 1 more check: linear.b\n" in report.text()
    assert report.text().count("DIAGNOSIS") == 2
    assert report.text(verbose=True).count("DIAGNOSIS") == 3


def test_one_rounding_is_told_as_that_and_accuses_nobody_after_another_failure():
    near = Judgement("y", "fail", 9, 1, inf, inf, 0, 0, (0,), 1 + 2.0**-23, 1.0, None)
    exact = result("linear.exact", "fail", case="linear.exact:float32:0", arrays=(near,))
    named = (Diagnosis("scale-alpha", "s = α.", 1.0),)
    other = result("linear.a", "fail", case="linear.a:float32:0", diagnosis=named)
    assert "one rounding of float32" in report_of(exact).text()
    assert [cause.id for cause in report_of(exact).causes] == [""]
    both = report_of(exact, other).causes
    assert [(c.id, c.checks) for c in both] == [
        ("scale-alpha", ["linear.a"]), ("structure-one-rounding", ["linear.exact"])
    ]  # fmt: skip
    far = replace(exact, arrays=(replace(near, got=1.5),))
    assert [cause.id for cause in report_of(far, other).causes] == ["scale-alpha", ""]
    assert "one rounding" not in report_of(far).text()


def test_a_level_of_which_most_was_skipped_has_no_tick():
    some = [result("linear.a", "pass"), result("linear.b", "skip", reason="none")]
    runs = Runs([report_of(*some)])
    assert runs.score(["linear.a", "linear.b"], 0)[0] == "skip"
    assert runs.score(["linear.a"], 0)[0] == "pass"


def test_levels_say_what_holds_of_what_was_asked():
    some = [result("linear.a", "pass"), result("linear.b", "fail"), result("linear.c", "skip")]
    report = report_of(*some, result("merge.a", "skip"), result("init.a", "pass"))
    said = "Checks that hold, by level: linear 1 of 2, init 1 of 1. Not asked: merge."
    assert levels(report) == said
    assert said in " ".join(report.text().split())
    assert said in markdown([report], MARKDOWN_BYTES)


def test_the_cause_stands_first_in_every_form():
    named = (Diagnosis("scale-alpha", "s = α.", 1.0),)
    report = report_of(result("linear.a", "fail", case="linear.a:float32:0", diagnosis=named))
    for page in (report.text(), markdown([report], MARKDOWN_BYTES), html([report]), junit(report)):
        low = page.lower()
        assert 0 < low.index("probable cause") < low.index("linear.a")
        assert "scale-alpha" in low[low.index("probable cause") :][:120]
        assert "checks ran" not in low[: low.index("probable cause")]
    assert report.to_json()["causes"][0]["id"] == "scale-alpha"
    assert "probable" not in report_of(result("linear.a", "pass")).text().lower()


def test_junit_says_the_cause_in_each_message_and_what_was_asked():
    named = (Diagnosis("scale-alpha", "s = α.", 1.0),)
    told = result("linear.a", "fail", case="linear.a:float32:0", diagnosis=named)
    other = result("linear.b", "error", faults=(FaultSeen("raises", "x", "linear.b:float32:0", 1),))
    suite = ET.fromstring(junit(report_of(told, other)))[0]
    properties = {each.get("name"): each.get("value") for each in suite.iter("property")}
    assert (properties["seed"], properties["profile"]) == ("0", "ci")
    messages = [case[0].get("message") for case in suite.iter("testcase")]
    assert messages[0].startswith("probable cause scale-alpha: s = α. ")
    assert messages[1].startswith("probable cause it raises: x")


def test_the_id_of_a_known_mistake_leads_to_what_it_is_and_to_its_issue():
    named = (Diagnosis("scale-alpha", "s = α.", 1.0),)
    whole = html([report_of(result("linear.a", "fail", case="a:float32:0", diagnosis=named))])
    links = {attributes["href"] for attributes in Page(whole).named("a")}
    assert {"#mistake-scale-alpha", "https://github.com/Blaizzy/mlx-vlm/issues/841"} <= links
    assert "mistake-scale-alpha" in Page(whole).ids
    assert issue_of("peft 0.21.2") == issue_of("nobody 7") == ""
    assert "Known mistakes" not in html([report_of(result("linear.a", "pass"))])


def test_every_issue_of_the_catalogue_has_an_address():
    seen = {name for mutant in MUTANTS for name in mutant.seen if re.fullmatch(r"\S+ \d+", name)}
    assert {name for name in seen if not issue_of(name)} <= {"vmlx-swift 320"}


def test_a_terminal_has_its_width_and_colours():
    failing = result("linear.a", "fail", case="linear.a:float32:0")
    failing = replace(failing, title="so many words " * 20)
    report = report_of(failing, result("linear.b", "pass"), result("merge.pass", "skip"))
    for width in (60, 120):
        lines = [line for line in report.text(width=width).splitlines() if "REPRODUCE" not in line]
        assert width - 15 < max(map(len, lines)) <= width
    plain, coloured = report.text(), report.text(colours=True)
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    assert "\x1b[1;31mFAIL\x1b[0m" in coloured
    assert "\x1b[32mpass\x1b[0m" in coloured
    assert " merge.pass" in coloured  # a name is no verdict


def test_a_reason_that_several_checks_share_is_given_once():
    entry = {"reason": "the scale", "seen": {"arrays": "W'"}}
    both = ("exact.merge", "sigma.merge")
    report = run(CHECKS, WrongScale(), known=dict.fromkeys(both, entry))
    assert report.text().count("the scale") == 1
    assert "known exact.merge, sigma.merge: the scale" in report.text()
    assert markdown([report], MARKDOWN_BYTES).count("the scale") == 1
    part = run(CHECKS, WrongScale(), known={f"{check}:float32": entry for check in both})
    assert "known exact.merge float32, sigma.merge float32: the scale" in part.text()


# The command


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs `minilora …` and gives the exit status, standard output and standard error."""
    monkeypatch.setitem(sys.modules, "minilora.verify.checks.registry", fake_checks)
    own = SimpleNamespace(implementation=fake_checks.Right)
    monkeypatch.setitem(sys.modules, "minilora.verify.implementation.minilora_impl", own)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        # Another process would have the checks that there are.
        here = ["--in-process"] * (arguments[0] == "verify")
        try:
            status = main([*arguments, *here])
        except SystemExit as left:
            status = left.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def jsons(command):
    assert command("verify", "--json", "a.json", "--profile", "quick")[0] == 0
    assert command("verify", "fake_checks:WrongScale", "--json", "b.json", "--seed", "2")[0] == 1
    return "a.json", "b.json"


def test_reports_are_combined_into_one_matrix(command, jsons):
    status, out, err = command("report", *jsons)
    assert (status, err) == (0, "")
    assert out.startswith("1  right 1.2: profile quick, seed 0\n   a.json: 14 of 14 checks ran")
    table = [line.split() for line in out.splitlines() if re.match(r" +\w+\.merge", line)]
    assert table == [["exact.merge", "....", "FFFF"], ["sigma.merge", "..--", "FF--"]]
    assert all(len(line) <= 80 for line in out.splitlines() if "REPRODUCE" not in line)
    assert "REPRODUCE  minilora verify fake_checks:WrongScale --in-process --case" in out


def test_a_combined_report_is_written_in_the_forms_that_are_asked_for(command, jsons):
    status, out, _ = command("report", *jsons, "--html", "m.html", "--markdown", "m.md")
    assert (status, out) == (0, ""), "printed where nothing is written, or where it is asked for"
    page = Page(Path("m.html").read_text())
    assert {"exact.merge@1", "exact.merge@2"} <= page.ids
    assert "from b.json" in page.text
    assert "| exact.merge | pass | FAIL |" in Path("m.md").read_text()
    assert (
        command("report", *jsons, "--html", "m.html", "--text")[1] == command("report", *jsons)[1]
    )
    alone = command("report", "b.json")[1]
    assert alone.startswith("wrong scale 1.2  (profile ci, seed 2)\n")
    assert "SMALLEST" in alone, "one report is shown in full"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent.json"], "minilora report: absent.json: No such file"),
        (["a.json", "junk.json"], "junk.json is not a report: found a list"),
        (["a.json", "--html", "no/such/m.html"], "cannot write no/such/m.html: No such file"),
        (["a.json", "--html", "a.json"], "a.json is one of the reports"),
        (["a.json", "--htm", "m.html"], "did you mean --html?"),
        ([], "the following arguments are required: FILE.json"),
    ],
)
def test_a_report_that_cannot_be_read_or_written_is_status_2(command, jsons, arguments, words):
    Path("junk.json").write_text("[]")
    before = Path("a.json").read_text()
    status, out, err = command("report", *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
    assert Path("a.json").read_text() == before
    assert not Path("m.html").exists()


def test_a_verification_writes_markdown(command):
    assert command("verify", "fake_checks:WrongScale", "--markdown", "r.md")[0] == 1
    first = Path("r.md").read_text()
    assert "**FAIL" in first
    assert command("verify", "--markdown", "r.md")[0] == 0
    assert "FAIL" not in Path("r.md").read_text(), "a file is written anew"


def test_the_summary_of_a_step_is_written_on_within_its_room(command, monkeypatch):
    summary = Path("summary.md")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary.absolute()))
    summary.write_text("# Before\n")
    for _ in range(2):
        command("verify", "fake_checks:WrongScale", "--markdown", "summary.md")
    assert summary.read_text().startswith("# Before\n## minilora verify: ")
    assert summary.read_text().count("## minilora verify") == 2
    summary.write_text("x" * (MARKDOWN_BYTES - 700))
    command("verify", "fake_checks:WrongScale", "--markdown", "summary.md")
    assert summary.stat().st_size <= MARKDOWN_BYTES


def test_verbose_shows_each_check(command, monkeypatch):
    twins = tuple(replace(CHECKS[0], id=f"exact.{i}") for i in range(2))
    monkeypatch.setattr(fake_checks, "CHECKS", twins)
    assert " merge: 2 checks " in command("verify")[1]
    assert " exact.1 " in command("verify", "--verbose")[1]


def test_annotations_say_the_cause_at_the_method_and_no_text_ends_a_command(tmp_path, monkeypatch):
    monkeypatch.setattr("minilora.verify.places.CHECKS", CHECKS)
    source = tmp_path / "mine.py"
    source.write_text("class Mine:\n    x = 1\n\n    def merge(self):\n        pass\n")
    report = run(CHECKS, WrongScale())
    first, *_, last = workflow_annotations(report, places_in(source)).splitlines()
    assert first.startswith("::error title=LoRA%3A ")
    assert f"file={source},line=4::" in first
    assert last == f"::error title=minilora verify {report.name}::{score(report)}"
    hostile = replace(report, name="a\n::error::b,c:d%")
    title = workflow_annotations(hostile).splitlines()[-1]
    assert title.startswith("::error title=minilora verify a")
    assert "b%2Cc%3Ad%25::" in title
    assert workflow_annotations(run(CHECKS, Right())).startswith("::notice ")


@pytest.mark.parametrize(
    ("target", "colour"), [(Right, "brightgreen"), (WrongScale, "red"), (OnlyMerge, "yellow")]
)
def test_a_badge_is_green_only_where_most_is_asked_and_holds(target, colour):
    document = json.loads(badge(run(CHECKS, target())))
    assert (document["schemaVersion"], document["color"]) == (1, colour)


def test_the_file_of_a_target_is_found_without_importing_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "package").mkdir()
    for name in ("package/__init__.py", "package/mine.py"):
        (tmp_path / name).write_text("raise SystemExit")
    assert source_file("package.mine:Mine") == Path("package/mine.py")
    assert source_file("package:Mine") == Path("package/__init__.py")
    assert source_file("package/mine.py:Mine") == Path("package/mine.py")
    assert (source_file("peft"), source_file("numpy:x"), source_file("")) == (None, None, None)
