"""Other processes that ask a part of the checks, each with a target of its own (``--jobs``)."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import inf
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any

from minilora.io.memory import free_memory
from minilora.verify.core.errors import LoadError
from minilora.verify.engine import Asker
from minilora.verify.plan import CheckPlan
from minilora.verify.work import Work

LOOK_SECONDS = 0.2
"""The time between two looks at whether another process is worth its start."""

ROOM = 2.0**32
"""The bytes of memory that are enough for two of any library that is known."""

LEAST_SECONDS = 0.5
"""How long is asked before the rest is estimated."""

STOP_SECONDS = 4.0
"""How long a process has to end its target and itself."""


Started = tuple[BaseProcess, Connection]
"""A process and the pipe to it."""


@dataclass(frozen=True)
class Setup:
    """What another process needs to ask as the first does: the target, and options of the run."""

    open_target: Callable[[], AbstractContextManager[object]]
    known: Mapping[str, Any]
    command: Sequence[str] | None
    time_limit: float


@dataclass
class Helpers:
    """``count`` processes beside this one, each of which opens the target anew.

    With ``if_worth_it`` each is started only once it saves more time than its start takes, and
    where there is memory: the target took ``start_seconds`` to open here, and has ``size`` bytes.
    """

    setup: Setup
    count: int
    if_worth_it: bool = False
    start_seconds: float = 0.0
    size: int = 0
    _early: Started | None = None

    @contextlib.contextmanager
    def early(self) -> Iterator[None]:
        """Starts the first of them at once, to open its target while this process opens its own.

        Not where there is little memory: how much a target takes is not known yet.
        """
        if free_memory(inf) < ROOM:
            yield
            return
        self._early = _started(self.setup)
        try:
            yield
        finally:
            _end(self._early[0])

    @contextlib.contextmanager
    def at(self, work: Work, plans: Sequence[CheckPlan]) -> Iterator[None]:
        """Lets them ask what they may, until the context is left."""
        helpers = [_Helper(self, work, plans, others) for others in range(self.count)]
        for helper in helpers:
            helper.start()
        try:
            yield
        except BaseException:
            for helper in helpers:
                helper.interrupt()
            raise
        finally:
            for helper in helpers:
                helper.end()

    def is_worth_it(self, work: Work, others: int, seconds: float) -> bool:
        """Whether one more process, beside ``others``, saves more time than its start takes."""
        if not self.if_worth_it:
            return True
        done = work.done
        if seconds < LEAST_SECONDS or not done:
            return False
        left = seconds * (sum(work.sizes) - done) / done
        return left > self.start_seconds * (others + 2) and 2 * self.size < free_memory(inf)


@dataclass
class _Helper:
    """A process that asks, and the thread here that gives it what to ask.

    ``others`` of its kind are started before it.
    """

    helpers: Helpers
    work: Work
    plans: Sequence[CheckPlan]
    others: int
    _over: threading.Event = field(default_factory=threading.Event)
    _process: BaseProcess | None = None
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Lets the thread begin."""
        self._thread = threading.Thread(target=self._run, name="minilora-helper", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        if (started := self._first_started()) is None:
            return
        self._process, here = started
        number: int | None = None
        try:
            with here:
                here.recv()  # its target is open
                while not self._over.is_set() and (number := self.work.for_others()) is not None:
                    p = self.plans[number]
                    here.send((p.check.id, p.dtype, p.numbers, p.seed))
                    self.work.add_of_others(number, here.recv())
                    number = None
                here.send(None)
        except (EOFError, OSError):  # it ended
            if number is not None:
                self.work.add_of_others(number, None)

    def _first_started(self) -> Started | None:
        """The process and its pipe, once it is worth it; None where the run ends before."""
        if self.others == 0 and self.helpers._early is not None:
            return self.helpers._early
        since = monotonic()
        while not self.helpers.is_worth_it(self.work, self.others, monotonic() - since):
            if self._over.wait(LOOK_SECONDS):
                return None
        return _started(self.helpers.setup)

    def interrupt(self) -> None:
        """Ends the process in whatever it does."""
        self._over.set()
        if self._process is not None and self._process.is_alive():
            self._process.terminate()

    def end(self) -> None:
        """Waits for the thread and the process."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)
        if self._process is not None:
            self._process.join(STOP_SECONDS)
            self._process.kill()


def _started(setup: Setup) -> Started:
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, setup), daemon=True)
    process.start()
    there.close()
    return process, here


def _end(process: BaseProcess) -> None:
    """Ends a process in whatever it does, and waits for that."""
    if process.is_alive():
        process.terminate()
        process.join(STOP_SECONDS)
        process.kill()


def _serve(connection: Connection, setup: Setup) -> None:
    """The process: results of the plans that it is told, until there are none."""
    from minilora.verify.checks.registry import CHECKS

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the first process's
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which leaves the contexts below
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the first process says what is to be said
    by_id = {check.id: check for check in CHECKS}
    with contextlib.suppress(LoadError, EOFError, OSError), setup.open_target() as target:
        asker = Asker.of(CHECKS, target, setup.known, setup.time_limit, setup.command)
        connection.send(None)
        while (asked := connection.recv()) is not None:
            check, dtype, numbers, seed = asked
            p = CheckPlan(by_id[check], dtype, numbers, seed, asker.subject.fixed)
            asker.subject.remarks.clear()
            connection.send((asker.result(p), tuple(asker.subject.remarks)))
