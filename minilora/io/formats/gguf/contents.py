"""The header of a GGUF file, walked and checked: metadata, and where each tensor lies.

The library `gguf` knows types, names and block formats; the header is walked here, because a count
or a length in it has to be checked against the file before memory is taken for it.
Source: the GGUF specification of GGML, versions 2 and 3.
"""

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.io.errors import FormatError
from minilora.io.files import check_regular

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9


def library() -> Any:
    """The library `gguf`, imported where it is used.

    Errors: ImportError that names the extra, if it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "GGUF files need the library gguf: install it, or minilora[gguf]"
        ) from error
    return gguf


@dataclass(frozen=True)
class Tensor:
    """A tensor in the file: the name of its type, its shape in NumPy's order, its bytes.

    It lies from byte ``start`` to ``end``; ``row`` is the number of bytes of one row.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int
    row: int


class Contents(Mapping[str, Any]):
    """A GGUF file: a mapping of its metadata, decoded on access, and its ``tensors``."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        remedy = "fetch or write it again"
        check_regular(path)
        try:
            with open(path, "rb") as file:
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise FormatError(path, "file", error, "a GGUF file", remedy) from None
        self._at = 0
        self._places: dict[str, tuple[int, int]] = {}
        magic, version, tensors, pairs = self._take("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            found = f"{magic!r}, version {version}"
            remedy = "is it the right file? Big-endian ones and version 1 are not read"
            raise FormatError(path, "file", found, "b'GGUF', version 2 or 3", remedy)
        for _ in range(self._counted(pairs, 13, "metadata")):
            key = self._string("a key")
            if key in self._places:
                raise self._wrong(key, "given twice", "once")
            (kind,) = self._take("<I")
            self._places[key] = (kind, self._at)
            self._value(kind, key, skip=True)
        self.tensors = self._directory(self._counted(tensors, 24, "tensors"))

    def _wrong(self, where: str, found: object, expected: object) -> FormatError:
        return FormatError(self.path, where, found, expected, "fetch or write it again")

    def _need(self, size: int, where: str) -> int:
        """Where the next ``size`` bytes begin, and on to their end."""
        start, left = self._at, len(self.bytes) - self._at
        if size > left:
            raise self._wrong(where, f"{left} bytes to the file's end", f"{size} or more")
        self._at += size
        return start

    def _take(self, format: str, where: str = "header") -> tuple[Any, ...]:
        return struct.unpack_from(format, self.bytes, self._need(struct.calcsize(format), where))

    def _counted(self, count: int, least: int, where: str) -> int:
        """The count, if that many things of ``least`` bytes can lie in the rest of the file."""
        left = len(self.bytes) - self._at
        if count * least > left:
            raise self._wrong(where, f"{count} of them in {left} bytes", "as many as are there")
        return count

    def _string(self, where: str, skip: bool = False) -> str:
        (size,) = self._take("<Q", where)
        start = self._need(size, where)
        if skip:
            return ""
        try:
            return self.bytes[start : start + size].decode()
        except UnicodeDecodeError as error:
            raise self._wrong(where, error, "a text in UTF-8") from None

    def _value(self, kind: int, where: str, skip: bool = False) -> Any:
        if kind in _SCALARS:
            return self._take(f"<{_SCALARS[kind]}", where)[0]
        if kind == _STRING:
            return self._string(where, skip)
        if kind != _ARRAY:
            raise self._wrong(where, f"a value of type {kind}", "a type from 0 to 12")
        inner, count = self._take("<IQ", where)
        if inner in _SCALARS:
            size = struct.calcsize(f"<{_SCALARS[inner]}")
            start = self._need(count * size, where)
            return (
                None
                if skip
                else [*struct.unpack_from(f"<{count}{_SCALARS[inner]}", self.bytes, start)]
            )
        if inner != _STRING:
            raise self._wrong(where, f"an array of type {inner}", "one of numbers or texts")
        texts = (self._string(where, skip) for _ in range(self._counted(count, 8, where)))
        if not skip:
            return list(texts)
        for _ in texts:
            pass
        return None

    def _directory(self, count: int) -> dict[str, Tensor]:
        gguf = library()
        entries = []
        for _ in range(count):
            name = self._string("a tensor's name")
            (dimensions,) = self._take("<I", name)
            if not 1 <= dimensions <= 4:
                raise self._wrong(name, f"{dimensions} dimensions", "1 to 4")
            shape = self._take(f"<{dimensions}Q", name)[::-1]
            entries.append((name, shape, *self._take("<IQ", name)))
        alignment = self.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._wrong("general.alignment", alignment, "a power of two")
        base = -(-self._at // alignment) * alignment
        tensors: dict[str, Tensor] = {}
        for name, shape, number, offset in entries:
            if name in tensors:
                raise self._wrong(name, "two tensors of this name", "one")
            try:
                kind = gguf.GGMLQuantizationType(number)
            except ValueError:
                remedy = "a newer release of gguf may know it"
                found = f"type {number}"
                raise FormatError(self.path, name, found, "a known type", remedy) from None
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if shape[-1] % block or 0 in shape:
                expected = f"rows of whole blocks of {block}, not empty"
                raise self._wrong(name, f"shape {shape} of {kind.name}", expected)
            if offset % alignment:
                raise self._wrong(name, f"offset {offset}", f"a multiple of {alignment}")
            row = shape[-1] // block * size
            start, end = base + offset, base + offset + row * math.prod(shape[:-1])
            if end > len(self.bytes):
                found = f"the file's end at byte {len(self.bytes)}"
                raise self._wrong(name, found, f"entries up to byte {end}")
            tensors[name] = Tensor(kind.name, shape, start, end, row)
        return tensors

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, key: str) -> Any:
        kind, self._at = self._places[key]
        return self._value(kind, key)

    def __len__(self) -> int:
        return len(self._places)

    def kind(self, key: str) -> tuple[int, int | None]:
        """The type of the metadata's value, and of an array's entries."""
        kind, at = self._places[key]
        return kind, struct.unpack_from("<I", self.bytes, at)[0] if kind == _ARRAY else None
