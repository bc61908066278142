"""Two files of one model: each tensor has the same numbers, as far as the coarser dtype can say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from minilora.audit.result import Entry
from minilora.audit.settings import compare_settings
from minilora.audit.tensors import StoredTensor, TensorStore, layer_of
from minilora.audit.untouched import untouched
from minilora.io.formats.gguf.names import file_rows
from minilora.spec.ops import Array

HEAD = "lm_head.weight"
FEW = 8
"""So many rows and columns of a tensor are looked at to explain what differs."""


def model_entries(
    one: TensorStore, other: TensorStore, progress: Callable[[int, int, str], object]
) -> Iterator[Entry]:
    """A verdict on each tensor of both, read a block of rows at a time."""
    yield from (entry for entry in compare_settings(one, other) if _matters(entry, other))
    found, read, total = set(), 0, one.nbytes + other.nbytes
    for name, tensor in one.items():
        there = other.find(name)
        if there is None:
            if not _is_spared(name, one, other):
                text = f"the first model has {name}, the second has not"
                yield Entry(name, "missing", text, _place(name))
            continue
        found.add(there)
        yield _compared(name, tensor, other[there], one)
        read += tensor.nbytes + other[there].nbytes
        progress(read, total, name)
    for name in other:
        if name not in found and not _is_spared(name, other, one):
            text = f"the second model has {name}, the first has not"
            yield Entry(name, "extra", text, _place(name))


def _matters(entry: Entry, other: TensorStore) -> bool:
    """GGUF's metadata say a part of the settings alone: what they lack is no difference."""
    return other.container != "gguf" or entry.severity == "deviation"


def _is_spared(name: str, store: TensorStore, other: TensorStore) -> bool:
    """A tied head that the other model leaves out, or tables that are computed."""
    tied = store.settings.get("tie_word_embeddings") or other.settings.get("tie_word_embeddings")
    computed = name.endswith(("rope_freqs.weight", ".inv_freq", ".attn.bias", ".masked_bias"))
    return computed or bool(tied and name.endswith(HEAD))


def _place(name: str) -> dict[str, str | int | float | bool | None]:
    layer = layer_of(name)
    return {} if layer is None else {"layer": layer}


def _compared(name: str, tensor: StoredTensor, there: StoredTensor, store: TensorStore) -> Entry:
    """The verdict of `untouched` in the words of a conversion; what explains other numbers."""
    entry = untouched(tensor, there)
    figures = {**_place(name), **entry.figures}
    text = entry.text.replace("the base's", "the first model's").replace(
        "the base", "the first model"
    )
    if entry.verdict == "unchanged":
        same = tensor.dtype == there.dtype and there.scheme == tensor.scheme
        verdict = "exact" if same and "within" not in text else "within"
        return Entry(name, verdict, text, figures)
    if entry.verdict == "changed":
        mistake = _explained(tensor, there, store)
        verdict = "transposed" if mistake == "transposed" else "mismatch"
        said = {
            "transposed": "it is the transpose",
            "rows-not-permuted": "it has the first model's rows in another order of q and k",
            "": text,
        }[mistake]
        return Entry(name, verdict, said, figures, mistake)
    return replace(entry, subject=name, text=text, figures=figures)


def _explained(tensor: StoredTensor, there: StoredTensor, store: TensorStore) -> str:
    """Which known mistake explains other numbers, by a few rows and columns; "" for none."""
    if len(tensor.shape) != 2 or len(there.shape) != 2:
        return ""
    W, M = _columns(tensor), _columns(there)
    steps = (there.spacing(*at) for at in there.blocks())
    gap = max((float(step.max()) for step in steps if step is not None), default=0.0)
    off = 2.0**-7 * float(np.abs(W).max(initial=0.0)) + gap
    if there.shape == tensor.shape[::-1]:
        first = np.asarray(tensor.rows(0, min(FEW, tensor.length)), np.float64)
        own = np.asarray(there.rows(0, min(FEW, there.length)), np.float64)
        near = _near(M[:, : len(first)].T, first, off) and _near(own.T, W[:, : len(own)], off)
        if near and not (tensor.shape == there.shape and _near(own, first, off)):
            return "transposed"
    if there.shape != tensor.shape:
        return ""
    heads = {store.settings.get(key) for key in ("num_attention_heads", "num_key_value_heads")}
    for each in heads:
        if type(each) is int and each > 0 and len(W) % (2 * each) == 0:
            rows = file_rows(each, len(W))
            if any(_near(M, W[order], off) for order in (rows, np.argsort(rows))):
                return "rows-not-permuted"
    return ""


def _columns(tensor: StoredTensor) -> Array:
    """The first few columns, read block by block."""
    blocks = [np.asarray(tensor.rows(*at)[:, :FEW], np.float64) for at in tensor.blocks()]
    return np.concatenate(blocks)


def _near(a: Array, b: Array, off: float) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max(initial=0.0) <= off)
