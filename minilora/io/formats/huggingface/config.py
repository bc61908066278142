"""``config.json`` of a Hugging Face model: the configuration, and the names of its classes.

Dropout of the base model acts only in training and is no part of these equations: its probabilities
are passed over in reading and written as 0.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora.io.architectures import ARCHITECTURES, Architecture, architecture_of
from minilora.io.errors import FormatError
from minilora.io.files import check_settings, read_json, typed
from minilora.spec.models import Config

CONFIG = "config.json"

INERT = """
architectures model_type transformers_version _name_or_path name_or_path _commit_hash
dtype torch_dtype unsloth_version transformers.js_config tokenizer_class prefix
finetuning_task task_specific_params id2label label2id num_labels _num_labels use_cache
return_dict use_return_dict output_attentions output_hidden_states output_past
tie_last_hidden_states torchscript use_bfloat16 tf_legacy_loss attn_implementation
_attn_implementation _attn_implementation_autoset gradient_checkpointing
chunk_size_feed_forward initializer_range

bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id
decoder_start_token_id

max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""
"""Settings of any architecture that do not change the logits: bookkeeping and ways to run; special
tokens; generation, which older files keep here."""

FIXED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "quantization_config": (None,),
    "pruned_heads": (None, {}),
    "per_layer_config": (None, {}),
    "problem_type": (None, "single_label_classification"),
}
"""Settings of any architecture, with the values under which the function is the one here."""

_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")


def read_config(path: Path | str) -> Config:
    """The configuration in the folder ``path``, or in the file itself.

    Both ways to write RoPE's base are read: ``rope_theta``, and transformers 5's
    ``rope_parameters``.

    Errors: FormatError for a damaged file, another architecture, a setting that changes the
    function to one that is not implemented, or an unknown setting.
    """
    path = Path(path)
    if path.is_dir():
        path = path / CONFIG
    return parse_config(path, read_json(path))


def parse_config(path: Path, settings: Mapping[str, Any]) -> Config:
    """The configuration that the settings of the file ``path`` make; errors as above."""
    a = _architecture(path, settings)
    known = {*a.keys.values(), *a.special}
    check_settings(path, settings, known, {**FIXED, **a.fixed}, INERT + a.inert)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(a.config):
        if key := a.keys.get(field.name):
            value = settings.get(key)
            if value is None and field.name in a.absent:
                value = a.absent[field.name](values)
            values[field.name] = typed(path, key, value, field.type)
    values |= a.read_fields(path, settings)
    if not a.windows:
        _check_layer_types(path, settings.get("layer_types"), values["layers"])
    _check_heads(path, settings, values, a)
    return a.configuration(values)


def _architecture(path: Path, settings: Mapping[str, Any]) -> Architecture:
    names = settings.get("architectures")
    if names not in [[name] for name in ARCHITECTURES]:
        remedy = "load it with a library that knows it and save it as one of these"
        expected = f"one of {', '.join(ARCHITECTURES)}"
        raise FormatError(path, "architectures", names, expected, remedy)
    a = ARCHITECTURES[names[0]]
    if settings.get("model_type") not in (None, a.model_type):
        remedy = f"write what belongs to {a.name}"
        raise FormatError(path, "model_type", settings["model_type"], a.model_type, remedy)
    return a


def _check_layer_types(path: Path, kinds: Any, layers: int) -> None:
    full = isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    if kinds is not None and not (full and len(kinds) == layers):
        remedy = "sliding windows are not implemented here"
        raise FormatError(path, "layer_types", kinds, "full_attention for each layer", remedy)


def _check_heads(
    path: Path, settings: Mapping[str, Any], values: Mapping[str, Any], a: Architecture
) -> None:
    d, heads = values["d"], values["heads"]
    kv_heads, head_dim = values.get("kv_heads", heads), values.get("head_dim")
    if settings.get("head_dim") is None and d % heads:
        expected, remedy = f"a divisor of {a.keys['d']} {d}", "the heads share its features"
        raise FormatError(path, a.keys["heads"], heads, expected, remedy)
    if heads % kv_heads:
        expected = f"a divisor of {a.keys['heads']} {heads}"
        remedy = "each serves as many query heads"
        raise FormatError(path, a.keys["kv_heads"], kv_heads, expected, remedy)
    if head_dim is not None and head_dim % 2:
        raise FormatError(path, "head_dim", head_dim, "an even number", "RoPE turns pairs")


def read_labels(path: Path | str) -> tuple[str, ...] | None:
    """The classes' names in their order, ``id2label``; None where it has none but LABEL_0, ….

    Errors: those of :func:`read_config`; FormatError for numbers that are not the classes', two
    classes of one name, or a ``label2id`` that says otherwise.
    """
    path = Path(path) / CONFIG
    settings = read_json(path)
    classes = getattr(parse_config(path, settings), "classes", 0)
    by_number, by_label = settings.get("id2label"), settings.get("label2id")
    if not classes or by_number is None:
        return None
    labels = [by_number.get(str(i)) for i in range(classes)]
    if not all(isinstance(label, str) and label.strip() for label in labels):
        expected = f"a name for each number from 0 to {classes - 1}"
        raise FormatError(path, "id2label", by_number, expected, "write them as transformers does")
    numbers = {label: i for i, label in enumerate(labels)}
    if len(numbers) < classes:
        remedy = "labels are found by their names: give each class its own"
        raise FormatError(path, "id2label", by_number, "names that differ", remedy)
    if labels == _default_labels(classes):
        return None
    if by_label is not None and by_label != numbers:
        remedy = "keep the one that the model was trained with"
        raise FormatError(path, "label2id", by_label, f"{numbers}, as id2label has it", remedy)
    return tuple(labels)


def _default_labels(classes: int) -> list[str]:
    """transformers' names of unnamed classes."""
    return [f"LABEL_{i}" for i in range(classes)]


def generation_settings(path: Path | str) -> dict[str, Any]:
    """The special tokens and the context length in ``config.json``, which change no logits.

    Errors: FormatError for a damaged file.
    """
    settings = read_json(Path(path) / CONFIG)
    return {key: settings[key] for key in _GENERATION if settings.get(key) is not None}


def config_to_json(c: Config, labels: Sequence[str] | None = None) -> dict[str, Any]:
    """What ``config.json`` says for ``c``, dtype and version apart.

    Dropout is 0 and no special token is named: with a padding token transformers would hold the
    gradient of its embedding at 0. A classifier's classes are called by ``labels``, or LABEL_0, …
    where these are none or the classes' numbers.

    Errors: FormatError if reading would refuse it; ValueError for other labels than the classes.
    """
    a = architecture_of(c)
    settings = {"architectures": [a.name], "model_type": a.model_type, **a.written}
    settings |= {key: getattr(c, field) for field, key in a.keys.items()}
    settings |= a.write_settings(c)
    if classes := getattr(c, "classes", None):
        settings |= _labels_to_json(classes, labels)
    parse_config(Path(CONFIG), settings)
    return settings


def _labels_to_json(classes: int, labels: Sequence[str] | None) -> dict[str, Any]:
    numbers = [str(i) for i in range(classes)]
    labels = _default_labels(classes) if labels is None or [*labels] == numbers else labels
    if len({*labels}) != len(labels) or len(labels) != classes:
        raise ValueError(f"labels {[*labels]}: expected {classes} names that differ")
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
