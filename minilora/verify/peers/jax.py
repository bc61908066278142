"""JAX on the plain formula, compiled by jit for the CPU, with the gradients of its vjp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, ClassVar

import jax
import numpy as np
from jax import numpy as jnp

Tensor = Any

_SUMMED = (
    "the transpose of a broadcast is a sum in the array's own dtype, and jnp.sum's is not: the "
    "gradient of a bias carries the rounding of every partial sum"
)


class Jax:
    """Every gradient is vjp's; DoRA's norm is held constant in it by stop_gradient."""

    name = "jax"
    version = str(jax.__version__)
    dtypes = ("float64", "float32", "bfloat16", "float16")
    # 1 + 511 terms of u/4 came out as the float32 sum in both half precisions.
    precision: ClassVar = {
        "bfloat16": {"storage": "bfloat16", "accumulation": "float32"},
        "float16": {"storage": "float16", "accumulation": "float32"},
    }
    conventions: ClassVar = {"dora_norm": "detached"}
    known: ClassVar = {
        f"{check}:{dtype}": _SUMMED
        for check, dtype in product(
            ("linear.vjp.bias", "linear.vjp.all", "variants.*.vjp*"), ("bfloat16", "float16")
        )
    }

    def lora_linear(self, x: Any, W: Any, A: Any, B: Any, **settings: Any) -> np.ndarray:
        """y."""
        return np.asarray(_arrays(_forward, x=x, W=W, A=A, B=B, **settings))

    def lora_linear_vjp(
        self, x: Any, W: Any, A: Any, B: Any, dy: Any, **settings: Any
    ) -> dict[str, np.ndarray]:
        """y and the gradients of ⟨dy, y⟩."""
        return dict(_arrays(_vjp, x=x, W=W, A=A, B=B, dy=dy, **settings))

    def merge(self, W: Any, A: Any, B: Any, **settings: Any) -> np.ndarray:
        """W + s B A, with DoRA its rows rescaled to the magnitude."""
        return np.asarray(_arrays(_merged, W=W, A=A, B=B, **settings))

    def unmerge(self, W_merged: Any, A: Any, B: Any, **settings: Any) -> np.ndarray:
        """W' - s B A."""
        if "magnitude" in settings:
            raise NotImplementedError("a rescaled row does not say what its norm was")
        return np.asarray(_arrays(_merged, W=W_merged, A=A, B=-B, **settings))

    def combine(
        self, adapters: Sequence[Mapping[str, Any]], weights: Sequence[float], **settings: Any
    ) -> np.ndarray:
        """[w s B …] [A; …], or the best change of its rank, for which halves are not enough."""
        return np.asarray(
            _arrays(_combined, adapters=_parts(adapters), weights=weights, **settings)
        )

    def multi_adapter(
        self, x: Any, W: Any, adapters: Sequence[Mapping[str, Any]], index: np.ndarray
    ) -> np.ndarray:
        """x Wᵀ, and to each adapter's rows its own branch."""
        return np.asarray(_arrays(_by_row, x=x, W=W, adapters=_parts(adapters), index=index))


def implementation() -> object:
    """The peer that `minilora verify jax` checks."""
    return Jax()


def _arrays(function: Any, **given: Any) -> Any:
    """What a compiled function answers, as NumPy arrays; without x64 JAX has no float64."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return jax.tree.map(np.asarray, function(**given))


def _parts(adapters: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Any, float]]:
    """A, B and s of each."""
    return [
        (a["A"], a["B"], _scale(a["alpha"], a["r"], a.get("use_rslora", False))) for a in adapters
    ]


def _scale(alpha: Any, r: Any, use_rslora: bool) -> Any:
    return alpha / r**0.5 if use_rslora else alpha / r


def _refuse(unknown: Mapping[str, Any]) -> None:
    if unknown:  # fan_in_fan_out among them: how a weight is stored is the compiler's matter
        raise NotImplementedError(f"the formula has no settings {', '.join(unknown)}")


def _layer(
    *,
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: float,
    r: int,
    bias: Tensor = None,
    keep: Tensor = None,
    p: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    magnitude: Tensor = None,
    lora_bias: Tensor = None,
    **unknown: Any,
) -> Tensor:
    """y = x Wᵀ + b + s ((x ∘ K) Aᵀ Bᵀ + c), with DoRA x Wᵀ + b + (x ∘ K) (m ∘ V / ‖V‖ - W)ᵀ."""
    _refuse(unknown)
    s = _scale(alpha, r, use_rslora)
    h = x if keep is None else x * keep / (1 - p)
    branch = s * (h @ A.T @ B.T)
    if lora_bias is not None:
        branch = branch + s * lora_bias
    if use_dora:
        norm = jax.lax.stop_gradient(jnp.linalg.norm(W + s * B @ A, axis=1))
        base = h @ W.T
        branch = magnitude / norm * (base + branch) - base
    y = x @ W.T + branch
    return y if bias is None else y + bias


_compiled = partial(jax.jit, static_argnames=("use_rslora", "use_dora"))
_forward = _compiled(_layer)


@_compiled
def _vjp(*, dy: Tensor, **given: Any) -> dict[str, Tensor]:
    names = ("x", "A", "B", "bias", "magnitude", "lora_bias")
    of = {name: given.pop(name) for name in names if name in given}
    y, back = jax.vjp(lambda of: _layer(**given, **of), of)
    (gradients,) = back(dy)
    return {"y": y} | {f"d{name}": gradient for name, gradient in gradients.items()}


@_compiled
def _merged(
    *,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: float,
    r: int,
    use_rslora: bool = False,
    use_dora: bool = False,
    magnitude: Tensor = None,
    lora_bias: Tensor = None,
    **unknown: Any,
) -> Tensor:
    """W + s B A, with DoRA its rows rescaled; the bias c of B would be added to the layer's own."""
    _refuse(unknown)
    merged = W + _scale(alpha, r, use_rslora) * B @ A
    if magnitude is None:
        return merged
    return (magnitude / jnp.linalg.norm(merged, axis=1))[:, None] * merged


@partial(jax.jit, static_argnames=("combination_type", "svd_rank"))
def _combined(
    *,
    adapters: Sequence[tuple[Tensor, Tensor, float]],
    weights: Sequence[float],
    combination_type: str = "cat",
    svd_rank: int | None = None,
) -> Tensor:
    B = jnp.concat([w * s * B for w, (_, B, s) in zip(weights, adapters, strict=True)], axis=1)
    change = B @ jnp.concat([A for A, _, _ in adapters])
    if combination_type == "cat":
        return change
    wide = change.astype(jnp.promote_types(change.dtype, jnp.float32))
    U, S, Vh = jnp.linalg.svd(wide, full_matrices=False)
    return ((U * S)[:, :svd_rank] @ Vh[:svd_rank]).astype(change.dtype)


@jax.jit
def _by_row(
    *, x: Tensor, W: Tensor, adapters: Sequence[tuple[Tensor, Tensor, float]], index: Tensor
) -> Tensor:
    y = x @ W.T
    for i, (A, B, s) in enumerate(adapters):
        y = y + jnp.where((index == i)[:, None], s * (x @ A.T @ B.T), 0)
    return y
