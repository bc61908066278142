"""The engine of `minilora verify`: every verdict, on implementations made for it."""

import contextlib
import gc
import itertools
import json
import re
import sys
import threading
import time
import traceback
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import fake_checks
import ml_dtypes
import numpy as np
import pytest
from fake_checks import CHECKS, OnlyMerge, Right, WrongScale

import minilora.verify
from minilora.forms.words import plain
from minilora.io.atomic import write_text
from minilora.verify import check as check_module_or_function
from minilora.verify import peers
from minilora.verify.core.dtypes import Precision
from minilora.verify.core.errors import Fault, LoadError, Skip, UsageError
from minilora.verify.core.types import MONTE_CARLO, Case, Check, Comparison, Limits
from minilora.verify.diagnosis.investigation import MAX_SHRINKS
from minilora.verify.engine import Interrupted, run
from minilora.verify.implementation.contract import METHODS
from minilora.verify.implementation.guard import MAX_HANGS, GuardedImplementation
from minilora.verify.loading import load
from minilora.verify.peers.peer import Peer
from minilora.verify.plan import plan
from minilora.verify.report.html import html
from minilora.verify.report.junit import junit
from minilora.verify.tally import CASES_AFTER_A_DEVIATION

EXACT, SIGMA, DICT, LIST = CHECKS
OFF = {"arrays": "W'"}


def only(report):
    """The single result of a report."""
    (result,) = report.results
    return result


def verdict(merge, check=EXACT, **options):
    """What the engine says of an implementation whose merge is this function, in float32."""
    implementation = type("Target", (), {"name": "target", "merge": merge})()
    return only(run([check], implementation, dtypes=["float32"], **options))


def test_a_right_implementation_passes_every_check_in_every_dtype():
    report = run(CHECKS, Right())
    assert report.exit_status == 0
    assert {result.status for result in report.results} == {"pass"}
    assert len(report.results) == 3 * 4 + 2  # one check is for the two wide dtypes alone
    assert report.ran == report.count("pass") == 14


def test_a_wrong_value_fails_and_says_where():
    report = run(CHECKS, WrongScale(), dtypes=["float32"])
    results = {result.check: result for result in report.results}
    assert report.exit_status == 1
    assert results["sigma.merge"].status == "fail"
    assert results["dict.vjp"].status == "pass"
    worst = results["sigma.merge"].worst
    assert worst.array == "W'"
    assert worst.z > 2 * worst.limit
    W, A, B = fake_checks.operands(Case("sigma.merge", "float32", 0, 0), whole=False)
    first = results["sigma.merge"].arrays[0]
    assert first.got == pytest.approx((W + 7 * B @ A)[first.index])
    assert first.want == pytest.approx((W + 7 / 3 * B @ A)[first.index])


def test_any_difference_fails_in_the_exact_lane():
    def one_ulp(self, W, A, B, *, alpha, r):
        merged = W + B @ A
        merged[2, 1] = np.nextafter(merged[2, 1], np.float32(9))
        return merged

    result = verdict(one_ulp)
    assert result.status == "fail"
    assert (result.arrays[0].beyond, result.arrays[0].index) == (1, (2, 1))


def sloppy(roundoffs):
    """A merge whose every element is off by so many standard deviations of the fake's sigma."""

    def merge(self, W, A, B, *, alpha, r):
        sigma = 2.0**-53 * 5 * (np.abs(W) + alpha * np.abs(B) @ np.abs(A))
        return W + alpha / r * (B @ A) + roundoffs * sigma

    return type("Sloppy", (), {"merge": merge})()


@pytest.mark.parametrize(("z", "status"), [(2.0, "pass"), (4.0, "loose"), (5.0, "fail")])
def test_loose_is_what_twice_the_unit_roundoff_would_give(z, status):
    # rms z over 20 elements may be 1.5 + 3/√20 = 2.17, and loose up to twice that.
    report = run([SIGMA], sloppy(z), dtypes=["float64"])
    assert only(report).status == status
    assert report.exit_status == (status == "fail")
    assert ("loose" in report.text()) == (status == "loose")


def test_the_limits_of_the_lanes_are_those_of_the_specification():
    assert Limits().verdict(6.0, 1.5 + 3 / 10, 100) == "pass"
    assert Limits().verdict(6.01, 1.0, 100) == "loose"
    assert Limits().verdict(12.01, 1.0, 100) == "fail"
    assert Limits().verdict(6.0, 2 * 1.81, 100) == "fail"
    assert MONTE_CARLO.verdict(8.0, 2.5 * (1 + 3 / 10), 100) == "pass"
    assert MONTE_CARLO.verdict(8.01, 1.0, 100) == "loose"


