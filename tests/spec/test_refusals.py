"""What can have no meaning is refused, where NumPy would answer something."""

import numpy as np
import pytest

import minilora as ml
from minilora.spec import adalora, initialization, layers, lora, multi_adapter, ops

ONE = np.ones((2, 3))
LINE = layers.Geometry((2,), (1,), ((0, 0),), (1,))


def moved(**changed):
    fields = {name: getattr(LINE, name) for name in ("kernel", "stride", "padding", "dilation")}
    return layers.Geometry(**{**fields, **changed})


def experts(count=2, only=None):
    P = [np.ones((count, 1, 3)), np.ones((count, 2, 1))]
    index = np.zeros(1, int)
    x, W = np.ones((3, 1)), np.ones((2, 2, 3))
    return layers.adapted_experts(lora.lora_linear, x, W, None, P, index, 1.0, only)


def masked(kind):
    c = ml.GPT2(vocab=5, d=4, layers=1, heads=2, ffn=4, positions=3)
    W = initialization.draw_weights(c, np.random.default_rng(0))
    batch = ml.Batch(np.zeros((1, 3), int), mask=np.array([[1, 1, 0]]) * kind)
    return ml.logits(batch, W, c, ml.TrainableSpec())


REFUSED = {
    "a label for all tokens": lambda n: ops.cross_entropy(np.ones((3, 2)), np.zeros(n, int)),
    "a row for all ids": lambda n: layers.with_tokens(ONE, np.array([0, 1]), np.ones((n, 3))),
    "rate": lambda p: initialization.draw_dropout(
        np.random.default_rng(0), p, {"q": (2, 2)}, float
    ),
    "start": lambda init: initialization.draw_factors(np.random.default_rng(0), init, 1, 2, 3),
    "adapters to fuse": lambda n: layers.fuse([(np.ones((1, 3)), np.ones((2, 1)))] * n),
    "NaN of singular values": lambda x: multi_adapter.combine_svd([ONE * x], [1], 1),
    "NaN to trim": lambda x: multi_adapter.trim(ONE * x, 0.5),
    "changes to elect": lambda n: multi_adapter.ties([ONE] * n, [1] * n, 1),
    "stride": lambda n: moved(stride=(n,)).places([4]),
    "kernel": lambda n: moved(kernel=(n,)).places([4]),
    "reflection": lambda n: layers.Geometry((1,), (1,), ((n, 0),), (1,), "reflect").places([3]),
    "an expert's adapter": lambda n: experts(n),
    "the expert adapted": lambda e: experts(only=[e]),
    "rank": lambda r: ml.LoraConfig(r=r),
    "rank of one": lambda r: ml.LoraConfig(rank_pattern={"q": r}),
    "mask": masked,
}
RIGHT_AND_WRONG = {
    "a label for all tokens": (2, 1),
    "a row for all ids": (2, 1),
    "rate": (0.5, 1),
    "start": ("gaussian", "none"),
    "adapters to fuse": (1, 0),
    "NaN of singular values": (1.0, np.nan),
    "NaN to trim": (1.0, np.nan),
    "changes to elect": (1, 0),
    "stride": (1, 0),
    "kernel": (1, 0),
    "reflection": (2, 3),
    "an expert's adapter": (2, 3),
    "the expert adapted": (1, 2),
    "rank": (np.int64(1), 1.5),
    "rank of one": (1, 0),
    "mask": (1, -1e9),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_have_no_meaning_is_refused(what):
    right, wrong = RIGHT_AND_WRONG[what]
    REFUSED[what](right)
    with pytest.raises(ValueError, match=r"expected|hold NaN|needs"):
        REFUSED[what](wrong)


@pytest.mark.parametrize("start", [initialization.pissa, initialization.olora])
def test_a_complex_weight_has_no_start_of_its_parts(start):
    start(ONE, 1, 1.0)
    with pytest.raises(TypeError, match="complex128: expected real numbers"):
        start(ONE * 1j, 1, 1.0)


def test_a_number_of_numpy_widens_no_adapter():
    A, B, s = np.ones((1, 3), np.float32), np.ones((2, 1), np.float32), np.float64(0.5)
    one = multi_adapter.Adapter((A, B), s)
    found = [
        *multi_adapter.combine([(A, B, s)], [np.float64(2)]),
        *multi_adapter.combine_exact([one, one], np.array([0.5, 2.0])).parts,
        *multi_adapter.combine_linear([(A, B, 1.0)], np.array([0.5])),
        multi_adapter.ties([B @ A], np.array([0.5]), 1),
    ]
    assert {array.dtype for array in found} == {np.dtype(np.float32)}
    assert type(adalora.adalora_scale(np.float64(3), 2)) is float
