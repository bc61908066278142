"""A step in groups: the whole batch's loss and gradients, whatever the groups and the threads."""

import functools
from dataclasses import replace

import numpy as np
import pytest
from calculus import GRADIENT, greatest, same_bits

import minilora as ml
from minilora import steps
from minilora import strategies as draw
from minilora.ops import IGNORED
from minilora.steps import Plan, evaluate, gradients

CONFIGS = {
    "Llama": ml.Llama(vocab=11, d=5, layers=3, heads=4, ffn=7, kv_heads=2, head_dim=2, tied=True),
    "GPT-2": ml.GPT2(vocab=11, d=6, layers=2, heads=3, ffn=7, positions=9),
    "BERT": ml.Bert(vocab=11, d=6, layers=2, heads=3, ffn=7, positions=9, types=2, classes=4),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)


@functools.cache
def case(name, b=5, t=6):
    """Adapters on every projection, dropout, padding and labels that do not count."""
    return draw.draw_model(CONFIGS[name], np.random.default_rng(0), b, t)


def of(model, plan=Plan(), count=None):  # noqa: B008
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
    agree(of(model, Plan(tokens=tokens)), wanted, groups=5)
    if tokens == 1000:
        assert same(of(model, Plan(tokens=tokens)), wanted)


def test_groups_that_each_take_their_own_mean_do_not(monkeypatch):
    model = case("Llama")
    wanted, right = of(model), steps.loss
    monkeypatch.setattr(steps, "loss", lambda batch, W, c, tuning, n: right(batch, W, c, tuning))
    with pytest.raises(AssertionError):
        agree(of(model, Plan(tokens=6)), wanted, groups=5)


@EVERY
def test_threads_change_no_bit(name):
    model = case(name)
    wanted = of(model, Plan(tokens=6))
    assert all(same(of(model, Plan(threads=n, tokens=6)), wanted) for n in (2, 3, 5))
    assert not same(of(model, Plan(tokens=12)), wanted)


@EVERY
def test_products_on_several_threads_add_up_too(name):
    """One group and two threads: the library may then split the sums otherwise."""
    agree(of(case(name), Plan(threads=2)), of(case(name)), groups=1)


def test_a_part_of_a_batch_is_divided_by_the_whole():
    model = case("GPT-2")
    n = steps.counted(model.batch, model.config)
    half, whole = of(model, count=2 * n), of(model)
    agree({k: 2 * g for k, g in half.items()}, whole, groups=1)


def test_the_threads_of_products_are_as_many_as_before():
    def threads():
        return [pool["num_threads"] for pool in steps._pools(True).info()]

    before = threads()
    with steps.blas_threads(1):
        assert set(threads()) == {1}
    assert threads() == before
    of(case("Llama"), Plan(threads=2, tokens=6))
    assert threads() == before


def test_an_error_of_one_group_is_the_steps():
    model = case("Llama")
    ids = model.batch.ids.copy()
    ids[3] = 11
    wrong = replace(model, batch=replace(model.batch, ids=ids))
    with pytest.raises(ValueError, match=r"rows of embed: found .* to 11, expected 0 to 10"):
        of(wrong, Plan(threads=2, tokens=6))


@EVERY
def test_evaluation_is_the_sum_over_labels_that_count(name):
    model = case(name)
    still = replace(model, tuning=replace(model.tuning, keep={}))
    nll, n = evaluate(model.batch, model.W, model.config, model.tuning, Plan(tokens=12))
    L = np.asarray(still.loss()[0])
    assert n == steps.counted(model.batch, model.config)
    agree({"loss": nll / n}, {"loss": L}, groups=3)
    dropped = np.asarray(model.loss()[0])
    assert abs(nll / n - dropped) > 4 * GRADIENT * greatest(L)


def test_a_group_without_labels_adds_nothing():
    model = case("Llama")
    labels = model.batch.labels.copy()
    labels[:2] = IGNORED
    model = replace(model, batch=replace(model.batch, labels=labels))
    agree(of(model, Plan(tokens=6)), of(model), groups=5)
    empty = replace(model, batch=replace(model.batch, labels=np.full_like(labels, IGNORED)))
    with pytest.raises(ValueError, match="no label counts in 5 rows; leave this batch out"):
        of(empty)
    with pytest.raises(ValueError, match="no label counts"):
        of(model, count=0)


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"tokens": -1}])
def test_a_plan_without_threads_or_tokens_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value}: expected at least 1"):
        Plan(**wrong)


def test_memory_is_kept_warm_where_the_library_can(monkeypatch):
    set_options = []

    class Library:
        @staticmethod
        def mallopt(option, value):
            set_options.append(option)
            return 1

    monkeypatch.setattr(steps.ctypes, "CDLL", lambda name: Library)
    assert steps.warm_memory()
    assert set_options == [steps.M_MMAP_THRESHOLD, steps.M_TRIM_THRESHOLD]
    monkeypatch.setattr(steps.ctypes, "CDLL", lambda name: object())
    assert not steps.warm_memory()
