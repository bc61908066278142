"""``minilora selftest``: check the checks."""

from __future__ import annotations

import argparse
import os
from typing import Any

from minilora.cli.console import (
    add_command,
    add_files,
    files_of,
    progress_bar,
    say,
    split,
    write_file,
)


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "selftest",
        "check the checks, by every known mutant of the equations",
        "Puts every mutant of the catalogue to the checks, each of which must be caught, and "
        "many cases of implementations that are right, none of which may be.",
        _run,
        "0 all is well, 1 a rate falls short, 2 wrong usage",
    )
    option = parser.add_argument
    option("--level", action="append", metavar="LEVEL", help="only this level; repeatable, or a,b")
    option("--dtype", action="append", metavar="DTYPE", help="only this dtype; repeatable, or a,b")
    option("--seed", type=int, default=0, metavar="N", help="draws other cases")
    option("--cases", type=int, metavar="N", help="cases of what is right, in each dtype")
    option("--quick", action="store_true", help="one mutant of each class, and fewer cases")
    option("--jobs", type=int, metavar="N", help="processes (default: one for each processor)")
    add_files(option, "the report", "json", "markdown")


def _run(arguments: argparse.Namespace) -> int:
    from minilora.verify.selftest import selftest

    files = files_of(arguments, "json", "markdown")
    with progress_bar() as progress:
        report = selftest(
            levels=split(arguments.level),
            dtypes=split(arguments.dtype),
            seed=arguments.seed,
            cases=arguments.cases,
            quick=arguments.quick,
            jobs=_processors() if arguments.jobs is None else arguments.jobs,
            progress=progress,
        )
    for form, path in files.items():
        write_file(path, getattr(report, form)())
    say(report.text())
    return report.exit_status


def _processors() -> int:
    """How many processors there are for this process, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
