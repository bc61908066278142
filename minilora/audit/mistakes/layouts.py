"""The change in another layout: transposed, reshaped, rows or columns in another order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import numpy as np

from minilora.audit.mistakes.mistake import Mistake, additive, factors_of, only
from minilora.audit.trial import Case, Trial, with_parts
from minilora.spec.ops import Array


def transposed(case: Case) -> Iterator[Trial]:
    """(s B A)ᵀ of a square weight."""
    change = only(case)
    if change is not None and len(change.parts["B"]) == np.shape(change.parts["A"])[1]:
        A, B = factors_of(change)
        if set(change.parts) == {"A", "B"}:
            yield Trial((with_parts(change, A=B.T, B=A.T),))


def reshaped(case: Case) -> Iterator[Trial]:
    """A or B reshaped where it should be transposed."""
    if (change := additive(case)) is None:
        return
    A, B = factors_of(change)
    yield Trial((with_parts(change, A=A.reshape(A.shape[::-1]).T),), "A")
    yield Trial((with_parts(change, B=B.reshape(B.shape[::-1]).T),), "B")
    both = with_parts(change, A=A.reshape(A.shape[::-1]).T, B=B.reshape(B.shape[::-1]).T)
    yield Trial((both,), "A and B")


def ranks_reversed(case: Case) -> Iterator[Trial]:
    """A's ranks in the reverse order of B's."""
    if (change := additive(case)) is not None and len(change.parts["A"]) > 1:
        yield Trial((with_parts(change, A=factors_of(change)[0][::-1]),))


HEAD_SIZES = (128, 64, 32, 16, 8, 80, 96, 256)


def _heads(case: Case, rows: int) -> list[int]:
    """How many heads the rows may be of: what is known first."""
    known = [h for h in case.around.heads or () if h and rows % h == 0]
    return list(dict.fromkeys([*known, *(rows // d for d in HEAD_SIZES if rows % d == 0)]))


def rotary(rows: int, heads: int, back: bool) -> Array | None:
    """The order of rows between rotary halves and pairs, as converters permute q and k."""
    if rows % (2 * heads):
        return None
    shape = (heads, -1, 2) if back else (heads, 2, -1)
    order: Array = np.arange(rows).reshape(shape).swapaxes(1, 2).reshape(-1)
    return order


def _orders(case: Case, rows: int) -> Iterator[tuple[str, Array]]:
    """Orders of rows that libraries take for another's, but for the natural one."""
    natural = np.arange(rows)
    return ((what, order) for what, order in _known(case, natural) if (order != natural).any())


def _known(case: Case, natural: Array) -> Iterator[tuple[str, Array]]:
    rows = len(natural)
    for heads in _heads(case, rows):
        for back in (False, True):
            order = rotary(rows, heads, back)
            if order is not None:
                yield f"rotary pairs and halves exchanged, in {heads} heads", order
    for k, what in ((2, "halves"), (3, "thirds")):
        if rows % k == 0:
            parts = natural.reshape(k, -1)
            for turn in [*permutations(range(k))][1:]:
                yield f"its {what} in the order {', '.join(map(str, turn))}", parts[[*turn]].ravel()
    for heads in _heads(case, rows):
        for k in (2, 3):
            if rows % (heads * k) == 0:
                mixed = natural.reshape(k, heads, -1).swapaxes(0, 1).ravel()
                yield f"{k} fused parts interleaved by {heads} heads", mixed
                apart = natural.reshape(heads, k, -1).swapaxes(0, 1).ravel()
                yield f"{k} fused parts, interleaved by {heads} heads, taken apart", apart
    yield "reversed", natural[::-1]
    for by in (1, -1):
        yield f"shifted by {by}", np.roll(natural, by)


def rows_permuted(case: Case) -> Iterator[Trial]:
    """B's rows in another order."""
    if (change := only(case)) is not None:
        _, B = factors_of(change)
        for what, order in _orders(case, len(B)):
            yield Trial((with_parts(change, B=B[order]),), f"output features: {what}")


