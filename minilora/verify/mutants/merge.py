"""Mutants of merging and unmerging."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.verify.mutants.mutant import Mutant, Reference, Same, Table, equivalents, mutants
from minilora.verify.mutants.references.helpers import Array
from minilora.verify.mutants.references.linear import Linear


def quantized(W: Array) -> Array:
    """W on a grid of 255 points, as after a passage through 8 bits."""
    step = abs(W).max() / 127 or 1
    on_grid: Array = np.round(W / step) * step
    return on_grid


def lengths_kept(W: Array, merged: Array) -> Array:
    """The merged weight with its rows at the lengths of W's."""
    squares = [np.maximum((array**2).sum(1, keepdims=True), 1e-9) for array in (W, merged)]
    kept: Array = merged * (squares[0] / squares[1]) ** 0.5
    return kept


def cut_off(W: Array, delta: Array, merged: Array, dtype: Any) -> Array:
    """The next number of a dtype from the exact sum towards 0."""
    exact = W.astype(np.longdouble) + delta
    near = merged.astype(dtype)
    over = np.abs(near.astype(np.longdouble)) > np.abs(exact)
    cut: Array = np.where(over, np.nextafter(near, np.zeros_like(near)), near)
    return cut


def swapped(W: Array) -> Array:
    """The same numbers in the other byte order; NumPy knows bfloat16 in one order alone."""
    return W.astype(W.dtype.newbyteorder()) if W.dtype.kind == "f" else W


MERGING = Reference((Linear,), globals())

