"""Level ``train``: whole steps of training, from a model, its adapter and batches in files.

What a loop around the layers can do wrong: the shift of the labels, those that are ignored,
padding, the mean over micro-batches of unequal counts, clipping, the schedule, decay, LoRA+. A step
is a list of micro-batches whose mean is over all labels that count in them, so that it is the step
of one batch that holds them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from minilora.spec.lora import Variant, Weights
from minilora.spec.models import Batch, Config
from minilora.spec.optim import accumulate, global_norm
from minilora.spec.target_modules import LoraConfig
from minilora.spec.variants import DORA
from minilora.verify.checks import tiny_models
from minilora.verify.checks.model import as_dict
from minilora.verify.checks.tiny_models import Small
from minilora.verify.checks.variants import variant
from minilora.verify.core.dtypes import Precision
from minilora.verify.core.inputs import long
from minilora.verify.core.level import Level
from minilora.verify.core.tolerance import Rounding, unit_roundoff
from minilora.verify.core.types import MONTE_CARLO, Case, Check, Comparison
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.minilora_impl import parts_of, trained

Array = np.ndarray

CASES = {"quick": 1, "ci": 1, "nightly": 20}
STEPS = 6
SAMPLES = 16
SILENT = 2
"""The step in which no label of a micro-batch counts."""

ADAPTED = ("q", "v", "down")
PLAIN = LoraConfig(r=3, lora_alpha=7, target_modules=ADAPTED)
SGD = {"optimizer": "sgd", "lr": 0.25, "momentum": 0.0, "weight_decay": 0.0}
ADAMW = {
    "optimizer": "adamw", "lr": 0.02, "betas": (0.8, 0.95), "eps": 0.003, "weight_decay": 0.0,
}  # fmt: skip

MEDIAN = -1.0
"""Stands for the median of the norms that a case's gradients have along the way."""

Kind = tuple[Config, LoraConfig, dict[str, Any], tuple[int, ...], str]

KINDS: dict[str, Kind] = {
    "labels": (
        tiny_models.LLAMA, PLAIN, SGD, (3,),
        "each token predicts the next; ignored labels and padding on either side do not count",
    ),
    "prompt": (
        tiny_models.GPT_2,
        LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=("qkv", "o", "down")),
        SGD, (3,), "the loss is over the answer, and not over the prompt",
    ),
    "gradient-accumulation": (
        tiny_models.LLAMA, PLAIN, SGD, (3, 1, 2),
        "a step's loss is the mean over the labels of all its micro-batches, one of which has none",
    ),
    "clip": (
        tiny_models.LLAMA, PLAIN,
        {**SGD, "lr": 0.125, "momentum": 0.5, "weight_decay": 0.25, "max_grad_norm": MEDIAN},
        (2, 1),
        "the gradient of a step is clipped by its global norm in about half of the steps",
    ),
    "linear-schedule": (
        tiny_models.LLAMA, PLAIN,
        {**ADAMW, "schedule": "linear", "warmup_steps": 2, "total_steps": STEPS + 1}, (2,),
        "AdamW under a linear schedule with warmup, counted in steps",
    ),
    "cosine-schedule": (
        tiny_models.LLAMA, PLAIN,
        {**ADAMW, "schedule": "cosine", "total_steps": STEPS + 2}, (1, 2),
        "AdamW under a cosine schedule without warmup, counted in steps, not in micro-batches",
    ),
    "weight-decay": (
        tiny_models.QWEN2,
        LoraConfig(
            r=3, lora_alpha=7, target_modules=ADAPTED, bias="lora_only",
            modules_to_save=("head.weight",),
        ),
        {**ADAMW, "weight_decay": 0.5}, (2,),
        "AdamW decays all trained parameters: a bias, a fully trained head, each A while B = 0",
    ),
    "no-weight-decay": (
        tiny_models.LLAMA, PLAIN, ADAMW, (2,),
        "without weight decay, nothing decays",
    ),
    "loraplus": (
        tiny_models.LLAMA, PLAIN,
        {
            **ADAMW, "loraplus_lr_ratio": 4.0, "weight_decay": 0.5, "schedule": "constant",
            "warmup_steps": 2,
        },
        (2,),
        "LoRA+: a higher learning rate for each B; a constant schedule has warmup, too",
    ),
    "loraplus.other-params": (
        tiny_models.QWEN2,
        LoraConfig(
            r=3, lora_alpha=7, target_modules=("embed", "q", "down"), bias="lora_only",
            modules_to_save=("head.weight",),
        ),
        {**ADAMW, "loraplus_lr_ratio": 4.0}, (2,),
        "LoRA+: an embedding's B has its rate; a bias and a fully trained head have not",
    ),
    "classifier": (
        tiny_models.BERT,
        LoraConfig(
            r=3, lora_alpha=7, target_modules=("q", "o", "down"), bias="lora_only",
            modules_to_save=("head.weight", "head.bias"),
        ),
        ADAMW, (3, 2),
        "a classifier's loss is over the labels of its sequences",
    ),
    "dora": (
        tiny_models.LLAMA,
        LoraConfig(r=3, lora_alpha=7, target_modules=("q", "o"), variant="dora"), SGD, (2,),
        "DoRA's magnitudes are trained",
    ),
    "combined": (
        tiny_models.DEEP, LoraConfig(r=2, lora_alpha=5, use_rslora=True, target_modules=ADAPTED),
        {
            **ADAMW, "weight_decay": 0.25, "max_grad_norm": MEDIAN, "schedule": "linear",
            "warmup_steps": 2, "total_steps": STEPS + 2, "loraplus_lr_ratio": 3.0,
            "gradient_checkpointing": True,
        },
        (2, 1, 3),
        "unequal micro-batches, clipping, a schedule, decay, LoRA+ and checkpointing at once",
    ),
}  # fmt: skip
"""The model, its adapter, the settings, the rows of each micro-batch, and the law in words."""


