"""Microsoft's loralib: its Linear layer, alone and in the place of the layers of a model."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import loralib
import numpy as np
import torch
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from minilora.verify.peers._torch import (
    GivenMask,
    arrays,
    fill,
    gradients,
    plain_number,
    to_numpy,
    to_torch,
)
from minilora.verify.peers._transformers import (
    enable_checkpointing,
    load_base,
    logits_of,
    loss_and_gradients,
    optimizer_of,
    scheduler_of,
    train_steps,
)
from minilora.verify.peers.implementations.loralib_module import module
from minilora.verify.peers.loralib import PEER
from minilora.verify.peers.peer import refuse_settings

# How a PEFT file names what loralib holds as a layer's own lora_A and lora_B.
_LORA = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])\.weight")


@PEER.describes
class Loralib:
    """Each call builds the library's own layer or model anew, so no state is left between calls."""

    def lora_linear(
        self, x: np.ndarray, W: np.ndarray, A: np.ndarray, B: np.ndarray, **settings: Any
    ) -> np.ndarray:
        """y of the adapted layer. Without `keep` the layer is in evaluation mode: no dropout."""
        with torch.no_grad():
            return to_numpy(_adapted(W, A, B, **settings)(to_torch(x)))

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
        layer = _adapted(W, A, B, **settings)
        of = {"dx": to_torch(x).requires_grad_(), "dA": layer.lora_A, "dB": layer.lora_B}
        if layer.bias is not None:
            of["dbias"] = layer.bias
        y = layer(of["dx"])
        return arrays({"y": y} | gradients(y, of, dy))

    def merge(self, W: np.ndarray, A: np.ndarray, B: np.ndarray, **settings: Any) -> Any:
        """The weight after eval(), which merges where the layer was built with merge_weights."""
        layer = _adapted(W, A, B, merge_weights=True, **settings)
        layer.eval()
        return _weight(layer) if layer.bias is None else (_weight(layer), to_numpy(layer.bias))

    def unmerge(
        self, W_merged: np.ndarray, A: np.ndarray, B: np.ndarray, **settings: Any
    ) -> np.ndarray:
        """The weight after train(), which unmerges, of a layer that holds W_merged as merged."""
        layer = _adapted(W_merged, A, B, merge_weights=True, **settings)
        as_merged = layer.weight.detach().clone()
        layer.eval()
        fill(layer.weight, as_merged)
        layer.train()
        return _weight(layer)

    def module(self, *given: Any, **settings: Any) -> dict[str, np.ndarray]:
        """y of a layer of a kind that the library has, its gradients, and what is held merged."""
        return module(*given, **settings)

    def session(self, layer: Mapping[str, Any]) -> "Session":
        """A layer whose one adapter is never removed."""
        if layer["kind"] not in ("linear", "conv1d", "embedding", "fused", "dropout"):
            raise NotImplementedError(f"loralib has no layer of kind {layer['kind']}")
        if len(set(layer.get("rows", ()))) > 1:
            raise NotImplementedError("loralib's MergedLinear has parts of one size")
        return Session(layer)

    def init(
        self, W: np.ndarray, *, r: int, alpha: float, seed: int, **settings: Any
    ) -> dict[str, np.ndarray]:
        """A and B of a new layer, from torch's generator."""
        refuse_settings("loralib", settings)
        m, n = W.shape
        torch.manual_seed(seed)
        layer = loralib.Linear(
            n, m, r=r, lora_alpha=plain_number(alpha), bias=False, dtype=to_torch(W).dtype
        )
        return {"A": to_numpy(layer.lora_A), "B": to_numpy(layer.lora_B)}

    def model_loss(
        self, model_dir: str | Path, adapter_dir: str | Path, batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        """Loss, logits and gradients of a transformers model whose adapted layers are loralib's."""
        model, trained = _opened(model_dir, adapter_dir)
        return loss_and_gradients(model, batch, trained)

    def logits(
        self, model_dir: str | Path, adapter_dir: str | Path, input_ids: np.ndarray
    ) -> np.ndarray:
        """The logits of such a model in evaluation."""
        model, _ = _opened(model_dir, adapter_dir)
        return logits_of(model, input_ids)

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
        model, trained = _opened(model_dir, adapter_dir)
        if checkpointing:
            enable_checkpointing(model)
        optimizer = optimizer_of(trained.values(), settings)
        scheduler = scheduler_of(optimizer, settings, len(batches))
        return train_steps(
            model, trained, optimizer, scheduler, batches, settings.get("max_grad_norm")
        )


class Session:
    """One of the library's layers: eval() merges its only adapter, and train() takes it out again.

    The adapter is there from when the layer is built; its tensors are loaded when it is to act.
    """

    def __init__(self, layer: Mapping[str, Any]) -> None:
        self._kind, self._given = layer["kind"], dict(layer)
        self._adapter: Mapping[str, Any] = {}
        self._layer: Any = None
        self._build(0, 1)

    def _build(self, r: int, alpha: float, enable: Sequence[bool] = (), p: float = 0.0) -> None:
        W, bias = self._given["W"], self._given.get("bias")
        m, n = W.shape
        how: dict[str, Any] = {"r": r, "lora_alpha": plain_number(alpha)}
        dtype = to_torch(W).dtype
        across = self._kind == "conv1d"
        if self._kind == "embedding":
            self._layer = loralib.Embedding(m, n, dtype=dtype, **how)
        else:
            how |= {"bias": bias is not None, "fan_in_fan_out": across, "dtype": dtype}
            how["lora_dropout"] = p
            if self._kind == "fused":
                enabled = [*enable] or [False] * len(self._given["rows"])
                self._layer = loralib.MergedLinear(n, m, enable_lora=enabled, **how)
            else:
                self._layer = loralib.Linear(n, m, **how)
        fill(self._layer.weight, to_torch(W.T if across else W))
        if bias is not None:
            fill(self._layer.bias, to_torch(bias))
        if hasattr(self._layer, "lora_B"):  # the library draws an embedding's
            fill(self._layer.lora_B, torch.zeros_like(self._layer.lora_B))

    def add(self, name: str, adapter: Mapping[str, Any]) -> None:
        """The layer built with its rank and alpha, B = 0."""
        if self._adapter:
            raise NotImplementedError("loralib has one adapter a layer")
        refuse_settings("loralib", sorted(adapter.keys() - {"A", "B", "alpha", "r", "enable", "p"}))
        self._adapter = {"name": name, **adapter}
        enable, p = adapter.get("enable", ()), adapter.get("p", 0.0)
        self._build(adapter["r"], adapter["alpha"], enable, p)

    def activate(self, names: Sequence[str]) -> None:
        """Its tensors loaded."""
        if [*names] != [self._adapter.get("name")]:
            raise NotImplementedError("loralib has no switch between adapters, and none")
        tensors = {f"lora_{part}": to_torch(self._adapter[part]) for part in "AB"}
        self._layer.load_state_dict(tensors, strict=False)

    def merge(self) -> None:
        """Which eval() does."""
        self._layer.eval()

    def unmerge(self) -> None:
        """Which train() does."""
        self._layer.train()

    train, eval = unmerge, merge

    def forward(self, x: np.ndarray) -> np.ndarray:
        """y."""
        with torch.no_grad():
            return to_numpy(self._layer(to_torch(x)))

    def weight(self) -> np.ndarray:
        """The weight that is held."""
        weight = self._layer.weight
        return to_numpy(weight.T if self._kind == "conv1d" else weight)


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
    fan_in_fan_out: bool = False,
    merge_weights: bool = False,
    **unknown: Any,
) -> Any:
    """The library's layer, filled with the given arrays; only with `merge_weights` may it merge."""
    refuse_settings("loralib", [name for name, value in unknown.items() if value is not False])
    m, n = W.shape
    weight = to_torch(W)
    layer = loralib.Linear(
        n,
        m,
        r=r,
        lora_alpha=plain_number(alpha),
        lora_dropout=p,
        fan_in_fan_out=fan_in_fan_out,
        merge_weights=merge_weights,
        bias=bias is not None,
        dtype=weight.dtype,
    )
    fill(layer.weight, weight.T if fan_in_fan_out else weight)
    if bias is not None:
        fill(layer.bias, to_torch(bias))
    fill(layer.lora_A, to_torch(A))
    fill(layer.lora_B, to_torch(B))
    if keep is not None:
        layer.lora_dropout = GivenMask(keep, p, layer.lora_dropout)
    elif not merge_weights:
        layer.eval()
    return layer


