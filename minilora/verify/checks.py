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

LONG = ("lifecycle", "model", "train", "grad-flow", "files")
"""Levels of whole models and whole lives, whose cases take up to a hundred times as long."""

FEW = 2
"""One case of each lane."""


def _cases(check: Check, profile: str, dtype: str) -> int:
    """As many as the check has; where it has to be quick, what is long in float32 alone."""
    count = check.cases(profile, dtype)
    if profile == "quick" and dtype != "float32":
        return 0 if check.level in LONG else min(count, FEW)
    return count


CHECKS: tuple[Check, ...] = tuple(
    replace(check, cases=partial(_cases, check), diagnose=partial(diagnose, check))
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
