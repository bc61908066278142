"""What a run has still to ask, which process asks it, and what came of it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence

from minilora.verify.report.result import Result
from minilora.verify.tally import COSTLY

Answered = tuple[Result, tuple[str, ...]]
"""The result of a plan, and what its check remarked."""


class Work:
    """The plans of a run by number: this process asks from the first on, others from the last.

    A result of another process is taken only if nothing deviates in it: what deviates is asked here
    again, and so is judged and explained as in one process alone. After a fault that costs a time
    limit or the target's process, all that follows is asked here, in order: it depends on that.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        """``sizes`` are the cases of each plan."""
        self.sizes = sizes
        self._answered: dict[int, Answered] = {}
        self._open = set(range(len(sizes)))
        """The plans that nobody asks, nor has asked."""
        self._only_here: set[int] = set()
        self._by_others: set[int] = set()
        """The plans whose results are another process's."""
        self._is_shared = True
        self._changed = threading.Condition()

    @property
    def done(self) -> int:
        """The number of cases that were asked."""
        with self._changed:
            return sum(self.sizes[number] for number in self._answered)

    @property
    def results(self) -> list[Result]:
        """The results so far, in the order of the plans."""
        return [result for result, _ in self._in_order()]

    @property
    def remarks(self) -> Iterable[str]:
        """What the checks remarked so far, in the order of the plans."""
        return dict.fromkeys(remark for _, remarks in self._in_order() for remark in remarks)

    def _in_order(self) -> list[Answered]:
        with self._changed:
            return [self._answered[number] for number in sorted(self._answered)]

    def here(self) -> Iterator[int]:
        """The plans for this process, one after another, until all are done."""
        while (number := self._next()) is not None:
            yield number

    def _next(self) -> int | None:
        with self._changed:
            while not self._open and len(self._answered) < len(self.sizes):
                self._changed.wait(1.0)  # for what others ask
            number = min(self._open, default=None)
            self._open.discard(-1 if number is None else number)
            return number

    def add(self, number: int, result: Result, remarks: Iterable[str]) -> None:
        """Takes in a result of this process."""
        with self._changed:
            self._answered[number] = result, tuple(remarks)
            if _is_costly(result):
                self._is_shared = False
                for later in [i for i in self._by_others if i > number]:
                    self._by_others.discard(later)
                    del self._answered[later]
                    self._open.add(later)

    def for_others(self) -> int | None:
        """The last plan that another process may ask, which it asks from now on, or None."""
        with self._changed:
            number = max(self._open - self._only_here, default=None)
            if number is None or not self._is_shared:
                return None
            self._open.discard(number)
            return number

    def add_of_others(self, number: int, answered: Answered | None) -> None:
        """Takes in a result of another process; without one, or where it deviates, asks here."""
        with self._changed:
            deviates = answered is None or answered[0].status in ("fail", "error")
            if answered is None or deviates or _is_costly(answered[0]) or not self._is_shared:
                self._only_here.add(number)
                self._open.add(number)
            else:
                self._by_others.add(number)
                self._answered[number] = answered
            self._changed.notify_all()


def _is_costly(result: Result) -> bool:
    return any(fault.kind in COSTLY for fault in result.faults)