def test_a_difference_where_sigma_is_zero_is_never_loose():
    got, want = np.array([1.0, 2.0]), np.array([1.0, 2.5])
    judged = Comparison("y", got, want, np.array([1.0, 0.0])).judge()
    assert (judged.verdict, judged.z, judged.index) == ("fail", np.inf, (1,))
    assert Comparison("y", want, want, np.zeros(2)).judge().verdict == "pass"


def test_a_nan_that_reached_a_comparison_fails():
    judged = Comparison("y", np.array([np.nan]), np.array([1.0]), np.array([1e9])).judge()
    assert judged.verdict == "fail"


@pytest.mark.parametrize(
    ("got", "want", "sigma", "words"),
    [
        (np.ones(2), np.ones(3), None, "shape"),
        (np.ones(0), np.ones(0), None, "array"),
        (np.ones(1), np.array([np.nan]), None, "not finite"),
        (np.ones(1), np.ones(1), np.array([-1.0]), "sigma"),
        (np.ones(1), np.ones(1), np.array([np.nan]), "sigma"),
    ],
)
def test_a_comparison_that_compares_nothing_is_refused(got, want, sigma, words):
    with pytest.raises(ValueError, match=words):
        Comparison("y", got, want, sigma)


def raises(self, W, A, B, *, alpha, r):
    raise ValueError("no such\nrank")


def leaves(self, W, A, B, *, alpha, r):
    sys.exit(0)


def interrupts(self, W, A, B, *, alpha, r):
    raise KeyboardInterrupt


def recurses(self, W, A, B, *, alpha, r):
    return recurses(self, W, A, B, alpha=alpha, r=r)


def asks_for_more(self, W, A, B, scaling, *, alpha, r):
    return W


def gives_nan(self, W, A, B, *, alpha, r):
    W[1, 2] = np.nan
    return W.copy()


def with_value(value):
    def merge(self, W, A, B, *, alpha, r):
        merged = W + B @ A
        merged[1, 2] = value
        return merged

    return merge


FAULTS = [
    (raises, "raises", r"ValueError: no such rank \(test_verify_engine.py:\d+, in raises: raise"),
    (leaves, "raises", "SystemExit: 0"),
    (interrupts, "raises", "KeyboardInterrupt"),
    (recurses, "raises", "RecursionError"),
    (asks_for_more, "raises", r"missing 1 required.*the contract is merge\(W, A, B, \*, alpha"),
    (with_value(np.nan), "nan", r"W' holds 1 NaN and 0 infinite of 20 .* first at \[1, 2\]"),
    (with_value(np.inf), "nan", "0 NaN and 1 infinite"),
    (lambda self, W, A, B, **_: (W + B @ A).T, "shape", r"shape \(5, 4\), expected \(4, 5\)"),
    (lambda self, W, A, B, **_: (W + B @ A).astype(float), "dtype", "float64, expected float32"),
    (lambda self, W, A, B, **_: [*(W + B @ A).T.tolist()], "shape", "it is a list"),
    (lambda self, W, A, B, **_: (W + B @ A) * 1j, "not an array", "complex"),
    (lambda self, W, A, B, **_: None, "not an array", "W' is None, expected real numbers"),
    (lambda self, W, A, B, **_: "garbage", "not an array", "W' is a str of <U7"),
    (lambda self, W, A, B, **_: [[1], [2, 3]], "not an array", "a list"),
    (lambda self, W, A, B, **_: W.__iadd__(B @ A), "changes its inputs", r"W\[0, \d\] was"),
]  # fmt: skip


@pytest.mark.parametrize(("merge", "kind", "words"), FAULTS)
def test_what_is_no_answer_is_an_error_in_plain_words(merge, kind, words):
    result = verdict(merge)
    (fault,) = result.faults
    assert (result.status, fault.kind) == ("error", kind)
    assert re.search(words, fault.message), fault.message
    assert fault.cases == 3, "it ends with the third fault of a kind"
    assert fault.message in result.faults[0].message
    assert "Traceback" not in fault.message


def test_a_list_of_numbers_is_an_array_where_any_dtype_will_do():
    subject = GuardedImplementation(Right())
    assert subject.answer([1.0, 2.0], "y", (2,)).tolist() == [1.0, 2.0]
    assert subject.answer(0.25, "loss", ()).item() == 0.25
    assert subject.answer(np.ones(1, ml_dtypes.bfloat16), "y", (1,), "bfloat16").dtype == "bfloat16"


