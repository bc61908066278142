"""Where the things of a report are: which kind of module, in which layer; and many in few words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from minilora.audit.result import Entry

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
"""A number that is a part of a dotted name: the layer, and then the expert."""


def place(entry: Entry) -> tuple[str, int | None]:
    """The kind of module and its layer: ``model.layers.*.mlp.up_proj.weight``, 3.

    The layer is the figure ``layer``, else the first number in the name, else None.
    """
    found = _NUMBER.search(entry.subject) if _is_name(entry.subject) else None
    given = entry.figures.get("layer")
    layer = given if isinstance(given, int) else int(found[0]) if found else None
    kind = _NUMBER.sub("*", entry.subject) if found else entry.subject
    return kind, layer


def places(entries: Iterable[Entry]) -> list[str]:
    """The subjects; names that differ by a part are one: ``layers.[0-29].{q_proj,v_proj}``."""
    subjects = [entry.subject for entry in entries]
    numbered: dict[str, list[list[int]]] = {}
    for name in filter(_is_name, subjects):
        found = [int(number) for number in _NUMBER.findall(name)]
        numbered.setdefault(_NUMBER.sub("*", name), []).append(found)
    said = [_filled(kind, numbers) for kind, numbers in numbered.items()]
    return [*_braced(said), *(each for each in subjects if not _is_name(each))]


def _is_name(subject: str) -> bool:
    """Whether it is a tensor's name, and no sentence, path or version."""
    return re.fullmatch(r"[\w.*-]+", subject) is not None


def _filled(kind: str, numbers: Sequence[Sequence[int]]) -> str:
    """The kind with the numbers that occur in each of its places."""
    columns = iter(zip(*numbers, strict=True))

    def said(_: re.Match[str]) -> str:
        column = set(next(columns))
        return f"[{ranges(column)}]" if len(column) > 1 else str(column.pop())

    return re.sub(r"\*", said, kind) if numbers[0] else kind


def ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2 and 5 as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def _braced(names: Iterable[str]) -> list[str]:
    """Names that differ in one of the last two parts as one: ``attn.{q_proj,v_proj}.weight``."""
    for part in (-2, -1):
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            parts = name.split(".")
            at = len(parts) + part
            alone = at <= 0 or "{" in name
            key = (name,) if alone else (*parts[:at], "", *parts[at + 1 :])
            groups.setdefault(key, []).append(name if alone else parts[at])
        names = [_joined(key, found) for key, found in groups.items()]
    return list(names)


def _joined(key: tuple[str, ...], found: Sequence[str]) -> str:
    """A name with what was found in the place that the key leaves empty."""
    inner = found[0] if len(found) == 1 else f"{{{','.join(found)}}}"
    return ".".join(part or inner for part in key) if "" in key else key[0]
