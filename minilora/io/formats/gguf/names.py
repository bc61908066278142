"""What GGUF calls modules and settings, and in which order the rows of a weight lie there."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from minilora.io.architectures import (
    ARCHITECTURES,
    Architecture,
    architecture_of,
    is_vector,
    module_paths,
)
from minilora.io.errors import FormatError
from minilora.io.formats.gguf.contents import Contents, library
from minilora.spec.models import Config
from minilora.spec.ops import Array

READER = "llama.cpp takes"
"""Who computes with the weights, for error messages."""

KEYS: Mapping[str, str] = {
    "d": "embedding_length",
    "layers": "block_count",
    "heads": "attention.head_count",
    "ffn": "feed_forward_length",
}
"""A configuration's fields and what GGUF calls them, in every architecture."""

SPECIAL = ("vocab_size", "attention.key_length", "attention.value_length", "rope.dimension_count")
INERT = "context_length tensor_data_layout rope.scaling.original_context_length"
FIXED: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (1.0,),
    "rope.scale_linear": (1.0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
}
"""Settings under an architecture's name: read by code; without effect; with one allowed value."""

TOKENS = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "pad": "padding",
    "sep": "seperator",
    "eot": "eot",
    "eom": "eom",
}
"""Special tokens and their names in GGUF, with its spelling."""


def known_architectures() -> dict[str, Architecture]:
    """The architectures that llama.cpp has, by their names there."""
    return {a.gguf_name: a for a in ARCHITECTURES.values() if a.gguf is not None}


def architecture_in(contents: Contents) -> Architecture:
    """The architecture of a file that holds what it should."""
    known, name = known_architectures(), contents.get("general.architecture")
    if not isinstance(name, str) or name not in known:
        expected, remedy = f"one of {', '.join(known)}", "no other is implemented for GGUF"
        raise FormatError(contents.path, "general.architecture", name, expected, remedy)
    return known[name]


def file_rows(heads: int, rows: int) -> Array:
    """Which row of the weight each row of llama.cpp's is: pair j of a head is its rows 2j, 2j + 1.

    Here the two of a pair lie half a head apart. ``argsort`` of it is the way back.

    Shapes: -> (rows,).
    """
    order: Array = np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()
    return order


def row_order(c: Config, at: str, m: int) -> Array | None:
    """:func:`file_rows` of the module, or None if its rows lie as here."""
    if at.endswith(architecture_of(c).permuted):
        return file_rows(c.heads if at.endswith(".q") else getattr(c, "kv_heads", c.heads), m)
    return None


def places(c: Config) -> dict[str, str]:
    """Internal module name -> the module's name in GGUF, as the library has it.

    Errors: FormatError for an architecture that llama.cpp does not have; ImportError where the
    installed gguf is older than it.
    """
    a = architecture_of(c)
    if a.gguf is None:
        remedy = "a pooler or classifier has no place there: keep Hugging Face's or PEFT's"
        known = ", ".join(known_architectures())
        raise FormatError("GGUF", "architecture", a.model_type, known, remedy)
    gguf = library()
    number = next((n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == a.gguf_name), None)
    if number is None:
        remedy = "python -m pip install --upgrade 'minilora[gguf]'"
        raise ImportError(f"the installed gguf does not know {a.gguf_name}: {remedy}")
    table = gguf.get_tensor_name_map(number, 1)
    first = {at: table.get_name(path) for at, path in module_paths(replace(c, layers=1)).items()}
    named = {at: name for at, name in first.items() if not at.startswith("layers.")}
    for at in first.keys() - named.keys():
        named |= {
            at.replace(".0.", f".{i}."): first[at].replace(".0.", f".{i}.") for i in range(c.layers)
        }
    return {at: named[at] for at in module_paths(c)}


def setting_names(a: Architecture) -> dict[str, str]:
    """A configuration's fields and what GGUF calls them."""
    return {**KEYS, **(a.gguf.keys if a.gguf else {})}


def one_added(c: Config, name: str) -> bool:
    """Whether the file has 1 + w in this parameter's place."""
    gguf = architecture_of(c).gguf
    return bool(gguf and gguf.one_added) and is_vector(name)


def weight_order(c: Config, name: str, m: int) -> Array | None:
    """Where in the file each of the weight's m rows is, or None."""
    at, _, part = name.rpartition(".")
    order = row_order(c, at, m) if part == "weight" else None
    return None if order is None else np.argsort(order)
