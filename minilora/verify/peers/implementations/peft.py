"""Hugging Face PEFT, driven through get_peft_model, LoraConfig and PeftModel."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from safetensors import safe_open

from minilora.verify.peers._peft import LinearLayer, save_adapter, without_deprecation
from minilora.verify.peers._peft_releases import later, lora_config, magnitude_of, taken
from minilora.verify.peers._torch import plain_number, to_numpy, to_torch
from minilora.verify.peers._transformers import (
    OPTIMIZERS,
    enable_checkpointing,
    load_base,
    loss_and_gradients,
    optimizer_of,
    scheduler_of,
    stored_dtype,
    train_steps,
)
from minilora.verify.peers.implementations.peft_inference import Inference
from minilora.verify.peers.implementations.peft_module import module
from minilora.verify.peers.implementations.peft_names import Names
from minilora.verify.peers.implementations.peft_session import TARGETS, PeftSession
from minilora.verify.peers.peer import refuse_settings
from minilora.verify.peers.peft import PEER

_OPTIMIZER_SETTINGS = {
    "optimizer", "lr", "betas", "eps", "weight_decay", "momentum", "max_grad_norm",
    "schedule", "warmup_steps", "total_steps", "loraplus_lr_ratio",
}  # fmt: skip


@PEER.describes
class Peft(Inference, Names, LinearLayer):
    """Each call builds the library's own layer or model anew, so no state is left between calls."""

    def combine(
        self, adapters: Sequence[Mapping[str, Any]], weights: Sequence[float], **settings: Any
    ) -> np.ndarray:
        """The change of add_weighted_adapter, by concatenation unless another way is asked for."""
        kind = {"combination_type": "cat"} | settings
        refuse_settings(
            "the peft peer", sorted(kind.keys() - {"combination_type", "svd_rank", "density"})
        )
        A, B = adapters[0]["A"], adapters[0]["B"]
        model, layer = self._with_adapters(np.zeros((len(B), A.shape[1]), A.dtype), adapters)
        names = [f"a{i}" for i in range(len(adapters))]
        with torch.no_grad():
            model.base_model.add_weighted_adapter(names, list(weights), "all", **kind)
            return to_numpy(layer.get_delta_weight("all"))

    def module(self, *given: Any, **settings: Any) -> dict[str, np.ndarray]:
        """y of a layer of any kind, its gradients, and what is held of it merged."""
        return module(*given, **settings)

    def session(self, layer: Mapping[str, Any]) -> PeftSession:
        """A layer whose adapters come and go."""
        if layer["kind"] not in TARGETS:
            raise NotImplementedError(f"the peft peer has no layer of kind {layer['kind']}")
        return PeftSession(layer)

    def init(
        self, W: np.ndarray, *, r: int, alpha: float, seed: int, **settings: Any
    ) -> dict[str, np.ndarray]:
        """A, B and the base's weight after get_peft_model, from torch's generator."""
        known = {"init_lora_weights", "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"}
        refuse_settings("the peft peer", sorted(settings.keys() - known))
        linear = self._frozen(W, "lora_bias" in settings, settings.get("fan_in_fan_out", False))
        self._hold(linear, W)
        try:
            config = lora_config(
                r=r, lora_alpha=plain_number(alpha), target_modules=["0"], **settings
            )
        except ValueError as refused:  # a bias of B goes with one start alone
            raise NotImplementedError(str(refused)) from refused
        torch.manual_seed(seed)
        try:
            model = peft.get_peft_model(
                torch.nn.Sequential(linear),
                config,
                **taken(peft.get_peft_model, autocast_adapter_dtype=False),
            )
        except ValueError as refused:
            if "Unknown initialization" in str(refused):  # of a later release
                raise NotImplementedError(str(refused)) from refused
            raise
        except TypeError as refused:  # PiSSA and OLoRA take no float64
            raise NotImplementedError(str(refused)) from refused
        layer = model.get_submodule("base_model.model.0")
        parts = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
        if settings.get("use_dora"):
            parts["magnitude"] = magnitude_of(layer, "default")
        if settings.get("lora_bias"):
            parts["lora_bias"] = layer.lora_B["default"].bias
        return {"W": self._weight(layer)} | {name: to_numpy(p) for name, p in parts.items()}

    def model_loss(
        self, model_dir: str | Path, adapter_dir: str | Path, batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        """Loss, logits and the gradient of every tensor that the adapter's file holds."""
        model = opened(model_dir, adapter_dir)
        return loss_and_gradients(model, batch, trained_of(model, adapter_dir))

    def save(
        self,
        model_dir: str | Path,
        adapter_arrays: Mapping[str, np.ndarray],
        settings: Mapping[str, Any],
        out_dir: str | Path,
    ) -> None:
        """save_pretrained of a model whose adapter is filled by set_peft_model_state_dict."""
        config = peft.LoraConfig.from_peft_type(**settings)
        with without_deprecation():
            model = peft.get_peft_model(
                load_base(model_dir),
                config,
                **taken(peft.get_peft_model, autocast_adapter_dtype=False),
            )
        tensors = {name: to_torch(array) for name, array in adapter_arrays.items()}
        result = peft.set_peft_model_state_dict(model, tensors)
        if result.unexpected_keys:
            raise ValueError(f"the library has no place for {', '.join(result.unexpected_keys)}")
        save_adapter(model, str(out_dir))

    def load(self, model_dir: str | Path, adapter_dir: str | Path) -> dict[str, np.ndarray]:
        """get_peft_model_state_dict after from_pretrained."""
        model = opened(model_dir, adapter_dir)
        state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        return {name: to_numpy(tensor) for name, tensor in state.items()}

    def train(
        self,
        model_dir: str | Path,
        adapter_dir: str | Path,
        batches: Sequence[Sequence[Mapping[str, np.ndarray]]],
        settings: Mapping[str, Any],
    ) -> list[dict[str, np.ndarray]]:
        """A training loop as one writes it, over torch.optim and transformers' schedule."""
        settings = dict(settings)
        checkpointing = settings.pop("gradient_checkpointing", False)
        model = opened(model_dir, adapter_dir, checkpointing)
        trained = trained_of(model, adapter_dir)
        optimizer = optimizer_for(trained, settings, model)
        scheduler = scheduler_of(optimizer, settings, len(batches))
        return train_steps(
            model, trained, optimizer, scheduler, batches, settings.get("max_grad_norm")
        )

    def optimizer_steps(
        self,
        params: Mapping[str, np.ndarray],
        gradients: Sequence[Mapping[str, np.ndarray] | Sequence[tuple[int, Mapping[str, Any]]]],
        settings: Mapping[str, Any],
    ) -> list[dict[str, np.ndarray]]:
        """Parameters after each step of torch.optim under transformers' schedule.

        A step's gradients are one dict, or pairs (tokens, dict), one per micro-batch, of which the
        average weighted by tokens is taken: a training loop scales each loss by tokens / total.
        """
        tensors = {name: torch.nn.Parameter(to_torch(value)) for name, value in params.items()}
        optimizer = optimizer_for(tensors, settings)
        scheduler = scheduler_of(optimizer, settings, len(gradients))
        after = []
        for step in gradients:
            optimizer.zero_grad()
            batches = [(1, step)] if isinstance(step, Mapping) else step
            total = sum(tokens for tokens, _ in batches)
            for tokens, gradient in batches:
                for name, value in gradient.items():
                    share = to_torch(value) * (tokens / total)
                    so_far = tensors[name].grad
                    tensors[name].grad = share if so_far is None else so_far + share
            if settings.get("max_grad_norm") is not None:
                torch.nn.utils.clip_grad_norm_(tensors.values(), settings["max_grad_norm"])
            optimizer.step()
            scheduler.step()
            after.append({name: to_numpy(tensor) for name, tensor in tensors.items()})
        return after


def opened(model_dir: str | Path, adapter_dir: str | Path, checkpointing: bool = False) -> Any:
    """The library's model of two folders, its adapter to be trained."""
    base = load_base(model_dir)
    if stored_dtype(adapter_dir) != base.dtype:
        raise ValueError(
            f"{adapter_dir}: stored in {stored_dtype(adapter_dir)}, expected {base.dtype} like "
            f"{model_dir}; store base and adapter in one dtype"
        )
    if checkpointing:
        enable_checkpointing(base)
    with without_deprecation():
        return peft.PeftModel.from_pretrained(
            base,
            str(adapter_dir),
            is_trainable=True,
            **taken(peft.PeftModel.from_pretrained, autocast_adapter_dtype=False),
        )


def trained_of(model: Any, adapter_dir: str | Path) -> dict[str, Any]:
    """The parameters of an adapter by their names in its file."""
    # With the parameters for a state dict the library itself says how each is named in a file.
    trained: dict[str, Any] = peft.get_peft_model_state_dict(
        model, state_dict=dict(model.named_parameters()), save_embedding_layers=False
    )
    with safe_open(Path(adapter_dir) / "adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
    if set(trained) != names:
        raise ValueError(
            f"{adapter_dir}: the library trains other tensors than the file holds: "
            f"{', '.join(sorted(set(trained) ^ names))}"
        )
    return trained


def optimizer_for(
    tensors: Mapping[str, torch.nn.Parameter], settings: Mapping[str, Any], model: Any = None
) -> torch.optim.Optimizer:
    """The optimizer that the settings name, with the library's LoRA+ groups where they ask.

    The library groups the parameters of ``model``, or without one of a model that has these.
    """
    refuse_settings("the peft peer", sorted(set(settings) - _OPTIMIZER_SETTINGS))
    kind = settings.get("optimizer", "adamw")
    ratio = settings.get("loraplus_lr_ratio")
    if ratio is None or kind not in OPTIMIZERS:
        return optimizer_of(tensors.values(), settings)
    make, names = OPTIMIZERS[kind]
    options = {"lr": settings["lr"]} | {key: settings[key] for key in names if key in settings}
    return later("create_loraplus_optimizer")(
        model or _with_peft_names(tensors),
        make,
        loraplus_lr_ratio=ratio,
        weight_decay=settings.get("weight_decay", 0.0),
        **options,
    )


def _with_peft_names(tensors: Mapping[str, torch.nn.Parameter]) -> torch.nn.Module:
    """A model of these parameters, each A and B where PEFT's layers have theirs."""
    model = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, last = re.sub(r"\.([AB])$", r".lora_\1.default.weight", name).split(".")
        at = model
        for part in path:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at.get_submodule(part)
        at.register_parameter(last, tensor)
    return model
