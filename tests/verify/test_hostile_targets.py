"""Targets that end, block or deceive the process that they run in: each ends in a verdict."""

import json
import os
import sys
import threading
from pathlib import Path

import fake_checks
import numpy as np
import pytest
from marks import others_slow

from minilora.cli.main import main
from minilora.verify.checks.session_inputs import draw_inputs
from minilora.verify.core.errors import Fault, LoadError
from minilora.verify.core.types import Case
from minilora.verify.engine import run
from minilora.verify.implementation import python_target
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.messages import read_arrays
from minilora.verify.implementation.minilora_impl import Minilora
from minilora.verify.implementation.python_target import PythonTarget

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="signals and process groups"),
]

HEAD = """
import atexit, ctypes, os, signal, sys, threading, time
import numpy as np
import fake_checks

class Lying(np.ndarray):
    shape = property(lambda self: (7,))
    dtype = property(lambda self: np.dtype(np.float64))
    def __array__(self, *a, **k): os._exit(0)
    def __array_ufunc__(self, *a, **k): return True
    def tobytes(self, *a): return bytes(80)
    astype = __eq__ = __ne__ = tobytes

class Mute:
    def __repr__(self): raise SystemExit(0)
    __str__ = __format__ = __repr__

class Worse(Exception):
    def __str__(self): os._exit(0)

class T(fake_checks.Right):
    known_answer = fake_checks.Right.merge
    def merge(self, W, A, B, *, alpha, r):
        right = self.known_answer(W, A, B, alpha=alpha, r=r)
        wrong = right + 1
"""
"""A right implementation but for the end of ``merge``, which two of the four checks call."""

ENDS = {
    "exit": ("os._exit(0)", "merge: it ended with exit status 0"),
    "segmentation fault": ("ctypes.string_at(0)", "ended by SIGSEGV (hostile.py:"),
    "abort": ("os.abort()", "merge: it was ended by SIGABRT (hostile.py:"),
    "kill": ("os.kill(os.getpid(), signal.SIGKILL)", "merge: it was ended by SIGKILL"),
    "stop": ("os.kill(os.getpid(), signal.SIGSTOP)", "merge gave no answer in 0.5 s"),
    "closed files": ("os.closerange(3, 99); time.sleep(60)", "merge: it closed its standard"),
    "hang": ("while True: pass", "merge gave no answer in 0.5 s (hostile.py:"),
    "hang with the lock": ("ctypes.PyDLL(None).sleep(60)", "in 0.5 s (hostile.py:"),
    "endless output": ("while True: print('x' * 1000)", "merge gave no answer in 0.5 s"),
    "forged answer": (
        "[os.write(f, FORGED) for f in range(3, 99) if is_answers(f)]",
        '\'{"seq":2,"ok":NaN,"bytes":0}\' on standard output is not an answer',
    ),
    "text that ends it": ("raise Worse", "merge: it ended with exit status 0"),
}
"""What ends the target's process, or has it ended: two deviations, two checks that pass."""

ANSWERS = {
    "sys.exit": ("sys.exit(0)", "SystemExit: 0"),
    "interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "huge text": ("raise ValueError('x' * 10**8)", "ValueError: xxx"),
    "huge answer": ("return np.broadcast_to(right[0, 0], (2**50,))", "raises"),
    "endless answer": ("return iter(int, 1)", "has it no end?"),
    "no text": ("return Mute()", "merge"),
    "a wrong array that lies": ("return wrong.view(Lying)", "FAIL exact.merge"),
    "atexit": ("atexit.register(os._exit, 0); return wrong", "FAIL exact.merge"),
    "a thread that stays": (
        "threading.Thread(target=time.sleep, args=[60]).start(); return wrong",
        "FAIL exact.merge",
    ),
    "threads that print": (
        "threading.Thread(target=lambda: [print('x' * 999) for _ in iter(int, 1)], daemon=True)"
        ".start(); return wrong",
        "FAIL exact.merge",
    ),
    "patched NumPy": (
        "np.matmul = np.array_equal = np.isfinite = np.abs = lambda *a, **k: right; return wrong",
        "FAIL exact.merge",
    ),
    "patched minilora": (
        "from minilora.verify import engine; from minilora.verify.core import types; "
        "types.Comparison.judge = engine.judged = engine.run = None; "
        "types.Limits.verdict = lambda *a: 'pass'; return wrong",
        "FAIL exact.merge",
    ),
    "another folder": ("os.chdir('/'); sys.path.clear(); return wrong", "FAIL exact.merge"),
}
"""What the target's process survives: two deviations, two checks that pass."""

