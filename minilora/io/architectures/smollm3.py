"""SmolLM3 in files."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minilora.io.architectures.llama import LLAMA, LLAMA_GGUF
from minilora.io.architectures.rope import ROPE_FIXED, read_theta, write_rope
from minilora.io.errors import FormatError
from minilora.spec.architectures import SmolLM3


def _read_fields(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's base, and the blocks without: where ``no_rope_layers`` has 0, or every fourth one."""
    layers, turned = settings.get("num_hidden_layers"), settings.get("no_rope_layers")
    every = settings.get("no_rope_layer_interval")
    every = 4 if every is None else every
    if turned is None and type(every) is int and every > 0 and type(layers) is int:
        turned = [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(turned, list) or len(turned) != layers or not {*turned} <= {0, 1}:
        expected = f"a list of 0 and 1 for {layers} layers"
        remedy = "write it as transformers does: 0 where a layer has no positions"
        raise FormatError(path, "no_rope_layers", turned, expected, remedy)
    still = tuple(i for i, is_turned in enumerate(turned) if not is_turned)
    return {"theta": read_theta(path, settings, 2e6), "without_positions": still}


def _write_settings(c: SmolLM3) -> dict[str, Any]:
    turned = [int(i not in c.without_positions) for i in range(c.layers)]
    return {**write_rope(c), "no_rope_layers": turned, "layer_types": c.layers * ["full_attention"]}


def _still_in_gguf(settings: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp turns nothing in every fourth block; no setting says so."""
    return {"without_positions": tuple(range(3, known["layers"], 4))}


def _check_gguf(c: SmolLM3) -> dict[str, Any]:
    every_fourth = tuple(range(3, c.layers, 4))
    if c.without_positions != every_fourth:
        found, remedy = f"blocks {c.without_positions}", "keep Hugging Face's folder"
        expected = f"blocks {every_fourth}, as llama.cpp takes for granted"
        raise FormatError("GGUF", "without_positions", found, expected, remedy)
    return {}


SMOLLM3 = replace(
    LLAMA,
    name="SmolLM3ForCausalLM",
    model_type="smollm3",
    config=SmolLM3,
    others=(),
    constant={},
    absent={
        "kv_heads": lambda known: 4,
        "head_dim": LLAMA.absent["head_dim"],
        "eps": LLAMA.absent["eps"],
        "tied": lambda known: True,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_sliding_window": (False, None),
        "sliding_window": (None,),
        **ROPE_FIXED,
    },
    inert="attention_dropout max_position_embeddings max_window_layers",
    special=(*LLAMA.special, "no_rope_layers", "no_rope_layer_interval", "layer_types"),
    read_fields=_read_fields,
    write_settings=_write_settings,
    gguf=replace(LLAMA_GGUF, read=_still_in_gguf, write=_check_gguf),
)
