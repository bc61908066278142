"""The choice of adapters: what it hits, what it says, and what it refuses."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora as ml
from minilora import strategies as draw

LLAMA = ml.Llama(vocab=11, d=5, layers=12, heads=4, ffn=7, kv_heads=2, head_dim=2, qkv_bias=True)
BERT = ml.Bert(vocab=11, d=6, layers=2, heads=3, ffn=7, positions=9, types=2, classes=3)


def hit(linears=None, **choice):
    return list(ml.choose(ml.Lora(**choice), linears or LLAMA.linears()).rank)


def test_all_linear_is_every_projection_but_the_head():
    assert hit() == [at for at in LLAMA.linears() if at != "head"]
    assert "head" in LLAMA.linears()
    assert hit(BERT.linears())[-1] == "pooler"


def test_names_match_a_whole_name_or_its_dotted_end_and_no_part_of_a_word():
    assert hit(targets=["q", "layers.3.up"]) == [
        at for at in LLAMA.linears() if at.endswith(".q") or at == "layers.3.up"
    ]
    linears = {"a.up": (2, 3), "a.pup": (2, 3), "up": (2, 3), "up.a": (2, 3)}
    assert hit(linears, targets=["up"]) == ["a.up", "up"]


def test_a_string_is_an_expression_for_whole_names():
    assert hit(targets=r"layers\.1\.[qv]") == ["layers.1.q", "layers.1.v"]
    assert hit(targets=r".*\.1\.q") == ["layers.1.q"]
    assert hit(targets=".*")[-1] == "head"
    with pytest.raises(ValueError, match="'q' hit no projection"):
        hit(targets="q")


def test_layers_are_numbers_and_no_beginnings_of_numbers():
    assert hit(targets=["q"], layers=[1, 10]) == ["layers.1.q", "layers.10.q"]
    assert all(at.startswith("layers.0.") for at in hit(layers=[0]))


def test_excluded_projections_are_not_hit():
    assert hit(targets=["q", "v"], exclude=["v"], layers=[2]) == ["layers.2.q"]
    assert hit(targets=["q", "v"], exclude=r"layers\.2\.q", layers=[2]) == ["layers.2.v"]


def test_patterns_give_ranks_and_alphas_of_their_own():
    choice = ml.choose(
        ml.Lora(
            r=2,
            alpha=5,
            layers=[1, 11],
            rank_pattern={r"layers\.1\.q": 7, "q|up": 3},
            alpha_pattern={"up": 4.5},
        ),
        LLAMA.linears(),
    )
    rank = dict.fromkeys(("k", "v", "o", "gate", "down"), 2) | {"q": 3, "up": 3}
    for layer in (1, 11):
        for at, r in rank.items():
            want = 7 if (layer, at) == (1, "q") else r
            assert choice.rank[f"layers.{layer}.{at}"] == want
            assert choice.alpha[f"layers.{layer}.{at}"] == (4.5 if at == "up" else 5)
    assert choice.shape["layers.1.k"] == (4, 5)


def test_a_choice_reports_what_it_hit():
    choice = ml.choose(ml.Lora(r=2, alpha=3, targets=["q", "down"], layers=[4]), LLAMA.linears())
    assert str(choice) == (
        "layers.4.q: r 2, alpha 3, 26 parameters\n"
        "layers.4.down: r 2, alpha 3, 24 parameters\n"
        "2 projections, 50 parameters"
    )


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"targets": "nothing"}, "targets 'nothing' hit no projection; there are: layers.0.q,"),
        ({"targets": ["q", "w"]}, "['w'] of the choice hit no projection"),
        ({"targets": ["q"], "layers": [12]}, "targets ['q'] hit no projection"),
        ({"targets": ["q"], "exclude": ["q"]}, "targets ['q'] hit no projection"),
        ({"rank_pattern": {"w": 3}}, "['w'] of the choice hit no projection"),
        ({"targets": ["q"], "alpha_pattern": {"v": 3}}, "['v'] of the choice hit no projection"),
        ({"rank_pattern": {"ayers.0.q": 3}}, "['ayers.0.q'] of the choice hit no projection"),
    ],
)
def test_a_choice_that_hits_nothing_is_refused_by_what_it_names(choice, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        hit(**choice)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"bias": "some"}, "bias 'some': expected one of ('none', 'lora_only', 'all')"),
        ({"init": "zero"}, "init 'zero': expected one of ('kaiming', 'gaussian')"),
        ({"dropout": 1.0}, "dropout 1.0: expected at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout -0.1: expected at least 0 and below 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(choice, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ml.Lora(**choice)
    assert ml.Lora(dropout=0.0).dropout == 0


def adapted(c=LLAMA, dtype=np.float64, **choice):
    rng = np.random.default_rng(0)
    W = {name: w.astype(dtype) for name, w in ml.draw_weights(c, rng).items()}
    return W, *ml.adapt(W, ml.Lora(**choice), c.linears(), rng)


def test_adapters_stand_beside_the_very_weights_in_their_dtype():
    base, W, tuning = adapted(dtype=np.float32, r=3, targets=["k"], layers=[2])
    assert all(W[name] is base[name] for name in base)
    assert W.keys() - base.keys() == tuning.trained == {"layers.2.k.A", "layers.2.k.B"}
    A, B = W["layers.2.k.A"], W["layers.2.k.B"]
    assert (A.shape, B.shape) == ((3, 5), (4, 3))
    assert A.dtype == B.dtype == np.float32
    assert A.all()
    assert not B.any()
    assert not tuning.keep


def test_the_scale_of_each_adapter_follows_from_its_own_rank_and_alpha():
    choice = {"r": 4, "alpha": 7, "rank_pattern": {"v": 9}, "alpha_pattern": {"o": 3}}
    _, _, tuning = adapted(layers=[0], **choice)
    _, _, stabilised = adapted(layers=[0], rslora=True, **choice)
    for at, plain, rooted in (("q", 7 / 4, 7 / 2), ("v", 7 / 9, 7 / 3), ("o", 3 / 4, 3 / 2)):
        assert tuning.scale[f"layers.0.{at}"] == plain
        assert stabilised.scale[f"layers.0.{at}"] == rooted
    assert len(tuning.scale) == 7


def test_biases_and_other_parameters_are_trained_as_the_choice_says():
    biases = {f"layers.{i}.{at}.bias" for i in range(12) for at in "qkv"}
    for bias, wanted in (
        ("none", set()),
        ("lora_only", {"layers.1.q.bias", "layers.2.q.bias"}),
        ("all", biases),
    ):
        _, W, tuning = adapted(targets=["q", "o"], layers=[1, 2], bias=bias)
        assert {name for name in tuning.trained if name.endswith(".bias")} == wanted
        assert {name for name in W if name.endswith((".A", ".B"))} <= tuning.trained
    _, _, tuning = adapted(also=[r"layers\.0\.norm.\.weight", "embed.weight"], targets=["q"])
    beside = {name for name in tuning.trained if not name.endswith((".A", ".B"))}
    assert beside == {"layers.0.norm1.weight", "layers.0.norm2.weight", "embed.weight"}


def test_adapters_upon_adapters_and_parameters_that_do_not_exist_are_refused():
    _, W, _ = adapted()
    with pytest.raises(ValueError, match="adapters already; disable or merge them first"):
        ml.adapt(W, ml.Lora(), LLAMA.linears(), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"\['norm'\] match no parameter; there are: embed.weight"):
        adapted(also=["norm", "norm.weight"])
    with pytest.raises(ValueError, match="rank 0: expected at least 1"):
        adapted(r=0)


@settings(max_examples=20)
@given(
    c=draw.configurations(),
    rng=draw.generators(),
    r=draw.ranks(),
    init=st.sampled_from(("kaiming", "gaussian")),
)
def test_a_freshly_adapted_model_is_the_base_to_the_bit(c, rng, r, init):
    base = draw.draw_model(c, rng, p=0)
    W = ml.disable(base.W)
    adapted, tuning = ml.adapt(W, ml.Lora(r=r, targets=".*", init=init), c.linears(), rng)
    assert tuning.scale.keys() == c.linears().keys()
    assert {at: adapted[f"{at}.A"].shape for at in c.linears()} == {
        at: (r, n) for at, (_, n) in c.linears().items()
    }
    model = replace(base, W=adapted, tuning=tuning)
    plain = replace(base, W=W, tuning=ml.Tuning())
    assert np.array_equal(model.logits(), plain.logits())
    gradients = model.loss()[1](1.0)
    assert not any(g.any() for name, g in gradients.items() if name.endswith(".A"))
    assert any(g.any() for name, g in gradients.items() if name.endswith(".B"))
    assert not np.array_equal(base.logits(), plain.logits())
