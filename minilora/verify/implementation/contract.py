"""The target of a verification: finding it, calling it safely, taking its answers.

Nothing that a target does reaches the caller as anything but an answer, a Skip or a Fault. One
limit is left: a call into compiled code that keeps Python's interpreter lock, or that kills the
process, cannot be stopped from inside the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import inspect
import linecache
import os
import queue
import sys
import threading
import traceback
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from types import FrameType, ModuleType
from typing import Any

import ml_dtypes
import numpy as np

METHODS: dict[str, str] = {
    "lora_linear": "x, W, A, B, *, alpha, r, bias=None, keep=None, p=0.0, **settings",
    "lora_linear_vjp": "x, W, A, B, dy, *, alpha, r, bias=None, keep=None, p=0.0, **settings",
    "merge": "W, A, B, *, alpha, r, **settings",
    "unmerge": "W_merged, A, B, *, alpha, r, **settings",
    "combine": "adapters, weights, **settings",
    "multi_adapter": "x, W, adapters, index",
    "model_loss": "model_dir, adapter_dir, batch",
    "optimizer_steps": "params, gradients, settings",
    "train": "model_dir, adapter_dir, batches, settings",
    "save": "model_dir, adapter_arrays, settings, out_dir",
    "load": "model_dir, adapter_dir",
    "session": "layer",
    "init": "W, *, r, alpha, seed, **settings",
}
"""The methods that an implementation may have, with the arguments that they are called with."""

SESSION: dict[str, str] = {
    "add": "name, adapter",
    "activate": "names",
    "disable": "",
    "scale": "name, factor",
    "merge": "",
    "unmerge": "",
    "delete": "name",
    "train": "",
    "eval": "",
    "forward": "x",
    "weight": "",
    "save": "name, folder",
    "load": "name, folder",
    "gradients": "x, dy",
}
"""The methods of what ``session`` answers, likewise."""

SESSION_NEEDS = ("add", "forward")
"""Those without which it is no session; the others may be absent."""

ANSWERS = ("forward", "gradients", "weight")
"""Those that are no step."""

KEEPS = ("session", "add")
"""The methods whose last argument a session may hold: no later call may change it."""

DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""The dtypes under test, widest first."""

DEFAULT_DTYPES = ("float64", "float32")
TIME_LIMIT = 30.0
"""Seconds that one call may take; generous, because a first call may compile or import."""

MOST = 10_000
"""So many entries has no list that is asked for: what goes on so long has no end."""

CONVENTIONS = {"dora_norm": ("detached", "differentiated")}
"""What an implementation may choose, and declares."""

HANGS_ALLOWED = 2
"""After so many calls of a method that hung, it is not called again in this run."""


class LoadError(Exception):
    """The target cannot be found, built or used; the message says why and what to do."""


class Skip(Exception):
    """The implementation does not support what this case asks."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = tidy(reason)


class Fault(Exception):
    """The implementation gave no answer that could be compared.

    ``kind`` is one of: raises, hangs, changes its inputs, not an array, shape, dtype, nan,
    missing, crashes, protocol, internal. The last is a fault of this package, and the two before
    it are of an implementation in another process.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = tidy(message, 600)


class Remote:
    """An implementation in another process (`process`), which is told more than one in this.

    It ends a call that is over the time limit by itself, raises Skip and Fault with its own words,
    and is told the id of the check that calls.
    """

    check = ""
    time_limit = TIME_LIMIT


@dataclass(frozen=True)
class Precision:
    """How an implementation computes: the dtype of what it stores and of its running sums."""

    storage: str
    accumulation: str


def tidy(text: object, limit: int = 300) -> str:
    """One printable line of at most ``limit`` characters, whatever a target said."""
    try:
        line = " ".join(str(text).split())
    except Exception:
        line = f"<{type(text).__name__} that has no text>"
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def describe(error: BaseException, home: str | None = None) -> str:
    """The exception's type, message and place: the last line in ``home``, the target's own file."""
    says = f"{type(error).__name__}: {tidy(error)}".removesuffix(": ")
    if isinstance(error, SyntaxError):  # whose message names the file and the line
        return says
    place = _place(reversed(list(traceback.walk_tb(error.__traceback__))), home)
    return f"{says} ({place})" if place else says


