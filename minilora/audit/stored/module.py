"""What a file holds of one module, and what it holds of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minilora.findings.stored import StoredAdapter, StoredModule
from minilora.spec.ops import Array

MOST_RANK, MOST_BYTES = 2**12, 2**31
"""Factors of a greater rank, or of more bytes, are not multiplied."""


@dataclass(frozen=True)
class Held:
    """A tensor in a file: its name there, dtype and shape, and what reads it as it lies.

    ``rows``: what reads entries along the first axis; ``spacing``: how far apart the numbers lie
    that a quantizer can store, for each entry, and ``scheme`` its name; None of plain numbers.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], Array] = field(repr=False)
    rows: Callable[[int, int], Array] | None = field(default=None, repr=False)
    spacing: Callable[[], Array] | None = field(default=None, repr=False)
    scheme: str | None = None

    def blocks(self, entries: int = 2**22) -> Iterator[Array]:
        """Its numbers, so many or one row at a time."""
        if self.rows is None or len(self.shape) < 2:
            yield self.read()
            return
        step = max(1, entries // max(1, math.prod(self.shape[1:])))
        for start in range(0, self.shape[0], step):
            yield self.rows(start, min(start + step, self.shape[0]))

    @property
    def nbytes(self) -> int:
        """What its numbers take in their dtype."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class OpenModule:
    """What a file holds of one module.

    ``name``: its path, as the file has it; ``parts``: the tensors by the parameter's name in the
    specification (A, B, magnitude, lora_bias, …), or weight, bias and tokens of a saved module;
    ``kind``: as `findings.stored.StoredModule` has it, or shared of VeRA's A and B; ``scale``: the
    factor of B A, None where no file says it; ``transposed``: A and B lie as (n, r) and (r, m);
    ``experts``: so many matrices lie side by side in A and B; ``config``: the settings that led to
    the scale.
    """

    name: str
    parts: Mapping[str, Held]
    kind: str = "linear"
    scale: float | None = 1.0
    transposed: bool = False
    experts: int = 1
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_measurable(self) -> bool:
        """Whether products of its factors take no more time and memory than anybody has."""
        return self.rank <= MOST_RANK and all(
            self.parts[part].nbytes <= MOST_BYTES for part in "AB"
        )

    @property
    def is_adapted(self) -> bool:
        """Whether it has both factors, in shapes that go together."""
        both = {"A", "B"} <= self.parts.keys() and self.kind != "shared"
        return both and not self.misfit

    @property
    def misfit(self) -> str:
        """What is wrong with the shapes of A and B, or nothing."""
        if not {"A", "B"} <= self.parts.keys():
            return ""
        A, B = (self.parts[part].shape for part in "AB")
        said = f"A has the shape {A} and B {B}"
        if len(A) < 2 or len(B) < 2 or 0 in (*A, *B):
            return f"{said}, expected matrices"
        return "" if self._rank_of("A") == self._rank_of("B") else f"{said}: of other ranks"

    def _rank_of(self, part: str) -> int:
        """The rank by the shape of A or B."""
        shape = self.parts[part].shape
        first = (part == "A") != self.transposed
        return shape[0] if first else shape[1]

    @property
    def rank(self) -> int:
        """The rank of each matrix; 0 without A."""
        if not self.is_adapted:
            return 0
        return self._rank_of("A") // self.experts

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of each matrix; of what has no factors (0, 0)."""
        if not self.is_adapted:
            return 0, 0
        A, B = (self.parts[part].shape for part in "AB")
        if self.transposed:
            A, B = A[::-1], B[::-1]
        return B[0], math.prod(A[1:])

    def pairs(self) -> list[tuple[Array, Array]]:
        """A (r, n) and B (m, r) of each matrix, in the file's dtype; AdaLoRA's A with its E."""
        A, B = (self.parts[part].read() for part in "AB")
        if "E" in self.parts:
            A = A.astype(np.float64) * self.parts["E"].read().reshape(-1, 1)
        return self.split(A, B)

    def split(self, A: Array, B: Array) -> list[tuple[Array, Array]]:
        """The same of arrays that lie as the file's do."""
        if self.transposed:
            A, B = A.T, B.T
        A, B = A.reshape(len(A), -1), B.reshape(len(B), -1)
        if self.experts == 1:
            return [(A, B)]
        # A's rows lie expert by expert, B's columns rank by rank.
        As = A.reshape(self.experts, -1, A.shape[1])
        Bs = B.reshape(len(B), -1, self.experts).transpose(2, 0, 1)
        return list(zip(As, Bs, strict=True))


@dataclass(frozen=True)
class OpenAdapter:
    """What the files of an adapter hold.

    ``format``: peft, mlx, gguf, kohya or loralib; ``settings``: as they are stored; ``others``:
    tensors that are no parameter of an adapter that is known, with the reason; ``tensors``: all by
    their names in the file.
    """

    path: Path
    format: str
    settings: Mapping[str, Any]
    modules: Sequence[OpenModule]
    others: Mapping[str, str] = field(default_factory=dict)
    files: frozenset[str] = frozenset()
    tensors: Mapping[str, Held] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> dict[str, OpenModule]:
        """The modules by their names."""
        return {module.name: module for module in self.modules}

    @property
    def adapted(self) -> list[OpenModule]:
        """The modules with both factors."""
        return [module for module in self.modules if module.is_adapted]

    @property
    def nbytes(self) -> int:
        """What all tensors take."""
        return sum(held.nbytes for module in self.modules for held in module.parts.values())

    def facts(
        self, base: Mapping[str, Any] | None = None, base_modules: frozenset[str] | None = None
    ) -> StoredAdapter:
        """What findings ask of it."""
        modules = tuple(
            StoredModule(
                m.name,
                frozenset(m.parts),
                m.kind,
                m.rank,
                1.0 if m.scale is None else m.scale,
                _shape(m),
            )
            for m in self.modules
            if m.kind != "shared"
        )
        return StoredAdapter(self.format, self.settings, modules, base, base_modules, self.files)


def _shape(module: OpenModule) -> tuple[int, ...]:
    if module.is_adapted:
        return (module.experts, *module.shape) if module.kind == "expert" else module.shape
    return next(iter(module.parts.values())).shape
