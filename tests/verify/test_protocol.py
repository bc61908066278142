"""Another process as the target: the protocol, every way to break it, the drivers of the docs."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from minilora.cli.main import main
from minilora.verify import check
from minilora.verify.checks.registry import CHECKS
from minilora.verify.core.errors import Fault, LoadError, Skip
from minilora.verify.implementation.child import last_words
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.messages import as_answer, message_line, read_arrays, understood
from minilora.verify.implementation.minilora_impl import Minilora
from minilora.verify.implementation.protocol import Driver

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/stat").exists(), reason="processes are looked for in /proc"
    ),
]

DRIVERS = Path(__file__).parents[2] / "docs" / "drivers"

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(2, 4) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["seq", "ok", "error"]), inner, max_size=3)
    ),
)

HEAD = """
import json, os, signal, subprocess, sys, time
out = sys.stdout

def say(seq, **answer):
    out.write(json.dumps({"seq": seq, **answer}) + "\\n")
    out.flush()

def write(m, name="W_merged", dtype="F64", shape=(2, 2), numbers=bytes(32)):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(numbers)]}
    header = json.dumps({name: entry}).encode()
    with open(m["out"], "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + numbers)

said = {"name": "tiny", "version": "0.1", "language": "Python", "methods": ["merge"]}

def start(m):
    say(m["seq"], protocol=1, implementation=said)

def bad(m):
    pass

def run(m):
    if m["settings"]["alpha"] == 0:
        return bad(m)
    write(m)
    say(m["seq"], ok=True)

def stop(m):
    sys.exit()
"""

TAIL = """
for line in sys.stdin:
    m = json.loads(line)
    globals()[m["cmd"]](m)
"""


@pytest.fixture
def tiny(tmp_path):
    """Starts a driver that answers zeros to a merge, but for what the body says otherwise.

    It does not import NumPy, so that it starts at once.
    """
    with contextlib.ExitStack() as opened:

        def start(body="", **options):
            path = tmp_path / "tiny.py"
            path.write_text(HEAD + body + TAIL)
            command = [sys.executable, "-I", "-S", str(path)]
            return opened.enter_context(Driver(command, CHECKS, **options))

        yield start


def merge(driver, alpha):
    """The answer to a merge through the contract: an array, or Skip or Fault."""
    subject = GuardedImplementation(driver, time_limit=driver.time_limit)
    W, A, B = np.zeros((2, 2)), np.zeros((1, 2)), np.zeros((2, 1))
    answer = subject.call("merge", W, A, B, alpha=alpha, r=1)
    return subject.answer(answer, "merged W", (2, 2), "float64")


def gone(pid):
    """Whether a process has ended, or does; only a bug lets the minute pass."""
    for _ in range(6000):
        with contextlib.suppress(FileNotFoundError):
            status = Path(f"/proc/{pid}/stat").read_text()
            if status.rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.01)
                continue
        return True
    return False


def test_the_messages_are_those_of_the_protocol(tiny, tmp_path):
    log = tmp_path / "log"
    spied = f"log = open({str(log)!r}, 'w')\nsys.stdin = (log.write(l) and l for l in sys.stdin)\n"
    with tiny(spied) as driver:
        driver.check = "merge.weight"
        merge(driver, 7.0)
        folder = driver._folder
        assert folder.is_dir()
        assert list(folder.iterdir()) == [], "files are gone when they were answered"
    start, run, stop = map(json.loads, log.read_text().splitlines())
    assert start == {"seq": 0, "cmd": "start", "protocol": 1}
    assert run == {
        "seq": 1,
        "cmd": "run",
        "check": "merge.weight",
        "method": "merge",
        "settings": {"alpha": 7.0, "r": 1},
        "in": f"{folder}/1.in.safetensors",
        "out": f"{folder}/1.out.safetensors",
    }
    assert stop == {"seq": -1, "cmd": "stop"}
    assert not folder.exists()


def test_the_driver_declares_what_it_is(tiny):
    body = "said |= {'dtypes': ['float32'], 'precision': {'float32': {'accumulation': 'float64'}}}"
    subject = GuardedImplementation(tiny(body))
    assert (subject.name, subject.version) == ("tiny", "0.1 (Python)")
    assert subject.dtypes == ("float32",)
    assert subject.precision("float32").accumulation == "float64"
    assert subject.has("merge")
    assert not subject.has("unmerge")


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (
            "print('first', file=sys.stderr); print('the last', file=sys.stderr); sys.exit(3)",
            "crashes",
            "first | the last",
        ),
        ("1 / 0", "crashes", "ZeroDivisionError"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashes", "by SIGSEGV; nothing on standard"),
        ("out.write('{\"seq\": '); sys.exit(0)", "crashes", "middle of a line: '{\"seq\":'"),
        ("os.close(1); time.sleep(60)", "crashes", "it closed its standard output"),
        ("print('hello', flush=True)", "protocol", "'hello' on standard output"),
        ("print(flush=True)", "protocol", "'' on standard output"),
        ("print('[1]', flush=True)", "protocol", "on standard output"),
        ("print('[' * 10**5, flush=True)", "protocol", "on standard output"),
        ("out.buffer.write(b'\\xff\\n'); out.flush()", "protocol", "on standard output"),
        ("print('x' * 2**21, end='', flush=True)", "protocol", "it begins with"),
        ("print('debug'); write(m); say(m['seq'], ok=True)", "protocol", "'debug' on standard"),
        ("say(m['seq'] - 1, ok=True)", "protocol", "has seq 0, expected seq 1"),
        ("say(True, ok=True)", "protocol", "has seq true, expected seq 1"),
        ("print('{\"ok\": true}', flush=True)", "protocol", "has no 'seq'"),
        ("say(m['seq'], done=True)", "protocol", "has 'seq', 'done'; expected one of 'ok' or"),
        ("say(m['seq'], ok=float('nan'))", "protocol", "on standard output is not an answer"),
        ("say(m['seq'], ok=1e999)", "protocol", "on standard output is not an answer"),
        ("say(m['seq'], ok=1)", "protocol", "'ok' is 1, expected true"),
        ("say(m['seq'], ok='yes')", "protocol", "'ok' is \"yes\", expected true"),
        ("os.mkfifo(m['out']); say(m['seq'], ok=True)", "not an array", "'out' is not a file"),
        ("say(m['seq'], ok=False)", "protocol", "expected one of 'ok' or 'skipped' or 'error'"),
        ("say(m['seq'], ok=True)", "missing", "'out'"),
        (
            "open(m['out'], 'w').write('W'); say(m['seq'], ok=True)",
            "not an array",
            "safetensors file",
        ),
        ("write(m, 'W'); say(m['seq'], ok=True)", "missing", "no 'W_merged'"),
        ("write(m, dtype='F32', shape=(2, 4)); say(m['seq'], ok=True)", "shape", "(2, 4)"),
        ("write(m, dtype='I64'); say(m['seq'], ok=True)", "dtype", "int64, expected float64"),
        ("write(m, numbers=b'\\xff' * 32); say(m['seq'], ok=True)", "nan", "4 NaN"),
        (
            "say(m['seq'], error={'message': 'no W', 'traceback': 'at a\\n at b'})",
            "raises",
            "no W (traceback: at a | at b)",
        ),
        ("say(m['seq'], error='no W')", "raises", "no W"),
    ],
)
def test_what_a_driver_does_wrong_is_a_verdict_and_the_next_case_is_answered(
    tiny, monkeypatch, body, kind, words
):
    monkeypatch.setattr("minilora.verify.implementation.child.END_LIMIT", 0.1)
    driver = tiny(f"def bad(m):\n    {body}\n", time_limit=20.0)
    with pytest.raises(Fault) as fault:
        merge(driver, 0)
    assert (fault.value.kind, words in fault.value.message) == (kind, True), fault.value.message
    assert merge(driver, 1).shape == (2, 2)


@pytest.mark.parametrize("said", ["", "out.write('{\"seq\": 1'); out.flush(); "])
def test_a_hang_ends_with_all_that_the_driver_started(tiny, tmp_path, said):
    pids = tmp_path / "pids"
    body = f"""
def bad(m):
    other = subprocess.Popen(["sleep", "60"])
    open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{other.pid}}")
    print("about to wait", file=sys.stderr, flush=True)
    {said}time.sleep(60)
