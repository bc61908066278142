"""Results in words: a cell of a table, a deviation in full, a sentence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeVar

from minilora.forms.words import WIDTH, plain, wrapped
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import tidy
from minilora.verify.core.tolerance import unit_roundoff
from minilora.verify.core.types import STRUCTURE, Diagnosis, Judgement
from minilora.verify.report.result import STATUSES, FaultSeen, Result

if TYPE_CHECKING:
    from minilora.verify.report.report import Report

T = TypeVar("T")
Fold = Callable[..., list[str]]

CELL = 11
"""The columns of a dtype: the longest word with a z, and a blank."""

FAR = 1e4
"""Beyond so many standard deviations a deviation is told in parts of the value."""

MAX_ONLY = 3
"""So many traits that cases which deviate have in common are told."""

MAX_ARRAYS = 4
"""The greatest number of arrays of a deviation that are shown."""

DIGITS = {"float32": 9, "bfloat16": 4, "float16": 5}
"""Digits that tell two neighbours of a dtype apart: 1 + ⌈bits of the significand · log10 2⌉."""

FAULTS = {
    "raises": "it raises",
    "hangs": "it hangs",
    "changes its inputs": "it changes its inputs",
    "changes its answers": "it changes its earlier answers",
    "shape": "wrong shape",
    "dtype": "wrong dtype",
    "nan": "not finite",
    "missing": "incomplete",
    "crashes": "it crashes",
    "protocol": "it breaks the protocol",
    "internal": "a fault of minilora, not of the target; please report it",
}
"""The kinds of faults, in words."""


def rows(report: Report) -> list[tuple[str, dict[str, Result]]]:
    """The results of each check by dtype, the worst check first."""
    table: dict[str, dict[str, Result]] = {}
    for result in report.results:
        table.setdefault(result.check, {})[result.dtype] = result
    return sorted(table.items(), key=lambda row: min(r.severity for r in row[1].values()))


def columns(report: Report) -> list[str]:
    """The dtypes that occur, widest first."""
    seen = {result.dtype for result in report.results}
    return [dtype for dtype in DTYPES if dtype in seen]


def cell(result: Result | None) -> str:
    """A result in one word, with its worst z where that lies beyond the limit."""
    if result is None:
        return "-"
    word = result.status.upper() if result.status in ("fail", "error") else result.status
    worst = result.worst
    beyond = worst is not None and worst.excess > 1 and result.status in ("fail", "loose", "known")
    return f"{word} {_short(worst.z)}" if worst and beyond and isfinite(worst.z) else word


def _short(z: float) -> str:
    """Four characters, five from 10^10 on."""
    if z < 999.5:
        return f"{z:.3g}"
    figure, _, power = f"{z:.0e}".partition("e")
    return f"{figure}e{int(power)}" if abs(int(power)) < 100 else "huge"


def summary(report: Report) -> str:
    """The score in one sentence; what was skipped never counts as passed."""
    words = {"pass": "passed", "fail": "failed", "error": "in error", "skip": "skipped"}
    counts = [f"{n} {words.get(s, s)}" for s in reversed(STATUSES) if (n := report.count(s))]
    total = len(report.results)
    return f"{report.ran} of {total} checks ran (check × dtype): " + (
        f"{', '.join(counts) or 'nothing to check'}; {report.seconds:.1f} s"
    )


def levels(report: Report) -> str:
    """How many checks of each level hold, of those that were asked, the worst level first."""
    worst: dict[str, list[str]] = {}
    for _, found in rows(report):
        result = min(found.values(), key=lambda each: each.severity)
        worst.setdefault(result.level, []).append(result.status)
    told, unasked = [], []
    for level, statuses in worst.items():
        asked = [status for status in statuses if status != "skip"]
        if asked:
            told.append(f"{level} {asked.count('pass')} of {len(asked)}")
        else:
            unasked.append(level)
    hold = f"Checks that hold, by level: {', '.join(told)}." if told else ""
    rest = f"Not asked: {', '.join(unasked)}." if unasked else ""
    return " ".join(filter(None, [hold, rest]))


def group_alike(
    checks: Sequence[tuple[str, str, T]], shared: Callable[[T], Any]
) -> list[tuple[str, T]]:
    """(name, results) of each check; checks of a level that share their results are one.

    ``checks`` are (id, level, results). ``shared`` gives what results must have in common, or None
    for a check that stands for itself.
    """
    groups: dict[Any, list[tuple[str, T]]] = {}
    for check, level, results in checks:
        common = shared(results)
        key = check if common is None else (level, common)
        groups.setdefault(key, []).append((check, results))
    return [
        (f"{key[0]}: {len(group)} checks" if len(group) > 1 else group[0][0], group[0][1])
        for key, group in groups.items()
    ]


def grouped_rows(report: Report) -> list[tuple[str, dict[str, Result]]]:
    """:func:`rows`, those of a level that pass, are skipped or follow from one cause as one."""
    cause_of = {
        check: cause.id
        for cause in report.causes
        if cause.id
        for check in cause.checks
        if check != cause.first.check
    }

    def shared(by_dtype: dict[str, Result]) -> Any:
        statuses = {dtype: result.status for dtype, result in by_dtype.items()}
        cause = cause_of.get(next(iter(by_dtype.values())).check)
        quiet = {*statuses.values()} <= {"pass", "skip"}
        return (cause, *statuses.items()) if quiet or cause else None

    level = {result.check: result.level for result in report.results}
    return group_alike([(check, level[check], found) for check, found in rows(report)], shared)


def only_words(only: Sequence[str]) -> str:
    """What all cases that deviate have and none that passes; of many, by chance most, the first."""
    if len(only) <= MAX_ONLY:
        return f"only where {' and '.join(only)}"
    return f"what deviates alone has {', '.join(only[:MAX_ONLY])} and {len(only) - MAX_ONLY} more"


def deviation_lines(report: Report, result: Result, width: int = WIDTH) -> Iterator[str]:
    """All that is known of one deviation, in lines of this width (but for the command)."""
    fold = partial(wrapped, width=width)
    yield f"{result.status.upper():<5} {result.check}   {_precision_words(result)}"
    yield from fold(result.title, 2, 0)
    if result.deviating_cases:
        count = f"{result.deviating_cases} of {result.cases} cases"
        yield from fold(f"in {count}, first in {result.case}", 2)
    if result.only:
        yield from fold(only_words(result.only), 2)
    yield from _array_lines(result, fold)
    for fault in result.faults:
        yield from fold(f"{fault_words(fault)}", 2)
        yield from fold(f"in {fault.cases} of {result.cases} cases, first in {fault.case}", 4)
    yield from _diagnosis_lines(result.diagnosis, fold)
    if result.smallest is not None:
        yield from fold(f"SMALLEST   {smallest_words(result.smallest)}", 2, 11)
    if result.known and result.status not in ("known", "pass"):
        yield from fold(f"KNOWN      another deviation of this check: {result.known.reason}", 2, 11)
    if result.note:
        yield from fold(result.note, 2)
    yield f"  REPRODUCE  {result.reproduce}"


def _precision_words(result: Result) -> str:
    words, precision = result.dtype, result.precision
    if precision.storage != result.dtype:
        words += f" stored as {precision.storage}"
    if precision.accumulation != result.dtype:
        words += f" ({precision.accumulation} accumulation)"
    return words


def _diagnosis_lines(diagnoses: Sequence[Diagnosis], fold: Fold) -> Iterator[str]:
    if not diagnoses:
        return
    first, *others = diagnoses
    if first.id.startswith(STRUCTURE):
        for diagnosis in diagnoses:
            yield from fold(f"STRUCTURE  {diagnosis.sentence}", 2, 11)
        return
    agrees = f"With that change every array of this check agrees (rms z {first.residual_z:.2g})."
    yield from fold(f"DIAGNOSIS  {first.id}: {first.sentence} {agrees}", 2, 11)
    if first.separating and not others:
        separates = "separates it from others that give the same answers here"
        yield from fold(f"Case {first.separating} {separates}.", 13, 0)
    if others:
        names = ", ".join(f"{d.id} ({d.sentence.rstrip('.')})" for d in others[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        why = "No case of this level separates them"
        if first.separating:
            why = f"Case {first.separating} would separate them; it was not answered"
        yield from fold(f"The same answers give: {names}{more}. {why}.", 13, 0)


def _array_lines(result: Result, fold: Fold) -> Iterator[str]:
    off = [judged for judged in result.arrays if judged.verdict != "pass"]
    if off and (steps := _steps(off[0].array)):
        yield from _history_lines(result, off, steps, fold)
        return
    off.sort(key=lambda judged: -judged.excess)
    for judged in off[:MAX_ARRAYS]:
        yield from fold(f"{judged.array}  {judgement_words(judged)}", 2)
        yield from fold(place_words(judged, result), 4)
    if rest := [judged.array for judged in off[MAX_ARRAYS:]]:
        yield from fold(f"and in {len(rest)} more arrays: {tidy(', '.join(rest))}", 2)
    if ok := [judged.array for judged in result.arrays if judged.verdict == "pass"]:
        yield from fold(f"ok  {tidy(', '.join(ok), 200)}", 2)


STEP = r"\w+\([^()]*\)(?: refused)?"
"""A step of a session in words."""


def _steps(array: str) -> list[str]:
    """The steps that an array's name tells: of ``y after add('one') merge()``, two."""
    after = re.fullmatch(rf".* after ((?:{STEP} ?)+)", array)
    return re.findall(STEP, after[1]) if after else []


