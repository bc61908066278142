"""Small models with adapters in folders, for checks that a model of one layer shows as well.

Their numbers are those of float32, in whatever dtype they are stored: what is wanted of one dtype
is wanted of the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from minilora.io.formats.huggingface import write_model
from minilora.io.formats.peft import adapter_names, write_adapter
from minilora.spec.initialization import draw_weights
from minilora.spec.lora import TrainableSpec, Weights
from minilora.spec.models import GPT2, Batch, Bert, Config, Llama
from minilora.spec.ops import IGNORED
from minilora.spec.target_modules import LoraConfig, inject
from minilora.verify.checks.model_answers import temporary_folder
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.types import Case, Comparison

Array = np.ndarray

LLAMA = Llama(
    vocab=13, d=12, layers=1, heads=2, ffn=10, kv_heads=1, head_dim=6, eps=3e-5, theta=2000.0
)
QWEN2 = replace(LLAMA, qkv_bias=True)
DEEP = replace(LLAMA, layers=2)
GPT_2 = GPT2(vocab=13, d=12, layers=1, heads=3, ffn=10, positions=80, eps=2e-5)
BERT = Bert(vocab=13, d=12, layers=1, heads=3, ffn=10, positions=80, types=2, classes=4, eps=4e-6)


@dataclass(frozen=True)
class TinyModel:
    """A model with its adapter: all weights, what is trained of them, and how they were chosen."""

    c: Config
    W: Weights
    spec: TrainableSpec
    lora: LoraConfig

    @property
    def trained(self) -> Weights:
        """The parameters that are trained."""
        return {name: self.W[name] for name in sorted(self.spec.trained)}

    def names(self) -> dict[str, str]:
        """The name of each trained parameter in the adapter's file."""
        return adapter_names(self.c, sorted(self.spec.trained))

    def write(self, folder: Path, dtype: str, shard_bytes: int | None = None) -> tuple[Path, Path]:
        """The folders of the model and of the adapter; with ``shard_bytes`` in several files.

        What is trained of the base itself is another in the model's folder, where it has not been
        trained yet: here its negative.
        """
        W = {name: array.astype(DTYPES[dtype]) for name, array in self.W.items()}
        old = self.spec.trained
        base = {name: -W[name] if name in old else W[name] for name in self.c.shapes()}
        write_model(folder / "base", self.c, base, shard_bytes=shard_bytes)
        write_adapter(folder / "adapter", self.c, W, self.spec, self.lora)
        return folder / "base", folder / "adapter"


def draw(c: Config, lora: LoraConfig, rng: np.random.Generator) -> TinyModel:
    """Weights far from a start: no bias and no B is 0, no norm is 1; the adapter's part is felt.

    Its numbers are those of float32.
    """
    shapes = {
        at: v for at, v in c.matrices().items() if at in c.linears() or at in lora.target_modules
    }
    W, spec = inject(draw_weights(c, rng, 0.3), lora, shapes, rng)

    def drawn(name: str, array: Array) -> Array:
        if name.endswith((".A", ".B")):
            array = 0.3 * rng.standard_normal(array.shape)
        elif array.shape[1] == 1:
            array = array + 0.2 * rng.standard_normal(array.shape)
        return array.astype(np.float32).astype(np.float64)

    return TinyModel(c, {name: drawn(name, array) for name, array in W.items()}, spec, lora)


def dotted_ends(pattern: Mapping[str, Any]) -> dict[str, Any]:
    """A pattern's keys without the first part of the names, as users write them."""
    return {name.partition(".")[2]: value for name, value in pattern.items()}


def at_start(model: TinyModel) -> TinyModel:
    """The model with B = 0, as training begins."""
    B = {name: 0 * array for name, array in model.W.items() if name.endswith(".B")}
    return replace(model, W=model.W | B)


@lru_cache(maxsize=64)
def folders(key: tuple[str, int, int], dtype: str, small: Any) -> tuple[Path, Path]:
    """The folders of ``small()``, a model that ``key`` determines."""
    name = "-".join(map(str, (*key, dtype)))
    model: TinyModel = small()
    return model.write(temporary_folder() / name, dtype)