def _opened(model_dir: str | Path, adapter_dir: str | Path) -> tuple[Any, dict[str, Any]]:
    """A transformers model with loralib's layers, and what of it the adapter's file holds."""
    model = load_base(model_dir)
    config = _adapter_config(adapter_dir)
    tensors = load_file(Path(adapter_dir) / "adapter_model.safetensors")
    for site in {match[1] for match in map(_LORA.fullmatch, tensors) if match}:
        _adapt(model, site, tensors, config)
    loralib.mark_only_lora_as_trainable(model)
    saved = set(config.get("modules_to_save") or ())
    trained = {}
    for name, tensor in tensors.items():
        path = _LORA.sub(r"\1.\2", name).removeprefix("base_model.model.")
        if not _LORA.fullmatch(name) and not saved & set(path.split(".")):
            raise NotImplementedError(f"loralib has no place for the adapter's tensor {name}")
        trained[name] = model.get_parameter(path)
        if not _LORA.fullmatch(name):  # which loralib knows nothing of
            trained[name].requires_grad_()
        fill(trained[name], tensor)
    return model, trained


def _weight(layer: Any) -> np.ndarray:
    """The weight of a layer as (m, n)."""
    return to_numpy(layer.weight.T if layer.fan_in_fan_out else layer.weight)


