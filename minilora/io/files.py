"""Tensors and settings in files: read with every check, and packed to bytes.

Whatever is wrong with a file is a `FormatError`; no other exception comes out of reading one.
"""

import json
import math
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from minilora.io.errors import FormatError, listed
from minilora.spec.lora import Weights
from minilora.spec.ops import Array

WEIGHT_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
"""The dtypes that weights may have, by their names in a safetensors file."""

TENSOR_DTYPES = (
    WEIGHT_DTYPES
    | {
        f"{letter}{bits}": np.dtype(f"{kind}{bits}")
        for letter, kind in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    }
    | {"BOOL": np.dtype(bool)}
)
"""The dtypes that tensors may have: token ids are whole numbers, masks are true or false."""

NOT_FINITE = "the weights are unusable: take an earlier checkpoint"


MOST_JSON = 2**28
"""No file of settings has more bytes: the largest tokenizers have a tenth of it."""


def check_regular(path: Path | str, most: int | None = None) -> None:
    """Refuse what is no file with an end: a pipe, a device; and one of more than ``most`` bytes.

    A file that is missing is left to who opens it.

    Errors: FormatError.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise FormatError(path, "file", "a pipe or a device", "a regular file", "check the path")
    if most is not None and status.st_size > most:
        found, expected = f"{status.st_size} bytes", f"{most} at most"
        raise FormatError(path, "file", found, expected, "is it the right file?")


def read_tensors(path: Path | str, ignore: str | None = None) -> Weights:
    """The tensors of a safetensors file, all of them finite numbers.

    ``ignore`` is an expression found in the names of tensors to leave out, whatever they hold.
    The header's sizes are checked against the file's before memory is taken for them.

    Errors: FormatError if the file is missing, cut short or damaged, or if a tensor has no entry,
    another dtype than `TENSOR_DTYPES`, or an entry that is not finite.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="np") as file:
            names = [name for name in file.keys() if not (ignore and re.search(ignore, name))]  # noqa: SIM118
        tensors: Weights = {}
        for name in sorted(names):
            # Opened anew, so that what has been read of the mapped file is no longer in memory.
            with safe_open(path, framework="np") as file:
                tensors[name] = _tensor(path, name, file)
        return tensors
    except (OSError, SafetensorError) as error:
        raise FormatError(
            path, "file", error, "a whole safetensors file", "fetch or write it again"
        ) from error


def _tensor(path: Path | str, name: str, file: Any) -> Array:
    view = file.get_slice(name)
    dtype, shape = view.get_dtype(), view.get_shape()
    if dtype not in TENSOR_DTYPES:
        remedy = "convert it; dequantize quantized weights"
        raise FormatError(
            path, name, f"dtype {dtype}", f"one of {', '.join(TENSOR_DTYPES)}", remedy
        )
    if 0 in shape:
        raise FormatError(path, name, f"shape {shape}", "at least one entry", "write it again")
    return check_finite(path, name, file.get_tensor(name), NOT_FINITE)


def check_finite(path: Path | str, name: str, array: Array, remedy: str) -> Array:
    """Return the array if all its entries are finite.

    Errors: FormatError if one is not.
    """
    with np.errstate(invalid="ignore"):  # a signalling NaN in bfloat16 raises the flag
        wrong = np.argwhere(~np.isfinite(array))
    if len(wrong):
        first = tuple(map(int, wrong[0]))
        found = f"{len(wrong)} entries that are not finite, the first {array[first]} at {first}"
        raise FormatError(path, name, found, f"finite numbers in {array.dtype}", remedy)
    return array


def to_dtype(path: Path | str, name: str, array: Array, dtype: Any) -> Array:
    """The weight in ``dtype``; None keeps its own.

    Errors: FormatError if the array holds whole numbers, or an entry too large for the dtype.
    """
    if array.dtype.kind in "biu":
        found, expected = f"dtype {array.dtype}", "floating-point numbers"
        raise FormatError(
            path, name, found, expected, "weights are floating-point numbers: dequantize them"
        )
    if dtype is None:
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if converted.dtype not in WEIGHT_DTYPES.values():  # wider than any file's
        return converted
    return check_finite(path, name, converted, f"it fits in {array.dtype}: take a wider dtype")


def to_narrow_dtype(path: Path | str, name: str, array: Array, dtype: Any, reader: str) -> Array:
    """The weight in ``dtype`` or its own, for a library that computes in float32 at most.

    ``reader`` names the library in the message. Errors: FormatError for a wider dtype, and those of
    :func:`to_dtype`.
    """
    converted = to_dtype(path, name, array, dtype)
    if converted.dtype.name not in ("float32", "float16", "bfloat16"):
        expected = "float32, float16 or bfloat16"
        remedy = f"{reader} no wider one: take float32, --dtype float32, if rounding is meant"
        raise FormatError(path, name, f"dtype {converted.dtype}", expected, remedy)
    return converted


