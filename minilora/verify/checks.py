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

WHOLE = ("model", "train", "grad-flow", "files")
"""Levels of whole models, whose cases take a hundred times as long as a layer's."""


def _cases(check: Check, profile: str, dtype: str) -> int:
    """As many as the check has, but of whole models in float32 alone where it has to be quick."""
    if profile == "quick" and check.level in WHOLE and dtype != "float32":
        return 0
    return check.cases(profile, dtype)


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
