"""``minilora evaluate``: how good a model is on examples that it has not seen."""

from __future__ import annotations

import argparse
import os
from typing import Any

from minilora.cli.commands import computing_model
from minilora.cli.console import HOLDS, add_command, add_model, at_least, say

LENGTH = 512
"""The most tokens of an example, unless it is said or a run's own data is read again."""


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "evaluate",
        "loss, perplexity, accuracy and ROUGE of a model",
        "Prints the loss, the perplexity and the accuracy of a model, with an adapter or without, "
        "on examples; and with --rouge, how near the texts that it writes are to those wanted.",
        _run,
    )
    option = parser.add_argument
    add_model(option)
    option("--data", metavar="D", help="JSON lines, a folder of train/valid/test, text, task:NAME")
    option("--task", metavar="TASK", help="lm (default), chat, summarize or classify")
    option("--split", metavar="SPLIT", help="test, valid or train (default: the first there is)")
    option(
        "--max-length", type=int, metavar="N", help=f"most tokens of an example (default: {LENGTH})"
    )
    option("--batch-tokens", type=int, default=1024, metavar="N", help="at a time")
    option("--seed", type=int, metavar="N", help="of the examples of task:NAME (default: 0)")
    option("--skip-invalid", action="store_true", help="leave out lines that cannot be used")
    option("--rouge", type=int, default=0, metavar="N", help="write answers to N examples")
    option(
        "--max-new-tokens",
        type=int,
        default=128,
        metavar="N",
        help="most of an answer, if they fit",
    )
    option("--json", metavar="FILE", help="write the figures as JSON")


def _run(arguments: argparse.Namespace) -> int:
    import math
    from pathlib import Path

    from minilora.cli.commands.train import data_of
    from minilora.io.files import NOT_FINITE, FormatError, pack_json, write_files
    from minilora.io.loading import class_names, run_of
    from minilora.training import data
    from minilora.training.evaluate import measure
    from minilora.training.metrics import accuracy, perplexity
    from minilora.training.train import batches_of
    from minilora.verify.report.report import writable

    if arguments.split and arguments.split not in data.SPLITS:
        raise ValueError(f"--split {arguments.split}: expected one of {data.SPLITS}")
    if arguments.json and (why := writable(arguments.json)):
        raise ValueError(f"--json: cannot write {why}")
    at_least(arguments, max_length=2, batch_tokens=1, seed=0, rouge=0, max_new_tokens=1)
    model = computing_model(arguments)
    base = model.base
    if not base.config.causal and "head.weight" not in model.weights:
        expected = "one: train it with --task classify, and give the --adapter"
        raise ValueError(f"{base.name}: an encoder without a classifier; expected {expected}")
    if arguments.rouge and not base.config.causal:
        name = type(base.config).__name__
        raise ValueError(f"--rouge: a {name} writes no text; expected a language model")
    run = run_of(arguments.adapter)  # what it was trained on is what it is judged by, if unasked
    path, task = data_of(
        base,
        arguments.data or run.get("data", {}).get("name"),
        arguments.task or run.get("settings", {}).get("task"),
    )
    reading = _as_divided(arguments, path, run)
    # A head without names for its classes has their numbers.
    numbers = tuple(map(str, range(getattr(base.config, "classes", 0)))) or None
    learned = class_names(arguments.adapter)
    read = data.read(
        path, task, base.tokenizer, **reading,
        classes=learned or base.classes or numbers, by_place=not learned,
    )  # fmt: skip
    if reading["val_fraction"] and read.digest != run["data"].get("digest"):
        expected = "the file that the run was trained on, of which it held a part out"
        remedy = "give it back, or rename what is to be measured, and name it by --data"
        raise FormatError(path, "file", "another content", expected, remedy)
    order = [arguments.split] if arguments.split else ["test", "valid", "train"]
    split = next((one for one in order if getattr(read, one)), None)
    if split is None:
        raise ValueError(f"{path}: no examples in {' or '.join(order)}")
    examples = getattr(read, split)
    batches = batches_of(examples, arguments.batch_tokens, base.tokenizer.pad)
    found = measure(batches, model.weights, base.config, model.tuning)
    assert found.right is not None
    if not math.isfinite(found.loss):
        raise ArithmeticError(f"{path}, {split}: the loss is {found.loss}: {NOT_FINITE}")
    share, low, high, _ = accuracy(found.right)
    undecided = perplexity(found.loss)
    figures: dict[str, Any] = {
        "examples": len(examples),
        "split": split,
        "labels": found.count,
        "loss": found.loss,
        "perplexity": undecided if math.isfinite(undecided) else None,  # JSON has no infinity
        "accuracy": share,
        "accuracy_interval": [low, high],
    }
    say(
        f"{path}, {split}: {len(examples)} examples, {found.count} labels\n"
        f"loss        {found.loss:.4f}\nperplexity  {undecided:.4f}\n"
        f"accuracy    {share:.4f}  ({low:.4f} to {high:.4f} at 95%)\n"
    )
    if arguments.rouge:
        figures |= _rouge(arguments, base, model, examples[: arguments.rouge])
    if arguments.json:
        file = Path(arguments.json)
        write_files(file.parent, {file.name: lambda: pack_json(figures)})
    return HOLDS


def _as_divided(arguments: argparse.Namespace, path: str, run: Any) -> dict[str, Any]:
    """How the examples are read: a run's own, of which a share was held out, as the run read them.

    Errors: ValueError for an option by which other lines would be held out.
    """
    usual = {"max_length": LENGTH, "seed": 0, "val_fraction": 0.0, "skip_invalid": False}
    said, own = run.get("settings", {}), run.get("data", {}).get("name")
    same = own is not None and os.path.realpath(path) == os.path.realpath(own)
    if same and said.get("val_fraction"):
        usual |= {name: said[name] for name in usual if name in said}
        for name in ("max_length", "seed"):
            if getattr(arguments, name) not in (None, usual[name]):
                found, expected = getattr(arguments, name), f"{usual[name]}, as it was trained"
                what = "other lines of the run's own data would be held out"
                raise ValueError(f"--{name.replace('_', '-')} {found}: expected {expected}: {what}")
    given = {name: getattr(arguments, name) for name in ("max_length", "seed")}
    given["skip_invalid"] = arguments.skip_invalid or None
    return usual | {name: value for name, value in given.items() if value is not None}


def _rouge(arguments: argparse.Namespace, base: Any, model: Any, examples: Any) -> dict[str, float]:
    from minilora.training.evaluate import answers
    from minilora.training.metrics import rouge

    c, most = base.config, arguments.max_new_tokens
    written, wanted = answers(examples, model.weights, c, model.tuning, base.tokenizer, most)
    found = rouge(written, wanted)
    for name, value in found.items():
        say(f"{name:10}  {value:.4f}\n")
    return found
