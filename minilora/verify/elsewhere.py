"""Checks that the workers of an executor ask, each with a target of its own (``--executor``)."""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from minilora.verify.engine import Asker
from minilora.verify.jobs import Setup
from minilora.verify.plan import CheckPlan
from minilora.verify.work import Answered, Work

AHEAD = 64
"""So many plans are with the workers at a time: the rest may still be asked here."""


@dataclass(frozen=True)
class Elsewhere:
    """The workers of an executor, such as Dask's, in the place of processes here.

    What one of them cannot ask, because its target cannot be opened or it was lost, is asked here.
    """

    setup: Setup
    executor: Executor
    ahead: int = AHEAD

    @contextlib.contextmanager
    def at(self, work: Work, plans: Sequence[CheckPlan]) -> Iterator[None]:
        """Lets them ask what they may, until the context is left."""
        over, room = threading.Event(), threading.Semaphore(self.ahead)
        setup = pickle.dumps(self.setup)

        def take(number: int, future: Future[Answered]) -> None:
            lost = future.cancelled() or future.exception() is not None
            work.add_of_others(number, None if lost else future.result())
            room.release()

        def hand_out() -> None:
            while room.acquire() and not over.is_set():
                if (number := work.for_others()) is None:
                    return
                p = plans[number]
                try:
                    future = self.executor.submit(
                        _answered, setup, p.check.id, p.dtype, p.numbers, p.seed
                    )
                except RuntimeError:  # it was shut down
                    work.add_of_others(number, None)
                    return
                future.add_done_callback(partial(take, number))

        thread = threading.Thread(target=hand_out, name="minilora-executor", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            room.release()
            thread.join()


_asking = threading.Lock()


def _answered(setup: bytes, check: str, dtype: str, numbers: range, seed: int) -> Answered:
    """The result of a plan, by a worker."""
    with _asking:  # a target is asked by one at a time
        asker = _asker(setup)
        p = CheckPlan(_checks()[check], dtype, numbers, seed, asker.subject.fixed)
        asker.subject.remarks.clear()
        return asker.result(p), tuple(asker.subject.remarks)


@lru_cache(maxsize=1)
def _checks() -> dict[str, Any]:
    from minilora.verify.checks.registry import CHECKS

    return {check.id: check for check in CHECKS}


@lru_cache(maxsize=1)
def _asker(setup: bytes) -> Asker:
    """Who asks in this worker; its target stays open as long as the worker runs."""
    made: Setup = pickle.loads(setup)
    target = _open.enter_context(made.open_target())
    checks = [*_checks().values()]
    return Asker.of(checks, target, made.known, made.time_limit, made.command)


_open = contextlib.ExitStack()
