"""Optimizers as pure functions over flat dicts of parameters and gradients.

A step takes parameters, gradients and state and returns new ones; nothing is changed in place.
``lr`` is one number, or a dict with one for each parameter, as :func:`loraplus_rates` makes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora.spec.lora import Params, Weights, sum_gradients
from minilora.spec.ops import Array, python_scalar

Rates = float | Mapping[str, float]


@dataclass(frozen=True)
class SGDState:
    """The velocity of each parameter; empty before the first step."""

    velocity: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class AdamState:
    """The number of steps done, and the running means of g and g²; empty before the first."""

    t: int = 0
    m: Params = field(default_factory=dict)
    v: Params = field(default_factory=dict)


def rates_of(lr: Rates, params: Weights) -> Mapping[str, float]:
    """The learning rate of each parameter, by name."""
    if isinstance(lr, Mapping):
        return {name: python_scalar(rate) for name, rate in lr.items()}
    return dict.fromkeys(params, python_scalar(lr))


def sgd(
    params: Weights,
    gradients: Weights,
    state: SGDState,
    lr: Rates,
    momentum: float = 0,
    weight_decay: float = 0,
) -> tuple[Weights, SGDState]:
    """p ← p - η u, u ← μ u + g + λ p, and u = g + λ p at the first step.

    Source: Sutskever et al. 2013 with the velocity free of η, as in PyTorch's SGD, whose weight
    decay is coupled: it passes through the velocity.
    """
    momentum, weight_decay = python_scalar(momentum), python_scalar(weight_decay)
    new, velocity, rates = {}, {}, rates_of(lr, params)
    for name, p in params.items():
        u = gradients[name] + weight_decay * p
        if name in state.velocity:
            u = momentum * state.velocity[name] + u
        velocity[name] = u
        new[name] = p - rates[name] * u
    return new, SGDState(velocity)


def adamw(
    params: Weights,
    gradients: Weights,
    state: AdamState,
    lr: Rates,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[Weights, AdamState]:
    """p ← (1 - η λ) p - η m̂ / (√v̂ + ε), m̂ = m / (1 - β₁ᵗ), v̂ = v / (1 - β₂ᵗ).

    With m ← β₁ m + (1 - β₁) g and v ← β₂ v + (1 - β₂) g², both from 0, and t from 1.

    Source: Kingma and Ba 2015, algorithm 1; the decay of Loshchilov and Hutter 2019, algorithm 2,
    times the rate as in PyTorch, where the paper has a schedule's factor alone.
    """
    beta1, beta2, eps, weight_decay = map(python_scalar, (*betas, eps, weight_decay))
    t = state.t + 1
    new, new_m, new_v, rates = {}, {}, {}, rates_of(lr, params)
    for name, p in params.items():
        g = gradients[name]
        m = beta1 * state.m.get(name, 0) + (1 - beta1) * g
        v = beta2 * state.v.get(name, 0) + (1 - beta2) * (g * g)
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        new_m[name], new_v[name] = m, v
        decayed = (1 - rates[name] * weight_decay) * p
        new[name] = decayed - rates[name] * (m_hat / (np.sqrt(v_hat) + eps))
    return new, AdamState(t, new_m, new_v)


def global_norm(gradients: Weights) -> Array:
    """‖g‖ = √(the sum of squares of all gradients together).

    Errors: ValueError if there is no gradient.
    """
    if not gradients:
        raise ValueError("no gradients: nothing is trained")
    norm: Array = np.sqrt(sum((g * g).sum() for g in gradients.values()))
    return norm


def clip(gradients: Weights, max_norm: float, eps: float = 1e-6) -> tuple[Weights, Array]:
    """g ← g min(1, max_norm / (‖g‖ + ε)) for all gradients alike; also gives ‖g‖ before.

    Errors: ValueError for a norm below 0, and without gradients.
    Source: Pascanu, Mikolov and Bengio 2013, algorithm 1; the ε is PyTorch's.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm {max_norm}: expected 0 or more")
    norm = global_norm(gradients)
    factor = np.minimum(python_scalar(max_norm) / (norm + python_scalar(eps)), 1)
    return {name: g * factor for name, g in gradients.items()}, norm


SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda q: 1.0,
    "linear": lambda q: 1 - q,
    "cosine": lambda q: 0.5 * (1 + math.cos(math.pi * q)),
}
"""The factor on the learning rate after warm-up, of the progress q from 0 to 1."""


