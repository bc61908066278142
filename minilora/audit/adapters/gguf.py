"""llama.cpp's adapters: names of its own, rows of q and k in its order, one alpha."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from minilora.audit.adapters.factors import Factors, Found
from minilora.audit.containers.gguf import Names, is_permuted
from minilora.audit.result import Entry
from minilora.audit.tensors import TensorStore
from minilora.io.errors import FormatError
from minilora.io.files import NOT_FINITE, WEIGHT_DTYPES, check_finite
from minilora.io.formats.gguf.adapter import ALPHA
from minilora.io.formats.gguf.contents import Contents, Tensor
from minilora.io.formats.gguf.names import file_rows
from minilora.io.header import Place
from minilora.spec.lora import scale
from minilora.spec.ops import Array


def read(file: Path, base: TensorStore) -> Found:
    """The adapter in a GGUF file; an alpha that is absent or 0 means s = 1.

    Errors: FormatError for a damaged file, for what is no LoRA, and for quantized factors.
    """
    contents = Contents(file)
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        if contents.get(key) != expected:
            raise FormatError(file, key, contents.get(key), expected, "is it an adapter?")
    alpha = contents.get(ALPHA, 0.0)
    if type(alpha) is not float or not math.isfinite(alpha):
        raise FormatError(file, ALPHA, alpha, "a number in float32", "write it again")
    found = Found({key: contents[key] for key in contents if key.startswith("adapter.")})
    names = Names(contents, len(contents.tensors))
    modules: dict[str, dict[str, Tensor]] = {}
    for place, tensor in contents.tensors.items():
        name, _, part = place.rpartition(".lora_")
        modules.setdefault(name, {})[part.upper()] = tensor
    for name, parts in modules.items():
        if parts.keys() != {"A", "B"}:
            text = f"found {', '.join(parts) or name}, expected lora_a and lora_b"
            found.entries.append(Entry(name, "wrong", text))
            continue
        found.factors.append(_factors(contents, names, name, parts, alpha, base))
    return found


def _factors(
    contents: Contents, names: Names, name: str, parts: dict[str, Tensor], alpha: float,
    base: TensorStore,
) -> Factors:  # fmt: skip
    module = names.huggingface(name).removesuffix(".weight")
    readers = {
        part: _reader(contents, f"{name}.lora_{part.lower()}", t) for part, t in parts.items()
    }
    shapes = {part: tensor.shape for part, tensor in parts.items()}
    r = shapes["B"][-1]
    if len(shapes["A"]) == 2 and shapes["A"][0] != r and shapes["A"][1] == r:  # of a table
        readers["A"] = _turned(readers["A"])
        shapes["A"] = shapes["A"][::-1]
    if is_permuted(names.architecture, name):
        key = "num_key_value_heads" if ".attn_k." in name else "num_attention_heads"
        heads = base.settings.get(key, base.settings.get("num_attention_heads"))
        if type(heads) is int and heads > 0 and shapes["B"][0] % (2 * heads) == 0:
            readers["B"] = _ordered(readers["B"], np.argsort(file_rows(heads, shapes["B"][0])))
    config = {"r": r, "lora_alpha": alpha or r, "peft_type": "gguf"}
    return Factors(module, readers, shapes, float(scale(alpha or float(r), max(r, 1))),
                   config=config)  # fmt: skip


def _reader(contents: Contents, name: str, tensor: Tensor) -> Callable[[], Array]:
    dtype = WEIGHT_DTYPES.get(tensor.kind)
    if dtype is None:
        remedy = "write the adapter in F32 or F16"
        raise FormatError(contents.path, name, f"type {tensor.kind}", "F32, F16, BF16", remedy)
    place = Place(contents.path, name, dtype, tensor.shape, tensor.start)
    return lambda: check_finite(place.path, name, place.rows(0, tensor.shape[0]), NOT_FINITE)


def _turned(read: Callable[[], Array]) -> Callable[[], Array]:
    return lambda: read().T


def _ordered(read: Callable[[], Array], order: Array) -> Callable[[], Array]:
    return lambda: read()[order]