def _history_lines(
    result: Result, off: Sequence[Judgement], steps: Sequence[str], fold: Fold
) -> Iterator[str]:
    """The first wrong answer with the steps before it, numbered and uncut; of later ones, when."""
    first = off[0]
    name = first.array.partition(" after ")[0]
    yield from fold(f"{name} is wrong after step {len(steps)}: {judgement_words(first)}", 2)
    yield from fold(place_words(first, result), 4)
    numbered = "  ".join(f"{k} {step}" for k, step in enumerate(steps, 1))
    yield from fold(f"STEPS  {numbered}", 2, 7)
    if len(off) > 1:
        right = sum(judged.verdict == "pass" for judged in result.arrays)
        yield from fold(f"{len(off) - 1} later answers are wrong too, {right} are right", 2)


def judgement_words(judged: Judgement) -> str:
    """How many elements of an array deviate, and by how much."""
    many = f"{judged.beyond} of {judged.elements} elements"
    if judged.sigma is None:
        return f"{many} differ; none may"
    if judged.z > FAR:
        return f"{many} beyond the limit, the worst {_far(judged)}"
    z = f"{judged.z:.3g}" if isfinite(judged.z) else "unbounded"
    rms = f"{judged.rms:.3g}" if isfinite(judged.rms) else "unbounded"
    return (
        f"{many} beyond the limit: max z {z} (limit {judged.limit:g}), "
        f"rms {rms} (limit {judged.rms_limit:.3g})"
    )


