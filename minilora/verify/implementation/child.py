"""The process of a driver: its pipes, its output, its end."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shlex
import signal
import subprocess
from collections.abc import Callable, Sequence
from time import monotonic

from minilora.verify.core.errors import Fault, LoadError, tidy
from minilora.verify.implementation.messages import message_line, quoted

LONGEST_LINE = 2**20
"""The maximum bytes of an answer: arrays belong in the file."""


STOP_LIMIT = 2.0
"""Seconds that a driver has to end by itself after the message ``stop``."""


END_LIMIT = 1.0
"""Seconds that a driver has to end after it closed its standard output."""


STDERR_BYTES = 8000
"""The last bytes of standard error that are kept."""


POLL_SECONDS = 0.05
"""The time between two looks at whether the process has ended."""


def words(command: str) -> list[str]:
    """The command's words, as a shell splits them. Raises ValueError."""
    try:
        split = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"the command {command!r} cannot be split: {error}") from None
    if not split:
        raise ValueError("the command is empty; give one that starts a driver, like ./driver")
    return split


def start(command: Sequence[str], shown: str) -> Child:
    """The process of a command; ``shown`` is the command in messages. Raises LoadError."""
    try:
        return Child(command)
    except FileNotFoundError:
        program = command[0]
        if os.path.exists(program) and os.sep in program:
            why = "the interpreter in its first line does not exist"
        elif os.path.exists(program):
            why = f"no such program on the PATH; for the file in this folder, use ./{program}"
        else:
            why = "no such file" if os.sep in program else "no such program on the PATH"
        raise LoadError(f"{shown}: {program} cannot be started: {why}") from None
    except PermissionError:
        why = "it is a folder" if os.path.isdir(command[0]) else "it is not executable"
        remedy = "run chmod +x on it, or put its interpreter before it"
        raise LoadError(f"{shown}: {command[0]} cannot be started: {why}; {remedy}") from None
    except (OSError, ValueError) as error:
        why = f"{getattr(error, 'strerror', None) or error}; put its interpreter before it"
        raise LoadError(f"{shown}: {command[0]} cannot be started: {why}") from None


