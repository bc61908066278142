"""What the answers of a module are made of, and the mistakes that dropped samples show.

A layer that is linear in its weight gives y of the base and of each part of the adapter: of each
expert, projection or entry of a kernel. How often each acts can be read off a wrong y.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product

import numpy as np

from minilora.verify.checks.module_inputs import ROUNDED, ModuleInputs, wide
from minilora.verify.checks.module_layers import LAYERS, by_substitution, merged
from minilora.verify.diagnosis.composition import is_made_of

Array = np.ndarray

Parts = Callable[[], Mapping[str, Array]]


def parts_of(inputs: ModuleInputs, name: str, got: Array) -> Parts | None:
    """The parts of y, or of a merged W; None for other arrays, and where y is not linear in W.

    The base and the adapter, where those are enough to make ``got``; else its pieces.
    """
    if inputs.kind in ROUNDED or name not in ("y", "W"):
        return None
    read = _output if name == "y" else _weight

    def parts() -> Mapping[str, Array]:
        base = read(_without_adapter(inputs))
        names = {"y": "the base", "W": "the base's W"}
        whole = {names[name]: base, "the adapter": read(inputs) - base}
        if is_made_of(wide(got), whole):
            return whole
        pieces = {words: read(piece) - base for words, piece in _pieces(inputs)}
        return {names[name]: base, **{words: v for words, v in pieces.items() if v.any()}}

    return parts


def _output(inputs: ModuleInputs) -> Array:
    y: Array = LAYERS[inputs.kind](inputs.module(wide), by_substitution)[0]
    return y


def _weight(inputs: ModuleInputs) -> Array:
    W: Array = merged(inputs.module(wide))["W"]
    return W


def _without_adapter(inputs: ModuleInputs) -> ModuleInputs:
    return inputs.with_adapter(B=np.zeros_like(inputs.adapter["B"]))


def _pieces(inputs: ModuleInputs) -> Iterator[tuple[str, ModuleInputs]]:
    """Layers with one part of the adapter each, where it has several that add up."""
    A, B = inputs.adapter["A"], inputs.adapter["B"]
    if "magnitude" in inputs.adapter:
        yield "the adapter", inputs
    elif inputs.kind == "experts":
        for e in range(len(B)):
            alone = np.where(np.arange(len(B))[:, None, None] == e, B, np.zeros_like(B))
            yield f"the adapter of expert {e}", inputs.with_adapter(B=alone)
    elif inputs.kind == "fused":
        sizes = zip(inputs.layer["rows"], inputs.adapter["enable"], strict=True)
        owner = np.concatenate([[i] * size for i, (size, on) in enumerate(sizes) if on])
        for i in dict.fromkeys(owner):
            alone = np.where((owner == i)[:, None], B, np.zeros_like(B))
            yield f"the adapter of projection {i}", inputs.with_adapter(B=alone)
    elif inputs.kind == "conv":
        kernel = inputs.layer["W"].shape[2:]
        of_entry = A.reshape(len(A), -1, int(np.prod(kernel)))
        for k, place in enumerate(product(*map(range, kernel))):
            alone = np.where(np.arange(of_entry.shape[-1]) == k, of_entry, np.zeros_like(of_entry))
            words = f"the adapter at the kernel's {list(place)}"
            yield words, inputs.with_adapter(A=alone.reshape(A.shape))
    else:
        yield "the adapter", inputs


def unscaled_of(kind: str) -> tuple[str, ...]:
    """The mutants that do not divide what dropout keeps by 1 - p, that of all kinds first."""
    own = {"conv": "conv-channels-not-rescaled", "fused": "fused-not-rescaled"}
    return tuple(f"module-{name}" for name in ("not-rescaled", own.get(kind, "")) if name)


def dropped_in_evaluation(inputs: ModuleInputs) -> tuple[str, ...]:
    """The mutants that drop in evaluation."""
    of_kind = [f"module-{inputs.kind}-dropout-in-evaluation"] * (inputs.kind in ("conv", "fused"))
    return ("module-dropout-in-evaluation", *of_kind)


def undropped_of(inputs: ModuleInputs) -> tuple[str, ...]:
    """The mutants without dropout in training."""
    names = ["dropout-never"]
    if inputs.kind == "conv":
        is_pointwise = int(np.prod(inputs.layer["W"].shape[2:])) == 1
        names += ["pointwise-without-dropout"] * is_pointwise + ["conv-without-dropout"]
    return tuple(f"module-{name}" for name in names)


def dropped_wrongly(
    inputs: ModuleInputs, y: Array, bases: list[Array], branches: list[Array], p: float
) -> tuple[str, ...]:
    """The mutants of which each sample of y is an answer.

    ``bases`` and ``branches`` are those of the inputs that a mask leaves: of none, either or both
    of a sample's numbers.
    """
    none, whole = bases[0], bases[-1]
    readings: list[tuple[tuple[str, ...], list[Array]]] = [
        (undropped_of(inputs), [whole + branches[-1]]),
        (unscaled_of(inputs.kind), [whole + branch for branch in branches]),
        (("module-one-over-p",), [whole + branch / p for branch in branches]),
        (
            ("module-dropout-on-base",),
            [
                none + (base - none + branch) / (1 - p)
                for base, branch in zip(bases, branches, strict=True)
            ],
        ),
    ]
    for names, ways in readings:
        axes = tuple(range(1, y.ndim))
        if np.stack([(y == way).all(axes) for way in ways]).any(0).all():
            return names
    at_output = np.stack([y == whole, y == whole + branches[-1] / (1 - p)])
    return ("module-dropout-on-output",) if at_output.any(0).all() else ()
