"""The commands of fine-tuning: what each prints and leaves, and how it refuses."""

import datetime
import errno
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import tomllib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from calculus import GRADIENT, record_worst, relative_error, same_bits
from extras import needs, optional
from marks import others_slow
from test_formats import libraries as libraries

from minilora import logits
from minilora.cli.commands.inspect import runtimes
from minilora.cli.commands.train import chosen_layers, target_modules
from minilora.cli.main import main
from minilora.io import reference_models, synthetic_data
from minilora.io.atomic import write_files, write_tensors
from minilora.io.conversion import write_adapter
from minilora.io.errors import FormatError
from minilora.io.files import pack_json, read_json, read_tensors
from minilora.io.formats import huggingface, mlx, peft
from minilora.io.formats.huggingface import copy_tokenizer
from minilora.io.formats.registry import FORMATS
from minilora.io.formats.tokenizers import WordTokenizer
from minilora.io.loading import (
    adapter_format,
    class_names,
    open_adapted,
    open_base,
    open_base_of,
)
from minilora.spec.initialization import draw_weights
from minilora.spec.lora import TrainableSpec, merge
from minilora.spec.models import GPT2, Llama
from minilora.spec.target_modules import LoraConfig, inject
from minilora.training import batching, data, evaluate
from minilora.training.checkpoints import TrainState
from minilora.training.config import TrainConfig
from minilora.training.gradients import ExecutionPlan
from minilora.training.loop import train_steps
from minilora.training.run import prepare
from minilora.training.run_folder import read_log

ROOT = Path(__file__).parents[2]


@pytest.fixture
def minilora(capsys, monkeypatch, tmp_path):
    """Runs a command in an empty folder: exit status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        try:
            status = main([str(word) for word in words])
        except SystemExit as left:
            status = left.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the reference model, and one of a classifier."""
    folder = tmp_path_factory.mktemp("trained")
    quick = ["--max-steps", "12", "--learning-rate", "0.02", "--rank", "4"]
    for name in ("llama", "bert"):
        out = str(folder / name)
        assert main(["train", "--model", f"reference:{name}", "--output", out, *quick]) == 0
    return folder


def figures(text):
    return {name: float(value) for name, value in re.findall(r"^(\w+) +(\d+\.\d+)", text, re.M)}


def printed_alike(one, other):
    """Whether the losses are one number, but for rounding and a unit of the last digit printed."""
    apart = round(1e4 * abs(figures(one)["loss"] - figures(other)["loss"]))
    return apart <= 1


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def slow(*values):
    return pytest.param(values if len(values) > 1 else values[0], marks=pytest.mark.slow)


# train


def test_train_needs_no_more_than_an_output(minilora, tmp_path):
    status, out, err = minilora("train", "--output", "run")
    assert (status, err) == (0, "")
    assert re.search(r"27108 parameters, 9792 trained\ntask:running-difference: 4096", out)
    loss, valid = map(float, re.search(r"loss (\S+), (\S+) in validation", out).groups())
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, len(log) + 1))
    assert round(log[-1]["loss"], 4) == loss < log[0]["loss"]
    assert round(log[-1]["val_loss"], 4) == valid
    names = {
        "step",
        "epoch",
        "loss",
        "tokens",
        "labels",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
    }
    assert names <= log[0].keys()
    assert peft.CONFIG in {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "reference:gpt2"),
        slow("--model", "reference:bert"),
        slow("--variant", "dora", "--target-modules", "q,v"),
        ("--variant", "lora+", "--lr-scheduler", "linear", "--warmup-steps", "2"),
        ("--target-modules", r"layers\.1\..*", "--rank", "2", "--alpha", "3", "--dropout", "0.1"),
        slow("--full", "--dtype", "float64"),
        slow(
            "--threads",
            "2",
            "--gradient-checkpointing",
            "--gradient-accumulation-steps",
            "2",
            "--weight-decay",
            "0.1",
        ),
    ],
)
def test_train_runs_with(options, minilora, tmp_path):
    status, _, err = minilora("train", "--output", "run", "--max-steps", 3, *options)
    assert (status, err) == (0, "")
    said = read_json(tmp_path / "run/run.json")["settings"]
    for name in ("variant", "lr_scheduler", "dtype"):
        if f"--{name}" in options:
            assert said[name] == options[options.index(f"--{name}") + 1]


@pytest.mark.slow
def test_recomputing_and_threads_for_each_group_change_no_bit(minilora, tmp_path):
    for out, *options in (
        ("one", "--threads", "2"),
        ("two", "--threads", "3", "--gradient-checkpointing"),
    ):
        size = "--batch-tokens", 8192  # several groups
        assert minilora("train", "--output", out, "--max-steps", 3, *size, *options)[0] == 0
    one, two = ((tmp_path / out / peft.WEIGHTS).read_bytes() for out in ("one", "two"))
    assert one == two


@pytest.mark.slow
def test_the_layers_that_are_adapted_and_where_their_input_is_kept(minilora, tmp_path):
    chosen = ("--layers", "last:1", "--prefix-cache", "kept", "--max-steps", 3)
    assert minilora("train", "--output", "run", *chosen)[0] == 0
    config = read_json(tmp_path / "run/adapter_config.json")
    settings = read_json(tmp_path / "run/run.json")["settings"]
    layers = settings["layers_to_transform"]
    assert len(layers) == 1
    assert all(f".layers.{layers[0]}." in name for name in config["target_modules"])
    assert settings["prefix"] == "float32"
    assert list((tmp_path / "kept").rglob("*.npy"))
    status, _, err = minilora(
        "train", "--output", "run", *chosen, "--prefix-dtype", "float16", "--resume"
    )
    assert status == 2
    assert "prefix was 'float32' and is 'float16'" in err


@pytest.mark.parametrize(
    ("text", "layers", "indices"),
    [("last:2", 6, [4, 5]), ("0,2-4", 6, [0, 2, 3, 4]), ("5", 6, [5]), ("1-1,1", None, [1])],
)
def test_layers_are_chosen_by_index_or_from_the_last(text, layers, indices):
    assert chosen_layers(text, layers) == indices


def test_other_threads_are_another_run(minilora):
    """With fewer groups than threads the products run in parallel, and sums in another order."""
    command = ("train", "--output", "run", "--max-steps", 2)
    assert minilora(*command)[0] == 0
    status, _, err = minilora(*command, "--resume", "--threads", 2)
    assert status == 2
    assert "threads was 1 and is 2" in err


def test_a_file_of_lines_is_trained_on_and_a_bad_line_is_named_or_left_out(minilora, tmp_path):
    path = written(tmp_path / "d.jsonl", {"text": "3 3 4 7"}, {"text": "zebra"}, {"text": "1 2"})
    command = ("train", "--output", "run", "--data", "d.jsonl", "--max-steps", 2)
    status, _, err = minilora(*command)
    assert status == 3
    assert "d.jsonl: line 2:" in err
    assert "zebra" in err
    assert not (tmp_path / "run").exists()
    status, out, _ = minilora(*command, "--skip-invalid")
    assert status == 0
    assert f"{path.name}, line 2:" in out
    assert "zebra" in out
    assert read_json(tmp_path / "run/run.json")["data"]["skipped"] == 1


def test_show_batch_prints_each_token_and_writes_nothing(minilora, tmp_path):
    written(tmp_path / "d.jsonl", {"prompt": "3 3", "completion": " 4"})
    status, out, _ = minilora("train", "--output", "run", "--data", "d.jsonl", "--show-batch")
    assert status == 0
    said = [line.split()[1] for line in out.splitlines()[1:]]
    assert said == ["given", "given", "given", "predict", "predict"]
    assert not (tmp_path / "run").exists()
    _, out, _ = minilora(
        "train", "--output", "run", "--data", "d.jsonl", "--show-batch", "--train-on-prompt"
    )
    said = [line.split()[1] for line in out.splitlines()[1:]]
    assert said == ["given"] + 4 * ["predict"]


