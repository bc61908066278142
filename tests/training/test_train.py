"""Training: what a step computes, and that nothing is lost, whatever ends a run."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from calculus import same_bits
from marks import others_slow
from safetensors import safe_open

import minilora as ml
from minilora.io import reference_models
from minilora.io.atomic import write_tensors
from minilora.io.errors import FormatError
from minilora.io.files import read_tensors
from minilora.io.formats.huggingface import read_model
from minilora.io.loading import MANIFEST, open_adapted, open_base, open_base_of
from minilora.spec import optim, target_modules
from minilora.spec.adalora import Importance
from minilora.spec.optim import AdamState
from minilora.spec.quantization import dequantize, quantize
from minilora.spec.variants import REGISTRY
from minilora.training import batching, checkpoints, data, evaluate, loop
from minilora.training import fit as fit_module
from minilora.training import run as run_module
from minilora.training.checkpoints import TrainState
from minilora.training.config import TrainConfig
from minilora.training.fit import FitOptions
from minilora.training.gradients import ExecutionPlan
from minilora.training.loop import Diverged, train_steps
from minilora.training.run import micro_batches, prepare, total_steps
from minilora.training.run_folder import LOG, Refused, read_log

ROOT = Path(__file__).parents[2]
PLAN = ExecutionPlan()
QUICK = TrainConfig(
    learning_rate=0.01, max_steps=6, batch_tokens=128, gradient_accumulation_steps=2, dropout=0.1
)
TIMES = ("tokens_per_second", "memory")


def run_of(config=QUICK, model="reference:llama", examples=40):
    base = open_base(model, np.dtype(config.dtype))
    name = "task:" + reference_models.tasks(base.reference)[1]
    read = data.read(name, config.task, base.tokenizer, config.max_length, seed=config.seed)
    read = replace(read, train=read.train[:examples], valid=read.valid[:10])
    return prepare(base, read, config, name)


def files(out):
    """The bytes of a run's result and its last checkpoint, and its log without the times."""
    held = {p.name: p.read_bytes() for p in out.iterdir() if p.suffix in (".safetensors", ".json")}
    last = checkpoints.saved(out / checkpoints.FOLDER)[-1]
    log = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    log = [{name: line[name] for name in line if name not in TIMES} for line in log]
    return held, last.name, last.read_bytes(), log


def fit(out, run, *, watch=None, tell=print, **options):
    return fit_module.fit(out, run, FitOptions(**options), watch, tell)


