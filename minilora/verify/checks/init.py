"""Level ``init``: how A and B start, so that training begins at the base.

What is drawn at random is judged by a statistical test whose error rate is stated: a right
implementation fails a check with a probability of at most ERROR.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import log, sqrt
from typing import Any

import numpy as np
from scipy.special import ndtr

from minilora.spec.lora import scale
from minilora.verify.checks.init_starts import CHECKS as FRESH
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import Skip
from minilora.verify.core.inputs import long
from minilora.verify.core.level import Level
from minilora.verify.core.tolerance import unit_roundoff
from minilora.verify.core.types import BOUND, CHANCE, Case, Check, Comparison
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray

CASES = {"quick": 1, "ci": 1, "nightly": 20}

FALSE_ALARM = 1e-9
"""The maximum probability that a check of random draws fails a correct implementation: of a million
nightly runs fewer than one fails by chance."""

MODULES: tuple[tuple[int, int, int, float, dict[str, Any]], ...] = (
    (40, 160, 24, 60.0, {}),
    (96, 96, 40, 10.0, {"use_rslora": True}),
    (180, 60, 16, 4.0, {}),
    (3, 1500, 1, 2.5, {}),
)
"""m, n, r, alpha and settings of the modules whose A are tested: wide, square, tall, of rank 1. The
distribution of A depends on n, or on r, and on nothing else."""

SEEDS = 6

SEED_OFFSETS = (0, 1, 2, 3, 256, 65536)
"""Seeds whose A are compared, relative to the first one: neighbours, and those that a generator
with 8 or 16 bits of seed mistakes for it."""

MAX_PROBABILITY = 2.0**-22
"""The maximum probability of one value of |A|: 23 random bits, as of float32's coarsest generators,
without the sign."""

POINTS = np.linspace(-2.0, 2.0, 41)
"""The points at which the distribution of √n A, which lies within ± 1, is tested."""

KINDS: dict[str, tuple[dict[str, Any], str, Callable[[Array], Array]]] = {
    "": ({}, "A ~ U(-1/√n, 1/√n)", lambda t: np.clip((t + 1) / 2, 0, 1)),
    ".gaussian": (
        {"init_lora_weights": "gaussian"},
        "A ~ N(0, 1/r²)",
        lambda t: np.asarray(ndtr(t)),
    ),
}
"""The settings, the law, and the distribution function of √n A, or of r A."""


def initialized(
    subject: GuardedImplementation,
    W: Array,
    r: int,
    alpha: float,
    seed: int,
    dtype: str,
    **settings: Any,
) -> tuple[Array, Array, Array]:
    """The initial A and B of an implementation, and the base weight beside them.

    Raises Skip where the rank is another than those that it takes.
    """
    alpha = subject.fixed.alpha_of(alpha, r)
    answer = subject.call("init", W, r=r, alpha=alpha, seed=seed, **settings)
    A = subject.answer(subject.entry(answer, "A"), "A", (r, W.shape[1]), dtype)
    B = subject.answer(subject.entry(answer, "B"), "B", (len(W), r), dtype)
    if "W" in answer:
        return A, B, subject.answer(answer["W"], "W", W.shape, dtype)
    return A, B, W


_GAUSSIAN = ((", gaussian", {"init_lora_weights": "gaussian"}),)


@contextmanager
def optional(settings: Mapping[str, Any]) -> Iterator[None]:
    """Skips an initialization that is not supported, unless it is the default one."""
    try:
        yield
    except Skip:
        if not settings:
            raise


def weight(case: Case, m: int, n: int) -> Array:
    """A base weight."""
    return (0.1 * case.rng().standard_normal((m, n))).astype(DTYPES[case.dtype])


def _first(case: Case) -> int:
    """The first of a case's seeds, which no other case shares."""
    return 1000 * case.seed + 50 * case.number


