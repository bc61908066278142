"""Whole models: every gradient by its derivative, every rounding by its bound, and their laws."""

import functools
from dataclasses import replace

import mpmath
import numpy as np
import pytest
from calculus import (
    GRADIENT,
    derivative,
    directional,
    greatest,
    random_like,
    record_worst,
    relative_error,
    same_bits,
)
from hypothesis import given
from marks import examples, others_slow
from mpmath import mpf
from number_systems import Real, Rounded, every_erf, propagated, to_objects, values
from zoo import MODELS

import minilora as ml
from minilora import testing as draw
from minilora.spec import blocks, lora, models, ops, target_modules

EVERY = pytest.mark.parametrize("name", MODELS)
# Qwen2 and the tied Llama are Llamas: where a test takes seconds, they are among the slow ones.
EVERY_KIND = pytest.mark.parametrize("name", others_slow(MODELS, "Llama", "GPT-2", "BERT"))
FEW = examples(5)
FLOAT64, LONG_DOUBLE = (np.finfo(dtype).eps for dtype in (np.float64, np.longdouble))


@functools.cache
def case(name, b=3, t=5, p=0.25):
    """Adapters on every projection, dropout, padding on both sides; everything is trained."""
    return draw.draw_model(MODELS[name], np.random.default_rng(0), b, t, p=p, train_base=True)


def scale_of(name, gradients):
    """What an error is relative to: the greatest entry of the array.

    The bias of a key moves all scores of a query alike, so its gradient is 0, and what is computed
    is rounding alone; it is measured by the gradient of the weight beside it.
    """
    return greatest(gradients[name.replace(".k.bias", ".k.weight")])


def error_of_gradients(model):
    wanted = derivative(lambda W: model.loss(W)[0], model.W)
    found = model.loss()[1](1.0)
    assert found.keys() == wanted.keys()
    return max(relative_error(found[k], wanted[k], scale_of(k, wanted)) for k in wanted)


@EVERY_KIND
def test_every_gradient_is_the_derivative_entry_by_entry(name):
    error = error_of_gradients(case(name))
    record_worst(f"1. complex step, each entry, {name}", error)
    assert error <= GRADIENT


def directional_error(model, rng):
    v = random_like(rng, model.W)
    gradients = model.loss()[1](1.0)
    terms = np.concatenate([(g * v[k]).ravel() for k, g in gradients.items()])
    derivative = directional(lambda W: model.loss(W)[0], model.W, v)
    return abs(derivative - terms.sum()) / abs(terms).sum()


@FEW
@given(model=draw.model_cases(train_base=True), rng=draw.generators())
def test_every_drawn_model_has_the_derivative_along_a_random_direction(model, rng):
    error = directional_error(model, rng)
    record_worst("1. complex step, along a direction through the whole model", error)
    assert error <= GRADIENT


def with_linear(implementation):
    """LoRA with another equation."""
    return replace(lora.LORA, linear=implementation)


def scaled(factor):
    """LoRA with dB off by a factor."""

    def implementation(*arguments):
        y, back = ml.lora_linear(*arguments)

        def wrong(dy):
            dx, dA, dB = back(dy)
            return dx, dA, dB * factor

        return y, wrong

    return with_linear(implementation)


@pytest.mark.slow
def test_a_gradient_off_in_the_twelfth_digit_is_noticed(monkeypatch):
    monkeypatch.setattr(lora, "LORA", scaled(1 + 1e-12))
    assert error_of_gradients(case("Llama", 2, 3)) > GRADIENT


def asymmetry(model, rng):
    """|u·Hv - v·Hu| over the sum of moduli, H v by a complex step through ``back``."""
    u, v = (random_like(rng, model.W) for _ in "uv")
    Hu, Hv = (directional(lambda W: model.loss(W)[1](1.0), model.W, w) for w in (u, v))
    uHv, vHu = (np.concatenate([(a[k] * b[k]).ravel() for k in a]) for a, b in ((u, Hv), (v, Hu)))
    return abs(uHv.sum() - vHu.sum()) / max(abs(uHv).sum(), abs(vHu).sum())


@FEW
@given(model=draw.model_cases(train_base=True), rng=draw.generators())
def test_the_hessian_is_symmetric(model, rng):
    error = asymmetry(model, rng)
    record_worst("2. Hessian's symmetry, whole models", error)
    assert error <= GRADIENT


