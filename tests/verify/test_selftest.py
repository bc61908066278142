"""The self-test finds what falls short: a mutant that is missed or misnamed, a false alarm."""

import json
import re
from dataclasses import replace

import pytest

from minilora.cli.main import main
from minilora.verify import engine, selftest
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.mutants import MUTANTS, Mutant
from minilora.verify.mutants.linear import LINEAR
from minilora.verify.mutants.merge import MERGING
from minilora.verify.mutants.references.linear import Linear
from minilora.verify.report.selftest import Alarm, Selftest, percent

pytestmark = pytest.mark.slow

CATALOGUE = {m.id: m for m in MUTANTS}


def of_one(make, caught_by="merge.weight"):
    return Mutant("merge-odd", "MERGE", "merge", "odd", (), make, caught_by)


@pytest.fixture(scope="module")
def few():
    """A share of the levels that take least, of every kind of work."""
    return selftest.selftest(levels=["merge"], dtypes=["float32", "float16"], quick=True, cases=200)


@pytest.mark.slow
def test_a_share_is_caught_named_and_without_a_false_alarm(few):
    assert few.shortfalls == []
    assert few.exit_status == 0
    assert {m.family for m in few.mutants} == {"MERGE", "UNMERGE"}
    assert [sum(each.values()) for each in few.cases.values()] == [200, 200]
    assert all(len(names) > 5 for names in few.rights.values())


@pytest.mark.slow
def test_any_number_of_processes_finds_the_same(few):
    options = {"levels": ["merge"], "dtypes": ["float32", "float16"], "quick": True, "cases": 200}
    two = selftest.selftest(**options, jobs=2)
    assert replace(two, seconds=few.seconds) == few


@pytest.mark.slow
def test_another_seed_takes_another_share_and_other_cases(few):
    other = selftest.share(few.mutants[:1] + tuple(CATALOGUE.values()), 1)
    assert other != selftest.share(few.mutants[:1] + tuple(CATALOGUE.values()), 0)
    assert len(other) == len({(m.level, m.family) for m in MUTANTS})


@pytest.mark.slow
def test_what_is_right_is_not_caught():
    assert selftest.catch(of_one(Linear), "float32") == ("", "")


@pytest.mark.slow
def test_what_is_loose_is_not_caught():
    """float32 has 24 digits; what keeps 21 of them loses more than it may, and not much more."""
    odd = LINEAR.edited({"# output": "y = digits(y, 21)"})
    loose = replace(of_one(odd, "linear.forward"), level="linear")
    report = engine.run(selftest.of_level("linear"), loose.make(), dtypes=["float32"])
    assert {result.status for result in report.results} == {"loose", "pass"}
    assert selftest.catch(loose, "float32") == ("", "")


def test_another_check_of_the_level_catches_what_its_own_does_not():
    m = replace(CATALOGUE["merge-no-scale"], caught_by="merge.zero-B")
    check, broken = selftest.catch(m, "float32")
    assert (check, broken) == ("merge.weight", "")


def test_an_exception_is_not_taken_for_a_catch():
    check, broken = selftest.catch(of_one(MERGING.edited({"# merged": "no_such_name"})), "float32")
    assert check == ""
    assert "no_such_name" in broken


def test_a_right_one_that_does_not_pass_is_an_alarm(monkeypatch):
    wrong = {"wrong": CATALOGUE["merge-no-scale"].make, "right": Linear}
    monkeypatch.setattr(selftest, "rights", lambda level: wrong)
    selftest._methods.cache_clear()
    found = selftest.alarms("merge", "float32", 1)
    selftest._methods.cache_clear()
    assert {alarm.right for alarm in found} == {"wrong"}
    assert found[0].case == "merge.weight:float32:1"
    assert found[0].says.startswith("fail: ")


def report_of(**changes):
    """A report of two mutants of two classes, all well but for the changes."""
    ms = (CATALOGUE["merge-no-scale"], CATALOGUE["scale-alpha"])
    all_well = Selftest(
        mutants=ms,
        caught={dtype: {m.id: m.caught_by for m in ms} for dtype in DTYPES},
        broken={},
        named={m.id: (m.id,) for m in ms},
        cases={dtype: {"linear": 7, "merge": 3} for dtype in DTYPES},
        alarms=dict.fromkeys(DTYPES, ()),
        rights={"linear": ("minilora",), "merge": ("minilora",)},
        seed=0,
        quick=False,
    )
    return replace(all_well, **changes)


def missed(dtype):
    caught = report_of().caught
    return caught | {dtype: caught[dtype] | {"scale-alpha": ""}}


def named(*names):
    return report_of().named | {"scale-alpha": names}


