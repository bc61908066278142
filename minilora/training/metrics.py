"""What is said of a model on text that it has not seen: perplexity, accuracy, ROUGE.

And of two models on the same text: by how much they differ, and how sure that is.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, bootstrap

from minilora.io.formats.tokenizers import missing_library
from minilora.spec.ops import Array

ROUGE = ("rouge1", "rouge2", "rougeL")
"""One word in common, two in a row, and the longest common order of words."""


class Accuracy(NamedTuple):
    """The share that is right of ``n``, and the interval that it lies in with a confidence."""

    share: float
    low: float
    high: float
    n: int


def perplexity(loss: float) -> float:
    """p = exp(loss), of a mean loss in nats a token: among how many tokens it is as undecided."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def accuracy(right: Array, confidence: float = 0.95) -> Accuracy:
    """How many of independent answers are right, with Wilson's interval.

    Shapes: right (n,).
    Source: Wilson 1927, as SciPy computes it.
    Errors: ValueError without an answer.
    """
    right = np.asarray(right, bool)
    if right.ndim != 1 or not right.size:
        raise ValueError(f"answers of shape {right.shape}: expected (n,), one at least")
    k, n = int(right.sum()), right.size
    interval = binomtest(k, n).proportion_ci(confidence, method="wilson")
    return Accuracy(k / n, float(interval.low), float(interval.high), n)


RESAMPLES = 9999
"""How often what was measured is drawn anew for an interval.

So often that by chance an end of a 95% interval is off by less than a hundredth of its width, in
standard deviations.
"""


class Difference(NamedTuple):
    """A ratio of sums, and the interval that it lies in with a confidence."""

    value: float
    low: float
    high: float


class Paired(NamedTuple):
    """By how much the share that is right differs between two on the same questions.

    ``only`` and ``other`` are how many questions just the one has right, and just the other;
    ``p`` is how probable a division of these as uneven would be if both were as good.
    """

    value: float
    low: float
    high: float
    only: int
    other: int
    p: float


def difference(sums: Array, counts: Array, confidence: float = 0.95, seed: int = 0) -> Difference:
    """d = Σ sums / Σ counts, with an interval from drawing the parts anew, with replacement.

    A part is what is independent of the others: a text with all its tokens, a source with all its
    texts. One part says nothing of how much they differ: the interval is then everything.

    Shapes: sums (n,), counts (n,).
    Source: the percentiles of Efron 1979, as SciPy computes them.
    Errors: ValueError without a part, or unless there are as many of both.
    """
    sums, counts = np.asarray(sums, float), np.asarray(counts, float)
    if sums.ndim != 1 or sums.shape != counts.shape or not sums.size or not counts.min() > 0:
        found = f"sums of shape {sums.shape}, counts of shape {counts.shape}"
        raise ValueError(f"{found}: expected (n,) of both, one part at least and no count of 0")
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

    Questions of one source are no independent ones: the interval is drawn over sources, as
    :func:`difference` has it. p is the exact one of McNemar, which takes questions one by one.

    Shapes: right (n,), other (n,).
    Source: McNemar 1947, in its exact form: the sign test of the questions that only one has right.
    Errors: ValueError without an answer, or unless there are as many of all.
    """
    right, other = np.asarray(right, bool), np.asarray(other, bool)
    of = range(right.size) if sources is None else sources
    if right.ndim != 1 or right.shape != other.shape or not right.size or len(of) != right.size:
        found = f"answers of shapes {right.shape} and {other.shape}, {len(of)} sources"
        raise ValueError(f"{found}: expected (n,) and a source for each, one at least")
    numbers = {source: i for i, source in enumerate(dict.fromkeys(of))}
    part = np.array([numbers[source] for source in of])
    d = right.astype(int) - other
    found_ = difference(np.bincount(part, d), np.bincount(part), confidence)
    only, less = int((d > 0).sum()), int((d < 0).sum())
    p = float(binomtest(only, only + less).pvalue) if only + less else 1.0
    return Paired(*found_, only, less, p)


def rouge(written: Sequence[str], wanted: Sequence[str], stem: bool = False) -> dict[str, float]:
    """The mean F1 of each of `ROUGE` over pairs of texts, by the library ``rouge-score``.

    ``stem`` takes words for equal that have an English stem in common.

    Errors: ValueError unless there are as many of both, one at least; ImportError without
    ``rouge-score``.
    """
    if len(written) != len(wanted) or not written:
        found = f"{len(written)} texts written, {len(wanted)} wanted"
        raise ValueError(f"{found}: expected as many of both, one at least")
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise missing_library("rouge-score", "ROUGE") from error
    scorer = RougeScorer(list(ROUGE), use_stemmer=stem)
    scores = [scorer.score(target, text) for text, target in zip(written, wanted, strict=True)]
    return {name: math.fsum(s[name].fmeasure for s in scores) / len(scores) for name in ROUGE}
