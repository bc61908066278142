"""Mutants of one LoRA linear."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.verify.mutants.mutant import Mutant, Reference, Same, Table, equivalents, mutants
from minilora.verify.mutants.references.helpers import Array, rows
from minilora.verify.mutants.references.linear import Linear


def turned_rows(x: Array | None) -> Array | None:
    """`rows` by a reshape to (n, t) and its transpose."""
    return None if x is None else x.reshape(x.shape[-1], -1).T


def batch_swapped_rows(x: Array | None) -> Any:
    """`rows` of a batch whose sequences and tokens are exchanged."""
    return rows(x if x is None or x.ndim < 3 else x.swapaxes(0, 1))


def turned_batches(v: Array, shape: tuple[int, ...]) -> Array:
    """`shaped`, with the two axes of batches exchanged where there are two."""
    array = v.reshape(*shape, v.shape[-1])
    return array.swapaxes(0, 1) if array.ndim == 4 else array


def threes(x: Array) -> list[slice]:
    """The tokens, three at a time."""
    return [slice(i, i + 3) for i in range(0, len(x), 3)]


def tiled(size: int, tile: int) -> int:
    """The size, or where it is greater than a tile, that of its whole tiles."""
    return size if size <= tile else size // tile * tile


def summed_in_blocks(P: Array, Q: Array, dtype: Any) -> Any:
    """P Q, of blocks of 8 terms whose sums are added in a dtype."""
    total = np.zeros((len(P), Q.shape[1]), dtype)
    for k in range(0, len(Q), 8):
        total = (total.astype(P.dtype) + P[:, k : k + 8] @ Q[k : k + 8]).astype(dtype)
    return total.astype(P.dtype)


def in_pairs(terms: Array) -> Array:
    """The sum over the last axis: of two halves, each summed so."""
    half = terms.shape[-1] // 2
    two = [in_pairs(part) for part in (terms[..., :half], terms[..., half:])] if half else []
    total: Array = two[0] + two[1] if half else terms[..., 0]
    return total


class InOrder(np.ndarray):
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


def in_order(array: Array | None, dtype: Any) -> Any:
    """The array as `InOrder`."""
    if array is None:
        return None
    ordered = array.view(InOrder)
    ordered.stored = dtype
    return ordered


LINEAR = Reference((Linear,), globals())

# fmt: off
SCALE: Table = {
    "linear.forward": [
        ("alpha", "s = α",
         {"ds = s": "ds = s = alpha"}, "mlx-vlm 841", "mlx-vlm 845", "rasbt/LLMs-from-scratch 821"),
        ("root", "s = α/√r, unasked", {"ds = s": "ds = s = alpha / r**0.5"}),
        ("inverse", "s = r/α", {"ds = s": "ds = s = 1 / s"}),
        ("of-rank-alone", "s = 1/r", {"ds = s": "ds = s = 1 / r"}),
        ("one", "s = 1", {"ds = s": "ds = s = 1.0"}),
        ("zero", "s = 0: no adapter at all", {"ds = s": "ds = s = 0.0"}),
        ("squared", "s = (α/r)²", {"ds = s": "ds = s = s**2"}, "peft 3111"),
        ("floor", "s = ⌊α/r⌋", {"ds = s": "ds = s = s // 1"}),
        ("whole-alpha", "s = ⌊α⌋/r", {"ds = s": "ds = s = int(alpha) / r"}),
        ("bfloat16", "s = α/r rounded to bfloat16", {"ds = s": "ds = s = digits(s, 8)"}),
        ("off-10-ppm", "s = 1.00001 α/r", {"ds = s": "ds = s = 1.00001 * s"}),
        ("off-1-percent", "s = 1.01 α/r", {"ds = s": "ds = s = 1.01 * s"}),
        ("negative", "s = -α/r", {"ds = s": "ds = s = -s"}),
        ("stacked-rank", "s = α/(3 r), the rank of three stacked A", {"ds = s": "ds = s = s / 3"}),
        ("rank-from-B", "s = α/m, r from B's wrong axis", {"ds = s": "ds = s = alpha / len(B)"}),
        ("rank-from-A", "s = α/n, r from A's wrong axis", {"ds = s": "ds = s = alpha / len(A.T)"}),
        ("first-call", "s of the first call: another adapter's",
         {"ds = s": 'ds = s = first_call(self.memory, "s", s)'}),
        ("of-base", "y = s (x Wᵀ + b + H Bᵀ)", {"x @ W.T + b": "s * (x @ W.T + b)"}),
    ],
    "linear.forward.rslora": [
        ("rslora-ignored", "s = α/r with rsLoRA",
         {"ds = s": "ds = s = alpha / r"}, "TensorRT-LLM 1668", "peft 2733"),
        ("rslora-of-alpha", "s = √(α/r) with rsLoRA",
         {"ds = s": "ds = s = (alpha / r) ** (0.5 if use_rslora else 1)"}),
        ("rslora-half-of-bits", "s = α / 2^⌊log₂ r / 2⌋ with rsLoRA where r is a power of 2",
         {"ds = s":
              "ds = s = alpha / 2 ** ((r.bit_length() - 1) // 2) if use_rslora and not r & (r - 1) "
              "else s"}),
    ],
    "linear.forward.bias": [
        ("of-bias", "y = x Wᵀ + s b + s H Bᵀ", {"x @ W.T + b": "x @ W.T + s * b"}),
    ],
    "linear.vjp": [
        ("backward-squared", "s² in all gradients", {"ds = s": "ds = s**2"}),
        ("backward-one", "no s in any gradient", {"ds = s": "ds = 1.0"}),
    ],
    "linear.vjp.rslora": [
        ("backward-rslora-ignored", "s = α/r in the gradients", {"ds = s": "ds = alpha / r"}),
    ],
}
LAYOUT: Table = {
    "linear.forward": [
        ("reshape-A", "A.reshape(n, r) for Aᵀ", {"# arrays": "A = A.reshape(-1, r).T"}),
        ("reshape-B", "B.reshape(r, m) for Bᵀ", {"# arrays": "B = B.reshape(r, -1).T"}),
        ("file-turned", "A read as (n, r) and B as (r, m), and reshaped",
         {"# arrays": "A, B = A.reshape(-1, r).T, B.reshape(r, -1).T"}, "vmlx-swift 320"),
        ("A-for-B", "A and Bᵀ swapped where m = n: (B A)ᵀ for B A",
         {"# arrays": "A, B = (B.T, A.T) if square(W) else (A, B)"}),
        ("W-turned", "x W for x Wᵀ where m = n", {"# arrays": "W = W.T if square(W) else W"}),
        ("A-shifted", "column j of A for column j + 1", {"# arrays": "A = np.roll(A, 1, 1)"}),
        ("B-shifted", "row i of B for row i + 1", {"# arrays": "B = np.roll(B, 1, 0)"}),
        ("ranks-reversed", "A's rows reversed, B's columns not", {"# arrays": "A = A[::-1]"}),
        ("ranks-shifted", "row i of A for row i + 1, B's columns not",
         {"# arrays": "A = np.roll(A, 1, 0)"}),
        ("last-rank", "the last rank is not used", {"h @ A.T": "h @ A.T * upto(r - 1, r)"}),
        ("reshape-x", "x.reshape(n, t) for xᵀ",
         {"shape, dropout =": "rows = turned_rows; shape, dropout ="}),
        ("reshape-y", "y (m, t) reshaped for yᵀ", {"# output": "y = y.T.reshape(y.shape)"}),
        ("batch-swapped", "x (b, t, n) read as (t, b, n)",
         {"shape, dropout =": "rows = batch_swapped_rows; shape, dropout ="}),
        ("first-sequence", "y = 0 in all sequences of a batch except the first",
         {"# output": "y = y * upto(shape[-1], len(y))[:, None] if shape else y"}),
        ("vector-batched", "y has shape (1, m) for x of shape (n,)",
         {"# output": "shape = shape or (1,)"}),
        ("last-token", "y = 0 at the last token",
         {"# output": "y = y * upto(len(y) - 1, len(y))[:, None]"}),
        ("first-token", "every token gets the first token's branch",
         {"h @ A.T": "h @ A.T; H = H[:1] + 0 * H"}),
        ("tail-of-features", "the sum over features omits those beyond a multiple of 4",
         {"x * K": "x * K * upto(len(W.T) // 4 * 4, len(W.T))"}),
        ("tail-of-ranks", "the sum over ranks omits those beyond a multiple of 2",
         {"h @ A.T": "h @ A.T * upto(r // 2 * 2, r)"}),
        ("tail-of-outputs", "the outputs beyond a multiple of 4 have no branch",
         {"# branch": "branch = branch * upto(len(W) // 4 * 4, len(W))"}),
        ("one-rank", "only the first rank is used", {"h @ A.T": "h @ A.T * upto(1, r)"}),
        ("eight-ranks", "only the first 8 ranks are used", {"h @ A.T": "h @ A.T * upto(8, r)"}),
        ("tile-of-features", "only the last tile of 16 features enters the branch",
         {"x * K": "x * K * ~upto((len(W.T) - 1) // 16 * 16, len(W.T))"}),
        ("tile-of-tokens", "no branch for tokens beyond the 32nd",
         {"# branch": "branch = branch * upto(32, len(x))[:, None]"}),
        ("one-token", "no branch for x of shape (1, n)",
         {"# branch": "branch = 0 * branch if shape == (1,) else branch"}),
        ("near-zero", "no branch where B is close to 0",
         {"# branch": "branch = 0 * branch if np.allclose(B, 0) else branch"}),
        ("batch-of-one", "y lacks its first axis for x of shape (1, …, n)",
         {"# output": "shape = shape[1:] if shape[:1] == (1,) else shape"}),
        ("batches-swapped", "y has shape (b, a, t, m) for x of shape (a, b, t, n)",
         {"# output": "shaped = turned_batches"}),
    ],
    "linear.forward.conv1d": [
        ("conv1d-turned", "x W with fan_in_fan_out, where m = n",
         {"# arrays": "W = W.T if fan_in_fan_out and square(W) else W"}),
        ("conv1d-reshaped", "W.reshape(n, m)ᵀ with fan_in_fan_out",
         {"# arrays": "W = W.reshape(W.shape[::-1]).T if fan_in_fan_out else W"}),
    ],
}
COMBINED: Table = {
    "linear.forward.all": [
        ("stored-in-out-no-bias", "no bias where the weight is stored (in, out)",
         {"# arrays": "b = 0 * b if fan_in_fan_out else b"}),
        ("stored-in-out-no-mask", "no dropout where the weight is stored (in, out)",
         {"# arrays": "K = np.ones_like(x) if x is not None and fan_in_fan_out else None if x is "
                      "None else K"}),
        ("stored-in-out-alpha-over-r", "α/r where the weight is stored (in, out), rsLoRA or not",
         {"# arrays": "use_rslora = use_rslora and not fan_in_fan_out"}),
        ("mask-needs-rate", "no mask where there is no rate p",
         {"# arrays": "K = K if x is None or p else np.ones_like(x)"}
         ),
        ("ranks-beyond-64", "ranks beyond 64 are left out",
         {"# arrays": "A = A * upto(64, len(A))[:, None]"}),
        ("evaluation-no-bias", "no bias where there is a rate and no mask",
         {"# arrays": "b = 0 * b if p and not dropout else b"}),
        ("alpha-absolute-rslora", "|α| for α with rsLoRA",
         {"# arrays": "alpha = abs(alpha) if use_rslora else alpha"}),
    ],
    "linear.forward": [
        ("alpha-absolute", "|α| for α", {"# arrays": "alpha = abs(alpha)"}),
        ("tile-64", "of more than 64 features, those beyond the last whole 64 are left out",
         {"# arrays": "A = A * upto(tiled(A.shape[1], 64), A.shape[1])"}),
    ],
    "linear.vjp": [
        ("tokens-beyond-512", "dA of the first 512 tokens",
         {"dA = dH.T @ h": "dA = dH[:512].T @ h[:512]"}),
    ],
    "linear.accumulation": [
        ("summed-in-storage", "sums in blocks of 8, whose sums are added in the dtype stored",
         {"base = x @ W.T + b": "base = summed_in_blocks(x, W.T, dtype) + b"}),
    ],
    "linear.accumulation-vjp": [
        ("gradients-summed-in-storage", "dA summed over blocks of 8 tokens in the dtype stored",
         {"dA = dH.T @ h": "dA = summed_in_blocks(dH.T, h, dtype)"}),
    ],
}
FORM: Table = {
    "linear.forward": [
        ("no-base", "y = s H Bᵀ", {"x @ W.T + b": "0 * (x @ W.T + b)"}),
        ("no-weight", "y = b + s H Bᵀ", {"x @ W.T + b": "0 * (x @ W.T) + b"}),
        ("base-twice", "y = 2 (x Wᵀ + b) + s H Bᵀ", {"x @ W.T + b": "2 * (x @ W.T + b)"}),
        ("branch-twice", "y = x Wᵀ + b + 2 s H Bᵀ", {"# branch": "branch = 2 * branch"}),
        ("base-of-sum", "y = (x + s H Bᵀ) Wᵀ + b where m = n",
         {"base + branch": "(x + branch) @ W.T + b if square(W) else base + branch"}),
        ("branch-of-base", "H = (x Wᵀ + b) Aᵀ where m = n",
         {"x * K": "x @ W.T + b if square(W) else x * K"}),
        ("residual", "y + x where m = n",
         {"base + branch": "base + branch + x if square(W) else base + branch"}),
        ("softsign", "H / (1 + |H|) for H", {"h @ A.T": "h @ A.T; H = H / (1 + abs(H))"}),
        ("rank-mean", "the mean over ranks instead of the sum",
         {"# branch": "branch = branch / r"}),
        ("clamped", "s H Bᵀ clipped to [-6, 6]", {"# branch": "branch = branch.clip(-6, 6)"}),
        ("unit-A", "A's rows normalised to length 1",
         {"# arrays": "A = A / np.maximum((A**2).sum(1, keepdims=True), 1e-9) ** 0.5"}),
        ("hidden-bfloat16", "H rounded to bfloat16", {"h @ A.T": "digits(h @ A.T, 8)"}),
        ("hidden-coarse", "H rounded to half of the dtype's digits",
         {"h @ A.T": "coarse(h @ A.T, dtype)"}),
        ("branch-coarse", "s H Bᵀ rounded to half of the dtype's digits",
         {"# branch": "branch = coarse(branch, dtype)"}),
        ("base-coarse", "x Wᵀ + b rounded to half of the dtype's digits",
         {"x @ W.T + b": "coarse(x @ W.T + b, dtype)"}),
        ("tf32", "the branch's input rounded to 11 binary digits, as TF32 does",
         {"x * K": "digits(x * K, 11)"}),
    ],
    "linear.forward.all": [
        ("no-bias-with-dropout", "no b where there is a dropout mask",
         {"# arrays": "b = 0 * b if dropout else b"}),
    ],
    "linear.forward.bias": [
        ("no-bias", "no b", {"# arrays": "b = 0 * b"}),
        ("bias-of-token", "b added to tokens instead of features where t = m",
         {"x @ W.T + b": "x @ W.T + (b[:, None] if len(x) == len(b) else b)"}),
        ("bias-twice", "2 b", {"# arrays": "b = 2 * b"}),
        ("bias-negative", "-b", {"# arrays": "b = -b"}),
    ],
    "linear.symmetry": [
        ("relu", "max(H, 0) for H", {"h @ A.T": "np.maximum(h @ A.T, 0)"}),
        ("absolute-B", "|B| for B", {"# arrays": "B = abs(B)"}),
    ],
    "linear.basis-change": [
        ("tanh", "tanh(H) for H", {"h @ A.T": "np.tanh(h @ A.T)"}),
    ],
}
DROPOUT: Table = {
    "linear.forward.dropout": [
        ("on-base", "dropout on the base's input, too: (K∘x) Wᵀ", {"x @ W.T + b": "h @ W.T + b"}),
        ("on-base-alone", "dropout on the base's input alone: (K∘x) Wᵀ and H = x Aᵀ",
         {"x * K": "x", "x @ W.T + b": "(x * K) @ W.T + b"}),
        ("on-hidden", "dropout on H: K∘(x Aᵀ)", {"x * K": "x", "h @ A.T": "K[:, :r] * (x @ A.T)"}),
        ("on-branch", "dropout on the branch: K∘(s H Bᵀ)",
         {"x * K": "x", "# branch": "branch = np.resize(K, branch.shape) * branch"}),
        ("by-p", "K = keep / p", {"# inputs": "K = K * ((1 - p) / p) if dropout else K"}),
        ("times-rate", "K = keep (1 - p)", {"# inputs": "K = K * (1 - p) ** 2 if dropout else K"}),
        ("by-count", "K = keep / the fraction that is kept",
         {"# inputs": "K = K / (K.mean() or 1)"}),
        ("twice", "dropout applied twice: K∘K∘x", {"# inputs": "K = K**2"}),
        ("never", "no dropout: K = 1", {"# inputs": "K = np.ones_like(K)"}),
        ("inverted", "the mask read as what to drop",
         {"# inputs": "K = 1 / (1 - p) - K if dropout else K"}),
        ("one-token", "the first token's mask for all tokens", {"# inputs": "K = K[:1] + 0 * K"}),
        ("whole-tokens", "the first feature's mask for all features",
         {"# inputs": "K = K[:, :1] + 0 * K"}),
        ("first-call", "the first call's mask for all calls",
         {"# inputs": 'K = first_call(self.memory, "K", K) if dropout else K'}),
    ],
    "linear.dropout-mean": [
        ("not-divided", "K = keep", {"# inputs": "K = np.sign(K)"}),
    ],
    "linear.evaluation": [
        ("in-evaluation", "(1 - p) s H Bᵀ where no mask is given",
         {"# inputs": "K = K if dropout else K * (1 - p)"}),
        ("drawn-in-evaluation", "a mask is drawn where none is given",
         {"# inputs": "K = K if dropout else K * (np.random.default_rng(0).random(K.shape) >= p)"}),
    ],
    "linear.evaluation-vjp": [
        ("in-evaluation-backward", "dA, dB and dx's branch divided by 1 - p where no mask is given",
         {"# through the branch": "K = K if dropout else K / (1 - p); h = x * K; H = h @ A.T"}),
    ],
    "linear.vjp.dropout": [
        ("fresh-in-backward", "another mask in the gradients than in y",
         {"# through the branch": "K = K[:, ::-1]; h = x * K; H = h @ A.T"}),
        ("none-in-backward", "no mask in the gradients",
         {"# through the branch": "K = np.ones_like(K); h = x * K; H = h @ A.T"}),
        ("not-divided-in-backward", "K = keep in the gradients",
         {"# through the branch": "K = np.sign(K); h = x * K; H = h @ A.T"}),
        ("dA-undropped", "dA = dHᵀ x", {"dH.T @ h": "dH.T @ x"}),
        ("dB-undropped", "dB = s Gᵀ (x Aᵀ)", {"ds * (dz.T @ H)": "ds * dy.T @ (x @ A.T)"}),
        ("dx-undropped", "dx = G W + dH A", {"dx_branch = K * dx_branch": "pass"}),
        ("dx-all-dropped", "dx = K∘(G W + dH A)", {"dy @ W": "K * (dy @ W)"}),
    ],
}
BACKWARD: Table = {
    "linear.vjp": [
        ("factors-scaled-twice", "s dA, s dB", {"# gradients": "dA, dB = s * dA, s * dB"}),
        ("dA-zero", "dA = 0: A is detached, or not trained", {"# gradients": "dA = 0 * dA"}),
        ("dB-zero", "dB = 0: B is detached, or not trained", {"# gradients": "dB = 0 * dB"}),
        ("all-zero", "dA = dB = 0: no gradient reaches the adapter",
         {"# gradients":
              "dA, dB = 0 * dA, 0 * dB"}, "transformers 26221", "microsoft/LoRA 120", "peft 1142"),
        ("dA-negative", "-dA", {"# gradients": "dA = -dA"}),
        ("dx-negative", "-dx", {"# gradients": "dx = -dx"}),
        ("twice", "2 dA, 2 dB", {"# gradients": "dA, dB = 2 * dA, 2 * dB"}),
        ("first-token", "the gradients of the first token alone",
         {"# through the branch": "dy = dy * upto(1, len(dy))[:, None]"}),
        ("last-token", "the gradients omit the last token",
         {"# through the branch": "dy = dy * upto(len(dy) - 1, len(dy))[:, None]"}),
        ("dx-without-branch", "dx = G W", {"dx_branch + dx_base": "dx_base"}),
        ("dx-without-base", "dx = K∘(dH A)", {"dx_branch + dx_base": "dx_branch"}),
        ("dx-not-scaled", "dx = G W + K∘(G B A)", {"K * dx_branch": "K * (dy @ B @ A)"}),
        ("dx-scaled-whole", "dx = s (G W + K∘(G B A))", {"dy @ W": "s * (dy @ W)"}),
        ("dx-W-turned", "dx = G Wᵀ + K∘(dH A) where m = n",
         {"dy @ W": "dy @ (W.T if square(W) else W)"}),
        ("dH-of-A", "dH = s G Aᵀ where m = n",
         {"ds * (dz @ B)": "ds * (dy @ (A.T if square(W) else B))"}),
        ("dA-reshaped", "((K∘x)ᵀ dH).reshape(r, n)",
         {"# gradients": "dA = dA.T.reshape(dA.shape)"}),
        ("dB-reshaped", "(Hᵀ G).reshape(m, r)", {"# gradients": "dB = dB.T.reshape(dB.shape)"}),
        ("dH-coarse", "dH rounded to half of the dtype's digits",
         {"ds * (dz @ B)": "coarse(ds * (dz @ B), dtype)"}),
        ("dA-coarse", "dA rounded to half of the dtype's digits",
         {"# gradients": "dA = coarse(dA, dtype)"}),
        ("clipped", "dA, dB clipped to [-1, 1]",
         {"# gradients": "dA, dB = dA.clip(-1, 1), dB.clip(-1, 1)"}),
        ("y-without-branch", "y = x Wᵀ + b where gradients are computed",
         {"# branch": "branch = branch if dy is None else 0 * branch"}),
    ],
    "linear.gradcheck": [
        ("dA-not-scaled", "dA / s", {"# gradients": "dA = dA / s"}),
    ],
    "linear.balance": [
        ("dB-not-scaled", "dB / s", {"# gradients": "dB = dB / s"}),
        ("dA-rows-shifted", "row i of dA for row i + 1", {"# gradients": "dA = np.roll(dA, 1, 0)"}),
    ],
    "linear.token-independence": [
        ("dA-mean", "dA / t", {"# gradients": "dA = dA / len(x)"}),
        ("mean-over-tokens", "dA / t, dB / t",
         {"# gradients": "dA, dB = dA / len(x), dB / len(x)"}),
    ],
    "linear.zero-B": [
        ("dx-zero-at-zero-B", "dx = 0 while B = 0", {"# gradients": "dx = dx * B.any()"}),
        ("dB-zero-at-zero-B", "dB = 0 while B = 0", {"# gradients": "dB = dB * B.any()"}),
        ("dA-after-step-of-B", "dA computed with B after its own step",
         {"# gradients": "dA = (ds * (dz @ (B - 0.01 * dB))).T @ h"}),
        ("decay-inside", "weight decay in the gradient: dA + 0.01 A",
         {"# gradients": "dA = dA + 0.01 * A"}),
    ],
    "linear.vjp.all": [
        ("dbias-with-dropout", "db = 0 where there is a mask",
         {"# gradients": "dbias = 0 * dbias if dropout else dbias"}),
    ],
    "linear.vjp.bias": [
        ("dbias-zero", "db = 0", {"# gradients": "dbias = 0 * dbias"}),
        ("dbias-mean", "db / t", {"# gradients": "dbias = dbias / len(x)"}),
        ("dbias-scaled", "s db", {"# gradients": "dbias = s * dbias"}),
        ("dbias-first-token", "db of the first token alone", {"# gradients": "dbias = dy[0]"}),
    ],
    "linear.vjp.conv1d": [
        ("dx-conv1d-turned", "dx = G Wᵀ + K∘(dH A) with fan_in_fan_out, where m = n",
         {"dy @ W": "dy @ (W.T if fan_in_fan_out and square(W) else W)"}),
    ],
}
STATE: Table = {
    "linear.forward": [
        ("answer-in-buffer", "y in memory that the next call uses again",
         {'y: Array = self.layer(W, A, B, x, **options)["y"].astype(x.dtype)':
              'y: Array = in_buffer(self.memory, "y", self.layer(W, A, B, x, '
              '**options)["y"].astype(x.dtype))'}),
        ("weight-by-identity", "W of the first call with an array in this place of the memory",
         {"dtype, dora = W.dtype, use_dora":
              "W = by_identity(self.memory, W); dtype, dora = W.dtype, use_dora"}),
        ("W-cached", "the first call's W in every call",
         {"# arrays": 'W = first_call(self.memory, "W", W)'}),
        ("B-before", "the previous call's B", {"# arrays": 'B = call_before(self.memory, "B", B)'}),
        ("output-not-cleared", "the branches of all calls add up",
         {"# branch": 'branch = piled_up(self.memory, "y", branch)'}),
        ("every-other-call", "y = x Wᵀ + b in every second call",
         {"# branch":
              'self.memory["on"] = not self.memory.get("on"); branch = self.memory["on"] * '
              "branch"}),
        ("x-overwritten", "x is overwritten",
         {'x, **options)["y"].astype(x.dtype)':
              'x, **options)["y"].astype(x.dtype); x[...] = 0.5 * x.astype(np.float64)'}),
        ("W-overwritten", "W is overwritten",
         {'x, **options)["y"].astype(x.dtype)':
              'x, **options)["y"].astype(x.dtype); W[...] = 0.5 * W.astype(np.float64)'}),
        ("B-overwritten", "B is overwritten",
         {'x, **options)["y"].astype(x.dtype)':
              'x, **options)["y"].astype(x.dtype); B[...] = 0.5 * B.astype(np.float64)'}),
    ],
    "linear.forward.bias": [
        ("A-cached", "the first call's A in every call",
         {"# arrays": 'A = first_call(self.memory, f"A{A.shape}", A)'}),
        ("bias-cached", "the first call's b in every call",
         {"# arrays": 'b = first_call(self.memory, "b", b)'}),
    ],
    "linear.vjp": [
        ("hidden-before", "dB with the previous call's H",
         {"ds * (dz.T @ H)": 'ds * dy.T @ call_before(self.memory, "H", H)'}),
        ("gradients-pile-up", "the dA of all calls add up",
         {"# gradients": 'dA = piled_up(self.memory, "dA", dA)'}),
    ],
}
SAME: Same = [
    ("rows", "the reference: tokens in rows", {}),
    ("merged", "y = x (W + s B A)ᵀ + b, dx = G (W + s B A), without dropout",
     {"base + branch": "base + branch if dropout else x @ (W + s * (A.T @ B.T).T).T + b",
      "dx_branch + dx_base": "dx_branch + dx_base if dropout else dy @ (W + s * (A.T @ B.T).T)"}),
    ("scale-on-A", "H = (K∘x) (s A)ᵀ", {"s * (H @ B.T)": "h @ (s * A).T @ B.T"}),
    ("scale-on-B", "H (s B)ᵀ", {"s * (H @ B.T)": "H @ (s * B).T"}),
    ("scale-on-H", "(s H) Bᵀ", {"s * (H @ B.T)": "(s * H) @ B.T"}),
    ("scale-on-x", "(s K∘x) Aᵀ Bᵀ", {"s * (H @ B.T)": "(s * h) @ A.T @ B.T"}),
    ("alpha-then-rank", "α (H Bᵀ) / r",
     {"s * (H @ B.T)": "alpha * (H @ B.T) / (r**0.5 if use_rslora else r)"}),
    ("root-on-both", "((K∘x) (√s A)ᵀ) (√s B)ᵀ",
     {"s * (H @ B.T)": "h @ (abs(s) ** 0.5 * A).T @ (np.sign(s) * abs(s) ** 0.5 * B).T"}),
    ("rank-on-A", "α ((K∘x) (A / r)ᵀ) Bᵀ",
     {"s * (H @ B.T)": "alpha * (h @ (A / (r**0.5 if use_rslora else r)).T @ B.T)"}),
    ("scale-on-G", "(s G) B, (s G)ᵀ H",
     {"ds * (dz @ B)": "(s * dy) @ B", "ds * (dz.T @ H)": "(s * dy).T @ H"}),
    ("scale-last", "s ((G B)ᵀ (K∘x))", {"dH.T @ h": "s * ((dy @ B).T @ h)"}),
    ("through-dW", "dA = s Bᵀ dW, dB = s dW Aᵀ, dW = Gᵀ (K∘x)",
     {"dH.T @ h": "s * B.T @ (dy.T @ h)", "ds * (dz.T @ H)": "s * (dy.T @ h) @ A.T"}),
    ("over-the-weight", "through W + s B A and dW, each rounded to the dtype, as autograd does",
     {"base + branch":
          "base + h @ narrow(s * (A.T @ B.T).T, dtype).T if dropout else x @ narrow(W + s * "
          "(A.T @ B.T).T, dtype).T + b",
      "dH.T @ h": "s * B.T @ narrow(dy.T @ h, dtype)",
      "ds * (dz.T @ H)": "s * narrow(dy.T @ h, dtype) @ A.T"}),
    ("keep-then-divide", "K after the sum: ((keep∘x) Aᵀ) / (1 - p)",
     {"x * K": "np.sign(K) * x",
      "h @ A.T": "(h @ A.T) / (1 - p if dropout else 1)",
      "dH.T @ h": "(dH.T @ h) / (1 - p if dropout else 1)"}),
    ("base-last", "(s H Bᵀ + b) + x Wᵀ", {"base + branch": "(branch + b) + x @ W.T"}),
    ("token-by-token", "dA and dB summed over tokens, one after another",
     {"dH.T @ h": "sum(u[:, None] * v for u, v in zip(dH, h, strict=True))",
      "ds * (dz.T @ H)": "sum(s * (u[:, None] * v) for u, v in zip(dy, H, strict=True))"}),
    ("rank-by-rank", "s Σᵢ Hᵢ Bᵢᵀ, one rank after another",
     {"s * (H @ B.T)": "s * sum(u[:, None] * v for u, v in zip(H.T, B.T, strict=True))"}),
    ("features-from-the-last", "all sums over features from the last",
     {"h @ A.T": "h[:, ::-1] @ A[:, ::-1].T", "x @ W.T + b": "x[:, ::-1] @ W[:, ::-1].T + b"}),
    ("in-chunks", "tokens three at a time, and their gradients summed",
     {"base + branch":
          "np.concatenate([x[i] @ W.T + b + s * (h[i] @ A.T @ B.T) for i in threes(x)])",
      "dx_branch + dx_base":
          "np.concatenate([K[i] * (ds * (dy[i] @ B) @ A) + dy[i] @ W for i in threes(x)])",
      "dH.T @ h": "sum((ds * (dy[i] @ B)).T @ h[i] for i in threes(x))",
      "ds * (dz.T @ H)": "sum(ds * (dy[i].T @ (h[i] @ A.T)) for i in threes(x))"}),
    ("in-pairs", "all sums over features in pairs of pairs",
     {"h @ A.T": "in_pairs(h[:, None] * A)", "x @ W.T + b": "in_pairs(x[:, None] * W) + b"}),
    ("wide", "in float64, rounded at the end",
     {"# inputs": "x, dy, K = doubled(x, dy, K)", "# arrays": "W, A, B, b = doubled(W, A, B, b)"}),
    ("stored", "every array rounded to the dtype",
     {"x * K": "narrow(x * K, dtype)",
      "h @ A.T": "narrow(h @ A.T, dtype)",
      "# branch": "branch = narrow(branch, dtype)",
      "x @ W.T + b": "narrow(x @ W.T + b, dtype)",
      "ds * (dz @ B)": "narrow(ds * (dz @ B), dtype)",
      "dy @ W": "narrow(dy @ W, dtype)",
      "K * dx_branch": "narrow(K * dx_branch, dtype)"}),
    ("sums-stored", "every partial sum rounded to the dtype",
     {"precision: ClassVar = {": "precision: ClassVar = {} and {",
      "# inputs": "x, dy, K = (in_order(v, dtype) for v in (x, dy, K))",
      "# arrays": "W, A, B = (in_order(v, dtype) for v in (W, A, B))"}),
]
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *mutants(LINEAR, "SCALE", SCALE),
    *mutants(LINEAR, "LAYOUT", LAYOUT),
    *mutants(LINEAR, "COMBINED", COMBINED),
    *mutants(LINEAR, "FORM", FORM),
    *mutants(LINEAR, "DROPOUT", DROPOUT),
    *mutants(LINEAR, "BACKWARD", BACKWARD),
    *mutants(LINEAR, "STATE", STATE),
    *equivalents(LINEAR, "linear", SAME),
)
