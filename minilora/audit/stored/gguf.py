"""llama.cpp's adapters in GGUF files by names alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minilora.audit.stored.module import Held, OpenAdapter, OpenModule
from minilora.io.errors import FormatError
from minilora.io.formats.gguf.adapter import ALPHA, OWN_DTYPES
from minilora.io.formats.gguf.blocks import Blocks, check_tensor
from minilora.io.formats.gguf.contents import Contents
from minilora.spec.ops import Array
from minilora.spec.quantization import F32

EMBEDDING = "token_embd"


def open_gguf(file: Path) -> OpenAdapter:
    """The adapter in a GGUF file; an alpha that is absent or 0 means s = 1.

    Errors: FormatError for a damaged file, and for what is no adapter.
    """
    contents = Contents(file)
    if contents.get("general.type") != "adapter":
        remedy = "is it a model? an audit of models takes it as that"
        raise FormatError(file, "general.type", contents.get("general.type"), "adapter", remedy)
    alpha = contents.get(ALPHA, 0.0)
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise FormatError(file, ALPHA, alpha, "a number", "write it again")
    grouped: dict[str, dict[str, Held]] = {}
    others = {}
    for name in contents.tensors:
        place, _, part = name.rpartition(".lora_")
        if part in ("a", "b") and place.endswith(".weight"):
            module = place.removesuffix(".weight")
            grouped.setdefault(module, {})[part.upper()] = _held(contents, name)
        elif name.endswith("_norm.weight"):
            module = name.removesuffix(".weight")
            grouped.setdefault(module, {})["weight"] = _held(contents, name)
        else:
            others[name] = "llama.cpp refuses a file with it"
    settings = {
        key: contents[key]
        for key in contents
        if key.startswith("adapter.") or key in ("general.architecture", "general.type")
    }
    modules = [_module(name, parts, float(alpha)) for name, parts in grouped.items()]
    return OpenAdapter(file, "gguf", settings, modules, others)


def _module(name: str, parts: dict[str, Held], alpha: float) -> OpenModule:
    if not {"A", "B"} & parts.keys():
        return OpenModule(name, parts, "saved", None)
    if name == EMBEDDING and "A" in parts:  # A lies (tokens, r) there
        a = parts["A"]
        parts = parts | {"A": Held(a.name, a.dtype, a.shape[::-1], lambda: a.read().T, a.spacing)}
    r = parts["B"].shape[-1] if "B" in parts else 1
    kind = "embedding" if name == EMBEDDING else "linear"
    scale = alpha / r if alpha else 1.0
    return OpenModule(name, parts, kind, scale, config={"r": r, "lora_alpha": alpha})


def _held(contents: Contents, name: str) -> Held:
    tensor = contents.tensors[name]
    check_tensor(contents, name, tensor.shape)
    dtype = OWN_DTYPES.get(tensor.kind, np.dtype(F32))
    spacing = None if tensor.kind in ("F32", "F16", "BF16", "F64") else _spacing(contents, name)
    return Held(name, dtype, tensor.shape, _reader(contents, name, dtype), spacing)


def _reader(contents: Contents, name: str, dtype: Any) -> Callable[[], Array]:
    shape = contents.tensors[name].shape
    flat = (math.prod(shape[:-1]), shape[-1])
    return lambda: Blocks(contents, name, flat, F32)().reshape(shape).astype(dtype)


def _spacing(contents: Contents, name: str) -> Callable[[], Array]:
    """How far apart the numbers of each entry's block lie, by the block's greatest distance.

    A block of b bits has 2^b steps at most between its ends, so that ends / 2^(b-1) bounds a step;
    of blocks of 32 the ends are found in the numbers themselves.
    """

    def steps() -> Array:
        tensor = contents.tensors[name]
        flat = (math.prod(tensor.shape[:-1]), tensor.shape[-1])
        values = np.abs(Blocks(contents, name, flat, F32)())
        blocks = values.reshape(len(values), -1, 32).max(2, keepdims=True)
        bits = int(next((sign for sign in tensor.kind if sign.isdigit()), "2"))
        each = np.broadcast_to(blocks / 2.0 ** (bits - 1), (*blocks.shape[:2], 32))
        return each.reshape(tensor.shape)

    return steps