class Stop:
    """Interrupts a run after so many steps, as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def __call__(self, line, steps):
        if line["step"] == self.step:
            raise KeyboardInterrupt


def whole(tmp_path, run, **settings):
    outcome = fit(tmp_path / "whole", run, **settings)
    assert outcome.state.step == outcome.steps
    assert outcome.stop_reason == ""
    return files(tmp_path / "whole")


VARIANTS = ["lora", "lora+", "rslora", "lora-fa", "lora-bias", "dora", "pissa", "olora", "vera"]
VARIANTS += ["adalora", "dora-full", "loftq", "gaussian", "orthogonal"]
KINDS = {
    **{variant: (replace(QUICK, variant=variant), "reference:llama") for variant in VARIANTS},
    "full": (replace(QUICK, full=True, learning_rate=1e-3), "reference:llama"),
    "gpt2": (QUICK, "reference:gpt2"),
    "bert": (replace(QUICK, task="classify"), "reference:bert"),
    "float64": (replace(QUICK, dtype="float64"), "reference:llama"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", others_slow(KINDS, "lora"))
def test_an_interrupted_run_goes_on_to_the_same_bits(kind, tmp_path):
    config, model = KINDS[kind]
    wanted = whole(tmp_path, run_of(config, model), save_every=2, val_every=2)
    out = tmp_path / "parts"
    for step in (1, 3, 4):
        stopped = fit(
            out, run_of(config, model), save_every=2, val_every=2, resume=True, watch=Stop(step)
        )
        assert stopped.stop_reason == "interrupted"
        assert stopped.state.step in (step - 1, step)
    fit(out, run_of(config, model), save_every=2, val_every=2, resume=True)
    assert files(out) == wanted


def forgets_the_means(monkeypatch):
    load = checkpoints.load
    monkeypatch.setattr(
        checkpoints, "load", lambda path: replace(load(path), adam=AdamState(load(path).adam.t))
    )


def forgets_its_place(monkeypatch):
    load = checkpoints.load
    monkeypatch.setattr(checkpoints, "load", lambda path: replace(load(path), position=0))


def drops_by_the_clock(monkeypatch):
    draw = loop.drawn_dropout
    monkeypatch.setattr(
        loop, "drawn_dropout", lambda seed, *rest: draw(time.monotonic_ns() % 2**31, *rest)
    )


@pytest.mark.slow
@pytest.mark.parametrize("flaw", [forgets_the_means, forgets_its_place, drops_by_the_clock])
def test_a_run_that_goes_on_from_less_ends_elsewhere(flaw, tmp_path, monkeypatch):
    wanted = whole(tmp_path, run_of())
    flaw(monkeypatch)
    fit(tmp_path / "parts", run_of(), watch=Stop(3))
    fit(tmp_path / "parts", run_of(), resume=True)
    assert files(tmp_path / "parts") != wanted


@pytest.mark.slow
def test_adalora_goes_on_from_what_its_budget_remembers(tmp_path, monkeypatch):
    config = KINDS["adalora"][0]
    wanted, load = whole(tmp_path, run_of(config)), checkpoints.load
    # The step after the interruption is in the budget's fall.
    fit(tmp_path / "parts", run_of(config), watch=Stop(1))
    found = load(checkpoints.saved(tmp_path / "parts" / checkpoints.FOLDER)[-1]).importance
    assert found.mean.keys() == found.spread.keys() == run_of(config).initial.keys()
    assert {keep.dtype for keep in found.keep.values()} == {np.dtype(bool)}
    monkeypatch.setattr(
        checkpoints, "load", lambda path: replace(load(path), importance=Importance())
    )
    fit(tmp_path / "parts", run_of(config), resume=True)
    assert files(tmp_path / "parts") != wanted


def following(run, config=None, state=None):
    run = replace(run, config=config or run.config)
    return train_steps(run, state or TrainState(run.initial))


def states(run, **settings):
    return list(following(run, **settings))


def test_a_run_changes_nothing_in_place():
    run = run_of()
    before = {name: array.copy() for name, array in run.weights({}).items()}
    reached = states(run)
    assert [state.step for state, _ in reached] == [1, 2, 3, 4, 5, 6]
    after = run.weights({})
    assert all(same_bits(before[name], after[name]) for name in before)
    again = states(run, state=reached[2][0])
    assert [record for _, record in again] == [record for _, record in reached[3:]]


def test_a_step_is_that_of_the_whole_batch_however_it_is_divided():
    """In float64, to the rounding of a sum of as many terms as there are tokens and weights."""
    run = run_of(
        replace(QUICK, dtype="float64", dropout=0.0, gradient_accumulation_steps=100, max_steps=1)
    )
    ((divided, _),) = states(run)
    rows = [i for some in micro_batches(run.data.train, run.config, 0) for i in some]
    together = batching.batch([run.data.train[i] for i in rows], run.base.tokenizer.pad)
    _, back = ml.loss(together, run.weights({}), run.base.config, run.spec)
    g, _ = optim.clip(back(1.0), run.config.max_grad_norm)
    wanted, _ = optim.adamw(run.initial, g, AdamState(), run.config.learning_rate, weight_decay=0.0)
    # Adam's first step is η g / (|g| + ε): a relative error of g, n u of the largest term, moves
    # it by no more than η times that error over the entry's own size.
    n, u = together.ids.size * sum(w.size for w in run.initial.values()), np.finfo(float).eps / 2
    for name, array in wanted.items():
        error = n * u * abs(g[name]).max() / (abs(g[name]) + 1e-8)
        assert (abs(divided.params[name] - array) <= run.config.learning_rate * error + u).all()
    mean = {name: g_ / 2 for name, g_ in g.items()}
    other, _ = optim.adamw(
        run.initial, mean, AdamState(t=1), run.config.learning_rate, weight_decay=0.0
    )
    assert any((abs(other[name] - wanted[name]) > 1e-3).any() for name in wanted)


def test_an_epoch_visits_each_example_once_and_its_last_step_may_be_smaller():
    run = run_of(replace(QUICK, max_steps=None, num_train_epochs=2, gradient_accumulation_steps=1))
    n = len(micro_batches(run.data.train, run.config, 0))
    run = replace(run, config=replace(run.config, gradient_accumulation_steps=n - 1))
    assert total_steps(run.data.train, run.config) == 4
    reached = states(run)
    assert [record.epoch for _, record in reached] == [0, 0, 1, 1]
    labels = sum(int(e.loss_mask.sum()) for e in run.data.train)
    for epoch in (0, 1):
        assert sum(r.labels for _, r in reached if r.epoch == epoch) == labels


def test_steps_are_counted_without_making_what_each_epoch_repeats(monkeypatch):
    made = []

    def counted(*arguments):
        made.append(arguments)
        return micro_batches(*arguments)

    run = run_of()
    monkeypatch.setattr(run_module, "micro_batches", counted)
    for tokens in (64, 2048):  # in several windows, and in one
        lengths = [len(e.ids) for e in run.data.train] * 30
        config = replace(QUICK, max_steps=None, num_train_epochs=6, batch_tokens=tokens)
        several = run.data.train * 30
        made.clear()
        steps = total_steps(several, config)
        assert len(made) == (6 if sum(lengths) > 64 * tokens else 1)
        each = [len(micro_batches(several, config, epoch)) for epoch in range(6)]
        assert steps == sum(-(-n // config.gradient_accumulation_steps) for n in each)
    assert len(made) == 1


def test_warm_up_and_schedule_are_the_optimizers():
    run = run_of(replace(QUICK, warmup_steps=2, lr_scheduler="linear"))
    rates = [record.learning_rate for _, record in states(run)]
    assert rates == [0.01 * optim.schedule("linear", k, 6, 2) for k in range(6)]


def test_lora_plus_has_b_learn_faster():
    run = run_of(replace(QUICK, max_steps=1))
    ((plain, _),), ((plus, _),) = (
        states(run),
        states(run, config=replace(run.config, loraplus_lr_ratio=4.0)),
    )
    for name, start in run.initial.items():
        a, b = plain.params[name] - start, plus.params[name] - start
        assert same_bits(a, b) != name.endswith(".B") or not a.any()


def test_training_lowers_the_loss_and_a_frozen_weight_keeps_its_bits(tmp_path):
    run = run_of(replace(QUICK, max_steps=30, dropout=0.0), examples=400)
    outcome = fit(tmp_path, run, val_every=1)
    log = read_log(tmp_path / LOG)
    assert log[-1]["val_loss"] < log[0]["val_loss"] / 1.5
    base = open_base("reference:llama")
    adapted = open_adapted(base, str(tmp_path))
    for name, array in base.weights.items():
        assert same_bits(adapted.weights[name], array)
    for name, array in outcome.state.params.items():
        assert same_bits(adapted.weights[name], array)


def evaluated(base, adapter, examples):
    """The loss of what is read of a run's folder."""
    read = open_adapted(base, str(adapter), base.weights["norm.weight"].dtype)
    batches = batching.batches_of(examples, 1024, base.tokenizer.pad)
    return evaluate.mean_loss(batches, read.weights, base.config, read.tuning, PLAN).loss


