"""Files read with every check and written whole or not at all: tensors and settings.

Whatever is wrong with a file is a `FormatError`; no other exception comes out of reading one.
"""

import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from minilora.spec.lora import Weights
from minilora.spec.ops import Array

WEIGHT_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
"""The dtypes that weights may have, by their names in a safetensors file."""

TENSOR_DTYPES = WEIGHT_DTYPES | {
    f"{letter}{bits}": np.dtype(f"{kind}{bits}")
    for letter, kind in (("I", "int"), ("U", "uint"))
    for bits in (8, 16, 32, 64)
}
"""The dtypes that tensors may have: token ids are whole numbers."""

NOT_FINITE = "these are no usable weights: take an earlier checkpoint"


class FormatError(ValueError):
    """A file does not hold what it should.

    Made of the file, the place in it, what was found, what was expected and what to do.
    """

    def __init__(
        self, path: Path | str, where: str, found: object, expected: object, remedy: str
    ) -> None:
        super().__init__(path, where, found, expected, remedy)

    def __str__(self) -> str:
        path, where, found, expected, remedy = self.args
        return (
            f"{path}: {_short(where)}: found {_short(found)}, expected {_short(expected)}; {remedy}"
        )


def _short(value: object, limit: int = 400) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[:limit] + "…"


def listed(names: Iterable[object], most: int = 5) -> str:
    """The first names in order, and how many more there are."""
    ordered = sorted(map(str, names))
    more = len(ordered) - most
    return ", ".join(ordered[:most]) + (f" and {more} more" if more > 0 else "")


def read_tensors(path: Path | str, ignore: str | None = None) -> Weights:
    """The tensors of a safetensors file, all of them finite numbers.

    ``ignore`` is an expression found in the names of tensors to leave out, whatever they hold.
    The header's sizes are checked against the file's before memory is taken for them.

    Errors: FormatError if the file is missing, cut short or damaged, or if a tensor has no entry,
    another dtype than `NUMBERS`, or an entry that is not finite.
    """
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
        remedy = "convert it, and dequantise what is quantised"
        raise FormatError(
            path, name, f"dtype {dtype}", f"one of {', '.join(TENSOR_DTYPES)}", remedy
        )
    if 0 in shape:
        raise FormatError(path, name, f"shape {shape}", "at least one entry", "write it again")
    return check_finite(path, name, file.get_tensor(name), NOT_FINITE)


def check_finite(path: Path | str, name: str, array: Array, remedy: str) -> Array:
    """The array itself.

    Errors: FormatError if an entry is not finite.
    """
    with np.errstate(invalid="ignore"):  # a signalling NaN in bfloat16 raises the flag
        wrong = np.argwhere(~np.isfinite(array))
    if len(wrong):
        first = tuple(map(int, wrong[0]))
        found = f"{len(wrong)} entries that are not finite, the first {array[first]} at {first}"
        raise FormatError(path, name, found, f"finite numbers in {array.dtype}", remedy)
    return array


def to_dtype(path: Path | str, name: str, array: Array, dtype: Any) -> Array:
    """The weight in ``dtype``, or as it is for None.

    Errors: FormatError if the array holds whole numbers, or an entry too large for the dtype.
    """
    if array.dtype.kind in "biu":
        found, expected = f"dtype {array.dtype}", "floating-point numbers"
        raise FormatError(path, name, found, expected, "weights are not whole numbers: dequantise")
    if dtype is None:
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if converted.dtype not in WEIGHT_DTYPES.values():  # wider than any file's
        return converted
    return check_finite(path, name, converted, f"it fits in {array.dtype}: take a wider dtype")


def to_narrow_dtype(path: Path | str, name: str, array: Array, dtype: Any, reader: str) -> Array:
    """The weight in ``dtype``, or its own: one that ``reader`` computes with, float32 at most.

    Errors: FormatError for a wider one, and those of `convert`.
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


def write_tensors(
    path: Path | str, arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all, in place of any that is there.

    Errors: those of :func:`pack` and of :func:`write_files`.
    """
    path = Path(path)
    data = pack(path, arrays, metadata)
    write_files(path.parent, {path.name: lambda: data})


