"""The command that repeats a case of a report, or all cases of a level."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from minilora.verify.plan import CheckPlan


def reproduce(command: Sequence[str] | None, case: str, seed: int) -> str:
    """The command, or the call in Python, that repeats one case."""
    if command is None:
        return f'minilora.verify.check(implementation, case="{case}", seed={seed})'
    return shlex.join([*command, "--case", case, "--seed", str(seed)])


def reproduce_all(command: Sequence[str] | None, p: CheckPlan, profile: str) -> str:
    """The same of all cases of a level in a dtype, for what no case shows alone."""
    level, dtype = p.check.level, p.dtype
    if command is None:
        chosen = f"levels=[{level!r}], dtypes=[{dtype!r}], profile={profile!r}, seed={p.seed}"
        return f"minilora.verify.check(implementation, {chosen})".replace("'", '"')
    options = ["--level", level, "--dtype", dtype, "--profile", profile, "--seed", str(p.seed)]
    return shlex.join([*command, *options])


def reproduce_run(command: Sequence[str] | None, p: CheckPlan, profile: str) -> str:
    """The same of all cases of the run."""
    if command is None:
        return f'minilora.verify.check(implementation, profile="{profile}", seed={p.seed})'
    return shlex.join([*command, "--profile", profile, "--seed", str(p.seed)])
