"""What training and generation hand in to the specification's models."""

import numpy as np
import pytest
from calculus import same_bits

import minilora as ml
from minilora import testing as draw
from minilora.spec import blocks, models, ops
from minilora.training import kernels

COUNTED = ml.Batch(np.zeros((2, 3), int)).position_ids
TABLES = {
    "counted": COUNTED,
    "one row": COUNTED[:1].copy(),
    "padded on the left": np.array([[0, 0, 1], [0, 1, 2]]),
    "going on": np.array([[7], [3]]),
}


@pytest.mark.parametrize("name", TABLES)
def test_remembered_tables_are_the_specifications(name):
    settings = 4, 1e4, np.dtype(np.float32)
    for positions in (TABLES[name], TABLES[name], TABLES[name] + 1):
        want = ops.rope_tables(positions, *settings)
        found = kernels.rope_tables(positions, *settings)
        for table, right in zip(found, want, strict=True):
            assert same_bits(np.broadcast_to(table, right.shape), right)


def test_what_several_calls_share_cannot_be_written_to():
    for table in kernels.rope_tables(COUNTED, 4, 1e4, np.dtype(float)):
        with pytest.raises(ValueError, match="read-only"):
            table[...] = 0


def test_nothing_is_kept_of_a_block_in_a_forward_alone():
    c = ml.Llama(11, 5, 2, heads=4, ffn=7, kv_heads=2, head_dim=2)
    model = draw.draw_model(c, np.random.default_rng(0))
    z, back = models.logits(model.batch, model.W, c, model.tuning, kernels.forward_kernels(c))
    want, back_all = models.logits(model.batch, model.W, c, model.tuning)
    assert same_bits(z, want)
    ones = np.ones_like(z)
    assert not any(name.startswith("layers.") for name in back(ones))
    assert any(name.startswith("layers.") for name in back_all(ones))
    assert models.Kernels().stack is blocks.stack
