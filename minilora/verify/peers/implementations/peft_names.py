"""PEFT's own matching of names, on a model without numbers that is made of these names."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import peft
import torch
import transformers

from minilora.verify.peers._peft import without_deprecation


class Names:
    """What get_peft_model adapts and trains."""

    def targets(
        self, config: Mapping[str, Any], names: Sequence[str]
    ) -> dict[str, tuple[int, float]]:
        """The adapted modules, each with its rank and alpha."""
        model = _adapted(config, dict.fromkeys(names, ("weight",)))
        layers = {
            name: layer
            for name, layer in model.base_model.model.named_modules()
            if isinstance(layer, peft.tuners.lora.LoraLayer)
        }
        return {n: (at.r["default"], at.lora_alpha["default"]) for n, at in layers.items()}

    def trainable(self, config: Mapping[str, Any], names: Sequence[str]) -> list[str]:
        """The trained parameters, as save_pretrained names them."""
        parameters: dict[str, tuple[str, ...]] = {}
        for name in names:
            at, _, part = name.rpartition(".")
            parameters[at] = (*parameters.get(at, ()), part)
        model = _adapted(config, parameters)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        saved = peft.get_peft_model_state_dict(
            model, state_dict=trained, save_embedding_layers=False
        )
        return list(saved)


class _Model(transformers.PreTrainedModel):
    """Modules under these names: embeddings, norms and linear layers; ``lm_head`` is the head."""

    config_class = transformers.PretrainedConfig

    def __init__(self, parameters: Mapping[str, Sequence[str]]) -> None:
        super().__init__(transformers.PretrainedConfig(tie_word_embeddings=False))
        for name, parts in parameters.items():
            parent: torch.nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, torch.nn.Module())
                parent = parent._modules[part]
            parent.add_module(last, _module(last, "bias" in parts))

    def get_output_embeddings(self) -> Any:
        """The output head, which "all-linear" leaves out."""
        return getattr(self, "lm_head", None)


def _module(last: str, bias: bool) -> torch.nn.Module:
    if last == "embed_tokens":
        return torch.nn.Embedding(3, 2)
    if last.endswith("norm"):
        return torch.nn.LayerNorm(2, bias=bias)
    return torch.nn.Linear(2, 2, bias=bias)


def _adapted(config: Mapping[str, Any], parameters: Mapping[str, Sequence[str]]) -> Any:
    """The library's model, without numbers."""
    settings = peft.LoraConfig.from_peft_type(**copy.deepcopy(dict(config)))
    with torch.device("meta"), without_deprecation():
        return peft.get_peft_model(_Model(parameters), settings)
