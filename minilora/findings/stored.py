"""What a finding may ask of an adapter in files: its settings, and what it has of each module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StoredModule:
    """What an adapter has of one module.

    ``parts``: the names of its tensors, as the specification has them: A, B, magnitude, lora_bias,
    E, lambda_d, lambda_b; of a module saved in full, weight and bias; tokens; ``kind``: linear,
    embedding, conv, expert, saved or tokens; ``rank``; ``scale``: the factor of B A that the
    adapter was trained with; ``shape``: (m, n) of the weight's matrix, or of the saved module.
    """

    name: str
    parts: frozenset[str]
    kind: str = "linear"
    rank: int = 0
    scale: float = 1.0
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in files.

    ``format``: peft, mlx, gguf, kohya or loralib; ``config``: its settings as they are stored;
    ``modules``; ``base``: the settings of the base's config.json, None where no base is given;
    ``base_modules``: the paths of the base's modules, None likewise.
    """

    format: str
    config: Mapping[str, Any]
    modules: tuple[StoredModule, ...]
    base: Mapping[str, Any] | None = None
    base_modules: frozenset[str] | None = None
    files: frozenset[str] = field(default_factory=frozenset)

    def having(self, *parts: str) -> list[str]:
        """The modules that have one of these parts."""
        return [m.name for m in self.modules if m.parts & {*parts}]

    def of_kind(self, *kinds: str) -> list[str]:
        """The modules of these kinds."""
        return [m.name for m in self.modules if m.kind in kinds]

    @property
    def adapted(self) -> list[StoredModule]:
        """The modules with both factors."""
        return [m for m in self.modules if m.parts >= {"A", "B"} and m.rank]
