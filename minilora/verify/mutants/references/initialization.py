"""Right initial factors, and what is taken out of the weight beside them."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.verify.mutants.references.helpers import Array, uniform
from minilora.verify.mutants.references.linear import Linear


class Initialization(Linear):
    def init(
        self,
        W: Array,
        *,
        r: int,
        alpha: float,
        seed: int,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        fan_in_fan_out: bool = False,
        init_lora_weights: Any = True,
        **settings: Any,
    ) -> dict[str, Array]:
        """A, B and the weight beside them."""
        if settings:
            raise NotImplementedError(", ".join(settings))
        kind, (m, n), wide = init_lora_weights, W.shape, W.astype(np.float64)
        rng = np.random.default_rng([seed, 7])
        s = alpha * r**-0.5 if use_rslora else alpha / r
        beside: Any = W
        # kind
        if kind == "pissa":
            U, values, Vh = np.linalg.svd(wide, full_matrices=False)
            root = (values[:r] / s) ** 0.5
            A, B = root[:, None] * Vh[:r], U[:, :r] * root
            # pissa
        elif kind == "olora":
            Q, R = np.linalg.qr(wide)
            A, B = R[:r], Q[:, :r]
            # olora
        elif kind == "orthogonal":
            # orthogonal
            Q, _ = np.linalg.qr(rng.standard_normal((r, r)))
            half = r // 2
            A = Q[:half].T @ rng.standard_normal((half, n)) / 10
            B = rng.standard_normal((m, half)) @ Q[half:] / 10
        elif kind == "gaussian":
            A = rng.normal(0, 1 / r, (r, n))
        else:
            A = uniform(rng, (r, n)) / n**0.5
        if kind in ("pissa", "olora"):
            beside = wide - s * (B @ A)
        elif kind != "orthogonal":
            B = np.zeros((m, r))
            # LoRA
        # start
        V = np.asarray(beside, np.float64) + s * (B @ A)
        norm = (V**2).sum(1) ** 0.5
        c = np.zeros(m)
        # variants
        answer = {"A": A, "B": B, "W": beside}
        answer |= {"magnitude": norm} if use_dora else {}
        answer |= {"lora_bias": c} if lora_bias else {}
        return {name: array.astype(W.dtype) for name, array in answer.items()}