@pytest.mark.parametrize("variant", others_slow(VARIANTS, "dora", "pissa"))
def test_what_is_written_of_a_variant_has_the_loss_of_what_was_trained(variant, tmp_path):
    """In float64, to the rounding of sums of as many terms as there are weights and labels."""
    run = run_of(replace(QUICK, variant=variant, dtype="float64", learning_rate=0.03))
    outcome = fit(tmp_path, run)
    wanted = read_log(tmp_path / LOG)[-1]["val_loss"]
    base = open_base_of(None, str(tmp_path), np.dtype(float))
    found = evaluated(base, tmp_path, run.data.valid)
    count = sum(int(e.loss_mask.sum()) for e in run.data.valid)
    bound = (count + sum(w.size for w in base.weights.values())) * np.finfo(float).eps
    assert abs(found / wanted - 1) <= bound
    batches = batching.batches_of(run.data.valid, 1024, base.tokenizer.pad)
    W = run.weights(run.initial)
    before = evaluate.mean_loss(batches, W, base.config, run.spec, PLAN).loss
    assert abs(before / wanted - 1) > bound
    assert outcome.state.step == 6


@pytest.mark.slow
def test_adalora_leaves_as_many_singular_values_as_the_rank_says(tmp_path):
    run = run_of(replace(QUICK, variant="adalora", rank=3, max_steps=10))
    fit(tmp_path, run)
    read = open_adapted(run.base, str(tmp_path))
    ranks = [len(E) for name, E in read.changed.items() if name.endswith(".E")]
    projections = len(target_modules.all_linear(run.base.config.linears()))
    assert sum(ranks) == 3 * projections
    assert max(ranks) <= 5
    assert len({*ranks}) > 1
    plain = TrainConfig(variant="lora", rank=3).lora_config()
    assert {round(s, 4) for s in read.tuning.scale.values()} == {round(plain.lora_alpha / 3, 4)}
    begun = fit(tmp_path / "begun", run, watch=Stop(1)).state
    assert len(begun.params["layers.0.q.A"]) == 5
    assert evaluated(run.base, tmp_path / "begun", run.data.valid) > 0


@pytest.mark.slow
def test_loftqs_base_goes_along_and_another_is_refused(tmp_path):
    run = run_of(replace(QUICK, variant="loftq"))
    fit(tmp_path, run)
    base = open_base_of(None, str(tmp_path))
    name = "layers.0.q.weight"
    quantized = dequantize(quantize(run.base.weights[name], "nf4"))
    assert same_bits(base.weights[name], quantized)
    assert same_bits(base.weights["embed.weight"], run.base.weights["embed.weight"])
    assert base.tokenizer.encode("3 4") == run.base.tokenizer.encode("3 4")
    assert open_base_of(str(tmp_path / "base"), str(tmp_path)).path == base.path
    with pytest.raises(FormatError, match=r"model: found reference:llama"):
        open_base_of("reference:llama", str(tmp_path))
    with pytest.raises(Refused):
        fit(tmp_path, run)
    fit(tmp_path, run_of(), overwrite=True)
    assert not [*(tmp_path / "base").iterdir()]
    assert open_base_of("reference:llama", str(tmp_path)).name == "reference:llama"


