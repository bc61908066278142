"""Mutants of training loops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from minilora.spec.lora import TrainableSpec, Weights, sum_gradients
from minilora.spec.ops import IGNORED
from minilora.verify.mutants.mutant import Mutant, Reference, Same, Table, equivalents, mutants
from minilora.verify.mutants.optimizer import clipped
from minilora.verify.mutants.references.helpers import Array
from minilora.verify.mutants.references.optimizer import Optimizer
from minilora.verify.mutants.references.training import Training


def moved(labels: Array, by: int) -> Array:
    """Each label that many places later, and IGNORED where none comes from."""
    later = np.full_like(labels, IGNORED)
    if by > 0:
        later[:, by:] = labels[:, :-by]
    else:
        later[:, :by] = labels[:, -by:]
    return later


def before_last(counts: Array) -> Array:
    """Whether a place of the row that counts comes there or later."""
    return np.maximum.accumulate(counts[:, ::-1], 1)[:, ::-1]


def first_row(labels: Array) -> Array:
    """The labels of the first row alone."""
    return np.where(np.arange(len(labels))[:, None] == 0, labels, IGNORED)


def times(factor: Any, g: Weights, names: Iterable[str] | None = None) -> Weights:
    """The gradients of these names, or all of them, multiplied by a factor."""
    chosen = set(g if names is None else names)
    return {name: v * v.dtype.type(factor) if name in chosen else v for name, v in g.items()}


def piled(steps: Sequence[Sequence[tuple[int, Weights]]]) -> Weights:
    """The sum of the gradients of all steps."""
    total = {name: 0 * array for name, array in steps[0][0][1].items()}
    for parts in steps:
        N = sum(n for n, _ in parts)
        for n, g in parts:
            total = {name: total[name] + np.float32(n / N) * g[name] for name in total}
    return total


def decayed(W: Weights, trained: Iterable[str], memory: dict[str, Any]) -> Weights:
    """The frozen weights 1 percent less in each call."""
    k = memory["k"] = memory.get("k", -1) + 1
    return {name: v if name in trained else v * v.dtype.type(0.99**k) for name, v in W.items()}


def each_micro(batches: Sequence[Sequence[Any]]) -> list[list[list[Any]]]:
    """Each micro-batch in which a label counts as a step of its own, by steps."""

    def counts(labels: Array) -> bool:
        return bool(((labels[:, 1:] if labels.ndim > 1 else labels) != IGNORED).any())

    return [[[batch] for batch in step if counts(batch["labels"])] for step in batches]


def without_root(spec: TrainableSpec, W: Weights) -> TrainableSpec:
    """Every scale over √r."""
    scale = {at: s / len(W[f"{at}.A"]) ** 0.5 for at, s in spec.scale.items()}
    return replace(spec, scale=scale)


def magnitudes_alone(g: Weights) -> Weights:
    """Where there are magnitudes, nothing but their gradients."""
    magnitudes = {name for name in g if name.endswith("magnitude")}
    return times(0, g, set(g) - magnitudes) if magnitudes else g


def other_layer(name: str, g: Weights) -> str:
    """The name in the other of two layers, where there is one."""
    other = name.replace("layers.0.", "layers.*.").replace("layers.1.", "layers.0.")
    other = other.replace("layers.*.", "layers.1.")
    return other if other in g else name


def rows_apart(step: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """A micro-batch for each row."""
    return [
        {name: array[i : i + 1] for name, array in batch.items()}
        for batch in step
        for i in range(len(batch["labels"]))
    ]


def padding_cut(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Without columns that hold padding alone."""
    real = arrays["attention_mask"].any(0)
    return {name: v[:, real] if v.ndim > 1 else v for name, v in arrays.items()}


NAMES = {**globals(), "clipped": clipped, "sum_gradients": sum_gradients}
TRAINING = Reference((Optimizer, Training), NAMES)

