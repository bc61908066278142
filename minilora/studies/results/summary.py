"""What the page of results needs of a report of ``verify``, as a short file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from minilora.io.atomic import write_text
from minilora.io.errors import FormatError
from minilora.verify.checks.registry import LEVELS
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.report.matrix import LETTERS
from minilora.verify.report.report import Report
from minilora.verify.report.result import STATUSES, Result
from minilora.verify.report.runs import headline
from minilora.verify.report.words import place_words, smallest_words

SCHEMA = 1
STATUS = {letter: status for status, letter in LETTERS.items()}
DEVIATES = ("fail", "error", "loose", "known")
"""The statuses of a check that deviates by more than rounding, declared or not."""


@dataclass(frozen=True)
class Deviation:
    """The worst dtype of a check that deviates.

    ``says`` is the deviation in one line and ``place`` its worst element; ``diagnosis`` the ids of
    mutants that explain it; ``smallest`` the smallest case, "" where none was looked for;
    ``findings`` the ids of the findings that were declared about it, ``reason`` what was without
    one.
    """

    check: str
    title: str
    dtype: str
    status: str
    cases: int
    deviating: int
    says: str = ""
    place: str = ""
    diagnosis: tuple[str, ...] = ()
    smallest: str = ""
    findings: tuple[str, ...] = ()
    reason: str = ""
    reproduce: str = ""


@dataclass(frozen=True)
class Summary:
    """A report in short.

    ``beside``: the versions of what was installed with the target; ``checks``: of each level
    {check: letters}, one for each of ``dtypes``, as in a matrix of reports; ``deviations``: one for
    each check that deviates, in the order of the checks.
    """

    target: str
    version: str
    beside: str
    minilora: str
    profile: str
    seed: int
    seconds: float
    dtypes: tuple[str, ...]
    causes: tuple[str, ...]
    checks: Mapping[str, Mapping[str, str]]
    deviations: tuple[Deviation, ...]

    @property
    def name(self) -> str:
        """The file's name without its ending, and the run's anchor on the page."""
        parts = filter(None, [self.target, self.version, self.profile])
        return re.sub(r"[^\w.-]+", "-", "-".join(parts))

    @property
    def release(self) -> tuple[int, ...]:
        """The version's numbers, by which releases are ordered."""
        return tuple(map(int, re.findall(r"\d+", self.version)[:4]))

    def status(self, level: str, check: str) -> str:
        """The worst status of a check; skip where it was not asked."""
        letters = self.checks.get(level, {}).get(check, "").replace("-", "")
        return min((STATUS[letter] for letter in letters), key=STATUSES.index, default="skip")

    def count(self, level: str) -> Counter[str]:
        """How many checks of a level have each status."""
        return Counter(self.status(level, check) for check in self.checks.get(level, {}))

    @property
    def total(self) -> Counter[str]:
        """How many checks have each status."""
        return sum((self.count(level) for level in self.checks), Counter())


FOLDER = re.compile(r"[^\s'\"(]*[/\\]minilora-\w{8}[/\\]")
"""The temporary folder of a check, whose name is another in each run."""


def _lasting(text: str) -> str:
    return FOLDER.sub("", text)


def summary_of(report: Report) -> Summary:
    """A report in short."""
    version, _, more = report.version.partition(" ")
    dtypes = [d for d in report.dtypes if any(r.dtype == d for r in report.results)]
    by_check: dict[str, dict[str, Result]] = {}
    for result in report.results:
        by_check.setdefault(result.check, {})[result.dtype] = result
    levels: dict[str, dict[str, str]] = {}
    deviations = []
    for check, found in by_check.items():
        worst = min(found.values(), key=lambda result: result.severity)
        levels.setdefault(worst.level, {})[check] = "".join(
            LETTERS[found[dtype].status] if dtype in found else "-" for dtype in dtypes
        )
        if worst.status in DEVIATES:
            deviations.append(_deviation(worst, found.values()))
    return Summary(
        target=report.name,
        version=version,
        beside=more.strip("()"),
        minilora=report.minilora,
        profile=report.profile,
        seed=report.seed,
        seconds=round(report.seconds, 1),
        dtypes=tuple(dtypes),
        causes=tuple(filter(None, (_lasting(cause.id) for cause in report.causes))),
        checks=levels,
        deviations=tuple(deviations),
    )


