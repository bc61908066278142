"""Gemma 3's text model in files."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minilora.io.architectures.llama import LLAMA, LLAMA_GGUF
from minilora.io.architectures.rope import ROPE_FIXED
from minilora.io.errors import FormatError
from minilora.io.files import typed
from minilora.spec.architectures import Gemma3

KINDS = ("sliding_attention", "full_attention")
KNOWN = (None, "default")
"""The kinds of RoPE that a kind of layer may have."""


def _read_fields(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The windows of the blocks, both of RoPE's bases, and what scores are divided by."""
    layers, window = settings.get("num_hidden_layers"), settings.get("sliding_window")
    window = typed(path, "sliding_window", 4096 if window is None else window, int)
    every = settings.get("sliding_window_pattern", settings.get("_sliding_window_pattern"))
    every = typed(path, "sliding_window_pattern", 6 if every is None else every, int)
    kinds = settings.get("layer_types")
    if kinds is None and isinstance(layers, int) and every > 0:
        kinds = [KINDS[(i + 1) % every == 0] for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not {*kinds} <= {*KINDS}:
        remedy = "write them as transformers does"
        raise FormatError(path, "layer_types", kinds, f"one of {', '.join(KINDS)} each", remedy)
    scale = settings.get("query_pre_attn_scalar")
    sliding, full = _bases(path, settings)
    return {
        "window": tuple(window if kind == KINDS[0] else None for kind in kinds),
        "theta": full,
        "local_theta": sliding,
        "score_scale": typed(path, "query_pre_attn_scalar", 256 if scale is None else scale, int),
    }


def _bases(path: Path, settings: Mapping[str, Any]) -> tuple[float, float]:
    """RoPE's bases of both kinds of blocks: transformers 5's way to write them, or that before."""
    rope = settings.get("rope_parameters")
    if rope is None:
        if settings.get("rope_scaling") is not None:
            remedy = "scaled RoPE is not implemented for Gemma 3: take another model"
            raise FormatError(path, "rope_scaling", settings["rope_scaling"], "none", remedy)
        local, full = settings.get("rope_local_base_freq"), settings.get("rope_theta")
        found = (1e4 if local is None else local, 1e6 if full is None else full)
    else:
        expected = "rope_type default and rope_theta for each kind of layer"
        remedy = "other kinds of RoPE are not implemented here: take another model"
        of_kind = rope if isinstance(rope, dict) else {}
        for kind in KINDS:
            one = of_kind.get(kind)
            known = isinstance(one, dict) and one.keys() <= {"rope_type", "rope_theta"}
            if not isinstance(one, dict) or not known or one.get("rope_type") not in KNOWN:
                raise FormatError(path, f"rope_parameters.{kind}", one, expected, remedy)
        found = tuple(
            of_kind[kind].get("rope_theta", default)
            for kind, default in zip(KINDS, (1e4, 1e6), strict=True)
        )
    sliding, full = (typed(path, "rope_theta", value, float) for value in found)
    return sliding, full


def _write_settings(c: Gemma3) -> dict[str, Any]:
    windows = {w for w in c.window if w is not None}
    if len(windows) > 1:
        raise ValueError(f"windows {sorted(windows)}: a file of Gemma 3 has one; expected one")
    rope = {
        kind: {"rope_type": "default", "rope_theta": theta}
        for kind, theta in zip(KINDS, (c.local_theta, c.theta), strict=True)
    }
    return {
        "rope_parameters": rope,
        "sliding_window": windows.pop() if windows else 4096,
        "layer_types": [KINDS[w is None] for w in c.window],
        "query_pre_attn_scalar": c.score_scale,
    }


WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
LOCAL_THETA = "rope.freq_base_swa"
"""What GGUF calls the window, the blocks that have it, and their base of RoPE."""


def _read_gguf(settings: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """As llama.cpp: without a pattern each sixth block sees all, without a window every block.

    No setting says what scores are divided by: a head's size, and in the model of 62 blocks d over
    the number of heads.
    """
    layers, size = known["layers"], settings.values.get(WINDOW, 0)
    window = settings.number(WINDOW, int) if size != 0 else None
    pattern = settings.values.get(PATTERN, 6)
    if type(pattern) is int and pattern >= 0:
        pattern = [pattern == 0 or (i + 1) % pattern != 0 for i in range(layers)]
    slides = layers * [pattern] if type(pattern) is bool else pattern
    if not isinstance(slides, list) or len(slides) != layers or {*map(type, slides)} != {bool}:
        expected = f"a period, or true or false for each of {layers} blocks"
        raise settings.error(PATTERN, pattern, expected, "write it as llama.cpp's converter does")
    return {
        "window": tuple(window if s else None for s in slides),
        "local_theta": settings.number(LOCAL_THETA, float, 1e4),
        "score_scale": _score_scale(known),
    }


def _score_scale(known: Mapping[str, Any]) -> int:
    return int(known["d"] // known["heads"] if known["layers"] == 62 else known["head_dim"])


def _write_gguf(c: Gemma3) -> dict[str, Any]:
    """The inverse; without a window nothing is said of it.

    Errors: FormatError for several windows, and for scores that llama.cpp divides by another root.
    """
    windows = {w for w in c.window if w is not None}
    takes = _score_scale(vars(c))
    for what, found, expected, fits in (
        ("windows", sorted(windows), "one", len(windows) < 2),
        ("score_scale", c.score_scale, f"{takes}, as llama.cpp takes", c.score_scale == takes),
    ):
        if not fits:
            raise FormatError("GGUF", what, found, expected, "keep Hugging Face's folder")
    said: dict[str, Any] = {LOCAL_THETA: c.local_theta}
    if windows:
        said |= {WINDOW: windows.pop(), PATTERN: [w is not None for w in c.window]}
    return said


GEMMA3 = replace(
    LLAMA,
    name="Gemma3ForCausalLM",
    model_type="gemma3_text",
    config=Gemma3,
    others=(),
    constant={},
    block={
        **LLAMA.block,
        "norm_q": "self_attn.q_norm",
        "norm_k": "self_attn.k_norm",
        "norm2": "post_attention_layernorm",
        "norm3": "pre_feedforward_layernorm",
        "norm4": "post_feedforward_layernorm",
    },
    absent={
        "kv_heads": lambda known: 4,
        "head_dim": lambda known: 256,
        "eps": LLAMA.absent["eps"],
        "tied": lambda known: True,
    },
    fixed={
        "hidden_activation": ("gelu_pytorch_tanh", None),
        "hidden_act": ("gelu_pytorch_tanh", None),
        "attention_bias": (False,),
        "final_logit_softcapping": (None,),
        "attn_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
        **ROPE_FIXED,
    },
    inert="attention_dropout max_position_embeddings cache_implementation",
    written={
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **{f"{token}_token_id": None for token in ("bos", "eos", "pad")},
    },
    special=(
        *LLAMA.special,
        "rope_local_base_freq",
        "layer_types",
        "sliding_window",
        "sliding_window_pattern",
        "_sliding_window_pattern",
        "query_pre_attn_scalar",
    ),
    read_fields=_read_fields,
    write_settings=_write_settings,
    windows=True,
    permuted=(),
    gguf=replace(
        LLAMA_GGUF,
        name="gemma3",
        special=(WINDOW, PATTERN, LOCAL_THETA),
        fixed={"final_logit_softcapping": (0.0,)},
        read=_read_gguf,
        write=_write_gguf,
        one_added=True,
    ),
)
