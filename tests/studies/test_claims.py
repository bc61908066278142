"""The claims: what is measured is what it says it is, and a verdict follows its figures."""

import html.parser
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minilora.cli.console import INTERRUPTED
from minilora.cli.main import main
from minilora.io import reference_models, synthetic_data
from minilora.spec.lora import TrainableSpec
from minilora.spec.optim import AdamState, adamw
from minilora.studies.claims import costs
from minilora.studies.claims import results as results_module
from minilora.studies.claims import study as study_module
from minilora.studies.claims import verdicts as verdicts_module
from minilora.studies.claims.charts import Axis, Line, chart
from minilora.studies.claims.costs import Cost, inference_of, memory_of, products_of
from minilora.studies.claims.page import html as page_of
from minilora.studies.claims.results import Results
from minilora.studies.claims.study import (
    FULL,
    SMOL,
    WHOLE,
    Asked,
    Course,
    Look,
    Side,
    Study,
    follow,
    run_of,
    sides_of,
    studied_model,
)
from minilora.studies.claims.verdicts import (
    CLAIMS,
    HOLDS,
    NOT,
    UNDECIDED,
    WHEN,
    Interval,
    crossing,
    exact,
    judge,
    notes,
    over,
    table,
    verdicts,
)
from minilora.training.batching import batches_of
from minilora.training.gradients import gradients

TINY = Study(
    models=("gpt2",), ranks=(1, 2), rates=(0.003, 0.01), seeds=(0, 1), steps=3, looks=(0, 1, 3),
    tokens=64, rounds=2,
)  # fmt: skip
BY_KEY = {claim.key: claim for claim in CLAIMS}


@pytest.fixture(scope="module")
def results():
    return results_module.measure(TINY, 1)


@pytest.fixture(scope="module")
def subject():
    return studied_model(TINY, "gpt2")


def course(side, seed, first, second, lr=0.01, valid=None):
    """A run from (0, 1) to these losses, in a straight line."""
    looks = Look(0, 0.0, 1.0), Look(10, first / 2, (1 + second) / 2), Look(100, first, second)
    return Course("m", side, lr, seed, looks, second if valid is None else valid)


def cost(side, scale):
    """The cost of full fine-tuning, times a number."""
    memory = dict.fromkeys(costs.PARTS, int(1000 * scale))
    seconds = tuple(scale * s for s in (1.0, 1.01, 1.02))
    forward = (10, 12, 10)
    trained, flops, disk = (int(1000 * scale) for _ in range(3))
    return Cost("m", side, trained, 2000, flops, seconds, memory, disk, forward, 0)


def study_of(lora, full, cheap=0.5):
    """A study's figures: either side's losses at the end, ± a little over the seeds."""
    study = Study(models=("m",), ranks=(1, 4), rates=(0.001, 0.01), seeds=(0, 1, 2))
    sides = (FULL, Side(1), Side(4), Side(9, attention=True))
    runs = [
        course(side, seed, *(x * (1 + 0.01 * seed) for x in (lora if side.rank else full)), rate)
        for side in sides
        for seed in study.seeds
        for rate in study.rates
    ]
    costs = [cost(side, cheap if side.rank else 1.0) for side in sides]
    return Results((study,), tuple(runs), tuple(costs), "real: left out")


def words(results):
    return {verdict.claim.key: verdict.word for verdict in verdicts(results)}


@pytest.mark.slow
def test_every_claim_has_a_criterion_a_source_and_a_verdict(results):
    assert words(results).keys() == BY_KEY.keys()
    for claim in CLAIMS:
        assert math.isfinite(claim.least) or math.isfinite(claim.most)
        assert re.search(r"lies (above|below) \d", claim.criterion)
        assert re.search(r"(Hu|Biderman|Schulman) et al\. 20\d\d", claim.source)


def test_a_verdict_flips_where_the_figures_are_swapped():
    """LoRA that learns less and forgets less at half the cost, and the sides swapped."""
    one, other = (0.5, 0.3), (0.9, 0.1)
    there, swapped = words(study_of(one, other)), words(study_of(other, one, cheap=2.0))
    flips = {
        "learns-less": (HOLDS, NOT),
        "forgets-less": (HOLDS, NOT),
        "quality": (NOT, HOLDS),
        "parameters": (HOLDS, NOT),
        "flops": (HOLDS, NOT),
        "step": (HOLDS, NOT),
        "memory": (HOLDS, NOT),
    }
    assert {key: (there[key], swapped[key]) for key in flips} == flips


def test_a_claim_that_holds_in_some_cases_names_them():
    claim = BY_KEY["parameters"]
    verdict = judge(claim, {"a": exact(0.5), "b": exact(2.0), "c": Interval(1.0, 0.9, 1.1)})
    assert verdict.word == WHEN
    assert verdict.sentence == "holds when: a"
    assert (verdict.named(False), verdict.named(None)) == (["b"], ["c"])


