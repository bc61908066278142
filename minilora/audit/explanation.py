"""What explains a wrong merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from minilora.audit.result import Figure


@dataclass(frozen=True)
class Explanation:
    """A verdict with the mistake that explains it.

    ``verdict``: a name of `VERDICTS`; ``mistake``: its name in the catalogue, "" if it has none;
    ``text``: what was found, with its figures.
    """

    verdict: str
    mistake: str
    text: str
    figures: Mapping[str, Figure] = field(default_factory=dict)