"""
    driver = tiny(body)
    driver.time_limit = 1.0
    with pytest.raises(Fault, match=r"merge gave no answer in 1 s.*about to wait") as fault:
        merge(driver, 0)
    assert fault.value.kind == "hangs"
    assert ("and no newline" in fault.value.message) == bool(said)
    assert all(gone(pid) for pid in pids.read_text().split())
    driver.time_limit = 20.0
    assert merge(driver, 1).shape == (2, 2)


def test_a_method_that_hangs_twice_is_not_called_again(tiny):
    driver = tiny("def bad(m):\n    time.sleep(60)\n")
    subject = GuardedImplementation(driver, time_limit=0.2)
    W = np.zeros((2, 2))
    for words in ("in 0.2 s", "in 0.2 s", "is not called any more"):
        with pytest.raises(Fault, match=words):
            subject.call("merge", W, W, W, alpha=0, r=1)


def test_what_stands_after_an_answer_is_refused(tiny):
    body = (
        'def bad(m):\n    write(m); out.write(\'{"seq": 1, "ok": true}\\nnoise\\n\'); out.flush()'
    )
    with pytest.raises(Fault, match="'noise' on standard output after its answer"):
        merge(tiny(body), 0)


def test_what_stands_before_a_question_is_refused(tiny, tmp_path):
    ask, asked = tmp_path / "ask", tmp_path / "asked"
    body = f"""
