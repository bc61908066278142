"""mlx-lm's folders by names alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from minilora.audit.stored.module import Held, OpenAdapter, OpenModule
from minilora.audit.stored.places import held_in
from minilora.io.errors import FormatError
from minilora.io.files import read_json
from minilora.io.formats.mlx import CONFIG, PARTS, WEIGHTS
from minilora.io.formats.values import Fits, is_integer, is_list, is_number, is_text

_FITS: Mapping[str, Fits] = {
    "rank": is_integer(1),
    "alpha": is_number,
    "keys": is_list(is_text),
}
_REMEDY = "write it as mlx-lm does"
_PART_OF = {name: part for part, (name, _) in PARTS.items()}


def open_mlx(folder: Path) -> OpenAdapter:
    """The adapter in a folder of mlx-lm's; its factors lie as a (n, r) and b (r, m).

    Errors: FormatError for damaged files, and without a scale.
    """
    settings = read_json(folder / CONFIG)
    parameters = settings.get("lora_parameters")
    full = settings.get("fine_tune_type") == "full"
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not full and (
        not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale)
    ):
        expected = "a number in lora_parameters"
        raise FormatError(folder / CONFIG, "scale", scale, expected, "is it mlx-lm's?")
    for key, fits in _FITS.items():
        value = parameters.get(key) if isinstance(parameters, dict) else None
        if value is not None and not fits(value):
            raise FormatError(folder / CONFIG, key, json.dumps(value), "another kind", _REMEDY)
    grouped: dict[str, dict[str, Held]] = {}
    others = {}
    tensors = held_in(folder / WEIGHTS)
    for name, held in tensors.items():
        module, _, last = name.rpartition(".")
        part = _PART_OF.get(last) or (last if full else "")
        if part:
            grouped.setdefault(module, {})[part] = held
        else:
            others[name] = "no parameter of an adapter that mlx-lm knows"
    modules = [_module(module, parts, scale) for module, parts in grouped.items()]
    names = frozenset(path.name for path in folder.iterdir())
    return OpenAdapter(folder, "mlx", settings, modules, others, names, tensors)


def _module(name: str, parts: dict[str, Held], scale: float | None) -> OpenModule:
    """Of an embedding a (tokens, r) and b (r, features) lie as they are looked up."""
    if not {"A", "B"} & parts.keys():
        return OpenModule(name, parts, "saved", None)
    table = name.rpartition(".")[2] in ("embed_tokens", "wte", "wpe", "word_embeddings")
    experts = len(parts["A"].shape) == 3 if "A" in parts else False
    kind = "embedding" if table else "expert" if experts else "linear"
    return OpenModule(name, parts, kind, scale, transposed=True)
