"""Fine-tuning: a run as a sequence of states, and the folder in which none of it is lost.

:func:`run` is the mathematics: a state after another, each a function of the one before. What is
around it writes them down, so that a run that ends for any reason goes on to the same bits.
"""

import hashlib
import io
import json
import math
import os
import re
import sys
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from minilora import __version__
from minilora.io.files import (
    FormatError,
    listed,
    make_folder,
    pack_json,
    read_json,
    remove_empty,
    write_files,
)
from minilora.io.formats import huggingface, peft
from minilora.io.loading import (
    BASE_FOLDER,
    MANIFEST,
    TOKENIZER_FILES,
    Base,
    copy_tokenizer,
    read_run,
    weights_with,
)
from minilora.spec import adalora
from minilora.spec.lora import LORA, Params, TrainableSpec, Weights, is_base, sum_gradients
from minilora.spec.models import Batch, Config
from minilora.spec.optim import AdamState, adamw, clip, loraplus_rates, schedule
from minilora.spec.target_modules import LoraConfig, inject
from minilora.spec.variants import REGISTRY
from minilora.training import checkpoints, evaluate
from minilora.training.checkpoints import State
from minilora.training.data import SPLITS, Data, Example, one_window, order
from minilora.training.data import batch as padded
from minilora.training.gradients import (
    ExecutionPlan,
    blas_threads,
    counted,
    drawn_dropout,
    gradients,
)

DIVERGED = 3.0
"""A loss so many times the first, or a uniform guess's if that is greater, has diverged."""

CHECKED = 8
"""Of so many examples, or of as many as a micro-batch has, the loss is formed once more after the
last step, to be judged by."""

NOT_TRAINED: Mapping[str, str] = {
    "alora": "it acts from an invocation's tokens on, in measuring and writing too, and no line of "
    "data names them: take lora, or train it with PEFT",
}
"""Variants that are proven here but that no run trains, and why."""

LOG, PLOT = "log.jsonl", "loss.svg"
"""The files of a run beside its result and its settings: a line for each step, the picture."""

_MODEL = (huggingface.CONFIG, huggingface.WEIGHTS)
"""The files of a model that a run writes: its result, or the base that its adapter acts on."""


@dataclass(frozen=True)
class TrainConfig:
    """All that decides the result of a run, beside the model and the data.

    Names are those of ``transformers.TrainingArguments`` and ``peft.LoraConfig`` where the meaning
    is the same. ``max_steps`` of ``gradient_accumulation_steps`` micro-batches of about
    ``batch_tokens`` tokens each, or as many as ``num_train_epochs`` have. B learns
    ``loraplus_lr_ratio`` times as fast, by default 16 times with the variant "lora+" and else as
    fast as the rest; the rate rises over ``warmup_steps`` and then follows ``lr_scheduler``.
    Gradients are clipped to the norm ``max_grad_norm``; 0 disables clipping.
    ``full`` trains every weight and no adapter: the baseline. ``seed`` settles the adapters' start,
    the data's order and the dropout.

    Errors: ValueError for a number outside its range, or a variant that no run trains.
    """

    task: str = "lm"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    variant: str = "lora"
    full: bool = False
    learning_rate: float = 1e-3
    loraplus_lr_ratio: float | None = None
    lr_scheduler: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_steps: int | None = None
    num_train_epochs: int = 1
    batch_tokens: int = 1024
    gradient_accumulation_steps: int = 1
    max_length: int = 512
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        least = {
            "rank": 1,
            "num_train_epochs": 1,
            "batch_tokens": 1,
            "gradient_accumulation_steps": 1,
            "warmup_steps": 0,
            "seed": 0,
        }
        least |= {"max_length": 2} | ({} if self.max_steps is None else {"max_steps": 1})
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < low:
                expected = f"expected {low} or more, a whole number"
                raise ValueError(f"{name} is {value}: {expected}")
        for name in ("alpha", "learning_rate", "loraplus_lr_ratio"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: expected more than 0")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 0 or more")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype {self.dtype!r}: expected float32 or float64")
        schedule(self.lr_scheduler, 0, 1)
        if not self.full and self.variant in NOT_TRAINED:
            raise ValueError(f"variant {self.variant!r}: {NOT_TRAINED[self.variant]}")
        if not isinstance(self.target_modules, str):
            object.__setattr__(
                self, "target_modules", tuple(self.target_modules)
            )  # so that it can be a key
        self.lora()

    def lora(self) -> LoraConfig:
        """The adapters' choice. AdaLoRA's rank is higher at the start, and the scale the same."""
        r = adalora.initial_rank(self.rank) if self.variant == "adalora" else self.rank
        return LoraConfig(
            r=r,
            lora_alpha=self.alpha * r / self.rank if r != self.rank else self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            variant=self.variant,
            modules_to_save=(r"head\..*",) if self.task == "classify" else (),
        )

    def ratio(self) -> float:
        """How much faster B learns: LoRA+'s own ratio, unless another is given."""
        usual = 16.0 if self.variant == "lora+" else 1.0
        return usual if self.loraplus_lr_ratio is None else self.loraplus_lr_ratio