RIGHT = {
    "a right array that lies": "return right.view(Lying)",
    "a list": "return right.tolist() if right.dtype == float else right",
    "closed standard files": "[os.close(f) for f in range(3) if is_open(f)]; return right",
    "two processes": "os.fork(); return right",
    "output": "print('x' * 10**6); return right",
}

FILES = """
import fcntl, os, stat
FORGED = b'{"seq":2,"ok":NaN,"bytes":0}\\n'
def is_open(f):
    try: return bool(os.fstat(f))
    except OSError: return False
def is_answers(f):
    is_pipe = is_open(f) and stat.S_ISFIFO(os.fstat(f).st_mode)
    return is_pipe and fcntl.fcntl(f, fcntl.F_GETFL) & os.O_WRONLY
"""


@pytest.fixture
def hostile(tmp_path, monkeypatch, capsys):
    """Verifies a target of which ``merge`` ends so: the status, the report and standard error."""
    monkeypatch.setitem(sys.modules, "minilora.verify.checks.registry", fake_checks)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)

    def verify(end, *options, before="", after=""):
        Path("hostile.py").write_text(f"{before}{FILES}{HEAD}        {end}\n{after}\n")
        limit = [] if "--time-limit" in options else ["--time-limit", "0.5"]
        chosen = ["--profile", "quick", "--dtype", "float64", "--json", "r.json"]
        status = main(["verify", "hostile.py:T", *chosen, *limit, *options])
        return status, *capsys.readouterr()

    return verify


@pytest.mark.parametrize(
    "name",
    others_slow(
        [*ENDS, *ANSWERS], "exit", "segmentation fault", "hang with the lock", "patched minilora"
    ),
)
def test_whatever_a_target_does_is_a_verdict_and_the_other_checks_are_made(hostile, name):
    end, words = {**ENDS, **ANSWERS}[name]
    status, out, err = hostile(end)
    assert status == 1
    assert words in " ".join(out.split())
    results = json.loads(Path("r.json").read_text())["results"]
    assert [r["status"] in ("error", "fail") for r in results] == [True, True, False, False]
    assert [r["status"] for r in results][2:] == ["pass", "pass"]
    assert len(out) < 10_000
    assert len(err) < python_target.PRINTED + 200
    assert sorted(os.listdir()) == ["hostile.py", "r.json"]


@pytest.mark.parametrize("name", others_slow(RIGHT, "a right array that lies"))
def test_what_is_strange_and_right_passes(hostile, name):
    status, out, _ = hostile(RIGHT[name], "--time-limit", "20")
    assert status == 0, out


@pytest.mark.parametrize("name", ["*", "*:float64", "exact.merge"])
def test_what_a_target_declares_as_known_of_everything_excuses_nothing(hostile, name):
    status, out, _ = hostile("return wrong", after=f"T.known = {{{name!r}: 'all is well'}}")
    assert status == 1
    assert "FAIL exact.merge" in " ".join(out.split())
    assert repr(name) in out or f"{name} is declared" in out


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("import os; os._exit(0)", "loading it: it ended with exit status 0"),
        ("import os; os.abort()", "loading it: it was ended by SIGABRT (hostile.py:"),
        ("import sys; sys.exit(0)", "importing hostile raises SystemExit: 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import no_such_module", "needs 'no_such_module', which is not installed"),
    ],
)
def test_a_target_that_cannot_be_loaded_is_status_3(hostile, before, words):
    status, out, err = hostile("return right", before=before + "\n")
    assert (status, out) == (3, "")
    assert words in err


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ("T.__init__ = lambda self: os.kill(os.getpid(), 9)", "it was ended by SIGKILL"),
        ("T.dtypes = 3", "'dtypes' is an int, expected names"),
        ("T.dtypes = ['float31']", "'dtypes' names float31; expected"),
        ("T.known = ['*']", "'known' is a list, expected a dict"),
        ("T.name = property(lambda self: 1 / 0)", "reading 'name' of the target raises"),
        ("T.version = T.merge", "'version' of the target is a"),
    ],
)
def test_a_declaration_that_cannot_be_used_is_status_3(hostile, after, words):
    status, out, err = hostile("return right", after=after)
    assert (status, out) == (3, "")
    assert words in err


