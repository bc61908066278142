"""Models and adapters in files: written, read, refused, damaged, and seen by other libraries."""

import json
import os
import pickle
import re
import struct
import warnings
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from calculus import GRADIENT, record_worst, relative_error
from extras import optional
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from marks import examples
from safetensors.numpy import load_file, save, save_file

from minilora.io import architectures
from minilora.io.architectures import tensor_names
from minilora.io.atomic import write_files, write_tensors
from minilora.io.errors import FormatError, listed
from minilora.io.files import check_settings, pack_json, read_json, read_tensors
from minilora.io.formats import huggingface, peft
from minilora.io.formats.huggingface import config_to_json, read_config, read_model, write_model
from minilora.io.formats.peft import adapter_names, read_adapter, read_lora_config, write_adapter
from minilora.spec.initialization import draw_weights
from minilora.spec.lora import TrainableSpec, scale
from minilora.spec.models import GPT2, Batch, Bert, Llama, logits
from minilora.spec.target_modules import LoraConfig, inject, resolve_targets

MODELS = {
    "llama": Llama(
        vocab=13, d=8, layers=2, heads=4, ffn=6, kv_heads=2, head_dim=4, eps=1e-6, theta=5e4
    ),
    "qwen2": Llama(
        vocab=13, d=8, layers=2, heads=2, ffn=6, kv_heads=1, head_dim=4, tied=True, qkv_bias=True
    ),
    "gpt2": GPT2(vocab=13, d=8, layers=2, heads=2, ffn=20, positions=9),
    "bert": Bert(vocab=13, d=8, layers=2, heads=2, ffn=12, positions=9, types=2, classes=3),
}
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
every_model = pytest.mark.parametrize("kind", MODELS)


def weights(c, seed=0, std=0.4):
    """Weights of which no two are alike: norms and biases drawn too."""
    rng = np.random.default_rng(seed)
    return {k: v + std * rng.standard_normal(v.shape) for k, v in draw_weights(c, rng, std).items()}


def batch(c):
    ids = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]])
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return Batch(ids, mask=mask, types=ids % 2 if isinstance(c, Bert) else None)


def same(a, b):
    """The same names, dtypes and bits."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes()
        for k in a
    )


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def edit(path, **changes):
    """The JSON file with these settings changed; ``...`` removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return tensors


@pytest.fixture
def folder(tmp_path):
    """A folder with a model of each kind."""
    for kind, c in MODELS.items():
        write_model(tmp_path / kind, c, weights(c))
    return tmp_path


# What the settings of an adapter may say, each said at least once.
LORAS = {
    "llama": LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        lora_dropout=0.1,
        target_modules=["q", "down", "head"],
        rank_pattern={"layers.1.q": 2},
        alpha_pattern={"down": 7.5},
        modules_to_save=["norm.weight", "embed.weight", r"layers\.0\.gate\.weight"],
    ),
    "qwen2": LoraConfig(
        r=2,
        lora_alpha=3,
        bias="all",
        modules_to_save=["embed.weight"],
        init_lora_weights="gaussian",
    ),
    "gpt2": LoraConfig(
        r=2,
        lora_alpha=1,
        bias="all",
        target_modules=r"layers\.\d\.(qkv|down)",
        alpha_pattern={"layers.0.qkv": 4},
        modules_to_save=["norm.weight", "positions.weight", r"layers\.1\.up\.weight"],
    ),
    "bert": LoraConfig(
        r=2,
        lora_alpha=4,
        bias="lora_only",
        target_modules=["q", "v", "o", "pooler"],
        layers_to_transform=None,
        exclude_modules=["layers.0.o"],
        rank_pattern={"v": 1},
        modules_to_save=["head.weight", "head.bias"],
    ),
}


def adapted(kind, seed=1):
    """A model with a trained adapter: its weights, tuning and choice."""
    c, lora = MODELS[kind], LORAS[kind]
    rng = np.random.default_rng(seed)
    W, tuning = inject(weights(c), lora, c.linears(), rng)
    moved = {k: W[k] + 0.3 * rng.standard_normal(W[k].shape) for k in sorted(tuning.trained)}
    return c, W | moved, tuning, lora


@pytest.fixture
def adapters(folder):
    for kind in MODELS:
        c, W, tuning, lora = adapted(kind)
        write_adapter(folder / f"{kind}-adapter", c, W, tuning, lora)
    return folder


@every_model
def test_every_parameter_has_a_place_of_its_own(kind):
    c = MODELS[kind]
    places = tensor_names(c)
    assert places.keys() == c.shapes().keys()
    assert len({place for place, _ in places.values()}) == len(places)


def test_only_gpt2_keeps_projections_transposed():
    for c in MODELS.values():
        transposed = {name for name, (_, lies) in tensor_names(c).items() if lies}
        weights_ = {f"{at}.weight" for at in c.linears()} if isinstance(c, GPT2) else set()
        assert transposed == weights_


@every_model
@pytest.mark.parametrize("shard_bytes", [None, 1500])
def test_a_model_read_back_is_the_model_written(kind, shard_bytes, tmp_path):
    c = MODELS[kind]
    for dtype in DTYPES:
        W = {k: v.astype(dtype) for k, v in weights(c).items()}
        path = tmp_path / np.dtype(dtype).name
        write_model(path, c, W, shard_bytes=shard_bytes)
        c_read, W_read = read_model(path)
        assert c_read == c
        assert same(W_read, W)
        assert len(list(path.glob("*.safetensors"))) > 1 or shard_bytes is None


@every_model
def test_a_model_read_back_computes_the_same_bits(kind, folder):
    c, W = MODELS[kind], weights(MODELS[kind])
    c_read, W_read = read_model(folder / kind)
    z, _ = logits(batch(c), W, c, TrainableSpec())
    z_read, _ = logits(batch(c), W_read, c_read, TrainableSpec())
    assert z.tobytes() == z_read.tobytes()


@every_model
def test_writing_what_was_read_gives_the_same_bytes(kind, folder):
    c, W = read_model(folder / kind)
    # Another layout in memory and another order of names are the same model.
    shuffled = {k: np.asfortranarray(W[k]) for k in reversed(W)}
    write_model(folder / "again", c, shuffled)
    assert contents(folder / "again") == contents(folder / kind)


@every_model
def test_shards_hold_what_they_may_and_the_index_says_where(kind, tmp_path):
    c, W = MODELS[kind], weights(MODELS[kind])
    write_model(tmp_path, c, W, shard_bytes=1500)
    where = read_json(tmp_path / huggingface.INDEX)["weight_map"]
    for shard in sorted(set(where.values())):
        tensors = read_tensors(tmp_path / shard)
        assert tensors.keys() == {name for name in where if where[name] == shard}
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 1500


def test_weights_are_converted_to_the_dtype_asked_for(folder):
    c, W = MODELS["gpt2"], weights(MODELS["gpt2"])
    for dtype in DTYPES:
        narrow = {k: v.astype(dtype) for k, v in W.items()}
        _, W_read = read_model(folder / "gpt2", dtype)
        assert same(W_read, narrow)
        write_model(folder / "written", c, W, dtype=dtype)
        assert same(read_model(folder / "written")[1], narrow)
        written = read_json(folder / "written" / "config.json")["dtype"]
        assert written == np.dtype(dtype).name
    assert read_model(folder / "gpt2", np.longdouble)[1]["norm.weight"].dtype == np.longdouble


def test_a_weight_too_large_for_the_dtype_is_refused(folder):
    c, W = MODELS["gpt2"], weights(MODELS["gpt2"])
    W["layers.1.down.bias"][3] = 7e4
    write_model(folder / "gpt2", c, W)
    with pytest.raises(FormatError, match=r"h\.1\.mlp\.c_proj\.bias: found 1 entr.*at \(3, 0\)"):
        read_model(folder / "gpt2", np.float16)
    assert read_model(folder / "gpt2", ml_dtypes.bfloat16)[1]["layers.1.down.bias"][3] > 6.9e4


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_names_without_the_base_models_prefix_are_read(kind, folder):
    prefix = architectures.architecture_of(MODELS[kind]).prefix
    path = folder / kind / huggingface.WEIGHTS
    save_file({k.removeprefix(prefix): v for k, v in read_tensors(path).items()}, path)
    assert same(read_model(folder / kind)[1], weights(MODELS[kind]))


def test_the_buffers_of_older_files_are_passed_over(folder):
    extra = {
        "gpt2": {"transformer.h.0.attn.bias": np.ones((1, 1, 9, 9), np.uint8)},
        "llama": {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)},
        "bert": {"bert.embeddings.position_ids": np.arange(9)[None]},
    }
    for kind, buffers in extra.items():
        path = folder / kind / huggingface.WEIGHTS
        save_file(read_tensors(path) | buffers, path)
        assert same(read_model(folder / kind)[1], weights(MODELS[kind]))
        save_file(read_tensors(path, next(iter(buffers))) | {"h.bias": np.ones(3)}, path)
        with pytest.raises(FormatError, match=r"tensors: found h\.bias, expected these"):
            read_model(folder / kind)


