"""Answers of whole models: by the specification, from an implementation, and their rounding."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from minilora.spec.lora import TrainableSpec, Weights
from minilora.spec.models import Batch, Config, logits, shifted_labels
from minilora.spec.ops import cross_entropy
from minilora.verify.core.dtypes import Precision
from minilora.verify.core.inputs import long
from minilora.verify.core.tolerance import Rounding, unit_roundoff
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray

SAMPLES = 16
"""The number of noisy runs from which a sigma is sampled."""


@cache
def temporary_folder() -> Path:
    """A folder for models, removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="minilora-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def specified(batch: Batch, W: Weights, c: Config, spec: TrainableSpec) -> dict[str, Any]:
    """Loss, logits and gradients by the specification, over any number system."""
    z, back_logits = logits(batch, W, c, spec)
    L, back_loss = cross_entropy(z, shifted_labels(batch, c))
    gradients: Weights = back_logits(back_loss(1.0))
    return {"loss": L, "logits": z, **gradients}


def visible_answers(batch: Batch, c: Config, spec: TrainableSpec, W: Weights) -> dict[str, Any]:
    """The same with logits (rows, classes) where they are defined."""
    answer = specified(batch, W, c, spec)
    z = answer["logits"].T
    z = z.reshape(*batch.ids.shape, -1) if c.causal else z
    return answer | {"logits": visible(batch, z)}


def visible(batch: Batch, z: Array) -> Array:
    """The logits (rows, classes) that are defined: of real tokens, or of each sequence."""
    return z[batch.real] if z.ndim == 3 else z


def as_dict(batch: Batch) -> dict[str, Array]:
    """A batch as in the contract: int64 arrays under Hugging Face's names."""
    arrays = {"input_ids": batch.ids, "labels": batch.labels, "attention_mask": batch.real}
    if batch.types is not None:
        arrays["token_type_ids"] = batch.types
    return {name: array.astype(np.int64) for name, array in arrays.items() if array is not None}


def loss_and_logits(
    subject: GuardedImplementation,
    answer: Any,
    batch: Batch,
    classes: int,
    causal: bool,
    dtype: str,
) -> dict[str, Array]:
    """The loss and the visible logits of an implementation's answer. Raises Fault."""
    shape = (*batch.ids.shape, classes) if causal else (len(batch.ids), classes)
    loss = subject.answer(subject.entry(answer, "loss"), "loss", (), dtype)
    z = subject.answer(subject.entry(answer, "logits"), "logits", shape, dtype)
    return {"loss": loss, "logits": visible(batch, z)}


def parameter(
    subject: GuardedImplementation,
    value: Any,
    shown: str,
    name: str,
    shape: Sequence[int],
    dtype: str,
) -> Array:
    """An answer in the shape of a parameter; vectors have one axis in files. Raises Fault."""
    is_matrix = shape[1] > 1 or name.endswith((".A", ".B"))
    in_file = tuple(shape) if is_matrix else tuple(shape[:1])
    return subject.answer(value, shown, in_file, dtype).reshape(shape)


def wanted_and_sigma(
    run: Callable[[Weights], dict[str, Array]], W: Weights, causal: bool, seed: Sequence[int]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The true answers of ``run``, in long double, and their σ in float32.

    σ is the root mean square of what runs in float32 differ by whose weights are rounded at random
    first: rounding carries through the model as it does in an implementation. BERT's erf has no
    long double: then the true answers have rounded too, as float64 does.
    """
    exact, both = (long, 1.0) if causal else (np.asarray, 2**0.5)
    want = run({name: exact(v) for name, v in W.items()})
    rng = np.random.default_rng(list(seed))
    u, squares = unit_roundoff("float32"), {name: np.zeros(v.shape) for name, v in want.items()}
    for _ in range(SAMPLES):
        rounded = {n: (v * (1 + u * rng.uniform(-1, 1, v.shape))).astype("f") for n, v in W.items()}
        for name, array in run(rounded).items():
            squares[name] += (array - want[name].astype(np.float64)) ** 2
    return want, {name: both * np.sqrt(total / SAMPLES) for name, total in squares.items()}


def sigma_of(sampled: Array, want: Array, precision: Precision) -> Array:
    """σ of float32 scaled to a precision: rounding is proportional to u; at least that of storing.

    An element may come out right in all samples by chance: it has the mean variance of the array.
    """
    mean = np.sqrt(np.mean(sampled**2))
    scale = unit_roundoff(precision.accumulation) / unit_roundoff("float32")
    stored = np.sqrt(Rounding(precision).stored(want.astype(np.float64)))
    sigma: Array = np.maximum(scale * np.hypot(sampled, mean), stored)
    return sigma
