"""VeRA's and AdaLoRA's layers, VeRA's shared draw and LoRA+'s rates, against PEFT in float64."""

import numpy as np
import pytest
from calculus import GRADIENT, greatest, record_worst, relative_error, same_bits
from extras import optional

from minilora.spec.adalora import adalora_scale
from minilora.spec.initialization import draw_vera, shared_part
from minilora.spec.optim import loraplus_rates
from minilora.spec.variants import (
    VERA,
    adalora_linear,
    fresh_parts,
    merge_adalora,
    merge_vera,
    vera_linear,
)

torch = optional("torch")
peft = optional("peft")

N, M, R, T = 5, 4, 3, 6


def base(**layers):
    return torch.nn.ModuleDict({at: torch.nn.Linear(n, m) for at, (m, n) in layers.items()})


def place(parameter, array):
    with torch.no_grad():
        parameter.copy_(torch.tensor(array.reshape(parameter.shape)))
    return parameter


def vera(rng):
    """One of PEFT's layers that takes a part of A and B, and the arguments of minilora's."""
    config = peft.VeraConfig(r=R, target_modules=["q", "wide"])
    model = peft.get_peft_model(base(q=(M, N), wide=(M + 3, N + 2)), config).double()
    layer = model.base_model.model.q
    A, B = (shared["default"].requires_grad_() for shared in (layer.vera_A, layer.vera_B))
    place(A, rng.standard_normal(A.shape))
    place(B, rng.standard_normal(B.shape))
    d = place(layer.vera_lambda_d["default"], rng.standard_normal(R))
    b = place(layer.vera_lambda_b["default"], rng.standard_normal(M))
    shared = {name: t.detach().numpy() for name, t in (("A", A), ("B", B))}
    parts = {
        "A": shared["A"][:, :N],
        "B": shared["B"][:M],
        "lambda_d": d.detach().numpy()[:, None],
        "lambda_b": b.detach().numpy()[:, None],
    }

    def gradients():
        assert not A.grad[:, N:].any()
        assert not B.grad[M:].any()
        return {"A": A.grad[:, :N], "B": B.grad[:M], "lambda_d": d.grad, "lambda_b": b.grad}

    return layer, parts, gradients, 1.0, vera_linear, merge_vera


def adalora(rng):
    config = peft.AdaLoraConfig(
        init_r=R, target_r=1, lora_alpha=8, total_step=9, target_modules=["q"]
    )
    layer = peft.get_peft_model(base(q=(M, N)), config).double().base_model.model.q
    tensors = {part: getattr(layer, f"lora_{part}")["default"] for part in "ABE"}
    for t in tensors.values():
        place(t, rng.standard_normal(t.shape))
    parts = {part: t.detach().numpy() for part, t in tensors.items()}

    def gradients():
        return {part: t.grad for part, t in tensors.items()}

    return layer, parts, gradients, adalora_scale(8, R), adalora_linear, merge_adalora


def errors(variant, seed=0, s_off=0.0, doubled=False):
    """The relative errors of y, of every gradient and of the merged weight, beside PEFT's layer."""
    rng = np.random.default_rng(seed)
    layer, parts, gradients, s, linear, merge = variant(rng)
    s = s + s_off
    W = layer.base_layer.weight.detach().numpy().copy()
    b = layer.base_layer.bias.detach().numpy()[:, None]
    x, dy = rng.standard_normal((N, T)), rng.standard_normal((M, T))
    tx = torch.tensor(x.T, requires_grad=True)
    ty = layer(tx)
    ty.backward(torch.tensor(dy.T))

    y, back = linear(x, W, b, *parts.values(), s)
    dx, *given = back(dy)
    found = {"y": y, "dx": dx} | dict(zip(parts, given, strict=True))
    wanted = {"y": ty.detach().T, "dx": tx.grad.T} | gradients()
    found["W"], same_b = merge(W, b, *parts.values(), s)
    assert same_bits(same_b, b)
    layer.merge()
    wanted["W"] = layer.base_layer.weight.detach()
    if doubled:
        last, before = list(parts)[-1], list(parts)[-2]
        found[last] = 2 * found[last]
        found[before] = 1.5 * found[before]
    assert found.keys() == wanted.keys()
    return {k: relative_error(a, wanted[k].numpy().reshape(a.shape)) for k, a in found.items()}


@pytest.mark.parametrize("variant", [vera, adalora])
def test_the_layer_and_its_gradients_are_pefts(variant):
    for seed in range(3):
        error = max(errors(variant, seed).values())
        record_worst(f"{variant.__name__}_linear against PEFT's layer", error)
        assert error <= GRADIENT


@pytest.mark.parametrize("variant", [vera, adalora])
def test_another_scale_and_other_gradients_are_not_pefts(variant):
    off = errors(variant, s_off=1e-5)
    assert min(off.values()) > GRADIENT
    off = errors(variant, doubled=True)
    assert sum(error > GRADIENT for error in off.values()) == 2


def test_loras_own_scale_is_not_the_one_of_pefts_adalora():
    error = errors(adalora, s_off=8 / R - adalora_scale(8, R))
    assert min(error.values()) > GRADIENT


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


def test_loraplus_gives_each_matrix_the_rate_that_peft_gives_it():
    from peft.optimizers import create_loraplus_optimizer

    config = peft.LoraConfig(r=R, target_modules=["q", "k"])
    model = peft.get_peft_model(base(q=(M, N), k=(N, M)), config)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {
        f"{at}.{part}": rate[id(getattr(model.base_model.model[at], f"lora_{part}").default.weight)]
        for at in "qk"
        for part in "AB"
    }
    assert found == loraplus_rates(list(found), 0.01, 16.0)
    assert found != loraplus_rates([name.swapcase() for name in found], 0.01, 16.0)
    assert found != loraplus_rates(list(found), 0.01, 8.0)