@pytest.mark.parametrize(
    ("figure", "word"),
    [
        (Interval(0.5, 0.4, 0.6), HOLDS),
        (Interval(0.5, 0.4, 1.0), UNDECIDED),  # it may lie on the end itself
        (Interval(1.5, 1.0, 2.0), NOT),
        (Interval(math.inf, 0.5, math.inf), UNDECIDED),
        (Interval(math.nan, -math.inf, math.inf), UNDECIDED),
    ],
)
def test_a_case_counts_only_where_its_whole_interval_does(figure, word):
    verdict = judge(BY_KEY["step"], {"a": figure})
    assert verdict.word == word
    assert verdict.sentence == word


def test_between_two_ends_both_sides_are_outside():
    claim = BY_KEY["rate"]
    results = [judge(claim, {"a": exact(x)}).word for x in (0.0, 1.0, 2.0)]
    assert results == [NOT, HOLDS, NOT]


def test_no_figure_is_no_verdict():
    with pytest.raises(ValueError, match="rank: no figure, no verdict"):
        judge(BY_KEY["rank"], {})


def coverage(interval, n, draws=600):
    """How many standard deviations too seldom the interval has the true mean in it."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(draws):
        results = interval([*rng.standard_normal(n)])
        hits += results.low <= 0 <= results.high
    wanted = verdicts_module.CONFIDENCE
    return (hits - draws * wanted) / math.sqrt(draws * wanted * (1 - wanted))


def normal_theory(values):
    half = 1.96 * np.std(values, ddof=1) / math.sqrt(len(values))
    return Interval(np.mean(values), np.mean(values) - half, np.mean(values) + half)


def test_the_interval_has_the_mean_in_it_as_often_as_it_says():
    for n in (2, 3, 8):
        assert abs(coverage(over, n)) < 4
    assert coverage(normal_theory, 3) < -4


def test_rounding_makes_an_interval_wider_and_a_lone_value_has_none():
    plain, wider = over([1.0, 2.0, 3.0]), over([1.0, 2.0, 3.0], 0.25)
    assert (wider.low, wider.high) == (plain.low - 0.25, plain.high + 0.25)
    with pytest.raises(ValueError, match="1 values: an interval needs two at least"):
        over([1.0])


def test_a_run_that_diverged_decides_for_nobody():
    figure = over([0.1, math.inf, 0.2])
    assert (figure.low, figure.high) == (0.1, math.inf)
    assert over([0.1, -math.inf, math.inf]).low == -math.inf
    there = study_of((0.5, 0.3), (0.9, 0.1))
    broken = tuple(
        replace(run, why="step 2: the loss is inf", valid=math.inf) if run.side.rank else run
        for run in there.courses
    )
    results = words(replace(there, courses=broken))
    assert results["quality"] == results["training"] == results["forgets-less"] == NOT


def test_each_side_takes_its_own_best_rate_by_validation_alone():
    """At the rate that is better in validation the exact loss is the worse one."""
    study = Study(models=("m",), ranks=(1, 4), rates=(0.001, 0.01, 0.1), seeds=(0, 1))
    runs = [
        course(side, seed, 0.5, 1.0 - valid, lr, valid)
        for side, valids in ((FULL, (0.2, 0.3, 0.4)), (Side(1), (0.9, 0.1, 0.5)))
        for lr, valid in zip(study.rates, valids, strict=True)
        for seed in study.seeds
    ]
    results = Results((study,), tuple(runs), ())
    assert (results.rate("m", FULL), results.rate("m", Side(1))) == (0.001, 0.01)
    assert results.at_the_edge() == ["m, full: 0.001"]


def test_where_a_path_crosses_a_loss():
    path = course(Side(1), 0, first=0.8, second=0.2)
    assert crossing(path, 1.0) == (0.0, 0.0)
    step, first = crossing(path, 0.6)
    assert (round(step, 9), first) == (10.0, 0.4)
    step, first = crossing(path, 0.4)
    assert 10 < step < 100
    assert 0.4 < first < 0.8
    with pytest.raises(ValueError, match=r"never at 0\.1"):
        crossing(path, 0.1)


def test_a_product_is_counted_by_its_shape():
    W, x = np.ones((3, 4)), np.ones((4, 5))
    assert products_of(lambda held: held["W"] @ x, {"W": W}) == [(3, 5, 4)]
    assert costs.flops_of([(3, 5, 4), (2, 2, 2)]) == 2 * 60 + 2 * 8
    assert products_of(lambda held: W @ x, {"W": W}) == []


def test_full_fine_tuning_is_three_products_for_each_of_the_forward(subject):
    """But for the lowest input, whose gradient no one needs, and attention's own products."""
    run = run_of(subject, TINY, FULL)
    batch = batches_of(run.data.train, 64, 0)[0]
    W, c = dict(run.base.weights), subject.base.config
    forward = products_of(lambda h: costs.logits(batch, h, c, TrainableSpec()), W)
    step = products_of(lambda h: costs.loss(batch, h, c, run.spec)[1](1.0), W)
    assert costs.flops_of(step) == 3 * costs.flops_of(forward)


