"""A right optimizer: clipping, schedules, accumulation, LoRA+, SGD and AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from minilora.verify.mutants.references.helpers import HALVES, Array, wide


class Optimizer:
    name = "reference"
    dtypes: ClassVar = ("float64", "float32", *HALVES)
    precision: ClassVar = {h: {"storage": h, "accumulation": "float32"} for h in HALVES}

    def __init__(self) -> None:
        self.memory: dict[str, Any] = {}

    def optimizer_steps(
        self, params: Mapping[str, Array], gradients: Sequence[Any], settings: Mapping[str, Any]
    ) -> list[dict[str, Array]]:
        """The parameters after each step."""
        dtype, steps = next(iter(params.values())).dtype, []
        p = {name: wide(array) for name, array in params.items()}
        m, v, u = ({name: 0 * array for name, array in p.items()} for _ in range(3))
        optimizer, lr = settings["optimizer"], settings["lr"]
        beta1, beta2 = settings.get("betas", (0.9, 0.999))
        eps, momentum = settings.get("eps", 1e-8), settings.get("momentum", 0.0)
        weight_decay = settings.get("weight_decay", 0.0)
        max_norm = settings.get("max_grad_norm", np.inf)
        schedule, warmup = settings.get("schedule", "constant"), settings.get("warmup_steps", 0)
        total = settings.get("total_steps", len(gradients))
        ratio = settings.get("loraplus_lr_ratio", 1.0)
        # settings
        for k, item in enumerate(gradients):
            g = self.accumulated(item, max_norm)
            norm = sum((x**2).sum() for x in g.values()) ** 0.5
            clip = min(1.0, max_norm / (norm + 1e-6))
            g = {n: x * clip for n, x in g.items()}
            step = k
            factor = self.factor(schedule, step, warmup, total)
            # rate
            for name, w in p.items():
                grad, decay = g[name], weight_decay
                rate = lr * factor
                rate = rate * ratio if name.endswith("B") else rate
                # parameter
                if optimizer == "sgd":
                    u[name] = momentum * u[name] + (grad + decay * w)
                    new = w - rate * u[name]
                else:
                    m[name] = beta1 * m[name] + (1 - beta1) * grad
                    v[name] = beta2 * v[name] + (1 - beta2) * grad**2
                    t = k + 1
                    m_hat = m[name] / (1 - beta1**t)
                    v_hat = v[name] / (1 - beta2**t)
                    direction = m_hat / (v_hat**0.5 + eps)
                    new = w * (1 - rate * decay) - rate * direction
                # step
                p[name] = new
            steps.append({name: array.astype(dtype) for name, array in p.items()})
        return steps

    def accumulated(self, item: Any, max_norm: float) -> dict[str, Any]:
        """The gradient of a step: of a batch, or the mean over all labels of its micro-batches."""
        if isinstance(item, Mapping):
            return {name: wide(array) for name, array in item.items()}
        n = [count for count, _ in item]
        parts = [{name: wide(array) for name, array in part.items()} for _, part in item]
        # micro-batches
        share = [x / sum(n) for x in n]
        pairs = list(zip(share, parts, strict=True))
        return {name: sum(f * part[name] for f, part in pairs) for name in parts[0]}

    def factor(self, schedule: str, k: int, warmup: int, total: int) -> float:
        """What the schedule multiplies the learning rate by in step k."""
        if k < warmup:
            return k / warmup
        left = max(0, total - k) / (total - warmup)
        curves = {"constant": 1.0, "linear": left, "cosine": np.sin(np.pi / 2 * left) ** 2}
        return float(curves[schedule])
