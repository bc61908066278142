"""What a backward keeps: each block's activations until they are used, and nothing below."""

import weakref

import numpy as np
import pytest

from minilora.spec.blocks import stack as keeping_stack
from minilora.training.checkpointing import ZERO, stack


def frees_as_it_goes(stack):
    activations = []

    def block(x, at):
        activation = np.tanh(x)
        activations.append(weakref.ref(activation))
        number = len(activations)

        def back(dy):
            alive = [ref() is not None for ref in activations]
            assert alive == [i < number for i in range(len(activations))]
            return dy * (1 - activation * activation), {at: dy}

        return activation + 0, back

    _, back = stack(np.ones((2, 3)), 4, block)
    back(np.ones((2, 3)))
    assert not any(ref() is not None for ref in activations)


def refuses_a_second_run(stack):
    _, back = stack(np.ones(2), 2, lambda x, at: (x, lambda dy: (dy, {at: dy})))
    _, gradients = back(np.ones(2))
    assert list(gradients) == ["layers.1.", "layers.0."]
    with pytest.raises(RuntimeError, match="back has run and freed the activations; run the for"):
        back(np.ones(2))


@pytest.mark.parametrize("guard", [frees_as_it_goes, refuses_a_second_run])
def test_the_stack(guard):
    guard(stack)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        guard(keeping_stack)


def test_zero_stays_zero_and_adds_nothing():
    x = np.arange(6.0).reshape(2, 3)
    for product in (x * ZERO, ZERO * x, ZERO @ x, 2.0 * ZERO, np.add.reduce(ZERO) / len(ZERO)):
        assert product is ZERO
    assert ZERO + ZERO is ZERO
    assert ZERO - ZERO is ZERO
    for total in (x + ZERO, ZERO + x, x - ZERO):
        assert total is x
    assert (ZERO - x == -x).all()
