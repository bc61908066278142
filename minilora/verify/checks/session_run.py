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
from minilora.verify.checks.session_inputs import SessionInputs, draw_inputs, wide
from minilora.verify.core.errors import Fault, Skip
from minilora.verify.core.types import Case, Comparison
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.sessions import LayerState

Array = np.ndarray

Step = tuple[Any, ...]
"""The name of a method of a session, and its arguments; ("anew",) opens another session."""

REFUSABLE = {
    "add", "activate", "scale", "delete", "replace", "step", "train", "merge", "save", "load",
}  # fmt: skip
"""What a session may refuse while something is or may be merged."""

KEEPS_MERGED = {"merge", "unmerge", "save"}
"""After every other step a session may have merged or unmerged by itself, if something was merged.
After train and eval it may at any time: some libraries merge for evaluation."""

NAMING = {"delete", "scale", "replace"}
"""The steps that concern one adapter: with another one that is inactive, what is merged stays."""

LEARNING_RATE = 1.0
"""Of a step of training: a power of two, which rounds nothing."""

BROUGHT = ("bias", "head.W", "head.bias")
"""The parameters that an adapter brings beside A and B."""


@dataclass
class SessionRun:
    """A session beside its expected state.

    ``saved`` has, by name, the folder and the entries of each saved adapter. ``unsure``: what is
    merged in the session may be another than is expected. That changes no output, but what it may
    refuse: it accepted a merge of nothing, or merged and unmerged by itself.
    """

    subject: GuardedImplementation
    inputs: SessionInputs
    session: GuardedImplementation
    state: LayerState
    dtype: str
    saved: dict[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    outputs: int = 0
    unsure: bool = False
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
        may_be_merged = self.state.merged or self.unsure
        return (
            not is_valid
            or (may_be_merged and method in REFUSABLE)
            or (self.unsure and method == "unmerge")
        )

    def _foretold(self, method: str, is_valid: bool) -> str:
        """Whether the step may be refused: a harmless one, which has no meaning, or another."""
        if not is_valid:
            return "harmless"
        return "allowed" if self.may_refuse(method, True) else ""

    def take(self, step: Step) -> bool:
        """Takes the step on both sides; False if the session refused it, as it may."""
        method, *arguments = step
        if method == "anew":
            self.session, self.state = opened(self.subject, self.inputs)
            self.unsure = False
            return True
        if method == "load" and arguments[1] not in self.saved:
            return False  # saving it was refused
        if method in ("add", "load") and self._is_too_many(arguments[0]):
            raise Skip("it has one adapter at a time")
        if not self.session.has(method):
            raise Skip(f"no {method}")
        if method == "step" and self._is_out_of_integers():
            raise Skip("a step with DoRA's norm differentiated leaves the integers")
        if method == "step" and self.unsure and not self._follow_weight():
            return False  # what is merged is not trained
        passed = self._passed(method, arguments)
        expected = next_state(self.state, self.inputs, self.saved, step)
        self.session.foretold = self._foretold(method, expected is not None)
        try:
            self.session.call(method, *passed)
        except Fault as fault:
            if fault.kind == "raises" and self.may_refuse(method, expected is not None):
                return False
            raise Fault(fault.kind, f"{step_words(step)}: {fault.message}") from None
        self.unsure = self._is_unsure_after(
            method, {*map(str, arguments[:1])}, expected is not None
        )
        if method == "save":
            self.saved[arguments[0]] = passed[1], self.state.adapters[arguments[0]]
        self.state = expected or self.state
        return True

    def _is_too_many(self, name: str) -> bool:
        """Whether the implementation has declared that it has no place for one more adapter."""
        others = self.state.adapters.keys() - {name}
        return self.subject.fixed.adapters is not None and bool(others)

    def _is_out_of_integers(self) -> bool:
        """Whether a step changes V of DoRA: where its norm is held, only the magnitude changes."""
        has_dora = any("magnitude" in self.state.adapters[name] for name in self.state.active)
        return has_dora and self.subject.conventions.get("dora_norm") == "differentiated"

    def _follow_weight(self) -> bool:
        """Whether the stored weight shows what is merged; the expected state then follows it."""
        if self.inputs.layer["kind"] in ("tied", "full") or not self.session.has("weight"):
            return False
        self.session.foretold = "unsure"
        W = self.session.call("weight")
        for state in (self.state, self.state.unmerge() if self.state.merged else self.state):
            if np.array_equal(W, state.stored()):
                self.state, self.unsure = state, False
                return True
        return False

    def _is_unsure_after(self, method: str, names: set[Any], is_valid: bool) -> bool:
        """Whether, after an accepted step, what is merged is known no longer."""
        if method in ("merge", "unmerge"):
            return method == "merge" and not is_valid
        is_another = method in NAMING and not names & {*self.state.active}
        is_touched = self.state.merged and method not in KEEPS_MERGED and not is_another
        return self.unsure or is_touched or method in ("train", "eval")

    def refuses(self, step: Step) -> bool:
        """Whether the session raises an error, in a step that has no meaning for the state."""
        method, *arguments = step
        self.session.foretold = "required"
        try:
            self.session.call(method, *self._passed(method, arguments))
        except Fault as fault:
            if fault.kind != "raises":
                raise
            return True
        return False

    def _passed(self, method: str, arguments: list[Any]) -> list[Any]:
        """The arguments of the method, with the arrays or the folder that a step leaves out."""
        if method in ("add", "replace"):
            return [arguments[0], self.inputs.of(arguments[-1])]
        if method == "step":
            return [*self.inputs.one_token(), LEARNING_RATE]
        if method == "rows":
            return [self.inputs.x[: len(arguments[0])], *arguments]
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
        state = self.state

        def parts() -> dict[str, Array]:
            base = state.activate([]).forward(wide(x))[0]
            alone = {
                name: state.activate([name]).forward(wide(x))[0] - base for name in state.adapters
            }
            return {"the base": base, **alone}

        return Comparison(f"y after {after}", got, y, parts=parts)

    def rows(self, names: list[str], after: str) -> Comparison:
        """A batch of which each row has the adapter of this name, or none for ""."""
        x, state = self.inputs.x[: len(names)], self.state
        alone = [state.activate([name] if name else []).forward(wide(x)) for name in names]
        want = np.stack([y[j] for j, (y, _) in enumerate(alone)])
        answer = self.session.call("rows", x, names)
        got = self.session.answer(answer, "y of rows", want.shape, self.dtype)
        return Comparison(f"y of rows {names} before {after}", got, want)

    def gradients(self, after: str) -> Iterator[Comparison]:
        """The gradients of ⟨dy, y⟩ against the expected ones; a missing one is 0.

        While anything is merged, those of a bias or a head are not compared: a library may continue
        to train it.
        """
        if self.unsure:
            return  # what is merged has no gradients
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

    def has_weight(self) -> bool:
        """Whether there is one stored weight, and it is known what it should be."""
        is_one = self.inputs.layer["kind"] not in ("tied", "full")
        is_known = not (self.unsure or self.state.disabled)
        return is_one and is_known and self.session.has("weight")

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
        "add": lambda name, of="": state.add(name, wide(inputs.of(of or name))),
        "replace": lambda name, of: state.swap(name, wide(inputs.of(of))),
        "combine": state.combine,
        "step": lambda: _trained(state, inputs),
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


def _trained(state: LayerState, inputs: SessionInputs) -> LayerState:
    x, dy = inputs.one_token()
    return state.step(wide(x), wide(dy), LEARNING_RATE)


def gradient_name(name: str) -> str:
    """The gradient of a parameter in words: dx, or d(one.A)."""
    return name if name == "dx" else f"d({name})"


def step_words(step: Step) -> str:
    """The step in words: merge(), activate(['one']), add('one', two's)."""
    method, *arguments = step
    words = [repr(argument) for argument in arguments]
    if method in ("add", "replace") and len(words) == 2:
        words[1] = f"{arguments[1]}'s"
    return f"{method}({', '.join(words)})"


def fitting(steps: Iterable[Step], subject: GuardedImplementation) -> Iterator[Step]:
    """The steps; of a layer that has one adapter at a time, those with "one" alone."""
    for method, *arguments in steps:
        named = [n for a in arguments for n in (a if isinstance(a, list) else [a])]
        others = {name for name in named if isinstance(name, str)} - {"one"}
        if subject.fixed.adapters is None or not others:
            yield method, *arguments
        elif method == "activate" and "one" in named:
            yield method, ["one"]


def follow(run: SessionRun, steps: Iterable[Step], gradients: bool = False) -> Iterator[Comparison]:
    """The output after each step; its name tells all steps so far.

    After merging and unmerging the stored weight too, and with ``gradients`` those after each step.
    """
    done: list[str] = []
    for step in steps:
        words, accepted = step_words(step), run.take(step)
        done.append(words if accepted else f"{words} refused")
        if gradients and step[0] != "anew":
            yield from run.gradients(" ".join(done))
        yield run.compare(" ".join(done))
        if accepted and step[0] in ("merge", "unmerge") and run.has_weight():
            yield run.weight(" ".join(done))
