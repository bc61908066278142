"""Known deviations: bound to versions and to what was seen, so that nothing else hides behind."""

import json
from dataclasses import replace
from datetime import date
from typing import ClassVar

import numpy as np
import pytest
from fake_checks import CHECKS, Right, WrongScale

from minilora.findings.versions import is_in_range
from minilora.verify import known as known_module
from minilora.verify.checks.registry import CHECKS as REAL_CHECKS
from minilora.verify.core.errors import UsageError
from minilora.verify.core.types import Diagnosis
from minilora.verify.engine import run
from minilora.verify.known import read_known
from minilora.verify.mutants.derived import mutant_of
from minilora.verify.record import Recorder, _reason, as_text

EXACT, SIGMA, DICT, LIST = CHECKS
OFF = {"arrays": "W'"}


def only(report):
    (result,) = report.results
    return result


def entry(reason="why", seen=OFF, **more):
    return {"reason": reason, "seen": seen, **more}


def merging(change):
    """An implementation whose merge is the right one, changed."""

    class Changed(Right):
        def merge(self, W, A, B, *, alpha, r):
            return change(super().merge(W, A, B, alpha=alpha, r=r)).astype(W.dtype)

    return Changed()


def raising(error):
    class Raising(Right):
        def merge(self, *args, **kwargs):
            raise error

    return Raising()


def status(implementation, seen, check=SIGMA, dtype="float64", **more):
    known = {check.id: entry(seen=seen, **more)}
    return only(run([check], implementation, dtypes=[dtype], known=known)).status


@pytest.mark.parametrize("name", ["exact.merge", "exact.merge:float32", "exact.*"])
def test_a_known_deviation_is_run_shown_and_no_failure(name):
    report = run([EXACT], merging(np.negative), dtypes=["float32"], known={name: entry()})
    assert (only(report).status, report.exit_status) == ("known", 0)
    assert only(report).worst.array == "W'"
    assert only(report).known_cases == only(report).cases == 5, "every case is looked at"
    assert "known exact.merge float32: why" in report.text()
    known = {"exact.merge:float32": entry()}
    other = run([EXACT], merging(np.negative), dtypes=["float64"], known=known)
    assert only(other).status == "fail", "declared for another dtype"


@pytest.mark.parametrize(
    ("seen", "shown", "other"),
    [
        ({"factor": 2}, lambda W: 2 * W, lambda W: 3 * W),
        ({"factor": 2, "arrays": "W'"}, lambda W: 2 * W, np.transpose),
        ({"rounded_to": "float32"}, np.float32, lambda W: W * (1 + 2**-12)),
        ([{"factor": 2}, {"factor": -1}], np.negative, lambda W: -2 * W),
    ],
)
def test_another_deviation_of_the_same_check_fails(seen, shown, other):
    assert status(merging(shown), seen) == "known"

    class Other(Right):
        def merge(self, W, A, B, *, alpha, r):
            wrong = np.resize(other(super().merge(W, A, B, alpha=alpha, r=r)), W.shape)
            return wrong.astype(W.dtype)

    report = run([SIGMA], Other(), dtypes=["float64"], known={"sigma.merge": entry(seen=seen)})
    assert (only(report).status, report.exit_status) == ("fail", 1)
    assert "KNOWN      another deviation of this check: why" in report.text()
    assert only(report).no_longer_fails, "what is known does not occur"


def test_one_case_that_is_something_else_fails():
    calls = []

    def sometimes(W):
        calls.append(W)
        return 3 * W if len(calls) == 4 else 2 * W

    report = run(
        [SIGMA],
        merging(sometimes),
        dtypes=["float64"],
        known={"sigma.merge": entry(seen={"factor": 2})},
    )
    result = only(report)
    assert (result.status, result.known_cases, result.deviating_cases) == ("fail", 4, 1)
    assert result.case == "sigma.merge:float64:3"


