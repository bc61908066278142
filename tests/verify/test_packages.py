"""The packages of `minilora.verify` import one way: no circle, not even inside a function."""

import ast
import functools
from collections.abc import Mapping
from pathlib import Path

import minilora.verify

ROOT = Path(minilora.verify.__file__).parent


@functools.cache
def imported(source: str) -> frozenset[str]:
    """The modules that are imported anywhere, but for those that type checkers alone import."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        if not isinstance(node, ast.expr):
            waiting += ast.iter_child_nodes(node)
    return frozenset(found)


def packages(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """What each package, or module beside them, imports of the others; sources by their paths."""
    graph: dict[str, set[str]] = {path.split("/")[0].removesuffix(".py"): set() for path in sources}
    for path, source in sources.items():
        here = path.split("/")[0].removesuffix(".py")
        for module in imported(source):
            parts = module.split(".")
            if parts[:2] == ["minilora", "verify"] and len(parts) > 2:
                there = parts[2] if parts[2] in graph else "__init__"
                graph[here] |= {there} - {here}
    return graph


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Packages that import each other, as a path that ends where it begins; none if there is no
    circle."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        for other in sorted(graph[node] if node not in done else ()):
            if found := visit(other, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


SOURCES = {str(path.relative_to(ROOT)): path.read_text() for path in ROOT.rglob("*.py")}


def test_no_package_imports_one_that_imports_it():
    graph = packages(SOURCES)
    assert {"core", "checks", "diagnosis", "report"} <= graph.keys()
    assert circle(graph) == []


def test_a_circle_would_be_found_in_a_function_too_and_not_among_types():
    lazy = "def f():\n    from minilora.verify.checks.registry import CHECKS\n"
    assert circle(packages(SOURCES | {"diagnosis/extra.py": lazy})) == [
        "checks",
        "diagnosis",
        "checks",
    ]
    typed = f"if TYPE_CHECKING:\n    {lazy.splitlines()[1].strip()}\n"
    assert circle(packages(SOURCES | {"diagnosis/extra.py": typed})) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_core_and_checks_import_nothing_of_what_is_built_on_them():
    graph = packages(SOURCES)
    assert graph["core"] == set()
    assert graph["implementation"] == {"core"}
    assert "mutants" not in graph["checks"]
