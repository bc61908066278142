"""How good a model is on examples: loss, perplexity, accuracy with its interval, ROUGE.

Perplexity is the exponential of the mean loss a label. An accuracy is the share of the labels that
have the greatest logit, all that count: a classifier's classes, or a language model's next tokens.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from minilora.lora import Tuning, Weights
from minilora.models import Batch, Config, logits, targets
from minilora.ops import IGNORED, cross_entropy
from minilora.steps import Plan
from minilora.steps import evaluate as sums

CONFIDENCE = 0.95
"""Of the intervals."""


@dataclass(frozen=True)
class Measured:
    """What was found: the sum of negative log-likelihoods, the labels that count, those right."""

    nll: float
    count: int
    right: int | None = None

    @property
    def loss(self) -> float:
        """Nats a label."""
        return self.nll / self.count

    @property
    def perplexity(self) -> float:
        """e^loss, or infinity where that is beyond a float."""
        return math.exp(self.loss) if self.loss < math.log(np.finfo(float).max) else math.inf

    @property
    def accuracy(self) -> float | None:
        """The share of the labels that are right."""
        return None if self.right is None else self.right / self.count

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's interval of the accuracy, at `CONFIDENCE`: labels are taken as independent.

        Source: Wilson 1927; ``scipy.stats.binomtest``.
        """
        if self.right is None:
            return None
        from scipy.stats import binomtest

        found = binomtest(self.right, self.count).proportion_ci(CONFIDENCE, "wilson")
        return float(found.low), float(found.high)


def mean_loss(
    batches: Iterable[Batch], W: Weights, c: Config, tuning: Tuning, plan: Plan
) -> Measured:
    """The loss over all batches, without a backward; each label counts the same.

    Errors: ValueError if no label counts; those of `logits`.
    """
    parts = [sums(batch, W, c, tuning, plan) for batch in batches]
    return _whole(Measured(math.fsum(float(L) for L, _ in parts), sum(n for _, n in parts)))


def measure(batches: Iterable[Batch], W: Weights, c: Config, tuning: Tuning) -> Measured:
    """The loss as :func:`mean_loss` has it, and how many labels have the greatest logit.

    Errors: those of :func:`mean_loss`.
    """
    still = replace(tuning, trained=frozenset(), keep={})
    nll, count, right = [], 0, 0
    for batch in batches:
        labels = targets(batch, c)
        counted = labels != IGNORED
        if not counted.any():
            continue
        z, _ = logits(batch, W, c, still)
        nll.append(float(cross_entropy(z, labels, 1)[0]))
        count += int(counted.sum())
        right += int((z.argmax(0) == labels)[counted].sum())
    return _whole(Measured(math.fsum(nll), count, right))


def _whole(measured: Measured) -> Measured:
    if measured.count < 1:
        raise ValueError("no label counts: there is nothing to measure; give other examples")
    return measured


def rouge(written: Sequence[str], wanted: Sequence[str]) -> Mapping[str, float]:
    """The mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, by the library ``rouge-score``.

    Errors: ValueError unless there is one text for each; ImportError without the library.
    Source: Lin 2004, "ROUGE: A package for automatic evaluation of summaries".
    """
    if not wanted or len(written) != len(wanted):
        raise ValueError(f"{len(written)} texts for {len(wanted)}: expected one for each")
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        extra = "python -m pip install 'minilora[text]'"
        raise ImportError(f"ROUGE needs the library rouge-score: {extra}") from error
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    found = [scorer.score(a, b) for a, b in zip(wanted, written, strict=True)]
    return {kind: math.fsum(one[kind].fmeasure for one in found) / len(found) for kind in kinds}
