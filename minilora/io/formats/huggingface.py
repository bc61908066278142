"""Hugging Face model folders: ``config.json`` and ``model.safetensors``, one file or shards.

Inside, weights are (out, in), vectors (n, 1) and names those of `models`; how a file
names and lays out each of them is said here, once. Dropout of the base model acts only in training
and is no part of these equations: its probabilities are passed over in reading and written as 0.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minilora.io.files import (
    FormatError,
    check_settings,
    listed,
    pack,
    pack_json,
    read_json,
    read_tensors,
    to_dtype,
    write_files,
)
from minilora.spec.lora import Weights
from minilora.spec.models import GPT2, Bert, Config, Llama
from minilora.spec.ops import Array

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_WEIGHTS_OF_A_MODEL = r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"

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


@dataclass(frozen=True)
class Architecture:
    """How Hugging Face writes one architecture.

    ``keys``: the file's name of each field of ``config``. ``absent``: what transformers takes where
    the file says nothing, computed from the other fields. ``constant``: fields that the
    architecture's name settles. ``special``: settings that code below reads. ``fixed`` and
    ``inert``: as above. ``written``: further settings to write. ``outer`` and ``block``: the file's
    names of the modules, the block's below ``blocks`` and a number. ``prefix``: what may be left
    out before them. ``buffers``: tensors of older files that are no parameters.
    """

    config: type[Config]
    model_type: str
    keys: Mapping[str, str]
    absent: Mapping[str, Callable[[dict[str, Any]], Any]]
    fixed: dict[str, tuple[Any, ...]]
    inert: str
    written: Mapping[str, Any]
    prefix: str
    outer: Mapping[str, str]
    blocks: str
    block: Mapping[str, str]
    buffers: str | None = None
    special: tuple[str, ...] = ()
    constant: Mapping[str, Any] = field(default_factory=dict)


_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_ROPE = {"partial_rotary_factor": (1.0, None)}

_LLAMA = Architecture(
    config=Llama,
    model_type="llama",
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
        **_ROPE,
    },
    inert="attention_dropout max_position_embeddings is_llama_config",
    written={"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, **_NO_TOKENS},
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
    buffers=r"\.rotary_emb\.inv_freq$",
    special=("rope_theta", "rope_parameters", "rope_scaling"),
    constant={"qkv_bias": False},
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": dataclasses.replace(
        _LLAMA,
        model_type="qwen2",
        # transformers would take 32 key/value heads, whatever the model: the file has to say it
        absent={key: value for key, value in _LLAMA.absent.items() if key != "kv_heads"},
        fixed={
            "hidden_act": ("silu", "swish"),
            "use_sliding_window": (False,),
            "use_mrope": (False,),
            **_ROPE,
        },
        inert="attention_dropout max_position_embeddings sliding_window max_window_layers",
        written={"hidden_act": "silu", "attention_dropout": 0.0, **_NO_TOKENS},
        special=(*_LLAMA.special, "layer_types"),
        constant={"qkv_bias": True},
    ),
    "GPT2LMHeadModel": Architecture(
        config=GPT2,
        model_type="gpt2",
        keys={
            "vocab": "vocab_size",
            "d": "n_embd",
            "layers": "n_layer",
            "heads": "n_head",
            "ffn": "n_inner",
            "positions": "n_positions",
            "eps": "layer_norm_epsilon",
        },
        absent={"ffn": lambda known: 4 * known["d"], "eps": lambda known: 1e-5},
        fixed={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
            "tie_word_embeddings": (True,),
        },
        inert="attn_pdrop embd_pdrop resid_pdrop n_ctx summary_activation summary_first_dropout "
        "summary_proj_to_labels summary_type summary_use_proj",
        written={
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
            **_NO_TOKENS,
        },
        prefix="transformer.",
        outer={
            "embed": "transformer.wte",
            "positions": "transformer.wpe",
            "norm": "transformer.ln_f",
            "head": "lm_head",
        },
        blocks="transformer.h",
        block={
            "norm1": "ln_1",
            "qkv": "attn.c_attn",
            "o": "attn.c_proj",
            "norm2": "ln_2",
            "up": "mlp.c_fc",
            "down": "mlp.c_proj",
        },
        buffers=r"(^|\.)h\.\d+\.attn\.(masked_)?bias$",
    ),
    "BertForSequenceClassification": Architecture(
        config=Bert,
        model_type="bert",
        keys={
            "vocab": "vocab_size",
            "d": "hidden_size",
            "layers": "num_hidden_layers",
            "heads": "num_attention_heads",
            "ffn": "intermediate_size",
            "positions": "max_position_embeddings",
            "types": "type_vocab_size",
            "eps": "layer_norm_eps",
        },
        absent={"eps": lambda known: 1e-12},
        fixed={"hidden_act": ("gelu",), "position_embedding_type": ("absolute",)},
        inert="hidden_dropout_prob attention_probs_dropout_prob classifier_dropout "
        "tie_word_embeddings directionality pooler_fc_size pooler_num_attention_heads "
        "pooler_num_fc_layers pooler_size_per_head pooler_type",
        written={
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **_NO_TOKENS,
        },
        prefix="bert.",
        outer={
            "embed": "bert.embeddings.word_embeddings",
            "positions": "bert.embeddings.position_embeddings",
            "types": "bert.embeddings.token_type_embeddings",
            "norm": "bert.embeddings.LayerNorm",
            "pooler": "bert.pooler.dense",
            "head": "classifier",
        },
        blocks="bert.encoder.layer",
        block={
            "q": "attention.self.query",
            "k": "attention.self.key",
            "v": "attention.self.value",
            "o": "attention.output.dense",
            "norm1": "attention.output.LayerNorm",
            "up": "intermediate.dense",
            "down": "output.dense",
            "norm2": "output.LayerNorm",
        },
        buffers=r"(^|\.)embeddings\.position_ids$",
        special=("id2label", "num_labels"),
    ),
}
"""The architectures that are read and written, by their names in ``config.json``."""


def architecture_of(c: Config) -> tuple[str, Architecture]:
    """The name and the description of the architecture that ``c`` configures.

    Errors: TypeError for a configuration of none of them.
    """
    for name, a in ARCHITECTURES.items():
        if type(c) is a.config and all(getattr(c, f) == v for f, v in a.constant.items()):
            return name, a
    raise TypeError(f"{c}: expected a configuration of {', '.join(ARCHITECTURES)}")


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
    return _config(path, read_json(path))


def _config(path: Path, settings: Mapping[str, Any]) -> Config:
    found = settings.get("architectures")
    if found not in [[name] for name in ARCHITECTURES]:
        remedy = "load it with a library that knows it and save it as one of these"
        expected = f"one of {', '.join(ARCHITECTURES)}"
        raise FormatError(path, "architectures", found, expected, remedy)
    a = ARCHITECTURES[found[0]]
    if settings.get("model_type") not in (None, a.model_type):
        remedy = f"write what belongs to {found[0]}"
        raise FormatError(path, "model_type", settings["model_type"], a.model_type, remedy)
    known = {*a.keys.values(), *a.special}
    check_settings(path, settings, known, FIXED | a.fixed, INERT + a.inert)

    values: dict[str, Any] = {}
    for f in dataclasses.fields(a.config):
        if key := a.keys.get(f.name):
            value = settings.get(key)
            if value is None and f.name in a.absent:
                value = a.absent[f.name](values)
            values[f.name] = _typed(path, key, value, f.type)
    if a.config is Llama:
        values["theta"] = _theta(path, settings)
    if a.config is Bert:
        values["classes"] = _classes(path, settings)
    kinds = settings.get("layer_types")
    full = isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    if kinds is not None and not (full and len(kinds) == values["layers"]):
        remedy = "sliding windows are not implemented here"
        raise FormatError(path, "layer_types", kinds, "full_attention for each layer", remedy)
    _check_heads(path, settings, values, a)
    return a.config(**values, **a.constant)


def _typed(path: Path, key: str, value: Any, kind: Any) -> Any:
    """The value as int (at least 1), float (finite and not negative) or bool."""
    fits = {
        int: type(value) is int and 1 <= value <= sys.maxsize,
        float: type(value) in (int, float) and 0 <= value <= sys.float_info.max,
        bool: type(value) is bool,
    }
    if not fits[kind]:
        expected = {int: "a whole number from 1", float: "a number from 0", bool: "true or false"}
        raise FormatError(
            path, key, value, expected[kind], "take it from the model's original file"
        )
    return kind(value)


def _theta(path: Path, settings: Mapping[str, Any]) -> float:
    """RoPE's base; refuses every other kind of RoPE."""
    # An empty rope_scaling yields to rope_parameters, as in transformers.
    where = "rope_scaling" if settings.get("rope_scaling") else "rope_parameters"
    rope = settings.get(where) or {}
    if not isinstance(rope, dict):
        raise FormatError(path, where, rope, "an object", "write it as transformers does")
    kind = ("default", None)
    for key in ("rope_type", "type"):  # before what belongs to another kind
        if rope.get(key) not in kind:
            remedy = "other kinds of RoPE are not implemented here: take another model"
            raise FormatError(f"{path}: {where}", key, json.dumps(rope[key]), '"default"', remedy)
    check_settings(
        f"{path}: {where}", rope, ("rope_theta",), {"rope_type": kind, "type": kind, **_ROPE}, ""
    )
    given = [
        _typed(path, f"{at}rope_theta", value, float)
        for at, value in (
            (f"{where}.", rope.get("rope_theta")),
            ("", settings.get("rope_theta")),
        )
        if value is not None
    ]
    if len(set(given)) > 1 or 0 in given:
        remedy = "keep the one that the model was trained with"
        raise FormatError(path, "rope_theta", given, "one number above 0", remedy)
    return given[0] if given else 10000.0


