"""Flax NNX: its LoRALinear, which has no scale."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from minilora.verify.peers.flax import PEER
from minilora.verify.peers.peer import refuse_settings


@PEER.describes
class Flax:
    """Each call builds the layer anew; its kernel is (in, out), as are A and B."""

    def lora_linear(
        self,
        x: np.ndarray,
        W: np.ndarray,
        A: np.ndarray,
        B: np.ndarray,
        *,
        bias: Any = None,
        **settings: Any,
    ) -> np.ndarray:
        """y."""
        _refuse(settings)
        with _float64():
            return np.asarray(_forward({"x": x, "A": A, "B": B} | _bias(bias), W))

    def lora_linear_vjp(
        self,
        x: np.ndarray,
        W: np.ndarray,
        A: np.ndarray,
        B: np.ndarray,
        dy: np.ndarray,
        *,
        bias: Any = None,
        **settings: Any,
    ) -> dict[str, np.ndarray]:
        """y and the gradients of ⟨dy, y⟩, by vjp."""
        _refuse(settings)
        with _float64():
            of = jax.tree.map(jnp.asarray, {"x": x, "A": A, "B": B} | _bias(bias))
            y, back = jax.vjp(lambda of: _forward(of, W), of)
            (gradients,) = back(jnp.asarray(dy))
            answer = {"y": y} | {f"d{name}": gradient for name, gradient in gradients.items()}
            return {name: np.asarray(array) for name, array in answer.items()}

    def init(self, W: np.ndarray, *, r: int, seed: int, **settings: Any) -> dict[str, np.ndarray]:
        """A and B of a new layer."""
        _refuse(settings)
        with _float64():
            adapter = _layer(W, r, seed).lora
            return {
                "A": np.asarray(adapter.lora_a[...]).T.copy(),
                "B": np.asarray(adapter.lora_b[...]).T.copy(),
            }


def _refuse(settings: dict[str, Any]) -> None:
    refuse_settings("Flax", [name for name in settings if name not in ("alpha", "r")])


def _float64() -> Any:
    """JAX has no float64 without it."""
    return jax.enable_x64(True)


def _bias(bias: np.ndarray | None) -> dict[str, np.ndarray]:
    return {} if bias is None else {"bias": bias}


def _layer(W: np.ndarray, r: int, seed: int = 0, **how: Any) -> nnx.LoRALinear:
    m, n = W.shape
    how |= {"param_dtype": W.dtype, "lora_param_dtype": W.dtype}
    return nnx.LoRALinear(n, m, lora_rank=r, rngs=nnx.Rngs(seed), **how)


_ZEROS = nnx.initializers.zeros_init()
_FILLED = {"kernel_init": _ZEROS, "a_initializer": _ZEROS, "b_initializer": _ZEROS}
"""Quicker than random numbers that are written over."""


def _forward(of: dict[str, Any], W: np.ndarray) -> jax.Array:
    layer = _layer(W, len(of["A"]), use_bias="bias" in of, **_FILLED)
    layer.kernel[...] = jnp.asarray(W).T
    layer.lora.lora_a[...] = jnp.asarray(of["A"]).T
    layer.lora.lora_b[...] = jnp.asarray(of["B"]).T
    if "bias" in of:
        layer.bias[...] = jnp.asarray(of["bias"])
    y: jax.Array = layer(jnp.asarray(of["x"]))
    return y
