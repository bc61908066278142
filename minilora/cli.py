"""The command line. What a command needs is imported when it is asked for."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from minilora import __version__
from minilora.commands import add_all
from minilora.console import (
    DEVIATES,
    HOLDS,
    INTERRUPTED,
    NOT_LOADED,
    USAGE,
    progress_bar,
    refuse,
    say,
    split,
    stdout_on_stderr,
)

if TYPE_CHECKING:
    from minilora.verify.report import Report


class _Parser(argparse.ArgumentParser):
    """A parser that suggests what a mistyped option or command may have meant."""

    def error(self, message: str) -> NoReturn:
        known = re.findall(r"(?<![\w-])--[a-z][a-z-]*", self.format_help())
        if invalid := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            asked, known = invalid[1], re.findall(r"[\w-]+", invalid[2])
        else:
            asked = message.rpartition("unrecognized arguments: ")[2].split("=")[0].split(" ")[0]
        close = difflib.get_close_matches(asked, known, n=1, cutoff=0.7)
        super().error(message + (f"; did you mean {close[0]}?" if close else ""))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and gives its exit status; wrong usage raises SystemExit(2)."""
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if "run" not in arguments:
        parser.print_help(sys.stderr)
        return USAGE
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> _Parser:
    parser = _Parser(
        prog="minilora",
        description="The executable specification of low-rank adaptation.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"minilora {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_verify(commands)
    _add_report(commands)
    _add_variants(commands)
    _add_selftest(commands)
    _add_vectors(commands)
    add_all(commands)
    return parser


def _add_verify(commands: argparse._SubParsersAction[_Parser]) -> None:
    verify = commands.add_parser(
        "verify",
        help="check an implementation of LoRA",
        description="Checks an implementation of LoRA against the equations. Exit status: 0 all "
        "hold, 1 a deviation or an error, 2 wrong usage, 3 the target cannot be loaded or every "
        "check was skipped.",
        allow_abbrev=False,
    )
    verify.set_defaults(run=_verify, parser=verify)
    add = verify.add_argument
    add(
        "target",
        nargs="?",
        metavar="TARGET",
        help="a shipped peer (peft, loralib), or package.module:name of an object, a class or a "
        "factory without arguments; without it, minilora itself",
    )
    add("--cmd", metavar="CMD", help="start a driver in another language, and check it")
    add("--level", action="append", metavar="LEVEL", help="only this level; repeatable, or a,b")
    add("--profile", default="ci", metavar="PROFILE", help="quick, ci (the default) or nightly")
    add("--dtype", action="append", metavar="DTYPE", help="only this dtype; repeatable, or a,b")
    add("--seed", type=int, default=0, metavar="N", help="draws other cases (default: 0)")
    add("--case", metavar="CHECK:DTYPE:N", help="only this case, as a report names it")
    add("--known", metavar="FILE", help="JSON list of known deviations: check, dtype, reason, link")
    add("--time-limit", type=float, metavar="SECONDS", help="for one call (default: 30)")
    add("--json", metavar="FILE", help="write the report as JSON")
    add("--junit", metavar="FILE", help="write the report as JUnit XML")
    add("--html", metavar="FILE", help="write the report as one HTML page")
    add(
        "--markdown",
        metavar="FILE",
        help="write the report as Markdown; $GITHUB_STEP_SUMMARY is written on",
    )
    add("--verbose", action="store_true", help="a line for each check, and all of each deviation")
    add("--timing", action="store_true", help="print where the time went, too")
    add("--list", action="store_true", help="list the checks and run nothing")


def _add_report(commands: argparse._SubParsersAction[_Parser]) -> None:
    report = commands.add_parser(
        "report",
        help="combine JSON reports of verify into one matrix",
        description="Shows the reports that `minilora verify --json` wrote, several of them beside "
        "each other: implementations × checks. Exit status: 0 it is shown, whatever was found, 2 "
        "wrong usage or a file that is no report.",
        allow_abbrev=False,
    )
    report.set_defaults(run=_report, parser=report)
    add = report.add_argument
    add("reports", nargs="+", metavar="FILE.json", help="what verify --json wrote")
    add("--html", metavar="FILE", help="write the matrix as one HTML page")
    add(
        "--markdown",
        metavar="FILE",
        help="write it as Markdown; $GITHUB_STEP_SUMMARY is written on",
    )
    add("--text", action="store_true", help="print it, as without the other two")
    add("--verbose", action="store_true", help="a line for each check")


def _report(arguments: argparse.Namespace) -> int:
    from minilora.verify import pages, webpage
    from minilora.verify.engine import UsageError
    from minilora.verify.reading import read_report
    from minilora.verify.report import writable

    paths = {kind: getattr(arguments, kind) for kind in ("html", "markdown")}
    for path in filter(None, paths.values()):
        if why := writable(path):
            return refuse(f"cannot write {why}", "report")
        if any(os.path.exists(path) and os.path.samefile(path, r) for r in _there(arguments)):
            return refuse(f"{path} is one of the reports; write somewhere else", "report")
    try:
        reports = [read_report(path) for path in arguments.reports]
    except UsageError as error:
        return refuse(str(error), "report")
    runs = pages.Runs(reports, arguments.reports)
    forms = {
        "html": lambda: webpage.html(reports, arguments.reports),
        "markdown": lambda: pages.markdown(reports, _room(paths["markdown"]), arguments.reports),
    }
    for kind, path in paths.items():
        if path and (why := _written(path, forms[kind]())):
            return refuse(why, "report")
    if arguments.text or not any(paths.values()):
        one = len(reports) == 1
        verbose = arguments.verbose
        say(reports[0].text(verbose) if one else pages.text(runs, verbose))
    return HOLDS


def _there(arguments: argparse.Namespace) -> list[str]:
    return [path for path in arguments.reports if os.path.exists(path)]


def _is_summary(path: str) -> bool:
    """Whether it is the file that GitHub collects the summary of a step in, to be written on."""
    collected = os.environ.get("GITHUB_STEP_SUMMARY")
    return bool(collected) and os.path.abspath(path) == os.path.abspath(collected or "")


def _room(path: str) -> int:
    """How many bytes of Markdown there is room for in a file."""
    from minilora.verify.report import MARKDOWN_BYTES

    there = os.path.getsize(path) if _is_summary(path) and os.path.exists(path) else 0
    return MARKDOWN_BYTES - there


def _written(path: str, text: str) -> str:
    """Writes a file; why it could not be written, or nothing."""
    from minilora.verify.report import write

    try:
        if _is_summary(path):
            with open(path, "a", encoding="utf-8") as file:
                file.write(text)
        else:
            write(path, text)
    except OSError as error:
        return f"cannot write {path}: {error.strerror}"
    return ""


def _add_variants(commands: argparse._SubParsersAction[_Parser]) -> None:
    variants = commands.add_parser(
        "variants",
        help="the table of LoRA's variants on every kind of layer, proven as it is printed",
        description="Runs each variant of LoRA on each kind of layer and prints which laws it "
        "keeps, its gradients' deviation from a complex step and from the real library that "
        "defines it (where the extra peers is installed), and its file. Exit status: 0 all is as "
        "the registry says, 1 something is not, 2 wrong usage.",
        allow_abbrev=False,
    )
    variants.set_defaults(run=_variants, parser=variants)
    add = variants.add_argument
    add("--variant", action="append", metavar="NAME", help="only this variant; repeatable, or a,b")
    add("--kind", action="append", metavar="KIND", help="only this kind of layer; the same")
    add("--seed", type=int, default=0, metavar="N", help="draws other cases (default: 0)")
    add("--no-library", action="store_true", help="do not ask the real libraries")
    add("--json", metavar="FILE", help="write the table as JSON")
    add("--markdown", metavar="FILE", help="write the table as Markdown")


def _add_vectors(commands: argparse._SubParsersAction[_Parser]) -> None:
    vectors = commands.add_parser(
        "vectors",
        help="write test vectors for any language, or judge answers to them",
        usage="minilora vectors DIR [options]\n       minilora vectors check DIR ANSWERS [options]",
        description="Writes the checks' cases to the folder DIR: inputs, true answers, and how far "
        "rounding may carry an answer. The bytes are the same on every machine. With check, judges "
        "the answers in the folder ANSWERS. Exit status: 0 written, or all answers hold, 1 a "
        "deviation or an error, 2 wrong usage or a set that was changed, 3 no answers.",
        allow_abbrev=False,
    )
    vectors.set_defaults(run=_vectors, parser=vectors)
    add = vectors.add_argument
    add("words", nargs="+", metavar="DIR", help="the folder of the set, and that of the answers")
    add("--level", action="append", metavar="LEVEL", help="only this level; repeatable, or a,b")
    add("--check", action="append", metavar="CHECK", help="only this check, * for anything")
    add("--seed", type=int, default=0, metavar="N", help="writes other vectors (default: 0)")
    add("--case", metavar="ID", help="judges this vector alone")
    add("--json", metavar="FILE", help="write the report as JSON")
    add("--junit", metavar="FILE", help="write the report as JUnit XML")
    add("--html", metavar="FILE", help="write the report as one HTML page")


def _vectors(arguments: argparse.Namespace) -> int:
    from minilora.formats.files import FormatError
    from minilora.verify.engine import UsageError
    from minilora.verify.vectors import vectors, write

    if arguments.words[0] == "check":
        return _vectors_check(arguments)
    if len(arguments.words) > 1:
        says = "expected one folder; to judge answers: minilora vectors check DIR ANSWERS"
        return refuse(f"{' '.join(arguments.words)}: {says}", "vectors")
    (folder,) = arguments.words
    try:
        with progress_bar() as progress:
            levels, checks = split(arguments.level), split(arguments.check)
            made = vectors(levels, checks, arguments.seed, progress)
        written = write(folder, made, arguments.seed)
    except (UsageError, FormatError) as error:
        return refuse(str(error), "vectors")
    except OSError as error:
        return refuse(f"cannot write {folder}: {error.strerror}", "vectors")
    except ArithmeticError as error:
        print(f"minilora vectors: {error}", file=sys.stderr)
        return DEVIATES
    checks_made, size = {v.check for v in made}, sum(map(len, written.values()))
    say(
        f"{len(made)} vectors of {len(checks_made)} checks in {folder}: {len(written)} files, "
        f"{size} bytes\n"
    )
    return HOLDS


def _vectors_check(arguments: argparse.Namespace) -> int:
    from minilora.verify.answers import Answered, judge
    from minilora.verify.contract import LoadError
    from minilora.verify.engine import UsageError
    from minilora.verify.report import writable, write
    from minilora.verify.vectors import chosen, read

    if len(arguments.words) != 3:
        return refuse("expected minilora vectors check DIR ANSWERS", "vectors")
    _, folder, answers = arguments.words
    files = {kind: getattr(arguments, kind) for kind in ("json", "junit", "html")}
    for path in filter(None, files.values()):
        if why := writable(path):
            return refuse(f"cannot write {why}", "vectors")
    command = ["minilora", "vectors", "check", folder, answers]
    try:
        manifest, given = read(folder)
        given = chosen(given, split(arguments.level), split(arguments.check), arguments.case)
        with progress_bar() as progress:
            report = judge(
                given,
                Answered(answers),
                seed=manifest["seed"],
                command=command,
                progress=progress,
            )
    except UsageError as error:
        return refuse(str(error), "vectors")
    except LoadError as error:
        print(f"minilora vectors: {error}", file=sys.stderr)
        return NOT_LOADED
    for kind, path in files.items():
        try:
            if path:
                write(path, getattr(report, kind)())
        except OSError as error:
            return refuse(f"cannot write {path}: {error.strerror}", "vectors")
    say(report.text())
    return report.exit_status


def _add_selftest(commands: argparse._SubParsersAction[_Parser]) -> None:
    selftest = commands.add_parser(
        "selftest",
        help="check the checks, by every known misreading of the equations",
        description="Puts every misreading of the catalogue to the checks, each of which must be "
        "caught, and many cases of implementations that are right, none of which may be. Exit "
        "status: 0 all is well, 1 a rate falls short, 2 wrong usage.",
        allow_abbrev=False,
    )
    selftest.set_defaults(run=_selftest, parser=selftest)
    add = selftest.add_argument
    add("--level", action="append", metavar="LEVEL", help="only this level; repeatable, or a,b")
    add("--dtype", action="append", metavar="DTYPE", help="only this dtype; repeatable, or a,b")
    add("--seed", type=int, default=0, metavar="N", help="draws other cases (default: 0)")
    add("--cases", type=int, metavar="N", help="cases of what is right, in each dtype")
    add("--quick", action="store_true", help="one misreading of each class, and fewer cases")
    add("--jobs", type=int, metavar="N", help="processes (default: one for each processor)")
    add("--json", metavar="FILE", help="write the report as JSON")
    add("--markdown", metavar="FILE", help="write the report as Markdown")


def _selftest(arguments: argparse.Namespace) -> int:
    from minilora.verify.engine import UsageError
    from minilora.verify.report import writable, write
    from minilora.verify.selftest import selftest

    files = {kind: getattr(arguments, kind) for kind in ("json", "markdown")}
    for path in filter(None, files.values()):
        if why := writable(path):
            return refuse(f"cannot write {why}", "selftest")
    try:
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
    except UsageError as error:
        return refuse(str(error), "selftest")
    for kind, path in files.items():
        if path:
            try:
                write(path, getattr(report, kind)())
            except OSError as error:
                return refuse(f"cannot write {path}: {error.strerror}", "selftest")
    say(report.text())
    return HOLDS if report.exit_status == 0 else DEVIATES


def _processors() -> int:
    """How many processors there are for this process, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _variants(arguments: argparse.Namespace) -> int:
    from minilora.laws import KINDS
    from minilora.variants import REGISTRY
    from minilora.verify.report import writable, write
    from minilora.verify.table import as_json, as_markdown, as_text, cells

    chosen = []
    for option, known in (("variant", REGISTRY), ("kind", KINDS)):
        asked = split(getattr(arguments, option)) or list(known)
        if unknown := [name for name in asked if name not in known]:
            expected = f"expected some of {', '.join(known)}"
            return refuse(f"--{option} {', '.join(unknown)}: {expected}", "variants")
        chosen.append(asked)
    files = {"json": as_json, "markdown": as_markdown}
    paths = {kind: getattr(arguments, kind) for kind in files if getattr(arguments, kind)}
    for path in paths.values():
        if why := writable(path):
            return refuse(f"cannot write {why}", "variants")
    with stdout_on_stderr(), progress_bar() as progress:

        def step(number: int, total: int) -> None:
            if progress:
                progress("cells:", number, total)

        entries, kinds = chosen
        table = list(cells(entries, kinds, arguments.seed, not arguments.no_library, step))
    for kind, path in paths.items():
        try:
            write(path, files[kind](table))
        except OSError as error:
            return refuse(f"cannot write {path}: {error.strerror}", "variants")
    say(as_text(table))
    return HOLDS if all(cell.good for cell in table) else DEVIATES


def _verify(arguments: argparse.Namespace) -> int:
    from minilora.verify.checks import CHECKS
    from minilora.verify.contract import OWN, TIME_LIMIT, LoadError, load
    from minilora.verify.engine import Interrupted, UsageError, plan, read_known, run
    from minilora.verify.report import writable

    levels, dtypes = split(arguments.level), split(arguments.dtype)
    limit = TIME_LIMIT if arguments.time_limit is None else arguments.time_limit
    choice = {
        "levels": levels,
        "profile": arguments.profile,
        "dtypes": dtypes,
        "seed": arguments.seed,
        "case": arguments.case,
    }
    try:
        plans = plan(CHECKS, **choice)
        known = read_known(arguments.known) if arguments.known else None
    except UsageError as error:
        return refuse(str(error))
    if arguments.cmd is not None and (why := _no_command(arguments)):
        return refuse(why)
    if not limit > 0:
        return refuse(f"--time-limit is {limit:g}; expected more than 0 seconds")
    if arguments.list:
        say(_listed(list(dict.fromkeys((p.check.id, p.check.level, p.check.title) for p in plans))))
        return HOLDS
    command = ["minilora", "verify", *filter(None, [arguments.target])]
    command += [] if arguments.cmd is None else ["--cmd", arguments.cmd]
    if arguments.time_limit is not None:
        command += ["--time-limit", f"{limit:g}"]
    files = {kind: getattr(arguments, kind) for kind in ("json", "junit", "html", "markdown")}
    for path in filter(None, files.values()):
        if why := writable(path):
            return refuse(f"cannot write {why}")
    try:
        with contextlib.ExitStack() as opened:
            opened.enter_context(stdout_on_stderr())
            if arguments.cmd is None:
                implementation = load(arguments.target or OWN)
            else:
                from minilora.verify.process import Driver

                implementation = opened.enter_context(Driver(arguments.cmd, time_limit=limit))
            with progress_bar() as progress:
                report = run(
                    CHECKS,
                    implementation,
                    **choice,
                    known=known,
                    time_limit=limit,
                    progress=progress,
                    command=command,
                )
    except UsageError as error:
        return refuse(str(error))
    except LoadError as error:
        print(f"minilora verify: {error}", file=sys.stderr)
        return NOT_LOADED
    except Interrupted as interrupted:
        report = interrupted.report
    status = _deliver(report, files, arguments.verbose)
    if arguments.timing:
        say(f"\n{report.timing()}")
    return status


def _no_command(arguments: argparse.Namespace) -> str:
    """What is wrong with ``--cmd``, or nothing."""
    from minilora.verify.process import words

    if arguments.target is not None:
        return f"TARGET {arguments.target!r} and --cmd both; give one of them"
    try:
        words(arguments.cmd)
    except ValueError as error:
        return f"--cmd: {error}"
    return ""


def _deliver(report: Report, files: dict[str, str | None], verbose: bool) -> int:
    """Writes the files and prints the report: the files first, for a reader may close the pipe."""
    failures: list[str] = []
    for kind, path in files.items():
        if path:
            text = report.markdown(_room(path)) if kind == "markdown" else getattr(report, kind)()
            failures += filter(None, [_written(path, text)])
    say(report.text(verbose))
    for failure in failures:
        refuse(failure)
    return USAGE if failures else report.exit_status


def _listed(checks: Sequence[tuple[str, str, str]]) -> str:
    import textwrap

    lines = []
    for check, level, title in checks:
        lines += [
            f"{check}  ({level})",
            *textwrap.wrap(title, 76, initial_indent="    ", subsequent_indent="    "),
        ]
    return "\n".join(lines) + "\n"
