"""The frozen prefix: run once for each sequence, and the gradients are those of the whole model."""

from dataclasses import replace

import numpy as np
import pytest
from calculus import GRADIENT, greatest, same_bits
from zoo import MODELS

from minilora import testing as draw
from minilora.io import reference_models
from minilora.io.errors import FormatError
from minilora.io.loading import open_base
from minilora.spec import blocks, models
from minilora.training import data, frozen_prefix
from minilora.training.checkpoints import TrainState
from minilora.training.config import TrainConfig
from minilora.training.frozen_prefix import FrozenPrefix
from minilora.training.gradients import ExecutionPlan, evaluate, gradients
from minilora.training.loop import train_steps
from minilora.training.prefix_store import FolderStore, MemoryStore, with_kept_prefix
from minilora.training.run import prepare

CONFIGS = {
    "Llama": replace(MODELS["Llama, tied"], vocab=11, layers=3),
    "GPT-2": replace(MODELS["GPT-2"], layers=3),
    "BERT": replace(MODELS["BERT"], layers=3),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)
DEPTH = 2


def case(name):
    """A batch with padding and dropout, and adapters in the last block and above alone."""
    model = draw.draw_model(CONFIGS[name], np.random.default_rng(0), 5, 6)
    upper = ("layers.2.", "head.", "pooler.")
    base = model.config.shapes()
    W = {n: w for n, w in model.W.items() if n in base or n.startswith(upper)}
    tuning = model.tuning
    trained = frozenset(n for n in tuning.trained if n.startswith(upper))
    scale = {at: s for at, s in tuning.scale.items() if f"{at}.".startswith(upper)}
    drop = {at: K for at, K in tuning.dropout_scale.items() if at in scale}
    variant = {at: v for at, v in tuning.variant.items() if at in scale}
    tuning = replace(tuning, trained=trained, scale=scale, dropout_scale=drop, variant=variant)
    return replace(model, W=W, tuning=tuning)


def of(model, store=None, depth=DEPTH, **plan):
    prefix = None if store is None else FrozenPrefix(depth, store)
    plan = ExecutionPlan(prefix=prefix, **plan)
    L, g = gradients(model.batch, model.W, model.config, model.tuning, plan)
    return {"loss": np.asarray(L)} | g


def agree(found, wanted):
    assert found.keys() == wanted.keys()
    bound = 2 * GRADIENT * max(map(greatest, wanted.values()))
    assert all(greatest(found[k] - wanted[k]) <= bound for k in wanted)


@EVERY
def test_gradients_and_losses_are_those_of_the_whole_model(name):
    model = case(name)
    store = MemoryStore(np.inf)
    for _ in range(2):
        agree(of(model, store), of(model))
    common = model.batch, model.W, model.config, model.tuning
    kept, whole = (
        evaluate(*common, ExecutionPlan(prefix=prefix))[0]
        for prefix in (FrozenPrefix(DEPTH, store), None)
    )
    assert abs(kept - whole) <= 2 * GRADIENT * abs(whole)


@EVERY
def test_a_store_that_takes_one_sequence_for_another_gives_other_gradients(name, monkeypatch):
    model = case(name)
    right = frozen_prefix._key
    monkeypatch.setattr(frozen_prefix, "_key", lambda row: str(len(right(row))).encode())
    with pytest.raises(AssertionError):
        agree(of(model, MemoryStore(np.inf)), of(model))


@EVERY
@pytest.mark.parametrize("plan", [{"tokens": 6}, {"gradient_checkpointing": True}])
def test_what_is_kept_has_the_bits_of_what_is_computed_again(name, plan, tmp_path):
    model = case(name)
    wanted = of(model, MemoryStore(0), **plan)
    for store in (MemoryStore(np.inf), FolderStore(tmp_path, np.dtype(float))):
        for _ in range(2):
            found = of(model, store, **plan)
            assert all(same_bits(found[k], wanted[k]) for k in wanted)


def test_the_blocks_below_run_once_for_each_sequence(monkeypatch):
    model, ran = case("Llama"), []
    right = blocks.normalise

    def counting(op, x, at, *rest):
        ran.append(at)
        return right(op, x, at, *rest)

    monkeypatch.setattr(blocks, "normalise", counting)
    monkeypatch.setattr(models, "normalise", counting)
    store = MemoryStore(np.inf)
    for _ in range(3):
        of(model, store)
    assert [ran.count(f"layers.{i}.norm1") for i in range(3)] == [5, 5, 3]


