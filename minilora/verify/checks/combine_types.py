"""The ways to combine adapters that change more than a sum: linear, TIES, DARE, magnitude pruning.

Each has a form that works on the factors, A and B by themselves, and one that works on the changes
s B A and ends with an SVD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import log, sqrt
from typing import Any

import numpy as np

from minilora.spec.lora import scale
from minilora.spec.multi_adapter import combine_linear, combine_svd, ties, trim
from minilora.verify.checks.init import FALSE_ALARM
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.inputs import long
from minilora.verify.core.tolerance import unit_roundoff
from minilora.verify.core.types import BOUND, CHANCE, Case, Comparison
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray

M, N = 6, 8
"""The sides of the weight, even, so that half of the entries is a whole number."""

DENSITY = 0.5
"""The density of trimming: half of the entries are kept, a whole number."""

KEPT = 0.25
"""The density of DARE's random masks: unlike 1/2, it differs from the share that is dropped."""

CALLS = 4
"""How often a combination is drawn by chance."""


@dataclass(frozen=True)
class Alike:
    """Adapters of one rank, with weights of both signs: whole numbers, of which no two are alike.

    The products w s are powers of 4, so that their roots round nothing.
    """

    adapters: list[dict[str, Any]]
    weights: list[float]

    def factors(self, part: str) -> list[Array]:
        """A or B of each."""
        return [long(a[part]) for a in self.adapters]

    def scales(self) -> list[float]:
        """s of each."""
        return [float(scale(a["alpha"], a["r"], "use_rslora" in a)) for a in self.adapters]

    def changes(self) -> list[Array]:
        """s B A of each."""
        pairs = zip(self.scales(), self.factors("B"), self.factors("A"), strict=True)
        return [s * (B @ A) for s, B, A in pairs]


def draw_alike(case: Case) -> Alike:
    """Two or three adapters of equal rank, of which one may be rsLoRA's, or have a negative alpha.

    None of the entries that a trim has to choose between, and no sum that elects a sign, is a tie:
    which way those go, libraries leave open.
    """
    rng, dtype = case.rng(), DTYPES[case.dtype]
    r, count = ((2, 2), (4, 3), (2, 3), (4, 2))[case.number % 4]

    def distinct(*shape: int) -> Array:
        size = shape[0] * shape[1]
        signs = rng.choice([-1.0, 1.0], size)
        numbers: Array = ((1 + rng.permutation(size)) * signs).reshape(shape).astype(dtype)
        return numbers

    while True:
        adapters: list[dict[str, Any]] = [
            {"A": distinct(r, N), "B": distinct(M, r), "r": r, "alpha": s * r}
            for s in rng.choice([0.25, 1.0, 4.0], count).tolist()
        ]
        adapters[-1] |= {"alpha": -adapters[-1]["alpha"]} if case.number % 3 == 1 else {}
        if r == 4:  # whose root is a power of two
            adapters[0] |= case.fixed.fitting(case.check, {"use_rslora": True})
            adapters[0]["alpha"] /= 1 + ("use_rslora" in adapters[0])
        signs = rng.permutation([1.0, -1.0, 1.0])[:count]
        weights = (signs * rng.choice([0.25, 1.0, 4.0], count)).tolist()
        drawn = Alike(adapters, weights)
        if all(map(_is_clear, (drawn.factors("A"), drawn.factors("B"), drawn.changes()))):
            return drawn


