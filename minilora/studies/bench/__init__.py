"""What a step costs here and elsewhere: time, memory and arithmetic, of the same model and batch.

Each side runs in a process of its own and does one step when it is told to, in turn with the other:
what else the machine does meets both. What is compared is the ratio of neighbours, and its median.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import IO, Any

import numpy as np

from minilora.io.formats import huggingface, peft
from minilora.io.formats.files import FormatError, write_tensors
from minilora.spec.models import FIRST, Config, Llama, draw_weights
from minilora.spec.quantization import gguf_bytes, quantise
from minilora.spec.target_modules import LoraConfig, inject

RANK = 8
KINDS = ("step", "forward", "generate")
"""What is measured: a step of training, the loss alone, tokens drawn one by one."""

RATE = 1e-4
"""The learning rate on either side."""

PROMPT, NEW = 32, 32
"""Tokens: at most so many of the batch's first sequence are gone on from, by so many."""

PAUSE = 0.1
"""Seconds between runs: libraries' threads wait for more work for a while, and take the processors
of what runs next."""


@dataclass(frozen=True)
class Size:
    """A model and its batch, b sequences of t tokens, and what is measured of them."""

    c: Llama
    b: int
    t: int
    kinds: tuple[str, ...] = KINDS


_SMOLLM2 = Llama(
    vocab=49152, d=576, layers=30, heads=9, ffn=1536, kv_heads=3, head_dim=64, tied=True
)
SIZES = {
    "tiny": Size(Llama(vocab=256, d=32, layers=2, heads=2, ffn=96, kv_heads=2, head_dim=16), 4, 32),
    "small": Size(
        Llama(vocab=1024, d=128, layers=4, heads=4, ffn=352, kv_heads=4, head_dim=32), 8, 128
    ),
    "medium": Size(
        Llama(vocab=4096, d=384, layers=6, heads=6, ffn=1024, kv_heads=6, head_dim=64), 4, 256
    ),
    "smollm2": Size(_SMOLLM2, 1, 128),
    "smollm2-512": Size(_SMOLLM2, 1, 512, KINDS[:2]),
}
"""The sizes by name, the last two those of SmolLM2-135M, which generates alike in both."""

SIDES = {
    "minilora": "minilora.studies.bench.own:Own",
    "peft": "minilora.studies.bench.peers.peft:Peft",
    "peft-warm": "minilora.studies.bench.peers.peft:Warm",
    "torch": "minilora.studies.bench.peers.torch:ByHand",
    "torch-compile": "minilora.studies.bench.peers.torch:Compiled",
    "jax": "minilora.studies.bench.peers.jax:Jax",
}
"""What can be measured, each with its class; beside itself, this package shows what options do."""


