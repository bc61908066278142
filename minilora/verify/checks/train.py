"""Level ``train``: whole steps of training, from a model, its adapter and batches in files.

Bugs of a training loop: the shift of the labels, ignored labels, padding, the mean over
micro-batches of unequal counts, clipping, the schedule, decay, LoRA+. A step is a list of
micro-batches; its loss is the mean over all their labels, as of one batch with all rows.
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
from minilora.verify.checks.model_answers import as_dict, parameter, sigma_of, wanted_and_sigma
from minilora.verify.checks.tiny_models import TinyModel
from minilora.verify.checks.variants import variant
from minilora.verify.core.level import Level
from minilora.verify.core.types import MONTE_CARLO, Case, Check, Comparison
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.minilora_impl import micro_batch_gradients, trained

Array = np.ndarray

CASES = {"quick": 1, "ci": 1, "nightly": 20}
STEPS = 6
MORE = {"weight-decay": 12}
"""The steps of the kinds that have more."""

LONG = 4
"""The step whose batch is a single row, longer than 32 tokens."""

SILENT = 2
"""The step in which a micro-batch has no labels."""

ADAPTED = ("q", "v", "down")
PLAIN = LoraConfig(r=3, lora_alpha=7, target_modules=ADAPTED)
SGD = {"optimizer": "sgd", "lr": 0.25, "momentum": 0.0, "weight_decay": 0.0}
ADAMW = {
    "optimizer": "adamw", "lr": 0.02, "betas": (0.8, 0.95), "eps": 0.003, "weight_decay": 0.0,
}  # fmt: skip

MEDIAN = -1.0
"""Replaced by the median of the gradient norms of a case."""

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
    "partial-step": (
        tiny_models.QWEN2,
        LoraConfig(
            r=3, lora_alpha=7, target_modules=ADAPTED, bias="lora_only",
            modules_to_save=("head.weight",),
        ),
        {**SGD, "lr": 0.125, "max_grad_norm": MEDIAN}, (2, 1),
        "the last step has one micro-batch where others have two; a bias and a head count in the "
        "norm that is clipped",
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


def _draw_batch(rng: np.random.Generator, c: Config, kind: str, b: int, k: int, i: int) -> Batch:
    """Of b rows, with padding on either side or none by turns; one is a single long row."""
    t = 5 + (k + i) % 4
    if kind in ("prompt", "gradient-accumulation"):
        return tiny_models.draw_batch(rng, c, b, t, kind == "prompt")
    if kind == "labels" and k == LONG:
        return tiny_models.draw_padded(rng, c, 1, 40, "none", True)
    sides = ("right", "none") if not c.causal or b == 1 else ("right", "left", "none", "both")
    return tiny_models.draw_padded(rng, c, b, t, sides[(k + i) % len(sides)], True)


@lru_cache(maxsize=64)
def draw_case(kind: str, number: int, seed: int) -> tuple[TinyModel, list[list[Batch]]]:
    """The model of a case and the micro-batches of each step, the same in every dtype."""
    c, lora, _, rows, _ = KINDS[kind]
    rng = tiny_models.rng_of(Case("", "", number, seed), f"train.{kind}")
    model = tiny_models.draw(c, lora, rng)
    steps = [
        [_draw_batch(rng, c, kind, b, k, i) for i, b in enumerate(rows)]
        for k in range(MORE.get(kind, STEPS))
    ]
    if kind == "weight-decay":
        model = tiny_models.at_start(model)
    if kind == "partial-step":
        steps[-1] = steps[-1][:1]
    if kind == "gradient-accumulation":
        steps[SILENT][1] = tiny_models.without_labels(steps[SILENT][1])
    return model, steps


def numerical_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that change the result."""
    return {name: value for name, value in settings.items() if name != "gradient_checkpointing"}


def history(
    model: TinyModel, W: Weights, steps: list[list[Batch]], settings: Any
) -> dict[str, Array]:
    """Every trained parameter after every step, as ``name after step k``."""
    names = model.names()
    return {
        f"{names[name]} after step {k}": array
        for k, after in enumerate(
            trained(model.c, W, model.spec, steps, numerical_settings(settings)), 1
        )
        for name, array in after.items()
    }