class Diverged(ArithmeticError):
    """The loss, its gradient or a parameter is no longer a number to go on with.

    Made of the step, and what was found there.
    """

    def __str__(self) -> str:
        step, found = self.args
        return f"step {step}: {found}"


@dataclass(frozen=True)
class Record:
    """What a step is known by: a line of the log."""

    step: int
    epoch: int
    loss: float
    tokens: int
    labels: int
    learning_rate: float
    grad_norm: float


def micro_batches(examples: Sequence[Example], recipe: TrainConfig, epoch: int) -> list[list[int]]:
    """The rows of each micro-batch of an epoch, in their order."""
    return order(examples, recipe.batch_tokens, recipe.seed, epoch)


def steps_in(examples: Sequence[Example], recipe: TrainConfig) -> int:
    """How many steps the run has: those given, or those of all epochs."""
    if recipe.max_steps is not None:
        return recipe.max_steps
    # Where all examples are sorted at once, no shuffle changes the lengths in the batches.
    alike = one_window(examples, recipe.batch_tokens)
    each = (
        -(-len(micro_batches(examples, recipe, epoch)) // recipe.gradient_accumulation_steps)
        for epoch in range(1 if alike else recipe.num_train_epochs)
    )
    return sum(each) * (recipe.num_train_epochs if alike else 1)


def run(
    state: State,
    W: Params,
    c: Config,
    tuning: TrainableSpec,
    examples: Sequence[Example],
    recipe: TrainConfig,
    plan: ExecutionPlan,
    pad: int = 0,
    steps: int | None = None,
) -> Iterator[tuple[State, Record]]:
    """The states that follow ``state``, with what each step is known by, up to the last step.

    A step takes the next micro-batches of its epoch, fewer at an epoch's end, and divides by the
    labels that count in all of them together: how they are divided changes no more than rounding.
    Nothing is changed in place: whoever stops keeps the last state. ``steps`` are those of
    :func:`steps_in`, unless they are known already.

    Errors: Diverged, and those of `gradients.gradients`.
    """
    steps = steps_in(examples, recipe) if steps is None else steps
    rates = loraplus_rates(sorted(state.params), recipe.learning_rate, recipe.ratio())
    pruned = sum(name.endswith(".E") for name in state.params)
    falls = adalora.planned(recipe.rank, pruned, steps) if pruned else None
    rows, epoch = micro_batches(examples, recipe, state.epoch), state.epoch
    while state.step < steps:
        if state.position >= len(rows):  # the batches are others than when it was saved
            state = replace(state, epoch=state.epoch + 1, position=0)
        if state.epoch != epoch:
            rows, epoch = micro_batches(examples, recipe, state.epoch), state.epoch
        chosen = rows[state.position : state.position + recipe.gradient_accumulation_steps]
        batches = [padded([examples[i] for i in own], pad) for own in chosen]
        factor = schedule(recipe.lr_scheduler, state.step, steps, recipe.warmup_steps)
        lr = {name: rate * factor for name, rate in rates.items()}
        params, adam, loss, norm, importance = step(
            state, batches, W, c, tuning, recipe, plan, lr, falls
        )
        first = loss if state.first is None else state.first
        _check(state.step + 1, loss, first, c)
        tokens = sum(int(batch.real.sum()) for batch in batches)
        labels = sum(counted(batch, c) for batch in batches)
        place = state.position + len(chosen)
        at = (epoch + 1, 0) if place >= len(rows) else (epoch, place)
        record = Record(
            state.step + 1, epoch, loss, tokens, labels, recipe.learning_rate * factor, norm
        )
        state = State(params, adam, state.step + 1, *at, state.tokens + tokens, first, importance)
        yield state, record


def _check(step: int, loss: float, first: float | None, c: Config) -> None:
    """Errors: Diverged unless the loss is one to go on with."""
    first = loss if first is None else first
    if not loss <= DIVERGED * max(first, math.log(getattr(c, "classes", c.vocab))):
        raise Diverged(step, f"the loss is {loss:.4g}, at first it was {first:.4g}")


# What overflows is found in the results, and told as a divergence.
@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def step(
    state: State,
    batches: Sequence[Batch],
    W: Params,
    c: Config,
    tuning: TrainableSpec,
    recipe: TrainConfig,
    plan: ExecutionPlan,
    lr: Mapping[str, float],
    falls: adalora.Plan | None = None,
) -> tuple[Weights, AdamState, float, float, adalora.Importance]:
    """The parameters and the optimizer's means after a step, its loss, its gradients' norm.

    Loss and gradients are those of all micro-batches together, over all labels that count; then
    they are clipped, and AdamW goes by them. AdaLoRA's gradients have its penalty's added, which
    the loss does not count; ``falls`` is the plan by which its singular values are pruned, and what
    that remembers comes last.

    Errors: ValueError if no label counts; Diverged if a number is not finite.
    """
    L, g = _summed(state, batches, weights_with(W, state.params), c, tuning, recipe, plan)
    g, norm = clip(adalora.penalised(state.params, g), recipe.max_grad_norm or np.inf)
    if not (np.isfinite(L) and np.isfinite(norm)):
        raise Diverged(state.step + 1, f"the loss is {L:g}, its gradient's norm {norm:g}")
    params, adam = adamw(state.params, g, state.adam, lr, weight_decay=recipe.weight_decay)
    if not all(np.isfinite(p).all() for p in params.values()):
        raise Diverged(state.step + 1, "a parameter is no longer finite")
    importance = state.importance
    if falls is not None:
        own = {name: p for name, p in params.items() if name.endswith((".A", ".B", ".E"))}
        own, importance = adalora.advance(own, g, importance, state.step + 1, falls)
        params |= own
    return params, adam, float(L), float(norm), importance


def _summed(
    state: State,
    batches: Sequence[Batch],
    W: Params,
    c: Config,
    tuning: TrainableSpec,
    recipe: TrainConfig,
    plan: ExecutionPlan,
) -> tuple[Any, Weights]:
    counts = [counted(batch, c) for batch in batches]
    if not any(counts):
        raise ValueError(f"step {state.step + 1}: no label counts in any of its examples")
    L: Any = 0.0
    g: Weights = {}
    for i, (batch, n) in enumerate(zip(batches, counts, strict=True)):
        if n:
            draw = state.step * recipe.gradient_accumulation_steps + i
            p = 0.0 if recipe.full else recipe.dropout
            keep = drawn_dropout(recipe.seed, draw, p, batch, c, tuning, recipe.dtype)
            own = replace(tuning, dropout_scale=keep)
            L_i, g_i = gradients(batch, W, c, own, plan, sum(counts))
            L, g = L + L_i, sum_gradients(g, g_i)
    return L, g


@dataclass(frozen=True, eq=False)
class Job:
    """What a run works on: a model with its fresh adapters, the data, the recipe.

    ``frozen``: the weights below; ``start``: what is trained, as it begins; ``adapter``: all
    parameters of the adapters, frozen ones among them; ``lora`` is None in full fine-tuning.
    """

    base: Base
    data: Data
    recipe: TrainConfig
    frozen: Params
    start: Weights
    adapter: Weights
    tuning: TrainableSpec
    lora: LoraConfig | None
    source: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def examples(self, split: str) -> Sequence[Example]:
        """Those to train on, ``train``, to validate with, ``valid``, or ``test``."""
        found: Sequence[Example] = getattr(self.data, split)
        return found

    def weights(self, params: Params) -> Params:
        """The whole model, with these trained parameters in it."""
        return weights_with(self.frozen, {**self.adapter, **params})


def prepare(base: Base, read: Data, recipe: TrainConfig, source: str = "", **settings: Any) -> Job:
    """The model with fresh adapters, or all of it to be trained; a head where a BERT has none.

    ``source``, where the data was read, and the ``settings`` of the reading go on record.

    Errors: ValueError as `target_modules.inject` has it; for a classifier with other classes
    than the data; for an example that is longer than the model has positions.
    """
    c, W = base.config, base.weights
    longest = max((len(e.ids) for split in SPLITS for e in getattr(read, split)), default=0)
    if longest > (room := c.tables().get("positions", longest)):
        found = f"max_length {recipe.max_length}: found an example of {longest} tokens"
        expected = f"at most {room}, the model's positions: give a smaller max_length"
        raise ValueError(f"{found}, expected {expected}")
    if (recipe.task == "classify") == c.causal:
        fits = "lm, chat or summarize" if c.causal else "classify"
        raise ValueError(f"task {recipe.task!r} with a {type(c).__name__}: expected {fits}")
    classes = getattr(c, "classes", None)
    if recipe.task == "classify" and "head.weight" not in W:
        classes = len(read.classes)
        base = replace(base, config=replace(c, classes=classes))  # type: ignore[call-arg]
        c, shape = base.config, (classes, c.d)
        drawn_head = 0.02 * np.random.default_rng([recipe.seed, 3]).standard_normal(shape)
        head = {"head.weight": drawn_head, "head.bias": np.zeros((classes, 1))}
        W = weights_with(W, {name: w.astype(recipe.dtype) for name, w in head.items()})
    if recipe.task == "classify" and len(read.classes) != classes:
        found = f"{len(read.classes)} classes in the data, {classes} in the model"
        raise ValueError(
            f"{found}: expected as many; take another model, or its own head's classes"
        )
    if base.classes not in (None, read.classes):
        found = f"classes {', '.join(read.classes)} in the data"
        wanted = f"the model's, {', '.join(base.classes or ())}, in their order"
        raise ValueError(f"{found}: expected {wanted}; read the data with classes=base.classes")
    said = {**vars(recipe), **settings}
    if recipe.full:
        trained = {name: np.asarray(W[name]) for name in c.shapes()}
        tuning = TrainableSpec(trained=frozenset(trained))
        return Job(base, read, recipe, W, trained, {}, tuning, None, source, said)
    lora = recipe.lora()
    # A drawn start reads its weight's shape and dtype and nothing else: those of a base that is
    # expanded on demand are not expanded for it.
    drawn = lora.equation == LORA and lora.init_lora_weights in (
        "kaiming",
        "gaussian",
        "orthogonal",
    )
    seen = _outlines(W, c) if drawn else {name: W[name] for name in c.shapes()}
    adapted, tuning = inject(seen, lora, c.linears(), np.random.default_rng([recipe.seed, 2]))
    if recipe.task == "classify" and "head" in tuning.scale:
        expected = "other projections: a classifier's head is trained in full"
        raise ValueError(
            f"target_modules {recipe.target_modules!r} hit the head: expected {expected}"
        )
    adapter = {name: w for name, w in adapted.items() if not is_base(name)}
    changed = {name: w for name, w in adapted.items() if is_base(name) and w is not seen[name]}
    start = {name: adapter[name] if name in adapter else W[name] for name in tuning.trained}
    return Job(
        base, read, recipe, weights_with(W, changed), start, adapter, tuning, lora, source, said
    )


def _outlines(W: Params, c: Config) -> Weights:
    """Arrays of the weights' shapes and dtype that take no memory."""
    dtype = W["norm.weight"].dtype  # no matrix, which might have to be expanded
    return {name: np.broadcast_to(dtype.type(0), shape) for name, shape in c.shapes().items()}


def write_result(folder: Path | str, job: Job, params: Weights) -> None:
    """Write what was trained: an adapter in PEFT's format, or a Hugging Face model if ``full``.

    Errors: those of the format's writer; OSError where the disk is full or closed.
    """
    base = job.base
    if job.lora is None:
        huggingface.write_model(
            folder, base.config, params, labels=job.data.classes or None, kept=base.kept
        )
        copy_tokenizer(base, folder)
        return
    W, tuning, lora, below = {**job.adapter, **params}, job.tuning, job.lora, base.weights
    if lora.variant == "adalora":
        W, tuning, lora = _pruned(W, tuning, lora)
    if lora.variant == "dora-full":  # what it computes is DoRA's: only its gradients are others
        lora = replace(lora, variant="dora")
        tuning = replace(tuning, variant=dict.fromkeys(tuning.variant, lora.equation))
    if REGISTRY[lora.variant].breaks.get("kept"):  # the start changed the base
        W = {name: job.weights(params)[name] for name in (*base.config.shapes(), *job.adapter)}
        below = job.frozen if goes_along(job) else below
    of = None if goes_along(job) else base.of_transformers
    peft.write_adapter(folder, base.config, W, tuning, lora, base=below, of=of)


def _pruned(
    W: Weights, tuning: TrainableSpec, lora: LoraConfig
) -> tuple[Weights, TrainableSpec, LoraConfig]:
    """AdaLoRA's adapter without the triplets that do not act, nor the projections without any."""
    kept = adalora.left(W)
    ranks = {name.removesuffix(".E"): len(E) for name, E in kept.items() if name.endswith(".E")}
    tuning = replace(tuning, trained=tuning.trained - (W.keys() - kept.keys()))
    patterns = {re.escape(at): r for at, r in ranks.items()}
    return kept, tuning, replace(lora, target_modules=[*ranks], rank_pattern=patterns)


def goes_along(job: Job) -> bool:
    """Whether the adapter is one on another base than the model, which is written beside it.

    LoftQ's is quantised, and what that loses is no matrix of low rank.
    """
    return job.lora is not None and job.lora.init_lora_weights == "loftq"


def write_base(folder: Path | str, job: Job) -> None:
    """Write the base on which the adapter acts, with its tokenizer, as a Hugging Face model.

    Errors: those of the format's writer; OSError where the disk is full or closed.
    """
    c, labels = job.base.config, job.data.classes or None
    whole = {name: np.asarray(job.frozen[name]) for name in c.shapes()}
    huggingface.write_model(folder, c, whole, labels=labels, kept=job.base.kept)
    copy_tokenizer(job.base, folder)


class Refused(ValueError):
    """A run that may not begin here: the folder holds another, or the run is not the same."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """Where a run stands: its last saved state, and why it is not at its end, if it is not."""

    state: State
    steps: int
    why: str = ""


def manifest(job: Job) -> dict[str, Any]:
    """What ``run.json`` says: the settings, what the model's and the data's files are, versions."""
    read = job.data
    base, lines = job.base, {split: len(job.examples(split)) for split in SPLITS}
    name = base.name if base.reference else str(base.path.resolve())
    said = {"name": job.source, "digest": read.digest, "classes": list(read.classes)}
    return {
        "settings": json.loads(json.dumps(job.settings)),
        "model": {"name": name, "digest": base.digest},
        "data": said | lines | {"skipped": len(read.skipped)},
        "start": start_digest(job),
        "base": BASE_FOLDER if goes_along(job) else None,
        "steps": steps_in(read.train, job.recipe),
        "versions": {"minilora": __version__, "numpy": np.__version__},
    }


def start_digest(job: Job) -> str:
    """SHA-256 of what was made before the first step: the adapters, and weights that they changed.

    A run goes on to the same bits only where these come out the same: SVD, and the order of sums,
    may differ from one library of linear algebra to the next.
    """
    sha = hashlib.sha256()
    changed = job.frozen.maps[0] if isinstance(job.frozen, ChainMap) else {}
    for name, array in sorted({**changed, **job.adapter}.items()):
        sha.update(f"{name} {array.shape} {array.dtype}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What decides a run's result and is another than it was, a sentence each."""
    was, new = before.get("settings", {}), now["settings"]
    found = [
        f"{name} was {was.get(name)!r} and is {new.get(name)!r}"
        for name in sorted(was.keys() | new.keys())
        if was.get(name) != new.get(name)
    ]
    for what in ("model", "data"):
        if before.get(what, {}).get("digest") != now[what]["digest"]:
            found += [f"the {what}'s files have changed"]
    if not found and before.get("start") != now["start"]:
        found += ["the adapters start otherwise: NumPy or its linear algebra is another"]
    return found


def begin(
    out: Path, job: Job, resume: bool = False, overwrite: bool = False, accept: bool = False
) -> tuple[State, list[str]]:
    """The state from which the run goes on, in a folder made ready for it, and what to tell.

    A new run needs a folder without files. ``overwrite`` removes what an earlier run has written
    there, and nothing else; ``resume`` goes on from its last checkpoint that is whole, or begins
    where there is none yet; those that are not get other names. What decides the result has to be
    as it was, unless ``accept``.

    Errors: Refused; FormatError for a damaged ``run.json``; OSError where the disk is full or
    closed.
    """
    told: list[str] = []
    now, state = manifest(job), State(job.start)
    # What cannot run is told before any change.
    micro_batches(job.data.train, job.recipe, 0)
    if job.recipe.variant == "adalora":
        adalora.planned(job.recipe.rank, 1, now["steps"])
    if out.is_dir() and any(out.iterdir()):
        if resume and (out / MANIFEST).is_file():
            different = changes(read_run(out / MANIFEST), now)
            if different and not accept:
                raise Refused(
                    f"{out}: {'; '.join(different)}: with this the run would be another; give what "
                    "was given, go on all the same with --accept-changes, or choose a new folder"
                )
            told += [f"changed: {one}" for one in different]
            _clean(out)
            last, wrong = checkpoints.newest(out / checkpoints.FOLDER)
            told += [f"{checkpoints.set_aside(error.args[0]).name}: {error}" for error in wrong]
            state = last or state
            if _shapes_of(state.params) != _shapes_of(job.start):
                raise Refused(
                    f"{out}: its checkpoint trains other parameters, or of other shapes; choose a "
                    "new folder"
                )
        elif resume:
            raise Refused(
                f"{out}: files, but no {MANIFEST} of a run to resume; choose a new folder"
            )
        elif not overwrite:
            raise Refused(
                f"{out}: there are files already; go on with that run by --resume, replace it by "
                "--overwrite, or choose a new folder"
            )
        else:
            _remove(out, job)
    write_files(out, {MANIFEST: lambda: pack_json(now)}, durable=True)
    _cut_log(out / LOG, state.step)
    return state, told


def _shapes_of(params: Params) -> dict[str, tuple[int, ...]]:
    """The parameters' shapes by name."""
    return {name: array.shape for name, array in params.items()}


def _clean(out: Path) -> None:
    """Removes what a run that was killed while it wrote has left under no name of its own."""
    checkpoints.clean(out / checkpoints.FOLDER)
    for name in (MANIFEST, LOG, PLOT, peft.CONFIG, peft.WEIGHTS, *_MODEL, *TOKENIZER_FILES):
        for path in out.glob(f".{name}.*"):
            path.unlink()


def _remove(out: Path, job: Job) -> None:
    """What a run has written there, as its ``run.json`` says; its log last, by which it is known.

    Errors: Refused for the folder of the job's own model, and for the result of no run.
    """
    own, full = (out / BASE_FOLDER).resolve(), (*_MODEL, *TOKENIZER_FILES)
    if job.base.path.resolve() in (out.resolve(), own):
        raise Refused(f"{out}: it holds the model that is to be trained; choose a new folder")
    results = [PLOT, peft.CONFIG, peft.WEIGHTS]
    known = (out / MANIFEST).is_file() or (out / LOG).is_file()
    kept = [name for name in (*results, *_MODEL) if (out / name).exists()]
    if kept and not known:
        raise Refused(
            f"{out}: {listed(kept)}, and no {MANIFEST} of a run that wrote it; move it away, or "
            "choose a new folder"
        )
    before: dict[str, Any] = {}
    with suppress(FormatError):  # it goes, damaged or not
        before = read_run(out / MANIFEST)
    if before.get("settings", {}).get("full"):
        results += full
    if before.get("base") == BASE_FOLDER:
        results += [f"{BASE_FOLDER}/{name}" for name in full]
    for name in (*results, MANIFEST):
        (out / name).unlink(missing_ok=True)
    _clean(out)
    for path in checkpoints.saved(out / checkpoints.FOLDER):
        path.unlink()
    (out / LOG).unlink(missing_ok=True)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that are whole."""
    lines = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        with suppress(ValueError):  # cut off where the run was killed
            found = json.loads(line)
            lines += [found] if isinstance(found, dict) else []
    return lines


def _cut_log(path: Path, step: int) -> None:
    """Drops the lines of steps that are to be done again."""
    kept = "".join(_line(line) for line in read_log(path) if line.get("step", step + 1) <= step)
    write_files(path.parent, {path.name: kept.encode})


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, allow_nan=False) + "\n"


def peak_memory() -> int | None:
    """The most bytes of memory that the process has held, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


Watch = Callable[[Mapping[str, Any], int], None]
"""Is told each line of the log, and how many steps there are; first where the run begins, its step
alone."""


def _locks() -> Any:
    """The system's module of locks, which end with the process; none on Windows."""
    try:
        import fcntl
    except ImportError:
        return None
    return fcntl


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """The folder, made where there is none, with nobody else at work in it, if the system can tell.

    Errors: Refused if somebody is; OSError where the disk is full or closed.
    """
    if out.is_file():  # which is told by whoever writes into it
        yield
        return
    made, number = make_folder(out), None
    try:
        fcntl = _locks()
        if fcntl is not None:
            number = os.open(out, os.O_RDONLY)
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                remedy = "wait for it, or choose a new folder"
                raise Refused(f"{out}: another run is at work there; {remedy}") from None
            except OSError:  # a file system without locks
                pass
        yield
    finally:
        if number is not None:
            os.close(number)
        remove_empty(made)


def fit(
    out: Path | str,
    job: Job,
    *,
    plan: ExecutionPlan = ExecutionPlan(),  # noqa: B008 - it is frozen
    resume: bool = False,
    overwrite: bool = False,
    accept: bool = False,
    save_every: int = 50,
    save_seconds: float = math.inf,
    val_every: int = 50,
    watch: Watch | None = None,
    tell: Callable[[str], None] = print,
) -> Outcome:
    """Run the job and keep it in the folder ``out``: its result, its log, its checkpoints.

    A checkpoint is written before the first step, then after each ``save_every`` steps, or once
    ``save_seconds`` have passed since the last, and at the end; with it the result so far. An
    interruption (Ctrl-C) saves the last whole step. After a divergence, in validation or after the
    last step too, the last checkpoint is what stays, with its result.

    Errors: those of :func:`begin` and :func:`run`; OSError where the disk is full or closed, when
    what was saved before is still there.
    """
    for name, value in {
        "save_every": save_every,
        "val_every": val_every,
        "save_minutes": save_seconds / 60,
    }.items():
        if not value > 0:
            raise ValueError(f"{name} {value:g}: expected more than 0")
    if resume and overwrite:
        raise ValueError("resume and overwrite: expected one of the two")
    out = Path(out)
    with alone(out):
        state, told = begin(out, job, resume, overwrite, accept)
        for text in told:
            tell(text)
        c, steps = job.base.config, read_json(out / MANIFEST)["steps"]
        valid, shown = (
            batches_of(some, job.recipe.batch_tokens, job.base.tokenizer.pad)
            for some in (job.data.valid, job.data.train[:CHECKED])
        )
        saved = -1  # the step that was saved, and not its state, which would be held

        saved_at = time.monotonic()

        def save() -> None:
            nonlocal saved, saved_at
            if saved != state.step:
                checkpoints.save(out / checkpoints.FOLDER, state)
                write_result(out, job, state.params)
            saved, saved_at = state.step, time.monotonic()

        why = ""
        try:
            if goes_along(job) and state.step == 0:
                write_base(out / BASE_FOLDER, job)
            save()
            if watch is not None:
                watch({"step": state.step}, steps)
            with blas_threads(1), (out / LOG).open("a", encoding="utf-8") as log:
                started = time.perf_counter()
                following = run(
                    state, job.weights({}), c, job.tuning, job.data.train, job.recipe, plan,
                    job.base.tokenizer.pad, steps,
                )  # fmt: skip
                for after, record in following:
                    passed = time.perf_counter() - started
                    line = vars(record) | {"tokens_per_second": round(record.tokens / passed, 1)}
                    line["memory"] = peak_memory()
                    if valid and (after.step % val_every == 0 or after.step == steps):
                        line["val_loss"] = held = _loss(valid, job, after, plan)
                        if not math.isfinite(held):
                            raise Diverged(after.step, f"the loss in validation is {held:g}")
                    if after.step == steps:  # no step comes that would find what this one has done
                        _check(after.step, _loss(shown[:1], job, after, plan), after.first, c)
                    log.write(_line(line))
                    log.flush()
                    state = after
                    if after.step % save_every == 0 or time.monotonic() - saved_at >= save_seconds:
                        save()
                    if watch is not None:
                        watch(line, steps)
                    started = time.perf_counter()
            save()
        except KeyboardInterrupt:
            save()
            _cut_log(out / LOG, state.step)  # it may have come just after a line was written
            why = "interrupted"
        except OSError as error:
            there = checkpoints.saved(out / checkpoints.FOLDER)
            kept = f"kept is {there[-1].stem} of {steps}" if there else "nothing is kept yet"
            said = f"{error.strerror or error}; {kept}: see to the disk and go on with --resume"
            raise OSError(error.errno, said, error.filename or str(out)) from error
        except Diverged as error:
            why = str(error)
            _cut_log(out / LOG, saved)
            state = checkpoints.load(out / checkpoints.FOLDER / checkpoints.name_of(saved))
        return Outcome(state, steps, why)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def _loss(batches: Sequence[Batch], job: Job, state: State, plan: ExecutionPlan) -> float:
    W = job.weights(state.params)
    return evaluate.mean_loss(batches, W, job.base.config, job.tuning, plan).loss


def batches_of(examples: Sequence[Example], tokens: int, pad: int) -> list[Batch]:
    """All examples in batches of about so many tokens."""
    if not examples:
        return []
    return [padded([examples[i] for i in rows], pad) for rows in order(examples, tokens, 0, 0)]


def canvas(size: tuple[float, float]) -> tuple[Any, Callable[[], bytes]]:
    """A figure of matplotlib, and what draws it as SVG, the same bytes for the same figure.

    Errors: ImportError that names the extra.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        extra = "python -m pip install 'minilora[plot]'"
        raise ImportError(f"the plot needs the library matplotlib: {extra}") from error
    figure = Figure(figsize=size, layout="constrained")

    def draw() -> bytes:
        drawn = io.BytesIO()
        with rc_context({"svg.hashsalt": "minilora"}):
            FigureCanvasSVG(figure).print_svg(drawn, metadata={"Date": None})
        return drawn.getvalue()

    return figure, draw


def plot(out: Path | str) -> Path:
    """The log's losses as a picture, ``loss.svg``, by matplotlib.

    Errors: ImportError without it; ValueError for a log without steps.
    """
    out = Path(out)
    lines = read_log(out / LOG)
    if not lines:
        raise ValueError(f"{out / LOG}: no step to plot")
    figure, draw = canvas((7, 4))
    axes = figure.subplots()
    axes.plot([one["step"] for one in lines], [one["loss"] for one in lines], label="training")
    valid = [one for one in lines if "val_loss" in one]
    if valid:
        steps, losses = zip(*((one["step"], one["val_loss"]) for one in valid), strict=True)
        axes.plot(steps, losses, "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss in nats a label")
    axes.legend()
    write_files(out, {PLOT: draw})
    return out / PLOT
