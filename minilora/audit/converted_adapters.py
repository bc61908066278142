"""Two files of one adapter: the same change of each module, with the factor where it is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.audit.adapter_tensors import place
from minilora.audit.change import Change
from minilora.audit.containers.gguf import is_permuted
from minilora.audit.floats import format_of
from minilora.audit.result import Entry, Figure
from minilora.audit.rounding import reach
from minilora.audit.scales import named_factors
from minilora.audit.stored.compare import Factored, Likeness, factored, likeness
from minilora.audit.stored.match import paired
from minilora.audit.stored.module import Held, OpenAdapter, OpenModule
from minilora.io.formats.gguf.names import file_rows
from minilora.spec.ops import Array

Progress = Callable[[int, int, str], object]

NOT_COMPARED = {"A", "B", "E", "alpha", "base weight", "base bias"}
"""The parts that the change of the weight holds, or that are no part of the adapter."""


def adapter_entries(one: OpenAdapter, other: OpenAdapter, progress: Progress) -> Iterator[Entry]:
    """A verdict on each module of both."""
    there = paired(one, other)
    read, total = 0, one.nbytes + other.nbytes
    for module in one.modules:
        name = there.get(module.name)
        if name is None:
            text = f"{one.path.name} has it, and {other.path.name} has not"
            yield Entry(module.name, "missing", text, place(module), "missing")
            continue
        pair = Pair(module, other.by_name[name], one, other)
        yield from pair.entries()
        sizes = (held.nbytes for m in (module, pair.there) for held in m.parts.values())
        read += sum(sizes)
        progress(read, total, module.name)
    for name in other.by_name.keys() - set(there.values()):
        text = f"{other.path.name} has it, and {one.path.name} has not"
        yield Entry(name, "extra", text, place(other.by_name[name]), "extra")


@dataclass(frozen=True)
class Pair:
    """One module in both files."""

    here: OpenModule
    there: OpenModule
    one: OpenAdapter
    other: OpenAdapter

    def entries(self) -> Iterator[Entry]:
        """The verdict on the change of the weight, and on what else there is of the module."""
        shared = "shared" in (self.here.kind, self.there.kind)
        if {"A", "B"} & {*self.here.parts, *self.there.parts} and not shared:
            yield self._factors()
        yield from self._beside(NOT_COMPARED - {"A", "B"} if shared else NOT_COMPARED)

    @property
    def _figures(self) -> dict[str, Figure]:
        return {**place(self.here), "rank": self.here.rank, "scale": self.there.scale}

    def _factors(self) -> Entry:
        name, figures = self.here.name, self._figures
        for module, adapter in ((self.here, self.one), (self.there, self.other)):
            if not module.is_adapted:
                text = f"{adapter.path.name} has no whole A and B of it"
                return Entry(name, "missing", text, figures, "missing")
        if self.here.shape not in (self.there.shape, self.there.shape[::-1]):
            text = f"B A has the shape {self.here.shape}, and {self.there.shape}"
            return Entry(name, "mismatch", text, figures, "shape")
        if not (self.here.is_measurable and self.there.is_measurable):
            text = f"rank {self.here.rank}: its factors are too large to be compared"
            return Entry(name, "undecided", text, figures)
        if self._has_the_bits():
            return Entry(name, "exact", "the same A, B and scale", figures)
        known = [1.0 if m.scale is None else m.scale for m in (self.here, self.there)]
        X, Y = factored(self.here, known[0]), factored(self.there, known[1])
        bad = [a for F in (*X, *Y) for a in (F.A, F.B) if not np.isfinite(a).all()]
        if bad or len(X) != len(Y):
            text = "entries are NaN or infinite" if bad else "another number of experts"
            return Entry(name, "corrupt" if bad else "mismatch", text, figures)
        return self._judged(X, Y, figures)

    def _has_the_bits(self) -> bool:
        """Whether A, B and s are the same numbers, bit for bit."""
        if self.here.scale is None or self.here.scale != self.there.scale or self._orders:
            return False
        return all(
            a.dtype == b.dtype and np.array_equal(a, b)
            for one, two in zip(self.here.pairs(), self.there.pairs(), strict=False)
            for a, b in zip(one, two, strict=True)
        )

    @property
    def _orders(self) -> list[tuple[int, Array]]:
        """The numbers of heads that q and k may have where llama.cpp orders their rows."""
        sides = (self.here, self.one), (self.there, self.other)
        permuted = [a.format == "gguf" and is_permuted(_architecture(a), m.name) for m, a in sides]
        m = self.here.shape[0]
        if permuted[0] == permuted[1]:
            return []
        heads = [h for h in range(1, m // 2 + 1) if m % (2 * h) == 0 and m // h > 2]
        turned = [np.argsort(file_rows(h, m)) if permuted[1] else file_rows(h, m) for h in heads]
        return list(zip(heads, turned, strict=True))

    def _judged(self, X: list[Factored], Y: list[Factored], figures: dict[str, Figure]) -> Entry:
        """The verdict by the first of the explanations that holds."""
        name, here, there = self.here.name, self.here, self.there
        plain = likeness(X, Y) if X[0].shape == Y[0].shape else None
        for heads, rows in self._orders:
            found = likeness(X, [y.ordered(rows) for y in Y])
            if found.is_multiple or found.is_same:
                return self._alike(found, {**figures, "heads": heads})
        if plain is not None and (plain.is_same or plain.is_multiple):
            if self._orders and plain.norm:
                text = (
                    "its rows lie in Hugging Face's order, and llama.cpp takes q and k in its own"
                )
                return Entry(name, "mismatch", text, figures, "rows-not-permuted")
            return self._alike(plain, figures)
        if X[0].shape == Y[0].shape[::-1]:
            turned = likeness(X, [y.transposed for y in Y])
            if turned.is_same or turned.is_multiple:
                said = "" if turned.is_same else f", and {turned.factor:.6g} times it"
                text = f"the change is transposed{said}"
                return Entry(name, "transposed", text, figures, "transposed")
        if other := self._other_module(Y):
            text = f"it is the change of {other}"
            return Entry(name, "other-module", text, figures, "other-module")
        if plain is None:
            text = f"B A has the shape {here.shape}, and {there.shape}"
            return Entry(name, "mismatch", text, figures, "shape")
        relative = plain.difference / plain.norm if plain.norm else math.inf
        figures |= {"relative": relative, "factor": plain.factor}
        text = (
            f"it differs by {relative:.3g} of its norm; the nearest multiple is {plain.factor:.6g}"
        )
        return Entry(name, "mismatch", text, figures, "mismatch")

    def _alike(self, found: Likeness, figures: dict[str, Figure]) -> Entry:
        """The same change, or a multiple of it, with what explains the factor."""
        name = self.here.name
        unknown = [a for m, a in self._sides if m.scale is None]
        if unknown and (found.is_multiple or found.is_same):
            text = f"the same, if the scale of {unknown[0].path.name}, which no file says, is "
            s = found.factor if unknown[0] is self.one else 1 / found.factor
            return Entry(name, "within", f"{text}{s:.6g}", figures | {"scale": s})
        if found.is_same:
            relative = found.difference / found.norm if found.norm else 0.0
            text = (
                f"the same change, within the roundings of its factors ({relative:.2g} of its norm)"
            )
            return Entry(name, "within", text, figures | {"relative": relative})
        f = found.factor
        id, why = self._why(found)
        text = f"{f:.6g} times the change{f': {why}' if why else ''}"
        more: dict[str, Figure] = {"factor": f, "factor_error": found.factor_error}
        return Entry(name, "factor", text, figures | more, id or "factor")

    @property
    def _sides(self) -> tuple[tuple[OpenModule, OpenAdapter], tuple[OpenModule, OpenAdapter]]:
        return (self.here, self.one), (self.there, self.other)

    def _why(self, found: Likeness) -> tuple[str, str]:
        """The wrong scale that gives this factor, or neither id nor words.

        No mean of base and merged: there is no base.
        """
        s = self.here.scale or 0.0
        change = Change(self.here.name, self.here.name, {}, scale=s, config=_config(self.here))
        for wrong, factor in named_factors(change):
            if wrong.id != "half" and abs(factor - found.factor) <= found.factor_error:
                return wrong.id, wrong.text
        return "", ""

    def _other_module(self, Y: list[Factored]) -> str:
        """Another module of the first file whose change this is; "" where there is none."""
        norm = math.hypot(*(y.norm for y in Y))
        for module in self.one.adapted:
            if module is self.here or module.shape != self.there.shape or module.scale is None:
                continue
            X = factored(module, module.scale)
            size = math.hypot(*(x.norm for x in X))
            near = abs(size - norm) <= 2.0**-6 * norm  # before more is computed
            if near and len(X) == len(Y) and likeness(X, Y).is_same:
                return module.name
        return ""

    def _beside(self, left_out: set[str]) -> Iterator[Entry]:
        """Every other parameter of the two: magnitudes, biases, what is saved in full."""
        parts = dict.fromkeys([*self.here.parts, *self.there.parts])
        for part in parts:
            if part in left_out:
                continue
            subject = f"{self.here.name}.{part}"
            if part not in self.there.parts or part not in self.here.parts:
                lost = part not in self.there.parts
                lacks, has = (self.other, self.one) if lost else (self.one, self.other)
                text = f"{has.path.name} has {part}, and {lacks.path.name} has not"
                of_dora = "norm-not-applied" if part == "magnitude" else "missing"
                verdict = of_dora if lost else "extra"
                yield Entry(subject, verdict, text, place(self.here), verdict)
                continue
            yield self._same_array(subject, part)

    def _same_array(self, subject: str, part: str) -> Entry:
        one, two = self.here.parts[part], self.there.parts[part]
        s = [
            m.scale if part == "lora_bias" and m.scale is not None else 1.0 for m, _ in self._sides
        ]
        a, b = (np.asarray(held.read(), np.float64).reshape(-1) for held in (one, two))
        a, b = s[0] * a, s[1] * b
        figures = place(self.here)
        if a.shape != b.shape:
            text = f"its shapes are {one.shape} and {two.shape}"
            return Entry(subject, "mismatch", text, figures, "shape")
        if np.array_equal(a, b, equal_nan=True):
            return Entry(subject, "exact", "the same numbers", figures)
        bound = abs(s[0]) * _unit(one) + abs(s[1]) * _unit(two)
        gap = np.abs(a - b)
        if np.all(gap <= bound.reshape(-1) if isinstance(bound, np.ndarray) else gap <= bound):
            return Entry(subject, "within", "the same numbers, rounded", figures)
        text = f"it differs by {float(np.max(gap)):.3g} at most"
        return Entry(subject, "mismatch", text, figures, part)


def _unit(held: Held) -> Array:
    """How far each number may be from what was stored."""
    values = np.asarray(held.read(), np.float64).reshape(-1)
    if held.spacing is not None:
        gap = np.asarray(held.spacing(), np.float64).reshape(-1)
        return reach(held.scheme or "", gap, values)
    form = format_of(held.dtype)
    bound: Array = np.maximum(form.u * np.abs(values), form.eta / 2)
    return bound


def _architecture(adapter: OpenAdapter) -> str:
    return str(adapter.settings.get("general.architecture"))


def _config(module: OpenModule) -> dict[str, Any]:
    """The settings of the scale, with the rank of the tensor."""
    return {**module.config, "r": module.config.get("r") or module.rank}
