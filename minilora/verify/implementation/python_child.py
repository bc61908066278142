"""The process of a Python target: it loads the target, and answers what `python_target` asks.

It speaks the line protocol with the arrays' bytes behind each line, as `values` writes them. What
the target prints goes to standard error; the answers have a pipe of their own.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from time import monotonic
from typing import Any, BinaryIO

from minilora.verify.core.errors import Fault, LoadError, Skip, describe, tidy
from minilora.verify.implementation.arguments import arguments_of
from minilora.verify.implementation.contract import DECLARATIONS, METHODS, SESSION
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.values import Unpacker, framed, packed

STACKS_SIGNAL = signal.SIGUSR1
"""At this signal the process writes where it is, even while the interpreter's lock is held."""

IMPORTING_SECONDS = 0.02
"""The least time between two messages that a call is importing."""


class Channel:
    """The pipes of the protocol, which are not the target's standard input and output."""

    def __init__(self) -> None:
        self._in: BinaryIO = os.fdopen(os.dup(0), "rb")
        self._out = os.dup(1)
        _make_nothing(0)
        os.dup2(2, 1)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.register_at_fork(after_in_child=self._leave)

    def _leave(self) -> None:
        """Takes no part in the protocol: another process does."""
        for file in (self._in.fileno(), self._out):
            _make_nothing(file)

    def read(self) -> tuple[dict[str, Any], bytes] | None:
        """A message, and the bytes of its arrays; None at the end."""
        if not (line := self._in.readline()):
            return None
        message = json.loads(line)
        return message, self._in.read(message.get("bytes", 0))

    def write(self, message: Mapping[str, Any], arrays: list[bytes]) -> None:
        """Writes a message, and the bytes of its arrays."""
        rest = memoryview(framed(message, arrays))
        while rest:
            rest = rest[os.write(self._out, rest) :]


def _make_nothing(file: int) -> None:
    """Makes a descriptor one that reads nothing and takes everything."""
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, file)
    os.close(nothing)


class ImportWatch:
    """Tells the judge that a call is importing: that time is not the call's.

    It stands before the finders of modules, and finds none itself.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._last = 0.0
        self.seq: int | None = None
        """The number of the call in progress."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Nothing; called for each module that is looked for."""
        is_main = threading.current_thread() is threading.main_thread()
        if self.seq is not None and is_main and monotonic() - self._last > IMPORTING_SECONDS:
            self._last = monotonic()
            self._channel.write({"seq": self.seq, "importing": tidy(name, 100)}, [])


class Server:
    """The target and what it opened, by number, and the answers to the messages about them."""

    def __init__(self, channel: Channel, load: Callable[[str], object]) -> None:
        self._channel, self._load = channel, load
        self._objects: dict[int, GuardedImplementation] = {}
        self._watch = ImportWatch(channel)

    def start(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Loads the target: its name, its methods and what it declares."""
        sys.dont_write_bytecode = True  # nothing is left beside the target's files
        target = self._load(message["target"])
        subject = self._objects[0] = GuardedImplementation(target, time_limit=None)
        gc.freeze()  # looking through a library's modules for garbage takes time
        warnings.simplefilter("ignore")  # warnings of a target are no verdict
        sys.meta_path.insert(0, self._watch)
        declared = {"name": subject.name, "version": subject.version}
        for name in DECLARATIONS:
            if (value := getattr(subject.implementation, name, None)) is not None:
                declared[name] = _plain(value)
        return {
            "protocol": 1,
            "implementation": declared,
            "methods": {name: _arguments(subject, name) for name in METHODS if subject.has(name)},
            "home": subject.home,
            "thread": threading.get_ident(),
        }

    def run(self, message: Mapping[str, Any], payload: bytes) -> Any:
        """The answer of a method. Raises Skip or Fault."""
        for number in message["ended"]:
            self._objects.pop(number, None)
        subject, method = self._objects[message["object"]], message["method"]
        unpacker = Unpacker(payload)
        args, kwargs = unpacker.value(message["arguments"])
        if method != "session":
            return subject.call(method, *args, **kwargs)
        session = self._objects[message["seq"]] = subject.session(*args, **kwargs)
        return {name: None for name in SESSION if session.has(name)}

    def anew(self, message: Mapping[str, Any]) -> bool:
        """Makes a new instance, under the message's number; whether there is one."""
        other = self._objects[0].anew()
        if other is not None:
            self._objects[message["seq"]] = other
        return other is not None

    def reply(self, message: Mapping[str, Any], payload: bytes) -> None:
        """Answers a message, whatever the target does."""
        arrays: list[bytes] = []
        answer: dict[str, Any]
        self._watch.seq = message["seq"] if message["cmd"] == "run" else None
        try:
            if message["cmd"] == "start":
                said: Any = self.start(message)
            elif message["cmd"] == "anew":
                said = self.anew(message)
            else:
                said = self.run(message, payload)
            answer = {"ok": True, "answer": packed(said, arrays)}
        except LoadError as error:
            answer = _error("load", str(error))
        except Skip as skip:
            answer = {"skipped": {"reason": skip.reason.removeprefix("not supported: ")}}
        except Fault as fault:
            answer = _error(fault.kind, fault.message)
        except BaseException as error:
            answer = _error("raises", describe(error))
        self._watch.seq = None
        if "error" in answer or "skipped" in answer:
            arrays.clear()
        self._channel.write({"seq": message["seq"], **answer}, arrays)


def _arguments(subject: GuardedImplementation, method: str) -> list[str] | None:
    """The names of the arguments that a method takes, or None."""
    names = arguments_of(subject.implementation, method)
    return None if names is None else sorted(names)


def _error(kind: str, message: str) -> dict[str, Any]:
    return {"error": {"kind": kind, "message": message}}


def _plain(value: Any) -> Any:
    """A declaration as values of the contract."""
    if is_dataclass(value) and not isinstance(value, type | Mapping):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return value


def main(load: Callable[[str], object]) -> None:
    """Answers messages until there are none, or the last; ``load`` gives the target of a name."""
    channel = Channel()
    server = Server(channel, load)
    while (read := channel.read()) is not None:
        message, payload = read
        if message["cmd"] == "start":
            faulthandler.enable(message["stacks"])
            faulthandler.register(STACKS_SIGNAL, message["stacks"])
        if message["cmd"] == "stop":
            break
        server.reply(message, payload)
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    os._exit(0)  # threads that the target left running are not waited for
