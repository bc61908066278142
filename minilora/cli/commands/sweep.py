"""``minilora sweep``: a grid of runs in parallel, a table and a picture of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from minilora.cli.commands.train import add_adapter, add_data, add_schedule, add_val_fraction
from minilora.cli.console import INTERRUPTED, OK, say
from minilora.cli.executors import add_executor, opened_executor
from minilora.cli.options import add_command, add_model, at_least
from minilora.cli.progress import sigterm_interrupts

if TYPE_CHECKING:
    from minilora.studies.sweep.grid import Setting


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "sweep",
        "train at every rank, alpha, learning rate and seed of a grid",
        "Run minilora train for each combination of rank, alpha, learning rate and seed, each in "
        "a process of its own with one thread, and in a folder of its own inside OUT. Finished "
        "runs are kept: the same command continues an interrupted sweep, and other lists add to "
        "it.",
        _run,
    )
    option = parser.add_argument
    add_model(option, adapter=False, trained=False)
    add_data(option)
    option("--output", required=True, metavar="OUT", help="folder for the sweep")
    option("--ranks", default="1,2,4,8", metavar="R,...", help="ranks of the adapters")
    option(
        "--alphas", metavar="A,...", help="the adapters' scale is A / R (default: 2 R at each rank)"
    )
    option(
        "--learning-rates",
        default="0.001,0.003,0.01,0.03",
        metavar="X,...",
        help="learning rates",
    )
    option(
        "--seeds",
        default="0,1,2",
        metavar="N,...",
        help="seeds of the adapters' start, the order of the data and dropout",
    )
    option("--jobs", type=int, metavar="N", help="processes (default: one for each processor)")
    add_executor(option)
    add_adapter(option)
    add_schedule(option)
    add_val_fraction(option)


def numbers(text: str, option: str, kind: type[int] | type[float]) -> list[Any]:
    """The numbers of a comma-separated list. Errors: ValueError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        return [kind(part) for part in parts]
    except ValueError:
        expected = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{option} {text}: expected {expected}, separated by commas") from None


def _setting(arguments: argparse.Namespace) -> Setting:
    """What all cells of the grid have in common."""
    from dataclasses import fields

    from minilora.cli.commands.train import data_and_task, target_modules
    from minilora.studies.sweep.grid import Setting
    from minilora.studies.sweep.run import date_of_sweep, opened
    from minilora.training.config import TrainConfig

    name = arguments.model or "reference:llama"
    base = opened(name, arguments.dtype)
    values = {
        f.name: getattr(arguments, f.name) for f in fields(TrainConfig) if f.name in arguments
    }
    values["target_modules"] = target_modules(arguments.target_modules)
    path, task = data_and_task(base, arguments.data, arguments.task)
    reading: tuple[tuple[str, Any], ...] = (("val_fraction", arguments.val_fraction),)
    if base.tokenizer.sees_date:
        reading += (("date", arguments.date or date_of_sweep(arguments.output)),)
    return Setting(name, path, TrainConfig(**values | {"task": task}), reading)


def _run(arguments: argparse.Namespace) -> int:
    import os
    import sys

    from minilora.cli.commands.train import LEAST_OF_SCHEDULE
    from minilora.cli.progress import progress_bar
    from minilora.studies.sweep.grid import grid
    from minilora.studies.sweep.results import plot, table
    from minilora.studies.sweep.run import sweep

    at_least(arguments, jobs=1, **LEAST_OF_SCHEDULE)
    cells = grid(
        numbers(arguments.ranks, "--ranks", int),
        numbers(arguments.alphas or "", "--alphas", float),
        numbers(arguments.learning_rates, "--learning-rates", float),
        numbers(arguments.seeds, "--seeds", int),
    )
    setting = _setting(arguments)
    for cell in cells:
        setting.at(cell)  # a number out of range is reported before anything runs
    jobs = arguments.jobs if arguments.jobs is not None else os.cpu_count() or 1
    out = arguments.output
    try:
        with (
            opened_executor(arguments.executor) as executor,
            sigterm_interrupts(),
            progress_bar("cells") as bar,
        ):

            def watch(row: Any, done: int, of: int) -> None:
                if bar is not None:
                    bar(f"{row.cell.name}: {row.judged:.4g}", done, of)

            rows = sweep(out, setting, cells, jobs, watch, executor)
    except KeyboardInterrupt:
        print(
            f"interrupted; finished runs are kept in {out}: the same command continues",
            file=sys.stderr,
        )
        return INTERRUPTED
    say(table(rows))
    try:
        say(f"{plot(out, rows)}\n")
    except (ImportError, ValueError) as error:
        say(f"no plot: {error}\n")
    return OK