def test_a_list_of_float64_is_an_array_in_float64():
    implementation = type("T", (), {"merge": lambda s, W, A, B, **_: (W + B @ A).tolist()})()
    assert only(run([EXACT], implementation, dtypes=["float64"])).status == "pass"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "the answer is None, expected a dict with 'dx'"),
        ({"y": 1}, "the answer has no 'dx'"),
        ([1, 2], "the answer is a list"),
    ],
)
def test_an_answer_without_the_key_is_incomplete(answer, words):
    implementation = type("T", (), {"lora_linear_vjp": lambda *_, **__: answer})()
    result = only(run([DICT], implementation, dtypes=["float32"]))
    assert (result.status, result.faults[0].kind) == ("error", "missing")
    assert words in result.faults[0].message


@pytest.mark.parametrize(
    ("answer", "words"),
    [(None, "expected a list of 2"), ([{}], "1 entries, expected 2"), ([{}, {}], "step 0 has no")],
)
def test_a_list_of_another_length_is_incomplete(answer, words):
    implementation = type("T", (), {"optimizer_steps": lambda *_, **__: answer})()
    result = only(run([LIST], implementation, dtypes=["float32"]))
    assert (result.status, result.faults[0].kind) == ("error", "missing")
    assert words in result.faults[0].message


def changes(what):
    """optimizer_steps that does this to its arguments, and answers well."""

    def steps(self, params, gradients, settings):
        answer = Right().optimizer_steps(dict(params), list(gradients), dict(settings))
        what(params, gradients, settings)
        return answer

    return type("T", (), {"optimizer_steps": steps})()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda p, g, s: p["a"].__isub__(1), r"params\['a'\]\[0\] was 1.0 and is 0.0"),
        (lambda p, g, s: g[1]["a"].fill(0), r"gradients\[1\]\['a'\]\[0\]"),
        (lambda p, g, s: g.clear(), "gradients had 2 entries, now 0"),
        (lambda p, g, s: s.update(lr=1.0), "an entry of settings was replaced by a float"),
        (lambda p, g, s: s.update(t=1), "settings gained or lost 't'"),
        (lambda p, g, s: p.update(a=None), "an entry of params was replaced by None"),
        (lambda p, g, s: p["a"].resize(2, refcheck=False), "params.* is now float32 of shape"),
    ],
)
def test_a_change_of_any_argument_is_found_by_name(what, words):
    result = only(run([LIST], changes(what), dtypes=["float32"]))
    assert result.faults[0].kind == "changes its inputs"
    assert re.search(words, result.faults[0].message), result.faults[0].message


def test_a_target_that_changes_nothing_is_not_accused():
    assert only(run([LIST], changes(lambda *_: None), dtypes=["float32"])).status == "pass"


def test_the_callers_arrays_are_safe_from_the_target():
    def spoil(self, W, A, B):
        W[:] = 9
        return W

    W = np.zeros((2, 2))
    W.setflags(write=False)
    with pytest.raises(Fault, match="changes its inputs"):
        GuardedImplementation(type("T", (), {"merge": spoil})()).call("merge", W, W, W)
    assert not W.any()


def test_an_output_buffer_used_again_changes_an_earlier_answer():
    class Reuses:
        buffer = np.zeros(1)

        def merge(self, W, A, B):
            self.buffer[:] = W
            return self.buffer

    subject = GuardedImplementation(Reuses())
    assert subject.call("merge", np.full(1, 1.0), 0, 0).item() == 1.0
    assert subject.call("merge", np.full(1, 1.0), 0, 0).item() == 1.0
    with pytest.raises(Fault, match="changes its answers: the answer of an earlier merge"):
        subject.call("merge", np.full(1, 2.0), 0, 0)


def test_an_answer_that_is_an_argument_is_the_callers():
    subject = GuardedImplementation(type("T", (), {"merge": lambda self, W, A, B: W[:1]})())
    for v in (1.0, 2.0):
        assert subject.call("merge", np.full(2, v), 0, 0).item() == v


def test_a_caller_uses_the_memory_of_its_arguments_again():
    places = []
    subject = GuardedImplementation(
        type("T", (), {"merge": lambda self, W, A, B: places.append(W) or W + 1})()
    )
    for v in range(8):
        assert subject.call("merge", np.full(1, float(v)), 0, 0).item() == v + 1
    first, second, third, fourth, fifth, *_, last = places
    assert third is fourth is last
    assert first is not second is not third is not fifth


def test_lists_of_numbers_are_answers_in_any_dtype():
    subject = GuardedImplementation(object())
    for answer in ([[0.5, 1.5]], ([0.5, 1.5],)):
        array = subject.answer(answer, "y", (1, 2), "float32")
        assert array.dtype == np.float32
        assert (array == [[0.5, 1.5]]).all()
    with pytest.raises(Fault, match="expected float32"):
        subject.answer(np.ones((1, 2)), "y", (1, 2), "float32")


