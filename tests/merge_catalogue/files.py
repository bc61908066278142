"""A right merge whose files are spoiled: cut off, incomplete, renamed, with other settings."""

import copy
import json

import numpy as np

from merge_catalogue.catalogue import wrong
from merge_catalogue.worlds import pack, write_adapter, write_json, write_model

FILE = "model.safetensors"


def spoil(text, verdicts, says, where=lambda w: True, unreadable=False):
    return wrong(text, verdicts, says, where, spoils=True, unreadable=unreadable)


def tensors(folder, world):
    """The merged tensors as they were written."""
    merged = {}
    data = (folder / FILE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            a, b = entry["data_offsets"]
            dtype = world.base[name].dtype
            merged[name] = np.frombuffer(data[8 + size + a : 8 + size + b], dtype).reshape(
                entry["shape"]
            )
    return merged


def rewritten(folder, world, change):
    (folder / FILE).write_bytes(pack(change(tensors(folder, world))))


@spoil("a tensor is missing", "missing wrong changed", r"missing|no tensor|no such")
def a_tensor_missing(folder, world):
    rewritten(folder, world, lambda M: dict(list(M.items())[:-1]))


@spoil(
    "the tensors of a layer are missing",
    "missing",
    r"missing",
    lambda w: any(".1." in n for n in w.base),
)
def a_layer_missing(folder, world):
    rewritten(folder, world, lambda M: {n: a for n, a in M.items() if ".1." not in n})


@spoil("a tensor more", "extra", r"no such|extra|more")
def a_tensor_more(folder, world):
    rewritten(folder, world, lambda M: M | {"model.extra.weight": np.ones((2, 2), np.float32)})


@spoil("the adapter's tensors are still there", "extra", r"lora|adapter|no such|extra")
def adapter_tensors_left(folder, world):
    rewritten(folder, world, lambda M: M | dict(world.adapter))


@spoil(
    "names as in PEFT's module: base_model.model…base_layer",
    "missing extra",
    r"base_layer|base_model|name|prefix|missing",
)
def names_of_peft(folder, world):
    rewritten(
        folder,
        world,
        lambda M: {
            f"base_model.model.{n.removesuffix('.weight')}.base_layer.weight"
            if n in {t.weight for t in world.sites}
            else f"base_model.model.{n}": a
            for n, a in M.items()
        },
    )


@spoil("names with module. in front", "missing extra wrong", r"module|name|prefix|missing")
def names_of_data_parallel(folder, world):
    rewritten(folder, world, lambda M: {f"module.{n}": a for n, a in M.items()})


@spoil("a NaN in a merged matrix", "corrupt mismatch", r"NaN|infin", lambda w: bool(w.sites))
def a_nan(folder, world):
    rewritten(folder, world, lambda M: put(M, world.sites[0].weight, np.nan))


@spoil("an infinity in a merged matrix", "corrupt mismatch", r"NaN|infin", lambda w: bool(w.sites))
def an_infinity(folder, world):
    rewritten(folder, world, lambda M: put(M, world.sites[0].weight, np.inf))


@spoil("a NaN in a tensor that no adapter touches", "corrupt changed", r"NaN|infin")
def a_nan_in_a_norm(folder, world):
    rewritten(folder, world, lambda M: put(M, next(n for n, a in M.items() if a.ndim == 1), np.nan))


def put(M, name, value):
    M[name] = M[name].copy()
    M[name].flat[M[name].size // 2] = value
    return M


@spoil("a matrix of zeros", "mismatch changed corrupt factor", r"zero", lambda w: bool(w.sites))
def a_matrix_of_zeros(folder, world):
    rewritten(
        folder,
        world,
        lambda M: M | {world.sites[0].weight: np.zeros_like(M[world.sites[0].weight])},
    )


@spoil(
    "the file is cut off in its middle",
    "corrupt missing",
    r"cut|short|trunc|bytes|end",
    unreadable=True,
)
def file_cut_off(folder, world):
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[: len(data) // 2])


@spoil(
    "the last pages of the file were never written: zeros",
    "corrupt mismatch changed",
    r"zero|mismatch|changed|cut",
)
def last_pages_zero(folder, world):
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(
        data[: -len(data) // 8] + bytes(len(data) - len(data[: -len(data) // 8]))
    )


@spoil(
    "one bit of the file is flipped", "mismatch changed corrupt", r"mismatch|changed|differ|entr"
)
def a_bit_flipped(folder, world):
    data = bytearray((folder / FILE).read_bytes())
    data[-6] ^= 0x40
    (folder / FILE).write_bytes(bytes(data))


def sharded(folder, world, shards=3):
    M = tensors(folder, world)
    (folder / FILE).unlink()
    write_model(folder, M, json.loads((folder / "config.json").read_text()), shards)
    return M, sorted(folder.glob("model-*.safetensors")), folder / "model.safetensors.index.json"


@spoil(
    "the last shard is the base's (unmerged)",
    "not-applied",
    r"not.applied",
    lambda w: bool(w.sites),
)
def last_shard_unmerged(folder, world):
    M, files, _ = sharded(folder, world)
    last = list(M)[2 * len(M) // 3 :]
    files[-1].write_bytes(pack({n: world.base[n] for n in last}))


@spoil("a shard is missing", "missing", r"missing|shard|no such|found", unreadable=True)
def a_shard_missing(folder, world):
    _, files, _ = sharded(folder, world)
    files[1].unlink()


@spoil("a shard is cut off", "corrupt missing", r"cut|short|trunc|bytes|end", unreadable=True)
def a_shard_cut_off(folder, world):
    _, files, _ = sharded(folder, world)
    files[1].write_bytes(files[1].read_bytes()[:-1000])


@spoil(
    "two shards have each other's contents",
    "missing corrupt",
    r"shard|index|missing|holds",
    unreadable=True,
)
def shards_exchanged_on_disk(folder, world):
    _, files, _ = sharded(folder, world)
    a, b = files[0].read_bytes(), files[1].read_bytes()
    files[0].write_bytes(b)
    files[1].write_bytes(a)


@spoil(
    "the index leaves a tensor out, though a shard holds it",
    "missing extra wrong doubtful",
    r"index|missing|shard",
    unreadable=True,
)
def index_incomplete(folder, world):
    _, _, index = sharded(folder, world)
    value = json.loads(index.read_text())
    value["weight_map"].pop(next(iter(value["weight_map"])))
    write_json(index, value)


@spoil(
    "a matrix is transposed as a whole",
    "mismatch transposed changed wrong",
    r"shape|transpos",
    lambda w: any(t.shape[0] != t.shape[1] for t in w.sites),
)
def a_matrix_of_another_shape(folder, world):
    t = next(t for t in world.sites if t.shape[0] != t.shape[1])
    rewritten(folder, world, lambda M: M | {t.weight: np.ascontiguousarray(M[t.weight].T)})


@spoil(
    "the table has more rows than the base's",
    "mismatch changed extra told doubtful",
    r"row|vocab|pad|resiz|shape",
)
def table_padded(folder, world):
    name = next(
        n
        for n in world.base
        if "embed_tokens.weight" in n or "wte.weight" in n or "word_embeddings.weight" in n
    )
    rewritten(folder, world, lambda M: M | {name: np.concatenate([M[name], M[name][:3]])})


@spoil(
    "the table has fewer rows than the base's", "mismatch changed missing", r"row|vocab|cut|shape"
)
def table_cut(folder, world):
    name = next(
        n
        for n in world.base
        if "embed_tokens.weight" in n or "wte.weight" in n or "word_embeddings.weight" in n
    )
    rewritten(folder, world, lambda M: M | {name: np.ascontiguousarray(M[name][:-3])})


def setting(name, text, says, change, where=lambda w: True):
    """A right merge beside a changed config.json."""

    def changes(config):
        other = copy.deepcopy(dict(config))
        try:
            change(other)
        except KeyError:
            return False
        return other != config

    def function(folder, world):
        path = folder / "config.json"
        value = json.loads(path.read_text())
        change(value)
        write_json(path, value)

    function.__name__ = name
    spoil(text, "wrong doubtful changed", says, lambda w: where(w) and changes(w.config))(function)


def set_to(key, value):
    return lambda config: config.__setitem__(key, value)


def of_llama(world):
    return "rope_theta" in world.config


setting(
    "rope_theta_changed",
    "rope_theta",
    r"rope",
    lambda c: c.update(
        rope_theta=7 * c["rope_theta"],
        rope_parameters=dict(c.get("rope_parameters") or {}, rope_theta=7 * c["rope_theta"]),
    ),
    of_llama,
)
setting(
    "rope_scaling_added",
    "rope_scaling",
    r"rope",
    set_to("rope_scaling", {"rope_type": "linear", "factor": 4.0}),
    of_llama,
)
setting(
    "tie_changed",
    "tie_word_embeddings",
    r"tie",
    lambda c: c.__setitem__("tie_word_embeddings", not c.get("tie_word_embeddings", True)),
    of_llama,
)
setting(
    "vocab_size_changed",
    "vocab_size",
    r"vocab",
    lambda c: c.__setitem__("vocab_size", c["vocab_size"] + 64),
)
setting("norm_eps_changed", "rms_norm_eps", r"eps", set_to("rms_norm_eps", 1e-6), of_llama)
setting(
    "heads_changed",
    "num_attention_heads",
    r"head",
    lambda c: c.__setitem__("num_attention_heads", 2),
    of_llama,
)
setting("activation_changed", "hidden_act", r"act", set_to("hidden_act", "gelu"), of_llama)
setting(
    "architecture_changed",
    "architectures",
    r"architect|model_type",
    lambda c: c.update(model_type="mistral", architectures=["MistralForCausalLM"]),
    of_llama,
)
setting(
    "layers_fewer_in_the_config",
    "num_hidden_layers",
    r"layers",
    lambda c: c.__setitem__("num_hidden_layers", 1),
    of_llama,
)
setting(
    "quantization_config_left",
    "quantization_config",
    r"quanti",
    set_to("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
)
setting("eos_changed", "eos_token_id", r"eos", set_to("eos_token_id", 5), of_llama)
setting(
    "context_cut",
    "max_position_embeddings",
    r"position",
    lambda c: c.update(max_position_embeddings=c["max_position_embeddings"] // 2),
    of_llama,
)


@spoil("config.json is missing", "missing wrong doubtful", r"config", unreadable=True)
def config_missing(folder, world):
    (folder / "config.json").unlink()


def tokenizer(name, text, says, file, change):
    def function(folder, world):
        path = folder / file
        value = json.loads(path.read_text())
        change(value)
        write_json(path, value)

    function.__name__ = name
    spoil(text, "wrong doubtful changed missing", says)(function)


tokenizer(
    "chat_template_changed",
    "chat_template",
    r"template",
    "tokenizer_config.json",
    set_to("chat_template", "{{ prompt }}"),
)
tokenizer(
    "chat_template_lost",
    "chat_template",
    r"template",
    "tokenizer_config.json",
    lambda c: c.pop("chat_template"),
)
tokenizer(
    "eos_token_changed",
    "eos_token",
    r"eos",
    "tokenizer_config.json",
    set_to("eos_token", "<|im_end|>"),
)
tokenizer(
    "vocabulary_changed",
    "vocab",
    r"vocab|token",
    "tokenizer.json",
    lambda c: c["model"]["vocab"].update(c=2, a=1, b=0),
)


@spoil("the adapter lies beside the merged weights (peft 1381)", "wrong", r"beside|twice")
def adapter_left_beside(folder, world):
    write_adapter(folder, world.adapter, world.settings)


@spoil("the base as one file beside the merged shards (unsloth-zoo 808)", "wrong", r"beside|shard")
def base_beside_the_shards(folder, world):
    sharded(folder, world)
    (folder / FILE).write_bytes(pack(world.base))
