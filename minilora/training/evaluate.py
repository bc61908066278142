"""A model on examples that it was not trained on: the loss, and how many labels it gets right.

A label is right that has the greatest logit: a class, or of a language model the next token.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from minilora.io.formats.tokenizers import Tokenizer
from minilora.spec.lora import Params, TrainableSpec, project
from minilora.spec.models import Batch, Config, logits, shifted_labels
from minilora.spec.ops import IGNORED, Array, Back, cross_entropy
from minilora.training.checkpointing import prepared
from minilora.training.example import Example
from minilora.training.generate import fitting, generate
from minilora.training.gradients import ExecutionPlan
from minilora.training.gradients import evaluate as sums
from minilora.training.kernels import forward_kernels

COLUMNS = 256
"""Of how many tokens at once the logits are formed: of all they may take more than the model."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What was found: the sum of negative log-likelihoods, the labels that count, which are right.

    Shapes: right (count,).
    """

    nll: float
    count: int
    right: Array | None = None

    @property
    def loss(self) -> float:
        """Nats a label."""
        return self.nll / self.count


def mean_loss(
    batches: Iterable[Batch], W: Params, c: Config, tuning: TrainableSpec, plan: ExecutionPlan
) -> Measured:
    """The loss over all batches, without a backward; each label counts the same.

    Errors: ValueError if no label counts; those of `models.logits`.
    """
    parts = [sums(batch, W, c, tuning, plan) for batch in batches]
    return _whole(Measured(math.fsum(float(L) for L, _ in parts), sum(n for _, n in parts)))


def measure(batches: Iterable[Batch], W: Params, c: Config, tuning: TrainableSpec) -> Measured:
    """The loss as :func:`mean_loss` has it, and which of the labels that count are right.

    Errors: those of :func:`mean_loss`.
    """
    still = replace(tuning, trained=frozenset(), dropout_scale={})
    nll: list[float] = []
    right: list[Array] = []
    for batch in batches:
        labels = shifted_labels(batch, c)
        counted = np.flatnonzero(labels != IGNORED)

        def head(
            x: Array,
            at: str,
            W: Params,
            tuning: TrainableSpec,
            labels: Array = labels,
            of: Array = counted,
        ) -> tuple[Array, Back]:
            for start in range(0, len(of), COLUMNS):
                columns = of[start : start + COLUMNS]
                z, _ = project(x[:, columns], at, W, tuning)
                nll.append(float(cross_entropy(z, labels[columns], 1)[0]))
                right.append(z.argmax(0) == labels[columns])
            return x, lambda dx: None

        logits(batch, prepared(W, c, still), c, still, forward_kernels(c, head))
    found = np.concatenate([np.zeros(0, bool), *right])
    return _whole(Measured(math.fsum(nll), len(found), found))


def answers(
    examples: Sequence[Example],
    W: Params,
    c: Config,
    tuning: TrainableSpec,
    tokenizer: Tokenizer,
    most: int,
) -> tuple[list[str], list[str]]:
    """What the model answers, the most probable token each time, and what was to be answered.

    An answer has ``most`` tokens, or those that the model has positions for.

    Errors: those of `generate.generate`.
    """
    written, wanted = [], []
    for example in examples:
        asked, answer = example.prompt_and_answer
        n = fitting(c, len(asked), most)
        steps = generate([asked.tolist()], W, c, tuning, most=n, stop=tokenizer.stops)
        written.append(tokenizer.decode([token for (token,) in steps if token is not None]))
        wanted.append(tokenizer.decode(answer.tolist()))
    return written, wanted


def _whole(measured: Measured) -> Measured:
    if measured.count < 1:
        raise ValueError("no label counts: there is nothing to measure; give other examples")
    return measured
