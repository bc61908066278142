"""Writing files whole or not at all: beside their place, and into it once they are complete."""

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from minilora.io.errors import FormatError, listed
from minilora.io.files import pack
from minilora.spec.ops import Array


def make_folder(folder: Path) -> list[Path]:
    """Make the folder with those above it; the ones that were not there, the innermost first."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders that are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, piece by piece; at the end it takes the place of it.

    Errors: FormatError if ``path`` is a folder. If writing fails, what is there stays.
    """
    if path.is_dir():
        raise FormatError(path, "file", "a folder", "a file, or nothing there", "name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """A hidden name in the same folder, which nothing else has."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}")


def write_files(
    folder: Path | str,
    files: Mapping[str, Callable[[], bytes]],
    stale: str | None = None,
    durable: bool = False,
) -> None:
    """Write files to a folder, each whole; in place of none before all are written beside it.

    A name may have folders in it, which are made.

    A folder that is there keeps its other files. ``stale`` is an expression for the names of those
    that may not stay, because a reader would take them for a part of the new files.
    ``durable``: all is on the disk, and not only on its way to it, when this returns, and each file
    before it takes its name.

    Errors: FormatError if the folder is a file or holds a stale file; OSError where the disk is
    full or closed. The folder is then as it was; where it is the renaming that fails, each file is
    the old one or the new one, whole.
    """
    folder = Path(folder)
    if folder.is_file():
        raise FormatError(folder, "folder", "a file", "a folder", "choose another name")
    made = make_folder(folder)
    _check_others(folder, files, stale)
    for parent in dict.fromkeys((folder / name).parent for name in files):
        made = make_folder(parent) + made
    beside = {name: _beside(folder / name) for name in files}
    try:
        for name, data in files.items():
            _write(beside[name], data(), durable, folder / name)
        for name, temporary in beside.items():
            os.replace(temporary, folder / name)
        if durable:
            _flush(folder)
    except BaseException:
        for temporary in beside.values():
            temporary.unlink(missing_ok=True)
        remove_empty(made)
        raise


def _check_others(folder: Path, names: Collection[str], stale: str | None) -> None:
    """Refuse stale files beside those named, and folders in their place."""
    others = {entry.name for entry in folder.iterdir()} - {*names}
    if old := {name for name in others if stale and re.fullmatch(stale, name)}:
        remedy = "remove them first, or choose another folder"
        raise FormatError(folder, "folder", listed(old), "no weights but those written", remedy)
    if folders := [name for name in names if (folder / name).is_dir()]:
        found = f"folders named {listed(folders)}"
        raise FormatError(folder, "folder", found, "files or nothing there", "move them away")


def _write(path: Path, data: bytes, durable: bool, target: Path) -> None:
    try:
        path.write_bytes(data)
        if durable:
            _flush(path)
    except OSError as error:  # the system names no file where it is the writing that fails
        reason = error.strerror or str(error)
        raise OSError(error.errno, reason, str(target)) from error


def _flush(path: Path) -> None:
    """Flush a file, or a folder's names, to the disk (fsync)."""
    if path.is_dir() and os.name != "posix":
        return  # no other system opens a folder
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_text(path: str, text: str) -> None:
    """Write a text file, whole or not at all. Errors: OSError.

    A link keeps pointing to the file; a device or a pipe is written as it is.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "w", encoding="utf-8") as out:
            out.write(text)
        return
    path = os.path.realpath(path)
    beside = f"{path}.{os.getpid()}.tmp"
    try:
        with open(beside, "x", encoding="utf-8", errors="backslashreplace") as out:
            out.write(text)
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            os.remove(beside)
        raise


def why_not_writable(path: str) -> str:
    """Why a file cannot be written to this path, or nothing."""
    if os.path.isdir(path):
        return f"{path} is a folder"
    if os.path.exists(path) and not os.path.isfile(path):
        return ""
    beside = f"{os.path.realpath(path)}.{os.getpid()}.tmp"
    try:
        with open(beside, "x", encoding="utf-8"):
            pass
        os.remove(beside)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return ""


def write_tensors(
    path: Path | str, arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all, in place of any that is there.

    Errors: those of `files.pack` and of :func:`write_files`.
    """
    path = Path(path)
    data = pack(path, arrays, metadata)
    write_files(path.parent, {path.name: lambda: data})
