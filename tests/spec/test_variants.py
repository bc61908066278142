"""Variants beyond their laws: a norm's edge, how each starts, and whole models with each."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from calculus import GRADIENT, directional, random_like, record_worst, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import examples
from number_systems import Rounded, every_erf, propagated, to_objects
from test_models import converted, rounded_tables
from zoo import MODELS

import minilora as ml
from minilora import testing as draw
from minilora.spec import blocks, initialization, lora, models, ops, variants
from minilora.spec.variants import REGISTRY, invocation, part_shapes, row_norm, start
from minilora.verify.properties import derivatives, exact_numbers, layer_kinds

FEW = examples(3)
OWN = {entry: REGISTRY[entry].variant for entry in REGISTRY if REGISTRY[entry].variant != lora.LORA}
VARIANTS = {"lora": lora.LORA} | OWN
EVERY = pytest.mark.parametrize("entry", VARIANTS)


def test_a_row_of_zeros_has_norm_1_and_no_gradient():
    V = np.array([[3.0, 4.0], [0.0, 0.0]])
    v, back = row_norm(V)
    assert (v == [[5], [1]]).all()
    assert (back(np.array([[2.0], [7.0]])) == [[6 / 5, 8 / 5], [0, 0]]).all()


def test_dora_leaves_a_row_of_zeros_what_it_is():
    rng = np.random.default_rng(0)
    W, A, B, x, dy = (rng.standard_normal(s) for s in ((3, 5), (2, 5), (3, 2), (5, 4), (3, 4)))
    W[1], B[1], W[2, 0] = 0, 0, 0
    _, (*_, magnitude) = start(variants.DORA, "kaiming", rng, W, 2, 7 / 3)
    assert magnitude[2] > 0
    assert magnitude[1] == 0  # else its first step, however short, would have this length
    for f in (variants.dora_linear, variants.dora_full_linear):
        y, back = f(x, W, None, A, B, magnitude, 7 / 3)
        assert not y[1].any()
        assert all(np.isfinite(g).all() for g in back(dy))


def gradient_of_the_direction(f, case):
    """V and the whole dV of an exact case: dB = s dV Aᵀ where A = I and s = 1."""
    magnitude = case.P[0][2]
    A = exact_numbers.exactly(np.eye(case.W.shape[1]))
    V = lora.merge_weight(case.W, *case.P[0][:2], case.s)
    _, back = f(case.x, 0 * V, None, A, V, magnitude, Fraction(1))
    return V, back(case.dy)[2]


@FEW
@given(rng=draw.generators())
def test_each_row_of_doras_whole_gradient_is_orthogonal_to_its_direction(rng):
    """A longer row is the same row: nothing is gained along it. With the norm held it is."""
    case = layer_kinds.draw_case("dora-full", "linear", rng)
    V, dV = gradient_of_the_direction(variants.dora_full_linear, case)
    assert exact_numbers.same((V * dV).sum(1), 0 * V[:, 0])
    V, dV = gradient_of_the_direction(variants.dora_linear, case)
    assert not exact_numbers.same((V * dV).sum(1), 0 * V[:, 0])


@FEW
@given(rng=draw.generators(), entry=st.sampled_from(("dora", "dora-full")))
def test_the_merged_rows_have_the_magnitudes_for_norms(rng, entry):
    case = layer_kinds.draw_case(entry, "linear", rng)
    A, B, magnitude = case.P[0]
    merged, b = case.variant.merge(case.W, case.b, A, B, magnitude, case.s)
    assert exact_numbers.same(row_norm(merged)[0], abs(magnitude))
    assert b is case.b
    other, _ = case.variant.merge(case.W, case.b, A, B, 2 * magnitude, case.s)
    assert not exact_numbers.same(row_norm(other)[0], abs(magnitude))


def by_looking(ids, tokens):
    """A row at a time, from its end."""
    on = np.zeros(ids.shape, bool)
    for row, text in enumerate(ids.tolist()):
        for i in range(len(text) - len(tokens), -1, -1):
            if text[i : i + len(tokens)] == list(tokens):
                on[row, i:] = True
                break
    return on


@settings(max_examples=40)
@given(rng=draw.generators(), b=st.integers(1, 3), t=st.integers(1, 7), k=st.integers(1, 3))
def test_it_acts_from_the_last_place_where_its_invocation_stands(rng, b, t, k):
    ids, tokens = rng.integers(0, 2, (b, t)), rng.integers(0, 2, k)
    on = invocation(ids, tokens)
    assert on.shape == (b, t)
    assert (on == by_looking(ids, tokens)).all()


def test_the_first_place_and_the_place_behind_are_others():
    ids = np.array([[1, 2, 0, 1, 2, 3], [1, 0, 2, 2, 2, 2], [1, 1, 1, 1, 1, 2]])
    on = invocation(ids, np.array([1, 2]))
    assert on.astype(int).tolist() == [[0, 0, 0, 1, 1, 1], [0] * 6, [0, 0, 0, 0, 1, 1]]
    assert not invocation(ids[:, :1], np.array([1, 2])).any()
    with pytest.raises(ValueError, match="no invocation tokens: expected at least one"):
        invocation(ids, np.array([], int))


@pytest.mark.parametrize("entry", REGISTRY)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fresh_parameters_have_their_shapes_the_weights_dtype_and_their_values(entry, dtype):
    rng = np.random.default_rng(0)
    W, s = rng.standard_normal((4, 6)).astype(dtype), 7 / 3
    known = REGISTRY[entry]
    base, P = start(known.variant, known.init, rng, W, 2, s)
    parts = dict(zip(known.variant.parts, P, strict=True))
    assert base.dtype == dtype
    assert {p.dtype for p in P} == {np.dtype(dtype)}
    assert {part: p.shape for part, p in parts.items()} == part_shapes(known.variant, 2, 4, 6)
    assert (base is W) == ("frozen-weight" not in known.breaks)
    constants = {"c": 0, "lambda_d": dtype(0.1), "lambda_b": 0, "E": 0}
    for part in constants.keys() & parts.keys():
        assert (parts[part] == constants[part]).all()
    if "magnitude" in parts:
        norms = np.array([[np.sqrt(sum(w * w for w in row))] for row in W.astype(np.longdouble)])
        # The square of each is rounded, their sum five times, the root once.
        assert (abs(parts["magnitude"] - norms) <= 8 * np.finfo(dtype).eps / 2 * norms).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@FEW
@given(rng=draw.generators(), shape=draw.sizes(2, 2, 6))
def test_what_starts_at_a_product_of_zero_is_the_base_bit_for_bit(dtype, rng, shape):
    """DoRA's norm divided by itself is 1; a weight that an adapter is taken out of is rounded."""
    W = rng.standard_normal(shape).astype(dtype)
    x, b = (rng.standard_normal(s).astype(dtype) for s in ((shape[1], 3), (shape[0], 1)))
    for entry in REGISTRY.values():
        base, P = start(entry.variant, entry.init, rng, W, 2, 7 / 3)
        y, _ = entry.variant.linear(x, base, b, *P, 7 / 3)
        if entry.init not in ("pissa", "olora", "loftq", "orthogonal"):
            assert same_bits(y, ops.linear(x, W, b)[0])
        off = tuple(p + dtype(1) for p in P)
        assert not same_bits(entry.variant.linear(x, base, b, *off, 7 / 3)[0], y)


