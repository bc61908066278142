"""AdamW over several small arrays at once: there, calls cost more than arithmetic."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from minilora.spec.lora import Params, Weights
from minilora.spec.ops import Array
from minilora.spec.optim import AdamState, Rates, adamw, rates_of

JOINED = 2**16
"""About so many entries are worked on at a time."""


def fused_adamw(
    params: Weights, gradients: Weights, state: AdamState, lr: Rates, **options: Any
) -> tuple[Weights, AdamState]:
    """`optim.adamw`, the same bits: each step works on runs of arrays that are joined to one.

    ``options``: betas, eps, weight_decay.
    """
    rates, shapes = rates_of(lr, params), {name: p.shape for name, p in params.items()}
    new: Weights = {}
    new_m, new_v = Joined(shapes), Joined(shapes)
    for names in _alike(params, gradients, state, rates):
        at = names[0]
        p, g, m, v = (
            {at: _joined(arrays, names)} if at in arrays else {}
            for arrays in (params, gradients, state.m, state.v)
        )
        p, means = adamw(p, g, AdamState(state.t, m, v), {at: rates[at]}, **options)
        new |= _parted(p[at], names, shapes)
        new_m.runs[names], new_v.runs[names] = means.m[at], means.v[at]
    return new, AdamState(state.t + 1, new_m, new_v)


def _alike(
    params: Weights, gradients: Weights, state: AdamState, rates: Mapping[str, float]
) -> Iterator[tuple[str, ...]]:
    """The names in runs of one rate and one number system, of `JOINED` entries or one array."""
    run: list[str] = []
    size, before = 0, None
    for name, p in params.items():
        kind = rates[name], p.dtype, gradients[name].dtype, name in state.m
        if run and (kind != before or size + p.size > JOINED):
            yield tuple(run)
            run, size = [], 0
        run.append(name)
        size, before = size + p.size, kind
    if run:
        yield tuple(run)


class Joined(Mapping[str, Array]):
    """Arrays of which several are kept as one; each is cut out of it when it is asked for."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.runs: dict[tuple[str, ...], Array] = {}
        self.shapes = shapes

    def __getitem__(self, name: str) -> Array:
        for names, joined in self.runs.items():
            if name in names:
                return _parted(joined, names, self.shapes)[name]
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _joined(arrays: Params, names: tuple[str, ...]) -> Array:
    """These arrays as one: what is done entry by entry is done to all of them at once."""
    if isinstance(arrays, Joined) and names in arrays.runs:
        return arrays.runs[names]
    if len(names) == 1:
        return arrays[names[0]]
    return np.concatenate([arrays[name].ravel() for name in names])


def _parted(whole: Array, names: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """The arrays that `_joined` made one, each in its shape: parts of it, and no copies."""
    if len(names) == 1:
        return {names[0]: whole}
    parts: Weights = {}
    start = 0
    for name in names:
        end = start + math.prod(shapes[name])
        parts[name] = whole[start:end].reshape(shapes[name])
        start = end
    return parts
