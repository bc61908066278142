"""Level ``lifecycle``: a layer whose adapters come, act, are merged, scaled, switched off and go.

A session's truth is a :class:`minilora.adapters.State`: after each step the layer's output is
compared with it by ==, in whole numbers so small that merging and unmerging are exact. What a state
refuses (merging twice) a session may refuse as well, or pass over; it may not change the function.
What a state allows beside a merge (adding, scaling, activating, deleting) a session may refuse with
an error, and then nothing has happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from minilora.adapters import Adapter, State
from minilora.layers import OneHot
from minilora.verify.cases import Several, draw_several, in_exact_lane
from minilora.verify.contract import Fault, Skip, Subject
from minilora.verify.terms import Case, Check, Comparison, counter

Array = np.ndarray
Step = tuple[Any, ...]

CASES = {"quick": 4, "ci": 16, "nightly": 320}
NAMES = ("one", "two", "three")

KINDS = {
    "linear": "",
    "conv1d": ", stored (in, out)",
    "embedding": ", of an embedding",
}
"""The kinds of layers, in words; a session may have no such layer."""

REFUSABLE = {"add", "activate", "scale", "delete", "train", "merge"}
"""What a session may refuse while something is merged."""


@dataclass
class Run:
    """A session beside its true state."""

    session: Subject
    several: Several
    state: State
    dtype: str
    kind: str = "linear"

    @classmethod
    def of(cls, subject: Subject, case: Case, bias: bool = True, kind: str = "linear") -> Run:
        """A session of a layer in small whole numbers, without adapters.

        An embedding's W is its table (v, d), the transpose of the state's, and it has no bias.
        """
        several, _ = draw_several(in_exact_lane(case))
        first = several.adapters[0]
        bias = bias and kind != "embedding"
        b = case.rng().integers(-2, 3, len(first.W)) if bias else None
        W = np.ascontiguousarray(first.W.T) if kind == "embedding" else first.W
        layer = {"kind": kind, "W": W}
        if b is not None:
            layer["bias"] = b.astype(first.W.dtype)
        session = Subject(subject.call("session", layer), time_limit=subject.time_limit)
        base = None if b is None else b[:, None].astype(float)
        return cls(session, several, State(first.W.astype(float), base), case.dtype, kind)

    def adapter(self, name: str) -> tuple[dict[str, Any], Adapter]:
        """The adapter of this name as the contract and as the state have it."""
        layer = self.several.adapters[NAMES.index(name)]
        given = {"A": layer.A, "B": layer.B, **layer.merge_options()}
        return given, Adapter((layer.A.astype(float), layer.B.astype(float)), layer.s)

    def take(self, step: Step) -> bool:
        """The step on both sides; False if the session refused it, as it may."""
        what, *arguments = step
        given, next_state = list(arguments), self._next(what, arguments)
        if what == "add":
            given.append(self.adapter(arguments[0])[0])
        if not self.session.has(what):
            raise Skip(f"no {what}")
        try:
            self.session.call(what, *given)
        except Fault as fault:
            may = next_state is None or (self.state.merged and what in REFUSABLE)
            if fault.kind != "raises" or not may:
                raise
            return False
        if next_state is not None:
            self.state = next_state
        return True

    def _next(self, what: str, arguments: list[Any]) -> State | None:
        """The state after the step; None if it refuses."""
        state = self.state
        moves: dict[str, Callable[..., State]] = {
            "add": lambda name: state.add(name, self.adapter(name)[1]),
            "activate": lambda names: state.enable().activate(*names),
            "disable": state.disable,
            "scale": lambda name, factor: state.set_scale(name, factor * self.adapter(name)[1].s),
            "merge": state.merge,
            "unmerge": state.unmerge,
            "delete": state.delete,
            "train": lambda: state,
            "eval": lambda: state,
        }
        try:
            return moves[what](*arguments)
        except ValueError:
            return None

    def compare(self, after: str) -> Comparison:
        """The layer's output against the state's."""
        x = self.several.adapters[0].x
        columns: Any = x.T.astype(float)
        if self.kind == "embedding":
            v = self.state.W.shape[1]
            x = np.arange(7) * 5 % v  # numbers of rows, some of them twice
            columns = OneHot(x, v)
        y = self.session.answer(
            self.session.call("forward", x), "y", (len(x), len(self.state.W)), self.dtype
        )
        return Comparison(f"y after {after}", y, self.state.forward(columns)[0].T)

    def weight(self, after: str) -> Comparison:
        """The weight that the layer holds against the base's, where nothing is merged."""
        stored = self.state.stored()[0]
        stored = stored.T if self.kind == "embedding" else stored
        W = self.session.answer(self.session.call("weight"), "W", stored.shape, self.dtype)
        return Comparison(f"W after {after}", W, stored)


def told(step: Step) -> str:
    """The step in words: merge(), activate(['one'])."""
    what, *arguments = step
    return f"{what}({', '.join(map(repr, arguments))})"


def follow(run: Run, steps: Iterable[Step]) -> Iterator[Comparison]:
    """Every step, and the output after each; the name says all that was done before."""
    done: list[str] = []
    for step in steps:
        words = told(step)
        done.append(words if run.take(step) else f"{words} refused")
        yield run.compare(" ".join(done))


