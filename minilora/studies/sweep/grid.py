"""The cells of a sweep, and what all of them share."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from minilora.training.config import TrainConfig


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