def _distribution(kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    """The share of entries up to each point, against the distribution function there.

    The largest difference of N draws exceeds ε with a probability of at most 2 exp(-2 N ε²)
    (Massart 1990), whatever the distribution; entries that are rounded by u at 1 differ by u more.
    Each module is tested by itself, and all together, where N is larger.
    """
    settings, _, distribution = KINDS[kind]
    want = distribution(POINTS)

    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        pooled_entries: list[Array] = []

        def compared(draws: list[Array], where: str) -> Comparison:
            pooled = np.sort(np.concatenate(draws))
            below = np.searchsorted(pooled, POINTS, "right") / len(pooled)
            level = log(2 * (len(MODULES) + 1) / FALSE_ALARM)
            allowed = sqrt(level / (2 * len(pooled))) + unit_roundoff(case.dtype)
            label = f"the part of {'r' if kind else '√n'} A up to each point{where}"
            return Comparison(label, below, want, np.full(want.shape, allowed), CHANCE)

        for k, (m, n, r, alpha, more) in enumerate(MODULES):
            W, draws, r = weight(case, m, n), list[Array](), subject.fixed.rank(r)
            with optional(more):
                for seed in range(SEEDS):
                    at = _first(case) + SEEDS * k + seed
                    A, _, _ = initialized(subject, W, r, alpha, at, case.dtype, **settings, **more)
                    draws.append(A.astype(np.float64).ravel() * (r if kind else sqrt(n)))
                yield compared(draws, f", {m} by {n} of rank {r}{', rsLoRA' if more else ''}")
                pooled_entries += draws
        yield compared(pooled_entries, "")

    return run


def allowed_repeats(count: int, error: float) -> float:
    """The number of draws that may equal an earlier one; more have a probability of ``error``.

    Draw t equals an earlier one with a probability of at most t `MAX_PROBABILITY`, whatever they
    are. The number of such events, of which μ are expected, exceeds μ + t with one of at most
    exp(-t² / (2 μ + 2 t / 3)) (Bernstein; Freedman 1975 where they depend on earlier ones).
    """
    level, mean = -log(error), count * (count - 1) / 2 * MAX_PROBABILITY
    return mean + level / 3 + sqrt(level**2 / 9 + 2 * level * mean)


def independent(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Entries of A are independent; no value repeats across entries or seeds.

    For rows a, b of n independent entries of variance 1/n, each at most √(3/n): the sum n Σ aᵢ bᵢ
    exceeds t with a probability of at most 2 exp(-t² / (2 n + 2 t)) (Bernstein), as products have
    variance 1 and are at most 3; and |a|² falls below 1 - ε with one of at most exp(-2 n ε² / 9)
    (Hoeffding). The cosine is compared, so that the size of the entries does not matter. Entries
    that are repeated elsewhere, or with the other sign, are counted, where the dtype has enough
    numbers to tell them from chance.
    """
    m, n, r = 5, 1024, subject.fixed.rank(4)
    W = weight(case, m, n)

    def of_seeds(**settings: Any) -> list[Array]:
        seeds = [_first(case) + offset for offset in SEED_OFFSETS]
        return [initialized(subject, W, r, 2.5 * r, at, case.dtype, **settings)[0] for at in seeds]

    draws = of_seeds()
    rows = np.concatenate(draws).astype(np.float64)
    lengths = np.sqrt((rows * rows).sum(1, keepdims=True))
    rows = rows / np.where(lengths > 0, lengths, 1)
    above = np.triu_indices(len(rows), 1)
    level = log(2 * len(above[0]) / (FALSE_ALARM / 4))
    allowed = (level + sqrt(level**2 + 2 * level * n)) / n
    shorter = sqrt(9 * log(len(rows) / (FALSE_ALARM / 4)) / (2 * n))
    cosines = (rows @ rows.T)[above]
    yield Comparison(
        "cosines of two rows of A",
        cosines,
        np.zeros(cosines.shape),
        np.full(cosines.shape, allowed / (1 - shorter)),
        CHANCE,
    )
    # A column has an entry for every row of every seed: chance repeats none, in any dtype.
    different = np.unique(np.concatenate(draws).astype(np.float64), axis=1).shape[1]
    yield Comparison("the number of different columns of A", np.asarray(different), np.asarray(n))
    if _cases_of_wide_dtypes("ci", case.dtype):
        yield _repeated(draws, "")
        for label, settings in _GAUSSIAN:
            with optional(settings):
                yield _repeated(of_seeds(**settings), label)


def _repeated(draws: list[Array], label: str) -> Comparison:
    """The number of entries of A with the size of an earlier one, in any place and of any seed."""
    sizes = np.abs(np.concatenate(draws))
    count = sizes.size - np.unique(sizes).size
    allowed = np.asarray(allowed_repeats(sizes.size, FALSE_ALARM / 4))
    name = f"how many entries of A came before, or their opposites{label}"
    return Comparison(name, np.asarray(float(count)), np.zeros(()), allowed, CHANCE)


def reproducible(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """The same seed gives the same bits, whatever was drawn before; another seed does not."""
    at = _first(case)
    for label, r, settings in _random_initializations(case.dtype):
        W = weight(case, 10 if r == 1 else 6, 10)  # also of equal sides
        r = subject.fixed.rank(r)
        with optional(settings):
            A, B, _ = initialized(subject, W, r, 7.0, at, case.dtype, **settings)
            other, _, _ = initialized(subject, W, r, 7.0, at + 1, case.dtype, **settings)
            second = initialized(subject, W, r, 7.0, at, case.dtype, **settings)
            yield Comparison(f"A of the same seed{label}", second[0], A)
            yield Comparison(f"B of the same seed{label}", second[1], B)
            same = np.asarray(float((other == A).all()))
            yield Comparison(f"whether another seed gives the same A{label}", same, np.zeros(()))


def _random_initializations(dtype: str) -> Iterable[tuple[str, int, dict[str, Any]]]:
    """Labels, ranks and settings of random initializations."""
    yield "", 3, {}
    yield " of rank 1", 1, {}
    yield ", gaussian", 3, {"init_lora_weights": "gaussian"}
    if _cases_of_wide_dtypes("ci", dtype):
        yield ", orthogonal", 4, {"init_lora_weights": "orthogonal"}


def zero_B(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """B is exactly 0, for any scale."""
    for k, (m, n, r) in enumerate(((6, 10, 3), (8, 8, 8), (3, 5, 1))):
        for label, settings in (("", {}), (", rsLoRA", {"use_rslora": True}), *_GAUSSIAN):
            W, r = weight(case, m, n), subject.fixed.rank(r)
            with optional(settings):
                _, B, _ = initialized(subject, W, r, 7.0, _first(case) + k, case.dtype, **settings)
                yield Comparison(f"B of rank {r}{label}", B, np.zeros_like(B))


def base_unchanged(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Initialization changes no bit of the base weight or of the output."""
    W, r = weight(case, 6, 10), subject.fixed.rank(3)
    for label, settings in _GAUSSIAN:
        with optional(settings):
            for where, V in (("", W), (" of 10 by 6", weight(case, 10, 6))):
                *_, base = initialized(subject, V, r, 7.0, _first(case), case.dtype, **settings)
                yield Comparison(f"W{where}{label}", base, V)
    A, B, base = initialized(subject, W, r, 7.0, _first(case), case.dtype)
    yield Comparison("W", base, W)
    if subject.has("lora_linear"):
        x, alpha = weight(case, 5, 10), subject.fixed.alpha_of(7.0, r)
        adapted, plain = (
            subject.call("lora_linear", x, base, A_, B_, alpha=alpha, r=r)
            for A_, B_ in ((A, B), (0 * A, 0 * B))
        )
        y = subject.answer(adapted, "y", (5, 6), case.dtype)
        want = subject.answer(plain, "y of the base", (5, 6), case.dtype)
        yield Comparison("y at the start against the base's", y, want)


C = 12
"""A Householder QR or SVD of (m, n) is that of W + E, with ‖E‖ at most C m n u ‖W‖ in the Frobenius
norm: theorems 19.4 and 20.3 of Higham 2002 have m n times a small integer constant, which they
leave open; 12 is chosen."""


def _weight_of_ranks(case: Case, m: int, n: int, r: int) -> Array:
    """A weight whose first r singular values are well above the others."""
    rng = case.rng()
    U, V = (np.linalg.qr(rng.standard_normal((k, min(m, n))))[0] for k in (m, n))
    values = np.where(np.arange(min(m, n)) < r, 4.0, 0.5) * rng.uniform(0.8, 1.2, min(m, n))
    W: Array = ((U * values) @ V.T).astype(DTYPES[case.dtype])
    return W


SPLIT_SHAPES = ((10, 6, 2, False), (7, 11, 3, True), (9, 9, 4, True), (5, 8, 5, False))
"""m, n, r of the weights that are split, and whether with rsLoRA; one has full rank r."""


def _split(kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    """W = W' + s B A, and the laws of A and B.

    Storing W' loses u |W'| and forming s B A at most (r + 3) u s |B| |A|, as in level merge; the
    check's own sums are in long double. The laws of A and B hold within C m n u ‖W‖.
    """

    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        for m, n, r, rslora in SPLIT_SHAPES:
            if (r := subject.fixed.rank(r)) > min(m, n):
                continue
            W = _weight_of_ranks(case, m, n, r)
            settings: dict[str, Any] = {"init_lora_weights": kind}
            more = {"use_rslora": True} if rslora else {}
            alpha, at = subject.fixed.alpha_of(2.5 * r, r), _first(case)
            answer = None
            with optional(more):
                answer = initialized(subject, W, r, alpha, at, case.dtype, **settings, **more)
            if answer is None:
                continue
            A, B, base = answer
            A, B, base, W = (long(v) for v in (A, B, base, W))
            u, s = unit_roundoff(subject.precision(case.dtype).storage), scale(alpha, r, rslora)
            terms = s * (np.abs(B) @ np.abs(A))
            bound = 2 * u * (np.abs(base) + np.abs(W) + (r + 3) * terms)
            where = f" of {m} by {n}"
            yield Comparison(
                f"W' + s B A{where}", base + s * (B @ A), W, bound.astype(np.float64), BOUND
            )
            size = float(C * m * n * u * np.sqrt((W * W).sum()))
            yield from laws[kind](W, A, B, s, where, size)

    laws = {"pissa": _pissa, "olora": _olora}
    return run


def _pissa(W: Array, A: Array, B: Array, s: Any, where: str, size: float) -> Iterable[Comparison]:
    """s B A is the best approximation of its rank, and Bᵀ B = A Aᵀ."""
    values = np.linalg.svd(W.astype(np.float64), compute_uv=False)[len(A) :]
    left = W - s * (B @ A)
    yield Comparison(
        f"‖W - s B A‖{where}",
        np.sqrt((left * left).sum()),
        np.asarray(np.sqrt((values**2).sum())),
        np.asarray(2 * size),
        BOUND,
    )
    yield Comparison(
        f"s Bᵀ B against s A Aᵀ{where}", s * (B.T @ B), s * (A @ A.T), np.asarray(4 * size), BOUND
    )


def _olora(W: Array, A: Array, B: Array, s: Any, where: str, size: float) -> Iterable[Comparison]:
    """Bᵀ B = 1, A = Bᵀ W, and A is 0 below its diagonal."""
    one = np.eye(len(A))
    norm = float(np.sqrt((W * W).sum()))
    yield Comparison(f"Bᵀ B{where}", B.T @ B, one, np.asarray(2 * size / norm), BOUND)
    yield Comparison(f"A against Bᵀ W{where}", A, B.T @ W, np.asarray(4 * size), BOUND)
    yield Comparison(f"A below its diagonal{where}", np.tril(A, -1), 0 * A)


def orthogonal(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Orthogonal initialization: B A = 0 though neither is 0, and W is unchanged."""
    for k, (m, n, r) in enumerate(((7, 11, 4), (10, 6, 2))):
        W, r = weight(case, m, n), subject.fixed.rank(r)
        A, B, base = initialized(
            subject, W, r, 7.0, _first(case) + k, case.dtype, init_lora_weights="orthogonal"
        )
        where = f" of {m} by {n}"
        yield Comparison(f"W{where}", base, W)
        zeros = [float((v == 0).all()) for v in (A, B)]
        yield Comparison(f"whether A or B is 0{where}", np.asarray(zeros), np.zeros(2))
        A, B = long(A), long(B)
        u = unit_roundoff(subject.precision(case.dtype).storage)
        norms = np.sqrt((B * B).sum(1, keepdims=True)) * np.sqrt((A * A).sum(0))
        bound = (C * r * r * u * norms).astype(np.float64)
        yield Comparison(f"B A{where}", B @ A, np.zeros((m, n)), bound, BOUND)


def _cases(profile: str, dtype: str) -> int:
    return CASES[profile]


def _cases_of_wide_dtypes(profile: str, dtype: str) -> int:
    """None in half precision, in which no library decomposes matrices."""
    return CASES[profile] * (dtype in ("float64", "float32"))


def _law(run: Any, cases: Callable[[str, str], int]) -> Check:
    title = (run.__doc__ or "").splitlines()[0]
    return Check(f"init.{run.__name__.replace('_', '-')}", "init", ("init",), title, run, cases)


SPLITS = {
    "pissa": "PiSSA moves the largest singular values of W into the adapter: W = W' + s B A.",
    "olora": "OLoRA moves the first columns of W = Q R into the adapter: W = W' + s B A.",
}

_CHECKS: tuple[Check, ...] = (
    _law(zero_B, _cases),
    *(
        Check(
            f"init.distribution{kind}",
            "init",
            ("init",),
            f"{law}, tested on pooled entries with a false alarm rate of {FALSE_ALARM:g}.",
            _distribution(kind),
            _cases,
        )
        for kind, (_, law, _) in KINDS.items()
    ),
    _law(independent, _cases),
    _law(reproducible, _cases),
    _law(base_unchanged, _cases),
    *(
        Check(f"init.{kind}", "init", ("init",), title, _split(kind), _cases_of_wide_dtypes)
        for kind, title in SPLITS.items()
    ),
    _law(orthogonal, _cases_of_wide_dtypes),
    *(
        Check(f"init.{name}", "init", ("init",), law, run, _cases_of_wide_dtypes)
        for name, (law, run) in FRESH.items()
    ),
)

LEVEL = Level(
    "init",
    _CHECKS,
    laws=("reproducible",),
    relations=("reproducible",),
    vectors={
        "zero-B": (("bfloat16", 0), ("float32", 0)),
        "base-unchanged": (("bfloat16", 0), ("float32", 0)),
    },
    no_vectors={
        **dict.fromkeys(("pissa", "olora", "orthogonal"), "its factors may have other signs"),
        "*": "what is drawn at random has no one answer",
    },
    exact=("*",),
)