def test_an_unknown_start_is_refused_and_none_shares_its_parameters():
    W = np.random.default_rng(0).standard_normal((4, 6))
    one, two = (start(variants.VERA, "vera", np.random.default_rng(0), W, 2, 1.0) for _ in "12")
    assert all(same_bits(a, b) and a is not b for a, b in zip(one[1], two[1], strict=True))
    with pytest.raises(KeyError):
        start(lora.LORA, "unknown", np.random.default_rng(0), W, 2, 1.0)


# Whole models: the variant on every projection, on the tables, and on a head that is tied.


def adapted(name, entry, seed=0, p=0.25, b=2, t=4, depth=1, variant=None):
    """A model of test_models.py, each of its matrices adapted, of unequal ranks; nothing at 0."""
    rng = np.random.default_rng(seed)
    c = replace(MODELS[name], layers=depth)
    batch, W = draw.draw_batch(c, rng, b, t), draw.draw_parameters(c, rng)
    variant = VARIANTS[entry] if variant is None else variant
    matrices = c.matrices()
    if "c" in variant.parts:
        matrices = {at: shape for at, shape in matrices.items() if at not in lora.TABLES}
    P = {}
    for i, (at, (m, n)) in enumerate(matrices.items()):
        shapes = part_shapes(variant, 2 + i % 2, m, n)
        P |= {f"{at}.{part}": 0.6 * rng.standard_normal(shape) for part, shape in shapes.items()}
        if "magnitude" in shapes:
            P[f"{at}.magnitude"] = 1 + 0.3 * rng.standard_normal((m, 1))
    shapes = initialization.input_shapes(c, *batch.ids.shape)
    shapes |= {"head": (c.d, b * t)} if "head" in matrices.keys() - shapes.keys() else {}
    keep = initialization.draw_dropout(rng, p, shapes, float) if p else {}
    others = {name for name in W if name.endswith(".bias") or ".norm" in f".{name}"}
    tuning = ml.TrainableSpec(
        {at: (3 + i % 3) / 4 for i, at in enumerate(matrices)},
        keep,
        frozenset(P) | (W.keys() if variant.additive else others),
        {} if variant == lora.LORA else dict.fromkeys(matrices, variant),
    )
    return draw.ModelCase(c, W | P, tuning, batch)


