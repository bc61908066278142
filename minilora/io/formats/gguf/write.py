"""Writing GGUF files: whole or not at all, tensor by tensor; and a model as one."""

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from minilora.io.architectures import architecture_of
from minilora.io.atomic import replacing
from minilora.io.errors import FormatError
from minilora.io.files import to_narrow_dtype
from minilora.io.formats.factors import file_name
from minilora.io.formats.gguf.contents import Contents, library
from minilora.io.formats.gguf.names import (
    READER,
    SPECIAL,
    architecture_in,
    one_added,
    places,
    setting_names,
    weight_order,
)
from minilora.io.formats.gguf.rope import FACTORS, scaling_factors
from minilora.io.formats.tensors import check_complete
from minilora.spec.lora import Params
from minilora.spec.models import Config
from minilora.spec.ops import Array
from minilora.spec.quantization import F32

CONTEXT = 2048
"""The tokens that a model may have at a time, where nothing says how many."""


@contextmanager
def gguf_writer(path: Path | str, architecture: str) -> Iterator[Any]:
    """The library's writer of the file ``path``, which takes its place once it is whole.

    Errors: FormatError for a folder; OSError where the disk is full or closed.
    """
    path = Path(path)
    try:
        with replacing(path) as beside:
            writer = library().GGUFWriter(beside, architecture)
            try:
                yield writer
                writer.close()
                _check_whole(beside)
            finally:
                with suppress(OSError):  # of what a full disk did not take: that is told below
                    writer.close()
    except OSError as error:
        reason = error.strerror or f"{error}; is the disk full?"
        raise OSError(error.errno or errno.ENOSPC, reason, str(path)) from None


def _check_whole(path: Path) -> None:
    """NumPy's tofile, by which the library writes, may lose an error."""
    try:
        Contents(path)
    except FormatError:
        raise OSError("it does not come out whole") from None


def write_tensors(writer: Any, like: Mapping[str, Array], make: Callable[[str], Array]) -> None:
    """Header, metadata, and the tensors one by one, each made when it is its turn.

    ``like`` has for each an array of its shape and dtype in the file, which may hold anything.
    """
    bfloat16 = library().GGMLQuantizationType.BF16
    for name, array in like.items():
        raw = bfloat16 if array.dtype == ml_dtypes.bfloat16 else None
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in like:
        writer.write_tensor_data(np.ascontiguousarray(make(name)))


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
    module_names, shapes = places(c), c.shapes()
    check_complete(path, c, W)
    parameter_of = {file_name(module_names, name): name for name in shapes}
    factors = scaling_factors(c)

    def dtype_of(name: str) -> Any:
        return F32 if shapes[name][1] == 1 or name.startswith("positions.") else dtype

    def make(place: str) -> Array:
        if place == FACTORS and factors is not None:
            return factors
        name = parameter_of[place]
        array, order = np.asarray(W[name]), weight_order(c, name, shapes[name][0])
        if array.shape != shapes[name]:
            expected = f"shape {shapes[name]}"
            raise FormatError(path, name, f"shape {array.shape}", expected, "check c against W")
        array = array if order is None else array[np.argsort(order)]
        array = np.asarray(array, np.float64) + 1 if one_added(c, name) else array
        array = array[:, 0] if array.shape[1] == 1 else array
        return to_narrow_dtype(path, name, array, dtype_of(name), READER)

    like_arrays = {}
    for place, name in parameter_of.items():
        m, n = shapes[name]
        # Of the shape and dtype, and of no memory.
        zero = np.zeros((), dtype_of(name))
        like_arrays[place] = np.broadcast_to(zero, (m,) if n == 1 else (m, n))
    if factors is not None:
        like_arrays[FACTORS] = factors
    with gguf_writer(path, architecture_of(c).gguf_name) as writer:
        writer.add_type("model")
        context = _copy_metadata(path, writer, c, like, context)
        _write_settings(writer, c, context)
        write_tensors(writer, like_arrays, make)


def _copy_metadata(
    path: Path | str, writer: Any, c: Config, like: Path | str | None, context: int
) -> int:
    """Tokenizer, name and licence of the file ``like``; and its context length, or ``context``."""
    if like is None:
        writer.add_string("tokenizer.ggml.model", "no_vocab")
        return context
    other, name = Contents(like), architecture_of(c).gguf_name
    if (other_name := architecture_in(other).gguf_name) != name:
        remedy = "take the file that the weights came from"
        raise FormatError(like, "general.architecture", other_name, name, remedy)
    for key in other:
        if key.startswith(("tokenizer.", "general.name", "general.license")):
            kinds = [library().GGUFValueType(k) for k in other.kind(key) if k is not None]
            writer.add_key_value(key, other[key], *kinds)
    return int(other.get(f"{name}.context_length", context))


def _write_settings(writer: Any, c: Config, context: int) -> None:
    a = architecture_of(c)
    said = {key: getattr(c, field) for field, key in setting_names(a).items()}
    said |= a.gguf.write(c) if a.gguf else {}
    adders = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for key, value in said.items():
        adders[type(value)](f"{a.gguf_name}.{key}", value)
    writer.add_uint32(f"{a.gguf_name}.vocab_size", c.vocab)
    if (head_dim := getattr(c, "head_dim", None)) is not None:
        for key in SPECIAL[1:]:
            writer.add_uint32(f"{a.gguf_name}.{key}", head_dim)
        writer.add_uint32(f"{a.gguf_name}.context_length", context)
