"""A Python target in a process of its own, as the judge sees it.

The target cannot reach what judges it: it is asked by messages and answers by numbers. Whatever it
does is a verdict, the end of its process too. After that it is started again for the next call, a
few times.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import Parameter, Signature
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from minilora.verify.core.errors import CALLERS, Fault, LoadError, Skip, place_words, tidy
from minilora.verify.implementation.child import Child
from minilora.verify.implementation.contract import DECLARATIONS, START_LIMIT, TIME_LIMIT, Remote
from minilora.verify.implementation.messages import quoted, skip_reason, understood
from minilora.verify.implementation.python_child import STACKS_SIGNAL
from minilora.verify.implementation.values import Unpacker, framed, packed

MAX_ENDS = 20
"""After so many ends of its process a target is not started again."""

MAX_ENDS_OF_A_METHOD = 3
"""After so many ends in a row, without an answer, a method is not called again."""

LONGEST_HEAD = 2**24
LARGEST_ANSWER = 2**30
"""The most bytes of an answer without its arrays, and of its arrays."""

PRINTED = 2**16
"""So many bytes of what a target prints are passed on to standard error."""

STACK_BYTES = 2**16
STACK_SECONDS = 0.5
"""How much is read of where a process is, and how long that is waited for."""

IMPORT = 'File "<frozen importlib._bootstrap>"'
"""What stands in the stack of a thread that is importing."""

FAULTS = ("raises", "changes its inputs", "changes its answers", "missing")
"""The kinds of faults that the target's process may report."""

CODE = """\
import json, sys
sys.path[:] = json.loads(sys.argv.pop(1))
from minilora.verify.implementation.python_child import main
from minilora.verify.loading import load
main(load)
"""


Methods = Mapping[str, Sequence[str] | None]


class Printed:
    """What a target prints, passed on to standard error up to a limit."""

    def __init__(self) -> None:
        self.left = PRINTED

    def __call__(self, chunk: bytes) -> None:
        """Passes on what is left of the limit, and says so at its end."""
        if self.left <= 0:
            return
        sys.stderr.write(chunk[: self.left].decode(errors="replace"))
        self.left -= len(chunk)
        if self.left <= 0:
            sys.stderr.write(f"\nminilora: the target printed {PRINTED} bytes; more is left out\n")
        sys.stderr.flush()


class Process(Child):
    """The process of a Python target: a line of JSON, and the bytes of arrays behind it."""

    def __init__(self, printed: Printed) -> None:
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self.stacks = self._stacks.fileno()
        self.home: str | None = None
        self.thread = 0
        self.is_importing = False
        """Whether it was importing when the time for its last answer was over."""
        self._size: int | None = None
        path = json.dumps([os.path.abspath(entry) for entry in sys.path])
        command = [sys.executable, "-P", "-c", CODE, path]
        super().__init__(command, files=[self.stacks], echo=printed)

    def _first_line(self) -> bytes | None:
        if self._size is None:
            if (end := self._unread.find(b"\n")) < 0:
                return None
            self._size = end + 1 + _announced(bytes(self._unread[:end]))
        if len(self._unread) < self._size:
            return None
        size, self._size = self._size, None
        return self._taken(size)

    def _within_length(self) -> None:
        if self._size is None and len(self._unread) > LONGEST_HEAD:
            raise Fault("protocol", f"an answer of more than {LONGEST_HEAD} bytes without arrays")

    def _how_it_ended(self, method: str) -> str:
        place = self._place(os.pread(self.stacks, STACK_BYTES, 0))
        return f"{method}: {self._end_words()}{place}; {self._stderr_words()}"

    def _how_it_hangs(self, method: str, limit: float) -> str:
        before = os.fstat(self.stacks).st_size
        self._process.send_signal(STACKS_SIGNAL)
        written, end = b"", monotonic() + STACK_SECONDS
        while not (place := self._place(written)) and monotonic() < end:
            sleep(0.01)
            written = os.pread(self.stacks, STACK_BYTES, before)
        self.is_importing = IMPORT in self._main_thread(written)
        return f"{method} gave no answer in {limit:g} s{place}"

    def _place(self, stacks: bytes) -> str:
        """Where the target is, by what faulthandler wrote, in words."""
        found = re.findall(r'^  File "(.*)", line (\d+) in (.*)$', self._main_thread(stacks), re.M)
        places = [(file, int(line), name) for file, line, name in found if not _is_own(file)]
        words = place_words(places, self.home)
        return f" ({words})" if words else ""

    def _main_thread(self, stacks: bytes) -> str:
        """The stack of the thread that ended the process, or of the one that calls the target."""
        threads = stacks.decode(errors="replace").split("\n\n")
        at_fault = "" if threads[0].startswith("Fatal") else f" 0x{self.thread:016x}"
        names = (f"Current thread{at_fault}", f"Thread 0x{self.thread:016x}")
        return next((text for text in threads if text.startswith(names)), "")

    def kill(self) -> None:
        """Ends it, waits for its end and closes its files."""
        super().kill()
        self._stacks.close()


