"""Small models on batches of every kind: of one row, without padding, padded on either side, long.

A path of its own for what is not padded, or for a single row, is easily wrong, and so is a mask
that reaches only so far. Each pair of values of the axes is in some case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from minilora.io.formats.peft import write_adapter
from minilora.spec.models import Batch, Config
from minilora.spec.target_modules import LoraConfig
from minilora.verify.checks import tiny_models
from minilora.verify.checks.model_answers import (
    as_dict,
    loss_and_logits,
    parameter,
    sigma_of,
    visible_answers,
    wanted_and_sigma,
)
from minilora.verify.checks.tiny_models import TinyModel
from minilora.verify.core.axes import Axis
from minilora.verify.core.combinations import Row, pairwise
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.types import MONTE_CARLO, Case, Check, Comparison
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray
Answer = tuple[dict[str, Array], dict[str, Array]]
"""The true answers, and their σ in float32."""

PLAIN = LoraConfig(r=3, lora_alpha=7, target_modules=("q", "v", "down"))

MODELS: dict[str, tuple[Config, LoraConfig]] = {
    "Llama": (tiny_models.LLAMA, PLAIN),
    "two layers": (tiny_models.DEEP, replace(PLAIN, lora_alpha=-5)),
    "GPT-2": (
        tiny_models.GPT_2,
        replace(PLAIN, use_rslora=True, target_modules=("qkv", "o", "down")),
    ),
    "BERT": (tiny_models.BERT, replace(PLAIN, target_modules=("q", "o", "down"))),
}
"""A model of each architecture, and its adapter."""

LENGTHS = {"up to 32": 7, "beyond 32": 40, "beyond 64": 70}
"""The tokens of a row."""


def padding_of(mask: Array) -> str:
    """On which side there is padding: ``none``, ``right``, ``left``, or ``both``."""
    mask = np.asarray(mask, bool)
    sides = {"left": not mask[:, 0].all(), "right": not mask[:, -1].all()}
    return {0: "none", 2: "both"}.get(sum(sides.values())) or max(sides, key=lambda s: sides[s])


def _batch(given: Mapping[str, Any]) -> Mapping[str, Array]:
    batch: Mapping[str, Array] = given["batch"]
    return batch


def _rows(given: Mapping[str, Any]) -> str:
    b = len(_batch(given)["input_ids"])
    return "one" if b == 1 else "several"


def _length(given: Mapping[str, Any]) -> str:
    t = _batch(given)["input_ids"].shape[1]
    return "beyond 64" if t > 64 else "beyond 32" if t > 32 else "up to 32"


def _ignored(given: Mapping[str, Any]) -> bool:
    batch = _batch(given)
    labels = batch["labels"]
    if labels.ndim == 1:
        return bool((labels < 0).any())
    real = np.asarray(batch["attention_mask"], bool)  # the first of a row is predicted by nothing
    before = np.pad(real, ((0, 0), (1, 0)))[:, :-1]
    return bool((labels[real & before] < 0).any())


def _architecture(given: Mapping[str, Any]) -> str | None:
    """The architecture of a small model, by its folder's name; None of other models."""
    return next((name for name in MODELS if f"-{name}-" in str(given["model_dir"])), None)


AXES = (
    Axis("model", tuple(MODELS), _architecture),
    Axis("rows", ("one", "several"), _rows),
    Axis(
        "padding",
        ("none", "right", "left", "both"),
        lambda g: padding_of(_batch(g)["attention_mask"]),
    ),
    Axis("tokens", tuple(LENGTHS), _length),
    Axis("ignored labels", (False, True), _ignored),
)


def is_possible(row: Mapping[str, Any]) -> bool:
    """A classifier reads the first token; one row has padding on one side, and needs its label."""
    if row.get("model") == "BERT" and row.get("padding") in ("left", "both"):
        return False
    if row.get("rows") == "one":
        is_classifier = row.get("model") == "BERT" and row.get("ignored labels")
        return row.get("padding") != "both" and not is_classifier
    return True


@cache
def rows_of_axes() -> list[Row]:
    """The rows of the axes, the shortest first."""
    rows = pairwise({axis.name: axis.values for axis in AXES}, is_possible)
    return sorted(rows, key=lambda row: LENGTHS[row["tokens"]])


@lru_cache(maxsize=64)
def draw_case(number: int, seed: int) -> tuple[str, TinyModel, Batch]:
    """The model and the batch of a case, the same in every dtype."""
    row = rows_of_axes()[number % len(rows_of_axes())]
    c, lora = MODELS[row["model"]]
    rng = tiny_models.rng_of(Case("", "", number, seed), "model.batches")
    model = tiny_models.draw(c, lora, rng)
    b, t = {"one": 1, "several": 2}[row["rows"]], LENGTHS[row["tokens"]]
    batch = tiny_models.draw_padded(rng, c, b, t, row["padding"], row["ignored labels"])
    return row["model"], model, batch


