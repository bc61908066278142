"""GGUF files as llama.cpp's converter writes them, of models that transformers made."""

import importlib
import math
from dataclasses import replace

import numpy as np
import pytest
from calculus import same_bits
from extras import optional
from test_gguf import IDS, by_llama_cpp, judged, rewritten
from zoo import MORE_MODELS

from minilora.io.errors import FormatError
from minilora.io.formats.gguf.contents import Contents
from minilora.io.formats.gguf.rope import FACTORS, read_scaling
from minilora.io.formats.gguf.write import write_model
from minilora.io.loading import open_base
from minilora.spec.architectures import Gemma3, Llama3, RopeScaling, SmolLM3
from minilora.spec.architectures.llama3 import frequencies
from minilora.spec.initialization import draw_weights
from minilora.spec.lora import TrainableSpec
from minilora.spec.models import Batch, logits

gguf = optional("gguf")
gguf_files = importlib.import_module("minilora.io.formats.gguf")

F32 = np.float32
EPS, THETA = 2.0**-17, 2.0**19
"""Numbers that float32 holds, as the metadata are."""

COMMON = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": EPS,
    "max_position_embeddings": 512,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": THETA,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 64.0},
    "full_attention": {"rope_type": "default", "rope_theta": THETA},
}
MODELS = {
    "gemma3": (
        "Gemma3",
        {
            "num_hidden_layers": 7,
            "sliding_window": 5,
            "query_pre_attn_scalar": 16,
            "rope_parameters": GEMMA_ROPE,
            "layer_types": ["full_attention" if i == 5 else "sliding_attention" for i in range(7)],
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "rope_theta": THETA}),
    "llama": ("Llama", {"num_hidden_layers": 2, "rope_parameters": LLAMA_3}),
}
"""Models by their names in GGUF: transformers' class, and its settings beside the common ones."""


def of_transformers(kind):
    """A tiny random model of transformers; its norms' weights are such that 1 + w is exact."""
    torch, transformers = optional("torch"), optional("transformers")
    name, settings = MODELS[kind]
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    torch.manual_seed(0)
    wanted = COMMON | settings | {"tie_word_embeddings": kind != "llama", "pad_token_id": None}
    model = getattr(transformers, f"{name}ForCausalLM")(config(**wanted))
    with torch.no_grad():
        for at, w in model.named_parameters():
            w.normal_(std=0.3)
            if "norm" in at:
                w.copy_(w.bfloat16())
    return model.eval()


def in_pairs(W, heads):
    """The rows of q or k as `LlamaModel.permute` of the converter orders them."""
    return W.reshape(heads, 2, len(W) // heads // 2, -1).swapaxes(1, 2).reshape(W.shape)


def factors_of(theta, d, factor, low, high, length):
    """`LlamaModel.generate_extra_tensors` of the converter, in float32."""
    freqs = F32(1) / F32(theta) ** (np.arange(0, d, 2, dtype=F32) / F32(d))
    found = []
    for freq in freqs:
        wavelength = F32(2 * math.pi) / freq
        if wavelength < length / high:
            found.append(1.0)
        elif wavelength > length / low:
            found.append(factor)
        else:
            smooth = (F32(length) / wavelength - F32(low)) / F32(high - low)
            found.append(F32(1) / ((F32(1) - smooth) / F32(factor) + smooth))
    return np.array(found, F32)


def converted(model, kind, path, change=None):
    """The file that llama.cpp's converter writes of it, by the library gguf alone.

    ``change``: tensors by their names in the file, or settings, that are otherwise; None for none.
    """
    c, change = model.config, change or {}
    writer = gguf.GGUFWriter(path, kind)
    writer.add_type("model")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_file_type(0)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    writer.add_rope_freq_base(THETA)
    if kind == "gemma3":
        writer.add_sliding_window(c.sliding_window)
        writer.add_float32("gemma3.rope.freq_base_swa", 64.0)
    else:
        writer.add_vocab_size(c.vocab_size)
        writer.add_rope_dimension_count(c.head_dim)
    names = gguf.get_tensor_name_map(
        next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == kind), c.num_hidden_layers
    )
    tensors = {}
    for name, tensor in model.state_dict().items():
        W, (at, _, part) = tensor.numpy(), name.rpartition(".")
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        if kind == "gemma3" and name.endswith("norm.weight"):
            W = W + F32(1)
        if kind != "gemma3" and at.endswith(("q_proj", "k_proj")):
            W = in_pairs(W, c.num_attention_heads if at[-6] == "q" else c.num_key_value_heads)
        tensors[f"{names.get_name(at)}.{part}"] = W
    if kind == "llama":
        tensors["rope_freqs.weight"] = factors_of(THETA, c.head_dim, 8.0, 1.0, 4.0, 8192)
    for name, W in (tensors | change).items():
        if W is not None:
            writer.add_tensor(name, W)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def both(kind, tmp_path):
    """The model of transformers as its folder and as the converter's file, read here."""
    model = of_transformers(kind)
    model.save_pretrained(tmp_path / "folder")
    file = converted(model, kind, tmp_path / "m.gguf")
    return model, open_base(str(tmp_path / "folder")), open_base(str(file))


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_the_converters_file_is_the_folder(kind, tmp_path):
    """The same configuration, the same weights to the bit, and so the same logits to the bit."""
    model, folder, file = both(kind, tmp_path)
    assert file.config == folder.config
    assert {*file.weights} == {*folder.weights}
    assert all(same_bits(np.asarray(file.weights[n]), folder.weights[n]) for n in folder.weights)
    batch = Batch(IDS[None])
    z, wanted = (logits(batch, base.weights, base.config, TrainableSpec())[0] for base in
                 (file, folder))  # fmt: skip
    assert same_bits(z, wanted)
    # Wrong norms, another order of the rows, or no factors would be seen.
    names = {
        "gemma3": ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
        "smollm3": ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"),
        "llama": (FACTORS, None),
    }
    place, own = names[kind]
    wrong = {place: None if own is None else model.state_dict()[own].numpy()}
    other = open_base(str(converted(model, kind, tmp_path / "wrong.gguf", wrong)))
    assert not same_bits(logits(batch, other.weights, other.config, TrainableSpec())[0], wanted)


