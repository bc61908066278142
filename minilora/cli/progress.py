"""Progress bars on standard error, and signals that interrupt a run."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from minilora.cli.console import open_streams

if TYPE_CHECKING:
    from minilora.verify.engine import Progress


@contextlib.contextmanager
def progress_bar(unit: str = "cases") -> Iterator[Progress | None]:
    """A progress bar on standard error, if that is a terminal."""
    open_streams()
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    # The longest part is last: a narrow terminal cuts it off.
    form = f"{{n_fmt}} of {{total_fmt}} {unit}, {{remaining}} left  {{desc}}"
    form = "{percentage:3.0f}% {bar:16} " + form
    with tqdm(bar_format=form, leave=False, file=sys.stderr, dynamic_ncols=True) as bar:

        def progress(case: str, behind: int, total: int) -> None:
            bar.total = total
            bar.set_description_str(case.rpartition(":")[0], refresh=False)
            bar.update(behind - bar.n)

        yield progress


BytesRead = Callable[[int, int, str], None]
"""Told as an audit goes: the bytes that were read, of how many, and the name of what they are."""


@contextlib.contextmanager
def bytes_bar(unit: str = "B") -> Iterator[BytesRead | None]:
    """A progress bar of bytes, or of what ``unit`` says, and the time left on standard error.

    None, if that is no terminal.
    """
    open_streams()
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    # The name is last: a narrow terminal cuts it off.
    form = f"{{n_fmt}}{unit} of {{total_fmt}}{unit}, {{remaining}} left  {{desc}}"
    form = "{percentage:3.0f}% {bar:16} " + form
    with tqdm(
        bar_format=form, unit_scale=True, leave=False, file=sys.stderr, dynamic_ncols=True
    ) as bar:

        def progress(read: int, total: int, name: str) -> None:
            bar.total = total
            bar.set_description_str(name, refresh=False)
            bar.update(read - bar.n)

        yield progress


@contextlib.contextmanager
def steps_bar() -> Iterator[Callable[[Mapping[str, Any], int], None] | None]:
    """A progress bar of a run's steps on standard error; in a log, a line now and then.

    It starts at the first step to be done, and shows the time left, the loss, the last validation
    loss, tokens per second and memory. It is as wide as the terminal.
    """
    open_streams()
    if not sys.stderr.isatty():
        yield steps_log()
        return
    from tqdm import tqdm

    form = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}, {remaining} left{desc}"
    with contextlib.ExitStack() as stack:
        bar, valid = None, ""

        def watch(line: Mapping[str, Any], steps: int) -> None:
            nonlocal bar, valid
            if bar is None:  # messages before the first step stay above it
                bar = stack.enter_context(
                    tqdm(total=steps, initial=line["step"], bar_format=form, file=sys.stderr,
                         dynamic_ncols=True)
                )  # fmt: skip
            if "loss" not in line:
                return
            if "val_loss" in line:
                valid = f", valid {line['val_loss']:#.4g}"
            speed = f", {tqdm.format_sizeof(line['tokens_per_second'])} tok/s"
            memory = line["memory"]
            held = "" if memory is None else f", {tqdm.format_sizeof(memory, 'iB', 1024)}"
            told = f", loss {line['loss']:#.4g}{valid}{speed}{held}"
            bar.set_description_str(told, refresh=False)
            bar.update(line["step"] - bar.n)

        yield watch


LOG_SECONDS = 30.0
"""So many seconds pass at least between two lines of a log."""


def steps_log(
    seconds: float | None = None, clock: Callable[[], float] = time.monotonic
) -> Callable[[Mapping[str, Any], int], None]:
    """Print a line with the step, the loss and the time left, after `LOG_SECONDS` each."""
    seconds = LOG_SECONDS if seconds is None else seconds
    started = last = clock()
    first: int | None = None

    def watch(line: Mapping[str, Any], steps: int) -> None:
        nonlocal first, last
        step, now = line["step"], clock()
        first = step if first is None else first
        if "loss" not in line or now - last < seconds:
            return
        last, done = now, step - first
        left = (now - started) / done * (steps - step)
        valid = f", valid {line['val_loss']:#.4g}" if "val_loss" in line else ""
        print(
            f"step {step} of {steps}: loss {line['loss']:#.4g}{valid}, "
            f"{line['tokens_per_second']:.0f} tokens/s, {_minutes(left)} left",
            file=sys.stderr,
            flush=True,
        )

    return watch


def _minutes(seconds: float) -> str:
    """Seconds as minutes and seconds, or hours and minutes."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C, and only the first signal: a second must not stop the saving."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = False

    def once(number: int, frame: Any) -> None:
        nonlocal seen
        if not seen:
            seen = True
            raise KeyboardInterrupt

    before = {number: signal.signal(number, once) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