@pytest.mark.parametrize(
    ("options", "status", "found"),
    [
        (("--rank", "0"), 2, "rank"),
        (("--learning-rate", "-1"), 2, "learning_rate -1.0"),
        (("--learning-rate", "nan"), 2, "learning_rate nan"),
        (("--lr-scheduler", "up"), 2, "lr_scheduler 'up'"),
        (("--variant", "alora"), 2, "variant 'alora'"),
        (("--variant", "none"), 2, "variant 'none'"),
        (("--target-modules", "kk_proj"), 2, "kk_proj"),
        (("--layers", "last:0"), 2, "--layers 'last:0': expected last:N, or indices such as"),
        (
            ("--layers", "last:9"),
            2,
            "--layers last:9: expected indices of the model's layers, 0 to",
        ),
        (("--layers", "0,7"), 2, "--layers 0,7: expected indices of the model's layers, 0 to"),
        (("--full", "--layers", "1"), 2, "--layers 1 with --full"),
        (("--prefix-cache", "memory"), 2, "a kept prefix: found a trained lowest block"),
        (("--prefix-dtype", "int8"), 2, "prefix_dtype 'int8': expected float32, float16, bfloat16"),
        (("--dtype", "float16"), 2, "argument --dtype: invalid choice: 'float16'"),
        (("--alpha", "nan"), 2, "alpha nan"),
        (("--threads", "0"), 2, "--threads 0:"),
        (("--save-every", "0"), 2, "--save-every 0:"),
        (("--max-length", "3"), 2, "length 3"),
        (("--task", "classify"), 2, "task"),
        (("--model", "reference:none"), 3, "expected reference:bert, reference:gpt2"),
        (("--model", "nowhere"), 3, "nowhere: model:"),
        (("--data", "nowhere.jsonl"), 3, "nowhere.jsonl: file:"),
        (("--full", "--rank", "4"), 2, "--rank 4 with --full"),
        (("--full", "--target-modules", "q"), 2, "--target-modules q with --full"),
        (("--loraplus-lr-rato", "2"), 2, "did you mean --loraplus-lr-ratio"),
        (("--lr", "3"), 2, "unrecognized arguments: --lr 3; did you mean --learning-rate?"),
        (("--threads", "99999999999999999999"), 2, r"--threads 9+: expected less than 2\*\*63"),
        (("--threads", "9999999"), 2, "9999999"),
        (("--batch-tokens", "1" + 21 * "0"), 2, r"--batch-tokens 10+: expected less than 2\*\*63"),
        (("--num-train-epochs", "0"), 2, "--num-train-epochs 0:"),
        (("--save-minutes", "0"), 2, "save_minutes 0:"),
        (("--model", ""), 2, "--model '': expected a value"),
        (("--data", ""), 2, "--data '': expected a value"),
        (("--output", ""), 2, "--output '': expected a value"),
        (("--rank", "100000000000"), 2, "--allow-high-rank"),
        (("--rank", "100000000000", "--allow-high-rank"), 1, "not enough memory"),
        (("--model", "package:os"), 3, "package:os: package: found a module, expected a package"),
        (("--model", "package:sys"), 3, "package:sys: package: found a module"),
        (("--model", "package:__main__"), 3, "package:__main__: package: found a module"),
        (("--model", "package:"), 3, "package:: package: found ''"),
    ],
)
def test_train_refuses(options, status, found, minilora, tmp_path):
    got, out, err = minilora("train", "--output", "run", *options)
    assert got == status
    assert re.search(found, err)
    assert len(err.splitlines()) < 100
    assert not (tmp_path / "run").exists()
    assert "Traceback" not in out + err


def screen(monkeypatch, columns, *words):
    """What the command draws on a terminal so many columns wide: a text for each carriage return.

    A thread reads all that is drawn, up to its end: a terminal holds little that nobody reads.
    """
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))  # POSIX has them
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    drawn = []

    def read():
        with suppress(OSError):  # EIO, once the other side is closed
            while chunk := os.read(ours, 2**16):
                drawn.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with open(theirs, "w", encoding="utf-8") as terminal:
            monkeypatch.setattr(sys, "stderr", terminal)
            assert main([*words]) == 0
            monkeypatch.undo()
    finally:
        reader.join()
        os.close(ours)
    text = b"".join(drawn).decode()
    return [frame.rstrip("\n") for frame in text.split("\r") if frame.strip()]


@pytest.mark.slow
@pytest.mark.parametrize("columns", [slow(60), 80, slow(132)])
def test_the_bar_fits_on_the_terminal_and_begins_where_the_run_goes_on(
    columns, tmp_path, monkeypatch
):
    command = ["train", "--output", str(tmp_path / "run"), "--val-every", "1", "--max-steps"]
    frames = screen(monkeypatch, columns, *command, "2")
    assert "0/2, " in frames[0]
    assert max(map(len, frames)) <= columns
    whole = (
        r"100% .+ 2/2, 00:00 left, loss \d\.\d{3}, valid \d\.\d{3}, [\d.]+k? tok/s, [\d.]+[MG]iB"
    )
    assert columns < 80 or re.fullmatch(whole, frames[-1])
    frames = screen(monkeypatch, columns, *command, "4", "--resume", "--accept-changes")
    assert re.match(r" 50% .+ 2/4, ", frames[0])
    assert re.match(r"100% .+ 4/4, ", frames[-1])


@pytest.mark.slow
def test_a_divergence_is_status_1_and_says_how_to_go_on(minilora, tmp_path):
    command = ("train", "--output", "run", "--max-grad-norm", "0", "--save-every", 1)
    status, _, err = minilora(*command, "--learning-rate", "1e30")
    assert status == 1
    assert re.search(r"diverged at step 2: .*saved in run: step 1 of 27; ", err)
    way = re.search(r"--resume --accept-changes --learning-rate \S+\d", err)[0]
    (changed,) = [option for option in way.split() if option[0].isdigit()]
    status, out, err = minilora(*command, *way.replace(changed, "1e-9").split())
    assert "changed: learning_rate was 1e+30 and is 1e-09" in out
    assert status in (0, 1)  # what is left of the model after such a step is another question


@pytest.mark.slow
def test_an_output_that_is_there_is_refused(minilora, trained):
    status, _, err = minilora("train", "--output", trained / "llama")
    assert status == 2
    assert "--resume" in err
    assert "--overwrite" in err


def test_a_plot_of_the_loss_is_drawn(minilora, tmp_path):
    optional("matplotlib")
    minilora("train", "--output", "run", "--max-steps", 3)
    picture = (tmp_path / "run/loss.svg").read_text()
    assert "<svg" in picture
    assert picture.count('<g id="line2d') > 1


