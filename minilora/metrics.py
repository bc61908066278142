"""What is said of a model on text that it has not seen: perplexity, accuracy, ROUGE."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from minilora.formats.tokenizers import lacking
from minilora.ops import Array

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
        raise lacking("rouge-score", "ROUGE") from error
    scorer = RougeScorer(list(ROUGE), use_stemmer=stem)
    scores = [scorer.score(target, text) for text, target in zip(written, wanted, strict=True)]
    return {name: math.fsum(s[name].fmeasure for s in scores) / len(scores) for name in ROUGE}
