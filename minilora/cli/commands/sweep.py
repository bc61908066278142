"""``minilora sweep``: a grid of runs in parallel, a table and a picture of them."""

from __future__ import annotations

import argparse
from typing import Any

from minilora.cli.console import (
    HOLDS,
    INTERRUPTED,
    add_command,
    add_model,
    at_least,
    say,
    sigterm_interrupts,
)


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "sweep",
        "train at every rank, alpha, learning rate and seed of a grid",
        "Each cell of the grid is what minilora train does with its four numbers, in a process of "
        "one thread and with a folder inside OUT. What is finished is kept: the same command "
        "goes on where it was interrupted, and with other lists it adds to what is there.",
        _run,
    )
    option = parser.add_argument
    add_model(option, adapter=False)
    option("--data", metavar="D", help="as minilora train has it")
    option("--task", metavar="TASK", help="as minilora train has it")
    option("--output", required=True, metavar="OUT", help="the folder of the sweep")
    option("--ranks", default="1,2,4,8", metavar="R,...", help="of the adapters")
    option("--alphas", metavar="A,...", help="the scale is A / R (default: 2 R alone)")
    option(
        "--learning-rates",
        default="0.001,0.003,0.01,0.03",
        metavar="RATE,...",
        help="learning rates",
    )
    option("--seeds", default="0,1,2", metavar="N,...", help="of start, order and dropout")
    option("--jobs", type=int, metavar="N", help="processes at a time (default: the processors)")
    option(
        "--target-modules", default="all-linear", metavar="NAMES", help="as minilora train has it"
    )
    option("--variant", default="lora", metavar="NAME", help="as minilora variants lists them")
    option("--dropout", type=float, default=0.0, metavar="P", help="of the adapters' input")
    option("--lr-scheduler", default="cosine", metavar="KIND", help="constant, linear or cosine")
    option(
        "--warmup-steps", type=int, default=0, metavar="N", help="steps over which the rate rises"
    )
    option("--num-train-epochs", type=int, default=1, metavar="N", help="times through the data")
    option("--max-steps", type=int, metavar="N", help="so many steps, whatever the epochs")
    option("--batch-tokens", type=int, default=1024, metavar="N", help="in a micro-batch")
    option(
        "--gradient-accumulation-steps",
        type=int,
        default=1,
        metavar="N",
        help="micro-batches in a step",
    )
    option("--max-length", type=int, default=512, metavar="N", help="most tokens of an example")
    option(
        "--val-fraction", type=float, default=0.0, metavar="SHARE", help="of a file, to judge by"
    )


def numbers(text: str, option: str, kind: type[int] | type[float]) -> list[Any]:
    """The numbers of a list with commas. Errors: ValueError for a part that is none."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        return [kind(part) for part in parts]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{option} {text}: expected {what} with commas between") from None


def _run(arguments: argparse.Namespace) -> int:
    import os
    import sys
    from dataclasses import fields

    from minilora.cli.commands.train import data_of, targets_of
    from minilora.cli.console import progress_bar
    from minilora.studies.sweep import Setting, grid, opened, plot, sweep, table
    from minilora.training.train import TrainConfig

    least = {
        "num_train_epochs": 1,
        "max_steps": 1,
        "batch_tokens": 1,
        "gradient_accumulation_steps": 1,
        "max_length": 2,
        "warmup_steps": 0,
    }
    at_least(arguments, jobs=1, **least)
    cells = grid(
        numbers(arguments.ranks, "--ranks", int),
        numbers(arguments.alphas or "", "--alphas", float),
        numbers(arguments.learning_rates, "--learning-rates", float),
        numbers(arguments.seeds, "--seeds", int),
    )
    name = arguments.model or "reference:llama"
    given = {f.name: getattr(arguments, f.name) for f in fields(TrainConfig) if f.name in arguments}
    given["target_modules"] = targets_of(arguments.target_modules)
    path, task = data_of(opened(name, arguments.dtype), arguments.data, arguments.task)
    recipe = TrainConfig(**given | {"task": task})
    setting = Setting(name, path, recipe, (("val_fraction", arguments.val_fraction),))
    for cell in cells:
        setting.at(cell)  # a number out of its range is told before anything runs
    jobs = arguments.jobs if arguments.jobs is not None else os.cpu_count() or 1
    out = arguments.output
    try:
        with sigterm_interrupts(), progress_bar("cells") as bar:

            def watch(row: Any, done: int, of: int) -> None:
                if bar is not None:
                    bar(f"{row.cell.name}: {row.judged:.4g}", done, of)

            rows = sweep(out, setting, cells, jobs, watch)
    except KeyboardInterrupt:
        print(
            f"interrupted; what is done is kept in {out}: the same command goes on", file=sys.stderr
        )
        return INTERRUPTED
    say(table(rows))
    try:
        say(f"{plot(out, rows)}\n")
    except (ImportError, ValueError) as error:
        say(f"no picture: {error}\n")
    return HOLDS