def is_one_rounding(judged: Judgement, dtype: str) -> bool:
    """Whether what must be equal differs by no more than the spacing of the dtype's numbers."""
    largest = max(abs(judged.got), abs(judged.want))
    off = abs(judged.got - judged.want)
    is_exact = judged.sigma is None and dtype in DTYPES
    return is_exact and 0 < off <= 2 * unit_roundoff(dtype) * largest


def _far(judged: Judgement) -> str:
    """By how much the worst element is off, where a count of standard deviations says little."""
    if judged.want == 0 or not isfinite(judged.got):
        return f"is {judged.got:.4g} and should be {judged.want:.4g}"
    off = abs(judged.got - judged.want) / abs(judged.want)
    return f"is off by {off:.2g} of its value" if off < 0.01 else f"is off by {100 * off:.3g} %"


def place_words(judged: Judgement, result: Result) -> str:
    """The worst element: its index, its value and the correct one.

    Of two answers of the implementation either may be wrong: the name "one against another" has
    both.
    """
    got, want = (
        f"{value:.{DIGITS[result.dtype]}g}" if result.dtype in DIGITS else repr(value)
        for value in (judged.got, judged.want)
    )
    sigma = "" if judged.sigma is None else f", sigma {judged.sigma:.3g}"
    sigma += f": one rounding of {result.dtype}" if is_one_rounding(judged, result.dtype) else ""
    where = f"at {list(judged.index)}: " if judged.index else ""
    one, against, other = judged.array.partition(" against ")
    if against:
        return f"{where}they disagree: {one} is {got}, {other} is {want}{sigma}"
    if result.is_relation:
        return f"{where}one of its answers is {got}, the other {want}{sigma}"
    return f"{where}got {got}, want {want}{sigma}"


