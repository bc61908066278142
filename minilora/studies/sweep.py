"""Many runs at once: every rank, alpha, learning rate and seed of a grid, each in one thread.

A cell is what ``minilora train`` does with its four numbers, in a folder of its own, and it is kept
there: a sweep that was interrupted goes on with the cells that are missing, and those with a
checkpoint go on from it.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from minilora import __version__
from minilora.io.files import FormatError, pack_json, read_json, write_files
from minilora.io.loading import MANIFEST, Base, open_base
from minilora.studies.processes import in_processes
from minilora.training import data, evaluate
from minilora.training.batching import batches_of
from minilora.training.config import TrainConfig
from minilora.training.example import Data
from minilora.training.fit import FitOptions, fit
from minilora.training.gradients import ExecutionPlan
from minilora.training.plot import canvas
from minilora.training.run import prepare
from minilora.training.run_folder import LOG, Refused, read_log

RESULT, TABLE, PICTURE = "result.json", "sweep.json", "sweep.svg"
"""The files of a sweep: in each cell's folder what it came to; beside them all cells, a picture."""


@dataclass(frozen=True, order=True)
class Cell:
    """A point of the grid."""

    rank: int
    alpha: float
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"r{self.rank}-a{self.alpha:g}-lr{self.learning_rate:g}-s{self.seed}"


def grid(
    ranks: Sequence[int], alphas: Sequence[float], lrs: Sequence[float], seeds: Sequence[int]
) -> list[Cell]:
    """Every combination once, in order; without alphas, alpha is 2 r.

    Errors: ValueError where a list is empty, or two cells would share a folder.
    """
    lists = (("ranks", ranks), ("learning rates", lrs), ("seeds", seeds))
    for what, values in lists:
        if not values:
            raise ValueError(f"no {what}: expected at least one")
    cells = sorted(
        {
            Cell(r, alpha, lr, seed)
            for r, lr, seed in product(ranks, lrs, seeds)
            for alpha in (alphas or [2.0 * r])
        }
    )
    if len({cell.name for cell in cells}) < len(cells):
        raise ValueError("two alphas or rates agree in six digits: leave one out")
    return cells


@dataclass(frozen=True)
class Setting:
    """What all cells share: the model, the data and its reading, the config but for the cell's."""

    model: str
    data: str
    config: TrainConfig
    reading: tuple[tuple[str, Any], ...] = ()

    def at(self, cell: Cell) -> TrainConfig:
        """The cell's config."""
        return replace(self.config, **asdict(cell))

    def record(self) -> dict[str, Any]:
        """All of it, as it is written down; a cell's numbers are not in it."""
        own = Cell.__dataclass_fields__
        config = {name: v for name, v in vars(self.config).items() if name not in own}
        return {"model": self.model, "data": self.data, **config, **dict(self.reading)}


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


def _kept(folder: Path) -> Row | None:
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
) -> list[Row]:
    """The rows of all cells, in their order, those kept in the folder ``out`` among them.

    ``watch`` is told each row that is done, how many are done by now, and of how many.

    Errors: Refused where ``out`` holds the sweep of something else; those of the model's and the
    data's readers, before a process is started; those of :func:`run_cell`.
    """
    out = Path(out)
    base, read = opened(setting.model, setting.config.dtype), _read(setting, 0)
    for cell in cells[:1]:
        prepare(base, read, setting.at(cell), setting.data, **dict(setting.reading))
    now = {**setting.record(), "base": base.digest, "digest": read.digest, "minilora": __version__}
    now = json.loads(json.dumps(now))
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if TABLE in there and len(there) > 1:  # alone it says what was wanted, and nothing was done
        before = read_json(out / TABLE).get("setting")
        if not isinstance(before, dict):
            remedy = "it is damaged: choose a new folder"
            raise FormatError(out / TABLE, "setting", before, "an object", remedy)
        names = sorted(name for name in now if before.get(name) != now[name])
        if names:
            told = "; ".join(
                f"{name}: {before.get(name)!r} then, {now[name]!r} now" for name in names
            )
            raise Refused(f"{out}: the sweep of another setting ({told}); choose a new folder")
    elif there - {TABLE}:
        raise Refused(f"{out}: there are files already, of no sweep; choose a new folder")
    rows = {cell: row for cell in cells if (row := _kept(out / cell.name))}

    def write() -> None:
        held = [asdict(rows[cell]) for cell in cells if cell in rows]
        write_files(out, {TABLE: lambda: pack_json({"setting": now, "rows": held})})

    write()
    missing = [cell for cell in cells if cell not in rows]
    for row in rows.values():
        if watch is not None:
            watch(row, len(rows), len(cells))
    work = partial(_work_on, setting, out)
    for _, found in in_processes(work, missing, jobs) if missing else ():
        if found is None:
            raise KeyboardInterrupt
        rows[found.cell] = found
        write()
        if watch is not None:
            watch(found, len(rows), len(cells))
    return [rows[cell] for cell in cells]