def test_the_arrays_that_deviate_are_named():
    report = run(
        [LIST],
        type("Wrong", (Right,), {"optimizer_steps": lambda s, p, g, t: [{"a": 9 * p["a"]}] * 2})(),
        dtypes=["float32"],
        known={"list.steps": entry(seen={"arrays": "a after 2"})},
    )
    assert only(report).status == "fail", "a after 1 deviates, too"


@pytest.mark.parametrize("seen", [OFF, {"factor": 2}, {"rounded_to": "float32"}])
def test_an_error_is_never_excused_by_a_deviation(seen):
    assert status(raising(ValueError("no")), seen) == "error"


def test_a_library_that_cannot_be_imported_leaves_nothing_known():
    broken = raising(ModuleNotFoundError("No module named 'theirs'"))
    broken.known = {c.id: entry(seen=[OFF, {"error": "raises: KeyError*"}]) for c in CHECKS[:2]}
    report = run(CHECKS[:2], broken)
    assert {result.status for result in report.results} == {"error"}
    assert report.exit_status == 1


def test_an_entry_may_name_the_very_error_and_no_other():
    seen = {"error": "raises: KeyError: 'one'*"}
    assert status(raising(KeyError("one")), seen) == "known"
    assert status(raising(KeyError("two")), seen) == "error"
    assert status(merging(np.negative), seen) == "fail"


def test_a_fault_of_ours_is_nobodys_known_deviation():
    broken = replace(EXACT, run=lambda subject, case: [])
    assert status(Right(), {"error": "internal: exact*"}, broken) == "error"


@pytest.mark.parametrize("name", ["*", "*.merge", "e*t.merge", "?xact.merge", "[e]xact.merge"])
def test_a_pattern_of_all_levels_is_refused(name):
    class Hiding(WrongScale):
        known: ClassVar = {name: entry()}

    report = run([EXACT, SIGMA], Hiding(), dtypes=["float32"])
    assert (report.count("fail"), report.exit_status) == (2, 1)
    assert "names no level" in " ".join(report.text().split())
    with pytest.raises(UsageError, match="names no level"):
        run([EXACT, SIGMA], WrongScale(), known={name: entry()})


def test_a_declaration_without_what_was_seen_excuses_nothing():
    class Silent(WrongScale):
        known: ClassVar = {"sigma.merge": "alpha is taken for the scale"}

    report = run([SIGMA], Silent(), dtypes=["float64"])
    assert (only(report).status, report.exit_status) == ("fail", 1)
    assert "sigma.merge is declared as known without 'seen'" in " ".join(report.notes)


def test_one_declaration_for_several_checks_holds_while_any_of_them_deviates():
    known = dict.fromkeys(("exact.merge", "sigma.merge"), entry())

    class Half(WrongScale):
        def merge(self, W, A, B, *, alpha, r):
            wrong = alpha == 7
            return super().merge(W, A, B, alpha=alpha if wrong else alpha / r, r=r)

    report = run([EXACT, SIGMA], Half(), dtypes=["float32"], known=known)
    assert [result.status for result in report.results] == ["pass", "known"]
    assert not any(result.no_longer_fails for result in report.results)
    right = run([EXACT, SIGMA], Right(), dtypes=["float32"], known=known)
    assert "no longer fails, though known: exact.merge float32, sigma.merge" in right.text()


def test_a_known_deviation_that_no_longer_fails_is_reported():
    report = run([EXACT], Right(), dtypes=["float32"], known={"exact.merge": entry("was wrong")})
    assert (only(report).status, only(report).no_longer_fails) == ("pass", True)
    assert report.to_json()["results"][0]["no_longer_fails"] is True
    assert "no longer fails, though known: exact.merge float32: was wrong" in report.text()


