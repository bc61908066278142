"""Loops of training, misread: what goes into a step, and what a step goes into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from minilora.io.formats.huggingface import read_model
from minilora.io.formats.peft import adapter_names, read_adapter, read_lora_config
from minilora.spec.lora import TrainableSpec, Weights, draw_dropout, sum_gradients
from minilora.spec.models import Batch, Config, loss, shifted_labels
from minilora.spec.ops import IGNORED
from minilora.verify.mutants.mutant import Mutant
from minilora.verify.mutants.optimizer import MUTANTS as OPTIMIZERS
from minilora.verify.mutants.reference import Array, Plain
from minilora.verify.mutants.transition import equivalents, family

Parts = list[tuple[Any, Weights]]


class Trainer(Plain):
    """A right loop: the specification's loss under the optimizer of `Plain`."""

    def train(
        self, model_dir: str, adapter_dir: str, batches: Sequence[Any], settings: Mapping[str, Any]
    ) -> list[dict[str, Array]]:
        """The adapter after each step, by the names in its file."""
        c, W = read_model(model_dir)
        factors, tuning = read_adapter(adapter_dir, c, base=W)
        self.dropout, self.rng = (
            read_lora_config(adapter_dir, c).lora_dropout,
            np.random.default_rng(1),
        )
        self.checkpointed = settings.get("gradient_checkpointing", False)
        tuning = self.tuned(c, W, tuning)
        W, start = W | factors, {name: (W | factors)[name] for name in sorted(tuning.trained)}
        own = {"total_steps": len(batches), **settings}
        now, gradients, history = start, [], []
        for step in batches:
            given = [self.batch(c, b) for b in self.micro(step)]
            parts = [self.part(W | now, b, c, tuning) for b in given if self.counts(b, c)]
            gradients.append(self.gone_in(parts))
            now = self.optimizer_steps(start, gradients, own)[-1]
            history.append(now)
        names = adapter_names(c, sorted(tuning.trained))
        return [self.told({names[n]: self.flat(v) for n, v in p.items()}) for p in history]

    def tuned(self, c: Config, W: Weights, tuning: TrainableSpec) -> TrainableSpec:
        """What is trained."""
        return tuning

    def micro(self, step: Sequence[Any]) -> Sequence[Any]:
        """The micro-batches of a step."""
        return step

    def batch(self, c: Config, given: Mapping[str, Array]) -> Batch:
        """A batch of the contract."""
        mask = given["attention_mask"].astype(bool)
        return Batch(
            given["input_ids"], self.labels(given), mask, types=given.get("token_type_ids")
        )

    def labels(self, given: Mapping[str, Array]) -> Array:
        """Its labels, each at its own token."""
        labels: Array = given["labels"]
        return labels

    def counts(self, batch: Batch, c: Config) -> bool:
        """Whether a micro-batch has a label that counts."""
        return bool((shifted_labels(batch, c) != IGNORED).any())

    def counted(self, batch: Batch, c: Config) -> int:
        """How many labels count."""
        return int((shifted_labels(batch, c) != IGNORED).sum())

    def part(
        self, W: Weights, batch: Batch, c: Config, tuning: TrainableSpec
    ) -> tuple[Any, Weights]:
        """The number of labels of a micro-batch and the gradient of their mean."""
        if self.dropout:
            shapes = {at: n for at, n in c.inputs(*batch.ids.shape).items() if at in tuning.scale}
            dtype = next(iter(W.values())).dtype
            keep = draw_dropout(self.rng, self.dropout, shapes, dtype)
            tuning = replace(tuning, dropout_scale=keep)
        _, back = loss(batch, W, c, tuning)
        return self.counted(batch, c), self.flown(back(1.0), W)

    def flown(self, g: Weights, W: Weights) -> Weights:
        """The gradients as they arrive."""
        return g

    def gone_in(self, parts: Parts) -> Any:
        """What the optimizer has of a step."""
        return parts

    def flat(self, array: Array) -> Array:
        """Vectors have one axis in a file."""
        return array if array.shape[1] > 1 else array[:, 0]

    def told(self, adapter: dict[str, Array]) -> dict[str, Array]:
        """What is given back of a step."""
        return adapter