class Child:
    """The process of a driver: its pipes, its unread output, and its end.

    It leads its own process group: an interrupt from the terminal does not reach it before this
    process can stop it, and whatever it starts ends with it.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        files: Sequence[int] = (),
        echo: Callable[[bytes], None] | None = None,
    ) -> None:
        """``files`` are descriptors that it inherits; ``echo`` is given its standard error."""
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            bufsize=0,
            start_new_session=True,
            pass_fds=files,
        )
        self._echo = echo
        pipes = (self._process.stdin, self._process.stdout, self._process.stderr)
        self._in, self._out, self._err = (p.fileno() for p in pipes if p is not None)
        self._selector = selectors.DefaultSelector()
        for file in (self._in, self._out, self._err):
            os.set_blocking(file, False)
        for file in (self._out, self._err):
            self._selector.register(file, selectors.EVENT_READ)
        self._unread = bytearray()
        self._last_words = b""
        self._has_ended_output = False

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def exchange(self, method: str, limit: float, message: bytes) -> bytes:
        """The line that it answers to a message. Raises Fault."""
        while self._read(0.0):
            self._within_length()
        self.nothing_more("before it was asked")
        return self.wait(method, limit, message)

    def wait(self, method: str, limit: float, message: bytes = b"") -> bytes:
        """Its next line, while the message is written. Raises Fault."""
        end = monotonic() + limit
        rest = self._write(memoryview(message))
        if rest:
            self._selector.register(self._in, selectors.EVENT_WRITE)
        try:
            while (line := self._first_line()) is None:
                self._within_length()
                if self._has_ended_output:
                    raise Fault("crashes", self._how_it_ended(method))
                if (left := end - monotonic()) <= 0:
                    raise Fault("hangs", self._how_it_hangs(method, limit))
                if not self._read(min(left, POLL_SECONDS)) and self._process.poll() is not None:
                    self._has_ended_output = not self._read(0.0)
                if rest and not (rest := self._write(rest)):
                    self._selector.unregister(self._in)
        finally:
            if rest:
                self._selector.unregister(self._in)
        return line

    def _first_line(self) -> bytes | None:
        end = self._unread.find(b"\n")
        return None if end < 0 else self._taken(end + 1)[:-1]

    def _taken(self, size: int) -> bytes:
        """The first bytes of the unread output, which are read by that."""
        taken = bytes(self._unread[:size])
        del self._unread[:size]
        return taken

    def _within_length(self) -> None:
        if len(self._unread) > LONGEST_LINE:
            raise Fault(
                "protocol", f"a line without an end; it begins with {quoted(bytes(self._unread))}"
            )

    def nothing_more(self, when: str) -> None:
        """Raises Fault where there is output that was not asked for."""
        if self._unread:
            text = f"{quoted(bytes(self._unread))} on standard output {when}"
            raise Fault("protocol", f"{text}; expected one answer to each message and nothing else")

    def _write(self, rest: memoryview) -> memoryview:
        if not rest:
            return rest
        try:
            return rest[os.write(self._in, rest) :]
        except BlockingIOError:
            return rest
        except BrokenPipeError:  # its end will be seen on its standard output
            return rest[:0]

    def _read(self, wait: float) -> bool:
        """Reads the output so far, of both pipes; whether there was any."""
        ready = [key.fd for key, _ in self._selector.select(wait)]
        for file in ready:
            if file == self._in:
                continue
            try:
                chunk = os.read(file, 2**16)
            except BlockingIOError:
                continue
            if not chunk:
                self._selector.unregister(file)
                self._has_ended_output |= file == self._out
            elif file == self._out:
                self._unread += chunk
            else:
                self._last_words = (self._last_words + chunk)[-STDERR_BYTES:]
                if self._echo is not None:
                    self._echo(chunk)
        return bool(ready)

    def _end_words(self) -> str:
        """How the process ended: by a signal, or with a status."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_LIMIT)
        status = self._process.poll()
        if status is None:
            return "it closed its standard output"
        if status < 0:
            return f"it was ended by {signal_name(-status)}"
        return f"it ended with exit status {status}"

    def _how_it_ended(self, method: str) -> str:
        text = f"{method}: {self._end_words()}"
        if self._unread:
            text += f", in the middle of a line: {quoted(bytes(self._unread))}"
        return f"{text}; {self._stderr_words()}"

    def _how_it_hangs(self, method: str, limit: float) -> str:
        text = f"{method} gave no answer in {limit:g} s, and the driver was ended"
        if self._unread:
            text += (
                f"; it wrote the beginning of a line, {quoted(bytes(self._unread))}, and no newline"
            )
        return f"{text}; {self._stderr_words()}"

    def _stderr_words(self) -> str:
        """The last lines of standard error, in words."""
        end = monotonic() + 0.2
        while self._selector.get_map() and monotonic() < end and self._read(POLL_SECONDS):
            pass
        text = last_words(self._last_words.decode(errors="replace"))
        return f"standard error ends with: {text}" if text else "nothing on standard error"

    def stop(self) -> None:
        """Asks it to end, and waits a moment."""
        self._write(memoryview(message_line({"seq": -1, "cmd": "stop"})))
        end = monotonic() + STOP_LIMIT
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        while self._process.poll() is None and monotonic() < end:
            if not self._selector.get_map():  # both outputs closed: it is about to end
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(max(0.0, end - monotonic()))
                return
            self._read(POLL_SECONDS)
            self._unread.clear()

    def end(self) -> None:
        """Ends it and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Ends it, waits for its end and closes its pipes."""
        self.end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        self._selector.close()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def signal_name(number: int) -> str:
    """The name of a signal."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def last_words(text: str) -> str:
    """The last lines of a text in one, and the last line before them that names an error."""
    lines = [tidy(line, 150) for line in text.splitlines() if line.strip()]
    before, last = lines[:-5], lines[-5:]
    headlines = [line for line in before if re.search("error|exception|panic|fatal", line, re.I)]
    joined = " | ".join(last)
    joined = joined if len(joined) <= 250 else f"…{joined[-249:]}"
    return " | ".join([*headlines[-1:], joined])
