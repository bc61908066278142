"""llama.cpp's adapters: names of its own, rows of q and k in its order, one alpha."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from minilora.audit.adapters.factors import Factors, Found, checked
from minilora.audit.containers.gguf import Names, is_permuted
from minilora.audit.result import Entry
from minilora.audit.stored.gguf import open_gguf
from minilora.audit.stored.module import Held, OpenModule
from minilora.audit.tensors import TensorStore
from minilora.io.errors import FormatError
from minilora.io.formats.gguf.contents import Contents
from minilora.io.formats.gguf.names import file_rows
from minilora.spec.ops import Array


def read(file: Path, base: TensorStore) -> Found:
    """The adapter in a GGUF file; an alpha that is absent or 0 means s = 1.

    Errors: FormatError for a damaged file, for what is no LoRA, and for quantized factors.
    """
    opened = open_gguf(file)
    if (kind := opened.settings.get("adapter.type")) != "lora":
        raise FormatError(file, "adapter.type", kind, "lora", "is it an adapter?")
    found = Found(opened.settings)
    contents = Contents(file)
    names = Names(contents, len(contents.tensors))
    for module in opened.modules:
        if module.parts.keys() != {"A", "B"}:
            parts = ", ".join(held.name for held in module.parts.values())
            text = f"found {parts}, expected lora_a and lora_b"
            found.entries.append(Entry(module.name, "wrong", text))
            continue
        found.factors.append(_factors(file, names, module, base))
    for name, reason in opened.others.items():
        found.entries.append(Entry(name, "wrong", reason))
    return found


def _factors(file: Path, names: Names, opened: OpenModule, base: TensorStore) -> Factors:
    name = f"{opened.name}.weight"
    module = names.huggingface(name).removesuffix(".weight")
    readers = {part: _reader(file, held) for part, held in opened.parts.items()}
    shapes = {part: held.shape for part, held in opened.parts.items()}
    r = shapes["B"][-1]
    if is_permuted(names.architecture, name):
        key = "num_key_value_heads" if ".attn_k." in name else "num_attention_heads"
        heads = base.settings.get(key, base.settings.get("num_attention_heads"))
        if type(heads) is int and heads > 0 and shapes["B"][0] % (2 * heads) == 0:
            readers["B"] = _ordered(readers["B"], np.argsort(file_rows(heads, shapes["B"][0])))
    s = 1.0 if opened.scale is None else opened.scale
    config = {"r": r, "lora_alpha": opened.config["lora_alpha"] or r, "peft_type": "gguf"}
    return Factors(module, readers, shapes, s, config=config)


def _reader(file: Path, held: Held) -> Callable[[], Array]:
    if held.scheme is not None:
        remedy = "write the adapter in F32 or F16"
        raise FormatError(file, held.name, f"type {held.scheme}", "F32, F16, BF16", remedy)
    return checked(file, held)


def _ordered(read: Callable[[], Array], order: Array) -> Callable[[], Array]:
    return lambda: read()[order]
