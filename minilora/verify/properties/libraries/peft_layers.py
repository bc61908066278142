"""A variant on a kind of layer in PEFT, and how PEFT starts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import peft
import torch
from transformers.pytorch_utils import Conv1D

from minilora.spec.initialization import INITIALIZATIONS
from minilora.spec.lora import LORA
from minilora.spec.variants import REGISTRY, extended
from minilora.verify.peers._torch import GivenMask, fill, plain_number, to_numpy, to_torch
from minilora.verify.properties.layer_kinds import LayerCase
from minilora.verify.properties.libraries.torch_layers import (
    AskLibrary,
    Base,
    LibraryAnswer,
    P,
    Unsupported,
    base_model,
    dropout_mask,
    fill_base,
    fill_parts,
    fused_as_parts,
    layer_answers,
    moved_convolution,
    named_parts,
    read_base,
    refusals,
)

PEFT = f"peft {version('peft')}"


def _fill_experts(
    case: LayerCase, tensors: dict[str, torch.Tensor], library: str
) -> Callable[[str, np.ndarray], list[np.ndarray]]:
    """PEFT's layout: the rows of A (e·r, n) by the expert, the columns of B (m, r·e) by the rank.

    So the columns of expert i are i, i + e, i + 2 e, …
    """
    A, B = (np.stack([named[name] for named in named_parts(case)]) for name in "AB")
    e, r, n = A.shape
    if tensors["A"].shape != (e * r, n):
        found = tuple(tensors["A"].shape)
        raise Unsupported(f"{library} makes A {found} where it needs {(e * r, n)}")
    fill(tensors["A"], to_torch(A.reshape(e * r, n)))
    fill(tensors["B"], to_torch(B.transpose(1, 2, 0).reshape(-1, r * e)))

    def unpack(name: str, gradient: np.ndarray) -> list[np.ndarray]:
        if name == "A":
            return list(gradient.reshape(e, r, n))
        return list(gradient.reshape(-1, r, e).transpose(2, 0, 1))

    return unpack


def _config(case: LayerCase, p: float) -> peft.PeftConfig:
    """PEFT's configuration of the variant on the module or the parameter."""
    at: dict[str, Any] = {"target_modules": ["layer"]}
    if case.kind == "experts":
        at = {"target_modules": [], "target_parameters": ["layer.weight"]}
    return _CONFIGS[_peft_type(case)](case, p, at)


def _peft_type(case: LayerCase) -> str:
    return extended(REGISTRY[case.entry].equation).peft.peft_type


def _vera_config(case: LayerCase, p: float, at: dict[str, Any]) -> peft.PeftConfig:
    return peft.VeraConfig(r=case.r, vera_dropout=p, **at)


def _adalora_config(case: LayerCase, p: float, at: dict[str, Any]) -> peft.PeftConfig:
    ranks = {"init_r": case.r, "target_r": 1, "total_step": 9}
    return peft.AdaLoraConfig(lora_alpha=plain_number(case.alpha), lora_dropout=p, **ranks, **at)


def _lora_config(case: LayerCase, p: float, at: dict[str, Any]) -> peft.PeftConfig:
    entry = REGISTRY[case.entry]
    setting = extended(entry.equation).peft.setting
    if case.on is not None:
        at |= {setting: [0], "task_type": "CAUSAL_LM"}
    elif setting:
        at |= {setting: True}
    if INITIALIZATIONS[entry.init].base == "quantized":
        at["loftq_config"] = peft.LoftQConfig()
    return peft.LoraConfig(
        r=case.r,
        lora_alpha=plain_number(case.alpha),
        lora_dropout=p,
        use_rslora=entry.rslora,
        init_lora_weights=True if entry.init == "kaiming" else entry.init,
        **at,
    )


_CONFIGS: dict[str, Callable[[LayerCase, float, dict[str, Any]], peft.PeftConfig]] = {
    "LORA": _lora_config,
    "VERA": _vera_config,
    "ADALORA": _adalora_config,
}
_SCALES = {"VERA": ", s = 1", "ADALORA": ", s = alpha/(r + 1e-5)"}
_DROPOUTS = {"VERA": "vera_dropout"}


def _default(parts: Any, field: str = "") -> torch.Tensor:
    """The default adapter's tensor in one of PEFT's dictionaries of modules or parameters."""
    part = parts["default"]
    tensor: torch.Tensor = getattr(part, field) if field else getattr(part, "weight", part)
    return tensor


def _peft_tensors(case: LayerCase, layer: Any) -> dict[str, torch.Tensor]:
    """The variant's parameters in PEFT's layer, by the names that its files have."""
    names = dict(extended(REGISTRY[case.entry].equation).peft.tensors)
    if case.kind == "embedding":
        names |= {"A": "lora_embedding_A", "B": "lora_embedding_B"}
    tensors = {}
    for part in case.variant.parts:
        attribute, _, field = names[part].partition(".")
        tensors[part] = _default(getattr(layer, attribute), field)
    return tensors


def _injected(case: LayerCase, model: torch.nn.ModuleDict, p: float) -> tuple[Any, str]:
    """The layer that PEFT puts into the model, started as the variant starts, and what is not so.

    PiSSA and OLoRA refuse float64: the model is of float32 here.
    """
    layer, note = model["layer"], ""
    before = layer.weight.detach().clone()
    config = _config(case, p)
    if _peft_type(case) == "VERA":  # its factors are the model's
        peft.get_peft_model(model, config)
    else:
        note = _inject(case, model, config)
    init = INITIALIZATIONS[REGISTRY[case.entry].init]
    if init.in_peft:
        residual = init.base == "residual"
        unchanged = torch.equal(layer.weight, before)
        if unchanged if residual else not _peft_tensors(case, model["layer"])["A"].any():
            raise Unsupported(f"{PEFT} makes it plain LoRA's start, without a word")
    return model["layer"], note


