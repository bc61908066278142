"""The base as an adapter sees it: with the head that is tied to a table, and repeated layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from minilora.audit.tensors import StoredTensor, TensorStore
from minilora.io.errors import FormatError
from minilora.spec.target_modules import replicated_layers

HEAD = "lm_head.weight"
"""The name of a head that is tied, and so has no tensor of its own."""

_TABLES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings")
_HEADS = ("lm_head", "embed_out", "output")
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_MOST_LAYERS = 10_000
_LAYER = re.compile(r"^((?:.*\.)?(?:layers|layer|h)\.)(\d+)(\..*)$")


def is_head(name: str) -> bool:
    """Whether the tensor is the weight of a language model's head."""
    return name.endswith(".weight") and name.removesuffix(".weight").rpartition(".")[2] in _HEADS


def tied_table(store: TensorStore) -> str | None:
    """The table that the head is tied to, None where the head has a tensor, or there is none.

    A causal language model without a tensor of its head has a tied one, whatever its settings say:
    transformers leaves the setting out where it is the architecture's default.
    """
    architectures = store.settings.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if not any(isinstance(name, str) and name.endswith(_WITH_HEAD) for name in names):
        return None
    modules = {name.removesuffix(".weight"): name for name in store if name.endswith(".weight")}
    if any(module.rpartition(".")[2] in _HEADS for module in modules):
        return None
    tables = [name for at, name in modules.items() if at.rpartition(".")[2] in _TABLES]
    tables = [name for name in tables if len(store[name].shape) == 2]
    return tables[0] if len(tables) == 1 else None


def with_head(store: TensorStore) -> tuple[TensorStore, str | None]:
    """The store with a tied head as a tensor beside its table, and the table's name."""
    table = tied_table(store)
    if table is None:
        return store, None
    head = replace(store[table], name=HEAD, nbytes=0)
    return store.with_tensors({**store.tensors, HEAD: head}), table


_MOST_RANGES = 1000
"""Of layer_replication: more than any model has layers."""


def replicated(store: TensorStore, ranges: Sequence[Sequence[int]]) -> TensorStore:
    """The store with its layers repeated as ``layer_replication`` says.

    Errors: FormatError for ranges of layers that it does not have.
    """
    layered = {name: match for name in store if (match := _LAYER.match(name))}
    depth = 1 + max((int(match[2]) for match in layered.values()), default=-1)
    if len(ranges) > _MOST_RANGES:
        found, expected = f"{len(ranges)} ranges", f"{_MOST_RANGES} at most"
        remedy = "is it another model's adapter?"
        raise FormatError(store.path, "layer_replication", found, expected, remedy)
    try:
        if sum(last - first for first, last in ranges) > _MOST_LAYERS:
            raise ValueError(f"more than {_MOST_LAYERS} layers")
        order = replicated_layers(depth, [(first, last) for first, last in ranges])
    except ValueError as error:
        remedy = "is it another model's adapter?"
        expected = f"ranges of its {depth} layers"
        raise FormatError(store.path, "layer_replication", error, expected, remedy) from None
    tensors = {name: tensor for name, tensor in store.items() if name not in layered}
    for name, match in layered.items():
        for new, old in enumerate(order):
            if old == int(match[2]):
                copy = f"{match[1]}{new}{match[3]}"
                tensors[copy] = replace(store[name], name=copy)
    deeper = store.with_tensors(tensors)
    depths = {key: len(order) for key in ("num_hidden_layers", "n_layer") if key in store.settings}
    deeper.settings = {**store.settings, **depths}
    return deeper


def replaced(store: TensorStore, tensors: Iterable[StoredTensor]) -> TensorStore:
    """The store with other tensors in the place of its own."""
    return store.with_tensors({**store.tensors, **{t.name: t for t in tensors}})
