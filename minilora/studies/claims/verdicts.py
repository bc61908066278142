"""The claims, each with its criterion and its literature, and what the figures say of them."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import fmean, stdev

from scipy.stats import t as student

from minilora.io.files import pack_json
from minilora.studies.claims.costs import Cost
from minilora.studies.claims.results import Results
from minilora.studies.claims.study import FULL, HELD, OWN, Course, Side

HU = 'Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"'
BIDERMAN = 'Biderman et al. 2024, "LoRA Learns Less and Forgets Less"'
SCHULMAN = 'Schulman et al. 2025, "LoRA Without Regret"'

CONFIDENCE = 0.95
"""That of every interval over seeds or rounds: Student's t."""


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
    of: Callable[[Results], Figures]
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


HOLDS, WHEN, NOT, UNDECIDED = "holds", "holds when", "does not hold", "undecided"
"""The verdicts: every case supports the claim, some do, none does; no case decides."""


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
        """`HOLDS`, `WHEN`, `NOT`, or `UNDECIDED` where no case supports it and none opposes it."""
        support = [case.supports for case in self.cases]
        if all(support):
            return HOLDS
        if any(support):
            return WHEN
        return NOT if False in support else UNDECIDED

    @property
    def sentence(self) -> str:
        """The verdict, with the cases in which the claim holds where it does not hold in all."""
        return f"{WHEN}: {'; '.join(self.named(True))}" if self.word == WHEN else self.word

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


def verdicts(results: Results) -> list[Verdict]:
    """Of all `CLAIMS` that have a figure: a study may have no side of attention alone."""
    return [judge(claim, figures) for claim in CLAIMS if (figures := claim.of(results))]


def _costs(results: Results, of: Callable[[Cost, Cost], Interval]) -> Figures:
    """A figure of LoRA's cost and full fine-tuning's, for each model and rank."""
    chosen = [cost for cost in results.costs if cost.side.rank and not cost.side.attention]
    return {f"{c.model}, {c.side.name}": of(c, results.cost(c.model, FULL)) for c in chosen}


def _ratio_of_times(lora: Cost, full: Cost) -> Interval:
    logs = [math.log(a / b) for a, b in zip(lora.seconds, full.seconds, strict=True)]
    return Interval(*map(math.exp, vars(over(logs)).values()))


def _pairs(results: Results, of: Callable[[Course, Course], float], wider: float = 0.0) -> Figures:
    """A figure of LoRA's run and full fine-tuning's with the same seed, each at its best rate."""
    figures: Figures = {}
    for model, study in results.models.items():
        full = results.best(model, FULL)
        for rank in study.ranks:
            both = zip(results.best(model, Side(rank)), full, strict=True)
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


def _same_loss(results: Results) -> Figures:
    def of(lora: Course, full: Course) -> float:
        level = _level(lora, full)
        each = []
        for course in (lora, full):
            step = fmean(results.cost(course.model, course.side).seconds)
            each.append(max(1.0, crossing(course, level)[0]) * step)
        return math.log(each[0] / each[1])

    return {
        name: Interval(*map(math.exp, vars(figure).values()))
        for name, figure in _pairs(results, of).items()
    }


def _forgets_at_the_same(lora: Course, full: Course) -> float:
    level = _level(lora, full)
    return crossing(lora, level)[1] - crossing(full, level)[1]


def _rank_gain(results: Results) -> Figures:
    figures = {}
    for model, study in results.models.items():
        few, many = (results.best(model, Side(study.ranks[i])) for i in (0, -1))
        pairs = zip(few, many, strict=True)
        figures[model] = over(
            [(a.looks[-1].second - b.looks[-1].second) / learned(b) for a, b in pairs]
        )
    return figures


def _layers(results: Results) -> Figures:
    figures = {}
    for model, study in results.models.items():
        for alone in [side for side in results.sides(model) if side.attention]:
            both = (results.best(model, alone), results.best(model, Side(study.ranks[1])))
            pairs = zip(*both, strict=True)
            figures[model] = over([a.looks[-1].second - b.looks[-1].second for a, b in pairs])
    return figures