@lru_cache(maxsize=64)
def expected(number: int, seed: int) -> Answer:
    """The true answers of a case, and their σ in float32."""
    _, model, batch = draw_case(number, seed)
    run = partial(visible_answers, batch, model.c, model.spec)
    return wanted_and_sigma(run, model.W, model.c.causal, (number, seed))


def compared(
    subject: GuardedImplementation,
    case: Case,
    model: TinyModel,
    paths: Iterable[Path],
    batch: Batch,
    known: Answer,
) -> Iterable[Comparison]:
    """Loss, logits and gradients beside the true ones."""
    want, sampled = known
    answer = subject.call("model_loss", *map(str, paths), as_dict(batch))
    classes = len(model.W["head.weight"]) if "head.weight" in model.W else model.c.vocab
    got = loss_and_logits(subject, answer, batch, classes, model.c.causal, case.dtype)
    gradients, names = subject.entry(answer, "grads"), model.names()
    for own, theirs in names.items():
        value, shape = subject.entry(gradients, theirs, "grads"), model.W[own].shape
        got[own] = parameter(subject, value, f"grads[{theirs!r}]", own, shape, case.dtype)
    for name, array in want.items():
        sigma = sigma_of(sampled[name], array, subject.precision(case.dtype))
        yield Comparison(names.get(name, name), got[name], array, sigma, MONTE_CARLO)


def batches(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Batches of one row, without padding, padded on the left, on the right, and long ones."""
    name, model, batch = draw_case(case.number, case.seed)
    key = (f"batches-{name}", case.number, case.seed)
    paths = tiny_models.folders(key, case.dtype, lambda: model)
    yield from compared(subject, case, model, paths, batch, expected(case.number, case.seed))


@lru_cache(maxsize=16)
def draw_two(number: int, seed: int) -> tuple[str, tuple[TinyModel, TinyModel], Batch]:
    """A model, the same with another adapter of the same shapes, and a batch."""
    name = tuple(MODELS)[number % len(MODELS)]
    c, lora = MODELS[name]
    rng = tiny_models.rng_of(Case("", "", number, seed), "model.adapters")
    model = tiny_models.draw(c, lora, rng)
    other = {n: -2 * v[::-1] if n.endswith(".A") else v for n, v in model.W.items()}
    batch = tiny_models.draw_padded(rng, c, 1 + number % 2, 6, "right", False)
    return name, (model, replace(model, W=other)), batch


@lru_cache(maxsize=16)
def expected_of_two(number: int, seed: int) -> tuple[Answer, ...]:
    """The true answers with each of the two adapters."""
    _, models, batch = draw_two(number, seed)
    return tuple(
        wanted_and_sigma(
            partial(visible_answers, batch, m.c, m.spec), m.W, m.c.causal, (number, seed)
        )
        for m in models
    )


def adapters(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Another adapter of the same model, and then the first again, on one object."""
    name, models, batch = draw_two(case.number, case.seed)
    key = (f"adapters-{name}", case.number, case.seed)
    base, first = tiny_models.folders(key, case.dtype, lambda: models[0])
    second, model = first.with_name("other"), models[1]
    if not second.exists():
        W = {name: array.astype(DTYPES[case.dtype]) for name, array in model.W.items()}
        write_adapter(second, model.c, W, model.spec, model.lora)
    known = expected_of_two(case.number, case.seed)
    for turn, i in (("", 0), (" of another adapter", 1), (" of the first again", 0)):
        path = (first, second)[i]
        for each in compared(subject, case, models[i], (base, path), batch, known[i]):
            yield replace(each, array=f"{each.array}{turn}")


def _cases(counts: Mapping[str, int]) -> Callable[[str, str], int]:
    """σ is known in float32, and in dtypes whose σ is proportional to it."""
    return lambda profile, dtype: counts[profile] * (dtype in ("float64", "float32"))


def checks() -> tuple[Check, ...]:
    """The checks of the level ``model`` that small models show."""
    counts = {"quick": 2, "ci": len(rows_of_axes()), "nightly": 10 * len(rows_of_axes())}
    few = {"quick": 1, "ci": 2, "nightly": 20}
    return tuple(
        Check(
            f"model.{run.__name__}",
            "model",
            ("model_loss",),
            (run.__doc__ or "").splitlines()[0],
            run,
            _cases(count),
        )
        for run, count in ((batches, counts), (adapters, few))
    )
