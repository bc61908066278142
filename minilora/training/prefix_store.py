"""Where the frozen prefix of a run is kept: in memory, or in files that runs share."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from minilora.io.atomic import replacing
from minilora.io.errors import FormatError
from minilora.io.memory import free_memory
from minilora.spec.ops import Array
from minilora.training.checkpointing import lowest_block
from minilora.training.frozen_prefix import FrozenPrefix
from minilora.training.run import Run
from minilora.training.threads import blas_name

KEPT_AS = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes in which it may be kept; half precision rounds it."""

UNKNOWN = 4e9
"""The bytes that are taken for free if the system does not tell."""

SHARE = 4
"""The store in memory takes at most this part, one fourth, of the memory that is free."""


class MemoryStore:
    """Arrays in memory, at most ``room`` bytes of them."""

    def __init__(self, room: float) -> None:
        self.room, self.arrays = room, dict[bytes, Array]()

    def get(self, key: bytes) -> Array | None:  # noqa: D102
        return self.arrays.get(key)

    def put(self, key: bytes, array: Array) -> None:  # noqa: D102
        if array.nbytes <= self.room:
            self.room -= array.nbytes
            self.arrays[key] = array


class FolderStore:
    """Arrays in the files of a folder, mapped, which runs and processes share.

    A file is complete or not there. Errors: OSError if the disk is full or not writable;
    FormatError for a file that is no array.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        self.folder, self.dtype = folder, dtype

    def _path(self, key: bytes) -> Path:
        name = hashlib.sha256(key).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.npy"

    def get(self, key: bytes) -> Array | None:  # noqa: D102
        path = self._path(key)
        try:
            array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            return None
        except (ValueError, EOFError) as error:
            raise FormatError(path, "file", str(error), "a kept prefix", "delete it") from error
        return array.view(self.dtype)  # NumPy's files do not know bfloat16

    def put(self, key: bytes, array: Array) -> None:  # noqa: D102
        with replacing(self._path(key)) as path, path.open("wb") as file:
            np.save(file, array.view(f"u{array.itemsize}"), allow_pickle=False)


def with_kept_prefix(run: Run, where: str | None = None, kept_as: str = "float32") -> Run:
    """The run with its frozen prefix kept in ``where``: "memory", "none", or a folder.

    By default in memory, if there is a second epoch. In memory there is only so much room (`SHARE`,
    and none with gradient checkpointing); what finds none is computed again, to the same bits. With
    "none" the prefix is computed with each batch, and its sums may have another order. A folder is
    shared by the runs of the same base: what they keep there depends on the base's digest, the
    depth, the dtypes, and the library of matrix products.

    Errors: ValueError for another dtype than float32, float16 or bfloat16, or for half precision
    or a folder where nothing is kept.
    """
    if kept_as not in KEPT_AS:
        raise ValueError(f"prefix_dtype {kept_as!r}: expected {', '.join(KEPT_AS)}")
    depth = lowest_block(run.c.layers, run.c.causal, run.spec.trained)
    if where is None and kept_as == "float32":
        where = "memory" if depth and _repeats(run) else "none"
    if where == "none" and kept_as == "float32":
        return run
    if depth == 0 or where in (None, "none"):
        found = "a trained lowest block" if depth == 0 else "no place for it (prefix_cache)"
        raise ValueError(
            f"a kept prefix: found {found}, expected adapters in the last blocks alone"
        )
    own = np.dtype(run.config.dtype)
    dtype = KEPT_AS[kept_as] if kept_as != "float32" else own
    if where == "memory":
        store: Any = MemoryStore(
            0 if run.plan.gradient_checkpointing else free_memory(UNKNOWN) / SHARE
        )
    else:
        made_of = run.base.digest, depth, own.name, dtype.name, np.__version__, blas_name()
        name = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
        store = FolderStore(Path(where) / f"prefix-{name}", dtype)
    plan = replace(run.plan, prefix=FrozenPrefix(depth, store, dtype))
    return replace(run, plan=plan, settings={**run.settings, "prefix": dtype.name})


def _repeats(run: Run) -> bool:
    """Whether an example is seen twice."""
    batches = len(run.micro_batches(0))
    return run.total_steps > -(-batches // run.config.gradient_accumulation_steps)
