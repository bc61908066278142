"""Level ``model``: loss, logits and every adapter gradient of whole models, from files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from minilora.io import reference_models
from minilora.io.atomic import write_files, write_tensors
from minilora.io.files import pack_json, read_json, read_tensors
from minilora.io.formats.huggingface import read_model
from minilora.io.formats.peft import adapter_names, read_adapter
from minilora.io.synthetic_data import draw_batch
from minilora.spec.lora import TrainableSpec, Weights
from minilora.spec.models import Batch, Config
from minilora.spec.ops import IGNORED
from minilora.verify.checks import batches
from minilora.verify.checks.model_answers import (
    SAMPLES,
    as_dict,
    loss_and_logits,
    parameter,
    temporary_folder,
    visible,
    visible_answers,
)
from minilora.verify.core.dtypes import DTYPES, Precision
from minilora.verify.core.inputs import long
from minilora.verify.core.level import Level
from minilora.verify.core.tolerance import Draws, Rounding, noisy, spread
from minilora.verify.core.types import MONTE_CARLO, Case, Check, Comparison
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray
Run = Callable[[GuardedImplementation, Case], Iterable[Comparison]]

CASES = {"quick": 1, "ci": 1, "nightly": 20}
MORE_SAMPLES = 256
SUSPICIOUS = 6.0, 12.0
"""z between these is looked at again: 16 samples know sigma to 18 % only, 256 to 4 %."""


FINE = 2.0**-28
"""The size of what float64 files have beside the numbers of float32, which float32 would lose."""


@cache
def stored_folders(name: str, dtype: str, fine: bool = True) -> tuple[Path, Path]:
    """The folders of the reference model and of its adapter, in the dtype under test.

    The files are float32. In float64, ``fine`` numbers need all of its digits.
    """
    source = reference_models.folder() / name
    target = temporary_folder() / f"{name}-{dtype}{'' if fine else '-stored'}"
    for part in ("base", "adapter"):
        (target / part).mkdir(parents=True, exist_ok=True)  # it may have failed before, half-way
        for path in sorted((source / part).iterdir()):
            if path.suffix == ".safetensors":
                arrays = {k: v.astype(DTYPES[dtype]) for k, v in read_tensors(path).items()}
                if fine and dtype == "float64":
                    arrays = {k: _refined(k, v) for k, v in arrays.items()}
                write_tensors(target / part / path.name, arrays, {"format": "pt"})
            elif path.name == "config.json":
                config = read_json(path) | {"dtype": dtype}
                write_files(target / part, {path.name: partial(pack_json, config)})
            else:
                shutil.copyfile(path, target / part / path.name)
    return target / "base", target / "adapter"


def _refined(name: str, array: Array) -> Array:
    """The array with other digits beyond those of float32."""
    rng = np.random.default_rng(crc32(name.encode()))
    return np.asarray(array * (1 + FINE * rng.uniform(-1, 1, array.shape)))


@cache
def read_back(
    name: str, dtype: str, fine: bool = True
) -> tuple[Config, Weights, TrainableSpec, dict[str, str]]:
    """What is in those folders, in float64, and the names of the adapter's tensors in its file."""
    base, adapter = stored_folders(name, dtype, fine)
    c, W = read_model(base, np.float64)
    factors, spec = read_adapter(adapter, c, np.float64)
    return c, W | factors, spec, adapter_names(c, spec.trained)


def draw(name: str, case: Case) -> Batch:
    """The batch of a case: padding on both sides, ignored labels, unequal counts.

    The same for all laws of a model, whose spreads are then sampled once.
    """
    shared = replace(case, check=f"model.{name}")
    return draw_batch(reference_models.tasks(name)[1], shared.rng())


def ask(
    subject: GuardedImplementation, name: str, dtype: str, batch: Batch, fine: bool = True
) -> dict[str, Array]:
    """The implementation's loss, logits and gradients, by the names of the specification."""
    c, W, _, names = read_back(name, dtype)
    base, adapter = stored_folders(name, dtype, fine)
    answer = subject.call("model_loss", str(base), str(adapter), as_dict(batch))
    classes = len(W["head.weight"]) if "head.weight" in W else c.vocab
    got = loss_and_logits(subject, answer, batch, classes, c.causal, dtype)
    gradients = subject.entry(answer, "grads")
    for parameter_name, file_name in names.items():
        value, shape = subject.entry(gradients, file_name, "grads"), W[parameter_name].shape
        shown = f"grads[{file_name!r}]"
        got[parameter_name] = parameter(subject, value, shown, parameter_name, shape, dtype)
    return got


def spreads(
    batch: Batch, name: str, dtype: str, precision: Precision, want: dict[str, Array], samples: int
) -> dict[str, Array]:
    """σ of each answer by noisy runs, at least that of storing the answer, and the oracle's own."""
    c, W, spec, _ = read_back(name, dtype)

    def run(draws: Draws) -> dict[str, Array]:
        noisy_W: dict[str, Any] = {key: noisy(array, precision, draws) for key, array in W.items()}
        return visible_answers(batch, c, spec, noisy_W)

    sigma = spread(run, want, samples, [samples])
    rounding = Rounding(precision)
    # Where the answer is in float64 too, it and the oracle's have rounded independently.
    both = 2**0.5 if precision.accumulation == "float64" else 1.0
    return {
        key: both * np.maximum(sigma[key], np.sqrt(rounding.stored(value)))
        for key, value in want.items()
    }


@lru_cache(maxsize=128)
def expected(
    name: str, dtype: str, number: int, seed: int, precision: Precision
) -> tuple[Batch, dict[str, Array], dict[str, Array]]:
    """The batch of a case, its true answers and their σ."""
    batch = draw(name, Case("", dtype, number, seed))
    c, W, spec, _ = read_back(name, dtype)
    want = visible_answers(batch, c, spec, W)
    return batch, want, spreads(batch, name, dtype, precision, want, SAMPLES)


