"""Attention for training: the values and derivatives of the specification's."""

import numpy as np
import pytest
from calculus import GRADIENT, greatest

from minilora.spec import ops
from minilora.training import attention


@pytest.mark.parametrize("kinds", [(float, float), (float, complex), (complex, float)])
def test_scores_are_the_product_with_the_keys_outermost_in_memory(kinds):
    rng = np.random.default_rng(0)
    shapes = (2, 3, 1, 4, 5), (2, 3, 2, 4, 7)
    K, Q = (rng.integers(-9, 9, s).astype(kind) for s, kind in zip(shapes, kinds, strict=True))
    Q = Q.T.copy().T  # however it lies
    z = attention.keys_outermost(K.mT, Q)
    assert z.dtype == np.result_type(K, Q)
    assert (z == K.mT @ Q).all()  # of whole numbers, so without rounding
    assert z.transpose(3, 0, 1, 2, 4).flags.c_contiguous
    assert not (K.mT @ Q).transpose(3, 0, 1, 2, 4).flags.c_contiguous


def test_queries_in_blocks_have_the_derivatives_of_attention(monkeypatch):
    """By a complex step, where dk is complex though k is not; and beside a longer past."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((3, 4, 2, 5))
    k, v = rng.standard_normal((2, 3, 2, 2, 7))
    mask = ops.causal_mask(np.ones((3, 7), bool))[:, :, -5:]
    whole, back = ops.attention(q, k, v, mask)
    monkeypatch.setattr(attention, "QUERIES", 2)
    o, back_blocks = attention.by_queries(ops.attention, q, k, v, mask)
    bound = GRADIENT * greatest(whole)
    assert greatest(o - whole) <= bound
    do = rng.standard_normal(o.shape)
    for found, wanted in zip(back_blocks(1j * do), back(do), strict=True):
        assert greatest(found - 1j * wanted) <= 3 * GRADIENT * greatest(wanted)
    turned, _ = attention.by_queries(ops.attention, q, k, 1j * v, mask)
    assert greatest(turned - 1j * whole) <= bound