ENTERED = threading.Event()


def hangs_in_a_loop(self, W, A, B, **_):
    ENTERED.set()
    while True:
        pass


def eventually(condition):
    """Waits until it holds; only a bug lets the minute pass."""
    for _ in range(6000):
        if condition():
            return True
        time.sleep(0.01)
    return False


def hangs_in_sleep(self, W, A, B, **_):
    time.sleep(1000)


@pytest.mark.parametrize("merge", [hangs_in_a_loop, hangs_in_sleep])
def test_a_call_that_hangs_ends_the_check_with_the_place(merge):
    result = verdict(merge, time_limit=0.5)
    assert (result.status, result.faults[0].kind, result.cases) == ("error", "hangs", 1)
    assert re.search(
        rf"merge gave no answer in 0.5 s \(test_.*{merge.__name__}", result.faults[0].message
    )


def running(name):
    """Whether some thread is inside a function of this name."""
    frames = sys._current_frames().values()
    return any(f.f_code.co_name == name for top in frames for f, _ in traceback.walk_stack(top))


@pytest.mark.slow
def test_a_loop_of_python_is_stopped_when_its_time_is_over():
    ENTERED.clear()
    verdict(hangs_in_a_loop, time_limit=1.0)
    assert ENTERED.is_set(), "it was running before its time was over"
    assert eventually(lambda: not running("hangs_in_a_loop"))


def test_a_run_leaves_no_thread_behind():
    before = threading.active_count()
    for _ in range(3):
        run([EXACT], Right(), dtypes=["float32"])
        verdict(raises)
    gc.collect()
    assert eventually(lambda: threading.active_count() <= before)


def test_a_loop_that_catches_everything_still_gets_its_verdict():
    stop = threading.Event()

    def stubborn(self, W, A, B, **_):
        while not stop.is_set():
            with contextlib.suppress(BaseException):
                time.sleep(0.001)
        return W

    try:
        assert verdict(stubborn, time_limit=0.05).faults[0].kind == "hangs"
    finally:
        stop.set()


@pytest.mark.slow
def test_a_method_that_hung_twice_is_not_called_any_more():
    calls = []

    class Hangs(Right):
        def merge(self, W, A, B, **_):
            calls.append(1)
            time.sleep(1000)

    subject = GuardedImplementation(Hangs(), time_limit=0.05)
    for _ in range(MAX_HANGS + 2):
        with pytest.raises(Fault, match="hangs"):
            subject.call("merge", np.eye(2), np.eye(2), np.eye(2), alpha=1, r=1)
    assert len(calls) == MAX_HANGS
    subject.time_limit = 60.0
    (case,) = [plan([DICT], dtypes=["float32"])[0].case(0)]
    judged = [comparison.judge().verdict for comparison in DICT.run(subject, case)]
    assert judged == ["pass"], "the other methods are still checked"


def test_the_next_call_works_after_one_that_hung():
    class Once(Right):
        hung = False

        def merge(self, W, A, B, *, alpha, r):
            if not self.hung:
                self.hung = True
                time.sleep(1000)
            return super().merge(W, A, B, alpha=alpha, r=r)

    subject = GuardedImplementation(Once(), time_limit=0.1)
    with pytest.raises(Fault, match="hangs"):
        subject.call("merge", np.eye(2), np.eye(2), np.eye(2), alpha=1, r=1)
    subject.time_limit = 60.0
    merged = subject.call("merge", np.eye(2), np.eye(2), np.eye(2), alpha=1, r=1)
    assert (merged == 2 * np.eye(2)).all()


def test_what_a_target_prints_stays_out_of_standard_output(capsys):
    def chatty(self, W, A, B, *, alpha, r):
        print("garbage")
        return W + B @ A

    assert verdict(chatty).status == "pass"
    out, err = capsys.readouterr()
    assert out == ""
    assert "garbage" in err


def test_a_warning_of_the_target_is_no_error_even_where_warnings_are():
    def warns(self, W, A, B, *, alpha, r):
        np.float32(1) / np.float32(0)
        return W + B @ A

    assert verdict(warns).status == "pass"


def test_an_absent_method_is_a_check_that_did_not_run():
    report = run(CHECKS, OnlyMerge())
    skipped = [result for result in report.results if result.status == "skip"]
    assert {result.check for result in skipped} == {"dict.vjp", "list.steps"}
    assert skipped[0].reason == "not supported: no method lora_linear_vjp"
    assert report.exit_status == 0
    assert "4 of 8 checks ran" in report.text()
    text = " ".join(report.text().split())
    assert "2, not supported: no method optimizer_steps: list.steps" in text


