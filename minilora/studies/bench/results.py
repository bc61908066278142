"""What was measured, as a table and as a file."""

import json
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from minilora.io.errors import FormatError
from minilora.studies.bench.cases import KINDS


@dataclass(frozen=True)
class Result:
    """What was measured of one size, the own side first: seconds and bytes, medians of all rounds.

    ``ratio``: of each kind of run, the median over rounds of own time over the peer's; ``spread``:
    the quartiles of that; ``cpu``: the same of the processors' time, which others do not take from
    a side, and of which several threads take more than the clock; ``share``: of a step and a
    forward, the least arithmetic over what products alone reach; ``loss``: of the first step on
    either side; ``alike``: how many drawn tokens are the same on both, from the first on, and of
    how many. Of what a side cannot do there is no entry. ``machine``: the processor.
    """

    size: str
    threads: int
    peer: str
    rounds: int
    seconds: dict[str, tuple[float, float]]
    ratio: dict[str, float]
    spread: dict[str, tuple[float, float]]
    cpu: dict[str, float]
    share: dict[str, float]
    flops: dict[str, int]
    peak_flops: float | None
    memory: tuple[int, int]
    loss: tuple[float, float]
    alike: tuple[int, int] | None
    versions: tuple[str, str]
    machine: str

    @property
    def memory_ratio(self) -> float:
        """Own peak memory over the peer's."""
        return self.memory[0] / self.memory[1]

    def json(self) -> dict[str, Any]:
        """All of it, for a file."""
        return {**asdict(self), "memory_ratio": self.memory_ratio}


def processor() -> str:
    """What the system calls the processor, and how many there are."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        name = next(names, name)
    return f"{name}, {os.cpu_count()} processors"


def table(results: Sequence[Result]) -> str:
    """The results as lines of text, a row for each size and number of threads."""
    columns = [["size", *(r.size for r in results)]]

    def column(head: str, of: Callable[[Result], str]) -> None:
        columns.append([head, *map(of, results)])

    def measured(kind: str, cell: Callable[[Result], str]) -> Callable[[Result], str]:
        return lambda r: cell(r) if kind in r.ratio else "-"

    def quartiles(kind: str) -> Callable[[Result], str]:
        return lambda r: "{:.2f} ({:.2f} to {:.2f})".format(r.ratio[kind], *r.spread[kind])

    def milliseconds(r: Result) -> str:
        return "{:.1f} over {:.1f}".format(*(1e3 * t for t in r.seconds["step"]))

    column("threads", lambda r: str(r.threads))
    for kind in KINDS:
        column(kind, measured(kind, quartiles(kind)))
    column("alike", lambda r: "{} of {}".format(*r.alike) if r.alike else "-")
    column("step cpu", measured("step", lambda r: f"{r.cpu['step']:.2f}"))
    column("memory", lambda r: f"{r.memory_ratio:.2f}")
    column("ms", measured("step", milliseconds))
    column("MB", lambda r: "{:.0f} over {:.0f}".format(*(m / 1e6 for m in r.memory)))
    column("GFLOP", lambda r: f"{r.flops['step'] / 1e9:.3g}")
    column("of peak", measured("step", lambda r: f"{r.share['step']:.0%}"))
    widths = [max(map(len, cells)) for cells in columns]
    rows = zip(*columns, strict=True)
    lines = ("  ".join(f"{cell:>{n}}" for cell, n in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(lines) + "\n"


def read_results(path: Path | str) -> list[Result]:
    """What ``minilora bench --json`` has written.

    Errors: FormatError for a file that is none.
    """
    names = {f.name for f in fields(Result)}
    try:
        found = json.loads(Path(path).read_text())
        return [Result(**{name: each[name] for name in names}) for each in found]
    except (ValueError, TypeError, KeyError) as error:
        expected = "results of minilora bench --json"
        raise FormatError(path, "results", error, expected, "measure anew") from None


def tables(results: Sequence[Result]) -> str:
    """A table for each peer, with the versions above it."""
    by_peer: dict[str, list[Result]] = {}
    for each in results:
        by_peer.setdefault(each.peer, []).append(each)
    heads = {
        peer: f"{own[0].versions[0]} over {peer} ({own[0].versions[1]}), {own[0].machine}"
        for peer, own in by_peer.items()
    }
    return "\n".join(f"{heads[peer]}\n{table(own)}" for peer, own in by_peer.items())
