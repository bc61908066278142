"""The table of every variant on every kind of layer: what was proven of each, in this very run.

A cell has the laws that hold over exact rationals, the worst deviation of the gradients from a
complex step, the deviation of the real library that defines the variant, and the file that an
adapter was written to and read from, bit for bit. What is lacking has its reason.
"""

from __future__ import annotations

import json
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from minilora.io.files import read_tensors, write_tensors
from minilora.io.formats.layouts import from_tensors, refusal, to_tensors
from minilora.spec.variants import REGISTRY
from minilora.verify.properties.derivatives import derivative_error
from minilora.verify.properties.laws import LAWS, holds
from minilora.verify.properties.layer_kinds import LayerCase, draw_case

PROMISE = 1e-13
"""What the project promises of a gradient in float64, relative to what it sums up.

It is a promise, 900 times the unit roundoff, and no estimate: rounding does a tenth of it to these
small layers, and the slightest error in a formula far more.
"""

SEEDS = 2
"""Cases of each cell: one with distinct sizes, one with a square matrix."""


@dataclass(frozen=True)
class Cell:
    """What one variant on one kind of layer showed, or why they do not go together.

    ``laws``: for each law whether it held, in all cases, None where it says nothing; ``expected``
    is what the registry says. ``step``: the worst relative error against a complex step.
    ``library``: its name, its release and what it was asked, with its deviation, or the reason for
    none; ``file`` likewise.
    """

    entry: str
    kind: str
    lacks: str | None = None
    laws: dict[str, bool | None] | None = None
    breaks: dict[str, str] | None = None
    step: float | None = None
    library: str | None = None
    deviation: float | None = None
    no_library: str | None = None
    file: str | None = None
    no_file: str | None = None

    @property
    def good(self) -> bool:
        """Whether all is as the registry says, and the figures within the promise."""
        figures = [v for v in (self.step, self.deviation) if v is not None]
        return not self.unexpected and all(v <= PROMISE for v in figures)

    @property
    def unexpected(self) -> list[str]:
        """The laws that hold or fail against what the registry says."""
        broken = self.breaks or {}
        laws = (self.laws or {}).items()
        return [law for law, held in laws if held is not None and held == (law in broken)]


def cell(entry: str, kind: str, seed: int = 0, library: bool = True) -> Cell:
    """The cell's checks, run now; without ``library`` the real one is not asked."""
    if why := REGISTRY[entry].lacks.get(kind):
        return Cell(entry, kind, lacks=why)

    def draw(number: int, exact: bool) -> LayerCase:
        rng = np.random.default_rng((seed, number))
        return draw_case(entry, kind, rng, exact, square=number % 2 == 1)

    breaks = dict(REGISTRY[entry].breaks)
    laws: dict[str, bool | None] = {}
    for law in LAWS:
        held = [holds(law, draw(i, True)) for i in range(SEEDS)]
        laws[law] = None if None in held else all(held)
    steps = [
        derivative_error(draw(i, False), np.random.default_rng((seed, i))) for i in range(SEEDS)
    ]
    named, figure, no_library = _library(entry, kind, seed) if library else (None, None, NOT_ASKED)
    file, no_file = _file(draw(0, False))
    return Cell(
        entry,
        kind,
        laws=laws,
        breaks=breaks,
        step=max(steps),
        library=named,
        deviation=figure,
        no_library=no_library,
        file=file,
        no_file=no_file,
    )


NOT_ASKED = "not asked for"


def _library(entry: str, kind: str, seed: int) -> tuple[str | None, float | None, str | None]:
    needed = ("torch", "peft", "loralib", "transformers")
    if missing := [name for name in needed if find_spec(name) is None]:
        return None, None, f"{', '.join(missing)} not installed: pip install 'minilora[peers]'"
    from minilora.verify.properties.libraries import deviation

    found = deviation(entry, kind, seed)
    return (None, None, found.by) if found.worst is None else (found.by, found.worst, None)


def _file(case: LayerCase) -> tuple[str | None, str | None]:
    """The name of the format in which the adapter came back with the same bits, or the reason."""
    if why := refusal(case.variant, case.kind):
        return None, why
    kernel = case.extra["geometry"].kernel if "geometry" in case.extra else ()
    rows = case.extra.get("rows", ())
    tensors = to_tensors(case.variant, case.kind, case.P, kernel, rows)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter_model.safetensors"
        write_tensors(file, tensors)
        parts = from_tensors(case.variant, case.kind, read_tensors(file), len(case.P), rows)
    pairs = ((a, b) for P, Q in zip(parts, case.P, strict=True) for a, b in zip(P, Q, strict=True))
    if not all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs):
        raise AssertionError(f"{case.entry} on {case.kind}: other bits came back from the file")
    return "PEFT", None