@pytest.mark.parametrize(("opened", "what"), [(None, "None"), (object(), "an object")])
def test_what_is_no_session_is_incomplete_and_not_skipped(opened, what):
    subject = GuardedImplementation(type("T", (), {"session": lambda self, layer: opened})())
    with pytest.raises(Fault, match=f"session answers {what} without add, forward"):
        subject.session({"kind": "linear", "W": np.ones((2, 2))})


def not_here(self, W, A, B, **_):
    raise NotImplementedError("no merge on this device")


def test_what_is_not_implemented_is_skipped_and_never_passed():
    report = run([EXACT], type("T", (), {"merge": not_here})())
    assert {result.status for result in report.results} == {"skip"}
    assert report.results[0].reason == "not supported: no merge on this device"
    assert report.exit_status == 3
    assert "0 of 2 checks ran" in report.text()
    assert report.to_json()["summary"]["passed"] == 0


def test_cases_that_are_skipped_in_part_are_counted():
    class Sometimes(Right):
        calls = 0

        def merge(self, W, A, B, *, alpha, r):
            self.calls += 1
            if self.calls % 2:
                raise NotImplementedError
            return super().merge(W, A, B, alpha=alpha, r=r)

    report = run([EXACT], Sometimes(), dtypes=["float32"])
    result = only(report)
    assert (result.status, result.cases, result.skipped_cases) == ("pass", 5, 3)
    assert "exact.merge float32 skipped 3 of 5 cases, not supported: merge" in report.text()


def test_a_dtype_that_was_asked_for_and_is_not_taken_is_skipped():
    report = run([EXACT], OnlyMerge(), dtypes=["bfloat16"])
    assert only(report).reason == "not supported: OnlyMerge takes float64, float32"
    assert report.exit_status == 3


def test_after_a_deviation_some_more_cases_look_for_the_worst():
    result = only(run([SIGMA], WrongScale(), dtypes=["float32"], profile="nightly"))
    assert result.cases == 1 + CASES_AFTER_A_DEVIATION
    assert result.case == "sigma.merge:float32:0"
    assert result.worst.excess > result.arrays[0].excess
    assert result.worst_case != result.case


def test_the_smallest_counterexample_is_looked_for_only_when_a_check_failed():
    failed = only(run([EXACT], type("T", (), {"merge": with_value(9)})(), dtypes=["float64"]))
    assert failed.smallest is None, "a fault on the way, here an index error, leaves none"
    report = run([EXACT], type("T", (), {"merge": lambda s, W, A, B, **_: W - B @ A})())
    assert report.results[0].smallest["got"] == -1
    assert "SMALLEST   W=[[0]] A=[[1]] B=[[1]]  ->  got -1, want 1" in report.text()
    assert only(run([EXACT], Right(), dtypes=["float64"])).smallest is None


def test_the_smallest_counterexample_is_looked_for_in_the_first_checks_that_fail():
    wrong = type("T", (), {"merge": lambda s, W, A, B, **_: W - B @ A})()
    checks = [replace(EXACT, id=f"exact.{i}") for i in range(MAX_SHRINKS + 1)]
    results = run(checks, wrong).results
    found = [result.dtype for result in results if result.smallest]
    assert found == ["float64"] * MAX_SHRINKS, "in one dtype each"
    assert [r.check for r in results if r.note] == [f"exact.{MAX_SHRINKS}"]
    alone = only(run(checks, wrong, case=f"exact.{MAX_SHRINKS}:float64:0"))
    assert alone.smallest, "as the note says"


def test_a_search_that_breaks_is_owned():
    check = replace(EXACT, smallest=lambda subject, dtype: 1 / 0)
    wrong = type("T", (), {"merge": lambda s, W, A, B, **_: W})()
    result = only(run([check], wrong, dtypes=["float64"]))
    assert (result.status, result.smallest) == ("fail", None)
    assert "by a fault of minilora: ZeroDivisionError" in result.note


def internal(run_it, **options):
    return only(run([replace(EXACT, run=run_it, **options)], Right(), dtypes=["float32"]))


def test_a_fault_of_a_check_is_owned_and_located():
    def broken(subject, case):
        yield Comparison("y", np.ones(1), np.ones(1))
        raise ZeroDivisionError("oops")

    result = internal(broken)
    assert (result.status, result.faults[0].kind) == ("error", "internal")
    assert "ZeroDivisionError: oops (test_verify_engine.py" in result.faults[0].message


def test_a_check_that_compares_nothing_does_not_pass():
    result = internal(lambda subject, case: [])
    assert (result.status, result.faults[0].kind) == ("error", "internal")
    assert "compared nothing" in result.faults[0].message


