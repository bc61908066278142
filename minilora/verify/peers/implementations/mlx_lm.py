"""mlx-lm's LoRALinear and DoRALinear, on the CPU build of MLX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np
from mlx import core as mx
from mlx import nn
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from minilora.verify.peers.implementations import mlx_lm_files
from minilora.verify.peers.mlx_lm import PEER
from minilora.verify.peers.peer import refuse_settings

_DTYPES = {
    np.dtype(np.float64): mx.float64,
    np.dtype(np.float32): mx.float32,
    np.dtype(np.float16): mx.float16,
}


@PEER.describes
class MlxLm:
    """Each call builds the library's own layer anew, so no state is left between calls."""

    def lora_linear(self, x: Any, W: Any, A: Any, B: Any, **settings: Any) -> np.ndarray:
        """y of the adapted layer. Without `keep` the layer is in evaluation mode: no dropout."""
        with _on_the_cpu(settings):
            return _numpy(_adapted(W, A, B, **settings)(_mlx(x)))

    def lora_linear_vjp(
        self, x: Any, W: Any, A: Any, B: Any, dy: Any, **settings: Any
    ) -> dict[str, np.ndarray]:
        """y and the gradients of ⟨dy, y⟩ by mx.vjp through the library's forward."""
        if not x.size and x.itemsize == 2:  # a thread of MLX 0.32.4 never ends
            refuse_settings("MLX", ["for an empty batch in half precision"])
        with _on_the_cpu(settings):
            layer = _adapted(W, A, B, **settings)
            places = {"dA": (layer, "lora_a"), "dB": (layer, "lora_b")}
            if "bias" in settings:
                places["dbias"] = layer.linear, "bias"
            if "magnitude" in settings:
                places["dmagnitude"] = layer, "m"

            def forward(x: Any, *parameters: Any) -> Any:
                for (module, name), parameter in zip(places.values(), parameters, strict=True):
                    module[name] = parameter
                return layer(x)

            held = [module[name] for module, name in places.values()]
            (y,), (dx, *gradients) = mx.vjp(forward, [_mlx(x), *held], [_mlx(dy)])
            answer = {"y": y, "dx": dx} | dict(zip(places, gradients, strict=True))
            answer |= {"dA": answer["dA"].T, "dB": answer["dB"].T}
            return {name: _numpy(array) for name, array in answer.items()}

    def logits(self, model_dir: Any, adapter_dir: Any, input_ids: Any) -> np.ndarray:
        """The logits after load_adapters, of PEFT's folder under the library's names."""
        with TemporaryDirectory(prefix="minilora-") as folder, mx.stream(mx.cpu):
            mlx_lm_files.write(model_dir, adapter_dir, folder)
            model, _ = load_model(Path(model_dir))
            model = load_adapters(model, folder)
            model.eval()
            return _numpy(model(mx.array(input_ids)))

    def session(self, layer: Mapping[str, Any]) -> QuantizedSession:
        """A layer in four or eight bits with one adapter."""
        is_wide = layer["W"].dtype == np.float64  # which no kernel unpacks
        if layer["kind"] != "quantized" or layer["scheme"] not in ("int4", "int8") or is_wide:
            refuse_settings("mlx-lm", ["for sessions other than int4 and int8 in up to 32 bits"])
        return QuantizedSession(layer)

    def merge(self, W: Any, A: Any, B: Any, **settings: Any) -> Any:
        """The weight of the layer that fuse() gives, and its bias where there is one."""
        with _on_the_cpu(settings):
            fused = _adapted(W, A, B, **settings).fuse()
            W_merged = _numpy(fused.weight)
            return (W_merged, _numpy(fused.bias)) if "bias" in settings else W_merged


