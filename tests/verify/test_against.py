"""What has changed since an earlier report: new deviations, those gone, checks no longer asked."""

import json
from dataclasses import replace

import pytest
from fake_checks import CHECKS, OnlyMerge, Right, WrongScale

from minilora.cli.main import main
from minilora.verify.core.types import Diagnosis
from minilora.verify.engine import run
from minilora.verify.report.against import against


@pytest.fixture(scope="module")
def reports():
    made = {target.__name__: run(CHECKS, target()) for target in (Right, WrongScale, OnlyMerge)}
    assert {name: report.exit_status for name, report in made.items()} == {
        "Right": 0,
        "WrongScale": 1,
        "OnlyMerge": 0,
    }
    return made


def test_what_fails_now_alone_is_new_and_what_failed_alone_is_gone(reports):
    right, wrong = reports["Right"], reports["WrongScale"]
    worse, better = against(wrong, right), against(right, wrong)
    fails = tuple(f"{r.check}:{r.dtype}" for r in wrong.results if r.status == "fail")
    assert (worse.new, worse.gone, worse.lost) == (fails, (), ())
    assert (better.new, better.gone, better.lost) == ((), fails, ())
    assert against(wrong, wrong).text == "nothing has changed"


def test_a_check_that_is_no_longer_asked_is_lost_and_not_mended(reports):
    lost = against(reports["OnlyMerge"], reports["WrongScale"])
    assert lost.lost
    assert not set(lost.gone) & set(lost.lost)


def test_a_deviation_of_another_cause_is_told_and_one_without_a_diagnosis_is_not(reports):
    wrong = reports["WrongScale"]

    def caused_by(*ids):
        causes = tuple(Diagnosis(id, "", 0.0) for id in ids)
        return replace(wrong, results=tuple(replace(r, diagnosis=causes) for r in wrong.results))

    fails = tuple(f"{r.check}:{r.dtype}" for r in wrong.results if r.status == "fail")
    changed = against(caused_by("scale-one"), caused_by("scale-double"))
    assert (changed.new, changed.other, changed.is_worse) == ((), fails, True)
    assert f"{len(fails)} deviations of another cause: {fails[0]}" in changed.text
    for now, then in (
        (("scale-one",), ("scale-one", "scale-double")),
        ((), ("scale-one",)),
        (("scale-one",), ()),
    ):
        assert not against(caused_by(*now), caused_by(*then)).is_worse


def test_a_deviation_that_was_known_before_is_new(reports):
    wrong = reports["WrongScale"]
    known = replace(
        wrong,
        results=tuple(replace(r, status="known") for r in wrong.results if r.status == "fail"),
    )
    assert against(wrong, known).new


@pytest.mark.parametrize(("earlier", "status"), [("WrongScale", 0), ("Right", 1)])
def test_the_command_fails_for_news_alone(tmp_path, capsys, reports, earlier, status):
    path, now = tmp_path / "old.json", tmp_path / "now.json"
    target = ["fake_checks:WrongScale", "--in-process", "--level", "linear", "--profile", "quick"]
    main(["verify", *target, "--json", str(now)])
    document = json.loads(now.read_text())
    if earlier == "Right":
        for result in document["results"]:
            result["status"] = "pass"
    path.write_text(json.dumps(document))
    capsys.readouterr()
    assert main(["verify", *target, "--against", str(path)]) == status
    assert ("new deviations" in capsys.readouterr().out) == bool(status)


def test_what_is_no_report_is_refused_before_the_work(tmp_path, capsys):
    path = tmp_path / "old.json"
    path.write_text("{}")
    assert main(["verify", "--against", str(path)]) == 2
    assert "is not a report" in capsys.readouterr().err