@pytest.mark.parametrize(
    ("kind", "embedding"), [("gpt2", "transformer.wte"), ("qwen2", "model.embed_tokens")]
)
def test_a_tied_head_may_be_there_if_it_is_the_embedding(kind, embedding, folder):
    path = folder / kind / huggingface.WEIGHTS

    def head(tensors):
        tensors["lm_head.weight"] = tensors[f"{embedding}.weight"].copy()

    tensors = edit_tensors(path, head)
    assert same(read_model(folder / kind)[1], weights(MODELS[kind]))
    tensors["lm_head.weight"][2, 1] = np.nextafter(tensors["lm_head.weight"][2, 1], 1)
    save_file(tensors, path)
    with pytest.raises(FormatError, match=r"lm_head\.weight: found other entries.*tie_word_emb"):
        read_model(folder / kind)


def test_both_ways_to_write_ropes_base_are_read(folder):
    path = folder / "llama" / "config.json"
    for rope in (
        {"rope_parameters": {"rope_theta": 7e3, "rope_type": "default"}},
        {"rope_parameters": ..., "rope_theta": 7000},
        {"rope_parameters": ..., "rope_theta": 7e3, "rope_scaling": None},
        {"rope_parameters": None, "rope_theta": 7e3, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 7e3}, "rope_theta": 7e3},
    ):
        edit(path, rope_theta=..., rope_scaling=...)
        edit(path, **rope)
        assert read_config(path).theta == 7000
    edit(path, rope_theta=..., rope_scaling=..., rope_parameters=...)
    assert read_config(path).theta == 10000


def test_what_older_files_leave_out_is_what_transformers_takes(folder):
    gone = dict.fromkeys(("num_key_value_heads", "head_dim", "rms_norm_eps"), ...)
    edit(folder / "llama" / "config.json", **gone, tie_word_embeddings=...)
    c = read_config(folder / "llama")
    assert (c.kv_heads, c.head_dim, c.eps, c.tied) == (4, 2, 1e-6, False)
    edit(folder / "gpt2" / "config.json", n_inner=None, layer_norm_epsilon=..., attn_pdrop=0.1)
    c = read_config(folder / "gpt2")
    assert (c.ffn, c.eps) == (32, 1e-5)
    edit(folder / "bert" / "config.json", id2label=..., label2id=..., torch_dtype="float32")
    assert read_config(folder / "bert").classes == 2


# As these models have them on the hub, some fields shared with another left out.
HUB = {
    "SmolLM2-135M": (
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "hidden_act": "silu",
            "hidden_size": 576,
            "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.40.1",
            "use_cache": True,
            "vocab_size": 49152,
        },
        Llama(49152, 576, 30, 9, 1536, 3, 64, 1e-5, 1e5, tied=True),
    ),
    "Qwen2.5-0.5B": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "model_type": "qwen2",
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        Llama(151936, 896, 24, 14, 4864, 2, 64, 1e-6, 1e6, tied=True, qkv_bias=True),
    ),
    "gpt2": (
        {
            "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.1,
            "bos_token_id": 50256,
            "layer_norm_epsilon": 1e-05,
            "model_type": "gpt2",
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "summary_first_dropout": 0.1,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50257,
        },
        GPT2(50257, 768, 12, 12, 3072, 1024),
    ),
    "bert-base-multilingual-uncased-sentiment": (
        {
            "_num_labels": 5,
            "architectures": ["BertForSequenceClassification"],
            "attention_probs_dropout_prob": 0.1,
            "directionality": "bidi",
            "finetuning_task": "sentiment-analysis",
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "hidden_size": 768,
            "id2label": {str(i): f"{i + 1} stars" for i in range(5)},
            "intermediate_size": 3072,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": 512,
            "model_type": "bert",
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "output_past": True,
            "pad_token_id": 0,
            "pooler_fc_size": 768,
            "pooler_type": "first_token_transform",
            "type_vocab_size": 2,
            "vocab_size": 105879,
        },
        Bert(105879, 768, 12, 12, 3072, 512, 2, 5),
    ),
}


@pytest.mark.parametrize("model", HUB)
def test_configurations_on_the_hub_are_read(model, tmp_path):
    written, c = HUB[model]
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_config(tmp_path) == c


