"""The tasks: exact probabilities and entropies, expected losses, and what a batch holds."""

import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from minilora.io.synthetic_data import END, PAD, START, TASKS, Task, draw_batch, expected_loss, task
from minilora.spec.initialization import draw_weights
from minilora.spec.lora import TrainableSpec
from minilora.spec.models import GPT2, Bert
from minilora.spec.ops import IGNORED

U = np.finfo(float).eps / 2
EVERY = pytest.mark.parametrize("name", TASKS)
LANGUAGES = [name for name in TASKS if task(name).causal]
CLASSES = [name for name in TASKS if not task(name).causal]


def bound_of_entropy(chosen):
    """Each logarithm of a fraction is a difference of two, of numbers up to the greatest
    denominator D: within 4 u log D of its own, 6 u with the difference and the product; both sides
    of a comparison do so, over weights whose sum is one, per label or more."""
    return 12 * U * math.log(max(e.probability.denominator for e in chosen.examples))


def total(chosen):
    return sum(e.probability for e in chosen.examples)


@EVERY
def test_the_probabilities_sum_to_one_exactly(name):
    chosen = task(name)
    assert total(chosen) == 1
    assert min(e.probability for e in chosen.examples) > 0
    assert total(replace(chosen, examples=chosen.examples[1:])) < 1


@EVERY
def test_no_example_comes_twice(name):
    seen = Counter((e.ids, e.label) for e in task(name).examples)
    assert set(seen.values()) == {1}


def coin(p):
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


FORMULAS = {
    "running": (37 / 16 * math.log(11) + (1 + 3 / 4) * coin(1 / 4)) / (2 * 37 / 16 + 1),
    "more_of": 14 / 15 * math.log(15 / 14) + math.log(30) / 15,
}


@pytest.mark.parametrize("name", [name for name in TASKS if TASKS[name].func.__name__ in FORMULAS])
def test_the_entropy_is_that_of_the_formula(name):
    chosen, formula = task(name), FORMULAS[TASKS[name].func.__name__]
    bound, incomplete = bound_of_entropy(chosen), replace(chosen, examples=chosen.examples[1:])
    assert abs(chosen.entropy - formula) <= bound
    assert abs(incomplete.entropy - formula) > bound


def of_each_next_token(chosen):
    """Of every prefix the probabilities of the next token, by its own probability."""
    after = {}
    for e in chosen.examples:
        for i in range(1, len(e.ids)):
            prefix = after.setdefault(e.ids[:i], Counter())
            prefix[e.ids[i]] += e.probability
    return {prefix: (sum(c.values()), c) for prefix, c in after.items()}


@pytest.mark.parametrize("name", LANGUAGES)
def test_the_entropy_is_the_sum_of_those_of_each_next_token(name):
    chosen, entropy = task(name), 0.0
    for p, following in of_each_next_token(chosen).values():
        shares = [float(share / p) for share in following.values()]
        entropy -= float(p) * sum(share * math.log(share) for share in shares)
    # One rounding more for each label than the other side, whose sum is exact.
    bound = bound_of_entropy(chosen) + len(chosen.examples) * U * entropy
    assert abs(chosen.entropy - entropy / float(chosen.label_count)) <= bound


def symbols(name, example):
    """The example's own symbols, without the tokens that every task has."""
    start, *inner, end = example.ids
    assert (start, end) == (START, END)
    return [task(name).symbols[token] for token in inner]


def continues(name, sign):
    """Whether each digit is followed by the sum or difference so far."""
    for e in task(name).examples:
        numbers, s = list(map(int, symbols(name, e))), 0
        for x, after in zip(numbers[::2], numbers[1::2], strict=True):
            s = (s + sign * x) % 11
            if after != s:
                return False
    return True


def test_running_tasks_add_and_subtract():
    assert continues("running-sum", +1)
    assert continues("running-difference", -1)
    assert not continues("running-sum", -1)


def nested(text):
    while text and text != (text := text.replace("()", "").replace("[]", "")):
        pass
    return not text