def trains(**methods: Any) -> Callable[[], Trainer]:
    """`Trainer` with these methods in the place of its own."""
    return type("Wrong", (Trainer,), methods)


def _labelled(change: Callable[[Mapping[str, Array]], Array]) -> Callable[[], Trainer]:
    """Other labels of a text, which has one for each token."""
    return trains(
        labels=lambda my, given: change(given) if given["labels"].ndim > 1 else given["labels"]
    )


def _moved(labels: Array, by: int) -> Array:
    """Each label that many places later, and nothing where none comes from."""
    moved = np.full_like(labels, IGNORED)
    if by > 0:
        moved[:, by:] = labels[:, :-by]
    else:
        moved[:, :by] = labels[:, -by:]
    return moved


def _rows_alone(given: Mapping[str, Array]) -> Array:
    labels = given["labels"].copy()
    labels[1:] = IGNORED
    return labels


def _times(factor: Callable[[Batch, int], float]) -> Callable[[], Trainer]:
    """Gradients multiplied by a function of the micro-batch and its number of labels."""

    def part(my: Trainer, W: Weights, batch: Batch, c: Config, tuning: TrainableSpec) -> Any:
        n, g = Trainer.part(my, W, batch, c, tuning)
        times = np.asarray(factor(batch, n)).astype(next(iter(g.values())).dtype)
        return n, {name: times * array for name, array in g.items()}

    return trains(part=part)


def _weighted(weigh: Callable[[list[Any]], list[Any]]) -> Callable[[], Trainer]:
    """The micro-batches of a step weighted by a function of their numbers of labels."""

    def gone_in(my: Trainer, parts: Parts) -> Any:
        weights = weigh([n for n, _ in parts])
        return [(w, g) for w, (_, g) in zip(weights, parts, strict=True)]

    return trains(gone_in=gone_in)


def _summed(my: Trainer, parts: Parts) -> Any:
    return sum_gradients(*(g for _, g in parts))


def _piling(my: Trainer, parts: Parts) -> Any:
    my.memory["parts"] = [*my.memory.get("parts", []), parts]
    mean = {name: 0 * array for name, array in parts[0][1].items()}
    for each in my.memory["parts"]:
        N = sum(n for n, _ in each)
        for n, g in each:
            mean = {name: mean[name] + np.float32(n / N) * g[name] for name in mean}
    return mean


def _forgetting(my: Trainer, *given: Any) -> Any:
    """With a memory that lasts for one call."""
    my.memory.clear()
    return Trainer.train(my, *given)


def _late(my: Trainer, parts: Parts) -> Any:
    before, my.memory["last"] = my.memory.get("last", parts), parts
    return before


def _clipped_apart(my: Trainer, parts: Parts) -> Any:
    clipped = []
    for n, g in parts:
        norm = sum((v**2).sum() for v in g.values()) ** 0.5
        factor = min(1.0, my.memory["greatest"] / (norm + 1e-6))
        clipped.append((n, {k: v * v.dtype.type(factor) for k, v in g.items()}))
    return clipped


def _clips(my: Trainer, *given: Any) -> Any:
    my.memory["greatest"] = given[-1].get("max_grad_norm", np.inf)
    return Trainer.train(my, *given)


def _settings(**changes: Callable[[Mapping[str, Any], int], Any]) -> Callable[[], Trainer]:
    """Settings taken for others: functions of what was asked and the number of micro-batches."""

    def train(my: Trainer, model: str, adapter: str, batches: Any, settings: Any) -> Any:
        count = sum(map(len, batches))
        new = {key: change(settings, count) for key, change in changes.items()}
        return Trainer.train(my, model, adapter, batches, {**settings, **new})

    return trains(train=train)