def test_a_deviation_outweighs_the_error_that_follows_it():
    def both(subject, case):
        yield Comparison("y", np.zeros(1), np.ones(1))
        raise Fault("raises", "then it raised")

    result = internal(both)
    assert result.status == "fail"
    assert result.faults[0].message == "then it raised"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"levels": ["mrege"]},
            "no level 'mrege' .did you mean 'merge'.*one of merge, linear, opt",
        ),
        ({"dtypes": ["float8"]}, "no dtype 'float8' .*one of float64, float32, bfloat16"),
        ({"profile": "fast"}, "no profile 'fast'.*one of quick, ci, nightly"),
        ({"seed": -1}, "seed is -1"),
        ({"case": "exact.merge"}, "CHECK:DTYPE:NUMBER"),
        ({"case": "exact.merge:float32:-1"}, "CHECK:DTYPE:NUMBER"),
        ({"case": "exact.marge:float32:1"}, "did you mean 'exact.merge'"),
        ({"case": "exact.merge:float31:1"}, "did you mean 'float3"),
        ({"known": {"exact.marge": "x"}}, "did you mean 'exact.merge'"),
        ({"known": {"exact.merge": 3}}, "expected the reason"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(options, words):
    with pytest.raises(UsageError, match=words):
        run(CHECKS, Right(), **options)


def test_levels_and_dtypes_choose_and_profiles_count():
    assert [p.check.id for p in plan(CHECKS, levels=["merge"], dtypes=["float32"])] == [
        "exact.merge",
        "sigma.merge",
    ]
    assert plan(CHECKS, levels="merge", dtypes="float32") == plan(
        CHECKS, levels=["merge"], dtypes=["float32"]
    )
    sizes = [len(plan(CHECKS, profile=p)[0].numbers) for p in ("quick", "ci", "nightly")]
    assert sizes == [2, 5, 100]


def test_a_case_is_a_function_of_its_four_values():
    def draw(*four):
        return Case(*four).rng().random()

    one = draw("a.b", "float32", 3, 0)
    # The figure itself is pinned: a case id in an old report must go on meaning the same case.
    assert one == draw("a.b", "float32", 3, 0) == 0.8762129237329452
    others = [("a.c", "float32", 3, 0), ("a.b", "float64", 3, 0), ("a.b", "float32", 4, 0)]
    assert len({one, draw("a.b", "float32", 3, 1), *(draw(*o) for o in others)}) == 5


def test_the_command_reproduces_the_very_case():
    seen = []

    class FailsInTheFourth(Right):
        def merge(self, W, A, B, *, alpha, r):
            seen.append(W.copy())
            right = super().merge(W, A, B, alpha=alpha, r=r)
            return right if len(seen) < 4 else -right

    failed = only(run([SIGMA], FailsInTheFourth(), dtypes=["float32"], seed=5))
    found = re.search(r'case="(.*)", seed=(\d+)', failed.reproduce)
    assert found[1] == failed.case == "sigma.merge:float32:3"
    fourth, again = (
        seen[3],
        only(run(CHECKS, FailsInTheFourth(), case=found[1], seed=int(found[2]))),
    )
    assert again.cases == 1
    assert np.array_equal(seen[5], fourth)
    assert not np.array_equal(seen[0], fourth)
    assert again.arrays == failed.arrays


def test_a_case_beyond_the_profile_can_be_tried_alone():
    report = run(CHECKS, Right(), case="exact.merge:bfloat16:4411", levels=["optimizer"])
    assert (only(report).status, only(report).cases) == ("pass", 1)


def test_an_interrupt_of_the_user_keeps_what_was_found():
    def progress(case, behind, total):
        assert total == 4 * 5
        if case.startswith("dict"):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        run([EXACT, DICT], Right(), dtypes=["float64", "float32"], progress=progress)
    report = stopped.value.report
    assert [result.check for result in report.results] == ["exact.merge", "exact.merge"]
    assert report.exit_status == 130
    assert "INTERRUPTED" in report.text()


class Odd(Right):
    """Deviates in every way at once, with names that try to break the formats."""

    name = 'o"d<d>\x1b[31m & ü\ud800'
    version = "0\n1"
    conventions: ClassVar = {"x": np.float32(np.inf), 3: np.int64(4)}

    def merge(self, W, A, B, *, alpha, r):
        return (W - B @ A).astype(W.dtype)

    def lora_linear_vjp(self, *args, **kwargs):
        raise ValueError("<b>\x00\x1b[2J\n" + "x" * 5000)


@pytest.fixture(scope="module")
def odd():
    return run(CHECKS, Odd(), known={"sigma.merge:float64": {"reason": "a <reason>", "seen": OFF}})


def test_the_json_is_strict_and_has_the_fields_of_the_contract(odd):
    def refuse(constant):
        raise AssertionError(constant)

    document = json.loads(odd.json(), parse_constant=refuse)
    assert document == odd.to_json()
    assert set(document) >= {
        "schema",
        "minilora",
        "target",
        "profile",
        "seed",
        "summary",
        "results",
    }
    assert document["schema"] == 1
    assert set(document["target"]) >= {"name", "version"}
    counts = ("passed", "failed", "loose", "known", "skipped", "errors")
    assert sum(document["summary"][c] for c in counts) == len(document["results"])
    assert document["summary"]["failed"] == 5
    for result in document["results"]:
        assert set(result) >= {
            "check", "level", "dtype", "status", "cases", "worst", "diagnosis", "counterexample",
            "reproduce",
        }  # fmt: skip
    exact = document["results"][0]
    assert exact["worst"]["z"] is None, "a broken == has no finite z"
    assert exact["worst"]["sigma"] is None
    assert set(exact["worst"]) >= {"array", "index", "z", "got", "want", "sigma", "case"}
    assert exact["counterexample"]["smallest"]["got"] == -1.0
    assert document["target"]["conventions"] == {"x": "Infinity", "3": 4}


def test_numbers_of_every_kind_become_json():
    values = {
        "a": np.arange(2, dtype=np.int8), "b": np.bool_(True), "c": np.longdouble(2),
        "d": ml_dtypes.bfloat16(1.5), "e": (np.nan, -np.inf), 6: {1}, "g": Path("x"), "h": None,
        "i": np.ones(1, ml_dtypes.bfloat16),
    }  # fmt: skip
    expected = {
        "a": [0, 1], "b": True, "c": 2.0, "d": 1.5, "e": ["NaN", "-Infinity"], "6": [1],
        "g": "x", "h": None, "i": [1.0],
    }  # fmt: skip
    assert plain(values) == expected
    json.dumps(plain(values), allow_nan=False)


def test_the_terminal_report_fits_in_80_columns_worst_first(odd):
    text = odd.text()
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines if "REPRODUCE" not in line)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text), "no control character of the target"
    head = next(i for i, line in enumerate(lines) if line.split()[:1] == ["float64"])
    table = [line.split()[0] for line in lines[head : head + 5]]
    assert table == ["float64", "exact.merge", "sigma.merge", "dict.vjp", "list.steps"]
    for word in ("FAIL", "ERROR", "known", "pass", "got", "want", "SMALLEST", "REPRODUCE"):
        assert word in text