def bad(m):
    write(m); say(m['seq'], ok=True)
    while not os.path.exists({str(ask)!r}): time.sleep(0.01)
    print('x', flush=True)
    open({str(asked)!r}, "w").close()
"""
    driver = tiny(body)
    merge(driver, 0)
    ask.touch()
    while not asked.exists():
        time.sleep(0.01)
    with pytest.raises(Fault, match="'x' on standard output before it was asked"):
        merge(driver, 1)


def test_a_driver_may_answer_the_merged_bias_beside_the_weight():
    W, b = np.ones((2, 3)), np.ones(2)
    assert as_answer("merge", {"W_merged": W}) is W
    assert as_answer("merge", {"W_merged": W, "bias": b}) == (W, b)


def test_a_skip_is_counted_as_skipped_with_its_reason(tiny):
    url = "https://example.org/7"
    body = f"def run(m):\n    say(m['seq'], skipped={{'reason': 'later', 'issue_url': '{url}'}})"
    driver = tiny(body)
    with pytest.raises(Skip, match=f"not supported: later .{url}."):
        merge(driver, 1)
    report = check(driver, levels=["merge"], profile="quick", dtypes=["float64"])
    assert report.exit_status == 3
    text = " ".join(report.text(verbose=True).split())
    assert f", not supported: later ({url}): merge.weight" in text


def test_standard_error_does_no_harm(tiny):
    noise = "print('x' * 10**6, file=sys.stderr, flush=True)"
    body = f"{noise}\ndef run(m):\n    {noise}; write(m); say(m['seq'], ok=True); {noise}"
    driver = tiny(body)
    for _ in range(3):
        merge(driver, 1)


def test_a_session_lives_in_the_driver_and_ends_with_it(tiny, tmp_path):
    log = tmp_path / "log"
    body = f"""
said["methods"] = ["session", "session.merge", "session.weight"]
def run(m):
    print(m["method"], m.get("session"), m["settings"], file=open({str(log)!r}, "a"))
    if m["method"] == "session.merge":
        sys.exit(4)
    if m["method"] == "session.weight":
        write(m, "W")
    say(m["seq"], ok=True)
"""
    driver = tiny(body)
    layer = {"kind": "linear", "W": np.zeros((2, 2))}
    first = GuardedImplementation(driver).call("session", layer)
    del first
    second = GuardedImplementation(GuardedImplementation(driver).call("session", layer))
    assert (second.has("merge"), second.has("add")) == (True, False)
    assert second.call("weight").shape == (2, 2)
    with pytest.raises(Fault, match="exit status 4"):
        second.call("merge")
    with pytest.raises(Fault, match="the session ended with the driver that held it"):
        second.call("weight")
    assert GuardedImplementation(driver).call("session", layer).number == 6
    assert log.read_text().splitlines() == [
        "session None {'layer': {'kind': 'linear'}}",
        "session None {'layer': {'kind': 'linear'}}",
        "session.end 1 {}",
        "session.weight 2 {}",
        "session.merge 2 {}",
        "session None {'layer': {'kind': 'linear'}}",
    ]


def test_null_is_as_good_as_nothing(tiny):
    body = """
