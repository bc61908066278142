"""What lies beside the weights in a model's folder, and is read with them or in their place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from minilora.audit.result import Entry
from minilora.audit.tensors import TensorStore, open_tensors
from minilora.io.errors import FormatError, listed
from minilora.io.formats.huggingface.model import INDEX, read_index

_ADAPTER = "adapter_config.json"
_WHOLE = "model.safetensors"


def beside(merged: TensorStore) -> Iterator[Entry]:
    """Entries for files of the merged model's folder that make it another model where it is loaded.

    Source: transformers 5.24, ``PreTrainedModel.from_pretrained``; mlx-lm 0.31, ``load_model``.
    """
    if merged.folder is None:
        return
    if (merged.folder / _ADAPTER).exists() and any(merged.folder.glob("adapter_model.*")):
        text = (
            "an adapter lies beside the merged weights: transformers adds it to them when it loads "
            "the folder, so that it acts twice; move it elsewhere"
        )
        yield Entry(_ADAPTER, "wrong", text, mistake="adapter-beside")
    for index in merged.folder.glob(f"*{INDEX}"):
        yield from _beside_shards(merged, merged.folder, index)


def _beside_shards(merged: TensorStore, folder: Path, index: Path) -> Iterator[Entry]:
    """Weights in a folder of shards that the index does not name."""
    named = {*read_index(index).values()}
    others = [p.name for p in folder.glob("model*.safetensors") if p.name not in named]
    if _WHOLE in others and not _is_same(merged, folder / _WHOLE):
        text = (
            f"it lies beside {index.name}, and holds other weights than the shards: transformers "
            "loads this file and no shard; remove what is out of date"
        )
        yield Entry(_WHOLE, "wrong", text, mistake="stale-weights")
    elif others:
        text = (
            f"{listed(others)} lie beside the shards that {index.name} names: mlx-lm reads every "
            "model*.safetensors; remove them"
        )
        yield Entry("files", "doubtful", text, {"files": len(others)}, "stale-weights")


def _is_same(merged: TensorStore, path: Path) -> bool:
    """Whether the file has the tensors of the model, bit for bit."""
    try:
        other = open_tensors(path)
    except FormatError:
        return False
    return {*merged} == {*other} and all(
        merged[name].has_bits_of(other[name], *at)
        for name in merged
        for at in merged[name].blocks()
    )
