"""The subject: a frozen weight W and a trained product of low rank beside it, h = W x + s B A x.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3.

All parameters of a model lie in one flat dict under dotted names: ``layers.0.q.weight`` (m, n),
``layers.0.q.bias`` (m, 1), and, where the projection is adapted, ``layers.0.q.A`` (r, n) and
``layers.0.q.B`` (m, r), or what else its `Variant` has. What is trained, and with which variant,
scale and dropout mask, says a `TrainableSpec`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora.spec.ops import Array, Back, dropout, linear

Weights = dict[str, Array]
Params = Mapping[str, Array]
"""A model's parameters where they are only read: a dict, or arrays that are made on demand."""


def python_scalar(x: Any) -> Any:
    """x, or where it is one of NumPy's scalars, Python's: NumPy's make float64 of float32 arrays.

    Of long double, which Python lacks, the scalar itself.
    """
    return x.item() if isinstance(x, np.generic) else x


def scale(alpha: Any, r: int, rslora: bool = False) -> Any:
    """s = alpha / r, or alpha / √r for rsLoRA.

    Errors: ValueError if r < 1.
    Source: Hu et al. 2021, section 4.1; Kalajdzievski 2023, "rsLoRA", theorem 3.2.
    """
    if r < 1:
        raise ValueError(f"rank {r}: expected at least 1")
    alpha = python_scalar(alpha)
    if not rslora:
        return alpha / r
    root = math.isqrt(r)  # where it is whole, a fraction stays one
    if root * root == r:
        return alpha / root
    return alpha / (np.sqrt(type(alpha)(r)) if isinstance(alpha, np.generic) else math.sqrt(r))


def lora_linear(
    x: Array, W: Array, b: Array | None, A: Array, B: Array, s: Any, K: Array | None = None
) -> tuple[Array, Back]:
    """y = W x + b + s B A (K ∘ x), with W, b frozen, A, B trained and K the dropout multiplier.

    With h = K ∘ x, u = A h and du = s Bᵀ dy:
    dx = Wᵀ dy + K ∘ (Aᵀ du),   dA = du hᵀ,   dB = dy (s u)ᵀ;   dx = 0 of a ``constant`` x.

    Shapes: x (n, t), W (m, n), b (m, 1), A (r, n), B (m, r), s (), K (n, t) -> y (m, t).
    Source: Hu et al. 2021, equation 3; dropout on the branch's input as in its code.
    """
    base, back_base = linear(x, W, b)
    h, back_dropout = dropout(x, K)
    su = s * (A @ h)
    y = base + B @ su

    def back(dy: Array, constant: bool = False) -> tuple[Any, Array, Array]:
        du = s * (B.T @ dy)
        dx = 0 if constant else back_base(dy) + back_dropout(A.T @ du)
        return dx, (h @ du.T).T, dy @ su.T

    return y, back


def merge_weight(W: Array, A: Array, B: Array, s: Any) -> Array:
    """W' = W + s B A, a new array: the adapter costs nothing at inference.

    Shapes: W (m, n), A (r, n), B (m, r), s () -> W' (m, n).
    Source: Hu et al. 2021, section 4.1.
    """
    merged: Array = W + s * (B @ A)
    return merged


def combine(
    adapters: Sequence[tuple[Array, Array, Any]], weights: Sequence[Any]
) -> tuple[Array, Array]:
    """A, B with B A = Σᵢ wᵢ sᵢ Bᵢ Aᵢ exactly: the Aᵢ stacked, the wᵢ sᵢ Bᵢ side by side.

    The rank is the sum of the ranks; the result's own scale is 1.

    Shapes: Aᵢ (rᵢ, n), Bᵢ (m, rᵢ) -> A (Σ rᵢ, n), B (m, Σ rᵢ).
    Errors: ValueError if there is no adapter, or not one weight for each.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters, {len(weights)} weights: expected one for each")
    A = np.concatenate([A for A, _, _ in adapters])
    scaled = zip(adapters, map(python_scalar, weights), strict=True)
    B = np.concatenate([w * python_scalar(s) * B for (_, B, s), w in scaled], axis=1)
    return A, B


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


@dataclass(frozen=True)
class Variant:
    """A way to adapt a projection: an equation, the weight that it merges into, its parameters.

    ``parts`` are the parameters' names after the projection's. ``linear(x, W, b, *parts, s, K)``
    gives y and ``back``, and ``back(dy)`` dx and a gradient for each part. ``merge(W, b, *parts,
    s)`` gives W' and b' with W' x + b' = y. ``additive``: y - W x does not depend on W. ``spares``:
    ``back(dy, True)`` forms no dx.
    """

    parts: tuple[str, ...]
    linear: Callable[..., tuple[Array, Back]]
    merge: Callable[..., tuple[Array, Array | None]]
    additive: bool = True
    spares: bool = False


def _merge_lora(W: Array, b: Array | None, A: Array, B: Array, s: Any) -> tuple[Array, Any]:
    return merge_weight(W, A, B, s), b


LORA = Variant(("A", "B"), lora_linear, _merge_lora, spares=True)
"""LoRA itself; `variants` has the others."""


@dataclass(frozen=True)
class TrainableSpec:
    """What is trained. All that ``trained`` does not name is constant; no gradient of it is formed.

    ``scale``: s of each adapted projection; ``dropout_scale``: its dropout multiplier K (n,
    tokens), none outside training; ``trained``: names of parameters, adapters' or the base's own;
    ``variant``: of the projections whose adapter is not LoRA itself; ``recompute``: ``back`` runs
    each block's forward again, so that only its input is kept; ``constant``: projections whose input depends on
    nothing that is trained, as the model finds them: their dx is 0. Full fine-tuning is
    ``TrainableSpec(trained=frozenset(weights))``.
    """

    scale: Mapping[str, Any] = field(default_factory=dict)
    dropout_scale: Mapping[str, Array] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()
    variant: Mapping[str, Variant] = field(default_factory=dict)
    recompute: bool = False
    constant: frozenset[str] = frozenset()

    def trained_only(self, gradients: Iterable[tuple[str, Array]]) -> Weights:
        """Those of ``gradients`` whose parameter, named beside, is trained."""
        return {name: g for name, g in gradients if name in self.trained}


def sum_gradients(*parts: Weights) -> Weights:
    """The sum of gradients by name: a tied weight receives one from each of its uses."""
    sums: Weights = {}
    for name, g in (item for part in parts for item in part.items()):
        sums[name] = sums[name] + g if name in sums else g
    return sums


TABLES = ("embed", "positions", "types")
"""The modules whose weight is a table with a row for each number: as a matrix, its transpose."""

TIE = {"head": "embed"}
"""A module without a weight of its own takes this one's: a head that is tied to the embedding."""


