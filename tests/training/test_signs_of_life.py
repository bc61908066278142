"""What a run tells: that nothing was learned, that a rank is too high, how far it is."""

from dataclasses import replace

import numpy as np
import pytest
from test_train import QUICK, fit, run_of

from minilora.cli.main import main
from minilora.cli.progress import steps_log
from minilora.io.architectures import internal_targets
from minilora.io.loading import open_base
from minilora.training import data
from minilora.training.fit import LEARNS


def test_a_gradient_that_stays_0_ends_the_run(tmp_path):
    config = replace(QUICK, learning_rate=1e6, max_steps=30, max_grad_norm=0.0, dropout=0.0)
    outcome = fit(tmp_path / "run", run_of(config, examples=400))
    assert "the gradient is 0 in 3 steps" in outcome.stop_reason


def test_a_run_that_leaves_what_it_was_trained_on_no_better_is_no_success(tmp_path, monkeypatch):
    small = {"batch_tokens": 32, "gradient_accumulation_steps": 1, "dropout": 0.0}
    run = run_of(replace(QUICK, max_steps=None, num_train_epochs=1, **small), examples=80)
    assert run.total_steps >= LEARNS
    assert fit(tmp_path / "right", run).stop_reason == ""
    backwards = {name: -rate for name, rate in run.learning_rates.items()}
    monkeypatch.setitem(run.__dict__, "learning_rates", backwards)
    monkeypatch.setattr("minilora.training.loop.DIVERGED", np.inf)
    outcome = fit(tmp_path / "wrong", run)
    assert "nothing was learned" in outcome.stop_reason
    assert "before training it was" in outcome.stop_reason


def test_a_rank_above_a_side_has_to_be_asked_for():
    with pytest.raises(ValueError, match=r"rank 100: found a module, layers\.0\.k, of 24 x 36"):
        run_of(replace(QUICK, rank=100))
    run = run_of(replace(QUICK, rank=100, allow_high_rank=True, target_modules=["q"]))
    assert run.initial["layers.0.q.A"].shape[0] == 100


@pytest.mark.parametrize(
    ("model", "names", "inside"),
    [
        ("llama", ["q_proj", "v_proj"], ["q", "v"]),
        ("llama", ["model.layers.1.mlp.gate_proj"], ["layers.1.gate"]),
        ("llama", ["q", "layers.0.k", "no_such"], ["q", "layers.0.k", "no_such"]),
        ("gpt2", ["c_attn", "mlp.c_proj"], None),
        ("bert", ["query", "attention.output.dense"], ["q", "o"]),
    ],
)
def test_target_modules_have_transformers_names_too(model, names, inside):
    c = open_base(f"reference:{model}", np.float32).config
    found = internal_targets(c, names)
    assert inside is None or found == inside
    linears = c.linears()
    unknown = {name for name in found if not any(f".{at}".endswith(f".{name}") for at in linears)}
    assert unknown == ({"no_such"} & set(names))


def test_an_unknown_module_has_a_suggestion(capsys, tmp_path):
    command = ["train", "--target-modules", "qq", "--output", str(tmp_path / "run")]
    assert main(command) == 2
    assert "did you mean q?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [["--rank", "0"], ["--alpha", "-1"], ["--variant", "none"], ["--dropout", "2"]],
    ids=lambda words: words[0],
)
def test_options_are_refused_before_the_model_is_read(wrong, capsys, tmp_path):
    command = ["train", "--model", str(tmp_path / "nothing"), "--output", str(tmp_path / "run")]
    assert main([*command, *wrong]) == 2
    assert main(command) == 3
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine").touch()
    assert main(command) == 2
    assert "is not empty" in capsys.readouterr().err


def test_empty_lines_at_the_end_are_none_and_within_are_told(tmp_path):
    path = tmp_path / "a.jsonl"
    row = '{"ids": [1, 2, 3]}\n'
    path.write_text(row + row + "\n \n")
    assert len(data.read(path, "lm", None, 8).train) == 2
    path.write_text(row + "\n" + row)
    with pytest.raises(ValueError, match="line 2: found an empty line"):
        data.read(path, "lm", None, 8)
    path.write_text(row + "\n" + row + '{"ids": [1, 2,}\n')
    read = data.read(path, "lm", None, 8, skip_invalid=True)
    assert [line.line for line in read.skipped] == [2, 4]
    assert "line" not in read.skipped[1].reason.partition("expected")[0]


def test_the_ends_of_lines_are_those_of_unix_in_the_text(tmp_path):
    base = open_base("reference:llama", np.float32)
    texts = {}
    for name, end in (("unix", "\n"), ("windows", "\r\n")):
        path = tmp_path / f"{name}.txt"
        path.write_bytes(end.join(["1 2 3", "4 5"]).encode())
        texts[name] = [e.ids.tolist() for e in data.read(path, "lm", base.tokenizer, 64).train]
    assert texts["unix"] == texts["windows"]


def test_in_a_log_a_line_is_printed_now_and_then(capsys):
    now = iter([0.0, 1.0, 10.0, 31.0, 45.0, 61.0])
    watch = steps_log(30.0, lambda: next(now))
    line = {"loss": 2.0, "tokens_per_second": 1000.0}
    watch({"step": 0}, 100)
    for step in (10, 20, 30):
        watch(line | {"step": step}, 100)
    watch(line | {"step": 40, "val_loss": 1.5}, 100)
    assert capsys.readouterr().err.splitlines() == [
        "step 20 of 100: loss 2.000, 1000 tokens/s, 2 min 4 s left",
        "step 40 of 100: loss 2.000, valid 1.500, 1000 tokens/s, 1 min 32 s left",
    ]


def test_the_first_batch_is_shown_without_an_output(capsys):
    assert main(["train", "--show-batch"]) == 0
    assert capsys.readouterr().out
    assert main(["train"]) == 2
    assert "--output is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_says_what_a_run_takes_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dry-run", "--max-length", "16", "--gradient-checkpointing"]) == 0
    told = dict(
        line.split(None, 1) for line in capsys.readouterr().out.splitlines() if ":" not in line
    )
    assert {"examples", "tokens", "batches", "steps", "time", "memory"} <= told.keys()
    assert main(["train", "--output", "run", "--max-length", "16"]) == 0
    assert f"step {told['steps']} of {told['steps']}:" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