def _of(id: str) -> Callable[[], Trainer]:
    """A loop over the optimizer that is misread so."""
    wrong: Any = next(m for m in OPTIMIZERS if m.id == f"optimizer-{id}").make
    return type("Wrong", (wrong, Trainer), {})


def _counting(labels: Array) -> bool:
    """Whether one of them is predicted."""
    return bool(((labels[:, 1:] if labels.ndim > 1 else labels) != IGNORED).any())


def _each_micro(my: Trainer, model: str, adapter: str, batches: Any, settings: Any) -> Any:
    """A step of the optimizer after each micro-batch in which a label counts."""
    alone = [[[batch] for batch in step if _counting(batch["labels"])] for step in batches]
    every = Trainer.train(my, model, adapter, [step for steps in alone for step in steps], settings)
    ends = np.cumsum([len(step) for step in alone]) - 1
    return [every[end] for end in ends]


def _decayed_base(my: Trainer, W: Weights, batch: Batch, c: Config, tuning: TrainableSpec) -> Any:
    k = my.memory["k"] = my.memory.get("k", -1) + 1
    shrunk = {
        name: v if name in tuning.trained else v * v.dtype.type(0.99**k) for name, v in W.items()
    }
    return Trainer.part(my, shrunk, batch, c, tuning)


def _unpadded(my: Trainer, c: Config, given: Mapping[str, Array]) -> Batch:
    """Padding before a text taken for a part of it."""
    mask = given["attention_mask"]
    return Trainer.batch(
        my, c, {**given, "attention_mask": mask if mask[:, 0].all() else np.ones_like(mask)}
    )


def _mean_of_none(my: Trainer, W: Weights, batch: Batch, c: Config, tuning: TrainableSpec) -> Any:
    """0 / 0 where no label counts."""
    if Trainer.counts(my, batch, c):
        return Trainer.part(my, W, batch, c, tuning)
    return 0, {name: np.full_like(W[name], np.nan) for name in sorted(tuning.trained)}


def _of_classifiers(change: Callable[..., Any]) -> Callable[[], Trainer]:
    """The number of labels and the gradients of a classifier's micro-batch, changed."""

    def part(my: Trainer, W: Weights, batch: Batch, c: Config, tuning: TrainableSpec) -> Any:
        n, g = Trainer.part(my, W, batch, c, tuning)
        return (n, g) if c.causal else change(n, g, batch)

    return trains(part=part)


def _without_root(my: Trainer, W: Weights, batch: Batch, c: Config, tuning: TrainableSpec) -> Any:
    """rsLoRA's scale over √r where activations are computed again."""
    if my.checkpointed:
        scale = {at: s / len(W[f"{at}.A"]) ** 0.5 for at, s in tuning.scale.items()}
        tuning = replace(tuning, scale=scale)
    return Trainer.part(my, W, batch, c, tuning)


def _unclipped(my: Trainer, model: str, adapter: str, batches: Any, settings: Any) -> Any:
    """No clipping under checkpointing."""
    own = dict(settings)
    if own.get("gradient_checkpointing"):
        own.pop("max_grad_norm", None)
    return Trainer.train(my, model, adapter, batches, own)


