"""``minilora example``: a real task from end to end, on files that packages have."""

from __future__ import annotations

import argparse
from typing import Any

from minilora.cli.console import OK, say
from minilora.cli.options import add_command
from minilora.cli.progress import sigterm_interrupts, steps_bar


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "example",
        "fine-tune a real model on a real task: sentiment or summaries",
        "Fine-tune a real model on real texts, both from installed packages, and compare it with "
        "the model before: sentiment, MiniLM on texts rated by people; summaries, SmolLM2 on "
        "papers summarized by experts. If a package is missing, print the command that installs "
        "it. OUT/result.json has all figures.",
        _run,
    )
    option = parser.add_argument
    option("example", choices=["sentiment", "summaries"], help="the task")
    option(
        "--output",
        required=True,
        metavar="OUT",
        help="folder for the results; an interrupted run continues",
    )
    option("--archive", metavar="FILE", help="the rated texts (default: vaderSentiment-0.5.zip)")
    option("--quick", action="store_true", help="use only a part of the texts")
    option(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the split, the start, the order of the data and dropout",
    )
    option("--threads", type=int, default=1, metavar="N", help="number of threads")


def _run(arguments: argparse.Namespace) -> int:
    from minilora.studies.examples.result import Settings, result_lines
    from minilora.studies.examples.sentiment import sentiment
    from minilora.studies.examples.summaries import summaries
    from minilora.studies.examples.texts import ARCHIVE
    from minilora.training.gradients import ExecutionPlan
    from minilora.training.memory import keep_freed_memory

    if arguments.example == "summaries" and arguments.archive:
        raise ValueError("--archive: only sentiment takes it")
    with sigterm_interrupts(), steps_bar() as bar:
        settings = Settings(
            quick=arguments.quick,
            seed=arguments.seed,
            plan=ExecutionPlan(arguments.threads),
            watch=bar,
            tell=lambda text: say(text + "\n"),
        )
        if arguments.example == "sentiment":
            keep_freed_memory()
            result = sentiment(arguments.output, arguments.archive or ARCHIVE, settings)
        else:
            result = summaries(arguments.output, settings)
    say(result_lines(result))
    return OK
