"""The best classifier head on a frozen model: what adapters are compared with."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import minimize

from minilora.spec.lora import Params, TrainableSpec, project
from minilora.spec.models import Config, logits
from minilora.spec.ops import Array, Back, cross_entropy, linear
from minilora.training.batching import batches_of, order
from minilora.training.example import Example
from minilora.training.kernels import forward_kernels

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""The decays among which the probe chooses, by the loss in validation."""


def features(examples: Sequence[Example], W: Params, c: Config, tokens: int) -> Array:
    """What the head of a BERT as it is has before it, for each example.

    Shapes: -> x (d, n).
    """
    seen: list[Array] = []

    def head(x: Array, at: str, W: Params, tuning: TrainableSpec) -> tuple[Array, Back]:
        seen.append(x)
        return x, lambda dx: None

    for batch in batches_of(examples, tokens, 0):
        logits(batch, W, c, TrainableSpec(), forward_kernels(c, head))
    places = np.argsort(row_order(examples, tokens))
    return np.concatenate(seen, 1)[:, places]


def row_order(examples: Sequence[Example], tokens: int) -> list[int]:
    """The numbers of the examples in the order in which `batches_of` has them."""
    return [i for rows in order(examples, tokens, 0, 0) for i in rows]


def probe(x: Array, labels: Array, classes: int, strength: float) -> tuple[Array, Array]:
    """The head W, b that has the least mean cross-entropy + strength/2 ‖W‖² on frozen features.

    The problem is convex, so this is the best that a head alone can do: no rate, no seed.

    Shapes: x (d, n), labels (n,) -> W (classes, d), b (classes, 1).
    """
    x = x.astype(np.float64)
    shape = (classes, len(x) + 1)

    def loss(flat: Array) -> tuple[float, Array]:
        W, b = np.split(flat.reshape(shape), [len(x)], axis=1)
        head = {"head.weight": W, "head.bias": b}
        z, back_z = project(x, "head", head, TrainableSpec(trained=frozenset(head)))
        L, back_L = cross_entropy(z, labels)
        _, g = back_z(back_L(1.0))
        decayed = [g["head.weight"] + strength * W, g["head.bias"]]
        norm = 0.5 * strength * float((W * W).sum())
        return float(L) + norm, np.concatenate(decayed, axis=1).ravel()

    found = minimize(loss, np.zeros(np.prod(shape)), jac=True, method="L-BFGS-B")
    W, b = np.split(found.x.reshape(shape), [len(x)], axis=1)
    return W, b


def best_probe(
    x: Mapping[str, Array], labels: Mapping[str, Array], classes: int
) -> tuple[float, Array]:
    """The decay with the least loss in validation, and which of the test's labels are right."""
    heads = {s: probe(x["train"], labels["train"], classes, s) for s in STRENGTHS}

    def loss(strength: float) -> float:
        z, _ = linear(x["valid"].astype(np.float64), *heads[strength])
        return float(cross_entropy(z, labels["valid"])[0])

    best = min(STRENGTHS, key=loss)
    z, _ = linear(x["test"].astype(np.float64), *heads[best])
    return best, z.argmax(0) == labels["test"]
