"""Models in GGUF files, by their Hugging Face names and in the layouts of those."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from minilora.audit.tensors import StoredTensor, TensorStore
from minilora.io.architectures import ARCHITECTURES, architecture_of
from minilora.io.errors import FormatError
from minilora.io.files import WEIGHT_DTYPES
from minilora.io.formats.gguf.blocks import Blocks, expands
from minilora.io.formats.gguf.contents import Contents, Tensor, library
from minilora.io.formats.gguf.names import file_rows
from minilora.io.formats.gguf.read import read_config
from minilora.io.formats.gguf.rope import FACTORS
from minilora.io.header import Place
from minilora.spec.ops import Array

_PERMUTED = {
    *(a.gguf_name for a in ARCHITECTURES.values() if a.permuted),
    *("deci", "minicpm", "xverse", "internlm2", "arctic", "granite", "granitemoe", "olmo"),
    "arcee",
}
"""The architectures of which llama.cpp's converter orders the rows of q and k otherwise."""

_ONE_ADDED = {a.gguf_name for a in ARCHITECTURES.values() if a.gguf and a.gguf.one_added}
"""The architectures whose norms are stored as 1 + w."""

_TRANSPOSED = {a.gguf_name: {*a.block.values()} for a in ARCHITECTURES.values() if a.transposed}
"""The architectures whose projections lie (in, out) in Hugging Face's files, and not here."""

_CODES: Mapping[str, tuple[tuple[int, int, int], ...]] = {
    "Q8_0": ((2, 34, 0x01),),
    "Q4_0": ((2, 18, 0x11),),
    "Q4_1": ((4, 20, 0x11),),
    "Q5_0": ((2, 6, 0), (6, 22, 0x11)),
    "Q5_1": ((4, 8, 0), (8, 24, 0x11)),
    "Q2_K": ((16, 80, 0x55),),
    "Q3_K": ((0, 32, 0), (32, 96, 0x55)),
    "Q4_K": ((16, 144, 0x11),),
    "Q5_K": ((16, 48, 0), (48, 176, 0x11)),
    "Q6_K": ((0, 128, 0x11), (128, 192, 0)),
}
"""Where the codes lie in a block of each type, and the byte in which each code is 1."""

_SETTINGS = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}
"""Metadata that say what settings of ``config.json`` say."""


def open_gguf(path: Path) -> TensorStore:
    """The tensors of a GGUF model, by llama.cpp's table of names.

    The rows of a Llama's q and k, and a GPT-2's projections, come in Hugging Face's layout.

    Errors: FormatError for a damaged file, an adapter, an unknown architecture, or a type of blocks
    that is not expanded; ImportError without the library gguf.
    """
    contents = Contents(path)
    kind = contents.get("general.type", "model")
    if kind != "model":
        raise FormatError(path, "general.type", kind, "model", "give an adapter by --adapter")
    parts = _parts(contents)
    everything = {place: part for part in parts for place in part.tensors}
    names = Names(contents, None, len(everything))
    tensors: dict[str, StoredTensor] = {}
    for place, part in everything.items():
        name, tensor = names.huggingface(place), part.tensors[place]
        if len(tensor.shape) == 3 and ".experts." in name:
            tensors |= _one_by_one(part, names, name, place, tensor)
        else:
            tensors[name] = _stored(part, names, name, place, tensor)
    settings = _settings(contents, names, "output.weight" not in everything)
    factors = tensors.pop(FACTORS, None)  # a setting elsewhere, and no weight
    if factors is not None and "rope_parameters" not in settings:
        settings["rope_factors"] = factors.rows(0, factors.length).tolist()

    def alias(name: str) -> str | None:
        expert = _EXPERT.search(name)
        gguf_name = names.gguf(_EXPERT.sub(".experts.", name))
        if gguf_name is None:
            return None
        found = names.huggingface(gguf_name)
        return found.replace(".experts.", expert[0]) if expert else found

    return TensorStore(path, "gguf", tensors, settings, None, alias)


def _parts(first: Contents) -> list[Contents]:
    """The files that the model is split into, of which this is the first.

    Errors: FormatError for another than the first, and for parts that are missing.
    """
    count = first.get("split.count", 1)
    if count in (0, 1):
        return [first]
    match = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", first.path.name)
    if type(count) is not int or match is None or int(match[2]) != count:
        expected = f"the first of {count} files, NAME-00001-of-{count:05}.gguf"
        remedy = "give that, or join the parts with llama-gguf-split --merge"
        raise FormatError(first.path, "split.count", first.path.name, expected, remedy)
    stem, rest = match[1], range(2, count + 1)
    names = [f"{stem}-{i:05}-of-{count:05}.gguf" for i in rest]
    return [first, *(Contents(first.path.with_name(name)) for name in names)]


_EXPERT = re.compile(r"\.experts\.\d+\.")