def schedule(kind: str, k: int, total: int, warmup: int = 0) -> float:
    """The factor on the learning rate at step k = 0, 1, …: k / warmup first, then by ``kind``.

    With the progress q = (k - warmup) / (total - warmup), and 1 from total on, the factor is 1 for
    "constant", 1 - q for "linear" and (1 + cos πq) / 2 for "cosine", as `SCHEDULES` has them.

    Errors: ValueError for an unknown kind, or a warmup below 0.
    Source: Loshchilov and Hutter 2017, equation 5, for the cosine; counted as in transformers.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"lr_scheduler {kind!r}: expected one of {', '.join(SCHEDULES)}")
    if warmup < 0:
        raise ValueError(f"warmup {warmup}: expected 0 steps or more")
    q = (k - warmup) / (total - warmup) if warmup <= k < total else 1.0
    return k / warmup if k < warmup else SCHEDULES[kind](q)


def loraplus_rates(names: Sequence[str], lr: float, ratio: float) -> dict[str, float]:
    """η for every parameter, and η · ratio for each B.

    Source: Hayou, Ghosh and Yu 2024, "LoRA+", section 4.
    """
    return {name: lr * ratio if name.endswith(".B") else lr for name in names}


def lorafa_gradient(dB: Array, A: Array, s: Any) -> Array:
    """g = dB (A Aᵀ)⁻¹ / s²: with A frozen, the step of B that changes W most like the full one.

    Of all g, the change s g A is nearest to dW = ∂L/∂W: (s g A - dW) Aᵀ = 0, since dB = s dW Aᵀ.

    Shapes: dB (m, r), A (r, n), s () -> g (m, r).
    Errors: numpy.linalg.LinAlgError if A's rows depend on one another.
    Source: the optimizer that PEFT names LoRA-FA, there with A Aᵀ + 10⁻⁸ I; Zhang et al. 2023,
    "LoRA-FA", section 3, train B with dB itself.
    """
    g: Array = np.linalg.solve(A @ A.T, dB.T).T / s**2
    return g


def accumulate(parts: Sequence[tuple[int, Weights]]) -> Weights:
    """g = Σᵢ nᵢ gᵢ / Σᵢ nᵢ over micro-batches: gᵢ the mean over the nᵢ labels that count there.

    This is the gradient of the whole batch's mean; the mean of the gᵢ is not, when the nᵢ differ.

    Errors: ValueError if no label counts or if the parts name different parameters.
    """
    parts = [(python_scalar(n), g) for n, g in parts]
    tokens = sum(n for n, _ in parts)
    if tokens < 1:
        raise ValueError(
            f"{len(parts)} micro-batches with {tokens} labels that count: nothing to do"
        )
    names = parts[0][1].keys()
    if any(g.keys() != names for _, g in parts):
        raise ValueError("the micro-batches' gradients name different parameters")
    weighted = sum_gradients(*({name: n * g[name] for name in names} for n, g in parts))
    return {name: g / tokens for name, g in weighted.items()}


STEPS: Mapping[str, Any] = {"adamw": (adamw, AdamState), "sgd": (sgd, SGDState)}


def run(params: Weights, gradients: Sequence[Any], settings: Mapping[str, Any]) -> list[Weights]:
    """The parameters after each step: accumulate, clip, schedule, step.

    ``gradients`` holds one item a step: a dict, or (count, dict) pairs, one a micro-batch.
    ``settings``: optimizer, lr, and as they apply betas, eps, momentum, weight_decay,
    max_grad_norm, schedule, warmup_steps, total_steps, loraplus_lr_ratio.

    Errors: ValueError for an unknown optimizer or setting, and without lr; those of `clip`,
    `schedule` and `accumulate`.
    """
    kind = settings.get("optimizer", "adamw")
    own = {"adamw": ("betas", "eps", "weight_decay"), "sgd": ("momentum", "weight_decay")}
    if kind not in own:
        raise ValueError(f"optimizer {kind!r}: expected one of {', '.join(own)}")
    known = {"optimizer", "lr", "max_grad_norm", "schedule", "warmup_steps", "total_steps"}
    known |= {"loraplus_lr_ratio", *own[kind]}
    if unknown := sorted(settings.keys() - known):
        raise ValueError(f"settings {unknown} mean nothing to {kind}; there are {sorted(known)}")
    if "lr" not in settings:
        raise ValueError(f"settings {sorted(settings)}: expected lr, the learning rate, among them")
    step, start = STEPS[kind]
    options = {name: settings[name] for name in own[kind] if name in settings}
    state, history = start(), []
    rates = loraplus_rates(list(params), settings["lr"], settings.get("loraplus_lr_ratio") or 1.0)
    for k, item in enumerate(gradients):
        g = item if isinstance(item, dict) else accumulate(item)
        if settings.get("max_grad_norm") is not None:
            g, _ = clip(g, settings["max_grad_norm"])
        factor = schedule(
            settings.get("schedule", "constant"),
            k,
            settings.get("total_steps", len(gradients)),
            settings.get("warmup_steps", 0),
        )
        lr = {name: rate * factor for name, rate in rates.items()}
        params, state = step(params, g, state, lr, **options)
        history.append(params)
    return history
