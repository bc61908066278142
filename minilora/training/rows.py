"""The rows of a data file: JSON lines, a JSON array, CSV or parquet. Each is numbered.

A new kind of file is a function from a path and a hash of its bytes to numbered rows, and an entry
in `READERS`.
"""

import csv
import io
from collections.abc import Callable, Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Protocol

from minilora.io.errors import FormatError
from minilora.io.files import parse_json
from minilora.training.example import InvalidLine


class Hash(Protocol):
    """What the bytes of a file are added to."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""


Row = tuple[int, Any]
"""The number of a row, a line's where the file has lines; and its value, or an InvalidLine."""

OBJECT = "a JSON object on one line, in UTF-8"


def without_bom(raw: bytes) -> bytes:
    """Without the byte order mark that some editors write at the start of a file."""
    return raw.removeprefix(b"\xef\xbb\xbf")


def json_lines(path: Path, sha: Hash) -> Iterator[Row]:
    """An object a line. Empty lines at the end of the file are none."""
    blank = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            sha.update(raw)
            if not raw.strip():
                blank += 1
                continue
            for before in range(number - blank, number):
                yield before, InvalidLine("an empty line", OBJECT)
            blank = 0
            yield number, _parsed(without_bom(raw) if number == 1 else raw)


def _parsed(raw: bytes) -> Any:
    try:
        return parse_json(raw)
    except JSONDecodeError as error:
        return InvalidLine(f"no JSON ({error.msg}, character {error.pos + 1})", OBJECT)
    except ValueError as error:
        return InvalidLine(error, OBJECT)


def json_array(path: Path, sha: Hash) -> Iterator[Row]:
    """The entries of an array.

    Errors: FormatError for a file that is none.
    """
    raw = path.read_bytes()
    sha.update(raw)
    expected, remedy = "a JSON array of objects, in UTF-8", "write one object per line as .jsonl"
    try:
        value = parse_json(without_bom(raw))
    except JSONDecodeError as error:
        found = f"no JSON ({error.msg}, column {error.colno})"
        raise FormatError(path, f"line {error.lineno}", found, expected, remedy) from None
    except ValueError as error:
        raise FormatError(path, "file", error, expected, remedy) from None
    if not isinstance(value, list):
        raise FormatError(path, "file", f"a JSON {type(value).__name__}", expected, remedy)
    yield from enumerate(value, 1)


def comma_separated(path: Path, sha: Hash) -> Iterator[Row]:
    """The lines below the first, which names the columns; a label of digits is a number.

    Errors: FormatError for a file that is not in UTF-8.
    """
    raw = path.read_bytes()
    sha.update(raw)
    try:
        text = without_bom(raw).decode()
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise FormatError(path, f"line {line}", error, "UTF-8", "write it in UTF-8") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, InvalidLine(error, "a line of CSV, with commas and quotes")
            return  # where a quote is not closed, all that follows is in it
        names = list(reader.fieldnames or ())
        if None in row or None in row.values():
            columns = len(row.get(None, ())) + sum(v is not None for v in row.values())
            columns -= None in row
            yield (
                reader.line_num,
                InvalidLine(f"{columns} column{'s' * (columns != 1)}", f"{len(names)}: {names}"),
            )
            continue
        label = row.get("label")
        number = {"label": int(label)} if label is not None and label.isdecimal() else {}
        yield reader.line_num, {**row, **number}


def parquet(path: Path, sha: Hash) -> Iterator[Row]:
    """The rows of a parquet file.

    Errors: ImportError without pyarrow; FormatError for a damaged file.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(
            f"{path}: a parquet file needs pyarrow: python -m pip install 'minilora[parquet]'"
        ) from error
    sha.update(path.read_bytes())
    try:
        number = 0
        for batch in ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, {name: value for name, value in row.items() if value is not None}
    except (ArrowException, OSError, ValueError) as error:
        raise FormatError(path, "file", error, "a parquet file", "fetch it again") from None


READERS: dict[str, Callable[[Path, Hash], Iterator[Row]]] = {
    ".jsonl": json_lines,
    ".json": json_array,
    ".csv": comma_separated,
    ".parquet": parquet,
}
"""What reads a file, by its suffix."""