# fmt: off
LABELS: Table = {
    "train.labels": [
        ("no-shift", "token t is predicted at t",
         {"# labels": "labels = moved(labels, 1) if text else labels"}),
        ("double-shift", "token t + 2 is predicted at t",
         {"# labels": "labels = moved(labels, -1) if text else labels"}, "transformers 47394"),
        ("ids-for-labels", "ignored labels count: all tokens except padding",
         {"# labels": "labels = np.where(mask == 1, ids, IGNORED) if text else labels"}),
        ("padding-as-0", "ignored labels taken for class 0",
         {"# labels": "labels = np.maximum(labels, 0) if text else labels"}),
        ("first-padding", "the first padding token is a label",
         {"# labels":
              "labels = np.where((mask == 0) & (moved(mask, 1) == 1), ids, labels) if text else "
              "labels"}, "mlx-lm 1697"),
        ("first-row", "only the first row of a batch counts",
         {"# labels": "labels = first_row(labels) if text else labels"}),
        ("padding-left-read", "padding on the left is attended to",
         {"# labels": "mask = mask if mask[:, 0].all() else np.ones_like(mask)"}),
        ("sum", "the sum over labels instead of the mean", {"# back": "g = times(n, g)"}),
        ("by-batch", "divided by the number of rows",
         {"# back": "g = times(n / len(batch.ids), g)"}),
        ("by-positions", "divided by all positions",
         {"# back": "g = times(n / batch.ids.size, g)"}),
        ("gradient-late", "each step has the previous step's gradient",
         {"# accumulate": "parts, last = (last if history else parts), parts"}),
        ("gradient-not-zeroed", "gradients add up over the steps",
         {"# accumulate": "steps = [*steps, parts] if history else [parts]; parts = piled(steps)"}),
        ("A-alone", "B is not trained",
         {"# parameter": 'rate = rate if name.endswith("A") else 0'}),
        ("B-alone", "A is not trained",
         {"# parameter": 'rate = 0 if name.endswith("A") else rate'}),
        ("ascent", "gradient ascent", {"# back": "g = times(-1, g)"}),
        ("base-decays", "the frozen weights shrink by 1 percent a batch",
         {"# start": "self.memory.clear()", "# part": "W = decayed(W, spec.trained, self.memory)"}),
    ],
    "train.prompt": [
        ("prompt-learned", "labels at the prompt count",
         {"# labels":
              "labels = np.where(before_last(labels != IGNORED), ids, labels) if text else "
              "labels"}),
        ("prompt-last-learned", "the prompt's last token is a label",
         {"# labels":
              "labels = np.where((labels == IGNORED) & (moved(labels, -1) != IGNORED), ids, "
              "labels) if text else labels"}),
        ("answer-first-lost", "the answer's first token is no label",
         {"# labels":
              "labels = np.where(moved(labels, 1) == IGNORED, IGNORED, labels) if text else "
              "labels"}),
        ("scale", "s = 1",
         {"# trained": "spec = replace(spec, scale=dict.fromkeys(spec.scale, 1.0))"}),
    ],
}
ACCUMULATE: Table = {
    "train.gradient-accumulation": [
        ("mean-of-means", "the mean of the micro-batches' means",
         {"# accumulate":
              "parts = [(1, g) for _, g in parts]"},
         "transformers 34191", "mlx-lm 1413", "torchtune 1875"),
        ("sum-of-means", "the sum of the micro-batches' means",
         {"# accumulate": "parts = sum_gradients(*(g for _, g in parts))"}),
        ("last-micro-batch", "the last micro-batch alone",
         {"# batches of the step": "step = step[-1:]"}),
        ("first-micro-batch", "the first micro-batch alone",
         {"# batches of the step": "step = step[:1]"}),
        ("rows-weigh", "micro-batches weighted by their rows", {"# back": "n = len(batch.ids)"}),
        ("positions-weigh", "micro-batches weighted by all their positions",
         {"# back": "n = batch.ids.size"}),
        ("tokens-weigh", "micro-batches weighted by their tokens, ignored ones too",
         {"# back": "n = int(batch.real[:, 1:].sum())"}),
        ("mean-of-none", "0 / 0 where no label of a micro-batch counts",
         {"if (shifted_labels(b, c) != IGNORED).any()]": "]",
          "# part":
              "if not n: return 0, {name: np.full_like(W[name], np.nan) for name in "
              "sorted(spec.trained)}"}),
        ("labels-not-shifted-weigh", "micro-batches weighted by their labels before the shift",
         {"# back": "n = int((batch.labels != IGNORED).sum())"}),
        ("step-per-micro-batch", "a step for each micro-batch",
         {"# start":
              "alone = each_micro(batches); batches = [step for steps in alone for step in steps]",
          "# answer":
              "answer = [answer[end - 1] for end in np.cumsum([len(steps) for steps in alone])]"}),
    ],
}
CLIP: Table = {
    "train.partial-step": [
        ("partial-step-shrunk", "the last step over the number of micro-batches of a full one",
         {"# accumulate":
              "f = len(step) / len(batches[0]); parts = [(n, times(f, g)) for n, g in parts]"},
         "transformers 38837"),
        ("partial-step-lost", "no last step where its micro-batches are fewer",
         {"# accumulate":
              "f = float(len(step) == len(batches[0])); parts = [(n, times(f, g)) for n, g in "
              "parts]"}),
        ("clip-adapters-alone", "the norm of the A's and B's gradients for ‖g‖",
         {"sum((x**2).sum() for x in g.values()) ** 0.5":
              'sum((x**2).sum() for n, x in g.items() if n.endswith((".A", ".B"))) ** 0.5'}),
    ],
    "train.clip": [
        ("clip-none", "no clipping", {"min(1.0, max_norm / (norm + 1e-6))": "1.0"}),
        ("clip-per-tensor", "each tensor clipped by itself",
         {"x * clip": "clipped({n: x}, max_norm)[n]"}),
        ("sgd-no-momentum", "SGD without its momentum", {"# settings": "momentum = 0.0"}),
        ("sgd-no-decay", "SGD without its decay",
         {"# settings": 'weight_decay = 0.0 if optimizer == "sgd" else weight_decay'}),
        ("clip-always", "gradients below the maximum norm scaled up to it",
         {"min(1.0, max_norm / (norm + 1e-6))": "min(9.0, max_norm / norm)"}),
        ("clip-micro-batches", "each micro-batch's gradient clipped, then their mean",
         {"# accumulate":
              'parts = [(n, clipped(g, settings.get("max_grad_norm", np.inf))) for n, g in '
              "parts]"}),
    ],
}
SCHEDULE: Table = {
    "train.linear-schedule": [
        ("schedule-none", "a constant rate η", {"# settings": 'schedule = "constant"'}),
        ("schedule-ahead", "the factor of the step after", {"step = k": "step = k + 1"}),
        ("schedule-no-warmup", "no warm-up", {"# settings": "warmup = 0"}),
        ("adam-restarted", "m and v from 0 in every step",
         {"m[name] / (1 - beta1**t)": "grad", "v[name] / (1 - beta2**t)": "grad**2"}),
        ("adam-step-from-2", "bias correction counted from 2", {"k + 1": "k + 2"}),
    ],
    "train.cosine-schedule": [
        ("schedule-of-micro-batches", "the schedule as long as there are micro-batches",
         {"# start":
              'n = sum(map(len, batches)); settings = {**settings, "total_steps": n + 2 if '
              '"total_steps" in settings else n}'}),
        ("schedule-as-linear", "linear where cosine is asked for",
         {"# settings": 'schedule = "linear" if schedule == "cosine" else schedule'}),
        ("schedule-none-without-warmup", "a constant rate where there is no warm-up",
         {"# settings": 'schedule = schedule if warmup else "constant"'}),
    ],
}
DECAY: Table = {
    "train.weight-decay": [
        ("decay-none", "λ = 0", {"# settings": "weight_decay = 0.0"}),
        ("decay-biases-spared", "λ = 0 for biases, unasked",
         {"# parameter": 'decay = decay * (not name.endswith("bias"))'}),
        ("decay-factors-alone", "λ = 0 for what is trained in full",
         {"# parameter": 'decay = decay * name.endswith((".A", ".B"))'}),
        ("decay-coupled", "coupled decay: λ p in the gradient",
         {"m[name] = beta1": "grad = grad + decay * w; decay = 0; m[name] = beta1"}),
        ("still-skipped", "no decay where the whole gradient is 0",
         {"# parameter": "if not grad.any(): continue"}),
        ("biases-frozen", "biases are not trained",
         {"# back": 'g = times(0, g, [name for name in g if name.endswith("bias")])'}),
    ],
    "train.no-weight-decay": [
        ("decay-default", "λ = 0.01 where 0 is asked for",
         {"# settings": "weight_decay = weight_decay or 0.01"}),
    ],
}
LORAPLUS: Table = {
    "train.loraplus": [
        ("warmup-constant-none", "no warm-up where the schedule is constant",
         {"# rate":
              'factor = 1.0 if schedule == "constant" else factor'}, "transformers get_scheduler"),
        ("loraplus-ignored", "no LoRA+ ratio", {"# settings": "ratio = 1.0"}),
        ("loraplus-on-A", "the LoRA+ ratio for A instead of B",
         {"# parameter": 'rate = lr * (ratio if name.endswith("A") else 1)'}),
        ("loraplus-not-in-decay", "B's decay without the LoRA+ ratio",
         {"w * (1 - rate * decay)": "w * (1 - lr * factor * decay)"}),
        ("loraplus-not-decayed", "λ = 0 with LoRA+, whose groups set it",
         {"# settings": 'weight_decay = 0 if "loraplus_lr_ratio" in settings else weight_decay'},
         "peft's create_loraplus_optimizer, given weight_decay"),
    ],
    "train.loraplus.other-params": [
        ("loraplus-not-A", "the LoRA+ ratio for all parameters except A",
         {'name.endswith("B") else rate': 'not name.endswith(".A") else rate'}),
        ("loraplus-vectors", "the LoRA+ ratio for biases, too",
         {'name.endswith("B") else rate': 'name.endswith((".B", "bias")) else rate'}, "peft 0.21"),
        ("loraplus-no-embedding", "no LoRA+ ratio for an embedding's B",
         {'name.endswith("B") else rate':
              'name.endswith(".B") and not name.startswith("embed") else rate'}),
    ],
}
AGAIN: Table = {
    "train.repeat": [
        ("adapter-kept", "a second run continues the first one's adapter",
         {"# start":
              'settings = {"total_steps": len(batches), **settings}; kept = '
              "self.memory.setdefault(adapter_dir, []); done = len(kept); kept += batches; "
              "batches = kept",
          "# answer": "answer = answer[done:]"}),
    ],
}
OTHERS: Table = {
    "train.classifier": [
        ("classifier-frozen", "a classifier's gradients are 0",
         {"# back": "g = g if c.causal else times(0, g)"}),
        ("classifier-rows-weigh", "a classifier's micro-batches weighted by their rows",
         {"# back": "n = n if c.causal else len(batch.ids)"}),
        ("classifier-types-lost", "token types are ignored", {"# labels": "types = None"}),
    ],
    "train.dora": [
        ("magnitudes-frozen", "DoRA's magnitudes are not trained",
         {"# back": 'g = times(0, g, [name for name in g if name.endswith("magnitude")])'}),
        ("magnitudes-alone", "with DoRA only the magnitudes are trained",
         {"# back": "g = magnitudes_alone(g)"}),
    ],
}
TOGETHER: Table = {
    "train.combined": [
        ("checkpointing-unclipped", "no clipping under checkpointing",
         {"# start":
              'settings = {**settings, "max_grad_norm": np.inf} if '
              'settings.get("gradient_checkpointing") else settings'}),
        ("checkpointing-without-root", "rsLoRA's scale over √r under checkpointing",
         {"# part": "spec = without_root(spec, W) if self.checkpointing else spec"}),
        ("upper-layer-alone", "the first layer's adapters are not trained",
         {"# back":
              'g = times(0, g, [name for name in g if name.startswith("layers.0.") and '
              "other_layer(name, g) != name])"}),
        ("layers-exchanged", "each layer gets the other one's gradients",
         {"# back": "g = {name: g[other_layer(name, g)] for name in g}"}),
    ],
}
SAME: Same = [
    ("plain", "the reference: another optimizer and loop", {}),
    ("one-batch", "the micro-batches in reverse order",
     {"# batches of the step": "step = step[::-1]"}),
    ("rows-apart", "a micro-batch for each row",
     {"# batches of the step": "step = rows_apart(step)"}),
    ("padding-cut", "columns of padding are cut off",
     {"# arrays of the batch": "arrays = padding_cut(arrays)"}),
]
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *mutants(TRAINING, "TRAIN", LABELS),
    *mutants(TRAINING, "TRAIN", ACCUMULATE),
    *mutants(TRAINING, "TRAIN", CLIP),
    *mutants(TRAINING, "TRAIN", SCHEDULE),
    *mutants(TRAINING, "TRAIN", DECAY),
    *mutants(TRAINING, "TRAIN", LORAPLUS),
    *mutants(TRAINING, "TRAIN", AGAIN),
    *mutants(TRAINING, "TRAIN", OTHERS),
    *mutants(TRAINING, "TRAIN", TOGETHER),
    *equivalents(TRAINING, "train", SAME),
)
