"""PEFT's tensors of an adapter on each kind of layer: names after the module's path, and shapes.

A kind's arrays are those of `layers`: matrices A (r, n) and B (m, r) and columns
(r, 1) or (m, 1), a tuple of them for each matrix that is adapted. The layouts are PEFT 0.21's.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from minilora.spec.layers import fuse
from minilora.spec.lora import LORA, Variant
from minilora.spec.ops import Array
from minilora.spec.variants import extended

_Part = tuple[Array, ...]


def refusal(variant: Variant, kind: str) -> str | None:
    """Why PEFT has no tensors for this variant on this kind of layer; None where it has.

    The reasons are PEFT's own refusals, or what its module cannot say.
    """
    if kind in (refuses := extended(variant).peft.refuses):
        return refuses[kind]
    if kind == "experts" and variant is not LORA:
        return "PEFT's target_parameters takes LoRA itself alone"
    if kind == "fused" and variant is not LORA:
        return "PEFT adapts the fused weight as a whole: LoRA itself alone can be fused to that"
    return None


def to_tensors(
    variant: Variant,
    kind: str,
    P: Sequence[_Part],
    kernel: tuple[int, ...] = (),
    rows: Sequence[int] = (),
) -> dict[str, Array]:
    """The tensors of a layer's adapter by their names after the module's path.

    ``kernel`` is a convolution's; ``rows`` are the fused weight's, of Q, K and V, with Q and V
    adapted: they become one adapter of their summed rank, whose B is block-diagonal.

    Errors: ValueError with the reason where PEFT has no tensors for it.
    """
    if reason := refusal(variant, kind):
        raise ValueError(reason)
    if kind == "experts":
        As, Bs = (np.stack(factor) for factor in zip(*P, strict=True))
        # A's rows lie expert by expert, B's columns rank by rank.
        P = [(As.reshape(-1, As.shape[2]), Bs.transpose(1, 2, 0).reshape(Bs.shape[1], -1))]
    if kind == "fused":
        (Aq, Bq), (Av, Bv) = P
        none = np.zeros((0, Aq.shape[1]), Aq.dtype), np.zeros((rows[1], 0), Bq.dtype)
        P = [fuse([(Aq, Bq), none, (Av, Bv)])]
    ((*arrays,),) = P
    named = dict(zip(variant.parts, arrays, strict=True))
    tensors = {}
    for part, array in named.items():
        tensors[_name(variant, kind, part)] = _flat(array, part, kernel, variant)
    return tensors


def from_tensors(
    variant: Variant,
    kind: str,
    tensors: Mapping[str, Array],
    experts: int = 1,
    rows: Sequence[int] = (),
) -> list[_Part]:
    """The layer's arrays, a tuple for each matrix: the inverse of `to_tensors`.

    Errors: ValueError where PEFT has none, if a tensor is missing or left over, or if a fused
    adapter's B is not block-diagonal: it is then no adapter of the parts.
    """
    if reason := refusal(variant, kind):
        raise ValueError(reason)
    names = {part: _name(variant, kind, part) for part in variant.parts}
    if odd := tensors.keys() ^ set(names.values()):
        raise ValueError(f"tensors {sorted(odd)}: expected just {sorted(names.values())}")
    P = [
        tensors[name].reshape(len(tensors[name]), -1)
        if part in ("A", "B")
        else tensors[name].reshape(-1, 1)
        for part, name in names.items()
    ]
    if kind == "experts":
        A, B = P
        Bs = B.reshape(len(B), -1, experts).transpose(2, 0, 1)
        return list(zip(A.reshape(experts, -1, A.shape[1]), Bs, strict=True))
    if kind == "fused":
        A, B = P
        r, q = len(A) // 2, rows[0]
        of_q, of_v = (A[:r], B[:q, :r]), (A[r:], B[q + rows[1] :, r:])
        of_k = (A[:0], B[q : q + rows[1], :0])
        _, fused = fuse([of_q, of_k, of_v])
        if not np.array_equal(fused, B):
            raise ValueError("B is not block-diagonal: this adapter changes Q, K and V together")
        return [of_q, of_v]
    return [tuple(P)]


def _name(variant: Variant, kind: str, part: str) -> str:
    if kind == "embedding" and part in ("A", "B"):
        return f"lora_embedding_{part}"
    return extended(variant).peft.tensors[part]


def _flat(array: Array, part: str, kernel: tuple[int, ...], variant: Variant) -> Array:
    """The array as the tensor lies: a kernel's shape, a vector for a column."""
    if extended(variant).peft.flat:
        return array
    if part == "A":
        return array.reshape(len(array), -1, *kernel) if kernel else array
    if part == "B":
        return array.reshape(*array.shape, *(1,) * len(kernel))
    if part == "magnitude" and kernel:
        return array.reshape(1, -1, *(1,) * len(kernel))
    return array[:, 0]