# Fields of an adapter's configuration that loralib can honour or that change no arithmetic here.
_HONOURED = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "target_modules", "exclude_modules", "task_type",
}  # fmt: skip


def _adapter_config(adapter_dir: str | Path) -> dict[str, Any]:
    """The adapter's configuration; NotImplementedError where loralib computes something else."""
    config: dict[str, Any] = json.loads((Path(adapter_dir) / "adapter_config.json").read_text())
    for field, value in config.items():
        plain = field in _HONOURED or value in (None, False, [], {}, "none")
        if not plain or (field == "init_lora_weights" and value not in (True, False, "gaussian")):
            raise NotImplementedError(f"loralib knows no adapter with {field} = {value!r}")
    return config


def _adapt(
    model: torch.nn.Module,
    site: str,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
) -> None:
    """Put the library's layer, with the base's own weight and bias, in the place of `site`."""
    A, B = (tensors[f"base_model.model.{site}.lora_{end}.weight"] for end in "AB")
    old: Any = model.get_submodule(site)
    # PEFT's rule for a pattern: it matches the whole module path or an end of it.
    alphas = [
        alpha
        for pattern, alpha in (config.get("alpha_pattern") or {}).items()
        if re.match(rf"(.*\.)?({pattern})$", site)
    ]
    layer = loralib.Linear(
        A.shape[1],
        len(B),
        r=len(A),
        lora_alpha=plain_number(alphas[0] if alphas else config["lora_alpha"]),
        lora_dropout=config.get("lora_dropout", 0.0),
        fan_in_fan_out=isinstance(old, Conv1D),
        merge_weights=False,
        bias=old.bias is not None,
        dtype=old.weight.dtype,
    )
    layer.weight, layer.bias = old.weight, old.bias
    model.set_submodule(site, layer)