def test_the_junit_file_parses_and_counts(odd):
    suite = ET.fromstring(junit(odd)).find("testsuite")
    assert suite.get("tests") == str(len(odd.results)) == str(len(suite.findall("testcase")))
    assert len(suite.findall("testcase/failure")) == int(suite.get("failures")) == 5
    assert len(suite.findall("testcase/error")) == int(suite.get("errors")) == 4
    assert suite.find("testcase/skipped").get("message") == "known: a <reason>"


def test_the_page_holds_every_check_and_nothing_of_another_site(odd):
    page = html([odd])
    for check in CHECKS:
        assert f'id="{check.id}"' in page
    assert "http" not in page
    assert "<b>" not in page
    assert "a &lt;reason&gt;" in page
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page
    page.encode()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    write_text(str(path), "one")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_text(str(path), "two")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path], "nothing is left beside it"


def test_declarations_are_read_and_checked():
    class Declares(Right):
        dtypes: ClassVar = [np.float32, "bfloat16"]
        precision: ClassVar = {"bfloat16": {"storage": "bfloat16", "accumulation": "float32"}}

    subject = GuardedImplementation(Declares())
    assert subject.dtypes == ("float32", "bfloat16")
    assert subject.precision("bfloat16") == Precision("bfloat16", "float32")
    assert subject.precision("float32") == Precision("float32", "float32")
    assert GuardedImplementation(OnlyMerge()).dtypes == ("float64", "float32")
    assert (
        GuardedImplementation(OnlyMerge()).name,
        GuardedImplementation(OnlyMerge()).version,
    ) == ("OnlyMerge", "")
    wrong = type("T", (Declares,), {"merge": lambda s, W, A, B, **_: W})()
    text = run([EXACT], wrong, dtypes=["bfloat16"]).text()
    assert "FAIL  exact.merge   bfloat16 (float32 accumulation)" in text


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("dtypes", ["float33"], "'dtypes' names float33"),
        ("dtypes", 3, "'dtypes' is an int"),
        ("precision", ["float32"], "'precision' is a list, expected a dict"),
        ("precision", {"float32": "float64"}, "is a str, expected .*storage"),
        ("precision", {"float32": {"storage": "fp8"}}, "names fp8"),
        ("known", "all", "'known' is a str"),
        ("name", lambda self: "it", "'name' of the target is a method"),
        (
            "conventions",
            {"dora_norm": "none"},
            r"conventions\['dora_norm'\] is 'none', expected one of detached, differentiated",
        ),
        ("name", property(lambda self: 1 / 0), "reading 'name' .* ZeroDivisionError"),
    ],
)
def test_a_declaration_that_cannot_be_read_is_refused(attribute, value, words):
    with pytest.raises(LoadError, match=words):
        GuardedImplementation(type("T", (Right,), {attribute: value})())


