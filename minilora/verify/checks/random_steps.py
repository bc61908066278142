"""Random steps of a session, and the search for the shortest ones that fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from hypothesis import strategies as st

from minilora.verify.checks.session_inputs import EXCLUSIVE, NAMES, draw_inputs, wide
from minilora.verify.checks.session_run import SessionRun, Step, next_state, step_words
from minilora.verify.core.errors import Fault, Skip, tidy
from minilora.verify.core.fixed import FREE, Fixed
from minilora.verify.core.shrinking import Budget, Smallest, shrunk
from minilora.verify.core.types import Case
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.sessions import LayerState

STEPS = 12
"""The number of random steps of a case, and the greatest of a search."""

MAX_WALKS = 300
"""The maximum number of sequences that the search for the shortest one tries."""

CHECK = "lifecycle.random-steps"


def draw_steps(
    run: SessionRun, kind: str, rng: np.random.Generator, files: bool = False
) -> Iterator[Step]:
    """Random steps; half of them use what is there. ``files``: with saving and loading."""
    for _ in range(STEPS):
        known, names = list(run.state.adapters), NAMES[: run.subject.fixed.adapters]
        new = [name for name in names if name not in known]
        if not known or (new and rng.random() < 0.2):
            yield _new_adapter(run, new, rng, kind)
        else:
            yield _step_with(known, kind, rng, files)


def _new_adapter(run: SessionRun, new: list[str], rng: np.random.Generator, kind: str) -> Step:
    """An adapter that is added, perhaps with another's arrays, or loaded where some are saved."""
    name = str(rng.choice(new))
    if run.saved and rng.random() < 0.7:
        return "load", name, str(rng.choice([*run.saved]))
    if kind not in (*EXCLUSIVE, "dora") and rng.random() < 0.3:
        return "add", name, str(rng.choice([*run.inputs.adapters]))
    return "add", name


def _step_with(known: list[str], kind: str, rng: np.random.Generator, files: bool) -> Step:
    """A step with the adapters that are there, the usual ones more often."""
    some = [name for name in known if rng.random() < 0.6]
    if kind in EXCLUSIVE and {"one", "two"} <= {*some}:
        some.remove(str(rng.choice(["one", "two"])))
    name = str(rng.choice(known))
    factor = float(rng.choice([0.5, 2.0, -1.0]))
    steps: list[Step] = [("activate", some)] * 4 + [("merge",)] * 3 + [("unmerge",)] * 3
    steps += [("disable",), ("train",), ("eval",), ("delete", name)]
    # Of DoRA another scale is another norm, which is not an integer.
    steps += [("merge",) if kind == "dora" and name != "one" else ("scale", name, factor)]
    steps += [("save", name)] * 4 + [("delete", name)] * 2 if files else []
    return steps[rng.integers(len(steps))]


def possible_steps(state: LayerState, kind: str, fixed: Fixed = FREE) -> list[Step]:
    """Every step that is valid in a state, the simplest first."""
    known = list(state.adapters)
    groups = [list(some) for n in range(len(known) + 1) for some in combinations(known, n)]
    steps: list[Step] = [("add", name) for name in NAMES[: fixed.adapters] if name not in known]
    steps += [("activate", some) for some in groups if not _is_excluded(some, kind)]
    steps += [("merge",), ("unmerge",), ("disable",), ("train",), ("eval",)]
    steps += [("delete", name) for name in known]
    if kind != "dora":
        steps += [("scale", name, factor) for name in known for factor in (2.0, 0.5, -1.0)]
    return steps


def _is_excluded(names: Sequence[str], kind: str) -> bool:
    """Whether these adapters may not be active at once."""
    return kind in EXCLUSIVE and {"one", "two"} <= {*names}


@st.composite
def walks(draw: st.DrawFn, kind: str, fixed: Fixed) -> list[Step]:
    """Up to `STEPS` steps, each possible where it is taken."""
    inputs = draw_inputs(kind, Case(CHECK, "float64", 1, 0, fixed), bias=True)
    state, steps = LayerState.of(wide(inputs.layer)), list[Step]()
    for _ in range(draw(st.integers(1, STEPS))):
        steps.append(draw(st.sampled_from(possible_steps(state, kind, fixed))))
        state = next_state(state, inputs, {}, steps[-1]) or state
    return steps


def fewest_steps(kind: str) -> Smallest:
    """Finds the fewest steps to a wrong output, or to an error."""

    def smallest(subject: GuardedImplementation, dtype: str) -> dict[str, Any] | None:
        fixed = subject.fixed
        budget, case = Budget(MAX_WALKS), Case(CHECK, dtype, 1, 0, fixed)
        failing: list[tuple[list[Step], dict[str, Any]]] = []

        def fails(steps: list[Step]) -> bool:
            if not budget.spend():
                return False
            shown = _deviation(SessionRun.of(subject, case, kind=kind), steps)
            if shown:
                failing.append((steps[: shown.pop("count")], shown))
            return bool(shown)

        def shortest() -> tuple[list[Step], dict[str, Any]]:
            return min(failing, key=lambda pair: len(pair[0]))

        with contextlib.suppress(Skip):
            shrunk(walks(kind, fixed), fails)
        if not failing:
            return None
        # A step may have been drawn only for what it makes possible afterwards.
        while any(fails(steps) for steps in _without_one(kind, shortest()[0], fixed)):
            pass
        return shortest()[1]

    return smallest


def _deviation(run: SessionRun, steps: Sequence[Step]) -> dict[str, Any]:
    """The steps up to the first wrong output, and their count; nothing if there is none."""
    done: list[str] = []
    for count, step in enumerate(steps, 1):
        words = step_words(step)
        try:
            done.append(words if run.take(step) else f"{words} refused")
            judged = run.compare("").judge()
        except Fault as fault:
            taken = " ".join([*done, words][:count])
            return {"count": count, "steps": taken, "got": tidy(str(fault))}
        if judged.verdict == "fail":
            at = f"y{list(judged.index)}"
            shown = {"count": count, "steps": " ".join(done), "array": at, "got": judged.got}
            return shown | {"want": judged.want}
    return {}


def _without_one(kind: str, steps: list[Step], fixed: Fixed) -> Iterator[list[Step]]:
    """The steps without one of them, the last first, where the others are possible still."""
    inputs = draw_inputs(kind, Case(CHECK, "float64", 1, 0, fixed), bias=True)
    for i in reversed(range(len(steps))):
        fewer, state = steps[:i] + steps[i + 1 :], LayerState.of(wide(inputs.layer))
        for step in fewer:
            if step not in possible_steps(state, kind, fixed):
                break
            state = next_state(state, inputs, {}, step) or state
        else:
            yield fewer
