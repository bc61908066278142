"""The choice of adapters: what it hits, what it says, and what it refuses."""

import itertools
import re
import warnings
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from calculus import GRADIENT, record_worst, relative_error, same_bits
from extras import optional
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora as ml
from minilora import testing as draw
from minilora.io.architectures import tensor_names as names_in_files
from minilora.io.architectures import to_file_layout
from minilora.io.formats.huggingface import write_model
from minilora.io.formats.peft import adapter_names
from minilora.spec import layers as spec_layers
from minilora.spec import ops, target_modules
from minilora.spec.initialization import INITIALIZATIONS
from minilora.spec.lora import LORA, is_base
from minilora.spec.variants import ALORA, REGISTRY

LLAMA = ml.Llama(vocab=11, d=5, layers=12, heads=4, ffn=7, kv_heads=2, head_dim=2, qkv_bias=True)
BERT = ml.Bert(vocab=11, d=6, layers=2, heads=3, ffn=7, positions=9, types=2, classes=3)


def hit(linears=None, **choice):
    return list(ml.resolve_targets(ml.LoraConfig(**choice), linears or LLAMA.linears()).rank)


def test_all_linear_is_every_projection_but_the_head():
    assert hit() == [at for at in LLAMA.linears() if at != "head"]
    assert "head" in LLAMA.linears()
    assert hit(BERT.linears())[-1] == "pooler"


def test_names_match_a_whole_name_or_its_dotted_end_and_no_part_of_a_word():
    assert hit(target_modules=["q", "layers.3.up"]) == [
        at for at in LLAMA.linears() if at.endswith(".q") or at == "layers.3.up"
    ]
    linears = {"a.up": (2, 3), "a.pup": (2, 3), "up": (2, 3), "up.a": (2, 3)}
    assert hit(linears, target_modules=["up"]) == ["a.up", "up"]


def test_a_string_is_an_expression_for_whole_names():
    assert hit(target_modules=r"layers\.1\.[qv]") == ["layers.1.q", "layers.1.v"]
    assert hit(target_modules=r".*\.1\.q") == ["layers.1.q"]
    assert hit(target_modules=".*")[-1] == "head"
    with pytest.raises(ValueError, match=r"^target_modules: 'q'"):
        hit(target_modules="q")


def test_layers_are_numbers_and_no_beginnings_of_numbers():
    assert hit(target_modules=["q"], layers_to_transform=[1, 10]) == ["layers.1.q", "layers.10.q"]
    assert all(at.startswith("layers.0.") for at in hit(layers_to_transform=[0]))


def test_what_is_named_in_full_is_hit_in_any_layer():
    assert hit(target_modules=["q", "layers.3.up", "head"], layers_to_transform=[1]) == [
        "layers.1.q",
        "layers.3.up",
        "head",
    ]
    assert hit(target_modules=["q", "3.up"], layers_to_transform=[1]) == ["layers.1.q"]
    with pytest.raises(ValueError, match="layers_to_transform: found none"):
        ml.LoraConfig(layers_to_transform=[])


def test_excluded_projections_are_not_hit():
    assert hit(target_modules=["q", "v"], exclude_modules=["v"], layers_to_transform=[2]) == [
        "layers.2.q"
    ]
    assert hit(
        target_modules=["q", "v"], exclude_modules=r"layers\.2\.q", layers_to_transform=[2]
    ) == ["layers.2.v"]


