"""``minilora evaluate``: how good a model is on examples that it has not seen."""

from __future__ import annotations

import argparse
from typing import Any

from minilora.commands import adapted_model
from minilora.console import HOLDS, add_command, add_model, at_least, say


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
    option("--split", default="", metavar="SPLIT", help="test, valid or train (default: the first)")
    option("--length", type=int, default=512, metavar="N", help="most tokens of an example")
    option("--batch-tokens", type=int, default=1024, metavar="N", help="at a time")
    option("--seed", type=int, default=0, metavar="N", help="of the examples of task:NAME")
    option("--skip-bad", action="store_true", help="leave out lines that cannot be used")
    option("--rouge", type=int, default=0, metavar="N", help="write answers to N examples")
    option("--tokens", type=int, default=128, metavar="N", help="most of an answer")
    option("--json", metavar="FILE", help="write the figures as JSON")


def _run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from minilora import data
    from minilora.bases import classes_of, told
    from minilora.commands.train import data_of
    from minilora.evaluate import measure
    from minilora.formats.files import pack_json, write_files
    from minilora.metrics import accuracy, perplexity
    from minilora.train import batches_of

    if arguments.split and arguments.split not in data.SPLITS:
        raise ValueError(f"--split {arguments.split}: expected one of {data.SPLITS}")
    at_least(arguments, length=2, batch_tokens=1, seed=0, rouge=0, tokens=1)
    model = adapted_model(arguments)
    base = model.base
    if not base.config.causal and "head.weight" not in model.weights:
        expected = "one: train it with --task classify, and give the --adapter"
        raise ValueError(f"{base.name}: an encoder without a classifier; expected {expected}")
    run = told(arguments.adapter)  # what it was trained on is what it is judged by, if unasked
    path, task = data_of(
        base,
        arguments.data or run.get("data", {}).get("name"),
        arguments.task or run.get("settings", {}).get("task"),
    )
    # A head without names for its classes has their numbers.
    numbers = tuple(map(str, range(getattr(base.config, "classes", 0)))) or None
    read = data.read(
        path, task, base.tokenizer, arguments.length, skip_bad=arguments.skip_bad,
        seed=arguments.seed, classes=classes_of(arguments.adapter) or base.classes or numbers,
    )  # fmt: skip
    order = [arguments.split] if arguments.split else ["test", "valid", "train"]
    split = next((one for one in order if getattr(read, one)), None)
    if split is None:
        raise ValueError(f"{path}: no examples in {' or '.join(order)}")
    examples = getattr(read, split)
    batches = batches_of(examples, arguments.batch_tokens, base.tokenizer.pad)
    found = measure(batches, model.weights, base.config, model.tuning)
    assert found.right is not None
    share, low, high, _ = accuracy(found.right)
    figures: dict[str, Any] = {
        "examples": len(examples),
        "split": split,
        "labels": found.count,
        "loss": found.loss,
        "perplexity": perplexity(found.loss),
        "accuracy": share,
        "accuracy_interval": [low, high],
    }
    say(
        f"{path}, {split}: {len(examples)} examples, {found.count} labels\n"
        f"loss        {found.loss:.4f}\nperplexity  {perplexity(found.loss):.4f}\n"
        f"accuracy    {share:.4f}  ({low:.4f} to {high:.4f} at 95%)\n"
    )
    if arguments.rouge:
        figures |= _rouge(arguments, base, model, examples[: arguments.rouge])
    if arguments.json:
        file = Path(arguments.json)
        write_files(file.parent, {file.name: lambda: pack_json(figures)})
    return HOLDS


def _rouge(arguments: argparse.Namespace, base: Any, model: Any, examples: Any) -> dict[str, float]:
    from minilora.evaluate import answers
    from minilora.metrics import rouge

    c, most = base.config, arguments.tokens
    written, wanted = answers(examples, model.weights, c, model.tuning, base.tokenizer, most)
    found = rouge(written, wanted)
    for name, value in found.items():
        say(f"{name:10}  {value:.4f}\n")
    return found
