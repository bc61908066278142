"""The messages of the line protocol: JSON lines, arrays in safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors import safe_open

from minilora.verify.core.errors import Fault, LoadError, near, tidy
from minilora.verify.core.types import Check
from minilora.verify.implementation.contract import METHODS, SESSION, positional

PROTOCOL = 1


SESSION_ARGUMENTS = {name: positional(name, SESSION) for name in SESSION}
"""The methods of what ``session`` answers, with their arguments; ``session.add`` in a message."""


CARRIED = (*METHODS, *(f"session.{name}" for name in SESSION))
"""The methods that the protocol carries and a driver may declare."""


RESULTS = {
    "lora_linear": "y",
    "merge": "W_merged",
    "unmerge": "W",
    "combine": "delta_W",
    "multi_adapter": "y",
    "logits": "logits",
    "session.forward": "y",
    "session.rows": "y",
    "session.weight": "W",
}
"""The name of the one array that these methods answer; the others answer arrays by their names."""


WITH_ARRAYS = {*RESULTS, "session.gradients"}


WITHOUT_ARRAYS = {"save", "session", "session.end", *CARRIED[len(METHODS) :]} - WITH_ARRAYS
"""The methods that answer no arrays."""


def message_line(message: Mapping[str, Any]) -> bytes:
    """A message as a line; only quotes and backslashes are escaped, which any reader can undo."""
    text = json.dumps(message, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.encode(errors="surrogateescape") + b"\n"


def split_arrays(value: Any, path: tuple[str, ...], arrays: dict[str, np.ndarray]) -> Any:
    """The value as JSON; its arrays go to ``arrays`` under their paths.

    An object lacks the entries that are arrays; a list has null in their place.
    """
    if isinstance(value, np.ndarray):
        arrays[".".join(path)] = value
        return None
    if isinstance(value, Mapping):
        entries = {str(k): split_arrays(v, (*path, str(k)), arrays) for k, v in value.items()}
        taken = {str(k) for k, v in value.items() if isinstance(v, np.ndarray)}
        return {k: v for k, v in entries.items() if k not in taken}
    if isinstance(value, list | tuple):
        return [split_arrays(entry, (*path, str(i)), arrays) for i, entry in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path) else value


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the driver's file. Raises Fault."""
    if not path.exists():
        raise Fault("missing", "it answered ok, but the file 'out' does not exist")
    if not path.is_file():  # opening a named pipe would never return
        raise Fault("not an array", "'out' is not a file")
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise Fault(
            "not an array", f"the file 'out' is not a safetensors file: {tidy(error)}"
        ) from None


def as_answer(method: str, arrays: dict[str, np.ndarray]) -> Any:
    """The arrays of a file in the form of the method's answer. Raises Fault."""
    if method in RESULTS:
        name = RESULTS[method]
        if name not in arrays:
            names = tidy(", ".join(map(repr, sorted(arrays)))) or "nothing"
            raise Fault("missing", f"the file 'out' has no {name!r}; it has {names}")
        if method == "merge" and "bias" in arrays:
            return arrays[name], arrays["bias"]
        return arrays[name]
    if method == "model_loss":
        return _with_gradients(arrays)
    return _steps(arrays) if method in ("optimizer_steps", "train") else arrays


