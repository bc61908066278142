"""Frozen weights that are made when they are read: the same bits, and none of them stays."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
from calculus import same_bits

import minilora as ml
from minilora.io import lazy_weights
from minilora.io.lazy_weights import Expanded, OnDemand, Table, as_table
from minilora.spec import initialization, models
from minilora.spec.quantization import dequantize, quantize
from minilora.training import chunked_head
from minilora.training.gradients import ExecutionPlan, evaluate, gradients

C = ml.Llama(vocab=70, d=32, layers=3, heads=2, ffn=64, kv_heads=1, head_dim=16, tied=True)
RNG = np.random.default_rng(0)
CODES = {
    f"{at}.weight": quantize(RNG.standard_normal(shape).astype(np.float32) / 4, "q4_1")
    for at, shape in {**C.linears(), "embed": (C.vocab, C.d)}.items()
}
NORMS = {
    name: np.ones(shape, np.float32) for name, shape in C.shapes().items() if name not in CODES
}
LARGE = NORMS | {name: dequantize(q) for name, q in CODES.items()}
WHOLE, TUNING = ml.inject(LARGE, ml.LoraConfig(r=2, target_modules=".*"), C.matrices(), RNG)
ADAPTERS = {
    name: RNG.standard_normal(WHOLE[name].shape).astype(np.float32) for name in TUNING.trained
}
IDS = RNG.integers(0, C.vocab, (3, 5))
BATCH = ml.Batch(IDS, labels=IDS)


def outcome(W, tuning=TUNING, **plan):
    L, g = gradients(BATCH, W | ADAPTERS, C, tuning, ExecutionPlan(**plan))
    return {"loss": L} | g


def same(found, wanted):
    return found.keys() == wanted.keys() and all(same_bits(found[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tables", [True, False])
def test_expanded_weights_change_no_bit(recompute, tables):
    """With adapters on all matrices, and without those of the tables, whose rows are looked up."""
    tuning = TUNING
    adapters = {n: a for n, a in ADAPTERS.items() if tables or not n.startswith(("embed", "head"))}
    tuning = replace(TUNING, trained=frozenset(adapters))
    small = Expanded({**NORMS, **{name: OnDemand(q) for name, q in CODES.items()}})
    found, wanted = (
        gradients(BATCH, W | adapters, C, tuning, ExecutionPlan(gradient_checkpointing=recompute))
        for W in (small, LARGE)
    )
    assert same(found[1], wanted[1])
    assert same_bits(found[0], wanted[0])
    other = {**LARGE, "layers.1.up.weight": LARGE["layers.1.up.weight"] + 1e-3}
    assert not same(gradients(BATCH, other | adapters, C, tuning)[1], wanted[1])


def watched(alive):
    """Entries that note how many of the weights they have made are held at a time."""
    made = []

    def entry(name):
        def make():
            W = dequantize(CODES[name]) + 0
            made.append(weakref.ref(W))
            alive.append(sum(ref() is not None for ref in made))
            return W

        return make

    return Expanded({**NORMS, **{name: entry(name) for name in CODES}})


def test_with_recomputation_no_more_than_a_blocks_weights_are_held():
    kept, again, still = [], [], []
    outcome(watched(kept))
    outcome(watched(again), gradient_checkpointing=True)
    evaluate(BATCH, watched(still) | ADAPTERS, C, TUNING)
    projections, tables = 7, 2  # the embedding, and the same as head
    assert max(again) <= projections + tables
    assert max(still) <= projections + tables
    assert max(kept) >= 3 * projections


def test_only_the_rows_that_are_looked_up_are_expanded():
    asked = []

    class Rows(OnDemand):
        def rows(self, ids):
            asked.append(len(ids))
            return super().rows(ids)

    W = Expanded({**NORMS, **{name: Rows(q) for name, q in CODES.items()}})
    ids = np.array([3, 3, 9])
    assert same_bits(W["embed.weight"][ids], LARGE["embed.weight"][ids])
    assert asked == [3]


@pytest.mark.parametrize("scheme", ["q4_0", "q8_0", "int4", "nf4"])
def test_rows_are_those_of_the_whole(scheme, monkeypatch):
    q = quantize(RNG.standard_normal((9, 64)).astype(np.float32), scheme)
    entry, whole = OnDemand(q), dequantize(q)
    assert same_bits(entry.rows(np.array([8, 0, 8])), whole[[8, 0, 8]])
    assert same_bits(entry.rows(slice(2, 5)), whole[2:5])
    monkeypatch.setattr(lazy_weights, "ENTRIES", 4 * 64)
    assert same_bits(entry(), whole)
    assert (entry.shape, entry.dtype) == (whole.shape, whole.dtype)


def test_a_table_is_a_matrix_in_products(monkeypatch):
    """In blocks of rows: the rows of E x, and a sum of their products for Eᵀ dy."""
    monkeypatch.setattr(lazy_weights, "ENTRIES", 32 * C.d)
    q, E = CODES["embed.weight"], LARGE["embed.weight"]
    table = Table(OnDemand(q).rows, q.shape, q.dtype)
    x = RNG.standard_normal((C.d, 4)).astype(np.float32)
    dy = RNG.standard_normal((C.vocab, 4)).astype(np.float32)
    parts = slice(0, 32), slice(32, 64), slice(64, 70)
    assert [rows for rows, _ in table.parts()] == list(parts)
    assert len(table) == len(E)
    assert same_bits(table @ x, np.concatenate([E[rows] @ x for rows in parts]))
    first, second, third = (E[rows].T @ dy[rows] for rows in parts)
    assert same_bits(table.T @ dy, first + second + third)
    assert same_bits(as_table(E).T @ dy, table.T @ dy)
    assert as_table(table) is table
    assert same_bits(np.asarray(table.T.T), E)
    assert same_bits(np.asarray(table.T), E.T)
    assert np.asarray(table, np.float64).dtype == np.float64


@pytest.mark.parametrize("kind", ["lora", "dora", "lora-bias"])
def test_a_large_head_is_read_by_rows_to_the_same_bits(kind, monkeypatch):
    """Forward and backward for each part of the columns; DoRA reads it once, dense."""
    monkeypatch.setattr(chunked_head, "LOGITS", 90)
    monkeypatch.setattr(chunked_head, "COLUMNS", 1)
    monkeypatch.setattr(chunked_head, "LARGE", 90)
    monkeypatch.setattr(lazy_weights, "ENTRIES", 32 * C.d)
    asked = []

    class Rows(OnDemand):
        def rows(self, at):
            asked.append(at)
            return super().rows(at)

    lora = ml.LoraConfig(r=2, target_modules=["head", "q"], variant=kind)
    W, tuning = ml.inject(LARGE, lora, C.matrices(), np.random.default_rng(1))
    adapters = {name: W[name] for name in tuning.trained}
    small = Expanded({**NORMS, **{name: Rows(q) for name, q in CODES.items()}})
    found, wanted = (gradients(BATCH, base | adapters, C, tuning) for base in (small, LARGE))
    assert same(found[1], wanted[1])
    assert same_bits(found[0], wanted[0])
    blocks = sum(at == slice(64, 70) for at in asked if isinstance(at, slice))
    parts = -(-12 // (90 // C.vocab))  # of the columns that count
    assert blocks == (1 if kind == "dora" else 2 * parts)


def test_parameters_are_counted_and_joined_without_being_made():
    def never():
        raise AssertionError

    W = Expanded({"a.weight": never, "b.weight": np.ones(2)})
    joined = W | {"a.A": np.zeros(2)} | Expanded({"c.weight": never})
    assert list(joined) == ["a.weight", "b.weight", "a.A", "c.weight"]
    assert len(joined) == 4
    assert "a.weight" in joined
    assert "a.bias" not in joined
    assert joined.get("a.bias") is None
    with pytest.raises(AssertionError):
        joined["c.weight"]


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_a_head_made_on_demand_are_those_of_its_weight(kind, tied):
    c = replace(C, tied=tied)
    codes = CODES if tied else CODES | {"head.weight": CODES["embed.weight"]}
    large = NORMS | {name: dequantize(q) for name, q in codes.items()}
    lora = ml.LoraConfig(r=2, target_modules=["head"], variant=kind)
    W, tuning = ml.inject(large, lora, c.matrices(), np.random.default_rng(1))
    adapters = {name: W[name] for name in tuning.trained}
    small = Expanded({**NORMS, **{name: OnDemand(q) for name, q in codes.items()}})
    found, wanted = (ml.logits(BATCH, base | adapters, c, tuning)[0] for base in (small, large))
    assert same_bits(found, wanted)
    other = {**large, "embed.weight": -large["embed.weight"]}
    assert not same_bits(ml.logits(BATCH, other | adapters, c, tuning)[0], wanted)


@pytest.mark.parametrize("at", ["embed", "head", "layers.0.q"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_every_adapter_acts_on_and_merges_into_what_is_expanded(at, variant):
    rng = np.random.default_rng(0)
    c = models.Llama(33, 32, 1, heads=2, ffn=32, kv_heads=1, head_dim=16, tied=True)
    W = {name: w.astype(np.float32) for name, w in initialization.draw_weights(c, rng, 0.3).items()}
    codes = {name: quantize(w, "q8_0") for name, w in W.items() if w.shape[1] > 1}
    large = W | {name: dequantize(q) for name, q in codes.items()}
    small = Expanded(W | {name: OnDemand(q) for name, q in codes.items()})
    adapted, tuning = ml.inject(
        large, ml.LoraConfig(r=2, target_modules=[at], variant=variant), c.matrices(), rng
    )
    own = {name: adapted[name] for name in tuning.trained}
    ids = rng.integers(0, 33, (2, 6))
    (L, back), (L_small, back_small) = (
        models.loss(models.Batch(ids, labels=ids), held | own, c, tuning) for held in (large, small)
    )
    assert same_bits(L, L_small)
    g, g_small = back(1.0), back_small(1.0)
    assert all(same_bits(g[name], g_small[name]) for name in own)
    merged, merged_small = (ml.merge(held | own, tuning) for held in (large, small))
    assert all(same_bits(merged[name], np.asarray(merged_small[name])) for name in merged)
