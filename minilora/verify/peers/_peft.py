"""What the peers of PEFT share: one frozen layer with its adapters, whatever holds the weight."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import peft
import torch
from transformers.pytorch_utils import Conv1D

from minilora.verify.peers._peft_releases import lora_config, magnitude_of, taken
from minilora.verify.peers._torch import (
    GivenMask,
    arrays,
    fill,
    gradients,
    plain_number,
    to_numpy,
    to_torch,
)
from minilora.verify.peers.peer import refuse_settings


class Layer:
    """Each call builds the library's own layer anew, so no state is left between calls.

    A subclass says what the frozen layer is, and where the features of x lie in its inputs.
    """

    name: str
    autocast_adapters = False
    """Whether adapters of a half precision are kept in float32, which is PEFT's default."""
    in_4bit = False
    """As transformers says it of a model, for PEFT."""

    def _frozen(self, W: np.ndarray, biased: bool, fan_in_fan_out: bool) -> Any:
        """The frozen layer, of whatever weight."""
        raise NotImplementedError

    def _hold(self, frozen: Any, W: np.ndarray) -> None:
        """Give it its weight."""
        raise NotImplementedError

    def _weight(self, layer: Any) -> np.ndarray:
        """The weight (m, n) of an adapted layer."""
        raise NotImplementedError

    def _wide(self, array: np.ndarray) -> torch.Tensor:
        """What has the features of x in its last axis, as the layer has it."""
        return to_torch(array)

    def _narrow(self, wide: torch.Tensor) -> torch.Tensor:
        """The features of x alone."""
        return wide

    def _mode(self, model: Any, training: bool) -> None:
        """Training or evaluation."""
        model.train(training)

    def lora_linear(
        self, x: np.ndarray, W: np.ndarray, A: np.ndarray, B: np.ndarray, **settings: Any
    ) -> np.ndarray:
        """y of the adapted layer. Without `keep` the layer is in evaluation mode: no dropout."""
        with _autocast(settings.pop("autocast", None)), torch.no_grad():
            model, _ = self._adapted(W, A, B, **settings)
            return to_numpy(model(self._wide(x)))

    def lora_linear_vjp(
        self,
        x: np.ndarray,
        W: np.ndarray,
        A: np.ndarray,
        B: np.ndarray,
        dy: np.ndarray,
        **settings: Any,
    ) -> dict[str, np.ndarray]:
        """y and the gradients of ⟨dy, y⟩ by autograd through the library's forward."""
        dtype = settings.pop("autocast", None)
        model, layer = self._adapted(W, A, B, **settings)
        of = {
            "dx": self._wide(x).requires_grad_(),
            "dA": layer.lora_A["default"].weight,
            "dB": layer.lora_B["default"].weight,
        }
        if settings.get("bias") is not None:
            of["dbias"] = layer.get_base_layer().bias
        if "magnitude" in settings:
            of["dmagnitude"] = magnitude_of(layer, "default")
        if "lora_bias" in settings:
            of["dlora_bias"] = layer.lora_B["default"].bias
        with _autocast(dtype):
            y = model(of["dx"])
        answer = {"y": y} | gradients(y, of, dy)
        return arrays(answer | {name: self._narrow(answer[name]) for name in ("dx", "dA")})

    def merge(self, W: np.ndarray, A: np.ndarray, B: np.ndarray, **settings: Any) -> Any:
        """The weight after merge_adapter(), and the bias where there is one."""
        biased = "bias" in settings
        if "lora_bias" in settings and not biased:  # merging needs a bias to add it to
            settings["bias"] = np.zeros_like(settings["lora_bias"])
        model, layer = self._adapted(W, A, B, **settings)
        model.merge_adapter()
        W_merged = self._weight(layer)
        return (W_merged, to_numpy(layer.get_base_layer().bias)) if biased else W_merged

    def unmerge(
        self, W_merged: np.ndarray, A: np.ndarray, B: np.ndarray, **settings: Any
    ) -> np.ndarray:
        """The weight after unmerge_adapter() of a layer that holds W_merged as merged."""
        model, layer = self._adapted(W_merged, A, B, **settings)
        model.merge_adapter()
        self._hold(layer.get_base_layer(), W_merged)
        model.unmerge_adapter()
        return self._weight(layer)

    def multi_adapter(
        self,
        x: np.ndarray,
        W: np.ndarray,
        adapters: Sequence[Mapping[str, Any]],
        index: np.ndarray,
    ) -> np.ndarray:
        """y of one batch whose rows name their adapters, "__base__" for none."""
        model, layer = self._with_adapters(W, adapters)
        if not hasattr(layer, "_mixed_batch_forward"):
            raise NotImplementedError(f"PEFT {peft.__version__} has no adapter_names")
        names = ["__base__" if i < 0 else f"a{i}" for i in index]
        with torch.no_grad():
            return to_numpy(model(self._wide(x), adapter_names=names))

    def _with_adapters(
        self, W: np.ndarray, adapters: Sequence[Mapping[str, Any]]
    ) -> tuple[Any, Any]:
        """The model of one layer with the adapters a0, a1, …, and that layer."""
        model = layer = None
        for i, adapter in enumerate(adapters):
            model, layer = self._adapted(W, **adapter, name=f"a{i}", model=model)
        return model, layer

    def _base(self, W: np.ndarray, bias: np.ndarray | None, fan_in_fan_out: bool) -> Any:
        """A model of the frozen layer alone."""
        frozen = self._frozen(W, bias is not None, fan_in_fan_out)
        self._hold(frozen, W)
        if bias is not None:
            frozen.bias = torch.nn.Parameter(to_torch(bias))
        whole = torch.nn.Sequential(frozen)
        whole.is_loaded_in_4bit = self.in_4bit
        return whole

    def _adapted(
        self,
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
        fan_in_fan_out: bool = False,
        use_dora: bool = False,
        magnitude: np.ndarray | None = None,
        lora_bias: np.ndarray | None = None,
        name: str = "default",
        model: Any = None,
        **unknown: Any,
    ) -> tuple[Any, Any]:
        """The model of one adapted layer, or `model` with one more adapter on it, and the layer."""
        refuse_settings(f"the {self.name} peer", unknown)
        if self.autocast_adapters and to_torch(A).dtype in (torch.bfloat16, torch.float16):
            raise NotImplementedError("adapters of a half precision: they are kept in float32")
        config = lora_config(
            r=r,
            lora_alpha=plain_number(alpha),
            lora_dropout=p,
            use_rslora=use_rslora,
            use_dora=use_dora,
            lora_bias=lora_bias is not None,
            fan_in_fan_out=fan_in_fan_out,
            target_modules=["0"],
            bias="none" if bias is None else "all",
        )
        if model is None:
            base = self._base(W, bias, fan_in_fan_out)
            cast = taken(peft.get_peft_model, autocast_adapter_dtype=self.autocast_adapters)
            model = peft.get_peft_model(base, config, adapter_name=name, **cast)
        else:
            cast = taken(model.add_adapter, autocast_adapter_dtype=self.autocast_adapters)
            model.add_adapter(name, config, **cast)
        layer = model.get_submodule("base_model.model.0")
        if self.in_4bit:  # of a weight in four bits PEFT sees no dtype to give its own
            for held in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                held.to(to_torch(A).dtype)
        fill(layer.lora_A[name].weight, self._wide(A))
        fill(layer.lora_B[name].weight, to_torch(B))
        if magnitude is not None:
            fill(magnitude_of(layer, name), to_torch(magnitude))
        if lora_bias is not None:
            fill(layer.lora_B[name].bias, to_torch(lora_bias))
        if keep is not None:
            spread = self._wide(keep).numpy()
            layer.lora_dropout[name] = GivenMask(spread, p, layer.lora_dropout[name])
        self._mode(model, keep is not None)
        return model, layer


