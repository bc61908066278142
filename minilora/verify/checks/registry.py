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
from minilora.verify.core.types import Check
from minilora.verify.diagnosis.diagnose import diagnose, follows

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
                diagnose=partial(diagnose, level, check) if level.is_diagnosed(check) else None,
                follows=partial(follows, level, check),
            )


CHECKS: tuple[Check, ...] = tuple(assembled(LEVELS))
