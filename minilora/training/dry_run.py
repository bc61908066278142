"""What a run will take: data, steps, time and memory, found out by steps that are not kept."""

import time
from collections.abc import Iterator

import numpy as np

from minilora.training.batching import batch as padded
from minilora.training.checkpoints import TrainState
from minilora.training.fit import peak_memory
from minilora.training.loop import train_step
from minilora.training.run import Run

WARM_UP = 1
"""So many steps are taken before the one that is timed: the first also allocates."""


def dry_run(run: Run) -> str:
    """Lines for a reader, one for each thing; nothing is written.

    The longest micro-batch is taken as the measure of memory, and the time of a token on it as that
    of all tokens.

    Errors: those of `loop.train_step`.
    """
    return "".join(f"{name:12} {text}\n" for name, text in _lines(run))


def _lines(run: Run) -> Iterator[tuple[str, str]]:
    examples = run.data.train
    lengths = np.array([len(example.ids) for example in examples])
    counted = sum(int(np.sum(example.loss_mask)) for example in examples)
    yield "examples", f"{len(examples)}, {len(run.data.valid)} for validation"
    yield (
        "tokens",
        (
            f"{lengths.sum()} an epoch, {counted} predicted; an example has {lengths.min()} to "
            f"{lengths.max()}, half have {np.median(lengths):.0f} or fewer"
        ),
    )
    if run.data.truncated:
        share = run.data.truncated / len(examples)
        yield (
            "cut",
            (
                f"{run.data.truncated} examples ({share:.0%}) to {run.config.max_length} tokens: "
                "--max-length takes more"
            ),
        )
    rows = run.micro_batches(0)
    padding = 1 - lengths.sum() / sum(len(row) * lengths[row].max() for row in rows)
    yield "batches", f"{len(rows)} micro-batches an epoch, {padding:.0%} of them padding"
    yield "steps", f"{run.total_steps}"
    longest = max(rows, key=lambda row: len(row) * lengths[row].max())
    batch = padded([examples[i] for i in longest], run.pad)
    for _ in range(1 + WARM_UP):
        started = time.perf_counter()
        train_step(run, TrainState(run.initial), [batch])
        seconds = time.perf_counter() - started
    tokens = int(batch.real.sum())
    each = int(lengths.sum()) / len(rows) * run.config.gradient_accumulation_steps
    total = seconds / tokens * each * run.total_steps
    yield "time", f"about {_duration(total)}, {tokens / seconds:.0f} tokens a second"
    memory = peak_memory()
    if memory is not None:
        less = "" if run.plan.gradient_checkpointing else "; --gradient-checkpointing needs less"
        yield "memory", f"{memory / 2**20:.0f} MiB so far, with the longest batch{less}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
