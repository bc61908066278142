"""Models that bitsandbytes has quantized: NF4 with its states beside it, and LLM.int8()'s rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minilora.audit.containers.tensor import StoredTensor
from minilora.io.errors import FormatError
from minilora.io.files import parse_json
from minilora.io.formats.values import is_integer, is_number
from minilora.spec.ops import Array
from minilora.spec.quantization import (
    F32,
    Quantized,
    dequantize,
    dequantize_dynamic,
    nf4_values,
    unpack,
)

STATE = ".quant_state.bitsandbytes__"
"""What follows a weight's name in the name of its state; then comes the kind of codes."""

_LARGEST = 2**16
"""A larger state is refused: it is a short JSON text."""


def is_quantized(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether some of the tensors are the states or the scales of bitsandbytes."""
    return any(STATE in name or name.endswith(".SCB") for name in tensors)


def dequantized(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors, with each weight and what lies beside it as one.

    Errors: FormatError for FP4, and for parts that are missing or do not fit together.
    """
    found = dict(tensors)
    for name in tensors:
        if STATE in name:
            weight = name.partition(STATE)[0]
            found[weight] = _four_bits(path, weight, name, found)
        elif name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            found[f"{module}.weight"] = _eight_bits(
                path, f"{module}.weight", found.pop(name), found
            )
            found.pop(f"{module}.weight_format", None)
    return {name: found[name] for name in tensors if name in found}


def _four_bits(path: Path, weight: str, state: str, found: dict[str, StoredTensor]) -> StoredTensor:
    """The weight in codes of NF4; what lies beside it is taken out of ``found``."""
    kind, settings = state.partition(STATE)[2], _state(path, found.pop(state))
    parts = {
        part: found.pop(f"{weight}.{part}", None)
        for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    }
    codes, absmax, nested = found.get(weight), parts["absmax"], parts["nested_absmax"]
    sizes = _sizes(settings) if kind == "nf4" else None
    if codes is None or absmax is None or sizes is None or not sizes.fit(codes, absmax, nested):
        shapes = {part: None if t is None else t.shape for part, t in parts.items()}
        text = f"{kind}, {json.dumps(settings)[:200]}, {shapes}"
        expected = "NF4 codes (k/2, 1), absmax (k / blocksize), and a state with shape"
        remedy = "save the model again; FP4 is not judged here"
        raise FormatError(path, weight, text, expected, remedy)
    nf4 = _Nf4(codes, absmax, nested, sizes)
    nbytes = codes.nbytes + sum(t.nbytes for t in parts.values() if t is not None)
    scheme = "nf4" if nested is None else "nf4-double"
    return StoredTensor(
        weight, np.dtype(F32), sizes.shape, nbytes, nf4.rows, scheme, nf4.spacing, nf4.as_stored
    )


@dataclass(frozen=True)
class _Sizes:
    """What a state says: the weight's shape, the size of blocks, and of blocks of blocks."""

    shape: tuple[int, ...]
    block: int
    inner: int
    offset: float

    def fit(self, codes: StoredTensor, absmax: StoredTensor, nested: StoredTensor | None) -> bool:
        """Whether the tensors have these sizes."""
        size = math.prod(self.shape)
        fits = codes.dtype == np.uint8 and math.prod(codes.shape) == -(-size // 2)
        fits = fits and absmax.shape == (-(-size // self.block),)
        return bool(fits) and (nested is not None) == (absmax.dtype == np.uint8)


def _sizes(settings: Mapping[str, Any]) -> _Sizes | None:
    """The state's sizes, None if it says none that can be."""
    shape = _shape(settings.get("shape"))
    block: Any = settings.get("blocksize")
    inner: Any = settings.get("nested_blocksize", 256)
    offset: Any = settings.get("nested_offset", 0.0)
    fits = is_integer(2, 2**20)(block) and is_integer(1, 2**20)(inner) and is_number(offset)
    if not shape or not fits or not isinstance(block, int) or block % 2:
        return None
    return _Sizes(shape, block, inner, float(offset))


def _shape(shape: Any) -> tuple[int, ...]:
    """The shape, () if it is none."""
    fits = isinstance(shape, list) and all(type(n) is int and 0 < n < 2**40 for n in shape)
    return tuple(shape) if fits else ()


def _state(path: Path, tensor: StoredTensor) -> dict[str, Any]:
    """The JSON text in a state."""
    if tensor.dtype != np.uint8 or len(tensor.shape) != 1 or tensor.length > _LARGEST:
        expected = f"bytes of a JSON text, {_LARGEST} at most"
        raise FormatError(path, tensor.name, tensor.shape, expected, "save the model again")
    try:
        settings = parse_json(tensor.rows(0, tensor.length).tobytes())
    except ValueError as error:
        raise FormatError(path, tensor.name, error, "JSON", "save the model again") from None
    return settings if isinstance(settings, dict) else {}


@dataclass(frozen=True)
class _Nf4:
    """The tensors of a weight in NF4: blocks run through the rows on end."""

    codes: StoredTensor
    absmax: StoredTensor
    nested: StoredTensor | None
    sizes: _Sizes
    table: Array = field(default_factory=nf4_values)

    def rows(self, start: int, stop: int) -> Array:
        """Rows of the weight, expanded."""
        codes, absmax, first = self._read(start, stop)
        shape = len(absmax), self.sizes.block
        q = Quantized("nf4", shape, np.dtype(F32), self.sizes.block, codes, {"absmax": absmax})
        return self._cut(dequantize(q), first, start, stop)

    def spacing(self, start: int, stop: int) -> Array:
        """The greater distance to the neighbours in NF4's table, times the block's absmax."""
        codes, absmax, first = self._read(start, stop)
        gaps = np.diff(self.table)
        greater = np.maximum(np.append(gaps, 0), np.insert(gaps, 0, 0)).astype(F32)
        gap = greater[unpack(codes)].reshape(-1, self.sizes.block) * absmax[:, None]
        return self._cut(gap, first, start, stop)

    def as_stored(self, start: int, stop: int) -> tuple[Array, Array]:
        """The codes and absmax of the blocks of these rows."""
        codes, absmax, _ = self._read(start, stop)
        return codes, absmax

    def _read(self, start: int, stop: int) -> tuple[Array, Array, int]:
        """The codes and absmax of the blocks of these rows, and the first block\'s number."""
        n = math.prod(self.sizes.shape[1:])
        first, last = start * n // self.sizes.block, -(-stop * n // self.sizes.block)
        bytes_of = self.sizes.block // 2
        end = min(last * bytes_of, self.codes.length)
        codes = np.zeros((last - first) * bytes_of, np.uint8)
        stored = self.codes.rows(first * bytes_of, end).reshape(-1)
        codes[: len(stored)] = stored
        absmax = self.absmax.rows(first, last)
        if self.nested is not None:
            outer = first // self.sizes.inner, -(-last // self.sizes.inner)
            scales = self.nested.rows(*outer).repeat(self.sizes.inner)
            scales = scales[first - outer[0] * self.sizes.inner :][: last - first]
            absmax = dequantize_dynamic(absmax, scales, 1) + F32(self.sizes.offset)
        return codes, absmax.astype(F32, copy=False), first

    def _cut(self, values: Array, first: int, start: int, stop: int) -> Array:
        """The rows among the values of whole blocks."""
        n = math.prod(self.sizes.shape[1:])
        skip = start * n - first * self.sizes.block
        flat = values.reshape(-1)[skip : skip + (stop - start) * n]
        return flat.reshape(stop - start, *self.sizes.shape[1:])


def _eight_bits(
    path: Path, weight: str, scales: StoredTensor, found: Mapping[str, StoredTensor]
) -> StoredTensor:
    """The weight in whole numbers from -127 to 127, each row with a scale: w = q SCB / 127."""
    codes = found.get(weight)
    if codes is None or codes.dtype != np.int8 or scales.shape != codes.shape[:1]:
        found_text = "none" if codes is None else f"{codes.dtype} {codes.shape}, {scales.shape}"
        raise FormatError(path, weight, found_text, "int8 (m, n) and SCB (m,)",
                          "save the model again")  # fmt: skip
    stored = codes

    def step(start: int, stop: int) -> Array:
        gap: Array = scales.rows(start, stop).astype(F32)[:, None] / F32(127)
        return gap

    def rows(start: int, stop: int) -> Array:
        values: Array = stored.rows(start, stop).astype(F32) * step(start, stop)
        return values

    def as_stored(start: int, stop: int) -> tuple[Array, Array]:
        return stored.rows(start, stop), scales.rows(start, stop)

    nbytes, dtype = codes.nbytes + scales.nbytes, np.dtype(F32)
    return StoredTensor(weight, dtype, codes.shape, nbytes, rows, "int8-rows", step, as_stored)
