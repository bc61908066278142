"""What an implementation has fixed, so that cases are drawn to fit and all else is still asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minilora.verify.core.errors import LoadError, Skip, tidy

NAMES = ("alpha", "r", "adapters")

OPTIONAL = {
    "bias": "bias",
    "dropout": "dropout",
    "fan_in_fan_out": "conv1d",
    "use_rslora": "rslora",
}
"""What a target may lack, and declare as False, and the part of the id of a check that asks it."""

EXACT_SCALES = (0.25, 1.0, 4.0)
"""Scales with which no sum of small integers is rounded: powers of two whose roots are, too."""

MAX_RANK = 256


@dataclass(frozen=True)
class Fixed:
    """The settings of which a layer has one value, or a few.

    ``alpha``: ``"r"`` of a layer without a scale, whose s is 1; or a number. ``ranks``: those that
    it takes. ``adapters``: 1 of a layer that has one adapter at a time. None and () are free.
    ``lacking``: the settings of `OPTIONAL` that it does not have. ``mixtures``: the operands of
    several dtypes that it declares; whoever else is put the same case is put the same operands.
    """

    alpha: float | str | None = None
    ranks: tuple[int, ...] = ()
    adapters: int | None = None
    lacking: frozenset[str] = frozenset()
    mixtures: tuple[Any, ...] = ()

    @classmethod
    def of(cls, declared: Mapping[str, Any], target: str) -> Fixed:
        """What a target declares as ``fixed``. Raises LoadError."""
        alpha, r, adapters = (declared.get(name) for name in NAMES)
        ranks = tuple(r) if isinstance(r, list | tuple) else () if r is None else (r,)
        valid = {
            "alpha": alpha is None or alpha == "r" or (_is_number(alpha) and alpha != 0),
            "r": all(isinstance(k, int) and 1 <= k <= MAX_RANK for k in ranks)
            and r not in ([], ()),
            "adapters": adapters in (None, 1) and adapters is not True,
        } | {name: declared.get(name) is False for name in OPTIONAL}
        for name, value in declared.items():
            if not valid.get(name):
                raise LoadError(
                    f"{target}: fixed[{tidy(name)!r}] is {tidy(repr(value), 60)}; expected "
                    '{"alpha": "r"} of a layer without a scale, or a number; {"r": a rank or a '
                    f'list}}; {{"adapters": 1}}; False of {", ".join(OPTIONAL)}'
                )
        lacking = frozenset(name for name in OPTIONAL if name in declared)
        lacking |= {"use_rslora"} if alpha == "r" else set()
        return cls(alpha, ranks, adapters, lacking)

    def fitting(self, check: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a case without those that it lacks, unless the check is named after them.

        Raises Skip where the check asks several at once, and none is left.
        """
        parts = check.split(".")
        left = {
            name: value
            for name, value in options.items()
            if name not in self.lacking or OPTIONAL[name] in parts
        }
        if any(options.values()) and not any(left.values()) and parts[-1] == "all":
            raise Skip(f"not supported: it has none of {', '.join(options)}")
        return left

    def rank(self, r: int) -> int:
        """The rank next to r that there is."""
        return min(self.ranks, key=lambda k: (abs(k - r), k)) if self.ranks else r

    def alpha_of(self, alpha: float, r: int) -> float:
        """alpha, or what it always is with rank r."""
        if self.alpha is None:
            return alpha
        return float(r) if self.alpha == "r" else float(self.alpha)

    def exact(self, r: int, rslora: bool = False) -> tuple[int, float | None]:
        """The rank next to r that the exact lane may have, and s; None where s is free.

        A rank is a power of two, with rsLoRA of four. Raises Skip where there is none.
        """
        if self.alpha is None and not self.ranks:
            return r, None
        powers = [(4 if rslora else 2) ** i for i in range(5 if rslora else 9)]
        possible = [
            k
            for k in powers
            if k in (self.ranks or powers)
            and (self.alpha is None or self._scale(k, rslora) in EXACT_SCALES)
        ]
        if not possible:
            raise Skip(f"no case without rounding has {self.words()}")
        nearest = min(possible, key=lambda k: abs(k - r))
        return nearest, None if self.alpha is None else self._scale(nearest, rslora)

    def _scale(self, r: int, rslora: bool) -> float:
        return self.alpha_of(0.0, r) / (r**0.5 if rslora else r)

    def words(self) -> str:
        """What is fixed."""
        values = {"alpha": self.alpha, "r": list(self.ranks) or None, "adapters": self.adapters}
        return ", ".join(f"{name} fixed to {v}" for name, v in values.items() if v is not None)

    def refusal(self, arguments: Mapping[str, Any]) -> str:
        """Why a call with these arguments cannot be asked, or nothing."""
        for alpha, r in _scales_in(arguments):
            if self.ranks and r not in self.ranks:
                return f"the rank is {r}, and r is fixed to {', '.join(map(str, self.ranks))}"
            if self.alpha is not None and alpha != self.alpha_of(alpha, r):
                return f"alpha is {alpha:g} with rank {r}, and is fixed to {self.alpha}"
        adapters = arguments.get("adapters")
        if self.adapters and isinstance(adapters, list) and len(adapters) > self.adapters:
            return f"there are {len(adapters)} adapters, and it has one at a time"
        return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scales_in(arguments: Mapping[str, Any]) -> Iterator[tuple[float, int]]:
    """alpha and r of a call, or of the adapters that it is given."""
    adapter, several = arguments.get("adapter"), arguments.get("adapters")
    inner = several if isinstance(several, list) else [adapter]
    for given in (arguments, *inner):
        if isinstance(given, Mapping) and {"alpha", "r"} <= given.keys():
            yield given["alpha"], given["r"]


FREE = Fixed()