CONFIG_REFUSALS = [
    ("llama", {"architectures": ["MistralForCausalLM"]}, r"architectures: found \['Mistral"),
    ("llama", {"architectures": None}, "architectures: found None, expected one of LlamaForC"),
    ("llama", {"model_type": "gpt2"}, "model_type: found gpt2, expected llama"),
    ("llama", {"hidden_size": ...}, "hidden_size: found None, expected a whole number from 1"),
    ("llama", {"hidden_size": 8.0}, r"hidden_size: found 8\.0"),
    ("llama", {"hidden_size": True}, "hidden_size: found True"),
    ("llama", {"hidden_size": 0}, "hidden_size: found 0"),
    ("llama", {"hidden_size": 10**4000}, "hidden_size: found 10000"),
    ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps: found 1e-6, expected a number"),
    ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps: found 10000"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings: found 1, expected true or"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads: found 3, expected a divisor"),
    ("llama", {"head_dim": 3}, "head_dim: found 3, expected an even number"),
    ("llama", {"head_dim": None, "hidden_size": 10}, "heads: found 4, expected a divisor of"),
    ("gpt2", {"n_head": 3}, "n_head: found 3, expected a divisor of n_embd 8"),
    (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "low_freq_factor: found None",
    ),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_type: found .yarn"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, 'scaling: type: found "linear"'),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, 'rope_type: found "yarn", expected "def'),
    ("llama", {"rope_parameters": {"factor": 2.0}}, r"factor: found 2\.0, expected no setting"),
    ("llama", {"rope_parameters": [1]}, r"rope_parameters: found \[1\]"),
    ("llama", {"rope_theta": 1e4}, r"rope_theta: found \[50000\.0, 10000\.0\], expected one"),
    ("llama", {"rope_parameters": {"rope_theta": 0}}, "rope_theta: found"),
    ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor: found 0\.5"),
    ("llama", {"hidden_act": "gelu"}, 'hidden_act: found "gelu", expected "silu" or "swish"'),
    ("llama", {"attention_bias": True}, "attention_bias: found true, expected false"),
    ("llama", {"mlp_bias": True}, "mlp_bias: found true"),
    ("llama", {"pretraining_tp": 2}, "pretraining_tp: found 2, expected 1"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: found"),
    ("llama", {"sliding_window": 4096}, "sliding_window: found 4096"),
    ("llama", {"per_layer_config": {"0": {"hidden_act": "gelu"}}}, "per_layer_config: found"),
    ("llama", {"logits_scaling": 8.0}, r"logits_scaling: found 8\.0, expected no setting of"),
    ("qwen2", {"num_key_value_heads": ...}, "num_key_value_heads: found None, expected a whole"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window: found true"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: found"),
    ("qwen2", {"layer_types": 3}, "layer_types: found 3, expected full_attention for each"),
    (
        "qwen2",
        {"num_hidden_layers": 10**15, "layer_types": []},
        r"layer_types: found \[\], expected",
    ),
    ("qwen2", {"attention_bias": False}, "attention_bias: found false, expected no setting"),
    ("gpt2", {"activation_function": "gelu"}, "activation_function: found"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: found false"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx: found true"),
    ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn: found true"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention: found true"),
    ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings: found false"),
    ("bert", {"hidden_act": "gelu_new"}, "hidden_act: found"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type: found"),
    ("bert", {"is_decoder": True}, "is_decoder: found true"),
    ("bert", {"problem_type": "regression"}, 'problem_type: found "regression", expected null or'),
    ("bert", {"id2label": {"0": "a"}}, r"id2label: found .*expected 2 classes.*one class is regr"),
    ("bert", {"id2label": None, "num_labels": 1}, "id2label: found"),
    ("bert", {"num_labels": 5}, "id2label: found .*num_labels 5"),
    ("bert", {"id2label": ["a", "b"]}, "id2label: found"),
]


@pytest.mark.parametrize(("kind", "change", "says"), CONFIG_REFUSALS)
def test_a_setting_that_changes_the_function_is_refused(kind, change, says, folder):
    path = folder / kind / "config.json"
    assert read_config(path) == MODELS[kind]
    edit(path, **change)
    with pytest.raises(FormatError, match=says) as raised:
        read_model(folder / kind)
    assert str(path) in str(raised.value)


@every_model
def test_settings_known_to_change_no_logit_pass(kind, folder):
    a = architectures.architecture_of(MODELS[kind])
    untouched = {"architectures", "model_type", "id2label", "num_labels"}
    inert = set((huggingface.INERT + a.inert).split()) - untouched
    edit(folder / kind / "config.json", **dict.fromkeys(inert, 0.1), of_the_future=None)
    assert read_config(folder / kind) == MODELS[kind]


@every_model
def test_a_fixed_setting_has_no_other_value(kind, adapters):
    c = MODELS[kind]
    a = architectures.architecture_of(c)
    model, adapter = adapters / kind, adapters / f"{kind}-adapter"
    for fixed, path, read in (
        (huggingface.FIXED | a.fixed, model / "config.json", lambda: read_config(model)),
        (peft.FIXED, adapter / "adapter_config.json", lambda: read_lora_config(adapter, c)),
    ):
        text = path.read_text()
        for key, values in fixed.items():
            others = {"other": "other", "one": 1, "yes": True, "no": False}.values()
            for value in (v for v in others if v not in values):
                edit(path, **{key: value})
                with pytest.raises(FormatError, match=f"{key}: found {json.dumps(value)}, exp"):
                    read()
                path.write_text(text)


def test_the_three_lists_of_settings_are_apart():
    for a in architectures.ARCHITECTURES.values():
        fixed = {*huggingface.FIXED, *a.fixed}
        read = {*a.keys.values(), *a.special}
        assert not fixed & read
        assert not fixed & {*huggingface.INERT.split(), *a.inert.split()}
        assert not {*a.keys.values()} & {*huggingface.INERT.split(), *a.inert.split()}
    assert not peft.FIXED.keys() & peft.READ.keys()
    assert not {*peft.FIXED, *peft.READ} & {*peft.INERT.split()}


def test_an_error_crosses_processes_whole():
    error = FormatError("a/b", "x", 1, 2, "count again")
    assert str(error) == "a/b: x: found 1, expected 2; count again"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_of_many_names_the_first_are_listed():
    assert listed("edcba") == "a, b, c, d, e"
    assert listed("fedcba") == "a, b, c, d, e and 1 more"


def test_a_setting_is_inert_by_its_whole_name_only():
    check_settings("f", {"dtype": 1}, (), {}, "torch_dtype dtype")
    with pytest.raises(FormatError, match="f: type: found 1, expected no setting"):
        check_settings("f", {"type": 1}, (), {}, "torch_dtype dtype")


def test_a_configuration_that_could_not_be_read_is_not_written(tmp_path):
    one = Bert(vocab=5, d=4, layers=1, heads=2, ffn=3, positions=4, types=1, classes=1)
    with pytest.raises(FormatError, match="2 classes or more"):
        config_to_json(one)
    odd = Llama(vocab=5, d=6, layers=1, heads=2, ffn=3, kv_heads=2, head_dim=3)
    with pytest.raises(FormatError, match="head_dim: found 3"):
        write_model(tmp_path / "odd", odd, draw_weights(odd, np.random.default_rng(0)))
    assert not (tmp_path / "odd").exists()
    with pytest.raises(TypeError, match="expected a configuration of LlamaForCausalLM"):
        config_to_json("llama")


def breaks(folder, kind, change):
    """The message that reading the model gives after a change of its tensors."""
    edit_tensors(folder / kind / huggingface.WEIGHTS, change)
    with pytest.raises(FormatError) as raised:
        read_model(folder / kind)
    message = str(raised.value)
    assert str(folder / kind / huggingface.WEIGHTS) in message
    return message


Q = "model.layers.1.self_attn.q_proj.weight"


def test_a_missing_tensor_is_named(folder):
    message = breaks(folder, "llama", lambda tensors: tensors.pop(Q))
    assert f"tensors: found none named {Q}, expected 21 tensors with" in message


def test_an_extra_tensor_is_named(folder):
    message = breaks(folder, "llama", lambda tensors: tensors.update(extra=np.ones(2)))
    assert "tensors: found extra, expected these 21 only" in message


def test_a_wrong_shape_is_named(folder):
    message = breaks(folder, "llama", lambda tensors: tensors.update({Q: tensors[Q].T.copy()}))
    assert f"{Q}: found shape (8, 16), expected shape (16, 8); the configuration" in message
    vector = {"model.norm.weight": np.ones((8, 1))}
    message = breaks(
        folder, "llama", lambda tensors: tensors.update({Q: np.ones((16, 8))} | vector)
    )
    assert "model.norm.weight: found shape (8, 1), expected shape (8,)" in message


def test_an_entry_that_is_not_finite_is_named(folder):
    for bad in (np.nan, np.inf):

        def change(tensors, bad=bad):
            tensors[Q] = np.zeros((16, 8))
            tensors[Q][[3, 5], 2] = bad

        message = breaks(folder, "llama", change)
        assert f"{Q}: found 2 entries that are not finite, the first {bad} at (3, 2)" in message


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.ones((16, 8), np.int32), "found dtype int32, expected floating-point numbers"),
        (np.ones((16, 8), bool), "found dtype bool, expected floating-point numbers"),
        (np.ones((0, 8)), "found shape [0, 8], expected at least one entry"),
    ],
)
def test_a_tensor_that_is_no_weight_is_named(array, says, folder):
    message = breaks(folder, "llama", lambda tensors: tensors.update({Q: array}))
    assert f"{Q}: {says}" in message


def test_more_layers_than_tensors_are_refused_before_they_are_counted(folder):
    edit(folder / "gpt2" / "config.json", n_layer=10**15)
    with pytest.raises(FormatError, match=r"tensors: found 28, expected 1000000000000000 layers"):
        read_model(folder / "gpt2")


def test_a_folder_without_weights_or_with_two_kinds_is_refused(folder):
    weights_file = folder / "gpt2" / huggingface.WEIGHTS
    (folder / "gpt2" / huggingface.INDEX).write_text("{}")
    with pytest.raises(FormatError, match="found both model"):
        read_model(folder / "gpt2")
    (folder / "gpt2" / huggingface.INDEX).unlink()
    weights_file.rename(folder / "gpt2" / "pytorch_model.bin")
    with pytest.raises(
        FormatError, match=r"found config\.json, pytorch_model\.bin, expected model"
    ):
        read_model(folder / "gpt2")
    for path in (folder / "nothing", folder / "llama" / "config.json"):
        with pytest.raises(FormatError, match="expected a folder with config"):
            read_model(path)
    (folder / "empty").mkdir()
    with pytest.raises(FormatError, match=r"empty/config\.json: file: found .*No such file"):
        read_model(folder / "empty")


def test_shards_that_do_not_match_their_index_are_refused(tmp_path):
    c, W = MODELS["gpt2"], weights(MODELS["gpt2"])
    write_model(tmp_path, c, W, shard_bytes=1500)
    index = tmp_path / huggingface.INDEX
    where = read_json(index)["weight_map"]
    assert same(read_model(tmp_path)[1], W)

    first, last = min(where.values()), max(where.values())
    moved = next(name for name in where if where[name] == first)
    for wrong, says in (
        ({**where, moved: last}, f"{first}: tensors: found {moved} in one of the two only"),
        ({k: v for k, v in where.items() if k != moved}, f"{moved} in one of the two only"),
        (dict.fromkeys(where, "model-9.safetensors"), r"model-9\.safetensors: file: found No such"),
        ({**where, moved: f"../{first}"}, "weight_map: found .* expected tensor names"),
        ({**where, moved: 3}, "weight_map: found"),
        ([], "weight_map: found"),
        ({}, "weight_map: found"),
    ):
        edit(index, weight_map=wrong)
        with pytest.raises(FormatError, match=says):
            read_model(tmp_path)
    edit(index, weight_map=where)
    (tmp_path / last).unlink()
    with pytest.raises(FormatError, match=last):
        read_model(tmp_path)


def test_a_wrong_shape_in_a_shard_names_the_shard(tmp_path):
    c, W = MODELS["gpt2"], weights(MODELS["gpt2"])
    write_model(tmp_path, c, W, shard_bytes=1500)
    where = read_json(tmp_path / huggingface.INDEX)["weight_map"]
    place = "transformer.h.1.ln_2.bias"
    edit_tensors(tmp_path / where[place], lambda tensors: tensors.update({place: np.ones(9)}))
    with pytest.raises(FormatError, match=rf"{where[place]}: {place}: found shape \(9,\)"):
        read_model(tmp_path)