START: tuple[Step, ...] = (("add", "one"), ("add", "two"), ("activate", ["one"]))

SCRIPTS: dict[str, tuple[str, tuple[Step, ...]]] = {
    "add": (
        "Adding an adapter changes no output; activating it does.",
        (("add", "one"), ("activate", ["one"]), ("add", "two"), ("activate", ["two"])),
    ),
    "several": (
        "Several active adapters add up, in any order; none is the base.",
        (*START, ("activate", ["one", "two"]), ("activate", ["two", "one"]), ("activate", [])),
    ),
    "disable": (
        "While disabled the base alone acts, merged or not; activating ends it.",
        (*START, ("disable",), ("activate", ["one"]), ("merge",), ("disable",),
         ("activate", ["one"])),
    ),
    "scale": (
        "A factor on the scale counts once, however often it is set.",
        (*START, ("scale", "one", 2.0), ("scale", "one", 2.0), ("scale", "one", 0.5),
         ("scale", "two", 4.0)),
    ),
    "merge-twice": (
        "A second merge changes nothing, nor does a second unmerge.",
        (*START, ("merge",), ("merge",), ("unmerge",), ("unmerge",)),
    ),
    "merge-several": (
        "All active adapters are merged, and no other.",
        (*START, ("activate", ["two"]), ("merge",), ("unmerge",), ("activate", ["one", "two"]),
         ("merge",), ("unmerge",)),
    ),
    "scale-while-merged": (
        "A scale that changes while merged acts, and unmerging takes it back too.",
        (*START, ("merge",), ("scale", "one", 2.0), ("unmerge",), ("activate", ["two"])),
    ),
    "delete": (
        "A deleted adapter acts no longer, also if it was active.",
        (*START, ("activate", ["one", "two"]), ("delete", "one"), ("activate", ["two"]),
         ("add", "one"), ("activate", ["one"])),
    ),
    "delete-while-merged": (
        "Deleting a merged adapter takes its change along.",
        (*START, ("merge",), ("delete", "one"), ("activate", ["two"])),
    ),
    "activate-while-merged": (
        "Activating another adapter while one is merged leaves that other alone acting.",
        (*START, ("merge",), ("activate", ["two"]), ("activate", ["one"])),
    ),
    "add-while-merged": (
        "Adding an adapter beside a merged one changes no output.",
        (*START, ("merge",), ("add", "three"), ("unmerge",), ("activate", ["three"])),
    ),
    "train-eval": (
        "Without dropout training and evaluation are one function, merged or not.",
        (*START, ("train",), ("eval",), ("train",), ("merge",), ("eval",), ("train",), ("eval",),
         ("unmerge",)),
    ),
}  # fmt: skip
"""What happens to many layers one day, a check each: its law and its steps."""


def _script(name: str) -> Callable[[Subject, Case], Iterable[Comparison]]:
    def run(subject: Subject, case: Case) -> Iterable[Comparison]:
        yield from follow(Run.of(subject, case, bias=case.number % 2 == 0), SCRIPTS[name][1])

    return run


def weight(subject: Subject, case: Case, kind: str = "linear") -> Iterable[Comparison]:
    """The weight that is held: W' while merged, and W's bits again afterwards."""
    run = Run.of(subject, case, kind=kind)
    for step in (*START, ("scale", "one", 2.0)):
        run.take(step)
    yield run.weight("activating")
    run.take(("merge",))
    yield run.weight("merge()")
    run.take(("unmerge",))
    yield run.weight("merge() unmerge()")


def machine(subject: Subject, case: Case, kind: str = "linear") -> Iterable[Comparison]:
    """Twelve steps at random: after each the output is that of the state."""
    run, rng = Run.of(subject, case, kind=kind), case.rng()
    yield from follow(run, drawn(run, rng, 12))


def drawn(run: Run, rng: np.random.Generator, count: int) -> Iterator[Step]:
    """Steps as they may come: half of them touch what is there."""
    for _ in range(count):
        known = list(run.state.adapters)
        new = [name for name in NAMES if name not in known]
        if not known or (new and rng.random() < 0.2):
            yield "add", str(rng.choice(new))
            continue
        some = [name for name in known if rng.random() < 0.6]
        one = str(rng.choice(known))
        steps: list[Step] = [("activate", some)] * 4 + [("merge",)] * 3 + [("unmerge",)] * 3
        steps += [("disable",), ("train",), ("eval",), ("delete", one)]
        steps += [("scale", one, float(rng.choice([0.5, 2.0])))]
        yield steps[rng.integers(len(steps))]


CHECKS: tuple[Check, ...] = (
    *(
        Check(
            f"lifecycle.{name}",
            "lifecycle",
            ("session",),
            law,
            _script(name),
            counter(CASES, 0.25, low_precision=False),
        )
        for name, (law, _) in SCRIPTS.items()
    ),
    *(
        Check(
            f"lifecycle.{run.__name__}{'' if kind == 'linear' else '.' + kind}",
            "lifecycle",
            ("session",),
            (run.__doc__ or "").splitlines()[0].rstrip(".") + words + ".",
            partial(run, kind=kind),
            counter(CASES, share, low_precision=False),
        )
        for kind, words in KINDS.items()
        for run, share in ((weight, 0.25), (machine, 1.0))
    ),
)
