"""A study of a real model: its own text, how far it goes from it, and two rounds of runs."""

import json
import math
import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from extras import needs
from scipy.special import log_softmax

from minilora.cli.main import main
from minilora.io.formats import huggingface
from minilora.spec.initialization import draw_weights
from minilora.spec.lora import TrainableSpec
from minilora.spec.models import Batch, Llama
from minilora.studies.claims import page
from minilora.studies.claims import results as results_module
from minilora.studies.claims import study as study_module
from minilora.studies.claims.charts import Axis
from minilora.studies.claims.page import from_base, html, learns, scaled
from minilora.studies.claims.results import Results, jobs_within
from minilora.studies.claims.study import (
    FULL,
    REAL,
    SMOL,
    Asked,
    Course,
    Look,
    Side,
    divergence,
    follow,
    own_texts,
    run_of,
    sides_of,
    states,
    studied_model,
    topics,
)
from minilora.studies.claims.verdicts import as_json, notes, verdicts

needs_text = needs("tokenizers")
C = Llama(vocab=0, d=16, layers=1, heads=2, ffn=32, kv_heads=1, head_dim=8, tied=True)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The real model's study in small, of a model that was drawn and knows nothing."""
    import tokenizer_folders

    folder = tokenizer_folders.write(tmp_path_factory.mktemp("real"), "byte level")
    c = replace(C, vocab=len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]))
    W = draw_weights(c, np.random.default_rng(0), 0.3)
    huggingface.write_model(folder, c, {name: w.astype(np.float32) for name, w in W.items()})
    return replace(
        SMOL, path=str(folder), ranks=(1, 2), rates=(0.003, 0.01), tokens=32, length=16,
        lora_rates=((0.01, 0.1), (0.02, 0.2)), seeds=(0, 1), steps=3, looks=(0, 1, 3), rounds=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(study):
    return study_module.model_of(study, REAL)


@pytest.fixture(scope="module")
def own(study, base):
    return own_texts(base, study)


@pytest.fixture(scope="module")
def results(study):
    reference = study_module.Study(
        models=("gpt2",), ranks=(1, 2), rates=(0.003, 0.01), seeds=(0, 1), steps=1, looks=(0, 1),
        tokens=64, rounds=2, real=study,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:  # other processes would read the text anew
        in_order = lambda work, items, *_: enumerate(map(work, items))  # noqa: E731
        patched.setattr(results_module, "in_processes", in_order)
        return results_module.measure(reference, 1)


def test_the_divergence_of_the_next_tokens_adds_up_to_that_of_the_sequences():
    """Over all sequences of three tokens, drawn from p₀; the other way round it is another."""
    v, rng = 4, np.random.default_rng(0)
    W = {"head.weight": np.eye(v)}
    before = [(), *product(range(v), repeat=1), *product(range(v), repeat=2)]
    z0, z = ({known: rng.standard_normal(v) for known in before} for _ in range(2))

    def of(logits, x):
        """The logits after each beginning of x."""
        return np.stack([logits[x[:i]] for i in range(len(x) + 1)], axis=1)

    def log_p(logits, x):
        return sum(log_softmax(logits[x[:i]])[x[i]] for i in range(len(x)))

    there, back, direct, size = 0.0, 0.0, 0.0, 0.0
    for x in product(range(v), repeat=2):
        p0 = math.exp(log_p(z0, x))
        there += p0 * 2 * divergence(of(z0, x), W, of(z, x), W, TrainableSpec(), 3)
        back += p0 * 2 * divergence(of(z, x), W, of(z0, x), W, TrainableSpec(), 3)
        direct += p0 * (log_p(z0, x) - log_p(z, x))
        size += p0 * (abs(log_p(z0, x)) + abs(log_p(z, x)))
    # Sums of v and of v² terms whose logarithms and exponentials round once more each.
    bound = (v**2 + 8 * v) * np.finfo(float).eps * size
    assert abs(there - direct) <= bound
    assert abs(back - direct) > bound


def test_only_places_with_a_next_token_count():
    """The last place of each sequence, whose next token is none of it, may be anything."""
    rng = np.random.default_rng(1)
    W = {"head.weight": np.eye(3)}
    h0, h = rng.standard_normal((2, 3, 8))
    other = h.copy()
    other[:, [3, 7]] += 1
    first = divergence(h0, W, h, W, TrainableSpec(), 4)
    assert divergence(h0, W, other, W, TrainableSpec(), 4) == first > 0
    other[:, 2] += [1, 0, 0]
    assert divergence(h0, W, other, W, TrainableSpec(), 4) != first


def surprise(base, texts):
    """How many standard deviations the texts' loss is from the entropy of the base's own text."""
    batch = Batch(np.array(texts).reshape(-1, len(texts[0][0])))
    h = states(batch, base.weights, base.config, TrainableSpec())
    z = base.weights["embed.weight"].astype(float) @ h
    log_p = log_softmax(z, axis=0).reshape(len(z), *batch.ids.shape)[:, :, :-1]
    entropy = -(np.exp(log_p) * log_p).sum(0)
    variance = (np.exp(log_p) * log_p**2).sum(0) - entropy**2
    rows, places = np.indices(entropy.shape)
    losses = -log_p[batch.ids[:, 1:], rows, places]
    return (losses - entropy).sum() / math.sqrt(variance.sum())


@needs_text
def test_the_own_text_has_the_entropy_of_the_base(study, base, own, monkeypatch):
    assert abs(surprise(base, own)) < 4
    cold = study_module.Sampling(temperature=0.7)
    monkeypatch.setattr(study_module, "Sampling", lambda temperature: cold)
    assert surprise(base, own_texts(base, study)) < -4


@needs_text
def test_every_seed_has_a_text_of_its_own(study, base, own):
    assert [len(texts) for texts in own] == [study_module.OWN] * len(study.seeds)
    rows = [row for texts in own for row in texts]
    assert len(set(rows)) == len(rows)
    assert {(len(row), row[0]) for row in rows} == {(study.length, base.tokenizer.bos)}
    assert own_texts(base, study) == own


@needs_text
def test_the_text_held_out_is_not_trained_on(study, base):
    data = topics(base, study.length, 0)
    texts = [{tuple(e.ids) for e in part} for part in (data.train, data.valid, data.test)]
    assert [len(data.valid), len(data.test)] == [study_module.HELD] * 2
    assert {len(row) for some in texts for row in some} == {study.length}
    again, other = topics(base, study.length, 0), topics(base, study.length, 1)
    assert all((a.ids == b.ids).all() for a, b in zip(data.test, again.test, strict=True))
    assert texts[2] != {tuple(e.ids) for e in other.test}
    whole = sorted(tuple(e.ids) for part in (data.train, data.valid, data.test) for e in part)
    assert whole == sorted(
        tuple(e.ids) for part in (other.train, other.valid, other.test) for e in part
    )
    with pytest.raises(ValueError, match=r"0 sequences of 10000000 tokens: expected 72 or more"):
        topics(base, 10**7, 0)


@needs_text
@pytest.mark.parametrize("side", [FULL, Side(2)], ids=lambda side: side.name)
def test_every_side_begins_where_the_base_is(side, study, own):
    """B is zero, so that nothing has diverged, to the bit; a B that is not has."""
    subject = studied_model(study, REAL, 0, own[0])
    run = run_of(subject, study, side)
    W = run.weights(run.initial)
    assert (subject.first(W, run.spec), subject.second(W, run.spec)) == subject.begin
    assert subject.begin[0] == 0
    moved = run.weights({name: w + np.float32(0.01) for name, w in run.initial.items()})
    assert subject.first(moved, run.spec) > 0
    assert subject.second(moved, run.spec) != subject.begin[1]


@needs_text
def test_a_run_learns_the_text_and_forgets_its_own(study, own):
    asked = Asked(replace(study, steps=30, looks=(0, 10, 30)), REAL, FULL, 0.01, 0, own[0])
    course = follow(asked)
    assert course.why == ""
    a, b, c = course.looks
    assert a.second > b.second > c.second
    assert a.first == 0 < b.first < c.first
    assert follow(asked) == course


@needs_text
def test_every_rate_is_run_with_the_seeds_that_tune_and_the_best_with_the_others(results, study):
    runs = [run for run in results.courses if run.model == REAL]
    sides = sides_of(study, C)
    assert sides == [FULL, Side(1), Side(2)]
    tuned = {(side, lr, 0) for side in sides for lr in study.rates_of(side)}
    best = {(side, results.rate(REAL, side), 1) for side in sides}
    assert {(run.side, run.lr, run.seed) for run in runs} == tuned | best
    assert len(runs) == len(tuned | best)
    assert {len(results.best(REAL, side)) for side in sides} == {2}
    assert {cost.side for cost in results.costs if cost.model == REAL} == set(sides)


@needs_text
def test_the_verdicts_and_the_page_have_the_real_model(results, study):
    judged = {verdict.claim.key: verdict for verdict in verdicts(results)}
    for key, verdict in judged.items():
        names = [case.name for case in verdict.cases if case.name.startswith(REAL)]
        wanted = {"layers": 0, "rank": 1}.get(key, len(study.ranks))
        assert len(names) == wanted, key
    (rate, _) = (c for c in judged["rate"].cases if c.name.startswith(REAL))
    assert rate.supports is None
    alone = replace(results, studies=results.studies[1:])
    assert judged.keys() - {verdict.claim.key for verdict in verdicts(alone)} == {"layers"}
    text = html(results, [*judged.values()])
    assert text.count(">first task: divergence<") == 2
    assert text.count("<figure>") == 2 * (5 + 1)
    said = as_json(results, [*judged.values()]).decode()
    assert study.path not in said + text
    assert [one["models"] for one in json.loads(said)["studies"]] == [["gpt2"], [REAL]]
    assert any("decide nothing about the claim on rates" in note for note in notes(results))
    both = replace(
        results, studies=(results.studies[0], replace(results.studies[1], tuning=(0, 1)))
    )
    assert not any("decide nothing" in note for note in notes(both))


def test_a_side_is_tuned_by_its_own_rates_and_the_seeds_that_tune():
    """With the other seed alone the other rate would have been the better one."""

    def course(side, lr, seed, valid):
        return Course(REAL, side, lr, seed, (Look(0, 0.0, 1.0), Look(20, 0.1, valid)), valid)

    study = replace(SMOL, rates=(0.1, 0.2), lora_rates=((1.0, 2.0), (3.0, 4.0)), seeds=(0, 1))
    runs = [
        course(side, lr, seed, 0.5 + (seed if i == 0 else 0.1))
        for side in (FULL, Side(2), Side(16))
        for i, lr in enumerate(study.rates_of(side))
        for seed in study.seeds
    ]
    results = Results((study,), tuple(runs), ())
    rates = [results.rate(REAL, side) for side in (FULL, Side(2), Side(16))]
    assert rates == [0.1, 1.0, 3.0]
    every = replace(results, studies=(replace(study, tuning=()),))
    assert [every.rate(REAL, side) for side in (FULL, Side(2), Side(16))] == [0.2, 2.0, 4.0]
    assert len(results.tuning(REAL, FULL, 0.1)) == 1
    assert len(results.at(REAL, FULL, 0.1)) == 2


def test_so_many_processes_as_the_memory_has_room_for():
    whole = results_module.COPIES * 100
    assert [jobs_within(memory, 100, 4) for memory in (whole - 1, whole, 3 * whole - 1)] == [
        1,
        1,
        2,
    ]
    assert jobs_within(100 * whole, 100, 4) == jobs_within(None, 100, 4) == 4
    assert jobs_within(whole, 100, 0) == 0  # which is refused, and not mended
    memory = results_module.machine_memory()
    assert memory is None or memory > 2**20


def test_a_picture_of_a_real_model_begins_at_zero():
    looks = (Look(0, 0.0, 3.5), Look(20, 0.1, 3.0))
    seen = from_base(Course(REAL, FULL, 0.1, 0, looks, 3.1))
    assert seen.looks == (Look(0, 0.0, 0.0), Look(20, 0.1, -0.5))


def test_a_rate_that_learns_nothing_squeezes_no_picture(monkeypatch):
    """A run that ends far above the base, and one that diverges, are left out or drawn at it."""
    looks = (Look(0, 0.0, 3.5), Look(20, 0.1, 3.0))
    good = Course(REAL, FULL, 0.1, 0, looks, 3.1)
    bad = replace(good, lr=0.2, looks=(looks[0], Look(20, 77.0, 99.0)), valid=99.0)
    gone = replace(good, lr=0.2, why="step 2: the loss is inf", valid=math.inf)
    assert [learns(course) for course in (good, bad, gone)] == [True, False, False]
    study = replace(SMOL, rates=(0.1, 0.2), lora_rates=((0.1, 0.2), (0.1, 0.2)))
    sides = sides_of(study, C)
    for other in (bad, gone):
        runs = tuple(replace(run, side=side) for side in sides for run in (good, other))
        drawn = "".join(page._learning(Results((study,), runs, ()), REAL))
        marks = re.findall(r">(-?[\d.]+)</text>", drawn)
        assert marks
        assert max(map(float, marks)) <= 21  # steps + 1
    monkeypatch.setattr(page, "learns", lambda course: True)
    runs = tuple(replace(run, side=side) for side in sides for run in (good, bad))
    drawn = "".join(page._learning(Results((study,), runs, ()), REAL))
    assert max(map(float, re.findall(r">(-?[\d.]+)</text>", drawn))) > 21


def test_an_axis_has_three_ticks_or_more():
    for low, high in ((-3.96, -3.05), (0.0, 0.98), (0.0, 1.0), (-0.5, 0.5), (3.07, 3.5)):
        marks = Axis("x").marks(low, high)
        assert 3 <= len(marks) <= 7
        assert low <= marks[0] < marks[-1] <= high


def test_a_number_is_short():
    assert [scaled(x, "B") for x in (0, 999, 1500, 2.5e6, 4.486e9)] == [
        "0 B", "999 B", "1.5 kB", "2.5 MB", "4.486 GB"
    ]  # fmt: skip


def test_the_command_says_which_study(monkeypatch):
    asked = []

    def measure(study, *_):
        asked.append(study)
        raise KeyboardInterrupt

    monkeypatch.setattr(results_module, "measure", measure)
    for more in ([], ["--reference-only"], ["--quick"]):
        main(["claims", *more])
    assert asked == [study_module.WHOLE, study_module.Study(), study_module.QUICK]
    assert [study.real for study in asked] == [SMOL, None, None]
