"""The best parameters in validation, kept beside the last ones, and when to stop early."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from minilora.io.atomic import write_files
from minilora.io.loading import MANIFEST
from minilora.training.checkpoints import TrainState
from minilora.training.result import write_result, writes_own_base
from minilora.training.run import Run

FOLDER = "best"
"""The folder of the best result, inside a run's."""


class Best:
    """Follows the validation losses of a run, and keeps the result with the lowest.

    ``lines``: those of the log so far, so that a resumed run knows its best. ``patience``: so many
    validations in a row without a lower loss end the run; None never does.
    """

    def __init__(
        self, out: Path, run: Run, patience: int | None, lines: Sequence[Mapping[str, Any]]
    ) -> None:
        self.folder, self.run, self.patience = out / FOLDER, run, patience
        self.loss, self.step, self.idle = math.inf, 0, 0
        for line in lines:
            if "val_loss" in line:
                self._count(line["step"], line["val_loss"])

    def _count(self, step: int, loss: float) -> bool:
        """Whether the loss is the lowest so far."""
        lower = loss < self.loss
        self.idle = 0 if lower else self.idle + 1
        if lower:
            self.loss, self.step = loss, step
        return lower

    def see(self, state: TrainState, loss: float, keep: bool = True) -> None:
        """Keep the result of this state if its validation loss is the lowest.

        ``keep``: write it, if so.
        """
        if self._count(state.step, loss) and keep:
            write_result(self.folder, self.run, state.params)
            manifest = (self.folder.parent / MANIFEST).read_bytes()
            told = json.dumps({"step": state.step, "val_loss": loss}) + "\n"
            files = {MANIFEST: manifest, "best.json": told.encode()}
            write_files(self.folder, {name: partial(bytes, data) for name, data in files.items()})

    @property
    def is_over(self) -> bool:
        """Whether the patience is at its end."""
        return self.patience is not None and self.idle >= self.patience

    @property
    def text(self) -> str:
        """Which result is the best, and where it is."""
        return f"{self.folder}: the best in validation, step {self.step}, loss {self.loss:.4f}"


def check(run: Run, keep: bool) -> None:
    """Errors: ValueError if the best is to be kept, and cannot be told or be written alone."""
    if keep and not run.data.valid:
        raise ValueError(
            "keep_best and patience: found no examples for validation; give a file of them, or a "
            "val_fraction"
        )
    if keep and writes_own_base(run):
        raise ValueError("keep_best and patience: a run that writes a base of its own has no best")


def remove(out: Path) -> None:
    """Remove the best result of an earlier run."""
    folder = out / FOLDER
    if (folder / "best.json").is_file():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
