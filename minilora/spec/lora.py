"""LoRA: a frozen weight W and a trained product of low rank beside it, y = W x + s B A x.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3.

All parameters of a model are in one flat dict with dotted names: ``layers.0.q.weight`` (m, n),
``layers.0.q.bias`` (m, 1), and, if the projection has an adapter, ``layers.0.q.A`` (r, n) and
``layers.0.q.B`` (m, r), or the other parameters of its `Variant`. A `TrainableSpec` says what is
trained, and with which variant, scale and dropout mask. ``at`` is the name of a module, such as
``layers.0.q``; ``W`` is a matrix in an equation, and the dict of all parameters elsewhere.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora.spec.ops import Array, Back, dropout, linear, outer, python_scalar

Weights = dict[str, Array]
Params = Mapping[str, Array]
"""A model's parameters, read only: a dict, or arrays that are created when they are read."""


def lora_linear(
    x: Array, W: Array, b: Array | None, A: Array, B: Array, s: Any, K: Array | None = None
) -> tuple[Array, Back]:
    """y = W x + b + B (s A (K ∘ x)), with W, b frozen, A, B trained and K the dropout multiplier.

    With h = K ∘ x, u = A h and du = s Bᵀ dy:
    dx = Wᵀ dy + K ∘ (Aᵀ du),   dA = du hᵀ,   dB = dy (s u)ᵀ.

    Shapes: x (n, t), W (m, n), b (m, 1), A (r, n), B (m, r), s (), K (n, t) -> y (m, t).
    Source: Hu et al. 2021, equation 3; dropout on the branch's input as in its code.
    """
    base, back_base = linear(x, W, b)
    h, back_dropout = dropout(x, K)
    u = A @ h
    y = base + B @ (s * u)

    def back(dy: Array) -> tuple[Array, Array, Array]:
        du = s * (B.T @ dy)
        dx = back_base(dy) + back_dropout(A.T @ du)
        return dx, outer(du, h), outer(dy, s * u)

    return y, back


def scale(alpha: Any, r: int, rslora: bool = False) -> Any:
    """s = alpha / r, or alpha / √r for rsLoRA.

    Errors: ValueError if r < 1.
    Source: Hu et al. 2021, section 4.1; Kalajdzievski 2023, "rsLoRA", theorem 3.2.
    """
    if r < 1:
        raise ValueError(f"rank {r}: expected at least 1")
    alpha, root = python_scalar(alpha), math.isqrt(r)
    if rslora and root * root != r:
        return alpha / (np.sqrt(type(alpha)(r)) if isinstance(alpha, np.generic) else math.sqrt(r))
    return alpha / (root if rslora else r)  # an integer root keeps a Fraction exact


def merge_weight(W: Array, A: Array, B: Array, s: Any) -> Array:
    """W' = W + s B A, a new array: the adapter costs nothing at inference.

    Shapes: W (m, n), A (r, n), B (m, r), s () -> W' (m, n).
    Source: Hu et al. 2021, section 4.1.
    """
    return W + s * (B @ A)


@dataclass(frozen=True)
class Variant:
    """A way to adapt a projection: an equation, the weight that it merges into, its parameters.

    ``parts`` are the parameters' names after the projection's. ``linear(x, W, b, *parts, s, K)``
    gives y and ``back``, and ``back(dy)`` dx and a gradient for each part. ``merge(W, b, *parts,
    s)`` gives W' and b' with W' x + b' = y. ``additive``: y - W x does not depend on W.
    """

    parts: tuple[str, ...]
    linear: Callable[..., tuple[Array, Back]]
    merge: Callable[..., tuple[Array, Array | None]]
    additive: bool = True


LORA = Variant(("A", "B"), lora_linear, lambda W, b, A, B, s: (merge_weight(W, A, B, s), b))
"""LoRA itself; `variants` has the others."""


@dataclass(frozen=True)
class TrainableSpec:
    """What is trained, and how. Parameters not in ``trained`` are constant and have no gradient.

    ``scale``: s of each adapted projection; ``dropout_scale``: its dropout multiplier K (n,
    tokens), none in evaluation; ``trained``: names of parameters, of adapters or of the base;
    ``variant``: that of projections whose adapter is not plain LoRA. Full fine-tuning is
    ``TrainableSpec(trained=frozenset(weights))``.
    """

    scale: Mapping[str, Any] = field(default_factory=dict)
    dropout_scale: Mapping[str, Array] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()
    variant: Mapping[str, Variant] = field(default_factory=dict)

    def trained_only(self, gradients: Iterable[tuple[str, Array]]) -> Weights:
        """The gradients, given as (name, gradient), of the parameters that are trained."""
        return {name: g for name, g in gradients if name in self.trained}


def sum_gradients(*parts: Weights) -> Weights:
    """The sum of gradients by name: a tied weight receives one from each of its uses."""
    sums: Weights = {}
    for name, g in (item for part in parts for item in part.items()):
        sums[name] = sums[name] + g if name in sums else g
    return sums


TABLES = ("embed", "positions", "types")
"""The embeddings: their weight has a row for each id, and is the transpose of the matrix W."""

TIE = {"head": "embed"}
"""A head without a weight is tied: it uses the embedding's weight. Each of the two may have an
adapter of its own."""


def weight_of(at: str, W: Params) -> str:
    """The name of the module's weight: its own, or the one that it is tied to."""
    own = f"{at}.weight"
    return own if own in W else f"{TIE.get(at, at)}.weight"


