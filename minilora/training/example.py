"""An example to train on, and the examples of a data set."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minilora.spec.ops import Array

SPLITS = ("train", "valid", "test")
"""The names of a folder's files."""


@dataclass(frozen=True, eq=False)
class Example:
    """A sequence of t tokens, and which of them are predicted; or its class, ``label``.

    ``loss_mask`` is true where a token is predicted from those before it, so never at the first.
    ``types`` are BERT's token types. Shapes: ids (t,), loss_mask (t,), types (t,).
    """

    ids: Array
    loss_mask: Array
    label: int | None = None
    types: Array | None = None

    @property
    def prompt_and_answer(self) -> tuple[Array, Array]:
        """The last run of predicted tokens, after all tokens before it."""
        predicted = np.flatnonzero(self.loss_mask)
        if not len(predicted):
            return self.ids, self.ids[:0]
        end = predicted[-1] + 1
        start = end - np.argmin(self.loss_mask[:end][::-1])
        return self.ids[:start], self.ids[start:end]


class Skipped(NamedTuple):
    """A line that was skipped, and the reason."""

    path: str
    line: int
    reason: str


@dataclass(frozen=True, eq=False)
class Data:
    """Examples to train on, to validate and to test with.

    ``skipped`` are the invalid lines that were left out; ``truncated`` is how many training
    examples lost their end; ``digest`` identifies the files; ``classes`` names the labels in order;
    ``date`` is what the chat template saw, YYYY-MM-DD, if it looks at the date.
    """

    train: list[Example]
    valid: list[Example]
    test: list[Example]
    skipped: tuple[Skipped, ...] = ()
    digest: str = ""
    classes: tuple[str, ...] = ()
    truncated: int = 0
    date: str | None = None


class InvalidLine(ValueError):
    """A line that cannot be used: what was found, what was expected, what to do."""

    def __init__(self, found: object, expected: object, remedy: str = "correct the line") -> None:
        super().__init__(found, expected, remedy)
