"""Generation: the cache changes no logits, and each token is drawn as the settings say."""

from dataclasses import replace

import numpy as np
import pytest
from extras import optional
from number_systems import Real, Rounded, propagated, to_objects, values

import minilora as ml
from minilora import testing as draw
from minilora.spec import models, ops
from minilora.spec.models import Batch, logits
from minilora.training import kernels, kv_cache
from minilora.training.generate import Sampling, generate, probabilities
from minilora.training.generate import draw as draw_token
from minilora.training.kv_cache import KVCache, next_logits

MODELS = {
    "Llama": ml.Llama(vocab=11, d=4, layers=2, heads=4, ffn=5, kv_heads=2, head_dim=2, eps=0.1),
    "Qwen2": ml.Llama(
        vocab=7, d=4, layers=2, heads=2, ffn=5, kv_heads=1, head_dim=2, tied=True, qkv_bias=True
    ),
    "GPT2": ml.GPT2(vocab=9, d=4, layers=2, heads=2, ffn=5, positions=9),
}
BERT = ml.Bert(vocab=9, d=4, layers=1, heads=2, ffn=5, positions=9, types=2, classes=3)


def drawn(name, b=2, t=4):
    rng = np.random.default_rng(sum(map(ord, name)))
    model = draw.draw_model(MODELS[name], rng, b=b, t=t, padding="none", p=0.0)
    real = np.arange(t) >= np.arange(b)[:, None]  # row i begins with i columns of padding
    places = np.maximum(real.cumsum(1) - 1, 0)
    return replace(model, batch=replace(model.batch, mask=real, positions=places))


def columns(batch, start, end):
    """Some of a batch's tokens, in their own places."""
    return Batch(
        batch.ids[:, start:end],
        mask=batch.real[:, start:end],
        positions=batch.position_ids[:, start:end],
    )


def in_parts(model, ends):
    """The logits (v, b, t) of the batch, run part after part with a `KVCache`."""
    cache, starts = KVCache(), [0, *ends[:-1]]
    parts = []
    for start, end in zip(starts, ends, strict=True):
        part = columns(model.batch, start, end)
        z = next_logits(part, model.W, model.config, model.tuning, cache)
        parts.append(z.reshape(len(z), *part.ids.shape))
    return np.concatenate(parts, axis=-1)


def at_once(model):
    z, _ = logits(model.batch, model.W, model.config, model.tuning)
    return z.reshape(len(z), *model.batch.ids.shape)


def in_numbers(model, number):
    """The model with numbers of another kind as entries, whose sums run term after term."""
    W = {name: to_objects(w, number) for name, w in model.W.items()}
    return replace(model, W=W)


def remake_tables(monkeypatch, tables):
    """RoPE's tables by another function, in the specification's models and in generation."""
    defaults = (models.Kernels(rope_tables=tables),)
    monkeypatch.setattr(models.logits, "__defaults__", defaults)
    monkeypatch.setattr(kernels, "rope_tables", tables)


@pytest.fixture
def objects(monkeypatch):
    """RoPE's tables as entries of an object array are as they are in float64."""
    tables = ops.rope_tables

    def wide(positions, d, theta, dtype):
        made = tables(positions, d, theta, np.dtype(float))
        return tuple(to_objects(v, Real) for v in made) if np.dtype(dtype).hasobject else made

    remake_tables(monkeypatch, wide)


def same(a, b):
    return a.shape == b.shape and all(x == y for x, y in zip(a.ravel(), b.ravel(), strict=True))


@pytest.mark.parametrize("ends", [(1, 2, 3, 4), (3, 4), (2, 4)])
@pytest.mark.parametrize("name", MODELS)
def test_the_cache_changes_no_digit_where_a_sum_has_one_order(name, ends, objects):
    model = in_numbers(drawn(name, b=1, t=4), Real)
    assert same(in_parts(model, ends), at_once(model))


