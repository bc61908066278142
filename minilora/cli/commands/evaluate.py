"""``minilora evaluate``: how good a model is on examples that it has not seen."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from minilora.cli.commands import computing_model
from minilora.cli.commands.train import add_data, counted
from minilora.cli.console import OK, say
from minilora.cli.options import add_command, add_model, at_least, kinds_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from minilora.io.loading import AdaptedModel, Base
    from minilora.training.example import Data, Example

MAX_LENGTH = 512
"""The default of ``--max-length``, unless the run's own data is read again."""

READING = {"max_length": MAX_LENGTH, "seed": 0, "val_fraction": 0.0, "skip_invalid": False}
"""The defaults of how examples are read."""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "evaluate",
        "measure loss, perplexity, accuracy and ROUGE of a model",
        "Print the loss, the perplexity and the accuracy of a model, with or without an adapter, "
        "on examples; with --rouge, also compare generated answers with the expected ones.",
        _run,
    )
    option = parser.add_argument
    add_model(option)
    add_data(option)
    whole, _, flag = kinds_of(option)
    option("--split", metavar="SPLIT", help="test, valid or train (default: the first that exists)")
    whole("--max-length", help=f"maximum tokens per example (default: {MAX_LENGTH})")
    whole("--batch-tokens", default=1024, help="maximum tokens per batch")
    whole("--seed", help="seed of the examples of task:NAME (default: 0)")
    flag("--skip-invalid", help="skip invalid lines instead of stopping")
    whole("--rouge", default=0, help="generate answers to N examples")
    whole("--max-new-tokens", default=128, help="maximum tokens per generated answer")
    option("--json", metavar="FILE", help="write the figures as JSON")


def _run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from minilora.io.atomic import why_not_writable, write_files
    from minilora.io.files import pack_json
    from minilora.io.loading import run_of
    from minilora.training.example import SPLITS

    if arguments.split and arguments.split not in SPLITS:
        raise ValueError(f"--split {arguments.split}: expected one of {', '.join(SPLITS)}")
    if arguments.json and (error := why_not_writable(arguments.json)):
        raise ValueError(f"--json: cannot write {error}")
    at_least(arguments, max_length=2, batch_tokens=1, seed=0, rouge=0, max_new_tokens=1)
    model = computing_model(arguments)
    _check_model(arguments, model)
    path, data = _read(arguments, model.base, run_of(arguments.adapter))
    split, examples = _chosen_split(arguments, path, data)
    figures = {"examples": len(examples), "split": split}
    figures |= _measured(arguments, model, examples, f"{path}, {split}")
    if arguments.rouge:
        figures |= _rouge(arguments, model, examples[: arguments.rouge])
    if arguments.json:
        file = Path(arguments.json)
        write_files(file.parent, {file.name: lambda: pack_json(figures)})
    return OK


def _check_model(arguments: argparse.Namespace, model: AdaptedModel) -> None:
    """Errors: ValueError for a model that cannot be evaluated, or not with ``--rouge``."""
    c, name = model.base.config, model.base.name
    if not c.causal and "head.weight" not in model.weights:
        raise ValueError(
            f"{name}: found an encoder without a classifier's head: train one with --task classify,"
            " and give it as --adapter"
        )
    if arguments.rouge and not c.causal:
        raise ValueError(
            f"--rouge: a {type(c).__name__} generates no text: expected a language model"
        )


