"""What the commands of the command line share: exit statuses, printing, files, a progress bar."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minilora.verify.engine import Progress

OK, FAILED, USAGE, NOT_LOADED, INTERRUPTED = 0, 1, 2, 3, 130


def split(values: list[str] | None) -> list[str] | None:
    """The values of a repeatable option, each of which may be a list with commas."""
    return values and [part.strip() for value in values for part in value.split(",")]


def refuse(message: str, command: str) -> int:
    """Says what is wrong with how the command was called; its exit status."""
    print(f"minilora {command}: {message}", file=sys.stderr)
    return USAGE


def open_streams() -> None:
    """Where a stream was closed, what goes to it goes nowhere, and no other file gets its place."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process


def say(text: str) -> None:
    """Prints in whatever encoding the reader has, and lets a reader leave early."""
    open_streams()
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends: that goes nowhere then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def files_of(arguments: argparse.Namespace, *forms: str) -> dict[str, str]:
    """The files that the options ask for, by form. What cannot be written is told before the work.

    Errors: ValueError that says why.
    """
    from minilora.io.files import why_not_writable

    files = {form: path for form in forms if (path := getattr(arguments, form))}
    for path in files.values():
        if why := why_not_writable(path):
            raise ValueError(f"cannot write {why}")
    return files


def write_file(path: str, text: str) -> None:
    """Writes a file anew; the summary of a step on GitHub, where others write too, is written on.

    Errors: ValueError that says why it could not be.
    """
    from minilora.io.files import write_text

    try:
        if _is_summary(path):
            with open(path, "a", encoding="utf-8") as file:
                # A table would be taken for more rows of one that stands right above it.
                file.write(f"\n{text}" if text.startswith("|") else text)
        else:
            write_text(path, text)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None


def room(path: str) -> int:
    """How many bytes of Markdown there is room for in a file."""
    from minilora.verify.report.markdown import MARKDOWN_BYTES

    there = os.path.getsize(path) if _is_summary(path) and os.path.exists(path) else 0
    return MARKDOWN_BYTES - there


def _is_summary(path: str) -> bool:
    collected = os.environ.get("GITHUB_STEP_SUMMARY", "")
    return bool(collected) and os.path.abspath(path) == os.path.abspath(collected)


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
def progress_bar(unit: str = "cases") -> Iterator[Progress | None]:
    """A bar on standard error where that is a terminal."""
    open_streams()
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    # What is long stands last, where a narrow terminal cuts it off.
    form = f"{{n_fmt}} of {{total_fmt}} {unit}, {{remaining}} left  {{desc}}"
    form = "{percentage:3.0f}% {bar:16} " + form
    with tqdm(bar_format=form, leave=False, file=sys.stderr, dynamic_ncols=True) as bar:

        def progress(case: str, behind: int, total: int) -> None:
            bar.total = total
            bar.set_description_str(case.rpartition(":")[0], refresh=False)
            bar.update(behind - bar.n)

        yield progress


@contextlib.contextmanager
def steps_bar() -> Iterator[Callable[[Mapping[str, Any], int], None] | None]:
    """A bar over the steps of a run, on standard error where that is a terminal.

    It begins at the step from which the run goes on, and shows the time left, the loss, the last
    one in validation, the tokens a second and the memory. It takes what the terminal has of room.
    """
    open_streams()
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    form = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}, {remaining} left{desc}"
    with contextlib.ExitStack() as stack:
        bar, valid = None, ""

        def watch(line: Mapping[str, Any], steps: int) -> None:
            nonlocal bar, valid
            if bar is None:  # so that what is told before stands above it
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


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """A polite request to end is taken as Ctrl-C is: what there is, is saved.

    The first one counts: a second would cut short the saving.
    """
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