@pytest.mark.slow
def test_the_room_of_a_cache_doubles_so_that_few_tokens_cost_a_copy():
    """By heads and features that are more than the tokens: no other axis is taken for theirs."""
    cache, rng = KVCache(), np.random.default_rng(0)
    every = rng.standard_normal((2, 40, 41, 42, 20))
    rooms, grew = [], []
    for t in range(every.shape[-1]):
        k, v = cache.append(0, *every[..., t : t + 1])
        if not rooms or cache.held[0][0] is not rooms[-1]:
            rooms.append(cache.held[0][0])
            grew.append(t + 1)
        assert np.array_equal(k, every[0, ..., : t + 1])
        assert np.array_equal(v, every[1, ..., : t + 1])
    assert grew == [1, 3, 7, 15]
    assert [room.shape[-1] for room in rooms] == [2, 6, 14, 30]


@pytest.mark.parametrize("name", MODELS)
def test_a_row_with_padding_on_the_left_has_the_logits_of_the_row_alone(name, objects):
    model = in_numbers(drawn(name), Real)
    z, real = in_parts(model, (2, 3, 4)), model.batch.real
    assert not real.all()
    for row in range(2):
        own = Batch(model.batch.ids[row : row + 1][:, real[row]])
        alone = at_once(replace(model, batch=own))
        assert same(z[:, row, real[row]], alone[:, 0])


@pytest.mark.parametrize("name", MODELS)
def test_in_floating_point_the_cached_logits_are_within_their_rounding(name, monkeypatch):
    model = drawn(name, b=1, t=3)
    counting = in_numbers(model, Rounded)
    tables = ops.rope_tables
    remake_tables(monkeypatch, lambda p, d, theta, dtype: tables(p, d, theta, np.dtype(float)))
    exact = at_once(counting)
    cached, whole = in_parts(model, (2, 3)), at_once(model)
    for at in ((0, 0, 2), (3, 0, 1), (5, 0, 2)):
        bound, true = propagated([exact[at]], [1.0]), values(exact)[at]
        assert abs(cached[at] - true) <= bound
        assert abs(whole[at] - true) <= bound
        assert bound < abs(true)


def test_the_mask_over_a_cache_is_the_last_columns_of_the_whole_one(monkeypatch):
    real = np.array([[False, True, True, True, True], [True, True, False, True, False]])
    batch, cache, end = Batch(np.zeros(real.shape, int), mask=real), KVCache(), 0
    whole, masks = ops.causal_mask(real), []
    monkeypatch.setattr(kv_cache, "attention", lambda q, k, v, mask: masks.append(mask))
    for t in (2, 1, 2):
        start, end = end, end + t
        part = columns(batch, start, end)
        cache.begin(part.real)
        cache.attention(*np.zeros((3, 2, 1, 1, t)), ops.causal_mask(part.real))
        assert np.array_equal(masks[-1], whole[:, :end, start:end])
    assert not np.array_equal(whole[:, :, :2], whole[:, :, -2:])  # other columns would be seen


def values_of_the_wrong_order(cache, block, k, v, right=KVCache.append):
    keys, values = right(cache, block, k, v)
    return keys, values[..., ::-1]


def test_a_cache_that_mixes_its_tokens_is_seen(monkeypatch, objects):
    model = in_numbers(drawn("Llama", b=1), Real)
    whole = at_once(model)
    monkeypatch.setattr(KVCache, "append", values_of_the_wrong_order)
    assert not same(in_parts(model, (3, 4)), whole)


def test_positions_that_do_not_count_on_are_seen(monkeypatch, objects):
    model = in_numbers(drawn("GPT2", b=1), Real)
    whole, cache = at_once(model), KVCache()
    next_logits(columns(model.batch, 0, 3), model.W, model.config, model.tuning, cache)
    last = replace(columns(model.batch, 3, 4), positions=None)
    z = next_logits(last, model.W, model.config, model.tuning, cache)
    assert not same(z, whole[:, 0, 3:])


def test_a_classifier_has_no_cache():
    W = ml.draw_weights(BERT, np.random.default_rng(0))
    with pytest.raises(ValueError, match="a Bert has no cache"):
        next_logits(Batch(np.array([[1, 2]])), W, BERT, ml.TrainableSpec(), KVCache())