def test_an_answer_that_has_no_end_is_told():
    endless = type("T", (Right,), {"merge": lambda self, *_, **__: itertools.count()})
    subject = GuardedImplementation(endless())
    with pytest.raises(Fault, match="answer of 10000 entries and more: has it no end"):
        subject.call("merge", *(np.ones((2, 2)),) * 3, alpha=1.0, r=2)


def test_a_number_of_python_has_no_dtype_of_its_own():
    subject = GuardedImplementation(Right())
    assert subject.answer(0.5, "L", (), "float32") == 0.5
    with pytest.raises(Fault, match="L is float64, expected float32"):
        subject.answer(np.float64(0.5), "L", (), "float32")


@pytest.mark.parametrize("name", ["Right", "factory", "right"])
def test_an_object_a_class_or_a_factory_is_a_target(name):
    assert isinstance(load(f"fake_checks:{name}"), Right)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (
            "pfet",
            r"no target 'pfet' .*mean 'peft'.*; expected package.*, or one of adapters, axolotl",
        ),
        ("my_lora.py", "names no class, .* write my_lora.py:NAME"),
        ("no_such_module:x", "no module 'no_such_module', neither in the current folder nor"),
        ("fake_checks:Rihgt", r"fake_checks has no 'Rihgt' \(did you mean 'Right'\?\); it holds"),
        ("fake_checks:needs_arguments", r"takes arguments \(size\); give an object"),
        ("fake_checks:raises", r"calling fake_checks:raises\(\) raises RuntimeError: no device"),
        ("fake_checks:number", "is an int with none of the contract's methods: lora_linear"),
        ("json:JSONDecoder", "is a JSONDecoder with none of the contract's methods"),
        (":x", "no target"),
        ("fake_checks:", "no target"),
    ],
)
def test_a_target_that_cannot_be_loaded_is_told_why(target, words):
    with pytest.raises(LoadError, match=words):
        load(target)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_library", "needs 'no_such_library', which is not installed"),
        ("1 / 0", r"importing broken_\d raises ZeroDivisionError: .* \(broken_\d.py:1"),
        ("import sys; sys.exit(4)", "raises SystemExit: 4"),
        ("def f(:", "raises SyntaxError"),
    ],
)
def test_a_module_that_fails_to_load_is_told_why(source, words, tmp_path, monkeypatch, request):
    name = f"broken_{request.node.callspec.indices['source']}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(LoadError, match=words):
        load(f"{name}:x")


def test_a_shipped_peer_whose_library_is_absent_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "needs_it.py").write_text("def implementation():\n    import no_such_library\n")
    (tmp_path / "imports_it.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("needs_it", "imports_it"):
        absent = Peer("shipped", f"{name}:implementation", ("no-such-library",), "peers", ())
        monkeypatch.setitem(peers.PEERS, "shipped", absent)
        words = r"no_such_library is not installed; pip install 'minilora\[peers\]'"
        with pytest.raises(LoadError, match=words):
            load("shipped")


def test_a_call_gives_a_skip_or_a_fault_and_nothing_else():
    subject = GuardedImplementation(type("T", (), {"merge": not_here, "load": lambda *_: 1 / 0})())
    with pytest.raises(Skip):
        subject.call("merge", np.ones(1), 0, 0)
    with pytest.raises(Fault, match="ZeroDivisionError"):
        subject.call("load", "a", "b")
    assert subject.has("merge")
    assert not subject.has("save")
    assert all(name.isidentifier() for name in METHODS)


def test_the_public_function_checks_an_object_a_class_or_a_factory(monkeypatch):
    monkeypatch.setitem(sys.modules, "minilora.verify.checks.registry", fake_checks)
    assert callable(check_module_or_function)
    for target in (Right(), Right, fake_checks.factory):
        report = minilora.verify.check(target, levels=["merge"], profile="quick")
        assert report.exit_status == 0
    with pytest.raises(LoadError, match="takes arguments"):
        minilora.verify.check(fake_checks.needs_arguments)
    assert isinstance(CHECKS[0], Check)