LABELS = (
    *family(
        "TRAIN",
        "train.labels",
        ("no-shift", "token t learned at t", _labelled(lambda g: _moved(g["labels"], 1))),
        (
            "double-shift",
            "token t + 2 learned at t",
            _labelled(lambda g: _moved(g["labels"], -1)),
            "transformers 47394",
        ),
        (
            "ids-for-labels",
            "every token that is no padding, ignored or not",
            _labelled(lambda g: np.where(g["attention_mask"] == 1, g["input_ids"], IGNORED)),
        ),
        (
            "padding-as-0",
            "ignored labels as class 0",
            _labelled(lambda g: np.maximum(g["labels"], 0)),
        ),
        (
            "first-padding",
            "the first token of padding is learned",
            _labelled(
                lambda g: np.where(
                    (g["attention_mask"] == 0) & (_moved(g["attention_mask"], 1) == 1),
                    g["input_ids"],
                    g["labels"],
                )
            ),
            "mlx-lm 1697",
        ),
        ("first-row", "the first row of a batch alone", _labelled(_rows_alone)),
        ("padding-left-read", "padding before a text is read", trains(batch=_unpadded)),
        ("sum", "the sum over labels", _times(lambda batch, n: n)),
        ("by-batch", "divided by the number of rows", _times(lambda b, n: n / len(b.ids))),
        ("by-positions", "divided by all positions", _times(lambda b, n: n / b.ids.size)),
        ("gradient-late", "the gradient of the step before",
         trains(train=_forgetting, gone_in=_late)),
        ("gradient-not-zeroed", "gradients pile up over the steps",
         trains(train=_forgetting, gone_in=_piling)),
        ("A-alone", "B stays", _of("B-frozen")),
        ("B-alone", "A stays", _of("A-frozen")),
        ("ascent", "uphill", _times(lambda b, n: -1.0)),
        ("base-decays", "1 percent less of the frozen weights in each batch",
         trains(part=_decayed_base, train=_forgetting)),
    ),
    *family(
        "TRAIN",
        "train.prompt",
        (
            "prompt-learned",
            "the prompt is learned too",
            _labelled(
                lambda g: np.where(
                    np.maximum.accumulate((g["labels"] != IGNORED)[:, ::-1], 1)[:, ::-1],
                    g["input_ids"],
                    g["labels"],
                )
            ),
        ),
        (
            "prompt-last-learned",
            "the last token of the prompt is learned too",
            _labelled(
                lambda g: np.where(
                    (g["labels"] == IGNORED) & (_moved(g["labels"], -1) != IGNORED),
                    g["input_ids"],
                    g["labels"],
                )
            ),
        ),
        (
            "answer-first-lost",
            "the first token of the answer is not learned",
            _labelled(
                lambda g: np.where(_moved(g["labels"], 1) == IGNORED, IGNORED, g["labels"])
            ),
        ),
        ("scale", "s = 1", trains(
            tuned=lambda my, c, W, t: replace(t, scale=dict.fromkeys(t.scale, 1.0)))),
    ),
)  # fmt: skip

ACCUMULATE = family(
    "TRAIN",
    "train.gradient-accumulation",
    (
        "mean-of-means",
        "the mean of the micro-batches' means",
        _weighted(lambda n: [1] * len(n)),
        "transformers 34191",
        "mlx-lm 1413",
    ),
    (
        "sum-of-means",
        "the sum of the micro-batches' means",
        trains(gone_in=_summed),
    ),
    ("last-micro-batch", "the last micro-batch alone", trains(micro=lambda my, s: s[-1:])),
    ("first-micro-batch", "the first micro-batch alone", trains(micro=lambda my, s: s[:1])),
    (
        "rows-weigh",
        "micro-batches weighted by their rows",
        trains(counted=lambda my, batch, c: len(batch.ids)),
    ),
    (
        "positions-weigh",
        "micro-batches weighted by all their positions",
        trains(counted=lambda my, batch, c: batch.ids.size),
    ),
    (
        "tokens-weigh",
        "micro-batches weighted by their tokens, ignored ones too",
        trains(counted=lambda my, batch, c: int(batch.real[:, 1:].sum())),
    ),
    (
        "mean-of-none",
        "0 / 0 where no label of a micro-batch counts",
        trains(counts=lambda my, batch, c: True, part=_mean_of_none),
    ),
    (
        "labels-not-shifted-weigh",
        "the first label of a row is counted, which nothing predicts",
        trains(counted=lambda my, batch, c: int((batch.labels != IGNORED).sum())),
    ),
    ("step-per-micro-batch", "a step for each micro-batch", trains(train=_each_micro)),
)

