"""The true answers of vectors whose model and adapter are folders.

Exponentials, logarithms and cosines are not the same to the last bit everywhere. True answers are
therefore cut some digits below their σ in float32, far above the last digit of float64, and asked
in float32 alone. Where float64 could decide how one is cut, nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from minilora.io.architectures import architecture_of
from minilora.io.files import read_tensors
from minilora.io.formats.huggingface import read_model
from minilora.io.formats.peft import WEIGHTS, adapter_names, read_adapter
from minilora.spec.lora import TrainableSpec, Weights, merge
from minilora.spec.models import Batch, Config, logits
from minilora.spec.variants import DORA, DORA_FULL
from minilora.verify.checks.inference import log_probabilities
from minilora.verify.checks.model_answers import visible_answers
from minilora.verify.checks.train import numerical_settings
from minilora.verify.core.bigfloat import Shake
from minilora.verify.core.dtypes import Precision
from minilora.verify.core.tolerance import Draws, Rounding, noisy, rms, unit_roundoff
from minilora.verify.core.types import MONTE_CARLO
from minilora.verify.implementation.minilora_impl import batch_of, in_file, trained
from minilora.verify.vectors.call import FINE, Answers, Call, coarse, cut, rounding_of
from minilora.verify.vectors.vector import Output, put_files

Array = np.ndarray

BELOW = 6
"""The last binary digit of a true answer is so many below the first of the least σ: what is cut off
is no part of the tolerance that matters."""

NOISE = 16 * 2.0**-29
"""What float64 loses of an answer at most, beside its σ in float32: sixteen of its own σ."""

NO_HALF = 1 / 3
"""Where an answer is cut: numbers of few digits, which nothing has rounded, lie at no third."""

SAMPLES = 32


@dataclass(frozen=True)
class Opened:
    """A model with its adapter, in float64."""

    c: Config
    base: Weights
    W: Weights
    spec: TrainableSpec

    def with_dora(self, dora: Any) -> Opened:
        """With DoRA's equation by another convention."""
        variants = {at: dora if v is DORA else v for at, v in self.spec.variant.items()}
        return replace(self, spec=replace(self.spec, variant=variants))


Run = Callable[[Opened, Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
"""The answers by name, of a model, its weights in any number system, and the call's arguments."""


def _loss(it: Opened, W: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Loss, logits of the real tokens, and gradients."""
    batch = batch_of(given["batch"])
    of = visible_answers(batch, it.c, it.spec, dict(W))
    loss, z = of.pop("loss"), of.pop("logits")
    grads = {f"grads.{n}": in_file(own, of[own]) for own, n in adapter_names(it.c, of).items()}
    return {"loss": loss, "logits": z, **grads}


def _steps(it: Opened, W: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Each trained parameter after each step, the steps stacked."""
    steps = [[batch_of(batch) for batch in step] for step in given["batches"]]
    others = ("model_dir", "adapter_dir", "batches")
    settings = numerical_settings({k: v for k, v in given.items() if k not in others})
    history = trained(it.c, dict(W), it.spec, steps, settings)
    return {
        name: np.stack([in_file(own, after[own]) for after in history])
        for own, name in adapter_names(it.c, sorted(it.spec.trained)).items()
    }


def _log_probabilities(
    it: Opened, W: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """A row for each token."""
    ids = given["input_ids"]
    z = log_probabilities(logits(Batch(ids), dict(W), it.c, it.spec)[0])
    return {"log_probabilities": z.T.reshape(*ids.shape, -1)}


def _deltas(it: Opened, W: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the adapter adds to each parameter that it changes."""
    merged, base, paths = merge(dict(W), it.spec), dict(it.base), architecture_of(it.c).paths(it.c)
    base.setdefault("head.weight", base["embed.weight"])
    found = {}
    for name, array in merged.items():
        if array is not W.get(name) or name in it.spec.trained:
            at, _, part = name.rpartition(".")
            delta = array - base[name] if name in base else array
            found[paths[at] + (".bias" if part == "bias" else "")] = in_file(name, delta)
    return found


RUNS: dict[str, Run] = {
    "model_loss": _loss,
    "train": _steps,
    "logits": _log_probabilities,
    "deltas": _deltas,
}


def of_folders(call: Call) -> Answers:
    """The answers to a call that names folders."""
    with TemporaryDirectory(prefix="minilora-") as folder:
        put_files(Path(folder), call.files)
        if call.method == "load":
            tensors = read_tensors(Path(folder) / "adapter" / WEIGHTS)
            return {n: Output(v.astype(np.float64), {}) for n, v in tensors.items()}, {}
        c, base = read_model(Path(folder) / "model", np.float64)
        factors, spec = read_adapter(Path(folder) / "adapter", c, np.float64, base=base)
    it = Opened(c, base, base | factors, spec)
    usual = _outputs(call, it)
    if DORA not in spec.variant.values() or call.method not in ("train", "model_loss"):
        return usual, {}
    other = _outputs(call, it.with_dora(DORA_FULL))
    differing = {k: v for k, v in other.items() if (v.want != usual[k].want).any()}
    return usual, {"differentiated": differing}


def _outputs(call: Call, it: Opened) -> dict[str, Output]:
    """The answers, with σ by noisy runs in float32; each element has its array's mean besides."""
    run = RUNS[call.method]
    want = {n: np.asarray(v, np.float64) for n, v in run(it, it.W, call.arguments).items()}
    if call.method == "deltas":  # what is not changed may be left out
        want = {name: delta for name, delta in want.items() if delta.any()}
    draws = Draws([Shake(f"minilora noise/{call.name}/{i}") for i in range(SAMPLES)], SAMPLES)
    noisy_W = {name: noisy(array, rounding_of(""), draws) for name, array in it.W.items()}
    sampled = rms(run(it, noisy_W, call.arguments), want)
    stored, scale = Rounding(Precision("float32", "float32")), unit_roundoff("float32") / FINE
    sigma = {
        name: coarse(_sigma(scale * sampled[name], np.sqrt(stored.stored(array))))
        for name, array in want.items()
    }
    return {
        name: Output(
            _kept(array, sigma[name]),
            {"float32": sigma[name]},
            MONTE_CARLO.max_z,
            round(MONTE_CARLO.rms(array.size), 4),
        )
        for name, array in want.items()
    }


def _kept(array: Array, sigma: Array) -> Array:
    """The digits of an array that σ leaves; float64 loses `NOISE` σ."""
    _, exponent = np.frexp(sigma.min(initial=1.0, where=sigma > 0))
    noise = np.asarray(NOISE * sigma.astype(np.float64))
    return cut(array, int(exponent) - BELOW, noise, NO_HALF)


def _sigma(sampled: Array, stored: Array) -> Array:
    """An element may come out right in all samples by chance: it has the array's mean variance."""
    sigma: Array = np.maximum(np.hypot(sampled, np.sqrt(np.mean(sampled**2))), stored)
    return sigma