def _inject(case: LayerCase, model: torch.nn.ModuleDict, config: peft.PeftConfig) -> str:
    """Put PEFT's layer into the model; where its start needs a GPU, LoRA's, and say so."""
    layer = model["layer"]
    try:
        peft.inject_adapter_in_model(config, model)
    except (AssertionError, RuntimeError, ValueError) as error:
        if not any(word in str(error) for word in ("CUDA", "NVIDIA", "bitsandbytes")):
            raise
        if isinstance(layer, Conv1D) and layer.nf != layer.nx:  # what it would come to
            found, wanted = (case.r, layer.nf), (case.r, layer.nx)
            raise Unsupported(f"{PEFT} makes A {found} where it needs {wanted}") from error
        config.init_lora_weights = True
        model["layer"] = layer
        peft.inject_adapter_in_model(config, model)
        return ", after its start, which needs a GPU"  # LoftQ's; what follows is LoRA
    return ""


def peft_layer(
    case: LayerCase, rng: np.random.Generator, transposed: bool = False
) -> LibraryAnswer:
    """The case in PEFT's layer; ``transposed``: experts' weights lie as (in, out)."""
    if case.kind == "fused":
        return fused_as_parts(case, rng, peft_layer)
    entry, peft_type = REGISTRY[case.entry], _peft_type(case)
    case = replace(case, s=entry.scale(case.alpha, case.r, case.r, entry.rslora))
    p = 0.0 if case.K is None else P
    with refusals(PEFT):
        model = base_model(case, transposed)
        layer, note = _injected(case, model, p)
    model.double()
    tensors = _peft_tensors(case, layer)
    fill_base(case, layer.get_base_layer())
    put = _fill_experts if case.kind == "experts" else fill_parts
    unpack = put(case, tensors, PEFT)
    if case.K is not None:
        dropouts = getattr(layer, _DROPOUTS.get(peft_type, "lora_dropout"))
        dropouts["default"] = GivenMask(dropout_mask(case), p, dropouts["default"])
    model.train()
    if entry.variant == LORA:
        for part in set(tensors) - set(entry.trained):
            tensors.pop(part).requires_grad_(False)
    for tensor in tensors.values():
        tensor.requires_grad_()  # VeRA's A and B are buffers
    note = _SCALES.get(peft_type, note)
    if case.kind == "experts":
        note += " (experts, in, out)" if transposed else " (experts, out, in)"

    def merged() -> Base:
        with refusals(PEFT):
            layer.merge()
        return read_base(case, layer.get_base_layer())

    return LibraryAnswer(
        case, layer_answers(case, model, layer, tensors, unpack), merged, PEFT + note
    )


def _peft_transposed(case: LayerCase, rng: np.random.Generator) -> LibraryAnswer:
    return peft_layer(case, rng, transposed=True)


def _peft_unscaled(case: LayerCase, rng: np.random.Generator) -> LibraryAnswer:
    return peft_layer(replace(case, extra={"factor": 1.0}), rng)


def _peft_conv(case: LayerCase, rng: np.random.Generator, groups: bool = True) -> LibraryAnswer:
    """Padding stands before the layer: PEFT's A knows no padding mode, and nothing of dilation."""
    lora = _peft_type(case) == "LORA"
    # In groups AdaLoRA fails, and DoRA takes the norms of another matrix.
    groups = groups and lora and "magnitude" not in case.variant.parts
    asked = peft_layer(moved_convolution(case, rng, plain=lora, groups=groups), rng)
    left_out = [*(["dilation"] if lora else []), *([] if groups else ["groups"])]
    return replace(asked, by=f"{asked.by}, without {' and '.join(left_out)}")


def _peft_whole_conv(case: LayerCase, rng: np.random.Generator) -> LibraryAnswer:
    return _peft_conv(case, rng, groups=False)


def peft_start(
    init: str, W: np.ndarray, r: int, alpha: float, across: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The base's weight, A and B that PEFT starts a projection of weight W (m, n) from.

    ``across``: of a Conv1D, which stores the weight (in, out); all that is returned lies as ever.
    """
    m, n = W.shape
    base = Conv1D(m, n) if across else torch.nn.Linear(n, m)
    base.to(to_torch(W).dtype)
    fill(base.weight, to_torch(W.T if across else W))
    model = torch.nn.ModuleDict({"layer": base})
    quantized = {"loftq_config": peft.LoftQConfig()} if init == "loftq" else {}
    config = peft.LoraConfig(
        r=r,
        lora_alpha=plain_number(alpha),
        init_lora_weights=init,
        fan_in_fan_out=across,
        target_modules=["layer"],
        **quantized,
    )
    peft.inject_adapter_in_model(config, model)
    R = to_numpy(base.weight)
    A, B = (to_numpy(_default(part)) for part in (model["layer"].lora_A, model["layer"].lora_B))
    return R.T if across else R, A, B


PEFT_SIDES: dict[str, list[AskLibrary]] = {
    "embedding": [peft_layer, _peft_unscaled],
    "experts": [peft_layer, _peft_transposed],
    "conv1": [_peft_conv, _peft_whole_conv],
    "conv2": [_peft_conv, _peft_whole_conv],
}
"""How PEFT is asked about a kind, where it is not plainly."""
