"""A step in groups: the whole batch's loss and gradients, whatever the groups and the threads."""

import functools
import re
from dataclasses import replace

import numpy as np
import pytest
from calculus import GRADIENT, greatest, same_bits
from zoo import MODELS

import minilora as ml
from minilora import testing as draw
from minilora.spec import blocks, ops
from minilora.spec.ops import IGNORED
from minilora.training import attention, checkpointing, chunked_head, dropout, memory
from minilora.training import gradients as module
from minilora.training import threads as thread_module
from minilora.training.gradients import ExecutionPlan, evaluate, gradients

CONFIGS = {
    "Llama": replace(MODELS["Llama, tied"], vocab=11, layers=3),
    "GPT-2": MODELS["GPT-2"],
    "BERT": MODELS["BERT"],
}
EVERY = pytest.mark.parametrize("name", CONFIGS)


@functools.cache
def case(name, b=5, t=6):
    """Adapters on every projection, dropout, padding and labels that do not count."""
    return draw.draw_model(CONFIGS[name], np.random.default_rng(0), b, t)


def of(model, plan=ExecutionPlan(), count=None):  # noqa: B008
    L, g = gradients(model.batch, model.W, model.config, model.tuning, plan, count)
    return {"loss": np.asarray(L)} | g


def same(found, wanted):
    return found.keys() == wanted.keys() and all(same_bits(found[k], wanted[k]) for k in wanted)


def agree(found, wanted, groups):
    """Equal but for an error of GRADIENT for each group and for the whole."""
    assert found.keys() == wanted.keys()
    bound = (1 + groups) * GRADIENT * max(map(greatest, wanted.values()))
    assert all(greatest(found[k] - wanted[k]) <= bound for k in wanted)


@EVERY
@pytest.mark.parametrize("tokens", [1, 12, 17, 1000])
def test_groups_add_up_to_the_batch(name, tokens):
    model = case(name)
    L, back = model.loss()
    wanted = {"loss": np.asarray(L)} | back(1.0)
    agree(of(model, ExecutionPlan(tokens=tokens)), wanted, groups=5)
    if tokens == 1000:
        assert same(of(model, ExecutionPlan(tokens=tokens)), wanted)


def test_groups_that_each_take_their_own_mean_do_not(monkeypatch):
    model = case("Llama")
    wanted, right = of(model), module.loss
    monkeypatch.setattr(module, "loss", lambda batch, W, c, tuning, *_: right(batch, W, c, tuning))
    with pytest.raises(AssertionError):
        agree(of(model, ExecutionPlan(tokens=6)), wanted, groups=5)


@EVERY
def test_threads_change_no_bit(name):
    model = case(name)
    wanted = of(model, ExecutionPlan(tokens=6))
    assert all(same(of(model, ExecutionPlan(threads=n, tokens=6)), wanted) for n in (2, 3, 5))
    assert not same(of(model, ExecutionPlan(tokens=12)), wanted)


@EVERY
def test_products_on_several_threads_add_up_too(name):
    """One group and two threads: the library may then split the sums otherwise."""
    agree(of(case(name), ExecutionPlan(threads=2)), of(case(name)), groups=1)


@pytest.mark.parametrize(
    ("b", "t", "d", "tokens", "sizes"),
    [
        (8, 128, 128, None, [2, 3, 3]),  # 3 of 128 tokens: 384, and 128 wide, 3 * 2**14 entries
        (4, 256, 384, None, [1, 1, 1, 1]),
        (4, 32, 32, None, [4]),
        (7, 64, 999, None, [3, 4]),  # at least 256 tokens, and no group much smaller than others
        (7, 64, 999, 128, [1, 2, 2, 2]),
        (2, 999, 999, 1, [1, 1]),
    ],
)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_groups_have_so_many_tokens_and_as_many_as_one_another(b, t, d, tokens, sizes, threads):
    ids = np.zeros((b, t), int)
    c = replace(CONFIGS["Llama"], d=d)
    rows = module.groups(ml.Batch(ids, labels=ids), c, ExecutionPlan(threads, tokens))
    if d == 128 and threads > 1:
        sizes = [4, 4]  # 2**16 entries, since threads call in turn
    assert [each.stop - each.start for each in rows] == sizes
    assert [i for each in rows for i in range(b)[each]] == list(range(b))


