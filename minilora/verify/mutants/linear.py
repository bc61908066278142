"""One LoRA linear, misread."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.verify.mutants.mutant import Mutant, equivalents, family
from minilora.verify.mutants.reference import (
    Array,
    Call,
    Plain,
    backward,
    but,
    coarse,
    digits,
    from_call_before,
    from_first_call,
    narrow,
    piled_up,
    reads,
    square,
    then,
    upto,
    wide,
    with_,
)


def _b_unless_dropout(c: Call) -> Array:
    b: Array = 0 * c.b if c.dropout else c.b
    return b


SCALE = (
    *family(
        "SCALE",
        "linear.forward",
        ("alpha", "s = α", but(s=lambda my, c: c.alpha), "mlx-vlm 841", "mlx-vlm 845"),
        ("root", "s = α/√r, unasked", but(s=lambda my, c: c.alpha / c.r**0.5)),
        ("inverse", "s = r/α", then(s=lambda s, c: 1 / s)),
        ("of-rank-alone", "s = 1/r", but(s=lambda my, c: 1 / c.r)),
        ("one", "s = 1", but(s=lambda my, c: 1.0)),
        ("zero", "s = 0: no adapter at all", but(s=lambda my, c: 0.0)),
        ("squared", "s = (α/r)²", then(s=lambda s, c: s**2), "peft 3111"),
        ("floor", "s = ⌊α/r⌋", then(s=lambda s, c: s // 1)),
        ("whole-alpha", "s = ⌊α⌋/r", but(s=lambda my, c: int(c.alpha) / c.r)),
        ("bfloat16", "s = α/r rounded to bfloat16", then(s=lambda s, c: digits(s, 8))),
        ("off-10-ppm", "s = 1.00001 α/r", then(s=lambda s, c: 1.00001 * s)),
        ("off-1-percent", "s = 1.01 α/r", then(s=lambda s, c: 1.01 * s)),
        ("negative", "s = -α/r", then(s=lambda s, c: -s)),
        ("stacked-rank", "s = α/(3 r), the rank of three stacked A", then(s=lambda s, c: s / 3)),
        ("rank-from-B", "s = α/m, r from B's wrong axis", but(s=lambda my, c: c.alpha / len(c.B))),
        (
            "rank-from-A",
            "s = α/n, r from A's wrong axis",
            but(s=lambda my, c: c.alpha / len(c.A.T)),
        ),
        (
            "first-call",
            "s of the first call: another adapter's",
            but(s=lambda my, c: from_first_call(my, "s", Plain.s(my, c))),
            "diffusers 14409",
        ),
        ("of-base", "y = s (x Wᵀ + b + H Bᵀ)", but(base=lambda my, c: my.s(c) * Plain.base(my, c))),
    ),
    *family(
        "SCALE",
        "linear.forward.rslora",
        (
            "rslora-ignored",
            "s = α/r with rsLoRA",
            but(s=lambda my, c: c.alpha / c.r),
            "TensorRT-LLM 1668",
            "peft 2733",
        ),
        (
            "rslora-of-alpha",
            "s = √(α/r) with rsLoRA",
            but(s=lambda my, c: (c.alpha / c.r) ** (0.5 if c.rslora else 1)),
        ),
    ),
    *family(
        "SCALE",
        "linear.forward.bias",
        ("of-bias", "y = x Wᵀ + s b + s H Bᵀ", but(base=lambda my, c: c.x @ c.W.T + my.s(c) * c.b)),
    ),
    *family(
        "SCALE",
        "linear.vjp",
        ("backward-squared", "s² in all gradients", but(ds=lambda my, c: my.s(c) ** 2)),
        ("backward-one", "no s in any gradient", but(ds=lambda my, c: 1.0)),
    ),
    *family(
        "SCALE",
        "linear.vjp.rslora",
        (
            "backward-rslora-ignored",
            "s = α/r in the gradients",
            but(ds=lambda my, c: c.alpha / c.r),
        ),
    ),
)


def _batch_swapped(my: Plain, x: Array) -> Array:
    return Plain.rows(my, x.swapaxes(0, 1) if x.ndim > 2 else x)


def _first_squeezed(my: Plain, c: Call, rows: Array) -> Array:
    shaped = Plain.shaped(my, c, rows)
    return shaped[0] if c.lead[:1] == (1,) else shaped


def _batches_swapped(my: Plain, c: Call, rows: Array) -> Array:
    shaped = Plain.shaped(my, c, rows)
    return shaped.swapaxes(0, 1) if shaped.ndim == 4 else shaped


LAYOUT = (
    *family(
        "LAYOUT",
        "linear.forward",
        ("reshape-A", "A.reshape(n, r) for Aᵀ", reads(A=lambda c: c.A.reshape(-1, c.r).T)),
        ("reshape-B", "B.reshape(r, m) for Bᵀ", reads(B=lambda c: c.B.reshape(c.r, -1).T)),
        (
            "file-turned",
            "A (n, r), B (r, m) expected of a file, and reshaped",
            reads(A=lambda c: c.A.reshape(-1, c.r).T, B=lambda c: c.B.reshape(c.r, -1).T),
            "vmlx-swift 320",
        ),
        (
            "A-for-B",
            "A and Bᵀ swapped, that is (B A)ᵀ for B A, where m = n",
            reads(A=lambda c: c.B.T if square(c) else c.A, B=lambda c: c.A.T if square(c) else c.B),
        ),
        ("W-turned", "x W for x Wᵀ where m = n", reads(W=lambda c: c.W.T if square(c) else c.W)),
        ("A-shifted", "column j of A for column j + 1", reads(A=lambda c: np.roll(c.A, 1, 1))),
        ("B-shifted", "row i of B for row i + 1", reads(B=lambda c: np.roll(c.B, 1, 0))),
        ("ranks-reversed", "A's rows from the last, B's columns not", reads(A=lambda c: c.A[::-1])),
        (
            "reshape-x",
            "x.reshape(n, t) for xᵀ",
            but(rows=lambda my, x: x.reshape(x.shape[-1], -1).T),
        ),
        ("reshape-y", "y (m, t) reshaped for yᵀ", then(y=lambda y, c: y.T.reshape(y.shape))),
        ("batch-swapped", "x (b, t, n) read as (t, b, n)", but(rows=_batch_swapped)),
        (
            "first-sequence",
            "y = 0 in all sequences of a batch but the first",
            then(y=lambda y, c: y * upto(c.lead[-1], len(y))[:, None] if c.lead else y),
        ),
        (
            "vector-batched",
            "x (n,) answered with (1, m)",
            but(shaped=lambda my, c, rows: Plain.shaped(my, c, rows) if c.lead else rows),
        ),
        (
            "last-token",
            "y = 0 at the last token",
            then(y=lambda y, c: y * upto(len(y) - 1, len(y))[:, None]),
        ),
        ("first-token", "the first token's branch at all", then(H=lambda H, c: H[:1] + 0 * H)),
        (
            "tail-of-features",
            "the sum over features stops at a multiple of 4",
            then(kept=lambda x, c: x * upto(len(x.T) // 4 * 4, len(x.T))),
        ),
        (
            "tail-of-ranks",
            "the sum over ranks stops at a multiple of 2",
            then(H=lambda H, c: H * upto(c.r // 2 * 2, c.r)),
        ),
        (
            "tail-of-outputs",
            "the outputs beyond a multiple of 4 have no branch",
            then(branch=lambda v, c: v * upto(len(v.T) // 4 * 4, len(v.T))),
        ),
        ("one-rank", "all ranks but the first are lost", then(H=lambda H, c: H * upto(1, c.r))),
        ("eight-ranks", "all ranks but eight are lost", then(H=lambda H, c: H * upto(8, c.r))),
        (
            "tile-of-features",
            "the branch's sum over features begins anew at every 16th",
            then(kept=lambda x, c: x * ~upto((len(x.T) - 1) // 16 * 16, len(x.T))),
        ),
        (
            "tile-of-tokens",
            "no branch at tokens beyond the 32nd",
            then(branch=lambda v, c: v * upto(32, len(v))[:, None]),
        ),
        (
            "one-token",
            "no branch where x is (1, n): a single token",
            then(branch=lambda v, c: 0 * v if c.lead == (1,) else v),
        ),
        (
            "near-zero",
            "no branch where B is nearly 0",
            then(branch=lambda v, c: 0 * v if np.allclose(c.B, 0) else v),
        ),
        (
            "batch-of-one",
            "x (1, …, n) answered without its first axis",
            but(shaped=_first_squeezed),
        ),
        (
            "batches-swapped",
            "x (a, b, t, n) answered as (b, a, t, m)",
            but(shaped=_batches_swapped),
        ),
    ),
    *family(
        "LAYOUT",
        "linear.forward.conv1d",
        (
            "conv1d-turned",
            "x W with fan_in_fan_out, where m = n",
            reads(W=lambda c: c.W.T if c.conv1d and square(c) else c.W),
        ),
        (
            "conv1d-reshaped",
            "W.reshape(n, m)ᵀ with fan_in_fan_out",
            reads(W=lambda c: c.W.reshape(c.W.shape[::-1]).T if c.conv1d else c.W),
        ),
    ),
)

FORM = (
    *family(
        "FORM",
        "linear.forward",
        ("no-base", "y = s H Bᵀ", then(base=lambda v, c: 0 * v)),
        ("base-twice", "y = 2 (x Wᵀ + b) + s H Bᵀ", then(base=lambda v, c: 2 * v)),
        ("branch-twice", "y = x Wᵀ + b + 2 s H Bᵀ", then(branch=lambda v, c: 2 * v)),
        (
            "base-of-sum",
            "y = (x + s H Bᵀ) Wᵀ + b where m = n",
            but(
                y=lambda my, c: (
                    my.base(with_(c, x=lambda c: c.x + my.branch(c)))
                    if square(c)
                    else Plain.y(my, c)
                )
            ),
        ),
        (
            "branch-of-base",
            "H = (x Wᵀ + b) Aᵀ where m = n",
            but(kept=lambda my, c: my.base(c) if square(c) else Plain.kept(my, c)),
        ),
        ("residual", "y + x where m = n", then(base=lambda v, c: v + c.x if square(c) else v)),
        ("softsign", "H / (1 + |H|) for H", then(H=lambda H, c: H / (1 + abs(H)))),
        ("rank-mean", "the mean over ranks for the sum", then(branch=lambda v, c: v / c.r)),
        ("clamped", "s H Bᵀ between -6 and 6", then(branch=lambda v, c: v.clip(-6, 6))),
        (
            "unit-A",
            "A's rows at length 1",
            reads(A=lambda c: c.A / np.maximum((c.A**2).sum(1, keepdims=True), 1e-9) ** 0.5),
        ),
        ("hidden-bfloat16", "H rounded to bfloat16", then(H=lambda H, c: digits(H, 8))),
        ("hidden-coarse", "H kept in half of the digits", then(H=coarse)),
        ("branch-coarse", "s H Bᵀ kept in half of the digits", then(branch=coarse)),
        ("base-coarse", "x Wᵀ kept in half of the digits", then(base=coarse)),
        ("tf32", "x with 11 binary digits in products", then(kept=lambda x, c: digits(x, 11))),
    ),
    *family(
        "FORM",
        "linear.forward.all",
        ("no-bias-with-dropout", "b forgotten where there is a mask", reads(b=_b_unless_dropout)),
    ),
    *family(
        "FORM",
        "linear.forward.bias",
        ("no-bias", "b forgotten", reads(b=lambda c: 0 * c.b)),
        (
            "bias-of-token",
            "b a column where there are as many tokens as features",
            but(base=lambda my, c: c.x @ c.W.T + (c.b[:, None] if len(c.x) == len(c.b) else c.b)),
        ),
        ("bias-twice", "2 b", reads(b=lambda c: 2 * c.b)),
        ("bias-negative", "-b", reads(b=lambda c: -c.b)),
    ),
    *family(
        "FORM",
        "linear.symmetry",
        ("relu", "max(H, 0) for H", then(H=lambda H, c: np.maximum(H, 0))),
        ("absolute-B", "|B| for B", reads(B=lambda c: abs(c.B))),
    ),
    *family(
        "FORM",
        "linear.basis-change",
        ("tanh", "tanh(H) for H", then(H=lambda H, c: np.tanh(H))),
    ),
)

DROPOUT = (
    *family(
        "DROPOUT",
        "linear.forward.dropout",
        ("on-base", "(K∘x) Wᵀ too", but(base=lambda my, c: my.kept(c) @ c.W.T + c.b)),
        (
            "on-base-alone",
            "(K∘x) Wᵀ and H = x Aᵀ",
            but(base=lambda my, c: Plain.kept(my, c) @ c.W.T + c.b, kept=lambda my, c: c.x),
        ),
        (
            "on-hidden",
            "K∘(x Aᵀ)",
            but(kept=lambda my, c: c.x, H=lambda my, c: c.K[:, : c.r] * (c.x @ c.A.T)),
        ),
        (
            "on-branch",
            "K∘(s H Bᵀ)",
            but(
                kept=lambda my, c: c.x,
                branch=lambda my, c: np.resize(c.K, (len(c.x), len(c.B))) * Plain.branch(my, c),
            ),
        ),
        ("by-p", "K = keep / p", reads(K=lambda c: c.K * ((1 - c.p) / c.p) if c.dropout else c.K)),
        (
            "times-rate",
            "K = keep (1 - p)",
            reads(K=lambda c: c.K * (1 - c.p) ** 2 if c.dropout else c.K),
        ),
        (
            "by-count",
            "K = keep / the share that is kept",
            reads(K=lambda c: c.K / (c.K.mean() or 1)),
        ),
        ("twice", "K∘K∘x", reads(K=lambda c: c.K**2)),
        ("never", "K = 1", reads(K=lambda c: np.ones_like(c.K))),
        (
            "inverted",
            "keep read as what to drop",
            reads(K=lambda c: 1 / (1 - c.p) - c.K if c.dropout else c.K),
        ),
        ("one-token", "the first token's mask for all", reads(K=lambda c: c.K[:1] + 0 * c.K)),
        (
            "whole-tokens",
            "the first feature's mask for all",
            reads(K=lambda c: c.K[:, :1] + 0 * c.K),
        ),
        (
            "first-call",
            "the first call's mask for all",
            but(
                read=lambda my, c: (
                    with_(c, K=lambda c: from_first_call(my, "K", c.K)) if c.dropout else c
                )
            ),
        ),
    ),
    *family(
        "DROPOUT",
        "linear.dropout-mean",
        ("not-divided", "K = keep", reads(K=lambda c: np.sign(c.K))),
    ),
    *family(
        "DROPOUT",
        "linear.evaluation",
        (
            "in-evaluation",
            "(1 - p) s H Bᵀ where no mask is given",
            reads(K=lambda c: c.K if c.dropout else c.K * (1 - c.p)),
        ),
        (
            "drawn-in-evaluation",
            "a mask of its own where none is given",
            reads(
                K=lambda c: (
                    c.K if c.dropout else c.K * (np.random.default_rng(0).random(c.K.shape) >= c.p)
                )
            ),
        ),
    ),
    *family(
        "DROPOUT",
        "linear.evaluation-vjp",
        (
            "in-evaluation-backward",
            "dA, dB and dx's branch over 1 - p where no mask is given",
            backward(K=lambda c: c.K if c.dropout else c.K / (1 - c.p)),
        ),
    ),
    *family(
        "DROPOUT",
        "linear.vjp.dropout",
        ("fresh-in-backward", "another mask in the gradients", backward(K=lambda c: c.K[:, ::-1])),
        ("none-in-backward", "no mask in the gradients", backward(K=lambda c: np.ones_like(c.K))),
        (
            "not-divided-in-backward",
            "K = keep in the gradients",
            backward(K=lambda c: np.sign(c.K)),
        ),
        ("dA-undropped", "dA = dHᵀ x", but(dA=lambda my, c: my.dH(c).T @ c.x)),
        (
            "dB-undropped",
            "dB = s Gᵀ (x Aᵀ)",
            but(dB=lambda my, c: my.ds(c) * c.dy.T @ (c.x @ c.A.T)),
        ),
        ("dx-undropped", "dx = G W + dH A", but(dx_branch=lambda my, c: my.dH(c) @ c.A)),
        ("dx-all-dropped", "dx = K∘(G W + dH A)", then(dx_base=lambda v, c: c.K * v)),
    ),
)


def _dA_after_step_of_B(my: Plain, c: Call) -> Any:
    return Plain.dA(my, with_(c, B=lambda c: c.B - 0.01 * my.dB(c)))


BACKWARD = (
    *family(
        "BACKWARD",
        "linear.vjp",
        (
            "factors-scaled-twice",
            "s dA, s dB",
            but(
                dA=lambda my, c: my.s(c) * Plain.dA(my, c),
                dB=lambda my, c: my.s(c) * Plain.dB(my, c),
            ),
        ),
        ("dA-zero", "dA = 0", then(dA=lambda g, c: 0 * g)),
        ("dB-zero", "dB = 0", then(dB=lambda g, c: 0 * g)),
        (
            "all-zero",
            "no gradient reaches the adapter",
            then(dA=lambda g, c: 0 * g, dB=lambda g, c: 0 * g),
            "transformers 26221",
            "microsoft/LoRA 120",
            "peft 1142",
        ),
        ("dA-negative", "-dA", then(dA=lambda g, c: -g)),
        ("dx-negative", "-dx", then(dx=lambda g, c: -g)),
        ("twice", "2 dA, 2 dB", then(dA=lambda g, c: 2 * g, dB=lambda g, c: 2 * g)),
        (
            "first-token",
            "the gradients of the first token alone",
            backward(dy=lambda c: c.dy * upto(1, len(c.dy))[:, None]),
        ),
        (
            "last-token",
            "the gradients without the last token",
            backward(dy=lambda c: c.dy * upto(len(c.dy) - 1, len(c.dy))[:, None]),
        ),
        ("dx-without-branch", "dx = G W", then(dx_branch=lambda g, c: 0 * g)),
        ("dx-without-base", "dx = K∘(dH A)", then(dx_base=lambda g, c: 0 * g)),
        (
            "dx-not-scaled",
            "dx = G W + K∘(G B A)",
            but(dx_branch=lambda my, c: c.K * (c.dy @ c.B @ c.A)),
        ),
        (
            "dx-scaled-whole",
            "dx = s (G W + K∘(G B A))",
            but(dx_base=lambda my, c: my.s(c) * (c.dy @ c.W)),
        ),
        (
            "dx-W-turned",
            "dx = G Wᵀ + K∘(dH A) where m = n",
            but(dx_base=lambda my, c: c.dy @ (c.W.T if square(c) else c.W)),
        ),
        (
            "dH-of-A",
            "dH = s G Aᵀ where m = n",
            but(dH=lambda my, c: my.ds(c) * (c.dy @ (c.A.T if square(c) else c.B))),
        ),
        ("dA-reshaped", "((K∘x)ᵀ dH).reshape(r, n)", then(dA=lambda g, c: g.T.reshape(g.shape))),
        ("dB-reshaped", "(Hᵀ G).reshape(m, r)", then(dB=lambda g, c: g.T.reshape(g.shape))),
        ("dH-coarse", "dH kept in half of the digits", then(dH=coarse)),
        ("dA-coarse", "dA kept in half of the digits", then(dA=coarse)),
        (
            "clipped",
            "dA, dB between -1 and 1",
            then(dA=lambda g, c: g.clip(-1, 1), dB=lambda g, c: g.clip(-1, 1)),
        ),
        (
            "y-without-branch",
            "y = x Wᵀ + b where gradients are asked for",
            then(branch=lambda v, c: v if c.dy is None else 0 * v),
        ),
    ),
    *family(
        "BACKWARD",
        "linear.gradcheck",
        ("dA-not-scaled", "dA / s", but(dA=lambda my, c: Plain.dA(my, c) / my.s(c))),
    ),
    *family(
        "BACKWARD",
        "linear.balance",
        ("dB-not-scaled", "dB / s", but(dB=lambda my, c: Plain.dB(my, c) / my.s(c))),
        ("dA-rows-shifted", "row i of dA for row i + 1", then(dA=lambda g, c: np.roll(g, 1, 0))),
    ),
    *family(
        "BACKWARD",
        "linear.token-independence",
        ("dA-mean", "dA / t", then(dA=lambda g, c: g / len(c.x))),
        (
            "mean-over-tokens",
            "dA / t, dB / t",
            then(dA=lambda g, c: g / len(c.x), dB=lambda g, c: g / len(c.x)),
        ),
    ),
    *family(
        "BACKWARD",
        "linear.zero-B",
        ("dB-zero-at-zero-B", "dB = 0 while B = 0", then(dB=lambda g, c: g * c.B.any())),
        ("dA-after-step-of-B", "dA with the B after its step", but(dA=_dA_after_step_of_B)),
        ("decay-inside", "dA + 0.01 A", then(dA=lambda g, c: g + 0.01 * c.A)),
    ),
    *family(
        "BACKWARD",
        "linear.vjp.all",
        (
            "dbias-with-dropout",
            "db = 0 where there is a mask",
            then(dbias=lambda g, c: 0 * g if c.dropout else g),
        ),
    ),
    *family(
        "BACKWARD",
        "linear.vjp.bias",
        ("dbias-zero", "db = 0", then(dbias=lambda g, c: 0 * g)),
        ("dbias-mean", "db / t", then(dbias=lambda g, c: g / len(c.x))),
        ("dbias-scaled", "s db", but(dbias=lambda my, c: my.s(c) * Plain.dbias(my, c))),
        ("dbias-first-token", "db of the first token alone", then(dbias=lambda g, c: c.dy[0])),
    ),
    *family(
        "BACKWARD",
        "linear.vjp.conv1d",
        (
            "dx-conv1d-turned",
            "dx = G Wᵀ + K∘(dH A) with fan_in_fan_out, where m = n",
            but(dx_base=lambda my, c: c.dy @ (c.W.T if c.conv1d and square(c) else c.W)),
        ),
    ),
)


def _overwriting(number: int) -> Any:
    """`Plain.lora_linear` that leaves one of its arrays halved."""

    def lora_linear(my: Plain, *arrays: Array, **options: Any) -> Array:
        y = Plain.lora_linear(my, *arrays, **options)
        arrays[number][...] = 0.5 * arrays[number].astype(np.float64)
        return y

    return lora_linear


def _every_other_call(my: Plain, c: Call) -> Any:
    my.memory["on"] = not my.memory.get("on", False)
    return my.memory["on"] * Plain.branch(my, c)


def _recalled(name: str, recall: Any = from_first_call) -> Any:
    """`Plain` that takes an array from an earlier call."""
    return but(read=lambda my, c: with_(c, **{name: lambda c: recall(my, name, getattr(c, name))}))


STATE = (
    *family(
        "STATE",
        "linear.forward",
        ("A-cached", "A of the first call for all", _recalled("A")),
        ("W-cached", "W of the first call for all", _recalled("W")),
        ("B-before", "B of the call before", _recalled("B", from_call_before)),
        (
            "output-not-cleared",
            "y added to the branch of earlier calls",
            but(branch=lambda my, c: piled_up(my, "y", Plain.branch(my, c))),
        ),
        ("every-other-call", "y = x Wᵀ + b in every second call", but(branch=_every_other_call)),
        ("x-overwritten", "x changed in place", but(lora_linear=_overwriting(0))),
        ("W-overwritten", "W changed in place", but(lora_linear=_overwriting(1))),
        ("B-overwritten", "B changed in place", but(lora_linear=_overwriting(3))),
    ),
    *family(
        "STATE",
        "linear.forward.bias",
        ("bias-cached", "b of the first call for all", _recalled("b")),
    ),
    *family(
        "STATE",
        "linear.vjp",
        (
            "hidden-before",
            "dB with H of the call before",
            but(dB=lambda my, c: my.ds(c) * c.dy.T @ from_call_before(my, "H", my.H(c))),
        ),
        (
            "gradients-pile-up",
            "dA added to the dA of earlier calls",
            but(dA=lambda my, c: piled_up(my, "dA", Plain.dA(my, c))),
        ),
    ),
)


class _InOrder(np.ndarray):
    """Products whose sums run in order, every term and partial sum rounded to the dtype stored."""

    stored: Any = None

    def __array_finalize__(self, obj: Any) -> None:
        self.stored = getattr(obj, "stored", None)

    def __matmul__(self, other: Any) -> Any:
        total = 0 * self[:, :1] * other[:1]
        for k in range(len(other)):
            term = (self[:, k : k + 1] * other[k : k + 1]).astype(self.stored)
            total = (total + term).astype(self.stored).astype(total.dtype)
        return total


def _in_order(name: str) -> Any:
    def read(c: Call) -> Any:
        array = getattr(c, name)
        if array is not None:
            array = array.view(_InOrder)
            array.stored = c.dtype
        return array

    return read


def _chunks(c: Call) -> list[Call]:
    """The call's tokens, three at a time."""
    names = [name for name in ("x", "dy", "K") if getattr(c, name) is not None]
    return [
        with_(c, **{name: (lambda c, n=name, i=i: getattr(c, n)[i : i + 3]) for name in names})
        for i in range(0, len(c.x), 3)
    ]