@pytest.mark.parametrize("side", [FULL, Side(2)], ids=lambda side: side.name)
def test_memory_by_part_is_that_of_the_arrays(side, subject):
    run = run_of(subject, TINY, side)
    batch = batches_of(run.data.train, 64, 0)[0]
    memory = memory_of(run, batch)
    _, g = gradients(batch, run.weights(run.initial), subject.base.config, run.spec)
    _, adam = adamw(run.initial, g, AdamState(), 0.1)
    assert memory["gradients"] == sum(a.nbytes for a in g.values())
    assert memory["optimizer"] == sum(a.nbytes for a in (*adam.m.values(), *adam.v.values()))
    whole = sum(w.nbytes for w in run.base.weights.values())
    assert memory["weights"] == whole + (memory["gradients"] if side.rank else 0)
    more = memory_of(run, batches_of(run.data.train, 256, 0)[0])
    assert more["activations"] > 2 * memory["activations"]


def test_a_merged_model_is_a_plain_one_and_an_adapted_one_is_not(subject, monkeypatch):
    run = run_of(subject, TINY, Side(2))
    batch = batches_of(run.data.train, 64, 0)[0]
    (plain, adapted, merged), other = inference_of(run, batch)
    assert other == 0
    assert plain == merged < adapted
    adds = costs.merge

    def one_more(W, tuning):
        return {**adds(W, tuning), "layers.0.extra.weight": np.ones((2, 2), np.float32)}

    monkeypatch.setattr(costs, "merge", one_more)
    assert inference_of(run, batch)[1] == 1

    def wide(W, tuning):
        return {name: w.astype(np.float64) for name, w in adds(W, tuning).items()}

    monkeypatch.setattr(costs, "merge", wide)
    assert inference_of(run, batch)[1] == len(
        adds({**run.adapter, **subject.base.weights}, run.spec)
    )


@pytest.mark.parametrize("name", reference_models.names())
def test_attention_alone_has_no_fewer_parameters(name):
    study = Study()
    subject = studied_model(study, name)
    alone, same = sides_of(study, subject.base.config)[-1], Side(study.ranks[1])
    adapters = {
        side: run_of(subject, study, side).adapter
        for side in (alone, replace(alone, rank=alone.rank - 1), same)
    }
    many, fewer, wanted = (
        study_module.size(w for at, w in held.items() if not at.startswith("head"))
        for held in adapters.values()
    )
    assert fewer < wanted <= many
    assert all(re.search(r"\.(q|k|v|qkv|o)\.[AB]$", at) for at in adapters[alone])


@pytest.mark.slow
def test_a_run_is_the_same_again_and_begins_as_the_base(results, subject):
    """Every side begins where the base is; the excesses are those of the exact losses."""
    both = [synthetic_data.task(name) for name in reference_models.tasks("gpt2")]
    W = {name: np.asarray(w) for name, w in subject.base.weights.items()}
    start = [
        synthetic_data.expected_loss(one, W, subject.base.config, TrainableSpec()) - one.entropy
        for one in both
    ]
    run = run_of(subject, TINY, Side(1))
    assert subject.first(run.weights(run.initial), run.spec) == start[0]
    for one in results.courses:
        assert [look.step for look in one.looks] == [*TINY.looks]
        assert (one.looks[0].first, one.looks[0].second) == (start[0], start[1])
        assert one.looks[-1].second != one.looks[0].second
    last = results.courses[-1]
    assert follow(Asked(TINY, "gpt2", last.side, last.lr, last.seed)) == last
    assert len({run.looks[-1] for run in results.courses}) == len(results.courses)


def test_a_run_that_diverges_says_so():
    wild = replace(TINY, rates=(0.01, 1e39))
    results = follow(Asked(wild, "gpt2", Side(1), 1e39, 0))
    assert results.why
    assert results.valid == math.inf


@pytest.mark.slow
def test_every_side_is_run_and_costed(results, subject):
    sides = set(sides_of(TINY, subject.base.config))
    asked = {(run.side, run.lr, run.seed) for run in results.courses}
    assert asked == {(s, lr, seed) for s in sides for lr in TINY.rates for seed in TINY.seeds}
    assert {one.side for one in results.costs} == sides
    assert all(len(one.seconds) == TINY.rounds for one in results.costs)
    assert all(one.disk > 4 * one.trained for one in results.costs)


