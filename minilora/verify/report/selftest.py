"""The report of a self-test: what was caught, named, and raised a false alarm."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from minilora.forms.words import WIDTH

if TYPE_CHECKING:
    from minilora.verify.mutants import Mutant

MUST_CATCH = ("float64", "float32")
"""The dtypes in which each mutant must be caught; in the others, some are less than rounding."""

NAMED_IN = "float32"
MIN_NAMED = 0.9
"""The share of the catalogue that the diagnosis must name, in that dtype."""


@dataclass(frozen=True)
class Alarm:
    """A case in which an implementation that is right did not pass."""

    right: str
    case: str
    seed: int
    says: str


@dataclass(frozen=True)
class Selftest:
    """What a self-test found.

    ``caught`` has for each dtype and mutant the check that caught it, or ""; where a level has
    no cases in a dtype, its mutants are absent there. ``named`` has the names that the
    diagnosis gave, the nearest first. ``broken`` are mutants that raise.
    """

    mutants: tuple[Mutant, ...]
    caught: dict[str, dict[str, str]]
    broken: dict[str, str]
    named: dict[str, tuple[str, ...]]
    cases: dict[str, dict[str, int]]
    alarms: dict[str, tuple[Alarm, ...]]
    rights: dict[str, tuple[str, ...]]
    seed: int
    quick: bool
    seconds: float = 0.0

    @property
    def missed(self) -> dict[str, list[str]]:
        """The mutants that no check catches, by the dtype."""
        return {
            dtype: [id for id, check in found.items() if not check]
            for dtype, found in self.caught.items()
        }

    @property
    def misnamed(self) -> dict[str, tuple[str, ...]]:
        """Those that are given names, but not their own."""
        return {id: names for id, names in self.named.items() if names and id not in names}

    @property
    def unnamed(self) -> list[str]:
        """Those that are given no name."""
        return [id for id, names in self.named.items() if not names]

    @property
    def shortfalls(self) -> list[str]:
        """What is not as it has to be; nothing where all is well."""
        missed = self.missed
        short = [f"not caught in {d}: {', '.join(missed[d])}" for d in MUST_CATCH if missed.get(d)]
        short += [f"{id} is broken: {why}" for id, why in self.broken.items()]
        named = len(self.named) - len(self.misnamed) - len(self.unnamed)
        if self.named and not self.quick and named < MIN_NAMED * len(self.named):
            short.append(f"{named} of {len(self.named)} named, fewer than {percent(MIN_NAMED, 1)}")
        for dtype, alarms in self.alarms.items():
            short += [f"{len(alarms)} false alarms in {dtype}"] * bool(alarms)
        return short

    @property
    def exit_status(self) -> int:
        """0 all is well, 1 something falls short."""
        return 1 if self.shortfalls else 0

    def rows(self) -> list[tuple[str, ...]]:
        """Level, class, number, rate of each dtype, rate of names: the worst class first."""
        groups: dict[tuple[str, str], list[str]] = {}
        for m in self.mutants:
            groups.setdefault((m.level, m.family), []).append(m.id)
        ordered = sorted(groups.items(), key=lambda group: self._worst(group[1]))
        everything = [m.id for m in self.mutants]
        return [
            (level, family, str(len(ids)), *self._rates(ids))
            for (level, family), ids in [*ordered, (("all", ""), everything)]
        ]

    def _shares(self, ids: Sequence[str]) -> Iterator[tuple[int, int]]:
        for found in self.caught.values():
            tried = [found[id] for id in ids if id in found]
            yield sum(map(bool, tried)), len(tried)
        if self.named:
            given = [(id, self.named[id]) for id in ids if id in self.named]
            yield sum(id in names for id, names in given), len(given)

    def _rates(self, ids: Sequence[str]) -> list[str]:
        return [percent(some, all) for some, all in self._shares(ids)]

    def _worst(self, ids: Sequence[str]) -> float:
        return min((some / all for some, all in self._shares(ids) if all), default=1.0)

    def header(self) -> tuple[str, ...]:
        """What stands above the rows."""
        return ("level", "class", "no.", *self.caught, *(["named"] if self.named else []))

    def notes(self) -> Iterator[tuple[str, str]]:
        """(what, which) of everything that the table only counts."""
        for dtype, ids in self.missed.items():
            if ids:
                yield f"not caught in {dtype}", ", ".join(ids)
        if self.misnamed:
            each = (f"{id} as {', '.join(names)}" for id, names in self.misnamed.items())
            yield f"named wrongly in {NAMED_IN}", "; ".join(each)
        if self.unnamed:
            yield f"not named in {NAMED_IN}", ", ".join(self.unnamed)
        for dtype, cases in self.cases.items():
            alarms = self.alarms[dtype]
            levels = ", ".join(f"{level} {number}" for level, number in cases.items())
            total = sum(cases.values())
            yield (
                dtype,
                f"{len(alarms)} false alarms in {total} cases of right implementations ({levels})",
            )
            for alarm in alarms[:5]:
                yield f"{alarm.right}", f"{alarm.case}, seed {alarm.seed}: {alarm.says}"
        rights = ", ".join(f"{level} {len(names)}" for level, names in self.rights.items())
        yield "implementations that are right", rights

    def summary(self) -> str:
        """The rates in a sentence, and what falls short."""
        every = len(self.mutants)
        parts = [f"{'a share, ' if self.quick else ''}{every} mutants"]
        for dtype, found in self.caught.items():
            rate = percent(sum(map(bool, found.values())), len(found))
            parts.append(f"{rate} caught in {dtype}")
        if self.named:
            own = sum(id in names for id, names in self.named.items())
            alone = sum(names == (id,) for id, names in self.named.items())
            rates = [percent(some, len(self.named)) for some in (own, alone)]
            parts.append(f"{rates[0]} named, {rates[1]} with no other")
        cases = sum(sum(each.values()) for each in self.cases.values())
        parts.append(f"{sum(map(len, self.alarms.values()))} false alarms in {cases} cases")
        return f"{', '.join(parts)}; seed {self.seed}; {self.seconds:.0f} s"

    def text(self) -> str:
        """The report for a terminal of 80 columns, worst first."""
        out = []
        for level, family, *figures in (self.header(), *self.rows()):
            out.append(f"{level:<9} {family:<9}" + "".join(f"{text:>9}" for text in figures))
        out.append("")
        for what, which in self.notes():
            out += textwrap.wrap(
                f"{what}: {which}", WIDTH, subsequent_indent="  ", break_on_hyphens=False
            )
        out += ["", *textwrap.wrap(self.summary(), WIDTH)]
        for short in self.shortfalls:
            out += textwrap.wrap(f"FALLS SHORT  {short}", WIDTH, subsequent_indent=" " * 13)
        return "\n".join(out) + "\n"

    def markdown(self) -> str:
        """The report as Markdown, for a page or the summary of a build."""
        header = self.header()
        lines = [header, tuple("---" if i < 2 else "---:" for i in range(len(header)))]
        out = ["| " + " | ".join(line) + " |" for line in [*lines, *self.rows()]]
        out += ["", *(f"- {what}: {which}" for what, which in self.notes()), "", self.summary()]
        out += ["", *(f"**FALLS SHORT** {short}" for short in self.shortfalls)]
        return "\n".join(out).rstrip() + "\n"

    def json(self) -> str:
        """The report as one document of JSON."""
        document: dict[str, Any] = {
            "schema": 1,
            "seed": self.seed,
            "quick": self.quick,
            "mutants": [
                {"id": m.id, "level": m.level, "class": m.family, "formula": m.formula}
                | {
                    "caught_by": {
                        d: found[m.id] for d, found in self.caught.items() if m.id in found
                    }
                }
                | ({"named": self.named[m.id]} if m.id in self.named else {})
                for m in self.mutants
            ],
            "rights": self.rights,
            "cases": self.cases,
            "alarms": {dtype: list(map(asdict, each)) for dtype, each in self.alarms.items()},
            "shortfalls": self.shortfalls,
            "exit_status": self.exit_status,
            "seconds": round(self.seconds, 3),
        }
        return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def percent(some: float, all: float) -> str:
    """Rounded down, so that 100 % are all."""
    return f"{100 * some // all:.0f} %" if all else "-"
