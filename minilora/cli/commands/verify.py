"""``minilora verify``: check an implementation of LoRA."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from minilora.cli.console import (
    FAILED,
    OK,
    USAGE,
    columns,
    files_of,
    has_colours,
    markdown_room,
    say,
    stdout_on_stderr,
    tell,
    usage_error,
    write_file,
)
from minilora.cli.executors import add_executor, opened_executor
from minilora.cli.options import add_choices, add_command, add_files, processors, split
from minilora.cli.progress import progress_bar

if TYPE_CHECKING:
    from minilora.verify.core.types import Check
    from minilora.verify.jobs import Helpers, Setup
    from minilora.verify.plan import CheckPlan
    from minilora.verify.report.report import Report

MOST_JOBS = 4
"""The most processes that ask, unless more are asked for."""

FORMS = ("json", "junit", "html", "markdown", "annotations", "badge")


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "verify",
        "check an implementation of LoRA",
        "Check an implementation of LoRA against the equations.",
        _run,
        "0 all checks hold, 1 a deviation or an error, 2 wrong usage, 3 the target cannot be "
        "loaded or all checks were skipped",
    )
    option = parser.add_argument
    option(
        "target",
        nargs="?",
        metavar="TARGET",
        help="a library that minilora knows, such as peft (minilora doctor lists them), or "
        "package.module:name or path/to/module.py:name of an object, a class or a factory "
        "(default: minilora itself)",
    )
    option("--cmd", metavar="CMD", help="start a driver in another language and check it")
    _add_choice(option)
    _add_known(option)
    option(
        "--in-process",
        action="store_true",
        help="call the target in this process, for a debugger; if it exits, so does verify",
    )
    option(
        "--jobs",
        type=int,
        metavar="N",
        help="number of processes, each with its own copy of the target; the report is the same "
        "(default: as many as pay off for a known library, 1 for your own target)",
    )
    add_executor(option)
    option("--time-limit", type=float, metavar="SECONDS", help="limit for a call (default: 30)")
    add_files(option, "the report", *FORMS)
    option(
        "--verbose", action="store_true", help="print a line for each check, and deviations in full"
    )
    option("--timing", action="store_true", help="print the time of each check")
    option("--list", action="store_true", help="list the checks, and exit")
    option(
        "--coverage",
        action="store_true",
        help="count the values that cases have, list the pairs that never occur together, and exit",
    )


def _add_choice(option: Any) -> None:
    """Add the options that say what is checked."""
    add_choices(option, level="LEVEL")
    option("--profile", default="ci", metavar="PROFILE", help="quick, ci (the default) or nightly")
    add_choices(option, dtype="DTYPE")
    option("--seed", type=int, default=0, metavar="N", help="seed of the cases")
    option("--case", metavar="CHECK:DTYPE:N", help="only this case, named as in a report")


def _add_known(option: Any) -> None:
    """Add the options that say which deviations are no news."""
    option(
        "--known",
        metavar="FILE",
        help="known deviations, which are no failures: JSON entries with check, reason and what "
        "was seen",
    )
    option(
        "--update-known",
        metavar="FILE",
        help="rewrite FILE from this run: drop known deviations that no longer occur, and add all "
        "others that were seen",
    )
    option(
        "--against",
        metavar="FILE",
        help="compare with an earlier report in JSON; exit status 1 for new deviations, and those "
        "of another cause, only",
    )


def _run(arguments: argparse.Namespace) -> int:
    _look_in_the_current_folder_last()
    from minilora.verify.checks.registry import CHECKS
    from minilora.verify.plan import plan
    from minilora.verify.record import Recorder

    choice: dict[str, Any] = {
        "levels": split(arguments.level),
        "profile": arguments.profile,
        "dtypes": split(arguments.dtype),
        "seed": arguments.seed,
        "case": arguments.case,
    }
    plans = plan(CHECKS, **choice)
    options = choice | {
        "known": _known(arguments),
        "recorder": Recorder() if arguments.update_known else None,
        "command": _command(arguments),
        "time_limit": _time_limit(arguments),
    }
    _require_jobs(arguments)
    if arguments.list:
        return _list(arguments, plans)
    if arguments.coverage:
        from minilora.verify.coverage import table

        say(table(**choice))
        return OK
    earlier = _earlier(arguments)
    files, folder = files_of(arguments, *FORMS), os.getcwd()
    report = _checked(arguments, options)
    os.chdir(folder)  # the target may have changed it
    errors = _write(
        report, files, arguments.target
    )  # before the text, whose reader may close the pipe
    errors += _update_known(arguments, report, options)
    tell(report.text(arguments.verbose, columns(), has_colours()), files)
    for error in errors:
        usage_error(error, "verify")
    if arguments.timing:
        tell(f"\n{report.timing()}", files)
    status = report.exit_status
    if earlier is not None:
        status, changes = _since(report, earlier)
        tell(f"\nSince {arguments.against}: {changes}", files)
    return USAGE if errors else status


def _earlier(arguments: argparse.Namespace) -> Report | None:
    """The report that this one is compared with, if one is named."""
    if arguments.against is None:
        return None
    from minilora.verify.report.load_report import read_report

    return read_report(arguments.against)


def _since(report: Report, earlier: Report) -> tuple[int, str]:
    """The exit status, 1 for new deviations alone, and what has changed, for a reader."""
    from minilora.verify.report.against import against

    found, status = against(report, earlier), report.exit_status
    if status in (OK, FAILED):
        status = FAILED if found.is_worse else OK
    return status, f"{earlier.name} {earlier.version}\n{found.text}\n"


def _look_in_the_current_folder_last() -> None:
    """Let no file that a target leaves in the current folder be imported here.

    The target's process looks there first.
    """
    sys.path.sort(key=lambda entry: os.path.abspath(entry) == os.getcwd())


def _known(arguments: argparse.Namespace) -> dict[str, Any]:
    """The known deviations of the files that are named."""
    from minilora.verify.known import read_known

    paths = [arguments.known, arguments.update_known]
    if paths[1] is not None and not os.path.exists(paths[1]):
        paths[1] = None
    return {name: entry for path in paths if path for name, entry in read_known(path).items()}


def _update_known(
    arguments: argparse.Namespace, report: Report, options: dict[str, Any]
) -> list[str]:
    """Write the file of known deviations anew; the error if that fails."""
    if not arguments.update_known or report.interrupted:
        return []
    from minilora.verify.record import as_text

    entries = options["recorder"].entries(report, options["known"])
    try:
        write_file(arguments.update_known, as_text(entries))
    except ValueError as error:
        return [str(error)]
    return []


def _require_jobs(arguments: argparse.Namespace) -> None:
    """Errors: ValueError if ``--jobs`` is below 1, or above 1 beside what needs one process."""
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs}: expected 1 or more")
    asked = f"--executor {arguments.executor}" if arguments.executor else ""
    if arguments.jobs not in (None, 1):
        asked = f"--jobs {arguments.jobs}"
    for option in ("in_process", "case", "update_known") if asked else ():
        if getattr(arguments, option):
            name = option.replace("_", "-")
            raise ValueError(f"{asked} and --{name}: it runs in one process")


def _time_limit(arguments: argparse.Namespace) -> float:
    from minilora.verify.implementation.contract import TIME_LIMIT

    limit: float = TIME_LIMIT if arguments.time_limit is None else arguments.time_limit
    if not limit > 0:
        raise ValueError(f"--time-limit {limit:g}: expected more than 0 seconds")
    return limit


def _checked(arguments: argparse.Namespace, options: dict[str, Any]) -> Report:
    """The report of the target; what was checked so far, if interrupted."""
    from minilora.verify.checks.registry import CHECKS
    from minilora.verify.engine import Interrupted, run

    if arguments.executor is not None:
        return _checked_elsewhere(arguments, options)
    helpers = _helpers(arguments, options)
    is_whole = not (arguments.level or arguments.dtype)
    try:
        with (
            stdout_on_stderr(),
            helpers.early() if helpers and is_whole else contextlib.nullcontext(),
            _timed(_target(arguments, options["time_limit"]), helpers) as target,
            progress_bar() as progress,
        ):
            return run(CHECKS, target, **options, progress=progress, helpers=helpers)
    except Interrupted as interrupted:
        return interrupted.report


def _checked_elsewhere(arguments: argparse.Namespace, options: dict[str, Any]) -> Report:
    """The report, with the workers of ``--executor`` asking beside this process."""
    from minilora.verify.checks.registry import CHECKS
    from minilora.verify.elsewhere import Elsewhere
    from minilora.verify.engine import Interrupted, run

    setup = _setup(arguments, options)
    try:
        with (
            opened_executor(arguments.executor) as executor,
            stdout_on_stderr(),
            setup.open_target() as target,
            progress_bar() as progress,
        ):
            assert executor is not None  # as it has a name
            helpers = Elsewhere(setup, executor)
            return run(CHECKS, target, **options, progress=progress, helpers=helpers)
    except Interrupted as interrupted:
        return interrupted.report


@contextlib.contextmanager
def _timed(
    open_target: Callable[[], contextlib.AbstractContextManager[object]], helpers: Helpers | None
) -> Iterator[object]:
    """The target; the helpers are told how long it took to open, and how large it is."""
    started = monotonic()
    with open_target() as target:
        if helpers is not None:
            helpers.start_seconds = monotonic() - started
            helpers.size = getattr(target, "resident", 0)
        yield target


def _setup(arguments: argparse.Namespace, options: dict[str, Any]) -> Setup:
    """What another process needs to ask as this one does."""
    from minilora.verify.jobs import Setup

    return Setup(
        open_target=_target(arguments, options["time_limit"]),
        known=options["known"],
        command=options["command"],
        time_limit=options["time_limit"],
    )


def _helpers(arguments: argparse.Namespace, options: dict[str, Any]) -> Helpers | None:
    """The processes that ask beside this one, by ``--jobs`` or where they pay off."""
    from minilora.verify.jobs import Helpers
    from minilora.verify.peers import PEERS

    jobs, at_most = arguments.jobs, 1
    if not (arguments.in_process or arguments.cmd or arguments.case or arguments.update_known):
        # Two of somebody's own may share a file, a device, a port.
        at_most = min(processors(), MOST_JOBS) if arguments.target in (None, *PEERS) else 1
    if (at_most if jobs is None else jobs) == 1:
        return None
    count = (at_most if jobs is None else jobs) - 1
    return Helpers(_setup(arguments, options), count, if_worth_it=jobs is None)


def _write(report: Report, files: dict[str, str], target: str | None) -> list[str]:
    """Write the report's files; the errors of those that could not be written."""
    from minilora.verify.loading import source_file
    from minilora.verify.places import places_in
    from minilora.verify.report.forms import rendered

    errors, source = [], source_file(target or "") if "annotations" in files else None
    place = places_in(source) if source else None
    for form, path in files.items():
        text = rendered(report, form, markdown_room(path), place)
        try:
            write_file(path, text)
        except ValueError as error:
            errors.append(str(error))
    return errors