said |= {"version": None, "language": None, "checks": None, "dtypes": None, "known": None}
def run(m):
    write(m)
    say(m["seq"], ok=True, skipped=None, error=None)
"""
    driver = tiny(body)
    assert merge(driver, 1).shape == (2, 2)
    assert GuardedImplementation(driver).version == ""


@settings(max_examples=50)
@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_whatever_stands_in_a_line_is_an_answer_or_a_fault(line):
    with contextlib.suppress(Fault):
        assert understood(line, 3, ("ok", "error"))["seq"] == 3


@settings(max_examples=50)
@given(st.data())
def test_whatever_stands_in_a_file_is_arrays_or_a_fault(tmp_path_factory, data):
    whole = bytearray(save({"y": np.ones((2, 3)), "steps.A": np.ones(2, np.float32)}))
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=3)):
        whole[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    for method in ("lora_linear", "optimizer_steps", "model_loss"):
        with contextlib.suppress(Fault):
            as_answer(method, read_arrays(path))


def test_last_words_are_the_last_lines_and_the_error_before_them():
    assert last_words("") == ""
    assert last_words("one\n\n two\n") == "one | two"
    trace = [f"at line {i}" for i in range(9)]
    text = "\n".join(["Error: the first", *trace, "TypeError: no W", *trace, "node 20"])
    assert last_words(text) == (
        "TypeError: no W | at line 5 | at line 6 | at line 7 | at line 8 | node 20"
    )
    assert len(last_words("error " + "x" * 10**4 + "\n" + "y\n" * 4 + "z" * 10**4)) < 450


def test_names_outside_of_ascii_stand_in_a_message_as_they_are():
    line = message_line({"in": "/run/ü \udcff", "settings": {"a": '"'}})
    assert line == b'{"in":"/run/\xc3\xbc \xff","settings":{"a":"\\""}}\n'


def test_a_driver_that_crashes_at_each_start_again_is_a_verdict(tiny, tmp_path):
    flag = tmp_path / "flag"
    body = f"""
if os.path.exists({str(flag)!r}): sys.exit(9)
def bad(m):
    open({str(flag)!r}, "w"); sys.exit(8)
"""
    driver = tiny(body)
    for words in ("exit status 8", "cannot be started again: .* exit status 9"):
        with pytest.raises(Fault, match=words):
            merge(driver, 0)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("print('no device', file=sys.stderr); sys.exit(1)", "exit status 1; .*: no device"),
        ("time.sleep(60)", "start gave no answer in 0.5 s"),
        ("print('hi', flush=True)", "'hi' on standard output"),
        ("def start(m):\n    say(0, protocol=2, implementation=said)", "protocol 2, expected prot"),
        ("def start(m):\n    say(0, implementation=said)", "no 'protocol', expected protocol 1"),
        ("def start(m):\n    say(0, protocol=1)", "expected one of 'implementation' or 'error'"),
        ("def start(m):\n    say(0, protocol=1, implementation='me')", "expected an object"),
        ("def start(m):\n    say(0, error={'message': 'no GPU'})", "no GPU"),
        ("said['methods'] = ['merg']", r"the method 'merg' .did you mean 'merge'"),
        ("said['methods'] = ['session.ad']", "mean 'session.add'"),
        ("said['methods'] = 'merge'", "'methods' is merge, expected a list of names"),
        ("said['methods'] = []", "declares no methods"),
        ("said['checks'] = ['merge.wieght']", "did you mean 'merge.weight'"),
    ],
)
def test_a_driver_that_does_not_start_is_told_why(tiny, body, words):
    with pytest.raises(LoadError, match=words):
        tiny(body, start_limit=0.5 if "sleep" in body else 300.0)


def test_a_declaration_that_cannot_be_read_is_refused(tiny):
    with pytest.raises(LoadError, match="'dtypes' names float33"):
        GuardedImplementation(tiny("said['dtypes'] = ['float33']"))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("./absent", "./absent cannot be started: no such file"),
        ("no-such-program x", "no such program on the PATH"),
        ("plain", "./plain"),
        ("./plain", "not executable"),
        ("./headless", "interpreter"),
        ("./lost", "interpreter"),
        (".", "it is a folder"),
        ("'", "No closing quotation"),
        ("", "the command is empty"),
    ],
)
def test_a_command_that_cannot_be_started_is_told_why(tmp_path, monkeypatch, command, words):
    monkeypatch.chdir(tmp_path)
    for name, text, mode in (
        ("plain", "", 0o644),
        ("headless", "?", 0o755),
        ("lost", "#!/no/such\n", 0o755),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    with pytest.raises(LoadError, match=words):
        Driver(command, CHECKS)


def test_checks_may_be_declared_for_methods(tiny):
    body = "said['checks'] = ['merge.zero-*', 'linear.forward']; del said['methods']"
    driver = tiny(body)
    assert (
        GuardedImplementation(driver).has("merge"),
        GuardedImplementation(driver).has("unmerge"),
    ) == (True, False)
    driver.check = "merge.weight"
    with pytest.raises(Skip, match=r"tiny does not declare the check merge\.weight"):
        merge(driver, 1)
    driver.check = "merge.zero-B"
    merge(driver, 1)


def test_the_engine_says_which_check_asks(tiny, tmp_path):
    log = tmp_path / "log"
    body = f"""
