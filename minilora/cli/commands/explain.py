"""``minilora explain``: what a name in a report means."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from minilora.cli.console import OK, say
from minilora.cli.options import add_command

if TYPE_CHECKING:
    from minilora.audit.mistakes import Mistake
    from minilora.findings.finding import Finding, Library
    from minilora.verify.core.level import Level
    from minilora.verify.core.types import Check
    from minilora.verify.mutants.mutant import Mutant


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "explain",
        "explain a name that stands in a report",
        "Print what a check, a mutant, a finding, a level, or a mistake or verdict of an audit is, "
        "and what to do about it; of a library its findings as issues. Without a name, list them "
        "all.",
        _run,
        "0 printed, 2 no such name",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="such as scale-alpha")


def _run(arguments: argparse.Namespace) -> int:
    kinds = names()
    if arguments.name is None:
        say("\n\n".join(_listed(kind, known) for kind, known in kinds.items()) + "\n")
        return OK
    name = arguments.name.rpartition(":")[0] or arguments.name  # a check's with its dtype
    found = [known[name]() for known in kinds.values() if name in known]
    if not found:
        raise ValueError(_unknown(name, kinds))
    say("\n\n".join(found) + "\n")
    return OK


Explained = Mapping[str, Callable[[], str]]


def names() -> dict[str, Explained]:
    """Each kind of name, and of each name what prints its page."""
    from functools import partial

    from minilora.audit.cause import CAUSES
    from minilora.audit.mistakes import MISTAKES
    from minilora.audit.result import VERDICTS
    from minilora.findings import FINDINGS, LIBRARIES
    from minilora.verify.checks.registry import CHECKS, LEVELS
    from minilora.verify.mutants import MUTANTS

    return {
        "Levels": {level.name: partial(_of_level, level) for level in LEVELS},
        "Checks": {check.id: partial(_of_check, check) for check in CHECKS},
        "Mutants": {mutant.id: partial(_of_mutant, mutant) for mutant in MUTANTS},
        "Findings": {name: partial(_of_finding, each) for name, each in FINDINGS.items()},
        "Findings of a library, as issues": {
            name: partial(_of_library, each) for name, each in LIBRARIES.items()
        },
        "Mistakes in merges": {
            **{name: partial(_of_cause, name) for name in CAUSES},
            **{each.id: partial(_of_mistake, each) for each in MISTAKES},
        },
        "Verdicts of audits": {name: partial(_of_verdict, name) for name in VERDICTS},
    }


def _listed(kind: str, known: Explained) -> str:
    return f"{kind} ({len(known)})\n" + textwrap.fill(
        ", ".join(known), 92, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )


def _unknown(name: str, kinds: Mapping[str, Explained]) -> str:
    from difflib import get_close_matches

    every = [each for known in kinds.values() for each in known]
    inside = [each for each in every if name in each]
    close = (get_close_matches(name, every, 5, 0.6) or inside)[:5]
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    return f"{name}: found no such name{hint}; minilora explain lists all"


def _page(title: str, *parts: tuple[str, str]) -> str:
    """A title, and paragraphs with their headings; empty ones are left out."""
    lines = [title]
    for heading, text in parts:
        if text.strip():
            lines += ["", *_wrapped(f"{heading}: {text}" if heading else text)]
    return "\n".join(lines)


def _wrapped(text: str) -> Iterator[str]:
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        more = indent + "    " if indent else ""
        yield textwrap.fill(
            line, 92, subsequent_indent=more, break_long_words=False, break_on_hyphens=False
        )


def _of_level(level: Level) -> str:
    from minilora.verify.checks.registry import CHECKS

    checks = [check for check in CHECKS if check.level == level.name]
    methods = sorted({method for check in checks for method in check.needs})
    listed = "\n".join(f"  {check.id}  {check.title}" for check in checks)
    return _page(
        f"{level.name}: a level of minilora verify",
        ("", f"{len(checks)} checks of the methods {', '.join(methods)}:\n{listed}"),
        ("Run it", f"minilora verify TARGET --level {level.name}"),
    )


def _of_check(check: Check) -> str:
    from minilora.findings import FINDINGS
    from minilora.verify.mutants import MUTANTS

    best = [mutant.id for mutant in MUTANTS if mutant.caught_by == check.id]
    finds = [name for name, finding in FINDINGS.items() if check.id in finding.checks]
    kind = "compares two answers of yours" if check.is_relation else "compares with the equations"
    return _page(
        f"{check.id}: a check of the level {check.level}",
        ("", check.title),
        ("", f"It calls {', '.join(check.needs)}, and {kind}."),
        ("It shows best these mutants", ", ".join(best)),
        ("It finds", ", ".join(finds)),
        ("Run it", f"minilora verify TARGET --level {check.level} --verbose"),
    )


def _of_mutant(mutant: Mutant) -> str:
    edits = "\n".join(
        f"  right:   {' '.join(right.split())}\n  instead: {' '.join(wrong.split())}"
        for right, wrong in mutant.edits.items()
    )
    verdict = (
        "It only looks wrong: it is the same function, and passes."
        if mutant.equivalent
        else f"The check {mutant.caught_by} shows it best."
        if mutant.caught_by
        else ""
    )
    return _page(
        f"{mutant.id}: a mutant of the level {mutant.level}, class {mutant.family}",
        ("It computes instead", mutant.formula),
        (
            "",
            "The notation is y = x Wᵀ + b + s H Bᵀ with H = (K∘x) Aᵀ, tokens in rows; G is the "
            "gradient by y, dH = s G B.",
        ),
        ("In the code", f"\n{edits}" if edits else ""),
        ("", verdict),
        ("Seen in", ", ".join(mutant.seen)),
    )


def _of_finding(finding: Finding) -> str:
    import json

    from minilora.findings import LIBRARIES
    from minilora.findings.finding import SEVERITIES
    from minilora.findings.issue import plain
    from minilora.findings.reproduce import printed, script

    asked = f"minilora verify {finding.peer}: {', '.join(finding.checks)}" if finding.peer else ""
    stored = finding.stored.effect if finding.stored else ""
    where = f"{LIBRARIES[finding.library].title} {finding.versions}".rstrip()
    text, said = script(finding.id), printed().get(finding.id)
    shown = f"\n\nA script that shows it:\n\n{textwrap.indent(text, '    ')}" if text else ""
    shown += f"\nIt printed:\n\n{textwrap.indent(said.text.rstrip(), '    ')}" if said else ""
    page = _page(
        f"{finding.id}: a finding in {where}",
        ("", finding.title.rstrip(".") + "."),
        ("Severity", SEVERITIES[finding.severity]),
        ("Status", f"{finding.status}; seen in {finding.seen}"),
        ("It does", plain(finding.does)),
        ("Right is", plain(finding.right)),
        ("Consequence", plain(finding.consequence)),
        ("Of an adapter in files", stored),
        ("Cause", ": ".join(filter(None, [finding.cause, finding.code]))),
        ("Proposed fix", finding.fix),
        ("Found by", asked or finding.not_asked),
        ("Also in", json.dumps(dict(finding.also)) if finding.also else ""),
        ("Read, not run, in", "" if text else finding.source),
    )
    return page + shown.rstrip()


def _of_library(library: Library) -> str:
    from minilora.findings.issue import issues

    return f"{library.name}: its findings as issues, in Markdown\n\n{issues(library)}"


def _of_cause(name: str) -> str:
    from minilora.audit.cause import CAUSES, remedy_of
    from minilora.audit.scales import WRONG_SCALES

    verdict = "factor" if name in [wrong.id for wrong in WRONG_SCALES] else ""
    what = ("What to do", remedy_of(name, verdict))
    return _page(f"{name}: a mistake in a merge", ("", CAUSES[name]), what)


def _of_mistake(mistake: Mistake) -> str:
    from minilora.audit.cause import remedy_of
    from minilora.audit.result import VERDICTS

    return _page(
        f"{mistake.id}: a mistake in a merge, the verdict {mistake.verdict}",
        ("", mistake.text),
        ("The verdict says", VERDICTS[mistake.verdict][1]),
        ("What to do", remedy_of(mistake.id, mistake.verdict)),
        ("Seen in", ", ".join(mistake.seen)),
    )


def _of_verdict(name: str) -> str:
    from minilora.audit.mistakes import MISTAKES
    from minilora.audit.result import VERDICTS

    severity, text = VERDICTS[name]
    mistakes = [mistake.id for mistake in MISTAKES if mistake.verdict == name]
    return _page(
        f"{name}: a verdict of minilora audit, severity {severity}",
        ("", text),
        ("Mistakes that end in it", ", ".join(mistakes)),
    )