def _classes(path: Path, settings: Mapping[str, Any]) -> int:
    """The number of classes, which is 2 where the file says nothing."""
    labels, count = settings.get("id2label"), settings.get("num_labels")
    found = 2 if count is None else count
    if labels is not None:
        found = len(labels) if isinstance(labels, dict) else None
    if type(found) is not int or found < 2 or count not in (None, found):
        remedy = "one class is regression, which is not implemented here"
        given = f"id2label {labels}, num_labels {count}"
        raise FormatError(path, "id2label", given, "2 classes or more", remedy)
    return found


def read_labels(path: Path | str) -> tuple[str, ...] | None:
    """The classes' names in their order, ``id2label``; None where it has none but LABEL_0, ….

    Errors: those of :func:`read_config`; FormatError for numbers that are not the classes', two
    classes of one name, or a ``label2id`` that says otherwise.
    """
    path = Path(path) / CONFIG
    settings = read_json(path)
    classes = getattr(_config(path, settings), "classes", 0)
    named, back = settings.get("id2label"), settings.get("label2id")
    if not classes or named is None:
        return None
    found = [named.get(str(i)) for i in range(classes)]
    if not all(isinstance(name, str) and name.strip() for name in found):
        expected = f"a name for each number from 0 to {classes - 1}"
        raise FormatError(path, "id2label", named, expected, "write them as transformers does")
    numbers = {name: i for i, name in enumerate(found)}
    if len(numbers) < classes:
        remedy = "labels are found by their names: give each class its own"
        raise FormatError(path, "id2label", named, "names that differ", remedy)
    if found == _unnamed(classes):
        return None
    if back is not None and back != numbers:
        remedy = "keep the one that the model was trained with"
        raise FormatError(path, "label2id", back, f"{numbers}, as id2label has it", remedy)
    return tuple(found)