def test_what_is_no_gradient_has_no_symmetric_derivative(monkeypatch):
    monkeypatch.setattr(lora, "LORA", scaled(1 + 1e-9))
    assert asymmetry(case("GPT-2"), np.random.default_rng(0)) > GRADIENT


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", MODELS)
def test_a_complex_step_in_one_array_passes_through_every_backward(name):
    """Where few arrays are complex, none on the way may be made real."""
    model = case(name)
    whole = {at: w.astype(complex) for at, w in model.W.items()}
    size, rng = max(map(greatest, model.loss(model.W)[1](1.0).values())), np.random.default_rng(1)
    for at in model.W:
        step = random_like(rng, {at: model.W[at]})
        alone, among = (
            directional(lambda W: model.loss(W)[1](1.0), V, step) for V in (model.W, whole)
        )
        scale = max(size, *map(greatest, among.values()))
        for part in alone:
            assert relative_error(alone[part], among[part], scale) <= GRADIENT


def converted(model, convert):
    """The model with all of its parameters and dropout multipliers converted."""
    W = {name: convert(w) for name, w in model.W.items()}
    keep = {at: convert(K) for at, K in model.tuning.dropout_scale.items()}
    return replace(model, W=W, tuning=replace(model.tuning, dropout_scale=keep))


def rounded_tables(positions, d, theta, dtype):
    """RoPE's tables with float64's error: see test_ops.error_of_tables."""
    tables = ops.rope_tables(positions, d, theta, np.longdouble)
    relative = (2 * np.log(theta) + 9) * Rounded.FUNCTION / 8
    error = float(positions.max()) * relative + Rounded.FUNCTION
    return tuple(to_objects(table, lambda v: Rounded(v, error)) for table in tables)


