"""A command in several processes of MPI: the first one speaks, and none waits for a dead one."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from minilora.cli.console import FAILED, INTERRUPTED

if TYPE_CHECKING:
    from minilora.training.team import Alone


@contextlib.contextmanager
def ending_together(team: Alone) -> Iterator[None]:
    """An exception in one process ends all: the others would wait for it forever.

    The others than the first print nothing, and leave signals to it: it saves, and ends them.
    """
    if team.size == 1:
        yield
        return
    errors = sys.stderr
    try:
        with contextlib.ExitStack() as stack:
            if team.rank:
                for number in (signal.SIGINT, signal.SIGTERM):
                    stack.callback(signal.signal, number, signal.signal(number, signal.SIG_IGN))
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    except Told:
        raise
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        text = "interrupted" if stopped else f"{type(error).__name__}: {error}"
        print(f"minilora: process {team.rank} of {team.size}: {text}", file=errors, flush=True)
        team.end(INTERRUPTED if stopped else FAILED)
        raise


class Told(Exception):
    """An error that all processes know of: the first of them raises its ``cause``."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause


def together(team: Alone, work: Callable[[], Any]) -> Any:
    """What ``work`` gives in this process, once all processes have it.

    Errors: its own, in a team of one; Told in all processes, if any has one.
    """
    if team.size == 1:
        return work()
    try:
        made, error = work(), None
    except Exception as raised:
        made, error = None, raised
    texts = team.agree(error and f"{type(error).__name__}: {error}")
    failing = [k for k, text in enumerate(texts) if text is not None]
    if not failing:
        return made
    cause = error or ValueError(f"process {failing[0]} of {team.size}: {texts[failing[0]]}")
    raise Told(cause)
