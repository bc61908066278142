"""``minilora selftest``: check the checks."""

from __future__ import annotations

import argparse
from typing import Any

from minilora.cli.console import files_of, tell, write_file
from minilora.cli.executors import add_executor, opened_executor
from minilora.cli.options import add_choices, add_command, add_files, processors, split
from minilora.cli.progress import progress_bar


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "selftest",
        "check the checks: run them on mutants of the equations",
        "Run the checks on every mutant of the catalogue, each of which they must catch, and on "
        "correct implementations, which they must pass.",
        _run,
        "0 all caught and all passed, 1 not all, 2 wrong usage",
    )
    option = parser.add_argument
    add_choices(option, level="LEVEL", dtype="DTYPE")
    option("--seed", type=int, default=0, metavar="N", help="seed of the cases")
    option("--cases", type=int, metavar="N", help="cases of correct implementations in each dtype")
    option("--quick", action="store_true", help="one mutant of each class, and fewer cases")
    option("--jobs", type=int, metavar="N", help="processes (default: one for each processor)")
    add_executor(option)
    add_files(option, "the report", "json", "markdown")


def _run(arguments: argparse.Namespace) -> int:
    from minilora.verify.selftest import selftest

    files = files_of(arguments, "json", "markdown")
    with opened_executor(arguments.executor) as executor, progress_bar() as progress:
        report = selftest(
            levels=split(arguments.level),
            dtypes=split(arguments.dtype),
            seed=arguments.seed,
            cases=arguments.cases,
            quick=arguments.quick,
            jobs=processors() if arguments.jobs is None else arguments.jobs,
            progress=progress,
            executor=executor,
        )
    for form, path in files.items():
        write_file(path, getattr(report, form)())
    tell(report.text(), files)
    return report.exit_status
