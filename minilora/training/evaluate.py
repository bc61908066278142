"""A model on examples that it was not trained on: the loss, and how many labels it gets right.

A label is right if it has the greatest logit: a class or, of a language model, the next token.
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
from minilora.training.gradients import evaluate as sum_of_losses
from minilora.training.kernels import forward_kernels

COLUMNS = 256
"""The number of tokens whose logits are formed at once: those of all may not fit into memory."""


@dataclass(frozen=True, eq=False)
class Measured:
    """The sum of negative log-likelihoods, the number of labels, and which of them are right.

    Shapes: right (count,).
    """

    nll: float
    count: int
    right: Array | None = None

    @property
    def loss(self) -> float:
        """The mean loss in nats per label."""
        return self.nll / self.count


def mean_loss(
    batches: Iterable[Batch], W: Params, c: Config, tuning: TrainableSpec, plan: ExecutionPlan
) -> Measured:
    """The loss over all batches, without gradients; each label has the same weight.

    Errors: ValueError if no label counts; those of `models.logits`.
    """
    sums = [sum_of_losses(batch, W, c, tuning, plan) for batch in batches]
    return _checked(Measured(math.fsum(float(nll) for nll, _ in sums), sum(n for _, n in sums)))


def measure(batches: Iterable[Batch], W: Params, c: Config, tuning: TrainableSpec) -> Measured:
    """The loss as :func:`mean_loss` has it, and which of the labels are right.

    Errors: those of :func:`mean_loss`.
    """
    frozen = replace(tuning, trained=frozenset(), dropout_scale={})
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
            counted: Array = counted,
        ) -> tuple[Array, Back]:
            for start in range(0, len(counted), COLUMNS):
                columns = counted[start : start + COLUMNS]
                z, _ = project(x[:, columns], at, W, tuning)
                nll.append(float(cross_entropy(z, labels[columns], 1)[0]))
                right.append(z.argmax(0) == labels[columns])
            return x, lambda dx: None

        kernels = forward_kernels(c, head)
        logits(batch, prepared(W, c, frozen), c, frozen, kernels)
    all_right = np.concatenate([np.zeros(0, bool), *right])
    return _checked(Measured(math.fsum(nll), len(all_right), all_right))


def answers(
    examples: Sequence[Example],
    W: Params,
    c: Config,
    tuning: TrainableSpec,
    tokenizer: Tokenizer,
    max_new_tokens: int,
) -> tuple[list[str], list[str]]:
    """The answers that the model generates, with the most probable tokens, and the expected ones.

    An answer has up to ``max_new_tokens`` tokens, fewer if the model lacks positions for them.

    Errors: those of `generate.generate`.
    """
    generated, expected = [], []
    for example in examples:
        prompt, answer = example.prompt_and_answer
        n = fitting(c, len(prompt), max_new_tokens)
        steps = generate([prompt.tolist()], W, c, tuning, max_new_tokens=n, stop=tokenizer.stop_ids)
        generated.append(tokenizer.decode([token for (token,) in steps if token is not None]))
        expected.append(tokenizer.decode(answer.tolist()))
    return generated, expected


def _checked(measured: Measured) -> Measured:
    if measured.count < 1:
        raise ValueError("no label counts: expected at least one; use other examples")
    return measured