CLIP = family(
    "TRAIN",
    "train.clip",
    ("clip-none", "no clipping", _of("clip-none")),
    ("clip-per-tensor", "each tensor clipped by itself", _of("clip-per-tensor")),
    ("sgd-no-momentum", "SGD without its momentum", _settings(momentum=lambda s, n: 0.0)),
    (
        "sgd-no-decay",
        "SGD without its decay",
        _settings(weight_decay=lambda s, n: 0.0 if s["optimizer"] == "sgd" else s["weight_decay"]),
    ),
    ("clip-always", "scaled up to the greatest norm too", _of("clip-always")),
    (
        "clip-micro-batches",
        "each micro-batch's gradient clipped, then their mean",
        trains(train=_clips, gone_in=_clipped_apart),
    ),
)

SCHEDULE = (
    *family(
        "TRAIN",
        "train.linear-schedule",
        ("schedule-none", "a constant rate", _settings(schedule=lambda s, n: "constant")),
        ("schedule-ahead", "the factor of the step after", _of("schedule-one-ahead")),
        ("schedule-no-warmup", "no warm-up", _settings(warmup_steps=lambda s, n: 0)),
        (
            "adam-restarted",
            "m and v from 0 in every step",
            _of("state-lost"),
        ),
        ("adam-step-from-2", "bias correction counted from 2", _of("t-from-2")),
    ),
    *family(
        "TRAIN",
        "train.cosine-schedule",
        (
            "schedule-of-micro-batches",
            "the schedule as long as there are micro-batches",
            _settings(total_steps=lambda s, n: n + 2 if "total_steps" in s else n),
        ),
        (
            "schedule-as-linear",
            "linear where cosine is asked for",
            _of("schedule-linear-for-cosine"),
        ),
        (
            "schedule-none-without-warmup",
            "a constant rate where there is no warm-up",
            _of("schedule-none-without-warmup"),
        ),
    ),
)

DECAY = (
    *family(
        "TRAIN",
        "train.weight-decay",
        ("decay-none", "λ = 0", _settings(weight_decay=lambda s, n: 0.0)),
        (
            "decay-biases-spared",
            "λ = 0 for biases, unasked",
            trains(decay=lambda my, c, name: c.decay * (not name.endswith("bias"))),
        ),
        (
            "decay-factors-alone",
            "λ = 0 for what is trained in full",
            trains(decay=lambda my, c, name: c.decay * name.endswith((".A", ".B"))),
        ),
        ("decay-coupled", "λ p in the gradient", _of("decay-coupled")),
        ("still-skipped", "no decay of an A while B = 0", _of("still-skipped")),
        (
            "biases-frozen",
            "biases stay",
            trains(flown=lambda my, g, W: {n: v * (not n.endswith("bias")) for n, v in g.items()}),
        ),
    ),
    *family(
        "TRAIN",
        "train.no-weight-decay",
        ("decay-default", "λ = 0.01 where 0 is asked for", _of("decay-default")),
    ),
)

LORAPLUS = family(
    "TRAIN",
    "train.loraplus",
    (
        "warmup-constant-none",
        "no warm-up where the schedule is constant",
        _of("schedule-constant-without-warmup"),
        "transformers get_scheduler",
    ),
    ("loraplus-ignored", "one rate", _settings(loraplus_lr_ratio=lambda s, n: 1.0)),
    ("loraplus-on-A", "A has the greater rate", _of("loraplus-on-A")),
    ("loraplus-not-in-decay", "B decays at the rate of A", _of("loraplus-not-in-decay")),
)

LORAPLUS += family(
    "TRAIN",
    "train.loraplus.other-params",
    ("loraplus-not-A", "all but A has the greater rate", _of("loraplus-not-A")),
    ("loraplus-vectors", "biases have the greater rate too", _of("loraplus-vectors"), "peft 0.21"),
    ("loraplus-no-embedding", "an embedding's B has it not", _of("loraplus-no-embedding")),
)


