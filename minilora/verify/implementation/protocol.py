"""Another process as the target: a driver in any language that speaks JSON lines.

A message is one line of JSON on the driver's standard input, its answer one line on its standard
output; arrays travel in safetensors files that the message names. The driver is asked for the
contract's own methods, so that every check, tolerance and diagnosis is the one of a Python target.
Whatever the driver does wrong is a verdict; after a crash, a hang or an answer that cannot be
understood it is ended with all that it started, and started again for the next call.
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
from minilora.verify.implementation.contract import METHODS, SESSION, TIME_LIMIT, Remote, positional
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
        self._over: list[tuple[Child, int]] = []
        self._folder = Path(tempfile.mkdtemp(prefix="minilora-"))
        self._living: list[Child] = []
        weakref.finalize(self, _clean, self._living, self._folder)
        try:
            said = self._start()
            self.name = said.get("name") or os.path.basename(self.command[0])
            language = f" ({said['language']})" if said.get("language") else ""
            self.version = f"{said.get('version') or ''}{language}".strip()
            for each in ("dtypes", "precision", "conventions", "known"):
                if said.get(each) is not None:
                    setattr(self, each, said[each])
            self._patterns = names_in(said, "checks")
            self.methods = declared_methods(said, self._patterns, checks)
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
        if self._patterns and self.check and not matches(self.check, self._patterns):
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
                refuse(answer["error"])
            if answer.get("skipped"):
                raise Skip(f"not supported: {skip_reason(answer['skipped'])}")
            return None if method in WITHOUT_ARRAYS else as_answer(method, read_arrays(answered))
        finally:
            for path in (given, answered):
                path.unlink(missing_ok=True)

    def _start(self) -> dict[str, Any]:
        """Starts the driver and gives what it says of itself. Raises LoadError."""
        shown = shlex.join(self.command)
        self._living.append(start(self.command, shown))
        message = {"seq": 0, "cmd": "start", "protocol": PROTOCOL}
        try:
            answer = self._exchange("start", message, ("implementation", "error"))
            if answer.get("error"):
                refuse(answer["error"])
            require_same("protocol", answer, PROTOCOL)
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
            line = self._living[0].exchange(what, message_line(message), self.time_limit)
            answer = understood(line, message["seq"], outcomes)
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
        self, driver: Driver, child: Child, number: int, over: list[tuple[Child, int]]
    ) -> None:
        self.driver, self.child, self.number = driver, child, number
        weakref.finalize(self, over.append, (child, number))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name in SESSION and f"session.{name}" in self.driver.methods:
            return partial(self.driver._of_session, self, name)
        raise AttributeError(name)


def _clean(living: list[Child], folder: Path) -> None:
    for child in living:
        child.kill()
    shutil.rmtree(folder, ignore_errors=True)
