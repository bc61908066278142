"""Two sides in turn, round by round, and the medians of their ratios."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from minilora.studies.bench.cases import KINDS, SIZES, cost_of
from minilora.studies.bench.results import Result, processor
from minilora.studies.bench.sides import Side

PAUSE = 0.1
"""Seconds between runs: libraries' threads wait for more work for a while, and take the processors
of what runs next."""


@dataclass
class Rounds:
    """What the rounds of one kind of run gave: seconds of both sides, ratio of processor time."""

    seconds: list[tuple[float, float]] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Own time over the peer's, of each round."""
        return [own / peer for own, peer in self.seconds]

    @property
    def medians(self) -> tuple[float, float]:
        """The median seconds of either side."""
        own, peer = zip(*self.seconds, strict=True)
        return median(own), median(peer)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The quartiles of the ratios."""
        low, high = np.quantile(self.ratios, (0.25, 0.75)).tolist()
        return low, high


def measure(
    name: str,
    folder: Path,
    peer: str,
    threads: int,
    rounds: int,
    options: dict[str, Any] | None = None,
    least: float = 0.1,
    kinds: Sequence[str] = KINDS,
) -> Result:
    """Minilora, with its ``options``, and a peer in turn, after a run to warm up.

    A round runs each side for ``least`` seconds, or once. Of ``kinds`` only those that the size
    has and both sides can do.

    Errors: those of `Side`.
    """
    size, cost = SIZES[name], cost_of(SIZES[name])
    with ExitStack() as opened:
        sides = (
            opened.enter_context(Side("minilora", folder, threads, **(options or {}))),
            opened.enter_context(Side(peer, folder, threads)),
        )
        losses = [side.run("step")["value"] for side in sides]
        for side in sides:
            side.run("step")
        memory = [side.run("memory")["value"] for side in sides]
        can = set(kinds).intersection(size.kinds, *(side.kinds for side in sides))
        first = {kind: [side.run(kind) for side in sides] for kind in KINDS if kind in can}
        results = _all_rounds(sides, first, cost, rounds, least)
    tokens = [run["value"] for run in first.get("generate", ())]
    peaks = [peak for of_kind in results.values() for peak in of_kind.peak]
    return Result(
        size=name,
        threads=threads,
        peer=peer,
        rounds=rounds,
        seconds={kind: of_kind.medians for kind, of_kind in results.items()},
        ratio={kind: median(of_kind.ratios) for kind, of_kind in results.items()},
        spread={kind: of_kind.quartiles for kind, of_kind in results.items()},
        cpu={kind: median(of_kind.cpu) for kind, of_kind in results.items()},
        share={kind: median(results[kind].share) for kind in results if kind in cost},
        flops=cost,
        peak_flops=median(peaks) if peaks else None,
        memory=(memory[0], memory[1]),
        loss=(losses[0], losses[1]),
        alike=_alike(*tokens) if tokens else None,
        versions=(sides[0].versions, sides[1].versions),
        machine=processor(),
    )


def _all_rounds(
    sides: tuple[Side, Side],
    first: dict[str, list[dict[str, Any]]],
    cost: dict[str, int],
    rounds: int,
    least: float,
) -> dict[str, Rounds]:
    """The rounds of each kind; ``first``: one run on either side, to see how long it takes."""
    times = {
        kind: max(1, int(least / min(run["seconds"] for run in runs)))
        for kind, runs in first.items()
    }
    results = {kind: Rounds() for kind in first}
    for i in range(rounds):
        for kind, n in times.items():
            runs: dict[int, dict[str, Any]] = {}
            for side in (0, 1) if i % 2 else (1, 0):  # neither is always the first
                time.sleep(PAUSE)
                runs[side] = sides[side].run(kind, n)
            own, peer = runs[0], runs[1]
            of_kind = results[kind]
            of_kind.seconds.append((own["seconds"] / n, peer["seconds"] / n))
            of_kind.cpu.append(own["cpu"] / peer["cpu"])
            if kind in cost:
                of_kind.peak.append(sides[0].run("products")["value"])
                of_kind.share.append(cost[kind] / of_kind.seconds[-1][0] / of_kind.peak[-1])
    return results


def _alike(own: Sequence[int], others: Sequence[int]) -> tuple[int, int]:
    """How many tokens come before the first that differs, and of how many."""
    same = [a == b for a, b in zip(own, others, strict=True)]
    return [*same, False].index(False), len(same)