def columns_permuted(case: Case) -> Iterator[Trial]:
    """A's columns in another order."""
    if (change := only(case)) is not None:
        A, _ = factors_of(change)
        for what, order in _orders(case, A.shape[1]):
            yield Trial((with_parts(change, A=A[:, order]),), f"input features: {what}")


def tensor_permuted(case: Case) -> Iterator[Trial]:
    """The rows of the merged tensor in another order, base and all."""
    if only(case) is not None and case.region.index is None:
        for what, order in _orders(case, case.region.rows):
            yield Trial(case.changes, what, free=False, order=order)


def tensor_transposed(case: Case) -> Iterator[Trial]:
    """The merged tensor transposed, base and all, of a square one."""
    change, region = only(case), case.region
    if change and region.index is None and not change.rows and region.rows == region.width:
        yield Trial(case.changes, free=False, turned=True)


def kernel_moved(case: Case) -> Iterator[Trial]:
    """A convolution's kernel with its axes in another order, or flipped."""
    change = only(case)
    shape = case.region.base.shape[1:]
    if change is None or change.kind != "conv" or len(shape) < 2:
        return
    A, _ = factors_of(change)
    kernel = A.reshape(len(A), *shape)
    last = kernel.ndim - 1
    moved = {
        "channels last": np.moveaxis(kernel, 1, last),
        "channels read as last": np.moveaxis(kernel.reshape(len(A), *shape[1:], shape[0]), last, 1),
        "flipped": kernel[(slice(None), slice(None), *(slice(None, None, -1) for _ in shape[1:]))],
    }
    if len(shape) == 3 and shape[1] == shape[2]:
        moved["height and width exchanged"] = kernel.swapaxes(2, 3)
    for what, other in moved.items():
        if not np.array_equal(other.reshape(len(A), -1), A):  # as where the kernel has size 1
            yield Trial((with_parts(change, A=other.reshape(len(A), -1)),), what)


def experts_packed(case: Case) -> Iterator[Trial]:
    """B, A or both of all experts, side by side in one matrix, taken apart in the other order.

    PEFT's A lies expert by expert, its B rank by rank.
    """
    change = additive(case)
    if change is None or change.index is None:
        return
    every = {c.index: c for c in case.around.modules if c.tensor == change.tensor}
    if [*every] != [*range(len(every))] or len(every) < 2 or change.index not in every:
        return
    A, B = (np.stack([np.asarray(c.parts[n]) for c in every.values()]) for n in "AB")
    experts, r, n = A.shape
    e, m = change.index, B.shape[1]
    other_A = A.reshape(r, experts, n)[:, e]
    other_B = B.transpose(1, 2, 0).reshape(m, experts, r)[:, e]
    yield Trial((with_parts(change, B=other_B),), "B, as if it lay expert by expert")
    yield Trial((with_parts(change, A=other_A),), "A, as if it lay rank by rank")
    yield Trial((with_parts(change, A=other_A, B=other_B),), "A and B")


LAYOUTS = (
    Mistake(
        "experts-packed",
        "known-mistake",
        "the experts' factors taken apart in another order",
        experts_packed,
        ("unsloth-zoo 1269",),
    ),
    Mistake("transposed", "transposed", "the change is transposed", transposed),
    Mistake(
        "ranks-reversed", "known-mistake", "A's ranks in the reverse order of B's", ranks_reversed
    ),
    Mistake("reshaped", "known-mistake", "reshaped where it should be transposed", reshaped),
    Mistake(
        "rows-permuted",
        "permuted",
        "the output features in another order",
        rows_permuted,
        ("llama.cpp's permutation of q and k",),
    ),
    Mistake(
        "tensor-permuted",
        "permuted",
        "the merged tensor's rows in another order, base and all",
        tensor_permuted,
    ),
    Mistake(
        "tensor-transposed",
        "transposed",
        "the merged tensor is stored transposed, base and all",
        tensor_transposed,
    ),
    Mistake(
        "columns-permuted", "permuted", "the input features in another order", columns_permuted
    ),
    Mistake(
        "kernel-moved", "permuted", "the kernel's axes in another order, or flipped", kernel_moved
    ),
)
