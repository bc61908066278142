"""Small tasks with exactly known entropy, which measure learning and forgetting without sampling.

A task is a whole distribution: a finite list of examples with rational probabilities. A model's
expected loss is then a finite sum. It exceeds the entropy by a Kullback-Leibler divergence, which
is zero for the perfect model only. The tasks come in pairs of the same symbols and the same entropy
that contradict each other.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, cached_property, partial
from itertools import accumulate, product

import numpy as np

from minilora.spec.lora import TrainableSpec, Weights
from minilora.spec.models import Batch, Config, loss
from minilora.spec.ops import IGNORED, Array

PAD, START, END = range(3)
"""The special tokens of every task; its own symbols follow."""

SPECIAL = "<pad>", "<start>", "<end>"
"""Their texts."""

GROUP = 512
"""How many examples :func:`expected_loss` runs at once."""


@dataclass(frozen=True)
class Example:
    """A sequence, what is predicted of it, and their joint probability.

    ``label`` is a class, or None if every token after the first is predicted.
    ``input_probability`` is that of the part that is not predicted: 1 for a language, and for a
    class that of the sequence.
    """

    ids: tuple[int, ...]
    probability: Fraction
    input_probability: Fraction = Fraction(1)
    label: int | None = None
    types: tuple[int, ...] | None = None

    @property
    def label_count(self) -> int:
        """The number of labels."""
        return len(self.ids) - 1 if self.label is None else 1


@dataclass(frozen=True)
class Task:
    """A distribution over finitely many examples; their probabilities sum to 1 exactly."""

    name: str
    symbols: tuple[str, ...]
    examples: tuple[Example, ...]

    @property
    def causal(self) -> bool:
        """Whether the next token is predicted, and not a class."""
        return self.examples[0].label is None

    @property
    def label_count(self) -> Fraction:
        """The expected number of labels of an example."""
        return sum((e.probability * e.label_count for e in self.examples), Fraction(0))

    @cached_property
    def entropy(self) -> float:
        """H = Σ P log(G / P) / the expected number of labels, in nats; G: ``input_probability``.

        The least expected loss that any model can have, and that of the true distribution.
        """
        terms = (
            float(e.probability) * _log(e.input_probability / e.probability) for e in self.examples
        )
        return math.fsum(terms) / float(self.label_count)

    @cached_property
    def _columns(self) -> tuple[Array, Array, Array, Array | None, Array]:
        """ids, labels and mask padded on the right, types, and each example's length."""
        lengths = np.array([len(e.ids) for e in self.examples])
        mask = np.arange(lengths.max()) < lengths[:, None]
        ids, types = np.full(mask.shape, PAD), np.zeros(mask.shape, int)
        ids[mask] = [token for e in self.examples for token in e.ids]
        if self.causal:
            labels = np.where(mask, ids, IGNORED)
            labels[:, 0] = IGNORED
            return ids, labels, mask, None, lengths
        types[mask] = [token for e in self.examples for token in e.types or ()]
        return ids, np.array([e.label for e in self.examples]), mask, types, lengths

    def batch(self, rows: Array) -> Batch:
        """The examples of these numbers, padded on the right to the longest of them.

        Shapes: rows (b,).
        """
        ids, labels, mask, types, lengths = self._columns
        at = np.ix_(rows, np.arange(lengths[rows].max()))
        return Batch(
            ids[at],
            labels[at] if self.causal else labels[rows],
            mask[at],
            types=None if types is None else types[at],
        )

    @cached_property
    def _cumulative(self) -> Array:
        return np.array([float(p) for p in accumulate(e.probability for e in self.examples)])

    def draw_rows(self, rng: np.random.Generator, b: int) -> Array:
        """The numbers of b examples, drawn by their probabilities.

        Shapes: -> rows (b,).
        """
        return np.searchsorted(self._cumulative, rng.random(b), side="right")

    def draw(self, rng: np.random.Generator, b: int) -> Batch:
        """b examples drawn by their probabilities, padded on the right."""
        return self.batch(self.draw_rows(rng, b))

    def read(self, ids: Array) -> str:
        """The symbols of these tokens, without padding."""
        return " ".join(self.symbols[token] for token in ids if token != PAD)


def _log(x: Fraction) -> float:
    return math.log(x.numerator) - math.log(x.denominator)


def expected_loss(task: Task, W: Weights, c: Config, tuning: TrainableSpec) -> float:
    """Σ P nll / the expected number of labels, over all examples: the exact expected loss.

    nll is the sum of an example's negative log likelihoods, as `models.loss` has
    them. The least possible value is the task's entropy.
    """
    by_probability: dict[Fraction, list[int]] = {}
    for row, e in enumerate(task.examples):
        by_probability.setdefault(e.probability, []).append(row)
    sums = []
    for p, rows in by_probability.items():
        for start in range(0, len(rows), GROUP):
            batch = task.batch(np.array(rows[start : start + GROUP]))
            sums.append(float(p) * float(loss(batch, W, c, tuning, count=1)[0]))
    return math.fsum(sums) / float(task.label_count)


def running(name: str, sign: int) -> Task:
    """x₁ s₁ x₂ s₂ …: uniform x_i of 0 … 10, each followed by s_i = s_{i-1} ± x_i modulo 11; s₀ = 0.

    It ends with probability 1/4 after s₁ and after s₂, and after s₃ surely. With E[k] = 37/16 the
    expected number of digits and h the entropy of a coin:
    H = (E[k] log 11 + (1 + 3/4) h(1/4)) / (2 E[k] + 1).
    """
    modulus, most = 11, 3

    def grow(ids: tuple[int, ...], s: int, p: Fraction, left: int) -> Iterator[Example]:
        if left < most:
            end = Fraction(1, 4) if left else Fraction(1)
            yield Example((*ids, END), p * end)
            p *= 1 - end
        for x in range(modulus if left else 0):
            after = (s + sign * x) % modulus
            more = *ids, END + 1 + x, END + 1 + after
            yield from grow(more, after, p / modulus, left - 1)

    symbols = *SPECIAL, *map(str, range(modulus))
    return Task(name, symbols, tuple(grow((START,), 0, Fraction(1), most)))


