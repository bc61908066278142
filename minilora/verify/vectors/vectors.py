"""Test vectors: cases of the checks as files, for implementations that no Python can call.

The bytes of a set are the same on every machine: inputs are drawn from SHAKE-128
(`bigfloat.Shake`), true answers are computed exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from minilora.io.atomic import write_files
from minilora.io.files import pack_json
from minilora.verify.checks.names import MEANINGFUL, MEANINGLESS
from minilora.verify.checks.registry import CHECKS, LEVELS
from minilora.verify.core.bigfloat import Portable
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import UsageError, near
from minilora.verify.core.level import Draws, Level
from minilora.verify.core.types import Case, Check
from minilora.verify.engine import Progress
from minilora.verify.implementation.messages import split_arrays
from minilora.verify.plan import levels_of, require_known
from minilora.verify.vectors.call import Call
from minilora.verify.vectors.files import files, frozen
from minilora.verify.vectors.recorded import asked
from minilora.verify.vectors.tags import flags
from minilora.verify.vectors.truth import true_answers
from minilora.verify.vectors.vector import Vector, fingerprint

Array = np.ndarray

HOLD = {
    "bfloat16": ("float64", "float32", "bfloat16", "float16"),
    "float32": ("float64", "float32"),
    "float64": ("float64",),
}
"""The dtypes that inputs drawn in one of them are put to: those that hold them exactly."""


def level_of(check: str) -> Level:
    """The level of a check."""
    return next(level for level in LEVELS if check.startswith(f"{level.name}."))


def draws(check: str) -> Draws:
    """The cases of a check that become vectors."""
    return level_of(check).draws(check)


def name_of(check: str, drawn: str, number: int, seed: int) -> str:
    """The id of the vector of a case."""
    return f"{check}-{drawn}-{number}" + (f"-seed{seed}" if seed else "")


def make(check: Check, drawn: str, number: int, seed: int) -> Vector:
    """The vector of a case."""
    name = name_of(check.id, drawn, number, seed)
    method, given, taken = asked(check, Case(check.id, drawn, number, Portable(seed)))
    lane = "exact" if level_of(check.id).is_exact(check.id, number) else "rounding"
    settings_and_arrays = _flat(given)
    inputs = settings_and_arrays[1]
    held = HOLD[drawn] if not taken else (drawn,)  # files have one dtype
    dtypes = tuple(d for d in held if check.cases("ci", d) and _held(inputs, d))
    outputs, alternatives = true_answers(Call(method, given, lane, dtypes, name, taken))
    return Vector(
        id=name,
        check=check.id,
        level=check.level,
        method=method,
        settings=settings_and_arrays[0],
        inputs=inputs,
        drawn=drawn,
        lane=lane,
        dtypes=dtypes,
        outputs=outputs,
        flags=flags(check.id, method, given, drawn, lane),
        result="acceptable" if alternatives else "valid",
        alternatives=alternatives,
        files=taken,
    )


def _flat(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Array]]:
    arrays: dict[str, Array] = {}
    settings = split_arrays(given, (), arrays)
    return settings, arrays


def _held(arrays: Mapping[str, Array], dtype: str) -> bool:
    """Whether a dtype holds all of these numbers exactly."""
    floats = (v for v in arrays.values() if v.dtype.kind == "f")
    return all((v.astype(DTYPES[dtype]).astype(np.float64) == v).all() for v in floats)


INVALID: tuple[tuple[str, str, Callable[[dict[str, Array]], dict[str, Array]]], ...] = (
    (
        "multi.forward",
        "IndexBeyond",
        lambda a: {"index": np.where(a["index"] == a["index"].max(), 99, a["index"])},
    ),
    ("linear.forward", "RanksDiffer", lambda a: {"B": a["B"][:, :1]}),
)
"""The check whose first vector is spoiled, the flag that says how, and the change of its inputs."""


def _spoiled(valid: Vector, flag: str, change: Any) -> Vector:
    return replace(
        valid,
        id=f"{valid.id}-{flag}",
        inputs=valid.inputs | change(valid.inputs),
        outputs={},
        flags=(flag,),
        result="invalid",
    )


LISTS = ("names.targets.list", "names.trainable.plain")
"""The checks whose first vector is asked with configurations that mean nothing, too."""


def _meaningless(valid: Vector) -> Iterator[Vector]:
    """The names of a vector with each configuration that is to be refused."""
    for number, changes in enumerate(MEANINGLESS.values()):
        yield replace(
            valid,
            id=f"{valid.id}-Meaningless-{number}",
            settings=valid.settings | {"config": {**MEANINGFUL, **changes}},
            outputs={},
            flags=("Names", "Meaningless"),
            result="invalid",
        )


def vectors(
    levels: Sequence[str] | None = None,
    checks: Sequence[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Vector]:
    """The vectors of these levels and checks (patterns), in the order of the checks.

    Raises UsageError where a level or a check has none.
    """
    if seed < 0:
        raise UsageError(f"the seed is {seed}; expected 0 or more")
    planned = [
        (check, drawn, number)
        for check in _checks_with_vectors(levels, checks)
        for drawn, number in draws(check.id)
    ]
    made: list[Vector] = []
    for done, (check, drawn, number) in enumerate(planned):
        if progress:
            progress(f"{check.id}:", done, len(planned))
        made.append(make(check, drawn, number, seed))
    firsts = {vector.check: vector for vector in reversed(made)}
    spoiled = [_spoiled(firsts[c], flag, change) for c, flag, change in INVALID if c in firsts]
    lists = [firsts[check] for check in LISTS if check in firsts]
    return made + spoiled + [each for valid in lists for each in _meaningless(valid)]


def _checks_with_vectors(
    levels: Sequence[str] | None, patterns: Sequence[str] | None
) -> list[Check]:
    """The checks of these levels and patterns that have vectors. Raises UsageError."""
    checks = [check for check in CHECKS if draws(check.id)]
    names = [check.id for check in checks]
    for level in levels or ():
        require_known("level", level, levels_of(checks))
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            suggestion = near(pattern, names)
            raise UsageError(
                f"no vectors of {pattern!r}{suggestion}; there are: {', '.join(names)}"
            )
    return [check for check in checks if _is_chosen(check.level, check.id, levels, patterns)]


def _is_chosen(
    level: str, check: str, levels: Sequence[str] | None, patterns: Sequence[str] | None
) -> bool:
    """Whether a check is of these levels and fits one of these patterns; None is all."""
    fits = not patterns or any(fnmatchcase(check, pattern) for pattern in patterns)
    return fits and (not levels or level in levels)


def chosen(
    vectors: Sequence[Vector],
    levels: Sequence[str] | None = None,
    checks: Sequence[str] | None = None,
    case: str | None = None,
) -> list[Vector]:
    """The vectors of these levels and checks (patterns), or the one of this id.

    Raises UsageError where there is none.
    """
    if case is not None:
        found = [v for v in vectors if v.id == case]
    else:
        found = [v for v in vectors if _is_chosen(v.level, v.check, levels, checks)]
    if not found:
        asked = case or ", ".join([*(levels or ()), *(checks or ())])
        known = {name for v in vectors for name in (v.id, v.level, v.check)}
        raise UsageError(f"no vectors of {asked} in this set{near(asked, sorted(known))}")
    return found


def freeze(anew: bool = False) -> None:
    """Adds the vectors that are new to the frozen list; one that changed is an error.

    ``anew`` forgets the list first, which nobody may who has published a set.
    """
    made, known = vectors(), {} if anew else frozen()
    if not anew:
        files(made)
    now = {vector.id: fingerprint(vector) for vector in made}
    list_ = {"frozen.json": lambda: pack_json({**now, **known})}
    write_files(Path(__file__).parent, list_)
