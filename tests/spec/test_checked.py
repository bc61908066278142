"""The public entry refuses by name what the equations would take for something else."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from calculus import same_bits

import minilora as ml
from minilora.spec import checked, lora, models

M, N, R, T = 7, 12, 2, 5
LINEAR = {
    "x": np.ones((N, T)),
    "W": np.ones((M, N)),
    "b": np.ones((M, 1)),
    "A": np.ones((R, N)),
    "B": np.ones((M, R)),
    "s": 2.0,
    "K": np.ones((N, T)),
}
C = ml.Llama(vocab=11, d=4, layers=1, heads=2, ffn=5, kv_heads=1, head_dim=2)
IDS = np.array([[1, 2, 3], [4, 5, 0]])


def model(c=C):
    rng = np.random.default_rng(0)
    return ml.inject(ml.draw_weights(c, rng), ml.LoraConfig(r=2), c.linears(), rng)


def run(c=C, batch=None, weights=None, **changes):
    """The loss with some fields of the batch, or some weights, replaced."""
    W, spec = model()
    batch = replace(ml.Batch(IDS, labels=IDS), **(batch or {}))
    W = {name: w for name, w in (W | (weights or {})).items() if w is not None}
    return ml.loss(batch, W, c, replace(spec, **changes))


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        (
            {"x": np.ones((T, N)), "K": None},
            r"x is \(5, 12\): expected \(n, tokens\) with n = 12 as in W; are tokens in rows\?",
        ),
        ({"x": np.ones((T, 7))}, r"x is \(5, 7\): expected \(n, tokens\) with n = 12 as in W$"),
        ({"x": np.ones(N)}, r"x is \(12,\): expected \(n, tokens\)"),
        ({"x": [[1.0] * T] * N}, r"x is a list: expected an array; use np.array\(x\)"),
        ({"W": np.ones(N)}, r"W is \(12,\): expected \(m, n\)"),
        ({"b": np.ones(M)}, r"b is \(7,\): expected \(m, 1\) with m = 7 as in W"),
        ({"A": np.ones((N, R))}, r"A is \(12, 2\): .* n = 12 as in W; is it transposed\?"),
        ({"B": np.ones((M, 3))}, r"B is \(7, 3\): .* m = 7 as in W and r = 2 as in A"),
        ({"B": np.ones((R, M))}, r"B is \(2, 7\): .*; is it transposed\?"),
        ({"K": np.ones((T, N))}, r"K is \(5, 12\): .*; are tokens in rows\?"),
        ({"s": "1"}, "s is '1': expected a number, such as alpha / r"),
        ({"s": np.ones((1, 2))}, r"s is \(1, 2\): expected a number"),
        ({"x": np.ones((N, T), np.float32)}, "W is float64 and x float32: expected one dtype"),
    ],
)
def test_a_projection_names_what_does_not_fit(changed, found):
    ml.lora_linear(**LINEAR)
    with pytest.raises(ValueError, match=found):
        ml.lora_linear(**LINEAR | changed)


def test_a_bias_in_a_row_would_have_been_added_to_tokens():
    """What the check is for: NumPy answers, and the answer is wrong."""
    square = LINEAR | {"x": np.ones((N, M)), "K": None, "b": np.arange(M)}
    y, _ = lora.lora_linear(**square)
    right, _ = lora.lora_linear(**square | {"b": np.arange(M)[:, None]})
    assert (y != right).any()
    with pytest.raises(ValueError, match="b is"):
        ml.lora_linear(**square)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"ids": IDS.tolist()}, "ids is a list: expected an array"),
        ({"ids": IDS * 1.0}, r"ids are float64: expected whole numbers; use ids.astype\(int\)"),
        ({"ids": IDS[0]}, r"ids is \(3,\): expected \(b, t\); use ids\[None\]"),
        ({"ids": IDS[:, :0]}, "expected at least one token"),
        ({"labels": IDS[:, :2]}, r"labels is \(2, 2\): .* t = 3 as in ids"),
        ({"labels": IDS * 1.0}, "labels are float64"),
        ({"mask": IDS[:1]}, r"mask is \(1, 3\)"),
        ({"mask": np.array([[1, 1, 1], [0, 0, 0]])}, "mask: row 1 is 0 everywhere"),
        ({"positions": IDS[0]}, r"positions is \(3,\)"),
        ({"ids": IDS + 90}, "ids: found 90 to 95"),
    ],
)
def test_a_batch_names_what_does_not_fit(batch, found):
    run()
    with pytest.raises(ValueError, match=found):
        run(batch=batch)


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        ({"norm.weight": None}, "norm.weight is missing in W"),
        ({"layers.0.q.B": None}, "layers.0.q.B is missing in W: found layers.0.q.A"),
        (
            {"layers.0.qq.weight": np.ones((4, 4))},
            r"layers.0.qq.weight is no weight of this model; did you mean layers.0.q.weight\?",
        ),
        ({"layers.0.q.C": np.ones(1)}, "layers.0.q.C is no weight of this model"),
        ({"layers.0.up.weight": np.ones((4, 5))}, r"\(4, 5\): expected \(5, 4\); is it transp"),
        ({"layers.0.q.A": np.ones((4, 2))}, r"layers.0.q.A is \(4, 2\)"),
        ({"norm.weight": np.ones((4, 1), np.float32)}, "norm.weight float32: expected one dtype"),
    ],
)
def test_weights_name_what_does_not_fit(weights, found):
    with pytest.raises(ValueError, match=found):
        run(weights=weights)


def test_what_is_trained_and_scaled_must_be_there():
    with pytest.raises(ValueError, match=r"trained has layers.0.q.a, which W has not"):
        run(trained=frozenset(["layers.0.q.a"]))
    with pytest.raises(ValueError, match=r"scale has no 'layers.0.q'"):
        run(scale={})


@pytest.mark.parametrize(
    ("c", "found"),
    [
        (replace(C, heads=3, kv_heads=2), "heads is 3 and kv_heads 2: expected a multiple"),
        (replace(C, head_dim=3), "head_dim is 3: expected an even number"),
        (replace(C, heads=0), "heads is 0: expected a whole number, at least 1"),
        (replace(C, d=2.5), "d is 2.5"),
        (ml.GPT2(11, 4, 1, 3, 5, positions=3), "d is 4 and heads 3: expected a multiple"),
    ],
)
def test_sizes_that_no_model_has_are_refused(c, found):
    for refused in (
        lambda: ml.draw_weights(c, np.random.default_rng(0)),
        lambda: ml.logits(ml.Batch(IDS), {}, c, ml.TrainableSpec()),
    ):
        with pytest.raises(ValueError, match=found):
            refused()


def test_a_seed_is_no_generator():
    with pytest.raises(
        ValueError, match=r"rng is of type int: expected a generator; use np.random"
    ):
        ml.draw_weights(C, 0)


def test_a_projection_by_its_name_is_checked():
    W, spec = model()
    x = np.ones((4, 3))
    ml.project(x, "layers.0.q", W, spec)
    with pytest.raises(ValueError, match=r"layers.0.qu.weight is missing in W; did you mean"):
        ml.project(x, "layers.0.qu", W, spec)
    with pytest.raises(ValueError, match=r"x is \(3, 4\): .* n = 4 as in layers.0.q.weight; are"):
        ml.project(x.T, "layers.0.q", W, spec)


def test_a_merge_is_checked():
    W, spec = model()
    ml.merge(W, spec)
    with pytest.raises(ValueError, match=r"layers.0.q.B is \(2, 4\)"):
        ml.merge(W | {"layers.0.q.B": W["layers.0.q.B"].T}, spec)


NUMBERS = {
    "complex": lambda a: a * (1 + 0j),
    "long double": lambda a: a.astype(np.longdouble),
    "fractions": lambda a: np.vectorize(Fraction, otypes=[object])(a),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_any_number_system_passes_and_the_answer_is_the_equations(kind):
    given = {n: v if n == "s" else NUMBERS[kind](v) for n, v in LINEAR.items()}
    assert (ml.lora_linear(**given)[0] == lora.lora_linear(**given)[0]).all()


def test_a_complex_step_at_real_weights_passes():
    assert ml.lora_linear(**LINEAR | {"x": LINEAR["x"] + 1e-30j})[0].dtype == complex


def test_the_checked_entry_computes_what_the_equations_do():
    W, spec = model()
    batch = ml.Batch(IDS, labels=IDS)
    (L, back), (L2, back2) = ml.loss(batch, W, C, spec), models.loss(batch, W, C, spec)
    assert same_bits(np.array(L), np.array(L2))
    for name, g in back2(1.0).items():
        assert same_bits(back(1.0)[name], g)


def test_merged_weights_of_a_tied_model_pass():
    c = replace(C, tied=True)
    rng = np.random.default_rng(0)
    config = ml.LoraConfig(r=2, target_modules=["q", "embed"])
    W, spec = ml.inject(ml.draw_weights(c, rng), config, c.matrices(), rng)
    ml.logits(ml.Batch(IDS), ml.merge(W, spec), c, ml.TrainableSpec())


def test_the_public_names_are_the_checked_ones_with_the_docstrings_of_the_equations():
    for name in ("lora_linear", "project", "logits", "loss", "merge"):
        assert getattr(ml, name) is getattr(checked, name)
        assert getattr(ml, name).__doc__ == getattr(ml, name).__wrapped__.__doc__
    assert ml.draw_weights is checked.draw_weights