def _goes_on(my: Trainer, model: str, adapter: str, batches: Any, settings: Any) -> Any:
    """A second training starts where the first one of the same folder ended."""
    before = my.memory.setdefault(adapter, [])
    done = len(before)
    before += batches
    own = {"total_steps": len(batches), **settings}
    return Trainer.train(my, model, adapter, before, own)[done:]


AGAIN = family(
    "TRAIN",
    "train.repeat",
    ("adapter-kept", "the adapter that was trained last is trained on", trains(train=_goes_on)),
)

OTHERS = (
    *family(
        "TRAIN",
        "train.classifier",
        (
            "classifier-frozen",
            "a classifier stays as it is",
            _of_classifiers(lambda n, g, batch: (n, {k: 0 * v for k, v in g.items()})),
        ),
        (
            "classifier-rows-weigh",
            "a classifier's micro-batches weighted by their rows",
            _of_classifiers(lambda n, g, batch: (len(batch.ids), g)),
        ),
        (
            "classifier-types-lost",
            "all token types 0",
            trains(batch=lambda my, c, given: replace(Trainer.batch(my, c, given), types=None)),
        ),
    ),
    *family(
        "TRAIN",
        "train.dora",
        (
            "magnitudes-frozen",
            "DoRA's magnitudes stay",
            trains(
                flown=lambda my, g, W: {n: v * (not n.endswith("magnitude")) for n, v in g.items()}
            ),
        ),
        (
            "magnitudes-alone",
            "of DoRA the magnitudes alone are trained",
            trains(
                flown=lambda my, g, W: {
                    n: v * (n.endswith("magnitude") or not any(k.endswith("magnitude") for k in g))
                    for n, v in g.items()
                }
            ),
        ),
    ),
)

TOGETHER = family(
    "TRAIN",
    "train.combined",
    ("checkpointing-unclipped", "no clipping under checkpointing", trains(train=_unclipped)),
    (
        "checkpointing-without-root",
        "rsLoRA's scale over √r under checkpointing",
        trains(part=_without_root),
    ),
    (
        "upper-layer-alone",
        "the first layer's adapters stay",
        trains(flown=lambda my, g, W: {n: v * (not _below(n, g)) for n, v in g.items()}),
    ),
    (
        "layers-exchanged",
        "each layer gets another's gradients",
        trains(flown=lambda my, g, W: {n: g[_exchanged(n, g)] for n in g}),
    ),
)


def _below(name: str, g: Weights) -> bool:
    """Whether it is in the first layer of several."""
    return name.startswith("layers.0.") and _exchanged(name, g) != name


def _exchanged(name: str, g: Weights) -> str:
    other = name.replace("layers.0.", "layers.*.").replace("layers.1.", "layers.0.")
    other = other.replace("layers.*.", "layers.1.")
    return other if other in g else name


SAME = equivalents(
    "train",
    ("plain", "the specification's loss, another optimizer", Trainer),
    (
        "one-batch",
        "a micro-batch counts as its labels, in another order",
        trains(micro=lambda my, step: step[::-1]),
    ),
    (
        "rows-apart",
        "a micro-batch for each row",
        trains(
            micro=lambda my, step: [
                {name: array[i : i + 1] for name, array in batch.items()}
                for batch in step
                for i in range(len(batch["labels"]))
            ]
        ),
    ),
    (
        "padding-cut",
        "columns of padding alone are cut off",
        trains(
            batch=lambda my, c, g: Trainer.batch(
                my,
                c,
                {n: v[:, g["attention_mask"].any(0)] if v.ndim > 1 else v for n, v in g.items()},
            )
        ),
    ),
)

MUTANTS: tuple[Mutant, ...] = (
    LABELS + ACCUMULATE + CLIP + SCHEDULE + DECAY + LORAPLUS + AGAIN + OTHERS + TOGETHER + SAME
)
