"""How a library's callable is called: by its arguments' names, or by trying what they may mean."""

from __future__ import annotations

import ast
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from minilora.verify.skeletons.names import LINEAR, meant

TRIED = ("n", "m", "r", "alpha", LINEAR)
"""What an argument is given whose name tells nothing, one after the other."""

MOST = 4
"""So many such arguments are tried."""


@dataclass(frozen=True)
class Call:
    """A call in Python.

    ``target``: the callable as it is written; ``given``: what each argument is given, with "" in
    the place of a name for those without one; ``unknown``: arguments that nothing is known of;
    ``tried``: those whose name tells nothing; ``free``: numbers that are left at their defaults.
    """

    target: str
    given: Mapping[str, str]
    unknown: tuple[str, ...] = ()
    tried: tuple[str, ...] = ()
    free: tuple[str, ...] = ()

    def __str__(self) -> str:
        unknown = dict.fromkeys(self.unknown, "...")
        listed = (
            value if name.startswith("*") else f"{name}={value}"
            for name, value in {**self.given, **unknown}.items()
        )
        return f"{self.target}({', '.join(listed)})"

    def giving(self, more: Mapping[str, str]) -> Call:
        """The call with other arguments beside or in the place of its own."""
        left = tuple(name for name in self.unknown if name not in more)
        return Call(self.target, {**self.given, **more}, left, self.tried, self.free)

    def gives(self, value: str) -> bool:
        """Whether some argument is given this."""
        return any(value in given for given in self.given.values())


def calls(
    called: Callable[..., Any],
    target: str,
    known: Mapping[str, tuple[str, ...]],
    tried: Sequence[str] = TRIED,
) -> Iterator[Call]:
    """The calls that its arguments may mean; one with ``unknown`` where none can be made."""
    call = by_names(called, target, known)
    if not call.unknown or len(call.unknown) > MOST:
        yield call
    else:
        for values in product(tried, repeat=len(call.unknown)):
            more = dict(zip(call.unknown, values, strict=True))
            yield Call(call.target, {**call.given, **more}, (), call.unknown, call.free)


def by_names(called: Callable[..., Any], target: str, known: Mapping[str, tuple[str, ...]]) -> Call:
    """The call as far as the names of arguments, and the classes that they are of, tell."""
    given: dict[str, str] = {}
    unknown, free = [], []
    for parameter in inspect.signature(called).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        name = parameter.name
        key = f"*{name}" if parameter.kind is parameter.POSITIONAL_ONLY else name
        value = meant(name, known) or _settings(called, name, known)
        if value is not None:
            given[key] = value
        elif parameter.default is parameter.empty:
            unknown.append(key)
        elif type(parameter.default) in (int, float):
            free.append(key)
    return Call(target, given, tuple(unknown), (), tuple(free))


def _settings(
    called: Callable[..., Any], name: str, known: Mapping[str, tuple[str, ...]]
) -> str | None:
    """An object of settings for an argument that is annotated with its class."""
    function = getattr(called, "__init__", called) if isinstance(called, type) else called
    try:
        annotated = typing.get_type_hints(function).get(name)
    except Exception:  # an annotation that cannot be evaluated tells nothing
        return None
    if not inspect.isclass(annotated) or annotated.__module__.partition(".")[0] in (
        *("builtins", "torch", "typing", "collections", "numpy", "jax"),
    ):
        return None
    try:
        call = by_names(annotated, f"{annotated.__module__}.{annotated.__qualname__}", known)
    except (TypeError, ValueError):
        return None
    return None if call.unknown or not call.gives("r") else str(call)


def factories(layer: Any, target: str) -> Iterator[tuple[Callable[..., Any], str]]:
    """A class and its class methods and static methods, which may make one; or a function."""
    yield layer, target
    if isinstance(layer, type):
        for name in dir(layer):
            held = inspect.getattr_static(layer, name)
            if isinstance(held, classmethod | staticmethod) and not name.startswith("_"):
                yield getattr(layer, name), f"{target}.{name}"


def modules(text: str) -> list[str]:
    """The imported modules that an expression names, but torch."""
    found = set()
    for node in ast.walk(ast.parse(text, mode="eval")):
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        while name and name not in sys.modules:
            name = name.rpartition(".")[0]
        found.add(name)
    whole = {name for name in found if not any(other.startswith(f"{name}.") for other in found)}
    return sorted(name for name in whole if name and name.partition(".")[0] != "torch")
