"""JAX on the plain formula, compiled by jit for the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from minilora.verify.peers import _formula
from minilora.verify.peers._formula import Tensor
from minilora.verify.peers.jax import PEER


@PEER.describes
class Jax:
    """Every gradient is vjp's; DoRA's norm is held constant in it by stop_gradient."""

    def lora_linear(self, x: Any, W: Any, A: Any, B: Any, **settings: Any) -> np.ndarray:
        """y."""
        return np.asarray(_arrays(_forward, x=x, W=W, A=A, B=B, **settings))

    def lora_linear_vjp(
        self, x: Any, W: Any, A: Any, B: Any, dy: Any, **settings: Any
    ) -> dict[str, np.ndarray]:
        """y and the gradients of ⟨dy, y⟩."""
        return dict(_arrays(_vjp, x=x, W=W, A=A, B=B, dy=dy, **settings))

    def merge(self, W: Any, A: Any, B: Any, **settings: Any) -> Any:
        """W + s B A, with DoRA its rows rescaled to the magnitude; with a bias (W', b')."""
        merged = _arrays(_merged, W=W, A=A, B=B, **settings)
        return tuple(map(np.asarray, merged)) if isinstance(merged, tuple) else np.asarray(merged)

    def unmerge(self, W_merged: Any, A: Any, B: Any, **settings: Any) -> np.ndarray:
        """W' - s B A."""
        _formula.refuse_dora(settings)
        W: np.ndarray = self.merge(W_merged, A, -B, **settings)
        return W

    def combine(
        self,
        adapters: Sequence[Mapping[str, Any]],
        weights: Sequence[float],
        combination_type: str = "cat",
        svd_rank: int | None = None,
    ) -> np.ndarray:
        """[w s B …] [A; …], or the best change of its rank."""
        parts = _parts(adapters)
        return np.asarray(_arrays(_combined, adapters=parts, weights=weights, rank=svd_rank))

    def multi_adapter(
        self, x: Any, W: Any, adapters: Sequence[Mapping[str, Any]], index: np.ndarray
    ) -> np.ndarray:
        """x Wᵀ, and to each adapter's rows its own branch."""
        return np.asarray(_arrays(_by_row, x=x, W=W, adapters=_parts(adapters), index=index))


def _arrays(function: Any, **arguments: Any) -> Any:
    """What a compiled function answers, as NumPy arrays; without x64 JAX has no float64."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return jax.tree.map(np.asarray, function(**arguments))


def _parts(adapters: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Any, float]]:
    """A, B and s of each."""
    return [(a["A"], a["B"], _formula.scale(**a)) for a in adapters]


def _row_norms(V: Tensor) -> Tensor:
    return jnp.linalg.norm(V, axis=1)


_compiled = partial(jax.jit, static_argnames=("use_rslora", "use_dora"))


def _layer(**arguments: Any) -> Tensor:
    return _formula.layer(lambda V: jax.lax.stop_gradient(_row_norms(V)), **arguments)


@_compiled
def _forward(**arguments: Any) -> Tensor:
    return _layer(**arguments)


@_compiled
def _vjp(*, dy: Tensor, **arguments: Any) -> dict[str, Tensor]:
    names = ("x", "A", "B", "bias", "magnitude", "lora_bias")
    of = {name: arguments.pop(name) for name in names if name in arguments}
    y, back = jax.vjp(lambda of: _layer(**arguments, **of), of)
    (gradients,) = back(dy)
    return {"y": y} | {f"d{name}": gradient for name, gradient in gradients.items()}


@_compiled
def _merged(**arguments: Any) -> Tensor:
    return _formula.merged(_row_norms, **arguments)


@partial(jax.jit, static_argnames="rank")
def _combined(
    *, adapters: Sequence[tuple[Tensor, Tensor, float]], weights: Sequence[float], rank: int | None
) -> Tensor:
    factors = [(A, w * s * B) for w, (A, B, s) in zip(weights, adapters, strict=True)]
    return _formula.combined(jnp, lambda array, dtype: array.astype(dtype), factors, rank)


@jax.jit
def _by_row(
    *, x: Tensor, W: Tensor, adapters: Sequence[tuple[Tensor, Tensor, float]], index: Tensor
) -> Tensor:
    y = x @ W.T
    for i, (A, B, s) in enumerate(adapters):
        y = y + jnp.where((index == i)[:, None], s * (x @ A.T @ B.T), 0)
    return y