def _work_on(setting: Setting, out: Path, cell: Cell) -> Row | None:
    return run_cell(setting, out / cell.name, cell)


LEGEND = "* the least mean loss"

Group = tuple[int, float, float]
"""Rank, alpha and learning rate: what the seeds of a cell have in common."""


def by_group(rows: Sequence[Row]) -> dict[Group, list[float]]:
    """What the cells of each group are judged by, a number for each seed."""
    groups: dict[Group, list[float]] = {}
    for row in rows:
        c = row.cell
        groups.setdefault((c.rank, c.alpha, c.learning_rate), []).append(row.judged)
    return groups


def best(rows: Sequence[Row]) -> Group:
    """The group with the least mean loss; the first of equals.

    Errors: ValueError without rows, or where all have diverged.
    """
    means = {group: float(np.mean(losses)) for group, losses in by_group(rows).items()}
    if not means or not math.isfinite(min(means.values())):
        raise ValueError(f"{len(rows)} cells and no loss: try smaller learning rates")
    return min(means, key=lambda group: means[group])


def table(rows: Sequence[Row]) -> str:
    """A line for each group: its mean loss, the least and the greatest over its seeds.

    The group with the least mean loss is marked ``*`` before its rank, which the line below the
    table explains. ``diverged`` counts the seeds without a finite loss; a group with one has no
    mean.
    """
    try:
        best_group: Group | None = best(rows)
    except ValueError:
        best_group = None
    lines = [["", "rank", "alpha", "lr", "seeds", "loss", "least", "greatest", "diverged"]]
    for (rank, alpha, lr), losses in by_group(rows).items():
        figures = (float(np.mean(losses)), min(losses), max(losses))
        texts = [f"{x:.4f}" if math.isfinite(x) else "-" for x in figures]
        diverged = sum(not math.isfinite(loss) for loss in losses)
        mark = "*" if (rank, alpha, lr) == best_group else ""
        lines.append(
            [mark, str(rank), f"{alpha:g}", f"{lr:g}", str(len(losses)), *texts, str(diverged)]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ["  ".join(f"{x:>{n}}" for x, n in zip(line, widths, strict=True)) for line in lines]
    legend = [LEGEND] if best_group else []
    return "\n".join(line.rstrip() for line in [*padded, *legend]) + "\n"


def plot(out: Path | str, rows: Sequence[Row]) -> Path:
    """The loss against the learning rate, a line for each rank and alpha, as ``sweep.svg``.

    A mark is a seed, a line their mean.

    Errors: ImportError without matplotlib; ValueError where no cell has a loss.
    """
    best(rows)
    figure, draw = canvas((7, 4))
    axes = figure.subplots()
    groups = by_group(rows)
    for rank, alpha in sorted({group[:2] for group in groups}):
        points = sorted((g[2], y) for g, y in groups.items() if g[:2] == (rank, alpha))
        rates = [lr for lr, _ in points]
        (line,) = axes.plot(
            rates, [np.mean(y) for _, y in points], label=f"rank {rank}, alpha {alpha:g}"
        )
        for lr, losses in points:
            axes.plot([lr] * len(losses), losses, ".", color=line.get_color())
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss in nats a label")
    axes.legend()
    write_files(out, {PICTURE: lambda: draw()})
    return Path(out) / PICTURE