def read_json(path: Path | str) -> dict[str, Any]:
    """The object in a JSON file.

    Errors: FormatError if it is missing or damaged, is no object, names a key twice or holds a
    number that is not finite.
    """
    try:
        value = parse_json(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise FormatError(path, "file", error, "a JSON object", "fetch or write it again") from None
    if not isinstance(value, dict):
        raise FormatError(path, "file", type(value).__name__, "an object", "is it the right file?")
    return value


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
    except RecursionError as error:
        raise ValueError(str(error)) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{listed({key for key in keys if keys.count(key) > 1})} given twice")
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


def make_folder(folder: Path) -> list[Path]:
    """Make the folder with those above it; the ones that were not there, the innermost first."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders that are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, piece by piece; at the end it takes the place of it.

    Errors: FormatError if ``path`` is a folder. If writing fails, what is there stays.
    """
    if path.is_dir():
        raise FormatError(path, "file", "a folder", "a file, or nothing there", "name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """A hidden name in the same folder, which nothing else has."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}")


def write_files(
    folder: Path | str,
    files: Mapping[str, Callable[[], bytes]],
    stale: str | None = None,
    durable: bool = False,
) -> None:
    """Write files to a folder, each whole; in place of none before all are written beside it.

    A folder that is there keeps its other files. ``stale`` is an expression for the names of those
    that may not stay, because a reader would take them for a part of what is written now.
    ``durable``: all is on the disk, and not only on its way to it, when this returns, and each file
    before it takes its name.

    Errors: FormatError if the folder is a file or holds a stale file; OSError where the disk is
    full or closed. The folder is then as it was; where it is the renaming that fails, each file is
    the old one or the new one, whole.
    """
    folder = Path(folder)
    if folder.is_file():
        raise FormatError(folder, "folder", "a file", "a folder", "choose another name")
    made = make_folder(folder)
    _check_others(folder, files, stale)
    beside = {name: _beside(folder / name) for name in files}
    try:
        for name, data in files.items():
            _write(beside[name], data(), durable, folder / name)
        for name, temporary in beside.items():
            os.replace(temporary, folder / name)
        if durable:
            _flush(folder)
    except BaseException:
        for temporary in beside.values():
            temporary.unlink(missing_ok=True)
        remove_empty(made)
        raise


def _check_others(folder: Path, names: Collection[str], stale: str | None) -> None:
    """Refuse stale files beside those named, and folders in their place."""
    others = {entry.name for entry in folder.iterdir()} - {*names}
    if old := {name for name in others if stale and re.fullmatch(stale, name)}:
        remedy = "remove them first, or choose another folder"
        raise FormatError(folder, "folder", listed(old), "no weights but those written", remedy)
    if folders := [name for name in names if (folder / name).is_dir()]:
        found = f"folders named {listed(folders)}"
        raise FormatError(folder, "folder", found, "files or nothing there", "move them away")


def _write(path: Path, data: bytes, durable: bool, target: Path) -> None:
    try:
        path.write_bytes(data)
        if durable:
            _flush(path)
    except OSError as error:  # the system names no file where it is the writing that fails
        reason = error.strerror or str(error)
        raise OSError(error.errno, reason, str(target)) from error


def _flush(path: Path) -> None:
    """Flush a file, or a folder's names, to the disk (fsync)."""
    if path.is_dir() and os.name != "posix":
        return  # no other system opens a folder
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_text(path: str, text: str) -> None:
    """Write a text file, whole or not at all. Errors: OSError.

    A link keeps pointing to the file; a device or a pipe is written as it is.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "w", encoding="utf-8") as out:
            out.write(text)
        return
    path = os.path.realpath(path)
    beside = f"{path}.{os.getpid()}.tmp"
    try:
        with open(beside, "x", encoding="utf-8", errors="backslashreplace") as out:
            out.write(text)
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            os.remove(beside)
        raise


def why_not_writable(path: str) -> str:
    """Why a file cannot be written to this path, or nothing."""
    if os.path.isdir(path):
        return f"{path} is a folder"
    if os.path.exists(path) and not os.path.isfile(path):
        return ""
    beside = f"{os.path.realpath(path)}.{os.getpid()}.tmp"
    try:
        with open(beside, "x", encoding="utf-8"):
            pass
        os.remove(beside)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return ""