def test_without_matplotlib_the_run_says_how_to_have_a_plot(minilora, tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_svg"):
        monkeypatch.setitem(sys.modules, name, None)
    status, out, _ = minilora("train", "--output", "run", "--max-steps", 2)
    assert status == 0
    assert "python -m pip install 'minilora[plot]'" in out
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "plot" in extras["optional-dependencies"]


def test_names_are_a_list_and_an_expression_is_one():
    assert target_modules("all-linear") == "all-linear"
    assert target_modules("q, v") == ["q", "v"]
    assert target_modules("layers.0.q") == ["layers.0.q"]
    assert target_modules(r"layers\.0\..*") == r"layers\.0\..*"


# evaluate


def test_evaluate_prints_the_measures_of_the_examples(minilora, trained, tmp_path):
    status, out, _ = minilora("evaluate", "--adapter", trained / "llama", "--json", "f.json")
    assert status == 0
    said = read_json(tmp_path / "f.json")
    assert figures(out) == {
        name: round(said[name], 4) for name in ("loss", "perplexity", "accuracy")
    }
    base = open_base("reference:llama")
    adapted = open_adapted(base, str(trained / "llama"))
    read = data.read("task:running-difference", "lm", base.tokenizer, 512)
    batch = batching.batch(read.test, base.tokenizer.pad)
    z, _ = logits(batch, adapted.weights, base.config, adapted.tuning)
    z = z.reshape(len(z), *batch.ids.shape)
    counted = batch.real[:, 1:]
    right = (z.argmax(0)[:, :-1] == batch.ids[:, 1:])[counted]
    assert said["accuracy"] == right.mean()
    assert said["labels"] == counted.sum()
    low, high = said["accuracy_interval"]
    assert low < said["accuracy"] < high
    _, out, _ = minilora("evaluate")
    assert figures(out)["loss"] > said["loss"]


def test_the_loss_does_not_depend_on_how_the_examples_lie_in_batches():
    """In float64 and to the rounding of a sum of so many terms."""
    base = open_base("reference:llama", np.float64)
    read = data.read("task:running-sum", "lm", base.tokenizer, 512)
    adapted = open_adapted(base)
    given = adapted.weights, base.config, adapted.tuning
    pad, some = base.tokenizer.pad, read.test[:40]
    apart = [batching.batch([example], pad) for example in some]
    one, many = (
        evaluate.measure([batching.batch(some, pad)], *given),
        evaluate.measure(apart, *given),
    )
    bound = one.count * base.config.vocab * base.config.d * np.finfo(float).eps
    assert (one.count, one.right.sum()) == (many.count, many.right.sum())
    assert abs(one.nll / many.nll - 1) <= bound
    losses = evaluate.mean_loss(apart, *given, ExecutionPlan())
    assert (losses.count, losses.right) == (one.count, None)
    assert abs(losses.nll / one.nll - 1) <= bound
    means = [evaluate.measure([batch], *given).loss for batch in apart]
    assert abs(np.mean(means) / one.loss - 1) > bound  # the mean of means is another
    with pytest.raises(ValueError, match="no label counts"):
        evaluate.measure([], *given)


def test_a_classifier_is_evaluated_by_the_classes_that_it_learned(minilora, trained, tmp_path):
    status, out, _ = minilora("evaluate", "--adapter", trained / "bert")
    assert status == 0
    assert "512 examples, 512 labels" in out
    assert class_names(str(trained / "bert")) == ("0", "1", "2")
    path = tmp_path / "d.jsonl"
    rows = [{"text": "a b", "label": label} for label in ("0", "2", "2")]
    written(path, *rows)
    status, out, _ = minilora(
        "evaluate", "--adapter", trained / "bert", "--data", path, "--split", "train"
    )
    assert status == 0, out
    written(path, *rows, {"text": "a", "label": "7"})
    status, _, err = minilora("evaluate", "--adapter", trained / "bert", "--data", path)
    assert status == 3
    assert "line 4: found label '7'" in err


def test_rouge_compares_what_the_model_writes(minilora, trained, tmp_path):
    optional("rouge_score")
    written(tmp_path / "d.jsonl", {"prompt": "3", "completion": " 8"})
    status, out, _ = minilora(
        "evaluate", "--adapter", "reference:llama", "--data", "d.jsonl", "--rouge", 1
    )
    assert status == 0
    assert figures(out)["rouge1"] == 1.0
    written(tmp_path / "d.jsonl", {"prompt": "3", "completion": " 4"})
    _, out, _ = minilora(
        "evaluate", "--adapter", "reference:llama", "--data", "d.jsonl", "--rouge", 1
    )
    assert figures(out)["rouge1"] == 0.0


# generate


def test_generate_writes_what_the_adapted_model_has_learned(minilora):
    """Modulo 11, 0 - 3 is 8; the model that was taught sums says 0 + 3."""
    for adapter, wanted in ((("--adapter", "reference:llama"), "3 8"), ((), "3 3")):
        status, out, err = minilora("generate", "--prompt", "3", *adapter)
        assert (status, err) == (0, "")
        assert out.strip() == wanted


def test_generate_draws_by_the_seed(minilora):
    command = ("generate", "--temperature", "1", "--max-new-tokens", "12")
    texts = [minilora(*command, "--seed", seed)[1] for seed in (0, 0, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_generate_reads_its_prompt_from_standard_input(minilora, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("3"))
    status, out, _ = minilora("generate", "--prompt", "-", "--adapter", "reference:llama")
    assert (status, out.strip()) == (0, "3 8")


def test_generate_ends_before_a_stop_text(minilora):
    whole = minilora("generate", "--prompt", "3 3", "--max-new-tokens", 12, "--temperature", 2)[1]
    last = whole.split()[-1]
    cut = minilora(
        "generate", "--prompt", "3 3", "--max-new-tokens", 12, "--temperature", 2, "--stop", last
    )[1]
    assert last not in cut[3:]
    assert whole.startswith(cut.rstrip("\n"))


TEMPLATE = "{{ bos_token }} {{ messages | map(attribute='content') | join(' ') }}"


def test_a_chat_sees_the_date_that_is_given(minilora, monkeypatch):
    optional("jinja2")
    monkeypatch.setattr(
        WordTokenizer, "chat_template", "{{ bos_token }} {{ strftime_now('%d')[1] }}"
    )
    command = ("--adapter", "reference:llama", "--max-new-tokens", 2)
    for day in (3, 8):
        _, answer, _ = minilora("generate", "--chat", "x", "--date", f"2025-03-0{day}", *command)
        _, text, _ = minilora("generate", "--prompt", f"{day}", *command)
        assert text.split() == [f"{day}", *answer.split()]


class Days(datetime.date):
    """A calendar that says it is the first of March, and then another day."""

    day_of_march = 1

    @classmethod
    def today(cls):
        return cls(2025, 3, cls.day_of_march)


@pytest.mark.slow
def test_a_run_keeps_its_date(minilora, monkeypatch, tmp_path):
    """Resumed on another day it goes on with the date that it began with, to the same bits."""
    optional("jinja2")
    template = "{{ strftime_now('%d')[1] }} {{ messages | map(attribute='content') | join(' ') }}"
    monkeypatch.setattr(WordTokenizer, "chat_template", template)
    monkeypatch.setattr("minilora.training.data.datetime", SimpleNamespace(date=Days))
    lines = [{"prompt": "3 4", "completion": f"{i}"} for i in range(8)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = ("--data", tmp_path / "a.jsonl", "--task", "chat")
    command = ("train", *data, "--val-fraction", 0.5, "--max-steps", 2)

    def date_of(name):
        return json.loads((tmp_path / name / "run.json").read_text())["data"]["date"]

    whole, other, again = tmp_path / "whole", tmp_path / "other", tmp_path / "again"
    assert minilora(*command, "--output", whole)[0] == 0
    assert date_of("whole") == "2025-03-01"
    first = minilora("evaluate", "--adapter", whole)[1]
    monkeypatch.setattr(Days, "day_of_march", 2)
    assert minilora(*command, "--output", whole, "--resume")[0] == 0
    assert date_of("whole") == "2025-03-01"
    assert minilora("evaluate", "--adapter", whole)[1] == first
    assert minilora("evaluate", "--adapter", whole, "--date", "2025-03-02")[1] != first
    status, _, err = minilora(*command, "--output", whole, "--resume", "--date", "2025-03-02")
    assert status == 2
    assert "the date that the chat template sees was 2025-03-01 and is 2025-03-02" in err
    assert minilora(*command, "--output", other)[0] == 0
    assert date_of("other") == "2025-03-02"
    assert minilora("train", "--config", whole / "run.json", "--output", again)[0] == 0
    assert date_of("again") == "2025-03-01"
    whole, other, again = (
        (path / "adapter_model.safetensors").read_bytes() for path in (whole, other, again)
    )
    assert whole == again != other


def test_a_chat_reads_messages_until_its_end_and_remembers_them(minilora, monkeypatch):
    """The reference model was taught 3 8 after 3: after 3 8 3 it goes on from all of it."""
    optional("jinja2")
    monkeypatch.setattr(WordTokenizer, "chat_template", TEMPLATE)
    command = ("generate", "--chat", "--adapter", "reference:llama", "--max-new-tokens", 1)

    def answers(*lines):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        status, out, err = minilora(*command)
        assert status == 0
        return out.split(), err

    alone, err = answers("3")
    assert alone == ["8"]
    assert "[1 token, " in err
    assert "cut off" in err
    both, _ = answers("3", "", "4")
    prompt = minilora("generate", "--prompt", "3 8 4", *command[2:])[1].split()
    assert both == ["8", prompt[-1]]
    assert answers("3", "/reset", "3", "/exit", "3")[0] == ["8", "8"]
    lines, err = answers("zebra", "3")
    assert lines == ["8"]
    assert "the word 'zebra'" in err


@pytest.mark.parametrize(
    ("options", "status", "found"),
    [
        (("--system", "x"), 2, "--system: found no --chat"),
        (("--date", "2025-03-09"), 2, "--date: found no --chat"),
        (("--chat", "3", "--date", "9 March"), 2, "date '9 March': expected a date, as YYYY-MM-DD"),
        (("--chat",), 2, "no chat template"),
        (("--stop", "a", "--stop", ""), 2, "stop ''"),
        (("--repetition-penalty", "0"), 2, "repetition_penalty 0.0"),
        (("--prompt", "zebra"), 2, "the word 'zebra'"),
        (("--prompt", "3", "--chat", "3"), 2, "--prompt and --chat"),
        (("--chat", "3"), 2, "no chat template"),
        (("--model", "reference:bert", "--prompt", "a"), 2, "a Bert "),
        (("--max-new-tokens", "0"), 2, "--max-new-tokens 0"),
        (("--temperature", "-1"), 2, "temperature -1.0"),
        (("--adapter", "nowhere"), 3, "nowhere: adapter: found nothing there"),
        (("--adapter", "nowhere", "--model", "reference:llama"), 3, "nowhere: adapter"),
    ],
)
def test_generate_refuses(options, status, found, minilora):
    got, _, err = minilora("generate", *options)
    assert got == status
    assert found in err


# merge, convert, inspect


@pytest.mark.slow
def test_a_merged_model_needs_no_adapter(minilora, trained):
    status, _, _ = minilora("merge", "--adapter", trained / "llama", "--output", "merged")
    assert status == 0
    adapted = open_adapted(open_base_of(None, str(trained / "llama")), str(trained / "llama"))
    c, W = huggingface.read_model("merged")
    for name in c.linears():
        at, change = f"{name}.weight", None
        if f"{name}.A" in adapted.changed:
            s = adapted.tuning.scale[name]
            change = s * (adapted.changed[f"{name}.B"] @ adapted.changed[f"{name}.A"])
        base = adapted.base.weights[at]
        assert same_bits(W[at], base if change is None else base + change)
    with_it = minilora("evaluate", "--adapter", trained / "llama")[1]
    merged = minilora("evaluate", "--model", "merged", "--data", "task:running-difference")[1]
    assert printed_alike(with_it, merged)
    assert not printed_alike(with_it, minilora("evaluate")[1])
    status, _, err = minilora("merge", "--output", "other")
    assert status == 2
    assert "--adapter" in err


def test_a_model_without_a_tokenizer_is_merged_and_says_so(minilora, trained, tmp_path):
    optional("gguf")
    from minilora.io.formats import gguf

    base = open_base("reference:llama")
    gguf.write_model("m.gguf", base.config, base.weights)
    command = ("merge", "--adapter", trained / "llama", "--output")
    status, out, err = minilora(*command, "merged", "--model", "m.gguf")
    assert status == 0
    assert err.startswith("note: ")  # of other files than it was trained on
    assert len(err.splitlines()) == 1
    assert "merged: no tokenizer beside the model: m.gguf: tokenizer.ggml.model: found no_" in out
    assert {path.name for path in Path("merged").iterdir()} == {"config.json", huggingface.WEIGHTS}
    _, out, _ = minilora(*command, "other")
    assert "no tokenizer" not in out
    assert (tmp_path / "other/tokenizer.json").is_file()


def test_an_adapter_goes_from_format_to_format_and_back_to_the_bit(minilora, trained, tmp_path):
    optional("gguf")
    model = ("--model", "reference:llama")
    way = [("mlx", "a"), ("gguf", "b.gguf"), ("peft", "c")]
    adapter = trained / "llama"
    for kind, out in way:
        status, text, err = minilora("convert", adapter, *model, "--to", kind, "--output", out)
        assert (status, err) == (0, "")
        assert "was multiplied" not in text
        assert adapter_format(tmp_path / out).name == kind
        adapter = tmp_path / out
    base = open_base("reference:llama")
    first, last = (open_adapted(base, str(path)) for path in (trained / "llama", adapter))
    assert first.tuning.scale == last.tuning.scale
    assert first.changed.keys() == last.changed.keys()
    assert all(same_bits(first.changed[name], last.changed[name]) for name in first.changed)


@pytest.mark.parametrize(
    ("options", "status", "found"),
    [
        (("--to", "mlx", "--output", "a.gguf"), 2, "expected a folder for mlx"),
        (("--to", "gguf", "--output", "a"), 2, "expected a .gguf file for gguf"),
        (("--to", "onnx", "--output", "a"), 2, "invalid choice: 'onnx'"),
    ],
)
def test_convert_refuses(options, status, found, minilora, trained):
    got, _, err = minilora("convert", trained / "llama", *options)
    assert got == status
    assert found in err


def test_what_a_format_cannot_say_is_refused(minilora, trained, tmp_path):
    status, _, err = minilora("convert", trained / "bert", "--to", "mlx", "--output", "a")
    assert status == 3
    assert "found bert" in err
    assert not (tmp_path / "a").exists()


def test_inspect_prints_the_norms_and_what_each_library_does(minilora, trained):
    status, out, _ = minilora("inspect", trained / "llama")
    assert status == 0
    adapted = open_adapted(open_base_of(None, str(trained / "llama")), str(trained / "llama"))
    own, s = adapted.changed, adapted.tuning.scale["layers.1.down"]
    change = np.linalg.norm(s * (own["layers.1.down.B"] @ own["layers.1.down.A"]))
    ratio = change / np.linalg.norm(adapted.weights["layers.1.down.weight"])
    (row,) = [line.split() for line in out.splitlines() if line.startswith("layers.1.down")]
    assert row == ["layers.1.down", "lora", "4", "2", f"{change:.4g}", f"{ratio:.2%}"]
    assert "14 of 15 projections adapted, 4896 parameters trained" in out
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["peft", "mlx", "gguf"]
    _, out, _ = minilora("inspect", trained / "bert")
    assert "head.bias, head.weight" in out
    assert re.search(r"^mlx +not possible: .*found bert", out, re.M)


def test_inspect_says_what_would_be_refused(trained, monkeypatch):
    adapted = open_adapted(open_base_of(None, str(trained / "llama")), str(trained / "llama"))
    assert not any("not possible" in line for line in runtimes(adapted))

    def refuses(*arguments, **settings):
        raise FormatError("a", "scale", "2 of them", "one", "keep PEFT's")

    monkeypatch.setattr(mlx, "write_adapter", refuses)
    assert [line for line in runtimes(adapted) if "not possible" in line] == [
        "mlx   not possible: scale: found 2 of them, expected one; keep PEFT's"
    ]


# Models


def plain_encoder(folder):
    """The reference BERT without its classifier, as a sentence encoder's folder has it."""
    c, W = huggingface.read_model(open_base("reference:bert").path)
    huggingface.write_model(folder, c, W)
    said = read_json(folder / "config.json") | {"architectures": ["BertModel"]}
    del said["id2label"], said["label2id"]
    tensors = read_tensors(folder / huggingface.WEIGHTS)
    bare = {
        name.removeprefix("bert."): w for name, w in tensors.items() if "classifier" not in name
    }
    write_files(folder, {"config.json": lambda: pack_json(said)})
    write_tensors(folder / huggingface.WEIGHTS, bare)
    copy_tokenizer(open_base("reference:bert"), folder)
    return folder


MOODS = ("sour", "sweet", "bland")
"""Classes whose order is not that of their names."""


def named_classifier(folder):
    """The reference BERT with names for its three classes."""
    base = open_base("reference:bert")
    huggingface.write_model(folder, base.config, base.weights, labels=MOODS)
    copy_tokenizer(base, folder)
    return folder


@pytest.mark.slow
def test_a_pretrained_classifiers_classes_are_found_by_name_and_kept(minilora, trained, tmp_path):
    folder = named_classifier(tmp_path / "model")
    assert open_base(str(folder)).classes == MOODS
    assert open_base("reference:bert").classes is None
    texts = ("a b", "b c c", "c a", "b b")
    rows = [{"text": text, "label": MOODS[i % 3]} for i, text in enumerate(texts)]
    path = written(tmp_path / "d.jsonl", *rows)
    plain = [{"text": text, "label": i % 3} for i, text in enumerate(texts)]
    numbers = written(tmp_path / "n.jsonl", *plain)
    # By name they are the classes that the numbers mean, and not those that sorting gives.
    losses = []
    for model, file in ((folder, path), ("reference:bert", numbers)):
        options = ("--data", file, "--task", "classify", "--split", "train")
        status, out, err = minilora("evaluate", "--model", model, *options)
        assert (status, err) == (0, "")
        losses.append(figures(out)["loss"])
    assert losses[0] == losses[1]
    status, _, err = minilora(
        "evaluate", "--model", "reference:bert", *options[:1], path, *options[2:]
    )
    assert status == 3
    assert "line 1: found label 'sour'" in err
    command = ("train", "--model", folder, "--task", "classify", "--max-steps", 2)
    for out, *options in (("run",), ("full", "--full")):
        assert minilora(*command, "--data", path, "--output", out, *options)[0] == 0
        assert class_names(out) == MOODS
    assert minilora("merge", "--adapter", "run", "--output", "merged")[0] == 0
    for out in ("full", "merged"):
        assert huggingface.read_labels(out) == MOODS
    wrong = written(tmp_path / "w.jsonl", *rows, {"text": "a", "label": "Sweet"})
    status, _, err = minilora(*command, "--data", wrong, "--output", "no")
    assert status == 3
    assert "line 5: found label 'Sweet'" in err
    assert "bland, sour, sweet" in err


def test_names_that_a_classifier_has_learned_are_written_and_numbers_are_not(minilora, trained):
    assert minilora("merge", "--adapter", trained / "bert", "--output", "merged")[0] == 0
    said = read_json("merged/config.json")
    assert said["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert huggingface.read_labels("merged") is None


def test_transformers_reads_the_names_of_the_classes(tmp_path):
    transformers = optional("transformers")
    named_classifier(tmp_path)
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert read.id2label == dict(enumerate(MOODS))
    assert read.label2id == {name: i for i, name in enumerate(MOODS)}
    read.save_pretrained(tmp_path)
    assert huggingface.read_labels(tmp_path) == MOODS


def test_data_of_other_classes_than_the_models_is_not_trained_on(tmp_path):
    base = open_base(str(named_classifier(tmp_path / "model")))
    rows = [{"text": "a b", "label": mood} for mood in MOODS]
    path = written(tmp_path / "d.jsonl", *rows)
    config = TrainConfig(task="classify")
    read = data.read(path, "classify", base.tokenizer, 64)
    with pytest.raises(ValueError, match="bland, sour, sweet"):
        prepare(base, read, config)
    prepare(base, data.read(path, "classify", base.tokenizer, 64, classes=base.classes), config)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"id2label": {"0": "a", "1": "b", "3": "c"}}, "id2label: found .*from 0 to 2"),
        ({"id2label": {"0": "a", "1": "b", "2": 7}}, "id2label: found .*from 0 to 2"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "id2label: found .*names that differ"),
        ({"label2id": {"sour": 1, "sweet": 0, "bland": 2}}, "label2id: found .*id2label has it"),
    ],
)
def test_names_of_classes_that_contradict_themselves_are_refused(change, found, tmp_path):
    folder = named_classifier(tmp_path)
    said = read_json(folder / "config.json") | change
    write_files(folder, {"config.json": lambda: pack_json(said)})
    with pytest.raises(FormatError, match=found):
        open_base(str(folder))


def test_a_model_is_written_with_a_name_for_each_class_or_none(tmp_path):
    base = open_base("reference:bert")
    for labels in (("a", "b"), ("a", "b", "a")):
        with pytest.raises(ValueError, match="expected 3 names that differ"):
            huggingface.write_model(tmp_path, base.config, base.weights, labels=labels)


@pytest.mark.slow
def test_a_bert_without_a_classifier_gets_one_for_the_datas_classes(minilora, tmp_path):
    folder = plain_encoder(tmp_path / "encoder")
    base = open_base(str(folder), classes=5)
    assert base.config.classes == 5
    assert not any(name.startswith("head") for name in base.weights)
    rows = [{"text": text, "label": label} for text, label in (("a b", "x"), ("b c c", "y"))]
    path = written(
        tmp_path / "d.jsonl", *rows, {"text": "c", "label": "w"}, {"text": "a", "label": "z"}
    )
    command = (
        "train",
        "--model",
        folder,
        "--data",
        path,
        "--task",
        "classify",
        "--learning-rate",
        "0.01",
    )
    status, _, err = minilora(*command, "--max-steps", 30, "--output", "run")
    assert (status, err) == (0, "")
    losses = [line["loss"] for line in read_log(tmp_path / "run/log.jsonl")]
    assert losses[-1] < losses[0]
    assert class_names("run") == ("w", "x", "y", "z")
    status, out, _ = minilora("evaluate", "--adapter", "run", "--data", path)
    assert status == 0
    assert figures(out)["loss"] < losses[0]
    minilora("merge", "--adapter", "run", "--output", "merged")
    merged = minilora("evaluate", "--model", "merged", "--data", path)[1]
    assert printed_alike(merged, out)
    assert huggingface.read_config("merged").classes == 4
    with pytest.raises(FormatError, match="expected BertModel, DistilBertModel alone"):
        huggingface.read_encoder("merged", 4)


def test_a_classifier_of_other_classes_is_refused(minilora, tmp_path):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    path = written(tmp_path / "d.jsonl", *rows)
    command = ("train", "--model", "reference:bert", "--data", path, "--output", "run")
    status, _, err = minilora(*command)
    assert status == 2
    assert "2 classes" in err
    assert "3 in the model" in err


def test_a_base_that_stays_quantized_trains_to_the_same_bits(tmp_path):
    optional("gguf")
    from minilora.io.formats.gguf import write_model

    c = Llama(vocab=14, d=32, layers=2, heads=4, ffn=64, kv_heads=2, head_dim=8)
    W = draw_weights(c, np.random.default_rng(0), 0.3)
    write_model(
        tmp_path / "a.gguf", c, {n: w.astype(np.float32) for n, w in W.items()}, dtype=np.float16
    )
    read = data.read("task:running-sum", "lm", None, 32)
    results = []
    for quantized in (False, True):
        base = open_base(str(tmp_path / "a.gguf"), keep_quantized=quantized)
        vars(base)["tokenizer"] = WordTokenizer.of(synthetic_data.task("running-sum"))
        assert isinstance(base.weights, dict) != quantized
        plan = ExecutionPlan(gradient_checkpointing=quantized)
        run = prepare(base, read, TrainConfig(max_steps=3, dropout=0.1), plan=plan)
        *_, (state, _) = train_steps(run, TrainState(run.initial))
        results.append(state.params)
    assert results[0].keys() == results[1].keys()
    assert all(same_bits(results[0][name], w) for name, w in results[1].items())


def test_a_model_merged_into_a_gguf_file_is_the_merged_model(minilora, trained):
    optional("gguf")
    for out in ("merged", "merged.gguf"):
        assert minilora("merge", "--adapter", trained / "llama", "--output", out)[0] == 0
    folder, file = open_base("merged"), open_base("merged.gguf")
    assert all(same_bits(file.weights[name], w) for name, w in folder.weights.items())


def test_what_is_no_adapter_or_two_is_refused(tmp_path):
    with pytest.raises(FormatError, match="found no adapter's file"):
        adapter_format(tmp_path)
    for name in ("adapter_model.safetensors", "adapters.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FormatError, match=r"found adapter_model\.safetensors and"):
        adapter_format(tmp_path)


# Other libraries


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_peft_computes_what_was_trained_here(name, trained, libraries, tmp_path):
    base = open_base(f"reference:{name}", np.float64)
    folder = tmp_path / "base"
    huggingface.write_model(folder, base.config, dict(base.weights))
    model = libraries.adapted(libraries.model(folder), trained / name).double()
    adapted = open_adapted(base, str(trained / name), np.float64)
    given, _ = reference_models.vector(name)
    asked = {"input_ids": given.ids, "attention_mask": given.real.astype(int)}
    asked |= {} if given.types is None else {"token_type_ids": given.types}
    with libraries.torch.no_grad():
        found = model(**{at: libraries.torch.from_numpy(a) for at, a in asked.items()}).logits
    found = found.numpy()[given.real] if base.config.causal else found.numpy()

    def off(W, tuning):
        z, _ = logits(given, W, base.config, tuning)
        return relative_error(found.T, z[:, given.real.ravel()] if base.config.causal else z)

    figure = off(adapted.weights, adapted.tuning)
    record_worst("logits against peft, trained here", figure)
    assert figure <= GRADIENT < off(base.weights, TrainableSpec())


def test_a_shipped_classifier_is_inspected_and_gguf_has_no_place_for_it(minilora):
    status, out, err = minilora("inspect", "reference:bert")
    assert (status, err) == (0, "")
    assert re.search(r"^gguf +not possible: architecture: found bert", out, re.M)
    for words in (
        ("convert", "reference:bert", "--to", "gguf"),
        ("merge", "--adapter", "reference:bert"),
    ):
        status, _, err = minilora(*words, "--output", "b.gguf")
        assert status == 3
        assert "architecture: found bert" in err


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("kind", ["mlx", pytest.param("gguf", marks=needs("gguf"))])
def test_what_a_start_took_out_of_the_base_is_converted_too(init, kind, tmp_path):
    """PEFT takes it out again where it loads the folder; others leave the base as it is."""
    base, rng = open_base("reference:llama"), np.random.default_rng(0)
    lora = LoraConfig(r=2, lora_alpha=2, variant=init)
    W, tuning = inject(dict(base.weights), lora, base.config.linears(), rng)
    moved = {name: W[name] + W[name].dtype.type(0.1) for name in tuning.trained}
    before = {name: W[name] for name in base.config.shapes()}
    peft.write_adapter(tmp_path / "a", base.config, W | moved, tuning, lora, base=before)
    said = read_json(tmp_path / "a" / peft.CONFIG) | {"init_lora_weights": init}
    write_files(tmp_path / "a", {peft.CONFIG: lambda: pack_json(said)})
    model = open_adapted(base, str(tmp_path / "a"))
    out = str(tmp_path / ("b.gguf" if kind == "gguf" else "b"))
    assert f"what {init} took out of the base" in write_adapter(out, FORMATS[kind], model)[0]
    other = open_adapted(base, out)
    wanted, found = (merge({**one.weights}, one.tuning) for one in (model, other))
    # Roundings of the residual, of the scale in the file, and of the two sums of r and 2r products.
    k, u = 4 * lora.r + 7, np.finfo(np.float32).eps / 2
    for at in model.tuning.scale:
        name = f"{at}.weight"
        off = abs(found[name].astype(float) - wanted[name])
        assert (off <= k * u / (1 - k * u) * (moduli(model, at) + moduli(other, at))).all()
        assert abs(wanted[name] - base.weights[name]).max() > 0.01


def moduli(model, at):
    """|W| + |s| |B| |A|, of which W' = W + s B A has its roundings."""
    A, B = (abs(model.changed[f"{at}.{part}"].astype(float)) for part in "AB")
    return abs(model.weights[f"{at}.weight"]) + abs(model.tuning.scale[at]) * (B @ A)


@pytest.mark.parametrize("kind", ["mlx", pytest.param("gguf", marks=needs("gguf"))])
def test_trained_rows_of_a_table_are_not_lost_in_converting(kind, tmp_path):
    base, rng = open_base("reference:llama"), np.random.default_rng(0)
    lora = LoraConfig(
        r=2, lora_alpha=2, target_modules=["q"], trainable_token_indices={"embed": [3, 4]}
    )
    W, tuning = inject(dict(base.weights), lora, base.config.linears(), rng)
    for change, refused in ((0, False), (1, True)):
        E = np.array(base.weights["embed.weight"])
        E[[3, 4]] += change
        peft.write_adapter(tmp_path / "a", base.config, W | {"embed.weight": E}, tuning, lora)
        model = open_adapted(base, str(tmp_path / "a"))
        out = tmp_path / f"{change}.{kind}"
        if refused:
            with pytest.raises(FormatError, match=r"weights: found embed\.weight"):
                write_adapter(out, FORMATS[kind], model)
        else:
            write_adapter(out, FORMATS[kind], model)
        assert out.exists() is not refused


def test_a_model_folder_keeps_its_tokenizer_where_the_disk_is_full(monkeypatch, tmp_path):
    base = open_base("reference:llama")
    copy_tokenizer(base, tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def full(path, data):
        with path.open("wb") as file:
            file.write(data[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        copy_tokenizer(base, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert not [*tmp_path.glob(".*")]


@pytest.mark.parametrize(
    "option", ["--rouge", "--seed", "--max-new-tokens", "--batch-tokens", "--max-length"]
)
def test_evaluate_refuses_a_number_below_what_makes_sense(option, minilora):
    status, _, err = minilora("evaluate", option, "-1")
    assert status == 2
    assert f"{option} -1: expected" in err


@pytest.mark.parametrize("at", ["head", "embed"])
def test_a_tie_that_an_adapter_ends_is_merged_as_two_weights(at, minilora, tmp_path):
    rng = np.random.default_rng(0)
    c = Llama(vocab=9, d=8, layers=1, heads=2, ffn=6, kv_heads=1, head_dim=4, tied=True)
    base = {name: w.astype(np.float32) for name, w in draw_weights(c, rng).items()}
    huggingface.write_model(tmp_path / "m", c, base, kept={"eos_token_id": 7})
    lora = LoraConfig(r=2, lora_alpha=2, target_modules=[at])
    W, tuning = inject(base, lora, c.matrices(), rng)
    W[f"{at}.B"] = rng.standard_normal(W[f"{at}.B"].shape).astype(np.float32)
    peft.write_adapter(tmp_path / "a", c, W, tuning, lora)
    status, _, err = minilora("merge", "--model", "m", "--adapter", "a", "--output", "out")
    assert (status, err) == (0, "")
    c_read, merged = huggingface.read_model(tmp_path / "out")
    assert c_read == replace(c, tied=False)
    wanted = merge(W, tuning)
    assert all(same_bits(merged[name], wanted[name]) for name in merged)
    assert read_json(tmp_path / "out/config.json")["eos_token_id"] == 7
    c = GPT2(vocab=9, d=8, layers=1, heads=2, ffn=6, positions=5)
    base = {name: w.astype(np.float32) for name, w in draw_weights(c, rng).items()}
    huggingface.write_model(tmp_path / "g", c, base)
    W, tuning = inject(base, lora, c.matrices(), rng)
    W[f"{at}.B"] += 1
    peft.write_adapter(tmp_path / "b", c, W, tuning, lora)
    status, _, err = minilora("merge", "--model", "g", "--adapter", "b", "--output", "none")
    assert status == 2
    assert "merging gives a GPT2" in err


@pytest.mark.slow
def test_a_changed_model_keeps_what_generation_needs_of_its_settings(minilora, tmp_path):
    base = open_base("reference:llama")
    kept = {"eos_token_id": [3, 4], "bos_token_id": 1, "max_position_embeddings": 99}
    huggingface.write_model(tmp_path / "m", base.config, base.weights, kept=kept)
    copy_tokenizer(base, tmp_path / "m")
    data = ("--data", "task:running-difference", "--max-steps", "1")
    assert minilora("train", "--model", "m", *data, "--output", "full", "--full")[0] == 0
    assert minilora("train", "--model", "m", *data, "--output", "run")[0] == 0
    assert minilora("merge", "--adapter", "run", "--output", "merged")[0] == 0
    for folder in ("full", "merged"):
        said = read_json(tmp_path / folder / "config.json")
        assert {name: said[name] for name in kept} == kept
        assert said["pad_token_id"] is None


def test_a_classifiers_head_is_no_target(minilora):
    status, _, err = minilora(
        "train", "--model", "reference:bert", "--target-modules", "head,q", "--output", "run"
    )
    assert status == 2
    assert "the head" in err


def test_a_second_signal_does_not_cut_short_the_saving():
    import signal

    from minilora.cli.progress import sigterm_interrupts

    seen = []
    with sigterm_interrupts():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            seen.append("saved")
    assert seen == ["saved"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_classifiers_labels_are_its_own_numbers_whatever_the_data_has(minilora, tmp_path):
    rows = [{"text": "a b", "label": 1}, {"text": "b c c", "label": 2}, {"text": "c a", "label": 1}]
    data = ("--task", "classify", "--split", "train", "--model", "reference:bert")
    path = written(tmp_path / "some.jsonl", *rows)
    status, out, err = minilora("evaluate", "--data", path, *data)
    assert (status, err) == (0, "")
    every = written(tmp_path / "all.jsonl", *rows, {"text": "b b", "label": 0})
    with_all = figures(minilora("evaluate", "--data", every, *data)[1])
    alone = written(tmp_path / "one.jsonl", {"text": "b b", "label": 0})
    without = figures(minilora("evaluate", "--data", alone, *data)[1])
    some = figures(out)["loss"]
    assert abs(4 * with_all["loss"] - 3 * some - without["loss"]) < 4 * 1e-4  # of 4 digits each


def test_an_encoder_without_a_classifier_is_not_judged(minilora, tmp_path):
    folder = plain_encoder(tmp_path / "encoder")
    path = written(tmp_path / "d.jsonl", {"text": "a b", "label": 0}, {"text": "b", "label": 1})
    status, _, err = minilora("evaluate", "--model", folder, "--data", path, "--split", "train")
    assert status == 2
    assert "--task classify" in err


def test_an_adapter_is_judged_by_what_it_was_trained_on(minilora, trained, tmp_path):
    asked = ("train", "--data", "task:running-sum", "--max-steps", "2", "--output", "run")
    assert minilora(*asked)[0] == 0
    assert minilora("evaluate", "--adapter", "run")[1].startswith("task:running-sum, ")


@pytest.mark.parametrize("command", ["merge", "convert"])
def test_what_is_read_is_not_written_over(command, minilora, trained, tmp_path):
    run = trained / "llama"
    for out, what in ((run, "the adapter itself"), ("reference", None)):
        words = ["--adapter", run] if command == "merge" else [run, "--to", "peft"]
        if what is None:
            minilora("train", "--max-steps", "1", "--output", out)
            what = "the folder of a run"
        before = {path.name: path.read_bytes() for path in Path(out).iterdir() if path.is_file()}
        status, _, err = minilora(command, *words, "--output", out)
        assert status == 2
        assert what in err
        now = {path.name: path.read_bytes() for path in Path(out).iterdir() if path.is_file()}
        assert now == before


def test_text_is_written_for_as_long_as_there_are_positions_unless_told(minilora):
    for words, status in (((), 0), (("--max-new-tokens", "64"), 2)):
        got, out, err = minilora("generate", "--model", "reference:gpt2", "--prompt", "( [", *words)
        assert got == status
        assert out.startswith("( [")
        assert ("20 positions" in err) == bool(status)


def test_a_model_that_the_adapter_was_not_trained_on_is_told(minilora, trained, tmp_path):
    c, W = huggingface.read_model(reference_models.folder() / "llama/base")
    huggingface.write_model(tmp_path / "other", c, W | {"norm.weight": W["norm.weight"] + 1})
    adapter = str(trained / "llama")
    for options, told in (
        ((), False),
        (("--model", "reference:llama"), False),
        (("--model", "other"), True),
    ):
        status, _, err = minilora("inspect", adapter, *options)
        assert status == 0
        assert ("was trained on reference:llama" in err) is told


def test_the_base_of_loftq_is_its_own(minilora):
    assert minilora("train", "--output", "run", "--max-steps", "1", "--variant", "loftq")[0] == 0
    assert minilora("inspect", "run")[::2] == (0, "")


def test_merge_leaves_a_folder_that_holds_files_as_it_is(minilora, trained, tmp_path):
    """Those of another model would be lost, or read as a part of what is merged."""
    model = tmp_path / "model"
    shutil.copytree(reference_models.folder() / "gpt2/base", model)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    command = ("merge", "--adapter", trained / "llama", "--output")
    status, _, err = minilora(*command, "model")
    assert status == 2
    assert "--output model: found chat_template.jinja, config.json" in err
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    (tmp_path / "empty").mkdir()
    assert minilora(*command, "empty")[0] == 0


def test_no_adapter_is_written_beside_one_of_the_other_format(minilora, trained, tmp_path):
    for one, other in (("mlx", "peft"), ("peft", "mlx")):
        command = ("convert", trained / "llama", "--output", f"{one}-first", "--to")
        assert minilora(*command, one)[0] == 0
        folder = tmp_path / f"{one}-first"
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        status, _, err = minilora(*command, other)
        assert status == 3
        assert "remove them first" in err
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_a_folder_may_be_called_as_a_file_is(minilora, trained):
    run = ("train", "--max-steps", 1, "--output")
    assert minilora(*run, "run.gguf")[0] == 0
    assert minilora("inspect", "run.gguf")[0] == 0
    assert minilora(*run, "full.npz", "--full")[0] == 0
    assert minilora("merge", "--adapter", trained / "llama", "--output", "merged.npz")[0] == 0
    for model in ("full.npz", "merged.npz"):
        assert (
            minilora("generate", "--model", model, "--prompt", "3", "--max-new-tokens", 2)[0] == 0
        )
    assert minilora("train", "--max-steps", 1, "--model", "merged.npz",
                    "--data", "task:running-sum", "--output", "again.npz",
                    "--full")[0] == 0  # fmt: skip
    assert open_base("again.npz").tokenizer.encode("3")


def test_a_disk_that_is_full_is_told_with_the_file(minilora, trained, monkeypatch, tmp_path):
    def full(path, data):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(Path, "write_bytes", full)
    status, _, err = minilora("merge", "--adapter", trained / "llama", "--output", "merged")
    assert status == 1
    assert re.search(r"minilora merge: merged/\S+: File too large", err)
    assert not (tmp_path / "merged").exists()


# What a hostile user met


@pytest.mark.slow
def test_a_run_that_diverges_in_its_last_step_is_no_success(minilora, tmp_path):
    """Found in validation, or where there is none in what it was trained on."""
    row = {"prompt": "3", "completion": " 8"}
    written(tmp_path / "d.jsonl", *[row] * 10)
    command = (
        "train",
        "--data",
        "d.jsonl",
        "--max-steps",
        1,
        "--learning-rate",
        "1e30",
        "--output",
    )
    for out, *options, found in (
        ("run", "--val-fraction", "0.5", "the loss in validation is nan"),
        ("other", "the loss is nan, at first it was"),
    ):
        status, _, err = minilora(*command, out, *options)
        assert status == 1
        assert f"minilora train: diverged at step 1: {found}" in err
        assert "Warning" not in err
        assert "step 0 of 1; " in err
        assert (
            "--learning-rate 0.001, " in err
        )  # and not a fourth of what is a thousand times too much
        assert (tmp_path / out / "log.jsonl").read_text() == ""
        again = minilora(*command, out, *options, "--overwrite", "--learning-rate", "0.01")
        assert again[0] == 0
        for line in (tmp_path / out / "log.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)


def test_where_the_scale_is_too_large_a_smaller_one_is_advised(minilora):
    status, _, err = minilora("train", "--output", "run", "--max-steps", 2, "--alpha", "1e300")
    assert status == 1
    assert "is 1.25e+299" in err
    assert "--alpha, such as 16" in err


def beyond(folder):
    """A model whose weights are numbers, and whose loss is none."""
    c, W = huggingface.read_model(reference_models.folder() / "llama/base")
    huggingface.write_model(folder, c, W | {"norm.weight": np.full_like(W["norm.weight"], 3e38)})
    copy_tokenizer(open_base("reference:llama"), folder)
    return folder


def test_a_loss_that_is_none_is_no_measure(minilora, tmp_path):
    model = beyond(tmp_path / "model")
    command = ("evaluate", "--model", model, "--data", "task:running-sum", "--json", "f.json")
    status, out, err = minilora(*command)
    assert (status, out) == (1, "")
    assert "task:running-sum, test: the loss is nan" in err
    assert "Warning" not in err
    assert not (tmp_path / "f.json").exists()
    status, _, err = minilora("generate", "--model", model, "--prompt", "3")
    assert status == 2
    assert "Warning" not in err


def test_no_number_of_json_is_infinite(minilora, monkeypatch, tmp_path):
    """A perplexity may be: the loss is measured here, and its exponential is none."""
    measured = evaluate.measure
    huge = lambda *given: replace(measured(*given), nll=1e9)  # noqa: E731
    monkeypatch.setattr(evaluate, "measure", huge)
    status, out, _ = minilora("evaluate", "--json", "f.json")
    assert status == 0
    assert "perplexity  inf" in out
    assert read_json(tmp_path / "f.json")["perplexity"] is None


@pytest.mark.slow
def test_a_run_is_judged_by_the_lines_that_it_held_out(minilora, tmp_path):
    digits = range(10)
    rows = [{"prompt": f"{a}", "completion": f" {b}"} for a in digits for b in digits]
    path = written(tmp_path / "d.jsonl", *rows)
    command = (
        "train",
        "--data",
        path,
        "--max-steps",
        2,
        "--val-fraction",
        "0.1",
        "--seed",
        3,
        "--max-length",
        9,
    )
    status, out, _ = minilora(*command, "--output", "run")
    assert status == 0
    loss = re.search(r"loss \S+, (\S+) in validation", out)[1]
    for more in ((), ("--split", "valid"), ("--data", path)):
        status, out, _ = minilora("evaluate", "--adapter", "run", *more)
        assert status == 0
        assert f"{path}, valid: 10 examples, 20 labels\nloss        {loss}\n" in out
    assert "train: 90 examples" in minilora("evaluate", "--adapter", "run", "--split", "train")[1]
    for option, was in (("--seed", 3), ("--max-length", 9)):
        status, _, err = minilora("evaluate", "--adapter", "run", option, 8)
        assert status == 2
        assert f"{option} 8: expected {was}," in err
    other = written(tmp_path / "e.jsonl", *rows)
    assert "train: 100 examples" in minilora("evaluate", "--adapter", "run", "--data", other)[1]
    written(path, *rows[1:])
    status, _, err = minilora("evaluate", "--adapter", "run")
    assert status == 3
    assert "d.jsonl: file:" in err


def test_what_is_cut_is_counted_of_the_examples_to_train_on(minilora, tmp_path):
    long = [{"prompt": "1", "completion": " 2 3 4 5 6"} for _ in range(10)]
    (tmp_path / "d").mkdir()
    written(tmp_path / "d/train.jsonl", {"prompt": "1", "completion": " 2"}, long[0])
    written(tmp_path / "d/valid.jsonl", *long)
    command = ("train", "--data", "d", "--max-steps", 1, "--max-length", 5, "--output", "run")
    assert "2 examples, 1 of them cut to 5 tokens, 10 " in minilora(*command)[1]


DAMAGES = [
    *[{part: value} for part in ("settings", "model", "data") for value in ([], None, "text")],
    *[{"data": {"classes": value}} for value in (5, None, "ab", [1, 2])],
    *[{"data": {"name": 5}}, {"settings": {"val_fraction": "x"}}, {"settings": {"seed": None}}],
]


@pytest.mark.parametrize("damage", others_slow(DAMAGES, *DAMAGES[::5]), ids=json.dumps)
def test_a_damaged_run_is_told_and_may_be_replaced(damage, minilora, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "llama", run)
    (run / "run.json").write_text(json.dumps(read_json(run / "run.json") | damage))
    train = ("train", "--output", "run", "--max-steps", 1)
    for command in (("evaluate", "--adapter", "run"), ("inspect", "run"), (*train, "--resume")):
        status, _, err = minilora(*command)
        assert status == 3
        assert "run.json: " in err
        assert "it is damaged" in err
    assert minilora(*train, "--overwrite")[0] == 0


def test_memory_that_is_not_there_is_told(minilora, monkeypatch):
    def eats(*arguments, **settings):
        raise MemoryError

    monkeypatch.setattr(data, "read", eats)
    status, _, err = minilora("train", "--output", "run")
    assert status == 1
    assert "not enough memory" in err


@pytest.mark.slow
@pytest.mark.parametrize("streams", others_slow([">&-", "2>&-", ">&- 2>&-"], ">&-"))
def test_a_stream_that_is_closed_ends_no_command(streams, tmp_path):
    command = f"{sys.executable} -m minilora train --output run --max-steps 1 {streams}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / peft.WEIGHTS).is_file()


@pytest.mark.parametrize("name", ["model", "adapter", "data", "json", "split"])
def test_an_option_without_its_value_is_refused(name, minilora):
    status, _, err = minilora("evaluate", f"--{name}", "")
    assert status == 2
    assert f"--{name} '': expected a value" in err


def test_a_prompt_may_be_empty_and_is_text(minilora):
    assert minilora("generate", "--prompt", "", "--max-new-tokens", 2)[0] == 0
    status, _, err = minilora("generate", "--prompt", "3 \udcff")
    assert status == 2
    assert "--prompt '3 \\udcff': expected a text" in err


def test_lora_plus_is_what_was_given(minilora):
    command = ("train", "--variant", "lora+", "--max-steps", 1, "--output")
    for out, options, ratio in (("a", (), 16.0), ("b", ("--loraplus-lr-ratio", "1"), 1.0)):
        assert minilora(*command, out, *options)[0] == 0
        said = read_json(f"{out}/run.json")["settings"]["loraplus_lr_ratio"]
        assert TrainConfig(variant="lora+", loraplus_lr_ratio=said).lr_ratio == ratio
    assert TrainConfig().lr_ratio == 1.0


def test_the_expression_of_the_help_hits_one_layer(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    (example,) = re.findall(r"such as '(\S+)'", " ".join(capsys.readouterr().out.split()))
    assert re.fullmatch(example, "layers.0.q")
    assert not re.fullmatch(example.replace("0", "1"), "layers.10.q")


def test_answers_are_as_long_as_there_are_positions(minilora, tmp_path):
    optional("rouge_score")
    written(tmp_path / "d.jsonl", {"prompt": "( [", "completion": " ] )"})
    command = ("evaluate", "--rouge", 1, "--data", "d.jsonl", "--model")
    status, out, err = minilora(*command, "reference:gpt2")
    assert (status, err) == (0, "")
    assert "rouge1" in out
    status, out, err = minilora(*command, "reference:bert")
    assert (status, out) == (2, "")
    assert "--rouge: a Bert" in err


def test_evaluate_says_before_it_measures_that_it_cannot_write(minilora):
    status, out, err = minilora("evaluate", "--json", ".")
    assert (status, out) == (2, "")
    assert "--json: cannot write ." in err


def test_an_alora_is_shown_and_told_in_words(minilora, tmp_path):
    """A file that PEFT writes differs from LoRA's by the setting that names the tokens."""
    shutil.copytree(reference_models.folder() / "llama/adapter", tmp_path / "alora")
    said = read_json("alora/adapter_config.json")
    plain = {"modules_to_save": None, "use_rslora": False, "alora_invocation_tokens": [3, 4]}
    (tmp_path / "alora/adapter_config.json").write_bytes(pack_json(said | plain))
    model = ("--model", "reference:llama")
    status, out, err = minilora("inspect", "alora", *model)
    assert (status, err) == (0, "")
    assert re.search(r"^layers\.0\.\w+ +alora ", out, re.M)
    assert "the tokens 3 4" in out
    for command in (
        ("evaluate", "--adapter", "alora", "--data", "task:running-sum"),
        ("generate", "--adapter", "alora", "--prompt", "3"),
    ):
        status, out, err = minilora(*command, *model)
        assert (status, out) == (2, "")
        assert "found an aLoRA" in err
    status, _, err = minilora("convert", "alora", "--to", "mlx", "--output", "m", *model)
    assert status == 3
    assert "found alora" in err


def test_an_adapter_of_more_layers_is_told_in_words(minilora, tmp_path):
    shutil.copytree(reference_models.folder() / "llama/adapter", tmp_path / "deep")
    said = read_json("deep/adapter_config.json")
    plain = {"modules_to_save": None, "layer_replication": [[0, 2], [1, 2]]}
    (tmp_path / "deep/adapter_config.json").write_bytes(pack_json(said | plain))
    status, _, err = minilora("inspect", "deep", "--model", "reference:llama")
    assert status == 3
    assert "merge it with PEFT" in err


def test_a_dtype_is_named_as_the_option_that_it_is(minilora, trained):
    run = trained / "llama"
    wide = ("--dtype", "float64", "--output")
    status, _, err = minilora("convert", run, "--to", "mlx", *wide, "m")
    assert status == 3
    assert "--dtype float32" in err
    optional("gguf")
    status, out, _ = minilora("merge", "--adapter", run, *wide, "m.gguf")
    assert status == 0
    assert "m.gguf: in float32" in out


def test_a_file_is_no_adapters_folder(minilora, trained, tmp_path):
    path = written(tmp_path / "d.jsonl", {"text": "1"})
    for file in (path, trained / "llama" / peft.WEIGHTS):
        status, _, err = minilora("evaluate", "--adapter", file)
        assert status == 3
        assert "found another file" in err


def test_a_run_with_more_steps_than_asked_for_says_so(minilora):
    command = ("train", "--output", "run", "--max-steps")
    assert minilora(*command, 4)[0] == 0
    status, out, _ = minilora(*command, 2, "--resume", "--accept-changes")
    assert status == 0
    assert "run is at step 4 of 2" in out


def test_words_that_touch_are_taken_apart_at_the_border(minilora, tmp_path):
    written(tmp_path / "d.jsonl", {"prompt": "1 2", "completion": "3 4"})
    command = ("train", "--data", "d.jsonl", "--show-batch", "--output", "run")
    status, out, _ = minilora(*command)
    assert status == 0
    words = re.findall(r"(given|predict) +\d+  “(.)”$", out, re.M)
    assert words == [("given", "1"), ("given", "2"), ("predict", "3"), ("predict", "4")]
    written(tmp_path / "d.jsonl", {"prompt": "1 2", "completion": "3 99"})
    status, _, err = minilora(*command)
    assert status == 3
    assert "the word '99'" in err


def test_more_layers_than_tensors_are_told_before_a_name_is_made_for_each(tmp_path):
    folder = plain_encoder(tmp_path / "encoder")
    said = read_json(folder / "config.json")
    (folder / "config.json").write_bytes(pack_json(said | {"num_hidden_layers": 10**12}))
    with pytest.raises(FormatError, match=r"expected 1000000000000 layers of several tensors"):
        open_base(str(folder))