def _with_gradients(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The arrays, those named grads.NAME as one dict of gradients."""
    prefix = "grads."
    gradients = {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}
    others = {name: v for name, v in arrays.items() if not name.startswith(prefix)}
    return {**others, "grads": gradients}


def _steps(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The arrays, named STEP.NAME, as a list of steps. Raises Fault."""
    steps: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        number, _, parameter = name.partition(".")
        steps.setdefault(number, {})[parameter] = array
    numbers = [str(i) for i in range(len(steps))]
    if strange := sorted(steps.keys() - set(numbers)):
        message = f"expected steps named 0.NAME, 1.NAME, …; the file 'out' has {', '.join(strange)}"
        raise Fault("missing", message)
    return [steps[number] for number in numbers]


def understood(line: bytes, seq: int, outcomes: Sequence[str]) -> dict[str, Any]:
    """The answer in a line. Raises Fault."""
    try:
        answer = _READER.decode(line.decode())
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise Fault(
            "protocol",
            f"{quoted(line)} on standard output is not an answer; expected a JSON object in a "
            "line: write everything else to standard error",
        )
    require_same("seq", answer, seq)
    if not isinstance(ok := answer.get("ok") or False, bool):
        raise Fault("protocol", f"'ok' is {tidy(json.dumps(ok), 60)}, expected true")
    if not any(answer.get(outcome) for outcome in outcomes):
        keys = tidy(", ".join(map(repr, answer)))
        expected = " or ".join(map(repr, outcomes))
        raise Fault("protocol", f"the answer has {keys}; expected one of {expected}")
    return answer


def _no_number(name: str) -> NoReturn:
    """Refuses NaN and Infinity, which JSON does not have. Raises ValueError."""
    raise ValueError(name)


_READER = json.JSONDecoder(parse_constant=_no_number)


def require_same(key: str, answer: Mapping[str, Any], expected: int) -> None:
    """Raises Fault where the answer does not have this number."""
    got = answer.get(key)
    if got != expected or isinstance(got, bool):
        found = f"no {key!r}" if key not in answer else f"{key} {tidy(json.dumps(got), 60)}"
        raise Fault("protocol", f"the answer has {found}, expected {key} {expected}")


def refuse(error: Any) -> NoReturn:
    """Raises the error that the driver reports."""
    if not isinstance(error, Mapping):
        raise Fault("raises", tidy(error))
    message = tidy(error.get("message") or "an error without a message")
    if trace := error.get("traceback"):
        message += f" (traceback: {joined(str(trace))})"
    raise Fault("raises", message)


def skip_reason(skipped: Any) -> str:
    """Why the driver skipped a case."""
    if not isinstance(skipped, Mapping):
        return tidy(skipped)
    reason = tidy(skipped.get("reason") or "no reason given", 200)
    link = skipped.get("issue_url")
    return f"{reason} ({tidy(link, 90)})" if link else reason


def joined(text: str) -> str:
    """Lines joined by bars."""
    return " | ".join(line.strip() for line in text.splitlines() if line.strip())


def quoted(line: bytes) -> str:
    """The beginning of a line, quoted."""
    return repr(tidy(line[:200].decode(errors="replace"), 80))


def names_in(declared: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of names that the driver declares. Raises LoadError."""
    value = declared.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise LoadError(f"the driver's {key!r} is {tidy(value, 60)}, expected a list of names")
    return tuple(value)


def matches(check: str, patterns: Sequence[str]) -> bool:
    """Whether the id of a check fits one of the patterns."""
    return any(fnmatchcase(check, pattern) for pattern in patterns)


def declared_methods(
    declared: Mapping[str, Any], patterns: Sequence[str], checks: Sequence[Check]
) -> tuple[str, ...]:
    """The methods that the driver declares, or that the checks need that it declares.

    Raises LoadError.
    """
    ids = [check.id for check in checks]
    for pattern in patterns:
        if not any(fnmatchcase(id, pattern) for id in ids):
            raise LoadError(
                f"the driver declares the check {pattern!r}; no check fits{near(pattern, ids)}"
            )
    methods = names_in(declared, "methods")
    for name in methods:
        if name not in CARRIED:
            suggestion, carried = near(name, list(CARRIED)), ", ".join(CARRIED)
            raise LoadError(
                f"the driver declares the method {name!r}{suggestion}; expected some of {carried}"
            )
    if not methods:
        needed = {need for check in checks if matches(check.id, patterns) for need in check.needs}
        methods = tuple(name for name in CARRIED if name in needed)
    if not methods:
        raise LoadError(
            f'the driver declares no methods; expected "methods": some of {", ".join(CARRIED)}'
        )
    return methods