def brackets(name: str, closes: int) -> Task:
    """One to four pairs of brackets of two kinds, closed in the order that ``closes`` names.

    -1: what was opened last is closed first, as on a stack; 0: what was opened first, as in a
    queue. Where a bracket may open and one may close, each has probability 1/2, and where one
    opens, so has each kind. Where all are closed the sequence ends with probability 1/4, and after
    four pairs surely. How the next one closes is certain: both orders have the same entropy,
    H = (E[k] log 2 + the entropy of opening, closing and ending) / (2 E[k] + 1), k the pairs.
    """
    most = 4

    def grow(
        ids: tuple[int, ...], pending: tuple[int, ...], p: Fraction, left: int
    ) -> Iterator[Example]:
        if not pending and left < most:
            end = Fraction(1, 4) if left else Fraction(1)
            yield Example((*ids, END), p * end)
            p *= 1 - end
        opens = Fraction(left > 0, 2 if pending else 1)
        for kind in range(2 if left else 0):
            yield from grow((*ids, END + 1 + kind), (*pending, kind), p * opens / 2, left - 1)
        if pending:
            rest = list(pending)
            closed = END + 3 + rest.pop(closes)
            yield from grow((*ids, closed), tuple(rest), p * (1 - opens), left)

    return Task(name, (*SPECIAL, *"([)]"), tuple(grow((START,), (), Fraction(1), most)))


def more_of(name: str, letter: str) -> Task:
    """Two words: has the first fewer of the letter than the second (0), as many (1), more (2)?

    Each word has one to three letters, each length and each of a, b, c equally probable. One label
    in ten is redrawn uniformly: the true one has probability 14/15, the others 1/30 each, so
    H = (14/15) log(15/14) + (1/15) log 30, and no classifier is right more often than 14/15.
    """
    letters, lengths, redrawn = "abc", (1, 2, 3), Fraction(1, 10)
    words = ["".join(word) for k in lengths for word in product(letters, repeat=k)]
    examples = []
    for first, second in product(words, words):
        one, two = ([END + 1 + letters.index(x) for x in word] for word in (first, second))
        types = (0,) * (len(one) + 2) + (1,) * (len(two) + 1)
        of_words = Fraction(1, len(lengths) ** 2 * len(letters) ** len(first + second))
        a, b = first.count(letter), second.count(letter)
        for label in range(3):
            p = redrawn / 3 + (1 - redrawn) * (label == 1 + (a > b) - (a < b))
            ids = START, *one, END, *two, END
            examples.append(Example(ids, of_words * p, of_words, label, types))
    return Task(name, (*SPECIAL, *letters), tuple(examples))


TASKS: dict[str, Callable[[str], Task]] = {
    "running-sum": partial(running, sign=1),
    "running-difference": partial(running, sign=-1),
    "nested-brackets": partial(brackets, closes=-1),
    "queued-brackets": partial(brackets, closes=0),
    "more-a": partial(more_of, letter="a"),
    "more-b": partial(more_of, letter="b"),
}
"""The tasks by name, in pairs that contradict each other."""


@cache
def task(name: str) -> Task:
    """The task of this name. Errors: ValueError for an unknown one."""
    if name not in TASKS:
        raise ValueError(f"task {name!r}: expected one of {', '.join(TASKS)}")
    return TASKS[name](name)


def draw_batch(name: str, rng: np.random.Generator, b: int = 5) -> Batch:
    """A batch of the task ``name`` with padding, ignored labels and unequal counts of labels.

    Language: even rows are padded on the left, odd ones on the right, the first two rows surely;
    each label is ignored with probability 1/4, each row keeps one, and the counts are not all the
    same. Classes: every row is padded on the right, since it is the first token that is read, the
    first two rows surely; the label of one row is ignored.

    Shapes: -> ids (b, t), labels (b, t) or (b,), mask (b, t), types (b, t) or None.
    Errors: ValueError for an unknown name, or if b < 3.
    """
    if b < 3:
        raise ValueError(f"{b} rows: expected at least 3, two padded ones and a longer one")
    chosen = task(name)
    while True:
        batch = chosen.draw(rng, b)
        padding = (~batch.real).sum(1)
        if padding[:2].all():
            batch = _ignoring(batch, rng)
            if not chosen.causal:
                return batch
            counts = (_labels(batch) != IGNORED).sum(1)
            if counts.all() and len(set(counts)) > 1:
                return _shifted(batch, np.where(np.arange(b) % 2, 0, padding))


def _labels(batch: Batch) -> Array:
    assert batch.labels is not None  # every task has them
    return batch.labels


def _ignoring(batch: Batch, rng: np.random.Generator) -> Batch:
    """Each of a language's labels ignored with probability 1/4, or one of the classes."""
    labels = _labels(batch)
    if labels.ndim == 1:
        ignored = np.arange(len(labels)) == rng.integers(len(labels))
    else:
        ignored = rng.random(labels.shape) < 0.25
    return replace(batch, labels=np.where(ignored, IGNORED, labels))


def _shifted(batch: Batch, left: Array) -> Batch:
    """Each row moved to the right by its number in ``left``, around the end."""
    b, t = batch.ids.shape
    at = np.arange(b)[:, None], np.arange(t) - left[:, None]
    return Batch(batch.ids[at], _labels(batch)[at], batch.real[at])
