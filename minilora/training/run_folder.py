"""The folder of a run: who may use it, what it records, and how a run is resumed in it."""

import hashlib
import json
import os
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from minilora import __version__
from minilora.io.atomic import make_folder, remove_empty, write_files
from minilora.io.errors import FormatError, listed
from minilora.io.files import pack_json
from minilora.io.formats import huggingface, peft
from minilora.io.formats.huggingface import TOKENIZER_FILES
from minilora.io.loading import BASE_FOLDER, MANIFEST, read_run
from minilora.spec.lora import Params
from minilora.training import best, checkpoints
from minilora.training.checkpoints import TrainState
from minilora.training.example import SPLITS
from minilora.training.result import writes_own_base
from minilora.training.run import Run

LOG, TABLE, PLOT = "log.jsonl", "log.csv", "loss.svg"
"""The log, one line per step, the same as a table, and the picture of it."""

CARD = "README.md"
"""The model card."""

WRITTEN = "<!-- Written by minilora train. Remove this line, and it leaves your text as it is. -->"
"""The line of a card that may be written again."""

_ADAPTER = (peft.CONFIG, peft.WEIGHTS)
_MODEL = (huggingface.CONFIG, huggingface.WEIGHTS)


class Refused(ValueError):
    """The folder must not be used: it holds something else, or the run is not the same."""


def manifest(run: Run) -> dict[str, Any]:
    """The contents of ``run.json``: settings, digests of the model and the data, versions."""
    data, base = run.data, run.base
    return {
        "settings": json.loads(json.dumps(run.settings)),
        "model": {
            "name": base.name if base.reference else str(base.path.resolve()),
            "origin": base.origin,
            "digest": base.digest,
        },
        "data": {
            "name": run.source,
            "digest": data.digest,
            **({"date": data.date} if data.date else {}),
            "classes": list(data.classes),
            **{split: len(run.examples(split)) for split in SPLITS},
            "skipped": len(data.skipped),
        },
        "start": start_digest(run),
        "base": BASE_FOLDER if writes_own_base(run) else None,
        "steps": run.total_steps,
        "versions": {"minilora": __version__, "numpy": np.__version__},
    }


def start_digest(run: Run) -> str:
    """SHA-256 of the adapters before the first step, and of the base's weights they changed.

    A resumed run gives the same bits only if these are the same: an SVD, and the order of sums,
    may differ between libraries of linear algebra.
    """
    sha = hashlib.sha256()
    changed = run.frozen.maps[0] if isinstance(run.frozen, ChainMap) else {}
    for name, array in sorted({**changed, **run.adapter}.items()):
        sha.update(f"{name} {array.shape} {array.dtype}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two manifests that change a run's result, one sentence each."""
    old, new = before.get("settings", {}), now["settings"]
    sentences = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    for part in ("model", "data"):
        if before.get(part, {}).get("digest") != now[part]["digest"]:
            sentences += [f"the {part}'s files have changed"]
    saw, sees = before.get("data", {}).get("date"), now["data"].get("date")
    if saw != sees:
        sentences += [f"the date that the chat template sees was {saw} and is {sees}"]
    if not sentences and before.get("start") != now["start"]:
        sentences += ["the adapters start with other values: NumPy or its BLAS has changed"]
    return sentences


def check_same(run: Run) -> None:
    """Errors: Refused if a process of the run's team has other settings, or read other files."""
    first, *others = run.plan.team.agree(manifest(run))
    for rank, other in enumerate(others, 1):
        if different := changes(first, other):
            raise Refused(
                f"process {rank} has another run than process 0: {'; '.join(different)}: give all "
                "the same options and files"
            )


def is_free(out: Path, may_be_used: bool) -> bool:
    """Whether the folder is empty or not there.

    Errors: Refused if it is not, and may not be used all the same.
    """
    free = not (out.is_dir() and any(out.iterdir()))
    if not free and not may_be_used:
        raise Refused(
            f"{out}: the folder is not empty: use --resume or --overwrite, or choose a new folder"
        )
    return free


def open_folder(
    out: Path, run: Run, resume: bool, overwrite: bool, accept_changes: bool
) -> tuple[TrainState, list[str]]:
    """Make the folder ready for the run; the state to start from, and messages for the user.

    A new run needs an empty folder. ``overwrite`` removes what an earlier run has written there,
    and nothing else. ``resume`` continues from the last undamaged checkpoint, or from the start if
    there is none; damaged ones are renamed. Everything that changes the result must be as it was,
    unless ``accept_changes``.

    Errors: Refused; FormatError for a damaged ``run.json``; OSError if the disk is full or not
    writable.
    """
    now = manifest(run)
    run.micro_batches(0)  # a run that cannot start fails here, before anything is changed
    _ = run.adalora_plan
    state, messages = TrainState(run.initial), list[str]()
    if not is_free(out, resume or overwrite):
        if resume:
            state, messages = _resumed(out, run, now, accept_changes)
        else:
            _remove(out, run)
    write_files(out, {MANIFEST: lambda: pack_json(now)}, durable=True)
    cut_log(out / LOG, state.step)
    return state, messages


def _resumed(
    out: Path, run: Run, now: Mapping[str, Any], accept_changes: bool
) -> tuple[TrainState, list[str]]:
    """The last state in the folder, or the first; what has changed, and what is damaged."""
    if not (out / MANIFEST).is_file():
        raise Refused(f"{out}: no {MANIFEST} of a run to resume; choose a new folder")
    different = changes(read_run(out / MANIFEST), now)
    if different and not accept_changes:
        raise Refused(
            f"{out}: {'; '.join(different)}: use the same settings and files as before, resume "
            "all the same with --accept-changes, or choose a new folder"
        )
    messages = [f"changed: {sentence}" for sentence in different]
    _remove_temporary(out)
    last, errors = checkpoints.newest(out / checkpoints.FOLDER)
    for error in errors:
        messages += [f"{checkpoints.set_aside(error.args[0]).name}: {error}"]
    state = last or TrainState(run.initial)
    if _shapes(state.params) != _shapes(run.initial):
        raise Refused(
            f"{out}: its checkpoint has other trained parameters, or other shapes; choose a new "
            "folder"
        )
    return state, messages


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in params.items()}