def _deviation(worst: Result, found: Iterable[Result]) -> Deviation:
    link = worst.known.link if worst.known else ""
    named = re.fullmatch(r"\(finding (.*)\)", link)
    smallest = [each.smallest for each in (worst, *found) if each.smallest is not None]
    off = max(worst.arrays, key=lambda judged: judged.excess, default=None)
    return Deviation(
        check=worst.check,
        title=worst.title,
        dtype=worst.dtype,
        status=worst.status,
        cases=worst.cases,
        deviating=worst.deviating_cases or worst.known_cases,
        says=_lasting(headline(worst)),
        place=place_words(off, worst) if off is not None and off.verdict != "pass" else "",
        diagnosis=tuple(each.id for each in worst.diagnosis[:3]),
        smallest=smallest_words(smallest[0]) if smallest else "",
        findings=tuple(named[1].split(", ")) if named else (),
        reason=worst.known.reason if worst.known and not named else "",
        reproduce=worst.reproduce,
    )


def joined(before: Summary, after: Summary) -> Summary:
    """Two runs of one release and profile as one: the levels of ``after`` beside the others.

    Only what was recorded alike is joined: of another seed, of another minilora or with other
    packages beside it, ``after`` stands alone.
    """
    alike = ("target", "version", "beside", "minilora", "profile", "seed")
    if any(getattr(before, each) != getattr(after, each) for each in alike):
        return after
    kept = {level: checks for level, checks in before.checks.items() if level not in after.checks}
    if not kept:
        return after
    dtypes = tuple(d for d in DTYPES if d in (*before.dtypes, *after.dtypes))
    levels = {**_in(dtypes, before.dtypes, kept), **_in(dtypes, after.dtypes, after.checks)}
    order = {level.name: i for i, level in enumerate(LEVELS)}
    checks = dict(sorted(levels.items(), key=lambda item: order.get(item[0], len(order))))
    found = [each for each in before.deviations if any(each.check in c for c in kept.values())]
    places = [check for level in checks.values() for check in level]
    found += after.deviations
    return replace(
        after,
        seconds=round(before.seconds + after.seconds, 1),
        dtypes=dtypes,
        causes=tuple(dict.fromkeys((*before.causes, *after.causes))),
        checks=checks,
        deviations=tuple(sorted(found, key=lambda each: places.index(each.check))),
    )


def _in(
    dtypes: Sequence[str], own: Sequence[str], levels: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, str]]:
    """The letters of more dtypes: "-" in those that were not asked."""

    def widened(letters: str) -> str:
        by_dtype = dict(zip(own, letters, strict=True))
        return "".join(by_dtype.get(dtype, "-") for dtype in dtypes)

    return {
        level: {check: widened(letters) for check, letters in checks.items()}
        for level, checks in levels.items()
    }


def add_summary(folder: Path | str, summary: Summary) -> Path:
    """Write a summary, joined with the one of the same release and profile that is there."""
    there = Path(folder) / f"{summary.name}.json"
    return write_summary(
        folder, joined(read_summary(there), summary) if there.is_file() else summary
    )


def write_summary(folder: Path | str, summary: Summary) -> Path:
    """Write a summary into a folder, under the target's name, its version and the profile."""
    path = Path(folder) / f"{summary.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"schema": SCHEMA, **asdict(summary)}
    document["deviations"] = [
        {name: value for name, value in asdict(each).items() if value or value == 0}
        for each in summary.deviations
    ]
    write_text(str(path), _by_lines(document))
    return path


def _by_lines(document: Mapping[str, Any]) -> str:
    """JSON with a line for each key, for each level and for each deviation: a reader compares."""

    def one(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    def body(key: str, value: Any) -> str:
        if key == "checks":
            return "{\n  " + ",\n  ".join(f"{one(k)}: {one(v)}" for k, v in value.items()) + "\n }"
        if key == "deviations" and value:
            return "[\n  " + ",\n  ".join(map(one, value)) + "\n ]"
        return one(value)

    lines = (f" {one(key)}: {body(key, value)}" for key, value in document.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_summary(path: Path | str) -> Summary:
    """A summary that `write_summary` wrote. Errors: FormatError for a file that is none."""
    expected = f"a summary of schema {SCHEMA}, as minilora results --add writes it"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']}")
        values = {each.name: _frozen(found[each.name]) for each in fields(Summary)}
        values["deviations"] = tuple(
            Deviation(**{name: _frozen(value) for name, value in entry.items()})
            for entry in found["deviations"]
        )
        return Summary(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(path, "results", error, expected, "record it anew") from None


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def read_summaries(folder: Path | str) -> list[Summary]:
    """All summaries of a folder, by target and release."""
    found = [read_summary(path) for path in sorted(Path(folder).glob("*.json"))]
    return sorted(found, key=lambda each: (each.target, each.release, each.version))