def test_a_declaration_for_all_dtypes_still_holds_where_one_deviates():
    class Half(WrongScale):
        def merge(self, W, A, B, *, alpha, r):
            wrong = W.dtype == np.float32
            return super().merge(W, A, B, alpha=alpha if wrong else alpha / r, r=r)

    report = run([SIGMA], Half(), known={"sigma.merge": entry()})
    assert [result.status for result in report.results] == ["pass", "known"]
    assert not any(result.no_longer_fails for result in report.results)


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ([], "known"),
        (["1.*"], "known"),
        ("1.2", "known"),
        ("<1.3", "known"),
        (">=1.0,<1.2", "fail"),
        (["2.*", "<1"], "fail"),
        (["2.*", "~=1.1"], "known"),
    ],
)
def test_a_known_deviation_holds_for_its_versions(versions, expected):
    assert status(WrongScale(), OFF, versions=versions) == expected


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        ("2026-01-02", "known"),
        ("2026-01-01", "fail"),
        ("2025-12-31", "fail"),
        ("1.3", "known"),
        ("1.2", "fail"),
        ("1.2rc1", "fail"),
    ],
)
def test_an_entry_excuses_nothing_from_its_end_on_and_says_so(until, expected, monkeypatch):
    monkeypatch.setattr(known_module, "today", lambda: date(2026, 1, 1))
    known = {"sigma.merge": entry(until=until)}
    report = run([SIGMA], WrongScale(), dtypes=["float64"], known=known)
    assert only(report).status == expected
    told = f"excused until {until}, and no longer: why" in " ".join(report.notes)
    assert told == (expected == "fail")


@pytest.mark.parametrize("until", ["soon", "2026-13-01", 3, ["1.2"]])
def test_an_end_that_is_none_is_refused(until):
    with pytest.raises(UsageError, match=r"sigma\.merge: .*(until|month|date)"):
        run([SIGMA], Right(), known={"sigma.merge": entry(until=until)})


def test_what_has_expired_is_recorded_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(known_module, "today", lambda: date(2026, 1, 1))
    wrong, file = merging(lambda W: 2 * W), tmp_path / "known.json"
    for until, kept in (("2026-01-02", ["mine"]), ("2026-01-01", [])):
        old = {"check": "exact.merge", **entry("mine", [{"factor": 2}], until=until)}
        file.write_text(json.dumps([old]))
        found = recorded(wrong, [EXACT], read_known(str(file)))
        assert [e["reason"] for e in found if e["reason"] == "mine"] == kept
        assert len(found) == 1


def test_a_check_has_an_entry_for_each_range_of_versions(tmp_path):
    file = tmp_path / "known.json"
    old = {"check": "sigma.merge", **entry("old", {"factor": 9}, versions="<1.2")}
    file.write_text(json.dumps([old, {"check": "sigma.merge", **entry("new", versions=">=1.2")}]))
    known = read_known(str(file))
    result = only(run([SIGMA], WrongScale(), dtypes=["float64"], known=known))
    assert (result.status, result.known.reason) == ("known", "new")
    kept = recorded(WrongScale(), [SIGMA], known, dtypes=["float64"])
    assert [e["reason"] for e in kept] == ["old", "new"]


def test_a_version_that_is_none_is_in_no_range_and_is_told():
    class Unnumbered(WrongScale):
        version = "main"

    known = {"sigma.merge": entry(versions="<2")}
    report = run([SIGMA], Unnumbered(), dtypes=["float64"], known=known)
    assert only(report).status == "fail"
    assert "'main' is no version" in " ".join(report.notes)


@pytest.mark.parametrize(
    ("version", "range_", "expected"),
    [
        ("0.2", "<0.3", True),
        ("0.3rc1", "<0.3", False),
        ("0.3.dev1", "<0.3", False),
        ("0.3rc1", "<0.3rc2", True),
        ("0.18.1", ">=0.18, <0.20", True),
        ("0.20.0", ">=0.18,<0.20", False),
        ("0.20.0.dev0", ">=0.19,<0.20", False),
        ("0.18.0", "==0.18", True),
        ("0.18", "0.18.0", True),
        ("0.180", "0.18.*", False),
        ("0.18.7", "!=0.18.*", False),
        ("0.19", "~=0.18.2", False),
        ("0.18.9", "~=0.18.2", True),
        ("0.2.post1", ">0.2", False),
        ("0.2.post1", ">=0.2", True),
        ("2.13.0+cpu", "==2.13.0", True),
        ("0.9", "<0.10", True),
        ("1!0.1", ">5", True),
    ],
)
def test_ranges_are_those_of_pep_440(version, range_, expected):
    assert is_in_range(version, range_) == expected
    specifiers = pytest.importorskip("packaging.specifiers")
    theirs = specifiers.SpecifierSet(range_ if range_[0] in "<>=!~" else f"=={range_}")
    assert theirs.contains(version, prereleases=True) == expected


