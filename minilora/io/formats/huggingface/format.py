"""The `Format` of Hugging Face's model folders."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minilora.io.errors import FormatError
from minilora.io.files import read_json
from minilora.io.formats.format import Base, Format, LoadedModel, ReadOptions
from minilora.io.formats.huggingface.config import CONFIG, generation_settings, read_labels
from minilora.io.formats.huggingface.model import headless, read_encoder, read_model, write_model
from minilora.io.formats.huggingface.tokenizer import TOKENIZER_FILES, copy_tokenizer
from minilora.io.formats.tokenizers import read_tokenizer
from minilora.spec.lora import Params
from minilora.spec.models import Config


def _read(path: Path, options: ReadOptions) -> LoadedModel:
    if headless(path):
        return LoadedModel(*read_encoder(path, options.classes, options.dtype))
    return LoadedModel(*read_model(path, options.dtype), read_labels(path))


def _write(path: Path, c: Config, W: Params, base: Base, labels: Sequence[str] | None) -> list[str]:
    weights = {name: np.asarray(W[name]) for name in W}
    write_model(path, c, weights, labels=labels, kept=base.generation_settings)
    try:
        copy_tokenizer(base, path)
    except (FormatError, ImportError) as error:  # a model can do without
        return [f"no tokenizer beside the model: {error}"]
    return []


def _files(path: Path) -> list[Path]:
    files = {*(path / name for name in (CONFIG, *TOKENIZER_FILES)), *path.glob("*.safetensors")}
    return [file for file in sorted(files) if file.is_file()]


def _origin(path: Path) -> str | None:
    """What transformers 4 wrote as ``_name_or_path``, if that is a name and no folder."""
    name = read_json(path / CONFIG).get("_name_or_path")
    return name if isinstance(name, str) and name.count("/") == 1 and name[0] not in "./" else None


FORMAT = Format(
    name="huggingface",
    library="transformers",
    model_file=CONFIG,
    read_model=_read,
    read_tokenizer=read_tokenizer,
    generation_settings=generation_settings,
    origin=_origin,
    files=_files,
    write_model=_write,
)
