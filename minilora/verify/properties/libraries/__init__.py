"""Every variant on every kind of layer, forward and gradients, beside the library that defines it.

A case of `laws` is put into the library's own layer, in float64, dropout's multiplier
included. PEFT defines most variants and LyCORIS the DoRA whose norm is differentiated; loralib and
LyCORIS have their own plain LoRA besides. What a library refuses is told in its own words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.verify.properties.layer_kinds import LayerCase, answers, draw_case
from minilora.verify.properties.libraries.loralib_layers import loralib_layer
from minilora.verify.properties.libraries.lycoris_layers import lycoris_layer
from minilora.verify.properties.libraries.peft_layers import PEFT_SIDES, peft_layer, peft_start
from minilora.verify.properties.libraries.torch_layers import (
    Answers,
    AskLibrary,
    LibraryAnswer,
    Unsupported,
)
from minilora.verify.properties.library_names import library_names

__all__ = ["Deviation", "deviation", "merge_deviation", "peft_start"]


@dataclass(frozen=True)
class Deviation:
    """How far minilora and the libraries are apart, relatively; None: no library has the cell.

    ``by``: the libraries with their versions and how they were asked, or why none could be.
    """

    worst: float | None
    by: str


def deviation(
    entry: str,
    kind: str,
    seed: int = 0,
    square: bool = False,
    ours: Callable[[LayerCase], Answers] = answers,
) -> Deviation:
    """The greatest deviation of y, dx and every gradient, over all libraries that have the cell.

    Relative to the greatest entry of the array or, if that is more, of the inputs and dy. ``ours``
    answers in minilora's place: the place for something wrong. What is not the library's, dropout
    or a geometry, is left out on both sides, and ``by`` says so.
    """

    def error(asked: LibraryAnswer) -> float:
        y, dx, dP = ours(asked.case)
        y2, dx2, dP2 = asked.answers
        pairs = [(y, y2), (dx, dx2)]
        for found, wanted in zip(dP, dP2, strict=True):
            pairs += [(found[name], wanted[name]) for name in wanted]
        return max(relative_error(asked.case, *pair) for pair in pairs)

    return _greatest(entry, kind, seed, square, error)


def merge_deviation(
    entry: str,
    kind: str,
    seed: int = 0,
    square: bool = False,
    ours: Callable[[LayerCase], LayerCase] = LayerCase.merged,
) -> Deviation:
    """The greatest deviation of the merged weight and bias, likewise."""

    def error(asked: LibraryAnswer) -> float:
        W, b = asked.merged()
        merged = ours(asked.case.without_dropout())
        return max(relative_error(asked.case, merged.W, W), relative_error(asked.case, merged.b, b))

    return _greatest(entry, kind, seed, square, error)


def _greatest(
    entry: str, kind: str, seed: int, square: bool, error: Callable[[LibraryAnswer], float]
) -> Deviation:
    worst, names, reasons = 0.0, [], []
    for side in sides(entry, kind):
        rng = np.random.default_rng(seed)
        case = draw_case(entry, kind, rng, exact=False, square=square)
        try:
            asked = side(case, rng)
            worst = max(worst, error(asked))
        except Unsupported as reason:
            reasons.append(str(reason))
        else:
            names.append(asked.by)
    if names:
        return Deviation(worst, "; ".join(dict.fromkeys(names)))
    return Deviation(None, "; ".join(dict.fromkeys(reasons)))


def sides(entry: str, kind: str) -> list[AskLibrary]:
    """Each way to ask each library."""
    of: dict[str, list[AskLibrary]] = {
        "PEFT": PEFT_SIDES.get(kind, [peft_layer]),
        "LyCORIS": [lycoris_layer],
        "loralib": [loralib_layer],
    }
    return [side for name in library_names(entry, kind) for side in of[name]]


def relative_error(case: LayerCase, found: Any, wanted: Any) -> float:
    """The greatest difference, relative to the greatest entry of ``wanted`` or of the case."""
    if found is None and wanted is None:
        return 0.0
    if found.shape != wanted.shape:
        raise ValueError(f"found shape {found.shape}, the library's is {wanted.shape}")
    arrays = [wanted, case.W, case.dy, *(p for part in case.P for p in part)]
    arrays += [case.x] if case.x.dtype.kind == "f" else []
    error = float(abs(found - wanted).max() / max(float(abs(array).max()) for array in arrays))
    return error if np.isfinite(error) else np.inf
