"""Lines of text, and values as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from math import isfinite
from numbers import Integral
from typing import Any

import numpy as np

WIDTH = 80


def wrapped(text: str, indent: int = 0, hang: int = 2, width: int = WIDTH) -> list[str]:
    """The text in lines of this width, those after the first further in."""
    before, after = " " * indent, " " * (indent + hang)
    return textwrap.wrap(
        text, width, initial_indent=before, subsequent_indent=after, break_on_hyphens=False
    )


def printable(text: str) -> str:
    """The text without characters that XML or a file cannot hold."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def plain(value: Any) -> Any:
    """The value in the types of JSON; what is not finite becomes a string."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, float | np.generic):
        number = float(value)
        names = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
        return number if isfinite(number) else names[str(number)]
    return str(value)


def json_text(document: Any) -> str:
    """The document as strict JSON: no number is NaN, and half of a surrogate pair is escaped."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"