def _place(frames: Iterable[tuple[FrameType, int]], home: str | None) -> str:
    """The innermost line of the target's own file in these frames, innermost first."""
    outside = [
        (frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in frames
        if frame.f_code.co_filename != __file__
        and not frame.f_code.co_filename.startswith("<frozen importlib")
    ]
    if not outside:
        return ""
    file, line, name = next((f for f in outside if f[0] == home), outside[0])
    source = tidy(linecache.getline(file, line), 80)
    return f"{os.path.basename(file)}:{line}, in {name}" + (f": {source}" if source else "")


OWN = "minilora.verify.implementation.minilora_impl:implementation"
"""The target where none is named: minilora itself."""


def load(target: str) -> object:
    """The implementation that TARGET names: a shipped peer, or ``package.module:name``.

    The name may be an object, a class or a factory without arguments; modules are looked for in
    the current folder first. Raises LoadError.
    """
    from minilora.verify.peers import EXTRAS, PEERS

    module, colon, name = PEERS.get(target, target).partition(":")
    if not (module and colon and name):
        raise LoadError(_no_target(target, sorted(PEERS)))
    own = target in PEERS or module.partition(".")[0] == __package__.partition(".")[0]
    if not own and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return resolve(_find(module, name), target)
    except LoadError as error:
        cause = error.__cause__
        if target in PEERS and isinstance(cause, ModuleNotFoundError):
            raise LoadError(
                f"{target} cannot be checked: {cause.name} is not installed; "
                f"pip install 'minilora[{EXTRAS.get(target, 'peers')}]'"
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


def near(asked: str, known: list[str]) -> str:
    """A suggestion for a mistyped name, or nothing."""
    import difflib

    close = difflib.get_close_matches(asked, known, n=1, cutoff=0.7)
    return f" (did you mean {close[0]!r}?)" if close else ""


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
            f"{shown} is {_named(found)} with none of the contract's methods: {', '.join(METHODS)}"
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
    return [name for name in METHODS if _has(implementation, name)]


def _has(implementation: object, method: str) -> bool:
    try:
        return callable(getattr(implementation, method, None))
    except Exception:  # it is there, and calling it will say what is wrong
        return True


def _named(value: object) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


class GuardedImplementation:
    """An implementation with its declarations, called safely.

    Arrays go in as fresh writable copies and are compared with the originals afterwards. A call
    runs in a thread of its own that is left behind when the time limit is over; what a ``whole``
    has answered, a session, is called in the thread of that.
    """

    def __init__(
        self,
        implementation: object,
        *,
        time_limit: float = TIME_LIMIT,
        methods: Mapping[str, str] = METHODS,
        whole: GuardedImplementation | None = None,
    ) -> None:
        self.implementation = implementation
        self._methods = methods
        self._whole = whole
        self.time_limit = time_limit
        if isinstance(implementation, Remote):  # a call may have to start it first
            implementation.time_limit, self.time_limit = time_limit, 2 * time_limit + 10
        self.spent = 0.0
        """Seconds that the implementation has taken so far."""
        self.remarks: dict[str, None] = {}
        """What checks have remarked on, in order, each once."""
        self.traits: set[str] = set()
        """What is particular about the calls of a case, in words; who asks a case empties it."""
        self.sizes: dict[str, int] = {}
        """The greatest sizes in the calls of a case, each by its name; emptied likewise."""
        self._lent: list[tuple[str, Any, Any]] = []
        """What a session was given to hold: its name, the array as it is now and as it was."""
        self._worker: _Worker | None = None
        self._hangs: Counter[str] = Counter()
        self._home = _home(implementation)
        self._set = _settings(implementation)
        kind = implementation if isinstance(implementation, type) else type(implementation)
        self.name = tidy(self._text("name", kind.__name__), 60)
        self.version = tidy(self._text("version", ""), 120)
        self.dtypes = self._read_dtypes()
        self._precision = {d: self._read_precision(d) for d in self.dtypes}
        self.conventions = self._read_mapping("conventions")
        for name, value in self.conventions.items():
            if value not in (known := CONVENTIONS.get(name, (value,))):
                expected = f"expected one of {', '.join(known)}"
                raise LoadError(f"{self.name}: conventions[{name!r}] is {value!r}, {expected}")
        self.known = self._read_mapping("known")

    def _declared(self, attribute: str, default: Any) -> Any:
        try:
            value = getattr(self.implementation, attribute, None)
        except Exception as error:
            raise LoadError(
                f"reading {attribute!r} of the target raises {describe(error)}"
            ) from None
        return default if value is None else value

    def _text(self, attribute: str, default: str) -> Any:
        value = self._declared(attribute, default)
        if callable(value):
            raise LoadError(f"{attribute!r} of the target is {_named(value)}, expected a text")
        return value

    def _read_mapping(self, attribute: str) -> dict[str, Any]:
        value = self._declared(attribute, {})
        if not isinstance(value, Mapping):
            raise LoadError(f"{self.name}: {attribute!r} is {_named(value)}, expected a dict")
        return {str(key): entry for key, entry in value.items()}

    def _read_dtypes(self) -> tuple[str, ...]:
        value = self._declared("dtypes", DEFAULT_DTYPES)
        try:
            names = {_dtype_name(d) for d in ((value,) if isinstance(value, str) else value)}
        except TypeError:
            raise LoadError(f"{self.name}: 'dtypes' is {_named(value)}, expected names") from None
        if unknown := sorted(names - set(DTYPES)):
            raise LoadError(
                f"{self.name}: 'dtypes' names {', '.join(unknown)}; known are {', '.join(DTYPES)}"
            )
        return tuple(d for d in DTYPES if d in names)

    def _read_precision(self, dtype: str) -> Precision:
        entry = self._read_mapping("precision").get(dtype, {})
        if not isinstance(entry, Mapping):
            raise LoadError(
                f"{self.name}: precision[{dtype!r}] is {_named(entry)}, "
                'expected {"storage": dtype, "accumulation": dtype}'
            )
        names = [_dtype_name(entry.get(k, dtype)) for k in ("storage", "accumulation")]
        if unknown := [n for n in names if n not in DTYPES]:
            raise LoadError(
                f"{self.name}: precision[{dtype!r}] names {', '.join(unknown)}; "
                f"known are {', '.join(DTYPES)}"
            )
        return Precision(*names)

    def remark(self, text: str) -> None:
        """Notes for the report what is no deviation and that a reader should know."""
        self.remarks[text] = None

    def precision(self, dtype: str) -> Precision:
        """The precision declared for a dtype: the dtype itself where nothing is declared."""
        return self._precision.get(dtype, Precision(dtype, dtype))

    def has(self, method: str) -> bool:
        """Whether the implementation has this method."""
        return _has(self.implementation, method)

    def anew(self) -> GuardedImplementation | None:
        """The implementation as it was before any call, if its class makes just that one."""
        try:
            kind = type(self.implementation)
            if inspect.signature(kind).parameters:
                return None
            made = kind()
        except Exception:  # a module, or a class of compiled code
            return None
        if _settings(made) != self._set:  # it has been given other ones since it was made
            return None
        return GuardedImplementation(made, time_limit=self.time_limit, methods=self._methods)

    def session(self, layer: Any) -> GuardedImplementation:
        """The session that it opens, called as safely. Raises Skip or Fault."""
        opened = self.call("session", layer)
        limit = self.time_limit
        session = type(self)(opened, time_limit=limit, methods=SESSION, whole=self)
        session._lent, self._lent = self._lent, []
        if absent := [name for name in SESSION_NEEDS if not session.has(name)]:
            raise Fault("missing", f"session answers {_named(opened)} without {', '.join(absent)}")
        return session

    def announce(self, check: str) -> None:
        """Says which check calls from now on, to an implementation that wants to know."""
        if isinstance(self.implementation, Remote):
            self.implementation.check = check

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """What the method answers, its arrays copied. Raises Skip or Fault."""
        if self._hangs[method] >= HANGS_ALLOWED:
            raise Fault("hangs", f"{method} is not called any more: it hung {HANGS_ALLOWED} times")
        names = positional(method, self._methods)
        named = dict(zip(names, args, strict=False)) | kwargs
        self.traits |= {*_traits(named)}
        for name, size in _sizes(named):
            self.sizes[name] = max(size, self.sizes.get(name, 0))
        given = _copied((args, kwargs))
        started = perf_counter()
        try:
            answer = self._within_limit(
                lambda: _settled(getattr(self.implementation, method)(*given[0], **given[1]))
            )
        except _TimeOut as late:
            self._hangs[method] += 1
            at = f" ({late.place})" if late.place else ""
            raise Fault("hangs", f"{method} gave no answer in {self.time_limit:g} s{at}") from None
        except Raised as raised:
            raise self._verdict_on(method, raised.error) from raised.error
        finally:
            seconds = perf_counter() - started
            for each in filter(None, (self, self._whole)):
                each.spent += seconds
        for i, (arg, original) in enumerate(zip(given[0], args, strict=True)):
            _unchanged(names[i] if i < len(names) else f"argument {i + 1}", arg, original)
        for name, original in kwargs.items():
            _unchanged(name, given[1][name], original)
        if method not in ANSWERS:  # what these change is found after the next step
            for what, now, original in self._lent:
                _unchanged(what, now, original, f"after {method}()")
        if method in KEEPS:
            self._lent.append((names[-1], given[0][-1], args[-1]))
        return answer

    def _verdict_on(self, method: str, error: BaseException) -> Skip | Fault:
        if isinstance(error, Skip | Fault) and isinstance(self.implementation, Remote):
            self._hangs[method] += isinstance(error, Fault) and error.kind == "hangs"
            return error
        if isinstance(error, NotImplementedError):
            return Skip(f"not supported: {tidy(error) or method}")
        says = describe(error, self._home)
        if isinstance(error, TypeError) and not says.endswith(")"):  # refused at the door
            says += f"; the contract is {method}({self._methods.get(method, '…')})"
        return Fault("raises", says)

    def _within_limit(self, call: Callable[[], Any]) -> Any:
        if self._whole is not None:
            return self._whole._within_limit(call)
        if self._worker is None:
            self._worker = _Worker()
            weakref.finalize(self, self._worker.stop)
        # A target's warnings are no verdict, and what it prints is kept out of a report.
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            try:
                return self._worker.call(call, self.time_limit, self._home)
            except (_TimeOut, KeyboardInterrupt):
                self._worker.abandon()
                self._worker = None
                raise

    def answer(
        self,
        value: Any,
        what: str,
        shape: tuple[int, ...] | None = None,
        dtype: str | None = None,
    ) -> np.ndarray:
        """The array that the implementation answered under the name ``what``.

        Anything that NumPy can take is an array, its bytes in either order. Raises Fault where it
        is none, where its shape or dtype is not the one given (None: any shape, any real dtype),
        and where it is not finite.
        """
        try:
            array = np.array(value)
        except Exception as error:
            raise Fault(
                "not an array", f"{what} is {_named(value)} that NumPy cannot take: {tidy(error)}"
            ) from None
        if array.dtype.kind in "fiu":
            array = array.astype(array.dtype.newbyteorder("="), copy=False)
        if array.dtype.kind not in "fiub" and array.dtype != DTYPES["bfloat16"]:
            of = "" if array.dtype.kind == "O" else f" of {array.dtype}"
            raise Fault("not an array", f"{what} is {_named(value)}{of}, expected real numbers")
        source = "" if isinstance(value, np.ndarray) else f" (it is {_named(value)})"
        if shape is not None and array.shape != tuple(shape):
            raise Fault("shape", f"{what} has shape {array.shape}, expected {shape}{source}")
        given = type(value) in (int, float)  # a number of Python's has no dtype of its own
        if dtype is not None and not given and array.dtype != DTYPES[dtype]:
            raise Fault("dtype", f"{what} is {array.dtype}, expected {dtype}{source}")
        bad = ~np.isfinite(array)
        if bad.any():
            where = [int(i) for i in np.argwhere(bad)[0]]
            raise Fault(
                "nan",
                f"{what} holds {int(np.isnan(array).sum())} NaN and {int(np.isinf(array).sum())} "
                f"infinite of {array.size} values, the first at {where}",
            )
        return array

    def entry(self, value: Any, key: str, what: str = "the answer") -> Any:
        """``value[key]``. Raises Fault where the value is no mapping or has no such key."""
        if not isinstance(value, Mapping):
            raise Fault("missing", f"{what} is {_named(value)}, expected a dict with {key!r}")
        if key not in value:
            keys = tidy(", ".join(repr(k) for k in value)) or "nothing"
            raise Fault("missing", f"{what} has no {key!r}; it holds {keys}")
        return value[key]

    def items(self, value: Any, length: int, what: str = "the answer") -> list[Any]:
        """The value as a list of this length. Raises Fault."""
        if not isinstance(value, list | tuple):
            raise Fault("missing", f"{what} is {_named(value)}, expected a list of {length}")
        if len(value) != length:
            raise Fault("missing", f"{what} has {len(value)} entries, expected {length}")
        return list(value)


def _settings(implementation: object) -> dict[str, Any]:
    """The attributes that say how an implementation was made: its numbers and words."""
    own = getattr(implementation, "__dict__", {})
    return {name: v for name, v in own.items() if isinstance(v, bool | int | float | str)}


def _traits(given: Mapping[str, Any]) -> Iterator[str]:
    """What is particular about the arguments of a layer: what an implementation may branch on."""
    r, alpha = given.get("r"), given.get("alpha")
    if r == 1:
        yield "r = 1"
    if isinstance(alpha, int | float) and alpha < 0:
        yield "alpha is negative"
    arrays = [v for v in given.values() if isinstance(v, np.ndarray) and v.dtype.kind not in "iub"]
    if arrays:
        whole = all(bool((v == np.rint(v.astype(float))).all()) for v in arrays)
        yield f"the numbers are {'' if whole else 'not '}whole"
    if isinstance(W := given.get("W"), np.ndarray) and W.ndim == 2:
        yield f"W is {'' if len(W) == len(W.T) else 'not '}square"
        if isinstance(r, int) and r > min(W.shape):
            yield "r is greater than a side of W"
    if isinstance(x := given.get("x"), np.ndarray) and x.ndim:
        yield f"x has {x.ndim} {'axis' if x.ndim == 1 else 'axes'}"
        yield f"there is {'one token' if x.size == x.shape[-1] else 'more than one token'}"
        if isinstance(W, np.ndarray) and W.ndim == 2 and x.shape[-1]:
            for side, name in zip(W.shape, ("rows", "columns"), strict=True):
                if x.size == side * x.shape[-1]:
                    yield f"there are as many tokens as {name} of W"
        yield f"there is {'no' if given.get('bias') is None else 'a'} bias"
        yield f"there is {'no' if given.get('keep') is None else 'a'} dropout mask"


def _sizes(given: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """What a kernel may cut into pieces, whose last ones are easily wrong."""
    if isinstance(W := given.get("W"), np.ndarray) and W.ndim == 2:
        yield from zip(("rows of W", "columns of W"), W.shape, strict=True)
    if isinstance(x := given.get("x"), np.ndarray) and x.ndim and x.shape[-1]:
        yield "tokens", x.size // x.shape[-1]
    if isinstance(r := given.get("r"), int):
        yield "ranks", r


def _dtype_name(dtype: Any) -> str:
    try:
        return str(np.dtype(dtype))
    except TypeError:
        return str(dtype).split(".")[-1]  # torch.float32


def _home(implementation: object) -> str | None:
    """The file that the implementation's class, or the module itself, was written in."""
    try:
        return inspect.getfile(
            implementation if isinstance(implementation, ModuleType) else type(implementation)
        )
    except (TypeError, OSError):
        return None


def positional(method: str, methods: Mapping[str, str] = METHODS) -> list[str]:
    """The names of the arguments that a method is given without them."""
    before, _, _ = methods.get(method, "").partition(", *")
    return [name for name in before.split(", ") if name]


def _copied(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return np.array(value, order="C")
    if type(value) is dict:
        return {key: _copied(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(entry) for entry in value)
    return value


def _settled(value: Any) -> Any:
    """The answer with everything lazy computed and every array copied, within the time limit.

    A copy, because an implementation may use its output buffer again in the next call.
    """
    if type(value) is dict:
        return {key: _settled(entry) for key, entry in value.items()}
    if type(value) in (list, tuple) or isinstance(value, Iterator):
        entries = [_settled(entry) for entry in islice(value, MOST)]
        if len(entries) == MOST:
            raise ValueError(f"an answer of {MOST} entries and more: has it no end?")
        return tuple(entries) if type(value) is tuple else entries
    if hasattr(value, "__array__"):
        with contextlib.suppress(Exception):  # `answer` will say what NumPy said
            return np.array(value)
    return value


def _unchanged(path: str, now: Any, original: Any, when: str = "after the call") -> None:
    """Raises Fault where a call has changed an array or a container that it was given."""
    if isinstance(original, np.ndarray):
        if (now.shape, now.dtype) != (original.shape, original.dtype):
            raise Fault("changes its inputs", f"{path} is now {now.dtype} of shape {now.shape}")
        if now.tobytes() != original.tobytes():
            where = [int(i) for i in np.argwhere(_differ(now, original))[0]]
            raise Fault(
                "changes its inputs",
                f"{path}{where} was {original[tuple(where)]!s} and is {now[tuple(where)]!s} {when}",
            )
    elif type(original) is dict:
        if now.keys() != original.keys():
            changed = ", ".join(sorted(map(repr, now.keys() ^ original.keys())))
            raise Fault("changes its inputs", f"{path} gained or lost {changed} {when}")
        for key in original:
            entry = _same_kind(path, now[key], original[key])
            _unchanged(f"{path}[{key!r}]", entry, original[key], when)
    elif type(original) in (list, tuple):
        if len(now) != len(original):
            raise Fault("changes its inputs", f"{path} had {len(original)} entries, now {len(now)}")
        for i, (entry, before) in enumerate(zip(now, original, strict=True)):
            _unchanged(f"{path}[{i}]", _same_kind(path, entry, before), before, when)


def _same_kind(path: str, now: Any, original: Any) -> Any:
    """An entry of a container, after the test that it was not replaced by something else."""
    replaced = type(now) is not type(original)
    container = isinstance(original, (np.ndarray, dict, list, tuple))
    if not (replaced or container or now is original):
        replaced = bool(now != original)
    if replaced:
        raise Fault(
            "changes its inputs", f"an entry of {path} was replaced by {_named(now)} in the call"
        )
    return now


def _differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where two arrays of one shape and dtype differ in their bytes; 0-d arrays give one index."""
    size = max(a.dtype.itemsize, 1)
    bytes_a = np.frombuffer(a.tobytes(), np.uint8).reshape(*a.shape, size)
    bytes_b = np.frombuffer(b.tobytes(), np.uint8).reshape(*b.shape, size)
    return np.asarray((bytes_a != bytes_b).any(axis=-1))


class _TimeOut(Exception):
    """The call did not return in time; ``place`` is the line where it was then."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.place = place


class Raised(Exception):
    """The call raised; whatever it was is carried, so that nothing of a target passes unseen."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


class _Stop(BaseException):
    """Thrown into a thread whose call is over its time: ends a loop of Python code."""


_Job = tuple[Callable[[], Any], list[Any], threading.Event]


class _Worker:
    """One daemon thread that makes the calls of a subject, one after another.

    One for all calls, because libraries keep state and thread pools per thread.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="minilora-target", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(_Stop):
            while (job := self._calls.get()) is not None:
                call, outcome, done = job
                try:
                    outcome += [call(), None]
                except BaseException as error:
                    outcome += [None, error]
                    if isinstance(error, _Stop):
                        return
                finally:
                    done.set()
                del job, call, outcome, done  # what they hold need not wait for the next call

    def call(self, call: Callable[[], Any], limit: float, home: str | None) -> Any:
        """What the call gives. Raises Raised, or _TimeOut after ``limit`` seconds."""
        outcome: list[Any] = []
        done = threading.Event()
        self._calls.put((call, outcome, done))
        if not done.wait(limit):
            frame = sys._current_frames().get(self._thread.ident or 0)
            raise _TimeOut(_place(traceback.walk_stack(frame), home) if frame else "")
        answer, error = outcome
        if error is not None:
            raise Raised(error)
        return answer

    def stop(self) -> None:
        """Ends the thread after its calls, and waits: a library may keep state until it ends."""
        self._calls.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def abandon(self) -> None:
        """Ends the thread if its call runs Python code; else leaves it behind, as a daemon."""
        if self._thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self._thread.ident), ctypes.py_object(_Stop)
            )
        self._thread.join(0.05)
