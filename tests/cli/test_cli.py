"""The command line: every option, every exit status, and what reaches which stream."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import fake_checks
import pytest

from minilora.cli.commands import NAMES
from minilora.cli.main import main
from minilora.verify.peers import PEERS

TESTS = Path(__file__).parents[1]
# The command line in a process of its own, with the small registry in the place of the real one.
WITH_FAKES = (
    "import sys, fake_checks; sys.modules['minilora.verify.checks.registry'] = fake_checks; "
    "from minilora.cli.commands import verify; verify.MOST_JOBS = 1; "
    "from minilora.cli.main import main; sys.exit(main())"
)

# Of some options what their help says: numbers, names, and what no number says.
DEFAULTS = {
    "verify": {"--seed N": "0"},
    "train": {
        "--batch-tokens N": "1024",
        "--max-length N": "512",
        "--max-grad-norm X": "1",
        "--dropout P": "0",
        "--lr-scheduler KIND": "cosine",
        "--threads N": "1",
        "--save-minutes X": "never",
    },
    "sweep": {"--learning-rates X,...": "0.001,0.003,0.01,0.03"},
}


@pytest.fixture(autouse=True)
def fakes(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "minilora.verify.checks.registry", fake_checks)
    monkeypatch.setattr("minilora.verify.loading.DEFAULT_TARGET", "fake_checks:Right")
    monkeypatch.setattr("minilora.cli.commands.verify.MOST_JOBS", 1)  # no other has the fakes
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def verify(capsys):
    """Runs `minilora verify …` and gives the exit status, standard output and standard error."""

    def run(*arguments):
        try:
            status = main(["verify", *arguments])
        except SystemExit as left:
            status = left.code
        return status, *capsys.readouterr()

    return run


def process(*arguments, code=WITH_FAKES, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        **options,
    )


def test_status_0_where_all_hold(verify):
    status, out, err = verify("fake_checks:Right")
    assert (status, err) == (0, "")
    assert "14 of 14 checks ran (check × dtype): 14 passed" in out


@pytest.mark.slow
def test_without_a_target_the_installation_itself_is_checked(verify):
    status, out, _ = verify("--profile", "quick", "--dtype", "float32")
    assert status == 0
    assert out.startswith("right 1.2  (profile quick, seed 0)")


def test_status_1_where_one_deviates(verify):
    status, out, _ = verify("fake_checks:WrongScale", "--level", "merge")
    assert status == 1
    assert "FAIL  sigma.merge   float64" in out


def test_status_3_where_nothing_can_be_checked(verify):
    status, _, err = verify("fake_checks:zzz")
    assert status == 3
    assert err.startswith("minilora verify: fake_checks has no 'zzz'; it holds")
    status, out, _ = verify("fake_checks:OnlyMerge", "--level", "optimizer")
    assert status == 3
    assert "Nothing was checked" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--levl", "merge"], "unrecognized arguments: --levl; did you mean --level?"),
        (["--jso=x"], "did you mean --json?"),
        (["a", "b"], "unrecognized arguments: b"),
        (["--level", "merge,linaer"], "no level 'linaer' (did you mean 'linear'?)"),
        (["--dtype", "float31"], "no dtype 'float31' (did you mean 'float3"),
        (["--profile", "nightl"], "no profile 'nightl' (did you mean 'nightly'?)"),
        (["--case", "x"], "CHECK:DTYPE:NUMBER"),
        (["--case", "exact.merg:float32:1"], "(did you mean 'exact.merge'?)"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["--seed", "-1"], "the seed is -1; expected 0 or more"),
        (["--time-limit", "0"], "expected more than 0 seconds"),
        (["--time-limit", "nan"], "expected more than 0 seconds"),
        (["--cmd", " "], "--cmd: the command is empty; give one that starts a driver"),
        (["--cmd", "node 'x"], "cannot be split: No closing quotation"),
        (["peft", "--cmd", "./driver"], "TARGET 'peft' and --cmd"),
        (["--known", "absent.json"], "absent.json: No such file"),
        (["--json", "no/such/folder/r.json"], "cannot write no/such/folder/r.json: No such file"),
        (["--html", "."], "cannot write . is a folder"),
    ],
)
def test_status_2_with_what_exists_where_the_usage_is_wrong(verify, arguments, words):
    status, out, err = verify(*arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


def test_an_unwritable_report_is_found_before_the_target_is_loaded(verify, tmp_path):
    (tmp_path / "slow.py").write_text("raise SystemExit('it was loaded')")
    status, _, err = verify("slow:x", "--json", "no/such/r.json")
    assert status == 2
    assert "it was loaded" not in err


def test_a_command_that_does_not_exist_is_refused_with_a_suggestion(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["verfy"])
    assert "did you mean verify?" in capsys.readouterr().err
    assert main([]) == 2
    assert "verify" in capsys.readouterr().err


@pytest.mark.slow
def test_a_module_in_the_current_folder_is_a_target(verify, tmp_path):
    (tmp_path / "mine_too.py").write_text("from fake_checks import WrongScale as lora\n")
    status, out, _ = verify("mine_too:lora", "--level", "merge", "--dtype", "float32")
    assert status == 1
    assert "REPRODUCE  minilora verify mine_too:lora --case sigma.merge:float32:0 --seed 0" in out


@pytest.mark.slow
def test_the_command_in_the_report_reproduces_the_same_case(verify):
    arguments = ["fake_checks:WrongScale", "--level", "merge", "--seed", "3", "--json", "r.json"]
    status, out, _ = verify(*arguments)
    first = json.loads(Path("r.json").read_text())["results"]
    assert f"REPRODUCE  {first[0]['reproduce']}\n" in out
    for result in first:
        assert result["counterexample"]["case"] in out, "of the other dtypes, the case is named"
        program, command, *rest = shlex.split(result["reproduce"])
        assert (program, command) == ("minilora", "verify")
        status, _, _ = verify(*rest, "--json", "again.json")
        (again,) = json.loads(Path("again.json").read_text())["results"]
        assert status == 1
        assert again["cases"] == 1
        assert again["counterexample"]["arrays"] == result["counterexample"]["arrays"]


@pytest.mark.slow
def test_a_report_stays_where_it_was_asked_for_though_the_target_goes_elsewhere(verify, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    lines = [
        "import os",
        "from fake_checks import Right",
        "class Goes(Right):",
        "    def merge(self, W, A, B, **settings):",
        f"        os.chdir({str(elsewhere)!r})",
        "        return super().merge(W, A, B, **settings)",
    ]
    (tmp_path / "goes.py").write_text("\n".join(lines))
    assert verify("goes:Goes", "--level", "merge", "--json", "r.json")[0] == 0
    assert (tmp_path / "r.json").is_file()
    assert not any(elsewhere.iterdir())


@pytest.mark.slow
def test_levels_dtypes_and_profiles_choose(verify):
    _, out, _ = verify("--level", "merge", "--level", "linear", "--dtype", "float64,float16")
    assert re.findall(r"^ (\w+\.\w+)", out, re.M) == ["exact.merge", "sigma.merge", "dict.vjp"]
    (head,) = [line.split() for line in out.splitlines() if line.startswith("  ")]
    assert head == ["float64", "float16"]


def test_list_shows_the_checks_and_runs_nothing(verify):
    status, out, _ = verify("--list", "no_such_module:x")
    assert status == 0
    assert out.splitlines()[:2] == ["exact.merge  (merge)", "    W' = W + B A in integers"]
    assert out.count("(") == len(fake_checks.CHECKS)
    assert verify("--list", "--level", "linear")[1].splitlines()[0] == "dict.vjp  (linear)"


@pytest.mark.slow
def test_reports_are_written_in_every_format(verify, tmp_path):
    files = {kind: tmp_path / f"r.{kind}" for kind in ("json", "junit", "html")}
    options = [part for kind, path in files.items() for part in (f"--{kind}", str(path))]
    status, out, _ = verify("fake_checks:WrongScale", *options)
    assert status == 1
    assert json.loads(files["json"].read_text())["summary"]["failed"] == 6
    assert len(ET.parse(files["junit"]).findall(".//failure")) == 6
    assert "exact.merge" in files["html"].read_text()
    assert "6 failed" in out
    assert sorted(tmp_path.iterdir()) == sorted(files.values()), "no temporary file is left"


@pytest.mark.slow
def test_a_report_goes_into_a_device_and_does_not_replace_it(verify):
    assert verify("--json", os.devnull, "--profile", "quick")[0] == 0
    assert not Path(os.devnull).is_file()


@pytest.mark.slow
def test_a_report_that_cannot_be_written_in_the_end_is_status_2(verify, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    status, out, err = verify("--json", "r.json")
    assert status == 2
    assert "14 passed" in out, "the verdict is still printed"
    assert "cannot write r.json: No space left on device" in err


@pytest.mark.slow
def test_known_deviations_are_no_failure(verify, tmp_path):
    seen = {"arrays": "W'"}
    entries = [
        {"check": c, "reason": "agreed", "seen": seen} for c in ("exact.merge", "sigma.merge")
    ]
    (tmp_path / "known.json").write_text(json.dumps(entries))
    status, out, _ = verify("fake_checks:WrongScale", "--known", "known.json")
    assert status == 0
    assert "6 known" in out
    status, out, _ = verify("fake_checks:Right", "--known", "known.json")
    assert status == 0
    assert "no longer fails, though known: exact.merge, sigma.merge: agreed" in out
    (tmp_path / "known.json").write_text('[{"check": "exact.marge", "reason": "agreed"}]')
    status, _, err = verify("--known", "known.json")
    assert status == 2
    assert "did you mean 'exact.merge'" in err


@pytest.mark.slow
def test_a_declaration_that_cannot_be_read_is_status_3(verify, tmp_path):
    source = "from fake_checks import Right\nclass Odd(Right):\n    dtypes = ['float7']\n"
    (tmp_path / "odd_dtypes.py").write_text(source)
    status, _, err = verify("odd_dtypes:Odd")
    assert status == 3
    assert "'dtypes' names float7" in err


@pytest.mark.slow
def test_a_hang_is_reproduced_with_its_time_limit(verify, tmp_path):
    (tmp_path / "hangs_here.py").write_text(
        "import time\nclass T:\n    def merge(self, *a, **k):\n        time.sleep(99)\n"
    )
    status, out, _ = verify(
        "hangs_here:T", "--time-limit", "0.1", "--case", "exact.merge:float32:2"
    )
    assert status == 1
    assert "merge gave no answer in 0.1 s (hangs_here.py:4, in merge:" in out
    assert "hangs_here:T --time-limit 0.1 --case exact.merge:float32:2 --seed 0" in out


@pytest.mark.slow
def test_what_a_target_prints_is_not_in_the_report(tmp_path):
    """Neither what Python prints nor what compiled code writes, while loading and in calls."""
    (tmp_path / "chatty.py").write_text(
        "import ctypes, os, fake_checks\n"
        "print('garbage at import')\n"
        "class T(fake_checks.Right):\n"
        "    def merge(self, *a, **k):\n"
        "        print('garbage of Python')\n"
        "        os.write(1, b'garbage of a descriptor\\n')\n"
        "        ctypes.CDLL(None).puts(b'garbage of C')\n"
        "        return super().merge(*a, **k)\n"
    )
    out, err = process("verify", "chatty:T", cwd=tmp_path).communicate()
    assert "garbage" not in out
    assert out.startswith("right 1.2")
    for source in ("at import", "of Python", "of a descriptor", "of C"):
        assert f"garbage {source}" in err


@pytest.mark.slow
def test_a_module_that_a_target_leaves_in_the_current_folder_is_not_imported(tmp_path):
    (tmp_path / "writes.py").write_text(
        "import fake_checks\nopen('html.py', 'w').write('raise SystemExit(0)')\n"
        "class T(fake_checks.WrongScale): pass\n"
    )
    run = process("verify", "writes:T", "--html", "r.html", "--profile", "quick", cwd=tmp_path)
    out, err = run.communicate()
    assert (run.returncode, err) == (1, "")
    assert "FAIL  sigma.merge" in out
    assert (tmp_path / "html.py").exists()
    assert (tmp_path / "r.html").exists()


@pytest.mark.slow
def test_a_reader_who_leaves_early_sees_no_traceback():
    run = process("verify", "fake_checks:WrongScale", "--profile", "quick")
    run.stdout.close()
    assert run.stderr.read() == ""
    assert run.wait() == 1
    run.stderr.close()


@pytest.mark.slow
def test_an_interrupt_prints_what_was_checked_so_far(tmp_path):
    (tmp_path / "slow_target.py").write_text(
        "import time, fake_checks\n"
        "class T(fake_checks.Right):\n"
        "    def optimizer_steps(self, *a, **k):\n"
        "        open('reached', 'w').close()\n"
        "        time.sleep(99)\n"
    )
    run = process("verify", "slow_target:T", "--json", "r.json", cwd=tmp_path)
    while not (tmp_path / "reached").exists() and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate()
    assert run.returncode == 130
    assert "Traceback" not in err
    assert "INTERRUPTED" in out
    assert "exact.merge  pass" in out
    summary = json.loads((tmp_path / "r.json").read_text())["summary"]
    assert summary["interrupted"] is True
    assert summary["passed"] == 10


def test_the_help_imports_no_oracle_and_no_torch():
    code = (
        "import sys; from minilora.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as left:\n    assert left.code == 0\n"
        "heavy = {'torch', 'hypothesis', 'tqdm', 'pytest', 'minilora.verify'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = process("verify", "--help", code=code)
    out, err = run.communicate()
    assert (run.returncode, err) == (0, "")
    for option in ("--level", "--profile", "--known", "--junit", "--html", "--list"):
        assert option in out


@pytest.mark.slow
def test_the_help_names_where_the_peers_are_listed(verify, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert "such as peft" in verify("--help")[1]
    status, _, err = verify("unknown")
    assert status == 3
    assert all(name in err for name in PEERS)


def test_every_options_default_is_shown_in_one_way(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for command in NAMES:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert re.findall(r"\(default: (?:|None|False|inf)\)", shown) == []
        for option, default in DEFAULTS.get(command, {}).items():
            pattern = rf"^  {re.escape(option)}\s[^()]* \(default: {re.escape(default)}\)$"
            assert re.search(pattern, shown, re.M), option


def test_python_m_minilora_is_the_command_line():
    run = subprocess.run(
        [sys.executable, "-m", "minilora", "--version"],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(r"minilora \d+\.\d+\S*\n", run.stdout)


@pytest.mark.slow
def test_no_progress_bar_where_nobody_watches(verify):
    assert verify("--profile", "quick")[2] == ""


@pytest.mark.slow
def test_a_progress_bar_on_a_terminal(verify, monkeypatch):
    class Terminal:
        written = ""
        encoding = "utf-8"

        def write(self, text):
            self.written += text

        def flush(self):
            pass

        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert verify("--profile", "quick")[0] == 0
    assert "cases" in terminal.written


@pytest.mark.slow
def test_a_narrow_encoding_is_no_error(monkeypatch):
    class Narrow:
        encoding = "ascii"
        written = ""

        def write(self, text):
            self.written += text.encode("ascii").decode()

        def flush(self):
            pass

        def isatty(self):
            return False

    narrow = Narrow()
    monkeypatch.setattr(sys, "stdout", narrow)
    assert main(["verify", "--profile", "quick"]) == 0
    assert "(check ? dtype)" in narrow.written


@pytest.mark.slow
def test_where_the_time_went_is_printed_by_level(verify):
    status, out, _ = verify("--timing", "--profile", "quick")
    assert status == 0
    head, *rows = [line.split() for line in out.rpartition("\n\n")[2].splitlines()]
    assert head[:3] == ["level", "cases", "seconds"]
    assert {row[0] for row in rows} == {check.level for check in fake_checks.CHECKS}
    for _, cases, seconds, inside, each in rows:
        assert int(cases) > 0
        assert 0 <= float(inside) <= float(seconds)
        assert float(each) >= 0


def test_a_form_takes_standard_output_and_the_text_goes_elsewhere(capsys):
    command = ["verify", "fake_checks:Right", "--in-process", "--level", "linear"]
    assert main([*command, "--profile", "quick", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["summary"]["exit_status"] == 0
    assert "checks ran" in err


def test_two_forms_cannot_share_standard_output(capsys):
    assert main(["verify", "--json", "-", "--html", "-"]) == 2
    assert "expected one form" in capsys.readouterr().err


def test_the_list_of_checks_is_json_too(capsys):
    assert main(["verify", "--list", "--level", "linear", "--json", "-"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {entry["level"] for entry in listed} == {"linear"}
    assert all(entry["methods"] and entry["title"] for entry in listed)
    assert main(["verify", "--list", "--html", "-"]) == 2