def _remove_temporary(out: Path) -> None:
    """Remove the temporary files of a run that was killed while it wrote."""
    checkpoints.clean(out / checkpoints.FOLDER)
    for name in (MANIFEST, LOG, TABLE, CARD, PLOT, *_ADAPTER, *_MODEL, *TOKENIZER_FILES):
        for path in out.glob(f".{name}.*"):
            path.unlink()


def _remove(out: Path, run: Run) -> None:
    """Remove what a run has written, as its ``run.json`` says; last its log, which identifies it.

    Errors: Refused if the folder holds the run's own model, or a result that no run wrote.
    """
    if run.base.path.resolve() in (out.resolve(), (out / BASE_FOLDER).resolve()):
        raise Refused(f"{out}: it holds the model to be trained; choose a new folder")
    is_run = (out / MANIFEST).is_file() or (out / LOG).is_file()
    existing = [name for name in (PLOT, *_ADAPTER, *_MODEL) if (out / name).exists()]
    if existing and not is_run:
        raise Refused(
            f"{out}: found {listed(existing)}, and no {MANIFEST} of a run that wrote it; move it "
            "away, or choose a new folder"
        )
    before: dict[str, Any] = {}
    with suppress(FormatError):  # a damaged manifest is removed, too
        before = read_run(out / MANIFEST)
    model = (*_MODEL, *TOKENIZER_FILES)
    names = [PLOT, TABLE, *_ADAPTER]
    names += [CARD] if is_own_card(out) else []
    names += model if before.get("settings", {}).get("full") else ()
    names += (
        [f"{BASE_FOLDER}/{name}" for name in model] if before.get("base") == BASE_FOLDER else ()
    )
    for name in (*names, MANIFEST):
        (out / name).unlink(missing_ok=True)
    _remove_temporary(out)
    for path in checkpoints.saved(out / checkpoints.FOLDER):
        path.unlink()
    best.remove(out)
    (out / LOG).unlink(missing_ok=True)


def is_own_card(out: Path) -> bool:
    """Whether the folder has a model card that nobody has made his own."""
    path = out / CARD
    return path.is_file() and WRITTEN in path.read_text("utf-8", "replace").splitlines()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a line that was cut off when the run was killed is skipped."""
    lines = []
    for text in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            line = json.loads(text)
            lines += [line] if isinstance(line, dict) else []
    return lines


def cut_log(path: Path, step: int) -> None:
    """Drop the lines after ``step``: these steps will be done again."""
    kept = [line for line in read_log(path) if line.get("step", step + 1) <= step]
    write_files(path.parent, {path.name: "".join(map(log_line, kept)).encode})


def log_line(values: Mapping[str, Any]) -> str:
    """A line of the log."""
    return json.dumps(values, allow_nan=False) + "\n"


def _file_locks() -> Any:
    """The system's module for locking files; locks end with the process. None on Windows."""
    try:
        import fcntl
    except ImportError:
        return None
    return fcntl


@contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Create the folder and lock it against other runs, if the system can.

    A folder that is still empty at the end is removed.

    Errors: Refused if another run has it; OSError if the disk is full or not writable.
    """
    if out.is_file():  # whoever writes into it reports that
        yield
        return
    created, descriptor = make_folder(out), None
    try:
        fcntl = _file_locks()
        if fcntl is not None:
            descriptor = os.open(out, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                remedy = "wait for it, or choose a new folder"
                raise Refused(f"{out}: another run uses this folder; {remedy}") from None
            except OSError:  # a file system without locks
                pass
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
        remove_empty(created)