@pytest.mark.parametrize(
    "versions", [0.3, 3, True, None, {"a": 1}, [0.3], "", "0.3 or 0.4", "<", "<0.3.*", "~=1", ">=x"]
)
def test_versions_that_are_no_range_are_refused(versions, tmp_path):
    file = tmp_path / "known.json"
    file.write_text(json.dumps([{"check": "a.b", **entry(versions=versions)}]))
    with pytest.raises(UsageError, match=r"known\.json, entry 0: .*(range|\.\*|~=)"):
        read_known(str(file))


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ("scale-alpha", "expected {KEY"),
        ([], "0 entries"),
        ({}, "expected {KEY"),
        ({"mutnat": "x"}, "did you mean 'mutant'"),
        ({"mutant": "scale-alhpa"}, "did you mean 'scale-alpha'"),
        ({"mutant": "scale-alpha + scale-alhpa"}, "did you mean 'scale-alpha'"),
        ({"mutant": "scale-alpha + optimizer-clip-none"}, "cannot be made at once"),
        ({"factor": "2"}, "expected a number"),
        ({"factor": True}, "expected a number"),
        ({"factor": float("nan")}, "expected a number"),
        ({"rounded_to": "float8"}, "one of float32"),
        ({"arrays": "*"}, "names all"),
        ({"arrays": []}, "a name or a list"),
        ({"after": 3}, "a name or a list"),
        ({"error": "*"}, "KIND: MESSAGE"),
        ({"error": "raises: *"}, "KIND: MESSAGE"),
        ({"error": "*: KeyError"}, "KIND: MESSAGE"),
        ({"factor": 2, "rounded_to": "float32"}, "together"),
    ],
)
def test_what_was_seen_has_a_form(seen, words):
    with pytest.raises(UsageError, match=words):
        run([EXACT], Right(), known={"exact.merge": {"reason": "why", "seen": seen or [*seen]}})


def test_an_implementation_may_declare_its_known_deviations():
    class Honest(WrongScale):
        known: ClassVar = {"sigma.merge": entry(), "gone.check": "x"}

    report = run([SIGMA], Honest(), dtypes=["float64"])
    assert only(report).status == "known"
    assert "declares 'gone.check' as known; there is no such check" in report.text()


def test_a_known_file_is_read(tmp_path):
    file = tmp_path / "known.json"
    first = {"check": "a.b", "dtype": "float32", "link": "l", **entry("r", versions=["1.*"])}
    file.write_text(json.dumps([first, {"check": "c.d", "reason": "q"}]))
    known = read_known(str(file))
    assert list(known) == ["a.b:float32", "c.d"]
    assert known["a.b:float32"][0].link == "l"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSON"),
        ('{"check": "a"}', "expected a list"),
        ("[3]", "expected a list"),
        ('[{"check": "a"}]', "'check' and 'reason'"),
        ('[{"check": "a", "reason": "r", "dtpye": "x"}]', "unknown dtpye"),
    ],
)
def test_a_malformed_known_file_is_refused(tmp_path, text, words):
    file = tmp_path / "known.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=words):
        read_known(str(file))
    with pytest.raises(UsageError, match="No such file"):
        read_known(str(tmp_path / "absent.json"))


# The catalogue