def tokens_of(model, prompts, **settings):
    steps = list(generate(prompts, model.W, model.config, model.tuning, **settings))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_the_whole_forward(name):
    model, tokens = drawn(name), [1, 4]
    for _ in range(5):
        z, _ = logits(Batch(np.array([tokens])), model.W, model.config, model.tuning)
        tokens = [*tokens, int(z[:, -1].argmax())]
    assert tokens_of(model, [[1, 4]], max_new_tokens=5) == [tokens[2:]]


def test_prompts_of_several_lengths_do_not_see_one_another():
    model, prompts = drawn("Llama"), [[1, 2, 3], [4], [5, 6]]
    together = tokens_of(model, prompts, max_new_tokens=4)
    assert together == [tokens_of(model, [prompt], max_new_tokens=4)[0] for prompt in prompts]


def test_a_row_stops_at_its_stop_and_the_others_go_on():
    model = drawn("Llama")
    free = tokens_of(model, [[1, 2], [4, 3]], max_new_tokens=6)
    stop = next(token for token in free[0] if token not in free[1])
    first, second = tokens_of(model, [[1, 2], [4, 3]], max_new_tokens=6, stop=[stop])
    assert first == free[0][: free[0].index(stop) + 1]
    assert second == free[1]


def test_the_seed_alone_decides_what_is_drawn():
    model = drawn("GPT2", b=1)
    settings = {"max_new_tokens": 6, "sampling": Sampling(2.0)}
    made = [tokens_of(model, [[1, 2]], seed=seed, **settings) for seed in (0, 0, 1, 2, 3)]
    assert made[0] == made[1]
    assert len({str(m) for m in made}) > 1


Z = np.array([1.0, 3.0, 2.0, 3.0])


def test_temperature_0_takes_the_first_of_the_most_probable():
    assert (probabilities(Z, Sampling()) == [0, 1, 0, 0]).all()
    assert draw_token(Z, Sampling(), 0, 0) == 1


def test_a_probability_is_the_softmax_of_the_logits_over_the_temperature():
    p, cold = probabilities(Z, Sampling(1.0)), probabilities(2 * Z, Sampling(2.0))
    assert (p == cold).all()
    softmax, _ = ops.softmax(Z[None, :, None])
    # exp, a sum of four, a division: each side is off by less than 16 roundings
    assert abs(p / softmax[0, :, 0] - 1).max() <= 16 * np.finfo(float).eps


def test_top_k_and_top_p_leave_the_most_probable():
    assert np.flatnonzero(probabilities(Z, Sampling(1.0, top_k=3))).tolist() == [1, 2, 3]
    assert np.flatnonzero(probabilities(Z, Sampling(1.0, top_k=1))).tolist() == [1]
    halves = np.log([0.5, 0.25, 0.125, 0.125])
    for p, left in ((0.4, 1), (0.6, 2), (0.8, 3), (1.0, 4)):
        assert np.count_nonzero(probabilities(halves, Sampling(1.0, top_p=p))) == left


def test_top_p_ends_with_the_token_that_reaches_it_exactly():
    """Of n equal logits each has the probability 1/n, and with n = 4 every sum of them is exact."""
    equal = np.zeros(4)
    for left in (1, 2, 3, 4):
        p = probabilities(equal, Sampling(1.0, top_p=left / 4))
        assert p.tolist() == [1 / left] * left + [0] * (4 - left)


def test_of_equal_logits_at_the_edge_of_top_k_the_first_stay():
    z = np.random.default_rng(0).integers(0, 4, 30).astype(float)
    order = sorted(range(30), key=lambda i: (-z[i], i))
    edges = {k for k in range(1, 30) if z[order[k - 1]] == z[order[k]]}
    assert edges  # where it matters which of them
    for k in range(1, 32):
        left = np.flatnonzero(probabilities(z, Sampling(1.0, top_k=k)))
        assert left.tolist() == sorted(order[:k])
    others = sorted(range(30), key=lambda i: (-z[i], -i))
    assert all(set(others[:k]) != set(order[:k]) for k in edges)


