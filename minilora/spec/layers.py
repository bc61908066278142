"""Every kind of layer that LoRA adapts, written as a product W x: no new equation.

An adapter acts on a matrix W (m, n) and on columns x (n, t). An embedding is such a product with
one-hot columns; a convolution, with patches as columns; a weight stored (in, out), with its
transpose; fused projections and experts are parts of one weight. So each variant works on each
kind, with its own equation. ``f`` is a `Variant.linear`, ``P`` its parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from minilora.spec.lora import Variant
from minilora.spec.ops import Array, Back, OneHot, linear

Linear = Callable[..., tuple[Array, Back]]


def adapted_embedding(
    f: Linear, ids: Array, E: Array, P: Sequence[Array], s: Any, factor: Any = None
) -> tuple[Array, Back]:
    """y = factor · f(onehot(ids), Eᵀ, P, s): row i of the table is column i of the weight.

    A (r, v) has a column for each token, B (d, r) a row for each feature: the table changes by
    s (B A)ᵀ. There is no dropout. ``factor`` is the embedding's own, √d in Gemma; it scales the
    adapter, too. ``back(dy)`` returns the gradients of P.

    Shapes: ids (t,), E (v, d) -> y (d, t).
    Source: the Embedding of Hu et al.'s code, whose A is (r, v) and B (d, r).
    """
    y, back_f = f(OneHot(ids, len(E)), E.T, None, *P, s)
    y = y if factor is None else factor * y

    def back(dy: Array) -> tuple[Array, ...]:
        _, *dP = back_f(dy if factor is None else factor * dy)
        return tuple(dP)

    return y, back


def fuse(adapters: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """One adapter for a fused projection (Q, K, V in one weight): A stacked, B block-diagonal.

    Shapes: Aᵢ (rᵢ, n), Bᵢ (mᵢ, rᵢ) -> A (Σ rᵢ, n), B (Σ mᵢ, Σ rᵢ).
    Errors: ValueError if there is no adapter.
    Source: MergedLinear in the code of Hu et al. 2021.
    """
    if not adapters:
        raise ValueError("no adapter to fuse: expected at least one")
    A = np.concatenate([A for A, _ in adapters])
    rows = sum(len(B) for _, B in adapters)
    B = np.zeros((rows, len(A)), np.result_type(*(B for _, B in adapters)))
    row = column = 0
    for _, B_i in adapters:
        m, r = B_i.shape
        B[row : row + m, column : column + r] = B_i
        row, column = row + m, column + r
    return A, B


def adapted_fused(
    f: Linear,
    x: Array,
    W: Array,
    b: Array | None,
    P: Sequence[Sequence[Array] | None],
    rows: Sequence[int],
    s: Any,
    K: Array | None = None,
) -> tuple[Array, Back]:
    """y = y₁ over y₂ over …, yᵢ = f(x, Wᵢ, bᵢ, Pᵢ, s, K), Wᵢ the next rows_i rows of W.

    Q, K and V in one weight, any of them adapted; Pᵢ is None for a part without an adapter. With
    grouped heads the parts differ in rows. ``back(dy)`` returns dx and the gradients of each Pᵢ.

    Shapes: x (n, t), W (m, n), b (m, 1), K (n, t) -> y (m, t).
    Errors: ValueError if the rows do not add up to W's, or not one P is given for each part.
    Source: MergedLinear of Hu et al.'s code, there with parts of one size.
    """
    if sum(rows) != len(W) or len(P) != len(rows):
        raise ValueError(f"{len(P)} adapters for rows {tuple(rows)} of a weight {W.shape}")
    ends = np.cumsum([0, *rows])
    parts = [slice(start, end) for start, end in pairwise(ends)]
    pairs = [
        (linear if Pi is None else f)(
            x, W[i], None if b is None else b[i], *(() if Pi is None else (*Pi, s, K))
        )
        for i, Pi in zip(parts, P, strict=True)
    ]
    y = np.concatenate([yi for yi, _ in pairs])

    def back(dy: Array) -> tuple[Any, ...]:
        dx: Any = 0
        gradients = []
        for i, Pi, (_, back_i) in zip(parts, P, pairs, strict=True):
            dxi, *dP = (back_i(dy[i]),) if Pi is None else back_i(dy[i])
            dx = dx + dxi
            gradients += [] if Pi is None else [tuple(dP)]
        return dx, *gradients

    return y, back


def adapted_experts(
    f: Linear,
    x: Array,
    W: Array,
    b: Array | None,
    P: Sequence[Array],
    index: Array,
    s: Any,
    only: Sequence[int] | None = None,
) -> tuple[Array, Back]:
    """y_j = f(x_j, W_e, b_e, P_e, s), e = index_j: column j goes through expert index_j.

    Each expert has a matrix and, if it is in ``only``, an adapter of its own: P's arrays have one
    entry per expert. A token that goes to several experts is several columns. ``back(dy)`` returns
    dx and the gradients of P, 0 for an expert without columns.

    Shapes: x (n, t), W (e, m, n), b (e, m, 1), index (t,) -> y (m, t).
    Errors: ValueError if index or ``only`` names no expert, or P has not one entry for each.
    Source: ``target_parameters`` of PEFT.
    """
    adapted = _adapted_experts(len(W), P, index, only)
    order = np.argsort(index, kind="stable")  # the columns of expert 0, then those of 1, …
    columns = np.split(order, np.searchsorted(index[order], np.arange(1, len(W))))
    original = np.argsort(order)
    pairs = [
        (f if e in adapted else linear)(
            x[:, at],
            W[e],
            None if b is None else b[e],
            *((*(p[e] for p in P), s) if e in adapted else ()),
        )
        for e, at in enumerate(columns)
    ]
    y = np.concatenate([ye for ye, _ in pairs], axis=1)[:, original]

    def back(dy: Array) -> tuple[Array, ...]:
        dxs, dPs = [], []
        for e, (_, back_e) in enumerate(pairs):
            dye = dy[:, columns[e]]
            dxe, *gradients = back_e(dye) if e in adapted else (back_e(dye),)
            dxs.append(dxe)
            dPs.append(gradients or [np.zeros_like(p[e]) for p in P])
        dx = np.concatenate(dxs, axis=1)[:, original]
        return dx, *(np.stack(d) for d in zip(*dPs, strict=True))

    return y, back


def _adapted_experts(
    count: int, P: Sequence[Array], index: Array, only: Sequence[int] | None
) -> set[int]:
    """The experts with an adapter. Errors: those of `adapted_experts`."""
    expected = f"expected {count} experts, from 0 to {count - 1}"
    if any(len(p) != count for p in P) or not set(only or ()) <= {*range(count)}:
        raise ValueError(f"adapters of {[len(p) for p in P]} experts, only {only}: {expected}")
    if index.size and not (index.min() >= 0 and index.max() < count):
        raise ValueError(f"index from {index.min()} to {index.max()}: {expected}")
    return set(range(count)) if only is None else set(only)


def with_tokens(E: Array, ids: Array, rows: Array) -> tuple[Array, Back]:
    """E' = E except E'[ids] = rows: the rows of some tokens are trained, the others are constant.

    With dE' given:   drows = dE'[ids], where dE' sums all uses of E', those of a tied head, too.
    The rows start as E[ids]: they are rows of the table, not differences. PEFT's
    ``trainable_tokens_delta`` holds the same, in spite of its name.

    Shapes: E (v, d), ids (k,), rows (k, d) -> E' (v, d).
    Errors: ValueError for an id outside E, an id given twice, or not one row for each id.
    """
    if rows.shape != (len(ids), E.shape[1]):
        raise ValueError(f"rows {rows.shape}: expected {(len(ids), E.shape[1])}, one for each id")
    if len(set(ids.tolist()).intersection(range(len(E)))) < len(ids):
        raise ValueError(f"ids {ids.tolist()}: expected tokens from 0 to {len(E) - 1}, each once")
    changed = E.astype(np.result_type(E, rows))
    changed[ids] = rows

    def back(dE: Array) -> Array:
        drows: Array = dE[ids]
        return drows

    return changed, back


@dataclass(frozen=True)
class Geometry:
    """A convolution's settings, an entry per spatial dimension, as PyTorch names them.

    ``padding``: (before, after); ``mode``: "zeros", "reflect", "replicate" or "circular".
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    mode: str = "zeros"

    def places(self, space: Sequence[int]) -> tuple[tuple[int, ...], Array]:
        """The output's size, and which input each entry of the kernel meets at each position.

        The inputs are flat indices (positions, kernel), -1 for a zero of the padding.

        Errors: ValueError for an unknown mode, a size below 1, a kernel that does not fit, or a
        reflect padding that is not below the input's size.
        """
        if self.mode not in PADDING:
            raise ValueError(f"padding mode {self.mode!r}: expected one of {', '.join(PADDING)}")
        flat, sizes = np.zeros((1, 1), int), []
        if min(*self.kernel, *self.stride, *self.dilation) < 1:
            raise ValueError(f"{self}: expected kernel, stride and dilation from 1 on")
        moves = zip(space, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        for n, k, step, (before, after), apart in moves:
            if self.mode == "reflect" and max(before, after) >= n:
                padding = max(before, after)
                raise ValueError(
                    f"reflect padding {padding} needs an input of at least {padding + 1}, got {n}"
                )
            size = (n + before + after - apart * (k - 1) - 1) // step + 1
            if size < 1:
                raise ValueError(f"kernel {k} with dilation {apart} does not fit an input of {n}")
            p = step * np.arange(size)[:, None] + apart * np.arange(k) - before
            q = np.where((p < 0) | (p >= n), PADDING[self.mode](p, n), p)
            whole = flat[:, None, :, None] * n + q[:, None]
            beside = (flat[:, None, :, None] < 0) | (q[:, None] < 0)
            flat = np.where(beside, -1, whole).reshape(len(flat) * size, -1)
            sizes.append(size)
        return tuple(sizes), flat


PADDING: dict[str, Callable[[Array, int], Array]] = {
    "zeros": lambda p, n: np.full_like(p, -1),
    "reflect": lambda p, n: n - 1 - abs(n - 1 - abs(p)),
    "replicate": lambda p, n: p.clip(0, n - 1),
    "circular": lambda p, n: p % n,
}
"""The index in 0 … n - 1 that a padding index p stands for, by the mode; -1 is a zero."""


def unfold(x: Array, geometry: Geometry) -> tuple[Array, Back]:
    """The patches of x as columns, one for each row and position: a convolution is W times them.

    With dy given:   dx adds each entry of dy at the input that it was read from.

    Shapes: x (c, b, …) -> y (c*kernel, b*places).
    """
    c, b, *space = x.shape
    _, flat = geometry.places(space)
    inside = flat >= 0
    patches = np.where(inside, x.reshape(c, b, -1)[:, :, flat], np.zeros((), x.dtype))
    y = patches.transpose(0, 3, 1, 2).reshape(c * flat.shape[1], -1)

    def back(dy: Array) -> Array:
        d = dy.reshape(c, flat.shape[1], b, len(flat)).transpose(0, 2, 3, 1)
        dx = np.zeros((int(np.prod(space)), c, b), dy.dtype)
        np.add.at(dx, flat[inside], np.moveaxis(d[:, :, inside], 2, 0))
        return np.moveaxis(dx, 0, 2).reshape(x.shape)

    return y, back


def block_diagonal(W: Array, groups: int) -> tuple[Array, Back]:
    """W's rows in g groups as g diagonal blocks: a grouped convolution's weight without groups.

    With dy given:   dW is dy's diagonal blocks.

    Shapes: W (m, n), groups () -> y (m, n*groups).
    Errors: ValueError if the rows do not divide by the groups.
    """
    m, n = W.shape
    if m % groups:
        raise ValueError(f"{m} rows in {groups} groups: expected a multiple")
    block = np.arange(m)[:, None], np.arange(n) + n * (np.arange(m) // (m // groups))[:, None]
    y = np.zeros((m, n * groups), W.dtype)
    y[block] = W

    def back(dy: Array) -> Array:
        dW: Array = dy[block]
        return dW

    return y, back


def conv(
    x: Array, W: Array, b: Array | None, geometry: Geometry, groups: int = 1
) -> tuple[Array, Back]:
    """y = W unfold(x) + b, each kernel of W a row, with W and b constant.

    With dy given:   dx = unfold's back(Wᵀ dy).

    Shapes: x (c, b, …), W (m, c/groups, …), b (m, 1) -> y (m, b, …).
    """
    columns, back_unfold = unfold(x, geometry)
    z, back_linear = linear(columns, block_diagonal(W.reshape(len(W), -1), groups)[0], b)
    y = z.reshape(len(W), x.shape[1], *geometry.places(x.shape[2:])[0])

    def back(dy: Array) -> Array:
        dx: Array = back_unfold(back_linear(dy.reshape(len(W), -1)))
        return dx

    return y, back


def adapted_conv(
    f: Linear,
    x: Array,
    W: Array,
    b: Array | None,
    P: Sequence[Array],
    s: Any,
    K: Array | None,
    geometry: Geometry,
    groups: int = 1,
) -> tuple[Array, Back]:
    """y = f(unfold(x), W, b, P, s, unfold(K)): a convolution as a product with patches.

    A (r, c·kernel) is a convolution to r channels with W's settings, B (m, r) a 1×1 convolution. In
    groups W is (m, c/g, …) and B (m, r/g), both block-diagonal; A reads all channels, so that the
    merged W' has no groups.

    Shapes: x (c, b, …), W (m, c/groups, …), b (m, 1) -> y (m, b, …).
    Source: Conv2d of PEFT, whose A moves as W does but for dilation and padding mode.
    """
    columns, back_unfold = unfold(x, geometry)
    kept = None if K is None else unfold(K, geometry)[0]
    flat, _ = block_diagonal(W.reshape(len(W), -1), groups)
    A, B, *others = P
    whole, back_blocks = block_diagonal(B, groups)
    z, back_f = f(columns, flat, b, A, whole, *others, s, kept)
    sizes, _ = geometry.places(x.shape[2:])
    y = z.reshape(len(W), x.shape[1], *sizes)

    def back(dy: Array) -> tuple[Array, ...]:
        dcolumns, dA, dB, *gradients = back_f(dy.reshape(len(W), -1))
        return back_unfold(dcolumns), dA, back_blocks(dB), *gradients

    return y, back


def merge_conv(
    variant: Variant, W: Array, b: Array | None, P: Sequence[Array], s: Any, groups: int = 1
) -> tuple[Array, Array | None]:
    """W' of the variant in the convolution's shape, without groups.

    Shapes: W (m, c/groups, …), b (m, 1) -> W' (m, c, …), b' (m, 1).
    """
    A, B, *others = P
    flat, _ = block_diagonal(W.reshape(len(W), -1), groups)
    merged, bias = variant.merge(flat, b, A, block_diagonal(B, groups)[0], *others, s)
    return merged.reshape(len(W), W.shape[1] * groups, *W.shape[2:]), bias
