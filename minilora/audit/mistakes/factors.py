"""A part of the factors: some ranks, or without the vectors beside A and B."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from minilora.audit.floats import BF16, F16, F64
from minilora.audit.mistakes.mistake import Mistake, additive, factors_of, only
from minilora.audit.scales import Settings
from minilora.audit.trial import Case, Trial, with_parts
from minilora.spec.ops import Array


def ranks_cut(case: Case) -> Iterator[Trial]:
    """The first ranks alone."""
    change = only(case)
    if change is None or set(change.parts) - {"A", "B", "magnitude"}:
        return
    A, B = factors_of(change)
    r = len(A)
    counts = {Settings(change).default_r, *(2**k for k in range(r.bit_length())), r - 1}
    for k in sorted((k for k in counts if 0 < k < r), reverse=True):
        yield Trial((with_parts(change, A=A[:k], B=B[:, :k]),), f"the first {k} of {r} ranks")
        yield Trial((with_parts(change, A=A[-k:], B=B[:, -k:]),), f"the last {k} of {r} ranks")
    if set(change.parts) == {"A", "B"}:
        first, second = _by_size(A, B)
        few = range(len(first)) if len(first) <= 16 else counts
        for k in sorted((k for k in few if 0 < k < len(first)), reverse=True):
            parts = with_parts(change, A=first[:k], B=second[:, :k])
            yield Trial((parts,), f"the {k} greatest singular values of {len(first)}")


def _by_size(A: Array, B: Array) -> tuple[Array, Array]:
    """Factors of B A by its singular value decomposition."""
    Q, R = np.linalg.qr(B.astype(F64))
    P, S = np.linalg.qr(A.astype(F64).T)
    U, σ, Vt = np.linalg.svd(R @ S.T, full_matrices=False)
    return σ[:, None] * (Vt @ P.T), Q @ U


def column_missing(case: Case) -> Iterator[Trial]:
    """A vector beside A and B that is left out: AdaLoRA's E, VeRA's λ."""
    if (change := additive(case)) is None:
        return
    extra = [name for name in change.parts if name not in ("A", "B", "c")]
    sets = [names for k in range(1, len(extra) + 1) for names in combinations(extra, k)]
    for names in sets:
        ones = {name: np.ones_like(change.parts[name]) for name in names}
        yield Trial((with_parts(change, **ones),), f"without {' and '.join(names)}")
    for name in extra:
        square = np.asarray(change.parts[name]) ** 2
        yield Trial((with_parts(change, **{name: square}),), f"{name} applied twice")


def bits_misread(case: Case) -> Iterator[Trial]:
    """The bits of bfloat16 taken for those of float16, or the other way round."""
    if (change := additive(case)) is None:
        return
    A, B = factors_of(change)
    other = {BF16: F16, F16: BF16}.get(A.dtype)
    if other is None or B.dtype != A.dtype:
        return
    read = [np.ascontiguousarray(x).view(other).astype(F64) for x in (A, B)]
    if all(np.isfinite(x).all() for x in read):
        yield Trial((with_parts(change, A=read[0], B=read[1]),), f"{A.dtype} as {other}")


FACTORS = (
    Mistake(
        "column-missing",
        "known-mistake",
        "a vector beside A and B is left out, or applied twice",
        column_missing,
    ),
    Mistake("ranks-cut", "partly", "a part of the ranks", ranks_cut),
    Mistake(
        "bits-misread",
        "known-mistake",
        "the bits of A and B were read as another dtype's",
        bits_misread,
        ("aprender 2189",),
    ),
)
