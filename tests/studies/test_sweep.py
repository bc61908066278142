"""A grid of runs: each is what training does, none is done twice, and the table says the best."""

import datetime
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from extras import optional

from minilora.cli.console import INTERRUPTED
from minilora.cli.main import main
from minilora.io.errors import FormatError
from minilora.io.loading import open_base
from minilora.studies.processes import in_processes
from minilora.studies.sweep import run as sweep
from minilora.studies.sweep.grid import Cell, Setting, grid
from minilora.studies.sweep.results import LEGEND, PICTURE, best, by_group, table
from minilora.studies.sweep.run import Row
from minilora.training import data
from minilora.training.config import TrainConfig
from minilora.training.fit import fit
from minilora.training.loop import Diverged
from minilora.training.run import prepare
from minilora.training.run_folder import Refused
from minilora.training.threads import blas_threads

SETTING = Setting(
    "reference:gpt2", "task:queued-brackets", TrainConfig(max_steps=4, batch_tokens=64)
)
CELLS = grid([1, 2], [], [1e-3, 1e-2], [3])
RESULTS = ("adapter_model.safetensors", "adapter_config.json")


def result_of(folder):
    return [(folder / name).read_bytes() for name in RESULTS]


def losses(rows):
    return [(row.cell, row.steps, row.loss, row.valid, row.why) for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, sweep.sweep(out, SETTING, CELLS, 2)


def test_the_grid_has_every_combination_once():
    assert grid([2, 1, 2], [8.0], [0.1], [0]) == [Cell(1, 8.0, 0.1, 0), Cell(2, 8.0, 0.1, 0)]
    assert [cell.alpha for cell in grid([1, 4], [], [0.1], [0])] == [2.0, 8.0]
    assert len(grid([1, 2], [1.0, 2.0], [0.1, 0.2, 0.3], [0, 1])) == 24


@pytest.mark.parametrize("lists", [([], [0.1], [0]), ([1], [], [0]), ([1], [0.1], [])])
def test_an_empty_list_is_refused(lists):
    ranks, lrs, seeds = lists
    with pytest.raises(ValueError, match=r"no (ranks|learning rates|seeds): expected at least one"):
        grid(ranks, [], lrs, seeds)


def test_cells_that_would_share_a_folder_are_refused():
    with pytest.raises(ValueError, match="agree in six digits"):
        grid([1], [], [0.1, 0.10000001], [0])


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_cell_is_what_training_does(cell, whole, tmp_path):
    out, rows = whole
    config = replace(SETTING.config, **vars(cell))
    base = open_base(SETTING.model)
    read = data.read(SETTING.data, "lm", base.tokenizer, 512, seed=cell.seed)
    with blas_threads(1):
        outcome = fit(tmp_path / "alone", prepare(base, read, config, SETTING.data))
    assert outcome.stop_reason == ""
    assert result_of(tmp_path / "alone") == result_of(out / cell.name)
    others = [other for other in CELLS if other != cell]
    assert all(result_of(out / other.name) != result_of(out / cell.name) for other in others)
    lines = (tmp_path / "alone/log.jsonl").read_text().splitlines()
    (row,) = [row for row in rows if row.cell == cell]
    assert row.loss == json.loads(lines[-1])["loss"]
    assert row.valid == json.loads(lines[-1])["val_loss"]


@pytest.mark.slow
def test_what_is_finished_is_kept_and_what_is_missing_is_done(whole, tmp_path):
    out, rows = whole

    def stop(row, done, of):
        assert (done, of) == (1, 4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(tmp_path, SETTING, CELLS, 1, stop)
    finished = [cell for cell in CELLS if (tmp_path / cell.name / sweep.RESULT).exists()]
    assert 1 <= len(finished) < len(CELLS)
    before = {cell: os.stat(tmp_path / cell.name / sweep.RESULT).st_mtime_ns for cell in finished}
    told = []
    again = sweep.sweep(tmp_path, SETTING, CELLS, 1, lambda row, done, of: told.append(done))
    assert told == [1, 2, 3, 4] if len(finished) == 1 else told[-1] == 4
    assert losses(again) == losses(rows)
    for cell, changed in before.items():
        assert os.stat(tmp_path / cell.name / sweep.RESULT).st_mtime_ns == changed
    for cell in CELLS:
        assert result_of(tmp_path / cell.name) == result_of(out / cell.name)
    held = json.loads((tmp_path / sweep.TABLE).read_text())["rows"]
    assert [Cell(**row["cell"]) for row in held] == CELLS


@pytest.mark.slow
def test_a_cell_cut_short_goes_on_from_its_checkpoint(whole, tmp_path):
    cell, (out, rows) = CELLS[0], whole
    base = open_base(SETTING.model)
    read = data.read(SETTING.data, "lm", base.tokenizer, 512, seed=cell.seed)
    run = prepare(base, read, SETTING.at(cell), SETTING.data)

    def stop(line, steps):
        if line["step"] == 2:
            raise KeyboardInterrupt

    assert fit(tmp_path / cell.name, run, watch=stop).state.step == 2
    row = sweep.run_cell(SETTING, tmp_path / cell.name, cell)
    assert losses([row]) == losses(rows[:1])
    assert result_of(tmp_path / cell.name) == result_of(out / cell.name)


@pytest.mark.slow
def test_a_larger_grid_adds_to_what_is_there(whole, tmp_path):
    few = sweep.sweep(tmp_path, SETTING, CELLS[:1], 1)
    told = []
    more = sweep.sweep(tmp_path, SETTING, CELLS[:2], 1, lambda row, done, of: told.append(row))
    assert told[0] == few[0] == more[0]
    assert losses(more) == losses(whole[1][:2])


@pytest.mark.slow
def test_another_setting_or_a_folder_of_other_files_is_refused(whole, tmp_path):
    other = replace(SETTING, config=replace(SETTING.config, max_steps=5))
    with pytest.raises(Refused, match=r"another setting \(max_steps was 4 and is 5\)"):
        sweep.sweep(whole[0], other, CELLS, 1)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(Refused, match="holds no sweep"):
        sweep.sweep(tmp_path, SETTING, CELLS, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.slow
def test_a_cell_that_diverged_is_a_row_and_never_the_best(tmp_path):
    cells = grid([1], [], [1e-2, 1e39], [0])
    fine, wild = sweep.sweep(tmp_path, replace(SETTING, config=TrainConfig(max_steps=8)), cells, 1)
    assert fine.why == ""
    assert "loss" in wild.why or "parameter" in wild.why
    assert wild.judged == math.inf
    assert best([wild, fine]) == (1, 2.0, 1e-2)


@pytest.mark.slow
def test_a_cell_that_diverges_in_its_last_step_is_a_row_too(tmp_path):
    """What it comes to is no number, and no number is what it is judged by."""
    cells = grid([1], [], [1e-2, 1e30], [0])
    fine, wild = sweep.sweep(tmp_path, replace(SETTING, config=TrainConfig(max_steps=1)), cells, 1)
    assert (fine.why, wild.why[:8]) == ("", "step 1: ")
    assert wild.judged == math.inf
    assert table([fine, wild]).splitlines()[2].split()[3:] == ["1", "-", "-", "-", "1"]
    assert replace(fine, valid=math.nan).judged == math.inf
    assert sweep.sweep(tmp_path, replace(SETTING, config=TrainConfig(max_steps=1)), cells, 1) == [
        fine,
        wild,
    ]


@pytest.mark.slow
def test_a_sweep_that_was_refused_is_told_in_a_line_and_may_be_corrected(tmp_path):
    command = [sys.executable, "-m", "minilora", *COMMAND, "--output", str(tmp_path / "out")]
    wrong = [*command, "--batch-tokens", "3"]
    done = subprocess.run(wrong, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "found 10 tokens, expected at most 3" in done.stderr
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    other = subprocess.run(wrong, capture_output=True, text=True, check=False)
    assert "the sweep of another setting (batch_tokens was 64 and is 3)" in other.stderr


@pytest.mark.parametrize("damage", [None, [], "text"])
def test_a_damaged_table_is_told(damage, whole, tmp_path):
    (tmp_path / sweep.TABLE).write_text(json.dumps({"setting": damage}))
    (tmp_path / "r1").mkdir()
    with pytest.raises(FormatError, match=r"setting: found .*, expected an object"):
        sweep.sweep(tmp_path, SETTING, CELLS, 1)


def rows_of(*losses):
    """A row for each loss, rates 1, 2, …, two seeds each with the loss ± 1/4."""
    return [
        Row(Cell(1, 2.0, float(i), seed), 9, 1.0, 0.0, loss + (0.25 if seed else -0.25))
        for i, loss in enumerate(losses, 1)
        for seed in (0, 1)
    ]


def test_the_best_is_the_least_mean_and_changes_with_the_losses():
    assert best(rows_of(3, 1, 2))[2] == 2.0
    assert best(rows_of(1, 3, 2))[2] == 1.0
    assert by_group(rows_of(3))[1, 2.0, 1.0] == [2.75, 3.25]
    with pytest.raises(ValueError, match="0 cells and no loss"):
        best([])


def test_the_table_marks_the_best_and_counts_what_diverged():
    rows = rows_of(3, 1)
    rows[0] = replace(rows[0], why="step 2: the loss is inf")
    lines = [line.split() for line in table(rows).splitlines()]
    assert lines[1] == ["1", "2", "1", "2", "-", "3.2500", "-", "1"]
    assert lines[2] == ["*", "1", "2", "2", "2", "1.0000", "0.7500", "1.2500", "0"]
    assert lines[-1] == LEGEND.split()
    assert "*" not in table([replace(row, why="diverged") for row in rows])


def square(x):
    if x < 0:
        raise Diverged(x, "below zero")
    return x * x, os.getpid()


def slow(x):
    time.sleep(60)


@pytest.mark.slow
def test_the_workers_are_other_processes_and_the_first_error_is_told():
    found = dict(in_processes(square, [3, 4, 5], 2))
    assert [found[i][0] for i in range(3)] == [9, 16, 25]
    assert os.getpid() not in {pid for _, pid in found.values()}
    with pytest.raises(Diverged, match="step -1: below zero"):
        list(in_processes(square, [1, -1], 1))
    with pytest.raises(ValueError, match="0 processes: expected at least 1"):
        list(in_processes(square, [1], 0))


@pytest.mark.slow
def test_whoever_leaves_early_does_not_wait_for_the_work():
    """A work of a minute is stopped; it would be seen by the test's own end, not by a clock."""
    following = in_processes(one_then_slow, [0, 1], 2)
    assert next(following) == (0, 0)
    following.close()


@pytest.mark.slow
def test_a_worker_that_is_stopped_says_nothing(capfd):
    """Whether it works, waits for work, or is not there yet."""
    with pytest.raises(Diverged, match="step -1: below zero"):
        list(in_processes(square, [-1] * 4, 4))
    assert capfd.readouterr().err == ""


def one_then_slow(x):
    if x:
        slow(x)
    return x


COMMAND = [
    "sweep",
    "--model",
    "reference:gpt2",
    "--ranks",
    "1",
    "--learning-rates",
    "0.01",
    "--seeds",
    "0",
]
COMMAND += ["--max-steps", "2", "--jobs", "1", "--batch-tokens", "64"]


def test_the_command_prints_a_table_and_draws_it(tmp_path, capsys):
    optional("matplotlib")
    assert main([*COMMAND, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split()[:4] == ["rank", "alpha", "lr", "seeds"]
    assert "<svg" in (tmp_path / "out" / PICTURE).read_text()


@pytest.mark.slow
def test_without_the_library_the_table_is_all_and_a_line_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*COMMAND, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "pip install 'minilora[plot]'" in printed.splitlines()[-1]
    assert not (tmp_path / "out" / PICTURE).exists()
    assert (tmp_path / "out" / sweep.TABLE).exists()


def test_an_interrupted_command_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "sweep", interrupted)
    assert main([*COMMAND, "--output", str(tmp_path)]) == INTERRUPTED
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "1,x"], "--ranks 1,x:"),
        (["--ranks", "0"], "rank 0:"),
        (["--learning-rates", "fast"], "--learning-rates fast:"),
        (["--seeds", ","], "seeds"),
        (["--jobs", "0"], "--jobs 0:"),
    ],
)
def test_wrong_usage_is_status_2_and_says_what_was_expected(arguments, words, tmp_path, capsys):
    assert main([*COMMAND, "--output", str(tmp_path / "out"), *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_targets_are_names_too(tmp_path):
    setting = replace(
        SETTING, config=replace(SETTING.config, max_steps=1, target_modules=["qkv", "up"])
    )
    (row,) = sweep.sweep(tmp_path, setting, CELLS[:1])
    assert row.steps == 1


@pytest.mark.slow
def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    """And leave what they have saved."""
    script = "from minilora.cli.main import main; main()"
    words = [
        "sweep",
        "--output",
        str(tmp_path / "s"),
        "--ranks",
        "1,2",
        "--learning-rates",
        "0.001",
    ]
    words += ["--seeds", "0", "--max-steps", "100000", "--jobs", "2"]
    parent = subprocess.Popen([sys.executable, "-c", script, *words], start_new_session=True)
    pids = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    if not pids.exists():
        parent.kill()
        pytest.skip("this system does not list a process's children")
    logs = tmp_path / "s"
    within(lambda: len([*logs.glob("*/log.jsonl")]) == 2)
    children = pids.read_text().split()
    parent.kill()
    parent.wait()
    within(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))


def within(condition, seconds=60):
    """Waits for it; a machine may be slow."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_sweep_keeps_the_date_that_its_templates_saw(tmp_path, monkeypatch):
    class Today(datetime.date):
        @classmethod
        def today(cls):
            return cls(2025, 3, 2)

    monkeypatch.setattr(sweep, "datetime", SimpleNamespace(date=Today))
    assert sweep.date_of_sweep(tmp_path) == "2025-03-02"
    (tmp_path / sweep.TABLE).write_text(json.dumps({"setting": {"date": "2025-03-01"}}))
    assert sweep.date_of_sweep(tmp_path) == "2025-03-01"