@lru_cache(maxsize=64)
def drawn(kind: str, number: int, seed: int) -> tuple[Small, list[list[Batch]]]:
    """The model of a case and the micro-batches of each step, the same in every dtype."""
    c, lora, _, rows, _ = KINDS[kind]
    rng = tiny_models.rng_of(Case("", "", number, seed), f"train.{kind}")
    of = tiny_models.draw(c, lora, rng)
    steps = [
        [
            tiny_models.draw_batch(rng, c, b, 5 + (k + i) % 4, kind == "prompt")
            for i, b in enumerate(rows)
        ]
        for k in range(STEPS)
    ]
    if kind == "weight-decay":
        of = tiny_models.begun(of)
    if kind == "labels":
        steps = [
            [tiny_models.padded_left(batch) for batch in step] if k % 2 else step
            for k, step in enumerate(steps)
        ]
    if kind == "gradient-accumulation":
        steps[SILENT][1] = tiny_models.silent(steps[SILENT][1])
    return of, steps


def computed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that change numbers."""
    return {name: value for name, value in settings.items() if name != "gradient_checkpointing"}


def history(of: Small, W: Weights, steps: list[list[Batch]], settings: Any) -> dict[str, Array]:
    """Every trained parameter after every step, as ``name after step k``."""
    names = of.names()
    return {
        f"{names[name]} after step {k}": array
        for k, after in enumerate(trained(of.c, W, of.tuning, steps, computed(settings)), 1)
        for name, array in after.items()
    }


def norms(of: Small, steps: list[list[Batch]], history: list[Weights]) -> list[float]:
    """The norm of each step's whole gradient, before it is clipped."""
    befores = [of.trained, *history[:-1]]
    return [
        float(global_norm(accumulate(parts_of(of.c, of.W | before, of.tuning, step))))
        for before, step in zip(befores, steps, strict=True)
    ]


@lru_cache(maxsize=64)
def settings_of(kind: str, number: int, seed: int) -> dict[str, Any]:
    """The settings of a case, whose clipping about half of the steps exceed."""
    settings = dict(KINDS[kind][2])
    if settings.get("max_grad_norm") == MEDIAN:
        of, steps = drawn(kind, number, seed)
        settings["max_grad_norm"] = 1.0
        for _ in range(2):  # where another maximum clips, the way is another
            history = trained(of.c, of.W, of.tuning, steps, computed(settings))
            settings["max_grad_norm"] = round(float(np.median(norms(of, steps, history))), 2)
    return settings


@lru_cache(maxsize=64)
def expected(
    kind: str, number: int, seed: int, dora: Variant = DORA
) -> tuple[dict[str, Array], dict[str, Array]]:
    """What is wanted in a case, and its σ in float32. How DoRA's norm is taken is declared."""
    of, steps = drawn(kind, number, seed)
    of = replace(of, tuning=replace(of.tuning, variant=dict.fromkeys(of.tuning.variant, dora)))
    return wanted(of, steps, settings_of(kind, number, seed), (number, seed))