def mutant(name):
    return mutant_of(name).make()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "shown", "other"),
    [
        ("lifecycle.scale-while-merged", "lifecycle-unmerge-anew", "lifecycle-scale-late"),
        ("combine.order", "combine-rank-for-alpha", "combine-first-scale"),
        ("combine.single", "combine-rank-for-alpha", "combine-alpha"),
        (
            "optimizer.all",
            "optimizer-loraplus-not-decayed + optimizer-schedule-constant-without-warmup",
            "optimizer-loraplus-not-decayed",
        ),
    ],
)
def test_a_mutant_that_is_known_excuses_itself_and_no_other(check, shown, other):
    checks = [c for c in REAL_CHECKS if c.id == check]
    known = {check: entry(seen={"mutant": shown})}
    for name, expected in ((shown, "known"), (other, "fail")):
        report = run(checks, mutant(name), dtypes=["float64", "float32"], known=known)
        assert {result.status for result in report.results} == {expected}, name


@pytest.mark.slow
def test_a_session_is_known_by_the_step_after_which_it_is_wrong():
    check = "lifecycle.scale-while-merged"
    known = {check: entry(seen={"after": ["scale"]})}
    checks = [c for c in REAL_CHECKS if c.id == check]
    for name, expected in (("unmerge-anew", "known"), ("merge-all", "fail")):
        report = run(checks, mutant(f"lifecycle-{name}"), dtypes=["float64"], known=known)
        assert only(report).status == expected, name


# A file that is recorded


def recorded(implementation, checks, known=None, **options):
    recorder = Recorder()
    report = run(checks, implementation, known=known, recorder=recorder, **options)
    return recorder.entries(report, known or {})


@pytest.mark.parametrize(
    ("change", "form"),
    [
        (lambda W: 2 * W, "factor"),
        (np.float16, "rounded_to"),
        (lambda W: W[::-1], "arrays"),
    ],
)
def test_what_deviates_is_recorded_by_its_most_telling_form(change, form, tmp_path):
    entries = recorded(merging(change), [EXACT, SIGMA])
    assert {key for e in entries for key in e["seen"][0]} <= {form, "arrays"}
    assert all(form in e["seen"][0] and e["versions"] == "==1.2" for e in entries)
    file = tmp_path / "known.json"
    file.write_text(as_text(entries))
    known = read_known(str(file))
    report = run([EXACT, SIGMA], merging(change), known=known)
    assert report.exit_status == 0
    assert report.count("known")
    if form != "arrays":
        assert run([EXACT, SIGMA], merging(lambda W: 5 * W), known=known).exit_status == 1


def test_the_reason_that_is_recorded_is_of_the_mutant_that_is():
    found = [Diagnosis("narrow", "H in float32.", 0.5), Diagnosis("scale-one", "s = 1.", 0.6)]
    result = replace(only(run([EXACT], Right(), dtypes=["float64"])), diagnosis=tuple(found))
    start = "recorded, not yet explained"
    assert _reason([result], [{"mutant": "scale-one"}]) == f"{start}: scale-one, s = 1."
    assert _reason([result], [{"mutant": "another"}]) == f"{start}: another"
    assert _reason([result], [{"arrays": ["y"]}]) == f"{start}: narrow, H in float32."
    assert _reason([], [{"arrays": ["y"]}]) == start


def test_what_no_longer_occurs_is_left_out_of_the_record(tmp_path):
    file = tmp_path / "known.json"
    file.write_text(as_text(recorded(merging(lambda W: 2 * W), [EXACT, SIGMA])))
    assert recorded(Right(), [EXACT, SIGMA], read_known(str(file))) == []
    kept = recorded(Right(), CHECKS, read_known(str(file)), case="exact.merge:float32:0")
    assert [e["check"] for e in kept] == ["sigma.merge"], "it was not asked"


def test_an_error_is_recorded_by_its_kind_and_type(tmp_path):
    entries = recorded(raising(KeyError("one")), [EXACT])
    assert [e["seen"] for e in entries] == [[{"error": "raises: KeyError*"}]]
