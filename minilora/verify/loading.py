"""Finding the target of a verification by its name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from minilora.verify.core.errors import LoadError, describe, near, tidy, type_words
from minilora.verify.implementation.contract import METHODS, has_method

DEFAULT_TARGET = "minilora.verify.implementation.minilora_impl:implementation"
"""The target where none is named: minilora itself."""


def load(target: str) -> object:
    """The implementation that TARGET names: a shipped peer, or ``package.module:name``.

    The module may be a path, ``folder/module.py:name``. The name may be an object, a class or a
    factory without arguments; modules are looked for in the current folder first. Raises LoadError.
    """
    from minilora.verify.peers import PEERS

    peer = PEERS.get(target)
    module, colon, name = (peer.implementation if peer else target).rpartition(":")
    if not (module and colon and name):
        raise LoadError(_no_target(target, sorted(PEERS)))
    if not peer and module.partition(".")[0] != __package__.partition(".")[0]:
        _find_here()
    if _is_path(module):
        return resolve(_member(_import_file(Path(module)), module, name), target)
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


def named(module: str, name: str) -> object:
    """What an installed module, or one in the current folder, holds. Raises LoadError."""
    _find_here()
    return _find(module, name)


def _find_here() -> None:
    """Let modules be found in the current folder first."""
    if sys.path[:1] != [os.getcwd()]:
        sys.path.insert(0, os.getcwd())


def source_file(target: str) -> Path | None:
    """The file of a target's module, below the current folder and as it is named from there.

    Nothing is imported; None for a peer, and for what is installed.
    """
    module = target.rpartition(":")[0]
    if not module:
        return None
    path = Path(module) if _is_path(module) else Path(*module.split("."))
    for candidate in (path, path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _find(module: str, name: str) -> object:
    return _member(_import(module), module, name)


def _member(found: Any, module: str, name: str) -> object:
    """What a module holds under a dotted name."""
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
    path = target.partition(":")[0]
    if _is_path(path):
        return f"{target!r} names no class, object or factory of the file: write {path}:NAME"
    return (
        f"no target {target!r}{near(target, peers)}; expected package.module:name, "
        f"path/to/module.py:name, or one of {', '.join(peers)}"
    )


def _is_path(module: str) -> bool:
    """Whether a module is given by its file."""
    return module.endswith(".py") or os.sep in module


def _import_file(path: Path) -> object:
    """The module of a file, which finds its neighbours as a script does. Raises LoadError."""
    if not path.is_file():
        why = "is a folder; name a file in it" if path.is_dir() else "does not exist"
        raise LoadError(f"{path} {why}: write path/to/module.py:NAME")
    path = path.resolve()
    package = [path.stem]
    root = path.parent
    while (root / "__init__.py").is_file():  # for its relative imports
        package.insert(0, root.name)
        root = root.parent
    sys.path.insert(0, str(root))
    if len(package) > 1:
        return _import(".".join(package))
    return _import(path.stem, path)


def _executed(name: str, path: Path) -> ModuleType:
    """The file's code as a module of this name, whatever else has it."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise LoadError(f"{path} is no Python file; its name ends with .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _import(module: str, path: Path | None = None) -> object:
    try:
        return importlib.import_module(module) if path is None else _executed(module, path)
    except KeyboardInterrupt:
        raise
    except LoadError:
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
