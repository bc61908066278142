"""Reading a GGUF model: its configuration, and its weights, which may stay as they are there."""

from pathlib import Path
from typing import Any

import numpy as np

from minilora.io.architectures import architecture_of
from minilora.io.errors import FormatError, listed
from minilora.io.files import check_settings
from minilora.io.formats.factors import file_name
from minilora.io.formats.gguf.blocks import Blocks, check_tensor
from minilora.io.formats.gguf.contents import Contents
from minilora.io.formats.gguf.names import (
    FIXED,
    INERT,
    SPECIAL,
    TOKENS,
    architecture_in,
    one_added,
    places,
    setting_names,
    weight_order,
)
from minilora.io.formats.gguf.rope import FACTORS, read_scaling, scaling_factors
from minilora.io.lazy_weights import Expanded
from minilora.spec.architectures import Llama3
from minilora.spec.lora import Params
from minilora.spec.models import Config


class _Settings:
    """The metadata under an architecture's name; what is said of each layer alike is one value."""

    def __init__(self, contents: Contents, architecture: str) -> None:
        self.path, self.prefix = contents.path, f"{architecture}."
        self.values: dict[str, Any] = {}
        for key in contents:
            if key.startswith(self.prefix):
                value = contents[key]
                alike = isinstance(value, list) and len({*value}) == 1
                self.values[key.removeprefix(self.prefix)] = value[0] if alike else value

    def error(self, key: str, found: object, expected: object, remedy: str) -> FormatError:
        return FormatError(self.path, f"{self.prefix}{key}", found, expected, remedy)

    def number(self, key: str, kind: Any, default: Any = None) -> Any:
        """The number, above 0 and one for all layers."""
        value = self.values.get(key, default)
        if type(value) is not kind or not 0 < value < 2**53:
            expected = "a number above 0, and one for all layers"
            raise self.error(key, value, expected, "take it from the model's original file")
        return value


def read_config(contents: Contents) -> Config:
    """The configuration that the metadata give, and what tensors there are.

    Errors: those of :func:`read_model`, but for the tensors.
    """
    path, a = contents.path, architecture_in(contents)
    kind = contents.get("general.type", "model")
    if kind != "model":
        remedy = "read an adapter with read_adapter, beside its model"
        raise FormatError(path, "general.type", kind, "model", remedy)
    if contents.get("split.count", 1) not in (0, 1):
        remedy = "join the parts with llama-gguf-split --merge"
        raise FormatError(path, "split.count", contents["split.count"], "a whole file", remedy)
    keys, gguf = setting_names(a), a.gguf
    assert gguf is not None  # it is in architecture_in's table
    settings = _Settings(contents, a.gguf_name)
    read = {*keys.values(), *SPECIAL, *gguf.special}
    fixed = {key: FIXED[key] for key in FIXED.keys() - {*gguf.special}} | {**gguf.fixed}
    check_settings(f"{path}: {a.gguf_name}", settings.values, read, fixed, INERT)
    values: dict[str, Any] = {
        field: settings.number(key, int)
        for field, key in keys.items()
        if field not in ("eps", "theta", "kv_heads")
    }
    values["eps"] = settings.number(keys["eps"], float)
    table = contents.tensors.get("token_embd.weight")
    if table is None:
        remedy = "is it a whole model?"
        raise FormatError(path, "token_embd.weight", "none", "the embedding", remedy)
    values["vocab"] = settings.number("vocab_size", int, table.shape[0])
    if a.has_field("theta"):
        values |= _rope_fields(settings, values["d"], values["heads"])
        values["tied"] = "output.weight" not in contents.tensors
        if Llama3 in a.others and (
            scaling := read_scaling(contents, values["theta"], values["head_dim"])
        ):
            values["scaling"] = scaling
    elif values["d"] % values["heads"]:
        expected = f"a divisor of {values['d']}"
        remedy = "the heads share its features"
        field = f"{a.gguf_name}.{keys['heads']}"
        raise FormatError(path, field, values["heads"], expected, remedy)
    if values["layers"] > len(contents.tensors):  # before anything is made for each of them
        expected = f"{values['layers']} layers of several tensors each"
        remedy = "the file is incomplete"
        raise FormatError(path, "tensors", len(contents.tensors), expected, remedy)
    return a.configuration(values | gguf.read(settings, values))