def held(model):
    """The model as DoRA's ``back`` sees it."""
    known = {variants.DORA: replace(variants.DORA, linear=derivatives.constant_norm_linear)}
    variant = {at: known.get(v, v) for at, v in model.tuning.variant.items()}
    return replace(model, tuning=replace(model.tuning, variant=variant))


def directional_error(model, seen, rng):
    gradients = model.loss()[1](1.0)
    assert gradients.keys() == model.tuning.trained
    v = random_like(rng, gradients)
    terms = np.concatenate([(g * v[k]).ravel() for k, g in gradients.items()])
    slope = directional(lambda W: seen.loss(W)[0], model.W, v)
    return abs(slope - terms.sum()) / abs(terms).sum()


@EVERY
@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_of_a_model_is_the_derivative_along_a_direction(name, entry):
    rng = np.random.default_rng(1)
    model = adapted(name, entry, depth=2)
    error = directional_error(model, held(model), rng)
    record_worst("1. complex step, whole models with each variant", error)
    assert error <= GRADIENT


def test_a_models_gradient_through_the_norm_is_another():
    model = adapted("Llama, tied", "dora")
    rng = np.random.default_rng(1)
    assert directional_error(model, model, rng) > GRADIENT
    model = adapted("Llama, tied", "dora-full")
    tuning = replace(model.tuning, variant=dict.fromkeys(model.tuning.variant, variants.DORA))
    assert directional_error(replace(model, tuning=tuning), model, rng) > GRADIENT