def _unnamed(classes: int) -> list[str]:
    """What transformers calls classes that nobody has named."""
    return [f"LABEL_{i}" for i in range(classes)]


def _check_heads(
    path: Path, settings: Mapping[str, Any], values: Mapping[str, Any], a: Architecture
) -> None:
    d, heads = values["d"], values["heads"]
    kv_heads, head_dim = values.get("kv_heads", heads), values.get("head_dim")
    if settings.get("head_dim") is None and d % heads:
        expected = f"a divisor of {a.keys['d']} {d}"
        raise FormatError(path, a.keys["heads"], heads, expected, "the heads share its features")
    if heads % kv_heads:
        expected = f"a divisor of {a.keys['heads']} {heads}"
        raise FormatError(
            path, a.keys["kv_heads"], kv_heads, expected, "each serves as many query heads"
        )
    if head_dim is not None and head_dim % 2:
        raise FormatError(path, "head_dim", head_dim, "an even number", "RoPE turns pairs")


_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")


def generation_settings(path: Path | str) -> dict[str, Any]:
    """What generation needs of a model's ``config.json`` and the logits do not.

    These are its special tokens and how long a text it was made for.

    Errors: FormatError for a damaged file.
    """
    settings = read_json(Path(path) / CONFIG)
    return {key: settings[key] for key in _KEPT if settings.get(key) is not None}