def adapter_of(at: str, W: Params, tuning: TrainableSpec) -> tuple[Variant, list[str]]:
    """The variant of the module's adapter and its parameters' names; no names without an adapter.

    Errors: ValueError if the base's weight is trained below a variant that rescales it.
    """
    variant = tuning.variant.get(at, LORA)
    names = [f"{at}.{part}" for part in variant.parts]
    if names[0] not in W:
        return variant, []
    if not variant.additive and (weight := weight_of(at, W)) in tuning.trained:
        raise ValueError(f"{weight} is trained, but its adapter rescales it: freeze one of the two")
    return variant, names


def project(x: Array, at: str, W: Params, tuning: TrainableSpec) -> tuple[Array, Back]:
    """The projection named ``at``: the one place that asks if it is adapted, trained or frozen.

    ``back(dy)`` gives dx and a dict with the gradients of the trained parameters: of the adapter,
    by its variant's equation, and of the base, dW = dy xᵀ and db = dy 1 (the sum over tokens).

    Shapes: x (n, t) -> y (m, t).
    Errors: those of `adapter_of`.
    """
    weight, bias = weight_of(at, W), f"{at}.bias"
    variant, names = adapter_of(at, W, tuning)
    if names:
        parts, s, K = [W[name] for name in names], tuning.scale[at], tuning.dropout_scale.get(at)
        y, back_y = variant.linear(x, W[weight], W.get(bias), *parts, s, K)
    else:
        y, back_y = linear(x, W[weight], W.get(bias))

    def back(dy: Array) -> tuple[Array, Weights]:
        dx, *dparts = back_y(dy) if names else (back_y(dy),)
        gradients = tuning.trained_only(zip(names, dparts, strict=True))
        if weight in tuning.trained:
            gradients[weight] = dy @ x.T
        if bias in tuning.trained:
            gradients[bias] = dy.sum(1, keepdims=True)
        return dx, gradients

    return y, back


def is_base(name: str) -> bool:
    """Whether the parameter is the base model's: its last part is ``weight`` or ``bias``."""
    return name.endswith((".weight", ".bias"))


def adapted_in(names: Iterable[str]) -> list[str]:
    """The modules that have an adapter, by the A among ``names``, in order."""
    return [name.removesuffix(".A") for name in names if name.endswith(".A")]


def disable(W: Weights) -> Weights:
    """The base model: the same arrays without the adapters' parameters."""
    return {name: array for name, array in W.items() if is_base(name)}


class Merged(Weights):
    """Weights with their adapters merged, and in ``original`` what they were merged from."""

    original: Weights


def merge(W: Weights, tuning: TrainableSpec) -> Merged:
    """Every adapted weight replaced by its variant's W', a new array; the others are shared.

    The function of a tied head stays the same: the head gets a weight of its own, unless its
    adapter is the embedding's `twin`.

    Errors: ValueError if W is merged already (the adapter would count twice) or has no adapter; if
    an embedding's adapter has a bias, which an embedding cannot hold; those of `adapter_of`.
    """
    if isinstance(W, Merged):
        raise ValueError("these weights are merged already; unmerge them first")
    if not adapted_in(W):
        raise ValueError("no adapter to merge: no parameter's name ends with .A")
    merged = Merged(disable(W))
    merged.original = dict(W)
    for at in adapted_in(W):
        merged |= _merged(at, W, tuning)
    if "head.weight" not in W and "embed.A" in W:
        if _are_twins(W, tuning):
            del merged["head.weight"]
        else:
            merged.setdefault("head.weight", W["embed.weight"])
    return merged


def _merged(at: str, W: Weights, tuning: TrainableSpec) -> Weights:
    """W' and b' of one module, by name; an embedding is adapted as its transpose."""
    variant, names = adapter_of(at, W, tuning)
    matrix = W[weight_of(at, W)].T if at in TABLES else W[weight_of(at, W)]
    parts = [W[name] for name in names]
    merged, bias = variant.merge(matrix, W.get(f"{at}.bias"), *parts, tuning.scale[at])
    if bias is None:
        return {f"{at}.weight": merged.T if at in TABLES else merged}
    if at in TABLES:
        raise ValueError(f"the adapter of {at} has a bias, which a table has no place for")
    return {f"{at}.weight": merged, f"{at}.bias": bias}


def twin(A: Array, B: Array) -> tuple[Array, Array]:
    """The adapter of a tied head that equals an embedding's: s (B A)ᵀ = s Aᵀ Bᵀ.

    An embedding's A (r, v), B (d, r) become a head's A (r, d), B (v, r), and vice versa.

    Shapes: A (r, n), B (m, r) -> A₂ (r, m), B₂ (n, r).
    Source: ``ensure_weight_tying`` of PEFT.
    """
    return B.T, A.T


def _are_twins(W: Weights, tuning: TrainableSpec) -> bool:
    if "head.A" not in W or {"head", "embed"} & tuning.variant.keys():
        return False
    A, B = twin(W["embed.A"], W["embed.B"])
    same = np.array_equal(A, W["head.A"]) and np.array_equal(B, W["head.B"])
    return same and bool(tuning.scale["head"] == tuning.scale["embed"])


def unmerge(W: Merged) -> Weights:
    """The arrays from before the merge, bit for bit: subtracting s B A would leave rounding errors.

    Errors: TypeError if W is not what :func:`merge` returned.
    """
    if not isinstance(W, Merged):
        raise TypeError("these weights are not merged; expected what merge returned")
    return dict(W.original)