def _command(arguments: argparse.Namespace) -> list[str]:
    """The command that a report repeats, without the options that choose cases.

    Errors: ValueError for an invalid ``--cmd``, or a target beside it.
    """
    command = ["minilora", "verify", *filter(None, [arguments.target])]
    if arguments.cmd is not None:
        from minilora.verify.implementation.child import words

        if arguments.target is not None:
            raise ValueError(f"TARGET {arguments.target!r} and --cmd: expected one of the two")
        if arguments.in_process:
            raise ValueError("--in-process and --cmd: a driver is another process")
        try:
            words(arguments.cmd)
        except ValueError as error:
            raise ValueError(f"--cmd: {error}") from None
        command += ["--cmd", arguments.cmd]
    if arguments.in_process:
        command += ["--in-process"]
    if arguments.time_limit is not None:
        command += ["--time-limit", f"{arguments.time_limit:g}"]
    return command


def _target(
    arguments: argparse.Namespace, limit: float
) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """What opens the implementation to check, here or in another process. Errors: LoadError."""
    from minilora.verify.loading import DEFAULT_TARGET, load

    if arguments.cmd is not None:
        return partial(_driver, arguments.cmd, limit)
    if arguments.in_process:
        return lambda: contextlib.nullcontext(load(arguments.target or DEFAULT_TARGET))
    from minilora.verify.implementation.python_target import PythonTarget

    return partial(PythonTarget, arguments.target or DEFAULT_TARGET, time_limit=limit)


def _driver(command: str, limit: float) -> contextlib.AbstractContextManager[object]:
    from minilora.verify.checks.registry import CHECKS
    from minilora.verify.implementation.protocol import Driver

    return Driver(command, CHECKS, time_limit=limit)


def _list(arguments: argparse.Namespace, plans: Sequence[CheckPlan]) -> int:
    """Print the checks, or write them as JSON."""
    import json

    checks = list(dict.fromkeys(plan.check for plan in plans))
    files = files_of(arguments, *FORMS)
    if other := files.keys() - {"json"}:
        raise ValueError(f"--list --{min(other)}: expected --json, or neither")
    entries = [{"id": c.id, "level": c.level, "title": c.title, "methods": c.needs} for c in checks]
    if files:
        write_file(files["json"], json.dumps(entries, indent=1) + "\n")
    else:
        say(_listed(checks))
    return OK


def _listed(checks: Sequence[Check]) -> str:
    import textwrap

    lines = []
    for check in checks:
        lines += [
            f"{check.id}  ({check.level})",
            *textwrap.wrap(check.title, 76, initial_indent="    ", subsequent_indent="    "),
        ]
    return "\n".join(lines) + "\n"
