"""What differs between two models' settings, and what it changes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from minilora.audit.base import tied_table
from minilora.audit.result import Entry
from minilora.audit.tensors import StoredTensor, TensorStore
from minilora.io.files import WEIGHT_DTYPES

_FUNCTION = {
    "model_type": "another architecture computes another function",
    "hidden_act": "another activation",
    "activation_function": "another activation",
    "hidden_size": "other shapes",
    "n_embd": "other shapes",
    "intermediate_size": "other shapes",
    "num_hidden_layers": "another number of layers is computed",
    "n_layer": "another number of layers is computed",
    "num_attention_heads": "the features are parted into other heads",
    "n_head": "the features are parted into other heads",
    "num_key_value_heads": "queries share other keys",
    "head_dim": "the features are parted into other heads",
    "rms_norm_eps": "the norms add another number",
    "layer_norm_eps": "the norms add another number",
    "layer_norm_epsilon": "the norms add another number",
    "sliding_window": "attention reaches another distance",
    "use_sliding_window": "attention reaches another distance",
    "layer_types": "other layers attend to a window",
    "attention_bias": "biases are added, or left out",
    "mlp_bias": "biases are added, or left out",
    "rope_factors": "positions turn by other angles",
    "logit_scale": "the logits are scaled",
    "final_logit_softcapping": "the logits are capped",
    "attn_logit_softcapping": "attention is capped",
    "query_pre_attn_scalar": "attention is scaled",
    "embedding_multiplier": "embeddings are scaled",
    "residual_multiplier": "residuals are scaled",
    "num_experts_per_tok": "another number of experts is asked",
    "num_local_experts": "another number of experts",
    "id2label": "the classes have other names, or another order",
    "num_labels": "another number of classes",
    "problem_type": "another loss, and other probabilities",
}
"""Settings that change what is computed, and how."""

_USE = {
    "max_position_embeddings": "longer texts are refused, or taken",
    "n_positions": "longer texts are refused, or taken",
    "bos_token_id": "generation begins with another token",
    "eos_token_id": "generation stops at another token",
    "pad_token_id": "another token pads a batch",
    "pretraining_tp": "products are summed in parts",
}
"""Settings that change how the model is used."""

_INERT = """
transformers_version _name_or_path use_cache torch_dtype dtype architectures gradient_checkpointing
auto_map initializer_range attention_dropout hidden_dropout_prob attention_probs_dropout_prob
classifier_dropout attn_pdrop embd_pdrop resid_pdrop summary_activation summary_first_dropout
summary_proj_to_labels summary_type summary_use_proj output_attentions output_hidden_states
return_dict is_decoder is_encoder_decoder add_cross_attention cross_attention_hidden_size
chunk_size_feed_forward label2id task_specific_params tf_legacy_loss use_bfloat16 finetuning_task
tie_encoder_decoder pruned_heads problem_type _attn_implementation_autoset unsloth_version
unsloth_fixed model_name n_ctx rope_theta rope_scaling rope_parameters partial_rotary_factor
rotary_pct rope_local_base_freq quantization_config quantization tie_word_embeddings vocab_size
"""
"""Settings that change nothing, or are looked at by themselves."""

_SCALED = ("rope_parameters", "rope_scaling", "rope_local_base_freq")
"""Settings of RoPE, beside its base."""

_NESTED = ("text_config", "vision_config", "audio_config")


def compare_settings(base: TensorStore, merged: TensorStore) -> Iterator[Entry]:
    """An entry for each setting that differs, with what it changes.

    Only what both files say is compared: a release of transformers leaves out what another writes.
    """
    B, M = base.settings, merged.settings
    if B and not M and merged.folder:
        text = "the base has one, the merged model has none: copy it, or nothing loads the folder"
        yield Entry("config.json", "doubtful", text)
    if not B or not M:
        return
    if base.container != merged.container and "gguf" in (base.container, merged.container):
        # llama.cpp has one architecture for several of transformers.
        B = {key: value for key, value in B.items() if key != "model_type"}
        # The metadata of a model that is not computed with here are read in part.
        if "rope_parameters" not in (B if base.container == "gguf" else M):
            B, M = ({k: v for k, v in s.items() if k not in _SCALED} for s in (B, M))
    yield from _compared(B, M, "")
    for name in _NESTED:
        one, two = B.get(name), M.get(name)
        if isinstance(one, dict) and isinstance(two, dict):
            yield from _compared(one, two, f"{name}.")
    yield from _dtype(B, M)
    yield from _quantization(B, M, merged)
    yield from _tie(B, M, merged)
    yield from _vocabulary(B, M, merged)


def _compared(B: Mapping[str, Any], M: Mapping[str, Any], prefix: str) -> Iterator[Entry]:
    for key in B:
        if key not in M or _same(B[key], M[key]) or key in _NESTED:
            continue
        text = f"{_shown(M[key])}, the base says {_shown(B[key])}"
        if key in _FUNCTION:
            yield Entry(f"{prefix}{key}", "wrong", f"{text}: {_FUNCTION[key]}")
        elif key in _USE:
            yield Entry(f"{prefix}{key}", "doubtful", f"{text}: {_USE[key]}")
        elif key not in _INERT.split():
            yield Entry(f"{prefix}{key}", "doubtful", f"{text}: it may change what is computed")
    yield from _rope(B, M, prefix)


def _same(one: Any, two: Any) -> bool:
    """Whether two values say the same: 5 and [5], 1 and 1.0."""
    one, two = (value[0] if isinstance(value, list) and len(value) == 1 else value
                for value in (one, two))  # fmt: skip
    return bool(one == two) or (one is None and two in (False, [], {}))


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _angles(settings: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's settings, which two generations of transformers write in two places."""
    found: dict[str, Any] = {}
    for place in ("rope_parameters", "rope_scaling"):
        inner = settings.get(place)
        if isinstance(inner, dict):
            found |= {("rope_type" if key == "type" else key): v for key, v in inner.items()}
    for key in ("rope_theta", "partial_rotary_factor", "rope_local_base_freq"):
        if settings.get(key) is not None:
            found.setdefault(key, settings[key])
    if isinstance(local := found.pop("sliding_attention", None), dict):
        found.setdefault("rope_local_base_freq", local.get("rope_theta"))
    if isinstance(everywhere := found.pop("full_attention", None), dict):
        found |= everywhere
    if found.get("rope_type") == "default":
        del found["rope_type"]
    if found.get("partial_rotary_factor") == 1:
        del found["partial_rotary_factor"]
    return found


