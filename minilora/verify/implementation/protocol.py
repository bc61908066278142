"""Another process as the target: a driver in any language that speaks JSON lines.

A message is one line of JSON on the driver's standard input, its answer one line on its standard
output; arrays travel in safetensors files that the message names. The driver is asked for the
contract's own methods, so that every check, tolerance and diagnosis is the one of a Python target.
Whatever the driver does wrong is a verdict; after a crash, a hang or an answer that cannot be
understood it is ended with all that it started, and started again for the next call.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from minilora.verify.core.errors import Fault, LoadError, Skip, near, tidy
from minilora.verify.core.types import Check
from minilora.verify.implementation.contract import METHODS, SESSION, TIME_LIMIT, Remote, positional

PROTOCOL = 1

SESSION_ARGUMENTS = {name: positional(name, SESSION) for name in SESSION}
"""The methods of what ``session`` answers, with their arguments; ``session.add`` in a message."""

CARRIED = (*METHODS, *(f"session.{name}" for name in SESSION))
"""The methods that the protocol carries and a driver may declare."""

RESULTS = {
    "lora_linear": "y",
    "merge": "W_merged",
    "unmerge": "W",
    "combine": "delta_W",
    "multi_adapter": "y",
    "session.forward": "y",
    "session.weight": "W",
}
"""The name of the one array that these methods answer; the others answer arrays by their names."""

ANSWERING = {*RESULTS, "session.gradients"}
SILENT = {"save", "session", "session.end", *CARRIED[len(METHODS) :]} - ANSWERING
"""The methods that answer no arrays."""

LONGEST_LINE = 2**20
"""An answer of more bytes than this is none: arrays belong into the file."""

STOP_LIMIT = 2.0
"""Seconds that a driver has to end by itself after the message ``stop``."""

END_LIMIT = 1.0
"""Seconds that a driver has to end after it closed its standard output."""

_LAST_WORDS = 8000
_SLICE = 0.05


class Driver(Remote):
    """An implementation that answers from another process.

    ``command`` starts it, without a shell; ``checks`` are those that it may name; ``time_limit`` is
    in seconds a call and for the start.
    It has the methods that the driver declares. `close` ends it, as leaving a ``with`` block does.

    Raises LoadError where the command cannot be started or does not speak the protocol.
    """

    def __init__(
        self,
        command: str | Sequence[str],
        checks: Sequence[Check],
        *,
        time_limit: float = TIME_LIMIT,
    ) -> None:
        try:
            self.command = words(command) if isinstance(command, str) else list(command)
        except ValueError as error:
            raise LoadError(str(error)) from None
        if os.name != "posix":
            raise LoadError("a driver needs a POSIX system: Linux, macOS, or WSL on Windows")
        self.time_limit = time_limit
        self.methods: tuple[str, ...] = ()  # all that is declared, those of a session too
        self._seq = 0
        self._calling = threading.Lock()
        self._closed = False
        self._over: list[tuple[_Child, int]] = []
        self._folder = Path(tempfile.mkdtemp(prefix="minilora-"))
        self._living: list[_Child] = []
        weakref.finalize(self, _clean, self._living, self._folder)
        try:
            said = self._start()
            self.name = said.get("name") or os.path.basename(self.command[0])
            language = f" ({said['language']})" if said.get("language") else ""
            self.version = f"{said.get('version') or ''}{language}".strip()
            for each in ("dtypes", "precision", "conventions", "known"):
                if said.get(each) is not None:
                    setattr(self, each, said[each])
            self._patterns = _names(said, "checks")
            self.methods = _methods(said, self._patterns, checks)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name in METHODS and name in self.methods:
            return partial(self._call, name)
        raise AttributeError(name)

    def close(self) -> None:
        """Ends the driver: by a message where it waits, by force in the middle of a call."""
        self._closed = True
        waits = self._calling.acquire(blocking=False)
        for child in list(self._living):
            child.stop() if waits else child.end()
        # The call that is under way sees the end of the pipe, and is over then.
        if waits or self._calling.acquire(timeout=1.0):
            self._end()
            self._calling.release()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self._patterns and self.check and not _matches(self.check, self._patterns):
            raise Skip(f"not supported: {self.name} does not declare the check {self.check}")
        given = dict(zip(positional(method), args, strict=False)) | kwargs
        given |= given.pop("settings", {})
        with self._calling:
            answer = self._run(method, given)
            if method == "session":
                return RemoteSession(self, self._living[0], self._seq, self._over)
            return answer

    def _of_session(self, session: RemoteSession, name: str, *args: Any) -> Any:
        """The answer of one of a session's methods."""
        arguments = dict(zip(SESSION_ARGUMENTS[name], args, strict=True))
        with self._calling:
            while self._over:
                child, number = self._over.pop()
                with contextlib.suppress(Skip, Fault):  # not this call's matter
                    if self._living == [child]:
                        self._run("session.end", {}, number)
            if self._living != [session.child]:
                raise Fault("crashes", "the session ended with the driver that held it")
            return self._run(f"session.{name}", arguments, session.number)

    def _run(self, method: str, arguments: dict[str, Any], session: int | None = None) -> Any:
        arrays: dict[str, np.ndarray] = {}
        settings = split_arrays(arguments, (), arrays)
        if self._closed:
            raise Fault("crashes", f"{method} is not called: the driver was closed")
        if not self._living:
            try:
                self._start()
            except LoadError as error:
                raise Fault("crashes", f"it cannot be started again: {error}") from None
        self._seq += 1
        given, answered = (
            self._folder / f"{self._seq}.{which}.safetensors" for which in ("in", "out")
        )
        message = {
            "seq": self._seq,
            "cmd": "run",
            "check": self.check,
            "method": method,
            "settings": settings,
            "in": str(given),
            "out": str(answered),
        }
        if session is not None:
            message["session"] = session
        try:
            given.write_bytes(save({k: np.array(v, order="C") for k, v in arrays.items()}))
            answer = self._exchange(method, message)
            if answer.get("error"):
                _refuse(answer["error"])
            if answer.get("skipped"):
                raise Skip(f"not supported: {_reason(answer['skipped'])}")
            return None if method in SILENT else _gathered(method, _read(answered))
        finally:
            for path in (given, answered):
                path.unlink(missing_ok=True)

    def _start(self) -> dict[str, Any]:
        """Starts the driver and gives what it says of itself. Raises LoadError."""
        shown = shlex.join(self.command)
        self._living.append(_started(self.command, shown))
        message = {"seq": 0, "cmd": "start", "protocol": PROTOCOL}
        try:
            answer = self._exchange("start", message, ("implementation", "error"))
            if answer.get("error"):
                _refuse(answer["error"])
            _same("protocol", answer, PROTOCOL)
            said = answer["implementation"]
            if not isinstance(said, dict):
                raise Fault("protocol", f"'implementation' is {tidy(said, 60)}, expected an object")
            return said
        except Fault as fault:
            self._end()
            raise LoadError(f"{shown}: {fault.message}") from None

    def _exchange(
        self,
        what: str,
        message: Mapping[str, Any],
        outcomes: Sequence[str] = ("ok", "skipped", "error"),
    ) -> dict[str, Any]:
        """The answer to a message; a driver that gives none that is understood is ended."""
        try:
            line = self._living[0].exchange(what, _line(message), self.time_limit)
            answer = _understood(line, message["seq"], outcomes)
            self._living[0].nothing_more("after its answer")
            return answer
        except BaseException:  # KeyboardInterrupt and the end of this thread as well
            self._end()
            raise

    def _end(self) -> None:
        for child in list(self._living):
            child.kill()
        self._living.clear()


