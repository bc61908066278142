"""LoRA itself on a kind of layer in loralib."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import Any

import loralib
import numpy as np
import torch

from minilora.verify.peers._torch import GivenMask, fill, plain_number, to_torch
from minilora.verify.properties.layer_kinds import LayerCase
from minilora.verify.properties.libraries.torch_layers import (
    Base,
    LibraryAnswer,
    P,
    Unsupported,
    dropout_mask,
    fill_base,
    layer_answers,
    named_parts,
    read_base,
)

LORALIB = f"loralib {version('loralib')}"


def loralib_layer(case: LayerCase, rng: np.random.Generator) -> LibraryAnswer:
    """The case in loralib's layer, of LoRA itself."""
    ranks: dict[str, Any] = {"r": case.r, "lora_alpha": plain_number(case.alpha)}
    ranks["merge_weights"] = False
    name = LORALIB
    if case.kind == "embedding":
        layer = loralib.Embedding(*case.W.shape, **ranks)
        case, name = replace(case, extra={"factor": 1.0}), f"{LORALIB}, without the factor"
    elif case.kind == "fused":
        if len(set(case.extra["rows"])) > 1:
            raise Unsupported(f"{LORALIB} has parts of one size only")
        m, n = case.W.shape
        enabled = [True, False, True]
        layer = loralib.MergedLinear(n, m, lora_dropout=P, enable_lora=enabled, **ranks)
    else:
        across = case.kind == "transposed"
        m, n = case.W.shape[::-1] if across else case.W.shape
        layer = loralib.Linear(n, m, lora_dropout=P, fan_in_fan_out=across, **ranks)
    model = torch.nn.ModuleDict({"layer": layer}).double()
    fill_base(case, layer)
    tensors = {"A": layer.lora_A, "B": layer.lora_B}
    for part, tensor in tensors.items():  # one matrix's rows after another's
        fill(tensor, to_torch(np.concatenate([named[part] for named in named_parts(case)])))
    if case.K is not None:
        layer.lora_dropout = GivenMask(dropout_mask(case), P, layer.lora_dropout)

    def unpack(name: str, gradient: np.ndarray) -> list[np.ndarray]:
        return np.split(gradient, len(case.P))

    def merged() -> Base:
        layer.merge_weights = True
        layer.eval()
        return read_base(case, layer)

    return LibraryAnswer(case, layer_answers(case, model, layer, tensors, unpack), merged, name)
