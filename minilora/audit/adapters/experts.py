"""PEFT's adapters of experts: one pair of factors for all matrices of a parameter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from minilora.audit.change import Change
from minilora.audit.tensors import TensorStore
from minilora.io.formats.peft.layers import from_tensors
from minilora.io.lazy_weights import Expanded
from minilora.spec.lora import LORA
from minilora.spec.ops import Array

if TYPE_CHECKING:
    from minilora.audit.adapters.factors import Factors

_TRANSPOSED = ("gpt_oss", "llama4", "llama4_text")
"""The model types whose experts lie (experts, in, out), whatever the shape."""

_SPLIT = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of an expert's matrices in files that have them one by one: gate, up and down."""


def expert_changes(factors: Factors, base: TensorStore, name: str) -> list[Change]:
    """The changes of experts' matrices, which one adapter has side by side; [] if none fit.

    ``target_parameters`` wraps a module once for each parameter: the module's name has a
    ``base_layer`` for each wrapper around the inner ones, and the parameter is found by its shape.
    A checkpoint may hold the experts' matrices one by one, and gate and up apart.
    """
    if factors.variant is not LORA or len(factors.shapes["A"]) != 2:
        return []
    module, depth = _unwrapped(factors.module)
    fused = _fused(module, depth, factors, base, name)
    return fused or _one_by_one(module, factors, base, name)


def _unwrapped(module: str) -> tuple[str, int]:
    """The module without its wrappers, and how many there are around this one."""
    plain = re.sub(r"(\.base_layer)+$", "", module)
    return plain, module.count(".base_layer")


def _fused(module: str, depth: int, factors: Factors, base: TensorStore, name: str) -> list[Change]:
    """The changes of a parameter (experts, ·, ·) of the module."""
    rows, columns = factors.shapes["B"][0], factors.shapes["A"][1]
    fitting = []
    for tensor in base.parameters_of(module):
        shape = base[tensor].shape
        total = factors.shapes["A"][0]
        if len(shape) == 3 and total % shape[0] == 0 and {rows, columns} == {*shape[1:]}:
            fitting.append(tensor)
    if not fitting:
        return []
    # The outermost wrapper is that of the parameter that was named last.
    fitting.sort(key=lambda tensor: "down" in tensor)
    tensor = fitting[max(0, len(fitting) - 1 - depth)] if len(fitting) > 1 else fitting[0]
    experts, first, second = base[tensor].shape
    square = first == second
    kind = base.settings.get("model_type")
    transposed = kind in _TRANSPOSED if square else (first, second) != (rows, columns)
    every = _Experts(factors, experts)
    return [
        Change(
            tensor, module, Expanded(_parts(every, e)), "expert", LORA, factors.scale,
            transposed=transposed, index=e, adapter=name, config=factors.config,
        )
        for e in range(experts)
    ]  # fmt: skip


def _one_by_one(module: str, factors: Factors, base: TensorStore, name: str) -> list[Change]:
    """The changes of matrices that a checkpoint holds one by one: ``experts.0.up_proj.weight``."""
    for gate, up, down in _SPLIT:
        places = [base.find(f"{module}.0.{part}.weight") for part in (gate, up, down)]
        if None in places:
            continue
        stem = str(places[0]).removesuffix(f"0.{gate}.weight")
        experts = 0
        while f"{stem}{experts}.{gate}.weight" in base:
            experts += 1
        of_gate, of_down = (base[f"{stem}0.{part}.weight"].shape for part in (gate, down))
        shape = factors.shapes["B"][0], factors.shapes["A"][1]
        if factors.shapes["A"][0] % experts:
            return []
        whole: list[tuple[str, slice | None]] = [(down, None)] if shape == of_down else []
        half = of_gate[0]
        if shape == (2 * half, of_gate[1]):
            whole = [(gate, slice(0, half)), (up, slice(half, 2 * half))]
        every = _Experts(factors, experts)
        return [
            Change(
                f"{stem}{e}.{part}.weight", f"{module}.{e}.{part}", Expanded(_parts(every, e, at)),
                "linear", LORA, factors.scale, adapter=name, config=factors.config,
            )
            for e in range(experts)
            for part, at in whole
        ]  # fmt: skip
    return []


@dataclass(frozen=True, eq=False)
class _Experts:
    """The factors of all experts, side by side in one file."""

    factors: Factors
    experts: int


@lru_cache(maxsize=4)
def _split(of: _Experts) -> list[tuple[Array, ...]]:
    """A and B of each expert; the last few are kept, since each expert asks for its own."""
    A, B = of.factors.parts["A"](), of.factors.parts["B"]()
    tensors = {"lora_A.weight": A, "lora_B.weight": B}
    return from_tensors(LORA, "experts", tensors, of.experts)


def _parts(of: _Experts, e: int, rows: slice | None = None) -> dict[str, Any]:
    """A and B of one expert, of some rows."""
    return {
        "A": lambda: _split(of)[e][0],
        "B": lambda: _split(of)[e][1] if rows is None else _split(of)[e][1][rows],
    }
