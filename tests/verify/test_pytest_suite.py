"""The checks as tests of pytest: what each verdict becomes, and which tests there are."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import fake_checks
import pytest
from extras import optional

from minilora.verify import check, parametrize_with_checks, pytest_suite
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import UsageError
from minilora.verify.diagnosis import investigation
from minilora.verify.plan import plan
from minilora.verify.report.result import Known

pytestmark = pytest.mark.slow

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[2]
OPTIONS = ("-p", "minilora.pytest_plugin", "-p", "no:cacheprovider")


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    """The small registry in the place of the real one."""
    monkeypatch.setitem(sys.modules, "minilora.verify.checks.registry", fake_checks)
    monkeypatch.setattr(pytest_suite, "_SHRUNK", pytest_suite.Counter())


@pytest.fixture
def front(pytester):
    """Runs `pytest --pyargs minilora.verify …` in this process."""

    def run(*arguments, target="fake_checks:Right"):
        package = ("--pyargs", "minilora.verify", "--minilora-implementation", target)
        return pytester.runpytest_inprocess(*OPTIONS, *package, *arguments)

    return run


OFF = {"arrays": "W'"}


class KnownWrong(fake_checks.WrongScale):
    known: ClassVar = {
        "sigma.merge:float32": {"reason": "takes alpha for alpha / r", "seen": OFF},
        "exact.merge": {"reason": "so too", "seen": OFF},
    }


class NoLongerWrong(fake_checks.Right):
    known: ClassVar = {
        "sigma.merge:float32": Known("was wrong in 1.1", "https://tracker/7", seen=(OFF,)),
        "exact.merge": {"reason": "was wrong in one dtype", "seen": OFF},
    }


for each in (KnownWrong, NoLongerWrong):  # where a target is looked for by its name
    setattr(fake_checks, each.__name__, each)


def test_there_is_a_test_for_each_check_and_dtype(front):
    front().assert_outcomes(passed=14)
    front("-k", "merge and float32").assert_outcomes(passed=2, deselected=12)
    front("-k", "sigma.").assert_outcomes(passed=2, deselected=12)
    ids = [one.id for one in pytest_suite.check_tests(fake_checks.Right())]
    assert len(set(ids)) == 14
    assert {id.rpartition("-")[2] for id in ids} == set(DTYPES)


def test_a_failure_shows_the_reports_own_text(front):
    run = front(target="fake_checks:WrongScale")
    run.assert_outcomes(passed=8, failed=6)
    run.stdout.fnmatch_lines(
        [
            "wrong scale 1.2: FAIL  sigma.merge   float64",
            "  W' = W + s B A",
            "  in 5 of 5 cases, first in sigma.merge:float64:0",
            "  REPRODUCE  minilora verify fake_checks:WrongScale --case sigma.merge:float64:0 "
            "--seed 0",
        ]
    )
    assert "Traceback" not in run.stdout.str()


def test_the_verdicts_are_those_of_check():
    for target in (fake_checks.Right, fake_checks.WrongScale, fake_checks.OnlyMerge, KnownWrong):
        report = check(target())
        found = [verdict(one, target()) for one in pytest_suite.check_tests(target())]
        assert found == [{"error": "fail"}.get(r.status, r.status) for r in report.results]


def verdict(one, implementation):
    try:
        one(implementation)
    except pytest.skip.Exception:
        return "skip"
    except pytest.xfail.Exception:
        return "known"
    except pytest.fail.Exception:
        return "fail"
    return "pass"


def test_what_is_not_supported_is_skipped_with_its_reason(front):
    run = front("-rs", target="fake_checks:OnlyMerge")
    run.assert_outcomes(passed=4, skipped=4)
    run.stdout.fnmatch_lines(["SKIPPED *not supported: no method lora_linear_vjp"])


def test_a_known_deviation_is_expected_to_fail(front):
    run = front("-rx", target="fake_checks:KnownWrong")
    run.assert_outcomes(passed=8, failed=1, xfailed=5)
    run.stdout.fnmatch_lines(["XFAIL *sigma.merge-float32* takes alpha for alpha / r"])
    front("--runxfail", target="fake_checks:KnownWrong").assert_outcomes(passed=8, failed=6)


def test_what_is_known_of_one_test_must_not_pass(front):
    run = front(target="fake_checks:NoLongerWrong")
    run.assert_outcomes(passed=13, failed=1)
    run.stdout.fnmatch_lines(["*no longer fails, though known: was wrong in 1.1 https://tracker/7"])


def test_what_is_known_of_several_tests_may_pass_in_one():
    (one,) = (o for o in pytest_suite.check_tests(NoLongerWrong()) if o.id == "exact.merge-float16")
    assert (one.known.reason, one.strict) == ("was wrong in one dtype", False)
    assert verdict(one, NoLongerWrong()) == "pass"


def test_a_fault_of_minilora_is_nobodys_known_deviation():
    def broken(subject, case):
        raise ZeroDivisionError("a check's own")

    (one,) = (o for o in pytest_suite.check_tests(KnownWrong()) if o.id == "sigma.merge-float32")
    assert verdict(one, KnownWrong()) == "known"
    one = replace(one, check=replace(one.check, run=broken))
    assert verdict(one, KnownWrong()) == "fail"


def test_many_cases_are_cut_into_parts_that_hold_each_case_once():
    parts = [
        o
        for o in pytest_suite.check_tests(
            fake_checks.Right(), profile="nightly", dtypes=["float32"]
        )
        if o.check.id == "exact.merge"
    ]
    assert [o.id for o in parts] == [f"exact.merge-float32-{i}of20" for i in range(1, 21)]
    numbers = []
    for one in parts:
        (part,) = plan([one.check], profile="nightly", dtypes=["float32"], part=one.part)
        numbers += part.numbers
    assert numbers == list(range(100))
    assert verdict(parts[3], fake_checks.Right()) == "pass"


def test_a_case_in_the_last_part_is_seen_there_and_named():
    class OnceWrong(fake_checks.Right):
        calls = 0

        def merge(self, W, A, B, **options):
            self.calls += 1
            return fake_checks.Right.merge(self, W, A, B, **options) + (self.calls == 5)

    last = list(pytest_suite.check_tests(OnceWrong(), profile="nightly", dtypes=["float32"]))[19]
    with pytest.raises(pytest.fail.Exception, match=r"first in exact\.merge:float32:99"):
        last(OnceWrong())


def test_the_smallest_counterexample_is_looked_for_in_a_few_tests_only(monkeypatch):
    monkeypatch.setattr(investigation, "MAX_SHRINKS", 1)
    searched = []
    monkeypatch.setattr(fake_checks, "smallest", lambda subject, dtype: searched.append(dtype))
    checks = [
        replace(c, smallest=fake_checks.smallest) for c in fake_checks.CHECKS if c.smallest
    ] + list(fake_checks.CHECKS[1:])

    class AllWrong(fake_checks.WrongScale):
        def merge(self, W, A, B, **options):
            return fake_checks.WrongScale.merge(self, W, A, B, **options) + 1

    monkeypatch.setattr(fake_checks, "CHECKS", checks)
    assert [verdict(o, AllWrong()) for o in pytest_suite.check_tests(AllWrong())].count("fail") == 6
    assert searched == ["float64"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target": "fake_checks:zzz"}, "fake_checks has no 'zzz'; it holds"),
        ({"target": "peftt"}, "no target 'peftt'"),
    ],
)
def test_a_target_that_does_not_load_ends_the_run_with_what_is_wrong(front, arguments, words):
    run = front(**arguments)
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run.stderr.fnmatch_lines([f"ERROR: --minilora-implementation: *{words}*"])


def test_a_profile_or_a_file_that_does_not_exist_is_refused(front):
    run = front("--minilora-known", "absent.json")
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run = front("--minilora-profile", "nigthly")
    assert run.ret != 0
    run.stdout.fnmatch_lines(["*no profile 'nigthly' (did you mean 'nightly'?)*"])


def test_a_known_file_is_read(front, pytester):
    path = pytester.path / "known.json"
    entry = {"check": "sigma.*", "reason": "in a file", "seen": OFF}
    path.write_text(json.dumps([entry]))
    run = front("--minilora-known", str(path), "-rx", target="fake_checks:WrongScale")
    run.assert_outcomes(passed=8, failed=4, xfailed=2)
    run.stdout.fnmatch_lines(["XFAIL * in a file"])


def test_a_suite_of_ones_own_takes_the_checks_by_a_decorator(pytester):
    pytester.makepyfile(
        """
        import fake_checks
        from minilora.verify import parametrize_with_checks

        @parametrize_with_checks(
            [fake_checks.Right, fake_checks.WrongScale(), "fake_checks:OnlyMerge"],
            levels=["merge"], dtypes=["float32", "float16"], profile="quick",
        )
        def test_mine(implementation, check):
            check(implementation)
        """
    )
    run = pytester.runpytest_inprocess(*OPTIONS, "-v")
    run.assert_outcomes(passed=5, failed=3, skipped=1)
    run.stdout.fnmatch_lines(["*test_mine?wrong scale-sigma.merge-float32? FAILED*"])
    run.stdout.fnmatch_lines(['*minilora.verify.check(implementation, case="sigma.merge:float32:*'])


def shown(language, word):
    """The block of code in the guide that holds a word."""
    guide = (ROOT / "docs/how-to-verify.md").read_text()
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", guide, re.M | re.S)
    return next(block for block in blocks if word in block)


def test_the_guides_example_of_a_suite_runs(pytester):
    pytester.makepyfile(
        "from fake_checks import Right as MyLayer\n" + shown("python", "parametrize_with_checks")
    )
    pytester.runpytest_inprocess(*OPTIONS).assert_outcomes(passed=10)


def test_the_guides_command_runs(pytester):
    command = shown("sh", "--pyargs").replace("package.module:name", "fake_checks:OnlyMerge")
    program, *arguments = shlex.split(command)
    assert program == "pytest"
    run = pytester.runpytest_inprocess(*OPTIONS, *arguments)
    assert run.ret == pytest.ExitCode.NO_TESTS_COLLECTED  # the small registry has no linear.…
    run = pytester.runpytest_inprocess(*OPTIONS, *arguments[:-1], "exact. and float32")
    run.assert_outcomes(passed=1, deselected=7)


def test_the_decorator_refuses_what_does_not_exist():
    with pytest.raises(UsageError, match="no level 'mrge'"):
        parametrize_with_checks([fake_checks.Right], levels=["mrge"])


def python(*arguments, **variables):
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )


@pytest.mark.slow
def test_the_plugin_leaves_other_suites_alone(tmp_path):
    """It takes no option of a general name, and loads nothing that the suite does not ask for."""
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--implementation')\n"
    )
    (tmp_path / "test_other.py").write_text(
        "import sys\n"
        "def test_other(request):\n"
        "    assert request.config.getoption('--implementation') == 'theirs'\n"
        "    assert request.config.pluginmanager.hasplugin('minilora.pytest_plugin')\n"
        "    loaded = {name for name in sys.modules if name.startswith('minilora')}\n"
        "    assert loaded == {'minilora', 'minilora.pytest_plugin'}\n"
        "    assert not {'numpy', 'scipy', 'hypothesis'} & set(sys.modules)\n"
    )
    options = (*OPTIONS, "--implementation", "theirs")
    run = python("-m", "pytest", *options, str(tmp_path), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert "1 passed" in run.stdout, run.stdout + run.stderr


@pytest.mark.slow
def test_a_check_needs_no_pytest():
    code = """if True:
        import sys
        sys.modules["pytest"] = None  # an import of it raises
        from minilora.verify import check
        from minilora.verify.implementation.minilora_impl import Minilora
        assert check(Minilora(), levels=["merge"], profile="quick").exit_status == 0
        try:
            import minilora.verify.pytest_suite
        except ImportError:
            print("pytest is not there")
        """
    run = python("-c", code)
    assert (run.stdout, run.stderr) == ("pytest is not there\n", "")


@pytest.mark.slow
def test_processes_share_the_tests():
    """The whole of the real registry is collected, in each process alike, and a part of it run."""
    optional("xdist")
    run = python(
        *("-m", "pytest", "-n2", "-q", *OPTIONS, "--pyargs", "minilora.verify"),
        *("--minilora-profile", "quick", "-k", "merge.weight and float32"),
    )
    assert "4 passed" in run.stdout, run.stdout + run.stderr
