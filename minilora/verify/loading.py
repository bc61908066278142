"""Finding the target of a verification by its name."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from minilora.verify.core.errors import LoadError, describe, near, tidy, type_words
from minilora.verify.implementation.contract import METHODS, has_method

DEFAULT_TARGET = "minilora.verify.implementation.minilora_impl:implementation"
"""The target where none is named: minilora itself."""


def load(target: str) -> object:
    """The implementation that TARGET names: a shipped peer, or ``package.module:name``.

    The name may be an object, a class or a factory without arguments; modules are looked for in
    the current folder first. Raises LoadError.
    """
    from minilora.verify.peers import PEERS

    peer = PEERS.get(target)
    module, colon, name = (peer.implementation if peer else target).partition(":")
    if not (module and colon and name):
        raise LoadError(_no_target(target, sorted(PEERS)))
    own = peer or module.partition(".")[0] == __package__.partition(".")[0]
    if not own and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return resolve(_find(module, name), target)
    except LoadError as error:
        cause = error.__cause__
        if peer and isinstance(cause, ModuleNotFoundError):
            raise LoadError(
                f"{target} cannot be checked: {cause.name} is not installed; "
                f"pip install 'minilora[{peer.extra}]'"
            ) from cause
        raise


def _find(module: str, name: str) -> object:
    found: Any = _import(module)
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            public = [n for n in dir(found) if not n.startswith("_")]
            holds = tidy(", ".join(public)) or "nothing public"
            raise LoadError(
                f"{module} has no {name!r}{near(part, public)}; it holds {holds}"
            ) from None
        except Exception as error:
            raise LoadError(f"reading {name!r} of {module} raises {describe(error)}") from error
    return found


def _no_target(target: str, peers: list[str]) -> str:
    known = f"TARGET is {' or '.join(peers)}, or package.module:name"
    path = target.partition(":")[0]
    if path.endswith(".py") or os.sep in path:
        stem = os.path.basename(path).removesuffix(".py")
        return f"{target!r} is a file; {known}: in its folder, write {stem}:NAME"
    return f"no target {target!r}; {known}{near(target, peers)}"


def _import(module: str) -> object:
    try:
        return importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        if module == missing or module.startswith(f"{missing}."):
            raise LoadError(
                f"no module {missing!r}, neither in the current folder nor installed"
            ) from error
        raise LoadError(f"{module} needs {missing!r}, which is not installed") from error
    except BaseException as error:
        raise LoadError(f"importing {module} raises {describe(error)}") from error


def resolve(found: object, shown: str) -> object:
    """The implementation: the object itself, or what the class or the factory gives."""
    if not isinstance(found, type) and _methods(found):
        return found
    if callable(found):
        if arguments := _required(found):
            raise LoadError(
                f"{shown} takes arguments ({', '.join(arguments)}); give an object, or a class or "
                f"a factory without arguments, whose methods are among {', '.join(METHODS)}"
            )
        try:
            found = found()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise LoadError(f"calling {shown}() raises {describe(error)}") from error
    if not _methods(found):
        raise LoadError(
            f"{shown} is {type_words(found)} with none of the contract's methods: "
            f"{', '.join(METHODS)}"
        )
    return found


def _required(function: Callable[..., object]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled code may have no signature
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


def _methods(implementation: object) -> list[str]:
    return [name for name in METHODS if has_method(implementation, name)]