def _is_own(file: str) -> bool:
    """Whether a file is one of those that call a target."""
    path = file.replace(os.sep, "/")
    return path == "<string>" or path.endswith(tuple(f"{c.replace('.', '/')}.py" for c in CALLERS))


def _announced(line: bytes) -> int:
    """How many bytes of arrays follow a line. Raises Fault."""
    found = re.search(rb'"bytes":(\d{1,18})}$', line)
    if found is None:
        raise Fault("protocol", f"{quoted(line)} is not an answer of the target's process")
    if (size := int(found[1])) > LARGEST_ANSWER:
        raise Fault("protocol", f"an answer of {size} bytes; expected at most {LARGEST_ANSWER}")
    return size


class RemoteObject(Remote):
    """The target, another instance of it or a session, in its process, by number.

    ``methods`` are those that it has, with the names of the arguments that each takes, or None.
    """

    def __init__(
        self, target: PythonTarget, process: Process | None, number: int, methods: Methods
    ) -> None:
        self._target, self._process, self._number = target, process, number
        self.methods = methods
        if process is not None:
            weakref.finalize(self, target.ended.append, number)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or name not in self.methods:
            raise AttributeError(name)
        method = partial(self._call, name)
        if (names := self.methods[name]) is not None:
            parameters = [Parameter(each, Parameter.KEYWORD_ONLY) for each in names]
            method.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        return method

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._target.ask(self, method, args, kwargs)