def weight_of(at: str, W: Params) -> str:
    """The name of the module's weight: its own, or the one that it is tied to."""
    own = f"{at}.weight"
    return own if own in W else f"{TIE.get(at, at)}.weight"


def adapter_of(at: str, W: Params, tuning: TrainableSpec) -> tuple[Variant, list[str]]:
    """The variant of the module's adapter and its parameters' names; no names, no adapter.

    Errors: ValueError if the base's weight is trained below a variant that rescales it.
    """
    variant = tuning.variant.get(at, LORA)
    names = [f"{at}.{part}" for part in variant.parts]
    if names[0] not in W:
        return variant, []
    if not variant.additive and (weight := weight_of(at, W)) in tuning.trained:
        raise ValueError(f"{weight} is trained, but its adapter rescales it: freeze one of the two")
    return variant, names


def frozen_weight(variant: Variant, name: str, W: Params) -> Array:
    """The weight below an adapter: whole where it is rescaled, where others read it in parts."""
    return W[name] if variant.additive else to_dense(W[name])


def to_dense(w: Any) -> Any:
    """A weight that is read by its rows, as `minilora.io.lazy_weights` has them, as one array."""
    return np.asarray(w) if hasattr(w, "rows") else w


def project(x: Array, at: str, W: Params, tuning: TrainableSpec) -> tuple[Array, Back]:
    """The projection named ``at``: the one place that asks if it is adapted, trained or frozen.

    ``back(dy)`` gives dx and a dict with the gradients of what is trained: those of the adapter as
    its variant has them, and of the base's own parameters dW = dy xᵀ and db = dy 1. A tied head's
    weight is the embedding's; its adapter is its own.

    Shapes: x (n, t) -> y (m, t).
    Errors: those of `adapter_of`.
    """
    weight, bias = weight_of(at, W), f"{at}.bias"
    variant, names = adapter_of(at, W, tuning)
    if names:
        s, K = tuning.scale[at], tuning.dropout_scale.get(at)
        base = frozen_weight(variant, weight, W)
        y, back_y = variant.linear(x, base, W.get(bias), *map(W.__getitem__, names), s, K)
    else:
        y, back_y = linear(x, W[weight], W.get(bias))

    constant = at in tuning.constant
    spared = (True,) if constant and variant.spares else ()

    def back(dy: Array) -> tuple[Any, Weights]:
        if names:
            dx, *parts = back_y(dy, *spared)
        else:
            dx, parts = 0 if constant else back_y(dy), []
        gradients = tuning.trained_only(zip(names, parts, strict=True))
        if weight in tuning.trained:
            gradients[weight] = dy @ x.T
        if bias in tuning.trained:
            gradients[bias] = dy.sum(1, keepdims=True)
        return dx, gradients

    return y, back


def _kaiming_uniform(rng: np.random.Generator, r: int, n: int) -> Array:
    return rng.uniform(-(n**-0.5), n**-0.5, (r, n))


def _gaussian(rng: np.random.Generator, r: int, n: int) -> Array:
    return rng.standard_normal((r, n)) / r


DRAW = {"kaiming": _kaiming_uniform, "gaussian": _gaussian}