def _one_by_one(
    contents: Contents, names: Names, name: str, place: str, tensor: Tensor
) -> dict[str, StoredTensor]:
    """Each expert's matrix, as Hugging Face's files have them one by one."""
    experts, m, n = tensor.shape
    every = _stored(contents, names, name, place, replace(tensor, shape=(experts * m, n)))
    found = {}
    for e in range(experts):
        own = name.replace(".experts.", f".experts.{e}.")
        read = partial(_below, every.read, e * m)
        step = None if every.step is None else partial(_below, every.step, e * m)
        nbytes = every.nbytes // experts
        codes = None if every.codes is None else partial(_below, every.codes, e * m)
        found[own] = StoredTensor(own, every.dtype, (m, n), nbytes, read, every.scheme, step, codes)
    return found


def _below(read: Callable[[int, int], Any], first: int, start: int, stop: int) -> Any:
    """Rows of a part that begins at row ``first``."""
    return read(first + start, first + stop)


class Names:
    """Names in a GGUF file and in Hugging Face's, by the library's table.

    ``layers``: how many there are; None where the metadata say it: ``most`` of them at most.
    """

    def __init__(self, contents: Contents, layers: int | None, most: int = 0) -> None:
        gguf, self.metadata = library(), contents
        found = contents.get("general.architecture")
        known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        if not isinstance(found, str) or found not in known:
            remedy = "a newer release of gguf may know it"
            expected = "an architecture that gguf knows"
            raise FormatError(contents.path, "general.architecture", found, expected, remedy)
        self.architecture: str = found
        if layers is None:
            layers = contents.get(f"{self.architecture}.block_count")
        if type(layers) is not int or not 0 <= layers <= max(most, len(contents.tensors)):
            expected = "no more layers than tensors"
            remedy = "the file is incomplete"
            raise FormatError(contents.path, "block_count", layers, expected, remedy)
        self.table = gguf.get_tensor_name_map(known[self.architecture], layers)
        self.paths = self._paths(layers)

    def _paths(self, layers: int) -> dict[str, str]:
        """The module that each name in the file stands for: of several the likeliest."""
        likely = [a for a in ARCHITECTURES.values() if a.gguf_name == self.architecture]
        own = {path for a in likely for path in a.outer.values()}
        stems = tuple(f"{a.blocks}." for a in likely) or ("model.layers.",)
        ends = {end for a in likely for end in a.block.values()}

        def rank(path: str) -> int:
            if path in own or (path.startswith(stems) and path.split(".", 3)[-1] in ends):
                return 0
            return 1 if path.startswith(("model.layers.", "model.embed", "model.norm")) else 2

        best: dict[str, str] = {}
        for path, (_, name) in self.table.mapping.items():
            if path != name and (name not in best or rank(path) < rank(best[name])):
                best[name] = path
        if "output" in best:
            best["output"] = "lm_head"
        best.pop("rope_freqs", None)  # no tensor of Hugging Face's
        return best

    def huggingface(self, name: str) -> str:
        """The name in Hugging Face's files; the file's own where the table has none."""
        module, _, part = name.rpartition(".")
        return f"{self.paths[module]}.{part}" if module in self.paths else name

    def gguf(self, name: str) -> str | None:
        """The name in the file of a tensor of Hugging Face's."""
        module, _, part = name.rpartition(".")
        found = self.table.get_name(module)
        return None if found is None else f"{found}.{part}"


def _settings(contents: Contents, names: Names, tied: bool) -> dict[str, Any]:
    """What the metadata say, by the names of ``config.json``."""
    architecture = names.architecture
    settings: dict[str, Any] = {"model_type": architecture, "tie_word_embeddings": tied}
    for key, name in _SETTINGS.items():
        value = contents.get(f"{architecture}.{key}")
        if isinstance(value, int | float):
            settings[name] = value
    with suppress(FormatError):  # a model that is audited and not computed with
        c = read_config(contents)
        settings |= architecture_of(c).write_settings(c)
    if architecture != "bert":
        settings["architectures"] = [f"{architecture}ForCausalLM"]
    return settings


def _stored(
    contents: Contents, names: Names, name: str, place: str, tensor: Tensor
) -> StoredTensor:
    """The tensor in Hugging Face's layout."""
    nbytes, shape = tensor.end - tensor.start, tensor.shape
    dtype = WEIGHT_DTYPES.get(tensor.kind)
    order = _order(names, place, shape)
    if dtype is not None and order is None:
        read: Callable[[int, int], Array] = Place(
            contents.path, place, dtype, shape, tensor.start
        ).rows
        step = None
    else:
        if dtype is None and (tensor.kind not in _CODES or not expands(tensor.kind)):
            expected = f"F64, F32, F16, BF16 or one of {', '.join(_CODES)}"
            remedy = "its blocks are not judged here: quantize the model to another type"
            raise FormatError(contents.path, place, f"type {tensor.kind}", expected, remedy)
        rows = Rows(contents, place, shape, order)
        read, step = rows.read, None if dtype is not None else rows.step
    if names.architecture in _ONE_ADDED and name.endswith("norm.weight"):
        read = partial(_without_one, read)
    scheme = None if dtype is not None else tensor.kind.lower()
    codes = None if scheme is None else rows.codes
    own = dtype or np.dtype(np.float32)
    stored = StoredTensor(name, own, shape, nbytes, read, scheme, step, codes)
    return _transposed(stored) if _lies_transposed(names.architecture, name) else stored


