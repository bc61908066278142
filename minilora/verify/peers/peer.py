"""What is known of a library that `minilora verify NAME` checks, without importing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from typing import Any, TypeVar

from minilora.verify.core.dtypes import DTYPES
from minilora.verify.implementation.contract import DECLARATIONS

_Class = TypeVar("_Class", bound=type)

ACCUMULATION = {"bfloat16": "float32", "float16": "float32"}
"""1 + 511 terms of u/4 came out as the float32 sum in both half precisions, in every library."""


def refuse_settings(library: str, names: Iterable[str]) -> None:
    """Errors: NotImplementedError, which skips the check, if there is a name."""
    if listed := ", ".join(names):
        raise NotImplementedError(f"{library} has no settings {listed}")


@dataclass(frozen=True)
class Peer:
    """One library, or one way to use it.

    ``implementation`` is ``module:class`` of what has the contract's methods; it is imported only
    when the peer is loaded, for it imports the library. ``packages`` are the distributions whose
    versions a report names, the library's own first. ``extra`` installs them. ``levels`` are those
    that the class has methods for. ``known`` maps patterns of ``check`` or ``check:dtype`` to the
    reason for which the library deviates there, and what was seen.
    """

    name: str
    implementation: str
    packages: tuple[str, ...]
    extra: str
    levels: tuple[str, ...]
    dtypes: tuple[str, ...] = tuple(DTYPES)
    conventions: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    mixed: tuple[Mapping[str, str], ...] = ()
    known: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """The installed versions: ``0.21.0 (torch 2.8.0)``. PackageNotFoundError without them."""
        library, *others = self.packages
        beside = ", ".join(f"{package} {version(package)}" for package in others)
        return f"{version(library)} ({beside})" if others else version(library)

    @property
    def precision(self) -> dict[str, dict[str, str]]:
        """What the contract wants to know of each dtype's sums."""
        return {d: {"storage": d, "accumulation": ACCUMULATION.get(d, d)} for d in self.dtypes}

    def describes(self, implementation: _Class) -> _Class:
        """A class decorator: gives the class the contract's attributes."""
        for name in ("name", "version", *DECLARATIONS):
            setattr(implementation, name, getattr(self, name))
        return implementation

    def load(self) -> object:
        """The implementation. ModuleNotFoundError where a package is not installed."""
        module, _, name = self.implementation.partition(":")
        made: Callable[[], Any] = getattr(import_module(module), name)
        return made()