def pack(
    path: Path | str, arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The bytes of a safetensors file, the same for the same input.

    Errors: those of :func:`read_tensors` for what it would not read; ValueError for more than one
    entry of metadata, which the library writes in no fixed order.
    """
    if metadata and len(metadata) > 1:
        raise ValueError(f"metadata {listed(metadata)}: one entry at most has reproducible bytes")
    plain: Weights = {}
    for name, array in arrays.items():
        dtype = next((d for d in TENSOR_DTYPES.values() if d.name == array.dtype.name), None)
        if dtype is None or array.size == 0:
            found = f"dtype {array.dtype}, shape {array.shape}"
            expected = f"entries in one of {', '.join(d.name for d in TENSOR_DTYPES.values())}"
            raise FormatError(path, name, found, expected, "nothing was written; convert it")
        # The library takes an array's memory as it lies, whatever its strides say.
        plain[name] = check_finite(path, name, np.asarray(array, dtype, order="C"), NOT_FINITE)
    return save(plain, dict(metadata) if metadata else None)


def read_json(path: Path | str) -> dict[str, Any]:
    """The object in a JSON file.

    Errors: FormatError if it is missing or damaged, is no object, names a key twice or holds a
    number that is not finite.
    """
    check_regular(path, MOST_JSON)
    try:
        value = parse_json(Path(path).read_bytes())
    except OSError as error:
        raise FormatError(path, "file", error.strerror, "a JSON object", "check the path") from None
    except ValueError as error:
        found, remedy = in_words(error), "fetch or write it again"
        raise FormatError(path, "file", found, "a JSON object", remedy) from None
    if not isinstance(value, dict):
        raise FormatError(path, "file", kind_of(value), "a JSON object", "is it the right file?")
    return value


_KINDS = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}


def kind_of(value: object) -> str:
    """What a value of JSON is, in words."""
    return _KINDS.get(type(value), "a number")


def in_words(error: Exception) -> str:
    """What an error of reading a file of JSON says, without Python's words for it."""
    if isinstance(error, OSError):
        return str(error.strerror or error)
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON from line {error.lineno}, column {error.colno} on"
    if isinstance(error, UnicodeDecodeError):
        return f"bytes that are no text, from byte {error.start} on"
    if str(error).startswith("Exceeds the limit"):
        return "a whole number of thousands of digits"
    return str(error)


def parse_json(data: bytes) -> Any:
    """What a text of JSON says.

    Errors: ValueError if it is not in UTF-8 or damaged, names a key twice or holds a number that is
    not finite.
    """
    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("brackets nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"{listed(key for key, n in counts.items() if n > 1)} given twice")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"the number {name}")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_constant(text)


def pack_json(value: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file, the same for the same input."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def check_settings(
    path: Path | str,
    settings: Mapping[str, Any],
    read: Collection[str],
    fixed: Mapping[str, Collection[Any]],
    inert: str,
) -> None:
    """Every setting is one that is read, or is inert, or has the value that is implemented.

    ``inert`` has names between blanks. A setting that is none of these passes as null only, which
    sets nothing.

    Errors: FormatError that names the setting and its value.
    """
    for key, value in settings.items():
        if key in fixed and value not in fixed[key]:
            expected = " or ".join(json.dumps(v) for v in fixed[key])
            remedy = "other values compute a function that is not implemented here"
            raise FormatError(path, key, json.dumps(value), expected, remedy)
        if value is not None and key not in {*read, *fixed, *inert.split()}:
            remedy = "it may change the function computed: remove it only if it does not"
            raise FormatError(path, key, json.dumps(value), "no setting of this name", remedy)


def typed(path: Path | str, key: str, value: Any, kind: Any) -> Any:
    """The setting's value as int (at least 1), float (finite and not negative) or bool.

    Errors: FormatError for another value.
    """
    fits = {
        int: type(value) is int and 1 <= value <= sys.maxsize,
        float: type(value) in (int, float) and 0 <= value <= sys.float_info.max,
        bool: type(value) is bool,
    }
    if not fits[kind]:
        expected = {int: "a whole number from 1", float: "a number from 0", bool: "true or false"}
        remedy = "take it from the model's original file"
        raise FormatError(path, key, value, expected[kind], remedy)
    return kind(value)