def test_a_part_of_a_batch_is_divided_by_the_whole():
    model = case("GPT-2")
    n = module.counted(model.batch, model.config)
    half, whole = of(model, count=2 * n), of(model)
    agree({k: 2 * g for k, g in half.items()}, whole, groups=1)


def test_the_threads_of_products_are_as_many_as_before():
    def threads():
        return [pool["num_threads"] for pool in thread_module._pools(True).info()]

    before = threads()
    with thread_module.blas_threads(1):
        assert set(threads()) == {1}
    assert threads() == before
    of(case("Llama"), ExecutionPlan(threads=2, tokens=6))
    assert threads() == before


def test_an_error_of_one_group_is_the_steps():
    model = case("Llama")
    ids = model.batch.ids.copy()
    ids[3] = 11
    wrong = replace(model, batch=replace(model.batch, ids=ids))
    with pytest.raises(ValueError, match=r"ids: found .* to 11, expected 0 to 10"):
        of(wrong, ExecutionPlan(threads=2, tokens=6))


@EVERY
def test_evaluation_is_the_sum_over_labels_that_count(name):
    model = case(name)
    still = replace(model, tuning=replace(model.tuning, dropout_scale={}))
    nll, n = evaluate(model.batch, model.W, model.config, model.tuning, ExecutionPlan(tokens=12))
    L = np.asarray(still.loss()[0])
    assert n == module.counted(model.batch, model.config)
    agree({"loss": nll / n}, {"loss": L}, groups=3)
    dropped = np.asarray(model.loss()[0])
    assert abs(nll / n - dropped) > 4 * GRADIENT * greatest(L)


def test_a_group_without_labels_adds_nothing():
    model = case("Llama")
    labels = model.batch.labels.copy()
    labels[:2] = IGNORED
    model = replace(model, batch=replace(model.batch, labels=labels))
    agree(of(model, ExecutionPlan(tokens=6)), of(model), groups=5)
    empty = replace(model, batch=replace(model.batch, labels=np.full_like(labels, IGNORED)))
    with pytest.raises(ValueError, match="no label counts in 5 rows"):
        of(empty)
    with pytest.raises(ValueError, match="no label counts"):
        of(model, count=0)
    one = np.full_like(labels, IGNORED)
    one[3, 4] = labels[3, 4]
    model = replace(model, batch=replace(model.batch, labels=one))
    L, back = model.loss()
    agree(of(model), {"loss": np.asarray(L)} | back(1.0), groups=1)


def test_products_keep_their_threads_inside_as_many():
    def threads():
        return {pool["num_threads"] for pool in thread_module._pools(True).info()}

    with thread_module.blas_threads(1):
        with thread_module.blas_threads(1):
            assert threads() == {1}
        with thread_module.blas_threads(2), thread_module.blas_threads(1):
            assert threads() == {1}
        with pytest.raises(ValueError, match="of the work"), thread_module.blas_threads(2):
            raise ValueError("of the work")
        with thread_module.blas_threads(1):
            assert threads() == {1}


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"tokens": -1}])
def test_a_plan_without_threads_or_tokens_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} {value}"):
        ExecutionPlan(**wrong)


def test_freed_memory_is_kept_where_the_library_can(monkeypatch):
    set_options = []

    class Library:
        @staticmethod
        def mallopt(option, value):
            set_options.append(option)
            return 1

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Library)
    assert memory.keep_freed_memory()
    assert set_options == [memory.M_MMAP_THRESHOLD, memory.M_TRIM_THRESHOLD]
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert not memory.keep_freed_memory()


@EVERY
@pytest.mark.parametrize("below", ["", "layers.1", "head"])
def test_recomputation_changes_no_bit(name, below):
    """Everything trained, or nothing below the second block, or below the head."""
    model = case(name)
    names = frozenset(n for n in model.tuning.trained if n.startswith(below)) or frozenset(
        n for n in model.tuning.trained if re.match(r"layers\.1", n)
    )
    model = replace(model, tuning=replace(model.tuning, trained=names))
    wanted = of(model, ExecutionPlan(tokens=12))
    assert wanted.keys() == names | {"loss"}
    assert same(of(model, ExecutionPlan(tokens=12, gradient_checkpointing=True)), wanted)