UNTRAINED = {name for name, entry in REGISTRY.items() if entry.untrained}


def test_a_variant_that_no_run_trains_says_why_and_what_to_take():
    for variant in UNTRAINED:
        with pytest.raises(ValueError, match=f"^variant '{variant}'"):
            TrainConfig(variant=variant)
    trained = REGISTRY.keys() - UNTRAINED
    assert all(TrainConfig(variant=variant).lora_config().variant == variant for variant in trained)
    assert trained == {*VARIANTS}


def test_a_classifiers_head_is_trained_and_saved(tmp_path):
    config, model = KINDS["bert"]
    outcome = fit(tmp_path, run_of(config, model))
    adapted = open_adapted(open_base(model), str(tmp_path))
    head = {"head.weight", "head.bias"}
    assert head <= adapted.tuning.trained == outcome.state.params.keys()
    for name in head:
        assert same_bits(adapted.weights[name], outcome.state.params[name])
        assert not same_bits(adapted.weights[name], adapted.base.weights[name])


def test_full_fine_tuning_writes_a_model_with_its_tokenizer(tmp_path):
    outcome = fit(tmp_path, run_of(*KINDS["full"]))
    c, W = read_model(tmp_path)
    assert c == open_base("reference:llama").config
    assert W.keys() == outcome.state.params.keys()
    assert all(same_bits(W[name], outcome.state.params[name]) for name in W)
    written = open_base(str(tmp_path)).tokenizer
    assert written.encode("3 4") == open_base("reference:llama").tokenizer.encode("3 4")


# What ends a run


def test_a_divergence_keeps_the_last_checkpoint_and_its_adapter(tmp_path):
    run = run_of(replace(QUICK, learning_rate=1e30, max_steps=20))
    outcome = fit(tmp_path, run, save_every=1)
    assert outcome.stop_reason.startswith(f"step {outcome.state.step + 1}: ")
    last, _ = checkpoints.newest(tmp_path / checkpoints.FOLDER)
    assert last.step == outcome.state.step == len(read_log(tmp_path / LOG))
    adapted = open_adapted(open_base("reference:llama"), str(tmp_path))
    assert all(same_bits(adapted.weights[name], array) for name, array in last.params.items())


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 100.0])
def test_a_loss_that_is_none_or_too_large_is_a_divergence(wrong, monkeypatch):
    run, gradients = run_of(), loop.gradients
    done = []

    def after_two(*arguments):
        done.append(1)
        L, g = gradients(*arguments)
        return (L + wrong if len(done) > 4 else L), g

    monkeypatch.setattr(loop, "gradients", after_two)
    reached = following(run)
    assert [next(reached)[0].step for _ in range(2)] == [1, 2]
    with pytest.raises(Diverged, match="step 3: the loss is"):
        next(reached)


@pytest.mark.slow
def test_a_full_disk_is_told_and_what_was_saved_stays(tmp_path, monkeypatch):
    wanted = whole(tmp_path, run_of(), save_every=2)
    out, written = tmp_path / "out", []
    write = Path.write_bytes

    def fails(path, content):
        written.append(path.name)
        if any(name.startswith(".step-00000004") for name in written):
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises(OSError, match="step-00000002 of 6"):
        fit(out, run_of(), save_every=2)
    monkeypatch.undo()
    names = sorted(p.name for p in (out / checkpoints.FOLDER).iterdir())
    assert names == ["step-00000000.safetensors", "step-00000002.safetensors"]
    open_adapted(open_base("reference:llama"), str(out))
    fit(out, run_of(), save_every=2, resume=True)
    assert files(out) == wanted


def test_minutes_are_an_interval_too(tmp_path, monkeypatch):
    now, written = [0.0], []
    monkeypatch.setattr(fit_module.time, "monotonic", lambda: now[0])
    save = checkpoints.save
    monkeypatch.setattr(
        checkpoints, "save", lambda folder, s: written.append(s.step) or save(folder, s)
    )

    def a_minute(line, steps):
        now[0] += 60 * ("loss" in line)

    fit(tmp_path, run_of(), save_minutes=2.5, watch=a_minute)
    assert written == [0, 4, 6]


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(tmp_path, monkeypatch):
    def closed(path, *rest, **settings):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", closed)
    monkeypatch.setattr(loop, "gradients", None)
    with pytest.raises(PermissionError, match="Permission denied"):
        fit(tmp_path / "out", run_of())
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="found a file"):
        fit(tmp_path / "file", run_of())


def test_who_looks_on_is_told_where_a_run_begins_and_each_line(tmp_path):
    told = []
    fit(tmp_path, run_of(), watch=Stop(2))
    fit(tmp_path, run_of(), watch=lambda *one: told.append(one), resume=True)
    assert told[0] == ({"step": 2}, 6)
    assert [line for line, _ in told[1:]] == read_log(tmp_path / LOG)[2:]