def share_of_merging(model, wrong=None):
    """|Σ v (adapted - merged logits)| over what their roundings may make of it."""
    merged = model.logits(ml.merge(model.W, model.tuning if wrong is None else wrong))
    rng = np.random.default_rng(0)
    difference = model.logits() - merged
    v = rng.standard_normal(difference.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.logits, "__defaults__", (models.Kernels(rope_tables=rounded_tables),))
        patch.setattr(ops, "erf", every_erf)
        rounded = converted(model, lambda a: to_objects(a, Rounded))
        bound = propagated(rounded.logits(), v)
        bound += propagated(rounded.logits(ml.merge(rounded.W, rounded.tuning)), v)
    return abs((v * difference).sum()) / bound


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("Llama", "dora"),
        ("Llama, tied", "vera"),
        ("Qwen2", "adalora"),
        ("GPT-2", "dora-full"),
        ("BERT", "lora-bias"),
        ("GPT-2", "lora"),
    ],
)
def test_merging_a_model_changes_no_logit_beyond_rounding_and_unmerging_restores_it(name, entry):
    model = adapted(name, entry, p=0, b=1, t=3)
    share = share_of_merging(model)
    record_worst("merged against unmerged, variants / its bound", share)
    assert share <= 1
    off = {at: s * (1 + 1e-9) for at, s in model.tuning.scale.items()}
    assert share_of_merging(model, replace(model.tuning, scale=off)) > 1
    restored = ml.unmerge(ml.merge(model.W, model.tuning))
    assert restored.keys() == model.W.keys()
    assert all(restored[name] is w for name, w in model.W.items())


def test_the_bias_of_b_becomes_a_bias_of_its_own_where_there_was_none():
    model = adapted("Llama", "lora-bias")
    merged = ml.merge(model.W, model.tuning)
    assert {f"{at}.bias" for at in model.config.linears()} <= merged.keys()
    assert not any(name.endswith(".bias") for name in model.W)


def test_an_embedding_has_no_bias_to_merge_one_into():
    model = adapted("Llama", "lora-bias")
    d, v = model.config.d, model.config.vocab
    W = model.W | {
        "embed.A": np.ones((2, v)),
        "embed.B": np.ones((d, 2)),
        "embed.c": np.ones((d, 1)),
    }
    scale, variant = model.tuning.scale | {"embed": 1.0}, dict(model.tuning.variant)
    tuning = ml.TrainableSpec(scale, variant=variant | {"embed": variants.LORA_BIAS})
    with pytest.raises(ValueError, match="the adapter of embed has a bias"):
        ml.merge(W, tuning)
    ml.merge(W, ml.TrainableSpec(scale, variant=variant))


@pytest.mark.parametrize(
    ("at", "weight"), [("layers.0.q", None), ("embed", None), ("head", "embed")]
)
def test_a_weight_is_not_trained_below_a_variant_that_rescales_it(at, weight):
    """The head's own weight is the embedding's."""
    for entry in OWN:
        model = adapted("Llama, tied", entry)
        only = {k: w for k, w in model.W.items() if lora.is_base(k) or k.startswith(f"{at}.")}
        trained = frozenset({f"{weight or at}.weight"})
        tuning = replace(model.tuning, trained=trained)
        case = replace(model, W=only, tuning=tuning)
        if VARIANTS[entry].additive:
            assert case.loss()[1](1.0).keys() == trained
        else:
            with pytest.raises(ValueError, match="is trained, but its adapter rescales it: freeze"):
                case.loss()


def invoked(seed=0, everywhere=False):
    """A Llama adapted by aLoRA, the multiplier that it acts by, and where the invocation begins."""
    model = adapted("Qwen2", "lora", seed, p=0, b=2, t=6, depth=2)
    W = {k: w for k, w in model.W.items() if lora.is_base(k) or not k.startswith("embed.")}
    ids = model.batch.ids.copy()
    tokens = np.array([9, 10])
    ids[ids > 8] = 0
    ids[0, 2:4], ids[1, 4:6] = tokens, tokens
    batch = replace(model.batch, ids=ids, mask=None, positions=None)
    on = invocation(ids, tokens) | everywhere
    at = model.config.linears()
    keep = {
        name: np.broadcast_to(on.reshape(1, -1) * 1.0, (n, on.size)) for name, (_, n) in at.items()
    }
    tuning = replace(model.tuning, dropout_scale=keep)
    return replace(model, W=W, tuning=tuning, batch=batch), invocation(ids, tokens)


