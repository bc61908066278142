"""llama.cpp's adapters in GGUF files by names alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from minilora.audit.containers.gguf import Rows
from minilora.audit.stored.module import Held, OpenAdapter, OpenModule
from minilora.io.errors import FormatError
from minilora.io.files import WEIGHT_DTYPES
from minilora.io.formats.gguf.adapter import ALPHA
from minilora.io.formats.gguf.blocks import check_tensor
from minilora.io.formats.gguf.contents import Contents
from minilora.spec.ops import Array

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
        step = None if a.spacing is None else _turned(a.spacing)
        turned = Held(a.name, a.dtype, a.shape[::-1], _turned(a.read), None, step, a.scheme)
        parts = parts | {"A": turned}
    r = parts["B"].shape[-1] if "B" in parts else 1
    kind = "embedding" if name == EMBEDDING else "linear"
    scale = alpha / r if alpha else 1.0
    return OpenModule(name, parts, kind, scale, config={"r": r, "lora_alpha": alpha})


def _turned(read: Callable[[], Array]) -> Callable[[], Array]:
    return lambda: read().T


def _held(contents: Contents, name: str) -> Held:
    tensor = contents.tensors[name]
    check_tensor(contents, name, tensor.shape)
    dtype, rows = WEIGHT_DTYPES.get(tensor.kind), Rows(contents, name, tensor.shape, None)
    m = tensor.shape[0]
    if dtype is not None:
        return Held(name, dtype, tensor.shape, lambda: rows.read(0, m), rows.read)
    kind = tensor.kind.lower()
    return Held(
        name,
        np.dtype(np.float32),
        tensor.shape,
        lambda: rows.read(0, m),
        rows.read,
        lambda: rows.step(0, m),
        kind,
    )