def _read(arguments: argparse.Namespace, base: Base, run: Mapping[str, Any]) -> tuple[str, Data]:
    """The data and where it is; by default those that the adapter was trained on.

    Errors: FormatError if the run held out a part of a file that has changed since.
    """
    from minilora.cli.commands.train import data_and_task
    from minilora.io.errors import FormatError
    from minilora.io.loading import class_names
    from minilora.training.data import read

    path, task = data_and_task(
        base,
        arguments.data or run.get("data", {}).get("name"),
        arguments.task or run.get("settings", {}).get("task"),
    )
    reading = _reading(arguments, path, run)
    # The classes of a head without names are numbers.
    numbers = tuple(map(str, range(getattr(base.config, "classes", 0)))) or None
    trained = class_names(arguments.adapter)
    data = read(
        path, task, base.tokenizer, **reading,
        classes=trained or base.classes or numbers, numeric_labels=not trained,
        date=arguments.date or run.get("data", {}).get("date"),
    )  # fmt: skip
    if reading["val_fraction"] and data.digest != run["data"].get("digest"):
        expected = "the file of the training run, which held out a part of it"
        remedy = "restore the file, or rename it and name it by --data"
        raise FormatError(path, "file", "other contents", expected, remedy)
    return path, data


def _reading(arguments: argparse.Namespace, path: str, run: Mapping[str, Any]) -> dict[str, Any]:
    """How the examples are read: as the run did, if it held out a part of this file.

    Errors: ValueError for an option that would hold out other lines.
    """
    defaults = dict(READING)
    settings, trained_on = run.get("settings", {}), run.get("data", {}).get("name")
    same = trained_on is not None and os.path.realpath(path) == os.path.realpath(trained_on)
    if same and settings.get("val_fraction"):
        defaults |= {name: settings[name] for name in READING if name in settings}
        for name in ("max_length", "seed"):
            value = getattr(arguments, name)
            if value not in (None, defaults[name]):
                raise ValueError(
                    f"--{name.replace('_', '-')} {value}: expected {defaults[name]}, as in "
                    "training: with another value other lines would be held out"
                )
    values = {name: getattr(arguments, name) for name in ("max_length", "seed")}
    values["skip_invalid"] = arguments.skip_invalid or None
    return defaults | {name: value for name, value in values.items() if value is not None}


def _chosen_split(
    arguments: argparse.Namespace, path: str, data: Data
) -> tuple[str, Sequence[Example]]:
    """The first split that has examples, or the one that is asked for."""
    splits = [arguments.split] if arguments.split else ["test", "valid", "train"]
    for split in splits:
        if getattr(data, split):
            return split, getattr(data, split)
    raise ValueError(f"{path}: no examples in {' or '.join(splits)}")


def _measured(
    arguments: argparse.Namespace, model: AdaptedModel, examples: Sequence[Example], name: str
) -> dict[str, Any]:
    """The figures of the examples, which are printed too."""
    import math

    from minilora.io.files import NOT_FINITE
    from minilora.training.batching import batches_of
    from minilora.training.evaluate import measure
    from minilora.training.metrics import accuracy, perplexity

    base = model.base
    batches = batches_of(examples, arguments.batch_tokens, base.tokenizer.pad)
    result = measure(batches, model.weights, base.config, model.tuning)
    assert result.right is not None
    if not math.isfinite(result.loss):
        raise ArithmeticError(f"{name}: the loss is {result.loss}: {NOT_FINITE}")
    share, low, high, _ = accuracy(result.right)
    p = perplexity(result.loss)
    say(
        f"{name}: {counted(examples)}, {result.count} labels\n"
        f"loss        {result.loss:.4f}\nperplexity  {p:.4f}\n"
        f"accuracy    {share:.4f}  ({low:.4f} to {high:.4f} at 95%)\n"
    )
    return {
        "labels": result.count,
        "loss": result.loss,
        "perplexity": p if math.isfinite(p) else None,  # JSON has no infinity
        "accuracy": share,
        "accuracy_interval": [low, high],
    }


def _rouge(
    arguments: argparse.Namespace, model: AdaptedModel, examples: Sequence[Example]
) -> dict[str, float]:
    """ROUGE of generated answers, which is printed too."""
    from minilora.training.evaluate import answers
    from minilora.training.metrics import rouge

    base = model.base
    generated, expected = answers(
        examples, model.weights, base.config, model.tuning, base.tokenizer, arguments.max_new_tokens
    )
    scores = rouge(generated, expected)
    for name, value in scores.items():
        say(f"{name:10}  {value:.4f}\n")
    return scores