class QuantizedSession:
    """A QuantizedLinear with the library's LoRALinear on it, which fuse() merges."""

    def __init__(self, layer: Mapping[str, Any]) -> None:
        W, bias = layer["W"], layer.get("bias")
        with mx.stream(mx.cpu):
            linear = nn.Linear(W.shape[1], len(W), bias=bias is not None)
            linear.weight = _mlx(W)
            if bias is not None:
                linear.bias = _mlx(bias)
            bits = {"int4": 4, "int8": 8}[layer["scheme"]]
            self._layer: Any = nn.QuantizedLinear.from_linear(linear, 64, bits)

    def add(self, name: str, adapter: Mapping[str, Any]) -> None:
        """LoRALinear.from_base, whose adapter always acts."""
        if isinstance(self._layer, LoRALinear) or "use_rslora" in adapter:
            raise NotImplementedError("one adapter")
        r = adapter["r"]
        with mx.stream(mx.cpu):
            self._layer = LoRALinear.from_base(self._layer, r=r, scale=adapter["alpha"] / r)
            self._layer.lora_a, self._layer.lora_b = _mlx(adapter["A"].T), _mlx(adapter["B"].T)

    def activate(self, names: Sequence[str]) -> None:
        """It is."""

    def train(self) -> None:
        """Training."""
        self._layer.train()

    def eval(self) -> None:
        """Evaluation."""
        self._layer.eval()

    def merge(self) -> None:
        """fuse(), which quantizes anew."""
        with mx.stream(mx.cpu):
            self._layer = self._layer.fuse()

    def weight(self) -> np.ndarray:
        """What the library dequantizes."""
        held = getattr(self._layer, "linear", self._layer)
        how = {"group_size": held.group_size, "bits": held.bits}
        with mx.stream(mx.cpu):
            return _numpy(mx.dequantize(held.weight, held.scales, held.biases, **how))

    def forward(self, x: np.ndarray) -> np.ndarray:
        """y."""
        with mx.stream(mx.cpu):
            return _numpy(self._layer(_mlx(x)))

    def gradients(self, x: np.ndarray, dy: np.ndarray) -> dict[str, np.ndarray]:
        """Those of ⟨dy, y⟩ by mx.vjp."""
        layer = self._layer

        def forward(x: Any, A: Any, B: Any) -> Any:
            layer.lora_a, layer.lora_b = A, B
            return layer(x)

        with mx.stream(mx.cpu):
            given = [_mlx(x), layer.lora_a, layer.lora_b]
            _, (dx, dA, dB) = mx.vjp(forward, given, [_mlx(dy)])
            return {"dx": _numpy(dx), "one.A": _numpy(dA.T), "one.B": _numpy(dB.T)}


def _adapted(
    W: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    *,
    alpha: float,
    r: int,
    bias: np.ndarray | None = None,
    keep: np.ndarray | None = None,
    p: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    magnitude: np.ndarray | None = None,
    **unknown: Any,
) -> Any:
    """The library's layer, filled with the given arrays. Its scale is α/r or α/√r as a whole."""
    refuse_settings("mlx-lm", [name for name, value in unknown.items() if value is not False])
    if keep is not None and not p:
        raise NotImplementedError("a mask without a rate: dropout of rate 0 drops nothing")
    linear = nn.Linear(W.shape[1], len(W), bias=bias is not None)
    linear.weight = _mlx(W)
    if bias is not None:
        linear.bias = _mlx(bias)
    scale = alpha / r**0.5 if use_rslora else alpha / r
    kind = DoRALinear if use_dora else LoRALinear
    layer = kind.from_base(linear, r=r, dropout=p, scale=scale)
    layer.lora_a, layer.lora_b = _mlx(A.T), _mlx(B.T)
    if magnitude is not None:
        layer.m = _mlx(magnitude)
    return layer.train(keep is not None)


@contextmanager
def _on_the_cpu(settings: dict[str, Any]) -> Iterator[None]:
    """MLX on the CPU, where float64 is; the library's dropout keeps what `keep` says."""
    keep, p = settings.get("keep"), settings.get("p", 0.0)

    def given(probability: float, shape: Any) -> Any:
        if keep is None or tuple(shape) != keep.shape or probability != 1 - p:
            raise ValueError(f"asked to keep {shape} with probability {probability}, not given")
        return mx.array(keep)

    with mx.stream(mx.cpu), patch.object(mx.random, "bernoulli", given):
        yield


def _mlx(array: np.ndarray) -> Any:
    """The same values and dtype; bfloat16 as its bits, since MLX takes none from NumPy."""
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array, dtype=_DTYPES[array.dtype])


def _numpy(array: Any) -> np.ndarray:
    """The same values and dtype; bfloat16 as its bits, since NumPy takes none from MLX."""
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)
