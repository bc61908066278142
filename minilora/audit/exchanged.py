"""Do tensors hold what others of their shape are to hold? Then their names were exchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from minilora.audit.change import Change
from minilora.audit.judge import judge
from minilora.audit.low_rank import matrix
from minilora.audit.result import Entry
from minilora.audit.tensors import StoredTensor, TensorStore
from minilora.audit.untouched import untouched
from minilora.spec.ops import Array

ROWS = 4
"""So many rows tell whether it is worth to look at all."""

MOST = 64
"""So many tensors of a shape are tried: of a model of many experts not all."""


class Walked(Protocol):
    """What is asked of the walk over both models."""

    base: TensorStore
    merged: TensorStore

    @property
    def changed(self) -> Mapping[str, Sequence[Change]]:
        """The changes of each tensor."""

    def place_of(self, name: str) -> str | None:
        """The tensor's name in the merged model."""


def exchanged(walk: Walked, entries: Sequence[Entry]) -> list[Entry]:
    """The entries; of tensors that hold what others are to hold they say so."""
    odd = [e for e in entries if e.verdict in ("mismatch", "changed") or e.mistake == "other-base"]
    odd = [e for e in odd if e.subject in walk.base and walk.place_of(e.subject)][:MOST]
    found = {e.subject: other for e in odd if (other := _other(walk, e.subject, odd))}
    return [_told(entry, found.get(entry.subject, "")) for entry in entries]


def _told(entry: Entry, other: str) -> Entry:
    if not other:
        return entry
    text = f"it holds what {other} is to hold: the two were exchanged, or one was written twice"
    figures = {name: entry.figures[name] for name in ("layer", "module") if name in entry.figures}
    return Entry(entry.subject, "known-mistake", text, figures, "exchanged")


def _other(walk: Walked, name: str, odd: Sequence[Entry]) -> str:
    """The other tensor that is stored here; "" for none."""
    here = walk.merged[str(walk.place_of(name))]
    first = _first(here)
    for entry in odd:
        other = walk.base[entry.subject]
        if entry.subject == name or other.shape != here.shape or here.shape == ():
            continue
        W = _first(other)
        if np.linalg.norm(first - W) < 0.5 * np.linalg.norm(W):
            changes = walk.changed.get(entry.subject, [])
            found = judge(other, here, changes) if changes else untouched(other, here)
            if found.severity in ("ok", "warning"):
                return entry.subject
    return ""


def _first(tensor: StoredTensor) -> Array:
    first: Array = matrix(tensor.rows(0, min(ROWS, tensor.length))).astype(np.float64)
    return first
