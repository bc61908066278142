"""Training that goes on from an adapter: `train --adapter`."""

import json
from dataclasses import replace

import numpy as np
import pytest
from test_train import QUICK, fit, run_of

from minilora.cli.main import main
from minilora.io.loading import open_adapted
from minilora.training.run import prepare

STILL = replace(QUICK, learning_rate=1e-40, max_steps=1, dropout=0.0)
"""A step that changes nothing in float32."""


def gone_on(run, folder, config):
    """A run that goes on from the adapter in the folder."""
    adapter = open_adapted(run.base, str(folder), np.float32)
    return adapter, prepare(run.base, run.data, config, "the same", adapter=adapter)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "lora-bias", "vera", "pissa"])
def test_it_begins_where_the_adapter_is_and_keeps_all_that_it_is(variant, tmp_path):
    run = run_of(replace(QUICK, variant=variant, rank=4, alpha=3.0, target_modules=["q", "up"]))
    before = fit(tmp_path / "first", run)
    adapter, again = gone_on(run, tmp_path / "first", STILL)
    assert again.initial.keys() == run.initial.keys()
    outcome = fit(tmp_path / "second", again)
    assert outcome.state.first_loss < before.state.first_loss
    after = open_adapted(run.base, str(tmp_path / "second"), np.float32)
    assert after.config == replace(adapter.config, lora_dropout=0.0)  # the new run's
    assert after.tuning.scale == adapter.tuning.scale
    assert all(np.array_equal(after.changed[n], w) for n, w in adapter.changed.items())


@pytest.mark.slow
def test_a_classifiers_head_goes_along(tmp_path):
    run = run_of(replace(QUICK, task="classify"), "reference:bert")
    fit(tmp_path / "first", run)
    adapter, again = gone_on(run, tmp_path / "first", replace(STILL, task="classify"))
    assert {"head.weight", "head.bias"} <= again.initial.keys()
    assert np.array_equal(again.initial["head.weight"], adapter.changed["head.weight"])


def test_no_training_goes_on_from_a_budget_that_is_spent(tmp_path):
    run = run_of(replace(QUICK, variant="adalora"))
    fit(tmp_path / "first", run)
    with pytest.raises(ValueError, match="no training goes on from it"):
        gone_on(run, tmp_path / "first", STILL)


@pytest.mark.slow
def test_the_command_goes_on_resumes_and_refuses_what_the_adapter_settles(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--output", "first", "--max-steps", "3", "--rank", "4"]) == 0
    on = ["train", "--adapter", "first", "--output", "second", "--max-steps", "2"]
    assert main(on) == 0
    assert main([*on, "--resume"]) == 0
    assert json.loads((tmp_path / "second/run.json").read_text())["settings"]["rank"] == 4
    capsys.readouterr()
    for option in (["--rank", "8", "--alpha", "3"], ["--variant", "dora"], ["--full"]):
        assert main([*on[:-4], "--output", "third", *option]) == 2
        assert "expected one of the two" in capsys.readouterr().err
