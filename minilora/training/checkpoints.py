"""Where a training run stands, as a value, and its file: whole or not there, the last two kept.

A run goes on from a `State` to the same bits as without the interruption: the order of the data and
the dropout masks are functions of the seed and the step, and all the rest is in here.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from minilora.io.files import FormatError, pack, read_tensors, write_files
from minilora.spec.adalora import Importance
from minilora.spec.lora import Weights
from minilora.spec.optim import AdamState

FOLDER = "checkpoint"
"""The folder of the checkpoints, inside a run's."""

KEPT = 2
"""How many checkpoints stay: should the disk have damaged the last one, there is the one before."""

PARTS = ("params", "m", "v", "mean", "spread", "keep")
"""What a name of a tensor in the file begins with: the parameters, the means of g and of g², and
what AdaLoRA's budget remembers, where there is one."""


@dataclass(frozen=True)
class State:
    """What is trained, the optimizer's means, and how far the data has been read.

    ``step`` and ``tokens``: how many are done; ``epoch`` and ``position``: the next micro-batch, by
    its place in the epoch's order; ``first``: the first step's loss; ``importance``: AdaLoRA's.
    """

    params: Weights
    adam: AdamState = field(default_factory=AdamState)
    step: int = 0
    epoch: int = 0
    position: int = 0
    tokens: int = 0
    first: float | None = None
    importance: Importance = field(default_factory=Importance)


COUNTS = ("step", "epoch", "position", "tokens")


def name_of(step: int) -> str:
    """The file's name; names are in the order of the steps."""
    return f"step-{step:08}.safetensors"


def saved(folder: Path | str) -> list[Path]:
    """The checkpoints that are in the folder, the earliest first."""
    there = Path(folder).glob("step-*.safetensors")
    return sorted(path for path in there if re.fullmatch(r"step-\d{8,}", path.stem))


def save(folder: Path | str, state: State) -> Path:
    """Write the state beside the earlier ones, on the disk before this returns; drop the oldest.

    Errors: FormatError if an entry is not finite; OSError where the disk is full or closed. The
    earlier checkpoints are then as they were.
    """
    folder, name = Path(folder), name_of(state.step)
    numbers = {count: getattr(state, count) for count in COUNTS}
    numbers |= {"t": state.adam.t, "first": state.first}
    i = state.importance
    keep = {at: array.astype(np.uint8) for at, array in i.keep.items()}
    held = (state.params, state.adam.m, state.adam.v, i.mean, i.spread, keep)
    arrays = zip(PARTS, held, strict=True)
    tensors = {f"{part}.{at}": array for part, own in arrays for at, array in own.items()}
    metadata = {"minilora": json.dumps(numbers, sort_keys=True, allow_nan=False)}
    write_files(folder, {name: partial(pack, folder / name, tensors, metadata)}, durable=True)
    earlier = [path for path in saved(folder) if path.name != name]
    for path in earlier[: 1 - KEPT]:
        path.unlink()
    return folder / name


def clean(folder: Path | str) -> None:
    """Remove what a run that was killed while it wrote has left: no checkpoint, under no name."""
    for path in Path(folder).glob(".step-*.safetensors.*"):
        path.unlink()


def load(path: Path | str) -> State:
    """The state in the file.

    Errors: FormatError as `files.read_tensors` has it; for a file that is no
    checkpoint; for counts that no run has, or another step's than its name says; for means of other
    parameters than those that are trained.
    """
    remedy = "remove this checkpoint, and the run goes on from the one before"
    found = read_tensors(path)
    try:
        with safe_open(path, framework="np") as file:
            numbers = json.loads((file.metadata() or {})["minilora"])
        counts: dict[str, Any] = {count: numbers[count] for count in (*COUNTS, "t", "first")}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        expected = "the counts of a run"
        raise FormatError(path, "metadata", repr(error), expected, remedy) from None
    if not _possible(counts) or name_of(counts["step"]) != Path(path).name:
        raise FormatError(path, "metadata", counts, "the counts of that step of a run", remedy)
    held: dict[str, Weights] = {part: {} for part in PARTS}
    for name, array in found.items():
        part, _, at = name.partition(".")
        if part not in held:
            raise FormatError(path, "tensors", name, f"one of {', '.join(PARTS)}", remedy)
        held[part][at] = array
    shapes = {part: {at: array.shape for at, array in own.items()} for part, own in held.items()}
    params = shapes["params"]
    # Adam has means of all that is trained; AdaLoRA remembers some of it, and a choice for each E.
    right = all(shapes[part] == (params if counts["t"] else {}) for part in ("m", "v"))
    right &= all(shapes[part].items() <= params.items() for part in ("mean", "spread"))
    right &= {f"{at}.E": shape for at, shape in shapes["keep"].items()}.items() <= params.items()
    numbers_of = [array for part, own in held.items() if part != "keep" for array in own.values()]
    right &= {array.dtype.kind for array in numbers_of} <= {"f"}
    right &= len({array.dtype for array in numbers_of}) <= 1
    if not right:
        found_ = "means of other parameters, or of other shapes or dtypes"
        raise FormatError(path, "tensors", found_, "those of what is trained", remedy)
    adam = AdamState(counts.pop("t"), held["m"], held["v"])
    keep = {at: array.astype(bool) for at, array in held["keep"].items()}
    importance = Importance(held["mean"], held["spread"], keep)
    return State(held["params"], adam, **counts, importance=importance)


def _possible(counts: Mapping[str, Any]) -> bool:
    """Whether a run can have these counts.

    Each step makes one of Adam's, takes a token at least, and ends an epoch at most.
    """
    whole = [counts[name] for name in (*COUNTS, "t")]
    if not all(type(n) is int and n >= 0 for n in whole):
        return False
    step, epoch, position, tokens, t = whole
    first = counts["first"]
    known = type(first) is float and math.isfinite(first)
    return (
        t == step
        and epoch <= step <= tokens
        and position <= tokens < 2**63
        and (first is None if step == 0 else known)
    )


def newest(folder: Path | str) -> tuple[State | None, list[FormatError]]:
    """The last state that is whole, if any, and what is wrong with those after it."""
    wrong: list[FormatError] = []
    for path in reversed(saved(folder)):
        try:
            return load(path), wrong
        except FormatError as error:
            wrong.append(error)
    return None, wrong


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint another name: it would pass for later than what is saved next."""
    return path.replace(path.with_name(f"{path.name}.damaged"))
