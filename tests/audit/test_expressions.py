"""Expressions that no name is matched against, because it could take for ever."""

import pytest

from minilora.audit.expressions import is_endless


@pytest.mark.parametrize(
    "pattern",
    [r"(a*)*", r"((([a-z])*)*)*!", r"(.*)*x", r"(x+x+)+y", r"(a|b+){2,}", r".*.*.*.*.*.*.*!"],
)
def test_a_repeat_in_a_repeat_is_endless(pattern):
    assert is_endless(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["q_proj", r"layers\.[0-3]\.mlp\.(up|down)_proj", r".*\.(q|k)_proj", r"(?:.*\.)?q", r"[*+]*",
     r"\(a*\)*", r"layers\.\d+\.", r"a{2,3}"],
)  # fmt: skip
def test_the_patterns_that_people_write_are_not(pattern):
    assert not is_endless(pattern)