def seen(model, W):
    """The logits, the keys and values of each block, and each block's hidden states: (…, b, t)."""
    cache, b, plain = [], len(model.batch.ids), blocks.normalise
    with pytest.MonkeyPatch.context() as patch:

        def attention(q, k, v, mask):
            cache.extend(x.transpose(1, 2, 0, 3).reshape(-1, *x.shape[::3]) for x in (k, v))
            return ops.attention(q, k, v, mask)

        def normalise(op, x, *rest):
            cache.append(x.reshape(len(x), b, -1))
            return plain(op, x, *rest)

        patch.setattr(models.logits, "__defaults__", (models.Kernels(attention=attention),))
        patch.setattr(blocks, "normalise", normalise)
        z = model.logits(W)
    return [z.reshape(len(z), b, -1), *cache]


@pytest.mark.parametrize("seed", range(3))
def test_before_its_invocation_activated_lora_is_the_base_bit_for_bit(seed):
    """Hidden states, keys, values and logits: a cache that the base has filled serves."""
    model, on = invoked(seed)
    found, base = seen(model, model.W), seen(model, ml.disable(model.W))
    assert len(found) == len(base) == 1 + 2 * (2 + 2)
    for with_adapter, without in zip(found, base, strict=True):
        assert same_bits(with_adapter[:, ~on], without[:, ~on])
    assert all((a[:, on] != b[:, on]).any() for a, b in zip(found[2:], base[2:], strict=True))


def test_an_adapter_that_acts_on_all_tokens_is_not_the_base_before_its_invocation():
    model, on = invoked(everywhere=True)
    found, base = seen(model, model.W), seen(model, ml.disable(model.W))
    assert not same_bits(found[0][:, ~on], base[0][:, ~on])
    assert not same_bits(found[2][:, ~on], base[2][:, ~on])


@pytest.mark.parametrize("entry", VARIANTS)
def test_half_an_adapter_is_an_error_and_not_the_base(entry):
    variant = VARIANTS[entry]
    parts = {f"p.{part}": np.ones(shape) for part, shape in part_shapes(variant, 2, 4, 3).items()}
    W, tuning = (
        {"p.weight": np.ones((4, 3))} | parts,
        ml.TrainableSpec({"p": 1.0}, variant={"p": variant}),
    )
    lora.project(np.ones((3, 2)), "p", W, tuning)
    for name in parts.keys() - {"p.A"}:
        with pytest.raises(KeyError, match=name):
            lora.project(np.ones((3, 2)), "p", {k: w for k, w in W.items() if k != name}, tuning)


# A tied table is one weight with two uses, each with an adapter of its own.


def tied(**changed):
    """An embedding (7, 3) in fractions, used as a head too, both adapted; what is changed."""
    rng = np.random.default_rng(0)

    def entries(*shape):
        return to_objects(rng.integers(-9, 10, shape).astype(float), Fraction) / 7

    W = {"embed.weight": entries(7, 3)}
    W |= {"embed.A": entries(2, 7), "embed.B": entries(3, 2)}
    W |= {"head.A": entries(2, 3), "head.B": entries(7, 2)}
    return {name: w for name, w in (W | changed).items() if w is not None}


def uses(W, tuning):
    """What the embedding gives for each number, and the head for them: exact."""
    rng = np.random.default_rng(1)
    ids = np.array([3, 0, 6, 3])
    h = to_objects(rng.integers(-9, 10, (3, 4)).astype(float), Fraction) / 5
    return blocks.embed(ids, "embed", W, tuning)[0], lora.project(h, "head", W, tuning)[0]