def fault_words(fault: FaultSeen) -> str:
    """What the target did, in words."""
    return f"{FAULTS.get(fault.kind, fault.kind)}: {fault.message}"


def smallest_words(smallest: Mapping[str, Any]) -> str:
    """The smallest counterexample in one line: the inputs, then got and want."""
    values = plain(smallest)
    inputs = [f"{key}={value}" for key, value in values.items() if key not in ("got", "want")]
    answer = [f"{key} {values[key]}" for key in ("got", "want") if key in values]
    text = "  ->  ".join(part for part in (" ".join(inputs), ", ".join(answer)) if part)
    return re.sub(r"(?<=\d)\.0(?![\d.e])", "", text)  # 1 for 1.0: the exact lane has integers


def check_names(report: Report, results: Sequence[Result]) -> str:
    """The checks of these results, and the dtypes where they are not all of a check's."""
    every = Counter(result.check for result in report.results)
    dtypes: dict[str, list[str]] = {}
    for result in results:
        dtypes.setdefault(result.check, []).append(result.dtype)
    return ", ".join(
        check if 1 < len(some) == every[check] else " ".join([check, *some])
        for check, some in dtypes.items()
    )


def nothing_checked(report: Report) -> str:
    """Why nothing was checked, and what to do."""
    if report.results:
        return "Nothing was checked: every check was skipped."
    return (
        f"Nothing was asked: the profile {report.profile} has no case of these levels in "
        f"{' or '.join(report.dtypes) or 'any dtype of the target'}. Ask in another dtype, such as "
        "--dtype float32, which the target then has to have among its dtypes, or with --profile ci."
    )


def known_and_skipped(report: Report) -> dict[tuple[str, str], list[Result]]:
    """The words before and after the names of checks that are known, or skipped in some cases."""
    reasons: dict[tuple[str, str], list[Result]] = {}
    for result in report.results:
        known = result.known
        if known and (result.status == "known" or result.no_longer_fails):
            before = "known" if result.status == "known" else "no longer fails, though known:"
            after = f": {known.reason} {known.link}".rstrip()
            reasons.setdefault((f"{before} ", after), []).append(result)
        if result.skipped_cases and result.status != "skip":
            after = f" skipped {result.skipped_cases} of {result.cases} cases, {result.reason}"
            reasons.setdefault(("", after), []).append(result)
    return reasons


def level_names(report: Report, results: Sequence[Result]) -> list[str]:
    """The checks of these results, and a level where they are all that it has."""
    every: dict[str, set[str]] = {}
    some: dict[str, dict[str, None]] = {}
    for result in report.results:
        every.setdefault(result.level, set()).add(result.check)
    for result in results:
        some.setdefault(result.level, {})[result.check] = None
    return [
        name
        for level, checks in some.items()
        for name in (
            [f"{level}: {len(checks)} checks"] if 1 < len(checks) == len(every[level]) else checks
        )
    ]
