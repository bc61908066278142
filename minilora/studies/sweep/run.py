"""The cells of a sweep in parallel, each in a folder of its own, which keeps its result.

An interrupted sweep continues with the cells that are missing, and those from their checkpoints.
"""

import datetime
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from minilora import __version__
from minilora.io.atomic import write_files
from minilora.io.errors import FormatError
from minilora.io.files import pack_json, read_json
from minilora.io.loading import MANIFEST, Base, open_base
from minilora.studies.processes import in_processes
from minilora.studies.sweep.grid import Cell, Setting
from minilora.training import data, evaluate
from minilora.training.batching import batches_of
from minilora.training.example import Data
from minilora.training.fit import FitOptions, fit
from minilora.training.gradients import ExecutionPlan
from minilora.training.run import prepare
from minilora.training.run_folder import LOG, Refused, read_log

RESULT, TABLE = "result.json", "sweep.json"
"""The file of a cell's result, in its folder; and of all results, in the sweep's."""


@dataclass(frozen=True)
class Row:
    """A finished cell: its losses in nats a label, its steps and seconds; ``why`` it ended early.

    ``valid`` is the loss in validation, or none without examples for it; ``loss`` that of the last
    step in training.
    """

    cell: Cell
    steps: int
    seconds: float
    loss: float | None
    valid: float | None = None
    why: str = ""

    @property
    def judged(self) -> float:
        """What cells are compared by: ``valid``, or else ``loss``; infinite where it diverged."""
        found = self.loss if self.valid is None else self.valid
        return math.inf if self.why or found is None or not math.isfinite(found) else found


@cache
def opened(model: str, dtype: str) -> Base:
    """The model, opened once in each process."""
    return open_base(model, np.dtype(dtype))


@cache
def _read(setting: Setting, seed: int) -> Data:
    base, config = opened(setting.model, setting.config.dtype), setting.config
    tokenizer, reading = base.tokenizer, dict(setting.reading)
    reading |= {"seed": seed, "classes": base.classes}
    return data.read(setting.data, config.task, tokenizer, config.max_length, **reading)


def run_cell(setting: Setting, folder: Path, cell: Cell) -> Row | None:
    """Trains the cell in ``folder``, from its checkpoint where there is one; None: interrupted.

    Errors: those of `fit.fit`.
    """
    config = setting.at(cell)
    base, read = opened(setting.model, config.dtype), _read(setting, cell.seed)
    run = prepare(base, read, config, setting.data, **dict(setting.reading))
    started, begun = time.monotonic(), (folder / MANIFEST).exists()
    options = FitOptions(resume=begun, overwrite=not begun, val_every=2**31)
    outcome = fit(folder, run, options, tell=lambda text: None)
    if outcome.stop_reason == "interrupted":
        return None
    valid = None
    batches = batches_of(read.valid, config.batch_tokens, base.tokenizer.pad)
    if batches and not outcome.stop_reason:
        W = run.weights(outcome.state.params)
        valid = evaluate.mean_loss(batches, W, run.c, run.spec, ExecutionPlan()).loss
    lines = read_log(folder / LOG)
    loss = lines[-1]["loss"] if lines else None
    seconds = round(time.monotonic() - started, 3)
    row = Row(cell, outcome.state.step, seconds, loss, valid, outcome.stop_reason)
    write_files(folder, {RESULT: lambda: pack_json(asdict(row))})
    return row


def _read_row(folder: Path) -> Row | None:
    """The result of a cell that is finished."""
    if not (folder / RESULT).is_file():
        return None
    found = read_json(folder / RESULT)
    try:
        return Row(Cell(**found.pop("cell")), **found)
    except (TypeError, KeyError) as error:
        remedy = "remove it, and the cell's run is judged again"
        raise FormatError(folder / RESULT, "file", error, "a cell's result", remedy) from None


def sweep(
    out: Path | str,
    setting: Setting,
    cells: Sequence[Cell],
    jobs: int = 1,
    watch: Callable[[Row, int, int], None] | None = None,
    executor: Executor | None = None,
) -> list[Row]:
    """Trains the cells that have no result in the folder ``out`` yet; returns all rows in order.

    ``watch(row, done, total)`` is called with each row. ``executor``: whose workers train them, and
    see the same folders, in the place of ``jobs`` processes here.

    Errors: Refused if ``out`` holds the sweep of another setting, or other files; those of the
    model's and the data's readers, before a process is started; those of :func:`run_cell`.
    """
    out = Path(out)
    base, read = opened(setting.model, setting.config.dtype), _read(setting, 0)
    for cell in cells[:1]:
        prepare(base, read, setting.at(cell), setting.data, **dict(setting.reading))
    record = {
        **setting.record(),
        "base": base.digest,
        "digest": read.digest,
        "minilora": __version__,
    }
    record = json.loads(json.dumps(record))
    _check_folder(out, record)
    rows = {cell: row for cell in cells if (row := _read_row(out / cell.name))}

    def write() -> None:
        finished = [asdict(rows[cell]) for cell in cells if cell in rows]
        write_files(out, {TABLE: lambda: pack_json({"setting": record, "rows": finished})})

    def report(row: Row) -> None:
        if watch is not None:
            watch(row, len(rows), len(cells))

    write()
    missing = [cell for cell in cells if cell not in rows]
    for row in rows.values():
        report(row)
    work = partial(_run_in, setting, out.resolve())
    for _, row in in_processes(work, missing, jobs, executor) if missing else ():
        if row is None:
            raise KeyboardInterrupt
        rows[row.cell] = row
        write()
        report(row)
    return [rows[cell] for cell in cells]


def date_of_sweep(out: Path | str) -> str:
    """The date that chat templates see in the sweep of this folder: its own, or today."""
    table = Path(out) / TABLE
    setting = read_json(table).get("setting") if table.is_file() else None
    date = setting.get("date") if isinstance(setting, dict) else None
    return date if isinstance(date, str) else datetime.date.today().isoformat()


def _check_folder(out: Path, record: Mapping[str, Any]) -> None:
    """Errors: Refused if the folder holds the sweep of another setting, or other files."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if TABLE not in names and names:
        raise Refused(f"{out}: the folder is not empty and holds no sweep; choose a new folder")
    if len(names) < 2:  # the table alone was written before any cell was run
        return
    earlier = read_json(out / TABLE).get("setting")
    if not isinstance(earlier, dict):
        remedy = "the file is damaged: choose a new folder"
        raise FormatError(out / TABLE, "setting", earlier, "an object", remedy)
    changes = [
        f"{name} was {earlier.get(name)!r} and is {record[name]!r}"
        for name in sorted(record)
        if earlier.get(name) != record[name]
    ]
    if changes:
        raise Refused(
            f"{out}: the folder holds the sweep of another setting ({'; '.join(changes)}); "
            "choose a new folder"
        )


def _run_in(setting: Setting, out: Path, cell: Cell) -> Row | None:
    return run_cell(setting, out / cell.name, cell)
