"""Where in a target's file the method stands that a check calls."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

from minilora.verify.checks.registry import CHECKS

Place = tuple[str, int]
"""A file, and a line in it."""


def places_in(source: Path) -> Callable[[str], Place]:
    """For the id of a check the line of the method that it calls, the first if it is not there."""
    lines = dict(_definitions(source))
    methods = {check.id: check.needs for check in CHECKS}

    def place(check: str) -> Place:
        called = reversed(methods.get(check, ()))
        return str(source), next((lines[name] for name in called if name in lines), 1)

    return place


def _definitions(source: Path) -> Iterator[tuple[str, int]]:
    try:
        tree = ast.parse(source.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno
