"""Another process as the target: a driver in any language that speaks JSON lines.

A message is one line of JSON on the driver's standard input, its answer one line on its standard
output; arrays are exchanged in safetensors files that the message names. The driver is asked for
the contract's methods, so that checks, tolerances and diagnoses are those of a Python target.
Whatever the driver does wrong is a verdict. After a crash, a hang or an invalid answer it is ended
with all that it started, and started again for the next call.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from minilora.verify.core.errors import Fault, LoadError, Skip, tidy
from minilora.verify.core.types import Check
from minilora.verify.implementation.child import Child, start, words
from minilora.verify.implementation.contract import (
    DECLARATIONS,
    METHODS,
    SESSION,
    START_LIMIT,
    TIME_LIMIT,
    Remote,
    positional,
)
from minilora.verify.implementation.messages import (
    PROTOCOL,
    SESSION_ARGUMENTS,
    WITHOUT_ARRAYS,
    as_answer,
    declared_methods,
    matches,
    message_line,
    names_in,
    read_arrays,
    refuse,
    require_same,
    skip_reason,
    split_arrays,
    understood,
)


class Driver(Remote):
    """An implementation that answers from another process.

    ``command`` starts it, without a shell; ``checks`` are those that it may declare; ``time_limit``
    is in seconds for a call, ``start_limit`` for the start, in which it may import for long. It has
    the methods that the driver declares. `close` ends it, as leaving a ``with`` block does.

    Raises LoadError where the command cannot be started or does not speak the protocol.
    """

    def __init__(
        self,
        command: str | Sequence[str],
        checks: Sequence[Check],
        *,
        time_limit: float = TIME_LIMIT,
        start_limit: float = START_LIMIT,
    ) -> None:
        try:
            self.command = words(command) if isinstance(command, str) else list(command)
        except ValueError as error:
            raise LoadError(str(error)) from None
        if os.name != "posix":
            raise LoadError("a driver needs a POSIX system: Linux, macOS, or WSL on Windows")
        self.time_limit, self._start_limit = time_limit, start_limit
        self.methods: tuple[str, ...] = ()  # those of a session, too
        self._seq = 0
        self._calling = threading.Lock()
        self._closed = False
        self._ended_sessions: list[tuple[Child, int]] = []
        self._folder = Path(tempfile.mkdtemp(prefix="minilora-"))
        self._children: list[Child] = []
        weakref.finalize(self, _clean, self._children, self._folder)
        try:
            declared = self._start()
            self.name = declared.get("name") or os.path.basename(self.command[0])
            language = f" ({declared['language']})" if declared.get("language") else ""
            self.version = f"{declared.get('version') or ''}{language}".strip()
            for attribute in DECLARATIONS:
                if declared.get(attribute) is not None:
                    setattr(self, attribute, declared[attribute])
            self._patterns = names_in(declared, "checks")
            self.methods = declared_methods(declared, self._patterns, checks)
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
        """Ends the driver: by a message if it is idle, by force in the middle of a call."""
        self._closed = True
        is_idle = self._calling.acquire(blocking=False)
        for child in list(self._children):
            child.stop() if is_idle else child.end()
        # A call in progress sees the end of the pipe and ends.
        if is_idle or self._calling.acquire(timeout=1.0):
            self._end()
            self._calling.release()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self._patterns and self.check and not matches(self.check, self._patterns):
            raise Skip(f"not supported: {self.name} does not declare the check {self.check}")
        arguments = dict(zip(positional(method), args, strict=False)) | kwargs
        arguments |= arguments.pop("settings", {})
        with self._calling:
            answer = self._run(method, arguments)
            if method == "session":
                return RemoteSession(self, self._children[0], self._seq, self._ended_sessions)
            return answer

    def _of_session(self, session: RemoteSession, name: str, *args: Any) -> Any:
        """The answer of one of a session's methods."""
        arguments = dict(zip(SESSION_ARGUMENTS[name], args, strict=True))
        with self._calling:
            while self._ended_sessions:
                child, number = self._ended_sessions.pop()
                with contextlib.suppress(Skip, Fault):  # no matter for this call
                    if self._children == [child]:
                        self._run("session.end", {}, number)
            if self._children != [session.child]:
                raise Fault("crashes", "the session ended with the driver that held it")
            return self._run(f"session.{name}", arguments, session.number)

    def _run(self, method: str, arguments: dict[str, Any], session: int | None = None) -> Any:
        arrays: dict[str, np.ndarray] = {}
        settings = split_arrays(arguments, (), arrays)
        if self._closed:
            raise Fault("crashes", f"{method} is not called: the driver was closed")
        if not self._children:
            try:
                self._start()
            except LoadError as error:
                raise Fault("crashes", f"it cannot be started again: {error}") from None
        self._seq += 1
        in_file, out_file = (
            self._folder / f"{self._seq}.{direction}.safetensors" for direction in ("in", "out")
        )
        message = {
            "seq": self._seq,
            "cmd": "run",
            "check": self.check,
            "method": method,
            "settings": settings,
            "in": str(in_file),
            "out": str(out_file),
        }
        if session is not None:
            message["session"] = session
        try:
            in_file.write_bytes(save({k: np.array(v, order="C") for k, v in arrays.items()}))
            answer = self._exchange(method, message)
            if answer.get("error"):
                refuse(answer["error"])
            if answer.get("skipped"):
                raise Skip(f"not supported: {skip_reason(answer['skipped'])}")
            return None if method in WITHOUT_ARRAYS else as_answer(method, read_arrays(out_file))
        finally:
            for path in (in_file, out_file):
                path.unlink(missing_ok=True)

    def _start(self) -> dict[str, Any]:
        """Starts the driver and gives its declarations. Raises LoadError."""
        shown = shlex.join(self.command)
        self._children.append(start(self.command, shown))
        message = {"seq": 0, "cmd": "start", "protocol": PROTOCOL}
        try:
            answer = self._exchange("start", message, ("implementation", "error"))
            if answer.get("error"):
                refuse(answer["error"])
            require_same("protocol", answer, PROTOCOL)
            declared = answer["implementation"]
            if not isinstance(declared, dict):
                raise Fault(
                    "protocol", f"'implementation' is {tidy(declared, 60)}, expected an object"
                )
            return declared
        except Fault as fault:
            self._end()
            raise LoadError(f"{shown}: {fault.message}") from None

    def _exchange(
        self,
        method: str,
        message: Mapping[str, Any],
        outcomes: Sequence[str] = ("ok", "skipped", "error"),
    ) -> dict[str, Any]:
        """The answer to a message; a driver that gives no valid answer is ended."""
        limit = self._start_limit if method == "start" else self.time_limit
        try:
            line = self._children[0].exchange(method, limit, message_line(message))
            answer = understood(line, message["seq"], outcomes)
            self._children[0].nothing_more("after its answer")
            return answer
        except BaseException:  # KeyboardInterrupt and the end of this thread as well
            self._end()
            raise

    def _end(self) -> None:
        for child in list(self._children):
            child.kill()
        self._children.clear()


class RemoteSession(Remote):
    """A session in the driver, by the number of the message that opened it.

    It has the methods that the driver declares as ``session.add`` and so on.
    """

    name = "a session"

    def __init__(
        self, driver: Driver, child: Child, number: int, ended: list[tuple[Child, int]]
    ) -> None:
        self.driver, self.child, self.number = driver, child, number
        weakref.finalize(self, ended.append, (child, number))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name in SESSION and f"session.{name}" in self.driver.methods:
            return partial(self.driver._of_session, self, name)
        raise AttributeError(name)


def _clean(children: list[Child], folder: Path) -> None:
    for child in children:
        child.kill()
    shutil.rmtree(folder, ignore_errors=True)
