"""A right server of adapters: folders are read as they are, and what fits nothing is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minilora.io.files import read_json, read_tensors
from minilora.io.formats.huggingface import read_model
from minilora.io.formats.peft import CONFIG, WEIGHTS
from minilora.spec.lora import TrainableSpec
from minilora.spec.models import Batch, logits
from minilora.verify.implementation.minilora_impl import Minilora
from minilora.verify.mutants.references.files import write_folder
from minilora.verify.mutants.references.helpers import Array, wide


def of_base(model_dir: Any, ids: Array) -> Any:
    """The logits of the base alone."""
    c, W = read_model(model_dir)
    z, _ = logits(Batch(ids), {n: wide(w) for n, w in W.items()}, c, TrainableSpec())
    return z.T.reshape(*ids.shape, -1).astype(W["embed.weight"].dtype)


class Server(Minilora):
    @contextmanager
    def read(self, model_dir: Any, adapter_dir: Any) -> Iterator[str]:
        """A folder with what was read of the adapter's."""
        c, t = read_json(Path(adapter_dir) / CONFIG), read_tensors(Path(adapter_dir) / WEIGHTS)
        # used
        with TemporaryDirectory(prefix="minilora-") as name:
            write_folder(name, t, c)
            yield name

    def ignored(self, adapter_dir: Any) -> bool:
        """Whether an adapter that does not fit is left out without a word."""
        return False

    def logits(self, model_dir: Any, adapter_dir: Any, input_ids: Any) -> Array:
        """The specification's."""
        with self.read(model_dir, adapter_dir) as folder:
            try:
                z = super().logits(model_dir, folder, input_ids)
            except ValueError:
                if not self.ignored(adapter_dir):
                    raise
                z = of_base(model_dir, input_ids)
        # logits
        return z

    def deltas(self, model_dir: Any, adapter_dir: Any) -> dict[str, Array]:
        """The specification's."""
        with self.read(model_dir, adapter_dir) as folder:
            try:
                d = super().deltas(model_dir, folder)
            except ValueError:
                # deltas refused
                if not self.ignored(adapter_dir):
                    raise
                d = {}
        # deltas of all
        return d