class RemoteSession(Remote):
    """A session that lives in the driver, under the number of the message that opened it.

    It has the methods that the driver declares as ``session.add`` and so on.
    """

    name = "a session"

    def __init__(
        self, driver: Driver, child: _Child, number: int, over: list[tuple[_Child, int]]
    ) -> None:
        self.driver, self.child, self.number = driver, child, number
        weakref.finalize(self, over.append, (child, number))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name in SESSION and f"session.{name}" in self.driver.methods:
            return partial(self.driver._of_session, self, name)
        raise AttributeError(name)


def words(command: str) -> list[str]:
    """The command's words, as a shell splits them. Raises ValueError."""
    try:
        split = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"the command {command!r} cannot be split: {error}") from None
    if not split:
        raise ValueError("the command is empty; give one that starts a driver, like ./driver")
    return split


def _clean(living: list[_Child], folder: Path) -> None:
    for child in living:
        child.kill()
    shutil.rmtree(folder, ignore_errors=True)


def _line(message: Mapping[str, Any]) -> bytes:
    """A message; no character but quotes and backslashes is escaped, which any reader can undo."""
    text = json.dumps(message, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.encode(errors="surrogateescape") + b"\n"


def split_arrays(value: Any, path: tuple[str, ...], arrays: dict[str, np.ndarray]) -> Any:
    """The value as JSON; its arrays go to ``arrays`` under their paths.

    An object lacks what is there, and a list has null in its place.
    """
    if isinstance(value, np.ndarray):
        arrays[".".join(path)] = value
        return None
    if isinstance(value, Mapping):
        plain = {str(k): split_arrays(v, (*path, str(k)), arrays) for k, v in value.items()}
        gone = {str(k) for k, v in value.items() if isinstance(v, np.ndarray)}
        return {k: v for k, v in plain.items() if k not in gone}
    if isinstance(value, list | tuple):
        return [split_arrays(entry, (*path, str(i)), arrays) for i, entry in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path) else value


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the driver's file. Raises Fault."""
    if not path.exists():
        raise Fault("missing", "it answers ok, and there is no file under the name 'out'")
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise Fault(
            "not an array", f"its file 'out' is no safetensors file: {tidy(error)}"
        ) from None


def _gathered(method: str, arrays: dict[str, np.ndarray]) -> Any:
    """The arrays of a file as the method answers them. Raises Fault."""
    if method in RESULTS:
        name = RESULTS[method]
        if name not in arrays:
            holds = tidy(", ".join(map(repr, sorted(arrays)))) or "nothing"
            raise Fault("missing", f"the file 'out' has no {name!r}; it holds {holds}")
        return arrays[name]
    if method == "model_loss":
        split = {name: name.partition("grads.") for name in arrays}
        gradients = {own: arrays[name] for name, (before, _, own) in split.items() if not before}
        others = {name: arrays[name] for name, (before, _, _) in split.items() if before}
        return {**others, "grads": gradients}
    if method in ("optimizer_steps", "train"):
        steps: dict[str, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            number, _, own = name.partition(".")
            steps.setdefault(number, {})[own] = array
        if strange := sorted(steps.keys() - {str(i) for i in range(len(steps))}):
            says = f"steps are named 0.NAME, 1.NAME, …; the file 'out' has {', '.join(strange)}"
            raise Fault("missing", says)
        return [steps[str(i)] for i in range(len(steps))]
    return arrays


def _understood(line: bytes, seq: int, outcomes: Sequence[str]) -> dict[str, Any]:
    """The answer in a line. Raises Fault."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise Fault(
            "protocol",
            f"{_shown(line)} on standard output is no answer; only answers may stand there, an "
            "object of JSON in a line: whatever else is to be said belongs on standard error",
        )
    _same("seq", answer, seq)
    if not any(answer.get(outcome) for outcome in outcomes):
        said = tidy(", ".join(map(repr, answer)))
        wanted = " or ".join(map(repr, outcomes))
        raise Fault("protocol", f"the answer has {said}; expected one of {wanted}")
    return answer


def _same(key: str, answer: Mapping[str, Any], wanted: int) -> None:
    got = answer.get(key)
    if got != wanted or isinstance(got, bool):
        found = f"no {key!r}" if key not in answer else f"{key} {tidy(json.dumps(got), 60)}"
        raise Fault("protocol", f"the answer has {found}, expected {key} {wanted}")


def _refuse(error: Any) -> NoReturn:
    """Raises what the driver says of its own failure."""
    if not isinstance(error, Mapping):
        raise Fault("raises", tidy(error))
    says = tidy(error.get("message") or "an error without a message")
    if trace := error.get("traceback"):
        says += f" (traceback: {_joined(str(trace))})"
    raise Fault("raises", says)


def _reason(skipped: Any) -> str:
    if not isinstance(skipped, Mapping):
        return tidy(skipped)
    reason = tidy(skipped.get("reason") or "no reason given", 200)
    link = skipped.get("issue_url")
    return f"{reason} ({tidy(link, 90)})" if link else reason


def _joined(text: str) -> str:
    """Some lines in one, a bar between them."""
    return " | ".join(line.strip() for line in text.splitlines() if line.strip())


def last_words(text: str) -> str:
    """The last lines of a text in one, and the last before them that speaks of an error."""
    lines = [tidy(line, 150) for line in text.splitlines() if line.strip()]
    before, last = lines[:-5], lines[-5:]
    headlines = [line for line in before if re.search("error|exception|panic|fatal", line, re.I)]
    joined = " | ".join(last)
    joined = joined if len(joined) <= 250 else f"…{joined[-249:]}"
    return " | ".join([*headlines[-1:], joined])


def _shown(line: bytes) -> str:
    return repr(tidy(line[:200].decode(errors="replace"), 80))


def _names(said: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = said.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise LoadError(f"the driver's {key!r} is {tidy(value, 60)}, expected a list of names")
    return tuple(value)


def _matches(check: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(check, pattern) for pattern in patterns)


def _methods(
    said: Mapping[str, Any], patterns: Sequence[str], checks: Sequence[Check]
) -> tuple[str, ...]:
    """The methods that the driver declares, or that the checks need that it declares."""
    for pattern in patterns:
        if not any(_matches(check.id, [pattern]) for check in checks):
            suggested = near(pattern, [check.id for check in checks])
            raise LoadError(f"the driver declares the check {pattern!r}; there is none{suggested}")
    methods = _names(said, "methods")
    for name in methods:
        if name not in CARRIED:
            raise LoadError(
                f"the driver declares the method {name!r}{near(name, list(CARRIED))}; the "
                f"protocol carries {', '.join(CARRIED)}"
            )
    if not methods:
        needed = {need for c in checks if _matches(c.id, patterns) for need in c.needs}
        methods = tuple(name for name in CARRIED if name in needed)
    if not methods:
        raise LoadError(
            f'the driver declares no methods; expected "methods": some of {", ".join(CARRIED)}'
        )
    return methods


def _started(command: Sequence[str], shown: str) -> _Child:
    try:
        return _Child(command)
    except FileNotFoundError:
        program = command[0]
        if os.path.exists(program) and os.sep in program:
            why = "the interpreter that its first line names is not there"
        elif os.path.exists(program):
            why = f"no such program on the PATH; for the file in this folder write ./{program}"
        else:
            why = "no such file" if os.sep in program else "no such program on the PATH"
        raise LoadError(f"{shown}: {program} cannot be started: {why}") from None
    except PermissionError:
        why = "it is a folder" if os.path.isdir(command[0]) else "it is not executable"
        remedy = "chmod +x makes it so, or name its interpreter before it"
        raise LoadError(f"{shown}: {command[0]} cannot be started: {why}; {remedy}") from None
    except (OSError, ValueError) as error:
        says = f"{getattr(error, 'strerror', None) or error}; name its interpreter before it"
        raise LoadError(f"{shown}: {command[0]} cannot be started: {says}") from None


class _Child:
    """One life of a driver: its pipes, what it said and not yet read, and its end.

    It leads a session of its own, so that an interrupt from the terminal does not reach it before
    this process can tell it what to do, and so that whatever it starts ends with it.
    """

    def __init__(self, command: Sequence[str]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True
        )
        pipes = (self._process.stdin, self._process.stdout, self._process.stderr)
        self._in, self._out, self._err = (p.fileno() for p in pipes if p is not None)
        self._selector = selectors.DefaultSelector()
        for file in (self._in, self._out, self._err):
            os.set_blocking(file, False)
        for file in (self._out, self._err):
            self._selector.register(file, selectors.EVENT_READ)
        self._said = bytearray()
        self._last_words = b""
        self._silent = False

    def exchange(self, what: str, message: bytes, limit: float) -> bytes:
        """The line that it answers to a message. Raises Fault."""
        while self._turn(0.0):
            self._within_length()
        self.nothing_more("before it was asked")
        end = monotonic() + limit
        rest = memoryview(message)
        while (line := self._first_line()) is None:
            self._within_length()
            if self._silent:
                raise Fault("crashes", self._how_it_ended())
            if (left := end - monotonic()) <= 0:
                raise Fault("hangs", self._how_it_hangs(what, limit))
            rest = self._write(rest)
            if not self._turn(min(left, _SLICE)) and self._process.poll() is not None:
                self._silent = not self._turn(0.0)
        return line

    def _first_line(self) -> bytes | None:
        line, newline, rest = self._said.partition(b"\n")
        if not newline:
            return None
        self._said = rest
        return bytes(line)

    def _within_length(self) -> None:
        if len(self._said) > LONGEST_LINE:
            raise Fault("protocol", f"no line ends; it begins with {_shown(bytes(self._said))}")

    def nothing_more(self, when: str) -> None:
        """Raises Fault where it has said what nobody asked for."""
        if self._said:
            says = f"{_shown(bytes(self._said))} on standard output {when}"
            raise Fault("protocol", f"{says}; only answers may stand there, one to each message")

    def _write(self, rest: memoryview) -> memoryview:
        if not rest:
            return rest
        try:
            return rest[os.write(self._in, rest) :]
        except BlockingIOError:
            return rest
        except BrokenPipeError:  # its end will be seen on its standard output
            return rest[:0]

    def _turn(self, wait: float) -> bool:
        """Takes in what it has said by now on both of its outputs; whether it was anything."""
        ready = [key.fd for key, _ in self._selector.select(wait)]
        for file in ready:
            try:
                chunk = os.read(file, 2**16)
            except BlockingIOError:
                continue
            if not chunk:
                self._selector.unregister(file)
                self._silent |= file == self._out
            elif file == self._out:
                self._said += chunk
            else:
                self._last_words = (self._last_words + chunk)[-_LAST_WORDS:]
        return bool(ready)

    def _how_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_LIMIT)
        status = self._process.poll()
        if status is None:
            says = "it closed its standard output"
        elif status < 0:
            says = f"it was ended by {_signal(-status)}"
        else:
            says = f"it ended with exit status {status}"
        if self._said:
            says += f", in the middle of a line: {_shown(bytes(self._said))}"
        return f"{says}; {self._words()}"

    def _how_it_hangs(self, what: str, limit: float) -> str:
        says = f"{what} gave no answer in {limit:g} s, and the driver was ended"
        if self._said:
            says += (
                f"; it said the beginning of a line, {_shown(bytes(self._said))}, and no newline"
            )
        return f"{says}; {self._words()}"

    def _words(self) -> str:
        """What it said last on standard error."""
        end = monotonic() + 0.2
        while self._selector.get_map() and monotonic() < end and self._turn(_SLICE):
            pass
        said = last_words(self._last_words.decode(errors="replace"))
        return f"its last words on standard error: {said}" if said else "nothing on standard error"

    def stop(self) -> None:
        """Asks it to end, and gives it a little time."""
        self._write(memoryview(_line({"seq": -1, "cmd": "stop"})))
        end = monotonic() + STOP_LIMIT
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        while self._process.poll() is None and monotonic() < end:
            if not self._selector.get_map():  # both outputs closed: it is about to end
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(max(0.0, end - monotonic()))
                return
            self._turn(_SLICE)
            self._said.clear()

    def end(self) -> None:
        """Ends it and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Ends it, waits for that and lets go of its pipes."""
        self.end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        self._selector.close()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
