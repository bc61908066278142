"""The best result in validation, and stopping early."""

import json
from dataclasses import replace

import pytest
from test_train import QUICK, Stop, fit, run_of

from minilora.cli.main import main
from minilora.io.files import read_tensors
from minilora.io.formats import peft
from minilora.training import best as best_module
from minilora.training.best import FOLDER
from minilora.training.run_folder import LOG, read_log

LONG = replace(QUICK, max_steps=24, learning_rate=0.3, lr_scheduler="constant", dropout=0.0)
EACH = {"val_every": 2, "save_every": 2, "keep_best": True}


def weights(folder):
    return (folder / peft.WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def run():
    return run_of(LONG, examples=12)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A run that overfits: its lowest validation loss is not its last."""
    out = tmp_path_factory.mktemp("run") / "whole"
    outcome = fit(out, run, **EACH)
    losses = {line["step"]: line["val_loss"] for line in read_log(out / LOG) if "val_loss" in line}
    lowest = min(losses, key=losses.get)
    assert lowest < max(losses)
    return out, outcome, losses, lowest


@pytest.mark.slow
def test_the_best_is_kept_with_what_names_its_model(run, whole, tmp_path):
    out, outcome, losses, lowest = whole
    told = json.loads((out / FOLDER / "best.json").read_text())
    assert told == {"step": lowest, "val_loss": losses[lowest]}
    assert f"step {lowest}, loss {losses[lowest]:.4f}" in outcome.best
    assert not outcome.early
    until = fit(tmp_path / "until", run, watch=Stop(lowest), val_every=2, save_every=2)
    assert until.stop_reason == "interrupted"
    assert weights(tmp_path / "until") == weights(out / FOLDER) != weights(out)
    assert (out / FOLDER / "run.json").read_bytes() == (out / "run.json").read_bytes()
    assert read_tensors(out / FOLDER / peft.WEIGHTS)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_best(run, whole, tmp_path):
    out, _, _, lowest = whole
    for stop in (lowest - 2, lowest + 2):
        again = tmp_path / str(stop)
        fit(again, run, watch=Stop(stop), **EACH)
        fit(again, run, resume=True, **EACH)
        assert weights(again / FOLDER) == weights(out / FOLDER)


@pytest.mark.slow
def test_the_patience_ends_a_run_and_is_counted_over_an_interruption(run, whole, tmp_path):
    _, _, losses, _ = whole
    steps, idle, lowest = sorted(losses), 0, float("inf")
    for last in steps:
        idle = 0 if losses[last] < lowest else idle + 1
        lowest = min(lowest, losses[last])
        if idle == 2:
            break
    assert last < max(steps)
    settings = EACH | {"patience": 2}
    outcome = fit(tmp_path / "once", run, **settings)
    assert (outcome.state.step, outcome.early, outcome.stop_reason) == (last, True, "")
    fit(tmp_path / "twice", run, watch=Stop(last - 1), **settings)
    outcome = fit(tmp_path / "twice", run, resume=True, **settings)
    assert (outcome.state.step, outcome.early) == (last, True)
    assert weights(tmp_path / "once") == weights(tmp_path / "twice")


def test_without_validation_there_is_no_best(run, tmp_path):
    alone = replace(run, data=replace(run.data, valid=[]))
    for settings in ({"keep_best": True}, {"patience": 1}):
        with pytest.raises(ValueError, match="found no examples for validation"):
            fit(tmp_path / "run", alone, **settings)
    with pytest.raises(ValueError, match="patience 0"):
        fit(tmp_path / "run", run, patience=0)


@pytest.mark.slow
def test_overwriting_removes_the_best_and_nothing_else(run, whole, tmp_path):
    fit(tmp_path / "run", run, **EACH)
    fit(tmp_path / "run", run, overwrite=True)
    assert not (tmp_path / "run" / FOLDER).exists()
    other = tmp_path / "other" / FOLDER
    other.mkdir(parents=True)
    (other / "mine").touch()
    best_module.remove(tmp_path / "other")
    assert (other / "mine").exists()


@pytest.mark.slow
def test_the_command_tells_the_best_and_evaluate_takes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [
        "train",
        "--output",
        "run",
        "--max-steps",
        "4",
        "--val-every",
        "2",
        "--patience",
        "1",
    ]
    assert main(command) == 0
    assert "the best in validation, step" in capsys.readouterr().out
    assert main(["evaluate", "--adapter", "run/best"]) == 0