def _rope(B: Mapping[str, Any], M: Mapping[str, Any], prefix: str) -> Iterator[Entry]:
    one, two = _angles(B), _angles(M)
    for key in sorted(one.keys() | two.keys(), key=str):
        a, b = one.get(key), two.get(key)
        if a == b:
            continue
        text = f"{_shown(b)}, the base says {_shown(a)}: positions turn by other angles"
        if key == "rope_theta" and None in (a, b):
            if 10000.0 in (a, b):  # what transformers takes where nothing is said
                continue
            yield Entry(f"{prefix}{key}", "doubtful", f"{text}, unless it is the default")
        else:
            yield Entry(f"{prefix}{key}", "wrong", text)


def _dtype(B: Mapping[str, Any], M: Mapping[str, Any]) -> Iterator[Entry]:
    one, two = (s.get("dtype", s.get("torch_dtype")) for s in (B, M))
    if one and two and one != two:
        text = f"{_shown(two)}, the base says {_shown(one)}: loaders take the weights in it"
        yield Entry("dtype", "told", text)


def _quantization(
    B: Mapping[str, Any], M: Mapping[str, Any], merged: TensorStore
) -> Iterator[Entry]:
    own, of_base = M.get("quantization_config"), B.get("quantization_config")
    if own and not any(map(_is_quantized, merged.values())):
        text = (
            f"{_shown(own)}, but no tensor is quantized: a loader quantizes the weights again, and "
            "may round the adapter away, or refuses them: remove the setting"
        )
        yield Entry("quantization_config", "wrong", text)
    elif of_base and not own:
        text = f"the base was quantized ({_shown(of_base)}), the merged model is not"
        yield Entry("quantization_config", "told", text)


def _is_quantized(tensor: StoredTensor) -> bool:
    """Whether the tensor is quantized, by a scheme that is known or another."""
    return tensor.scheme is not None or tensor.dtype.name not in _PLAIN


_PLAIN = {*(dtype.name for dtype in WEIGHT_DTYPES.values()), "int64", "bool"}


def _tie(B: Mapping[str, Any], M: Mapping[str, Any], merged: TensorStore) -> Iterator[Entry]:
    own = M.get("tie_word_embeddings")
    head = merged.find("lm_head.weight")
    if own is True and head is not None and not _head_is_table(merged, head):
        text = (
            "true, but the head has weights of its own, other than the table's: loaders pass "
            "them over and take the table: set it to false"
        )
        yield Entry("tie_word_embeddings", "wrong", text, mistake="tied-head")
    elif own is False and head is None and tied_table(merged) is not None:
        text = "false, but there is no tensor of the head: loaders draw one at random"
        yield Entry("tie_word_embeddings", "wrong", text)
    elif own is not None and own != B.get("tie_word_embeddings", own):
        yield Entry("tie_word_embeddings", "told", f"{_shown(own)}: the head was untied, or tied")


def _head_is_table(store: TensorStore, head: str) -> bool:
    """Whether the head has the bits of the table, which it is tied to."""
    without = store.with_tensors({name: t for name, t in store.items() if name != head})
    table = tied_table(without)
    if table is None:
        return True
    one, two = store[head], store[table]
    return one.shape == two.shape and all(
        one.rows(*at).tobytes() == two.rows(*at).tobytes() for at in one.blocks()
    )


def _only(one: Any, other: Any, store: TensorStore) -> bool:
    """Whether some tensor has one of the numbers of rows, and none the other."""
    if not (isinstance(one, int) and isinstance(other, int)):
        return False
    rows = {tensor.shape[0] for tensor in store.values() if len(tensor.shape) == 2}
    return one in rows and other not in rows


def _vocabulary(B: Mapping[str, Any], M: Mapping[str, Any], merged: TensorStore) -> Iterator[Entry]:
    size, of_base = M.get("vocab_size"), B.get("vocab_size")
    without = {n: t for n, t in merged.items() if not n.endswith("lm_head.weight")}
    table = tied_table(merged.with_tensors(without))
    rows = merged[table].shape[0] if table else None
    if rows is not None and type(size) is int and size != rows:
        text = f"{size}, but the table has {rows} rows: loaders refuse it, or draw it anew"
        yield Entry("vocab_size", "wrong", text)
    elif table is None and size != of_base and _only(of_base, size, merged):
        text = f"{size}, but the tables have {of_base} rows: loaders refuse them, or draw them anew"
        yield Entry("vocab_size", "wrong", text)
    elif size != of_base and None not in (size, of_base):
        text = f"{size}, the base says {of_base}: the vocabulary was resized or padded"
        yield Entry("vocab_size", "told", text)
