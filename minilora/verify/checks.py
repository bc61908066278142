"""All checks, in the order in which a fault is easiest to find: the lowest level first."""

from dataclasses import replace
from functools import partial

from minilora.verify.diagnosis import diagnose
from minilora.verify.levels import (
    combine,
    files,
    gradflow,
    init,
    lifecycle,
    linear,
    merge,
    model,
    multi,
    optimizer,
    train,
    variants,
)
from minilora.verify.terms import Check

CHECKS: tuple[Check, ...] = tuple(
    replace(check, diagnose=partial(diagnose, check))
    for level in (
        linear,
        merge,
        variants,
        combine,
        multi,
        init,
        lifecycle,
        model,
        optimizer,
        train,
        gradflow,
        files,
    )
    for check in level.CHECKS
)
