"""Wrong scales: by which other factor a change is applied, and what computes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from minilora.audit.change import Change
from minilora.spec.lora import scale


@dataclass(frozen=True)
class Settings:
    """What a change's configuration says of its scale; its own numbers where it says nothing."""

    change: Change

    def _number(self, name: str) -> float | None:
        value = self.change.config.get(name)
        return float(value) if isinstance(value, int | float) and value == value else None

    @property
    def r(self) -> int:
        """The module's rank."""
        found = self._number("r")
        if found:
            return int(found)
        A = self.change.parts.get("A")
        return 1 if A is None else len(A)

    @property
    def rslora(self) -> bool:
        """Whether the scale is alpha / √r."""
        return bool(self.change.config.get("use_rslora"))

    @property
    def alpha(self) -> float:
        """lora_alpha of the module: what gives its scale, if the configuration has none."""
        found = self._number("lora_alpha")
        return found if found is not None else self.change.scale / scale(1.0, self.r, self.rslora)

    @property
    def default_r(self) -> int:
        """The rank that rank_pattern replaces."""
        return int(self._number("default_r") or self.r)

    @property
    def default_alpha(self) -> float:
        """The alpha that alpha_pattern replaces."""
        return self._number("default_alpha") or self.alpha

    @property
    def dropout(self) -> float:
        """lora_dropout."""
        return self._number("lora_dropout") or 0.0


@dataclass(frozen=True)
class WrongScale:
    """A mistake that changes the scale alone: what stands for s, and what that is."""

    id: str
    text: str
    scale: Callable[[Settings, float], float]
    seen: tuple[str, ...] = ()


# fmt: off
WRONG_SCALES: tuple[WrongScale, ...] = (
    WrongScale("rslora-ignored", "alpha/r although use_rslora asks for alpha/√r",
               lambda c, s: scale(c.alpha, c.r, not c.rslora) if c.rslora else s,
               ("sglang 40835", "TensorRT-LLM 1668")),
    WrongScale("rslora-unasked", "alpha/√r although use_rslora is false",
               lambda c, s: scale(c.alpha, c.r, not c.rslora) if not c.rslora else s),
    WrongScale("rank-pattern-ignored", "the default rank in place of rank_pattern's",
               lambda c, s: scale(c.alpha, c.default_r, c.rslora)),
    WrongScale("alpha-pattern-ignored", "the default alpha in place of alpha_pattern's",
               lambda c, s: scale(c.default_alpha, c.r, c.rslora)),
    WrongScale("patterns-ignored", "the default rank and alpha in place of the patterns'",
               lambda c, s: scale(c.default_alpha, c.default_r, c.rslora)),
    WrongScale("no-scale", "B A without any scale", lambda c, s: 1.0),
    WrongScale("alpha-missing", "1/r: alpha is missing, or 1", lambda c, s: 1 / c.r),
    WrongScale("rank-missing", "alpha, not divided by the rank", lambda c, s: c.alpha),
    WrongScale("twice", "the change is applied twice", lambda c, s: 2 * s, ("peft 868", "trl 386")),
    WrongScale("negative", "the change is subtracted", lambda c, s: -s),
    WrongScale("half", "half of the change: a mean of base and merged", lambda c, s: s / 2),
    WrongScale("three-times", "the change is applied three times", lambda c, s: 3 * s),
    WrongScale("subtracted-twice", "the change is subtracted twice", lambda c, s: -2 * s),
    WrongScale("scale-squared", "s², the scale is applied twice", lambda c, s: s * s),
    WrongScale("scale-root", "√s, as on A or B alone", lambda c, s: math.sqrt(abs(s))),
    WrongScale("scale-inverse", "1/s: r/alpha in place of alpha/r", lambda c, s: 1 / s if s else s),
    WrongScale("divided-twice", "alpha/r²: divided by r once more", lambda c, s: s / c.r),
    WrongScale("root-of-rank", "1/√r: alpha is missing",
               lambda c, s: 1 / math.sqrt(c.r)),
    WrongScale("rank-in-place-of-alpha", "√r: alpha is taken as r, with alpha/√r",
               lambda c, s: math.sqrt(c.r)),
    WrongScale("scale-floored", "alpha // r, rounded down to a whole number",
               lambda c, s: float(c.alpha // c.r)),
    WrongScale("dropout-in-merge", "the change times 1 - lora_dropout",
               lambda c, s: s * (1 - c.dropout)),
    WrongScale("dropout-rescaled", "the change divided by 1 - lora_dropout",
               lambda c, s: s / (1 - c.dropout) if c.dropout < 1 else s),
    WrongScale("third", "a third of the change: alpha over the rank of three fused projections",
               lambda c, s: s / 3),
    WrongScale("quarter", "a quarter of the change", lambda c, s: s / 4),
    WrongScale("alpha-8", "PEFT's default lora_alpha of 8", lambda c, s: scale(8, c.r, c.rslora)),
    WrongScale("alpha-16", "an alpha of 16", lambda c, s: scale(16, c.r, c.rslora)),
    WrongScale("alpha-32", "an alpha of 32", lambda c, s: scale(32, c.r, c.rslora)),
    WrongScale("alpha-twice-rank", "alpha = 2 r", lambda c, s: scale(2 * c.r, c.r, c.rslora)),
    WrongScale("scale-20", "mlx-lm's default scale of 20", lambda c, s: 20.0),
    WrongScale("scale-10", "mlx-lm's former default scale of 10", lambda c, s: 10.0),
    WrongScale("ten-times", "ten times the change", lambda c, s: 10 * s),
)
# fmt: on
"""Every known wrong scale, what a configuration explains first."""


ROUNDED = 9 * 2.0**-53
"""How far a factor may be from 1 and be 1: it is the quotient of two scales, each of two divisions
and two roots at most, which is eight roundings with that of the quotient; γ₈ < 9 u."""


def named_factors(
    change: Change, others: Sequence[Change] = ()
) -> Iterator[tuple[WrongScale, float]]:
    """Each wrong scale as a factor of the right change, without those that are 1."""
    s, weight = change.scale, change.weight
    if not s or not weight:
        return
    d = change.config.get("embed_scale")
    if change.kind == "embedding" and "B" in change.parts:
        d = d or math.sqrt(len(change.parts["B"]))
        yield WrongScale("embedding-scaled", "times the embedding's own factor", lambda c, s: s), d
    if weight != 1:
        yield WrongScale("weight-ignored", "the adapter's weight is 1", lambda c, s: s), 1 / weight
        yield WrongScale("weight-squared", "the weight is applied twice", lambda c, s: s), weight
        root = math.sqrt(abs(weight))
        yield WrongScale("weight-root", "the root of the weight", lambda c, s: s), root / weight
    settings = Settings(change)
    for wrong in WRONG_SCALES:
        factor = wrong.scale(settings, s) / s
        if abs(factor - 1) > ROUNDED and math.isfinite(factor):
            yield wrong, factor
    scales = {other.scale for other in others} - {s}
    for other in sorted(scales)[:32]:
        text = f"the scale of another module, {other:g} in place of {s:g}"
        yield WrongScale("scale-of-another", text, lambda c, s: s), other / s
