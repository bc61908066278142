"""All levels and checks, in the order in which a fault is easiest to find: the lowest first."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

from minilora.verify.checks import (
    combine,
    files,
    gradflow,
    inference,
    init,
    lifecycle,
    linear,
    merge,
    model,
    module,
    multi,
    names,
    optimizer,
    precision,
    quantized,
    train,
    variants,
)
from minilora.verify.core.level import Level
from minilora.verify.core.types import Check, Diagnose
from minilora.verify.diagnosis.diagnose import diagnose, follows, shown

LEVELS: tuple[Level, ...] = tuple(
    module.LEVEL
    for module in (
        linear,
        merge,
        variants,
        precision,
        combine,
        multi,
        module,
        init,
        lifecycle,
        quantized,
        model,
        optimizer,
        train,
        gradflow,
        files,
        inference,
        names,
    )
)


def assembled(levels: Iterable[Level]) -> Iterator[Check]:
    """The checks of these levels, each with what its level says of it."""
    for level in levels:
        for check in level.checks:
            yield replace(
                check,
                cases=partial(level.count, check),
                is_relation=level.is_relation(check),
                is_chance=level.is_chance(check),
                diagnose=_diagnose(level, check),
                follows=partial(follows, level, check),
            )


def _diagnose(level: Level, check: Check) -> Diagnose | None:
    """What names the mistake: by its answers, or by what they show of chance."""
    if level.is_diagnosed(check):
        return partial(diagnose, level, check)
    return partial(shown, level, check) if level.is_chance(check) else None


CHECKS: tuple[Check, ...] = tuple(assembled(LEVELS))
