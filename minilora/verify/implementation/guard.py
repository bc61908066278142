"""A target, called safely, and its answers.

Nothing that a target does reaches the caller as anything but an answer, a Skip or a Fault. A call
that keeps Python's interpreter lock, or that kills the process, is one only where the target runs
in a process of its own (`python_target`).
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from types import ModuleType
from typing import Any

import numpy as np

from minilora.verify.core.dtypes import DTYPES, Precision
from minilora.verify.core.errors import Fault, LoadError, Skip, describe, tidy, type_words
from minilora.verify.core.fixed import OPTIONAL, Fixed
from minilora.verify.core.mixture import Mixture
from minilora.verify.implementation.arguments import (
    Buffers,
    LastAnswer,
    arguments_of,
    copied,
    require_files,
    require_unchanged,
    settings_of,
    settled,
    sizes_of,
    traits_of,
)
from minilora.verify.implementation.contract import (
    ANSWERS,
    COMPUTED,
    CONVENTIONS,
    DEFAULT_DTYPES,
    KEEPS,
    LAYER_METHODS,
    LAYOUTS,
    METHODS,
    SESSION,
    SESSION_NEEDS,
    TIME_LIMIT,
    WRITES,
    Remote,
    has_method,
    positional,
)
from minilora.verify.implementation.worker import Raised, TimedOut, Worker

MAX_HANGS = 2
"""After so many calls of a method that hung, it is not called again in this run."""


class GuardedImplementation:
    """An implementation with its declarations, called safely.

    Arrays are passed as writable copies and compared with the originals afterwards. Calls run in a
    thread of their own, which is abandoned when the time limit is over; without a time limit, and
    where the implementation is in another process, in the thread of the caller. A session runs in
    the thread of its ``owner``, the implementation that opened it.
    """

    def __init__(
        self,
        implementation: object,
        *,
        time_limit: float | None = TIME_LIMIT,
        methods: Mapping[str, str] = METHODS,
        owner: GuardedImplementation | None = None,
    ) -> None:
        self.implementation = implementation
        self._methods = methods
        self._owner = owner
        self.time_limit = time_limit
        self._remote = implementation if isinstance(implementation, Remote) else None
        if self._remote is not None and time_limit is not None:
            self._remote.time_limit = time_limit
        self.spent = 0.0
        """Seconds spent in the implementation so far."""
        self.remarks: dict[str, None] = {}
        """Notes of the checks for the report, in order, each once."""
        self.traits: set[str] = set()
        """The traits of a case's calls, in words; emptied before each case."""
        self.sizes: dict[str, int] = {}
        """The largest sizes in a case's calls, by name; emptied before each case."""
        self.foretold = ""
        """Whether a session may refuse its next step, for who keeps the steps (test vectors)."""
        self.session_lacks: frozenset[str] = frozenset()
        """The methods that the last session lacks."""
        self._lent: list[tuple[str, Any, Any]] = []
        """Arguments that a session may keep: the name, the argument as passed, and the original."""
        self._taken: dict[str, frozenset[str] | None] = {}
        """The names of the arguments of each method that was called."""
        self._buffers = Buffers()
        self._calls: Counter[str] = Counter()
        self._answers: dict[str, LastAnswer] = {}
        """The last answer of each method of `COMPUTED`."""
        self._worker: Worker | None = None
        self._hangs: Counter[str] = Counter()
        self.home = _home(implementation)
        """The file that the implementation was written in."""
        self._settings = settings_of(implementation)
        kind = implementation if isinstance(implementation, type) else type(implementation)
        self.name = tidy(self._text("name", kind.__name__), 60)
        self.version = tidy(self._text("version", ""), 120)
        self.dtypes = self._read_dtypes()
        self._precision = {d: self._read_precision(d) for d in self.dtypes}
        self.conventions = self._read_mapping("conventions")
        for name, value in self.conventions.items():
            if value not in (known := (CONVENTIONS | LAYOUTS).get(name, (value,))):
                expected = f"expected one of {', '.join(known)}"
                raise LoadError(f"{self.name}: conventions[{name!r}] is {value!r}, {expected}")
        self.known = self._read_mapping("known")
        self.mixtures = self._read_mixtures()
        self.declared_fixed = self._read_mapping("fixed")
        self.fixed = Fixed.of(self.declared_fixed, self.name)
        lacking = self.fixed.lacking | self._lacking()
        self.fixed = replace(self.fixed, lacking=lacking, mixtures=self.mixtures)

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
            raise LoadError(
                f"{attribute!r} of the target is {type_words(value)}, expected a string"
            )
        return value

    def _read_mapping(self, attribute: str) -> dict[str, Any]:
        value = self._declared(attribute, {})
        if not isinstance(value, Mapping):
            raise LoadError(f"{self.name}: {attribute!r} is {type_words(value)}, expected a dict")
        return {str(key): entry for key, entry in value.items()}

    def _read_dtypes(self) -> tuple[str, ...]:
        value = self._declared("dtypes", DEFAULT_DTYPES)
        try:
            names = {_dtype_name(d) for d in ((value,) if isinstance(value, str) else value)}
        except TypeError:
            raise LoadError(
                f"{self.name}: 'dtypes' is {type_words(value)}, expected names"
            ) from None
        if unknown := sorted(names - set(DTYPES)):
            raise LoadError(
                f"{self.name}: 'dtypes' names {', '.join(unknown)}; expected {', '.join(DTYPES)}"
            )
        return tuple(d for d in DTYPES if d in names)

    def _read_precision(self, dtype: str) -> Precision:
        entry = self._read_mapping("precision").get(dtype, {})
        if not isinstance(entry, Mapping):
            raise LoadError(
                f"{self.name}: precision[{dtype!r}] is {type_words(entry)}, "
                'expected {"storage": dtype, "accumulation": dtype}'
            )
        names = [_dtype_name(entry.get(k, dtype)) for k in ("storage", "accumulation")]
        if unknown := [n for n in names if n not in DTYPES]:
            raise LoadError(
                f"{self.name}: precision[{dtype!r}] names {', '.join(unknown)}; "
                f"expected {', '.join(DTYPES)}"
            )
        return Precision(*names)

    def _read_mixtures(self) -> tuple[Mixture, ...]:
        value = self._declared("mixed", ())
        if not isinstance(value, list | tuple):
            raise LoadError(f"{self.name}: 'mixed' is {type_words(value)}, expected a list")
        return tuple(Mixture.of(entry, self.name) for entry in value)

    def _lacking(self) -> set[str]:
        """The settings that none of the methods of a layer has an argument for."""

        def absent(argument: str, methods: Sequence[str]) -> bool:
            found = [arguments_of(self.implementation, m) for m in methods if self.has(m)]
            return bool(found) and all(f is not None and argument not in f for f in found)

        forward = {"bias": 2, "dropout": 2}  # merging has neither
        return {
            name
            for name in OPTIONAL
            if absent({"dropout": "keep"}.get(name, name), LAYER_METHODS[: forward.get(name)])
        }

    def remark(self, text: str) -> None:
        """Adds a note to the report: no deviation, but worth knowing."""
        self.remarks[text] = None

    def precision(self, dtype: str) -> Precision:
        """The precision declared for a dtype; by default, the dtype itself."""
        return self._precision.get(dtype, Precision(dtype, dtype))

    def has(self, method: str) -> bool:
        """Whether the implementation has this method."""
        return has_method(self.implementation, method)

    def anew(self) -> GuardedImplementation | None:
        """A new instance, as before any call; None where the class needs arguments."""
        if self._remote is not None:
            other = self._remote.anew()
            return None if other is None else self._beside(other)
        try:
            kind = type(self.implementation)
            if inspect.signature(kind).parameters:
                return None
            fresh = kind()
        except Exception:  # a module, or a class of compiled code
            return None
        if settings_of(fresh) != self._settings:  # it was configured after it was made
            return None
        return self._beside(fresh)

    def _beside(self, implementation: object) -> GuardedImplementation:
        return GuardedImplementation(
            implementation, time_limit=self.time_limit, methods=self._methods
        )

    def session(self, layer: Any) -> GuardedImplementation:
        """The session that the implementation opens, guarded. Raises Skip or Fault."""
        opened = self.call("session", layer)
        limit = self.time_limit
        session = type(self)(opened, time_limit=limit, methods=SESSION, owner=self)
        session._lent, self._lent = self._lent, []
        session.traits, session.sizes = self.traits, self.sizes
        if absent := [name for name in SESSION_NEEDS if not session.has(name)]:
            raise Fault(
                "missing", f"session answers {type_words(opened)} without {', '.join(absent)}"
            )
        self.session_lacks = frozenset(name for name in SESSION if not session.has(name))
        return session

    def announce(self, check: str) -> None:
        """Tells a remote implementation which check calls from now on."""
        if self._remote is not None:
            self._remote.check = check

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The method's answer, with its arrays copied. Raises Skip or Fault."""
        if self._hangs[method] >= MAX_HANGS:
            raise Fault("hangs", f"{method} is not called any more: it hung {MAX_HANGS} times")
        names = positional(method, self._methods)
        named = dict(zip(names, args, strict=False)) | kwargs
        if self.time_limit is not None:
            self._note(named)
        kwargs = self._accepted(method, named, kwargs)
        # Another process has copies of its own, and compares them itself.
        is_here = self._remote is None
        passed_args, passed_kwargs = (args, kwargs)
        if is_here:
            passed_args, passed_kwargs = self._lend(method, (args, kwargs))
        started = perf_counter()
        try:
            answer = self._within_limit(
                lambda: self._settled(
                    method,
                    getattr(self.implementation, method)(*passed_args, **passed_kwargs),
                    (passed_args, passed_kwargs),
                )
            )
        except TimedOut as late:
            self._hangs[method] += 1
            self._buffers.clear()
            at = f" ({late.place})" if late.place else ""
            raise Fault("hangs", f"{method} gave no answer in {self.time_limit:g} s{at}") from None
        except Raised as raised:
            raise self._verdict_on(method, raised.error) from raised.error
        finally:
            seconds = perf_counter() - started
            for guarded in filter(None, (self, self._owner)):
                guarded.spent += seconds
        if method in WRITES:
            require_files(named[names[-1]])
        if is_here:
            for i, (passed, original) in enumerate(zip(passed_args, args, strict=True)):
                name = names[i] if i < len(names) else f"argument {i + 1}"
                require_unchanged(name, passed, original)
            for name, original in kwargs.items():
                require_unchanged(name, passed_kwargs[name], original)
            self._require_lent_unchanged(method)
            if method in KEEPS:
                self._lent.append((names[-1], passed_args[-1], args[-1]))
        return answer

    def _lend(self, method: str, arguments: Any) -> Any:
        """The arguments in memory of their own, or in that of earlier calls.

        By turns of two calls: what an implementation keeps by mistake shows in new memory, and what
        it knows by its place in memory in the old.
        """
        self._calls[method] += 1
        if method in KEEPS or self._calls[method] % 4 in (1, 2):
            return copied(arguments)
        return self._buffers.filled((method,), arguments)

    def _settled(self, method: str, answer: Any, passed: Any) -> Any:
        """The answer in memory of its own, after the test that the last one is what it was."""
        if self._remote is not None:
            return answer
        if (last := self._answers.get(method)) is not None:
            last.require_unchanged(method)
        done = settled(answer)
        if method in COMPUTED:
            self._answers[method] = LastAnswer(answer, passed)
        return done

    def _note(self, named: Mapping[str, Any]) -> None:
        """Notes the traits and the sizes of a call's arguments."""
        self.traits |= {*traits_of(named)}
        for name, size in sizes_of(named):
            self.sizes[name] = max(size, self.sizes.get(name, 0))

    def _require_lent_unchanged(self, method: str) -> None:
        if method not in ANSWERS:  # a change by one of these is found after the next step
            for name, passed, original in self._lent:
                require_unchanged(name, passed, original, f"after {method}()")

    def _accepted(
        self, method: str, named: Mapping[str, Any], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The keyword arguments of a call without an alpha and r that tell nothing.

        Raises Skip where the method has no argument for another, or where what is fixed is not so.
        """
        if reason := self.fixed.refusal(named):
            raise Skip(f"not supported: {reason}")
        if method not in self._taken:
            self._taken[method] = arguments_of(self.implementation, method)
        taken = self._taken[method]
        absent = [] if taken is None else [name for name in kwargs if name not in taken]
        if "alpha" in absent and self.fixed.alpha is None:
            raise Skip(
                f'not supported: {method} takes no alpha; declare fixed = {{"alpha": "r"}} if it '
                "has no scale, or what alpha is"
            )
        known = {"alpha"} | ({"r"} if method in LAYER_METHODS else set())
        if strange := [name for name in absent if name not in known]:
            raise Skip(f"not supported: {method} takes no {', '.join(strange)}")
        return {name: value for name, value in kwargs.items() if name not in absent}

    def _verdict_on(self, method: str, error: BaseException) -> Skip | Fault:
        if isinstance(error, Skip | Fault) and self._remote is not None:
            self._hangs[method] += isinstance(error, Fault) and error.kind == "hangs"
            return error
        if isinstance(error, Fault):  # of its answer before
            return error
        if isinstance(error, NotImplementedError):
            return Skip(f"not supported: {tidy(error) or method}")
        message = describe(error, self.home)
        if isinstance(error, TypeError) and not message.endswith(")"):  # the arguments do not fit
            message += f"; the contract is {method}({self._methods.get(method, '…')})"
        return Fault("raises", message)

    def _within_limit(self, call: Callable[[], Any]) -> Any:
        if self._owner is not None:
            return self._owner._within_limit(call)
        if self._remote is not None or self.time_limit is None:
            try:
                return call()
            except BaseException as error:
                if self._remote is not None and isinstance(error, KeyboardInterrupt):
                    raise  # of the user, whom a process of its own does not hear
                raise Raised(error) from None
        if self._worker is None:
            self._worker = Worker()
            weakref.finalize(self, self._worker.stop)
        # Warnings of a target are no verdict, and its output stays out of the report.
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            try:
                return self._worker.call(call, self.time_limit, self.home)
            except (TimedOut, KeyboardInterrupt):
                self._worker.abandon()
                self._worker = None
                raise

    def answer(
        self,
        value: Any,
        name: str,
        shape: tuple[int, ...] | None = None,
        dtype: str | None = None,
    ) -> np.ndarray:
        """An answer as an array; ``name`` is for messages.

        Anything that NumPy can convert is an array, in either byte order. Raises Fault where it is
        not, where its shape or dtype is another one (None: any shape, any real dtype), and where it
        is not finite.
        """
        try:
            array = np.array(value)
        except Exception as error:
            raise Fault(
                "not an array",
                f"{name} is {type_words(value)}, which NumPy cannot convert: {tidy(error)}",
            ) from None
        is_list = type(value) in (list, tuple) and array.dtype == np.float64
        if is_list and dtype is not None:  # Python's numbers have no dtype
            array = array.astype(DTYPES[dtype])
        if array.dtype.kind in "fiu":
            array = array.astype(array.dtype.newbyteorder("="), copy=False)
        if array.dtype.kind not in "fiub" and array.dtype != DTYPES["bfloat16"]:
            of = "" if array.dtype.kind == "O" else f" of {array.dtype}"
            raise Fault("not an array", f"{name} is {type_words(value)}{of}, expected real numbers")
        source = "" if isinstance(value, np.ndarray) else f" (it is {type_words(value)})"
        if shape is not None and array.shape != tuple(shape):
            raise Fault("shape", f"{name} has shape {array.shape}, expected {shape}{source}")
        is_python_number = type(value) in (int, float)  # which has no dtype
        if dtype is not None and not is_python_number and array.dtype != DTYPES[dtype]:
            raise Fault("dtype", f"{name} is {array.dtype}, expected {dtype}{source}")
        bad = ~np.isfinite(array)
        if bad.any():
            where = [int(i) for i in np.argwhere(bad)[0]]
            raise Fault(
                "nan",
                f"{name} holds {int(np.isnan(array).sum())} NaN and {int(np.isinf(array).sum())} "
                f"infinite of {array.size} values, the first at {where}",
            )
        return array

    def entry(self, value: Any, key: str, name: str = "the answer") -> Any:
        """``value[key]``. Raises Fault if the value is not a mapping or lacks the key."""
        if not isinstance(value, Mapping):
            raise Fault("missing", f"{name} is {type_words(value)}, expected a dict with {key!r}")
        if key not in value:
            keys = tidy(", ".join(repr(k) for k in value)) or "nothing"
            raise Fault("missing", f"{name} has no {key!r}; it has {keys}")
        return value[key]

    def items(self, value: Any, length: int, name: str = "the answer") -> list[Any]:
        """The value as a list of this length. Raises Fault."""
        if not isinstance(value, list | tuple):
            raise Fault("missing", f"{name} is {type_words(value)}, expected a list of {length}")
        if len(value) != length:
            raise Fault("missing", f"{name} has {len(value)} entries, expected {length}")
        return list(value)


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
