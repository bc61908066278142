"""A session and its expected state, taken through the same steps."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from tempfile import mkdtemp
from typing import Any

import numpy as np

from minilora.spec.variants import DORA, DORA_FULL
from minilora.verify.checks.session_inputs import NAMES, SessionInputs, draw_inputs, wide
from minilora.verify.core.errors import Fault, Skip
from minilora.verify.core.types import Case, Comparison
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.sessions import LayerState

Step = tuple[Any, ...]
"""The name of a method of a session, and its arguments; ("anew",) opens another session."""

REFUSABLE = {"add", "activate", "scale", "delete", "train", "merge", "save", "load"}
"""What a session may refuse while something is merged, or after it merged nothing."""

BROUGHT = ("bias", "head.W", "head.bias")
"""The parameters that an adapter brings beside A and B."""


@dataclass
class SessionRun:
    """A session beside its expected state.

    ``saved`` has, by name, the folder and the entries of each saved adapter. ``merged_nothing``:
    the session accepted a merge of nothing, after which it may behave as merged.
    """

    subject: GuardedImplementation
    inputs: SessionInputs
    session: GuardedImplementation
    state: LayerState
    dtype: str
    saved: dict[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    outputs: int = 0
    merged_nothing: bool = False
    _folder: str = ""

    @classmethod
    def of(
        cls, subject: GuardedImplementation, case: Case, bias: bool = True, kind: str = "linear"
    ) -> SessionRun:
        """A session with a layer of small integers, without adapters."""
        inputs = draw_inputs(kind, case, bias)
        return cls(subject, inputs, *opened(subject, inputs), case.dtype)

    def may_refuse(self, method: str, is_valid: bool) -> bool:
        """Whether the contract lets a session refuse this step."""
        if method == "merge" and self.state.disabled:
            return True
        is_merged = bool(self.state.merged) or self.merged_nothing
        return not is_valid or (is_merged and method in REFUSABLE)

    def take(self, step: Step) -> bool:
        """Takes the step on both sides; False if the session refused it, as it may."""
        method, *arguments = step
        if method == "anew":
            self.session, self.state = opened(self.subject, self.inputs)
            self.merged_nothing = False
            return True
        if method == "load" and arguments[1] not in self.saved:
            return False  # saving it was refused
        if method in ("add", "load") and self._is_too_many(arguments[0]):
            raise Skip("it has one adapter at a time")
        if not self.session.has(method):
            raise Skip(f"no {method}")
        passed = self._passed(method, arguments)
        expected = next_state(self.state, self.inputs, self.saved, step)
        try:
            self.session.call(method, *passed)
        except Fault as fault:
            if fault.kind == "raises" and self.may_refuse(method, expected is not None):
                return False
            raise Fault(fault.kind, f"{step_words(step)}: {fault.message}") from None
        if method == "merge" and expected is None:
            self.merged_nothing = True
        elif method == "unmerge":
            self.merged_nothing = False
        if method == "save":
            self.saved[arguments[0]] = passed[1], self.state.adapters[arguments[0]]
        self.state = expected or self.state
        return True

    def _is_too_many(self, name: str) -> bool:
        """Whether the implementation has declared that it has no place for one more adapter."""
        others = self.state.adapters.keys() - {name}
        return self.subject.fixed.adapters is not None and bool(others)

    def _passed(self, method: str, arguments: list[Any]) -> list[Any]:
        """The arguments of the method, with the adapter or the folder that a step leaves out."""
        if method == "add":
            return [*arguments, self.inputs.adapters[arguments[0]]]
        if method == "save":
            return [*arguments, self._new_folder()]
        if method == "load":
            return [arguments[0], self.saved[arguments[1]][0]]
        return arguments

    def _new_folder(self) -> str:
        """A new folder, which is removed with the run."""
        if not self._folder:
            self._folder = mkdtemp(prefix="minilora-")
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return mkdtemp(dir=self._folder)

    def compare(self, after: str) -> Comparison:
        """The output against the expected one: other rows each time, every third time one row."""
        self.outputs += 1
        x = np.roll(self.inputs.x, self.outputs, 0)[: 1 if self.outputs % 3 == 2 else None]
        y, _ = self.state.forward(wide(x))
        got = self.session.answer(self.session.call("forward", x), "y", y.shape, self.dtype)
        return Comparison(f"y after {after}", got, y)

    def gradients(self, after: str) -> Iterator[Comparison]:
        """The gradients of ⟨dy, y⟩ against the expected ones; a missing one is 0.

        While anything is merged, those of a bias or a head are not compared: a library may continue
        to train it.
        """
        x, dy = self.inputs.x, self.inputs.dy
        if not self.session.has("gradients"):
            raise Skip("no gradients")
        _, back = self.state.forward(wide(x))
        wanted = back(wide(dy))
        answer = self.session.call("gradients", x, dy)
        if not isinstance(answer, Mapping):
            self.session.entry(answer, "dx", "gradients")
        for name in sorted({*wanted, *answer}):
            if self.state.merged and name.partition(".")[2] in BROUGHT:
                continue
            shape = np.shape(wanted[name]) if name in wanted else None
            got = (
                self.session.answer(answer[name], gradient_name(name), shape, self.dtype)
                if name in answer
                else np.zeros(shape or ())
            )
            want = wanted.get(name, np.zeros_like(got))
            yield Comparison(f"{gradient_name(name)} after {after}", got, want)

    def weight(self, after: str) -> Comparison:
        """The stored weight against the expected one."""
        stored = self.state.stored()
        W = self.session.answer(self.session.call("weight"), "W", stored.shape, self.dtype)
        return Comparison(f"W after {after}", W, stored)


def opened(
    subject: GuardedImplementation, inputs: SessionInputs
) -> tuple[GuardedImplementation, LayerState]:
    """A new session, and the expected state of its layer."""
    differentiated = subject.conventions.get("dora_norm") == "differentiated"
    state = LayerState.of(wide(inputs.layer), DORA_FULL if differentiated else DORA)
    return subject.session(inputs.layer), state


def next_state(
    state: LayerState,
    inputs: SessionInputs,
    saved: Mapping[str, tuple[str, Mapping[str, Any]]],
    step: Step,
) -> LayerState | None:
    """The state after the step; None if the step is invalid in this state."""
    methods: dict[str, Callable[..., LayerState]] = {
        "add": lambda name: state.add(name, wide(inputs.adapters[name])),
        "load": lambda name, of: state.add(name, saved[of][1]),
        "save": lambda name: state,
        "activate": state.activate,
        "disable": state.disable,
        "scale": state.scale,
        "merge": state.merge,
        "unmerge": state.unmerge,
        "delete": state.delete,
        "train": lambda: state,
        "eval": lambda: state,
    }
    method, *arguments = step
    try:
        return methods[method](*arguments)
    except ValueError:
        return None


def gradient_name(name: str) -> str:
    """The gradient of a parameter in words: dx, or d(one.A)."""
    return name if name == "dx" else f"d({name})"


def step_words(step: Step) -> str:
    """The step in words: merge(), activate(['one'])."""
    method, *arguments = step
    return f"{method}({', '.join(map(repr, arguments))})"


def fitting(steps: Iterable[Step], subject: GuardedImplementation) -> Iterator[Step]:
    """The steps; of a layer that has one adapter at a time, those with "one" alone."""
    for method, *arguments in steps:
        named = [n for a in arguments for n in (a if isinstance(a, list) else [a])]
        if subject.fixed.adapters is None or not {*named} & {*NAMES[1:]}:
            yield method, *arguments
        elif method == "activate" and "one" in named:
            yield method, ["one"]


def follow(run: SessionRun, steps: Iterable[Step]) -> Iterator[Comparison]:
    """The output after each step; its name tells all steps so far."""
    done: list[str] = []
    for step in steps:
        words = step_words(step)
        done.append(words if run.take(step) else f"{words} refused")
        yield run.compare(" ".join(done))
