"""A test vector: a question, its answers, and its place in the files of a set."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from minilora.verify.implementation.contract import CONVENTIONS

Array = np.ndarray

AND = "+"
"""Between the values of two conventions, in a name."""


@dataclass(frozen=True)
class Output:
    """A true answer, its sigma in each dtype (none in the exact lane), and the limits."""

    want: Array
    sigma: dict[str, Array]
    max_z: float = 0.0
    rms_z: float = 0.0
    optional: bool = False


@dataclass(frozen=True)
class Vector:
    """One question and its answers.

    ``drawn`` is the dtype that its inputs are drawn in, ``dtypes`` are those that it may be put to.
    ``alternatives`` holds, for another convention, the outputs that differ under it. ``result`` is
    valid, acceptable (where there are alternatives) or invalid (whatever is answered is wrong).
    ``files`` are those of the folders that the settings name, by their paths.
    """

    id: str
    check: str
    level: str
    method: str
    settings: dict[str, Any]
    inputs: dict[str, Array]
    drawn: str
    lane: str
    dtypes: tuple[str, ...]
    outputs: dict[str, Output]
    flags: tuple[str, ...] = ()
    result: str = "valid"
    alternatives: dict[str, dict[str, Output]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    def expected(self, conventions: Mapping[str, str]) -> dict[str, Output]:
        """The outputs under these conventions."""
        chosen = alternative(conventions)
        names = (chosen, *chosen.split(AND))  # of two that differ, one may make no difference
        return self.outputs | next(filter(None, map(self.alternatives.get, names)), {})


def alternative(conventions: Mapping[str, str]) -> str:
    """The name of the outputs under these conventions: the values that are not the first ones."""
    return AND.join(
        value
        for name, (first, *_) in CONVENTIONS.items()
        if (value := conventions.get(name, first)) != first
    )


def tensors(vector: Vector) -> dict[str, Array]:
    """The tensors of a vector: ID.in.NAME, ID.out.NAME, ID.sigma.DTYPE.NAME, and ID.alt.CONVENTION
    before the last two."""
    found = {f"{vector.id}.in.{name}": array for name, array in vector.inputs.items()}
    for at, outputs in (
        (vector.id, vector.outputs),
        *((f"{vector.id}.alt.{c}", outputs) for c, outputs in vector.alternatives.items()),
    ):
        for name, output in outputs.items():
            found[f"{at}.out.{name}"] = output.want
            found |= {f"{at}.sigma.{d}.{name}": sigma for d, sigma in output.sigma.items()}
    return found


def entry_of(vector: Vector) -> dict[str, Any]:
    """A vector in the manifest."""

    def stated(outputs: Mapping[str, Output]) -> dict[str, Any]:
        return {
            name: {
                "shape": list(output.want.shape),
                "max_z": output.max_z,
                "rms_z": output.rms_z,
                "optional": output.optional,
            }
            for name, output in outputs.items()
        }

    return {
        "id": vector.id,
        "check": vector.check,
        "level": vector.level,
        "file": f"{vector.level}.safetensors",
        "method": vector.method,
        "settings": vector.settings,
        "inputs": list(vector.inputs),
        "folder": folder_of(vector.id) if vector.files else "",
        "drawn": vector.drawn,
        "lane": vector.lane,
        "dtypes": list(vector.dtypes),
        "flags": list(vector.flags),
        "result": vector.result,
        "outputs": stated(vector.outputs),
        "alternatives": {c: stated(outputs) for c, outputs in vector.alternatives.items()},
    }


MEANING = (
    *("check", "method", "settings", "inputs", "drawn", "lane", "dtypes", "result"),
    *("outputs", "alternatives"),
)
"""What of a vector's entry in the manifest never changes, beside its tensors."""


def fingerprint(vector: Vector) -> str:
    """A hash of all that a vector asks and expects."""
    entry = entry_of(vector)
    meaning = canonical({key: entry[key] for key in MEANING})
    stored = {
        f"{path}/{name}": array
        for path, data in vector.files.items()
        if path.endswith(".safetensors")
        for name, array in load(data).items()
    }
    for name, array in sorted((tensors(vector) | stored).items()):
        meaning += f"{name} {array.dtype} {array.shape}".encode() + array.tobytes()
    for path, data in sorted(vector.files.items()):
        meaning += f"{path} ".encode() + (
            canonical(json.loads(data)) if path.endswith(".json") else b""
        )
    return sha256(meaning).hexdigest()


def folder_of(id: str) -> str:
    """The folder of a vector in a set, which holds its model and its adapter."""
    return f"folders/{id}"


def put_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files to a folder and to folders in it."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def canonical(document: Mapping[str, Any]) -> bytes:
    """JSON with sorted keys and no blanks, to be hashed."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def each_array(value: Any, turn: Callable[[Array], Any]) -> Any:
    """The value with every array in it turned."""
    if isinstance(value, np.ndarray):
        return turn(value)
    if isinstance(value, dict):
        return {key: each_array(entry, turn) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [each_array(entry, turn) for entry in value]
    return value


def gathered(settings: Mapping[str, Any], arrays: Mapping[str, Array]) -> dict[str, Any]:
    """The arguments of a method: each array in the place of the settings that its name says."""
    arguments: dict[str, Any] = deepcopy(dict(settings))
    for path, array in arrays.items():
        _put(arguments, path, array)
    return arguments


def _put(tree: Any, path: str, array: Array) -> None:
    key, _, rest = path.partition(".")
    at: Any = int(key) if isinstance(tree, list) else key
    if rest and (isinstance(tree, list) or key in tree):
        _put(tree[at], rest, array)
    else:
        tree[at if isinstance(tree, list) else path] = array
