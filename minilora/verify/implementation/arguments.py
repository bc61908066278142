"""The arguments of a call: copied, compared afterwards, and described."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from minilora.verify.core.errors import Fault, type_words

VARIANT_SETTINGS = ("use_rslora", "use_dora", "lora_bias", "bias")
"""The settings of a session's adapter that an implementation may branch on."""

MAX_ENTRIES = 10_000
"""So many entries has no list that is asked for: what goes on so long has no end."""


def arguments_of(implementation: object, method: str) -> frozenset[str] | None:
    """The names of the arguments that a method takes; None where it takes any, or does not say."""
    try:
        parameters = inspect.signature(getattr(implementation, method)).parameters.values()
    except (TypeError, ValueError, AttributeError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY)


def settings_of(implementation: object) -> dict[str, Any]:
    """The attributes that say how an implementation was made: its numbers and words."""
    own = getattr(implementation, "__dict__", {})
    return {name: v for name, v in own.items() if isinstance(v, bool | int | float | str)}


def traits_of(given: Mapping[str, Any]) -> Iterator[str]:
    """What is particular about the arguments of a layer: what an implementation may branch on."""
    yield from _scale_traits(given)
    yield from _session_traits(given.get("layer"), given.get("adapter"))
    W, x = _matrix(given.get("W")), given.get("x")
    if W is not None:
        yield from _weight_traits(W, given.get("r"))
    if isinstance(x, np.ndarray) and x.ndim:
        yield from _input_traits(x, W)
        yield f"there is {'no' if given.get('bias') is None else 'a'} bias"
        yield f"there is {'no' if given.get('keep') is None else 'a'} dropout mask"


def _session_traits(layer: Any, adapter: Any) -> Iterator[str]:
    """What is particular about a session's layer, or about an adapter that is added to it."""
    if isinstance(layer, Mapping):
        yield f"the layer is of the kind {layer.get('kind')}"
        yield f"the layer has {'no' if layer.get('bias') is None else 'a'} bias"
        if (W := _matrix(layer.get("W"))) is not None:
            yield from _weight_traits(W, None)
    if isinstance(adapter, Mapping):
        yield from (f"an adapter has {t}" for t in _scale_traits(adapter) if "numbers" not in t)
        yield from (f"an adapter has {k}" for k in VARIANT_SETTINGS if adapter.get(k) is not None)


def _matrix(value: Any) -> np.ndarray | None:
    return value if isinstance(value, np.ndarray) and value.ndim == 2 else None


def _scale_traits(given: Mapping[str, Any]) -> Iterator[str]:
    alpha = given.get("alpha")
    if given.get("r") == 1:
        yield "r = 1"
    if isinstance(alpha, int | float) and alpha < 0:
        yield "alpha is negative"
    arrays = [v for v in given.values() if isinstance(v, np.ndarray) and v.dtype.kind not in "iub"]
    if arrays:
        whole = all(bool((v == np.rint(v.astype(float))).all()) for v in arrays)
        yield f"the numbers are {'' if whole else 'not '}whole"


def _weight_traits(W: np.ndarray, r: Any) -> Iterator[str]:
    yield f"W is {'' if len(W) == len(W.T) else 'not '}square"
    if isinstance(r, int) and r > min(W.shape):
        yield "r is greater than a side of W"


def _input_traits(x: np.ndarray, W: np.ndarray | None) -> Iterator[str]:
    yield f"x has {x.ndim} {'axis' if x.ndim == 1 else 'axes'}"
    yield f"there is {'one token' if x.size == x.shape[-1] else 'more than one token'}"
    if W is not None and x.shape[-1]:
        for side, name in zip(W.shape, ("rows", "columns"), strict=True):
            if x.size == side * x.shape[-1]:
                yield f"there are as many tokens as {name} of W"


