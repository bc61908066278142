"""``minilora merge``: a model with an adapter merged into its weights."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from minilora.cli.commands import adapted_model
from minilora.cli.console import FAILED, OK, say
from minilora.cli.options import add_command, add_model
from minilora.cli.progress import bytes_bar

if TYPE_CHECKING:
    from pathlib import Path


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "merge",
        "merge an adapter into its model's weights",
        "Write the model with the adapter merged into its weights, as a Hugging Face folder or a "
        ".gguf file, and audit it: say how much of the adapter's change the rounding took.",
        _run,
        "0 done, 1 a deviation in what was written, a full disk or numbers that are not finite, 2 "
        "wrong usage, 3 a file cannot be read or a library is missing",
    )
    add_model(parser.add_argument)
    parser.add_argument("--output", required=True, metavar="OUT", help="a folder, or a .gguf file")


def _run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from minilora.io.errors import listed
    from minilora.io.formats import huggingface
    from minilora.io.formats.registry import model_formats
    from minilora.io.loading import check_output, class_names
    from minilora.spec.lora import merge

    if arguments.adapter is None:
        raise ValueError("--adapter is missing: expected the adapter to merge")
    model = adapted_model(arguments)
    base = model.base
    check_output(arguments.output, base, arguments.adapter)
    out = Path(arguments.output)
    if out.is_dir() and (there := sorted(path.name for path in out.iterdir())):
        # Files of another model would be overwritten, or be read as a part of this one.
        found, expected = listed(there), "an empty folder, or none"
        raise ValueError(
            f"--output {out}: found {found}, expected {expected}; choose another folder"
        )
    weights = {name: model.weights[name] for name in (*base.config.shapes(), *model.changed)}
    merged = merge(weights, model.tuning)
    c = merged_config(base.config, merged)
    labels = class_names(arguments.adapter) or base.classes
    writers = [f.write_model for f in model_formats() if f.write_model and f.fits(out)]
    write_model = writers[0] if writers else huggingface.FORMAT.write_model
    assert write_model is not None
    for note in write_model(out, c, merged, base, labels):
        say(f"{arguments.output}: {note}\n")
    status = audited(base.path, arguments.adapter, out)
    if status == OK:
        say(f"{arguments.output}: {base.name} with {arguments.adapter} merged\n")
    return status


def audited(base: Path, adapter: str, out: Path) -> int:
    """Audit what was written, and say how much of the change rounding took; the exit status.

    What deviates is printed. What cannot be audited is said, and is no failure of the merge.
    """
    from minilora.audit import merged as audit_merged
    from minilora.audit.report.groups import figure
    from minilora.audit.report.text import text
    from minilora.io.errors import FormatError

    try:
        with bytes_bar() as progress:
            report = audit_merged(base, adapter, out, progress=progress)
    except (FormatError, ImportError) as error:
        say(f"{out}: not audited: {error}\n")
        return OK
    if report.exit_status == FAILED:
        say(text(report))
        return FAILED
    survived = {e.subject: e.figures.get("survived") for e in report.entries}
    lost = {name: abs(1 - x) for name, x in survived.items() if isinstance(x, float)}
    worst = max(lost, key=lambda name: lost[name], default="")
    took = ""
    if lost:
        mean = figure("survived", sum(lost.values()) / len(lost))
        most = figure("survived", lost[worst])
        took = f"; rounding took {mean} of a change's norm on average, {most} at most ({worst})"
    undecided = " but what cannot be decided" if report.exit_status else ""
    say(f"{out}: audited, every tensor is right{undecided}{took}\n")
    return OK


def merged_config(c: Any, merged: Any) -> Any:
    """The configuration of merged weights: a tied head may have a weight of its own now.

    Errors: ValueError for a weight that the architecture does not have.
    """
    from dataclasses import replace

    from minilora.io.architectures import architecture_of
    from minilora.io.errors import listed
    from minilora.spec.target_modules import ties_head

    if architecture_of(c).has_field("tied") and ties_head(c) and "head.weight" in merged:
        c = replace(c, tied=False)
    if extra := merged.keys() - c.shapes().keys():
        raise ValueError(
            f"merging gives a {type(c).__name__} the weights {listed(extra)}, which its files "
            "cannot hold: keep the adapter beside the model"
        )
    return c
