"""Values of the contract as JSON and the bytes of their arrays, and back.

Numbers, strings, None and lists stand for themselves; every object of JSON is a tag with what it
holds: ``{"array": ["<f4", [2, 3]]}``, ``{"dict": [[key, value], …]}``. The bytes of the arrays
follow one another in the order of the tags. Nothing that is read is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cache
from math import isfinite, prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from minilora.verify.core.errors import tidy

WHOLE = 2**63
"""A greater whole number is sent as what NumPy makes of it: an object."""

WITHOUT_BYTES = re.compile(r"O|[<>|=][USVMm]\d*(\[\w+\])?")
"""Dtypes that are no numbers: of such an array only the dtype is sent, for the message."""

_AS_JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False)

NUMBERS = re.compile(r"[<>|=][biufc]\d{1,2}")


def framed(message: Mapping[str, Any], arrays: Sequence[bytes]) -> bytes:
    """A message as a line, and the bytes of its arrays behind it."""
    head = {**message, "bytes": sum(map(len, arrays))}
    return b"".join([_AS_JSON.encode(head).encode(), b"\n", *arrays])


def packed(value: Any, arrays: list[bytes]) -> Any:
    """The value as JSON; the bytes of its arrays go to ``arrays``.

    What is none of the contract's values is sent as `Foreign`.
    """
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int and -WHOLE <= value < WHOLE:
        return value
    if type(value) is float:
        return value if isfinite(value) else {"float": str(value)}
    if isinstance(value, np.ndarray):
        return {"array": _packed_array(value, arrays)}
    if isinstance(value, np.generic):
        return {"scalar": _packed_array(np.array(value), arrays)}
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return str(np.dtype(value))
    if isinstance(value, Path):
        return {"path": str(value)}
    return _packed_container(value, arrays)


def _packed_container(value: Any, arrays: list[bytes]) -> Any:
    if isinstance(value, list):
        return [packed(entry, arrays) for entry in value]
    if isinstance(value, tuple):
        return {"tuple": [packed(entry, arrays) for entry in value]}
    if isinstance(value, Set):
        return {"set": [packed(entry, arrays) for entry in value]}
    if isinstance(value, Mapping):
        pairs = [[packed(key, arrays), packed(value[key], arrays)] for key in value]
        return {"dict": pairs}
    return {"foreign": _packed_foreign(value, arrays)}


def _packed_array(array: np.ndarray, arrays: list[bytes]) -> list[Any]:
    array = np.asarray(array)
    code = _code(array.dtype)
    if WITHOUT_BYTES.fullmatch(code):
        return [code, []]
    arrays.append(array.tobytes())
    return [code, list(array.shape)]


@cache
def _code(dtype: np.dtype[Any]) -> str:
    """The name of a dtype in a message."""
    if hasattr(ml_dtypes, dtype.name):
        return dtype.name
    return "O" if dtype.kind == "O" or dtype.hasobject else dtype.str


def _packed_foreign(value: Any, arrays: list[bytes]) -> list[Any]:
    """Its type's name and its text, whether it can be called, what NumPy makes of it or says."""
    about = [tidy(type(value).__name__, 60), tidy(_text(value)), callable(value)]
    if callable(value):
        return [*about, None, ""]
    try:
        array = np.array(value)
    except Exception as error:
        return [*about, None, tidy(error)]
    is_object = array.dtype.kind == "O"
    return [*about, None if is_object else _packed_array(array, arrays), ""]


def _text(value: Any) -> str:
    try:
        return str(value)
    except BaseException:  # SystemExit, too
        return f"<{type(value).__name__} that has no text>"


class Foreign:
    """In the place of an object in another process, of a class with its name.

    NumPy makes of it what it made of the object.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _foreign(name: str, text: str, can_be_called: bool, array: Any, error: str) -> Foreign:
    def as_array(self: Foreign, *_: object, **__: object) -> np.ndarray:
        if error:
            raise TypeError(error)
        return np.array(array)

    methods: dict[str, Any] = {}
    if can_be_called:
        methods["__call__"] = lambda self: None
    if error or array is not None:
        methods["__array__"] = as_array
    made: Foreign = type(str(name)[:60] or "?", (Foreign,), methods)(str(text))
    return made


class Unpacker:
    """Reads the values of a message; ``payload`` holds the bytes of their arrays.

    The arrays cannot be written to.
    """

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._position = 0
        self._tags: dict[str, Callable[[Any], Any]] = {
            "array": self._array,
            "scalar": lambda entry: self._array(entry)[()],
            "dict": lambda pairs: {self.value(key): self.value(entry) for key, entry in pairs},
            "set": lambda entries: set(map(self.value, entries)),
            "tuple": lambda entries: tuple(map(self.value, entries)),
            "float": lambda text: {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}[text],
            "path": Path,
            "foreign": self._foreign,
        }

    def value(self, entry: Any) -> Any:
        """The value of an entry of JSON. Raises an exception of any type if there is none."""
        if isinstance(entry, list):
            return [self.value(part) for part in entry]
        if isinstance(entry, dict):
            ((tag, held),) = entry.items()
            return self._tags[tag](held)
        return entry

    def end(self) -> None:
        """Raises ValueError where bytes are left."""
        if self._position != len(self._payload):
            raise ValueError("bytes that belong to no array")

    def _foreign(self, entry: Any) -> Foreign:
        name, text, can_be_called, array, error = entry
        made = None if array is None else self._array(array)
        return _foreign(name, text, can_be_called, made, error)

    def _array(self, entry: Any) -> np.ndarray:
        code, shape = entry
        if WITHOUT_BYTES.fullmatch(code):
            return np.zeros((), code)
        if not NUMBERS.fullmatch(code) and not hasattr(ml_dtypes, code):
            raise ValueError(f"no dtype {code}")
        dtype = np.dtype(getattr(ml_dtypes, code, code))
        if not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f"no shape {shape}")
        count = prod(shape)
        array = np.frombuffer(self._payload, dtype, count, self._position) if count else ()
        self._position += count * dtype.itemsize
        return np.asarray(array, dtype).reshape(shape)
