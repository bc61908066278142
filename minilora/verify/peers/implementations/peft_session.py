"""PEFT's adapters that come and go on one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import peft
import torch
from transformers.pytorch_utils import Conv1D

from minilora.verify.peers._peft import save_adapter, without_deprecation
from minilora.verify.peers._peft_releases import later, lora_config, magnitude_of, taken
from minilora.verify.peers._torch import fill, plain_number, to_numpy, to_torch


class _Tied(torch.nn.Module):
    """Logits of the embedded, by one table; named as the library knows an embedding and a head."""

    config: ClassVar = {"tie_word_embeddings": True}
    _tied_weights_keys: ClassVar = ["lm_head.weight"]

    def __init__(self, v: int, d: int) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(v, d)
        self.lm_head = torch.nn.Linear(d, v, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm_head(self.embed_tokens(ids))
        return logits


TARGETS = {"linear": ["0"], "conv1d": ["0"], "embedding": ["0"], "bias": ["0"], "full": ["0"]} | {
    "tied": ["embed_tokens"],
    "lora_bias": ["0"],
    "dropout": ["0"],
}
"""The modules of each kind's model that are adapted where the adapter does not say."""

_ON: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
}


class PeftSession:
    """One layer in a PeftModel, or two, whose own methods do what is asked.

    A model has its first adapter from the beginning; until one is activated, adapters are disabled.
    """

    def __init__(self, layer: Mapping[str, Any]) -> None:
        self._kind, W, bias = layer["kind"], layer["W"], layer.get("bias")
        m, n = W.shape
        if self._kind == "tied":
            self._model: Any = _Tied(m, n).to(to_torch(W).dtype)
            self._base = self._model.embed_tokens
            fill(self._base.weight, to_torch(W))
            return
        base: Any = {
            "conv1d": lambda: Conv1D(m, n),
            "embedding": lambda: torch.nn.Embedding(m, n),
        }.get(self._kind, lambda: torch.nn.Linear(n, m, bias=bias is not None))()
        self._base, layers = base, [base]
        if self._kind == "full":
            head = layer["head"]
            layers.append(torch.nn.Linear(*head["W"].shape[::-1]))
        self._model = torch.nn.Sequential(*layers).to(to_torch(W).dtype)
        fill(base.weight, to_torch(W.T if self._kind == "conv1d" else W))
        if bias is not None:
            fill(base.bias, to_torch(bias))
        if self._kind == "full":
            _fill_module(layers[1], head)

    def _module(self, name: str) -> Any:
        return self._model.get_submodule(f"base_model.model.{name}")

    def _factors(self, name: str) -> dict[str, list[tuple[torch.Tensor, bool]]]:
        """The adapter's A and B wherever they are, and whether transposed there."""
        factors: dict[str, list[tuple[torch.Tensor, bool]]] = {"A": [], "B": []}
        for place in ("embed_tokens", "lm_head") if self._kind == "tied" else ("0",):
            layer = self._module(place)
            for part, other in zip("AB", "BA", strict=True):
                if name in getattr(layer, f"lora_embedding_{part}", {}):
                    factors[part].append((getattr(layer, f"lora_embedding_{part}")[name], False))
                if name in getattr(layer, f"lora_{part}", {}):
                    tensor = getattr(layer, f"lora_{part}")[name].weight
                    twin = bool(factors["B"])
                    factors[other if twin else part].append((tensor, twin))
        return factors

    def _config(self, adapter: Mapping[str, Any]) -> peft.LoraConfig:
        options: dict[str, Any] = {"target_modules": TARGETS[self._kind]}
        options |= _ON[adapter["on"]] if "on" in adapter else {}
        options |= {"modules_to_save": ["1"]} if "head" in adapter else {}
        options |= {"bias": "lora_only"} if "bias" in adapter else {}
        return lora_config(
            r=adapter["r"],
            lora_alpha=plain_number(adapter["alpha"]),
            use_rslora=adapter.get("use_rslora", False),
            use_dora=adapter.get("use_dora", False),
            lora_bias="lora_bias" in adapter,
            lora_dropout=adapter.get("p", 0.0),
            fan_in_fan_out=self._kind == "conv1d",
            **options,
        )

    def add(self, name: str, adapter: Mapping[str, Any]) -> None:
        """get_peft_model, or add_adapter."""
        config = self._config(adapter)
        if isinstance(self._model, peft.PeftModel):
            self._model.add_adapter(
                name, config, **taken(self._model.add_adapter, autocast_adapter_dtype=False)
            )
        else:
            self._model = peft.get_peft_model(
                self._model,
                config,
                adapter_name=name,
                **taken(peft.get_peft_model, autocast_adapter_dtype=False),
            )
            self._model.base_model.disable_adapter_layers()
        self._adjust()
        for part, places in self._factors(name).items():
            for tensor, turned in places:
                fill(tensor, to_torch(adapter[part].T if turned else adapter[part]))
        if "magnitude" in adapter:
            magnitude = magnitude_of(self._module("0"), name)
            fill(magnitude, to_torch(adapter["magnitude"]))
        if "lora_bias" in adapter:
            fill(self._module("0").lora_B[name].bias, to_torch(adapter["lora_bias"]))
        if "head" in adapter:
            _fill_module(self._module("1").modules_to_save[name], adapter["head"])
        if "bias" in adapter:  # which the library trains in the base itself
            fill(self._base.bias, to_torch(adapter["bias"]))

    def _adjust(self) -> None:
        """What an adapter that was just made needs before it is filled."""

    def replace(self, name: str, adapter: Mapping[str, Any]) -> None:
        """hotswap_adapter_from_state_dict, which takes A and B and a configuration."""
        others = adapter.keys() - {"A", "B", "alpha", "r", "use_rslora"}
        if others or self._kind in ("tied", "bias", "full"):
            raise NotImplementedError("the peft peer hot-swaps A and B of one layer alone")
        form = "lora_embedding_{}.{}" if self._kind == "embedding" else "lora_{}.{}.weight"
        state = {
            f"base_model.model.0.{form.format(part, name)}": to_torch(adapter[part])
            for part in "AB"
        }
        later("hotswap_adapter_from_state_dict")(self._model, state, name, self._config(adapter))

    def combine(self, name: str, names: Sequence[str], weights: Sequence[float]) -> None:
        """add_weighted_adapter, by concatenation."""
        self._model.base_model.add_weighted_adapter(
            list(names), list(weights), name, combination_type="cat"
        )

    def activate(self, names: Sequence[str]) -> None:
        """set_adapter of the base model, which takes several; none disables."""
        if names:
            self._model.base_model.enable_adapter_layers()
            self._model.base_model.set_adapter(list(names))
        else:
            self.disable()

    def disable(self) -> None:
        """disable_adapter_layers."""
        self._model.base_model.disable_adapter_layers()

    def scale(self, name: str, factor: float) -> None:
        """set_scale of the layers that have it, a factor on alpha / r."""
        for place in ("embed_tokens", "lm_head") if self._kind == "tied" else ("0",):
            if name in getattr(self._module(place), "scaling", {}):
                self._module(place).set_scale(name, factor)

    def merge(self) -> None:
        """merge_adapter."""
        self._model.merge_adapter()

    def unmerge(self) -> None:
        """unmerge_adapter."""
        self._model.unmerge_adapter()

    def delete(self, name: str) -> None:
        """delete_adapter."""
        self._model.delete_adapter(name)

    def train(self) -> None:
        """Training."""
        self._model.train()

    def eval(self) -> None:
        """Evaluation."""
        self._model.eval()

    def save(self, name: str, folder: str) -> None:
        """save_pretrained of this adapter alone, which makes a folder of its name."""
        with without_deprecation():
            save_adapter(self._model, folder, selected_adapters=[name])

    def load(self, name: str, folder: str) -> None:
        """from_pretrained, or load_adapter."""
        (saved,) = (str(path) for path in Path(folder).iterdir() if path.is_dir())
        how = {
            "is_trainable": True,
            **taken(peft.PeftModel.from_pretrained, autocast_adapter_dtype=False),
        }
        if isinstance(self._model, peft.PeftModel):
            self._model.load_adapter(saved, name, **how)
        else:
            self._model = peft.PeftModel.from_pretrained(
                self._model, saved, adapter_name=name, **how
            )
            self._model.base_model.disable_adapter_layers()

    def forward(self, x: np.ndarray) -> np.ndarray:
        """y."""
        with torch.no_grad():
            return to_numpy(self._model(to_torch(x)))

    def gradients(self, x: np.ndarray, dy: np.ndarray) -> dict[str, np.ndarray]:
        """Those of ⟨dy, y⟩ by autograd, of whatever is trained."""
        tensors: dict[str, list[tuple[torch.Tensor, bool]]] = {}
        input_tensor = to_torch(x)
        if x.dtype.kind not in "iu":
            tensors["dx"] = [(input_tensor.requires_grad_(), False)]
        for name, config in self._model.peft_config.items():
            tensors |= {f"{name}.{part}": uses for part, uses in self._factors(name).items()}
            if getattr(config, "lora_bias", False):
                tensors[f"{name}.lora_bias"] = [(self._module("0").lora_B[name].bias, False)]
            if config.use_dora:
                magnitude = magnitude_of(self._module("0"), name)
                tensors[f"{name}.magnitude"] = [(magnitude, False)]
            if config.modules_to_save:
                module = self._module("1").modules_to_save[name]
                tensors |= {
                    f"{name}.head.W": [(module.weight, False)],
                    f"{name}.head.bias": [(module.bias, False)],
                }
            if config.bias != "none":
                tensors[f"{name}.bias"] = [(self._base.bias, False)]
        y = self._model(input_tensor)
        answer: dict[str, np.ndarray] = {}
        for key, places in tensors.items():
            for tensor, turned in places:
                if not (tensor.requires_grad and y.requires_grad):
                    continue
                (g,) = torch.autograd.grad(
                    y, tensor, to_torch(dy), retain_graph=True, allow_unused=True
                )
                if g is not None:
                    gradient = to_numpy(g.T if turned else g)
                    answer[key] = answer[key] + gradient if key in answer else gradient
        return answer

    def step(self, x: np.ndarray, dy: np.ndarray, lr: float) -> None:
        """torch's SGD over the parameters that the library has marked for training."""
        trained = [p for p in self._model.parameters() if p.requires_grad]
        y = self._model(to_torch(x))
        if not (trained and y.requires_grad):
            return
        optimizer = torch.optim.SGD(trained, lr)
        optimizer.zero_grad()
        y.backward(to_torch(dy))
        optimizer.step()
        optimizer.zero_grad()

    def rows(self, x: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """y of a batch whose rows name their adapters."""
        with torch.no_grad():
            return to_numpy(
                self._model(to_torch(x), adapter_names=[name or "__base__" for name in names])
            )

    def weight(self) -> np.ndarray:
        """The weight that the base layer holds."""
        weight = self._base.weight
        return to_numpy(weight.T if self._kind == "conv1d" else weight)


def _fill_module(module: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """A linear module's weight and bias."""
    fill(module.weight, to_torch(arrays["W"]))
    fill(module.bias, to_torch(arrays["bias"]))