def flops(c: Config, b: int, t: int, r: int = RANK) -> dict[str, int]:
    """The multiplications and additions that a LoRA step on all linears takes at least.

    Of the frozen weights one product forward and one for the gradient of its input, none for dW; of
    the adapters one more. A causal mask leaves half of all pairs of tokens, each with two products
    forward and four backward. No gradient flows below the projections that read the first input.
    """
    heads = getattr(c, "head_dim", c.d // c.heads) * c.heads
    blocks = {at: m * n for at, (m, n) in c.linears().items() if at.startswith("layers.")}
    first = sum((m + r) * n for at, (m, n) in c.block().items() if at in FIRST)
    frozen = sum(blocks.values()) + c.vocab * c.d
    adapters = sum(r * sum(c.linears()[at]) for at in blocks)
    pairs = b * c.layers * heads * t * (t + 1) // 2
    forward = 2 * b * t * (frozen + adapters) + 2 * 2 * pairs
    backward = 2 * b * t * (frozen - first + 2 * adapters) + 4 * 2 * pairs
    return {"forward": forward, "step": forward + backward}


def write_case(folder: Path, size: Size, seed: int = 0) -> None:
    """The model, an adapter with B ≠ 0 and the batch, as files that every side reads."""
    rng = np.random.default_rng(seed)
    base = {name: w.astype(np.float32) for name, w in draw_weights(size.c, rng).items()}
    lora = LoraConfig(r=RANK, alpha=2 * RANK)
    W, tuning = inject(base, lora, size.c.linears(), rng)
    for name in sorted(tuning.trained):  # a set's order is another in each process
        W[name] = (0.02 * rng.standard_normal(W[name].shape)).astype(np.float32)
    huggingface.write_model(folder / "model", size.c, base)
    peft.write_adapter(folder / "adapter", size.c, W, tuning, lora)
    ids = rng.integers(0, size.c.vocab, (size.b, size.t))
    write_tensors(folder / "batch.safetensors", {"ids": ids})
    codes = {name: gguf_bytes(quantise(w, "q4_1")) for name, w in base.items() if w.shape[1] > 1}
    small = {name: codes.get(name, w) for name, w in base.items()}
    write_tensors(folder / "quantised.safetensors", small)


class Missing(Exception):
    """What a side needs is not installed; the message says how to install it."""


class Side:
    """One side in a process of its own, which works when it is told to.

    ``kinds`` are those of `KINDS` that it can do.
    Errors: Missing without its library; RuntimeError with what the process said when it ended.
    """

    def __init__(self, name: str, folder: Path, threads: int, **options: Any) -> None:
        self.name, self.error = name, folder / f"{name}-{os.urandom(4).hex()}.txt"
        given = json.dumps({"folder": str(folder), "threads": threads, **options})
        command = [sys.executable, "-m", "minilora.studies.bench.worker", SIDES[name], given]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        with self.error.open("w") as error:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=error,
                text=True,
                env=environment,
            )
        try:
            answer = self._answer()
            if "missing" in answer:
                raise Missing(f"{name} cannot be measured: {answer['missing']}")
        except BaseException:
            self.close()
            raise
        self.versions: str = answer["versions"]
        self.kinds: list[str] = answer["kinds"]

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        line = self._stream(self.process.stdout).readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: {self.error.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    @staticmethod
    def _stream(stream: IO[str] | None) -> IO[str]:
        assert stream is not None
        return stream

    def run(self, what: str, times: int = 1) -> dict[str, Any]:
        """{"seconds", "cpu", "value"}: how long ``what`` took, so many times; what it gave last."""
        stream = self._stream(self.process.stdin)
        stream.write(json.dumps([what, times]) + "\n")
        stream.flush()
        return self._answer()


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


def measure(
    name: str,
    folder: Path,
    peer: str,
    threads: int,
    rounds: int,
    own: dict[str, Any] | None = None,
    least: float = 0.1,
    kinds: Sequence[str] = KINDS,
) -> Result:
    """Own side and peer in turn, ``least`` seconds or one run at a time, after a run to warm up.

    Of ``kinds`` only what the size has and both sides can do.
    Errors: those of `Side`.
    """
    size = SIZES[name]
    with ExitStack() as opened:
        sides = [
            opened.enter_context(Side("minilora", folder, threads, **(own or {}))),
            opened.enter_context(Side(peer, folder, threads)),
        ]
        losses = [side.run("step")["value"] for side in sides]
        for side in sides:
            side.run("step")
        memory = [side.run("memory")["value"] for side in sides]
        can = set(kinds).intersection(size.kinds, *(side.kinds for side in sides))
        first = {kind: [side.run(kind) for side in sides] for kind in KINDS if kind in can}
        times = {
            kind: max(1, int(least / min(run["seconds"] for run in runs)))
            for kind, runs in first.items()
        }
        alike = _alike(*(run["value"] for run in first["generate"])) if "generate" in can else None
        taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in first}
        cpu: dict[str, list[float]] = {kind: [] for kind in first}
        peaks, cost = [], flops(size.c, size.b, size.t)
        shares: dict[str, list[float]] = {kind: [] for kind in first if kind in cost}
        for i in range(rounds):
            for kind, n in times.items():
                order = (0, 1) if i % 2 else (1, 0)  # neither is always the first
                each = {}
                for j in order:
                    time.sleep(PAUSE)
                    each[j] = sides[j].run(kind, n)
                taken[kind].append((each[0]["seconds"] / n, each[1]["seconds"] / n))
                cpu[kind].append(each[0]["cpu"] / each[1]["cpu"])
                if kind in shares:
                    peaks.append(sides[0].run("products")["value"])
                    shares[kind].append(cost[kind] / taken[kind][-1][0] / peaks[-1])
        versions = tuple(side.versions for side in sides)
    ratios = {kind: [a / b for a, b in pairs] for kind, pairs in taken.items()}
    return Result(
        name,
        threads,
        peer,
        rounds,
        {kind: _medians(pairs) for kind, pairs in taken.items()},
        {kind: median(r) for kind, r in ratios.items()},
        {kind: tuple(np.quantile(r, (0.25, 0.75)).tolist()) for kind, r in ratios.items()},
        {kind: median(r) for kind, r in cpu.items()},
        {kind: median(s) for kind, s in shares.items()},
        cost,
        median(peaks) if peaks else None,
        (memory[0], memory[1]),
        (losses[0], losses[1]),
        alike,
        (versions[0], versions[1]),
        processor(),
    )


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


def _alike(own: Sequence[int], others: Sequence[int]) -> tuple[int, int]:
    """How many tokens come before the first that differs, and of how many."""
    same = [a == b for a, b in zip(own, others, strict=True)]
    return [*same, False].index(False), len(same)


def _medians(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    own, others = zip(*pairs, strict=True)
    return median(own), median(others)
