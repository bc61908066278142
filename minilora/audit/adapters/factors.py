"""One module's adapter as a file has it -> the changes of the base's tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from minilora.audit.change import Change
from minilora.audit.result import Entry
from minilora.audit.tensors import TensorStore
from minilora.io.architectures import ARCHITECTURES
from minilora.io.lazy_weights import Expanded
from minilora.spec.lora import LORA, Variant
from minilora.spec.ops import Array
from minilora.spec.variants import part_shapes

Read = Callable[[], Array]

_CONV1D = {a.model_type for a in ARCHITECTURES.values() if a.transposed} | {
    "openai-gpt",
    "imagegpt",
    "decision_transformer",
}
"""The model types whose projections lie (in, out), as transformers' Conv1D has them."""


@dataclass(frozen=True)
class Factors:
    """One module's adapter.

    ``module``: its path in the base; ``parts``: the variant's parameters by name, each read when it
    is called; ``shapes``: theirs in the file; ``table``: A and B are of an embedding, whose weight
    is the transpose; ``whole``: a tied table that a head without a weight of its own adapts.
    """

    module: str
    parts: Mapping[str, Read]
    shapes: Mapping[str, tuple[int, ...]]
    scale: float
    variant: Variant = LORA
    table: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The rank of A, 0 where nothing is left of it."""
        return self.shapes["A"][0]


def changes_of(factors: Factors, base: TensorStore, name: str) -> list[Change] | Entry:
    """What the adapter ``name`` changes of the module's tensors; an entry if nothing fits."""
    tensor = base.weight_of(factors.module)
    if tensor is None:
        found = expert_changes(factors, base, name)
        return found if found else _no_module(factors, base)
    shape = base[tensor].shape
    if len(shape) < 2 or (factors.table and len(shape) != 2):
        return _wrong(factors, f"{tensor} has the shape {shape}, which takes no such adapter")
    m, n = shape[0], math.prod(shape[1:])
    transposed = factors.table or _lies_transposed(factors, base, m, n)
    if transposed:
        m, n = n, m
    parts = _flat_parts(factors, m, n)
    if isinstance(parts, str):
        return _wrong(factors, f"{parts}; {tensor} has the shape {shape}")
    kind = "embedding" if factors.table else "conv" if len(shape) > 2 else "linear"
    change = Change(
        tensor, factors.module, parts, kind, factors.variant, float(factors.scale),
        transposed=transposed, adapter=name, config=factors.config,
    )  # fmt: skip
    return with_bias(change, base)


def with_bias(change: Change, base: TensorStore) -> list[Change]:
    """The change of the weight, and that of the bias where the variant has one."""
    if "c" not in change.parts:
        return [change]
    bias = change.tensor.removesuffix("weight") + "bias"
    entries: dict[str, Any] = {part: _reader(change.parts, part) for part in ("A", "B")}
    weight = replace(change, variant=LORA, parts=Expanded(entries))
    parts = Expanded({"c": _reader(change.parts, "c")})
    return [weight, replace(change, tensor=bias, kind="bias", parts=parts, transposed=False)]


def _reader(parts: Mapping[str, Array], name: str) -> Read:
    return lambda: parts[name]


def _flat_parts(factors: Factors, m: int, n: int) -> Expanded | str:
    """The parts as the equation takes them; what does not fit, in words."""
    r = factors.rank
    wanted = part_shapes(factors.variant, r, m, n)
    if odd := wanted.keys() ^ factors.shapes.keys():
        return f"found {sorted(factors.shapes)}, expected {sorted(wanted)} ({sorted(odd)})"
    entries: dict[str, Any] = {}
    for part, shape in wanted.items():
        stored = factors.shapes[part]
        fits = stored[:1] == shape[:1] or (part not in "AB" and math.prod(stored) == shape[0])
        if math.prod(stored) != math.prod(shape) or not fits:
            return f"{part} has the shape {stored}, expected {shape} at rank {r}"
        entries[part] = _shaped(factors.parts[part], shape)
    return Expanded(entries)


def _shaped(read: Read, shape: tuple[int, ...]) -> Read:
    return lambda: read().reshape(shape)


def _lies_transposed(factors: Factors, base: TensorStore, m: int, n: int) -> bool:
    """Whether the weight lies (in, out): by the shapes, and where it is square by the model."""
    if len(factors.shapes["A"]) != 2:
        return False
    A, B = (math.prod(factors.shapes[part]) // max(factors.rank, 1) for part in "AB")
    if m != n:
        return (n, m) == (B, A)
    kind = base.settings.get("model_type")
    return kind in _CONV1D if kind else bool(factors.config.get("fan_in_fan_out"))


def expert_changes(factors: Factors, base: TensorStore, name: str) -> list[Change]:
    """The changes of experts' matrices, which one adapter holds side by side; [] if none fit."""
    return []


def _no_module(factors: Factors, base: TensorStore) -> Entry:
    text = f"the base has no {factors.module}.weight: this part of the adapter is applied nowhere"
    return Entry(factors.module, "wrong", text, {"module": factors.module})


def _wrong(factors: Factors, text: str) -> Entry:
    return Entry(factors.module, "wrong", f"it does not fit the base: {text}")