# fmt: off
MERGE: Table = {
    "merge.weight": [
        ("no-scale", "W + B A", {"s * (A.T @ B.T).T": "B @ A"}),
        ("alpha", "W + α B A", {"ds = s": "ds = s = alpha"}, "mlx-vlm 841"),
        ("root", "s = α/√r, unasked", {"ds = s": "ds = s = alpha / r**0.5"}),
        ("scale-squared", "W + s² B A", {"V = W + delta": "delta = s * delta; V = W + delta"}),
        ("near-weight", "W where s B A is close to 0 beside it",
         {"V = W + delta":
              "delta = 0 * delta if np.allclose(W + delta, W) else delta; V = W + delta"}),
        ("eight-ranks", "only the first 8 ranks are merged",
         {"# arrays": "A, B = A[:8], B[:, :8]"}),
        ("twice", "W + 2 s B A", {"V = W + delta": "delta = 2 * delta; V = W + delta"}),
        ("subtracted", "W - s B A", {"V = W + delta": "delta = -delta; V = W + delta"}),
        ("delta-alone", "s B A", {"# merged": "merged = delta"}),
        ("turned", "W + s (B A)ᵀ where m = n",
         {"V = W + delta": "delta = delta.T if square(W) else delta; V = W + delta"}),
        ("reshaped", "s (B A)ᵀ reshaped to (m, n)",
         {"V = W + delta": "delta = delta.T.reshape(delta.shape); V = W + delta"}),
        ("reshape-A", "A.reshape(n, r) for Aᵀ", {"# arrays": "A = A.reshape(-1, r).T"}),
        ("bfloat16", "W' rounded to bfloat16",
         {"# merged":
              "merged = digits(merged, 8)"},
         "peft 1388", "peft 2502", "torchtune 1101", "unsloth 3091"),
        ("delta-coarse", "s B A rounded to half of the dtype's digits",
         {"V = W + delta": "delta = coarse(delta, dtype); V = W + delta"}),
        ("one-rank", "W + s B₁ A₁", {"# arrays": "A, B = A[:1], B[:, :1]"}),
        ("rank-mean", "W + s B A / r", {"V = W + delta": "delta = delta / r; V = W + delta"}),
        ("last-row", "the last row is not merged",
         {"V = W + delta":
              "delta = delta * upto(len(delta) - 1, len(delta))[:, None]; V = W + delta"}),
        ("clamped", "s B A clipped to [-2, 2]",
         {"V = W + delta": "delta = delta.clip(-2, 2); V = W + delta"}),
        ("blended", "(W + W') / 2", {"# merged": "merged = (W + merged) / 2"}),
        ("piled-up", "the adapters of all calls add up",
         {"V = W + delta": 'delta = piled_up(self.memory, "delta", delta); V = W + delta'}),
        ("first-call-s", "the first call's s in every merge",
         {"ds = s": 'ds = s = first_call(self.memory, "s", s)'}),
        ("first-call-W", "the first call's W in every merge",
         {"# merged": 'merged = first_call(self.memory, "W", W) + delta'}),
        ("in-place", "W is overwritten", {"return merged": "W[...] = merged; return W"}),
        ("negligible", "W where W' is close to it",
         {"# merged": "merged = W if np.allclose(merged, W) else merged"}),
        ("alpha-unset", "a negative α read as unset: α = 2 r",
         {"# arrays": "alpha = alpha if alpha > 0 else 2 * r"}),
    ],
    "merge.weight.rslora": [
        ("rslora-ignored", "s = α/r with rsLoRA", {"ds = s": "ds = s = alpha / r"}),
    ],
    "merge.weight.conv1d": [
        ("conv1d-turned", "W + s (B A)ᵀ with fan_in_fan_out, where m = n",
         {"V = W + delta":
              "delta = delta.T if fan_in_fan_out and square(W) else delta; V = W + delta"}),
        ("conv1d-reshaped", "s (B A)ᵀ reshaped to (m, n) with fan_in_fan_out",
         {"V = W + delta":
              "delta = delta.T.reshape(delta.shape) if fan_in_fan_out else delta; V = W + delta"}),
    ],
    "merge.weight.all": [
        ("rslora-ignored-conv1d", "s = α/r with rsLoRA and fan_in_fan_out",
         {"ds = s": "ds = s = alpha / r if fan_in_fan_out else s"}),
    ],
    "merge.forward": [
        ("never", "nothing is merged: W",
         {"# merged": "merged = W"}, "microsoft/LoRA 34", "microsoft/LoRA 61", "candle-lora 26"),
        ("lengths-kept", "W' rescaled to the lengths of W's rows",
         {"# merged": "merged = lengths_kept(W, merged)"}),
        ("unlike-forward", "s² in the forward, s in the merge",
         {"# branch": "branch = s * branch"}),
    ],
    "merge.rounding": [
        ("cut-off", "W' cut off to the dtype's digits, not rounded",
         {"# merged": "merged = cut_off(W, merged - W if dora else delta, merged, dtype)"},
         "ggml's bfloat16"),
    ],
    "merge.zero-B": [
        ("W-coarse", "W rounded to half of the dtype's digits",
         {"# merged": "merged = coarse(W, dtype) + delta"}),
        ("W-quantized", "W rounded to 8 bits", {"# merged": "merged = quantized(W) + delta"}),
    ],
    "merge.bias": [
        ("bias-lost", "a bias of 0 after merging", {"# both": "shifted = 0 * shifted"}),
        ("bias-scaled", "s b for b after merging", {"# bias": "b = b * s"}),
        ("bias-negligible", "the bias rounded to half of the dtype's digits",
         {"# bias": "b = coarse(b, dtype)"}),
    ],
    "merge.bias-of-B": [
        ("bias-of-B-lost", "b for b + s c after merging",
         {"b = b if c is None else b + s * c": ""}),
        ("bias-of-B-unscaled", "b + c for b + s c after merging",
         {"else b + s * c": "else b + c"}),
        ("bias-of-B-without-rslora", "b + α/r c where α/√r was asked",
         {"else b + s * c": "else b + alpha / r * c"}),
        ("bias-of-B-alone", "s c for b + s c after merging", {"else b + s * c": "else s * c"}),
    ],
    "merge.negative": [
        ("absolute", "W + |s B A|", {"V = W + delta": "delta = abs(delta); V = W + delta"}),
    ],
}
UNMERGE: Table = {
    "merge.unmerge.rslora": [
        ("rslora-ignored", "W' - α/r B A where α/√r was asked",
         {"W - delta": "W - alpha / r * (B @ A)"}),
    ],
    "merge.unmerge.conv1d": [
        ("conv1d-turned", "W' - s (B A)ᵀ with fan_in_fan_out, where m = n",
         {"W - delta": "W - (delta.T if fan_in_fan_out and square(W) else delta)"}),
    ],
    "merge.unmerge.all": [
        ("rslora-ignored-conv1d", "W' - α/r B A where α/√r was asked, with fan_in_fan_out",
         {"W - delta":
              "W - (alpha / r * (B @ A) if use_rslora and fan_in_fan_out else delta)"}),
    ],
    "merge.full-digits": [
        ("unmerged-four-less", "the unmerged weight has four binary digits less than the dtype",
         {"# merged": "unmerged = four_less(unmerged, dtype)"}),
        ("merged-four-less", "the merged weight has four binary digits less than the dtype",
         {"# merged": "merged = four_less(merged, dtype)"}),
    ],
    "merge.unmerge": [
        ("nothing", "nothing is unmerged: W'", {"W - delta": "W"}),
        ("no-scale", "W' - B A", {"W - delta": "W - B @ A"}),
        ("twice", "W' - 2 s B A", {"W - delta": "W - 2 * delta"}),
        ("added", "W' + s B A", {"W - delta": "W + delta"}),
        ("turned", "W' - s (B A)ᵀ where m = n",
         {"W - delta": "W - (delta.T if square(W) else delta)"}),
        ("cached", "the W of the first merge, whatever W' is",
         {"W - delta": 'first_call(self.memory, "W", W)'}),
        ("first-call-s", "the first call's s in every call",
         {"W - delta": 'W - first_call(self.memory, "s", s) * (B @ A)'}),
        ("coarse", "W rounded to half of the dtype's digits",
         {"W - delta": "coarse(W - delta, dtype)"}),
        ("delta-coarse", "s B A rounded to half of the dtype's digits",
         {"W - delta": "W - coarse(delta, dtype)"}),
        ("last-row", "the last row stays merged",
         {"W - delta": "W - delta * upto(len(delta) - 1, len(delta))[:, None]"}),
    ],
}
SAME: Same = [
    ("rows", "the reference: (Aᵀ Bᵀ)ᵀ", {}),
    ("scale-on-A", "W + B (s A)", {"s * (A.T @ B.T).T": "B @ (s * A)"}),
    ("scale-on-B", "W + (s B) A", {"s * (A.T @ B.T).T": "(s * B) @ A"}),
    ("root-on-both", "W + (√|s| B) (±√|s| A)",
     {"s * (A.T @ B.T).T": "((root := abs(s) ** 0.5) * B) @ (np.sign(s) * root * A)"}),
    ("alpha-then-rank", "W + α (B A) / r",
     {"s * (A.T @ B.T).T": "alpha * (B @ A) / (r**0.5 if use_rslora else r)"}),
    ("rank-by-rank", "W + s Σᵢ Bᵢ Aᵢ, one rank after another",
     {"s * (A.T @ B.T).T": "s * sum(u[:, None] * v for u, v in zip(B.T, A, strict=True))"}),
    ("into-W", "((W + s B₁ A₁) + s B₂ A₂) + …",
     {"# merged": "merged = sum((s * u[:, None] * v for u, v in zip(B.T, A, strict=True)), W)"}),
    ("unmerged-by-merging", "W' + s (-B) A", {"W - delta": "W + (s * -B) @ A"}),
    ("wide", "in float64, rounded at the end", {"# arrays": "W, A, B = doubled(W, A, B)"}),
    ("other-byte-order", "W' in the other byte order", {"return merged": "return swapped(merged)"}),
    ("stored", "s B A rounded to the dtype",
     {"V = W + delta": "delta = narrow(delta, dtype); V = W + delta"}),
]
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *mutants(MERGING, "MERGE", MERGE),
    *mutants(MERGING, "UNMERGE", UNMERGE),
    *equivalents(MERGING, "merge", SAME),
)
