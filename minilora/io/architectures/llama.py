"""Llama and Qwen2 in files. Qwen2 is a Llama with biases at q, k and v."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minilora.io.architectures.architecture import NO_TOKENS, Architecture
from minilora.io.errors import FormatError
from minilora.io.files import check_settings, typed
from minilora.spec.models import Llama

_ROPE_FIXED = {"partial_rotary_factor": (1.0, None)}


def _read_theta(path: Path, settings: Mapping[str, Any]) -> float:
    """RoPE's base.

    Errors: FormatError for every other kind of RoPE, and for two bases.
    """
    # An empty rope_scaling yields to rope_parameters, as in transformers.
    where = "rope_scaling" if settings.get("rope_scaling") else "rope_parameters"
    rope = settings.get(where) or {}
    if not isinstance(rope, dict):
        raise FormatError(path, where, rope, "an object", "write it as transformers does")
    kinds = ("default", None)
    for key in ("rope_type", "type"):  # before what belongs to another kind
        if rope.get(key) not in kinds:
            remedy = "other kinds of RoPE are not implemented here: take another model"
            raise FormatError(f"{path}: {where}", key, json.dumps(rope[key]), '"default"', remedy)
    fixed = {"rope_type": kinds, "type": kinds, **_ROPE_FIXED}
    check_settings(f"{path}: {where}", rope, ("rope_theta",), fixed, "")
    bases = [
        typed(path, key, value, float)
        for key, value in (
            (f"{where}.rope_theta", rope.get("rope_theta")),
            ("rope_theta", settings.get("rope_theta")),
        )
        if value is not None
    ]
    if len(set(bases)) > 1 or 0 in bases:
        remedy = "keep the one that the model was trained with"
        raise FormatError(path, "rope_theta", bases, "one number above 0", remedy)
    return bases[0] if bases else 10000.0


def _read_fields(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"theta": _read_theta(path, settings)}


def _write_settings(c: Llama) -> dict[str, Any]:
    """RoPE's base both ways: ``rope_theta`` is for transformers before 5, and mlx-lm."""
    rope = {"rope_theta": c.theta, "rope_type": "default"}
    return {"rope_parameters": rope, "rope_theta": c.theta}


LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    config=Llama,
    constant={"qkv_bias": False},
    prefix="model.",
    outer={"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    blocks="model.layers",
    block={
        "norm1": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "norm2": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    keys={
        "vocab": "vocab_size",
        "d": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "ffn": "intermediate_size",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "eps": "rms_norm_eps",
        "tied": "tie_word_embeddings",
    },
    absent={
        "kv_heads": lambda known: known["heads"],
        "head_dim": lambda known: known["d"] // known["heads"],
        "eps": lambda known: 1e-6,
        "tied": lambda known: False,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "pretraining_tp": (1,),
        "rope_interleaved": (False,),
        "sliding_window": (None,),
        **_ROPE_FIXED,
    },
    inert="attention_dropout max_position_embeddings is_llama_config",
    written={"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, **NO_TOKENS},
    special=("rope_theta", "rope_parameters", "rope_scaling"),
    read_fields=_read_fields,
    write_settings=_write_settings,
    buffers=r"\.rotary_emb\.inv_freq$",
    heeds_weight_tying=True,
    gguf={
        "kv_heads": "attention.head_count_kv",
        "eps": "attention.layer_norm_rms_epsilon",
        "theta": "rope.freq_base",
    },
    permuted=(".q", ".k"),
    mlx_prefix="model.",
)

QWEN2 = replace(
    LLAMA,
    name="Qwen2ForCausalLM",
    model_type="qwen2",
    constant={"qkv_bias": True},
    # transformers would take 32 key/value heads, whatever the model: the file has to say it
    absent={key: value for key, value in LLAMA.absent.items() if key != "kv_heads"},
    fixed={
        "hidden_act": ("silu", "swish"),
        "use_sliding_window": (False,),
        "use_mrope": (False,),
        **_ROPE_FIXED,
    },
    inert="attention_dropout max_position_embeddings sliding_window max_window_layers",
    written={"hidden_act": "silu", "attention_dropout": 0.0, **NO_TOKENS},
    special=(*LLAMA.special, "layer_types"),
    writes_replication=False,  # PEFT 0.21 makes such a model, which fails in its forward
    permuted=(),
)