def test_patterns_give_ranks_and_alphas_of_their_own():
    choice = ml.resolve_targets(
        ml.LoraConfig(
            r=2,
            lora_alpha=5,
            layers_to_transform=[1, 11],
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
    choice = ml.resolve_targets(
        ml.LoraConfig(r=2, lora_alpha=3, target_modules=["q", "down"], layers_to_transform=[4]),
        LLAMA.linears(),
    )
    assert str(choice) == (
        "layers.4.q: r 2, alpha 3, 26 parameters\n"
        "layers.4.down: r 2, alpha 3, 24 parameters\n"
        "2 projections, 50 parameters"
    )


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        ({"target_modules": "nothing"}, "target_modules", "'nothing'"),
        ({"target_modules": ["nothing"]}, "target_modules", "'nothing'"),
        ({"target_modules": ["q", "w"]}, "target_modules", "'w'"),
        ({"target_modules": ["q"], "layers_to_transform": [12]}, "target_modules", "['q']"),
        ({"target_modules": ["q"], "exclude_modules": ["q"]}, "target_modules", "['q']"),
        ({"rank_pattern": {"w": 3}}, "rank_pattern", "'w'"),
        ({"target_modules": ["q"], "alpha_pattern": {"v": 3}}, "alpha_pattern", "'v'"),
        ({"rank_pattern": {"ayers.0.q": 3}}, "rank_pattern", "'ayers.0.q'"),
    ],
)
def test_what_matches_no_module_is_refused_by_its_field(config, field, value):
    with pytest.raises(ValueError, match=rf"^{field}: {re.escape(value)} .*layers\.0\.q,"):
        hit(**config)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"bias": "some"}, "bias 'some'"),
        ({"init_lora_weights": "zero"}, "init_lora_weights 'zero'"),
        ({"lora_dropout": 1.0}, "lora_dropout 1.0"),
        ({"r": 0}, "rank 0"),
        ({"r": 1.5}, "rank 1.5"),
        ({"rank_pattern": {"q": 0}}, "rank 0"),
        ({"target_modules": "("}, "'('"),
        ({"alpha_pattern": {"q": 1, "(": 2}}, "'('"),
        (
            {"trainable_token_indices": {"embed": [1]}, "modules_to_save": [r"embed\..*"]},
            "trainable_token_indices of embed",
        ),
        ({"lora_dropout": -0.1}, "lora_dropout -0.1"),
        ({"variant": "lokr"}, "variant 'lokr'"),
        ({"variant": "vera", "init_lora_weights": "gaussian"}, "init_lora_weights 'gaussian'"),
        ({"variant": "pissa", "init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"init_lora_weights": "adalora"}, "init_lora_weights 'adalora'"),
        ({"variant": "alora"}, "alora_invocation_tokens []"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens [1]"),
        ({"variant": "dora", "ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"variant": "vera", "use_rslora": True}, "use_rslora"),
        ({"variant": "vera", "rank_pattern": {"q": 1}}, "rank_pattern"),
        ({"variant": "adalora", "alpha_pattern": {"q": 1}}, "alpha_pattern"),
    ],
)
def test_settings_that_mean_nothing_are_refused(config, field):
    with pytest.raises(ValueError, match=rf"^{re.escape(field)}: "):
        ml.LoraConfig(**config)
    assert ml.LoraConfig(lora_dropout=0.0).lora_dropout == 0
    assert ml.LoraConfig(r=np.int64(1)).r == 1


def test_a_config_says_whether_the_weights_entries_are_read():
    drawn = ("kaiming", "gaussian", "orthogonal")
    assert not any(ml.LoraConfig(init_lora_weights=init).reads_weights for init in drawn)
    assert all(ml.LoraConfig(init_lora_weights=init).reads_weights for init in ("pissa", "loftq"))
    assert ml.LoraConfig(variant="dora").reads_weights  # for its magnitude
    assert not any(ml.LoraConfig(variant=v).reads_weights for v in ("vera", "lora-bias"))


def test_vera_shares_its_factors_among_all_modules():
    rng = np.random.default_rng(0)
    lora = ml.LoraConfig(r=3, variant="vera", target_modules=["q", "down"])
    W, _ = ml.inject(ml.draw_weights(LLAMA, rng), lora, LLAMA.linears(), rng)
    targets = ml.resolve_targets(lora, LLAMA.linears())
    assert {name: W[name].shape for name in targets.parts()} == targets.parts()
    for part in "AB":
        assert np.shares_memory(W[f"layers.0.q.{part}"], W[f"layers.1.down.{part}"])


def adapted(c=LLAMA, dtype=np.float64, **choice):
    rng = np.random.default_rng(0)
    W = {name: w.astype(dtype) for name, w in ml.draw_weights(c, rng).items()}
    return W, *ml.inject(W, ml.LoraConfig(**choice), c.linears(), rng)


def test_adapters_stand_beside_the_very_weights_in_their_dtype():
    base, W, tuning = adapted(dtype=np.float32, r=3, target_modules=["k"], layers_to_transform=[2])
    assert all(W[name] is base[name] for name in base)
    assert W.keys() - base.keys() == tuning.trained == {"layers.2.k.A", "layers.2.k.B"}
    A, B = W["layers.2.k.A"], W["layers.2.k.B"]
    assert (A.shape, B.shape) == ((3, 5), (4, 3))
    assert A.dtype == B.dtype == np.float32
    assert A.all()
    assert not B.any()
    assert not tuning.dropout_scale


def test_the_scale_of_each_adapter_follows_from_its_own_rank_and_alpha():
    choice = {"r": 4, "lora_alpha": 7, "rank_pattern": {"v": 9}, "alpha_pattern": {"o": 3}}
    _, _, tuning = adapted(layers_to_transform=[0], **choice)
    _, _, stabilised = adapted(layers_to_transform=[0], use_rslora=True, **choice)
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
        _, W, tuning = adapted(target_modules=["q", "o"], layers_to_transform=[1, 2], bias=bias)
        assert {name for name in tuning.trained if name.endswith(".bias")} == wanted
        assert {name for name in W if name.endswith((".A", ".B"))} <= tuning.trained
    _, _, tuning = adapted(
        modules_to_save=[r"layers\.0\.norm.\.weight", "embed.weight"], target_modules=["q"]
    )
    beside = {name for name in tuning.trained if not name.endswith((".A", ".B"))}
    assert beside == {"layers.0.norm1.weight", "layers.0.norm2.weight", "embed.weight"}


def test_adapters_upon_adapters_and_parameters_that_do_not_exist_are_refused():
    _, W, _ = adapted()
    with pytest.raises(ValueError, match="adapters already; disable or merge them first"):
        ml.inject(W, ml.LoraConfig(), LLAMA.linears(), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"\['norm'\] match no parameter; there are: embed.weight"):
        adapted(modules_to_save=["norm", "norm.weight"])
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
    adapted, tuning = ml.inject(
        W, ml.LoraConfig(r=r, target_modules=".*", init_lora_weights=init), c.linears(), rng
    )
    assert tuning.scale.keys() == c.linears().keys()
    assert {at: adapted[f"{at}.A"].shape for at in c.linears()} == {
        at: (r, n) for at, (_, n) in c.linears().items()
    }
    model = replace(base, W=adapted, tuning=tuning)
    plain = replace(base, W=W, tuning=ml.TrainableSpec())
    assert np.array_equal(model.logits(), plain.logits())
    gradients = model.loss()[1](1.0)
    assert not any(g.any() for name, g in gradients.items() if name.endswith(".A"))
    assert any(g.any() for name, g in gradients.items() if name.endswith(".B"))
    assert not np.array_equal(base.logits(), plain.logits())


# The matching rules. Names are tuples of parts and expressions are tuples of pieces on this side,
# so that no law leans on regular expressions or on the ends of strings.

PARTS = ("q", "q_proj", "q2", "seq", "extra", "mlp", "layers", "sublayers", "h", "0", "1", "11")
ANYTHING, DIGITS = ".*", r"\d+"


def text(pattern):
    """The expression itself."""
    return "".join(p if p in (ANYTHING, DIGITS) else re.escape(p) for p in pattern)


def ends(pattern, name, starts):
    """Where a match of the pieces can end that starts at one of ``starts``."""
    for piece in pattern:
        if piece == ANYTHING:
            starts = {j for i in starts for j in range(i, len(name) + 1)}
        elif piece == DIGITS:
            longest = {i: len(name[i:]) - len(name[i:].lstrip("0123456789")) for i in starts}
            starts = {i + k for i in starts for k in range(1, longest[i] + 1)}
        else:
            starts = {i + len(piece) for i in starts if name[i : i + len(piece)] == piece}
    return starts


def is_end(parts, name):
    """Whether the last parts of the name are these."""
    return parts == name[len(name) - len(parts) :]


def plain_matches(name, wanted):
    """Of names: part by part from the end; of pieces: from the first character to the last."""
    if isinstance(wanted, Pieces):
        return len(".".join(name)) in ends(wanted, ".".join(name), {0})
    return any(is_end(end, name) for end in wanted)


def plain_layer(name, patterns):
    """The first number after such parts, or after any two parts; never the last part."""
    numbers = [i for i in range(len(name) - 1) if name[i].isdecimal()]
    if not patterns:
        return next((int(name[i]) for i in numbers if i >= 2), None)
    for pattern in patterns:
        for i in numbers:
            if is_end(pattern, name[:i]):
                return int(name[i])
    return None


def plain_targeted(name, wanted, exclude, saved, layers, patterns):
    """As a table of what is so, and no order of questions."""
    inside = any(part == name[i : i + len(part)] for part in saved for i in range(len(name)))
    allowed = not plain_matches(name, exclude) and not inside
    if isinstance(wanted, Pieces):
        return allowed and plain_matches(name, wanted)
    in_layer = not layers or plain_layer(name, patterns) in layers
    return allowed and (name in wanted or (plain_matches(name, wanted) and in_layer))


def plain_value(patterns, name, default):
    """Each pattern tried at the name's start and after each dot."""
    name = ".".join(name)
    starts = {0} | {i + 1 for i, letter in enumerate(name) if letter == "."}
    for pattern, value in patterns.items():
        if any(len(name) in ends(choice, name, starts) for choice in pattern):
            return value
    return default


def plain_saved(name, wanted):
    """The letters from behind, of the name and of all that it lies in."""
    around = [".".join(name[: i + 1]) for i in range(len(name))]
    return any(
        len(end) <= len(outer)
        and all(a == b for a, b in zip(reversed(outer), reversed(end), strict=False))
        for outer, end in itertools.product(around, wanted)
    )


class Pieces(tuple):
    """An expression as the pieces that it is made of."""

    __slots__ = ()


@dataclass(frozen=True)
class Setting:
    """Names of a tree and settings of every kind: names as parts, expressions as pieces."""

    names: tuple
    wanted: tuple
    exclude: tuple = ()
    saved: tuple = ()
    layers: tuple = ()
    patterns: tuple = ()
    values: tuple = ()
    ends: tuple = ()

    @property
    def said(self):
        """The settings as a configuration has them."""

        def say(wanted):
            return text(wanted) if isinstance(wanted, Pieces) else list(map(".".join, wanted))

        return {
            "target_modules": say(self.wanted),
            "exclude_modules": say(self.exclude),
            "modules_to_save": [re.escape(".".join(part)) for part in self.saved],
            "layers_to_transform": list(self.layers),
            "layers_pattern": [re.escape(".".join(part)) for part in self.patterns],
        }

    @property
    def valued(self):
        """The patterns with a value each, alternatives joined."""
        return {"|".join(map(text, choices)): value for choices, value in self.values}


@st.composite
def settings_of_trees(draw_):
    """Names that are each other's ends, starts and parts, and settings made of their pieces."""
    part = st.sampled_from(PARTS)
    names = draw_(
        st.lists(st.lists(part, min_size=1, max_size=5).map(tuple), min_size=3, unique=True)
    )

    @st.composite
    def run(draw_):
        """Successive parts of a name: its end, most often."""
        name = draw_(st.sampled_from(names))
        i = draw_(st.integers(0, len(name) - 1))
        j = draw_(st.just(len(name)) | st.integers(i + 1, len(name)))
        return name[i:j]

    @st.composite
    def pieces(draw_):
        """A name with letters cut away and with some of it said by wild cards."""
        name = ".".join(draw_(run()))
        i = draw_(st.integers(0, min(2, len(name) - 1)))
        before, after = (
            draw_(st.sampled_from(((), (ANYTHING,)))),
            draw_(st.just(()) | st.just((ANYTHING,))),
        )
        inner = [DIGITS if p.isdecimal() else p for p in re.split(r"(\d+)", name[i:]) if p]
        return Pieces((*before, *inner, *after))

    listed = st.lists(run(), max_size=3).map(tuple)
    patterns = st.lists(st.tuples(st.lists(pieces(), min_size=1, max_size=2), st.integers(1, 9)))
    return Setting(
        tuple(names),
        draw_(listed | pieces()),
        draw_(st.just(()) | listed | pieces()),
        draw_(st.just(()) | listed),
        draw_(st.sampled_from(((), (), (0,), (1,), (11,), (0, 1)))),
        draw_(st.sampled_from(((), (("layers",),), (("h",), ("layers",)), (("mlp", "layers"),)))),
        tuple((tuple(c), v) for c, v in draw_(patterns)),
        tuple(".".join(end)[-draw_(st.integers(1, 9)) :] for end in draw_(listed)),
    )


def names_hit_whole_names_and_dotted_ends(rules, drawn):
    for name in drawn.names:
        found = rules.matches(".".join(name), drawn.said["target_modules"])
        assert found == plain_matches(name, drawn.wanted)


def a_layer_is_the_first_number_that_counts(rules, drawn):
    for name in drawn.names:
        found = rules.layer_index(".".join(name), drawn.said["layers_pattern"])
        assert found == plain_layer(name, drawn.patterns)


def the_settings_decide_in_their_order(rules, drawn):
    if isinstance(drawn.wanted, Pieces):
        drawn = replace(drawn, layers=())  # PEFT refuses the two together
    for name in drawn.names:
        settings = drawn.wanted, drawn.exclude, drawn.saved, drawn.layers, drawn.patterns
        found = rules.is_target(".".join(name), **drawn.said)
        assert found == plain_targeted(name, *settings)


def the_first_pattern_that_fits_counts(rules, drawn):
    for name in drawn.names:
        found = rules.pattern_value(drawn.valued, ".".join(name), 0)
        assert found == plain_value(dict(drawn.values), name, 0)


def the_end_of_a_name_saves_it_and_what_lies_in_it(rules, drawn):
    for name in drawn.names:
        assert rules.is_saved(".".join(name), drawn.ends) == plain_saved(name, drawn.ends)


LAWS = (
    names_hit_whole_names_and_dotted_ends,
    a_layer_is_the_first_number_that_counts,
    the_settings_decide_in_their_order,
    the_first_pattern_that_fits_counts,
    the_end_of_a_name_saves_it_and_what_lies_in_it,
)


@pytest.mark.slow
@settings(max_examples=40)
@given(drawn=settings_of_trees())
def test_every_rule_is_its_plain_definition(drawn):
    for law in LAWS:
        law(target_modules, drawn)


def trap(names, wanted=(), **others):
    """A tree and settings, written with dots; a string among the settings is an expression."""

    def parts(given):
        return given if isinstance(given, Pieces) else tuple(tuple(n.split(".")) for n in given)

    for kind in ("exclude", "saved", "patterns"):
        others[kind] = parts(others.get(kind, ()))
    return Setting(parts(names), parts(wanted), **others)


TREE = [
    "q", "seq", "q2", "q.extra", "mlp.q", "mlp.q2", "layers.0.q", "layers.1.q", "layers.11.q",
    "sublayers.1.q", "model.layers.1", "model.layers.1.q", "model.layers.1.q.extra",
    "model.layers.1.seq", "model.layers.11.seq", "model.layers.0.experts.1.q",
    "model.h.0.layers.1.q", "layers.1.mlp.layers.0.q",
]  # fmt: skip
TRAPS = [
    trap(TREE, ["q", "layers.1.q"], ends=("q",)),
    trap(TREE, Pieces(("q",)), values=(((("q",),), 3), ((("layers.", DIGITS, ".q"),), 5))),
    trap(
        TREE, Pieces((ANYTHING, "q")), values=(((("seq",), ("q2",)), 3),), ends=("layers.1", "eq")
    ),
    trap(TREE, ["q", "mlp.q2"], exclude=["mlp.q2"], layers=(1,), patterns=["layers"]),
    trap(TREE, ["q", "seq"], exclude=Pieces((ANYTHING, "1.q")), saved=["extra", "mlp"]),
    trap(TREE, ["q", "model.layers.0.experts.1.q"], layers=(1,)),
    trap(TREE, ["q", "seq"], layers=(1, 11), patterns=["layers", "h"], saved=["extra"]),
]


def in_another_order(name, **config):
    """A whole name first of all."""
    wanted = config["target_modules"]
    if not isinstance(wanted, str) and name in wanted:
        return True
    return target_modules.is_target(name, **config)


def asked_always(name, layers_to_transform, layers_pattern, **others):
    """Whole names for their layer too."""
    layer = target_modules.layer_index(name, layers_pattern)
    hit = target_modules.is_target(name, **others)
    return hit and (not layers_to_transform or layer in layers_to_transform)


def without(field):
    """``is_target`` that does not look at a field."""

    def is_target(name, **config):
        return target_modules.is_target(name, **{k: v for k, v in config.items() if k != field})

    return is_target


def layer_by(expression, bare=None):
    """The number after any of the patterns, in the place of {}, by another expression; or bare."""

    def layer_index(name, patterns=()):
        if bool(patterns) == bool(bare):
            return target_modules.layer_index(name, patterns)
        match = re.match(bare or expression.format("|".join(patterns)), name)
        return int(match["idx"]) if match else None

    return layer_index


def of_lists(hits):
    """``matches`` with another test of one entry of a list."""
    return lambda name, wanted: (
        target_modules.matches(name, wanted)
        if isinstance(wanted, str)
        else any(hits(name, end) for end in wanted)
    )


def of_strings(function):
    """``matches`` with another function of :mod:`re`."""
    return lambda name, wanted: (
        function(wanted, name) is not None
        if isinstance(wanted, str)
        else target_modules.matches(name, wanted)
    )


def of_patterns(fits, pick=0):
    """``pattern_value`` with another test of one pattern, or another choice of those that fit."""

    def pattern_value(patterns, name, default):
        fitting = [value for p, value in patterns.items() if fits(p, name)]
        return fitting[pick] if fitting else default

    return pattern_value


def anchored(pattern, name):
    return re.match(rf"(.*\.)?({pattern})$", name)


WRONG = {
    "names as substrings": ("matches", of_lists(lambda name, end: end in name)),
    "names as beginnings": ("matches", of_lists(lambda name, end: name.startswith(end))),
    "names as bare ends": ("matches", of_lists(lambda name, end: name.endswith(end))),
    "whole names only": ("matches", of_lists(lambda name, end: name == end)),
    "names as last parts only": ("matches", of_lists(lambda n, end: n.split(".")[-1] == end)),
    "names anywhere": ("matches", of_lists(lambda n, end: f".{end}." in f".{n}.")),
    "an expression searched for": ("matches", of_strings(re.search)),
    "an expression without its end": ("matches", of_strings(re.match)),
    "an expression as a name": (
        "matches",
        lambda n, wanted: target_modules.matches(
            n, [wanted] if isinstance(wanted, str) else wanted
        ),
    ),
    "the last number": ("layer_index", layer_by("", bare=r".*\.[^.]*\.(?P<idx>\d+)\.")),
    "a number after the first part": (
        "layer_index", layer_by("", bare=r"(?:^|.*?\.)[^.]*\.(?P<idx>\d+)\."),
    ),
    "a number that ends the name": ("layer_index", layer_by("", bare=r".*?\.[^.]*\.(?P<idx>\d+)")),
    "the last number after a pattern": (
        "layer_index", layer_by(r"(?:.*\.|^)(?:{})\.(?P<idx>\d+)\."),
    ),
    "whichever pattern stands first": (
        "layer_index", layer_by(r"(?:^|.*?\.)(?:{})\.(?P<idx>\d+)\."),
    ),
    "a pattern inside a word": ("layer_index", layer_by(r".*?(?:{})\.(?P<idx>\d+)\.")),
    "the first digit": ("layer_index", layer_by(r"(?:^|.*?\.)(?:{})\.(?P<idx>\d)")),
    "whole names before exclusion": ("is_target", in_another_order),
    "whole names asked for their layer": ("is_target", asked_always),
    "no exclusion": ("is_target", without("exclude_modules")),
    "saved modules adapted": ("is_target", without("modules_to_save")),
    "saved by the end of the name": (
        "is_target",
        lambda n, modules_to_save, **others: (
            target_modules.is_target(n, **others)
            and not target_modules.matches(n, modules_to_save)
        ),
    ),
    "no layers": ("is_target", without("layers_to_transform")),
    "the last pattern": ("pattern_value", of_patterns(anchored, -1)),
    "a pattern searched for": ("pattern_value", of_patterns(re.search)),
    "a pattern without its end": (
        "pattern_value", of_patterns(lambda p, name: re.match(rf"(.*\.)?({p})", name)),
    ),
    "a pattern after no dot": (
        "pattern_value", of_patterns(lambda p, name: re.match(rf".*({p})$", name)),
    ),
    "a pattern for whole names": ("pattern_value", of_patterns(re.fullmatch)),
    "ungrouped alternatives": (
        "pattern_value", of_patterns(lambda p, name: re.match(rf"(.*\.)?{p}$", name)),
    ),
    "saved by dotted ends": (
        "is_saved",
        lambda n, ends: any(f".{n}.".find(f".{end}.") >= 0 for end in ends),
    ),
    "saved by parts of words": ("is_saved", lambda n, ends: any(end in n for end in ends)),
    "what lies in a saved module": ("is_saved", lambda n, ends: n.endswith(ends)),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_another_rule_is_refused(wrong):
    rule, implementation = WRONG[wrong]
    rules = SimpleNamespace(**vars(target_modules) | {rule: implementation})
    refused = 0
    for drawn, law in itertools.product(TRAPS, LAWS):
        law(target_modules, drawn)
        try:
            law(rules, drawn)
        except AssertionError:
            refused += 1
    assert refused


@pytest.fixture(scope="module")
def pefts():
    """The same rules as PEFT's own functions have them; two are told from what they do."""
    torch = optional("torch")
    optional("peft")
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import _set_trainable, get_pattern_key

    def is_target(name, target_modules, **config):
        settings = {
            "exclude_modules": (),
            "modules_to_save": (),
            "layers_to_transform": None,
            "layers_pattern": None,
            "target_parameters": None,
        }
        config = SimpleNamespace(**settings | config, target_modules=target_modules)
        return bool(check_target_module_exists(config, name))

    def layer_index(name, patterns=()):
        """The one number with which the end of the name, which is not all of it, is hit."""
        numbers = {int(part) for part in name.split(".") if part.isdecimal()}
        _, dot, end = name.rpartition(".")
        hit = [
            i
            for i in numbers
            if dot and is_target(name, [end], layers_to_transform=[i], layers_pattern=patterns)
        ]
        assert len(hit) < 2
        return next(iter(hit), None)

    def pattern_value(patterns, name, default):
        return patterns.get(get_pattern_key(patterns.keys(), name), default)

    def is_saved(name, ends):
        """Whether a parameter of the innermost module is trained, in a tree of that one branch."""
        tree = branches(torch, [name])
        _set_trainable(tree.requires_grad_(False), "default", ends, inference_mode=False)
        return any(p.requires_grad for p in tree.parameters())

    return SimpleNamespace(
        matches=is_target,
        is_target=is_target,
        layer_index=layer_index,
        pattern_value=pattern_value,
        is_saved=is_saved,
    )


def branches(torch, names):
    """Modules under these names, the outermost ones linear."""
    root = torch.nn.Module()
    for name in names:
        module = root
        *around, last = name.split(".")
        for part in around:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.add_module(last, torch.nn.Linear(2, 3, bias=False))
    return root


@settings(max_examples=15)
@given(drawn=settings_of_trees())
def test_every_rule_is_pefts(pefts, drawn):
    for law in LAWS:
        law(pefts, drawn)


def test_every_trap_is_pefts_too(pefts):
    for drawn, law in itertools.product(TRAPS, LAWS):
        law(pefts, drawn)


RAW = [*PARTS, "", "q|up", "layers|h", r"l\w+s", ".", "1|11.q", "q.*", "(q|seq)", r"layers.\d+"]


@settings(max_examples=40)
@given(
    names=st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=5), min_size=1).map(
        lambda names: [".".join(name) for name in names]
    ),
    wanted=st.lists(st.sampled_from(RAW), min_size=1, max_size=3),
    listed=st.booleans(),
    saved=st.lists(st.sampled_from(RAW), max_size=1),
    exclude=st.lists(st.sampled_from(RAW), max_size=1) | st.sampled_from(RAW),
    layers=st.none() | st.integers(0, 2) | st.lists(st.sampled_from((0, 1, 11)), max_size=2),
    layers_pattern=st.lists(st.sampled_from(RAW), max_size=2) | st.sampled_from(RAW),
)
def test_unescaped_and_ungrouped_settings_hit_what_they_hit_in_peft(
    pefts, names, wanted, listed, saved, exclude, layers, layers_pattern
):
    config = {
        "target_modules": wanted if listed else wanted[0],
        "exclude_modules": exclude,
        "modules_to_save": saved,
    }
    if listed:
        config |= {"layers_to_transform": layers, "layers_pattern": layers_pattern}
    ranks = {pattern: i for i, pattern in enumerate(wanted)}
    for name in names:
        assert target_modules.is_target(name, **config) == pefts.is_target(name, **config)
        found = target_modules.pattern_value(ranks, name, 99)
        assert found == pefts.pattern_value(ranks, name, 99)


def test_peft_refuses_layers_beside_an_expression(pefts):
    from peft import LoraConfig

    with pytest.raises(ValueError, match="layers_to_transform"):
        LoraConfig(target_modules=".*q", layers_to_transform=[1])
    assert hit(target_modules=r".*\.q", layers_to_transform=[1]) == ["layers.1.q"]


@pytest.mark.filterwarnings("ignore:The following .* keys did not match any:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:You have passed exclude_modules:UserWarning")
@settings(max_examples=10)
@given(drawn=settings_of_trees())
def test_peft_adapts_what_the_rules_hit_with_their_ranks_and_alphas(pefts, drawn):
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    names = [".".join(name) for name in drawn.names]
    names = [name for name in names if not any(n.startswith(f"{name}.") for n in names)]
    said = drawn.said
    if isinstance(said["target_modules"], str) or not drawn.layers:
        said |= {"layers_to_transform": None, "layers_pattern": []}
    config = LoraConfig(
        r=11,
        lora_alpha=13,
        target_modules=said["target_modules"],
        exclude_modules=said["exclude_modules"] or None,
        layers_to_transform=said["layers_to_transform"],
        layers_pattern=said["layers_pattern"] or None,
        rank_pattern=drawn.valued,
        alpha_pattern=drawn.valued,
    )
    said["modules_to_save"] = ()
    every = {name for at in names for name in itertools.accumulate(at.split("."), "{}.{}".format)}
    hit = {name for name in every if target_modules.is_target(name, **said)}
    tree = branches(torch, names)
    if not hit or hit - set(names):  # nothing, or what is no projection
        with pytest.raises(ValueError, match="arget"):
            inject_adapter_in_model(config, tree)
        return
    inject_adapter_in_model(config, tree)
    adapted = {name: at for name, at in tree.named_modules() if hasattr(at, "lora_A")}
    assert {name: at.r["default"] for name, at in adapted.items()} == {
        name: target_modules.pattern_value(drawn.valued, name, 11) for name in hit
    }
    assert {name: at.lora_alpha["default"] for name, at in adapted.items()} == {
        name: target_modules.pattern_value(drawn.valued, name, 13) for name in hit
    }


def test_all_linear_is_pefts(pefts):
    torch = optional("torch")
    transformers = optional("transformers")
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as include

    class Model(transformers.PreTrainedModel):
        """A model of these projections, of which one is the output head, or none."""

        config_class = transformers.PretrainedConfig

        def __init__(self, names, head):
            super().__init__(transformers.PretrainedConfig())
            for part, module in branches(torch, names).named_children():
                self.add_module(part, module)
            self.head_is = head

        def get_output_embeddings(self):
            return self.get_submodule(self.head_is) if self.head_is else None

    linears = ["layers.0.q", "layers.1.q", "layers.1.head", "classifier", "head"]
    for head, task, left_out in (
        ("head", None, ["head"]),
        ("layers.1.head", "CAUSAL_LM", ["layers.1.head"]),
        (None, None, []),
        (None, "SEQ_CLS", ["classifier"]),
        ("head", "SEQ_CLS", ["head"]),
    ):
        config = LoraConfig(target_modules="all-linear", task_type=task)
        hit_by_peft = include(config, Model(linears, head)).target_modules
        assert hit_by_peft == set(target_modules.all_linear(linears, left_out))
        assert hit_by_peft != set(target_modules.all_linear(linears, ["layers.0.q"]))


RANGES = [(0, 2), (1, 3), (1, 2)]


@pytest.mark.parametrize(
    ("layers", "ranges", "source"),
    [
        (5, [(0, 4), (2, 5)], [0, 1, 2, 3, 2, 3, 4]),
        (3, RANGES, [0, 1, 1, 2, 1]),
        (3, [(2, 3), (0, 1)], [2, 0]),
        (12, [(0, 12)], list(range(12))),
    ],
)
def test_ranges_are_put_on_one_another(layers, ranges, source):
    assert target_modules.replicated_layers(layers, ranges) == source
    assert target_modules.replicated_layers(layers, [(i, i + 1) for i in source]) == source


@pytest.mark.parametrize("ranges", [[], [(0, 2), (1, 1)], [(2, 1)], [(0, 4)], [(-1, 2)], [(3, 4)]])
def test_ranges_of_no_layers_are_refused(ranges):
    with pytest.raises(ValueError, match=r"ranges: found .*, expected 0 ≤ start < end ≤ 3 in each"):
        target_modules.replicated_layers(3, ranges)


def shares_its_source(W, deeper, source):
    """Each array is the one that it comes from, and no array is left out or over."""
    assert {name for name in deeper if not name.startswith("layers.")} == {
        name for name in W if not name.startswith("layers.")
    }
    for name, w in deeper.items():
        kind, _, rest = name.partition(".")
        number, _, part = rest.partition(".")
        assert w is W[f"layers.{source[int(number)]}.{part}" if kind == "layers" else name]


@settings(max_examples=8)
@given(c=draw.configurations(greatest_layers=3), rng=draw.generators(), data=st.data())
def test_a_replicated_model_is_the_model_with_its_layers_copied(c, rng, data):
    pairs = st.tuples(st.integers(0, c.layers - 1), st.integers(1, c.layers))
    ranges = data.draw(st.lists(pairs.filter(lambda p: p[0] < p[1]), min_size=1, max_size=3))
    W = draw.draw_parameters(c, rng)
    deeper, d = target_modules.replicate_layers(W, c, ranges)
    source = target_modules.replicated_layers(c.layers, ranges)
    shares_its_source(W, deeper, source)
    assert d == replace(c, layers=len(source))
    assert {name: w.shape for name, w in deeper.items()} == d.shapes()
    copied = {name: w.copy() for name, w in deeper.items()}
    batch = draw.draw_batch(c, rng, 2, 3, "both")
    z, _ = ml.logits(batch, deeper, d, ml.TrainableSpec())
    assert same_bits(z, ml.logits(batch, copied, d, ml.TrainableSpec())[0])


def test_another_replication_is_noticed():
    W = ml.draw_weights(LLAMA, np.random.default_rng(0))
    source = target_modules.replicated_layers(12, [(0, 2), (1, 12)])
    deeper, d = target_modules.replicate_layers(W, LLAMA, [(0, 2), (1, 12)])
    assert d.layers == 13
    copied = {name: w.copy() for name, w in deeper.items()}
    for wrong in (copied, deeper | {"layers.2.q.weight": W["layers.2.q.weight"]}):
        with pytest.raises(AssertionError):
            shares_its_source(W, wrong, source)


def test_the_copies_share_the_base_and_have_adapters_of_their_own():
    rng = np.random.default_rng(0)
    base, c = target_modules.replicate_layers(ml.draw_weights(BERT, rng), BERT, [(0, 2), (1, 2)])
    W, tuning = ml.inject(base, ml.LoraConfig(r=2, target_modules=["q"]), c.linears(), rng)
    assert W["layers.1.q.weight"] is W["layers.2.q.weight"]
    assert not np.array_equal(W["layers.1.q.A"], W["layers.2.q.A"])
    assert tuning.scale.keys() == {"layers.0.q", "layers.1.q", "layers.2.q"}
    with pytest.raises(ValueError, match="replicate the base, then adapt it"):
        target_modules.replicate_layers(W, c, [(0, 3)])


TINY_LLAMA = ml.Llama(vocab=7, d=6, layers=3, heads=2, ffn=5, kv_heads=1, head_dim=2)
TINY_BERT = replace(BERT, layers=3)


def of_transformers(c, W, folder):
    """The model as transformers loads it, in float64."""
    transformers = optional("transformers")
    write_model(folder, c, W)
    cls = {ml.Llama: "LlamaForCausalLM", ml.GPT2: "GPT2LMHeadModel"}
    cls = cls.get(type(c), "BertForSequenceClassification")
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return getattr(transformers, cls).from_pretrained(folder, dtype="float64").eval()


@pytest.mark.parametrize("c", [TINY_LLAMA, TINY_BERT], ids=lambda c: type(c).__name__)
def test_peft_replicates_the_same_layers_and_shares_their_weights(pefts, c, tmp_path):
    from peft.tuners.tuners_utils import replicate_layers

    W = draw.draw_parameters(c, np.random.default_rng(0))
    model = of_transformers(c, W, tmp_path)
    replicate_layers(model, RANGES)
    deeper, d = target_modules.replicate_layers(W, c, RANGES)
    theirs = {name: model.get_parameter(key) for name, (key, _) in names_in_files(d).items()}
    assert theirs.keys() == deeper.keys()
    assert len(theirs) == len(list(model.named_parameters(remove_duplicate=False)))
    for name, (_, transposed) in names_in_files(d).items():
        assert same_bits(
            theirs[name].detach().numpy(), to_file_layout(name, deeper[name], transposed)
        )
    for a, b in itertools.combinations(deeper, 2):
        assert (deeper[a] is deeper[b]) == (theirs[a] is theirs[b])


def test_peft_computes_and_trains_a_replicated_model_with_its_adapters(pefts, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    rng = np.random.default_rng(0)
    base = draw.draw_parameters(TINY_BERT, rng)
    deeper, c = target_modules.replicate_layers(base, TINY_BERT, RANGES)
    W, tuning = ml.inject(
        deeper, ml.LoraConfig(r=2, lora_alpha=3, target_modules=["v", "down"]), c.linears(), rng
    )
    W |= {name: 0.3 * rng.standard_normal(w.shape) for name, w in W.items() if name.endswith(".B")}
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["value", "output.dense"],
        exclude_modules=["attention.output.dense"],
        layer_replication=RANGES,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = get_peft_model(of_transformers(TINY_BERT, base, tmp_path), config).eval()
    places = adapter_names(c, sorted(tuning.trained))
    theirs = {
        name: model.get_parameter(re.sub(r"\.weight$", ".default.weight", place))
        for name, place in places.items()
    }
    assert len(theirs) == sum(p.requires_grad for p in model.parameters())
    batch = draw.draw_batch(c, rng, 2, 3, "none")
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(torch.from_numpy(W[name]))
    z = model(torch.from_numpy(batch.ids), token_type_ids=torch.from_numpy(batch.types)).logits
    found, back = ml.logits(batch, W, c, tuning)
    dz = rng.standard_normal(found.shape)
    z.backward(torch.from_numpy(dz.T))
    gradients = back(dz)
    errors = [relative_error(found, z.detach().numpy().T)]
    errors += [relative_error(g, theirs[name].grad.numpy()) for name, g in gradients.items()]
    record_worst("layer replication against peft", max(errors))
    assert max(errors) <= GRADIENT
    assert gradients.keys() == theirs.keys()
    twin = gradients["layers.2.v.A"], theirs["layers.1.v.A"].grad.numpy()
    assert relative_error(*twin) > GRADIENT


def test_tokens_that_come_twice_or_do_not_exist_are_refused():
    E, rows = np.ones((4, 3)), np.zeros((2, 3))
    assert spec_layers.with_tokens(E, np.array([2, 0]), rows)[0].sum() == 6
    for ids in ([2, 2], [0, 4], [3, -1]):
        with pytest.raises(ValueError, match=r"ids \[.*\]: expected tokens from 0 to 3, each once"):
            spec_layers.with_tokens(E, np.array(ids), rows)
    assert E.all()


@settings(max_examples=10)
@given(
    E=draw.whole((5, 3)),
    rows=draw.whole((2, 3)),
    dy=draw.whole((3, 6)),
    ids=st.lists(st.integers(0, 4), min_size=6, max_size=6).map(np.array),
    trained=st.permutations(range(5)).map(lambda p: np.array(p[:2])),
)
def test_trained_tokens_are_pefts_and_its_delta_holds_rows(pefts, E, rows, dy, ids, trained):
    """Whole numbers, whose sums are exact in any order."""
    import torch
    from peft import TrainableTokensConfig
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    table = torch.nn.Embedding.from_pretrained(torch.from_numpy(E.copy()))
    layer = TrainableTokensLayer(table, "default")
    layer.update_layer("default", TrainableTokensConfig(token_indices=trained.tolist()))
    delta = layer.trainable_tokens_delta["default"]
    assert np.array_equal(delta.detach().numpy(), E[trained])
    with torch.no_grad():
        delta.copy_(torch.from_numpy(rows))
    theirs = layer(torch.from_numpy(ids))
    theirs.backward(torch.from_numpy(dy.T.copy()))

    table, back_table = spec_layers.with_tokens(E, trained, rows)
    y, back_y = ops.embedding(ids, table)
    assert np.array_equal(y, theirs.detach().numpy().T)
    assert np.array_equal(back_table(back_y(dy)), delta.grad.numpy())
    added, _ = spec_layers.with_tokens(E, trained, E[trained] + rows)
    looked_up, _ = ops.embedding(ids, added)
    assert np.array_equal(y, looked_up) == (not E[trained][np.isin(trained, ids)].any())


def test_peft_trains_the_tokens_of_a_tied_model_through_both_uses(pefts, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    c = ml.GPT2(vocab=7, d=6, layers=1, heads=3, ffn=5, positions=4)
    rng = np.random.default_rng(0)
    W, trained = draw.draw_parameters(c, rng), np.array([5, 2])
    rows = rng.standard_normal((2, 6))
    config = LoraConfig(
        target_modules=["c_fc"], fan_in_fan_out=True, trainable_token_indices=trained.tolist()
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = get_peft_model(of_transformers(c, W, tmp_path), config).eval()
    name = "base_model.model.transformer.wte.token_adapter.trainable_tokens_delta"
    delta = model.get_parameter(f"{name}.default")
    with torch.no_grad():
        delta.copy_(torch.from_numpy(rows))
    assert np.array_equal(get_peft_model_state_dict(model)[name].numpy(), rows)

    batch = ml.Batch(np.array([[5, 0, 2, 5], [1, 2, 3, 4]]))
    E, back_E = spec_layers.with_tokens(W["embed.weight"], trained, rows)
    tuning = ml.TrainableSpec(trained=frozenset({"embed.weight"}))
    z, back = ml.logits(batch, W | {"embed.weight": E}, c, tuning)
    theirs = model(torch.from_numpy(batch.ids)).logits
    dz = rng.standard_normal(z.shape)
    theirs.backward(torch.from_numpy(dz.T.reshape(theirs.shape).copy()))
    dE = back(dz)["embed.weight"]
    errors = [
        relative_error(z, theirs.detach().numpy().reshape(z.T.shape).T),
        relative_error(back_E(dE), delta.grad.numpy()),
    ]
    record_worst("trained tokens of a tied model against peft", max(errors))
    assert max(errors) <= GRADIENT
    _, back_swapped = spec_layers.with_tokens(W["embed.weight"], trained[::-1], rows)
    assert relative_error(back_swapped(dE), delta.grad.numpy()) > GRADIENT


TIED = replace(LLAMA, layers=1, d=6, tied=True)
IDS = np.array([[3, 1, 4, 1], [9, 2, 6, 1]])


def of_variant(variant, c=TIED, seed=0, **choice):
    """The base's weights, and an adapter of the variant beside them."""
    rng = np.random.default_rng(seed)
    W = ml.draw_weights(c, rng, std=0.4)
    lora = ml.LoraConfig(
        **{"r": 2, "lora_alpha": 3, "variant": variant}
        | ({"alora_invocation_tokens": [1]} if variant == "alora" else {})
        | choice
    )
    return lora, W, *ml.inject(W, lora, c.matrices(), rng)


def scores(W, tuning, lora, c=TIED):
    now = (
        target_modules.with_invocation(tuning, IDS, lora.alora_invocation_tokens)
        if lora.alora_invocation_tokens
        else tuning
    )
    return ml.logits(ml.Batch(IDS), W, c, now)


@pytest.mark.parametrize("variant", REGISTRY)
def test_a_fresh_adapter_of_each_variant_changes_no_output(variant):
    lora, base, W, tuning = of_variant(variant)
    entry, every = REGISTRY[variant], [at for at in TIED.linears() if at != "head"]
    before = {name: w.copy() for name, w in base.items()}
    assert {n for n in W if not is_base(n)} == {
        f"{at}.{part}" for at in every for part in entry.variant.parts
    }
    assert tuning.trained == {f"{at}.{part}" for at in every for part in entry.trained}
    assert tuning.variant == ({} if lora.equation == LORA else dict.fromkeys(every, lora.equation))
    s = {"rslora": 3 / 2**0.5, "vera": 1, "adalora": 3 / (2 + 1e-5)}.get(variant, 1.5)
    assert tuning.scale == dict.fromkeys(every, s)
    assert all(
        same_bits(base[name], before[name]) for name in base
    )  # the caller's stay as they were
    z, _ = ml.logits(ml.Batch(IDS), base, TIED, ml.TrainableSpec())
    found, _ = scores(W, tuning, lora)
    kept = all(W[name] is base[name] for name in base)
    assert kept == ("frozen-weight" not in entry.breaks)
    if variant == "orthogonal":  # whose halves are orthogonal but for rounding
        assert relative_error(found, z) <= GRADIENT
    elif kept:
        assert np.array_equal(found, z)
    elif variant == "loftq":
        assert relative_error(found, z) > GRADIENT  # a base in four bits
    else:
        for at in every:
            R, A, B = INITIALIZATIONS[variant].start(None, base[f"{at}.weight"], 2, 1.5)
            for part, array in (("weight", R), ("A", A), ("B", B)):
                assert np.array_equal(W[f"{at}.{part}"], array)
        record_worst(f"the start of {variant}", relative_error(found, z))
        assert relative_error(found, z) <= GRADIENT
    moved = {name: W[name] + 0.5 for name in tuning.trained}
    assert relative_error(scores(W | moved, tuning, lora)[0], z) > GRADIENT


def test_adalora_divides_by_the_rank_at_the_start_whatever_is_left():
    *_, W, tuning = of_variant("adalora", r=4, rank_pattern={"q": 1, "up": 3})
    assert {len(W[f"{at}.A"]) for at in tuning.scale} == {1, 3, 4}
    assert {*tuning.scale.values()} == {3 / (4 + 1e-5)}
    *_, plain = of_variant("lora", r=4, rank_pattern={"q": 1, "up": 3})
    assert {*plain.scale.values()} == {3, 1, 3 / 4}


def test_an_old_flag_and_a_variant_say_the_same():
    assert ml.LoraConfig(use_rslora=True).use_rslora
    assert ml.LoraConfig(variant="rslora").use_rslora
    *_, W, tuning = of_variant("rslora")
    *_, W_flag, tuning_flag = of_variant("lora", use_rslora=True)
    assert tuning == tuning_flag
    assert all(same_bits(W[name], W_flag[name]) for name in W)
    *_, plain = of_variant("lora")
    assert plain != tuning


def test_all_modules_of_a_vera_share_one_a_and_one_b():
    *_, W, tuning = of_variant("vera")
    parts = [[W[name] for name in W if name.endswith(end)] for end in (".A", ".B")]
    for factors in parts:
        whole = max(factors, key=lambda f: f.size)
        assert all(np.shares_memory(f, whole) for f in factors)
        assert all(np.array_equal(f, whole[: len(f), : f.shape[1]]) for f in factors)
    assert {name.rpartition(".")[2] for name in tuning.trained} == {"lambda_d", "lambda_b"}
    *_, plain, _ = of_variant("lora")
    assert not np.shares_memory(plain["layers.0.q.A"], plain["layers.0.k.A"])


def test_all_linear_hits_no_table_and_no_head_whatever_could_be_adapted():
    for c in (LLAMA, TIED, BERT):
        assert hit(c.matrices()) == hit(c.linears())
    assert TIED.matrices()["embed"] == (6, 11)
    assert TIED.matrices()["head"] == (11, 6)
    assert {*BERT.matrices()} - {*BERT.linears()} == {"embed", "positions", "types"}
    assert hit(TIED.matrices(), target_modules=["embed", "head"]) == ["embed", "head"]
    with pytest.raises(ValueError, match=r"^target_modules: 'embed'"):
        hit(TIED.linears(), target_modules=["embed", "q"])


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa", "orthogonal", "rslora"])
def test_a_table_starts_with_a_of_zeros_under_every_start(variant):
    _, base, W, tuning = of_variant(variant, target_modules=["embed"])
    assert not W["embed.A"].any()
    assert W["embed.B"].all()
    assert W["embed.A"].shape == (2, 11)
    assert W["embed.B"].shape == (6, 2)
    assert W["embed.weight"] is base["embed.weight"]
    z, _ = ml.logits(ml.Batch(IDS), base, TIED, ml.TrainableSpec())
    found, back = ml.logits(ml.Batch(IDS), W, TIED, tuning)
    assert relative_error(found, z) <= GRADIENT
    assert back(np.ones_like(z))["embed.A"].any()


@pytest.mark.parametrize("variant", ["vera", "adalora", "lora-bias", "lora-fa", "alora"])
def test_a_table_has_no_adapter_of_other_variants(variant):
    with pytest.raises(ValueError, match=f"embed is a table: .* of the variant '{variant}'"):
        of_variant(variant, target_modules=["embed", "q"])
    of_variant(variant, target_modules=["q"])


def test_a_tied_heads_residual_stands_beside_the_embedding():
    _, base, W, tuning = of_variant("pissa", target_modules=["head"])
    assert W["embed.weight"] is base["embed.weight"]
    assert (W["head.weight"] != base["embed.weight"]).any()
    z, _ = ml.logits(ml.Batch(IDS), base, TIED, ml.TrainableSpec())
    assert relative_error(ml.logits(ml.Batch(IDS), W, TIED, tuning)[0], z) <= GRADIENT


def test_a_tied_head_takes_the_embeddings_factors():
    for names in (["embed"], ["head", "q"], ["embed", "head"]):
        _, _, W, tuning = of_variant("lora", target_modules=names, ensure_weight_tying=True)
        assert same_bits(W["head.A"], W["embed.B"].T)
        assert same_bits(W["head.B"], W["embed.A"].T)
        assert {"head.A", "head.B", "embed.A", "embed.B"} <= tuning.trained
    _, _, W, _ = of_variant("lora", target_modules=["embed", "head"])
    assert not np.array_equal(W["head.A"], W["embed.B"].T)


@pytest.mark.parametrize("part", ["A", "B"])
def test_tied_factors_have_the_sum_of_both_gradients(part):
    """Beside a complex step through both uses of the one factor."""
    _, _, W, tuning = of_variant("lora", target_modules=["embed"], ensure_weight_tying=True)
    rng = np.random.default_rng(1)
    W |= {name: W[name] + rng.standard_normal(W[name].shape) for name in ("embed.A", "embed.B")}

    def tied(A, B):
        return W | {"embed.A": A, "embed.B": B, "head.A": B.T, "head.B": A.T}

    z, back = ml.logits(ml.Batch(IDS), tied(W["embed.A"], W["embed.B"]), TIED, tuning)
    dz = rng.standard_normal(z.shape)
    apart = back(dz)
    g = target_modules.tied_gradients(apart)
    assert same_bits(g["head.A"], g["embed.B"].T)
    assert same_bits(g["head.B"], g["embed.A"].T)
    direction, h = rng.standard_normal(W[f"embed.{part}"].shape), 1e-30
    moved = [W[f"embed.{p}"] + (1j * h * direction if p == part else 0) for p in "AB"]
    slope = (dz * ml.logits(ml.Batch(IDS), tied(*moved), TIED, tuning)[0].imag).sum() / h
    error = relative_error((g[f"embed.{part}"] * direction).sum(), slope)
    record_worst("gradients of tied factors", error)
    assert error <= GRADIENT
    assert relative_error((apart[f"embed.{part}"] * direction).sum(), slope) > GRADIENT


def test_alora_acts_from_the_invocation_on_and_never_without_one():
    lora, base, W, tuning = of_variant("alora", target_modules=["q", "down"])
    W |= {name: W[name] + 1 for name in tuning.trained}
    with pytest.raises(ValueError, match="give the batch's tuning, by with_invocation"):
        ml.logits(ml.Batch(IDS), W, TIED, tuning)
    with pytest.raises(ValueError, match="a weight on all: it has no merge"):
        ml.merge(W, tuning)
    z, _ = ml.logits(ml.Batch(IDS), base, TIED, ml.TrainableSpec())
    found, _ = scores(W, tuning, lora)
    on = np.array([[False, False, False, True], [False, False, False, True]]).ravel()
    assert np.array_equal(found[:, ~on], z[:, ~on])
    assert (found[:, on] != z[:, on]).any(0).all()
    never = target_modules.with_invocation(tuning, IDS, [7])
    assert np.array_equal(ml.logits(ml.Batch(IDS), W, TIED, never)[0], z)
    K = {"layers.0.q": np.full((6, 8), 2.0)}
    both = target_modules.with_invocation(replace(tuning, dropout_scale=K), IDS, [1])
    assert np.array_equal(both.dropout_scale["layers.0.q"], 2 * np.broadcast_to(on, (6, 8)))
    assert np.array_equal(both.dropout_scale["layers.0.down"], on[None])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            {"trainable_token_indices": {"embed": [11]}},
            "trainable_token_indices [11] of embed: expected each once, from 0 to 10",
        ),
        (
            {"trainable_token_indices": {"embed": [1, 1]}},
            "trainable_token_indices [1, 1] of embed",
        ),
        (
            {"trainable_token_indices": {"positions": [1]}},
            "trainable_token_indices [1] of positions",
        ),
        ({"layer_replication": [(0, 1), (0, 1)]}, "of 1 layers: replicate first"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "rank 3: expected an even rank"),
        ({"init_lora_weights": "pissa", "r": 7}, "rank 7"),
        (
            {"ensure_weight_tying": True, "target_modules": ["embed"], "rank_pattern": {"head": 3}},
            "ensure_weight_tying: ranks 2 and 3",
        ),
    ],
)
def test_what_a_model_does_not_have_is_refused(choice, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        of_variant("lora", **choice)
    of_variant(
        "lora",
        trainable_token_indices={"embed": [1, 10]},
        layer_replication=[(0, 1)],
        init_lora_weights="pissa",
    )


def test_only_a_tied_head_can_be_tied():
    c = replace(TIED, tied=False)
    with pytest.raises(ValueError, match="ensure_weight_tying: "):
        of_variant("lora", c, target_modules=["embed"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match=re.escape("give the model's matrices()")):
        ml.resolve_targets(
            ml.LoraConfig(target_modules=["head"], ensure_weight_tying=True), c.linears()
        )


def test_a_report_counts_what_the_variant_trains():
    def counted(variant):
        choice = ml.resolve_targets(
            ml.LoraConfig(r=2, target_modules=["q"], variant=variant), TIED.linears()
        )
        assert choice.trained() <= {*choice.parts()}
        return int(str(choice).split()[-2])

    m, n = TIED.linears()["layers.0.q"]
    assert {v: counted(v) for v in ("lora", "lora-fa", "dora", "lora-bias", "vera", "adalora")} == {
        "lora": 2 * (m + n),
        "lora-fa": 2 * m,
        "dora": 2 * (m + n) + m,
        "lora-bias": 2 * (m + n) + m,
        "vera": 2 + m,
        "adalora": 2 * (m + n) + 2,
    }


def test_rules_take_one_number_for_a_layer_and_a_string_for_an_expression_alone():
    config = {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "layers"}
    assert target_modules.is_target("layers.1.q", **config)
    assert not target_modules.is_target("layers.2.q", **config)
    assert not target_modules.is_target("q", r"layers\.0\.q")
    assert target_modules.layer_index("layers.1.up", "layers|h") is None


def test_a_tie_asks_for_the_two_only_where_one_of_them_is_hit():
    tied = replace(LLAMA, layers=1, tied=True)
    lora = ml.LoraConfig(r=2, target_modules=["q"], ensure_weight_tying=True)
    assert list(ml.resolve_targets(lora, tied.linears()).rank) == ["layers.0.q"]
    W = ml.draw_weights(tied, np.random.default_rng(0))
    assert "head.A" not in ml.inject(W, lora, tied.linears(), np.random.default_rng(0))[0]
    both = {"embed": (4, 7), "head": (7, 4)}
    assert list(ml.resolve_targets(replace(lora, target_modules=["embed"]), both).rank) == [
        "embed",
        "head",
    ]


def test_shared_factors_are_one_array_of_the_weights_dtype():
    W = ml.draw_weights(LLAMA, np.random.default_rng(0))
    W = {name: w.astype(np.float32) for name, w in W.items()}
    lora = ml.LoraConfig(r=2, target_modules=["q"], variant="vera")
    adapted, _ = ml.inject(W, lora, LLAMA.linears(), np.random.default_rng(0))
    assert {v.dtype for v in adapted.values()} == {np.dtype(np.float32)}
    assert np.shares_memory(adapted["layers.0.q.A"], adapted["layers.11.q.A"])
    W["layers.11.q.weight"] = W["layers.11.q.weight"].astype(float)
    adapted, _ = ml.inject(W, lora, LLAMA.linears(), np.random.default_rng(0))
    assert adapted["layers.11.q.A"].dtype == float


def test_tokens_without_a_row_are_refused():
    W = ml.draw_weights(LLAMA, np.random.default_rng(0))
    lora = ml.LoraConfig(target_modules=["q"], trainable_token_indices={"embed": []})
    with pytest.raises(ValueError, match=r"trainable_token_indices \[\] of embed"):
        ml.inject(W, lora, LLAMA.linears(), np.random.default_rng(0))


def test_a_replicated_model_has_the_layers_of_its_ranges():
    base = replace(LLAMA, layers=2)
    ranges = [(1, 2), (0, 2)]
    W, c = target_modules.replicate_layers(
        ml.draw_weights(base, np.random.default_rng(0)), base, ranges
    )
    lora = ml.LoraConfig(target_modules=["q"], layer_replication=ranges)
    assert "layers.2.q.A" in ml.inject(W, lora, c.linears(), np.random.default_rng(0))[0]
    with pytest.raises(ValueError, match="of 3 layers: replicate first"):
        ml.inject(
            W, replace(lora, layer_replication=[(1, 2)]), c.linears(), np.random.default_rng(0)
        )
    with pytest.raises(ValueError, match="ranges: found none, expected"):
        target_modules.replicated_layers(3, [])
    with pytest.raises(ValueError, match=r"ranges: found \[\(2, 4\)\], expected"):
        target_modules.replicated_layers(3, [(0, 1), (2, 4)])


def test_activated_lora_has_a_mask_of_numbers_and_a_scale():
    rng = np.random.default_rng(0)
    x, W, A, B, dy = (rng.standard_normal(s) for s in ((3, 4), (2, 3), (1, 3), (2, 1), (2, 4)))
    K = rng.random((3, 4)) / 2
    y, back = ALORA.linear(x, W, None, A, B, 7 / 3, K)
    wanted, back_lora = ml.lora_linear(x, W, None, A, B, 7 / 3, K)
    assert same_bits(y, wanted)
    assert all(same_bits(a, b) for a, b in zip(back(dy), back_lora(dy), strict=True))


@pytest.mark.parametrize(
    "wrong", [{"lora_alpha": np.nan}, {"lora_alpha": np.inf}, {"alpha_pattern": {"q": -np.inf}}]
)
def test_an_alpha_that_is_no_number_is_refused(wrong):
    with pytest.raises(ValueError, match=r"alpha .*: expected a finite number"):
        ml.LoraConfig(**wrong)
