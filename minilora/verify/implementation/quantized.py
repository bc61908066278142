"""minilora's own session with a quantized layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minilora.spec.lora import scale
from minilora.spec.quantization import SCHEMES, dequantize, qlora_linear, quantize, requantize

Array = np.ndarray


class QuantizedSession:
    """A weight in few bits with one adapter, which is merged into a weight in few bits.

    Unmerging gives back the very weight that there was.
    """

    def __init__(self, layer: Mapping[str, Any]) -> None:
        W, scheme = layer["W"], layer["scheme"]
        if scheme not in SCHEMES:
            raise NotImplementedError(f"no scheme {scheme}")
        self._dtype, self._bias = W.dtype, layer.get("bias")
        self._held = self._original = quantize(widened(W), scheme)
        self._adapter: tuple[Array, Array, Any] | None = None
        self._active = False

    def add(self, name: str, adapter: Mapping[str, Any]) -> None:
        """Adds the adapter, not active yet."""
        s = scale(adapter["alpha"], adapter["r"], adapter.get("use_rslora", False))
        if self._adapter is not None:
            raise NotImplementedError("one adapter")
        self._adapter = widened(adapter["A"]), widened(adapter["B"]), s

    def activate(self, names: Sequence[str]) -> None:
        """Makes it active, or not."""
        self._active = bool(names)

    def train(self) -> None:
        """Does nothing."""

    def eval(self) -> None:
        """Does nothing."""

    def weight(self) -> Array:
        """The weight that is stood for."""
        return dequantize(self._held).astype(self._dtype)

    def merge(self) -> None:
        """Quantizes W̃ + s B A."""
        if self._held is self._original and self._adapter is not None:
            A, B, s = self._adapter
            merged = dequantize(self._held) + s * (B @ A)
            self._held = requantize(self._held, merged.astype(self._held.dtype))

    def unmerge(self) -> None:
        """The weight that there was."""
        self._held = self._original

    def forward(self, x: Array) -> Array:
        """y."""
        return self._layer(x)[0]

    def gradients(self, x: Array, dy: Array) -> dict[str, Array]:
        """dx, and those of the adapter."""
        dx, dA, dB = self._layer(x)[1](widened(dy).T)
        found = {"dx": dx.T, "one.A": dA, "one.B": dB}
        return {name: array.astype(self._dtype) for name, array in found.items()}

    def _layer(self, x: Array) -> tuple[Array, Any]:
        if self._adapter is None:
            raise NotImplementedError("a layer without an adapter")
        A, B, s = self._adapter
        acts = self._active and self._held is self._original
        b = None if self._bias is None else widened(self._bias)[:, None]
        y, back = qlora_linear(widened(x).T, self._held, b, A, B if acts else 0 * B, s)
        return y.T.astype(self._dtype), back


def widened(array: Array) -> Array:
    """float16 and bfloat16 as float32."""
    return array if array.dtype in (np.float64, np.float32) else array.astype(np.float32)
