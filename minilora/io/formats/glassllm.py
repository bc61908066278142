"""The models of the package glassllm: a Llama in NumPy's ``.npz``, its tokenizer in a file beside.

Its RoPE turns neighbours, so that the rows of q and k lie as in llama.cpp's files; its matrices are
(in, out). Nothing in the files is executed, and an array is read only if its size follows from the
configuration.
"""

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from minilora.io.architectures.llama import LLAMA
from minilora.io.errors import FormatError, listed
from minilora.io.files import (
    NOT_FINITE,
    WEIGHT_DTYPES,
    check_finite,
    check_settings,
    read_json,
    to_dtype,
)
from minilora.io.formats.format import Format, LoadedModel
from minilora.io.formats.gguf import file_rows
from minilora.io.formats.tokenizers import LibraryTokenizer, missing_library
from minilora.spec.lora import Weights
from minilora.spec.models import Llama
from minilora.spec.ops import Array

KEYS = {
    "vocab": "vocab_size",
    "d": "d_model",
    "layers": "n_layers",
    "heads": "n_heads",
    "kv_heads": "n_kv_heads",
    "theta": "rope_base",
    "eps": "eps",
}
"""A configuration's fields and their names in the file."""

NAMES = {
    "norm1": "norm1.gamma",
    "norm2": "norm2.gamma",
    "q": "attn.W_Q",
    "k": "attn.W_K",
    "v": "attn.W_V",
    "o": "attn.W_O",
    "gate": "ffn.W1",
    "up": "ffn.W3",
    "down": "ffn.W2",
}
"""A block's modules and their names in the file."""

SPECIAL = {"pad": "<pad>", "unk": "<unk>", "bos": "<bos>", "eos": "<eos>"}
"""The first tokens. No text begins with ``bos``: the models have not been trained on it."""

BESIDE = ".tokenizer.json"
"""The end of the tokenizer's file name, in place of ``.npz``."""

_REMEDY = "fetch or write it again"


