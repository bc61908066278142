"""The rows of a sweep by group: the best, the table, the picture."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minilora.io.atomic import write_files
from minilora.studies.sweep.run import Row
from minilora.training.plot import canvas

PICTURE = "sweep.svg"
"""The picture's file, in the sweep's folder."""

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
