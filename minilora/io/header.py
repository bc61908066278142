"""The header of a safetensors file, walked and checked: where each tensor lies.

The library reads whole tensors and does not say where they lie; to read a large one a block of rows
at a time, its place has to be known. Nothing is taken for granted of what a header says: its size
is limited before it is read, and what it says is compared with the file's size.
Source: the format's description in the README of safetensors 0.4.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from minilora.io.errors import FormatError
from minilora.io.files import TENSOR_DTYPES, check_regular, in_words, kind_of, parse_json
from minilora.spec.ops import Array

LARGEST = 2**24
"""A header of more bytes is refused: that of 100 000 tensors with long names has 15 MB."""

STORED_DTYPES = TENSOR_DTYPES | {
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
"""The dtypes that are compared, by their names in the file: more than those of weights."""

_DAMAGED = "the file is cut off or damaged: fetch or write it again"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: ``start`` is the first byte of its entries in the file."""

    path: Path
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """How many bytes of the file it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> Array:
        """Entries start … stop along the first axis, read anew; a scalar is one row.

        Errors: FormatError if the file has become shorter.
        """
        inner = self.shape[1:]
        size = math.prod(inner) * self.dtype.itemsize
        array = np.empty((max(0, stop - start), *inner), self.dtype)
        view = array.reshape(-1).view(np.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start + start * size)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:].data)
                if not count:
                    found = f"the file's end, {len(view) - done} bytes too early"
                    raise FormatError(self.path, self.name, found, "its entries", _DAMAGED)
                done += count
        return array


def places(path: Path | str) -> tuple[dict[str, Place], dict[str, Any]]:
    """Where each tensor of a safetensors file lies, and the file's metadata.

    Errors: FormatError if the file is missing, cut off, larger than its header says, or damaged;
    for a header of more than `LARGEST` bytes; for a dtype that is not in `STORED_DTYPES`.
    """
    path = Path(path)
    header, data = _header(path)
    metadata = header.pop("__metadata__", None) or {}  # MLX writes null
    if not isinstance(metadata, dict):
        raise FormatError(path, "__metadata__", metadata, "an object", _DAMAGED)
    found, spans = {}, []
    size = path.stat().st_size - data
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(path, name, entry, size)
        found[name] = Place(path, name, dtype, shape, data + begin)
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            expected = f"byte {at}, where the one before it ends"
            raise FormatError(path, name, f"entries from byte {begin}", expected, _DAMAGED)
        at = end
    if at != size:
        raise FormatError(path, "file", f"{size} bytes of entries", f"{at} bytes", _DAMAGED)
    return found, metadata


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header's object, and the byte after it."""
    check_regular(path)
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > min(LARGEST, size - 8):
                _check_text(path, start + file.read(64))
                found = f"a header of {length} bytes in a file of {size}"
                expected = f"one that lies in the file, of {LARGEST} bytes at most"
                remedy = "is it a safetensors file, and whole? fetch or write it again"
                raise FormatError(path, "file", found, expected, remedy)
            header = parse_json(file.read(length))
    except FormatError:
        raise
    except OSError as error:
        expected, remedy = "a safetensors file", "check the path"
        raise FormatError(path, "file", error.strerror or error, expected, remedy) from None
    except ValueError as error:
        raise FormatError(path, "header", in_words(error), "a JSON object", _DAMAGED) from None
    if not isinstance(header, dict):
        raise FormatError(path, "header", kind_of(header), "a JSON object", _DAMAGED)
    return header, 8 + length


def _check_text(path: Path, start: bytes) -> None:
    """Refuse by its name what is often found in place of a file: a pointer of Git LFS, a page."""
    expected = "a safetensors file"
    if start.startswith(b"version https://git-lfs"):
        remedy = "it stands for the file: run git lfs pull, or download the file itself"
        raise FormatError(path, "file", "a pointer of Git LFS", expected, remedy)
    if start.lstrip().startswith((b"<", b"{")):
        found = "a page" if start.lstrip().startswith(b"<") else "a text"
        raise FormatError(path, "file", found, expected, "is it a server's answer? fetch it again")


def _entry(
    path: Path, name: str, entry: Any, size: int
) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """The dtype, the shape and the span of one entry of the header."""
    entry = entry if isinstance(entry, dict) else {}
    kind, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(kind, str) or kind not in STORED_DTYPES:
        expected = f"one of {', '.join(STORED_DTYPES)}"
        raise FormatError(path, name, f"dtype {kind}", expected, "convert it")
    if not _are_counts(shape, 8) or not _are_counts(span, 2) or len(span) != 2:
        found = f"shape {shape}, data_offsets {span}"
        expected = "eight whole numbers from 0 at most, and two"
        raise FormatError(path, name, found, expected, _DAMAGED)
    begin, end = span
    needed = math.prod(shape) * STORED_DTYPES[kind].itemsize
    if end > size or end - begin != needed:
        found = f"bytes {begin} to {end} of {size} for shape {tuple(shape)} in {kind}"
        raise FormatError(path, name, found, f"{needed} bytes in the file", _DAMAGED)
    return STORED_DTYPES[kind], tuple(shape), begin, end


def _are_counts(values: Any, most: int) -> bool:
    """Whether it is a list of whole numbers from 0, and a short one."""
    whole = isinstance(values, list) and len(values) <= most
    return whole and all(type(value) is int and value >= 0 for value in values)
