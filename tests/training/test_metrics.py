"""Perplexity, accuracy and ROUGE, by what defines them."""

import math
import re
import sys
from fractions import Fraction

import numpy as np
import pytest
from extras import needs
from hypothesis import given
from hypothesis import strategies as st

from minilora.training.metrics import (
    RESAMPLES,
    ROUGE,
    Accuracy,
    accuracy,
    difference,
    paired,
    perplexity,
    rouge,
)

needs_rouge = needs("rouge_score")


def test_an_even_guess_among_n_has_perplexity_n():
    for n in (1, 2, 50_000):
        # log and exp are each right to an ulp or so of their value, and exp magnifies by the log.
        bound = (2 + math.log(n)) * np.finfo(float).eps
        assert abs(perplexity(math.log(n)) / n - 1) <= bound
        assert abs(perplexity(math.log2(n)) / n - 1) > bound or n == 1
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


Z = 1.959963984540054
"""Of which a normal variable is above in 1 of 40 cases."""


def wilson(p, k, n):
    """What is zero at both ends of the interval: (p - k/n)² - z² p (1 - p) / n."""
    p, share = Fraction(p), Fraction(k, n)
    return (p - share) ** 2 - Fraction(Z) ** 2 * p * (1 - p) / n


@given(n=st.integers(1, 5000), data=st.data())
def test_an_interval_is_wilsons(n, data):
    k = data.draw(st.integers(0, n))
    got = accuracy(np.arange(n) < k)
    assert got == Accuracy(k / n, got.low, got.high, n)
    assert 0 <= got.low <= got.share <= got.high <= 1
    # The equation's slope at an end is at most 2 + z²/n, and its value there the slope times the
    # error of the end: a dozen operations on numbers up to 1 + z²/n, over 1 + z²/n.
    slope = 2 + Z**2 / n
    bound = 16 * np.finfo(float).eps * slope * (1 + Z**2 / n)
    for end in (got.low, got.high):
        assert abs(float(wilson(end, k, n))) <= bound
    if 0 < k < n:
        inside = (got.share + got.high) / 2
        assert abs(float(wilson(inside, k, n))) > bound


def test_more_confidence_is_a_wider_interval_and_more_answers_a_narrower_one():
    right = np.arange(40) < 30
    plain, sure = accuracy(right), accuracy(right, 0.99)
    assert sure.low < plain.low < plain.high < sure.high
    many = accuracy(np.tile(right, 10))
    assert plain.low < many.low < many.share < many.high < plain.high


@pytest.mark.parametrize("right", [[], [[True]], True])
def test_no_answer_has_no_accuracy(right):
    with pytest.raises(ValueError, match="answers of shape"):
        accuracy(np.array(right))


@needs_rouge
def test_rouge_counts_words_pairs_and_their_order():
    """By hand: of 4 words written and 6 wanted 3 are common, no two of them in a row."""
    got = rouge(["one two three four"], ["three x one y two z"])
    share = Fraction(2 * 3, 4 + 6)
    assert got["rouge1"] == float(share)
    assert got["rouge2"] == 0
    assert got["rougeL"] == float(Fraction(2 * 2, 4 + 6))
    both = rouge(["one two three four", "a"], ["three x one y two z", "a"])
    assert both["rouge1"] == (float(share) + 1) / 2
    assert [*got] == [*ROUGE]
    assert rouge(["running"], ["run"])["rouge1"] == 0
    assert rouge(["running"], ["run"], stem=True)["rouge1"] == 1


@pytest.mark.parametrize(("written", "wanted"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_texts_without_their_pair_are_refused(written, wanted):
    with pytest.raises(ValueError, match="expected as many of both"):
        rouge(written, wanted)


def test_rouge_without_its_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(
        ImportError, match=re.escape("rouge-score: python -m pip install 'minilora[")
    ):
        rouge(["a"], ["a"])


@pytest.mark.slow
def test_the_interval_holds_the_true_difference_about_as_often_as_it_says():
    """95% of all but for four standard deviations of a binomial; a quarter of it holds fewer."""
    rng, truth, n = np.random.default_rng(3), 0.2, 60
    least = n * 0.95 - 4 * math.sqrt(n * 0.95 * 0.05)
    inside, narrow = 0, 0
    for _ in range(n):
        counts = rng.integers(1, 5, 120)
        found = difference(counts * (truth + rng.standard_normal(120)), counts)
        quarter = (found.high - found.low) / 8
        inside += found.low <= truth <= found.high
        narrow += abs(found.value - truth) <= quarter
    assert inside >= least > narrow


def test_an_interval_depends_on_chance_by_a_hundredth_of_its_width():
    """Of N draws of a normal variable the quantile of 1/40, at -z, has a standard deviation of
    √(1/40 · 39/40 / N) over the density there, and the interval is 2 z wide."""
    rng = np.random.default_rng(0)
    sums, counts = rng.standard_normal(60), np.ones(60)
    found = np.array([difference(sums, counts, seed=seed)[1:] for seed in range(24)])
    off = found.std(0, ddof=1) / (found[:, 1] - found[:, 0]).mean()
    density = math.exp(-(Z**2) / 2) / math.sqrt(2 * math.pi)
    share = math.sqrt(39) / 40 / math.sqrt(RESAMPLES) / density / (2 * Z)
    # A standard deviation from 24 values is itself off by 1/√46, by four of these at most.
    room = 4 / math.sqrt(2 * (len(found) - 1))
    assert share < 1 / 100
    assert (abs(off / share - 1) < room).all()


def test_questions_of_one_source_are_worth_one():
    rng = np.random.default_rng(0)
    right, other = rng.random(30) < 0.8, rng.random(30) < 0.5
    once = paired(right, other)
    ten = paired(np.repeat(right, 10), np.repeat(other, 10), [i // 10 for i in range(300)])
    assert ten[:3] == once[:3]
    apart = paired(np.repeat(right, 10), np.repeat(other, 10))
    assert apart.high - apart.low < (ten.high - ten.low) / 2


def test_mcnemars_p_is_the_sign_test():
    right = np.array([True] * 9 + [False] * 3 + [True] * 5)
    other = np.array([False] * 9 + [True] * 3 + [True] * 5)
    found = paired(right, other)
    assert (found.only, found.other) == (9, 3)
    wanted = Fraction(2 * sum(math.comb(12, k) for k in range(4)), 2**12)
    assert found.p == wanted
    assert paired(right, right)[3:] == (0, 0, 1.0)
    assert paired(right, right)[:3] == (0.0, 0.0, 0.0)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="0 sources"):
        paired([], [])
    with pytest.raises(ValueError, match="1 sources"):
        paired([True, False], [True, True], [1])
    with pytest.raises(ValueError, match="no count of 0"):
        difference(np.ones(2), np.array([1, 0]))
    assert difference(np.ones(1), np.ones(1)) == (1.0, -math.inf, math.inf)
