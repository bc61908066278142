"""GGUF files, as llama.cpp reads them: models of any tensor type, tokenizers, and LoRA adapters.

A model's matrices stay in the file, mapped; what is asked for is expanded, and forgotten again.
The library `gguf` knows types, names and block formats; the header is walked here, because a count
or a length in it has to be checked against the file before memory is taken for it.
Source: the GGUF specification of GGML, versions 2 and 3; llama.cpp's converters for the layouts.
"""

import errno
import math
import mmap
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from minilora.io.architectures import ARCHITECTURES, Architecture, architecture_of, module_paths
from minilora.io.files import (
    NOT_FINITE,
    FormatError,
    check_finite,
    check_settings,
    listed,
    to_dtype,
    to_narrow_dtype,
)
from minilora.io.formats.factors import check_factors, file_name, parameter_shapes
from minilora.io.formats.format import AdapterWeights, Base, Format, LoadedModel, ReadOptions
from minilora.io.formats.tensors import check_complete
from minilora.io.formats.tokenizers import LibraryTokenizer, missing_library
from minilora.io.lazy_weights import Expanded
from minilora.spec.lora import LORA, TABLES, Params, TrainableSpec, Weights, scale
from minilora.spec.models import Config, ties_head
from minilora.spec.ops import Array
from minilora.spec.quantization import F32, dequantise, from_gguf

_READER = "llama.cpp takes"
"""Who computes with the weights of a file, in an error's words."""

HERE = ("q4_0", "q4_1", "q8_0")
"""The block types whose equation `quantization` has; the library expands the others."""

KNOWN = {a.model_type: a for a in ARCHITECTURES.values() if a.gguf is not None}
"""The architectures that llama.cpp has, by their names there."""

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
"""Settings under an architecture's name: read by code, of no effect, and with one value here."""

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 and Qwen2 cut a text before pairs are merged, with so many digits at most in one."""

TOKENS = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "pad": "padding",
    "sep": "seperator",
    "eot": "eot",
    "eom": "eom",
}
"""Special tokens, and what GGUF calls them: so is it spelt there."""

LONGEST = 1024
"""Characters in a token by score: each may be cut anywhere, so their number counts squared."""

ELSEWHERE = "take the tokenizer.json of the model's own folder"

CONTEXT = 2048
"""The tokens that a model may have at a time, where nothing says how many."""

ALPHA = "adapter.lora.alpha"
MERGE = "leave it out, merge it, or keep PEFT's"
KEPT = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""The types of an adapter's tensors that come back in their own dtype; all others in float32."""


