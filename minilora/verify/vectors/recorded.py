"""What a check asks of an implementation, as the question of a vector.

Of most checks it is the first call. Of a session it is every step, and whether the check lets it be
refused. Folders that a call names are taken along, file by file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from minilora.verify.core.errors import Fault, Skip
from minilora.verify.core.types import Case, Check
from minilora.verify.diagnosis.answers import Direct
from minilora.verify.implementation.contract import (
    ANSWERS,
    SESSION,
    positional,
)
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.minilora_impl import Minilora
from minilora.verify.vectors.vector import each_array

Array = np.ndarray
Files = dict[str, bytes]

FOLDERS = ("model_dir", "adapter_dir")
"""The arguments that name a folder to read."""

ALLOWED, HARMLESS, REQUIRED = "allowed", "harmless", "required"
"""Whether a session may refuse a step: it may, and the vector is then refused; it may or ignores
it, for it has no meaning and changes nothing; it has to."""


class _Asked(Exception):
    """What a check asks first."""


class _First(GuardedImplementation):
    """A subject that answers nothing and tells what it was asked."""

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(positional(method), args, strict=False)) | kwargs
        raise _Asked(method, *_taken(arguments))


class _Steps(Direct):
    """A right implementation that keeps the steps of its sessions."""

    def __init__(self, implementation: object, **more: Any) -> None:
        super().__init__(implementation, **more)
        self.layer: Mapping[str, Any] = {}
        self.log: list[dict[str, Any]] = []
        self.folders: list[str] = []

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The answer; the step is kept first."""
        recorder = self._owner
        if not isinstance(recorder, _Steps):
            self.log += [{"do": "anew"}] if self.layer else []
            self.layer = args[0]
            return super().call(method, *args, **kwargs)
        step: dict[str, Any] = {
            "do": method,
            **dict(zip(positional(method, SESSION), args, strict=True)),
        }
        if "folder" in step:
            recorder.folders += [f for f in (step["folder"],) if f not in recorder.folders]
            step["folder"] = str(recorder.folders.index(step["folder"]) + 1)
        if (method, self.foretold) == ("weight", "unsure"):
            raise ArithmeticError("what a right session has merged here is not known")
        if self.foretold and (
            method not in ANSWERS or (method, self.foretold) == ("rows", REQUIRED)
        ):
            step["refusal"] = self.foretold
        recorder.log.append(each_array(step, np.copy))
        return super().call(method, *args, **kwargs)


def asked(check: Check, case: Case) -> tuple[str, dict[str, Any], Files]:
    """The method that a check calls in a case, its arguments by name, and the files they name.

    Arrays are in float64, or whole numbers.
    """
    if check.needs == ("session",):
        return "session", each_array(_session(check, case), _wide), {}
    method, arguments, files = _first(check, case)
    return method, each_array(arguments, _wide), files


def _taken(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Files]:
    """The arguments with folders named as in a set, and their files, which a check may remove."""
    named, files = dict(arguments), Files()
    for name in FOLDERS:
        if name in arguments:
            into = name.removesuffix("_dir")
            files |= {f"{into}/{path}": data for path, data in _files_of(Path(arguments[name]))}
            named[name] = into
    return named, files


def _wide(array: Array) -> Array:
    return array if array.dtype.kind in "bi" else array.astype(np.float64)


def _files_of(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.read_bytes()


def _first(check: Check, case: Case) -> tuple[str, dict[str, Any], Files]:
    try:
        next(iter(check.run(_First(object()), case)))
    except _Asked as call:
        method, arguments, files = call.args
    if (method, check.needs) == ("merge", ("merge", "unmerge")):
        method = "unmerge"  # of a weight that is as good as a merged one
        arguments["W_merged"] = arguments.pop("W")
    if "settings" in positional(method):
        arguments |= arguments.pop("settings")
    return method, arguments, files


def _session(check: Check, case: Case) -> dict[str, Any]:
    """The layer of a session and its steps. ArithmeticError where minilora's own does not hold."""
    subject = _Steps(Minilora())
    off = [c.array for c in check.run(subject, case) if c.judge().verdict != "pass"]
    if off:
        raise ArithmeticError(f"{case.id}: minilora deviates in {', '.join(off)}")
    return {"layer": subject.layer, "steps": subject.log}


def replay_session(subject: GuardedImplementation, given: Mapping[str, Any]) -> dict[str, Any]:
    """The answers of a session to its steps: STEP.y, STEP.W, … Raises Skip or Fault."""
    session, answered, is_unsure = subject.session(given["layer"]), dict[str, Any](), False
    with TemporaryDirectory(prefix="minilora-") as folder:
        for i, step in enumerate(given["steps"]):
            method, refusal = step["do"], step.get("refusal")
            if method == "anew":
                session = subject.session(given["layer"])
                continue
            if not session.has(method):
                raise Skip(f"no {method}")
            arguments = [
                _argument(step, name, Path(folder)) for name in positional(method, SESSION)
            ]
            try:
                answer = session.call(method, *arguments)
                refused = False
            except Fault as fault:
                if fault.kind != "raises" or (refusal is None and not is_unsure):
                    raise Fault(fault.kind, f"step {i}, {method}: {fault.message}") from None
                if refusal == ALLOWED or (refusal is None and is_unsure):
                    raise Skip(f"not supported: it refuses step {i}, {method}") from None
                refused = True
            is_unsure |= method == "merge" and refusal == HARMLESS and not refused
            if refusal == REQUIRED:
                answered[f"{i}.refused"] = np.asarray(float(refused))
            answered |= _named(i, method, answer) if method in ANSWERS else {}
    return answered


def _argument(step: Mapping[str, Any], name: str, folder: Path) -> Any:
    """An argument of a step; a folder in this one, which is made."""
    if name != "folder":
        return step[name]
    path = folder / step[name]
    path.mkdir(exist_ok=True)
    return str(path)


def _named(i: int, method: str, answer: Any) -> dict[str, Any]:
    """The arrays of an answer."""
    if method == "gradients":
        return {f"{i}.{name}": array for name, array in answer.items()}
    return {f"{i}.{'W' if method == 'weight' else 'y'}": answer}