def run(m):
    print(m["check"], file=open({str(log)!r}, "a")); say(m["seq"], error="x")
"""
    check(tiny(body), levels=["merge"], profile="quick", dtypes=["float32"])
    wanted = [c.id for c in CHECKS if c.needs == ("merge",) and c.level == "merge"]
    assert list(dict.fromkeys(log.read_text().split())) == wanted


def test_a_driver_that_does_not_stop_is_ended(tiny, monkeypatch):
    monkeypatch.setattr("minilora.verify.implementation.child.STOP_LIMIT", 0.2)
    body = """
said["name"] = str(os.getpid())
def stop(m):
    print("x" * 10**6, flush=True); time.sleep(60)
"""
    with tiny(body) as driver:
        assert Path(f"/proc/{driver.name}").exists()
    assert gone(driver.name)
    with pytest.raises(Fault, match="the driver was closed"):
        merge(driver, 1)


def test_a_driver_is_closed_in_the_middle_of_a_call(tiny):
    driver = tiny("said['name'] = str(os.getpid())\ndef bad(m):\n    time.sleep(60)")
    faults = []

    def calls():
        with pytest.raises(Fault) as fault:
            merge(driver, 0)
        faults.append(fault.value.kind)

    call = threading.Thread(target=calls)
    call.start()
    while not driver._calling.locked():
        time.sleep(0.01)
    driver.close()
    call.join(60)
    assert faults == ["crashes"]
    assert gone(driver.name)


def test_a_driver_that_nobody_holds_ends(tiny, tmp_path):
    path = tmp_path / "forgotten.py"
    path.write_text(HEAD + "said['name'] = str(os.getpid())\n" + TAIL)
    driver = Driver([sys.executable, "-I", "-S", str(path)], CHECKS)
    pid, folder = driver.name, driver._folder
    del driver
    assert gone(pid)
    assert not folder.exists()


@pytest.mark.slow
def test_an_interrupt_leaves_no_child_behind(tmp_path):
    pids, path = tmp_path / "pids", tmp_path / "waits.py"
    body = f"""
def run(m):
    other = subprocess.Popen(["sleep", "60"])
    with open({str(pids)!r} + "~", "w") as file:
        file.write(f"{{os.getpid()}} {{other.pid}}")
    os.rename({str(pids)!r} + "~", {str(pids)!r})
    time.sleep(60)