def test_only_the_models_own_weights_are_written(tmp_path):
    c, W = MODELS["llama"], weights(MODELS["llama"])
    path = tmp_path / "model"
    for wrong, says in (
        (adapted("llama")[1], r"layers\.0\.down\.A.* in one of the two only.*merge or disable"),
        ({k: v for k, v in W.items() if k != "head.weight"}, "found head.weight in one of"),
        (W | {"norm.weight": np.ones(8)}, r"norm\.weight: found shape \(8,\), expected shape"),
        (W | {"norm.weight": np.ones((8, 1), int)}, "weight: found dtype int64"),
        (W | {"norm.weight": np.ones((8, 1), complex)}, "found dtype complex128, shape"),
        (W | {"norm.weight": np.full((8, 1), np.nan)}, "found 8 entries that are not finite"),
    ):
        with pytest.raises(FormatError, match=says):
            write_model(path, c, wrong)
        assert not path.exists()
    with pytest.raises(FormatError, match="it fits in float64: take a wider dtype"):
        write_model(path, c, W | {"norm.weight": np.full((8, 1), 1e300)}, dtype=np.float32)


def test_a_folder_keeps_its_other_files(folder):
    (folder / "gpt2" / "tokenizer.json").write_text("{}")
    (folder / "gpt2" / "model_card.json").write_text("{}")
    c, W = MODELS["gpt2"], weights(MODELS["gpt2"], seed=5)
    write_model(folder / "gpt2", c, W)
    assert same(read_model(folder / "gpt2")[1], W)
    assert (folder / "gpt2" / "tokenizer.json").read_text() == "{}"


def test_weights_of_another_model_may_not_stay(folder, adapters):
    c, W = MODELS["gpt2"], weights(MODELS["gpt2"])
    before = contents(folder / "gpt2")
    with pytest.raises(FormatError, match=r"found model\.safetensors, expected no weights but"):
        write_model(folder / "gpt2", c, W, shard_bytes=1500)
    assert contents(folder / "gpt2") == before
    c, W, tuning, lora = adapted("gpt2")
    (folder / "gpt2-adapter" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FormatError, match=r"found adapter_model\.bin, expected no weights but"):
        write_adapter(folder / "gpt2-adapter", c, W, tuning, lora)


def test_a_file_in_the_place_of_a_folder_stays(folder):
    c, W = MODELS["gpt2"], weights(MODELS["gpt2"])
    path = folder / "gpt2" / "config.json"
    before = path.read_bytes()
    with pytest.raises(FormatError, match="found a file, expected a folder"):
        write_model(path, c, W)
    assert path.read_bytes() == before
    (folder / "taken" / "config.json").mkdir(parents=True)
    with pytest.raises(FormatError, match="found folders named config"):
        write_model(folder / "taken", c, W)


@pytest.mark.parametrize("fails", ["pack", "replace"])
def test_a_failure_leaves_the_folder_as_it_was(fails, folder, monkeypatch):
    c, W = MODELS["gpt2"], weights(MODELS["gpt2"], seed=5)
    before = contents(folder / "gpt2")

    def fail(*args):
        raise OSError("no space left")

    if fails == "pack":  # the last of several files to be made
        monkeypatch.setattr(huggingface.model, "pack_json", fail)
    else:
        monkeypatch.setattr(os, "replace", fail)
    for path in (folder / "gpt2", folder / "new"):
        with pytest.raises(OSError, match="no space left"):
            write_model(path, c, W)
    assert contents(folder / "gpt2") == before
    assert not (folder / "new").exists()
    monkeypatch.undo()
    write_model(folder / "gpt2", c, W)
    assert contents(folder / "gpt2") != before


def test_what_is_written_may_be_read_by_all_who_may_read_the_folder(tmp_path):
    write_model(tmp_path / "model", MODELS["gpt2"], weights(MODELS["gpt2"]))
    (tmp_path / "plain").write_bytes(b"")
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_tensors_come_back_whatever_their_layout_in_memory(tmp_path):
    x = np.arange(6.0).reshape(2, 3)
    arrays = {"b": x.T, "a": x[:, ::2], "c": x.astype(">f4"), "d": np.array([3, 1]), "e": x[0, 0]}
    write_tensors(tmp_path / "x.safetensors", arrays, {"format": "pt"})
    found = read_tensors(tmp_path / "x.safetensors")
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    assert found["c"].dtype == np.float32
    assert not np.array_equal(found["b"], x.reshape(3, 2))  # the memory as it lies


def test_bytes_do_not_depend_on_order_and_chance(tmp_path):
    arrays = {name: np.full(3, i, np.float32) for i, name in enumerate("abcdef")}
    for i in range(8):
        some = dict(reversed(arrays.items())) if i % 2 else arrays
        write_tensors(tmp_path / str(i), some, {"format": "pt"})
    assert len({(tmp_path / str(i)).read_bytes() for i in range(8)}) == 1
    with pytest.raises(ValueError, match="metadata a, b: one entry at most"):
        write_tensors(tmp_path / "no", arrays, {"b": "1", "a": "2"})
    assert pack_json({"b": 1, "a": 2}) == pack_json({"a": 2, "b": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        pack_json({"a": np.inf})
    # More entries come in an order of chance.
    many = {str(i): "" for i in range(8)}
    assert len({save(arrays, many) for _ in range(20)}) > 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "found no JSON from line 1, column 1 on"),
        ("[1]", "found a list, expected a JSON object"),
        ('{"a": 1, "b": 2, "a": 3}', "found a given twice"),
        ('{"a": NaN}', "found the number NaN"),
        ('{"a": -Infinity}', "found the number -Infinity"),
        ('{"a": 1e999}', "found the number 1e999"),
        ('{"a": "\udcff"}', "found bytes that are no text, from byte 7 on"),
        ("[" * 100_000, "found brackets nested too deep"),
        ('{"a": 1' + "0" * 5000 + "}", "found a whole number of thousands of digits"),
    ],
)
def test_damaged_json_is_refused(text, says, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FormatError, match=says) as raised:
        read_json(path)
    assert str(path) in str(raised.value)


@every_model
def test_an_adapter_read_back_is_the_adapter_written(kind, adapters):
    c, W, tuning, _ = adapted(kind)
    read, tuning_read = read_adapter(adapters / f"{kind}-adapter", c)
    assert same(read, {name: W[name] for name in read})
    assert read.keys() == tuning.trained
    assert tuning_read == tuning
    z, _ = logits(batch(c), W, c, tuning)
    z_read, _ = logits(batch(c), read_model(adapters / kind)[1] | read, c, tuning_read)
    assert z.tobytes() == z_read.tobytes()
    z_base, _ = logits(batch(c), weights(c), c, TrainableSpec())
    assert abs(z - z_base).max() > 0.01


@every_model
def test_the_choice_read_back_is_the_choice_written(kind, adapters):
    c, _, _, lora = adapted(kind)
    read = read_lora_config(adapters / f"{kind}-adapter", c)
    assert resolve_targets(read, c.linears()) == resolve_targets(lora, c.linears())
    assert (read.r, read.lora_alpha, read.use_rslora, read.lora_dropout) == (
        lora.r,
        lora.lora_alpha,
        lora.use_rslora,
        lora.lora_dropout,
    )
    assert (read.bias, read.init_lora_weights) == (lora.bias, lora.init_lora_weights)
    W = weights(c)
    assert (
        inject(W, read, c.linears(), np.random.default_rng(0))[1]
        == (inject(W, lora, c.linears(), np.random.default_rng(0))[1])
    )


@every_model
def test_writing_an_adapter_that_was_read_gives_the_same_bytes(kind, adapters):
    path = adapters / f"{kind}-adapter"
    c = MODELS[kind]
    W, tuning = read_adapter(path, c)
    shuffled = {k: np.asfortranarray(W[k]) for k in reversed(W)}
    write_adapter(adapters / "again", c, shuffled, tuning, read_lora_config(path, c))
    assert contents(adapters / "again") == contents(path)


def test_an_adapter_is_converted_to_the_dtype_asked_for(adapters):
    c, W, tuning, lora = adapted("bert")
    for dtype in DTYPES:
        narrow = {k: W[k].astype(dtype) for k in tuning.trained}
        assert same(read_adapter(adapters / "bert-adapter", c, dtype)[0], narrow)
        write_adapter(adapters / "written", c, W, tuning, lora, dtype=dtype)
        assert same(read_adapter(adapters / "written", c)[0], narrow)


def test_names_in_an_adapters_file():
    c = MODELS["llama"]
    asked = ["layers.0.q.A", "layers.0.q.B", "layers.0.q.weight", "norm.weight", "head.weight"]
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    assert adapter_names(c, asked) == {
        "layers.0.q.A": f"{q}.lora_A.weight",
        "layers.0.q.B": f"{q}.lora_B.weight",
        "layers.0.q.weight": f"{q}.base_layer.weight",
        "norm.weight": "base_model.model.model.norm.weight",
        "head.weight": "base_model.model.lm_head.weight",
    }
    gpt2 = adapter_names(MODELS["gpt2"], ["layers.1.qkv.A", "layers.1.qkv.bias", "layers.1.o.bias"])
    assert list(gpt2.values()) == [
        "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight",
        "base_model.model.transformer.h.1.attn.c_attn.base_layer.bias",
        "base_model.model.transformer.h.1.attn.c_proj.bias",
    ]
    with pytest.raises(ValueError, match=r"'layers\.2\.q\.A': found no module 'layers\.2\.q'"):
        adapter_names(c, ["layers.2.q.A"])


