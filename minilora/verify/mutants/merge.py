"""Merging and unmerging, misread."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.verify.mutants.mutant import Mutant, equivalents, family
from minilora.verify.mutants.reference import (
    Array,
    Call,
    Plain,
    but,
    coarse,
    digits,
    from_first_call,
    narrow,
    piled_up,
    reads,
    square,
    then,
    upto,
    wide,
)


def _quantised(W: Array) -> Any:
    """W on a grid of 255 points, as after a passage through 8 bits."""
    step = abs(W).max() / 127 or 1
    return np.round(W / step) * step


def _lengths_kept(W: Array, c: Call) -> Any:
    squares = [np.maximum((array**2).sum(1, keepdims=True), 1e-9) for array in (c.W, W)]
    return W * (squares[0] / squares[1]) ** 0.5


def _in_place(my: Plain, W: Array, A: Array, B: Array, **options: Any) -> Array:
    W[...] = Plain.merge(my, W, A, B, **options)
    return W


def _rows_but_the_last(delta: Array, c: Call) -> Any:
    return delta * upto(len(delta) - 1, len(delta))[:, None]


def _swapped(W: Array) -> Array:
    """The same numbers; NumPy knows bfloat16 in one order alone."""
    return W.astype(W.dtype.newbyteorder()) if W.dtype.kind == "f" else W


def _turned(delta: Array, c: Call) -> Any:
    return delta.T if square(c) else delta


MERGE = (
    *family(
        "MERGE",
        "merge.weight",
        ("no-scale", "W + B A", but(delta=lambda my, c: c.B @ c.A)),
        ("alpha", "W + α B A", but(s=lambda my, c: c.alpha), "mlx-vlm 841"),
        ("root", "s = α/√r, unasked", but(s=lambda my, c: c.alpha / c.r**0.5)),
        ("scale-squared", "W + s² B A", but(delta=lambda my, c: my.s(c) * Plain.delta(my, c))),
        (
            "near-weight",
            "W where W + s B A is nearly W",
            then(delta=lambda d, c: 0 * d if np.allclose(c.W + d, c.W) else d),
        ),
        (
            "eight-ranks",
            "all ranks but eight are lost",
            reads(A=lambda c: c.A[:8], B=lambda c: c.B[:, :8]),
        ),
        ("twice", "W + 2 s B A", then(delta=lambda v, c: 2 * v), "candle-lora 26"),
        ("subtracted", "W - s B A", then(delta=lambda v, c: -v)),
        ("delta-alone", "s B A", but(merged=lambda my, c: my.delta(c))),
        ("turned", "W + s (B A)ᵀ where m = n", then(delta=_turned)),
        ("reshaped", "s (B A)ᵀ reshaped to (m, n)", then(delta=lambda v, c: v.T.reshape(v.shape))),
        ("reshape-A", "A.reshape(n, r) for Aᵀ", reads(A=lambda c: c.A.reshape(-1, c.r).T)),
        (
            "bfloat16",
            "W' rounded to bfloat16",
            then(merged=lambda W, c: digits(W, 8)),
            "peft 1388",
            "peft 2502",
            "torchtune 1101",
            "unsloth 3091",
        ),
        ("delta-coarse", "s B A kept in half of the digits", then(delta=coarse)),
        ("one-rank", "W + s B₁ A₁", reads(A=lambda c: c.A[:1], B=lambda c: c.B[:, :1])),
        ("rank-mean", "W + s B A / r", then(delta=lambda v, c: v / c.r)),
        ("last-row", "the last row is not merged", then(delta=_rows_but_the_last)),
        ("clamped", "s B A between -2 and 2", then(delta=lambda v, c: v.clip(-2, 2))),
        ("blended", "(W + W') / 2", then(merged=lambda W, c: (c.W + W) / 2)),
        (
            "piled-up",
            "the adapters of all calls added",
            but(delta=lambda my, c: piled_up(my, "delta", Plain.delta(my, c))),
        ),
        (
            "first-call-s",
            "s of the first merge for all",
            but(s=lambda my, c: from_first_call(my, "s", Plain.s(my, c))),
        ),
        (
            "first-call-W",
            "the W of the first call for all",
            but(merged=lambda my, c: from_first_call(my, "W", c.W) + my.delta(c)),
        ),
        ("in-place", "W itself is changed", but(merge=_in_place)),
        (
            "negligible",
            "W where all of W' lies within a hundred-thousandth of it",
            then(merged=lambda W, c: c.W if np.allclose(W, c.W) else W),
        ),
        (
            "alpha-unset",
            "α < 0 taken for 2 r",
            reads(alpha=lambda c: c.alpha if c.alpha > 0 else 2 * c.r),
        ),
    ),
    *family(
        "MERGE",
        "merge.weight.rslora",
        ("rslora-ignored", "s = α/r with rsLoRA", but(s=lambda my, c: c.alpha / c.r)),
    ),
    *family(
        "MERGE",
        "merge.weight.conv1d",
        (
            "conv1d-turned",
            "W + s (B A)ᵀ with fan_in_fan_out, where m = n",
            then(delta=lambda v, c: _turned(v, c) if c.conv1d else v),
        ),
        (
            "conv1d-reshaped",
            "s (B A)ᵀ reshaped to (m, n) with fan_in_fan_out",
            then(delta=lambda v, c: v.T.reshape(v.shape) if c.conv1d else v),
        ),
    ),
    *family(
        "MERGE",
        "merge.forward",
        (
            "never",
            "W: evaluation does not merge",
            but(merged=lambda my, c: c.W),
            "microsoft/LoRA 34",
            "microsoft/LoRA 61",
        ),
        ("lengths-kept", "W' with its rows at the lengths of W's", then(merged=_lengths_kept)),
        (
            "unlike-forward",
            "W + s B A, and y = x Wᵀ + s² H Bᵀ",
            but(branch=lambda my, c: my.s(c) * Plain.branch(my, c)),
        ),
    ),
    *family(
        "MERGE",
        "merge.zero-B",
        (
            "W-coarse",
            "W kept in half of the digits",
            but(merged=lambda my, c: coarse(c.W, c) + my.delta(c)),
        ),
        (
            "W-quantised",
            "W on a grid of 8 bits",
            but(merged=lambda my, c: _quantised(c.W) + my.delta(c)),
        ),
    ),
    *family(
        "MERGE",
        "merge.negative",
        ("absolute", "W + |s B A|", then(delta=lambda v, c: abs(v))),
    ),
)

UNMERGE = (
    *family(
        "UNMERGE",
        "merge.unmerge.rslora",
        (
            "rslora-ignored",
            "W' - α/r B A where α/√r was asked",
            but(unmerged=lambda my, c: c.W - c.alpha / c.r * (c.B @ c.A)),
        ),
    ),
    *family(
        "UNMERGE",
        "merge.unmerge.conv1d",
        (
            "conv1d-turned",
            "W' - s (B A)ᵀ with fan_in_fan_out, where m = n",
            but(
                unmerged=lambda my, c: c.W - (_turned(my.delta(c), c) if c.conv1d else my.delta(c))
            ),
        ),
    ),
)

UNMERGE += family(
    "UNMERGE",
    "merge.unmerge",
    ("nothing", "W'", but(unmerged=lambda my, c: c.W)),
    ("no-scale", "W' - B A", but(unmerged=lambda my, c: c.W - c.B @ c.A)),
    ("twice", "W' - 2 s B A", but(unmerged=lambda my, c: c.W - 2 * my.delta(c))),
    ("added", "W' + s B A", but(unmerged=lambda my, c: c.W + my.delta(c))),
    (
        "turned",
        "W' - s (B A)ᵀ where m = n",
        but(unmerged=lambda my, c: c.W - _turned(my.delta(c), c)),
    ),
    (
        "cached",
        "the W that was merged first, whatever W' is",
        but(
            merged=lambda my, c: from_first_call(my, "W", c.W) * 0 + c.W + my.delta(c),
            unmerged=lambda my, c: from_first_call(my, "W", c.W),
        ),
    ),
    (
        "first-call-s",
        "s of the first call for all",
        but(unmerged=lambda my, c: c.W - from_first_call(my, "s", my.s(c)) * (c.B @ c.A)),
    ),
    ("coarse", "W kept in half of the digits", then(unmerged=coarse)),
    (
        "delta-coarse",
        "s B A kept in half of the digits",
        but(unmerged=lambda my, c: c.W - coarse(my.delta(c), c)),
    ),
    (
        "last-row",
        "the last row stays merged",
        but(unmerged=lambda my, c: c.W - _rows_but_the_last(my.delta(c), c)),
    ),
)

SAME = equivalents(
    "merge",
    ("rows", "as it is: (Aᵀ Bᵀ)ᵀ", Plain),
    ("scale-on-A", "W + B (s A)", but(delta=lambda my, c: c.B @ (my.s(c) * c.A))),
    ("scale-on-B", "W + (s B) A", but(delta=lambda my, c: (my.s(c) * c.B) @ c.A)),
    (
        "root-on-both",
        "W + (√|s| B) (±√|s| A)",
        but(
            delta=lambda my, c: (
                ((root := abs(my.s(c)) ** 0.5) * c.B) @ (np.sign(my.s(c)) * root * c.A)
            )
        ),
    ),
    (
        "alpha-then-rank",
        "W + α (B A) / r",
        but(delta=lambda my, c: c.alpha * (c.B @ c.A) / (c.r**0.5 if c.rslora else c.r)),
    ),
    (
        "rank-by-rank",
        "W + s Σᵢ Bᵢ Aᵢ, one rank after another",
        but(
            delta=lambda my, c: (
                my.s(c) * sum(b[:, None] * a for b, a in zip(c.B.T, c.A, strict=True))
            )
        ),
    ),
    (
        "into-W",
        "((W + s B₁ A₁) + s B₂ A₂) + …",
        but(
            merged=lambda my, c: sum(
                (my.s(c) * b[:, None] * a for b, a in zip(c.B.T, c.A, strict=True)), c.W
            )
        ),
    ),
    (
        "unmerged-by-merging",
        "W' + s (-B) A",
        but(unmerged=lambda my, c: c.W + (my.s(c) * -c.B) @ c.A),
    ),
    ("wide", "in float64, rounded at the end", reads(**wide("W", "A", "B"))),
    (
        "other-byte-order",
        "W' with its bytes in the other order, as another machine has them",
        but(merge=lambda my, *arrays, **options: _swapped(Plain.merge(my, *arrays, **options))),
    ),
    ("stored", "s B A rounded to the dtype", then(delta=narrow)),
)

MUTANTS: tuple[Mutant, ...] = MERGE + UNMERGE + SAME