def norms(model: TinyModel, steps: list[list[Batch]], history: list[Weights]) -> list[float]:
    """The global norm of each step's gradient, before clipping."""
    before_steps = [model.trained, *history[:-1]]
    return [
        float(
            global_norm(
                accumulate(micro_batch_gradients(model.c, model.W | params, model.spec, step))
            )
        )
        for params, step in zip(before_steps, steps, strict=True)
    ]


@lru_cache(maxsize=64)
def settings_of(kind: str, number: int, seed: int) -> dict[str, Any]:
    """The settings of a case; about half of its steps are clipped."""
    settings = dict(KINDS[kind][2])
    if settings.get("max_grad_norm") == MEDIAN:
        model, steps = draw_case(kind, number, seed)
        settings["max_grad_norm"] = 1.0
        for _ in range(2):  # clipping changes the norms of later steps
            history = trained(model.c, model.W, model.spec, steps, numerical_settings(settings))
            settings["max_grad_norm"] = round(float(np.median(norms(model, steps, history))), 2)
    return settings


@lru_cache(maxsize=64)
def expected(
    kind: str, number: int, seed: int, dora: Variant = DORA
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The true answers of a case, and their σ in float32; ``dora`` is DoRA's declared equation."""
    model, steps = draw_case(kind, number, seed)
    model = replace(
        model, spec=replace(model.spec, variant=dict.fromkeys(model.spec.variant, dora))
    )
    return wanted(model, steps, settings_of(kind, number, seed), (number, seed))


def wanted(
    model: TinyModel, steps: list[list[Batch]], settings: dict[str, Any], seed: tuple[int, ...]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Every trained parameter after every step, in long double, and its σ in float32."""
    return wanted_and_sigma(
        lambda W: history(model, W, steps, settings), model.W, model.c.causal, seed
    )


def ask(
    subject: GuardedImplementation,
    model: TinyModel,
    paths: Any,
    steps: Any,
    settings: Any,
    dtype: str,
) -> Any:
    """The implementation's adapter after each step: (name, parameter, step, array)."""
    batches = [[as_dict(batch) for batch in step] for step in steps]
    answer = subject.call("train", *map(str, paths), batches, dict(settings))
    for k, after in enumerate(subject.items(answer, len(steps), "the list of steps"), 1):
        for name, file_name in model.names().items():
            value = subject.entry(after, file_name, f"step {k}")
            shown, shape = f"{file_name} after step {k}", model.W[name].shape
            yield file_name, name, k, parameter(subject, value, shown, name, shape, dtype)


def compared(
    subject: GuardedImplementation, dtype: str, got: Iterable[Any], want: Any, sampled: Any
) -> Iterable[Comparison]:
    """The trained parameters beside the true ones."""
    for file_name, _, k, array in got:
        label = f"{file_name} after step {k}"
        sigma = sigma_of(sampled[label], want[label], subject.precision(dtype))
        yield Comparison(label, array, want[label], sigma, MONTE_CARLO)


def _steps(kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        model, steps = draw_case(kind, case.number, case.seed)
        key = (f"train-{kind}", case.number, case.seed)
        paths = tiny_models.folders(key, case.dtype, partial(_small, kind, case.number, case.seed))
        settings = settings_of(kind, case.number, case.seed)
        want, sampled = expected(kind, case.number, case.seed, variant("dora", subject))
        yield from compared(
            subject,
            case.dtype,
            ask(subject, model, paths, steps, settings, case.dtype),
            want,
            sampled,
        )

    return run


def repeat(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Training again from the same folders starts from the same weights."""
    run = _steps("labels")
    for _ in run(subject, case):
        pass
    yield from run(subject, case)


def _small(kind: str, number: int, seed: int) -> TinyModel:
    return draw_case(kind, number, seed)[0]


def _cases(profile: str, dtype: str) -> int:
    """Training in half precision needs master weights and loss scaling, and is not checked."""
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

LEVEL = Level(
    "train",
    _CHECKS,
    cases=None,
    quick="combined",
    vectors={"*": (("float32", 0),)},
    no_vectors={
        "cosine-schedule": "the last bit of a cosine depends on the library of mathematics",
        "repeat": "the same vector twice",
    },
)