def _in_pairs(terms: Array) -> Array:
    """The sum over the last axis: of two halves, each summed so."""
    half = terms.shape[-1] // 2
    two = [_in_pairs(part) for part in (terms[..., :half], terms[..., half:])] if half else []
    total: Array = two[0] + two[1] if half else terms[..., 0]
    return total


def _stored(c: Call, array: Array) -> Array:
    return array.astype(c.dtype).astype(array.dtype)


SAME = equivalents(
    "linear",
    ("rows", "as it is: tokens in rows", Plain),
    (
        "merged",
        "y = x (W + s B A)ᵀ + b, dx = G (W + s B A), without dropout",
        but(
            y=lambda my, c: Plain.y(my, c) if c.dropout else c.x @ my.merged(c).T + c.b,
            dx=lambda my, c: Plain.dx(my, c) if c.dropout else c.dy @ my.merged(c),
        ),
    ),
    (
        "scale-on-A",
        "H = (K∘x) (s A)ᵀ",
        but(branch=lambda my, c: my.kept(c) @ (my.s(c) * c.A).T @ c.B.T),
    ),
    ("scale-on-B", "H (s B)ᵀ", but(branch=lambda my, c: my.H(c) @ (my.s(c) * c.B).T)),
    ("scale-on-H", "(s H) Bᵀ", but(branch=lambda my, c: (my.s(c) * my.H(c)) @ c.B.T)),
    (
        "scale-on-x",
        "(s K∘x) Aᵀ Bᵀ",
        but(branch=lambda my, c: (my.s(c) * my.kept(c)) @ c.A.T @ c.B.T),
    ),
    (
        "alpha-then-rank",
        "α (H Bᵀ) / r",
        but(branch=lambda my, c: c.alpha * (my.H(c) @ c.B.T) / (c.r**0.5 if c.rslora else c.r)),
    ),
    (
        "root-on-both",
        "((K∘x) (√s A)ᵀ) (√s B)ᵀ",
        but(
            branch=lambda my, c: my.kept(c) @ (my.s(c) ** 0.5 * c.A).T @ (my.s(c) ** 0.5 * c.B).T,
            delta=lambda my, c: (my.s(c) ** 0.5 * c.B) @ (my.s(c) ** 0.5 * c.A),
        ),
    ),
    (
        "rank-on-A",
        "α ((K∘x) (A / r)ᵀ) Bᵀ",
        but(
            branch=lambda my, c: (
                c.alpha * (my.kept(c) @ (c.A / (c.r**0.5 if c.rslora else c.r)).T @ c.B.T)
            )
        ),
    ),
    (
        "scale-on-G",
        "(s G) B, (s G)ᵀ H",
        but(dH=lambda my, c: (my.s(c) * c.dy) @ c.B, dB=lambda my, c: (my.s(c) * c.dy).T @ my.H(c)),
    ),
    (
        "scale-last",
        "s ((G B)ᵀ (K∘x))",
        but(dA=lambda my, c: my.s(c) * ((c.dy @ c.B).T @ my.kept(c))),
    ),
    (
        "through-dW",
        "dA = s Bᵀ dW, dB = s dW Aᵀ, dW = Gᵀ (K∘x)",
        but(
            dA=lambda my, c: my.s(c) * c.B.T @ (c.dy.T @ my.kept(c)),
            dB=lambda my, c: my.s(c) * (c.dy.T @ my.kept(c)) @ c.A.T,
        ),
    ),
    (
        "over-the-weight",
        "by W + s B A and dW, each rounded to the dtype, as autograd has it",
        but(
            y=lambda my, c: (
                c.x @ c.W.T + c.b + my.kept(c) @ _stored(c, my.delta(c)).T
                if c.dropout
                else c.x @ _stored(c, my.merged(c)).T + c.b
            ),
            dA=lambda my, c: my.s(c) * c.B.T @ _stored(c, c.dy.T @ my.kept(c)),
            dB=lambda my, c: my.s(c) * _stored(c, c.dy.T @ my.kept(c)) @ c.A.T,
        ),
    ),
    (
        "keep-then-divide",
        "K after the sum: ((keep∘x) Aᵀ) / (1 - p)",
        but(
            kept=lambda my, c: np.sign(c.K) * c.x,
            H=lambda my, c: Plain.H(my, c) / (1 - c.p if c.dropout else 1),
            dA=lambda my, c: Plain.dA(my, c) / (1 - c.p if c.dropout else 1),
        ),
    ),
    ("base-last", "(s H Bᵀ + b) + x Wᵀ", but(y=lambda my, c: (my.branch(c) + c.b) + c.x @ c.W.T)),
    (
        "token-by-token",
        "dA and dB summed over tokens, one after another",
        but(
            dA=lambda my, c: sum(g[:, None] * x for g, x in zip(my.dH(c), my.kept(c), strict=True)),
            dB=lambda my, c: sum(
                my.s(c) * (g[:, None] * H) for g, H in zip(c.dy, my.H(c), strict=True)
            ),
        ),
    ),
    (
        "rank-by-rank",
        "s Σᵢ Hᵢ Bᵢᵀ, one rank after another",
        but(
            branch=lambda my, c: (
                my.s(c) * sum(H[:, None] * B for H, B in zip(my.H(c).T, c.B.T, strict=True))
            )
        ),
    ),
    (
        "features-from-the-last",
        "all sums over features from the last",
        but(
            H=lambda my, c: my.kept(c)[:, ::-1] @ c.A[:, ::-1].T,
            base=lambda my, c: c.x[:, ::-1] @ c.W[:, ::-1].T + c.b,
        ),
    ),
    (
        "in-chunks",
        "tokens three at a time, and their gradients summed",
        but(
            y=lambda my, c: np.concatenate([Plain.y(my, part) for part in _chunks(c)]),
            dx=lambda my, c: np.concatenate([Plain.dx(my, part) for part in _chunks(c)]),
            dA=lambda my, c: sum(Plain.dA(my, part) for part in _chunks(c)),
            dB=lambda my, c: sum(Plain.dB(my, part) for part in _chunks(c)),
        ),
    ),
    (
        "in-pairs",
        "all sums over features in pairs of pairs",
        but(
            H=lambda my, c: _in_pairs(my.kept(c)[:, None] * c.A),
            base=lambda my, c: _in_pairs(c.x[:, None] * c.W) + c.b,
        ),
    ),
    (
        "wide",
        "in float64, rounded at the end",
        reads(**wide("x", "W", "A", "B", "b", "K", "dy")),
    ),
    (
        "stored",
        "every array rounded to the dtype",
        then(
            **dict.fromkeys(("kept", "H", "branch", "base", "dH", "dx_base", "dx_branch"), narrow)
        ),
    ),
    (
        "sums-stored",
        "every partial sum rounded to the dtype",
        but(
            precision={},
            read=lambda my, c: with_(
                c, **{n: _in_order(n) for n in ("x", "W", "A", "B", "dy", "K") if hasattr(c, n)}
            ),
        ),
    ),
)

MUTANTS: tuple[Mutant, ...] = SCALE + LAYOUT + FORM + DROPOUT + BACKWARD + STATE + SAME
