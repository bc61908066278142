"""Work in several processes of one thread each, interrupted without loss."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

import numpy as np

from minilora.training.memory import keep_freed_memory
from minilora.training.threads import blas_threads

MOST_LOST = 3
"""After so many lost workers the work itself is taken for the cause."""

_stopped = threading.Event()
_working = threading.Lock()


_STOPS = (signal.SIGINT, signal.SIGTERM)
"""The signals that stop a worker."""


def _mask(how: str) -> None:
    """Has the signals that stop wait, ``SIG_BLOCK``, or come, where the system can have them wait.

    A process that is started takes this over: a signal waits until there is somebody to heed it.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(getattr(signal, how), _STOPS)


def _begin_worker() -> None:
    """A worker leaves its linear algebra one thread, and is stopped by the first signal alone."""
    _stopped.clear()

    def stop(number: int, frame: Any) -> None:
        first = not _stopped.is_set()  # a second one would cut short what the first one has saved
        _stopped.set()
        if first and _working.locked():  # a worker that waits for work is ended by its pool
            raise KeyboardInterrupt

    for number in _STOPS:
        signal.signal(number, stop)
    _mask("SIG_UNBLOCK")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_freed_memory()


def _end_with_parent() -> None:
    """Nobody takes the results of a worker whose parent was killed: it saves, and ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGINT)
    with _working:
        os._exit(1)


def _work(work: Callable[[Any], Any], item: Any) -> Any:
    try:
        # What overflows is found in the results.
        with _working, blas_threads(1), np.errstate(all="ignore"):
            return None if _stopped.is_set() else work(item)
    except KeyboardInterrupt:
        return None


def in_processes(
    work: Callable[[Any], Any],
    items: Sequence[Any],
    jobs: int,
    executor: Executor | None = None,
) -> Iterator[tuple[int, Any]]:
    """(i, work(items[i])) as they are done, so many at a time, each process with one thread.

    ``work`` and the items go to other processes: a module's function, and plain values. Whoever
    leaves early, by Ctrl-C too, has the workers stopped; each is waited for until it has saved.
    What a worker had in hand that was killed is begun again. With ``executor``, such as Dask's, the
    work goes to its workers, ``jobs`` is theirs, and so is what happens to a lost one.

    Errors: ValueError unless there is a process at least; the first that ``work`` raises;
    MemoryError after `MOST_LOST` lost workers.
    """
    if jobs < 1:
        raise ValueError(f"{jobs} processes: expected at least 1")
    if executor is not None:
        yield from _in_executor(executor, work, items)
        return
    left, lost = dict(enumerate(items)), 0
    while left:
        try:
            for i, result in _in_pool(work, left, jobs):
                del left[i]
                yield i, result
        except BrokenProcessPool:
            lost += 1
            if lost == MOST_LOST:
                found = f"{lost} workers were killed, as systems do for want of memory"
                raise MemoryError(f"{found}; use fewer --jobs") from None


def _alone(work: Callable[[Any], Any], item: Any) -> Any:
    with blas_threads(1), np.errstate(all="ignore"):
        return work(item)


def _in_executor(
    executor: Executor, work: Callable[[Any], Any], items: Sequence[Any]
) -> Iterator[tuple[int, Any]]:
    waiting = {executor.submit(_alone, work, item): i for i, item in enumerate(items)}
    try:
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    finally:
        for future in waiting:
            future.cancel()


def _in_pool(
    work: Callable[[Any], Any], items: Mapping[int, Any], jobs: int
) -> Iterator[tuple[int, Any]]:
    """The items by a new pool of processes, which their first error ends."""
    # Not forked: a library's threads would not be there in the copy, but their locks would.
    context = multiprocessing.get_context("spawn")
    most = max(1, min(jobs, len(items)))
    with ProcessPoolExecutor(most, mp_context=context, initializer=_begin_worker) as pool:
        before = set(multiprocessing.active_children())
        _mask("SIG_BLOCK")
        try:
            waiting = {pool.submit(_work, work, item): i for i, item in items.items()}
        finally:
            _mask("SIG_UNBLOCK")
        own = set(multiprocessing.active_children()) - before
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BaseException:
            for future in waiting:
                future.cancel()
            own |= set(multiprocessing.active_children()) - before
            for process in own:
                if process.is_alive() and process.pid is not None:
                    with suppress(ProcessLookupError):  # of one that has ended meanwhile
                        os.kill(process.pid, signal.SIGINT)
            raise
