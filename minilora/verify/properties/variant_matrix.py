"""The table of every variant on every kind of layer: what was proven of each, in this very run.

A cell has the laws that hold over exact rationals, the worst deviation of the gradients from a
complex step, the deviation of the library that defines the variant, and the file from which an
adapter was read with the bits that were written. What is lacking has its reason.
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

from minilora.io.atomic import write_tensors
from minilora.io.files import read_tensors
from minilora.io.formats.peft.layers import from_tensors, refusal, to_tensors
from minilora.spec.variants import REGISTRY
from minilora.verify.properties.derivatives import derivative_error
from minilora.verify.properties.laws import LAWS, holds
from minilora.verify.properties.layer_kinds import LayerCase, draw_case
from minilora.verify.properties.library_names import library_names

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

    ``laws``: for each law whether it held, in all cases, None where it does not apply; ``breaks``:
    those that the registry says are broken, and why. ``step``: the worst relative error against a
    complex step. ``library``: the libraries with their releases and how they were asked, and
    ``deviation`` theirs, or ``no_library``, the reason for none; ``file`` and ``no_file`` likewise.
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
        breaks = self.breaks or {}
        laws = (self.laws or {}).items()
        return [law for law, held in laws if held is not None and held == (law in breaks)]


NOT_ASKED = "not asked"


def cell(entry: str, kind: str, seed: int = 0, library: bool = True) -> Cell:
    """The cell's checks, run now; without ``library`` no library is asked."""
    if why := REGISTRY[entry].lacks.get(kind):
        return Cell(entry, kind, lacks=why)

    def draw(number: int, exact: bool) -> LayerCase:
        rng = np.random.default_rng((seed, number))
        return draw_case(entry, kind, rng, exact, square=number % 2 == 1)

    laws: dict[str, bool | None] = {}
    for law in LAWS:
        held = [holds(law, draw(i, True)) for i in range(SEEDS)]
        laws[law] = None if None in held else all(held)
    steps = [
        derivative_error(draw(i, False), np.random.default_rng((seed, i))) for i in range(SEEDS)
    ]
    of_library = _library(entry, kind, seed) if library else {"no_library": NOT_ASKED}
    of_file = _file(draw(0, False))
    breaks = dict(REGISTRY[entry].breaks)
    return Cell(entry, kind, laws=laws, breaks=breaks, step=max(steps), **of_library, **of_file)


def _library(entry: str, kind: str, seed: int) -> dict[str, Any]:
    """The fields of the cell that say how far the libraries are, or why none was asked."""
    needed = ("torch", "peft", "loralib", "transformers")
    if missing := [name for name in needed if find_spec(name) is None]:
        remedy = "pip install 'minilora[peers]'"
        return {"no_library": f"{', '.join(missing)} not installed: {remedy}"}
    from minilora.verify.properties.libraries import deviation

    found = deviation(entry, kind, seed)
    if found.worst is None:
        return {"no_library": found.by}
    return {"library": found.by, "deviation": found.worst}


def _file(case: LayerCase) -> dict[str, Any]:
    """The fields of the cell that name the format which gave back the same bits, or the reason."""
    if why := refusal(case.variant, case.kind):
        return {"no_file": why}
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
    return {"file": "PEFT"}


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
    """The table with all reasons in full."""
    rows = [{k: v for k, v in asdict(c).items() if v is not None} for c in table]
    return json.dumps({"schema": 1, "cells": rows}, indent=2, ensure_ascii=False) + "\n"


class Notes:
    """Footnotes, numbered as they come."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def mark(self, *reasons: str) -> str:
        """The footnotes' numbers, such as [3] or [1,2]; nothing without reasons."""
        numbers = {self.numbers.setdefault(reason, len(self.numbers) + 1) for reason in reasons}
        return f"[{','.join(map(str, sorted(numbers)))}]" if numbers else ""


HEADER = ("variant", "kind", "laws", "complex step", "library", "deviation", "file")


def rows_of(table: Sequence[Cell]) -> tuple[list[tuple[str, ...]], Notes]:
    """The table's lines, a footnote's number where something is lacking, and the footnotes."""
    notes = Notes()
    return [_row(c, notes) for c in table], notes


def _row(c: Cell, notes: Notes) -> tuple[str, ...]:
    if c.lacks is not None:
        return c.entry, c.kind, f"– {notes.mark(c.lacks)}", *["–"] * (len(HEADER) - 3)
    laws, asked = _laws(c, notes), _asked(c, notes)
    file = c.file or f"none {notes.mark(c.no_file or '')}"
    return c.entry, c.kind, laws, f"{c.step:.1e}", *asked, file


def _laws(c: Cell, notes: Notes) -> str:
    """How many laws held, of those that apply; a footnote for each that is broken or does not."""
    laws, breaks = c.laws or {}, c.breaks or {}
    reasons = [f"law {law!r} is broken: {why}" for law, why in breaks.items() if laws[law] is False]
    reasons += [
        f"law {law!r} does not apply: no number of the input is dropped"
        for law, held in laws.items()
        if held is None
    ]
    reasons += [f"law {law!r}: UNEXPECTED, the registry says otherwise" for law in c.unexpected]
    held = sum(value is True for value in laws.values())
    applies = sum(value is not None for value in laws.values())
    return f"{held} of {applies} {notes.mark(*reasons)}".rstrip()


def _asked(c: Cell, notes: Notes) -> tuple[str, str]:
    """The libraries' names, and their deviation; a footnote says how they were asked."""
    names = ", ".join(library_names(c.entry, c.kind))
    if c.deviation is not None:
        return f"{names} {notes.mark(c.library or '')}", f"{c.deviation:.1e}"
    if c.no_library == NOT_ASKED:
        return names, NOT_ASKED
    return f"none {notes.mark(c.no_library or '')}", "–"


def as_text(table: Sequence[Cell]) -> str:
    """The table for a terminal, its footnotes below."""
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
    """The table as Markdown, its footnotes below."""
    lines, notes = rows_of(table)
    rows = [HEADER, ("---",) * len(HEADER), *lines]
    out = ["| " + " | ".join(line) + " |" for line in rows]
    out += ["", *(f"{n}. {reason}" for reason, n in notes.numbers.items())]
    return "\n".join([*out, "", summary(table), ""])


def summary(table: Sequence[Cell]) -> str:
    """One line: how many cells, the worst figures, and what is not as the registry says."""
    apart = sum(c.lacks is not None for c in table)
    parts = [f"{len(table)} cells, {apart} that do not go together"]
    if steps := [c.step for c in table if c.step is not None]:
        parts.append(f"complex step at most {max(steps):.1e}")
    if deviations := [c.deviation for c in table if c.deviation is not None]:
        parts.append(f"libraries at most {max(deviations):.1e} in {len(deviations)}")
    if wrong := [
        f"{c.entry} on {c.kind}: {', '.join(c.unexpected)}" for c in table if c.unexpected
    ]:
        parts.append(f"UNEXPECTED: {'; '.join(wrong)}")
    return "; ".join(parts)
