"""All that an adapter starts with, for each start, variant and storage: it changes no output."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import numpy as np

from minilora.spec.lora import scale
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import Skip
from minilora.verify.core.inputs import long
from minilora.verify.core.tolerance import unit_roundoff
from minilora.verify.core.types import BOUND, CHANCE, Case, Comparison
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray

STARTS = ("", "gaussian", "orthogonal", "pissa", "olora")
"""The values of init_lora_weights; of the first, it is absent."""

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"use_dora": True, "use_rslora": True},
    {"lora_bias": True},
)
STORAGES: tuple[dict[str, Any], ...] = ({}, {"fan_in_fan_out": True})

SHAPES = ((9, 6), (5, 11), (8, 8))
"""m and n: tall, wide and square."""

WIDE = (160, 20, 16)
"""m, n and r of the weight by which the greatest entry of A tells fan-in from fan-out: of 320
entries one is above 0.9/√n with a probability of more than 1 - 10^-14."""

ORTHOGONAL = 12
"""B A of an orthogonal start is 0 within this, times r² u |B| |A|; as in `init.orthogonal`."""


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(["plain" if not settings else "", *settings]).strip(", ")


def fresh(start: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    """A fresh adapter is no change: W' + s B A = W, DoRA's magnitude is its norm, a bias is 0.

    Storing W' and forming s B A lose what `init.pissa` states. A norm of n squares loses (n + 4) u
    of itself, and as much as its row does.
    """

    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        asked = 0
        begins: dict[str, Any] = {"init_lora_weights": start} if start else {}
        for number, (variant, storage) in enumerate(product(VARIANTS, STORAGES)):
            m, n = SHAPES[(number + case.number) % len(SHAPES)]
            settings = {**begins, **variant, **storage}
            try:
                answer = _answered(subject, case, (m, n), settings)
            except Skip as skip:
                reason = skip.reason
                continue
            asked += 1
            yield from _laws(subject, case, answer, _words({**variant, **storage}), settings)
        if not asked:
            raise Skip(reason)
        if not start:
            yield from _fan_in(subject, case)

    return run


def _answered(
    subject: GuardedImplementation, case: Case, shape: tuple[int, int], settings: dict[str, Any]
) -> dict[str, Array]:
    """W, and what an adapter of rank 4 starts with, in long double."""
    m, n = shape
    W = case.rng().standard_normal(shape).astype(DTYPES[case.dtype])
    seed = 7 * case.seed + case.number
    answer = subject.call("init", W, r=4, alpha=10.0, seed=seed, **settings)
    shapes: dict[str, tuple[int, ...]] = {"A": (4, n), "B": (m, 4)}
    shapes |= {"magnitude": (m,)} if settings.get("use_dora") else {}
    shapes |= {"lora_bias": (m,)} if settings.get("lora_bias") else {}
    if absent := [name for name in shapes.keys() - {"A", "B"} if name not in answer]:
        raise Skip(f"not supported: init answers no {absent[0]}")
    parts = {
        name: subject.answer(subject.entry(answer, name), name, expected, case.dtype)
        for name, expected in shapes.items()
    }
    base = subject.answer(answer["W"], "W", shape, case.dtype) if "W" in answer else W
    return {name: long(v) for name, v in {**parts, "base": base, "W": W}.items()}


def _laws(
    subject: GuardedImplementation,
    case: Case,
    given: dict[str, Array],
    words: str,
    settings: dict[str, Any],
) -> Iterable[Comparison]:
    A, B, base, W = (given[name] for name in ("A", "B", "base", "W"))
    r, n = A.shape
    s = scale(10.0, r, settings.get("use_rslora", False))
    u = unit_roundoff(subject.precision(case.dtype).storage)
    terms = s * (np.abs(B) @ np.abs(A))
    bound = 2 * u * (np.abs(base) + np.abs(W) + (r + 3) * terms)
    if settings.get("init_lora_weights") == "orthogonal":
        norms = np.sqrt((B * B).sum(1, keepdims=True) * (A * A).sum(0))
        bound = bound + ORTHOGONAL * r * r * u * s * norms
    V = base + s * (B @ A)
    if "magnitude" in given:
        norm = np.sqrt((V * V).sum(1, keepdims=True))
        lost = (n + 4) * u + np.sqrt((bound**2).sum(1, keepdims=True)) / norm
        V, bound = given["magnitude"][:, None] / norm * V, bound + 2 * lost * np.abs(V)
    yield Comparison(f"the weight at the start, {words}", V, W, bound.astype(np.float64), BOUND)
    if "lora_bias" in given:
        c = given["lora_bias"]
        yield Comparison(f"the bias of B at the start, {words}", c, np.zeros_like(c))


def _fan_in(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """The greatest entry of A is near 1/√n in both storages."""
    m, n, r = WIDE
    W = case.rng().standard_normal((m, n)).astype(DTYPES[case.dtype])
    for storage in STORAGES:
        try:
            answer = subject.call("init", W, r=r, alpha=10.0, seed=case.number, **storage)
        except Skip:
            continue
        A = subject.answer(subject.entry(answer, "A"), "A", (r, n), case.dtype)
        greatest = np.asarray(float(np.abs(A.astype(np.float64)).max() * n**0.5))
        allowed = np.asarray(0.05 + unit_roundoff(case.dtype))
        label = f"the greatest of √n |A|, {_words(storage)}"
        yield Comparison(label, greatest, np.asarray(0.95), allowed, CHANCE)


CHECKS: dict[str, tuple[str, Any]] = {
    f"fresh{f'.{start}' if start else ''}": (
        "A fresh adapter changes no output, with every variant, in both storages"
        + (f", started by {start}." if start else "."),
        fresh(start),
    )
    for start in STARTS
}
"""The checks: id, law and run."""
