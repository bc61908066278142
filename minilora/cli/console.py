"""What commands share: exit statuses, options, printing, files, progress bars, signals."""

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
"""The exit statuses."""


def split(values: list[str] | None) -> list[str] | None:
    """The values of a repeatable option, each of which may be a comma-separated list."""
    return values and [part.strip() for value in values for part in value.split(",")]


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
    """The files to write, by format.

    Errors: ValueError for a file that cannot be written, before the work.
    """
    from minilora.io.atomic import why_not_writable

    files = {form: path for form in forms if (path := getattr(arguments, form))}
    for path in files.values():
        if why := why_not_writable(path):
            raise ValueError(f"cannot write {why}")
    return files


def write_file(path: str, text: str) -> None:
    """Write a file; append to $GITHUB_STEP_SUMMARY, which other steps write, too.

    Errors: ValueError for a file that cannot be written.
    """
    from minilora.io.atomic import write_text

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
    from minilora.verify.report.markdown import MARKDOWN_BYTES

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


@contextlib.contextmanager
def steps_bar() -> Iterator[Callable[[Mapping[str, Any], int], None] | None]:
    """A progress bar of a run's steps on standard error, if that is a terminal.

    It starts at the first step to be done, and shows the time left, the loss, the last validation
    loss, tokens per second and memory. It is as wide as the terminal.
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


def guarded(command: str, run: Callable[[argparse.Namespace], int]) -> Any:
    """Wrap ``run``: an exception becomes a message and an exit status.

    `NOT_LOADED` for a file or a target that cannot be read, or a missing library; `USAGE` for an
    invalid setting; `FAILED` for a full disk, too little memory, or numbers that are not finite.
    """

    def command_with_errors(arguments: argparse.Namespace) -> int:
        import numpy as np

        try:
            open_streams()
            _check_texts(arguments)
            # Overflow shows in the results, and is reported there.
            with np.errstate(all="ignore"):
                return run(arguments)
        except _not_loaded() as error:
            print(f"minilora {command}: {error}", file=sys.stderr)
            return NOT_LOADED
        except ValueError as error:
            return usage_error(str(error), command)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            print(f"minilora {command}: {where}{error.strerror or error}", file=sys.stderr)
            return FAILED
        except ArithmeticError as error:
            print(f"minilora {command}: {error}", file=sys.stderr)
            return FAILED
        except MemoryError as error:
            text = f"not enough memory: {error}".removesuffix(": ")
            remedy = "use a smaller model or rank, or shorter texts"
            print(f"minilora {command}: {text}; {remedy}", file=sys.stderr)
            return FAILED

    return command_with_errors


def _not_loaded() -> tuple[type[Exception], ...]:
    """The errors of `NOT_LOADED`; imported only after an error, as these modules load slowly."""
    from minilora.io.errors import FormatError
    from minilora.verify.core.errors import LoadError

    return FormatError, ImportError, LoadError


TEXTS = ("prompt", "chat")
"""The options whose values are texts for a model, and may be empty."""


def _check_texts(arguments: argparse.Namespace) -> None:
    """Errors: ValueError for an empty value, or for a text that is not valid Unicode."""
    for name, value in vars(arguments).items():
        option = f"--{name.replace('_', '-')}"
        if value == "" and name not in TEXTS:
            raise ValueError(f"{option} '': expected a value")
        if name in TEXTS and value is not None:
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{option} {value!r}: expected a text in UTF-8") from None


def at_least(arguments: argparse.Namespace, **least: int) -> None:
    """Check that options are not below these numbers, and fit into 64 bits.

    Errors: ValueError that names the option.
    """
    for name, low in least.items():
        value = getattr(arguments, name)
        if value is not None and not low <= value < 2**63:
            expected = f"{low} or more" if value < low else "less than 2**63"
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected {expected}")


class _Help(argparse.HelpFormatter):
    """Shows the default of each option, unless its help text mentions the default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, value = action.help or "", action.default
        if action.nargs == 0 or value in (None, "") or "default" in text:
            return text
        return f"{text} (default: %(default){'g' if isinstance(value, float) else 's'})"


TUNING = (
    "0 done, 1 a full disk or numbers that are not finite, 2 wrong usage, 3 a file cannot be read "
    "or a library is missing"
)
"""The exit statuses of the commands for fine-tuning."""


def add_command(
    commands: Any, name: str, help: str, description: str, run: Any, statuses: str = TUNING
) -> Any:
    """Add a command; its help shows the defaults of options and the exit statuses."""
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{description} Exit status: {statuses}.",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    parser.set_defaults(run=guarded(name, run), parser=parser)
    return parser


FORMS = {
    "json": "JSON",
    "junit": "JUnit XML",
    "html": "one HTML page",
    "markdown": "Markdown; append to $GITHUB_STEP_SUMMARY",
}


def add_files(option: Any, what: str, *forms: str) -> None:
    """Add an option for each of these `FORMS`, which writes the result to a file."""
    for form in forms:
        option(f"--{form}", metavar="FILE", help=f"write {what} as {FORMS[form]}")


def add_model(add: Any, adapter: bool = True, trained: bool = True) -> None:
    """Add the options that name a model and, if ``adapter``, an adapter.

    ``trained``: whether the command has an adapter, which may name its model.
    """
    default = "the model that the adapter was trained on, or reference:llama"
    default = default if trained else "reference:llama"
    add(
        "--model",
        metavar="M",
        help="a Hugging Face folder, a .gguf file, package:NAME or reference:NAME (default: "
        f"{default})",
    )
    if adapter:
        add("--adapter", metavar="A", help="the folder or the file of an adapter")
    add(
        "--dtype",
        default="float32",
        choices=["float32", "float64"],
        metavar="DTYPE",
        help="float32 or float64",
    )
