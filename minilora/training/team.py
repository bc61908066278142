"""The processes of one run: each computes some groups of a batch, and all have the same sums.

The groups of a batch do not depend on how many processes there are. Group i is computed by process
i mod n. Gradients are added in the order of the groups, entry by entry, by the same additions as in
one process: 1, 2 or 4 processes give the same bits, where their processors and BLAS are the same.
"""

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np

from minilora.spec.lora import Weights, sum_gradients
from minilora.spec.ops import Array

STARTED_BY = ("PMI_SIZE", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""What MPI's starters, such as ``mpiexec``, set in the environment of each process."""

EXTRA = "python -m pip install 'minilora[mpi]'"
"""What installs mpi4py and MPICH."""


class Alone:
    """A team of one process: nothing travels."""

    rank, size = 0, 1

    def share(self, value: Any) -> Any:
        """The value that the first process has."""
        return value

    def agree(self, value: Any) -> list[Any]:
        """The values of all processes."""
        return [value]

    def sum_losses(self, losses: Iterable[Any], groups: int) -> Any:
        """The losses of all groups, added in their order; ``losses`` are this process's."""
        return sum(losses)

    def sum_gradients(self, parts: Iterable[tuple[Any, Weights]], groups: int) -> Any:
        """L and {name: dL} of all groups, added in their order; ``parts`` are this process's."""
        L: Any = None
        sums: Weights = {}
        for L_group, g in parts:
            L = L_group if L is None else L + L_group
            sums = sum_gradients(sums, g) if sums else g
        return L, sums

    def own(self, groups: Sequence[Any]) -> list[Any]:
        """The groups that this process computes."""
        return list(groups[self.rank :: self.size])

    def end(self, status: int) -> None:
        """End all processes, if there are others."""


ALONE = Alone()


class Team(Alone):
    """The processes of an MPI communicator. Each calls the same methods in the same order.

    ``sent`` counts the bytes of gradients that this process has sent to others.
    """

    def __init__(self, communicator: Any) -> None:
        self.communicator = communicator
        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()
        self.sent = 0

    def share(self, value: Any) -> Any:  # noqa: D102
        return self.communicator.bcast(value)

    def agree(self, value: Any) -> list[Any]:  # noqa: D102
        return list(self.communicator.allgather(value))

    def sum_losses(self, losses: Iterable[Any], groups: int) -> Any:  # noqa: D102
        return sum(self._in_order(self.agree(list(losses)), groups))

    def _in_order(self, by_process: Sequence[Any], groups: int) -> Iterator[Any]:
        """What each process has of its groups, in the order of all groups."""
        return (by_process[i % self.size][i // self.size] for i in range(groups))

    def sum_gradients(self, parts: Iterable[tuple[Any, Weights]], groups: int) -> Any:
        """Each process adds up a slice of the entries, for all groups, and hands it to the others.

        So a gradient travels twice, however many processes there are: `traffic`.
        """
        computed = list(parts)
        L = self.sum_losses([L for L, _ in computed], groups)
        layout = self.share(_Layout.of(computed[0][1]) if computed else None)
        rows = np.empty((len(computed), layout.entries), layout.dtype)
        for row, (_, g) in zip(rows, computed, strict=True):
            row[:] = layout.flat(g)
        ends = [layout.entries * k // self.size for k in range(self.size + 1)]
        slices = [slice(*pair) for pair in pairwise(ends)]
        mine = slices[self.rank].stop - slices[self.rank].start
        counts = [len(range(k, groups, self.size)) for k in range(self.size)]
        out = [
            np.ascontiguousarray(rows.reshape(len(computed), layout.entries)[:, at])
            for at in slices
        ]
        received = np.empty(groups * mine, layout.dtype)
        self.communicator.Alltoallv(
            [np.concatenate([a.ravel() for a in out]), [a.size for a in out]],
            [received, [n * mine for n in counts]],
        )
        starts = np.cumsum([0, *counts])
        by_group = received.reshape(groups, mine)
        by_process = [by_group[a:b] for a, b in pairwise(starts)]
        first, *others = self._in_order(by_process, groups)
        added = reduce(np.add, others, first)
        total = np.empty(layout.entries, layout.dtype)
        self.communicator.Allgatherv(
            np.ascontiguousarray(added), [total, [at.stop - at.start for at in slices]]
        )
        to_others = sum(a.size for k, a in enumerate(out) if k != self.rank)
        self.sent += (to_others + mine * (self.size - 1)) * layout.dtype.itemsize
        return L, layout.arrays(total)

    def end(self, status: int) -> None:  # noqa: D102
        sys.stdout.flush()
        sys.stderr.flush()
        self.communicator.Abort(status)


@dataclass(frozen=True)
class _Layout:
    """How the gradients of a group lie in one array: names, shapes and memory orders.

    A sum over a gradient's entries, such as its norm, runs in the order of its memory.
    """

    parts: tuple[tuple[str, tuple[int, ...], Any], ...]
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, g: Mapping[str, Array]) -> "_Layout":
        """That of these gradients."""
        parts = ((name, a.shape, "CF"[_is_transposed(a)]) for name, a in g.items())
        return cls(tuple(parts), np.result_type(*g.values()))

    @property
    def entries(self) -> int:
        return sum(math.prod(shape) for _, shape, _ in self.parts)

    def flat(self, g: Mapping[str, Array]) -> Array:
        return np.concatenate([np.ravel(g[name], order) for name, _, order in self.parts])

    def arrays(self, flat: Array) -> Weights:
        ends = np.cumsum([math.prod(shape) for _, shape, _ in self.parts])
        pieces = np.split(flat, ends[:-1])
        return {
            name: piece.reshape(shape, order=order)
            for (name, shape, order), piece in zip(self.parts, pieces, strict=True)
        }


def _is_transposed(a: Array) -> bool:
    return bool(a.flags.f_contiguous and not a.flags.c_contiguous)


def traffic(entries: int, groups: int, processes: int, itemsize: int = 4) -> float:
    """The bytes that a process sends in a step: about two gradients' if there is a group for each.

    To each other process its slice of the gradients of each own group, and the sum of the own
    slice: (g / n + 1) (n - 1) / n gradients, for g groups by n processes that share them evenly.
    """
    n = processes
    return itemsize * entries * (groups / n + 1) * (n - 1) / n


def from_environment(communicator: Callable[[], Any] | None = None) -> Alone:
    """The team that MPI has started this process in, or `ALONE`.

    Errors: ImportError that names the extra, where MPI has started it and mpi4py is missing.
    """
    if not any(name in os.environ for name in STARTED_BY):
        return ALONE
    made = communicator() if communicator else _world()
    return Team(made) if made.Get_size() > 1 else ALONE


def _world() -> Any:
    try:
        from mpi4py import MPI
    except ImportError as error:
        text = f"this process was started by MPI, and mpi4py is not installed: {EXTRA}"
        raise ImportError(text) from error
    return MPI.COMM_WORLD