@pytest.mark.slow
def test_tokens_are_drawn_as_often_as_they_are_probable():
    n, sampling = 4000, Sampling(1.0, top_k=3)
    drawn = [draw_token(Z, sampling, 5, step) for step in range(n)]
    p = probabilities(Z, sampling)
    sigma = np.sqrt(n * p * (1 - p))
    off = abs(np.bincount(drawn, minlength=4) - n * p)
    assert (off <= 4 * sigma).all()
    assert (abs(np.bincount(drawn, minlength=4) - n * p[::-1]) > 4 * sigma[::-1]).any()


def test_the_penalty_divides_what_is_above_0_and_multiplies_what_is_below():
    z = np.array([2.0, -1.0, 1.5, -2.0])
    plain = Sampling(1.0, repetition_penalty=2.0)
    p = probabilities(z, plain, seen={0, 1})
    assert (p == probabilities(np.array([1.0, -2.0, 1.5, -2.0]), Sampling(1.0))).all()
    assert (z == [2.0, -1.0, 1.5, -2.0]).all()
    # what a division of all, or a penalty of all tokens, would give
    assert (p != probabilities(np.array([1.0, -0.5, 1.5, -2.0]), Sampling(1.0))).any()
    assert (p != probabilities(np.array([1.0, -2.0, 0.75, -4.0]), Sampling(1.0))).any()


def test_the_penalty_is_that_of_transformers():
    torch = optional("torch")
    processors = optional("transformers").generation.logits_process
    z, seen = np.random.default_rng(0).standard_normal(20).astype(np.float32), [3, 7, 7, 11]
    theirs = processors.RepetitionPenaltyLogitsProcessor(1.5)(
        torch.tensor([seen]), torch.tensor(z)[None]
    )
    sampling = Sampling(1.0, repetition_penalty=1.5)
    expected = probabilities(theirs[0].numpy(), Sampling(1.0))
    # a quotient or product in float32 each may be rounded once more, with a weight of |z| < 4
    eps = 4 * np.finfo(np.float32).eps
    assert abs(probabilities(z, sampling, seen) / expected - 1).max() <= 2 * eps
    assert abs(probabilities(z, Sampling(1.0)) / expected - 1).max() > 2 * eps


@pytest.mark.parametrize("name", MODELS)
def test_the_penalty_counts_the_prompt_and_what_was_drawn(name):
    model, tokens = drawn(name), [1, 4]
    sampling = Sampling(repetition_penalty=1e6)
    for _ in range(4):
        z, _ = logits(Batch(np.array([tokens])), model.W, model.config, model.tuning)
        tokens = [*tokens, draw_token(z[:, -1], sampling, 0, 0, seen=tokens)]
    assert tokens_of(model, [[1, 4]], max_new_tokens=4, sampling=sampling) == [tokens[2:]]
    assert tokens_of(model, [[1, 4]], max_new_tokens=4) != [tokens[2:]]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty 0"),
        ({"temperature": -1}, "temperature -1"),
        ({"temperature": np.nan}, "temperature nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0}, "top_p 0"),
        ({"top_p": 1.5}, "top_p 1.5"),
    ],
)
def test_a_setting_outside_its_range_is_refused(settings, found):
    with pytest.raises(ValueError, match=found):
        Sampling(**settings)


def test_what_cannot_be_generated_is_refused():
    model = drawn("GPT2", b=1)
    for prompts, most, found in (
        ([], 1, "empty prompt"),
        ([[1], []], 1, "empty prompt"),
        ([[1, 2]], 9, "max_new_tokens 9 after 2 tokens"),
        ([[99]], 1, "ids: found 99"),
    ):
        with pytest.raises(ValueError, match=found):
            tokens_of(model, prompts, max_new_tokens=most)
    with pytest.raises(ValueError, match="not finite"):
        probabilities(np.array([np.nan, 1.0]), Sampling())


def test_a_temperature_near_zero_draws_the_most_probable():
    z = np.array([1.0, 700.0, -700.0], np.float32)
    assert probabilities(z, Sampling(1e-308)).tolist() == [0, 1, 0]


def test_the_last_token_drawn_needs_no_position():
    model = drawn("GPT2", b=1)
    full = [1] * model.config.positions
    assert len(tokens_of(model, [full], max_new_tokens=1)[0]) == 1
    with pytest.raises(ValueError, match="9 positions"):
        tokens_of(model, [full], max_new_tokens=2)