def config_to_json(c: Config, labels: Sequence[str] | None = None) -> dict[str, Any]:
    """What ``config.json`` says for ``c``, dtype and version apart.

    Dropout is 0 and no special token is named: with a padding token transformers would hold the
    gradient of its embedding at 0. A classifier's classes are called by ``labels``, or LABEL_0, …
    where these are none or the classes' numbers.

    Errors: FormatError if reading would refuse it; ValueError for other labels than the classes.
    """
    name, a = architecture_of(c)
    settings = {"architectures": [name], "model_type": a.model_type, **a.written}
    settings |= {key: getattr(c, f) for f, key in a.keys.items()}
    if isinstance(c, Llama):
        settings["rope_parameters"] = {"rope_theta": c.theta, "rope_type": "default"}
        settings["rope_theta"] = c.theta  # for transformers before 5, and mlx-lm
    if isinstance(c, Bert):
        numbers = [str(i) for i in range(c.classes)]
        labels = _unnamed(c.classes) if labels is None or [*labels] == numbers else labels
        if len({*labels}) != len(labels) or len(labels) != c.classes:
            raise ValueError(f"labels {[*labels]}: expected {c.classes} names that differ")
        settings["id2label"] = {str(i): label for i, label in enumerate(labels)}
        settings["label2id"] = {label: i for i, label in enumerate(labels)}
    _config(Path(CONFIG), settings)
    return settings


def module_paths(c: Config) -> dict[str, str]:
    """Internal module name -> the module's path in transformers: ``layers.0.q`` and the like."""
    _, a = architecture_of(c)
    named = dict(a.outer)
    for i in range(c.layers):
        named |= {f"layers.{i}.{at}": f"{a.blocks}.{i}.{path}" for at, path in a.block.items()}
    held = {name.rpartition(".")[0] for name in c.shapes()}
    return {at: path for at, path in named.items() if at in held}


def tensor_names(c: Config) -> dict[str, tuple[str, bool]]:
    """Internal parameter name -> (the file's tensor name, whether it lies transposed there).

    GPT-2's projections lie transposed, (in, out). Vectors are (n,) in files and (n, 1) inside.
    """
    paths, linears = module_paths(c), c.linears()
    places = {}
    for name in c.shapes():
        at, _, part = name.rpartition(".")
        transposed = type(c) is GPT2 and part == "weight" and at in linears
        places[name] = (f"{paths[at]}.{part}", transposed)
    return places


def _is_vector(name: str) -> bool:
    at, _, part = name.rpartition(".")
    return part == "bias" or at.rpartition(".")[2].startswith("norm")


def to_file_layout(name: str, array: Array, transposed: bool) -> Array:
    """The parameter as it lies in a file."""
    return array[:, 0] if _is_vector(name) else array.T if transposed else array


