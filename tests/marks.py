"""How much is tested: slow parameters, and numbers of examples."""

import os

import pytest
from hypothesis import settings

EFFORT = int(os.environ.get("MINILORA_TEST_EFFORT", "1"))
"""Multiplies the numbers of drawn examples; .ci/run and the mutants of the source take 2."""


def examples(n):
    """Hypothesis's settings for so many examples, times the effort."""
    return settings(max_examples=n * EFFORT)


def others_slow(names, *quick):
    """The names as parameters of a test, slow but for the quick ones."""
    assert all(name in names for name in quick)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
