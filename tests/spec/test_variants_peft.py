"""VeRA's shared factors, as PEFT draws them; test_libraries.py compares the layers."""

import numpy as np
import pytest
from calculus import greatest, same_bits
from extras import optional

from minilora.spec.initialization import draw_vera, shared_part
from minilora.spec.variants import (
    VERA,
    fresh_parts,
    vera_linear,
)

torch = optional("torch")
peft = optional("peft")

N, M, R, T = 5, 4, 3, 6


def base(**layers):
    return torch.nn.ModuleDict({at: torch.nn.Linear(n, m) for at, (m, n) in layers.items()})


class Seeded:
    """A generator of NumPy's form that draws PyTorch's float32 numbers."""

    def __init__(self, key):
        self.generator = torch.Generator().manual_seed(key)

    def uniform(self, low, high, shape):
        return torch.empty(shape).uniform_(low, high, generator=self.generator).numpy()


@pytest.mark.parametrize("key", [0, 7])
def test_veras_shared_factors_are_pefts_bit_for_bit_from_the_same_numbers(key):
    """Both bounds are the same number of float32, whichever way they are computed in float64."""
    shapes = {"q": (M, N), "high": (M + 3, N - 1), "wide": (M - 1, N + 4)}
    config = peft.VeraConfig(r=R, target_modules=[*shapes], projection_prng_key=key)
    model = peft.get_peft_model(base(**shapes), config)
    A, B = draw_vera(Seeded(key), R, M + 3, N + 4)
    for at, (m, n) in shapes.items():
        layer = model.base_model.model[at]
        assert same_bits(A, layer.vera_A["default"].numpy())
        assert same_bits(B, layer.vera_B["default"].numpy())
        part = fresh_parts(VERA, np.zeros((m, n), np.float32), *shared_part(A, B, m, n), 1.0)
        assert [p.shape for p in part] == [(R, n), (m, R), (R, 1), (m, 1)]
        assert same_bits(part[2][:, 0], layer.vera_lambda_d["default"].detach().numpy())
        assert same_bits(part[3][:, 0], layer.vera_lambda_b["default"].detach().numpy())
    other, _ = draw_vera(Seeded(key), R, N + 4, M + 3)  # m and n exchanged
    assert other.shape != A.shape
    for array, of_another_key in zip(
        (A, B), draw_vera(Seeded(key + 1), R, M + 3, N + 4), strict=True
    ):
        assert not same_bits(array, of_another_key)


def test_a_fresh_vera_changes_no_output_and_only_lambda_b_has_a_gradient():
    rng = np.random.default_rng(0)
    shared = shared_part(*draw_vera(rng, R, M + 1, N + 1), M, N)
    parts = fresh_parts(VERA, np.zeros((M, N)), *shared, 1.0)
    x, W, dy = (rng.standard_normal(shape) for shape in ((N, T), (M, N), (M, T)))
    y, back = vera_linear(x, W, None, *parts, 1.0)
    assert (y == W @ x).all()
    _, dA, dB, dlambda_d, dlambda_b = back(dy)
    assert not any(greatest(g) for g in (dA, dB, dlambda_d))
    assert greatest(dlambda_b) > 0
    y, _ = vera_linear(x, W, None, *parts[:3], parts[3] + 1, 1.0)
    assert (y != W @ x).any()


def test_a_projection_that_is_greater_than_the_shared_factors_is_refused():
    A, B = draw_vera(np.random.default_rng(0), R, M, N)
    for m, n in ((M + 1, N), (M, N + 1)):
        with pytest.raises(ValueError, match="draw them for the greatest"):
            shared_part(A, B, m, n)
    assert same_bits(shared_part(A, B, M, N)[0], A)
