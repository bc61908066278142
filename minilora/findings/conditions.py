"""Which adapters in files a finding concerns: conditions that several findings share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from minilora.findings.stored import StoredAdapter, StoredModule

Condition = Callable[[StoredAdapter], Sequence[str]]
"""The modules, tensors or settings of an adapter that are concerned."""

STARTS_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""The beginnings of ``init_lora_weights`` for which PEFT changes the base when it loads."""


def settings(*names: str) -> Condition:
    """Those of these settings that say something."""

    def said(adapter: StoredAdapter) -> list[str]:
        return [name for name in names if adapter.config.get(name) not in NOTHING]

    return said


NOTHING: tuple[object, ...] = (None, False, [], {}, "", "none")
"""The values of settings that say nothing."""


def parts(*names: str) -> Condition:
    """The modules with one of these parameters."""
    return lambda adapter: adapter.having(*names)


def one_factor(adapter: StoredAdapter) -> list[str]:
    """The modules of which one factor is missing."""
    return [m.name for m in adapter.modules if len(m.parts & {"A", "B"}) == 1]


def kinds(*names: str) -> Condition:
    """The modules of these kinds."""
    return lambda adapter: adapter.of_kind(*names)


def any_of(*conditions: Condition) -> Condition:
    """What one of the conditions concerns."""

    def concerned(adapter: StoredAdapter) -> list[str]:
        return list(dict.fromkeys(name for each in conditions for name in each(adapter)))

    return concerned


def other_type(adapter: StoredAdapter) -> list[str]:
    """``peft_type``, where it is another one than LoRA."""
    told = str(adapter.config.get("peft_type") or "LORA")
    return [] if told.upper() == "LORA" else [f"peft_type {told}"]


def start_in_base(adapter: StoredAdapter) -> list[str]:
    """``init_lora_weights``, where PEFT takes the start out of the base when it loads."""
    told = adapter.config.get("init_lora_weights")
    if isinstance(told, str) and told.lower().startswith(STARTS_FROM_BASE):
        return [f"init_lora_weights {told}"]
    return []


def not_in_base(adapter: StoredAdapter) -> list[str]:
    """The modules that the base lacks; none without a base."""
    if adapter.base_modules is None:
        return []
    return [m.name for m in adapter.modules if m.name not in adapter.base_modules]


def scaled_otherwise(scale: Callable[[StoredAdapter, StoredModule], float]) -> Condition:
    """The modules with factors for which ``scale`` is not the one that the adapter has."""

    def concerned(adapter: StoredAdapter) -> list[str]:
        return [m.name for m in adapter.adapted if differs(scale(adapter, m), m.scale)]

    return concerned


def differs(one: float, other: float) -> bool:
    """Whether two scales are apart by more than their roundings, a few units of float64."""
    return abs(one - other) > 8 * 2.0**-53 * max(abs(one), abs(other))


def ratio(
    scale: Callable[[StoredAdapter, StoredModule], float],
) -> Callable[[StoredAdapter, StoredModule], float]:
    """By what the scale of the library is greater than the adapter's; inf for an adapter of 0."""
    return lambda adapter, m: scale(adapter, m) / m.scale if m.scale else float("inf")


def alpha_of(adapter: StoredAdapter) -> float:
    """``lora_alpha``, 1 where there is none."""
    alpha = adapter.config.get("lora_alpha")
    return 1.0 if alpha is None else float(alpha)