@pytest.mark.slow
def test_files_that_are_there_are_neither_mixed_nor_removed_unasked(tmp_path):
    fit(tmp_path, run_of(), save_every=2)
    before = files(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(Refused, match="--overwrite"):
        fit(tmp_path, run_of())
    assert files(tmp_path) == before
    other = run_of(replace(QUICK, seed=1))
    fit(tmp_path, other, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    after = files(tmp_path)
    assert after[0]["adapter_model.safetensors"] != before[0]["adapter_model.safetensors"]
    assert after == whole(tmp_path / "alone", other)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(Refused, match=r"run\.json"):
        fit(tmp_path, other, resume=True)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"learning_rate": 0.02}, "learning_rate was 0.01 and is 0.02"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"max_steps": 9}, "max_steps was 6 and is 9"),
        ({"target_modules": ["q"]}, r"target_modules was 'all-linear' and is \['q'\]"),
        (
            {"gradient_accumulation_steps": 1, "rank": 4},
            "gradient_accumulation_steps was 2 and is 1; rank was 8 and is 4",
        ),
    ],
)
def test_a_setting_that_has_changed_is_refused_by_its_name(change, found, tmp_path):
    fit(tmp_path, run_of(), watch=Stop(2))
    before = files(tmp_path)
    with pytest.raises(Refused, match=found):
        fit(tmp_path, run_of(replace(QUICK, **change)), resume=True)
    assert files(tmp_path) == before


def test_a_change_that_is_accepted_is_told_and_the_run_goes_on_from_where_it_was(tmp_path):
    fit(tmp_path, run_of(), watch=Stop(3))
    told = []
    changed = run_of(replace(QUICK, learning_rate=0.001))
    outcome = fit(tmp_path, changed, resume=True, accept_changes=True, tell=told.append)
    assert told == ["changed: learning_rate was 0.01 and is 0.001"]
    assert outcome.state.step == 6
    assert [line["step"] for line in read_log(tmp_path / LOG)] == [1, 2, 3, 4, 5, 6]


def test_data_or_a_model_that_has_changed_is_refused(tmp_path):
    run = run_of()
    fit(tmp_path, run, watch=Stop(2))
    other = replace(run, data=replace(run.data, digest="another"))
    with pytest.raises(Refused, match="the data's files"):
        fit(tmp_path, other, resume=True)
    object.__setattr__(run.base, "digest", "another")
    with pytest.raises(Refused, match="the model's files"):
        fit(tmp_path, run, resume=True)


def test_a_start_that_comes_out_otherwise_is_refused(tmp_path):
    run = run_of(replace(QUICK, variant="pissa"))
    fit(tmp_path, run, watch=Stop(2))
    moved = {name: array * np.float32(1 + 2e-7) for name, array in run.adapter.items()}
    with pytest.raises(Refused, match="adapters"):
        fit(tmp_path, replace(run, adapter=moved), resume=True)


# Checkpoints


def some_state(step=3):
    rng = np.random.default_rng(step)
    arrays = [{"q.A": rng.standard_normal((2, 3)).astype(np.float32)} for _ in range(3)]
    return TrainState(arrays[0], AdamState(step, arrays[1], arrays[2]), step, 1, 4, 567, 1 / 3)


def test_a_checkpoint_holds_the_whole_state_to_the_bit(tmp_path):
    state = some_state()
    loaded = checkpoints.load(checkpoints.save(tmp_path, state))
    assert (loaded.first_loss, loaded.adam.t) == (state.first_loss, state.adam.t)
    for count in checkpoints.COUNTS:
        assert getattr(loaded, count) == getattr(state, count)
    for mine, theirs in (
        (state.params, loaded.params), (state.adam.m, loaded.adam.m), (state.adam.v, loaded.adam.v)
    ):  # fmt: skip
        assert mine.keys() == theirs.keys()
        assert all(same_bits(mine[name], theirs[name]) for name in mine)


def test_the_last_two_checkpoints_stay(tmp_path):
    for step in (1, 2, 9, 10, 100_000_000):
        checkpoints.save(tmp_path, some_state(step))
    assert [path.name for path in checkpoints.saved(tmp_path)] == [
        "step-00000010.safetensors",
        "step-100000000.safetensors",
    ]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-5],
        lambda content: b"",
        lambda content: content.replace(b"minilora", b"minilorb"),
        lambda content: content.replace(b"params.", b"qarams."),
        lambda content: content.replace(b'"m.q', b'"m.p'),
    ],
)
def test_a_damaged_checkpoint_is_left_aside_and_the_one_before_is_taken(damage, tmp_path):
    checkpoints.save(tmp_path, some_state(1))
    last = checkpoints.save(tmp_path, some_state(2))
    last.write_bytes(damage(last.read_bytes()))
    with pytest.raises(FormatError):
        checkpoints.load(last)
    state, wrong = checkpoints.newest(tmp_path)
    assert state.step == 1
    assert [error.args[0] for error in wrong] == [last]