NONE = dict.fromkeys(("embed.A", "embed.B"))
ALONE = dict.fromkeys(("head.A", "head.B"))
TWINS = dict(
    zip(("head.A", "head.B"), lora.twin(tied()["embed.A"], tied()["embed.B"]), strict=True)
)
TIES = {
    "embedding alone": (tied(**ALONE), {"embed.weight", "head.weight"}, {"head.weight"}),
    "head alone": (tied(**NONE), {"embed.weight", "head.weight"}, {"embed.weight"}),
    "both, each another": (tied(), {"embed.weight", "head.weight"}, set()),
    "both, twins": (tied(**TWINS), {"embed.weight"}, set()),
}


@pytest.mark.parametrize("name", TIES)
def test_merging_a_tied_table_changes_no_use_of_it(name):
    """The weights that it leaves, which of them are the very table, and what each use gives."""
    W, expected, untouched = TIES[name]
    tuning = ml.TrainableSpec({"embed": Fraction(7, 3), "head": Fraction(7, 3)})
    merged = ml.merge(W, tuning)
    assert merged.keys() == expected
    assert {name for name in merged if merged[name] is W["embed.weight"]} == untouched
    for found, wanted in zip(uses(merged, ml.TrainableSpec()), uses(W, tuning), strict=True):
        assert exact_numbers.same(found, wanted)
    restored = ml.unmerge(merged)
    assert restored.keys() == W.keys()
    assert all(restored[name] is w for name, w in W.items())


def test_twins_are_one_change_of_one_table_and_almost_twins_are_two():
    W, _, _ = TIES["both, twins"]
    tuning = ml.TrainableSpec({"embed": Fraction(7, 3), "head": Fraction(7, 3)})
    other = W["head.A"].copy()
    other[0, 0] += 1
    rescaled = replace(tuning, scale=tuning.scale | {"head": Fraction(2)})
    bias = ml.TrainableSpec(tuning.scale, variant={"head": variants.VERA})
    vectors = {"head.lambda_d": W["head.A"][:, :1], "head.lambda_b": W["head.B"][:, :1]}
    for almost, how in ((W | {"head.A": other}, tuning), (W, rescaled), (W | vectors, bias)):
        merged = ml.merge(almost, how)
        assert merged.keys() == {"embed.weight", "head.weight"}
        for found, wanted in zip(uses(merged, ml.TrainableSpec()), uses(almost, how), strict=True):
            assert exact_numbers.same(found, wanted)


def test_twins_stay_twins_whatever_variant_another_module_has():
    W, *_ = TIES["both, twins"]
    tuning = ml.TrainableSpec(dict.fromkeys(("embed", "head"), 1), variant={"q": variants.DORA})
    assert ml.merge(W, tuning).keys() == {"embed.weight"}


def test_a_head_of_its_own_is_not_tied():
    W = tied(**{"head.weight": tied()["embed.weight"] * 2})
    tuning = ml.TrainableSpec({"embed": Fraction(7, 3), "head": Fraction(7, 3)})
    for alone in ({}, NONE, ALONE):
        case = {name: w for name, w in W.items() if name not in alone}
        merged = ml.merge(case, tuning)
        for found, wanted in zip(uses(merged, ml.TrainableSpec()), uses(case, tuning), strict=True):
            assert exact_numbers.same(found, wanted)


def touching_the_table(W, tuning):
    """What merging must not do: the head's change put into the table that the embedding reads."""
    delta = tuning.scale["head"] * (W["head.B"] @ W["head.A"])
    return {"embed.weight": W["embed.weight"] + delta}


def test_a_merge_of_the_head_into_the_table_changes_the_embedding():
    W, *_ = TIES["head alone"]
    tuning = ml.TrainableSpec({"head": Fraction(7, 3)})
    wrong = uses(touching_the_table(W, tuning), ml.TrainableSpec())
    right = uses(W, tuning)
    assert exact_numbers.same(wrong[1], right[1])
    assert not exact_numbers.same(wrong[0], right[0])