PATTERNS = {
    "a period": (("UINT32", 2), (5, None, 5, None, 5, None, 5)),
    "all": (("UINT32", 0), (5,) * 7),
    "each block": (
        ("ARRAY", [True, False, False, True, True, True, False], "BOOL"),
        (5, None, None, 5, 5, 5, None),
    ),
    "alike": (("ARRAY", [True] * 7, "BOOL"), (5,) * 7),
}


def gemma_file(tmp_path, c=None):
    c = c or replace(MORE_MODELS["Gemma 3"], layers=7, window=(5,) * 5 + (None, 5), eps=EPS,
                     score_scale=6)  # fmt: skip
    W = draw_weights(c, np.random.default_rng(0), std=0.3)
    write_model(tmp_path / "m.gguf", c, W)
    return tmp_path / "m.gguf", c


def value_of(kind, value, *inner):
    return (kind, value, *(gguf.GGUFValueType[k] for k in inner))


@pytest.mark.parametrize("case", PATTERNS)
def test_the_pattern_of_windows_is_llama_cpps(case, tmp_path):
    said, windows = PATTERNS[case]
    path, c = gemma_file(tmp_path)
    key = "gemma3.attention.sliding_window_pattern"
    out = rewritten(path, tmp_path / "o.gguf", {key: value_of(*said)})
    assert gguf_files.read_model(out)[0] == replace(c, window=windows)


def test_without_a_pattern_each_sixth_block_sees_all_and_without_a_window_each_block(tmp_path):
    path, c = gemma_file(tmp_path)
    key = "gemma3.attention.sliding_window"
    out = rewritten(path, tmp_path / "o.gguf", {f"{key}_pattern": None})
    assert gguf_files.read_model(out)[0] == c
    out = rewritten(path, tmp_path / "o.gguf", {key: None, "gemma3.rope.freq_base_swa": None})
    assert gguf_files.read_model(out)[0] == replace(c, window=(None,) * 7, local_theta=1e4)


REFUSED = {
    "a window of nothing": ({"attention.sliding_window": ("STRING", "5")}, "above 0"),
    "a pattern of other blocks": (
        {"attention.sliding_window_pattern": ("ARRAY", [True, False], "BOOL")},
        "true or false for each of 7 blocks",
    ),
    "capped logits": ({"final_logit_softcapping": ("FLOAT32", 30.0)}, "final_logit_softcapping"),
    "scaled RoPE": ({"rope.scaling.type": ("STRING", "linear")}, "scaling.type"),
    "no base": ({"rope.freq_base_swa": ("FLOAT32", 0.0)}, "freq_base_swa"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_settings_of_a_gemma_3_are_refused(case, tmp_path):
    path, _ = gemma_file(tmp_path)
    settings, what = REFUSED[case]
    settings = {f"gemma3.{key}": value_of(*said) for key, said in settings.items()}
    with pytest.raises(FormatError, match=what):
        gguf_files.read_model(rewritten(path, tmp_path / "o.gguf", settings))


def test_what_llama_cpp_takes_for_granted_is_refused_where_it_is_otherwise(tmp_path):
    gemma = MORE_MODELS["Gemma 3"]
    for c, what in (
        (gemma, r"score_scale: found 7, expected 6"),
        (replace(gemma, score_scale=6, window=(2, 3, None)), "windows"),
        (MORE_MODELS["SmolLM3"], r"without_positions: found blocks \(1,\)"),
    ):
        W = draw_weights(c, np.random.default_rng(0))
        with pytest.raises(FormatError, match=what):
            write_model(tmp_path / "m.gguf", c, W)
        assert not [*tmp_path.iterdir()]


WRITTEN = {
    "Gemma 3": {"score_scale": 6, "eps": EPS},
    "Gemma 3 without windows": {"score_scale": 6, "eps": EPS, "window": (None,) * 3},
    "SmolLM3": {"without_positions": (3,), "layers": 4, "eps": EPS},
    "Llama 3": {"scaling": RopeScaling(32.0, 1.0, 4.0, 8192), "eps": EPS, "theta": 5e5},
}


def test_an_older_gguf_that_lacks_an_architecture_is_told(tmp_path, monkeypatch):
    names = {n: name for n, name in gguf.MODEL_ARCH_NAMES.items() if name != "smollm3"}
    monkeypatch.setattr(gguf, "MODEL_ARCH_NAMES", names)
    c = replace(MORE_MODELS["SmolLM3"], **WRITTEN["SmolLM3"])
    with pytest.raises(ImportError, match=r"does not know smollm3: .*minilora\[gguf\]"):
        write_model(tmp_path / "m.gguf", c, draw_weights(c, np.random.default_rng(0)))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_read(name, tmp_path):
    c = replace(MORE_MODELS[name.split(" without")[0]], **WRITTEN[name])
    W = draw_weights(c, np.random.default_rng(0), std=0.3)
    W = {n: w.astype(F32) for n, w in W.items()}
    write_model(tmp_path / "m.gguf", c, W)
    c_read, read = gguf_files.read_model(tmp_path / "m.gguf", keep_quantized=False)
    assert c_read == c
    for n, w in W.items():
        added = 1 if isinstance(c, Gemma3) and w.shape[1] == 1 else 0
        assert same_bits(read[n], (w + F32(added)) - F32(added))
    before = (tmp_path / "m.gguf").read_bytes()
    write_model(tmp_path / "m.gguf", c_read, read)
    assert (tmp_path / "m.gguf").read_bytes() == before


# Factors


def read_back(factors, theta, d, path):
    """The scaling that a file of these factors alone says."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor(FACTORS, factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_scaling(Contents(path), theta, d)


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e7])
@pytest.mark.parametrize("d", [8, 64, 128])
def test_a_scaling_comes_back_from_the_converters_factors(d, theta, tmp_path):
    omega = frequencies(d, theta)
    for factor in (2.0, 8.0, 32.0):
        for length in (2048, 8192, 65536):
            factors = factors_of(theta, d, factor, 1.0, 4.0, length)
            assert factors.min() == 1
            if factors.max() < factor:
                continue  # no pair is slowed by the whole factor, which they do not tell then
            wanted = RopeScaling(factor, 1.0, 4.0, length)
            read = read_back(factors, theta, d, tmp_path / "f")
            if ((factors > 1) & (factors < factor)).any():
                assert read == wanted
            assert (read.slowed(omega) == wanted.slowed(omega)).all()


def test_factors_of_another_scaling_are_refused(tmp_path):
    right = factors_of(5e5, 64, 8.0, 1.0, 4.0, 8192)
    middle = int(abs(right - 3).argmin())
    wrong = {
        "YaRN's, or other low and high": factors_of(5e5, 64, 8.0, 1.0, 3.0, 8192),
        "quicker": right / 2,
        "one otherwise": np.where(np.arange(32) == middle, right * F32(1.001), right),
        "in another order": right[::-1],
    }
    assert read_back(right, 5e5, 64, tmp_path / "f") == RopeScaling(8.0, 1.0, 4.0, 8192)
    for factors in wrong.values():
        with pytest.raises(FormatError, match="those of Llama 3's scaling"):
            read_back(np.ascontiguousarray(factors), 5e5, 64, tmp_path / "f")
    with pytest.raises(FormatError, match=r"rope_freqs.weight: found shape \(31,\)"):
        read_back(right[1:], 5e5, 64, tmp_path / "f")
    with pytest.raises(FormatError, match="not finite"):
        read_back(right * F32(np.nan), 5e5, 64, tmp_path / "f")
    ones = read_back(np.ones(32, F32), 5e5, 64, tmp_path / "f")
    assert (ones.slowed(right) == right).all()


# llama.cpp


@pytest.mark.parametrize("name", WRITTEN)
def test_llama_cpp_gives_the_logits_of_what_is_written(name, tmp_path, monkeypatch):
    c = replace(MORE_MODELS[name.split(" without")[0]], **WRITTEN[name], vocab=40)
    W = draw_weights(c, np.random.default_rng(0), std=0.3)
    write_model(tmp_path / "m.gguf", c, W)
    c, W = gguf_files.read_model(tmp_path / "m.gguf", keep_quantized=False)
    z = by_llama_cpp(tmp_path / "m.gguf", IDS)
    assert judged(z, c, W, TrainableSpec(), monkeypatch).verdict == "pass"
    wrong = {
        Gemma3: {"local_theta": 1e5, "window": (None, 5, None)},
        SmolLM3: {"without_positions": (2,)},
        Llama3: {"scaling": RopeScaling(4.0, 1.0, 4.0, 8192)},
    }
    other = replace(c, **wrong[type(c)])
    assert judged(z, other, W, TrainableSpec(), monkeypatch).verdict == "fail"
