"""Dropout in a session: it acts in training on the branch's input, and nowhere else.

The masks are the session's own. They are read off its answers: where s B A has one entry in a row
and in a column, y shows K ∘ x, and dx shows K. With the mask that is shown, every number is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from math import log, sqrt
from typing import Any

import numpy as np

from minilora.verify.checks.init import FALSE_ALARM
from minilora.verify.checks.session_inputs import SessionInputs, wide
from minilora.verify.checks.session_run import SessionRun, Step, gradient_name, opened, step_words
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.types import CHANCE, Case, Comparison
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray

RATE, KEPT = 0.75, 4.0
"""The rate p, and the multiplier of the entries that are kept, 1/(1 - p)."""

FEATURES, TOKENS, CALLS = 64, 2, 5
"""So many features that a mask which repeats is no chance, even one that all tokens share: it has
a probability of (1 - 2 p (1 - p))^64, less than 10^-13."""


def _inputs(case: Case) -> SessionInputs:
    """A layer, "one" with dropout and "two" without; of "one" s B A is a scaled permutation."""
    rng, dtype = case.rng(), DTYPES[case.dtype]
    m, n = FEATURES + 3, FEATURES

    def signs(*shape: int) -> Array:
        return rng.choice([-1.0, 1.0], shape)

    A = np.eye(n)[rng.permutation(n)] * signs(n)
    B = np.concatenate([np.eye(n)[rng.permutation(n)] * signs(n), np.zeros((m - n, n))])
    s = float(rng.choice([0.5, 2.0]))
    arrays = {"A": A, "B": B[rng.permutation(m)]}, {"A": signs(2, n), "B": signs(m, 2)}
    one, two = ({name: v.astype(dtype) for name, v in entry.items()} for entry in arrays)
    adapters = {
        "one": {**one, "r": n, "alpha": s * n, "p": RATE},
        "two": {**two, "r": 2, "alpha": 4.0},
    }
    layer = {"kind": "dropout", "W": signs(m, n).astype(dtype), "bias": signs(m).astype(dtype)}
    x = signs(TOKENS, n) * rng.integers(1, 3, (TOKENS, n))
    return SessionInputs(layer, adapters, x.astype(dtype), signs(TOKENS, m).astype(dtype))


class _Run:
    """A session with dropout beside its expected state, and what its masks were so far."""

    def __init__(self, subject: GuardedImplementation, case: Case) -> None:
        given = _inputs(case)
        self.run = SessionRun(subject, given, *opened(subject, given), case.dtype)
        self.done: list[str] = []
        self.masks: dict[str, list[Array]] = {"y": [], "dx": []}

    def take(self, *steps: Step) -> None:
        """The steps on both sides."""
        for step in steps:
            words = step_words(step)
            self.done.append(words if self.run.take(step) else f"{words} refused")

    @property
    def after(self) -> str:
        """All steps so far."""
        return " ".join(self.done)

    def evaluated(self, acts: str = "dropout-always") -> Comparison:
        """Without dropout, y is exact. ``acts`` is the mutant that drops all the same."""
        found = self.run.compare(self.after)
        if found.judge().verdict == "pass":
            return found
        x, session = self.run.inputs.x, self.run.session  # now: later the session has moved on
        first, *others = (np.asarray(session.call("forward", x)) for _ in range(CALLS))
        names = () if all(np.array_equal(first, y) for y in others) else (f"lifecycle-{acts}",)
        return replace(found, shows=lambda: names)

    def trained(self, never: str = "dropout-never") -> Iterator[Comparison]:
        """y with the mask that it shows itself, in several calls.

        ``never`` is the mutant that does not drop here, if there is one.
        """
        run, x = self.run, self.run.inputs.x
        change = self._change()
        at, columns = np.abs(change).argmax(0), np.arange(FEATURES)
        for _ in range(CALLS):
            y = run.session.answer(run.session.call("forward", x), "y", run_shape(run), run.dtype)
            without, _ = run.state.forward(wide(x), {"one": np.zeros(x.shape)})
            shown = (y - without)[:, at] / (change[at, columns] * wide(x))
            K = np.where(shown > KEPT / 2, KEPT, 0.0)
            self.masks["y"].append(K)
            want, _ = run.state.forward(wide(x), {"one": K})
            label = f"y in training, with the mask that it shows, after {self.after}"
            shows = partial(self._mistake, y, shown, never)
            yield Comparison(label, y, want, shows=shows)

    def _mistake(self, y: Array, shown: Array, never: str) -> tuple[str, ...]:
        """The mutant whose multipliers y shows: of the branch's input, or of the base's too."""
        layer, x = wide(self.run.inputs.layer), wide(self.run.inputs.x)
        whole = layer["W"] + self._change()
        of_both = np.linalg.lstsq(whole, (wide(y) - layer["bias"]).T, rcond=None)[0].T / x
        for name, multipliers, values in (
            (never, shown, (1.0,)),
            ("dropout-not-scaled", shown, (0.0, 1.0)),
            ("dropout-divided", shown, (0.0, 1 / RATE)),
            ("dropout-base", of_both, (0.0, KEPT)),
        ):
            near = np.stack([np.isclose(multipliers, v, atol=1e-6) for v in values])
            each = near.reshape(len(values), -1)
            if name and each.any(0).all() and each.any(1).all():
                return (f"lifecycle-{name}",)
        return ()

    def gradients(self) -> Iterator[Comparison]:
        """dx, dA and dB of one token, with the mask that dx shows."""
        run = self.run
        if not run.session.has("gradients"):
            return
        x, dy = run.inputs.x[:1], run.inputs.dy[:1]
        for _ in range(CALLS):
            answer = run.session.call("gradients", x, dy)
            got = {
                name: run.session.answer(
                    run.session.entry(answer, name, "gradients"),
                    gradient_name(name),
                    shape,
                    run.dtype,
                )
                for name, shape in self._shapes(x).items()
            }
            _, without = run.state.forward(wide(x), {"one": np.zeros(x.shape)})
            shown = (got["dx"] - without(wide(dy))["dx"]) / (wide(dy) @ self._change())
            K = np.where(shown > KEPT / 2, KEPT, 0.0)
            self.masks["dx"].append(K)
            _, back = run.state.forward(wide(x), {"one": K})
            want = back(wide(dy))
            for name, array in got.items():
                label = f"{gradient_name(name)} in training, with the mask that dx shows"
                yield Comparison(f"{label}, after {self.after}", array, want[name])

    def _change(self) -> Array:
        """s B A of the adapter with dropout."""
        adapter = wide(self.run.inputs.adapters["one"])
        change: Array = adapter["alpha"] / adapter["r"] * adapter["B"] @ adapter["A"]
        return change

    def _shapes(self, x: Array) -> dict[str, tuple[int, ...]]:
        adapter = self.run.inputs.adapters["one"]
        return {"dx": x.shape, "one.A": adapter["A"].shape, "one.B": adapter["B"].shape}

    def chance(self) -> Iterator[Comparison]:
        """The share that is kept, and that no two masks are the same.

        The share of N draws is off by more than ε with a probability of at most 2 exp(-2 N ε²)
        (Hoeffding). All tokens of a call may share a mask, so that N counts one token of each.
        """
        for array, masks in self.masks.items():
            if not masks:
                continue
            first = np.stack([K[0] for K in masks]) > 0
            allowed = np.asarray(sqrt(log(2 / FALSE_ALARM) / (2 * first.size)))
            share, want = np.asarray(first.mean()), np.asarray(1 - RATE)
            yield Comparison(
                f"the share of {array} that dropout keeps", share, want, allowed, CHANCE
            )
            same = sum(np.array_equal(a, b) for a, b in combinations(first, 2))
            label = f"how many {array} have the mask of an earlier one"
            yield Comparison(label, np.asarray(float(same)), np.zeros(()))


def run_shape(run: SessionRun) -> tuple[int, int]:
    """The shape of y."""
    return len(run.inputs.x), len(run.inputs.layer["W"])


def dropout(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Dropout acts in training on the branch's input, and neither in evaluation nor when merged."""
    session = _Run(subject, case)
    session.take(("add", "one"), ("activate", ["one"]), ("train",))
    yield from session.trained()
    yield from session.gradients()
    session.take(("merge",))
    yield session.evaluated()
    session.take(("unmerge",))
    yield from session.trained("dropout-ends")
    session.take(("eval",))
    yield session.evaluated()
    session.take(("unmerge",), ("train",))  # evaluation may have merged
    yield from session.trained("dropout-until-evaluation")
    yield from session.chance()