def sizes_of(given: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """What a kernel may cut into pieces, whose last ones are easily wrong."""
    if isinstance(W := given.get("W"), np.ndarray) and W.ndim == 2:
        yield from zip(("rows of W", "columns of W"), W.shape, strict=True)
    if isinstance(x := given.get("x"), np.ndarray) and x.ndim and x.shape[-1]:
        yield "tokens", x.size // x.shape[-1]
    if isinstance(r := given.get("r"), int):
        yield "ranks", r


def copied(value: Any) -> Any:
    """The value with every array in it copied, in C order."""
    if isinstance(value, np.ndarray):
        return np.array(value, order="C")
    if type(value) is dict:
        return {key: copied(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(entry) for entry in value)
    return value


class Buffers:
    """The memory of a caller that uses its arrays again: in each call other numbers stand there."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[Any, ...], np.ndarray] = {}

    def filled(self, path: tuple[Any, ...], value: Any) -> Any:
        """The value as `copied` gives it, its arrays in the memory of the last call's."""
        if isinstance(value, np.ndarray):
            key = (*path, value.shape, value.dtype)
            if key not in self._arrays:
                self._arrays[key] = np.empty(value.shape, value.dtype)
            np.copyto(self._arrays[key], value)
            return self._arrays[key]
        if type(value) is dict:
            return {key: self.filled((*path, key), entry) for key, entry in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.filled((*path, i), entry) for i, entry in enumerate(value))
        return value

    def clear(self) -> None:
        """Takes other memory from now on: a call that hangs has this one still."""
        self._arrays = {}


class LastAnswer:
    """The arrays of an answer as they were given, and as they were by then."""

    def __init__(self, answer: Any, passed: Any) -> None:
        inputs = [*_arrays_in("", passed)]
        self._arrays = [
            (path, array, array.copy())
            for path, array in _arrays_in("", answer)
            if not any(np.may_share_memory(array, given) for _, given in inputs)
        ]

    def require_unchanged(self, method: str) -> None:
        """Raises Fault where a later call has changed them."""
        for path, array, original in self._arrays:
            if array.tobytes() != original.tobytes():
                raise Fault(
                    "changes its answers",
                    f"the answer{path} of an earlier {method} is another one after this call: its "
                    "memory was used again",
                )


def _arrays_in(path: str, value: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays in a value, and NumPy's views of tensors, by their places."""
    if isinstance(value, np.ndarray):
        yield path, value
    elif type(value) is dict:
        for key, entry in value.items():
            yield from _arrays_in(f"{path}[{key!r}]", entry)
    elif type(value) in (list, tuple):
        for i, entry in enumerate(islice(value, MAX_ENTRIES)):
            yield from _arrays_in(f"{path}[{i}]", entry)
    elif hasattr(value, "__array__") and not isinstance(value, np.generic):
        with contextlib.suppress(Exception):  # `answer` will say what NumPy said
            yield path, np.asarray(value)


def settled(value: Any) -> Any:
    """The answer with everything lazy computed and every array copied, within the time limit."""
    if type(value) is dict:
        return {key: settled(entry) for key, entry in value.items()}
    if type(value) in (list, tuple) or isinstance(value, Iterator):
        entries = [settled(entry) for entry in islice(value, MAX_ENTRIES)]
        if len(entries) == MAX_ENTRIES:
            raise ValueError(f"an answer of {MAX_ENTRIES} entries and more: has it no end?")
        return tuple(entries) if type(value) is tuple else entries
    if hasattr(value, "__array__"):
        with contextlib.suppress(Exception):  # `answer` will say what NumPy said
            return np.array(value)
    return value


def require_unchanged(path: str, now: Any, original: Any, when: str = "after the call") -> None:
    """Raises Fault where a call has changed an array or a container that it was given."""
    if isinstance(original, np.ndarray):
        if (now.shape, now.dtype) != (original.shape, original.dtype):
            raise Fault("changes its inputs", f"{path} is now {now.dtype} of shape {now.shape}")
        if now.tobytes() != original.tobytes():
            where = [int(i) for i in np.argwhere(_differ(now, original))[0]]
            raise Fault(
                "changes its inputs",
                f"{path}{where} was {original[tuple(where)]!s} and is {now[tuple(where)]!s} {when}",
            )
    elif type(original) is dict:
        if now.keys() != original.keys():
            changed = ", ".join(sorted(map(repr, now.keys() ^ original.keys())))
            raise Fault("changes its inputs", f"{path} gained or lost {changed} {when}")
        for key in original:
            entry = _same_kind(path, now[key], original[key])
            require_unchanged(f"{path}[{key!r}]", entry, original[key], when)
    elif type(original) in (list, tuple):
        if len(now) != len(original):
            raise Fault("changes its inputs", f"{path} had {len(original)} entries, now {len(now)}")
        for i, (entry, before) in enumerate(zip(now, original, strict=True)):
            require_unchanged(f"{path}[{i}]", _same_kind(path, entry, before), before, when)


def require_files(folder: str | os.PathLike[str]) -> None:
    """Raises Fault where a folder holds what is neither a file nor a folder.

    Opening a named pipe would never return.
    """
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            if os.path.exists(path) and not os.path.isfile(path):
                raise Fault("not an array", f"{name} in the folder is not a file")


def _same_kind(path: str, now: Any, original: Any) -> Any:
    """An entry of a container, after the test that it was not replaced by something else."""
    replaced = type(now) is not type(original)
    container = isinstance(original, (np.ndarray, dict, list, tuple))
    if not (replaced or container or now is original):
        replaced = bool(now != original)
    if replaced:
        raise Fault(
            "changes its inputs",
            f"an entry of {path} was replaced by {type_words(now)} in the call",
        )
    return now


def _differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where two arrays of one shape and dtype differ in their bytes; 0-d arrays give one index."""
    size = max(a.dtype.itemsize, 1)
    bytes_a = np.frombuffer(a.tobytes(), np.uint8).reshape(*a.shape, size)
    bytes_b = np.frombuffer(b.tobytes(), np.uint8).reshape(*b.shape, size)
    return np.asarray((bytes_a != bytes_b).any(axis=-1))