alarm = Alarm("minilora", "merge.weight:float16:1", 0, "fail: W' z 9 rms 3")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"caught": missed("float32")}, "not caught in float32: scale-alpha"),
        ({"named": named("scale-1")}, "1 of 2 named, fewer than 90 %"),
        ({"named": named()}, "1 of 2 named, fewer than 90 %"),
        ({"broken": {"scale-alpha": "raises: x"}}, "scale-alpha is broken: raises: x"),
        ({"alarms": {"float16": (alarm,)}}, "1 false alarms in float16"),
    ],
)
def test_what_falls_short_is_said_and_gives_status_1(changes, words):
    assert report_of().exit_status == 0
    assert "FALLS SHORT" not in report_of().text()
    report = report_of(**{"cases": {"float16": {"merge": 3}}, **changes})
    assert report.exit_status == 1
    assert report.shortfalls == [words]
    for form in (report.text(), report.markdown()):
        assert words in re.sub(r"\s+", " ", form)
    assert json.loads(report.json())["shortfalls"] == [words]


def test_what_a_half_precision_hides_is_shown_and_no_shortfall():
    report = report_of(caught=missed("bfloat16"))
    assert report.exit_status == 0
    assert "not caught in bfloat16: scale-alpha" in report.text()


def test_the_worst_class_stands_first_and_no_line_is_too_long(few):
    header, first, *_ = report_of(caught=missed("bfloat16")).text().splitlines()
    assert header.split() == ["level", "class", "no.", *DTYPES, "named"]
    assert first.split()[:3] == ["linear", "SCALE", "1"]
    longest = report_of(named=named(*CATALOGUE), caught=missed("float16"))
    for report in (few, longest):
        assert all(len(line) <= 80 for line in report.text().splitlines())


def test_where_a_level_has_no_cases_nothing_is_missed():
    caught = report_of().caught
    report = report_of(caught=caught | {"float16": {"merge-no-scale": "merge.weight"}})
    assert report.missed["float16"] == []
    assert [row[-2] for row in report.rows()] == ["100 %", "-", "100 %"]
    rates = report.summary().count("100 % caught in")
    assert (rates, report.exit_status) == (len(DTYPES), 0)
    entries = json.loads(report.json())["mutants"]
    assert [len(entry["caught_by"]) for entry in entries] == [4, 3]


def test_a_share_without_cases_is_not_put_to_its_checks(monkeypatch):
    none = [replace(c, cases=lambda p, d: 6 * (d == "float32")) for c in selftest.of_level("merge")]
    monkeypatch.setattr(selftest, "of_level", lambda level: none)
    report = selftest.selftest(levels=["merge"], dtypes=["float32", "float16"], quick=True, cases=9)
    assert [len(found) for found in report.caught.values()] == [2, 0]


def test_almost_all_is_not_printed_as_all():
    assert percent(399, 400) == "99 %"
    assert percent(400, 400) == "100 %"


@pytest.mark.slow
def test_the_command_prints_and_writes_the_report(tmp_path, capsys):
    out, page = tmp_path / "s.json", tmp_path / "s.md"
    options = ["--quick", "--level", "merge", "--dtype", "float32", "--cases", "90", "--jobs", "1"]
    assert main(["selftest", *options, "--json", str(out), "--markdown", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "0 false alarms in 90 cases" in re.sub(r"\s+", " ", printed)
    document = json.loads(out.read_text())
    assert document["schema"] == 1
    assert all(m["caught_by"]["float32"] for m in document["mutants"])
    assert page.read_text().startswith("| level | class | no. | float32 | named |\n| --- |")


@pytest.mark.slow
def test_the_summary_of_a_step_is_written_on_and_another_file_anew(tmp_path, monkeypatch):
    summary, other = tmp_path / "summary.md", tmp_path / "other.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    options = ["--quick", "--level", "merge", "--dtype", "float32", "--cases", "9", "--jobs", "1"]
    for page in (summary, other):
        page.write_text("| before |\n")
        assert main(["selftest", *options, "--markdown", str(page)]) == 0
    table, rest = other.read_text().split("\n\n", 1)
    assert table.startswith("| level | class |")
    assert summary.read_text().startswith(f"| before |\n\n{table}\n\n")
    assert rest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--level", "mrge"], "no level 'mrge' (did you mean 'merge'?)"),
        (["--dtype", "float8"], "no dtype 'float8'"),
        (["--jobs", "0"], "0 processes"),
        (["--seed", "-1"], "the seed is -1"),
        (["--json", "no/such/folder.json"], "cannot write no/such/folder.json"),
    ],
)
def test_status_2_where_the_usage_is_wrong(arguments, words, capsys):
    assert main(["selftest", *arguments]) == 2
    assert words in capsys.readouterr().err