def library() -> Any:
    """The library `gguf`, imported where it is used.

    Errors: ImportError that names the extra, if it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "GGUF files need the library gguf: install it, or minilora[gguf]"
        ) from error
    return gguf


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: its type's name, its shape in NumPy's order, bytes ``start`` to ``end``.

    ``row``: how many bytes a row of its last dimension takes.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int
    row: int


class Contents(Mapping[str, Any]):
    """What a GGUF file says: its metadata, decoded when asked for; ``tensors``, where each lies."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        remedy = "fetch or write it again"
        try:
            with open(path, "rb") as file:
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise FormatError(path, "file", error, "a GGUF file", remedy) from None
        self._at = 0
        self._places: dict[str, tuple[int, int]] = {}
        magic, version, tensors, pairs = self._take("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            found = f"{magic!r}, version {version}"
            remedy = "is it the right file? Big-endian ones and version 1 are not read"
            raise FormatError(path, "file", found, "b'GGUF', version 2 or 3", remedy)
        for _ in range(self._counted(pairs, 13, "metadata")):
            key = self._string("a key")
            if key in self._places:
                raise self._wrong(key, "given twice", "once")
            (kind,) = self._take("<I")
            self._places[key] = (kind, self._at)
            self._value(kind, key, skip=True)
        self.tensors = self._directory(self._counted(tensors, 24, "tensors"))

    def _wrong(self, where: str, found: object, expected: object) -> FormatError:
        return FormatError(self.path, where, found, expected, "fetch or write it again")

    def _need(self, size: int, where: str) -> int:
        """Where the next ``size`` bytes begin, and on to their end."""
        start, left = self._at, len(self.bytes) - self._at
        if size > left:
            raise self._wrong(where, f"{left} bytes to the file's end", f"{size} or more")
        self._at += size
        return start

    def _take(self, format: str, where: str = "header") -> tuple[Any, ...]:
        return struct.unpack_from(format, self.bytes, self._need(struct.calcsize(format), where))

    def _counted(self, count: int, least: int, where: str) -> int:
        """The count, if that many things of ``least`` bytes can lie in the rest of the file."""
        left = len(self.bytes) - self._at
        if count * least > left:
            raise self._wrong(where, f"{count} of them in {left} bytes", "as many as are there")
        return count

    def _string(self, where: str, skip: bool = False) -> str:
        (size,) = self._take("<Q", where)
        start = self._need(size, where)
        if skip:
            return ""
        try:
            return self.bytes[start : start + size].decode()
        except UnicodeDecodeError as error:
            raise self._wrong(where, error, "a text in UTF-8") from None

    def _value(self, kind: int, where: str, skip: bool = False) -> Any:
        if kind in _SCALARS:
            return self._take(f"<{_SCALARS[kind]}", where)[0]
        if kind == _STRING:
            return self._string(where, skip)
        if kind != _ARRAY:
            raise self._wrong(where, f"a value of type {kind}", "a type from 0 to 12")
        inner, count = self._take("<IQ", where)
        if inner in _SCALARS:
            size = struct.calcsize(f"<{_SCALARS[inner]}")
            start = self._need(count * size, where)
            return (
                None
                if skip
                else [*struct.unpack_from(f"<{count}{_SCALARS[inner]}", self.bytes, start)]
            )
        if inner != _STRING:
            raise self._wrong(where, f"an array of type {inner}", "one of numbers or texts")
        texts = (self._string(where, skip) for _ in range(self._counted(count, 8, where)))
        if not skip:
            return list(texts)
        for _ in texts:
            pass
        return None

    def _directory(self, count: int) -> dict[str, Tensor]:
        gguf = library()
        told = []
        for _ in range(count):
            name = self._string("a tensor's name")
            (dimensions,) = self._take("<I", name)
            if not 1 <= dimensions <= 4:
                raise self._wrong(name, f"{dimensions} dimensions", "1 to 4")
            shape = self._take(f"<{dimensions}Q", name)[::-1]
            told.append((name, shape, *self._take("<IQ", name)))
        alignment = self.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._wrong("general.alignment", alignment, "a power of two")
        base = -(-self._at // alignment) * alignment
        tensors: dict[str, Tensor] = {}
        for name, shape, number, offset in told:
            if name in tensors:
                raise self._wrong(name, "two tensors of this name", "one")
            try:
                kind = gguf.GGMLQuantizationType(number)
            except ValueError:
                remedy = "a newer release of gguf may know it"
                found = f"type {number}"
                raise FormatError(self.path, name, found, "a known type", remedy) from None
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if shape[-1] % block or 0 in shape:
                expected = f"rows of whole blocks of {block}, not empty"
                raise self._wrong(name, f"shape {shape} of {kind.name}", expected)
            if offset % alignment:
                raise self._wrong(name, f"offset {offset}", f"a multiple of {alignment}")
            row = shape[-1] // block * size
            start, end = base + offset, base + offset + row * math.prod(shape[:-1])
            if end > len(self.bytes):
                found = f"the file's end at byte {len(self.bytes)}"
                raise self._wrong(name, found, f"entries up to byte {end}")
            tensors[name] = Tensor(kind.name, shape, start, end, row)
        return tensors

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, key: str) -> Any:
        kind, self._at = self._places[key]
        return self._value(kind, key)

    def __len__(self) -> int:
        return len(self._places)

    def kind(self, key: str) -> tuple[int, int | None]:
        """The type of the metadata's value, and of an array's entries."""
        kind, at = self._places[key]
        return kind, struct.unpack_from("<I", self.bytes, at)[0] if kind == _ARRAY else None


class Blocks:
    """A weight as its file has it, an entry of `Expanded`: called, it gives a fresh array.

    ``order``: of the file's rows, where they are others' than the weight's. What has been read of
    the file is given back to the operating system.
    """

    def __init__(
        self,
        contents: Contents,
        name: str,
        shape: tuple[int, int],
        dtype: Any,
        order: Array | None = None,
    ) -> None:
        self.contents, self.name, self.shape, self.dtype = contents, name, shape, np.dtype(dtype)
        self.tensor, self.order = contents.tensors[name], order
        size = self.tensor.end - self.tensor.start
        data = np.frombuffer(contents.bytes, np.uint8, size, self.tensor.start)
        self.data = data.reshape(-1, self.tensor.row)
        self.checked = False

    def __call__(self) -> Array:
        """The whole weight.

        Errors: FormatError if an entry is not finite.
        """
        whole = self._made(self.order)
        self.checked = True
        return whole.reshape(self.shape)

    def rows(self, ids: Any) -> Array:
        """The rows of the weight that ``ids`` name, an array or a slice, and no others.

        Shapes: ids (t,) -> (t, n).
        Errors: FormatError if an entry is not finite.
        """
        ids = np.arange(*ids.indices(len(self.data))) if isinstance(ids, slice) else np.asarray(ids)
        return self._made(ids if self.order is None else self.order[ids])

    def _made(self, order: Array | None) -> Array:
        """Those rows of the file, in that order, or all of them."""
        rows = len(self.data) if order is None else len(order)
        columns = math.prod(self.shape) // len(self.data)
        made = np.empty((rows, columns), self.dtype)
        step = max(1, 2**17 // columns)  # few enough entries for their codes to stay in a cache
        for start in range(0, rows, step):
            part = slice(start, start + step)
            made[part] = self._expand(part if order is None else order[part])
        if hasattr(mmap, "MADV_DONTNEED"):
            start = self.tensor.start // mmap.PAGESIZE * mmap.PAGESIZE
            self.contents.bytes.madvise(mmap.MADV_DONTNEED, start, self.tensor.end - start)
        if not self.checked:
            check_finite(self.contents.path, self.name, made, NOT_FINITE)
        return made

    def _expand(self, rows: Any) -> Array:
        data, kind = self.data[rows], self.tensor.kind
        if kind.lower() in HERE:
            return dequantise(from_gguf(data, kind.lower()))
        gguf = library()
        known: Array = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
        return known


def file_rows(heads: int, rows: int) -> Array:
    """Which row of the weight each row of llama.cpp's is: pair j of a head is its rows 2j, 2j + 1.

    Here the two of a pair lie half a head apart. ``argsort`` of it is the way back.

    Shapes: -> (rows,).
    """
    order: Array = np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()
    return order


def _order(c: Config, at: str, m: int) -> Array | None:
    """:func:`file_rows` of the module, or None if its rows lie as here."""
    if at.endswith(architecture_of(c).permuted):
        return file_rows(c.heads if at.endswith(".q") else getattr(c, "kv_heads", c.heads), m)
    return None


def places(c: Config) -> dict[str, str]:
    """Internal module name -> the module's name in GGUF, as the library has it.

    Errors: FormatError for an architecture that is not in `KNOWN`.
    """
    a = architecture_of(c)
    if a.gguf is None:
        remedy = "a pooler or classifier has no place there: keep Hugging Face's or PEFT's"
        raise FormatError("GGUF", "architecture", a.model_type, f"{', '.join(KNOWN)}", remedy)
    gguf = library()
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == a.model_type)
    known = gguf.get_tensor_name_map(number, 1)
    first = {at: known.get_name(path) for at, path in module_paths(replace(c, layers=1)).items()}
    named = {at: name for at, name in first.items() if not at.startswith("layers.")}
    for at in first.keys() - named.keys():
        named |= {
            at.replace(".0.", f".{i}."): first[at].replace(".0.", f".{i}.") for i in range(c.layers)
        }
    return {at: named[at] for at in module_paths(c)}


def _keys(a: Architecture) -> dict[str, str]:
    """A configuration's fields and what GGUF calls them."""
    return {**KEYS, **(a.gguf or {})}


def _named(contents: Contents) -> str:
    """The architecture's name, of a file that holds what it should."""
    path, name = contents.path, contents.get("general.architecture")
    if not isinstance(name, str) or name not in KNOWN:
        expected, remedy = f"one of {', '.join(KNOWN)}", "no other is implemented for GGUF"
        raise FormatError(path, "general.architecture", name, expected, remedy)
    return name


def _config(contents: Contents) -> Config:
    path, name = contents.path, _named(contents)
    kind = contents.get("general.type", "model")
    if kind != "model":
        remedy = "read an adapter with read_adapter, beside its model"
        raise FormatError(path, "general.type", kind, "model", remedy)
    if contents.get("split.count", 1) not in (0, 1):
        remedy = "join the parts with llama-gguf-split --merge"
        raise FormatError(path, "split.count", contents["split.count"], "a whole file", remedy)
    a = KNOWN[name]
    keys = _keys(a)
    prefix = f"{name}."
    said = {key[len(prefix) :]: contents[key] for key in contents if key.startswith(prefix)}
    for key, value in said.items():  # one for each layer
        if isinstance(value, list) and len({*value}) == 1:
            said[key] = value[0]
    check_settings(f"{path}: {name}", said, {*keys.values(), *SPECIAL}, FIXED, INERT)

    def number(key: str, default: Any, types: Sequence[type]) -> Any:
        value = said.get(key, default)
        if type(value) not in types or not 0 < value < 2**53:
            expected = "a number above 0, and one for all layers"
            remedy = "take it from the model's original file"
            raise FormatError(path, f"{prefix}{key}", value, expected, remedy)
        return value

    values: dict[str, Any] = {
        field: number(key, None, (int,))
        for field, key in keys.items()
        if field not in ("eps", "theta", "kv_heads")
    }
    values["eps"] = number(keys["eps"], None, (float,))
    table = contents.tensors.get("token_embd.weight")
    if table is None:
        remedy = "is it a whole model?"
        raise FormatError(path, "token_embd.weight", "none", "the embedding", remedy)
    values["vocab"] = number("vocab_size", table.shape[0], (int,))
    if a.has_field("theta"):
        _check_rope(path, prefix, said, values, number)
        values["tied"] = "output.weight" not in contents.tensors
    elif values["d"] % values["heads"]:
        expected = f"a divisor of {values['d']}"
        remedy = "the heads share its features"
        raise FormatError(path, f"{prefix}{keys['heads']}", values["heads"], expected, remedy)
    if values["layers"] > len(contents.tensors):  # before anything is made for each of them
        expected = f"{values['layers']} layers of several tensors each"
        remedy = "the file is incomplete"
        raise FormatError(path, "tensors", len(contents.tensors), expected, remedy)
    return a.config(**values, **a.constant)


def _check_rope(
    path: Path, prefix: str, said: Mapping[str, Any], values: dict[str, Any], number: Any
) -> None:
    """The heads and RoPE of an architecture that has it, into ``values``."""
    d, heads = values["d"], values["heads"]
    values["theta"] = number("rope.freq_base", 10000.0, (float,))
    values["kv_heads"] = number("attention.head_count_kv", heads, (int,))
    size = values["head_dim"] = number("attention.key_length", d // heads, (int,))
    for key in ("attention.value_length", "rope.dimension_count"):
        if said.get(key, size) != size:
            remedy = "other values compute a function that is not implemented here"
            raise FormatError(path, f"{prefix}{key}", said[key], size, remedy)
    if heads % values["kv_heads"] or size % 2 or ("attention.key_length" not in said and d % heads):
        found = f"{heads} heads, {values['kv_heads']} for keys, of {size}, in {d}"
        expected = "heads that share the features, the keys' and pairs evenly"
        raise FormatError(path, f"{prefix}attention", found, expected, "is it another model's?")


def read_model(
    path: Path | str, dtype: Any = np.float32, keep_quantized: bool = True
) -> tuple[Config, Params]:
    """The configuration and the weights of a GGUF model, expanded to ``dtype``.

    With ``keep_quantized`` the matrices are `Blocks` in an `Expanded`, made whenever they are read;
    without, all are in a dict. A block's entry is what float32 holds of it, so that a wider
    ``dtype`` holds the same. A Llama's q and k have their rows in Hugging Face's order.

    Errors: FormatError for a damaged file; for an architecture, a tensor type, a RoPE or a setting
    that is not implemented, or not known; for a head of a GPT-2 that is not its embedding.
    """
    contents = Contents(path)
    c = _config(contents)
    there, shapes = places(c), c.shapes()
    wanted = {name: file_name(there, name) for name in shapes}
    found = contents.tensors.keys() - _repeated(contents, c)
    if missing := set(wanted.values()) - found:
        expected = f"{len(wanted)} tensors with {listed(missing)}"
        remedy = "the file is incomplete"
        raise FormatError(path, "tensors", f"none named {listed(missing)}", expected, remedy)
    if extra := found - set(wanted.values()):
        remedy = "nothing here would use them, and they may change the function computed"
        if "rope_freqs.weight" in extra:
            remedy = "the RoPE is scaled by factors, which is not implemented here"
        raise FormatError(path, "tensors", listed(extra), f"these {len(wanted)} only", remedy)
    for name, place in wanted.items():
        m, n = shapes[name]
        _check(contents, place, (m, n) if n > 1 else (m,))
    entries = {
        name: Blocks(contents, place, shapes[name], dtype, _order_of(c, name, shapes[name][0]))
        for name, place in wanted.items()
    }
    if not keep_quantized:
        return c, {name: blocks() for name, blocks in entries.items()}
    # A norm's weight or a bias is no matrix, and nothing is saved by leaving it where it is.
    return c, Expanded(
        {name: blocks if blocks.shape[1] > 1 else blocks() for name, blocks in entries.items()}
    )


def _order_of(c: Config, name: str, m: int) -> Array | None:
    """Where in the file each of the weight's m rows is, or None."""
    at, _, part = name.rpartition(".")
    order = _order(c, at, m) if part == "weight" else None
    return None if order is None else np.argsort(order)


def _repeated(contents: Contents, c: Config) -> set[str]:
    """The head of a model that ties it: a file may have the embedding again there, and no other."""
    head, table = (contents.tensors.get(f"{name}.weight") for name in ("output", "token_embd"))
    if architecture_of(c).has_field("tied") or head is None or table is None:
        return set()
    one, other = (contents.bytes[t.start : t.end] for t in (head, table))
    if head.kind != table.kind or one != other:
        found, expected = "other entries than token_embd.weight", "those, to which it is tied"
        remedy = f"a {architecture_of(c).model_type} has no head of its own here"
        raise FormatError(contents.path, "output.weight", found, expected, remedy)
    return {"output.weight"}


def _check(contents: Contents, place: str, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape, or of a type that is not expanded."""
    path, tensor = contents.path, contents.tensors[place]
    if tensor.shape != shape:
        remedy = "the metadata are another model's"
        raise FormatError(path, place, f"shape {tensor.shape}", f"shape {shape}", remedy)
    if not _expands(tensor.kind):
        remedy = "gguf expands none such: quantise the model to another type"
        raise FormatError(path, place, f"type {tensor.kind}", "one that is read", remedy)


@cache
def _expands(kind: str) -> bool:
    """Whether the type can be expanded: asked of one block."""
    gguf = library()
    number = gguf.GGMLQuantizationType[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except NotImplementedError:
        return False
    return True


def read_tokenizer(path: Path | str) -> LibraryTokenizer:
    """The tokenizer that a GGUF model has in its metadata, with its chat template.

    Byte-level pairs (GPT-2's, SmolLM's, Qwen2's and Llama 3's, by ``tokenizer.ggml.pre``), and
    SentencePiece's pairs by score, as Llama 2 has them. Qwen2's texts are normalised (NFC) as its
    own tokenizer does, and llama.cpp does not.

    Errors: FormatError for another kind of tokenizer, or metadata that contradict one another;
    ImportError without ``tokenizers``.
    """
    contents = Contents(path)
    kinds = {"gpt2": _byte_level, "llama": _by_score}
    kind, remedy = contents.get("tokenizer.ggml.model"), ELSEWHERE
    if not isinstance(kind, str) or kind not in kinds:
        expected = f"one of {', '.join(kinds)}"
        raise FormatError(path, "tokenizer.ggml.model", kind, expected, remedy)
    try:
        import tokenizers
    except ImportError as error:
        raise missing_library("tokenizers", str(path)) from error
    tokens = _listed(contents, "tokens", str)
    types = _listed(contents, "token_type", int, len(tokens))
    if twice := [token for token, n in Counter(tokens).items() if n > 1]:
        raise FormatError(path, "tokenizer.ggml.tokens", listed(twice), "each once", remedy)
    named = {}
    for name, key in TOKENS.items():
        number = contents.get(f"tokenizer.ggml.{key}_token_id")
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < len(tokens):
            expected = f"a token's number, below {len(tokens)}"
            where = f"tokenizer.ggml.{key}_token_id"
            raise FormatError(path, where, number, expected, remedy)
        named[name] = tokens[number]
    stops = [tokens.index(named.pop(name)) for name in ("eot", "eom") if name in named]
    template = contents.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        found = type(template).__name__
        raise FormatError(path, "tokenizer.chat_template", found, "a text", remedy)
    expected = "one whose parts agree"
    try:
        backend, begins = kinds[kind](contents, tokens, types)
        for number, special in ((3, True), (4, False)):  # control, and the user's own
            added = [
                tokenizers.AddedToken(token, special=special, normalized=False)
                for token, of in zip(tokens, types, strict=True)
                if of == number
            ]
            (backend.add_special_tokens if special else backend.add_tokens)(added)
    except FormatError:
        raise
    except Exception as error:  # the library raises no kinder one
        raise FormatError(path, "tokenizer", error, expected, remedy) from None
    around = {
        name: contents[f"tokenizer.ggml.{name}_token_id"]
        for name, default in (("bos", begins), ("eos", False))
        if name in named and contents.get(f"tokenizer.ggml.add_{name}_token", default)
    }
    if around:
        before, after = ([name] * (name in around) for name in ("bos", "eos"))
        one, other = [*before, "$A", *after], [*before, "$B", *after]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=one,
            pair=one + other,
            special_tokens=[
                {"id": name, "ids": [i], "tokens": [tokens[i]]} for name, i in around.items()
            ],
        )
    try:
        return LibraryTokenizer(backend, named, template, stops)
    except ValueError as error:
        raise FormatError(path, "tokenizer", error, expected, remedy) from None


def generation_settings(path: Path | str) -> dict[str, Any]:
    """What generation needs of a model's metadata and the logits do not, by its names in JSON.

    As `huggingface.generation_settings` has it of a folder.

    Errors: FormatError for what is no GGUF model.
    """
    contents = Contents(path)
    keys = {
        f"{at}_token_id": f"tokenizer.ggml.{TOKENS[at]}_token_id" for at in ("bos", "eos", "pad")
    }
    keys["max_position_embeddings"] = f"{_named(contents)}.context_length"
    said = {name: contents.get(key) for name, key in keys.items()}
    return {name: value for name, value in said.items() if isinstance(value, int)}


def _listed(contents: Contents, what: str, kind: type, count: int | None = None) -> list[Any]:
    """The array of the tokenizer's metadata, of that kind, and of as many as there are tokens."""
    found = contents.get(f"tokenizer.ggml.{what}")
    many = found if isinstance(found, list) else []
    if not many or {*map(type, many)} != {kind} or len(many) != (count or len(many)):
        told = f"{len(many)} of {listed({type(one).__name__ for one in many})}" if many else "none"
        expected = f"{count or 'some'} of {kind.__name__}"
        raise FormatError(contents.path, f"tokenizer.ggml.{what}", told, expected, ELSEWHERE)
    return many


def _byte_level(contents: Contents, tokens: list[str], types: list[int]) -> tuple[Any, bool]:
    """Pairs of bytes, and whether a text begins with ``bos`` where the file does not say."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = contents.get("tokenizer.ggml.pre")
    cuts: dict[str, Any] = {
        "gpt-2": None,
        "smollm": pre_tokenizers.Digits(individual_digits=True),
        "qwen2": pre_tokenizers.Split(Regex(WORDS % 1), "isolated"),
        "llama-bpe": pre_tokenizers.Split(Regex(WORDS % 3), "isolated"),
    }
    if not isinstance(name, str) or name not in cuts:
        expected = f"one of {', '.join(cuts)}"
        raise FormatError(contents.path, "tokenizer.ggml.pre", name, expected, ELSEWHERE)
    merges = [tuple(merge.split(" ", 1)) for merge in _listed(contents, "merges", str)]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=name == "llama-bpe"))
    whole = name in ("qwen2", "llama-bpe")  # cut as GPT-2's are, or already
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not whole)
    cut = [] if cuts[name] is None else [cuts[name]]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cut, letters])
    backend.decoder = decoders.ByteLevel()
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend, name == "llama-bpe"


def _by_score(contents: Contents, tokens: list[str], types: list[int]) -> tuple[Any, bool]:
    """SentencePiece's pairs: of those that make a token, the one of the best score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _listed(contents, "scores", float, len(tokens))
    vocab = {token: i for i, token in enumerate(tokens)}
    if (longest := max(map(len, tokens))) > LONGEST:
        found, expected = f"a token of {longest} characters", f"{LONGEST} at most"
        raise FormatError(contents.path, "tokenizer.ggml.tokens", found, expected, ELSEWHERE)
    ranked = sorted(range(len(tokens)), key=lambda i: -scores[i])
    merges = [
        (tokens[i][:cut], tokens[i][cut:])
        for i in ranked
        if types[i] == 1
        for cut in range(1, len(tokens[i]))
        if tokens[i][:cut] in vocab and tokens[i][cut:] in vocab
    ]
    unknown = tokens[contents.get("tokenizer.ggml.unknown_token_id", 0)]
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = bool(contents.get("tokenizer.ggml.add_space_prefix", True))
    before = [normalizers.Prepend("▁")] * prefix
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    after = [decoders.Strip(" ", 1, 0)] * prefix
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return backend, True


@contextmanager
def _written(path: Path | str, name: str) -> Iterator[Any]:
    """The library's writer of a file beside ``path``, which takes its place once it is whole."""
    path = Path(path)
    if path.is_dir():
        raise FormatError(path, "file", "a folder", "a file, or nothing there", "name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".{path.name}.{os.urandom(4).hex()}"
    writer = library().GGUFWriter(beside, name)
    try:
        yield writer
        writer.close()
        try:
            Contents(beside)  # NumPy's tofile, by which the library writes, may lose an error
        except FormatError:
            raise OSError("it does not come out whole") from None
        os.replace(beside, path)
    except OSError as error:
        said = error.strerror or f"{error}; is the disk full?"
        raise OSError(error.errno or errno.ENOSPC, said, str(path)) from None
    finally:
        with suppress(OSError):  # of what it could not write on a full disk, which is told above
            writer.close()
        beside.unlink(missing_ok=True)


def _write_tensors(writer: Any, shapes: Mapping[str, Array], make: Callable[[str], Array]) -> None:
    """Header, metadata, and the tensors one by one, each made when it is its turn.

    ``shapes`` has for each an array of its shape and dtype, the file's, which may hold anything.
    """
    bfloat16 = library().GGMLQuantizationType.BF16
    for name, like in shapes.items():
        raw = bfloat16 if like.dtype == ml_dtypes.bfloat16 else None
        writer.add_tensor_info(name, like.shape, like.dtype, like.nbytes, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in shapes:
        writer.write_tensor_data(np.ascontiguousarray(make(name)))


def _like(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array of that shape and dtype which takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def write_model(
    path: Path | str,
    c: Config,
    W: Params,
    *,
    dtype: Any = np.float32,
    like: Path | str | None = None,
    context: int = CONTEXT,
) -> None:
    """Write a GGUF model, its matrices in ``dtype``; vectors and positions are float32, as there.

    ``like``: the GGUF file whose metadata it takes where they say nothing of the weights:
    tokenizer, chat template, context length. Without it the file has no tokenizer, and llama.cpp
    runs it on tokens of ``context`` length at most. The weights are written one by one.

    Errors: FormatError if W is not exactly the model's weights (adapters are merged first), or does
    not fit in ``dtype``; for a GPT-2 of another context; if ``like`` is another architecture's.
    """
    there, shapes = places(c), c.shapes()
    check_complete(path, c, W)

    def narrow(at: str) -> Any:
        return F32 if shapes[at][1] == 1 or at.startswith("positions.") else dtype

    def make(at: str) -> Array:
        array, order = np.asarray(W[at]), _order_of(c, at, shapes[at][0])
        if array.shape != shapes[at]:
            expected = f"shape {shapes[at]}"
            raise FormatError(path, at, f"shape {array.shape}", expected, "check c against W")
        array = array if order is None else array[np.argsort(order)]
        own = array[:, 0] if array.shape[1] == 1 else array
        return to_narrow_dtype(path, at, own, narrow(at), _READER)

    inside = {file_name(there, at): at for at in shapes}
    told = {
        place: _like(shapes[at][:1] if shapes[at][1] == 1 else shapes[at], narrow(at))
        for place, at in inside.items()
    }
    with _written(path, architecture_of(c).model_type) as writer:
        _write_settings(path, writer, c, like, context)
        _write_tensors(writer, told, lambda place: make(inside[place]))


def _write_settings(
    path: Path | str, writer: Any, c: Config, like: Path | str | None, context: int
) -> None:
    gguf, a = library(), architecture_of(c)
    name = a.model_type
    writer.add_type("model")
    other = Contents(like) if like is not None else None
    if other is None:
        writer.add_string("tokenizer.ggml.model", "no_vocab")
    elif _named(other) != name:
        found, remedy = _named(other), "take the file that the weights came from"
        raise FormatError(like or path, "general.architecture", found, name, remedy)
    else:
        for key in other:
            if key.startswith(("tokenizer.", "general.name", "general.license")):
                kind, inner = other.kind(key)
                types = [gguf.GGUFValueType(k) for k in (kind, inner) if k is not None]
                writer.add_key_value(key, other[key], *types)
        context = other.get(f"{name}.context_length", context)
    for field, key in _keys(a).items():
        value = getattr(c, field)
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(
            f"{name}.{key}", value
        )
    writer.add_uint32(f"{name}.vocab_size", c.vocab)
    if a.has_field("head_dim"):
        for key in SPECIAL[1:]:
            writer.add_uint32(f"{name}.{key}", getattr(c, "head_dim"))  # noqa: B009 - of this class
        writer.add_uint32(f"{name}.context_length", context)


def write_adapter(
    path: Path | str, c: Config, W: Params, tuning: TrainableSpec, *, dtype: Any = None
) -> dict[str, float]:
    """Write the adapter of W, in ``dtype`` or its own, to the file ``path``; the folded factors.

    The file has one alpha, float32, and llama.cpp takes s = alpha / r with each tensor's own r.
    rsLoRA's √r and single alphas have no place: where one alpha does not give a module's scale, B
    is multiplied by s r / alpha, rounded once, and the factor is in what is returned. The rows of a
    Llama's q and k are in llama.cpp's order in B too; the embedding's A lies transposed.

    Errors: FormatError for what llama.cpp cannot say or do: variants other than LoRA; what is
    trained beside factors; a tied head or its embedding, a table of positions; float64; and as
    `factors.check_factors` has it.
    """
    ranks = check_factors(path, c, W, tuning, (LORA,))
    there = places(c)
    for at in ranks:
        if reason := _unsaid(c, at):
            raise FormatError(path, f"adapter of {at}", reason, "an adapter that it applies", MERGE)
    alpha, folded = _alpha(path, ranks, tuning)
    tensors: dict[str, Array] = {}
    for at in ranks:
        A, B = W[f"{at}.A"], W[f"{at}.B"]
        if at in folded:
            B = (np.asarray(B, np.float64) * folded[at]).astype(B.dtype)
        order = _order(c, at, len(B))
        B = B if order is None else B[order]
        for part, array in (("a", A.T if at in TABLES else A), ("b", B)):
            place = f"{there[at]}.weight.lora_{part}"
            tensors[place] = to_narrow_dtype(path, place, array, dtype, _READER)
    with _written(path, architecture_of(c).model_type) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32(ALPHA, alpha)
        _write_tensors(writer, tensors, tensors.__getitem__)
    return folded


def _unsaid(c: Config, at: str) -> str | None:
    """Why llama.cpp has no such adapter, or None."""
    tied = ties_head(c)
    if at == "head" and tied:
        return "a tied head, which has no tensor of its own there"
    if at == "embed" and tied:
        return "an embedding that is the head too, where llama.cpp stops at its shape"
    if at in TABLES and at != "embed":
        return "a table that llama.cpp takes no adapter for"
    return None


def _alpha(
    path: Path | str, ranks: Mapping[str, int], tuning: TrainableSpec
) -> tuple[float, dict[str, float]]:
    """The alpha that most modules have, and the factor of those that have another."""
    with np.errstate(over="ignore", under="ignore"):
        alphas = {at: float(F32(tuning.scale[at] * r)) for at, r in ranks.items()}
    for at, alpha in alphas.items():
        if not math.isfinite(alpha) or (alpha == 0) != (tuning.scale[at] == 0):
            expected, remedy = "alpha in float32's range", "put a factor into B"
            raise FormatError(path, f"scale of {at}", repr(tuning.scale[at]), expected, remedy)
    # To llama.cpp an alpha of 0 is none, and s is 1.
    counted = [alpha for alpha in alphas.values() if alpha] or [1.0]
    most = max(counted, key=counted.count)
    return most, {
        at: float(tuning.scale[at]) * ranks[at] / most
        for at, alpha in alphas.items()
        if alpha != most
    }


def read_adapter(path: Path | str, c: Config, dtype: Any = None) -> tuple[Weights, TrainableSpec]:
    """The adapter's arrays under internal names, in ``dtype`` or the file's, and its
    `TrainableSpec`.

    An alpha that is absent or 0 means s = 1, as in llama.cpp.

    Errors: FormatError for a damaged file, another architecture, a setting that is not known (the
    invocation of an activated LoRA), a tensor of no module or of another shape, one factor without
    the other; and for what llama.cpp does not apply, as :func:`write_adapter` has it.
    """
    contents = Contents(path)
    name = architecture_of(c).model_type
    said = {key: contents[key] for key in contents if key.startswith("adapter.")}
    said |= {key: contents.get(key) for key in ("general.type", "general.architecture")}
    expected = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": name}
    for key, value in expected.items():
        if said.get(key) != value:
            remedy = "is it an adapter, and of this model?"
            raise FormatError(path, key, said.get(key), value, remedy)
    check_settings(path, said, {*expected, ALPHA}, {}, "")
    alpha = said.get(ALPHA, 0.0)
    if type(alpha) is not float or not math.isfinite(alpha):
        raise FormatError(path, ALPHA, alpha, "a number in float32", "write it again")
    modules_ = {f"{place}.weight": at for at, place in places(c).items()}
    ranks: dict[str, int] = {}
    found: dict[str, str] = {}
    for tensor in contents.tensors:
        place, _, part = tensor.rpartition(".lora_")
        at = modules_.get(place, "")
        if part not in ("a", "b") or at not in c.matrices() or _unsaid(c, at):
            what = _unsaid(c, at) or "no factor of a module here"
            remedy = "it may change the function computed: it is not passed over"
            raise FormatError(path, tensor, what, "lora_a and lora_b of projections", remedy)
        found[f"{at}.{part.upper()}"] = tensor
        if part == "b":
            ranks[at] = contents.tensors[tensor].shape[-1]
    if not ranks or len(found) != 2 * len(ranks):
        whole = {f"{at}.{part}" for at in ranks for part in "AB"}
        missing = listed(whole ^ found.keys()) or "none"
        raise FormatError(path, "tensors", missing, "lora_a and lora_b of each", "write it again")
    W: Weights = {}
    for at, r in ranks.items():
        for key, shape in parameter_shapes(c, at, r).items():
            turned = at in TABLES and key.endswith(".A")
            lying = shape[::-1] if turned else shape
            _check(contents, found[key], lying)
            array = Blocks(contents, found[key], lying, F32)()
            order = _order(c, at, len(array)) if key.endswith(".B") else None
            array = array if order is None else array[np.argsort(order)]
            array = np.ascontiguousarray(array.T) if turned else array
            kind = KEPT.get(contents.tensors[found[key]].kind, np.dtype(F32))
            W[key] = to_dtype(path, key, array.astype(kind), dtype)
    s = {at: scale(alpha or float(r), r) for at, r in ranks.items()}
    return W, TrainableSpec(s, {}, frozenset(W))


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
    write_model=_write_model,
    read_adapter=_read_adapter,
    write_adapter=_write_adapter,
    scaling="llama.cpp: --lora-scaled times alpha / r; {scales} at 1",
)
