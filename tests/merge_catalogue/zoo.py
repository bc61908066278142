"""The worlds on which the catalogue is tried, drawn and real, each made when asked for."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

from safetensors.numpy import load_file

from merge_catalogue.worlds import (
    ATTENTION,
    BF16,
    F16,
    F32,
    World,
    adapt,
    from_folder,
    gpt2,
    llama,
    minilm,
    mixtral,
    smollm2,
)
from minilora.audit.tensors import open_tensors
from minilora.io import reference_models

HALF_A_UNIT = 2.0**-9
"""A change of this share of the weights is half a unit of bfloat16's numbers, on the average."""


def peft_made(name):
    """The base and the adapter of a case of `right`, by PEFT."""
    from merge_catalogue.right import CASES

    with tempfile.TemporaryDirectory() as folder:
        made = CASES[f"peft {name}"](Path(folder))
        world = from_folder(name, made.base)
        adapter = load_file(made.adapters[0] / "adapter_model.safetensors")
        settings = json.loads((made.adapters[0] / "adapter_config.json").read_text())
    return replace(world, adapter=adapter, settings=settings)


def reference(name, dtype=F32):
    """A trained reference model with its trained adapter."""
    folder = reference_models.folder() / name
    world = from_folder(f"reference {name}", folder / "base", dtype)
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    return replace(world, adapter=adapter, settings=settings)


def glassllm():
    """A small model that a package has in a format of its own, by Hugging Face's names."""
    store = open_tensors("package:glassllm/weights/en.npz")
    base = {name: tensor.rows(0, tensor.length) for name, tensor in store.items()}
    return World("glassllm", base, dict(store.settings))


SMALL = {
    "llama": lambda: adapt(llama()),
    "llama-bf16": lambda: adapt(llama(BF16), r=4, effect=0.3, dtype=BF16),
    "llama-f16": lambda: adapt(llama(F16), r=16, dtype=F16),
    "llama-rslora": lambda: adapt(llama(), r=8, alpha=16, use_rslora=True),
    "llama-patterns": lambda: adapt(
        llama(), ranks={"q_proj": 4, r"layers\.1\.mlp\.down_proj": 16}, alphas={"v_proj": 3}
    ),
    "llama-12-layers": lambda: adapt(llama(layers=12, d=32, inner=48), targets=ATTENTION),
    "llama-one-layer": lambda: adapt(llama(layers=1), r=1, alpha=1.7),
    "llama-head": lambda: adapt(llama(), table=True, head=True),
    "llama-table": lambda: adapt(llama(), table=True),
    "llama-saved": lambda: adapt(llama(), saved=("lm_head",)),
    "llama-tokens": lambda: adapt(llama(), tokens=(3, 7, 50)),
    "qwen2": lambda: adapt(llama(BF16, tied=True, qkv_bias=True), table=True, effect=0.3),
    "qwen2-tokens": lambda: adapt(llama(F32, tied=True, qkv_bias=True), tokens=(5, 9)),
    "qwen2-bias": lambda: adapt(
        llama(F32, qkv_bias=True), bias=True, targets=r"(q_proj|k_proj|v_proj)$"
    ),
    "phi3": lambda: adapt(llama(fused=True, kv=2)),
    "phi3-heads": lambda: adapt(llama(fused=True, kv=4)),
    "gpt2": lambda: adapt(gpt2(), r=4),
    "mixtral": lambda: adapt(mixtral(), r=4),
    "llama-dora": lambda: adapt(llama(), dora=True),
    "qwen2-dora-bf16": lambda: adapt(llama(BF16, qkv_bias=True), dora=True, effect=0.3),
    "gpt2-dora": lambda: adapt(gpt2(), r=4, dora=True),
}

PEFT_MADE = {
    f"peft-{name}": (lambda name=name: peft_made(name))
    for name in (
        "float32 adalora",
        "float32 vera",
        "float32 rslora",
        "pissa as trained",
        "olora as trained",
        "float32 conv1d",
        "float32 dora",
        "float32 tokens",
        "float32 modules_to_save",
        "bfloat16 adalora",
        "bfloat16 vera",
        "bfloat16 dora",
        "float32 lora_bias",
    )
}

REAL = {
    f"smollm2-{label}-r{r}-{effect}": (
        lambda dtype=dtype, r=r, size=size, adapter=adapter: adapt(
            smollm2(dtype, layers=1, vocab=512),
            r=r,
            effect=size,
            dtype=adapter,
            targets=r"(q_proj|k_proj|v_proj|down_proj)$",
        )
    )
    for label, dtype, adapter in (
        ("bf16", BF16, F32),
        ("bf16bf16", BF16, BF16),
        ("f16", F16, F16),
        ("f32", F32, F32),
    )
    for r in (1, 8, 64)
    for effect, size in (
        ("huge", 4.0),
        ("usual", 0.05),
        ("unit", 2 * HALF_A_UNIT),
        ("below", HALF_A_UNIT / 2),
    )
} | {
    "smollm2-12-layers": lambda: adapt(
        smollm2(BF16, layers=12, vocab=512), r=16, effect=0.02, targets=r"(k_proj|v_proj|o_proj)$"
    ),
    "smollm2-rslora": lambda: adapt(
        smollm2(BF16, layers=2, vocab=512), r=32, alpha=16, effect=0.02, use_rslora=True
    ),
    "smollm2-table": lambda: adapt(
        smollm2(BF16, layers=2, vocab=2048), r=8, effect=0.05, table=True
    ),
    "smollm2-tokens": lambda: adapt(smollm2(F16, layers=2, vocab=2048), tokens=(0, 17, 2000)),
    "smollm2-dora": lambda: adapt(smollm2(BF16, layers=2, vocab=512), r=8, effect=0.05, dora=True),
    "smollm2-dora-f32": lambda: adapt(
        smollm2(F32, layers=2, vocab=512), r=8, effect=0.05, dora=True
    ),
    "minilm": lambda: adapt(minilm(), r=8),
    "minilm-f16": lambda: adapt(minilm(F16), r=32, effect=0.01, dtype=F16),
    "minilm-saved": lambda: adapt(minilm(), r=2, saved=("pooler",)),
    "minilm-bias": lambda: adapt(minilm(), r=4, bias=True),
    "glassllm": lambda: adapt(glassllm(), r=4),
    "glassllm-dora": lambda: adapt(glassllm(), r=8, dora=True, dtype=F16),
    **{
        f"reference-{name}": (lambda name=name: reference(name))
        for name in reference_models.names()
    },
    **{
        f"reference-{name}-bf16": (lambda name=name: reference(name, BF16))
        for name in reference_models.names()
    },
}


@cache
def world(name: str) -> World:
    """The world of that name."""
    return (SMALL | PEFT_MADE | REAL)[name]()
