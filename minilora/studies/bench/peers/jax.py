"""The same step by JAX: written by hand, its gradients by grad, compiled by jit."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax import numpy as jnp

from minilora.io.files import read_tensors
from minilora.io.formats.huggingface import read_model
from minilora.io.formats.peft import read_adapter
from minilora.spec.models import Llama
from minilora.spec.ops import IGNORED
from minilora.studies.bench.cases import RATE

Tensor = Any


class Jax:
    """A Llama with LoRA and AdamW in JAX's functions alone, a step being one compiled program."""

    versions = f"jax {jax.__version__}"

    def __init__(self, folder: str, threads: int) -> None:
        os.environ["NPROC"] = str(threads)  # of XLA's pool, which its first array makes
        jax.config.update("jax_platforms", "cpu")
        at = Path(folder)
        c, base = read_model(at / "model")
        assert isinstance(c, Llama)
        adapter, tuning = read_adapter(at / "adapter", c)
        batch = read_tensors(at / "batch.safetensors")
        self.W, self.params, self.batch = jax.tree.map(jnp.asarray, (base, adapter, batch))
        self.state = jax.tree.map(jnp.zeros_like, (self.params, self.params))
        self.t = 0
        loss = partial(_loss, c=c, scale=dict(tuning.scale))
        self._forward = jax.jit(loss)
        self._step = jax.jit(partial(_step, loss), donate_argnums=(0, 1))

    def step(self) -> float:
        """Loss, gradients and AdamW's step."""
        self.t += 1
        L, self.params, self.state = jax.block_until_ready(
            self._step(self.params, self.state, self.t, self.W, self.batch)
        )
        return float(L)

    def forward(self) -> float:
        """The loss alone."""
        return float(self._forward(self.params, self.W, self.batch))


def _loss(
    params: Any, W: Any, batch: dict[str, Tensor], c: Llama, scale: dict[str, float]
) -> Tensor:
    ids, labels = batch["ids"], batch["labels"][:, 1:]
    b, t = ids.shape
    half = jnp.arange(0, c.head_dim, 2) / c.head_dim
    angles = jnp.arange(t)[:, None, None] * c.theta**-half
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    def project(x: Tensor, at: str) -> Tensor:
        y = x @ W[f"{at}.weight"].T
        if at not in scale:
            return y
        return y + scale[at] * (x @ params[f"{at}.A"].T @ params[f"{at}.B"].T)

    def norm(x: Tensor, at: str) -> Tensor:
        rho = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + c.eps)
        return W[f"{at}.weight"][:, 0] * (x * rho)

    def turn(x: Tensor) -> Tensor:
        first, second = jnp.split(x, 2, -1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    x = W["embed.weight"][ids]
    for i in range(c.layers):
        at = f"layers.{i}."
        h = norm(x, at + "norm1")
        q, k, v = (project(h, at + part).reshape(b, t, -1, c.head_dim) for part in "qkv")
        a = jax.nn.dot_product_attention(turn(q), turn(k), v, is_causal=True)
        x = x + project(a.reshape(b, t, -1), at + "o")
        h = norm(x, at + "norm2")
        x = x + project(jax.nn.silu(project(h, at + "gate")) * project(h, at + "up"), at + "down")
    head = W["embed.weight" if c.tied else "head.weight"]
    z = norm(x, "norm")[:, :-1] @ head.T
    wanted = jnp.take_along_axis(z, ids[:, 1:, None], -1)[..., 0]
    counted = labels != IGNORED
    return ((jax.nn.logsumexp(z, -1) - wanted) * counted).sum() / counted.sum()


def _step(loss: Any, params: Any, state: Any, t: Tensor, W: Any, batch: Any) -> Any:
    """L and, by AdamW at PyTorch's betas, ε and decay, the next parameters and means."""
    L, g = jax.value_and_grad(loss)(params, W, batch)
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state[0], g)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, state[1], g)

    def moved(p: Tensor, m: Tensor, v: Tensor) -> Tensor:
        size = jnp.sqrt(v / (1 - 0.999**t)) + 1e-8
        return (1 - RATE * 0.01) * p - RATE * (m / (1 - 0.9**t) / size)

    return L, jax.tree.map(moved, params, m, v), (m, v)