def draw_factors(
    rng: np.random.Generator, init: str, r: int, m: int, n: int
) -> tuple[Array, Array]:
    """A drawn, B = 0, so that the adapted model starts as the base.

    "kaiming": A ~ U(-1/√n, 1/√n), which is kaiming-uniform with a = √5, as in the code of Hu et al.
    "gaussian": A ~ N(0, 1/r²), as PEFT reads the paper's "random Gaussian".

    Shapes: -> A (r, n), B (m, r).
    Errors: ValueError for another start.
    """
    if init not in DRAW:
        raise ValueError(f"init {init!r}: expected one of {', '.join(DRAW)}")
    return DRAW[init](rng, r, n), np.zeros((m, r))


def draw_dropout(
    rng: np.random.Generator, p: float, shapes: Mapping[str, tuple[int, int]], dtype: Any
) -> Weights:
    """K = keep / (1 - p) for each projection, keep ~ Bernoulli(1 - p) for each entry of its input.

    Shapes: shapes {name: (n, t)} -> {name: K (n, t)}.
    Errors: ValueError unless 0 ≤ p < 1.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout {p}: expected at least 0 and below 1")
    q = 1 - python_scalar(p)
    return {at: (rng.random(shape) >= p).astype(dtype) / q for at, shape in shapes.items()}


def twin(A: Array, B: Array) -> tuple[Array, Array]:
    """The same change of a tied table, seen from its other use: s (B A)ᵀ = s Aᵀ Bᵀ.

    An embedding's A (r, v), B (d, r) become a head's A (r, d), B (v, r), and the other way round.

    Shapes: A (r, n), B (m, r) -> A₂ (r, m), B₂ (n, r).
    Source: ``ensure_weight_tying`` of PEFT.
    """
    return B.T, A.T


def is_base(name: str) -> bool:
    """Whether the parameter is the base model's: its last part is ``weight`` or ``bias``."""
    return name.endswith((".weight", ".bias"))


def adapted_in(names: Iterable[str]) -> list[str]:
    """The modules of which ``names`` has an adapter's A, in their order."""
    return [name.removesuffix(".A") for name in names if name.endswith(".A")]


def disable(W: Weights) -> Weights:
    """The base alone: the same arrays without the adapters' parameters."""
    return {name: array for name, array in W.items() if is_base(name)}


class Merged(Weights):
    """Weights with their adapters merged; they keep the arrays that they were made from."""

    def __init__(self, weights: Weights, original: Weights) -> None:
        super().__init__(weights)
        self.original = dict(original)


def merge(W: Weights, tuning: TrainableSpec) -> Merged:
    """Every adapted weight replaced by its variant's W', a new array; the others are shared.

    An embedding's matrix is its table's transpose. A tie ends where only one of the two changes:
    the head's weight then stands beside the embedding's, as its own. It stays where both adapters
    are one change, each the other's transpose.

    Errors: ValueError if W is merged already (the adapter would count twice) or has no adapter; if
    an embedding's adapter has a bias, for which a table has no place; those of `adapter_of`.
    """
    if isinstance(W, Merged):
        raise ValueError("these weights are merged already; unmerge them first")
    if not adapted_in(W):
        raise ValueError("no adapter to merge: no parameter's name ends with .A")
    merged = disable(W)
    for head, table in TIE.items():
        changed = {at for at in (head, table) if f"{at}.A" in W}
        if f"{head}.weight" not in W and changed and not _twins(head, table, W, tuning):
            merged[f"{head}.weight"] = W[f"{table}.weight"]
    for at in adapted_in(W):
        if f"{at}.weight" not in merged:
            continue  # a tied head whose change is the embedding's
        variant, names = adapter_of(at, W, tuning)
        base = to_dense(W[weight_of(at, W)])
        matrix = base.T if at in TABLES else base
        factors = [W[name] for name in names]
        change, bias = variant.merge(matrix, W.get(f"{at}.bias"), *factors, tuning.scale[at])
        merged[f"{at}.weight"] = change.T if at in TABLES else change
        if at in TABLES and bias is not None:
            raise ValueError(
                f"the adapter of {at} has a bias; an embedding has none to merge it into"
            )
        merged |= {} if bias is None else {f"{at}.bias": bias}
    return Merged(merged, W)


def _twins(head: str, table: str, W: Weights, tuning: TrainableSpec) -> bool:
    """Whether both are adapted, and alike: one's factors are the other's `twin`, by LoRA itself."""
    if not {f"{head}.A", f"{table}.A"} <= W.keys() or {head, table} & tuning.variant.keys():
        return False
    own, other = ((W[f"{at}.A"], W[f"{at}.B"]) for at in (head, table))
    same = all(map(np.array_equal, own, twin(*other)))
    return same and bool(tuning.scale[head] == tuning.scale[table])


def unmerge(W: Merged) -> Weights:
    """The very arrays that were merged, bit for bit: subtraction would not restore them.

    Errors: TypeError if W is not what :func:`merge` returned.
    """
    if not isinstance(W, Merged):
        raise TypeError("these weights are not merged; expected what merge returned")
    return dict(W.original)
