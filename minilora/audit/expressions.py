"""Expressions of an adapter's settings whose matching may take longer than anybody waits."""

from __future__ import annotations

MOST = 6
"""So many unlimited repeats, one after the other, are matched; PEFT's patterns have one or two."""


def is_endless(pattern: str) -> bool:
    """Whether a repeat without limit lies in another, as in (a*)*, or more than `MOST` follow.

    Python's re tries every way to part a name among them before it says no.
    """
    repeats, groups, i = 0, [0], 0
    while i < len(pattern):
        sign = pattern[i]
        if sign == "\\":
            i += 1
        elif sign == "[":
            i = _end_of_set(pattern, i)
        elif sign == "(":
            groups.append(0)
        elif sign == ")" and len(groups) > 1:
            inner = groups.pop()
            if inner and pattern[i + 1 : i + 2] in ("*", "+", "{"):
                return True
            groups[-1] += inner
        elif _is_unlimited(pattern, i):
            repeats += 1
            groups[-1] += 1
        i += 1
    return repeats > MOST


def _is_unlimited(pattern: str, i: int) -> bool:
    """Whether a repeat without limit stands here, and no sign of how greedy one is."""
    found = pattern[i] in "*+" or (pattern[i] == "{" and ",}" in pattern[i : i + 8])
    return found and i > 0 and pattern[i - 1] not in "*+?"


def _end_of_set(pattern: str, start: int) -> int:
    """Where the set of characters ends that begins at ``start``."""
    i = start + 2 if pattern[start + 1 : start + 2] == "^" else start + 1
    i += 1 if pattern[i : i + 1] == "]" else 0
    while i < len(pattern) and pattern[i] != "]":
        i += 2 if pattern[i] == "\\" else 1
    return i
