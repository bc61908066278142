"""The `Format` of llama.cpp's GGUF files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minilora.io.formats.format import AdapterWeights, Base, Format, LoadedModel, ReadOptions
from minilora.io.formats.gguf.adapter import VARIANTS, read_adapter, write_adapter
from minilora.io.formats.gguf.read import generation_settings, origin, read_model
from minilora.io.formats.gguf.tokenizer import read_tokenizer
from minilora.io.formats.gguf.write import CONTEXT, write_model
from minilora.spec.lora import Params
from minilora.spec.models import Config


def _read_model(path: Path, options: ReadOptions) -> LoadedModel:
    return LoadedModel(*read_model(path, options.dtype, options.keep_quantized))


def _write_model(
    path: Path, c: Config, W: Params, base: Base, labels: Sequence[str] | None
) -> list[str]:
    like = base.path if base.format is FORMAT else None
    context = base.generation_settings.get("max_position_embeddings", CONTEXT)
    write_model(path, c, W, like=like, context=context)
    notes = []
    if any(np.asarray(W[name]).dtype == np.float64 for name in W):
        notes.append("in float32, the widest that llama.cpp computes with")
    if like is None:
        notes.append(f"no tokenizer in it: {base.name} has none of a GGUF file's")
    return notes


def _read_adapter(path: Path, c: Config, dtype: Any, base: Params) -> AdapterWeights:
    return AdapterWeights(*read_adapter(path, c, dtype))


def _write_adapter(path: Path, c: Config, adapter: AdapterWeights, base: Base) -> list[str]:
    folded = write_adapter(path, c, adapter.weights, adapter.tuning)
    return [f"B of {at} was multiplied by {factor:g}" for at, factor in folded.items()]


FORMAT = Format(
    name="gguf",
    library="llama.cpp",
    suffix=".gguf",
    read_model=_read_model,
    read_tokenizer=read_tokenizer,
    generation_settings=generation_settings,
    origin=origin,
    write_model=_write_model,
    read_adapter=_read_adapter,
    write_adapter=_write_adapter,
    variants=VARIANTS,
    scaling="llama.cpp: --lora-scaled times alpha / r; {scales} at 1",
)
