"""Several processes that ask: what each may ask, and a report that is the same."""

import json
import multiprocessing
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from fake_checks import CHECKS, Right

from minilora.cli.main import main
from minilora.verify.checks.registry import CHECKS as REAL_CHECKS
from minilora.verify.engine import Asker, Interrupted, run
from minilora.verify.implementation.python_target import PythonTarget
from minilora.verify.jobs import Helpers, Setup
from minilora.verify.plan import plan
from minilora.verify.report.result import FaultSeen
from minilora.verify.work import Work

PLANS = plan(CHECKS, dtypes=["float64"])
ASKER = Asker.of(CHECKS, Right(), {}, 30.0)
PASS = ASKER.result(PLANS[0])
FAIL = replace(PASS, status="fail")
CRASH = replace(PASS, status="error", faults=(FaultSeen("crashes", "SIGSEGV", "", 1),))


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.startswith("seconds")}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


def asked_here(work):
    """The plans that this process asks, each of which passes."""
    asked = []
    for number in work.here():
        asked.append(number)
        work.add(number, PASS, [])
    return asked


def test_this_process_asks_from_the_first_and_others_from_the_last():
    work = Work([3, 3, 3, 3])
    here = work.here()
    assert (next(here), work.for_others(), next(here), work.for_others()) == (0, 3, 1, 2)
    work.add(0, PASS, ["first"])
    work.add_of_others(3, (PASS, ("last", "first")))
    assert (work.done, len(work.results), list(work.remarks)) == (6, 2, ["first", "last"])
    work.add_of_others(2, (PASS, ()))
    work.add(1, PASS, [])
    assert next(here, None) is None
    assert work.for_others() is None


@pytest.mark.parametrize("answered", [None, (FAIL, ()), (CRASH, ())])
def test_what_deviates_elsewhere_is_asked_here_again(answered):
    work = Work([1, 1])
    assert work.for_others() == 1
    work.add_of_others(1, answered)
    assert work.for_others() == 0
    work.add_of_others(0, (PASS, ()))
    assert asked_here(work) == [1]


def test_after_a_crash_all_that_follows_is_asked_here():
    work = Work([1, 1, 1, 1])
    here = work.here()
    assert (work.for_others(), work.for_others(), next(here)) == (3, 2, 0)
    work.add_of_others(3, (PASS, ()))
    work.add(0, CRASH, [])
    assert work.for_others() is None
    work.add_of_others(2, (PASS, ()))
    assert asked_here(work) == [1, 2, 3]


def test_this_process_waits_for_what_others_ask():
    work = Work([1])
    assert work.for_others() == 0
    threading.Timer(0.05, work.add_of_others, (0, (PASS, ()))).start()
    assert asked_here(work) == []
    assert work.results == [PASS]


def test_another_process_is_started_where_it_pays_off():
    work = Work([1, 9])
    work.add(0, PASS, [])
    setup = Setup(nullcontext, {}, None, 30.0)
    helpers = Helpers(setup, 1, if_worth_it=True, start_seconds=4.0)
    assert helpers.is_worth_it(work, 0, seconds=1.0)  # 9 s are left, and 4.5 s with another
    assert not helpers.is_worth_it(work, 1, seconds=1.0)
    assert not helpers.is_worth_it(work, 0, seconds=0.8)
    assert not helpers.is_worth_it(Work([1, 9]), 0, seconds=100.0)
    assert not replace(helpers, size=10**18).is_worth_it(work, 0, seconds=1.0)
    assert replace(helpers, if_worth_it=False).is_worth_it(Work([1]), 0, seconds=0.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--jobs", "0"], "--jobs 0: expected 1 or more"),
        (["--jobs", "2", "--in-process"], "--jobs 2 and --in-process: it runs in one process"),
        (["--jobs", "2", "--case", "linear.forward:float64:0"], "--case: it runs in one process"),
    ],
)
def test_jobs_that_cannot_be_are_refused(options, words, capsys):
    assert main(["verify", *options]) == 2
    assert words in capsys.readouterr().err


TARGET = """
import os, time
from pathlib import Path
from minilora.verify.implementation.minilora_impl import Minilora

def is_beside():  # the process that asks is not the first
    return b"spawn_main" in Path(f"/proc/{{os.getppid()}}/cmdline").read_bytes()

class T(Minilora):
    def merge(self, W, A, B, **settings):
        if is_beside():
            Path("beside").touch()
        while Path("wait").exists() and not Path("beside").exists():
            time.sleep(0.01)
        {end}
        return super().merge(W, A, B, **settings)
"""
ENDS = {
    "": 0,
    "if settings.get('use_rslora'): raise KeyError('no')": 1,
    "if settings.get('use_rslora'): os._exit(3)": 1,
    "if is_beside(): A = 2 * A": 0,
    "if is_beside(): os.kill(os.getppid(), 9)": 0,
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a process tells what it is in /proc")
@pytest.mark.parametrize("end", ENDS)
def test_the_report_is_that_of_one_process(end, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(TARGET.format(end=end))
    documents = []
    for jobs in "12":
        options = ["--level", "merge", "--profile", "quick", "--dtype", "float32", "--jobs", jobs]
        options += ["--time-limit", "600", "--json", "r.json"]
        assert main(["verify", "mine.py:T", *options]) == ENDS[end]
        documents.append(without_times(json.loads(Path("r.json").read_text())))
        Path("wait").touch()  # the first process for the other
    assert documents[0] == documents[1]
    assert Path("beside").exists()


@pytest.mark.slow
def test_a_whole_run_is_shared_from_the_start(monkeypatch):
    merging = [check for check in REAL_CHECKS if check.level == "merge"]
    monkeypatch.setattr("minilora.verify.checks.registry.CHECKS", merging)
    monkeypatch.setattr("minilora.cli.commands.verify.processors", lambda: 2)
    asked, add, here = [], Work.add_of_others, Work.here

    def add_of_others(work, number, answered):
        asked.append(answered)
        add(work, number, answered)

    def after_others(work):
        while not asked:
            time.sleep(0.01)
        yield from here(work)

    monkeypatch.setattr(Work, "add_of_others", add_of_others)
    monkeypatch.setattr(Work, "here", after_others)
    assert main(["verify", "--profile", "quick"]) == 0
    assert None not in asked
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_an_interrupt_ends_the_other_process():
    target = "minilora.verify.implementation.minilora_impl:implementation"
    helpers = Helpers(Setup(partial(PythonTarget, target), {}, None, 30.0), count=1)

    def interrupt(case, behind, total):
        if multiprocessing.active_children():
            raise KeyboardInterrupt

    with pytest.raises(Interrupted), PythonTarget(target) as here:
        run(REAL_CHECKS, here, levels=["merge"], progress=interrupt, helpers=helpers)
    assert not multiprocessing.active_children()