COUNTS = [
    *[{name: value} for name in (*checkpoints.COUNTS, "t") for value in ("2", None, [], 0.5, -1)],
    *[{name: 10**30} for name in (*checkpoints.COUNTS, "t")],
    *[{"first_loss": value} for value in ("1", None, [1.0], True)],
    *[{"step": 1}, {"t": 1}, {"epoch": 3}, {"tokens": 1}, {"position": 568}],
]


@pytest.mark.parametrize("damage", COUNTS, ids=json.dumps)
def test_counts_that_no_run_has_are_a_damage(damage, tmp_path):
    checkpoints.save(tmp_path, some_state(1))
    last = checkpoints.save(tmp_path, some_state(2))
    with safe_open(last, framework="np") as file:
        counts = json.loads(file.metadata()["minilora"])
    write_tensors(last, read_tensors(last), {"minilora": json.dumps(counts)})
    assert checkpoints.load(last).step == 2
    write_tensors(last, read_tensors(last), {"minilora": json.dumps(counts | damage)})
    state, wrong = checkpoints.newest(tmp_path)
    assert state.step == 1
    assert [error.args[:2] for error in wrong] == [(last, "metadata")]


@pytest.mark.parametrize("part", ["m", "v", "mean", "spread", "keep"])
def test_a_mean_of_another_shape_is_a_damage(part, tmp_path):
    W = {"q.A": np.ones((2, 3)), "q.E": np.ones((2, 1))}
    remembered = Importance(W, W, {"q": np.ones((2, 1), bool)})
    for step in (1, 2):
        whole = TrainState(W, AdamState(step, W, W), step, 1, 1, 99, 0.5, remembered)
        last = checkpoints.save(tmp_path, whole)
    with safe_open(last, framework="np") as file:
        metadata = file.metadata()
    A, z = f"{part}.q.A", f"{part}.z"
    dtypes = [(A, np.ones((2, 3), dtype)) for dtype in (np.float32, np.int32)]
    for name, array in [(A, np.ones((2, 4))), (z, np.ones((2, 1))), *dtypes]:
        if name != "keep.q.A":
            write_tensors(last, read_tensors(last) | {name: array}, metadata)
            state, wrong = checkpoints.newest(tmp_path)
            assert state.step == 1
            assert "means of other parameters, or of other shapes or dtypes" in str(wrong[0])
            checkpoints.save(tmp_path, whole)


def test_a_place_beyond_the_epochs_end_is_the_next_ones_beginning():
    """As where the batches are larger than those that were counted."""
    run = run_of()
    n = len(micro_batches(run.data.train, run.config, 0))
    [(beyond, _), *_] = states(run, state=TrainState(run.initial, position=n + 5))
    [(begun, _), *_] = states(run, state=TrainState(run.initial, epoch=1))
    assert (beyond.epoch, beyond.position) == (begun.epoch, begun.position)
    assert all(same_bits(beyond.params[name], array) for name, array in begun.params.items())


def test_what_a_killed_run_was_writing_is_no_checkpoint(tmp_path):
    checkpoints.save(tmp_path, some_state(1))
    half = tmp_path / ".step-00000002.safetensors.0a1b2c3d"
    half.write_bytes(b"half")
    state, wrong = checkpoints.newest(tmp_path)
    assert (state.step, wrong) == (1, [])
    checkpoints.clean(tmp_path)
    assert not half.exists()


# Processes

COMMAND = [
    *(
        "train",
        "--learning-rate",
        "0.01",
        "--max-steps",
        "60",
        "--batch-tokens",
        "64",
        "--dropout",
        "0.1",
    ),
    *("--save-every", "7", "--gradient-accumulation-steps", "2", "--max-length", "32"),
]


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """A file of sums as they run, each a line of text."""
    path, rng = tmp_path_factory.mktemp("data") / "sums.jsonl", np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(0, 11, n))) for n in rng.integers(2, 7, 50)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def started(lines, out, *more, limit=None):
    # The limit is set by the process itself: a function between fork and exec is not safe here.
    begin = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); "
    begin = (begin.format(limit) if limit else "") + "import runpy"
    begin += "; runpy.run_module('minilora', run_name='__main__')"
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            begin,
            *COMMAND,
            "--data",
            str(lines),
            "--output",
            str(out),
            *more,
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def lines_in(out):
    log = out / LOG
    return log.read_bytes().count(b"\n") if log.exists() else 0


def ended(process):
    out, err = process.communicate()
    return process.returncode, out, err


