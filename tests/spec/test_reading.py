"""ops, lora, blocks and models can be read alone, and in one sitting."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

from minilora import spec

CORE = ("ops", "lora", "blocks", "models")
SOURCES = {name: (Path(spec.__file__).parent / f"{name}.py").read_text() for name in CORE}
MOST_LINES = 600
"""Lines of code of the four together."""

SCREEN = 50
"""Lines of a function, its docstring among them."""

STANDARD = {"collections", "dataclasses", "math", "typing"}


def imported_modules(source):
    """Every module that the source imports, one of a package by its own name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = node.module == "minilora.spec"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if package else [node.module]


def outside(source):
    """What the source imports beside the four, NumPy, SciPy and the standard library."""
    allowed = {f"minilora.spec.{name}" for name in CORE}
    others = {name for name in imported_modules(source) if name not in allowed}
    return {name for name in others if name.split(".")[0] not in {"numpy", "scipy"} | STANDARD}


def lines_of_code(source):
    """How many lines hold code: no blank line, no comment, no docstring."""
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {
        line
        for token in tokens
        if token.type not in empty | {tokenize.ENDMARKER}
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(lines - docstrings)


def longer_than_a_screen(source):
    """The functions that take more lines than a screen has."""
    functions = (f for f in ast.walk(ast.parse(source)) if isinstance(f, ast.FunctionDef))
    return {f.name for f in functions if f.end_lineno - f.lineno + 1 > SCREEN}


@pytest.mark.parametrize("name", CORE)
def test_the_four_import_one_another_and_numpy_alone(name):
    assert outside(SOURCES[name]) == set()


def test_an_import_of_anything_else_is_seen():
    for line, module in (
        ("from minilora.spec import layers", "minilora.spec.layers"),
        ("from minilora.spec.layers import OneHot", "minilora.spec.layers"),
        ("def f():\n import minilora.io.loading", "minilora.io.loading"),
        ("import threading", "threading"),
    ):
        assert outside(f"{SOURCES['lora']}\n{line}\n") == {module}


def test_the_four_have_no_more_lines_of_code_than_one_reads_in_a_sitting():
    count = sum(map(lines_of_code, SOURCES.values()))
    assert count <= MOST_LINES
    print(f"{count} lines of code in {', '.join(CORE)}")


def test_a_line_of_code_counts_and_none_of_prose_does():
    source = SOURCES["ops"]
    assert lines_of_code(f'{source}\nx = (\n    "a"\n)\n') == lines_of_code(source) + 3
    assert lines_of_code(f'{source}\n\n# a comment\n"""What x is."""\n') == lines_of_code(source)


@pytest.mark.parametrize("name", CORE)
def test_each_function_fits_on_a_screen(name):
    assert longer_than_a_screen(SOURCES[name]) == set()


def test_a_long_function_is_seen():
    lines = "    x = 1\n" * SCREEN
    assert longer_than_a_screen(f"def long():\n{lines}") == {"long"}
    assert longer_than_a_screen(f"def fits():\n{lines[:-10]}") == set()
