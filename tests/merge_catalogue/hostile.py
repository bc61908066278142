"""Files that lie, loop or grow: each spoils the folders of a right merge, which is to be refused.

An entry is a function of the folder that holds ``base``, ``adapter`` and ``merged``, under the
statuses with which an audit of them may end: 3 where nothing can be read, 1 where a deviation is.
"""

from __future__ import annotations

import json
import os
import struct

import numpy as np

from merge_catalogue.worlds import adapt, llama, pack, write_json, write_model

HOSTILE = {}
"""Name -> (the function, the statuses)."""


def hostile(*statuses):
    def enter(function):
        HOSTILE[function.__name__.replace("_", " ")] = function, set(statuses)
        return function

    return enter


def right(folder):
    """A tiny base, adapter and merged model."""
    world = adapt(llama(layers=1, d=16, inner=16, vocab=16), r=2)
    world.write(folder)
    write_model(folder / "merged", world.merge(), world.config)
    return world


MODEL = "merged/model.safetensors"


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def header(name, text, data=b"", length=None):
    """Enter a file with this header in the place of the merged model's."""

    def function(folder):
        (folder / MODEL).write_bytes(file_of(text, data, length))

    function.__name__ = name
    hostile(3)(function)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


header("header_of_2_to_the_60_bytes", b"{}", length=2**60)
header("header_of_all_ones", b"{}", length=2**64 - 1)
header("header_longer_than_the_file", b"{}", length=1000)
header("header_of_blanks", b" " * 20_000_000)
header("header_no_json", b"{'a': 1}")
header("header_no_text", b"\xff\xfe\x00\x80")
header("header_a_list", [])
header("header_a_number", b"1")
header("header_of_deep_lists", b"[" * 1_000_000)
header("header_of_deep_objects", b'{"a":' * 300_000)
header(
    "header_with_a_name_twice", b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)
)
header(
    "header_with_a_long_number",
    b'{"a":{"dtype":"F32","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,8]}}',
    bytes(8),
)
header("shape_of_2_to_the_60", {"a": entry(shape=[2**60])}, bytes(8))
header("shape_whose_product_overflows", {"a": entry(shape=[2**32, 2**32])}, bytes(8))
header("shape_whose_product_overflows_to_8", {"a": entry(shape=[2**63, 2, 2], offsets=[0, 0])})
header("shape_negative", {"a": entry(shape=[-1, -2])}, bytes(8))
header("shape_of_fractions", {"a": entry(shape=[2.0])}, bytes(8))
header("shape_of_truths", {"a": entry(shape=[True, 2])}, bytes(8))
header("shape_of_texts", {"a": entry(shape=["2"])}, bytes(8))
header("shape_of_lists", {"a": entry(shape=[[2]])}, bytes(8))
header("shape_an_object", {"a": entry(shape={"0": 2})}, bytes(8))
header("shape_of_a_thousand_axes", {"a": entry(shape=[1] * 999 + [2])}, bytes(8))
header("shape_null", {"a": entry(shape=None)}, bytes(8))
header("dtype_unknown", {"a": entry(dtype="Q4")}, bytes(8))
header("dtype_a_list", {"a": entry(dtype=["F32"])}, bytes(8))
header("offsets_past_the_end", {"a": entry(offsets=[0, 2**60], shape=[2**58])}, bytes(8))
header("offsets_reversed", {"a": entry(offsets=[8, 0])}, bytes(8))
header("offsets_negative", {"a": entry(offsets=[-8, 0])}, bytes(8))
header("offsets_overlapping", {"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12))
header("offsets_with_a_hole", {"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20))
header("offsets_of_three", {"a": entry(offsets=[0, 4, 8])}, bytes(8))
header("bytes_that_no_tensor_has", {"a": entry()}, bytes(80))
header("metadata_a_list", {"__metadata__": [1], "a": entry()}, bytes(8))
header("entry_a_number", {"a": 1})


@hostile(3)
def file_empty(folder):
    (folder / MODEL).write_bytes(b"")


@hostile(3)
def file_of_seven_bytes(folder):
    (folder / MODEL).write_bytes(bytes(7))


@hostile(1, 3)
def file_without_a_tensor(folder):
    (folder / MODEL).write_bytes(file_of({}))


@hostile(3)
def file_a_folder(folder):
    (folder / MODEL).unlink()
    (folder / MODEL).mkdir()


@hostile(3)
def file_a_link_to_itself(folder):
    (folder / MODEL).unlink()
    (folder / MODEL).symlink_to("model.safetensors")


@hostile(3)
def file_a_link_to_an_endless_device(folder):
    (folder / MODEL).unlink()
    (folder / MODEL).symlink_to("/dev/zero")


@hostile(3)
def file_a_pipe(folder):
    (folder / MODEL).unlink()
    os.mkfifo(folder / MODEL)


@hostile(3)
def folder_empty(folder):
    (folder / MODEL).unlink()


@hostile(3)
def folder_missing(folder):
    (folder / "merged").rename(folder / "elsewhere")


@hostile(3)
def pickle_instead(folder):
    (folder / MODEL).rename(folder / "merged" / "pytorch_model.bin")


# --- indices ---


def index(folder, value):
    if not isinstance(value, bytes):
        value = json.dumps(value).encode()
    (folder / MODEL).rename(folder / "merged" / "model-00001-of-00001.safetensors")
    (folder / "merged" / "model.safetensors.index.json").write_bytes(value)


def indexed(name, value, *statuses):
    def function(folder):
        index(folder, value() if callable(value) else value)

    function.__name__ = name
    hostile(*(statuses or (3,)))(function)


NAME = "model.norm.weight"
indexed("index_leaves_the_folder", {"weight_map": {NAME: "../base/model.safetensors"}})
indexed("index_names_an_absolute_path", {"weight_map": {NAME: "/etc/passwd"}})
indexed("index_names_itself", {"weight_map": {NAME: "model.safetensors.index.json"}})
indexed("index_names_the_folder", {"weight_map": {NAME: "."}})
indexed("index_names_nothing", {"weight_map": {NAME: ""}})
indexed("index_names_a_device", {"weight_map": {NAME: "../../../../../../dev/zero"}})
indexed("index_with_a_null_byte", {"weight_map": {NAME: "a\0b"}})
indexed("index_with_a_missing_shard", {"weight_map": {NAME: "model-00009-of-00009.safetensors"}})
indexed("index_of_numbers", {"weight_map": {NAME: 7}})
indexed("index_a_list", {"weight_map": [NAME]})
indexed("index_without_a_map", {})
indexed("index_no_json", b"{")
indexed("index_of_deep_lists", b"[" * 1_000_000)
indexed(
    "index_with_a_name_that_no_shard_has",
    {"weight_map": {"no.such": "model-00001-of-00001.safetensors"}},
)
indexed(
    "index_of_a_million_names",
    lambda: {"weight_map": {f"a.{i}": f"model-{i}.safetensors" for i in range(300_000)}},
)


@hostile(3)
def index_whose_shard_is_a_link_out(folder):
    index(folder, {"weight_map": {NAME: "model-00002-of-00002.safetensors"}})
    (folder / "merged" / "model-00002-of-00002.safetensors").symlink_to("/dev/zero")


@hostile(3)
def shards_that_link_in_a_loop(folder):
    index(folder, {"weight_map": {NAME: "x.safetensors"}})
    (folder / "merged" / "x.safetensors").symlink_to("y.safetensors")
    (folder / "merged" / "y.safetensors").symlink_to("x.safetensors")


@hostile(3)
def two_shards_with_the_same_tensors(folder):
    data = (folder / MODEL).read_bytes()
    index(
        folder,
        {
            "weight_map": {
                NAME: "model-00001-of-00001.safetensors",
                "model.embed_tokens.weight": "x.safetensors",
            }
        },
    )
    (folder / "merged" / "x.safetensors").write_bytes(data)


# --- settings ---


def settings_file(name, file, data, *statuses):
    def function(folder):
        (folder / file).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())

    function.__name__ = name
    hostile(*(statuses or (3,)))(function)


for file in ("merged/config.json", "base/config.json", "adapter/adapter_config.json"):
    label = file.replace("/", "_").removesuffix(".json")
    settings_file(f"{label}_no_json", file, b"{")
    settings_file(f"{label}_a_list", file, [])
    settings_file(f"{label}_empty", file, b"")
    settings_file(f"{label}_of_deep_lists", file, b"[" * 1_000_000)
    settings_file(f"{label}_with_nan", file, b'{"a": NaN}')
    settings_file(f"{label}_not_utf8", file, b'{"a": "\xff"}')


def endless(name, file, *statuses):
    def function(folder):
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to("/dev/zero")

    function.__name__ = name
    hostile(*(statuses or (3,)))(function)


endless("config_an_endless_device", "merged/config.json")
endless("adapter_config_an_endless_device", "adapter/adapter_config.json")
endless("index_an_endless_device", "merged/model.safetensors.index.json")
endless("tokenizer_an_endless_device", "merged/tokenizer.json", 0, 1, 3)


@hostile(3)
def config_a_pipe(folder):
    (folder / "merged/config.json").unlink()
    os.mkfifo(folder / "merged/config.json")


@hostile(3)
def config_of_a_gigabyte(folder):
    with open(folder / "merged/config.json", "wb") as file:
        file.truncate(2**30)


@hostile(0, 1, 3)
def config_of_strange_values(folder):
    path = folder / "merged/config.json"
    config = json.loads(path.read_text())
    write_json(path, {key: [{"a": value}] for key, value in config.items()})


@hostile(0, 1, 3)
def heads_without_end(folder):
    for place in ("base", "merged"):
        path = folder / place / "config.json"
        write_json(
            path,
            json.loads(path.read_text())
            | {"num_attention_heads": 10**30, "num_key_value_heads": -7},
        )
    spoil(folder)


def spoil(folder):
    """Make the merged model wrong, so that a cause is looked for."""
    data = bytearray((folder / MODEL).read_bytes())
    data[-200::7] = bytes(len(data[-200::7]))
    (folder / MODEL).write_bytes(bytes(data))


def adapter_setting(name, *statuses, **values):
    def function(folder):
        path = folder / "adapter/adapter_config.json"
        write_json(path, json.loads(path.read_text()) | values)

    function.__name__ = name
    hostile(*(statuses or (1, 3)))(function)


adapter_setting("rank_negative", r=-1)
adapter_setting("rank_zero", r=0)
adapter_setting("rank_of_a_billion", r=10**9)
adapter_setting("rank_a_text", r="8")
adapter_setting("rank_true", r=True)
adapter_setting("alpha_a_text", 3, lora_alpha="16")
adapter_setting("alpha_null", 3, lora_alpha=None)
adapter_setting("alpha_of_10_to_the_300", lora_alpha=1e300)
adapter_setting("type_unknown", 3, peft_type="NOSUCH")
adapter_setting("type_a_list", 3, peft_type=["LORA"])
adapter_setting("pattern_a_list", 3, rank_pattern=[["q_proj", 4]])
adapter_setting("pattern_no_expression", 0, 1, 3, rank_pattern={"(": 4})
adapter_setting("pattern_without_end", 0, 1, 3, rank_pattern={r"((([a-z_.0-9])*)*)*!": 4})
adapter_setting("alpha_pattern_without_end", 0, 1, 3, alpha_pattern={r"(.*)*(.*)*(.*)*!": 4})
adapter_setting("targets_without_end", 0, 1, 3, target_modules=r"((([a-z_.0-9])*)*)*!")
adapter_setting("layers_replicated_without_end", 3, layer_replication=[[0, 1]] * 500_000)
adapter_setting("layers_replicated_from_2_to_the_60", 3, layer_replication=[[0, 2**60]])
adapter_setting("tokens_negative", trainable_token_indices=[-1])
adapter_setting("saved_a_number", 0, 1, 3, modules_to_save=7)


def adapter_tensors(name, change, *statuses):
    def function(folder):
        world = adapt(llama(layers=1, d=16, inner=16, vocab=16), r=2)
        tensors = change(dict(world.adapter))
        (folder / "adapter/adapter_model.safetensors").write_bytes(pack(tensors))

    function.__name__ = name
    hostile(*(statuses or (1, 3)))(function)


def first(tensors, change):
    name = next(iter(tensors))
    return {**tensors, name: change(tensors[name])}


adapter_tensors("factor_of_no_rank", lambda t: first(t, lambda A: A[:0]))
adapter_tensors("factor_a_vector", lambda t: first(t, lambda A: A[0]))
adapter_tensors("factor_a_number", lambda t: first(t, lambda A: A[0, 0]))
adapter_tensors("factor_of_another_rank", lambda t: first(t, lambda A: A[:1]))
adapter_tensors("factor_of_other_columns", lambda t: first(t, lambda A: A[:, :3]))
adapter_tensors("factor_with_nan", lambda t: first(t, lambda A: A * np.float32(np.nan)))
adapter_tensors("factor_with_infinity", lambda t: first(t, lambda A: A + np.float32(np.inf)))
adapter_tensors("factor_of_whole_numbers", lambda t: first(t, lambda A: A.astype(np.int64)))
adapter_tensors("factor_alone", lambda t: dict([next(iter(t.items()))]))
adapter_tensors("no_factor", lambda t: {})
adapter_tensors(
    "factors_of_no_module", lambda t: {n.replace("_proj", "_other"): a for n, a in t.items()}
)
adapter_tensors(
    "factors_with_strange_names", lambda t: {f"{n}\x1b[31m\n": a for n, a in t.items()}, 0, 1, 3
)
adapter_tensors("factors_with_long_names", lambda t: {n * 2000: a for n, a in t.items()})


# --- GGUF ---


def gguf(tensors=1, keys=0, body=b"", magic=b"GGUF", version=3):
    return magic + struct.pack("<IQQ", version, tensors, keys) + body


def text(value):
    return struct.pack("<Q", len(value)) + value


ARCHITECTURE = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")


def gguf_file(name, data, *statuses):
    def function(folder):
        (folder / MODEL).unlink()
        (folder / "merged").rename(folder / "gone")
        (folder / "merged").write_bytes(data)  # told by its magic, whatever its name

    function.__name__ = name
    hostile(*(statuses or (3,)))(function)


gguf_file("gguf_of_2_to_the_60_tensors", gguf(2**60))
gguf_file("gguf_of_2_to_the_60_keys", gguf(1, 2**60))
gguf_file("gguf_with_a_text_of_2_to_the_60", gguf(0, 1, struct.pack("<Q", 2**60)))
gguf_file(
    "gguf_with_a_list_of_2_to_the_60", gguf(0, 1, text(b"a") + struct.pack("<IIQ", 9, 4, 2**60))
)
gguf_file(
    "gguf_with_lists_in_lists",
    gguf(0, 1, text(b"a") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1) * 100_000),
)
gguf_file("gguf_of_an_unknown_version", gguf(version=99))
gguf_file("gguf_of_four_bytes", b"GGUF")
gguf_file(
    "gguf_with_a_tensor_of_2_to_the_62",
    gguf(1, 1, ARCHITECTURE + text(b"output_norm.weight") + struct.pack("<IQIQ", 1, 2**62, 0, 0)),
)
gguf_file(
    "gguf_with_a_tensor_past_the_end",
    gguf(1, 1, ARCHITECTURE + text(b"output_norm.weight") + struct.pack("<IQIQ", 1, 16, 0, 2**60)),
)
gguf_file(
    "gguf_with_an_alignment_of_zero",
    gguf(0, 2, ARCHITECTURE + text(b"general.alignment") + struct.pack("<II", 4, 0)),
)
gguf_file(
    "gguf_with_a_tensor_of_a_thousand_axes",
    gguf(1, 1, ARCHITECTURE + text(b"output_norm.weight") + struct.pack("<I", 1000) + bytes(9000)),
)
gguf_file("gguf_without_an_architecture", gguf(0, 0))