class PythonTarget(RemoteObject):
    """An implementation that answers from a Python process of its own.

    ``target`` is what `loading.load` takes. Raises LoadError where it cannot be loaded.
    """

    def __init__(self, target: str, *, time_limit: float = TIME_LIMIT) -> None:
        if os.name != "posix":
            raise LoadError("a process of its own needs a POSIX system: use --in-process")
        super().__init__(self, None, 0, {})
        self._shown, self.time_limit = target, time_limit
        self.ended: list[int] = []
        self._printed = Printed()
        self._ends: Counter[str] = Counter()  # of each method in a row
        self._all_ends = 0
        self._seq = 0
        self._processes: list[Process] = []
        weakref.finalize(self, _kill, self._processes)
        try:
            said = self._start()
            self.methods = said["methods"]
            declared = said["implementation"]
            self.name, self.version = declared["name"], declared["version"]
            for name in DECLARATIONS:
                if name in declared:
                    setattr(self, name, declared[name])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PythonTarget:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def resident(self) -> int:
        """The bytes of memory that the process has; 0 where the system does not tell."""
        try:
            statm = Path(f"/proc/{self._processes[0].pid}/statm").read_text()
        except (OSError, IndexError):
            return 0
        return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        """Ends the process."""
        for process in self._processes:
            process.stop()
        self._end()

    def anew(self) -> RemoteObject | None:
        """Another instance in the same process; None where the class needs arguments."""
        try:
            self._require_alive(self, "anew")
            made = self._value(self._exchange("anew", {"cmd": "anew"}, [], START_LIMIT))
        except Fault:
            return None
        return RemoteObject(self, self._processes[0], self._seq, self.methods) if made else None

    def ask(
        self, asked: RemoteObject, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """What a method answers. Raises Skip or Fault."""
        self._require_alive(asked, method)
        arrays: list[bytes] = []
        arguments = packed([args, kwargs], arrays)
        ended = [self.ended.pop() for _ in range(len(self.ended))]
        message = {"cmd": "run", "object": asked._number, "method": method}
        message |= {"arguments": arguments, "ended": ended}
        answer = self._exchange(method, message, arrays, asked.time_limit)
        self._ends.pop(method, None)
        if skipped := answer[0].get("skipped"):
            raise Skip(f"not supported: {skip_reason(skipped)}")
        if error := answer[0].get("error"):
            raise _fault(error)
        value = self._value(answer)
        if method != "session":
            return value
        return RemoteObject(self, self._processes[0], self._seq, value)

    def _require_alive(self, asked: RemoteObject, method: str) -> None:
        """Starts the process again, if it may. Raises Fault."""
        if asked._process is not None and self._processes != [asked._process]:
            raise Fault("crashes", "the session ended with the process that held it")
        if self._ends[method] >= MAX_ENDS_OF_A_METHOD:
            times = f"each of its last {MAX_ENDS_OF_A_METHOD} calls ended the process"
            raise Fault("crashes", f"{method} is not called any more: {times}")
        if self._processes:
            return
        if self._all_ends >= MAX_ENDS:
            times = f"its process has ended {MAX_ENDS} times, and is not started again"
            raise Fault("crashes", f"{method} is not called: {times}")
        try:
            self._start()
        except LoadError as error:
            raise Fault("crashes", f"{method}: it cannot be started again: {error}") from None

    def _start(self) -> dict[str, Any]:
        """Starts the process: what it says of the target. Raises LoadError."""
        self.ended.clear()
        process = Process(self._printed)
        self._processes.append(process)
        message = {"cmd": "start", "target": self._shown, "stacks": process.stacks}
        try:
            answer = self._exchange("loading it", message, [], START_LIMIT)
            if error := answer[0].get("error"):
                self._end()
                raise LoadError(tidy(error["message"], 2000))
            said = self._value(answer)
            process.home, process.thread = said["home"], int(said["thread"])
            return dict(said)
        except Fault as fault:
            raise LoadError(f"{self._shown}: {fault.message}") from None

    def _exchange(
        self, method: str, message: Mapping[str, Any], arrays: list[bytes], limit: float
    ) -> tuple[dict[str, Any], bytes]:
        """The answer to a message; a process that gives no valid answer is ended."""
        self._seq += 1
        try:
            return self._answer(method, framed({"seq": self._seq, **message}, arrays), limit)
        except BaseException as error:  # KeyboardInterrupt as well
            if isinstance(error, Fault):
                self._ends[method] += 1
                self._all_ends += 1
            self._end()
            raise

    def _answer(self, method: str, message: bytes, limit: float) -> tuple[dict[str, Any], bytes]:
        """The answer to a message in the time that importing leaves. Raises Fault."""
        process, started = self._processes[0], monotonic()
        ask = process.exchange
        while monotonic() - started < START_LIMIT + limit:
            try:
                line, _, payload = ask(method, limit, message).partition(b"\n")
                said = understood(line, self._seq, ("ok", "skipped", "error", "importing"))
                if "importing" not in said:
                    return said, payload
            except Fault as fault:
                if fault.kind != "hangs" or not process.is_importing:
                    raise
            ask, message = process.wait, b""
        raise Fault("hangs", f"{method} imports for more than {START_LIMIT:g} s")

    def _value(self, answer: tuple[dict[str, Any], bytes]) -> Any:
        """The value of an answer. Raises Fault."""
        said, payload = answer
        try:
            unpacker = Unpacker(payload)
            value = unpacker.value(said["answer"])
            unpacker.end()
            return value
        except Exception as error:
            self._end()
            raise Fault("protocol", f"an answer that cannot be read: {tidy(error)}") from None

    def _end(self) -> None:
        _kill(self._processes)


def _fault(error: Any) -> Fault:
    kind = error.get("kind") if isinstance(error, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return Fault(kind if kind in FAULTS else "raises", tidy(message, 600))


def _kill(processes: list[Process]) -> None:
    for process in processes:
        process.kill()
    processes.clear()
