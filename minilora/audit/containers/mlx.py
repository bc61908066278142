"""Models that mlx-lm has quantized: a weight in codes, scales and biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora.audit.containers.tensor import StoredTensor
from minilora.io.errors import FormatError
from minilora.spec.ops import Array
from minilora.spec.quantization import dequantize_words

_BITS = (2, 3, 4, 5, 6, 8)


def dequantized(
    config: Path, tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """The tensors, with each weight in codes beside its scales and biases as one.

    ``settings``: ``quantization`` of ``config.json``: ``bits`` and ``group_size``, for all modules
    and for single ones.

    Errors: FormatError for another mode than "affine", and for parts that do not fit together.
    """
    found = dict(tensors)
    for name in tensors:
        if not name.endswith(".scales"):
            continue
        module = name.removesuffix(".scales")
        names = [f"{module}.{part}" for part in ("weight", "scales", "biases")]
        own = settings.get(module, settings)
        own = {**settings, **own} if isinstance(own, dict) else settings
        if own.get("mode", "affine") != "affine":
            remedy = "it is not judged here: quantize it in the mode affine"
            raise FormatError(config, "quantization.mode", own["mode"], "affine", remedy)
        if any(part not in tensors for part in names):
            raise FormatError(config.parent, module, "scales alone", "weight and biases too",
                              "save the model again")  # fmt: skip
        codes, scales, biases = (found.pop(part) for part in names)
        triple = _Triple(codes, scales, biases, own.get("bits"))
        triple.check(config, own.get("group_size"))
        found[names[0]] = triple.stored(names[0])
    return {name: found[name] for name in tensors if name in found}


@dataclass(frozen=True)
class _Triple:
    """The three tensors of a weight."""

    codes: StoredTensor
    scales: StoredTensor
    biases: StoredTensor
    bits: Any

    def check(self, config: Path, group: Any) -> None:
        """Refuse what does not fit together."""
        shapes = self.codes.shape, self.scales.shape, self.biases.shape
        fits = type(self.bits) is int and self.bits in _BITS and type(group) is int and group > 0
        fits = fits and self.codes.dtype == np.uint32 and shapes[1] == shapes[2]
        fits = fits and len(shapes[0]) == len(shapes[1]) >= 2 and shapes[0][:-1] == shapes[1][:-1]
        if not fits or shapes[0][-1] * 32 != shapes[1][-1] * group * self.bits:
            found = f"shapes {shapes} with {self.bits} bits in groups of {group}"
            expected = "(…, n bits / 32) uint32, and twice (…, n / group_size)"
            raise FormatError(config, self.codes.name, found, expected, "save the model again")

    def stored(self, name: str) -> StoredTensor:
        """The weight."""
        parts = (self.codes, self.scales, self.biases)
        n = self.codes.shape[-1] * 32 // self.bits
        shape = (*self.codes.shape[:-1], n)
        nbytes = sum(part.nbytes for part in parts)
        scheme = f"mlx-{self.bits}bit"
        dtype = np.dtype(np.float32)
        return StoredTensor(
            name, dtype, shape, nbytes, self.rows, scheme, self.spacing, self.as_stored
        )

    def as_stored(self, start: int, stop: int) -> list[Array]:
        """Codes, scales and biases of these rows."""
        return [part.rows(start, stop) for part in (self.codes, self.scales, self.biases)]

    def rows(self, start: int, stop: int) -> Array:
        """Rows of the weight, expanded."""
        codes, scales, biases = (
            part.rows(start, stop).reshape(-1, part.shape[-1])
            for part in (self.codes, self.scales, self.biases)
        )
        W = dequantize_words(codes, scales, biases, self.bits)
        return W.reshape(stop - start, *self.codes.shape[1:-1], -1)

    def spacing(self, start: int, stop: int) -> Array:
        """The scale of each entry's group."""
        scales = abs(self.scales.rows(start, stop).astype(np.float32))
        n = self.codes.shape[-1] * 32 // self.bits
        gap: Array = scales.repeat(n // scales.shape[-1], axis=-1)
        return gap
