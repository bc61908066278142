"""Level ``model``: loss, logits and every adapter gradient of whole models, from files."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from minilora import reference
from minilora.formats.files import pack_json, read_json, read_tensors, write_files, write_tensors
from minilora.formats.huggingface import read_model
from minilora.formats.peft import adapter_names, read_adapter
from minilora.lora import Tuning, Weights
from minilora.models import Batch, Config, logits, loss
from minilora.ops import IGNORED
from minilora.tasks import draw_batch
from minilora.verify.cases import long
from minilora.verify.check import MONTE_CARLO, Case, Check, Comparison
from minilora.verify.contract import DTYPES, Precision, Subject
from minilora.verify.tolerance import Rounding, noisy, spread

Array = np.ndarray

CASES = {"quick": 1, "ci": 2, "nightly": 40}
SAMPLES, MORE_SAMPLES = 16, 256
SUSPICIOUS = 6.0, 12.0
"""z between these is looked at again: 16 samples know sigma to 18 % only, 256 to 4 %."""


@cache
def _workshop() -> Path:
    """A folder for the models in each dtype, gone when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="minilora-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def stored(name: str, dtype: str) -> tuple[Path, Path]:
    """The folders of the reference model and of its adapter, all tensors in the dtype under test."""
    source, target = reference.folder() / name, _workshop() / f"{name}-{dtype}"
    for part in ("base", "adapter"):
        (target / part).mkdir(parents=True)
        for path in sorted((source / part).iterdir()):
            if path.suffix == ".safetensors":
                arrays = {k: v.astype(DTYPES[dtype]) for k, v in read_tensors(path).items()}
                write_tensors(target / part / path.name, arrays, {"format": "pt"})
            elif path.name == "config.json":
                config = read_json(path) | {"dtype": dtype}
                write_files(target / part, {path.name: lambda config=config: pack_json(config)})
            else:
                shutil.copyfile(path, target / part / path.name)
    return target / "base", target / "adapter"


@cache
def opened(name: str, dtype: str) -> tuple[Config, Weights, Tuning, dict[str, str]]:
    """What is in those folders, in float64, and the names of the adapter's tensors in its file."""
    base, adapter = stored(name, dtype)
    c, W = read_model(base, np.float64)
    factors, tuning = read_adapter(adapter, c, np.float64)
    return c, W | factors, tuning, adapter_names(c, tuning.trained)


def answers(batch: Batch, W: Weights, c: Config, tuning: Tuning) -> dict[str, Any]:
    """Loss, logits and gradients by the specification, over any number system."""
    L, back = loss(batch, W, c, tuning)
    z, _ = logits(batch, W, c, tuning)
    return {"loss": L, "logits": z} | back(np.float64(1.0))


def draw(name: str, case: Case) -> Batch:
    """The batch of a case: padding on both sides, ignored labels, unequal counts."""
    adapter_task = reference.tasks(name)[1]
    return draw_batch(adapter_task, case.rng())


def as_dict(batch: Batch) -> dict[str, Array]:
    """A batch as the contract has it: int64 arrays under Hugging Face's names."""
    given = {"input_ids": batch.ids, "labels": batch.labels, "attention_mask": batch.real}
    if batch.types is not None:
        given["token_type_ids"] = batch.types
    return {name: array.astype(np.int64) for name, array in given.items() if array is not None}


def visible(batch: Batch, z: Array) -> Array:
    """The logits (rows, classes) that mean something: at real tokens, or of each sequence."""
    return z[batch.real] if z.ndim == 3 else z


def ask(
    subject: Subject, name: str, dtype: str, batch: Batch
) -> dict[str, Array]:
    """The implementation's loss, logits and gradients, by the names of the specification."""
    c, W, tuning, names = opened(name, dtype)
    base, adapter = stored(name, dtype)
    answer = subject.call("model_loss", str(base), str(adapter), as_dict(batch))
    classes = len(W["head.weight"]) if "head.weight" in W else c.vocab
    shape = (*batch.ids.shape, classes) if c.causal else (len(batch.ids), classes)
    got = {
        "loss": subject.answer(subject.entry(answer, "loss"), "loss", (), dtype),
        "logits": subject.answer(subject.entry(answer, "logits"), "logits", shape, dtype),
    }
    gradients = subject.entry(answer, "grads")
    for own, theirs in names.items():
        wanted = W[own].shape if W[own].shape[1] > 1 or own.endswith((".A", ".B")) else (len(W[own]),)
        g = subject.answer(subject.entry(gradients, theirs, "grads"), f"grads[{theirs!r}]", wanted, dtype)
        got[own] = g.reshape(W[own].shape)
    return got


