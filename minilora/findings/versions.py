"""Ranges of versions, as requirements have them: ``>=0.18,<0.20``, ``0.18.*`` (PEP 440)."""

from __future__ import annotations

import re

_VERSION = re.compile(
    r"v?(?:(\d+)!)?(\d+(?:\.\d+)*)"
    r"(?:[-_.]?(a|alpha|b|beta|rc|c|pre|preview)[-_.]?(\d*))?"
    r"(?:(?:[-_.]?(?:post|rev|r)[-_.]?(\d*))|-(\d+))?"
    r"(?:[-_.]?(dev)[-_.]?(\d*))?(?:\+([a-z0-9]+(?:[-_.][a-z0-9]+)*))?",
    re.IGNORECASE,
)
_RANGE = re.compile(r"\s*(~=|==|!=|<=|>=|<|>)?\s*(\S+?)\s*")
_PHASES = {"a": 0, "alpha": 0, "b": 1, "beta": 1, "rc": 2, "c": 2, "pre": 2, "preview": 2}
EXPECTED = "expected a range such as '>=0.18,<0.20', '!=0.19.0' or '0.18.*'"

Key = tuple[int, tuple[int, ...], tuple[int, int], int, float]
"""Epoch, release without zeros at its end, phase, post-release, development release."""


def version_key(version: str) -> Key:
    """What versions are ordered by; a local part does not count. Raises ValueError."""
    found = _VERSION.fullmatch(version)
    if found is None:
        raise ValueError(f"{version!r} is no version, expected one such as '0.18.1' or '1.0rc2'")
    epoch, release, phase, number, post, bare_post, dev, dev_number, _ = found.groups()
    numbers = tuple(map(int, release.split(".")))
    while len(numbers) > 1 and not numbers[-1]:
        numbers = numbers[:-1]
    has_post = post is not None or bare_post is not None
    if phase:
        of_phase = (_PHASES[phase.lower()], int(number or 0))
    else:  # a development release alone is before every phase
        of_phase = (-1, 0) if dev and not has_post else (3, 0)
    after = int(post or bare_post or 0) if has_post else -1
    return int(epoch or 0), numbers, of_phase, after, int(dev_number or 0) if dev else float("inf")


def _parts(range_: str) -> list[tuple[str, str]]:
    """The operator and the version of each part. Raises ValueError."""
    parts = []
    for text in range_.split(","):
        found = _RANGE.fullmatch(text)
        if found is None:
            raise ValueError(f"the range {range_!r} has the part {text!r}; {EXPECTED}")
        operator, version = found[1] or "==", found[2]
        prefix = version.removesuffix(".*")
        try:
            version_key(prefix)
        except ValueError:
            raise ValueError(f"the range {range_!r} has the part {text!r}; {EXPECTED}") from None
        if prefix != version and operator not in ("==", "!="):
            raise ValueError(f"{text!r}: .* goes with == and != alone")
        if operator == "~=" and "." not in version:
            raise ValueError(f"{text!r}: ~= needs two numbers or more, such as '~=0.18.1'")
        parts.append((operator, version))
    return parts


def require_range(range_: object) -> str:
    """The range, if it is one. Raises ValueError, which says what was found."""
    if not isinstance(range_, str):
        raise ValueError(f"versions are {range_!r}; {EXPECTED}, in quotation marks")
    _parts(range_)
    return range_


def is_in_range(version: str, range_: str) -> bool:
    """Whether a version is in all parts of a range. Raises ValueError."""
    return all(_holds(version, operator, bound) for operator, bound in _parts(range_))


def _holds(version: str, operator: str, bound: str) -> bool:
    if bound.endswith(".*"):
        return _begins(version, bound.removesuffix(".*")) == (operator == "==")
    found, wanted = version_key(version), version_key(bound)
    if operator == "~=":
        return found >= wanted and _begins(version, bound.rpartition(".")[0])
    # 0.3rc1 is not below 0.3, and 0.2.post1 not above 0.2: they are of that release.
    of_it = found[:2] == wanted[:2] and _is_final(wanted) and wanted[3] < 0
    return {
        "==": found == wanted,
        "!=": found != wanted,
        "<=": found <= wanted,
        ">=": found >= wanted,
        "<": found < wanted and not (of_it and not _is_final(found)),
        ">": found > wanted and not (of_it and found[3] >= 0),
    }[operator]


def _is_final(key: Key) -> bool:
    return key[2] == (3, 0) and key[4] == float("inf")


def _begins(version: str, prefix: str) -> bool:
    """Whether a version's first numbers are those of the prefix."""
    found, wanted = version_key(version), version_key(prefix)
    count = prefix.rpartition("!")[2].count(".") + 1
    padded = (*found[1], *[0] * count)[:count]
    return found[0] == wanted[0] and padded == (*wanted[1], *[0] * count)[:count]
