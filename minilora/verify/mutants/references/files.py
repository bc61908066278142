"""A right reader and writer of adapters: what is given is written, what is there is read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minilora.io.atomic import write_files, write_tensors
from minilora.io.files import pack_json, read_json, read_tensors
from minilora.io.formats.peft import CONFIG, WEIGHTS
from minilora.verify.implementation.minilora_impl import Minilora
from minilora.verify.mutants.references.helpers import Array


def write_folder(path: str | Path, t: Mapping[str, Array], c: Mapping[str, Any]) -> None:
    """An adapter's two files."""
    write_tensors(Path(path) / WEIGHTS, dict(t), {"format": "pt"})
    write_files(Path(path), {CONFIG: partial(pack_json, dict(c))})


class Files(Minilora):
    def save(self, model_dir: Any, adapter_arrays: Any, settings: Any, out_dir: Any) -> None:
        """Both files."""
        t, c = {**adapter_arrays}, {**settings}
        # saved
        write_folder(out_dir, t, c)

    def load(self, model_dir: Any, adapter_dir: Any) -> dict[str, Array]:
        """The tensors."""
        c, t = read_json(Path(adapter_dir) / CONFIG), read_tensors(Path(adapter_dir) / WEIGHTS)
        # loaded
        return t

    def model_loss(self, model_dir: Any, adapter_dir: Any, batch: Any) -> dict[str, Any]:
        """The specification's, of the folder as it is read."""
        # folder
        c, t = read_json(Path(adapter_dir) / CONFIG), read_tensors(Path(adapter_dir) / WEIGHTS)
        # used
        with TemporaryDirectory(prefix="minilora-") as name:
            write_folder(name, t, c)
            answer = super().model_loss(model_dir, name, batch)
        # answer
        return answer