def _without_one(read: Callable[[int, int], Array], start: int, stop: int) -> Array:
    """The weights of norms that are stored as 1 + w."""
    stored: Array = read(start, stop)
    return stored - 1


def is_permuted(architecture: str, place: str) -> bool:
    """Whether llama.cpp orders the rows of this tensor otherwise: q and k of some architectures."""
    return architecture in _PERMUTED and bool({"attn_q", "attn_k"} & {*place.split(".")})


def _order(names: Names, place: str, shape: tuple[int, ...]) -> Array | None:
    """Where in the file each row of the weight or the bias is, or None if as in Hugging Face's."""
    contents, architecture = names.metadata, names.architecture
    if not is_permuted(architecture, place):
        return None
    heads = contents.get(f"{architecture}.attention.head_count")
    if place.split(".")[-2] == "attn_k":
        heads = contents.get(f"{architecture}.attention.head_count_kv", heads)
    if isinstance(heads, list):  # one for each layer
        layer = int(place.split(".")[1])
        heads = heads[layer] if layer < len(heads) else None
    if type(heads) is not int or heads < 1 or shape[0] % (2 * heads):
        expected = f"a number of heads that share {shape[0]} rows evenly"
        remedy = "the metadata are another model's"
        raise FormatError(contents.path, "attention.head_count", heads, expected, remedy)
    order: Array = np.argsort(file_rows(heads, shape[0]))
    return order


class Rows:
    """Rows of a tensor in blocks, or in another order."""

    def __init__(
        self, contents: Contents, place: str, shape: tuple[int, ...], order: Array | None
    ) -> None:
        m = math.prod(shape[:-1])
        self.blocks = Blocks(contents, place, (m, shape[-1]), np.float32, order)
        self.blocks.checked = True  # the audit tells what is not finite
        self.shape, self.order = shape, order
        self.dtype = WEIGHT_DTYPES.get(self.blocks.tensor.kind)
        self.each = m // shape[0]

    def read(self, start: int, stop: int) -> Array:
        """Rows start … stop, expanded."""
        rows = slice(start * self.each, stop * self.each)
        if self.dtype is not None:
            data = self.blocks.data[rows if self.order is None else self.order[rows]]
            return np.ascontiguousarray(data).view(self.dtype).reshape(-1, *self.shape[1:])
        return self.blocks.rows(rows).reshape(-1, *self.shape[1:])

    def codes(self, start: int, stop: int) -> list[Array]:
        """The bytes of rows start … stop."""
        rows = slice(start * self.each, stop * self.each)
        return [self.blocks.data[rows if self.order is None else self.order[rows]]]

    def step(self, start: int, stop: int) -> Array:
        """How far apart the numbers lie that the blocks can store.

        It is what a block with codes of 1 has more than one with codes of 0.
        """
        gguf, kind = library(), self.blocks.tensor.kind
        (data,) = self.codes(start, stop)
        number = gguf.GGMLQuantizationType[kind]
        size = gguf.GGML_QUANT_SIZES[number][1]
        values = []
        for one in (0, 1):
            blocks = data.reshape(-1, size).copy()
            for first, last, byte in _CODES[kind]:
                blocks[:, first:last] = byte * one
            values.append(gguf.quants.dequantize(blocks.reshape(data.shape), number))
        gap: Array = abs(values[1] - values[0])
        return gap.reshape(-1, *self.shape[1:])


def _lies_transposed(architecture: str, name: str) -> bool:
    ends = _TRANSPOSED.get(architecture, set())
    module = name.removesuffix(".weight")
    inner = (end for end in ends if not end.startswith("ln"))
    return module != name and any(module.endswith(f".{end}") for end in inner)


def _transposed(stored: StoredTensor) -> StoredTensor:
    """The tensor as its transpose, of which the last that was read is kept."""

    def whole(read: Callable[[int, int], Any]) -> Callable[[int, int], Array]:
        cached = lru_cache(maxsize=1)(lambda: np.ascontiguousarray(read(0, stored.shape[0]).T))
        return lambda start, stop: cached()[start:stop]

    return StoredTensor(
        stored.name, stored.dtype, stored.shape[::-1], stored.nbytes, whole(stored.read),
        stored.scheme, None if stored.step is None else whole(stored.step),
    )  # fmt: skip
