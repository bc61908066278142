"""The state of a training run, and its file: complete or absent, the last two kept.

A run continues from a `TrainState` to the same bits as without the interruption: the order of the
data and the dropout masks are functions of the seed and the step, and everything else is in here.
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

from minilora.io.atomic import write_files
from minilora.io.errors import FormatError
from minilora.io.files import pack, read_tensors
from minilora.spec.adalora import Importance
from minilora.spec.lora import Weights
from minilora.spec.optim import AdamState

FOLDER = "checkpoint"
"""The folder of the checkpoints, inside a run's."""

KEPT = 2
"""How many checkpoints are kept: if the last one is damaged, there is the one before."""

PARTS = ("params", "m", "v", "mean", "spread", "keep")
"""The prefixes of the tensors' names in the file: the parameters, Adam's means of g and g², and
AdaLoRA's means and masks."""


@dataclass(frozen=True)
class TrainState:
    """The trained parameters, the optimizer's means, and the position in the data.

    ``step`` and ``tokens``: how many are done; ``epoch`` and ``position``: the next micro-batch, as
    its index in the epoch's order; ``first_loss``: the first step's; ``importance``: AdaLoRA's.
    """

    params: Weights
    adam: AdamState = field(default_factory=AdamState)
    step: int = 0
    epoch: int = 0
    position: int = 0
    tokens: int = 0
    first_loss: float | None = None
    importance: Importance = field(default_factory=Importance)


COUNTS = ("step", "epoch", "position", "tokens")
"""The whole numbers of a state."""


def name_of(step: int) -> str:
    """The file's name; names sort in the order of the steps."""
    return f"step-{step:08}.safetensors"


def saved(folder: Path | str) -> list[Path]:
    """The checkpoints in the folder, the earliest first."""
    there = Path(folder).glob("step-*.safetensors")
    return sorted(path for path in there if re.fullmatch(r"step-\d{8,}", path.stem))


def save(folder: Path | str, state: TrainState) -> Path:
    """Write the state beside the earlier ones, on disk before this returns; remove the oldest.

    Errors: FormatError if an entry is not finite; OSError if the disk is full or not writable. The
    earlier checkpoints are then as they were.
    """
    folder, name = Path(folder), name_of(state.step)
    counts = {count: getattr(state, count) for count in COUNTS}
    counts |= {"t": state.adam.t, "first_loss": state.first_loss}
    importance = state.importance
    keep = {at: mask.astype(np.uint8) for at, mask in importance.keep.items()}
    arrays = (
        state.params, state.adam.m, state.adam.v, importance.mean, importance.spread, keep,
    )  # fmt: skip
    tensors = {
        f"{part}.{at}": array
        for part, arrays_of_part in zip(PARTS, arrays, strict=True)
        for at, array in arrays_of_part.items()
    }
    metadata = {"minilora": json.dumps(counts, sort_keys=True, allow_nan=False)}
    write_files(folder, {name: partial(pack, folder / name, tensors, metadata)}, durable=True)
    earlier = [path for path in saved(folder) if path.name != name]
    for path in earlier[: 1 - KEPT]:
        path.unlink()
    return folder / name


def clean(folder: Path | str) -> None:
    """Remove the temporary files of a run that was killed while it wrote."""
    for path in Path(folder).glob(".step-*.safetensors.*"):
        path.unlink()


def load(path: Path | str) -> TrainState:
    """The state in the file.

    Errors: FormatError as `files.read_tensors` has it; for a file that is no checkpoint; for
    counts that no run has, or of another step than its name says; for optimizer means of other
    parameters than those trained.
    """
    tensors = read_tensors(path)
    counts = _read_counts(path)
    arrays: dict[str, Weights] = {part: {} for part in PARTS}
    for name, array in tensors.items():
        part, _, at = name.partition(".")
        if part not in arrays:
            raise FormatError(path, "tensors", name, f"one of {', '.join(PARTS)}", _REMEDY)
        arrays[part][at] = array
    if not _consistent(arrays, counts["t"]):
        found = "means of other parameters, or of other shapes or dtypes"
        raise FormatError(path, "tensors", found, "those of the trained parameters", _REMEDY)
    adam = AdamState(counts.pop("t"), arrays["m"], arrays["v"])
    keep = {at: mask.astype(bool) for at, mask in arrays["keep"].items()}
    importance = Importance(arrays["mean"], arrays["spread"], keep)
    return TrainState(arrays["params"], adam, **counts, importance=importance)


_REMEDY = "remove this checkpoint, and the run continues from the one before"


def _read_counts(path: Path | str) -> dict[str, Any]:
    """The counts in the file's metadata. Errors: FormatError."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = json.loads((file.metadata() or {})["minilora"])
        counts = {count: metadata[count] for count in (*COUNTS, "t", "first_loss")}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise FormatError(path, "metadata", repr(error), "the counts of a run", _REMEDY) from None
    if not _possible(counts) or name_of(counts["step"]) != Path(path).name:
        expected = "the counts of that step of a run"
        raise FormatError(path, "metadata", counts, expected, _REMEDY)
    return counts


def _consistent(arrays: Mapping[str, Weights], t: int) -> bool:
    """Whether the arrays are of the same parameters, with the same shapes and dtype.

    Adam has means of all trained parameters once it has made a step; AdaLoRA has those of some, and
    a mask for each E.
    """
    shapes = {part: {at: a.shape for at, a in arrays[part].items()} for part in PARTS}
    params, masks = shapes["params"], {f"{at}.E": s for at, s in shapes["keep"].items()}
    dtypes = {a.dtype for part in PARTS if part != "keep" for a in arrays[part].values()}
    return (
        all(shapes[part] == (params if t else {}) for part in ("m", "v"))
        and all(shapes[part].items() <= params.items() for part in ("mean", "spread"))
        and masks.items() <= params.items()
        and len(dtypes) <= 1
        and all(dtype.kind == "f" for dtype in dtypes)
    )


def _possible(counts: Mapping[str, Any]) -> bool:
    """Whether a run can have these counts.

    Each step is one of Adam's, takes a token at least, and ends an epoch at most.
    """
    whole = [counts[name] for name in (*COUNTS, "t")]
    if not all(type(n) is int and n >= 0 for n in whole):
        return False
    step, epoch, position, tokens, t = whole
    loss = counts["first_loss"]
    finite = type(loss) is float and math.isfinite(loss)
    return (
        t == step
        and epoch <= step <= tokens
        and position <= tokens < 2**63
        and (loss is None if step == 0 else finite)
    )


def newest(folder: Path | str) -> tuple[TrainState | None, list[FormatError]]:
    """The last undamaged state, if any, and the errors of those after it."""
    errors: list[FormatError] = []
    for path in reversed(saved(folder)):
        try:
            return load(path), errors
        except FormatError as error:
            errors.append(error)
    return None, errors


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it does not count as later than the next one saved."""
    return path.replace(path.with_name(f"{path.name}.damaged"))
