"""The loss of a large vocabulary, in chunks of columns."""

from dataclasses import replace

import numpy as np
import pytest
from calculus import GRADIENT, greatest

import minilora as ml
from minilora import testing as draw
from minilora.spec import lora, ops
from minilora.training import chunked_head

LLAMA = ml.Llama(11, 5, 2, heads=4, ffn=7, kv_heads=2, head_dim=2, qkv_bias=True)


@pytest.mark.parametrize("trained", [("head.A", "head.B"), ("head.weight", "embed.A"), ()])
@pytest.mark.parametrize("count", [None, 12])
def test_a_loss_of_logits_in_parts_is_that_of_the_projection_as_a_whole(
    count, trained, monkeypatch
):
    """Dropped inputs, labels that do not count, complex A and dL: of parts as of one product."""
    model = draw.draw_model(LLAMA, np.random.default_rng(0))
    W, tuning, t = model.W, model.tuning, 9
    W = W | {"head.A": (1 + 0.1j) * W["head.A"]}
    rng = np.random.default_rng(1)
    n, x = W["head.weight"].shape[1], rng.standard_normal((W["head.weight"].shape[1], t))
    keep = {"head": 2.0 * (rng.random((n, t)) < 0.5)}
    tuning = replace(tuning, trained=frozenset(trained), dropout_scale=keep)
    labels = rng.integers(0, len(W["head.weight"]), t)
    labels[[2, 5]] = ops.IGNORED
    z, back_z = lora.project(x, "head", W, tuning)
    wanted, back = ops.cross_entropy(z, labels, count)
    dL = 2 + 3j
    dx, gradients = back_z(back(dL))
    for of_all in (True, False):
        shapes, right = [], chunked_head.cross_entropy
        monkeypatch.setattr(
            chunked_head,
            "cross_entropy",
            lambda z, *rest, shapes=shapes, right=right: (
                shapes.append(z.shape[1]) or right(z, *rest)
            ),
        )
        monkeypatch.setattr(chunked_head, "COLUMNS", 1)
        monkeypatch.setattr(chunked_head, "LOGITS", len(z) * t if of_all else len(z) * t - 1)
        L, back_L = chunked_head.head_loss(x, "head", W, tuning, labels, count)
        assert shapes == ([t] if of_all else [t - 2])
        monkeypatch.setattr(chunked_head, "LOGITS", 3 * len(z))
        in_parts, back_parts = chunked_head.head_loss(x, "head", W, tuning, labels, count)
        assert shapes[1:] == [3, 2, 2]
        for loss, back_of in ((L, back_L), (in_parts, back_parts)):
            assert abs(loss - wanted) <= GRADIENT * abs(wanted)
            found = back_of(dL)
            assert found[1].keys() == gradients.keys()
            if not trained:  # nothing below asks for it
                assert not found[0].any()
                assert found[0].shape == dx.shape
                continue
            assert greatest(found[0] - dx) <= GRADIENT * greatest(dx)
            for name, g in gradients.items():
                assert greatest(found[1][name] - g) <= GRADIENT * greatest(g)
        monkeypatch.setattr(chunked_head, "cross_entropy", right)
    none = np.full(t, ops.IGNORED)
    monkeypatch.setattr(chunked_head, "LOGITS", 3)
    if count is None:
        with pytest.raises(ValueError, match="no label counts"):
            chunked_head.head_loss(x, "head", W, tuning, none)
    else:
        assert chunked_head.head_loss(x, "head", W, tuning, none, count)[0] == 0
