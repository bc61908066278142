"""Metrics of a model on text that it was not trained on: perplexity, accuracy, ROUGE.

And the difference of two models on the same text, with a confidence interval.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, bootstrap

from minilora.io.formats.tokenizers import missing_library
from minilora.spec.ops import Array

ROUGE = ("rouge1", "rouge2", "rougeL")
"""Common words, common pairs of words, and the longest common subsequence of words."""


class Accuracy(NamedTuple):
    """The share of ``n`` that is right, with its confidence interval."""

    share: float
    low: float
    high: float
    n: int


def perplexity(loss: float) -> float:
    """p = exp(loss), of a mean loss in nats per token: as uncertain as among p equal tokens."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def accuracy(right: Array, confidence: float = 0.95) -> Accuracy:
    """The share of independent answers that are right, with Wilson's interval.

    Shapes: right (n,).
    Source: Wilson 1927, as SciPy computes it.
    Errors: ValueError without an answer.
    """
    right = np.asarray(right, bool)
    if right.ndim != 1 or not right.size:
        raise ValueError(f"answers of shape {right.shape}: expected (n,), n at least 1")
    k, n = int(right.sum()), right.size
    interval = binomtest(k, n).proportion_ci(confidence, method="wilson")
    return Accuracy(k / n, float(interval.low), float(interval.high), n)


RESAMPLES = 9999
"""The number of bootstrap resamples of an interval.

With this many, the standard deviation of an end of a 95% interval is less than a hundredth of its
width.
"""


class Difference(NamedTuple):
    """A ratio of sums, with its confidence interval."""

    value: float
    low: float
    high: float


class Paired(NamedTuple):
    """The difference of two shares of right answers to the same questions, with its interval.

    ``only`` and ``other`` are the numbers of questions that only the first, and only the second
    has right; ``p`` is McNemar's p-value: the probability of a division at least as uneven if both
    are equally good.
    """

    value: float
    low: float
    high: float
    only: int
    other: int
    p: float


def difference(sums: Array, counts: Array, confidence: float = 0.95, seed: int = 0) -> Difference:
    """d = Σ sums / Σ counts, with a bootstrap interval over the parts.

    A part is what is independent of the others: a text with all its tokens, a source with all its
    texts. With a single part the interval is infinite.

    Shapes: sums (n,), counts (n,).
    Source: the percentiles of Efron 1979, as SciPy computes them.
    Errors: ValueError without a part, or unless there are as many of both.
    """
    sums, counts = np.asarray(sums, float), np.asarray(counts, float)
    if sums.ndim != 1 or sums.shape != counts.shape or not sums.size or not counts.min() > 0:
        found = f"sums of shape {sums.shape}, counts of shape {counts.shape}"
        raise ValueError(f"{found}: expected (n,) of both, at least one part and no count of 0")
    value = float(sums.sum() / counts.sum())
    if len(sums) == 1:
        return Difference(value, -math.inf, math.inf)

    def ratio(s: Array, n: Array, axis: int) -> Array:
        return np.asarray(s.sum(axis) / n.sum(axis))

    drawn = bootstrap(
        (sums, counts), ratio, paired=True, n_resamples=RESAMPLES, confidence_level=confidence,
        method="percentile", batch=100, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Difference(value, float(drawn.low), float(drawn.high))


def paired(
    right: Array, other: Array, sources: Sequence[Hashable] | None = None, confidence: float = 0.95
) -> Paired:
    """The difference of two shares of right answers to the same questions.

    Questions of one source are not independent: the interval is drawn over sources, as
    :func:`difference` has it. p is McNemar's exact one, over single questions.

    Shapes: right (n,), other (n,).
    Source: McNemar 1947, in its exact form: the sign test of the questions that only one has right.
    Errors: ValueError without an answer, or unless there are as many of all.
    """
    right, other = np.asarray(right, bool), np.asarray(other, bool)
    of = range(right.size) if sources is None else sources
    if right.ndim != 1 or right.shape != other.shape or not right.size or len(of) != right.size:
        found = f"answers of shapes {right.shape} and {other.shape}, {len(of)} sources"
        raise ValueError(f"{found}: expected (n,) and a source for each, at least one")
    numbers = {source: i for i, source in enumerate(dict.fromkeys(of))}
    part = np.array([numbers[source] for source in of])
    d = right.astype(int) - other
    shares = difference(np.bincount(part, d), np.bincount(part), confidence)
    only, less = int((d > 0).sum()), int((d < 0).sum())
    p = float(binomtest(only, only + less).pvalue) if only + less else 1.0
    return Paired(*shares, only, less, p)


def rouge(
    generated: Sequence[str], expected: Sequence[str], stem: bool = False
) -> dict[str, float]:
    """The mean F1 of each of `ROUGE` over pairs of texts, by the library ``rouge-score``.

    With ``stem``, words with the same English stem are equal.

    Errors: ValueError unless there are as many of both, at least one; ImportError without
    ``rouge-score``.
    """
    if len(generated) != len(expected) or not generated:
        raise ValueError(
            f"found {len(generated)} generated texts and {len(expected)} expected ones: expected "
            "as many of both, at least one"
        )
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise missing_library("rouge-score", "ROUGE") from error
    scorer = RougeScorer(list(ROUGE), use_stemmer=stem)
    scores = [scorer.score(target, text) for text, target in zip(generated, expected, strict=True)]
    return {name: math.fsum(s[name].fmeasure for s in scores) / len(scores) for name in ROUGE}
