"""All checks, in the order in which a fault is easiest to find: the lowest level first."""

import re
from dataclasses import replace
from functools import partial

from minilora.verify.checks import (
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
from minilora.verify.core.types import Check
from minilora.verify.diagnosis.diagnose import diagnose

SHORT = ("linear", "merge")
"""Levels that have every dtype in the profile quick, with a case of each lane: others float32."""

QUICK = {
    "lifecycle": re.compile(r"lifecycle\.(\w|-)+"),
    "train": re.compile(r"train\.combined"),
    "grad-flow": re.compile(r"grad-flow\.(all-layers|dropout|zero-B)"),
}
"""Of levels whose cases are long, the checks that the profile quick has: what others build on."""


def _cases(check: Check, profile: str, dtype: str) -> int:
    """As many as the check has, or where it has to be quick fewer."""
    count = check.cases(profile, dtype)
    if profile != "quick":
        return count
    if check.level in QUICK and not QUICK[check.level].fullmatch(check.id):
        return 0
    if dtype != "float32":
        return min(count, 2) if check.level in SHORT else 0
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
