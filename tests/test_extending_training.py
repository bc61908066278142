"""The recipes for commands, schedules and data: each adds one value that a module exports."""

import json
import sys
import types
from dataclasses import replace

import pytest

from minilora.cli import commands
from minilora.cli.console import OK, say
from minilora.cli.main import main
from minilora.cli.options import add_command
from minilora.io.loading import open_base
from minilora.spec import optim
from minilora.training import line_shapes
from minilora.training.checkpoints import TrainState
from minilora.training.config import TrainConfig
from minilora.training.data import read
from minilora.training.encoding import Encoded, Encoder
from minilora.training.line_shapes import Row
from minilora.training.loop import train_steps
from minilora.training.run import prepare

# A command: its module, and its name.


def add(parsers):
    parser = add_command(parsers, "toy", "print a word", "Print a word.", run)
    parser.add_argument("--word", default="toy", metavar="W", help="the word")


def run(arguments):
    say(f"{arguments.word}\n")
    return OK


def test_a_command_is_a_module_and_a_name(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(["toy"])
    module = types.ModuleType("minilora.cli.commands.toy")
    module.add = add
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(commands, "NAMES", (*commands.NAMES, "toy"))
    capsys.readouterr()
    assert main(["toy", "--word", "new"]) == OK
    assert capsys.readouterr().out == "new\n"
    assert main([]) == 2
    assert "print a word" in capsys.readouterr().err


# A schedule: an entry in SCHEDULES.


def rates(kind):
    """The learning rates of four steps."""
    base = open_base("reference:llama")
    data = read("task:running-difference", "lm", base.tokenizer, 32)
    data = replace(data, train=data.train[:40])
    config = TrainConfig(lr_scheduler=kind, learning_rate=1e-3, max_steps=4, batch_tokens=128)
    toy = prepare(base, data, config)
    return [record.learning_rate for _, record in train_steps(toy, TrainState(toy.initial))]


def test_a_schedule_is_an_entry(monkeypatch):
    with pytest.raises(ValueError, match="toy"):
        TrainConfig(lr_scheduler="toy")
    monkeypatch.setattr(optim, "SCHEDULES", {**optim.SCHEDULES, "toy": lambda q: 1 - q * q})
    assert rates("toy") == [1e-3 * (1 - q * q) for q in (0, 0.25, 0.5, 0.75)]
    assert rates("toy") != rates("linear")


# A shape of lines: an entry in SHAPES.


def question(encoder: Encoder, row: Row) -> Encoded:
    return encoder.example(*encoder.completion(row["question"], row["answer"]))


def test_a_shape_of_lines_is_an_entry(monkeypatch, tmp_path):
    tokenizer = open_base("reference:llama").tokenizer
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"question": "3 4", "answer": " 7"}) + "\n")
    with pytest.raises(ValueError, match="line 1"):
        read(path, "lm", tokenizer, 32)
    shapes = {**line_shapes.SHAPES["lm"], ("question", "answer"): question}
    monkeypatch.setitem(line_shapes.SHAPES, "lm", shapes)
    (example,) = read(path, "lm", tokenizer, 32).train
    prompt, answer = example.prompt_and_answer
    assert tokenizer.decode(answer.tolist()).strip().startswith("7")
    assert len(prompt) + len(answer) == len(example.ids)