def draw_batch(rng: np.random.Generator, c: Config, b: int, t: int, prompt: bool = False) -> Batch:
    """Rows of unequal lengths, padded on the right, a quarter of the labels ignored.

    With ``prompt`` the first labels of each row are ignored instead. Each row keeps a label that
    is predicted. A classifier's labels are one for each row, of which one is ignored if there are
    several.
    """
    ids = rng.integers(0, c.vocab, (b, t))
    length = rng.integers(3, t + 1, b)
    length[0] = t - 1
    mask = np.arange(t) < length[:, None]
    if not c.causal:
        classes, _ = c.linears()["head"]
        labels = rng.integers(0, classes, b)
        labels[1:2] = IGNORED
        n_types = c.tables().get("types")
        types = None if n_types is None else rng.integers(0, n_types, (b, t))
        return Batch(ids, labels, mask, types=types)
    ignored = rng.random((b, t)) < 0.25
    if prompt:
        ignored = np.arange(t) < rng.integers(1, length - 1)[:, None]
    labels = np.where(mask & ~ignored, ids, IGNORED)
    last = length - 1
    labels[np.arange(b), last] = ids[np.arange(b), last]
    return Batch(ids, labels, mask)


def draw_padded(
    rng: np.random.Generator, c: Config, b: int, t: int, padding: str, ignored: bool
) -> Batch:
    """Rows of t tokens: with padding on the right, on the left, on both or none.

    ``both``: every other row is padded on the left. Without ``ignored`` all labels count; with it,
    each row keeps its last.
    """
    batch = draw_batch(rng, c, b, t)
    if padding == "none":
        batch = replace(batch, mask=np.ones((b, t), bool))
    if padding == "both":
        turned = padded_left(batch)
        is_left = np.arange(b)[:, None] % 2 == 1
        ids = np.where(is_left, turned.ids, batch.ids)
        batch = replace(batch, ids=ids, mask=np.where(is_left, turned.real, batch.real))
    if not c.causal:
        classes = rng.integers(0, c.linears()["head"][0], b)
        classes[1:2] = IGNORED if ignored else classes[1:2]
        return replace(batch, labels=classes)
    if padding == "left":
        batch = padded_left(batch)
    before = np.pad(batch.real, ((0, 0), (1, 0)))[:, :-1]
    labels = np.where(batch.real & (before | (padding == "right")), batch.ids, IGNORED)
    drop = rng.random((b, t)) < 0.3
    drop[np.arange(b), t - 1 - batch.real[:, ::-1].argmax(1)] = False  # each row's last token
    return replace(batch, labels=np.where(drop & ignored, IGNORED, labels))


def padded_left(batch: Batch) -> Batch:
    """The batch with each row's padding before it. What padding predicts does not count."""
    _, t = batch.ids.shape
    order = (np.arange(t) + batch.real.sum(1)[:, None]) % t
    ids, labels, real = (
        np.take_along_axis(array, order, 1) for array in (batch.ids, batch.labels, batch.real)
    )
    before = np.pad(real, ((0, 0), (1, 0)))[:, :-1]
    return replace(batch, ids=ids, labels=np.where(before, labels, IGNORED), mask=real)


def without_labels(batch: Batch) -> Batch:
    """The batch with no label but each row's first, which nothing predicts."""
    first = np.arange(batch.ids.shape[1]) == 0
    return replace(batch, labels=np.where(first, batch.ids, IGNORED))


def rng_of(case: Case, name: str) -> np.random.Generator:
    """The generator of a case, the same in every dtype."""
    return replace(case, check=name, dtype="").rng()


def same_names(what: str, got: Iterable[str], want: Iterable[str]) -> Comparison:
    """Whether the names are just these: 1 for each that is there, in the order of the alphabet."""
    got, want = set(got), set(want)
    every = sorted(got | want)
    lacks = "".join(f", without {name}" for name in sorted(want - got)[:3])
    beside = "".join(f", beside them {name}" for name in sorted(got - want)[:3])
    is_there, belongs = (
        np.asarray([float(name in names) for name in every]) for names in (got, want)
    )
    return Comparison(f"{what}{lacks}{beside}", is_there, belongs)
