"""A study that runs, what is timed first and alone; and all that it has results."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

from minilora.io.loading import package_model
from minilora.studies.claims.costs import Cost, costs_of
from minilora.studies.claims.study import (
    PACKAGE,
    REAL,
    Asked,
    Course,
    Side,
    Study,
    Text,
    follow,
    model_of,
    own_texts,
)
from minilora.studies.processes import in_processes


def real_path() -> Path | None:
    """The real model's file, where the package is installed.

    Errors: FormatError unless the package holds just one model.
    """
    try:
        return package_model(PACKAGE)
    except ImportError:
        return None


@dataclass(frozen=True)
class Results:
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
        (cost,) = [c for c in self.costs if (c.model, c.side) == (model, side)]
        return cost

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
"""Is told what is done, how many are done by now, and of how many."""


def measure(
    study: Study, jobs: int = 1, watch: Watch | None = None, executor: Executor | None = None
) -> Results:
    """Runs the study, so many runs at a time; what is timed runs before, here and alone.

    ``executor``: whose workers make the other runs, in the place of ``jobs`` processes here.

    The real model is left out where what it needs is not installed.

    Errors: those of `processes.in_processes`.
    """
    started, studies = time.monotonic(), [replace(study, real=None)]
    why = "it was not asked for" if study.real is None else "" if study.real.path else lacking()
    if study.real is not None and not why:
        studies.append(replace(study.real, path=study.real.path or str(real_path())))
    results = Results(tuple(studies), (), (), f"{REAL} was left out: {why}" if why else "")
    for one in studies:
        results = _measured(one, results, jobs, watch, executor)
    return replace(results, seconds=time.monotonic() - started)


def _measured(
    study: Study, results: Results, jobs: int, watch: Watch | None, executor: Executor | None
) -> Results:
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
    results = replace(results, costs=(*results.costs, *costs))
    rest = [seed for seed in study.seeds if seed not in study.tuned_by]
    each = [(model, side) for model in study.models for side in sides[model]]
    of_rates = [(*one, lr) for one in each for lr in study.rates_of(one[1])]
    total, done = len(of_rates) * len(study.tuned_by) + len(each) * len(rest), 0

    def courses(rows: Sequence[tuple[str, Side, float]], seeds: Sequence[int]) -> list[Course]:
        nonlocal done
        asked = [Asked(study, *row, seed, own[row[0], seed]) for row in rows for seed in seeds]
        runs: dict[int, Course] = {}
        at_once = jobs_within(machine_memory(), most, jobs) if asked else 1
        for i, course in in_processes(follow, asked, at_once, executor):
            if course is None:
                raise KeyboardInterrupt
            runs[i], done = course, done + 1
            say(f"{course.model}, {course.side.name}", done, total)
        return [runs[i] for i in sorted(runs)]

    results = replace(results, courses=(*results.courses, *courses(of_rates, study.tuned_by)))
    best = [(*one, results.rate(*one)) for one in each] if rest else []
    return replace(results, courses=(*results.courses, *courses(best, rest)))