def _of(name: str, subject: GuardedImplementation, case: Case) -> Any:
    return expected(name, case.dtype, case.number, case.seed, subject.precision(case.dtype))


def compared(
    subject: GuardedImplementation,
    name: str,
    dtype: str,
    batch: Batch,
    want: dict[str, Array],
    sigma: Any,
    fine: bool = True,
) -> list[Comparison]:
    """Loss, logits and gradients beside what is wanted; what is suspicious is sampled again."""
    got, names = ask(subject, name, dtype, batch, fine), read_back(name, dtype)[-1]

    def comparisons(sigma: dict[str, Array]) -> list[Comparison]:
        return [
            Comparison(names.get(key, key), got[key], want[key], sigma[key], MONTE_CARLO)
            for key in want
        ]

    first = comparisons(sigma)
    low, high = SUSPICIOUS
    if not low < max(each.judge().z for each in first) <= high:
        return first
    precision = subject.precision(dtype)
    return comparisons(spreads(batch, name, dtype, precision, want, MORE_SAMPLES))


def _whole(name: str) -> Run:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        batch, want, sigma = _of(name, subject, case)
        return compared(subject, name, case.dtype, batch, want, sigma)

    return run


@lru_cache(maxsize=16)
def expected_of_vector(
    name: str, dtype: str, precision: Precision
) -> tuple[Batch, dict[str, Array], dict[str, Array]]:
    """The same of the stored vector."""
    batch, stored_answers = reference_models.vector(name)
    _, W, _, names = read_back(name, dtype, fine=False)
    want = {
        name_: stored_answers[f"grads.{file_name}"].reshape(W[name_].shape)
        for name_, file_name in names.items()
    }
    want["loss"] = stored_answers["loss"]
    want["logits"] = visible(batch, stored_answers["logits"])
    return batch, want, spreads(batch, name, dtype, precision, want, SAMPLES)


def _vector(name: str) -> Run:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        of_vector = expected_of_vector(name, case.dtype, subject.precision(case.dtype))
        return compared(subject, name, case.dtype, *of_vector, fine=False)

    return run


def _balance(name: str) -> Run:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        batch, _, sigma = _of(name, subject, case)
        _, W, spec, _ = read_back(name, case.dtype)
        got = ask(subject, name, case.dtype, batch)
        for at in spec.scale:
            A, B = W[f"{at}.A"], W[f"{at}.B"]
            dA, dB = long(got[f"{at}.A"]), long(got[f"{at}.B"])
            variance = (B**2).T @ sigma[f"{at}.B"] ** 2 + sigma[f"{at}.A"] ** 2 @ (A**2).T
            left, right = long(B).T @ dB, dA @ long(A).T
            what = f"Bᵀ dB against dA Aᵀ at {at}"
            yield Comparison(what, left, right, np.sqrt(variance), MONTE_CARLO)

    return run


def _padding(name: str) -> Run:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        batch, want, sigma = _of(name, subject, case)
        c, _, _, names = read_back(name, case.dtype)
        got = ask(subject, name, case.dtype, batch)
        more = ask(subject, name, case.dtype, _padded(batch, c.causal))
        for key in (key for key in want if key != "logits"):
            what = f"{names.get(key, key)} with two more columns of padding"
            yield Comparison(what, more[key], got[key], 2**0.5 * sigma[key], MONTE_CARLO)

    return run


def _padded(batch: Batch, causal: bool) -> Batch:
    """The batch with two columns of padding on the right, which change nothing."""

    def wider(array: Array | None, value: int) -> Array | None:
        return None if array is None else np.pad(array, ((0, 0), (0, 2)), constant_values=value)

    return replace(
        batch,
        ids=np.pad(batch.ids, ((0, 0), (0, 2)), constant_values=1),
        mask=wider(batch.real, 0),
        labels=wider(batch.labels, IGNORED) if causal else batch.labels,
        types=wider(batch.types, 0),
    )


def _once(profile: str, dtype: str) -> int:
    """The vectors are of the stored float32 files, which only float32 and float64 hold exactly."""
    return int(dtype in ("float64", "float32"))


def _cases(share: float) -> Callable[[str, str], int]:
    return lambda profile, dtype: max(1, int(CASES[profile] * share))


LAWS: tuple[tuple[str, str, Any, Callable[[str, str], int]], ...] = (
    ("", "Loss, logits and every adapter gradient of {}.", _whole, _cases(1.0)),
    (".vector", "The stored test vector of {}: loss, logits and gradients.", _vector, _once),
    (".balance", "Bᵀ dB = dA Aᵀ at every adapted module of {}.", _balance, _cases(0.5)),
    (".padding", "More padding on the right changes nothing in {}.", _padding, _cases(0.5)),
)

_CHECKS: tuple[Check, ...] = (
    tuple(
        Check(f"model.{name}{law}", "model", ("model_loss",), title.format(name), make(name), cases)
        for name in reference_models.names()
        for law, title, make, cases in LAWS
    )
    + batches.checks()
)

LEVEL = Level(
    "model",
    _CHECKS,
    laws=("*.balance", "*.padding", "*.vector", "adapters"),
    relations=("*.padding",),
    vectors={"*.vector": (("float32", 0),)},
    no_vectors={
        "bert.vector": "a smaller BERT is in the vectors of files: a set stays small",
        "*": "the vectors of the reference models, and those of files, ask the same",
    },
    cases=None,
    axes=batches.AXES,
    is_possible=batches.is_possible,
)