"""
    path.write_text(HEAD + body + TAIL)
    command = f"{sys.executable} -I -S {path}"
    run = subprocess.Popen(
        [sys.executable, "-m", "minilora", "verify", "--cmd", command, "--level", "merge"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not pids.exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 130, err
    assert "INTERRUPTED" in out
    assert "Traceback" not in err
    assert all(gone(pid) for pid in pids.read_text().split())


def test_the_command_line_starts_a_driver(tiny, tmp_path, capsys, monkeypatch):
    tiny()  # writes the file
    options = ["--level", "merge", "--profile", "quick", "--dtype", "float64"]
    command = f"{sys.executable} -I -S {tmp_path / 'tiny.py'}"
    status = main(["verify", "--cmd", command, *options])
    text = capsys.readouterr().out
    assert status == 1
    assert text.startswith("tiny 0.1 (Python)")
    assert f"REPRODUCE  minilora verify --cmd '{command}' --case merge.weight" in text
    assert main(["verify", "--cmd", "./absent", *options]) == 3
    assert "./absent cannot be started" in capsys.readouterr().err


SLOW = ("optimizer", "model", "train", "grad-flow", "files", "inference")
CASES = [
    *(
        f"{each.id}:bfloat16:0"
        for each in CHECKS
        if each.level not in SLOW and each.cases("quick", "bfloat16")
    ),
    "optimizer.combined:float32:0",
    "model.llama:float32:0",
    "train.gradient-accumulation:float32:0",
    "grad-flow.dropout:float32:0",
    "files.resave:float32:0",
    "inference.logits.combined:float32:0",
    "inference.deltas.combined:float32:0",
    "inference.names.partial:float32:0",
    "names.targets.combined:float32:0",
    "names.trainable.combined:float32:0",
    "names.refused.trainable:float32:0",
]


@pytest.mark.slow
def test_every_check_runs_over_the_protocol_as_it_does_in_this_process():
    with Driver(
        [sys.executable, str(Path(__file__).parents[1] / "own_driver.py")], CHECKS
    ) as driver:
        for case in CASES:
            (theirs,), (ours,) = (
                check(driver, case=case).results,
                check(Minilora(), case=case).results,
            )
            # A mean's last bits depend on how an answer lies in the memory.
            known = replace(ours.worst, rms=theirs.worst.rms)
            assert (ours.status, known) == (theirs.status, theirs.worst), theirs
            assert ours.status == "pass"


@pytest.fixture(scope="module")
def node():
    """The JavaScript driver of the docs."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    return ["node", str(DRIVERS / "lora.mjs")]


@pytest.fixture(scope="module")
def cpp(tmp_path_factory):
    """The C++ driver of the docs, compiled as its first lines say."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    program = tmp_path_factory.mktemp("cpp") / "lora"
    source = DRIVERS / "lora.cpp"
    (line,) = (line for line in source.read_text().splitlines() if line.startswith("//     g++"))
    build = line.removeprefix("// ").split()
    build[build.index("lora.cpp")], build[build.index("lora")] = str(source), str(program)
    subprocess.run(build, check=True)
    return [str(program)]


LANGUAGES = ["node", "cpp"]


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_drivers_of_the_docs_pass(language, request):
    with Driver(request.getfixturevalue(language), CHECKS) as driver:
        report = check(driver)
    assert report.exit_status == 0, report.text()
    skipped = {result.reason for result in report.results if result.reason}
    unsupported = ("fan_in_fan_out", "combination_type", "lora_bias", "magnitude")
    assert skipped >= {f"not supported: {name} is not implemented" for name in unsupported}
    assert report.count("pass") > 60


BUGS = {
    "scale": ("linear.forward", "scale-alpha"),
    "layout": ("linear.forward", "layout-reshape-B"),
    "mask-on-base": ("linear.forward.dropout", "dropout-on-base"),
    "no-rescale": ("linear.forward.dropout", "dropout-not-divided"),
    "dA-unscaled": ("linear.vjp", "backward-dA-not-scaled"),
}


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_each_mistake_put_into_the_drivers_is_caught_and_named(language, request):
    command = request.getfixturevalue(language)
    by_id = {each.id: each for each in CHECKS}
    for bug, (where, name) in BUGS.items():
        with Driver([*command, bug], CHECKS) as driver:
            found = by_id[where].diagnose(GuardedImplementation(driver), "float32", 0)
        assert [each.id for each in found] == [name], bug
    with Driver([*command, "none"], CHECKS) as driver:
        assert by_id["linear.vjp"].diagnose(GuardedImplementation(driver), "float32", 0) == ()