def _is_clear(arrays: list[Array]) -> bool:
    """Whether nothing is a tie, with half of the entries kept or all of them."""
    for D in arrays:
        sizes = np.sort(np.abs(D), axis=None)
        if sizes[D.size // 2 - 1] == sizes[D.size // 2]:
            return False
    trimmed = [trim(D, DENSITY) for D in arrays]
    return all(
        (np.sum(some, axis=0)[np.any(some, axis=0)] != 0).all() for some in (arrays, trimmed)
    )


def _signed_roots(drawn: Alike) -> tuple[list[float], list[float]]:
    """±√|w s| for A, and √|w s| for B."""
    products = [w * s for w, s in zip(drawn.weights, drawn.scales(), strict=True)]
    roots = [abs(p) ** 0.5 for p in products]
    return [root if p >= 0 else -root for p, root in zip(products, roots, strict=True)], roots


def _pruned(arrays: list[Array], weights: list[float], density: float) -> Array:
    """The weighted sum of the trimmed arrays."""
    terms = [w * trim(D, density) for w, D in zip(weights, arrays, strict=True)]
    total: Array = np.sum(terms, axis=0)
    return total


WAYS: dict[str, Callable[[list[Array], list[float], float], Array]] = {
    "ties": ties,
    "magnitude_prune": _pruned,
    "dare_ties": ties,
    "dare_linear": _pruned,
}
"""The ways, as functions of arrays, weights and the density; of DARE with density 1, where no
chance is left."""


def _combined(
    subject: GuardedImplementation, drawn: Alike, dtype: str, kind: str, **settings: Any
) -> Array:
    answer = subject.call(
        "combine", drawn.adapters, drawn.weights, combination_type=kind, **settings
    )
    return subject.answer(answer, "ΔW", (M, N), dtype)


def linear(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """The linear combination has B = Σ √|w s| B and A = Σ ±√|w s| A; compared by ==."""
    drawn = draw_alike(case)
    triples = list(zip(drawn.factors("A"), drawn.factors("B"), drawn.scales(), strict=True))
    A, B = combine_linear(triples, drawn.weights)
    yield Comparison("ΔW", _combined(subject, drawn, case.dtype, "linear", density=1.0), B @ A)


def of_factors(
    subject: GuardedImplementation, case: Case, kind: str, density: float
) -> Iterable[Comparison]:
    """A and B by themselves, with the root of each weight.

    A mean of up to three loses 2 u with a reciprocal, in A and in B, each is stored, and their
    product loses (r + 1) u: (r + 8) u |B| |A| at most.
    """
    drawn = draw_alike(case)
    roots = _signed_roots(drawn)
    A, B = (
        WAYS[kind](drawn.factors(part), w, density) for part, w in zip("AB", roots, strict=True)
    )
    u = unit_roundoff(subject.precision(case.dtype).storage)
    bound = (len(A) + 8) * u * (np.abs(B) @ np.abs(A))
    answer = _combined(subject, drawn, case.dtype, kind, density=density)
    yield Comparison("ΔW", answer, B @ A, bound.astype(np.float64), BOUND)


def of_changes(
    subject: GuardedImplementation, case: Case, kind: str, density: float
) -> Iterable[Comparison]:
    """The best approximation of the combined changes, of rank 1 and of full rank."""
    drawn = draw_alike(case)
    wanted = WAYS[kind](drawn.changes(), drawn.weights, density)
    u = unit_roundoff(subject.precision(case.dtype).storage)
    slack = svd_slack(wanted, u)
    for rank in (1, min(M, N)):
        *_, dropped = combine_svd([wanted.astype(float)], [1.0], rank)
        settings = {"density": density, "svd_rank": rank}
        answer = long(_combined(subject, drawn, case.dtype, f"{kind}_svd", **settings))
        far = np.sqrt(((answer - wanted) ** 2).sum())
        label = f"‖ΔW - ΔW of rank {rank}‖"
        yield Comparison(label, far, np.asarray(float(dropped)), np.asarray(slack), BOUND)


def svd_slack(wanted: Array, u: float) -> float:
    """What a stable SVD and the product after it lose at most: 4 √k (m + n) u ‖ΔW‖, k = min(m, n).

    Golub and Van Loan 2013, section 8.6.
    """
    return float(4 * min(wanted.shape) ** 0.5 * sum(wanted.shape) * u * sqrt((wanted**2).sum()))


def dare_by_chance(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """DARE of changes keeps each entry by chance and divides it by the density.

    The first change has entries of ±1 and the second of ±16, so that a sum shows which of them are
    kept. With these, every entry is known.
    """
    rng, dtype = case.rng(), DTYPES[case.dtype]

    def signs(*shape: int) -> Array:
        return rng.choice([-1.0, 1.0], shape).astype(dtype)

    adapters = [{"A": signs(1, N), "B": v * signs(M, 1), "r": 1, "alpha": 1.0} for v in (1, 16)]
    drawn = Alike(adapters, [1.0, 1.0])
    first, second = drawn.changes()
    u = unit_roundoff(subject.precision(case.dtype).storage)
    masks = []
    for _ in range(CALLS):
        settings = {"density": KEPT, "svd_rank": min(M, N)}
        answer = long(_combined(subject, drawn, case.dtype, "dare_linear_svd", **settings))
        of_second = np.abs(answer) > 8
        of_first = np.abs(answer - of_second * second / KEPT) > 1
        masks.append(np.stack([of_first, of_second]))
        wanted = (of_first * first + of_second * second) / KEPT
        slack = np.full(wanted.shape, svd_slack(wanted, u))
        yield Comparison("ΔW, with the entries that it shows as kept", answer, wanted, slack, BOUND)
    kept = np.stack(masks)
    allowed = sqrt(log(2 / FALSE_ALARM) / (2 * kept.size))
    share, density = np.asarray(kept.mean()), np.asarray(KEPT)
    yield Comparison(
        "the share of entries that is kept", share, density, np.asarray(allowed), CHANCE
    )
    different = len(np.unique(kept.reshape(CALLS * 2, -1), axis=0))
    label = "the number of different masks of two changes in four calls"
    yield Comparison(label, np.asarray(float(different)), np.asarray(2.0 * CALLS))


CHECKS: dict[str, tuple[str, Any]] = {
    "linear": ("The linear combination sums A and B by themselves, with √|w s| on each.", linear),
    "ties": (
        "TIES trims A and B, elects each entry's sign, and takes the mean of those that agree.",
        partial(of_factors, kind="ties", density=DENSITY),
    ),
    "magnitude-prune": (
        "Magnitude pruning keeps the greatest entries of A and of B.",
        partial(of_factors, kind="magnitude_prune", density=DENSITY),
    ),
    "dare-linear": (
        "DARE with density 1 drops nothing: it is the linear combination.",
        partial(of_factors, kind="dare_linear", density=1.0),
    ),
    "dare-ties": (
        "DARE with TIES and density 1 drops nothing: it is TIES.",
        partial(of_factors, kind="dare_ties", density=1.0),
    ),
    "ties-svd": (
        "TIES of the changes, and the best approximation of its rank.",
        partial(of_changes, kind="ties", density=DENSITY),
    ),
    "magnitude-prune-svd": (
        "Magnitude pruning of the changes, and the best approximation of its rank.",
        partial(of_changes, kind="magnitude_prune", density=DENSITY),
    ),
    "dare-linear-svd": (
        "DARE of the changes with density 1 drops nothing: their sum's best approximation.",
        partial(of_changes, kind="dare_linear", density=1.0),
    ),
    "dare-ties-svd": (
        "DARE with TIES of the changes and density 1 drops nothing: it is TIES of the changes.",
        partial(of_changes, kind="dare_ties", density=1.0),
    ),
    "dare-by-chance": (
        "DARE keeps each entry by chance, with the density's probability, and divides by it.",
        dare_by_chance,
    ),
}
"""The checks: id, law and run."""