def queued(text):
    opened = [x for x in text if x in "(["]
    closed = [{")": "(", "]": "["}[x] for x in text if x in ")]"]
    in_time = all(text[:i].count("(") >= text[:i].count(")") for i in range(len(text)))
    return opened == closed and in_time


@pytest.mark.parametrize(
    ("name", "holds", "fails"),
    [("nested-brackets", nested, queued), ("queued-brackets", queued, nested)],
)
def test_brackets_are_closed_in_their_order_and_all_words_are_there(name, holds, fails):
    words = ["".join(symbols(name, e)) for e in task(name).examples]
    catalan = [math.comb(2 * k, k) // (k + 1) for k in range(5)]
    assert len(words) == sum(catalan[k] * 2**k for k in range(1, 5))
    assert all(map(holds, words))
    assert not all(map(fails, words))


@pytest.mark.parametrize("letter", "ab")
def test_words_have_the_class_that_their_letters_give(letter):
    chosen = task(f"more-{letter}")
    for e in chosen.examples:
        first, second = " ".join(chosen.symbols[i] for i in e.ids[1:-1]).split(" <end> ")
        a, b = first.count(letter), second.count(letter)
        true = 0 if a < b else 1 if a == b else 2
        assert e.probability == e.input_probability * (
            Fraction(14, 15) if e.label == true else Fraction(1, 30)
        )
        assert e.types == tuple([0] * (len(first.split()) + 2) + [1] * (len(second.split()) + 1))


@pytest.mark.parametrize("pair", [list(TASKS)[i : i + 2] for i in range(0, len(TASKS), 2)])
def test_the_two_of_a_pair_differ_but_not_in_symbols_or_entropy(pair):
    first, second = map(task, pair)
    assert first.symbols == second.symbols
    assert first.entropy == second.entropy
    assert set(first.examples) != set(second.examples)


def model_for(chosen, rng):
    """A small model of random weights for the task."""
    size, longest = len(chosen.symbols), max(len(e.ids) for e in chosen.examples)
    sizes = {"vocab": size, "d": 6, "layers": 1, "heads": 2, "ffn": 5, "positions": longest}
    c = GPT2(**sizes) if chosen.causal else Bert(**sizes, types=2, classes=3)
    return c, draw_weights(c, rng, std=0.5)


@EVERY
def test_a_model_that_knows_nothing_loses_the_logarithm_of_its_choices(name):
    """Each loss is one logarithm of a sum of ones, and the mean of n of them is within n u."""
    chosen = task(name)
    c, W = model_for(chosen, np.random.default_rng(0))
    nothing = {at: 0 * w for at, w in W.items()}
    wanted = math.log(c.vocab if chosen.causal else 3)
    bound = 2 * sum(e.label_count for e in chosen.examples) * U * wanted
    assert abs(expected_loss(chosen, nothing, c, TrainableSpec()) - wanted) <= bound
    assert abs(expected_loss(chosen, W, c, TrainableSpec()) - wanted) > bound


def few(name):
    """The task's first examples of different lengths and probabilities, made to sum to one."""
    chosen = task(name)
    kept = chosen.examples[:: len(chosen.examples) // 20]
    whole = sum(e.probability for e in kept)
    return replace(
        chosen, examples=tuple(replace(e, probability=e.probability / whole) for e in kept)
    )


def value(ids, label):
    """A whole number that every token and the label has a part in."""
    return sum(i * token for i, token in enumerate(ids, 1)) + 100 * (label or 0)


@EVERY
def test_the_expected_loss_weighs_every_example_by_its_probability(name, monkeypatch):
    """With whole numbers for losses the sums of a group are exact; probabilities, products, their
    sum, the expected number of labels and the division round once each; all terms have one sign."""
    chosen = task(name)

    def whole_numbers(batch, W, c, tuning, count):
        labels = [None] * len(batch.ids) if chosen.causal else batch.labels
        rows = zip(batch.ids, batch.mask, labels, strict=True)
        return sum(value(ids[mask].tolist(), label) for ids, mask, label in rows) / count, None

    monkeypatch.setattr("minilora.io.synthetic_data.loss", whole_numbers)
    wanted = (
        sum(e.probability * value(e.ids, e.label) for e in chosen.examples) / chosen.label_count
    )
    found = Fraction(expected_loss(chosen, {}, None, TrainableSpec()))
    assert abs(found - wanted) <= Fraction(5 * U) * wanted
    evenly = Fraction(sum(value(e.ids, e.label) for e in chosen.examples), len(chosen.examples))
    assert abs(found - evenly / chosen.label_count) > Fraction(5 * U) * wanted


def test_an_example_is_drawn_where_the_number_falls_into_its_share():
    chosen = few("nested-brackets")
    edges = np.cumsum([float(e.probability) for e in chosen.examples])
    middles = edges - np.diff(edges, prepend=0) / 2
    numbers = np.array([0.0, *middles, 1 - U])
    rows = chosen.draw_rows(SimpleNamespace(random=lambda b: numbers), len(numbers))
    assert rows.tolist() == [0, *range(len(edges)), len(edges) - 1]


def test_a_batch_is_its_examples_padded_on_the_right():
    chosen = task("more-a")
    rows = np.array([0, 700, 4000])
    batch = chosen.batch(rows)
    for row, ids, mask, types, label in zip(
        rows, batch.ids, batch.mask, batch.types, batch.labels, strict=True
    ):
        e = chosen.examples[row]
        padding = [PAD] * (batch.ids.shape[1] - len(e.ids))
        assert ids.tolist() == [*e.ids, *padding]
        assert mask.tolist() == [True] * len(e.ids) + [False] * len(padding)
        assert types.tolist() == [*e.types, *padding]
        assert label == e.label
    assert batch.mask.all(1).any()


SEEDS = range(20)


def drawn(name):
    return [draw_batch(name, np.random.default_rng(seed)) for seed in SEEDS]


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_drawn_batch_of_language_has_padding_on_both_sides_and_unequal_labels(name):
    examples = {e.ids for e in task(name).examples}
    ignored = 0
    for batch in drawn(name):
        for i, (ids, labels, mask) in enumerate(
            zip(batch.ids, batch.labels, batch.mask, strict=True)
        ):
            at = np.flatnonzero(mask)
            assert tuple(ids[at]) in examples
            assert at.tolist() == list(range(at[0], at[-1] + 1))
            assert at[0] == 0 if i % 2 else at[-1] == len(ids) - 1
            assert labels[at[0]] == IGNORED
            assert set(labels[~mask]) <= {IGNORED}
            counted = labels != IGNORED
            assert counted.any()
            assert (ids[counted] == labels[counted]).all()
            ignored += len(at) - 1 - counted.sum()
        assert not batch.mask[0, 0]
        assert not batch.mask[1, -1]
        assert len(set((batch.labels != IGNORED).sum(1))) > 1
    assert ignored


@pytest.mark.parametrize("name", CLASSES)
def test_a_drawn_batch_of_classes_is_padded_on_the_right_and_ignores_one(name):
    examples = {(e.ids, e.types) for e in task(name).examples}
    for batch in drawn(name):
        assert batch.mask[:, 0].all()
        assert not batch.mask[:2, -1].any()
        assert (batch.labels == IGNORED).sum() == 1
        for ids, types, mask in zip(batch.ids, batch.types, batch.mask, strict=True):
            assert (tuple(ids[mask]), tuple(types[mask])) in examples


@EVERY
def test_a_batch_is_a_function_of_its_seed(name):
    first, again = drawn(name), drawn(name)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(first, again, strict=True))
    assert all(np.array_equal(a.labels, b.labels) for a, b in zip(first, again, strict=True))
    assert len({batch.ids.tobytes() for batch in first}) > 1


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="task 'more-d': expected one of running-sum"):
        task("more-d")
    with pytest.raises(ValueError, match="2 rows: expected at least 3"):
        draw_batch("more-a", np.random.default_rng(0), b=2)


def test_a_sequence_reads_as_its_symbols():
    chosen = task("queued-brackets")
    assert isinstance(chosen, Task)
    assert chosen.read(np.array([PAD, START, 3, 5, END, PAD])) == "<start> ( ) <end>"