def _of_steps(
    before: Sequence[Step], after: Sequence[Step] = (), never: str = "dropout-never"
) -> Any:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        session = _Run(subject, case)
        session.take(*before, ("train",))
        yield from session.trained(never)
        session.take(("eval",))
        yield session.evaluated()
        if after:
            session.take(*after, ("eval",))
            yield session.evaluated()
        yield from session.chance()

    return run


def added(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """An adapter that is added or loaded in evaluation does not drop."""
    session, both = _Run(subject, case), ("activate", ["two", "one"])
    session.take(("add", "two"), ("activate", ["two"]), ("eval",), ("add", "one"), both)
    yield session.evaluated("adding-trains")
    session.take(("save", "one"), ("delete", "one"), ("load", "one", "one"), both)
    yield session.evaluated("loading-trains")


def replaced(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """An adapter that takes another's place has its own rate of dropout."""
    session = _Run(subject, case)
    session.take(("add", "one", "two"), ("activate", ["one"]), ("train",))
    yield session.evaluated()
    session.take(("replace", "one", "one"))
    yield from session.trained("replace-rate")
    session.take(("replace", "one", "two"))
    yield session.evaluated("replace-rate")
    yield from session.chance()


_IN_TRAINING: dict[str, tuple[Step, ...]] = {
    "kept": (("add", "two"), ("scale", "two", 2.0), ("activate", ["one", "two"]), ("disable",),
             ("activate", ["one"]), ("delete", "two")),
    "loaded": (("save", "one"), ("delete", "one"), ("load", "one", "one"), ("activate", ["one"])),
}  # fmt: skip


def _in_training(steps: Sequence[Step], never: str) -> Any:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        session = _Run(subject, case)
        session.take(("add", "one"), ("activate", ["one"]), ("train",), *steps)
        yield from session.trained(never)
        session.take(("eval",))
        yield session.evaluated()
        yield from session.chance()

    return run


_BOTH: tuple[Step, ...] = (("add", "one"), ("add", "two"), ("activate", ["two", "one"]))

CHECKS: dict[str, tuple[str, Any]] = {
    "dropout": ((dropout.__doc__ or ""), dropout),
    "dropout.several": (
        "Each active adapter has its own rate of dropout.",
        _of_steps(_BOTH, (("scale", "one", 2.0), ("activate", ["two"])), never=""),
    ),
    "dropout.added": ((added.__doc__ or ""), added),
    "dropout.kept": (
        "Adding, scaling, activating, disabling and deleting in training leave dropout on.",
        _in_training(_IN_TRAINING["kept"], ""),
    ),
    "dropout.loaded": (
        "Loading in training leaves dropout on.",
        _in_training(_IN_TRAINING["loaded"], "loading-evaluates"),
    ),
    "dropout.replaced": ((replaced.__doc__ or ""), replaced),
    "dropout.save": (
        "A saved adapter keeps its rate of dropout.",
        _of_steps((("add", "one"), ("save", "one"), ("anew",), ("load", "one", "one"),
                   ("activate", ["one"])), never="save-no-rate"),
    ),
}  # fmt: skip
"""The checks: id, law and run."""
