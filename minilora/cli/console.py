"""Printing, standard streams, and the files that commands write; the exit statuses."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping

OK, FAILED, USAGE, NOT_LOADED, INTERRUPTED = 0, 1, 2, 3, 130
"""The exit statuses."""

STDOUT = "-"
"""Standard output, where a file is asked for."""


def usage_error(message: str, command: str) -> int:
    """Print a usage error; its exit status."""
    print(f"minilora {command}: {message}", file=sys.stderr)
    return USAGE


def open_streams() -> None:
    """Replace closed standard streams, so that no other file takes their place."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process


def say(text: str) -> None:
    """Print in the encoding of standard output; ignore a closed pipe."""
    open_streams()
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def files_of(arguments: argparse.Namespace, *forms: str) -> dict[str, str]:
    """The files to write, by format; `STDOUT` is no file.

    Errors: ValueError for a file that cannot be written, before the work; for two that are to be
    standard output.
    """
    from minilora.io.atomic import why_not_writable

    files = {form: path for form in forms if (path := getattr(arguments, form))}
    if list(files.values()).count(STDOUT) > 1:
        raise ValueError("standard output, -, is named twice: expected one form there")
    for path in files.values():
        if path != STDOUT and (why := why_not_writable(path)):
            raise ValueError(f"cannot write {why}")
    return files


def has_colours() -> bool:
    """Whether standard output is a terminal that shows colours, and nobody asked for none."""
    no_colours = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not no_colours


def columns() -> int:
    """The columns of the terminal, between 40 and 120; 80 where there is none."""
    import shutil

    return min(max(shutil.get_terminal_size().columns, 40), 120) if sys.stdout.isatty() else 80


def tell(text: str, files: Mapping[str, str]) -> None:
    """Print what is for a reader: on standard error where a form takes standard output."""
    if STDOUT in files.values():
        print(text, end="", file=sys.stderr)
    else:
        say(text)


def write_file(path: str, text: str) -> None:
    """Write a file, or `STDOUT`; append to $GITHUB_STEP_SUMMARY, which other steps write, too.

    Errors: ValueError for a file that cannot be written.
    """
    from minilora.io.atomic import write_text

    if path == STDOUT:
        say(text)
        return
    try:
        if _is_summary(path):
            with open(path, "a", encoding="utf-8") as file:
                # Without a blank line a table would continue a table above it.
                file.write(f"\n{text}" if text.startswith("|") else text)
        else:
            write_text(path, text)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None


def markdown_room(path: str) -> int:
    """The number of bytes of Markdown that still fit into a file."""
    from minilora.forms.markdown import MARKDOWN_BYTES

    there = os.path.getsize(path) if _is_summary(path) and os.path.exists(path) else 0
    return MARKDOWN_BYTES - there


def _is_summary(path: str) -> bool:
    collected = os.environ.get("GITHUB_STEP_SUMMARY", "")
    return bool(collected) and os.path.abspath(path) == os.path.abspath(collected)


@contextlib.contextmanager
def stdout_on_stderr() -> Iterator[None]:
    """Redirect what a target prints, from Python or compiled code, to standard error."""
    try:
        out, err = sys.stdout.fileno(), sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # not a file, as in tests
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
