"""What the commands of the command line share: exit statuses, printing, a progress bar."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minilora.verify.engine import Progress

HOLDS, DEVIATES, USAGE, NOT_LOADED, INTERRUPTED = 0, 1, 2, 3, 130


def split(values: list[str] | None) -> list[str] | None:
    """The values of a repeatable option, each of which may be a list with commas."""
    return values and [part.strip() for value in values for part in value.split(",")]


def refuse(message: str, command: str = "verify") -> int:
    """Says what is wrong with how the command was called; its exit status."""
    print(f"minilora {command}: {message}", file=sys.stderr)
    return USAGE


def say(text: str) -> None:
    """Prints in whatever encoding the reader has, and lets a reader leave early."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends: that goes nowhere then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def stdout_on_stderr() -> Iterator[None]:
    """What a target prints, from Python or from compiled code, goes to standard error."""
    try:
        out, err = sys.stdout.fileno(), sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # a stream that is no file, as under a test
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    sys.stdout.flush()
    kept = os.dup(out)
    os.dup2(err, out)
    try:
        yield
    finally:
        sys.stdout.flush()
        with contextlib.suppress(OSError, TypeError, AttributeError):
            ctypes.CDLL(None).fflush(None)  # C's own buffer
        os.dup2(kept, out)
        os.close(kept)


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """A bar on standard error where that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    # What is long stands last, where a narrow terminal cuts it off.
    form = "{percentage:3.0f}% {bar:16} {n_fmt} of {total_fmt} cases, {remaining} left  {desc}"
    with tqdm(bar_format=form, leave=False, file=sys.stderr, dynamic_ncols=True) as bar:

        def progress(case: str, behind: int, total: int) -> None:
            bar.total = total
            bar.set_description_str(case.rpartition(":")[0], refresh=False)
            bar.update(behind - bar.n)

        yield progress