def said(adapters, kind, **changes):
    """The choice that the adapter's settings make after these changes."""
    path = adapters / f"{kind}-adapter"
    edit(path / "adapter_config.json", **changes)
    return read_lora_config(path, MODELS[kind])


def targets(adapters, kind, **changes):
    return sorted(said(adapters, kind, modules_to_save=None, **changes).target_modules)


def layers(*ends, of=(0, 1)):
    return sorted(f"layers.{i}.{end}" for i in of for end in ends)


LLAMA = layers(*"qkvo", "gate", "up", "down")
BERT = layers(*"qkvo", "up", "down")


TARGETS = [
    ("llama", {"target_modules": ["q_proj", "lm_head"]}, ["head", *layers("q")]),
    ("llama", {"target_modules": ["model.layers.1.mlp.up_proj"]}, ["layers.1.up"]),
    ("llama", {"target_modules": ["1.self_attn.k_proj"]}, ["layers.1.k"]),
    ("llama", {"target_modules": "all-linear"}, LLAMA),
    ("llama", {"target_modules": "All-Linear"}, LLAMA),
    ("llama", {"target_modules": r".*\.1\..*(q|v)_proj"}, layers("q", "v", of=[1])),
    ("llama", {"target_modules": ["v_proj"], "layers_to_transform": 1}, ["layers.1.v"]),
    ("llama", {"target_modules": ["v_proj"], "layers_to_transform": [0, 7]}, ["layers.0.v"]),
    ("llama", {"target_modules": ["v_proj"], "layers_to_transform": []}, layers("v")),
    (  # a whole name is not asked for its layer
        "llama",
        {"target_modules": ["v_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": 1},
        ["layers.0.up", "layers.1.v"],
    ),
    (
        "gpt2",
        {"target_modules": ["c_proj"], "layers_to_transform": 1, "layers_pattern": "h"},
        layers("o", "down", of=[1]),
    ),
    (
        "gpt2",
        {"target_modules": ["c_fc"], "layers_to_transform": 0, "layers_pattern": ["x", "h"]},
        ["layers.0.up"],
    ),
    (
        "llama",
        {"target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        ["layers.1.v"],
    ),
    ("gpt2", {"target_modules": "all-linear"}, layers("qkv", "o", "up", "down")),
    ("bert", {"target_modules": "all-linear", "task_type": None}, ["head", "pooler", *BERT]),
    ("bert", {"target_modules": "all-linear"}, [*BERT, "pooler"]),
    ("bert", {"target_modules": ["dense"]}, [*layers("o", "up", "down"), "pooler"]),
    (
        "bert",
        {"target_modules": ["dense"], "layers_to_transform": 1},
        layers("o", "up", "down", of=[1]),
    ),
    (
        "bert",
        {"target_modules": ["dense", "key"], "exclude_modules": ["output.dense"]},
        ["pooler", *layers("k", "up")],
    ),
    (
        "bert",
        {"target_modules": ["dense"], "exclude_modules": ".*(pooler|0).*"},
        layers("o", "up", "down", of=[1]),
    ),
]


@pytest.mark.parametrize(("kind", "changes", "hit"), TARGETS)
def test_targets_are_resolved_as_peft_resolves_them(kind, changes, hit, adapters):
    assert targets(adapters, kind, **changes) == sorted(hit)


def test_what_is_saved_in_full_is_not_adapted(adapters):
    lora = said(adapters, "bert", target_modules=["dense", "query"], modules_to_save=["pooler"])
    assert sorted(lora.target_modules) == layers("q", "o", "up", "down")
    assert {*lora.modules_to_save} == {"pooler.weight", "pooler.bias", "head.weight", "head.bias"}
    # Modules are found by the end of their name, no dot asked: norm is layernorm, too.
    norms = {"norm.weight", "layers.0.norm1.weight", "layers.1.norm1.weight"}
    norms |= {"layers.0.norm2.weight", "layers.1.norm2.weight"}
    lora = said(adapters, "llama", modules_to_save=["norm"], target_modules=["q_proj"])
    assert {*lora.modules_to_save} == norms


def test_ranks_and_scales_follow_the_first_pattern_that_fits(adapters):
    lora = said(
        adapters,
        "llama",
        target_modules=["q_proj", "v_proj"],
        modules_to_save=None,
        r=4,
        lora_alpha=12,
        use_rslora=False,
        rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 3, "^v_proj": 5},
        alpha_pattern={".*v_proj": 20.5, "layers.0.self_attn.v_proj": 1},
    )
    choice = resolve_targets(lora, MODELS["llama"].linears())
    found = {at: scale(choice.alpha[at], r, lora.use_rslora) for at, r in choice.rank.items()}
    assert found == {
        "layers.0.q": 12 / 3,
        "layers.1.q": 12 / 2,
        "layers.0.v": 20.5 / 4,
        "layers.1.v": 20.5 / 4,
    }


ADAPTER_REFUSALS = [
    ("llama", {"peft_type": "LOHA"}, 'peft_type: found "LOHA", expected "LORA"'),
    ("llama", {"peft_type": ...}, "peft_type: found none, expected LORA"),
    ("llama", {"task_type": "SEQ_CLS"}, 'task_type: found "SEQ_CLS", expected null or "CAUS'),
    ("bert", {"task_type": "TOKEN_CLS"}, 'task_type: found "TOKEN_CLS", expected null or "SEQ'),
    ("llama", {"use_qalora": True}, "use_qalora: found true"),
    ("llama", {"use_bdlora": {"nblocks": 1}}, "use_bdlora: found"),
    ("llama", {"init_lora_weights": "pissa"}, 'init_lora_weights: found "pissa"'),
    ("llama", {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: found"),
    ("llama", {"init_lora_weights": "olora"}, "init_lora_weights: found"),
    ("llama", {"init_lora_weights": "loftq"}, "init_lora_weights: found"),
    ("llama", {"init_lora_weights": "corda"}, "init_lora_weights: found"),
    ("llama", {"init_lora_weights": "lora_ga"}, "init_lora_weights: found"),
    ("llama", {"init_lora_weights": "mica"}, "init_lora_weights: found"),
    ("llama", {"target_parameters": ["experts.w"]}, "target_parameters: found"),
    ("llama", {"layer_replication": [[0, 2], [1, 2]]}, "found a model of 2 layers, expected 3"),
    ("llama", {"trainable_token_indices": [1]}, "trainable_token_indices: found"),
    ("llama", {"arrow_config": {"top_k": 2}}, "arrow_config: found"),
    ("llama", {"kasa_config": {"beta": 1}}, "kasa_config: found"),
    ("llama", {"monteclora_config": {}}, "monteclora_config: found"),
    ("llama", {"velora_config": {"scale": 1.0}}, "velora_config: found"),
    ("llama", {"megatron_config": {}}, "megatron_config: found"),
    ("llama", {"of_the_future": 0}, "of_the_future: found 0, expected no setting of this name"),
    ("llama", {"r": ...}, "r: found null, expected a whole number from 1"),
    ("llama", {"r": 0}, "r: found 0"),
    ("llama", {"r": True}, "r: found true"),
    ("llama", {"lora_alpha": "16"}, 'lora_alpha: found "16", expected a number'),
    ("llama", {"lora_alpha": 10**400}, "lora_alpha: found 1000"),
    ("llama", {"lora_dropout": 1.0}, r"lora_dropout: found 1\.0"),
    ("llama", {"use_rslora": 1}, "use_rslora: found 1, expected true or false"),
    ("llama", {"bias": "some"}, 'bias: found "some", expected none, all or lora_only'),
    ("llama", {"rank_pattern": {"q_proj": 1.5}}, r"rank_pattern: found \{.q_proj.: 1\.5"),
    ("llama", {"alpha_pattern": ["q_proj"]}, "alpha_pattern: found"),
    ("llama", {"alpha_pattern": {"(": 1}}, "expressions: found missing \\), unterminated"),
    ("llama", {"rank_pattern": {"(?P<a>x){99999999999}": 1}}, "expressions: found the repetition"),
    ("llama", {"target_modules": None}, "target_modules: found null, expected text or a list"),
    ("llama", {"target_modules": [1]}, r"target_modules: found \[1\]"),
    ("llama", {"target_modules": ["c_attn"]}, r"target_modules: found \[.c_attn.\]"),
    ("llama", {"target_modules": []}, r"target_modules: found \[\]"),
    ("llama", {"target_modules": "q_proj", "layers_to_transform": 1}, "transform: found it"),
    ("llama", {"layers_to_transform": [1.0]}, r"layers_to_transform: found \[1\.0\]"),
    ("llama", {"target_modules": ["input_layernorm"]}, "input_layernorm, expected proj"),
    (
        "llama",
        {"modules_to_save": ["_proj"]},
        r"found .*q_proj, by the end of the name, expected mod",
    ),
    ("gpt2", {"modules_to_save": ["wte"]}, "modules_to_save: found transformer.wte of"),
    ("gpt2", {"modules_to_save": ["wte"], "ensure_weight_tying": True}, "modules_to_save: found"),
    ("qwen2", {"ensure_weight_tying": False}, "modules_to_save: found model.embed_tok"),
    ("qwen2", {"modules_to_save": ["lm_head"], "ensure_weight_tying": False}, "found lm_head of"),
]


@pytest.mark.parametrize(("kind", "changes", "says"), ADAPTER_REFUSALS)
def test_an_adapters_setting_that_changes_the_function_is_refused(kind, changes, says, adapters):
    path = adapters / f"{kind}-adapter"
    read_adapter(path, MODELS[kind])
    edit(path / "adapter_config.json", **changes)
    with pytest.raises(FormatError, match=says) as raised:
        read_adapter(path, MODELS[kind])
    assert "adapter_config.json" in str(raised.value)


@every_model
def test_settings_known_to_change_nothing_of_an_adapter_pass(kind, adapters):
    path = adapters / f"{kind}-adapter"
    before = read_adapter(path, MODELS[kind])
    inert = dict.fromkeys(peft.INERT.split(), True)
    off = {key: values[-1] for key, values in peft.FIXED.items() if key != "init_lora_weights"}
    edit(path / "adapter_config.json", **inert, **off, of_the_future=None)
    for init in (True, False, "orthogonal", "eva"):
        edit(path / "adapter_config.json", init_lora_weights=init)
        W, tuning = read_adapter(path, MODELS[kind])
        assert same(W, before[0])
        assert tuning == before[1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target_modules": ["q_proj"]}, "tensors: found .*down_proj.lora_A.*, expected these"),
        ({"target_modules": ["q_proj", "k_proj", "down_proj", "lm_head"]}, "none named .*k_proj.l"),
        (
            {"rank_pattern": {}},
            r"q_proj\.lora_A\.weight: found shape \(2, 8\), expected .*\(3, 8\)",
        ),
        ({"r": 5}, r"found shape \(3, .\), expected shape \(5, .\)"),
        ({"modules_to_save": None}, r"tensors: found .*embed_tokens\.weight.*, expected these"),
        (
            {"modules_to_save": ["norm", "embed_tokens", "gate_proj"]},
            "none named .*input_layernorm",
        ),
    ],
)
def test_tensors_that_do_not_agree_with_the_settings_are_refused(changes, says, adapters):
    path = adapters / "llama-adapter"
    edit(path / "adapter_config.json", **changes)
    with pytest.raises(FormatError, match=says) as raised:
        read_adapter(path, MODELS["llama"])
    assert "adapter_model.safetensors" in str(raised.value)


def test_a_bias_rule_must_agree_with_the_tensors(adapters):
    for kind, bias, says in (
        ("bert", "none", r"found .*query\.base_layer\.bias.*, expected these"),
        ("bert", "all", "none named .*LayerNorm.bias"),
        ("gpt2", "lora_only", r"found .*\.bias.*, expected these"),
    ):
        edit(adapters / f"{kind}-adapter" / "adapter_config.json", bias=bias)
        with pytest.raises(FormatError, match=says):
            read_adapter(adapters / f"{kind}-adapter", MODELS[kind])


def test_an_adapters_tensors_are_checked_as_a_models_are(adapters):
    path = adapters / "llama-adapter"
    q = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    for array, says in (
        (np.full((16, 3), np.nan), "found 48 entries that are not finite"),
        (np.ones((16, 3), np.int8), "found dtype int8"),
        (np.ones((3, 16)), r"found shape \(3, 16\), expected shape \(16, 3\)"),
    ):
        edit_tensors(path / peft.WEIGHTS, lambda tensors, array=array: tensors.update({q: array}))
        with pytest.raises(FormatError, match=f"{q}: {says}"):
            read_adapter(path, MODELS["llama"])
    write_adapter(path, *adapted("llama"))
    (path / "adapter_model.bin").write_bytes(b"of an earlier release, and not read")
    read_adapter(path, MODELS["llama"])
    (path / peft.WEIGHTS).unlink()
    with pytest.raises(FormatError, match=r"found none, but a \.bin, expected a saf"):
        read_adapter(path, MODELS["llama"])


def test_what_peft_writes_twice_must_be_equal(adapters):
    c, path = MODELS["gpt2"], adapters / "gpt2-adapter"
    norm = "base_model.model.transformer.ln_f"
    before = read_adapter(path, c)[0]

    def twice(tensors):
        tensors[f"{norm}.modules_to_save.bias"] = tensors[f"{norm}.bias"].copy()
        tensors[f"{norm}.original_module.bias"] = np.zeros(8)

    tensors = edit_tensors(path / peft.WEIGHTS, twice)
    assert same(read_adapter(path, c)[0], before)
    tensors[f"{norm}.modules_to_save.bias"][0] += 1
    save_file(tensors, path / peft.WEIGHTS)
    with pytest.raises(FormatError, match=rf"{norm}\.modules_to_save\.bias: found other entries"):
        read_adapter(path, c)

    tensors.pop(f"{norm}.bias")
    save_file(tensors, path / peft.WEIGHTS)
    with pytest.raises(FormatError, match=rf"none named {norm}\.bias"):
        read_adapter(path, c)

    c, path = MODELS["qwen2"], adapters / "qwen2-adapter"
    embedding = "base_model.model.model.embed_tokens.weight"
    tensors = load_file(path / peft.WEIGHTS)
    assert np.array_equal(tensors["base_model.model.lm_head.weight"], tensors[embedding])
    tensors["base_model.model.lm_head.weight"][0] += 1
    save_file(tensors, path / peft.WEIGHTS)
    with pytest.raises(FormatError, match=r"lm_head\.weight: found other entries"):
        read_adapter(path, c)


def test_only_what_the_choice_says_is_written(tmp_path):
    c, W, tuning, lora = adapted("llama")
    biased = MODELS["gpt2"]
    other = {**tuning.scale, "layers.0.q": 1.0}
    for wrong, says in (
        ((weights(c), tuning, lora), r"factors: found head\.A.* in one of the two, expected the"),
        ((W, tuning, LoraConfig(target_modules=["q"])), r"factors: found head\.A"),
        ((W | {"layers.0.q.A": np.ones((4, 8))}, tuning, lora), r"q\.A: found shape \(4, 8\), exp"),
        ((W, replace(tuning, scale=other), lora), r"scale of layers\.0\.q: found 1"),
        ((W, TrainableSpec(scale={}, trained=tuning.trained), lora), "scale of .*: found None"),
        ((W, TrainableSpec(tuning.scale, trained=tuning.trained | {"layers.0.q.weight"}), lora),
         r"trained: found layers\.0\.q left out or over"),
    ):  # fmt: skip
        with pytest.raises(FormatError, match=says):
            write_adapter(tmp_path / "no", c, *wrong)
    for also, bias, says in (
        (["norm.weight"], "none", r"trained: found norm\.bias left out or over"),
        (["norm.bias"], "none", r"trained: found norm\.weight left out or over"),
        (["embed.weight"], "none", "found the tied embedding, expected no tied embedding"),
    ):
        lora = LoraConfig(modules_to_save=also, bias=bias)
        W, tuning = inject(weights(biased), lora, biased.linears(), np.random.default_rng(0))
        with pytest.raises(FormatError, match=says):
            write_adapter(tmp_path / "no", biased, W, tuning, lora)
    rule = LoraConfig(bias="all")
    W, tuning = inject(weights(biased), LoraConfig(), biased.linears(), np.random.default_rng(0))
    with pytest.raises(FormatError, match=r"left out or over, expected bias 'all' and whole"):
        write_adapter(tmp_path / "no", biased, W, tuning, rule)
    assert not (tmp_path / "no").exists()


def test_alpha_is_written_if_json_has_it(tmp_path):
    c = MODELS["gpt2"]
    for alpha, written in ((np.float32(2.5), 2.5), (np.int64(3), 3), (Fraction(1, 2), None)):
        lora = LoraConfig(r=1, lora_alpha=alpha, target_modules=["qkv"])
        W, tuning = inject(weights(c), lora, c.linears(), np.random.default_rng(0))
        if written is None:
            with pytest.raises(
                FormatError, match=r"alpha: found Fraction\(1, 2\), expected an int"
            ):
                write_adapter(tmp_path, c, W, tuning, lora)
        else:
            write_adapter(tmp_path, c, W, tuning, lora)
            assert read_json(tmp_path / "adapter_config.json")["lora_alpha"] == written


class Damaged:
    """A folder of which one file is replaced by other bytes while it is read."""

    def __init__(self, folder, read):
        self.folder, self.read = folder, read
        self.files = contents(folder)
        self.before = read(folder)

    def reading(self, name, data):
        """What reading gives, or the FormatError; any other exception is an error of ours."""
        path = self.folder / name
        path.write_bytes(data)
        try:
            result = self.read(self.folder)
        except FormatError as error:
            result = error
        finally:
            path.write_bytes(self.files[name])
        if isinstance(result, FormatError):
            assert str(self.folder) in str(result)
            assert re.search("found .*, expected .*; ", str(result), re.DOTALL)
        return result


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    c = GPT2(vocab=3, d=2, layers=1, heads=1, ffn=3, positions=2)
    lora = LoraConfig(
        r=1, lora_alpha=2, target_modules=["qkv"], bias="all", modules_to_save=["norm.weight"]
    )
    W, tuning = inject(weights(c), lora, c.linears(), np.random.default_rng(0))
    write_model(folder / "model", c, weights(c), dtype=np.float32)
    write_adapter(folder / "adapter", c, W, tuning, lora, dtype=ml_dtypes.bfloat16)
    return {
        "model": Damaged(folder / "model", read_model),
        "adapter": Damaged(folder / "adapter", lambda path: read_adapter(path, c)[::-1]),
    }


FILES = [
    ("model", huggingface.WEIGHTS),
    ("adapter", peft.WEIGHTS),
    ("model", huggingface.CONFIG),
    ("adapter", peft.CONFIG),
]
BYTES = st.integers(0, 255) | st.sampled_from(list(b'0123456789,.-[]{}":FBIUXeE'))
some = settings(examples(10), suppress_health_check=[HealthCheck.function_scoped_fixture])


def header_end(data):
    return 8 + struct.unpack("<Q", data[:8])[0]


def flipped(data, draw, start, stop):
    """The bytes with one to three replaced between ``start`` and ``stop``."""
    changed = bytearray(data)
    for at in draw(st.lists(st.integers(start, stop - 1), min_size=1, max_size=3)):
        changed[at] = draw(BYTES)
    return bytes(changed)


def same_result(a, b):
    return a[0] == b[0] and same(a[1], b[1])


@pytest.mark.parametrize(("kind", "name"), FILES)
@some
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused(damaged, kind, name, data):
    folder, whole = damaged[kind], damaged[kind].files[name]
    assert same_result(folder.reading(name, whole), folder.before)
    end = len(whole.rstrip())  # of JSON, the last line break is no part
    cut = whole[: data.draw(st.integers(0, end - 1))]
    assert isinstance(folder.reading(name, cut), FormatError)
    assert isinstance(folder.reading(name, whole + b"x"), FormatError)


@pytest.mark.parametrize(("kind", "name"), FILES[:2])
@some
@given(data=st.data())
def test_a_damaged_header_never_gives_other_arrays(damaged, kind, name, data):
    folder, whole = damaged[kind], damaged[kind].files[name]
    found = folder.reading(name, flipped(whole, data.draw, 0, header_end(whole)))
    assert isinstance(found, FormatError) or same_result(found, folder.before)


@pytest.mark.parametrize(("kind", "name"), FILES[:2])
@some
@given(data=st.data())
def test_damaged_numbers_are_refused_if_they_are_none(damaged, kind, name, data):
    folder, whole = damaged[kind], damaged[kind].files[name]
    found = folder.reading(name, flipped(whole, data.draw, header_end(whole), len(whole)))
    if isinstance(found, FormatError):
        assert "not finite" in str(found)
    else:
        assert found[1].keys() == folder.before[1].keys()
        assert all(np.isfinite(array).all() for array in found[1].values())


@pytest.mark.parametrize(("kind", "name"), FILES)
@some
@given(data=st.data())
def test_whatever_a_file_holds_no_other_exception_comes_out(damaged, kind, name, data):
    folder, whole = damaged[kind], damaged[kind].files[name]
    folder.reading(name, flipped(whole, data.draw, 0, len(whole)))
    folder.reading(name, data.draw(st.binary(max_size=60)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def every_setting(tmp_path_factory):
    """For each model: its settings and its adapter's, and the names that either may have."""
    folder = tmp_path_factory.mktemp("settings")
    found = {}
    for kind, c in MODELS.items():
        write_adapter(folder, c, *adapted(kind)[1:])
        a = architectures.architecture_of(c)
        names_ = [*huggingface.FIXED, *a.fixed, *a.keys.values(), *a.special, "architectures"]
        adapter = read_json(folder / peft.CONFIG)
        found[kind] = (folder, config_to_json(c), names_, adapter, [*peft.FIXED, *peft.READ])
    return found


@pytest.mark.slow
@every_model
@some
@given(data=st.data())
def test_whatever_a_setting_says_no_other_exception_comes_out(every_setting, kind, data):
    folder, model, names_, adapter, adapter_names_ = every_setting[kind]
    for base, possible, file, read in (
        (model, names_, huggingface.CONFIG, read_config),
        (adapter, adapter_names_, peft.CONFIG, lambda path: read_lora_config(path, MODELS[kind])),
    ):
        changes = data.draw(st.dictionaries(st.sampled_from(possible), JSON, max_size=2))
        (folder / file).write_text(json.dumps(base | changes))
        try:
            read(folder)
            message = file
        except FormatError as error:
            message = str(error)
        assert file in message


def test_the_library_alone_takes_a_damaged_header(damaged):
    whole = damaged["model"].files[huggingface.WEIGHTS]
    path = damaged["model"].folder / "other"
    path.write_bytes(whole.replace(b'"F32"', b'"I32"', 1))
    assert "int32" in {array.dtype.name for array in load_file(path).values()}
    path.unlink()


class Libraries(SimpleNamespace):
    """torch, transformers and peft."""

    def model(self, folder):
        """The folder's model as transformers loads it."""
        architecture = read_json(folder / "config.json")["architectures"][0]
        cls = getattr(self.transformers, architecture)
        return cls.from_pretrained(folder, attn_implementation="sdpa").eval()

    def adapt(self, model, **settings_):
        """The model with a fresh adapter, everything that PEFT trains of it moved at random."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
            warnings.filterwarnings("ignore", "You have requested `ensure_weight_t", UserWarning)
            model = self.peft.get_peft_model(model, self.peft.LoraConfig(**settings_))
        rng = np.random.default_rng(3)
        with self.torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += self.torch.from_numpy(0.3 * rng.standard_normal(parameter.shape))
        return model.eval()

    def adapted(self, model, folder):
        """The model with the folder's adapter. A missing or unused tensor would be a warning."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            return self.peft.PeftModel.from_pretrained(model, folder, is_trainable=True).eval()

    def saved(self, model, folder):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Setting `save_embedding_layers` to `T", UserWarning)
            model.save_pretrained(folder)
        return folder

    def logits(self, model, c):
        """The logits as minilora has them, a column per real token or per sequence."""
        given_ = {"input_ids": batch(c).ids, "attention_mask": batch(c).mask}
        if isinstance(c, Bert):
            given_["token_type_ids"] = batch(c).types
        with self.torch.no_grad():
            z = model(**{name: self.torch.from_numpy(v) for name, v in given_.items()}).logits
        return z.numpy()[batch(c).real].T if c.causal else z.numpy().T


def deviation(libraries, model, W, c, tuning):
    """The greatest difference of the library's logits from minilora's, relative to the greatest."""
    z, _ = logits(batch(c), W, c, tuning)
    return relative_error(
        libraries.logits(model, c), z[:, batch(c).real.ravel()] if c.causal else z
    )


def agree(library, figure):
    record_worst(f"logits against {library}, read and written in files", figure)
    return figure <= GRADIENT


@pytest.fixture(scope="module")
def libraries():
    """The libraries, with Llama and Qwen2 wholly in float64.

    transformers takes their norms and RoPE's tables in float32 whatever the model's dtype (and the
    softmax, in its eager attention, for which its "sdpa" stands here).
    """
    torch = optional("torch")
    transformers = optional("transformers")
    peft_library = optional("peft")
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2 import modeling_qwen2

    def norm(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    def rope(self, x, position_ids):
        d, theta = self.config.head_dim, self.config.rope_parameters["rope_theta"]
        frequencies = theta ** -(torch.arange(0, d, 2, dtype=x.dtype) / d)
        angles = (position_ids[..., None] * frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    transformers.utils.logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
        patch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", norm)
        patch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", rope)
        patch.setattr(modeling_qwen2.Qwen2RotaryEmbedding, "forward", rope)
        yield Libraries(torch=torch, transformers=transformers, peft=peft_library)


@every_model
@pytest.mark.parametrize("shard_bytes", [None, 1500])
def test_transformers_computes_the_model_that_is_written(kind, shard_bytes, libraries, tmp_path):
    c, W = MODELS[kind], weights(MODELS[kind])
    write_model(tmp_path, c, W, shard_bytes=shard_bytes)
    model = libraries.model(tmp_path)
    assert model.dtype == libraries.torch.float64
    assert agree("transformers", deviation(libraries, model, W, c, TrainableSpec()))


@every_model
def test_a_name_in_the_place_of_another_is_noticed(kind, libraries, tmp_path):
    c, W = MODELS[kind], weights(MODELS[kind])
    first, second = "layers.0.norm1.weight", "layers.1.norm1.weight"
    write_model(tmp_path, c, W | {first: W[second], second: W[first]})
    assert deviation(libraries, libraries.model(tmp_path), W, c, TrainableSpec()) > 1e9 * GRADIENT


@every_model
def test_what_a_file_leaves_out_is_what_transformers_takes(kind, libraries, tmp_path):
    a = architectures.architecture_of(MODELS[kind])
    left_out = {*a.written, "id2label", "label2id", "rope_parameters"}
    left_out |= {a.keys[field] for field in a.absent}
    written = config_to_json(MODELS[kind])
    short, whole = tmp_path / "short", tmp_path / "whole"
    short.mkdir()
    text = json.dumps({key: value for key, value in written.items() if key not in left_out})
    (short / "config.json").write_text(text)
    libraries.transformers.AutoConfig.from_pretrained(short).save_pretrained(whole)
    assert len(read_json(whole / "config.json")) > len(read_json(short / "config.json"))
    assert read_config(whole) == read_config(short)


@every_model
def test_what_transformers_writes_is_read(kind, libraries, folder):
    c, model = MODELS[kind], libraries.model(folder / kind)
    for dtype, name in ((np.float64, "float64"), (ml_dtypes.bfloat16, "bfloat16")):
        W = {k: v.astype(dtype) for k, v in weights(c).items()}
        for size in ("1GB", 1500):
            path = folder / f"{name}-{size}"
            model.to(getattr(libraries.torch, name)).save_pretrained(path, max_shard_size=size)
            c_read, W_read = read_model(path)
            assert c_read == c
            assert same(W_read, W)


@every_model
def test_peft_computes_and_trains_the_adapter_that_is_written(kind, libraries, adapters):
    c, W, tuning, _ = adapted(kind)
    path = adapters / f"{kind}-adapter"
    model = libraries.adapted(libraries.model(adapters / kind), path)
    assert agree("peft", deviation(libraries, model, W, c, tuning))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    stored = {re.sub(r"\.(modules_to_save|default)(?=\.)", "", name) for name in trained}
    assert stored == set(adapter_names(c, tuning.trained).values())

    read, tuning_read = read_adapter(libraries.saved(model, adapters / "again"), c)
    assert same({k: v for k, v in read.items() if k in tuning.trained}, read_adapter(path, c)[0])
    assert tuning_read == tuning


# What PEFT is told, and the scales and what else is trained that follow.
PEFT_SETTINGS = [
    (
        "llama",
        {
            "r": 3,
            "lora_alpha": 5,
            "use_rslora": True,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"layers.1.mlp.down_proj": 7},
            "modules_to_save": ["model.norm", "lm_head"],
        },
        {"layers.0.q": 5 / 2**0.5, "layers.1.down": 7 / 3**0.5, "layers.0.down": 5 / 3**0.5},
        {"norm.weight", "head.weight"},
    ),
    (
        "llama",
        {"target_modules": ["lm_head", "v_proj"], "task_type": "CAUSAL_LM"},
        {"head": 1.0, "layers.1.v": 1.0},
        set(),
    ),
    (
        "qwen2",
        {
            "r": 2,
            "target_modules": ["q_proj", "o_proj"],
            "bias": "lora_only",
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        {"layers.0.o": 4.0},
        {"embed.weight", "layers.0.q.bias", "layers.1.q.bias"},
    ),
    (
        "gpt2",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": r".*(c_attn|mlp\.c_proj)",
            "exclude_modules": [r"h.1.mlp.c_proj"],
            "bias": "all",
            "modules_to_save": ["ln_f", "wpe", "mlp.c_fc"],
            "task_type": "CAUSAL_LM",
        },
        {"layers.0.qkv": 1.5, "layers.1.qkv": 1.5, "layers.0.down": 1.5},
        {"norm.weight", "positions.weight", "layers.0.up.weight", "layers.1.up.weight"}
        | {name for name in MODELS["gpt2"].shapes() if name.endswith(".bias")},
    ),
    (
        "bert",
        {
            "r": 3,
            "target_modules": ["query", "dense"],
            "layers_to_transform": [1],
            "rank_pattern": {"attention.output.dense": 1},
            "bias": "all",
            "task_type": "SEQ_CLS",
            "modules_to_save": ["pooler"],
        },
        {"layers.1.q": 8 / 3, "layers.1.o": 8.0, "layers.1.up": 8 / 3, "layers.1.down": 8 / 3},
        {"pooler.weight", "head.weight"}
        | {name for name in MODELS["bert"].shapes() if name.endswith(".bias")},
    ),
    (
        "bert",
        {"target_modules": "all-linear", "bias": "lora_only", "init_lora_weights": "gaussian"},
        {"head": 1.0, "pooler": 1.0},
        {f"{at}.bias" for at in MODELS["bert"].linears()},
    ),
]


@pytest.mark.parametrize(("kind", "said_", "scales", "beside"), PEFT_SETTINGS)
def test_what_peft_writes_is_read(kind, said_, scales, beside, libraries, folder):
    c = MODELS[kind]
    model = libraries.adapt(libraries.model(folder / kind), **said_)
    read, tuning = read_adapter(libraries.saved(model, folder / "adapter"), c)
    assert {at: tuning.scale[at] for at in scales} == scales
    assert {name for name in tuning.trained if not name.endswith((".A", ".B"))} == beside
    W = weights(c) | read
    assert agree("peft", deviation(libraries, model, W, c, tuning))
    # The base without the adapter is another function.
    assert deviation(libraries, model, weights(c), c, TrainableSpec()) > 1e9 * GRADIENT


@pytest.mark.parametrize(("kind", "changes", "hit"), TARGETS)
def test_peft_resolves_targets_so(kind, changes, hit, libraries, folder):
    c = MODELS[kind]
    if kind == "bert":
        changes = {"task_type": "SEQ_CLS"} | changes
    model = libraries.adapt(libraries.model(folder / kind), **changes)
    paths = architectures.module_paths(c)
    assert sorted(model.targeted_module_names) == sorted(paths[at] for at in hit)


def test_peft_does_not_tie_gpt2s_embedding(libraries, folder):
    """Seen in peft 0.21.2."""
    model = libraries.adapt(
        libraries.model(folder / "gpt2"),
        target_modules=["c_attn"],
        modules_to_save=["wte"],
        ensure_weight_tying=True,
    )
    embedding = model.get_input_embeddings().modules_to_save["default"].weight
    assert not libraries.torch.equal(embedding, model.get_output_embeddings().weight)
    with pytest.raises(FormatError, match=r"modules_to_save: found transformer\.wte of a tied"):
        read_adapter(libraries.saved(model, folder / "adapter"), MODELS["gpt2"])


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")
def test_a_tied_head_that_peft_leaves_out_of_its_settings_is_named(libraries, folder):
    """Seen in peft 0.21.2: it would not load the factors again that it has written."""
    model = libraries.adapt(
        libraries.model(folder / "gpt2"),
        target_modules=["wte", "lm_head", "c_attn"],
        ensure_weight_tying=True,
    )
    path = libraries.saved(model, folder / "adapter")
    with pytest.raises(FormatError, match="target_modules: found no head, whose factors are in"):
        read_adapter(path, MODELS["gpt2"])
    named = read_json(path / "adapter_config.json")["target_modules"]
    edit(path / "adapter_config.json", target_modules=[*named, "lm_head"])
    W, _ = read_adapter(path, MODELS["gpt2"])
    assert {"embed.A", "head.A"} <= W.keys()


def renaming(monkeypatch, error):
    """The second file's renaming fails."""
    right, done = os.replace, []

    def replace_(*arguments):
        done.append(arguments)
        if len(done) == 2:
            raise error
        right(*arguments)

    monkeypatch.setattr(os, "replace", replace_)


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()])
def test_where_renaming_fails_each_file_is_whole(error, monkeypatch, tmp_path):
    folder = tmp_path / "f"
    renaming(monkeypatch, error)
    with pytest.raises(type(error)):
        write_files(folder, {"a": lambda: b"a", "b": lambda: b"b"})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"a"}


def test_what_cannot_be_written_leaves_no_folder(tmp_path):
    def fails():
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_files(tmp_path / "x/y/z", {"a": fails})
    assert not [*tmp_path.iterdir()]
