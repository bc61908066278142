"""What may be wrong with a merge: one `Wrong` each, gathered from the modules beside this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from merge_catalogue.worlds import World

NAMING = frozenset({"partly", "permuted", "known-mistake", "coarser"})
"""Verdicts that name a mistake by their text, whatever the mistake."""


@dataclass(frozen=True)
class Wrong:
    """A way in which a merge goes wrong.

    ``make(world)``: the tensors of the wrong merge; with ``two`` ``make(world, second, weights)``;
    ``spoil(folder, world)`` instead changes the folder of a right merge. ``verdicts``: those that
    name it, with any of which ``says``, a regular expression, must be found in the verdict's name,
    its text, its mistake or the report's cause. ``where``: on which worlds it can happen.
    ``unreadable``: the folder may be refused (exit status 3) as well.
    """

    name: str
    text: str
    verdicts: frozenset[str]
    says: str
    where: Callable[[World], bool]
    make: Callable[..., Mapping[str, np.ndarray]] | None = None
    spoil: Callable[[Path, World], None] | None = None
    two: bool = False
    unreadable: bool = False


WRONGS: dict[str, Wrong] = {}


def linear(world):
    """Plain LoRA of linear layers."""
    return bool(world.sites) and {site.variant for site in world.sites} <= {"lora"}


def wrong(text, verdicts, says, where=linear, *, spoils=False, two=False, unreadable=False):
    """Enter a function under its name, with spaces for underscores."""

    def enter(function):
        name = function.__name__.strip("_").replace("_", " ")
        assert name not in WRONGS, name
        how = {"spoil": function} if spoils else {"make": function}
        WRONGS[name] = Wrong(
            name,
            text,
            frozenset(verdicts.split()) | NAMING,
            says,
            where,
            **how,
            two=two,
            unreadable=unreadable,
        )
        return function

    return enter


def has(*kinds):
    """On plain LoRA that adapts modules of all these names."""
    return lambda world: linear(world) and set(kinds) <= {site.kind for site in world.sites}


def layers(least):
    """On plain LoRA in at least so many layers."""
    return lambda world: linear(world) and len({s.layer for s in world.sites} - {None}) >= least


def variant(name):
    """On adapters of that variant."""
    return lambda world: any(site.variant == name for site in world.sites)