@pytest.mark.slow
def test_the_real_model_left_out_is_said(results, monkeypatch):
    assert "SmolLM2-135M was left out: it was not asked for." in notes(results)
    monkeypatch.setattr("minilora.io.loading.importlib.util.find_spec", lambda name: None)
    assert results_module.real_path() is None
    assert "not installed" in results_module.lacking()
    monkeypatch.setattr(results_module, "_measured", lambda study, results, *_: results)
    left = results_module.measure(WHOLE, 1)
    assert "not installed" in left.left_out
    assert [study.models for study in left.studies] == [WHOLE.models]
    monkeypatch.setitem(sys.modules, "pydoc_data", None)
    assert "pydoc_data" in results_module.lacking()


@pytest.mark.parametrize("change", [{"seeds": (0,)}, {"ranks": (1,)}, {"rates": (0.1,)}])
def test_a_study_of_one_is_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} .*: expected two at least"):
        Study(**change)


def test_rates_of_other_ranks_and_seeds_that_are_not_run_are_refused():
    for own in (((0.1, 0.3),), ((0.1, 0.3), (0.1, 0.3), (0.1, 0.3))):
        with pytest.raises(ValueError, match=r"lora_rates .*: expected a grid for each"):
            replace(SMOL, lora_rates=own)
    with pytest.raises(ValueError, match="no side of attention alone"):
        replace(SMOL, attention=True)
    with pytest.raises(ValueError, match=r"tuning \(3,\): expected some of the seeds"):
        replace(SMOL, tuning=(3,))


class Reads(html.parser.HTMLParser):
    """Every element that is opened is closed in its turn; what the page would load or run."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.ids, self.links = [], [], set(), set()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id"))
        self.links.add(given.get("href"))
        self.loads += [tag] if tag in ("script", "link", "img", "iframe") else []
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.slow
def test_the_page_needs_nothing_else_and_says_every_verdict(results):
    judged = verdicts(results)
    text = page_of(results, judged)
    reads = Reads()
    reads.feed(text)
    assert reads.open == []
    assert reads.loads == []
    assert {link[1:] for link in reads.links if link} <= reads.ids
    assert "url(" not in text
    assert "@media (prefers-color-scheme: dark)" in text
    assert not re.search(r"\b(nan|inf)\b", "".join(re.findall(r"<svg.*?</svg>", text, re.S)))
    for verdict in judged:
        assert f'id="{verdict.claim.key}"' in text
    assert text.count("<figure>") == 5 + 1


def test_the_page_and_the_table_follow_the_figures():
    one, other = study_of((0.5, 0.3), (0.9, 0.1)), study_of((0.9, 0.1), (0.5, 0.3))
    lines = [table(results, verdicts(results)).splitlines() for results in (one, other)]
    assert "LoRA forgets less. HOLDS" in lines[0]
    assert "LoRA forgets less. DOES NOT HOLD" in lines[1]
    pages = [page_of(results, verdicts(results)) for results in (one, other)]
    marks = [page.count("✓ holds") for page in pages]
    assert marks[0] != marks[1]


def test_a_picture_leaves_out_what_is_no_number_and_needs_a_point():
    line = Line("a", [(1.0, 1.0), (2.0, math.nan), (3.0, 2.0)], 0)
    drawn = chart("two points", [line], Axis("x"), Axis("y", log=True))
    assert drawn.count("<circle") == 2
    with pytest.raises(ValueError, match="nothing: no finite point"):
        chart("nothing", [Line("a", [(1.0, math.inf)], 0)], Axis("x"), Axis("y"))


@pytest.mark.slow
def test_the_command_writes_a_page_and_its_figures(results, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(results_module, "measure", lambda *_: results)
    out = tmp_path / "out"
    assert main(["claims", "--quick", "--output", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["claims.html", "claims.json"]
    said = json.loads(Path(out / "claims.json").read_text())
    assert {key: one["verdict"] for key, one in said["claims"].items()} == words(results)
    assert len(said["runs"]) == len(results.courses)
    assert "LoRA trains fewer parameters." in capsys.readouterr().out


def test_an_interrupted_command_writes_nothing(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(results_module, "measure", interrupted)
    assert main(["claims", "--output", str(tmp_path / "out")]) == INTERRUPTED
    assert not (tmp_path / "out").exists()
    assert "nothing was written" in capsys.readouterr().err


def test_no_process_is_wrong_usage(capsys):
    assert main(["claims", "--jobs", "0"]) == 2
    assert "--jobs 0: expected at least 1" in capsys.readouterr().err