def cells(
    entries: Sequence[str],
    kinds: Sequence[str],
    seed: int = 0,
    library: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Cell]:
    """The table's cells, variant by variant."""
    pairs = [(entry, kind) for entry in entries for kind in kinds]
    for number, (entry, kind) in enumerate(pairs):
        if progress:
            progress(number, len(pairs))
        yield cell(entry, kind, seed, library)


def as_json(table: Sequence[Cell]) -> str:
    """The table with all of its reasons."""
    rows = [{k: v for k, v in asdict(c).items() if v is not None} for c in table]
    return json.dumps({"schema": 1, "cells": rows}, indent=2, ensure_ascii=False) + "\n"


class Notes:
    """Reasons, numbered as they come."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def mark(self, *reasons: str) -> str:
        """The reasons' numbers, such as [3] or [1,2]."""
        numbers = [self.numbers.setdefault(reason, len(self.numbers) + 1) for reason in reasons]
        return f"[{','.join(map(str, sorted(set(numbers))))}]" if numbers else ""


HEADER = ("variant", "kind", "laws", "complex step", "real library", "file")


def rows_of(table: Sequence[Cell]) -> tuple[list[tuple[str, ...]], Notes]:
    """The table's lines, a reason's number where something is lacking, and the reasons."""
    notes, lines = Notes(), []
    for c in table:
        if c.laws is None:
            lines.append((c.entry, c.kind, *[notes.mark(c.lacks or "")] * 4))
            continue
        held = sum(v is True for v in c.laws.values())
        asked = sum(v is not None for v in c.laws.values())
        broken = [
            f"law {law!r} not kept: {why}"
            for law, why in (c.breaks or {}).items()
            if c.laws.get(law) is False
        ]
        silent = [
            f"law {law!r} says nothing: no number of the input is dropped"
            for law, v in c.laws.items()
            if v is None
        ]
        broken += [f"law {law!r}: NOT AS THE REGISTRY SAYS" for law in c.unexpected]
        deviation = (
            notes.mark(c.no_library or "")
            if c.deviation is None
            else f"{c.deviation:.1e} {notes.mark(c.library or '')}"
        )
        lines.append(
            (
                c.entry,
                c.kind,
                f"{held} of {asked} {notes.mark(*broken, *silent)}".rstrip(),
                f"{c.step:.1e}",
                deviation,
                c.file or notes.mark(c.no_file or ""),
            )
        )
    return lines, notes


def as_text(table: Sequence[Cell]) -> str:
    """The table for a terminal, its reasons below."""
    lines, notes = rows_of(table)
    widths = [max(map(len, column)) for column in zip(HEADER, *lines, strict=True)]
    padded = (zip(line, widths, strict=True) for line in (HEADER, *lines))
    out = ["  ".join(f"{v:{w}}" for v, w in line).rstrip() for line in padded]
    out.append("")
    for reason, number in notes.numbers.items():
        mark = f"[{number}] "
        out += textwrap.wrap(reason, 92, initial_indent=mark, subsequent_indent=" " * len(mark))
    return "\n".join(out) + f"\n\n{summary(table)}\n"


def as_markdown(table: Sequence[Cell]) -> str:
    """The table as Markdown, its reasons below."""
    lines, notes = rows_of(table)
    rows = [HEADER, ("---",) * len(HEADER), *lines]
    out = ["| " + " | ".join(line) + " |" for line in rows]
    out += ["", *(f"{n}. {reason}" for reason, n in notes.numbers.items())]
    return "\n".join([*out, "", summary(table), ""])


def summary(table: Sequence[Cell]) -> str:
    """One line: how many cells, the worst figures, and what was not as it should be."""
    run = [c for c in table if c.laws is not None]
    steps = [c.step for c in run if c.step is not None]
    figures = [c.deviation for c in run if c.deviation is not None]
    wrong = [f"{c.entry} on {c.kind}: {', '.join(c.unexpected)}" for c in run if c.unexpected]
    parts: list[Any] = [f"{len(table)} cells, {len(table) - len(run)} that do not go together"]
    parts += [f"complex step at most {max(steps):.1e}"] if steps else []
    parts += [f"real libraries at most {max(figures):.1e} in {len(figures)}"] if figures else []
    parts += [f"NOT AS THE REGISTRY SAYS: {'; '.join(wrong)}"] if wrong else []
    return "; ".join(parts)
