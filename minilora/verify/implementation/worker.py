"""The thread in which a target is called, and the end of a call that hangs."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from minilora.verify.core.errors import place_of


class TimedOut(Exception):
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


class Worker:
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
        """What the call gives. Raises Raised, or TimedOut after ``limit`` seconds."""
        outcome: list[Any] = []
        done = threading.Event()
        self._calls.put((call, outcome, done))
        if not done.wait(limit):
            frame = sys._current_frames().get(self._thread.ident or 0)
            raise TimedOut(place_of(traceback.walk_stack(frame), home) if frame else "")
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