def _rope_fields(settings: _Settings, d: int, heads: int) -> dict[str, Any]:
    """The heads and RoPE of an architecture that has it."""
    theta = settings.number("rope.freq_base", float, 10000.0)
    kv_heads = settings.number("attention.head_count_kv", int, heads)
    size = settings.number("attention.key_length", int, d // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := settings.values.get(key, size)) != size:
            remedy = "other values compute a function that is not implemented here"
            raise settings.error(key, value, size, remedy)
    own_size = "attention.key_length" in settings.values
    if heads % kv_heads or size % 2 or (d % heads and not own_size):
        found = f"{heads} heads, {kv_heads} for keys, of {size}, in {d}"
        expected = "heads that share the features, the keys' and pairs evenly"
        raise settings.error("attention", found, expected, "is it another model's?")
    return {"theta": theta, "kv_heads": kv_heads, "head_dim": size}


def read_model(
    path: Path | str, dtype: Any = np.float32, keep_quantized: bool = True
) -> tuple[Config, Params]:
    """The configuration and the weights of a GGUF model, expanded to ``dtype``.

    With ``keep_quantized`` the matrices are `Blocks` in an `Expanded`, made whenever they are read;
    without, all are in a dict. A block's entry is what float32 holds of it, so that a wider
    ``dtype`` holds the same. A Llama's q and k have their rows in Hugging Face's order, and where
    the file has 1 + w for a norm, it is w.

    Errors: FormatError for a damaged file; for an architecture, a tensor type, a RoPE or a setting
    that is not implemented, or not known; for a head of a GPT-2 that is not its embedding.
    """
    contents = Contents(path)
    c = read_config(contents)
    module_names, shapes = places(c), c.shapes()
    names = {name: file_name(module_names, name) for name in shapes}
    _check_complete(contents, c, set(names.values()))
    for name, place in names.items():
        m, n = shapes[name]
        check_tensor(contents, place, (m, n) if n > 1 else (m,))
    entries: dict[str, Any] = {}
    for name, place in names.items():
        order = weight_order(c, name, shapes[name][0])
        blocks = Blocks(contents, place, shapes[name], dtype, order)
        # A norm's weight or a bias is no matrix, and nothing is saved by leaving it where it is.
        kept = keep_quantized and shapes[name][1] > 1
        added = 1 if one_added(c, name) else 0
        entries[name] = blocks if kept else blocks() - added
    return c, Expanded(entries) if keep_quantized else entries


def _check_complete(contents: Contents, c: Config, names: set[str]) -> None:
    """Refuse missing tensors, and more than the model has."""
    present = contents.tensors.keys() - _repeated(contents, c)
    if scaling_factors(c) is not None:
        present -= {FACTORS}
    if missing := names - present:
        expected = f"{len(names)} tensors with {listed(missing)}"
        found, remedy = f"none named {listed(missing)}", "the file is incomplete"
        raise FormatError(contents.path, "tensors", found, expected, remedy)
    if extra := present - names:
        remedy = "nothing here would use them, and they may change the function computed"
        if FACTORS in extra:
            remedy = f"scaled RoPE is not implemented for {architecture_of(c).gguf_name}"
        expected = f"these {len(names)} only"
        raise FormatError(contents.path, "tensors", listed(extra), expected, remedy)


def _repeated(contents: Contents, c: Config) -> set[str]:
    """The head of a model that ties it: a file may have the embedding again there, and no other."""
    head, table = (contents.tensors.get(f"{name}.weight") for name in ("output", "token_embd"))
    if architecture_of(c).has_field("tied") or head is None or table is None:
        return set()
    one, other = (contents.bytes[t.start : t.end] for t in (head, table))
    if head.kind != table.kind or one != other:
        found, expected = "other entries than token_embd.weight", "those, to which it is tied"
        remedy = f"a {architecture_of(c).gguf_name} has no head of its own here"
        raise FormatError(contents.path, "output.weight", found, expected, remedy)
    return {"output.weight"}


def generation_settings(path: Path | str) -> dict[str, Any]:
    """What generation needs of a model's metadata and the logits do not, by its names in JSON.

    As `huggingface.generation_settings` has it of a folder.

    Errors: FormatError for what is no GGUF model.
    """
    contents = Contents(path)
    keys = {
        f"{at}_token_id": f"tokenizer.ggml.{TOKENS[at]}_token_id" for at in ("bos", "eos", "pad")
    }
    keys["max_position_embeddings"] = f"{architecture_in(contents).gguf_name}.context_length"
    values = {name: contents.get(key) for name, key in keys.items()}
    return {name: value for name, value in values.items() if isinstance(value, int)}


HUB = "https://huggingface.co/"
"""The beginning of a repository's address."""


def origin(path: Path | str) -> str | None:
    """The model's repository on Hugging Face's Hub, of which the file is a conversion; or its name.

    Errors: FormatError for what is no GGUF file.
    """
    contents = Contents(path)
    keys = ("general.source.repo_url", "general.repo_url", "general.base_model.0.repo_url")
    for key in keys:
        address = contents.get(key)
        if isinstance(address, str) and address.startswith(HUB):
            return address.removeprefix(HUB)
    name = contents.get("general.name")
    return name if isinstance(name, str) and name.strip() else None
