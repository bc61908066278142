"""What explains a wrong merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from minilora.audit.change import Around
from minilora.audit.merges import Merge
from minilora.audit.result import Figure


@dataclass(frozen=True)
class Explanation:
    """A verdict with the mistake that explains it."""

    verdict: str
    mistake: str
    text: str
    figures: Mapping[str, Figure] = field(default_factory=dict)


def explain(merge: Merge, around: Around) -> Explanation | None:
    """The known mistake that explains all entries, None if there is none."""
    return None