def test_sequences_that_differ_in_types_or_mask_alone_are_told_apart():
    model = case("BERT")
    batch = replace(model.batch, types=np.zeros_like(model.batch.ids))
    store = MemoryStore(np.inf)
    of(replace(model, batch=batch), store)
    other = replace(model, batch=replace(batch, types=np.ones_like(batch.ids)))
    agree(of(other, store), of(other))


def test_half_precision_rounds_what_is_kept_and_nothing_else():
    model = case("Llama")
    prefix = FrozenPrefix(DEPTH, MemoryStore(np.inf))
    half = FrozenPrefix(DEPTH, MemoryStore(np.inf), np.dtype(np.float16))
    common = model.batch, model.W, model.config, model.tuning
    x = prefix.of(*common)
    assert same_bits(half.of(*common), x.astype(np.float16).astype(x.dtype))
    assert not same_bits(half.of(*common), x)


def test_a_folder_keeps_bfloat16_and_refuses_what_is_no_array(tmp_path):
    import ml_dtypes

    store = FolderStore(tmp_path, np.dtype(ml_dtypes.bfloat16))
    x = np.arange(6.0).reshape(2, 3).astype(ml_dtypes.bfloat16)
    assert store.get(b"a") is None
    store.put(b"a", x)
    assert same_bits(np.asarray(store.get(b"a")), x)
    (path,) = tmp_path.rglob("*.npy")
    path.write_bytes(b"no array")
    with pytest.raises(FormatError, match="delete it"):
        store.get(b"a")


def test_a_store_in_memory_takes_no_more_than_its_room():
    store = MemoryStore(100)
    store.put(b"a", np.zeros(12))
    store.put(b"b", np.zeros(12))
    assert store.get(b"a") is not None
    assert store.get(b"b") is None


def test_nobody_asks_the_prefix_for_a_gradient():
    with pytest.raises(AssertionError, match="no backward"):
        frozen_prefix._none(np.zeros(1))


def run_of(**settings):
    config = TrainConfig(learning_rate=0.01, max_steps=4, batch_tokens=128, dropout=0.1, **settings)
    base = open_base("reference:llama", np.dtype(config.dtype))
    name = "task:" + reference_models.tasks(base.reference)[1]
    read = data.read(name, config.task, base.tokenizer, config.max_length)
    read = replace(read, train=read.train[:12], valid=())
    return prepare(base, read, config, name)


def trained(run):
    *_, (state, _) = train_steps(run, TrainState(run.initial))
    return state.params


@pytest.mark.slow
def test_a_run_has_the_same_bits_wherever_its_prefix_is_kept(tmp_path):
    run = run_of(layers_to_transform=(1,))
    lean = replace(run, plan=ExecutionPlan(gradient_checkpointing=True))
    places = (run, None), (run, "memory"), (run, str(tmp_path)), (run, str(tmp_path)), (lean, None)
    runs = [with_kept_prefix(run, where) for run, where in places]
    assert [run.settings["prefix"] for run in runs] == ["float32"] * 5
    wanted = trained(runs[0])
    for run in runs[1:]:
        found = trained(run)
        assert all(same_bits(found[name], wanted[name]) for name in wanted)
    half = trained(with_kept_prefix(run, "memory", "bfloat16"))
    assert not all(same_bits(half[name], wanted[name]) for name in wanted)


def test_no_prefix_is_kept_where_none_is_frozen_or_nothing_is_seen_twice():
    assert with_kept_prefix(run_of()).plan.prefix is None
    run = run_of(layers_to_transform=(1,))
    assert with_kept_prefix(run, "none").plan.prefix is None
    once = replace(run, config=replace(run.config, max_steps=1))
    assert with_kept_prefix(once).plan.prefix is None


@pytest.mark.parametrize(
    ("settings", "where", "dtype", "message"),
    [
        ({}, "memory", "float32", "found a trained lowest block, expected adapters in the last"),
        ({}, None, "float16", "found a trained lowest block"),
        ({"layers_to_transform": (1,)}, "none", "float16", "found no place for it"),
        ({"layers_to_transform": (1,)}, "memory", "int8", "'int8': expected float32, float16, bf"),
    ],
)
def test_a_prefix_that_cannot_be_kept_is_refused(settings, where, dtype, message):
    with pytest.raises(ValueError, match=message):
        with_kept_prefix(run_of(**settings), where, dtype)