@pytest.fixture(scope="module")
def uninterrupted(lines, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    status, _, err = ended(started(lines, out))
    assert (status, err) == (0, "")
    return files(out)


def killed_at(lines, out, step, sign):
    """Starts or resumes the run and sends it a signal once its log has so many lines."""
    process = started(lines, out, "--resume")
    while lines_in(out) < step and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(sign)
    return ended(process)


@pytest.mark.slow
def test_killed_again_and_again_a_run_ends_with_the_same_bits(lines, uninterrupted, tmp_path):
    out = tmp_path / "out"
    for step in (5, 24, 41):
        status, _, _ = killed_at(lines, out, step, signal.SIGKILL)
        assert status == -signal.SIGKILL
        last, wrong = checkpoints.newest(out / checkpoints.FOLDER)
        assert wrong == []
        assert last.step >= 7 * (step // 7) - 7
        assert lines_in(out) - last.step <= 7 + 1
    assert ended(started(lines, out, "--resume"))[0] == 0
    assert files(out) == uninterrupted


@pytest.mark.slow
def test_killed_ten_times_at_random_moments_a_run_ends_with_the_same_bits(
    lines, uninterrupted, tmp_path
):
    rng, kills, runs = np.random.default_rng(), 0, 0
    while kills < 10:
        out = tmp_path / str(runs)
        process = started(lines, out, "--resume")
        time.sleep(rng.uniform(0.3, 1.2))
        process.kill()
        status, _, _ = ended(process)
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        if status == 0:  # it was done before: the next one begins anew
            assert files(out) == uninterrupted
            runs += 1
    assert ended(started(lines, out, "--resume"))[0] == 0
    assert files(out) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_the_last_step_and_says_how_to_go_on(sign, lines, uninterrupted, tmp_path):
    out = tmp_path / "out"
    status, _, err = killed_at(lines, out, 10, sign)
    assert status == 130
    last, _ = checkpoints.newest(out / checkpoints.FOLDER)
    assert f"{out}: step {last.step} of 60" in err
    assert "--resume" in err
    assert err.count("\n") == 1
    assert last.step == lines_in(out) >= 9  # the last line may be of a step that was not yet taken
    assert ended(started(lines, out, "--resume"))[0] == 0
    assert files(out) == uninterrupted


@pytest.mark.slow
def test_a_file_that_may_grow_no_more_ends_the_run_with_what_was_saved(
    lines, uninterrupted, tmp_path
):
    """The system's own refusal: files of this process may have no more bytes than the first."""
    out = tmp_path / "out"
    status, _, err = ended(started(lines, out, limit=100_000))
    assert status == 1
    assert "step-00000000 of 60" in err
    assert "--resume" in err
    names = [p.name for p in (out / checkpoints.FOLDER).iterdir()]
    assert names == ["step-00000000.safetensors"]
    assert ended(started(lines, out, "--resume"))[0] == 0
    assert files(out) == uninterrupted


MOMENTS = """
import os, sys
from pathlib import Path
from minilora.cli.main import main

def ends_at(moment):
    "The process ends, with nothing cleaned up, at its so-manieth act on the disk."
    acts = []
    def at(act, half=None):
        def instead(*given, **named):
            acts.append(act)
            if len(acts) == moment:
                if half:
                    half(*given)
                os._exit(9)
            return act(*given, **named)
        return instead
    os.replace, os.fsync = at(os.replace), at(os.fsync)
    Path.unlink = at(Path.unlink)
    write = Path.write_bytes
    Path.write_bytes = at(write, lambda path, content: write(path, content[: len(content) // 2]))

def forked(arguments, moment=0):
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if moment:
            ends_at(moment)
        os._exit(main(arguments))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

folder, command = Path(sys.argv[1]), sys.argv[2:]
assert forked([*command, str(folder / "whole")]) == 0
name = "adapter_model.safetensors"
wanted = (folder / "whole" / name).read_bytes()
moment, status = 0, 9
while status == 9:
    moment += int(os.environ["EVERY"])
    out = folder / str(moment)
    status = forked([*command, str(out)], moment)
    if status == 9:
        # Before run.json is there, nothing has begun.
        how = [] if not out.exists() or not any(out.iterdir()) else ["--resume"]
        how = ["--overwrite"] if how and not (out / "run.json").exists() else how
        again = forked([*command, str(out), *how])
        assert again == 0, (moment, how, again)
    assert (out / name).read_bytes() == wanted, moment
assert status == 0, status
print(moment)
"""


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 17])
def test_whatever_act_on_the_disk_is_the_last_the_run_ends_with_the_same_bits(
    every, lines, tmp_path
):
    command = [*COMMAND, "--max-steps", "4", "--save-every", "1", "--data", str(lines), "--output"]
    done = subprocess.run(
        [sys.executable, "-c", MOMENTS, str(tmp_path), *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "EVERY": str(every)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 30


def test_no_run_takes_the_place_of_a_model_that_no_run_wrote(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(open_base("reference:llama").path, model)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    own = run_of()
    own = replace(own, base=replace(own.base, path=model))
    with pytest.raises(Refused, match=re.escape(str(model))):
        fit(model, own, overwrite=True)
    with pytest.raises(Refused, match=r"config\.json, model\.safetensors"):
        fit(model, run_of(), overwrite=True)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


@pytest.mark.slow
def test_what_a_full_run_wrote_is_gone_and_what_is_anothers_is_not(tmp_path):
    out = tmp_path / "out"
    fit(out, run_of(replace(QUICK, full=True)))
    assert (out / "tokenizer.json").is_file()
    fit(out, run_of(), overwrite=True)
    left = {path.name for path in out.iterdir() if path.is_file()}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert left == adapter | {"README.md", "log.csv", "log.jsonl", "run.json"}
    (out / "config.json").write_text("mine")
    fit(out, run_of(), overwrite=True)
    assert (out / "config.json").read_text() == "mine"
    (out / MANIFEST).write_text("damaged")
    fit(out, run_of(), overwrite=True)
    assert (out / MANIFEST).stat().st_size > 100


@pytest.mark.slow
def test_what_is_saved_after_damaged_checkpoints_stays(tmp_path):
    fit(tmp_path, run_of(), save_every=2)
    kept = checkpoints.saved(tmp_path / checkpoints.FOLDER)
    for path in kept:
        path.write_bytes(b"damaged")
    told = []
    outcome = fit(tmp_path, run_of(), resume=True, watch=Stop(2), tell=told.append)
    assert (outcome.state.step, outcome.stop_reason) == (2, "interrupted")
    assert all(
        f"{path.name}.damaged: " in text for path, text in zip(kept[::-1], told, strict=True)
    )
    told.clear()
    fit(tmp_path, run_of(), resume=True, watch=lambda *one: told.append(one[0]["step"]))
    assert told[0] == 2
    later = checkpoints.save(tmp_path / "c", some_state(9))
    for path in (later, checkpoints.save(tmp_path / "c", some_state(8))):
        path.write_bytes(b"damaged")
    assert checkpoints.save(tmp_path / "c", some_state(1)).is_file()


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(tmp_path):
    told = []

    def watch(line, steps):
        if not told:
            with pytest.raises(Refused, match=re.escape(str(tmp_path))) as raised:
                fit(tmp_path, run_of(), overwrite=True)
            told.append(str(raised.value))

    fit(tmp_path, run_of(), watch=watch)
    assert told
    assert whole(tmp_path / "alone", run_of()) == files(tmp_path)
    fit(tmp_path, run_of(), overwrite=True)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"batch_tokens": 3}, "batch"),
        ({"variant": "adalora", "max_steps": 2}, "2 steps: expected 3 or more"),
    ],
)
def test_what_cannot_run_removes_nothing(change, found, tmp_path):
    fit(tmp_path, run_of())
    before = files(tmp_path)
    with pytest.raises(ValueError, match=found):
        fit(tmp_path, run_of(replace(QUICK, **change)), overwrite=True)
    assert files(tmp_path) == before
    with pytest.raises(ValueError, match="resume and overwrite: expected one"):
        fit(tmp_path, run_of(), resume=True, overwrite=True)