def answer(command: str, run: Callable[[argparse.Namespace], int]) -> Any:
    """``run`` as a command: what it raises becomes a message and an exit status.

    A file or a target that cannot be read, or a library that is not installed, is `NOT_LOADED`; a
    setting that cannot be is `USAGE`; a disk or memory that is full, or numbers that are none,
    `FAILED`.
    """

    def guarded(arguments: argparse.Namespace) -> int:
        import numpy as np

        try:
            open_streams()
            _check_texts(arguments)
            # What overflows is found in the results, and told in words.
            with np.errstate(all="ignore"):
                return run(arguments)
        except _not_loaded() as error:
            print(f"minilora {command}: {error}", file=sys.stderr)
            return NOT_LOADED
        except ValueError as error:
            return refuse(str(error), command)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            print(f"minilora {command}: {where}{error.strerror or error}", file=sys.stderr)
            return FAILED
        except ArithmeticError as error:
            print(f"minilora {command}: {error}", file=sys.stderr)
            return FAILED
        except MemoryError as error:
            remedy = "take a smaller model or rank, or shorter texts"
            said = f"there is not enough memory: {str(error) or 'none is left'}; {remedy}"
            print(f"minilora {command}: {said}", file=sys.stderr)
            return FAILED

    return guarded


def _not_loaded() -> tuple[type[Exception], ...]:
    """What `NOT_LOADED` stands for: looked up once there is an error, as the oracle takes long."""
    from minilora.io.files import FormatError
    from minilora.verify.core.errors import LoadError

    return FormatError, ImportError, LoadError


TEXTS = ("prompt", "chat")
"""The options whose values are texts for a model, which may be empty."""


def _check_texts(arguments: argparse.Namespace) -> None:
    """Errors: ValueError for an option without its value, or a text that is none."""
    for name, value in vars(arguments).items():
        option = f"--{name.replace('_', '-')}"
        if value == "" and name not in TEXTS:
            raise ValueError(f"{option} '': expected a value; leave it out, or give one")
        if name in TEXTS and value is not None:
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{option} {value!r}: expected a text in UTF-8") from None


def at_least(arguments: argparse.Namespace, **least: int) -> None:
    """Refuses an option's number, where it is given, that is less than what makes sense.

    More than 64 bits hold is no number of anything, either.

    Errors: ValueError that names the option.
    """
    for name, low in least.items():
        value = getattr(arguments, name)
        if value is not None and not low <= value < 2**63:
            expected = f"{low} or more" if value < low else "less than 2**63"
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected {expected}")


class _Help(argparse.HelpFormatter):
    """Says each option's default, unless its help says of itself what is the default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, value = action.help or "", action.default
        if action.nargs == 0 or value in (None, "") or "default" in text:
            return text
        return f"{text} (default: %(default){'g' if isinstance(value, float) else 's'})"


TUNING = (
    "0 done, 1 the disk or the numbers failed, 2 wrong usage, 3 a file cannot be read or a library "
    "is missing"
)
"""The exit statuses that the commands of fine-tuning share."""


def add_command(
    commands: Any, name: str, help: str, description: str, run: Any, statuses: str = TUNING
) -> Any:
    """A command's parser, which says each option's default and the exit statuses."""
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{description} Exit status: {statuses}.",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    parser.set_defaults(run=answer(name, run), parser=parser)
    return parser


FORMS = {
    "json": "JSON",
    "junit": "JUnit XML",
    "html": "one HTML page",
    "markdown": "Markdown; $GITHUB_STEP_SUMMARY is written on",
}


def add_files(option: Any, what: str, *forms: str) -> None:
    """The options that write what a command found to a file, in these of `FORMS`."""
    for form in forms:
        option(f"--{form}", metavar="FILE", help=f"write {what} as {FORMS[form]}")


def add_model(add: Any, adapter: bool = True) -> None:
    """The options that name a model, and an adapter on it."""
    add(
        "--model",
        metavar="M",
        help="a Hugging Face folder, a .gguf file, package:NAME or reference:NAME (default: the "
        "one that the adapter was trained on, or else reference:llama)",
    )
    if adapter:
        add("--adapter", metavar="A", help="an adapter of PEFT or MLX, a folder, or of llama.cpp")
    add(
        "--dtype",
        default="float32",
        choices=["float32", "float64"],
        metavar="DTYPE",
        help="float32 or float64",
    )