class LinearLayer(Layer):
    """A linear layer of torch, or transformers' Conv1D, as the frozen layer."""

    def _frozen(self, W: np.ndarray, biased: bool, fan_in_fan_out: bool) -> Any:
        m, n = W.shape
        frozen = Conv1D(m, n) if fan_in_fan_out else torch.nn.Linear(n, m, bias=biased)
        return frozen.to(to_torch(W).dtype)

    def _hold(self, frozen: Any, W: np.ndarray) -> None:
        fill(frozen.weight, to_torch(W.T if isinstance(frozen, Conv1D) else W))

    def _weight(self, layer: Any) -> np.ndarray:
        weight = layer.get_base_layer().weight
        return to_numpy(weight.T if layer.fan_in_fan_out else weight)


def _autocast(dtype: str | None) -> torch.autocast:
    """torch's, of this dtype; none without."""
    of = torch.bfloat16 if dtype is None else getattr(torch, dtype)
    return torch.autocast("cpu", dtype=of, enabled=dtype is not None)


def save_adapter(model: Any, folder: str, **options: Any) -> None:
    """save_pretrained without the model's card, whose template takes longer than all the rest."""
    model.create_or_update_model_card = lambda _: None
    model.save_pretrained(folder, save_embedding_layers=False, **options)


@contextmanager
def without_deprecation() -> Iterator[None]:
    """PEFT 0.21 asks for an attribute by a name that transformers 5.24 calls deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield
