"""Every tensor of a model by its name, block by block; what a header may not say."""

import json
import os
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from extras import needs, optional
from safetensors.numpy import load_file, save_file

from minilora.audit.tensors import open_tensors
from minilora.cli.main import main
from minilora.io.errors import FormatError
from minilora.io.header import LARGEST, places
from minilora.io.reference_models import folder
from minilora.spec.quantization import dequantize, dynamic_values, nf4_values, quantize_nf4

BASE = folder() / "llama" / "base"


def whole(tensor):
    return tensor.rows(0, tensor.length).reshape(tensor.shape)


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "uint8", "int64"])
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (4, 2, 3), (0, 3)])
def test_blocks_of_rows_are_the_array(tmp_path, dtype, shape):
    rng = np.random.default_rng(0)
    array = np.asarray(rng.integers(0, 100, shape)).astype(np.dtype(dtype))
    save_file({"a": array, "b": np.ones(2, np.float32)}, tmp_path / "m.safetensors")
    store = open_tensors(tmp_path / "m.safetensors")
    tensor = store["a"]
    assert (tensor.shape, tensor.dtype, tensor.scheme) == (shape, array.dtype, None)
    blocks = [tensor.rows(start, stop) for start, stop in tensor.blocks(3)]
    assert np.array_equal(np.concatenate([b.reshape(-1) for b in blocks] or [[]]), array.ravel())
    assert store.nbytes == array.nbytes + 8


def test_a_folder_gives_what_the_library_reads():
    store, tensors = open_tensors("reference:llama"), load_file(BASE / "model.safetensors")
    assert store.keys() == tensors.keys()
    assert all(np.array_equal(whole(store[name]), array) for name, array in tensors.items())
    assert store.settings["model_type"] == "llama"


def shards(out, index=None):
    """The base in two shards, with an index."""
    tensors = load_file(BASE / "model.safetensors")
    parts = {"one.safetensors": {}, "two.safetensors": {}}
    for i, (name, array) in enumerate(tensors.items()):
        parts[["one.safetensors", "two.safetensors"][i % 2]][name] = array
    out.mkdir(exist_ok=True)
    for file, part in parts.items():
        save_file(part, out / file)
    file_of = {name: file for file, part in parts.items() for name in part}
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": file_of if index is None else index(file_of)})
    )
    return out


def test_shards_are_one_model(tmp_path):
    store, tensors = open_tensors(shards(tmp_path)), load_file(BASE / "model.safetensors")
    assert {name: whole(t).tobytes() for name, t in store.items()} == {
        name: array.tobytes() for name, array in tensors.items()
    }


BAD_INDICES = {
    "leaves the folder": lambda m: {**m, "lm_head.weight": "../one.safetensors"},
    "an absolute path": lambda m: {**m, "lm_head.weight": "/etc/passwd"},
    "a pickle": lambda m: {**m, "lm_head.weight": "one.bin"},
    "itself": lambda m: dict.fromkeys(m, "model.safetensors.index.json"),
    "a shard that is not there": lambda m: {**m, "lm_head.weight": "three.safetensors"},
    "a tensor that is not there": lambda m: {**m, "other.weight": "one.safetensors"},
    "tensors in the other shard": lambda m: {
        name: {"one.safetensors": "two.safetensors"}.get(file, "one.safetensors")
        for name, file in m.items()
    },
    "no text": lambda m: {**m, "lm_head.weight": 3},
    "nothing": lambda m: {},
    "a list": list,
}  # fmt: skip


@pytest.mark.parametrize("index", BAD_INDICES.values(), ids=BAD_INDICES)
def test_an_index_that_lies_is_refused(tmp_path, index):
    with pytest.raises(FormatError):
        open_tensors(shards(tmp_path, index))


BAD_FILES = {
    "empty": b"",
    "short": b"\0\0\0",
    "a header of 2^60 bytes": file_of({}, length=2**60),
    "a header longer than the file": file_of({}, length=3),
    "no JSON": file_of(b"{nonsense"),
    "no object": file_of([1, 2]),
    "nested": file_of(b"[" * 100_000),
    "a name twice": file_of(b'{"a": {}, "a": {}}'),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "2^60 entries": file_of({"a": entry(shape=(2**60,), offsets=(0, 2**62))}, bytes(8)),
    "dimensions whose product overflows": file_of(
        {"a": entry(shape=(2**33, 2**33), offsets=(0, 8))}, bytes(8)
    ),
    "negative": file_of({"a": entry(shape=(-1, -2))}, bytes(8)),
    "offsets backwards": file_of({"a": entry(offsets=(8, 0))}, bytes(8)),
    "fractions": file_of({"a": entry(shape=(2.0,))}, bytes(8)),
    "true": file_of({"a": entry(shape=(True, 2))}, bytes(8)),
    "another dtype": file_of({"a": entry("F4")}, bytes(8)),
    "a dtype that is a list": file_of({"a": entry([])}, bytes(8)),
    "cut off": file_of({"a": entry()}, bytes(7)),
    "more than the header says": file_of({"a": entry()}, bytes(9)),
    "two in one place": file_of({"a": entry(), "b": entry()}, bytes(8)),
    "a hole": file_of({"a": entry(), "b": entry(offsets=(9, 17))}, bytes(17)),
    "many dimensions": file_of({"a": entry(shape=[1] * 9 + [2])}, bytes(8)),
    "no shape": file_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
}


@pytest.mark.parametrize("data", BAD_FILES.values(), ids=BAD_FILES)
def test_a_header_that_lies_is_refused(tmp_path, data):
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError):
        open_tensors(path)
    assert main(["audit", "merged", "--base", str(path), "--adapter", "reference:llama",
                 "--merged", str(path)]) == 3  # fmt: skip


def test_the_same_header_without_a_lie_is_read(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_of({"a": entry(), "b": entry(offsets=(8, 16))}, bytes(16)))
    assert {name: place.shape for name, place in places(path)[0].items()} == {"a": (2,), "b": (2,)}


def test_metadata_may_be_null_as_mlx_writes_it(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of({"__metadata__": None, "a": entry()}, bytes(8)))
    assert [*places(path)[0]] == ["a"]


def test_a_large_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", LARGEST + 1))
        os.truncate(file.fileno(), LARGEST + 100)
    tracemalloc.start()
    with pytest.raises(FormatError, match=f"of {LARGEST} bytes at most"):
        open_tensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system")
def test_what_is_no_plain_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.safetensors")
    (tmp_path / "other.safetensors").symlink_to("/dev/zero")
    for name in ("m.safetensors", "other.safetensors"):
        with pytest.raises(FormatError):
            open_tensors(tmp_path / name)


def seventy_billion():
    """Names and shapes of a Llama of 70 billion parameters."""
    d, kv, ffn, vocab = 8192, 1024, 28672, 128256
    yield "model.embed_tokens.weight", (vocab, d)
    for i in range(80):
        at = f"model.layers.{i}"
        for name, shape in {
            "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, d), "mlp.gate_proj": (ffn, d), "mlp.up_proj": (ffn, d),
            "mlp.down_proj": (d, ffn), "input_layernorm": (d,), "post_attention_layernorm": (d,),
        }.items():  # fmt: skip
            yield f"{at}.{name}.weight", shape
    yield from (("model.norm.weight", (d,)), ("lm_head.weight", (vocab, d)))


def test_a_checkpoint_of_70_billion_parameters_is_opened_in_little_memory(tmp_path):
    header, at = {}, 0
    for name, shape in seventy_billion():
        end = at + 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = entry("BF16", shape, (at, end))
        at = end
    assert at > 140e9
    path, start = tmp_path / "m.safetensors", file_of(header)
    path.write_bytes(start)
    os.truncate(path, len(start) + at)  # a sparse file: nothing is written
    tracemalloc.start()
    store = open_tensors(path)
    block = store["lm_head.weight"].rows(128_000, 128_064)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (block.shape, block.dtype) == ((64, 8192), ml_dtypes.bfloat16)
    assert (len(store), store.nbytes) == (723, at)
    assert peak < 8 * 2**20


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_with_the_way_to_convert(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(FormatError, match="save_pretrained"):
            open_tensors(path)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@needs("gguf")
def test_a_gguf_model_has_the_names_and_layouts_of_hugging_faces(tmp_path, model):
    path = str(tmp_path / "m.gguf")
    names = ["--model", f"reference:{model}", "--adapter", f"reference:{model}"]
    assert main(["merge", *names, "--output", path]) == 0
    assert main(["merge", *names, "--output", str(tmp_path / "m")]) == 0
    store, tensors = open_tensors(path), open_tensors(tmp_path / "m")
    assert {store.find(name) for name in tensors} == {*store}
    assert all(np.array_equal(whole(store[store.find(n)]), whole(t)) for n, t in tensors.items())
    for name, tensor in store.items():  # in blocks as whole
        blocks = [tensor.rows(*at) for at in tensor.blocks(100)]
        assert np.array_equal(np.concatenate(blocks), whole(tensor)), name


@needs("gguf")
def test_a_gguf_model_may_be_split(tmp_path):
    gguf = optional("gguf")
    W = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    for i, name in enumerate(("attn_q", "ffn_up")):
        writer = gguf.GGUFWriter(tmp_path / f"m-0000{i + 1}-of-00002.gguf", "llama")
        if not i:
            writer.add_block_count(2)  # more layers than tensors here
            writer.add_head_count(2)
        writer.add_uint16("split.count", 2)
        writer.add_tensor(f"blk.1.{name}.weight", W + np.float32(i))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    store = open_tensors(tmp_path / "m-00001-of-00002.gguf")
    assert np.array_equal(whole(store["model.layers.1.mlp.up_proj.weight"]), W + np.float32(1))
    assert np.array_equal(whole(store["model.layers.1.self_attn.q_proj.weight"]), W)
    with pytest.raises(FormatError, match="the first of 2 files"):
        open_tensors(tmp_path / "m-00002-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(FormatError):
        open_tensors(tmp_path / "m-00001-of-00002.gguf")


@needs("gguf")
def test_experts_of_a_gguf_model_come_one_by_one(tmp_path):
    gguf = optional("gguf")
    W = np.random.default_rng(0).standard_normal((3, 4, 32)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.ffn_gate_exps.weight", W)
    number = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.0.ffn_up_exps.weight", gguf.quants.quantize(W, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    store = open_tensors(tmp_path / "m.gguf")
    assert len(store) == 6
    for e in range(3):
        for family, gate, up in (("block_sparse_moe", "w1", "w3"), ("mlp", "gate_proj", "up_proj")):
            at = f"model.layers.0.{family}.experts.{e}"
            assert np.array_equal(whole(store[store.find(f"{at}.{gate}.weight")]), W[e])
            found = store[store.find(f"{at}.{up}.weight")]
            assert np.array_equal(found.rows(1, 3), whole(found)[1:3])
            assert (abs(whole(found) - W[e]) <= found.spacing(0, 4)).all()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@needs("gguf")
def test_a_quantizers_spacing_is_the_step_between_its_numbers(tmp_path, kind):
    gguf = optional("gguf")
    rng = np.random.default_rng(1)
    W = rng.standard_normal((6, 64)).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.ffn_up.weight", gguf.quants.quantize(W, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = open_tensors(tmp_path / "m.gguf")["model.layers.0.mlp.up_proj.weight"]
    assert tensor.scheme == kind.lower()
    got, step = whole(tensor), tensor.spacing(0, 6)
    assert np.array_equal(got, gguf.quants.dequantize(gguf.quants.quantize(W, number), number))
    for row, gap in zip(got.reshape(-1, 32), step.reshape(-1, 32), strict=True):
        between = np.diff(np.unique(row))
        assert len({*gap}) == 1
        ulps = between / gap[0]
        assert abs(ulps - np.rint(ulps)).max() < 2**-10  # whole steps but for float32's rounding
        assert ulps.min() >= 1 - 2**-10


K_BLOCKS = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q4_K": (0, 4), "Q5_K": (0, 4),
            "Q6_K": (208, 210)}  # fmt: skip
"""Where the constants of a block lie, in half precision."""


@pytest.mark.parametrize("kind", K_BLOCKS)
@needs("gguf")
def test_the_spacing_of_k_quants_is_the_step_between_its_numbers(tmp_path, kind):
    gguf = optional("gguf")
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    data = np.random.default_rng(4).integers(0, 256, (3, size), np.uint8)
    start, stop = K_BLOCKS[kind]
    data[:, start:stop] = np.full((3, (stop - start) // 2), 0.01, np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = open_tensors(tmp_path / "m.gguf")["model.layers.0.mlp.up_proj.weight"]
    assert (tensor.shape, tensor.scheme) == ((3, block), kind.lower())
    for row, gap in zip(whole(tensor).reshape(-1, 16), tensor.spacing(0, 3).reshape(-1, 16),
                        strict=True):  # fmt: skip
        assert len({*gap}) == 1
        steps = (row - row[0]) / gap[0] if gap[0] else row - row[0]
        assert abs(steps - np.rint(steps)).max() < 2**-8


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@needs("mlx")
def test_mlx_weights_are_dequantized_as_mlx_does(tmp_path, bits):
    mx = optional("mlx.core")
    W = mx.array(np.random.default_rng(2).standard_normal((8, 128)).astype(np.float32))
    parts = mx.quantize(W, group_size=64, bits=bits)
    names = [f"model.up_proj.{part}" for part in ("weight", "scales", "biases")]
    arrays = {name: np.array(part) for name, part in zip(names, parts, strict=True)}
    save_file({**arrays, "model.norm.weight": np.ones(8, np.float32)}, tmp_path / "m.safetensors")
    settings = {"quantization": {"group_size": 64, "bits": bits}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    store = open_tensors(tmp_path)
    tensor = store["model.up_proj.weight"]
    assert ([*store], store.container) == (["model.norm.weight", "model.up_proj.weight"], "mlx")
    assert tensor.scheme == f"mlx-{bits}bit"
    expected = np.array(mx.dequantize(*parts, group_size=64, bits=bits))
    assert np.array_equal(whole(tensor), expected)
    assert np.array_equal(tensor.spacing(2, 5), abs(arrays[names[1]][2:5]).repeat(64, 1))
    (tmp_path / "config.json").write_text('{"quantization": {"group_size": 16, "bits": 4}}')
    with pytest.raises(FormatError, match="shapes"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("end", ["qweight", "weight_scale_inv", "weight_packed"])
def test_codes_of_another_quantizer_are_refused_by_name(tmp_path, end):
    tensors = {"w.weight": np.ones(2, np.float32), f"w.{end}": np.ones(2, np.int32)}
    save_file(tensors, tmp_path / "m.safetensors")
    for path in (tmp_path, tmp_path / "m.safetensors"):
        with pytest.raises(FormatError, match="codes of another quantizer"):
            open_tensors(path)


def test_a_name_is_found_with_and_without_the_models_prefix(tmp_path):
    names = ["layers.0.q.weight", "layers.1.q.weight", "norm.weight"]
    save_file({name: np.ones(2, np.float32) for name in names}, tmp_path / "m.safetensors")
    store = open_tensors(tmp_path / "m.safetensors")
    assert store.find("model.layers.1.q.weight") == "layers.1.q.weight"
    assert store.find("transformer.norm.weight") == "norm.weight"
    save_file({f"model.{n}": np.ones(2, np.float32) for n in names}, tmp_path / "m.safetensors")
    store = open_tensors(tmp_path / "m.safetensors")
    assert store.find("layers.1.q.weight") == "model.layers.1.q.weight"
    assert store.find("transformer.norm.weight") == "model.norm.weight"
    assert store.find("model.layers.7.q.weight") is None  # no other layer's
    assert store.find("q.weight") is None


def nf4_file(path, W, double, state=None):
    """A weight as bitsandbytes writes it."""
    q = quantize_nf4(W, double=double)
    settings = {"shape": [*W.shape], "blocksize": 64, "quant_type": "nf4", "dtype": "float32"}
    tensors = {"w.weight": q.codes[:, None], "w.weight.absmax": q.constants["absmax"],
               "w.weight.quant_map": nf4_values()}  # fmt: skip
    if double:
        settings |= {"nested_blocksize": 256, "nested_offset": float(q.constants["offset"])}
        tensors |= {"w.weight.nested_absmax": q.constants["nested"],
                    "w.weight.nested_quant_map": dynamic_values()}  # fmt: skip
    text = json.dumps(settings | (state or {})).encode()
    tensors["w.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)
    path.mkdir(exist_ok=True)
    save_file({name: np.array(array) for name, array in tensors.items()}, path / "m.safetensors")
    return path, q


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(4, 64), (300, 96), (7, 30)])
def test_nf4_is_dequantized_in_any_rows(tmp_path, shape, double):
    W = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    path, q = nf4_file(tmp_path, W, double)
    store = open_tensors(path)
    tensor = store["w.weight"]
    assert ([*store], tensor.shape, tensor.scheme) == (["w.weight"], shape, q.scheme)
    for entries in (1, 100, 2**20):
        blocks = [tensor.rows(*at) for at in tensor.blocks(entries)]
        assert np.array_equal(np.concatenate(blocks), dequantize(q))
        gaps = np.concatenate([tensor.spacing(*at) for at in tensor.blocks(entries)])
        assert gaps.shape == shape
        assert (abs(W - dequantize(q)) <= gaps).all() or double
    assert (gaps > 0).all()


BAD_STATES = {
    "another shape": {"shape": [3, 3]}, "no shape": {"shape": None},
    "2^60 rows": {"shape": [2**60, 2]}, "negative": {"shape": [-4, -64]},
    "blocks of nothing": {"blocksize": 0}, "odd blocks": {"blocksize": 63},
    "blocks of text": {"blocksize": "64"},
}  # fmt: skip


@pytest.mark.parametrize("state", BAD_STATES.values(), ids=BAD_STATES)
def test_a_state_that_lies_is_refused(tmp_path, state):
    W = np.random.default_rng(3).standard_normal((4, 64)).astype(np.float32)
    with pytest.raises(FormatError, match="save the model again"):
        open_tensors(nf4_file(tmp_path, W, False, state)[0])


def test_rows_of_int8_have_a_scale_each(tmp_path):
    q = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    scales = np.array([127, 254, 12.7], np.float32)
    save_file({"w.weight": q, "w.SCB": scales}, tmp_path / "m.safetensors")
    tensor = open_tensors(tmp_path)["w.weight"]
    assert np.array_equal(tensor.rows(1, 3), q[1:] * (scales[1:, None] / np.float32(127)))
    assert np.array_equal(tensor.spacing(0, 3), scales[:, None] / np.float32(127))
    save_file({"w.weight": q, "w.SCB": scales[:2]}, tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match="SCB"):
        open_tensors(tmp_path)