def _rates(results: Results) -> Figures:
    """Decades between either side's best rates, seed by seed; of a lone seed they show nothing."""
    figures: Figures = {}

    def own(model: str, side: Side, seed: int) -> float:
        runs = [p for p in results.courses if (p.model, p.side, p.seed) == (model, side, seed)]
        return min(runs, key=lambda p: p.valid).lr

    for model, study in results.models.items():
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
        lambda results: _costs(results, lambda c, _: exact(c.trained / c.whole)),
        most=1.0,
        shown=_percent,
    ),
    Claim(
        "flops",
        "A step takes about two thirds of the arithmetic.",
        "the counted FLOPs of a step's products, over full fine-tuning's,",
        f"{SCHULMAN}, on compute: slightly more than 2/3",
        lambda results: _costs(results, lambda c, full: exact(c.flops / full.flops)),
        most=0.75,
    ),
    Claim(
        "step",
        "A step is faster.",
        "the time of a step over full fine-tuning's, of rounds in turn,",
        f"{HU}, section 4.2",
        lambda results: _costs(results, _ratio_of_times),
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
        lambda results: _costs(
            results,
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
        lambda results: _costs(results, lambda c, _: exact(c.other)),
        most=1.0,
        shown="{:.0f}".format,
    ),
    Claim(
        "quality",
        "LoRA learns as well as full fine-tuning.",
        "how far the second task's loss falls, over how far it falls in full fine-tuning,",
        f"{HU}, section 5; {SCHULMAN}; against {BIDERMAN}",
        lambda results: _pairs(results, lambda a, b: learned(a) / learned(b)),
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
        lambda results: _pairs(results, lambda a, b: a.looks[-1].second - b.looks[-1].second),
        least=0.0,
    ),
    Claim(
        "forgets-less",
        "LoRA forgets less.",
        "the first task's loss at the end less that of full fine-tuning",
        BIDERMAN,
        lambda results: _pairs(results, lambda a, b: a.looks[-1].first - b.looks[-1].first),
        most=0.0,
    ),
    Claim(
        "forgets-less-for-the-same",
        "LoRA forgets less for as much learned.",
        "the first task's loss less that of full fine-tuning, where either first has the least "
        "loss on the second that both reach,",
        BIDERMAN,
        lambda results: _pairs(results, _forgets_at_the_same),
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
        lambda results: _costs(results, lambda c, full: exact(c.disk / full.disk)),
        most=0.1,
        shown=_percent,
    ),
)
"""The claims, their criteria stated before anything is measured."""


def table(results: Results, judged: Sequence[Verdict]) -> str:
    """The verdicts as lines of text, each with its criterion and its figures."""
    lines = []
    for verdict in judged:
        claim = verdict.claim
        sentence = verdict.sentence.replace(verdict.word, verdict.word.upper(), 1)
        lines += [f"{claim.says} {sentence}", f"  holds if {claim.criterion}"]
        lines += [f"  {case_words(claim, case)}" for case in verdict.cases]
        lines.append(f"  {claim.source}")
    lines += notes(results)
    return "\n".join(lines) + "\n"


def case_words(claim: Claim, case: Case) -> str:
    """A case's figure in words."""
    figure, show = case.figure, claim.shown
    spread = "" if figure.low == figure.high else f" ({show(figure.low)} to {show(figure.high)})"
    word = {True: "yes", False: "no", None: "undecided"}[case.supports]
    return f"{case.name}: {show(figure.mean)}{spread}, {word}"


def notes(results: Results) -> list[str]:
    """How it was measured, and what to keep in mind."""

    def listed(values: Iterable[float]) -> str:
        return ", ".join(f"{x:g}" for x in values)

    said = [
        f"{len(results.courses)} runs in {results.seconds:.0f} s. In brackets: {CONFIDENCE:.0%} "
        "intervals over seeds, of times over rounds; what has none was counted. Each case is "
        "judged alone: of many that are near the criterion, some will pass by chance."
    ]
    for study in results.studies:
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
    if edge := results.at_the_edge():
        said.append(f"Best at an end of the grid, so that others may be better: {'; '.join(edge)}.")
    if diverged := [p for p in results.courses if p.why]:
        said.append(f"{len(diverged)} of the runs diverged; none of these is a best one.")
    return [*said, f"{results.left_out}."] if results.left_out else said


def as_json(results: Results, judged: Sequence[Verdict]) -> bytes:
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
    runs = [{**asdict(course), "valid": plain(course.valid)} for course in results.courses]
    costs = [asdict(cost) for cost in results.costs]
    studies = [asdict(replace(study, path="")) for study in results.studies]
    said = {"claims": claims, "notes": notes(results), "studies": studies}
    return pack_json({**said, "costs": costs, "runs": runs})