def runs_of_blocks(model, **plan):
    """How often each block's forward runs in a step."""
    runs = []

    def counting(op, x, at, *arguments):
        runs.append(at)
        return right(op, x, at, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        right = blocks.normalise
        patch.setattr(blocks, "normalise", counting)
        of(model, ExecutionPlan(**plan))
    return [runs.count(f"layers.{i}.norm1") for i in range(model.config.layers)]


def test_recomputation_runs_what_is_trained_twice_and_what_is_constant_once():
    model = case("Llama")
    assert runs_of_blocks(model) == [1, 1, 1]
    assert runs_of_blocks(model, gradient_checkpointing=True) == [2, 2, 2]
    upper = frozenset(n for n in model.tuning.trained if not n.startswith("layers.0"))
    model = replace(model, tuning=replace(model.tuning, trained=upper))
    assert runs_of_blocks(model, gradient_checkpointing=True) == [1, 2, 2]


def test_below_constant_blocks_dx_is_zero():
    x, dy = np.random.default_rng(0).standard_normal((2, 3, 4))
    for constant in (0, 1, 2):
        y, back = checkpointing.stack(
            x, 2, lambda x, at: (2 * x, lambda dy: (2 * dy, {})), constant
        )
        dx, none = back(dy)
        assert same_bits(y, 4 * x)
        assert same_bits(dx, 0 * dy + 0.0 if constant else 4 * dy)
        assert none == {}


@EVERY
def test_what_is_trained_below_a_constant_block_has_its_gradient(name):
    """A table, BERT's first norm, the last norm: whatever a block may be under or over."""
    model = draw.draw_model(CONFIGS[name], np.random.default_rng(0), 3, 4, train_base=True)
    every = of(model)
    for at in {"embed.weight", "norm.weight", "layers.1.norm1.weight", "head.A"} & every.keys():
        tuning = replace(model.tuning, trained=frozenset({at}))
        assert same_bits(of(replace(model, tuning=tuning))[at], every[at])


@EVERY
@pytest.mark.parametrize("lowest", [0, 1])
@pytest.mark.parametrize("bare", [(), (".k.A", ".o.A", ".qkv.A")])
def test_no_gradient_flows_below_what_reads_a_constant(name, lowest, bare, monkeypatch):
    """The gradients keep their bits, and none of the input is formed, beside an adapter or bare."""
    model, first = case(name), f"layers.{lowest}."
    adapters = {at: w for at, w in model.W.items() if not at.endswith(bare)} if bare else model.W
    model = replace(model, W=adapters)
    trained = frozenset(
        at for at in model.tuning.trained & model.W.keys() if at.startswith("layers.")
    )
    trained -= {at for at in trained if "norm1" in at or (lowest and at.startswith("layers.0."))}
    model = replace(model, tuning=replace(model.tuning, trained=trained))
    found, asked = of(model), []
    right = blocks.project

    def watched(x, at, W, tuning):
        y, back = right(x, at, W, tuning)

        def kept(dy):
            dx, g = back(dy)
            asked.append((at, dx is checkpointing.ZERO))
            return dx, g

        return y, kept

    monkeypatch.setattr(blocks, "project", watched)
    assert same(of(model), found)
    spared = {at for at, none in asked if none}
    assert spared == {first + at for at in checkpointing.FIRST if f"{first}{at}.weight" in model.W}
    monkeypatch.setattr(
        checkpointing, "constant_inputs", lambda layers, causal, trained: frozenset()
    )
    asked.clear()
    assert same(of(model), found)
    assert not any(none for _, none in asked)


@pytest.mark.parametrize("also", ["embed.weight", "norm.weight", "layers.1.norm1.weight"])
@pytest.mark.parametrize("causal", [True, False])
def test_what_is_trained_below_makes_an_input_vary(also, causal):
    """A causal model's outer norm is above the blocks, BERT's below them."""
    trained = {"layers.1.q.A", "layers.2.v.B", "head.A"}
    wanted = {f"layers.1.{at}" for at in checkpointing.FIRST}
    above = causal and also == "norm.weight"
    assert checkpointing.constant_inputs(3, causal, frozenset(trained)) == wanted
    assert (
        checkpointing.constant_inputs(3, causal, frozenset(trained | {"layers.2.norm1.weight"}))
        == wanted
    )
    found = checkpointing.constant_inputs(3, causal, frozenset(trained | {also}))
    assert found == (wanted if above else frozenset())


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_no_block_has_a_backward_for_the_last_norm_alone(name):
    model = case(name)
    tuning = replace(model.tuning, trained=frozenset({"norm.weight"}))
    layers = model.config.layers
    assert checkpointing.lowest_block(layers, True, tuning.trained) == layers


@EVERY
def test_logits_in_blocks_add_up(name, monkeypatch):
    model = case(name)
    wanted = of(model)
    formed, right = [], chunked_head.cross_entropy

    def counting(z, *arguments):
        formed.append(z.shape[1])
        return right(z, *arguments)

    monkeypatch.setattr(chunked_head, "LOGITS", 33)
    monkeypatch.setattr(chunked_head, "COLUMNS", 1)
    monkeypatch.setattr(chunked_head, "cross_entropy", counting)
    found = of(model)
    agree(found, wanted, groups=len(formed))
    counted = module.counted(model.batch, model.config)
    if name == "BERT":  # 5 rows of 4 classes
        assert formed == [5]
    else:
        assert sum(formed) == counted
        assert max(formed) <= 3


@EVERY
def test_queries_in_blocks_attend_to_the_same(name, monkeypatch):
    model = case(name)
    wanted, shapes, right = of(model), [], ops.softmax

    def watching(z):
        shapes.append(z.shape[-2:])
        return right(z)

    monkeypatch.setattr(ops, "softmax", watching)
    monkeypatch.setattr(attention, "QUERIES", 4)
    agree(of(model), wanted, groups=1)
    hidden = model.config.causal
    assert set(shapes) == ({(4, 4), (6, 2)} if hidden else {(6, 4), (6, 2)})


def dropping(model, step=3, p=0.25, seed=1):
    keep = dropout.drawn_dropout(seed, step, p, model.batch, model.config, model.tuning, float)
    return replace(model, tuning=replace(model.tuning, dropout_scale=keep))


@EVERY
def test_drawn_masks_are_those_of_their_sequences_however_the_batch_is_cut(name):
    model = dropping(case(name))
    held = replace(
        model, tuning=replace(model.tuning, dropout_scale=dict(model.tuning.dropout_scale))
    )
    assert held.tuning.dropout_scale.keys() == {at for at in model.tuning.scale if at != "embed"}
    for plan in (
        ExecutionPlan(),
        ExecutionPlan(tokens=12),
        ExecutionPlan(tokens=6, threads=2),
        ExecutionPlan(gradient_checkpointing=True),
    ):
        assert same(of(model, plan), of(held, plan))
    for other in (dropping(model, step=4), dropping(model, seed=2), dropping(model, p=0.26)):
        assert not same(of(other), of(model))


def test_masks_keep_their_share_and_differ_between_rows_modules_and_steps():
    model = case("Llama", b=40, t=50)
    p, keep = 0.25, dropping(model).tuning.dropout_scale
    for K in (keep["layers.0.q"], keep["layers.2.down"]):
        assert set(np.unique(K)) == {0, 1 / (1 - p)}
        share = (K > 0).mean()
        assert abs(share - (1 - p)) < 6 * (p * (1 - p) / K.size) ** 0.5
    one, *others = (
        keep["layers.0.q"][:, :50],
        keep["layers.0.q"][:, 50:100],
        keep["layers.0.k"][:, :50],
        dropping(model, step=4).tuning.dropout_scale["layers.0.q"][:, :50],
    )
    assert not any(np.array_equal(one, other) for other in others)
    assert dropout.drawn_dropout(0, 0, 0.0, model.batch, model.config, model.tuning, float) == {}
    assert len(keep) == len(list(keep)) == 21
    assert "embed" not in keep


@pytest.mark.parametrize("wrong", [{"p": 1.0}, {"p": -0.1}, {"seed": -1}, {"step": -1}])
def test_rates_and_seeds_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="expected a rate"):
        dropping(case("Llama"), **wrong)


def test_what_is_free_is_released_where_activations_are_recomputed(monkeypatch):
    trims = []

    class Library:
        malloc_trim = trims.append

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Library)
    of(case("Llama"))
    assert trims == []
    of(case("Llama"), ExecutionPlan(gradient_checkpointing=True))
    assert trims == [0]
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    of(case("Llama"), ExecutionPlan(gradient_checkpointing=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_what_numpy_was_told_of_overflows_holds_in_each_thread(threads):
    def work(part):
        return np.geterr()["over"]

    for told in ("ignore", "raise"):
        with np.errstate(over=told):
            assert [*thread_module.in_order(work, [slice(0, 1), slice(1, 2)], threads)] == [
                told
            ] * 2
