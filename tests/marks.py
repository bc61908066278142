"""Parameters of which some are slow."""

import pytest


def others_slow(names, *quick):
    """The names as parameters of a test, slow but for the quick ones."""
    assert all(name in names for name in quick)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
