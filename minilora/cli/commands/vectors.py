"""``minilora vectors``: the checks' cases as files for any language, and answers to check."""

from __future__ import annotations

import argparse
from typing import Any

from minilora.cli.console import OK, files_of, say, write_file
from minilora.cli.options import add_choices, add_command, add_files, split
from minilora.cli.progress import progress_bar

FORMS = ("json", "junit", "html")


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "vectors",
        "write test vectors for any language, or check answers to them",
        "Write the checks' cases to the folder DIR, or to an archive NAME.zip: inputs, true "
        "answers, and how much rounding may change an answer. The bytes are the same on every "
        "machine. With check, check the answers in the folder ANSWERS.",
        _run,
        "0 written, or all answers hold, 1 a deviation or an error, 2 wrong usage or changed "
        "vectors, 3 no answers",
    )
    parser.usage = (
        "minilora vectors DIR [options]\n       minilora vectors check DIR ANSWERS [options]"
    )
    option = parser.add_argument
    option(
        "words",
        nargs="+",
        metavar="DIR",
        help="the folder of the vectors, or NAME.zip to write; with check, the answers' too",
    )
    add_choices(option, level="LEVEL")
    option("--check", action="append", metavar="CHECK", help="only this check; * matches anything")
    option("--seed", type=int, default=0, metavar="N", help="seed of the vectors")
    option("--case", metavar="ID", help="check only this vector")
    add_files(option, "the report", *FORMS)


def _run(arguments: argparse.Namespace) -> int:
    from minilora.io.errors import FormatError
    from minilora.verify.vectors.files import write
    from minilora.verify.vectors.vectors import vectors

    if arguments.words[0] == "check":
        return _check(arguments)
    if len(arguments.words) > 1:
        raise ValueError(
            f"{' '.join(arguments.words)}: expected one folder; to check answers: minilora vectors "
            "check DIR ANSWERS"
        )
    (folder,) = arguments.words
    with progress_bar() as progress:
        new = vectors(split(arguments.level), split(arguments.check), arguments.seed, progress)
    try:
        written = write(folder, new, arguments.seed)
    except FormatError as error:
        raise ValueError(str(error)) from None
    except OSError as error:
        raise ValueError(f"cannot write {folder}: {error.strerror}") from None
    checks, size = {v.check for v in new}, sum(map(len, written.values()))
    say(
        f"{len(new)} vectors of {len(checks)} checks in {folder}: {len(written)} files, "
        f"{size} bytes\n"
    )
    return OK


def _check(arguments: argparse.Namespace) -> int:
    from minilora.verify.report.forms import rendered
    from minilora.verify.vectors.files import read
    from minilora.verify.vectors.vector_answers import Answered, judge
    from minilora.verify.vectors.vectors import chosen

    if len(arguments.words) != 3:
        raise ValueError("expected minilora vectors check DIR ANSWERS")
    _, folder, answers = arguments.words
    files = files_of(arguments, *FORMS)
    manifest, published = read(folder)
    asked = chosen(published, split(arguments.level), split(arguments.check), arguments.case)
    with progress_bar() as progress:
        report = judge(
            asked,
            Answered(answers),
            seed=manifest["seed"],
            command=["minilora", "vectors", "check", folder, answers],
            progress=progress,
        )
    for form, path in files.items():
        write_file(path, rendered(report, form))
    say(report.text())
    return report.exit_status