def _outside(batch: Batch, answer: dict[str, Any], causal: bool) -> dict[str, Array]:
    """The specification's answers with logits (rows, classes) at what is visible."""
    z = np.asarray(answer["logits"]).T
    z = z.reshape(*batch.ids.shape, -1) if causal else z
    return {name: np.asarray(v) for name, v in answer.items()} | {"logits": visible(batch, z)}


def spreads(
    batch: Batch, name: str, dtype: str, precision: Precision, want: dict[str, Array], samples: int
) -> dict[str, Array]:
    """σ of each answer by noisy runs, at least that of storing the answer, and the oracle's own."""
    c, W, tuning, _ = opened(name, dtype)

    def run(rng: np.random.Generator) -> dict[str, Array]:
        noisy_W = {key: noisy(array, precision, rng) for key, array in W.items()}
        return _outside(batch, answers(batch, noisy_W, c, tuning), c.causal)

    sigma = spread(run, want, samples, [samples])
    rounding = Rounding(precision)
    # Where the answer is in float64 too, it and the oracle's have rounded independently.
    both = 2**0.5 if precision.accumulation == "float64" else 1.0
    return {
        key: both * np.maximum(sigma[key], np.sqrt(rounding.stored(value)))
        for key, value in want.items()
    }


def _whole(name: str) -> Callable[[Subject, Case], Iterable[Comparison]]:
    def run(subject: Subject, case: Case) -> Iterable[Comparison]:
        batch = draw(name, case)
        c, W, tuning, names = opened(name, case.dtype)
        got = ask(subject, name, case.dtype, batch)
        got["logits"] = visible(batch, got["logits"])
        want = _outside(batch, answers(batch, W, c, tuning), c.causal)
        precision = subject.precision(case.dtype)

        def compared(samples: int) -> list[Comparison]:
            sigma = spreads(batch, name, case.dtype, precision, want, samples)
            return [
                Comparison(names.get(key, key), got[key], want[key], sigma[key], MONTE_CARLO)
                for key in want
            ]

        comparisons = compared(SAMPLES)
        worst = max(c.judge().z for c in comparisons)
        low, high = SUSPICIOUS
        return compared(MORE_SAMPLES) if low < worst <= high else comparisons

    return run


def _balance(name: str) -> Callable[[Subject, Case], Iterable[Comparison]]:
    def run(subject: Subject, case: Case) -> Iterable[Comparison]:
        batch = draw(name, case)
        c, W, tuning, _ = opened(name, case.dtype)
        got = ask(subject, name, case.dtype, batch)
        want = _outside(batch, answers(batch, W, c, tuning), c.causal)
        sigma = spreads(batch, name, case.dtype, subject.precision(case.dtype), want, SAMPLES)
        for at in tuning.scale:
            A, B = W[f"{at}.A"], W[f"{at}.B"]
            dA, dB = long(got[f"{at}.A"]), long(got[f"{at}.B"])
            variance = (B**2).T @ sigma[f"{at}.B"] ** 2 + sigma[f"{at}.A"] ** 2 @ (A**2).T
            yield Comparison(
                f"Bᵀ dB against dA Aᵀ at {at}", long(B).T @ dB, dA @ long(A).T, np.sqrt(variance), MONTE_CARLO
            )

    return run


def _padding(name: str) -> Callable[[Subject, Case], Iterable[Comparison]]:
    def run(subject: Subject, case: Case) -> Iterable[Comparison]:
        batch = draw(name, case)
        c, W, tuning, names = opened(name, case.dtype)
        got = ask(subject, name, case.dtype, batch)
        more = ask(subject, name, case.dtype, _padded(batch, c.causal))
        want = _outside(batch, answers(batch, W, c, tuning), c.causal)
        sigma = spreads(batch, name, case.dtype, subject.precision(case.dtype), want, SAMPLES)
        for key in (key for key in want if key != "logits"):
            array = f"{names.get(key, key)} with two more columns of padding"
            yield Comparison(array, more[key], got[key], 2**0.5 * sigma[key], MONTE_CARLO)

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


def _cases(share: float) -> Callable[[str, str], int]:
    return lambda profile, dtype: max(1, int(CASES[profile] * share))


LAWS: tuple[tuple[str, str, Any, float], ...] = (
    ("", "Loss, logits and every adapter gradient of {}.", _whole, 1.0),
    (".balance", "Bᵀ dB = dA Aᵀ at every site of {}.", _balance, 0.5),
    (".padding", "More padding on the right changes nothing in {}.", _padding, 0.5),
)

CHECKS: tuple[Check, ...] = tuple(
    Check(f"model.{name}{law}", "model", ("model_loss",), title.format(name), make(name), _cases(share))
    for law, title, make, share in LAWS
    for name in reference.names()
)
