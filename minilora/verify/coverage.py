"""What the checks draw: how often each value of an axis, and which pairs of values never meet.

It is read off the arguments of the calls that minilora's own implementation receives. Two values
that never meet are a place where a bug is not seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from minilora.verify.core.combinations import Pair, pairs
from minilora.verify.core.level import Level
from minilora.verify.diagnosis.answers import Direct
from minilora.verify.implementation.contract import positional
from minilora.verify.implementation.minilora_impl import Minilora
from minilora.verify.judging import judged
from minilora.verify.plan import CheckPlan, plan


@dataclass
class Coverage:
    """The calls of a level: the number of each value of its axes, and of each pair of values."""

    level: Level
    calls: int = 0
    values: Counter[tuple[str, Any]] = field(default_factory=Counter)
    pairs: Counter[Pair] = field(default_factory=Counter)

    def add(self, given: dict[str, Any]) -> None:
        """Counts a call with these arguments; not one that an axis says nothing of."""
        row = {axis.name: axis.of(given) for axis in self.level.axes}
        if None in row.values():
            return
        self.calls += 1
        self.values.update(row.items())
        self.pairs.update(combinations(row.items(), 2))

    @property
    def possible(self) -> list[Pair]:
        """All pairs of values that may meet."""
        axes = {axis.name: axis.values for axis in self.level.axes}
        return list(pairs(axes, self.level.is_possible))

    @property
    def missing(self) -> list[Pair]:
        """The pairs of values that may meet and never do."""
        return [pair for pair in self.possible if not self.pairs[pair]]

    def text(self) -> str:
        """A table: the axes with their values and counts, and what never meets."""
        width = max(len(axis.name) for axis in self.level.axes)
        lines = [
            f"{self.level.name}: {len(self.possible) - len(self.missing)} of "
            f"{len(self.possible)} pairs of values in {self.calls} calls"
        ]
        for axis in self.level.axes:
            counts = ", ".join(f"{word(v)} {self.values[axis.name, v]}" for v in axis.values)
            lines.append(f"  {axis.name:{width}}  {counts}")
        for (one, a), (other, b) in self.missing:
            lines.append(f"  never together: {one} {word(a)} and {other} {word(b)}")
        return "\n".join(lines)


def word(value: Any) -> str:
    """A value of an axis in words."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


class Recorder(Direct):
    """minilora's own implementation, with a record of the calls that it receives."""

    def __init__(self) -> None:
        super().__init__(Minilora())
        self.given: list[dict[str, Any]] = []

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The answer, after noting the arguments by their names."""
        self.given.append(dict(zip(positional(method), args, strict=False)) | kwargs)
        return super().call(method, *args, **kwargs)


def coverage(levels: Sequence[Level], plans: Sequence[CheckPlan]) -> Iterator[Coverage]:
    """The coverage of each level that has axes, by the cases that are planned."""
    for level in (level for level in levels if level.axes):
        found = Coverage(level)
        for p in (p for p in plans if p.check.level == level.name):
            subject = Recorder()
            for number in p.numbers:
                judged(p.check, subject, p.case(number))
                for given in subject.given:
                    found.add(given)
                subject.given.clear()
        if found.calls:
            yield found


def table(**choice: Any) -> str:
    """The tables of the levels that are chosen, as ``plan`` takes the choice."""
    from minilora.verify.checks.registry import CHECKS, LEVELS

    tables = [found.text() for found in coverage(LEVELS, plan(CHECKS, **choice))]
    return "\n\n".join(tables or ["no level that is chosen has axes"]) + "\n"