def read_model(path: Path | str, dtype: Any = None) -> tuple[Llama, Weights]:
    """The configuration and the weights in the file, in ``dtype`` or its own.

    Errors: FormatError for a damaged file, an unknown setting, and for arrays that are missing,
    more, of another shape or not finite.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as file:
            settings = _array(path, file, "__config__", "U", ())
            c = _config(path, file, str(settings))
            names = _array_names(c)
            if wrong := {*file.namelist()} ^ {
                f"{at}.npy" for at in (*names.values(), "__config__")
            }:
                found = f"{listed(wrong)} in one of the two only"
                raise FormatError(path, "arrays", found, f"the {len(names)} of {c}", _REMEDY)
            return c, {name: _weight(path, file, c, name, at, dtype) for name, at in names.items()}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError) as e:
        if isinstance(e, FormatError):
            raise
        raise FormatError(path, "file", e, "a model of glassllm", _REMEDY) from None


def _array_names(c: Llama) -> dict[str, str]:
    """The array that holds each parameter."""
    places = {"embed.weight": "E", "norm.weight": "norm_f.gamma"}
    for i in range(c.layers):
        places |= {f"layers.{i}.{at}.weight": f"blocks.{i}.{n}" for at, n in NAMES.items()}
    return places


def _config(path: Path, file: zipfile.ZipFile, text: str) -> Llama:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(path, "__config__", error, "an object of JSON", _REMEDY) from None
    if not isinstance(settings, dict):
        raise FormatError(path, "__config__", text, "an object of JSON", _REMEDY)
    check_settings(path, settings, KEYS.values(), {}, "max_len init_std")
    values: dict[str, Any] = {field: settings.get(key) for field, key in KEYS.items()}
    for field, value in values.items():
        kinds = (int, float) if field in ("theta", "eps") else (int,)
        if type(value) not in kinds or not 0 < value < 2**31:
            raise FormatError(path, KEYS[field], value, "a number above 0", _REMEDY)
    d, heads, kv, layers = (values[field] for field in ("d", "heads", "kv_heads", "layers"))
    if d % heads or heads % kv or d // heads % 2 or layers > len(file.namelist()):
        expected = "heads that share the features, the keys' and pairs evenly, in as many layers"
        raise FormatError(path, "__config__", text, expected, _REMEDY)
    sizes = {"ffn": int(8 * d / 3), "head_dim": d // heads}  # as the package itself has it
    values |= {"theta": float(values["theta"]), "eps": float(values["eps"])}
    return Llama(**values, **sizes, tied=True)


def _array(
    path: Path, file: zipfile.ZipFile, name: str, kinds: str, shape: tuple[int, ...]
) -> Array:
    """An array of one of these kinds and of this shape; no more is read than it has."""
    with file.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        if version != (1, 0):
            raise FormatError(path, name, f"version {version}", "version (1, 0)", _REMEDY)
        stored_shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        if dtype.kind not in kinds or dtype.itemsize > 2**16 or stored_shape != shape or fortran:
            found = f"{dtype} of shape {stored_shape}{', in columns' * fortran}"
            raise FormatError(path, name, found, f"shape {shape}, in rows", _REMEDY)
        size = dtype.itemsize * math.prod(shape)
        data = member.read(size)
        if len(data) != size:
            raise FormatError(path, name, f"{len(data)} bytes", size, _REMEDY)
        return np.frombuffer(data, dtype).reshape(shape)


def _weight(
    path: Path, file: zipfile.ZipFile, c: Llama, name: str, place: str, dtype: Any
) -> Array:
    """The parameter in internal layout."""
    m, n = shape = c.shapes()[name]
    at = name.removesuffix(".weight")
    stored_shape = shape if at == "embed" else (m,) if n == 1 else (n, m)
    array = check_finite(path, place, _array(path, file, place, "f", stored_shape), NOT_FINITE)
    if array.dtype not in WEIGHT_DTYPES.values():
        raise FormatError(path, place, array.dtype, f"one of {listed(WEIGHT_DTYPES)}", _REMEDY)
    array = array if at == "embed" else array.T.reshape(shape)
    if at.endswith(LLAMA.permuted):
        array = array[np.argsort(file_rows(m // c.head_dim, m))]
    return to_dtype(path, place, np.ascontiguousarray(array), dtype)


def read_tokenizer(path: Path | str) -> LibraryTokenizer:
    """The tokenizer of the model in that file: pairs of characters, blanks as ▁, NFC.

    Errors: FormatError without its file, or for one that is none; ImportError without
    ``tokenizers``.
    """
    path = Path(path)
    path = path.with_name(path.name.removesuffix(".npz") + BESIDE)
    if not path.is_file():
        raise FormatError(path, "tokenizer", "none", "the file beside the model", "fetch it too")
    try:
        from tokenizers import (
            AddedToken,
            Regex,
            Tokenizer,
            decoders,
            models,
            normalizers,
            pre_tokenizers,
        )
    except ImportError as error:
        raise missing_library("tokenizers", str(path)) from error
    settings = read_json(path)
    check_settings(path, settings, ("alphabet", "merges"), {"version": (1,)}, "")
    try:
        pairs = [(str(a), str(b)) for a, b in settings["merges"]]
        tokens = [*SPECIAL.values(), *map(str, settings["alphabet"]), *(a + b for a, b in pairs)]
        vocab = {token: i for i, token in enumerate(tokens)}
        backend = Tokenizer(models.BPE(vocab, pairs, unk_token=SPECIAL["unk"]))
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(" ", "▁")]
        )
        chunks = Regex(r"\n|▁*[^▁\n]+|▁+")
        backend.pre_tokenizer = pre_tokenizers.Split(chunks, "isolated")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
        backend.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL.values()])
        return LibraryTokenizer(backend, SPECIAL)
    except Exception as error:  # the library raises no kinder one
        raise FormatError(path, "tokenizer", error, "an alphabet and merges", _REMEDY) from None


def _files(path: Path) -> list[Path]:
    beside = path.with_name(path.name.removesuffix(FORMAT.suffix) + BESIDE)
    return [path, *([beside] if beside.is_file() else [])]


FORMAT = Format(
    name="glassllm",
    library="glassllm",
    suffix=".npz",
    read_model=lambda path, options: LoadedModel(*read_model(path, options.dtype)),
    read_tokenizer=read_tokenizer,
    files=_files,
)
