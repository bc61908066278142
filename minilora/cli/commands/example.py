"""``minilora example``: a real task from end to end, on files that packages have."""

from __future__ import annotations

import argparse
from typing import Any

from minilora.cli.console import OK, add_command, say, sigterm_interrupts, steps_bar


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "example",
        "a real task from end to end: sentiment or summaries",
        "Fine-tunes a real model on real texts, both from packages that are installed by name, and "
        "compares it with the model as it is: sentiment, MiniLM on texts that people have rated; "
        "summaries, SmolLM2 on papers that experts have summed up. What is missing is named with "
        "the command that gets it. OUT/result.json has all figures.",
        _run,
    )
    option = parser.add_argument
    option("example", choices=["sentiment", "summaries"], help="which one")
    option("--output", required=True, metavar="OUT", help="a folder; what was interrupted goes on")
    option("--archive", metavar="FILE", help="the rated texts (default: vaderSentiment-0.5.zip)")
    option("--quick", action="store_true", help="a part of the texts, to see that it works")
    option("--seed", type=int, default=0, metavar="N", help="of split, start, order and dropout")
    option("--threads", type=int, default=1, metavar="N", help="threads that share a step's work")


def _run(arguments: argparse.Namespace) -> int:
    from minilora.studies.examples.result import Settings, result_lines
    from minilora.studies.examples.sentiment import sentiment
    from minilora.studies.examples.summaries import summaries
    from minilora.studies.examples.texts import ARCHIVE
    from minilora.training.gradients import ExecutionPlan, warm_memory

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
            warm_memory()
            result = sentiment(arguments.output, arguments.archive or ARCHIVE, settings)
        else:
            result = summaries(arguments.output, settings)
    say(result_lines(result))
    return OK