@pytest.mark.slow
def test_a_declaration_arrives_as_it_was_made(hostile):
    after = (
        "T.dtypes = {np.float64, np.dtype('float32')}\nT.name, T.version = 'ours', 3\n"
        "T.precision = {'float64': {'accumulation': 'float32'}}\n"
        "T.conventions = {'dora_norm': 'detached'}"
    )
    assert hostile("return right", after=after)[0] == 0
    with PythonTarget("hostile.py:T") as target:
        subject = GuardedImplementation(target)
    assert (subject.name, subject.version) == ("ours", "3")
    assert subject.dtypes == ("float64", "float32")
    assert subject.precision("float64").accumulation == "float32"
    assert subject.conventions == {"dora_norm": "detached"}


@pytest.mark.slow
def test_a_method_that_ends_every_process_is_not_called_for_ever(hostile, monkeypatch):
    hostile("os._exit(7)")
    W, A, B = np.zeros((2, 2)), np.zeros((1, 2)), np.zeros((2, 1))
    with PythonTarget("hostile.py:T") as target:
        subject = GuardedImplementation(target)
        said = ["exit status 7"] * 3 + ["merge is not called any more: each of its last 3 calls"]
        for words in said:
            with pytest.raises(Fault, match=words):
                subject.call("merge", W, A, B, alpha=1, r=1)
        params = {"a": np.ones(3)}
        assert subject.call("optimizer_steps", params, [params] * 2, {"lr": 0.5})
        monkeypatch.setattr(python_target, "MAX_ENDS", 3)
        target._end()
        with pytest.raises(Fault, match="has ended 3 times, and is not started again"):
            subject.call("optimizer_steps", params, [params], {"lr": 0.5})


@pytest.mark.slow
def test_a_report_is_the_same_with_the_target_in_this_process(hostile):
    ends = ("return wrong", "raise ValueError('no')", "raise NotImplementedError('no merge')")
    for end in (*ends, "return [1.5]", "W += 1; return right", "return Mute().text", "return T"):
        reports = []
        for option in ([], ["--in-process"]):
            sys.modules.pop("hostile", None)
            hostile(end, "--verbose", *option)
            text = Path("r.json").read_text().replace(" --in-process", "")
            reports.append(_without_times(json.loads(text)))
        assert reports[0] == reports[1]


@pytest.mark.slow
def test_every_check_runs_in_another_process_as_in_this(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reports = []
    for option in ([], ["--in-process"]):
        assert main(["verify", "--profile", "quick", "--json", "r.json", *option]) == 0
        results = json.loads(Path("r.json").read_text())["results"]
        # Not the figures: some answers are drawn by chance.
        said = ("check", "dtype", "status", "cases", "skipped_cases", "faults", "reason")
        reports.append([[result[name] for name in said] for result in results])
    assert reports[0] == reports[1]


def _without_times(value):
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if not k.startswith("seconds")}
    return list(map(_without_times, value)) if isinstance(value, list) else value


@pytest.mark.slow
def test_importing_is_not_the_time_of_a_call(hostile):
    Path("slow_library.py").write_text("import time\ntime.sleep(1.5)\n")
    assert hostile("import slow_library; return right")[0] == 0
    Path("slow_library.py").write_text("")
    assert hostile("import slow_library; time.sleep(60); return right")[0] == 1