def wanted(
    of: Small, steps: list[list[Batch]], settings: dict[str, Any], seed: tuple[int, ...]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Every trained parameter after every step, in long double, and its σ in float32.

    σ is the root mean square, over some runs of the specification in float32 whose weights are
    rounded at random first, of what they differ by: rounding carries through the steps as it does.
    BERT's erf has no long double: what is wanted has rounded too then, as float64 does.
    """
    exact, both = (long, 1.0) if of.c.causal else (np.asarray, 2**0.5)
    want = history(of, {name: exact(v) for name, v in of.W.items()}, steps, settings)
    rng = np.random.default_rng(seed)
    u, squares = unit_roundoff("float32"), {what: np.zeros(v.shape) for what, v in want.items()}
    for _ in range(SAMPLES):
        W = {n: (v * (1 + u * rng.uniform(-1, 1, v.shape))).astype("f") for n, v in of.W.items()}
        for what, array in history(of, W, steps, settings).items():
            squares[what] += (array - want[what].astype(np.float64)) ** 2
    return want, {what: both * np.sqrt(total / SAMPLES) for what, total in squares.items()}


def sigma_of(sampled: Array, want: Array, precision: Precision) -> Array:
    """σ of float32 scaled to a precision: rounding is proportional to u; at least that of storing.

    An element may come out right in all samples by chance: it has the mean variance of the array.
    """
    mean = np.sqrt(np.mean(sampled**2))
    scale = unit_roundoff(precision.accumulation) / unit_roundoff("float32")
    stored = np.sqrt(Rounding(precision).stored(want.astype(np.float64)))
    sigma: Array = np.maximum(scale * np.hypot(sampled, mean), stored)
    return sigma


def ask(
    subject: GuardedImplementation, of: Small, where: Any, steps: Any, settings: Any, dtype: str
) -> Any:
    """The implementation's adapter after each step: (name, parameter, step, array)."""
    given = [[as_dict(batch) for batch in step] for step in steps]
    answer = subject.call("train", *map(str, where), given, dict(settings))
    for k, after in enumerate(subject.items(answer, len(steps), "the list of steps"), 1):
        for name, theirs in of.names().items():
            shape = of.W[name].shape
            flat = shape if shape[1] > 1 or name.endswith((".A", ".B")) else shape[:1]
            entry = subject.entry(after, theirs, f"step {k}")
            got = subject.answer(entry, f"{theirs} after step {k}", flat, dtype)
            yield theirs, name, k, got.reshape(shape)


def compared(
    subject: GuardedImplementation, dtype: str, got: Iterable[Any], want: Any, sampled: Any
) -> Iterable[Comparison]:
    """What was got beside what is wanted."""
    for theirs, _, k, array in got:
        what = f"{theirs} after step {k}"
        sigma = sigma_of(sampled[what], want[what], subject.precision(dtype))
        yield Comparison(what, array, want[what], sigma, MONTE_CARLO)


def _steps(kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        of, steps = drawn(kind, case.number, case.seed)
        key = (f"train-{kind}", case.number, case.seed)
        where = tiny_models.folders(key, case.dtype, partial(_small, kind, case.number, case.seed))
        settings = settings_of(kind, case.number, case.seed)
        want, sampled = expected(kind, case.number, case.seed, variant("dora", subject))
        yield from compared(
            subject, case.dtype, ask(subject, of, where, steps, settings, case.dtype), want, sampled
        )

    return run


def repeat(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Training again from the same folders starts from the same weights."""
    run = _steps("labels")
    for _ in run(subject, case):
        pass
    yield from run(subject, case)


def _small(kind: str, number: int, seed: int) -> Small:
    return drawn(kind, number, seed)[0]


def _cases(profile: str, dtype: str) -> int:
    """Training in a half precision is another matter: of master weights and scaled losses."""
    return CASES[profile] * (dtype in ("float64", "float32"))


_CHECKS: tuple[Check, ...] = (
    *(
        Check(
            f"train.{kind}",
            "train",
            ("train",),
            f"{words[0].upper()}{words[1:]}.",
            _steps(kind),
            _cases,
        )
        for kind, (*_, words) in KINDS.items()
    ),
    Check("train.repeat", "train", ("train",), repeat.__doc__ or "", repeat, _cases),
)

LEVEL = Level("train", _CHECKS, cases=None, quick="combined")