def to_internal(
    files: Mapping[str, Path],
    path: Path,
    found: Weights,
    places: Mapping[str, tuple[str, bool]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Any,
) -> Weights:
    """The tensors found, under internal names and in internal layout, in ``dtype`` if given.

    ``places`` says where each parameter is; ``shapes`` its shape inside; ``files`` the file that a
    tensor came from and ``path`` the one that should hold the missing.

    Errors: FormatError for missing and extra tensors and for wrong shapes.
    """
    wanted = {place for place, _ in places.values()}
    if missing := wanted - found.keys():
        expected = f"{len(wanted)} tensors with {listed(missing)}"
        remedy = "the file is incomplete, or the configuration is another model's"
        raise FormatError(path, "tensors", f"none named {listed(missing)}", expected, remedy)
    if extra := found.keys() - wanted:
        remedy = "nothing here would use them: the configuration is another model's"
        where = files[min(extra)]
        raise FormatError(where, "tensors", listed(extra), f"these {len(wanted)} only", remedy)
    W = {}
    for name, (place, transposed) in places.items():
        array, shape = found[place], shapes[name]
        lying = shape[:1] if _is_vector(name) else shape[::-1] if transposed else shape
        if array.shape != lying:
            remedy = "the configuration is another model's, or the tensor lies transposed"
            raise FormatError(files[place], place, f"shape {array.shape}", f"shape {lying}", remedy)
        # Laid out as it was before it was written, so that products give the same bits.
        inside = np.ascontiguousarray(array.T if transposed else array).reshape(shape)
        W[name] = to_dtype(files[place], place, inside, dtype)
    return W


def read_model(path: Path | str, dtype: Any = None) -> tuple[Config, Weights]:
    """The configuration and the weights in the folder ``path``, in ``dtype`` or the file's own.

    The names may be without the prefix that the base model has inside the whole (as in the first
    GPT-2 files). A tied head may be absent, or present and equal to the embedding.

    Errors: FormatError as :func:`read_config`, `files.read_tensors` and
    :func:`collect` have it; for an index that does not match its shards; for a tied head that
    differs.
    """
    folder = Path(path)
    if not folder.is_dir():
        expected = f"a folder with {CONFIG}"
        raise FormatError(folder, "folder", "a file or nothing", expected, "check the path")
    c = read_config(folder)
    _, a = architecture_of(c)
    found, files = _read_weights(folder, a.buffers)
    first = min(files.values(), default=folder / WEIGHTS)
    _check_layers(first, c, found)
    places = tensor_names(c)
    if not any(name.startswith(a.prefix) for name in found):
        places = {
            name: (place.removeprefix(a.prefix), transposed)
            for name, (place, transposed) in places.items()
        }
    head, embed = f"{a.outer['head']}.weight", places["embed.weight"][0]
    if "head.weight" not in places and head in found and embed in found:
        if not np.array_equal(found[head], found[embed]):
            found_, expected = "other entries than the embedding's", f"{embed}, to which it is tied"
            remedy = "a head of its own needs tie_word_embeddings false, and a Llama or Qwen2"
            raise FormatError(files[head], head, found_, expected, remedy)
        del found[head]
    return c, to_internal(files, first, found, places, c.shapes(), dtype)


def _check_layers(path: Path, c: Config, found: Weights) -> None:
    """Refuse more layers than tensors, before a name is made for each."""
    if c.layers > len(found):
        expected = f"{c.layers} layers of several tensors each"
        raise FormatError(path, "tensors", len(found), expected, f"compare with {CONFIG}")


def read_encoder(path: Path | str, classes: int, dtype: Any = None) -> tuple[Bert, Weights]:
    """A BERT without a classifier, ``BertModel``, as one that is to get a head of so many classes.

    All weights but the head's come from the folder: the head is whoever trains it to draw.

    Errors: those of :func:`read_model`.
    """
    folder = Path(path)
    settings = read_json(folder / CONFIG)
    if settings.get("architectures") != ["BertModel"]:
        found, remedy = settings.get("architectures"), "read it with read_model"
        raise FormatError(folder / CONFIG, "architectures", found, "BertModel alone", remedy)
    said = {"architectures": ["BertForSequenceClassification"], "num_labels": classes}
    c = _config(folder / CONFIG, {k: v for k, v in settings.items() if k != "id2label"} | said)
    assert isinstance(c, Bert)
    _, a = architecture_of(c)
    found_, files = _read_weights(folder, a.buffers)
    first = min(files.values(), default=folder / WEIGHTS)
    _check_layers(first, c, found_)
    places = {
        name: (place.removeprefix(a.prefix), transposed)
        for name, (place, transposed) in tensor_names(c).items()
        if not name.startswith("head.")
    }
    return c, to_internal(files, first, found_, places, c.shapes(), dtype)


def _read_weights(folder: Path, buffers: str | None) -> tuple[Weights, dict[str, Path]]:
    """The tensors of the one file or of all shards, and the file that each came from."""
    single, index = folder / WEIGHTS, folder / INDEX
    if single.exists() == index.exists():
        both = f"both {WEIGHTS} and {INDEX}"
        found = both if single.exists() else listed(p.name for p in folder.iterdir())
        remedy = "remove the one that is out of date, or save the model as safetensors"
        raise FormatError(folder, "folder", found, f"{WEIGHTS} or {INDEX}", remedy)
    if single.exists():
        found_ = read_tensors(single, buffers)
        return found_, dict.fromkeys(found_, single)

    where = read_json(index).get("weight_map")
    shards = set(where.values()) if isinstance(where, dict) and _plain(where) else None
    if not shards or not isinstance(where, dict):
        expected = "tensor names with names of files in the same folder"
        raise FormatError(index, "weight_map", where, expected, "save the model again")
    tensors: Weights = {}
    for shard in sorted(shards):
        path = folder / shard
        inside = read_tensors(path, buffers)
        said = {
            name
            for name, file in where.items()
            if file == shard and not (buffers and re.search(buffers, name))
        }
        if wrong := inside.keys() ^ said:
            expected = f"the {len(said)} tensors of {INDEX}"
            remedy = "shards and index are of different models: save it again"
            found = f"{listed(wrong)} in one of the two only"
            raise FormatError(path, "tensors", found, expected, remedy)
        tensors |= inside
    return tensors, {name: folder / where[name] for name in tensors}


def _plain(where: Mapping[str, Any]) -> bool:
    """Whether each value names a file of tensors, and none outside its folder."""
    return all(
        isinstance(v, str) and re.fullmatch(r"[\w.-]+\.safetensors", v) for v in where.values()
    )


def write_model(
    path: Path | str,
    c: Config,
    W: Weights,
    *,
    dtype: Any = None,
    shard_bytes: int | None = None,
    labels: Sequence[str] | None = None,
    kept: Mapping[str, Any] | None = None,
) -> None:
    """Write ``config.json`` and the weights, in ``dtype`` or their own, to the folder ``path``.

    ``labels`` are the classes' names, as :func:`config_to_json` has them; ``kept`` are settings of
    the model that these weights come from, :func:`generation_settings`. Beyond ``shard_bytes``
    bytes of tensors a new shard begins. The same input gives the same bytes.

    Errors: FormatError if W is not exactly the model's weights (adapters are merged or disabled
    first) or its entries do not fit in ``dtype``; if the folder holds weights that would stay;
    ValueError for other labels than the classes.
    """
    folder = Path(path)
    settings, shapes = config_to_json(c, labels), c.shapes()
    for key, value in (kept or {}).items():
        settings[key] = value if settings.get(key) is None else settings[key]
    if wrong := W.keys() ^ shapes.keys():
        remedy = "merge or disable adapters first, and give every weight of the model"
        found = f"{listed(wrong)} in one of the two only"
        raise FormatError(folder, "weights", found, f"the {len(shapes)} of {c}", remedy)
    tensors: Weights = {}
    for name, (place, transposed) in tensor_names(c).items():
        if W[name].shape != shapes[name]:
            found = f"shape {W[name].shape}"
            raise FormatError(folder, name, found, f"shape {shapes[name]}", "check c against W")
        tensors[place] = to_dtype(folder, name, to_file_layout(name, W[name], transposed), dtype)
    dtypes = {array.dtype.name for array in tensors.values()}
    if len(dtypes) == 1:
        settings["dtype"] = dtypes.pop()

    shards = _shards(tensors, shard_bytes)
    called = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        called = [WEIGHTS]
    files: dict[str, Callable[[], bytes]] = {
        label: partial(pack, folder / label, shard, {"format": "pt"})
        for label, shard in zip(called, shards, strict=True)
    }
    if len(shards) > 1:
        where = {name: label for label, shard in zip(called, shards, strict=True) for name in shard}
        size = sum(array.nbytes for array in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        files[INDEX] = partial(pack_json, index)
    files[CONFIG] = partial(pack_json, settings)
    write_files(folder, files, stale=_WEIGHTS_OF_A_MODEL)


def _shards(tensors: Weights, limit: int | None) -> list[Weights]:
    """The tensors in order, a new part where the next would pass ``limit`` bytes."""
    shards: list[Weights] = [{}]
    size = 0
    for name, array in tensors.items():
        if limit is not None and shards[-1] and size + array.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    return shards