def test_what_a_session_is_asked_arrives_in_the_other_process():
    layer = draw_inputs("linear", Case("lifecycle.random-steps", "float32", 1, 0), True)
    answers = []
    for implementation in (Minilora(), PythonTarget(f"{Minilora.__module__}:{Minilora.__name__}")):
        session = GuardedImplementation(implementation).session(layer.layer)
        session.call("add", "one", layer.adapters["one"])
        session.call("activate", ["one"])
        with pytest.raises(Fault, match="raises: ValueError: no adapter 'none'"):
            session.call("delete", "none")
        answers.append([session.call("forward", layer.x), session.call("weight")])
        assert session.call("gradients", layer.x, layer.dy).keys() == {"dx", "one.A", "one.B"}
    implementation.close()
    for here, there in zip(*answers, strict=True):
        assert (here.dtype, here.tobytes()) == (there.dtype, there.tobytes())


def test_a_session_that_keeps_or_changes_its_arguments_is_told(hostile):
    hostile("return right", after="""
class Session:
    def __init__(self, layer): self.layer = layer
    def add(self, name, adapter): self.adapter = adapter
    def forward(self, x): return x
    def merge(self): self.layer["W"] += 1
T.session = lambda self, layer: Session(layer)
class Poor(T):
    def session(self, layer): return Mute()
""")  # fmt: skip
    with PythonTarget("hostile.py:T") as target:
        session = GuardedImplementation(target).session({"W": np.zeros((2, 2))})
        assert (session.has("merge"), session.has("unmerge")) == (True, False)
        with pytest.raises(Fault, match=r"changes its inputs: layer.'W'..0, 0. was 0.0 and is 1.0"):
            session.call("merge")
        target._end()
        with pytest.raises(Fault, match="the session ended with the process that held it"):
            session.call("forward", np.zeros(2))
    with PythonTarget("hostile.py:Poor") as target, pytest.raises(Fault, match="a Mute without"):
        GuardedImplementation(target).session({"W": np.zeros((2, 2))})


@pytest.mark.slow
def test_another_instance_is_as_before_any_call(hostile):
    hostile("self.seen = getattr(self, 'seen', 0) + 1; return right + self.seen")
    with PythonTarget("hostile.py:T") as target:
        used = GuardedImplementation(target)
        W, A, B = np.zeros((2, 2)), np.zeros((1, 2)), np.zeros((2, 1))
        for subject, wanted in [(used, 1), (used, 2), (used.anew(), 1), (used, 3)]:
            assert subject.call("merge", W, A, B, alpha=1, r=1)[0, 0] == wanted


@pytest.mark.parametrize("where", ["a driver's answer", "a saved folder"])
def test_a_named_pipe_is_no_answer(tmp_path, where):
    os.mkfifo(tmp_path / "adapter")

    class Saves:
        def save(self, model_dir, adapter_arrays, settings, out_dir):
            pass

    def ask():
        if where == "a saved folder":
            GuardedImplementation(Saves()).call("save", "", {}, {}, str(tmp_path))
        else:
            read_arrays(tmp_path / "adapter")

    with pytest.raises(Fault, match="is not a file"):
        ask()


@pytest.mark.slow
def test_a_run_can_be_made_from_another_thread(hostile):
    hostile("return right")
    reports = []

    def verify():
        with PythonTarget("hostile.py:T") as target:
            reports.append(run(fake_checks.CHECKS, target, profile="quick"))

    thread = threading.Thread(target=verify)
    thread.start()
    thread.join()
    assert reports[0].exit_status == 0


@pytest.mark.slow
def test_a_path_is_a_target(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    package = tmp_path / "some_package" / "inner"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "base.py").write_text("from fake_checks import Right\n")
    (package / "mine.py").write_text("from .base import Right as Mine\n")
    (tmp_path / "odd-name.py").write_text("import beside\nfrom fake_checks import Right as Mine\n")
    (tmp_path / "beside.py").touch()
    for path in (package / "mine.py", tmp_path / "odd-name.py"):
        with PythonTarget(f"{path}:Mine") as target:
            assert target.name == "right"
        with pytest.raises(LoadError, match=f"{path.name} has no 'Mien'.*'Mine'"):
            PythonTarget(f"{path}:Mien")
    for named, words in [
        (f"{tmp_path}/absent.py:Mine", "absent.py does not exist"),
        (f"{tmp_path}:Mine", "is a folder; name a file in it"),
        (f"{package}/mine.py", "names no class, object or factory of the file: write .*mine.py:"),
    ]:
        with pytest.raises(LoadError, match=words):
            PythonTarget(named)