def exact_tables(positions, d, theta, dtype):
    frequencies = [mpf(theta) ** (-mpf(2 * i) / d) for i in range(d // 2)]
    angles = np.array([[[[p * f for p in row] for f in frequencies]] for row in positions.tolist()])
    return tuple(
        np.vectorize(lambda a, f=f: Real(f(a)), otypes=[object])(angles)
        for f in (mpmath.cos, mpmath.sin)
    )


@pytest.fixture
def any_number(monkeypatch):
    """Let the models run on long doubles and on numbers of Python's."""
    monkeypatch.setattr(ops, "erf", every_erf)

    def tables(number):
        monkeypatch.setattr(models.logits, "__defaults__", (models.Kernels(rope_tables=number),))

    return tables


def loss_and_gradients(model, dL=1.0):
    L, back = model.loss()
    return {"loss": np.asarray(L)} | back(dL)


def probes(rounded, rng):
    """Random sums of the loss, each kind of gradient, and all: names, weights, value, bound."""
    for kind in ("loss", ".A", ".B", ".weight", ".bias", ""):
        names = [name for name in rounded if name.endswith(kind)]
        if names:
            numbers = np.concatenate([rounded[k].ravel() for k in names])
            v = rng.standard_normal(numbers.size)
            yield names, v, (v * values(numbers)).sum(), propagated(numbers, v)


def shares_of_bounds(found, probes):
    for names, v, value, bound in probes:
        entries = np.concatenate([found[k].ravel() for k in names])
        yield float(abs((v * entries.astype(np.longdouble)).sum() - value)) / bound


@pytest.mark.slow
@EVERY
def test_float64_is_as_near_to_long_double_as_rounding_allows(name, any_number):
    model = case(name, 2, 4)
    found = loss_and_gradients(model)
    any_number(rounded_tables)
    rounded = loss_and_gradients(converted(model, lambda a: to_objects(a, Rounded)))
    sums = list(probes(rounded, np.random.default_rng(0)))
    worst = max(shares_of_bounds(found, sums))
    record_worst("4. error of float64 / its bound, whole models", worst)
    assert worst <= 1
    as_float32 = {k: g.astype(np.float32).astype(float) for k, g in found.items()}
    assert min(shares_of_bounds(as_float32, sums)) > 1

    any_number(ops.rope_tables)
    wide = loss_and_gradients(converted(model, lambda a: a.astype(np.longdouble)))
    assert all(answer.dtype == np.longdouble for answer in wide.values())
    # Two runs in long double, each off by its own bound.
    assert max(shares_of_bounds(wide, sums)) <= 2 * LONG_DOUBLE / FLOAT64


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen2", "GPT-2", "BERT"])
def test_40_digits_give_the_same_loss_and_gradients(name, any_number):
    c = replace(MODELS[name], layers=1)
    model = draw.draw_model(c, np.random.default_rng(1), 2, 3, train_base=True)
    found = loss_and_gradients(model)
    any_number(exact_tables)
    digits = converted(model, lambda a: to_objects(a, Real))
    wanted = {k: np.asarray(g) for k, g in loss_and_gradients(digits, dL=1).items()}
    as_floats = {k: np.vectorize(float)(g) for k, g in wanted.items()}
    error = max(relative_error(found[k], as_floats[k], scale_of(k, as_floats)) for k in as_floats)
    record_worst("4. float64 by 40 digits, small models", error)
    assert error <= GRADIENT

    # A central difference in 40 digits is right to h², about 26 digits: no complex numbers here.
    v = random_like(np.random.default_rng(2), model.W)
    h = mpf(10) ** -13
    ahead, behind = (
        digits.loss({k: w + v[k] * Real(sign * h) for k, w in digits.W.items()})[0]
        for sign in (1, -1)
    )
    slope = (ahead - behind).v / (2 * h)
    terms = np.concatenate([(v[k] * wanted[k]).ravel() for k in v]) + Real(0)
    error = float(abs(terms.sum() - slope)) / float(abs(terms).sum())
    record_worst("4. central difference in 40 digits, small models", error)
    assert error <= GRADIENT


def agree(found, wanted, promises=2):
    """Equal but for so many errors of GRADIENT each, relative to the greatest entry of all."""
    assert found.keys() == wanted.keys()
    bound = promises * GRADIENT * max(map(greatest, wanted.values()))
    for name, want in wanted.items():
        assert found[name].shape == want.shape
        assert greatest(found[name] - want) <= bound, name


def outcome(model):
    """The loss, the gradients and the logits (classes, b, tokens) of a model, by name."""
    z = model.logits()
    b = len(model.batch.ids)
    return loss_and_gradients(model) | {"logits": z.reshape(len(z), b, z.shape[1] // b)}


def factors_follow_from_the_weights_gradient(model):
    """At every projection dB = s dW Aᵀ and dA = s Bᵀ dW, where there is no dropout."""
    model = replace(model, tuning=replace(model.tuning, dropout_scale={}))
    gradients = model.loss()[1](1.0)
    for at, s in model.tuning.scale.items():
        A, B = model.W[f"{at}.A"], model.W[f"{at}.B"]
        dA, dB, dW = (gradients[f"{at}.{part}"] for part in ("A", "B", "weight"))
        # Each gradient is off by GRADIENT times its greatest entry; s dW Aᵀ sums that over n.
        bound = GRADIENT * (greatest(dB) + s * greatest(dW) * abs(A).sum(1).max())
        assert greatest(dB - s * dW @ A.T) <= bound
        bound = GRADIENT * (greatest(dA) + s * greatest(dW) * abs(B).sum(0).max())
        assert greatest(dA - s * B.T @ dW) <= bound


def factors_gradients_are_balanced(model):
    """At every projection Bᵀ dB = dA Aᵀ, whatever the dropout."""
    gradients = model.loss()[1](1.0)
    for at in model.tuning.scale:
        A, B, dA, dB = (d[f"{at}.{part}"] for d in (model.W, gradients) for part in "AB")
        bound = greatest(dB) * abs(B).sum(0).max() + greatest(dA) * abs(A).sum(1).max()
        assert greatest(B.T @ dB - dA @ A.T) <= GRADIENT * bound


def components_may_turn_their_sign_or_move_a_power_of_two(model):
    """A → c A, B → B / c: the same bits, dA → dA / c and dB → c dB."""
    W, expected = dict(model.W), dict(outcome(model))
    for at in model.tuning.scale:
        c = (-2.0) ** np.arange(len(W[f"{at}.A"]))[:, None]
        W |= {f"{at}.A": c * W[f"{at}.A"], f"{at}.B": W[f"{at}.B"] / c.T}
        expected |= {f"{at}.A": expected[f"{at}.A"] / c, f"{at}.B": expected[f"{at}.B"] * c.T}
    found = outcome(replace(model, W=W))
    assert all(np.array_equal(found[name], want) for name, want in expected.items())


def without_b_it_is_the_base(model):
    """B = 0: the logits of the base to the bit, dropout or not; no gradient of A."""
    W = {name: 0 * w if name.endswith(".B") else w for name, w in model.W.items()}
    assert np.array_equal(model.logits(W), model.logits(ml.disable(W)))
    assert not any(g.any() for name, g in model.loss(W)[1](1.0).items() if name.endswith(".A"))


def no_token_sees_a_later_one(model):
    """Other tokens from column j on: the columns before keep their bits."""
    ids = model.batch.ids
    j = ids.shape[1] // 2
    later = np.where(np.arange(ids.shape[1]) >= j, (ids + 1) % model.config.vocab, ids)
    changed = replace(model, batch=replace(model.batch, ids=later))
    z, changed_z = outcome(model)["logits"], outcome(changed)["logits"]
    assert same_bits(z[:, :, :j], changed_z[:, :, :j])
    assert not same_bits(z, changed_z)


def rows(model, index):
    """The model with these rows of its batch, and of its dropout multipliers."""
    batch, (b, t) = model.batch, model.batch.ids.shape
    parts = {
        name: None if (a := getattr(batch, name)) is None else a[index]
        for name in ("ids", "labels", "mask", "positions", "types")
    }
    columns = np.arange(b * t).reshape(b, t)[index].ravel()
    keep = {
        at: K[:, index if K.shape[1] == b else columns]
        for at, K in model.tuning.dropout_scale.items()
    }
    return replace(model, batch=ml.Batch(**parts), tuning=replace(model.tuning, dropout_scale=keep))


def the_order_of_rows_is_no_matter(model):
    order = np.arange(len(model.batch.ids))[::-1]
    wanted = outcome(model)
    wanted["logits"] = wanted["logits"][:, order]
    agree(outcome(rows(model, order)), wanted)


def labels_that_count(model):
    labels = model.batch.labels
    return int(((labels[:, 1:] if model.config.causal else labels) != ops.IGNORED).sum())


def parts_of_a_batch_add_up(model):
    """Each row alone, divided by the labels of all: losses and gradients sum to the batch's."""
    wanted, n = loss_and_gradients(model), labels_that_count(model)
    total = {}
    for i in range(len(model.batch.ids)):
        L, back = rows(model, [i]).loss(count=n)
        total = lora.sum_gradients(total, {"loss": np.asarray(L)} | back(1.0))
    agree(total, wanted, promises=1 + len(model.batch.ids))


def padded(model, columns, left):
    """The batch with more columns, of padding with arbitrary tokens, to the left or the right."""
    b = len(model.batch.ids)
    batch = replace(model.batch, positions=model.batch.position_ids, mask=model.batch.real)
    wide = {}
    fills = {"ids": 1, "labels": ops.IGNORED, "mask": False, "positions": 0, "types": 0}
    for name, fill in fills.items():
        a = getattr(batch, name)
        if a is None or a.ndim == 1:
            wide[name] = a
            continue
        more = np.full((b, columns), fill, a.dtype)
        wide[name] = np.concatenate([more, a] if left else [a, more], axis=1)
    return replace(model, batch=ml.Batch(**wide))


def padding_changes_nothing(model, left):
    t = model.batch.ids.shape[1]
    wanted, found = outcome(model), outcome(padded(model, 3, left))
    if model.config.causal:
        found["logits"] = found["logits"][:, :, 3:] if left else found["logits"][:, :, :t]
    seen = model.batch.real if model.config.causal else np.ones((len(model.batch.ids), 1), bool)
    for answers in (wanted, found):
        answers["logits"] = answers["logits"][:, seen]
    agree(found, wanted)


def padding_on_the_right_changes_nothing(model):
    padding_changes_nothing(model, left=False)


def padding_on_the_left_changes_nothing(model):
    padding_changes_nothing(model, left=True)


def grouped_heads_are_heads_with_repeated_rows(model):
    """k and v with the rows of W, B and bias repeated; the groups' gradients are the sums."""
    c, W = model.config, dict(model.W)
    group = c.heads // c.kv_heads
    repeated = [n for n in W if n.rsplit(".", 2)[-2] in ("k", "v") and not n.endswith(".A")]

    def heads(a):
        return a.reshape(c.kv_heads, -1, *a.shape[1:])

    for name in repeated:
        W[name] = heads(W[name]).repeat(group, axis=0).reshape(-1, W[name].shape[1])
    many = replace(model, W=W, config=replace(c, kv_heads=c.heads))
    found = outcome(many)
    for name in repeated:
        g = found[name].reshape(c.kv_heads, group, -1, found[name].shape[1]).sum(1)
        found[name] = g.reshape(model.W[name].shape)
    agree(found, outcome(model))


def neighbours(x, cos, sin, rope=ops.rope):
    """RoPE of pairs of neighbours."""
    halves = np.arange(x.shape[2]).reshape(-1, 2).T.ravel()
    y, back = rope(x[:, :, halves], cos, sin)
    pairs = np.argsort(halves)
    return y[:, :, pairs], lambda dy: back(dy[:, :, halves])[:, :, pairs]


def interleaved_rope_permutes_rows_of_w_and_b(model):
    """Neighbours for partners d/2 apart: rows of q and k in that order, in W, in B and in bias."""
    c, W = model.config, dict(model.W)
    wanted = outcome(model)
    order = np.arange(c.head_dim).reshape(2, -1).T.ravel()
    for name in W:
        if name.rsplit(".", 2)[-2] in ("q", "k") and not name.endswith(".A"):
            for arrays in (W, wanted):
                a = arrays[name].reshape(-1, c.head_dim, arrays[name].shape[1])[:, order]
                arrays[name] = a.reshape(arrays[name].shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "rope", neighbours)
        agree(outcome(replace(model, W=W)), wanted)


def the_order_of_heads_is_no_matter(model):
    """Heads move as rows of W, B and bias in q, k, v, and as columns of W and A in o."""
    c, W, wanted = model.config, dict(model.W), outcome(model)
    groups = getattr(c, "kv_heads", c.heads)

    def turned(a, parts=1):
        return a.reshape(parts, groups, -1, a.shape[1])[:, ::-1].reshape(a.shape)

    for name in W:
        *_, at, part = name.split(".")
        for arrays in (W, wanted):
            if at in ("q", "k", "v", "qkv") and part != "A":
                arrays[name] = turned(arrays[name], 3 if at == "qkv" else 1)
            if at == "o" and part in ("weight", "A"):
                arrays[name] = turned(arrays[name].T).T
    keep = {
        at: turned(K) if at.endswith(".o") else K for at, K in model.tuning.dropout_scale.items()
    }
    agree(outcome(replace(model, W=W, tuning=replace(model.tuning, dropout_scale=keep))), wanted)


def the_loss_is_the_mean_over_labels_that_count(model):
    """Token by token from the logits: -log p of the next token, or of the row's class."""
    z = outcome(model)["logits"]
    terms = []
    for row, label in enumerate(model.batch.labels):
        pairs = enumerate(label[1:]) if model.config.causal else [(0, label)]
        for column, wanted in pairs:
            if wanted != -100:
                e = np.exp(z[:, row, column])
                terms.append(-np.log(e[wanted] / e.sum()))
    L = np.asarray(model.loss()[0])
    agree({"loss": L}, {"loss": np.asarray(np.mean(terms))})


def numbers_name_rows_of_their_tables(model):
    """Rows of positions and types in another order, and so the numbers in the batch."""
    tables = {"positions": model.batch.positions, "types": model.batch.types}
    wanted, W, batch = outcome(model), dict(model.W), {}
    for at in tables.keys() & model.config.tables().keys():
        order = np.roll(np.arange(len(W[f"{at}.weight"])), 1)
        batch[at] = np.argsort(order)[tables[at]]
        for arrays in (W, wanted):
            arrays[f"{at}.weight"] = arrays[f"{at}.weight"][order]
    found = outcome(replace(model, W=W, batch=replace(model.batch, **batch)))
    assert all(np.array_equal(found[name], want) for name, want in wanted.items())


def rows_that_no_number_names_are_no_matter(model):
    """Their gradient is 0 and their entries touch no bit of the loss; a tied head uses all rows."""
    batch, W, gradients = model.batch, dict(model.W), model.loss()[1](1.0)
    tables = {"embed": batch.ids, "positions": batch.positions, "types": batch.types}
    for at in model.config.tables().keys() - ({"embed"} if "head.weight" not in W else set()):
        unused = np.setdiff1d(np.arange(len(W[f"{at}.weight"])), tables[at])
        assert not gradients[f"{at}.weight"][unused].any()
        W[f"{at}.weight"] = W[f"{at}.weight"].copy()
        W[f"{at}.weight"][unused] += 1
    assert same_bits(model.loss(W)[0], model.loss()[0])


def gradients_are_of_what_is_trained_alone(model):
    """Whatever is trained beside it, a gradient has the same bits; what is frozen has none."""
    every = model.loss()[1](1.0)
    names = sorted(model.W)
    for trained in (names[::2], names[1::3], [n for n in names if n.endswith((".A", ".B"))], []):
        tuning = replace(model.tuning, trained=frozenset(trained))
        gradients = replace(model, tuning=tuning).loss()[1](1.0)
        assert gradients.keys() == set(trained)
        assert all(same_bits(g, every[name]) for name, g in gradients.items())


def nothing_is_changed_in_place(model):
    """Parameters, multipliers and batch keep their bits."""
    batch = [getattr(model.batch, n) for n in ("ids", "labels", "mask", "positions", "types")]
    arrays = [
        *model.W.values(),
        *model.tuning.dropout_scale.values(),
        *(a for a in batch if a is not None),
    ]
    before = [a.copy() for a in arrays]
    model.loss()[1](1.0)
    assert all(same_bits(a, b) for a, b in zip(arrays, before, strict=True))


def lora_wrong(formula):
    """LoRA of other arguments."""

    def implementation(x, W, b, A, B, s, K=None):
        return ml.lora_linear(*formula(x, W, b, A, B, s, K))

    return lora, "LORA", with_linear(implementation)


def written(x, W, b, A, B, s, K):
    B += 1e-9
    return x, W, b, A, B, s, K


def adapters_alone(x, at, W, tuning):
    y, back = lora.project(x, at, W, tuning)
    return y, lambda dy: (back(dy)[0], {n: g for n, g in back(dy)[1].items() if n[-1] in "AB"})


def tiled(q, k, v, mask):
    """Query head h attends with the key/value head h modulo their number."""
    b, g, d, t = k.shape
    group = q.shape[1] // g
    o, back = ops.attention(q, *(np.tile(a, (1, group, 1, 1)) for a in (k, v)), mask)

    def wrong(do):
        dq, *both = back(do)
        return dq, *(a.reshape(b, group, g, d, t).sum(1) for a in both)

    return o, wrong


def mean_over_all(z, labels, count=None, right=ops.cross_entropy):
    return right(z, labels, labels.size if count is None else count)


def all_seen(real):
    return np.ones((*real.shape, real.shape[1]), bool)


def padding_seen(real, right=ops.causal_mask):
    return right(np.ones_like(real))


def first_row(ids, at, W, tuning):
    return blocks.embed(0 * ids if at == "types" else ids, at, W, tuning)


def centred(ids, at, W, tuning):
    """The embedding less the mean of all its rows."""
    mean = W[f"{at}.weight"].mean(0, keepdims=True).T
    y, back = blocks.embed(ids, at, W, tuning)
    return y - mean, back


def heads_within_features(x, b, h):
    return x.reshape(x.shape[0] // h, h, b, -1).transpose(2, 1, 0, 3)


def turned_backwards(x, cos, sin, rope=ops.rope):
    return rope(x, cos, -sin)


ALL, CAUSAL, LLAMA = {}, {"architectures": (ml.Llama, ml.GPT2)}, {"architectures": (ml.Llama,)}
PLAIN = {"p": (0.0,)}
LAWS = {
    factors_follow_from_the_weights_gradient: (ALL, lora, "LORA", scaled(1 + 1e-11)),
    factors_gradients_are_balanced: (ALL, lora, "LORA", scaled(1 + 1e-11)),
    components_may_turn_their_sign_or_move_a_power_of_two: (
        ALL,
        *lora_wrong(lambda x, W, b, A, B, s, K: (x, W, b, A, abs(B), s, K)),
    ),
    without_b_it_is_the_base: (
        ALL,
        *lora_wrong(lambda x, W, b, A, B, s, K: (x if K is None else K * x, W, b, A, B, s)),
    ),
    no_token_sees_a_later_one: (CAUSAL, ops, "causal_mask", all_seen),
    the_order_of_rows_is_no_matter: (
        ALL,
        *lora_wrong(lambda x, W, b, A, B, s, K: (x, W, b, A, B, s * x[0, 0])),
    ),
    parts_of_a_batch_add_up: (ALL, ops, "cross_entropy", mean_over_all),
    padding_on_the_right_changes_nothing: (PLAIN, ops, "causal_mask", all_seen),
    padding_on_the_left_changes_nothing: (PLAIN | CAUSAL, ops, "causal_mask", padding_seen),
    grouped_heads_are_heads_with_repeated_rows: (
        LLAMA,
        models.logits,
        "__defaults__",
        (models.Kernels(attention=tiled),),
    ),
    interleaved_rope_permutes_rows_of_w_and_b: (LLAMA, ops, "rope", turned_backwards),
    the_order_of_heads_is_no_matter: (ALL, ops, "split_heads", heads_within_features),
    the_loss_is_the_mean_over_labels_that_count: (ALL, ops, "cross_entropy", mean_over_all),
    numbers_name_rows_of_their_tables: (ALL, models, "embed", first_row),
    rows_that_no_number_names_are_no_matter: (ALL, models, "embed", centred),
    gradients_are_of_what_is_trained_alone: (ALL, blocks, "project", adapters_alone),
    nothing_is_changed_in_place: (ALL, *lora_wrong(written)),
}


def over_the_cases(law):
    """The law as a test over the models that it speaks of."""
    restrictions, *_ = LAWS[law]

    @FEW
    @given(model=draw.model_cases(**restrictions, train_base=True))
    def test(model):
        law(model)

    return test


@pytest.mark.parametrize("law", LAWS)
def test_of_every_drawn_model_it_holds_that(law):
    over_the_cases(law)()


@pytest.mark.parametrize("law", LAWS)
def test_a_wrong_part_breaks_the_law(law, monkeypatch):
    restrictions, module, name, wrong = LAWS[law]
    p = restrictions.get("p", (0.25,))[0]
    kinds = restrictions.get("architectures", (models.Config,))
    drawn = [case(name, p=p) for name, c in MODELS.items() if isinstance(c, kinds)]
    drawn = [replace(m, W={name: w.copy() for name, w in m.W.items()}) for m in drawn]
    for model in drawn:
        law(model)
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError):
        list(map(law, drawn))


@pytest.mark.slow
@pytest.mark.parametrize("name", others_slow(MODELS, "Llama"))
def test_merging_changes_no_output_beyond_rounding(name, any_number):
    model = case(name, 2, 4, p=0)
    rng = np.random.default_rng(0)
    logits = [model.logits(), model.logits(ml.merge(model.W, model.tuning))]
    scaled = replace(model.tuning, scale={at: 1.01 * s for at, s in model.tuning.scale.items()})
    wrong = model.logits(ml.merge(model.W, scaled))
    any_number(rounded_tables)
    rounded = converted(model, lambda a: to_objects(a, Rounded))
    v = rng.standard_normal(logits[0].shape)
    # Both are off from the same exact value by their own roundings, the merge's among them.
    bound = propagated(rounded.logits(), v)
    bound += propagated(rounded.logits(ml.merge(rounded.W, rounded.tuning)), v)
    share = abs((v * (logits[0] - logits[1])).sum()) / bound
    record_worst("merged against unmerged / its bound", share)
    assert share <= 1
    assert abs((v * (logits[0] - wrong)).sum()) > bound


NORMS = {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"}
PARAMETERS = {
    "Llama": (
        {f"{at}.weight" for at in ("norm1", "norm2", "q", "k", "v", "o", "gate", "up", "down")},
        {"embed.weight", "norm.weight", "head.weight"},
    ),
    "Qwen2": (
        {f"{at}.weight" for at in ("norm1", "norm2", "q", "k", "v", "o", "gate", "up", "down")}
        | {"q.bias", "k.bias", "v.bias"},
        {"embed.weight", "norm.weight", "head.weight"},
    ),
    "GPT-2": (
        NORMS
        | {f"{at}.{part}" for at in ("qkv", "o", "up", "down") for part in ("weight", "bias")},
        {"embed.weight", "positions.weight", "norm.weight", "norm.bias"},
    ),
    "BERT": (
        NORMS
        | {
            f"{at}.{part}"
            for at in ("q", "k", "v", "o", "up", "down")
            for part in ("weight", "bias")
        },
        {"embed.weight", "positions.weight", "types.weight", "norm.weight", "norm.bias"}
        | {"pooler.weight", "pooler.bias", "head.weight", "head.bias"},
    ),
}
PARAMETERS["Llama, tied"] = PARAMETERS["Llama"][0], PARAMETERS["Llama"][1] - {"head.weight"}


@EVERY
def test_every_architecture_has_its_parameters_and_uses_them(name):
    block, outer = PARAMETERS[name]
    expected = outer | {f"layers.{i}.{part}" for i in range(2) for part in block}
    c = MODELS[name]
    assert c.shapes().keys() == expected
    assert {
        f"{at}.weight": shape for at, shape in c.linears().items()
    }.items() <= c.shapes().items()
    assert target_modules.ties_head(c) == (not {"head.weight", "pooler.weight"} & expected)
    gradients = case(name).loss()[1](1.0)
    assert gradients.keys() >= expected
    assert all(greatest(gradients[n]) > GRADIENT for n in expected if not n.endswith(".k.bias"))


@EVERY
def test_fresh_weights_are_normal_matrices_norms_of_one_and_biases_of_zero(name):
    c = replace(MODELS[name], heads=1, d=2)  # the narrowest that RoPE can turn
    c = replace(c, kv_heads=1, head_dim=2) if isinstance(c, ml.Llama) else c
    W = ml.draw_weights(c, np.random.default_rng(0), std=0.5)
    assert {name: w.shape for name, w in W.items()} == c.shapes()
    for parameter, w in W.items():
        if w.shape[1] == 1:
            assert (w == (0 if parameter.endswith(".bias") else 1)).all()
    matrices = np.concatenate([w.ravel() for w in W.values() if w.shape[1] > 1])
    # Six standard deviations of a sample's mean and of its mean square.
    assert abs(matrices.mean()) < 6 * 0.5 / matrices.size**0.5
    assert abs((matrices**2).mean() - 0.25) < 6 * 0.25 * (2 / matrices.size) ** 0.5
    narrow, by_default = (
        ml.draw_weights(c, np.random.default_rng(0), *std)["embed.weight"] for std in ((0.02,), ())
    )
    assert same_bits(narrow, by_default)


def test_a_norm_of_weight_zero_gives_its_bias():
    model = case("GPT-2", p=0)
    W = model.W | {"norm.weight": 0 * model.W["norm.weight"]}
    z = model.logits(W)
    assert np.array_equal(z, W["embed.weight"] @ np.tile(W["norm.bias"], (1, z.shape[1])))


def test_positions_count_from_0_and_all_tokens_are_real_unless_given():
    ids = np.array([[3, 1, 2], [0, 2, 1]])
    bare = ml.Batch(ids, ids)
    full = ml.Batch(
        ids, ids, np.ones((2, 3), int), np.array([[0, 1, 2]] * 2), np.zeros((2, 3), int)
    )
    for name in MODELS:
        model = case(name, p=0)
        labels = np.array([1, 2]) if name == "BERT" else ids
        one, two = (
            replace(model, batch=replace(batch, labels=labels)).logits() for batch in (bare, full)
        )
        assert same_bits(one, two)


def test_numbers_outside_their_tables_and_batches_without_labels_are_refused():
    model = case("BERT", p=0)

    def outcome_with(**changed):
        return replace(model, batch=replace(model.batch, **changed)).loss()

    ids = model.batch.ids
    for changed, message in (
        ({"ids": ids + 11}, "ids: found 1[0-9] to 2[0-9], expected 0 to 10"),
        ({"ids": np.where(ids == ids.max(), -1, ids)}, "ids: found -1 to .*, expected 0 to 10"),
        ({"ids": np.where(ids == ids.min(), 11, ids)}, "ids: found .* to 11, expected 0 to 10"),
        ({"positions": ids * 0 + 9}, "position_ids: found 9 to 9, expected 0 to 8"),
        ({"types": ids * 0 - 1}, "type_ids: found -1 to -1, expected 0 to 1"),
        ({"labels": None}, "the batch has no labels; a loss needs them"),
        ({"labels": np.full(3, 4)}, "label 4: expected 0 to 3, or -100 to ignore"),
        ({"labels": np.full(3, -100)}, "no label counts: each is -100"),
    ):
        with pytest.raises(ValueError, match=message):
            outcome_with(**changed)