@pytest.mark.slow
def test_a_resume_that_is_refused_changes_no_setting(tmp_path):
    fit(tmp_path, run_of(), watch=Stop(2))
    said = (tmp_path / MANIFEST).read_bytes()
    with pytest.raises(Refused, match="shapes"):
        fit(tmp_path, run_of(replace(QUICK, rank=4)), resume=True, accept_changes=True)
    assert (tmp_path / MANIFEST).read_bytes() == said
    fit(tmp_path, run_of(), resume=True)


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    fit(tmp_path, run_of(), watch=Stop(2))
    for name in (".adapter_model.safetensors.0a1b2c3d", ".run.json.0a1b2c3d"):
        (tmp_path / name).write_text("half")
    fit(tmp_path, run_of(), resume=True)
    assert not [*tmp_path.glob(".*")]


def test_a_bad_expression_is_no_target():
    for wrong in ("[", "*", "layers.(0|"):
        with pytest.raises(ValueError, match="expected a name or a regular expression"):
            TrainConfig(target_modules=wrong)


def test_a_model_with_too_few_positions_is_told_before_anything_is_written():
    run = run_of(model="reference:gpt2")
    longest = max(len(e.ids) for e in run.data.train)
    few = replace(run.base, config=replace(run.base.config, positions=longest - 1))
    with pytest.raises(ValueError, match=f"an example of {longest} tokens, expected at most"):
        prepare(few, run.data, QUICK)


@pytest.mark.parametrize(
    "name", ["rank", "max_steps", "num_train_epochs", "batch_tokens", "max_length", "seed"]
)
def test_what_is_counted_is_a_whole_number(name):
    replace(QUICK, **{name: np.int64(2)})
    with pytest.raises(ValueError, match=f"^{name} 2.5"):
        replace(QUICK, **{name: 2.5})
