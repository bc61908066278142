"""Level ``names``: which modules a configuration adapts, and which parameters it trains.

No number is computed. A model is given as the names of its modules, a configuration as the fields
of ``adapter_config.json``; what is wanted are PEFT's rules. Names are chosen to be confused: names
that end others (``q_proj`` and ``eq_proj``), numbers that begin others (``layers.1`` and
``layers.11``), numbers inside layers, towers of several kinds, prefixes that look like PEFT's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from minilora.io.errors import FormatError
from minilora.io.formats.peft import adapted_names, trained_names
from minilora.verify.checks.tiny_models import rng_of, same_names
from minilora.verify.core.errors import ASKED, Fault, Skip, type_words
from minilora.verify.core.level import Level
from minilora.verify.core.types import Case, Check, Comparison
from minilora.verify.implementation.guard import GuardedImplementation

Config = dict[str, Any]
Rng = np.random.Generator

CASES = {"quick": 1, "ci": 2, "nightly": 60}
MAX_SHOWN = 4
"""So many entries of a list in a configuration are shown in an error."""

MANY = {"quick": 1, "ci": 1, "nightly": 3}
"""From the second case on, as many names as PEFT shortens to their ends: that takes seconds."""

TOWERS = (
    ("model",),
    ("model.visual", "model.language_model"),
    ("vision_tower.encoder", "language_model.model"),
    ("core.base_model.model",),
    ("encoder", "decoder"),
)
"""The paths of what has blocks; one has a part that PEFT puts before names."""

BLOCKS = ("layers", "h", "blocks", "layer")
NUMBERS: Sequence[int] = (0, 1, 11)
IN_BLOCK = (
    "self_attn.q_proj",
    "self_attn.eq_proj",
    "self_attn.o_proj",
    "self_attn.o_proj2",
    "mlp.up_proj",
    "mlp.experts.0.down_proj",
    "mlp.experts.1.down_proj",
    "input_layernorm",
)
BESIDE = ("connector.proj", "connector.up_proj", "lm_head")

SAVED_IN_BLOCK = ("o_proj", "down_proj")
SAVED_BESIDE = ("lm_head", "embed_tokens", "connector.proj")
"""What may be saved in full: no name ends with one of them but after a dot, where readers differ.
"""


def modules_of(rng: Rng, numbers: Sequence[int] = NUMBERS) -> list[str]:
    """The names of a model's modules, with blocks of these numbers."""
    names = []
    for tower in TOWERS[rng.integers(len(TOWERS))]:
        word = rng.choice(BLOCKS)
        names.append(f"{tower}.embed_tokens")
        names += [f"{tower}.{word}.{i}.{at}" for i in numbers for at in IN_BLOCK]
        names.append(f"{tower}.norm")
    return [*names, *BESIDE]


def some(rng: Rng, choices: Sequence[Any], count: int) -> list[Any]:
    """So many of the choices, in any order."""
    return [choices[i] for i in rng.permutation(len(choices))[:count]]


def ends(rng: Rng, names: Sequence[str]) -> list[str]:
    """Ends of names, of one, two and four parts, and a whole name."""
    (block,) = some(rng, [name for name in names if name.endswith("11.self_attn.o_proj")], 1)
    (whole,) = some(rng, [name for name in names if name.endswith("proj") and "mlp" in name], 1)
    one, two = some(rng, ("q_proj", "proj", "o_proj2"), 1), some(rng, ("mlp.up_proj",), 1)
    return some(rng, [*one, *two, ".".join(block.split(".")[-4:]), whole], 4)


def by_list(rng: Rng, names: Sequence[str], turn: int) -> Config:
    """Ends of names, whole names among them."""
    return {"target_modules": [*ends(rng, names), "q_proj", "embed_tokens"]}


HITS = (
    r".*\.q_proj",
    r".*\.1\..*down_proj",
    r".*\.(0|11)\.\w+\.\w*o_proj2?",
    r"(model|encoder|decoder)\..*\d+\.self_attn\.\w*q_proj",
    r".*language_model.*\.mlp\..*proj",
    r"lm_head",
    r"(?!.*\.1\.).*\.o_proj2",
)
"""Expressions for whole names."""

MISSES = (r".*\.mlp\.up", r"self_attn\.o_proj", r"connector")
"""Expressions for the beginning, the end and a part of names, which match none."""


def expression(rng: Rng) -> str:
    """Alternatives, of which some match no whole name."""
    chosen = [*some(rng, HITS, 2), *MISSES[:2]]
    return "|".join(some(rng, chosen, len(chosen)))


def by_expression(rng: Rng, names: Sequence[str], turn: int) -> Config:
    """A regular expression for whole names."""
    return {"target_modules": expression(rng)}


def by_layers(rng: Rng, names: Sequence[str], turn: int) -> Config:
    """A list, in some layers: of any blocks, or of those that a pattern names."""
    config = by_list(rng, names, turn) | {"layers_to_transform": [1, 7] if turn % 3 else 1}
    config["target_modules"].append("down_proj")  # whose names have a second number
    if turn % 2:
        used = {word for word in BLOCKS if any(f".{word}." in name for name in names)}
        last = some(rng, sorted(used), 1)
        config["layers_pattern"] = [*some(rng, sorted({*BLOCKS} - used), 1), *last]
        if turn % 4 == 3:
            config["layers_pattern"] = last[0]
    return config


def excluding(rng: Rng, names: Sequence[str], turn: int) -> Config:
    """Excluded modules beside a list, by names or by an expression."""
    config = by_list(rng, names, turn)
    if turn % 2:
        return config | {"exclude_modules": rf".*\.1\.self_attn\.q_proj|{expression(rng)}"}
    whole = [name for name in config["target_modules"] if name in names]
    return config | {"exclude_modules": [*whole, "1.self_attn.q_proj", "proj2", "_proj"]}


def all_linear(rng: Rng, names: Sequence[str], turn: int) -> Config:
    """All linear layers but the head, perhaps without some."""
    if turn % 2:
        return {"target_modules": "All-Linear", "exclude_modules": ends(rng, names)}
    return {"target_modules": "all-linear"}


def saved(rng: Rng) -> list[str]:
    """One of many places, and one or two outside of blocks."""
    beside = some(rng, SAVED_BESIDE, int(rng.integers(1, 3)))
    return some(rng, [*some(rng, SAVED_IN_BLOCK, 1), *beside], 3)


def saving(rng: Rng, names: Sequence[str], turn: int) -> Config:
    """Modules that are saved in full, which may be targets too."""
    targets = ["q_proj", "o_proj", "o_proj2", "down_proj", "embed_tokens"]
    return {"target_modules": targets, "modules_to_save": saved(rng)}


def many(rng: Rng, names: Sequence[str], turn: int) -> Config:
    """Very many whole names, as a file without its settings gives them."""
    last = {"q_proj", "o_proj", "up_proj", "o_proj2", "down_proj"}
    tower = names[0].removesuffix("embed_tokens")
    hit = [n for n in names if n.startswith(tower) and n.rpartition(".")[2] in last]
    left_out = {*some(rng, hit, 3)}
    return {"target_modules": [n for n in hit if n not in left_out]}


def patterns(rng: Rng, names: Sequence[str], turn: int) -> Config:
    """Ranks and alphas of single modules, of which several fit one module: the first counts."""
    config: Config = {"target_modules": ["q_proj", "eq_proj", "up_proj", "embed_tokens"]}
    (whole,) = some(rng, [name for name in names if name.endswith("eq_proj")], 1)
    long = [r".*\.0\.self_attn\..*", r"(self_attn|mlp)\.\w+_proj", r"1\.self_attn\.q_proj", whole]
    short = ["q_proj", "(q|up)_proj", r"\w*q_proj|up_proj", "^up_proj", "mlp.up"]
    for name, values in (("rank_pattern", (2, 3, 5, 8)), ("alpha_pattern", (1, 3.5, -6, 24))):
        keys = [*some(rng, long, 2), *some(rng, short, 2)]
        config[name] = dict(zip(some(rng, keys, 4), some(rng, values, 4), strict=True))
    if turn % 2:
        del config["alpha_pattern"]  # a rank of its own leaves alpha as it is
    return config


def combined(rng: Rng, names: Sequence[str], turn: int) -> Config:
    """Everything beside everything."""
    config = patterns(rng, names, turn)
    if turn % 4 == 3:
        config |= by_expression(rng, names, turn)
    elif turn % 2:
        config |= by_layers(rng, names, turn)
    config["modules_to_save"] = saved(rng)
    return config | {"exclude_modules": [*ends(rng, names)[:2], "0.self_attn.q_proj"]}


@dataclass(frozen=True)
class Drawn:
    """A configuration and a model's modules, of which some have a bias."""

    config: Config
    modules: list[str]
    biased: frozenset[str]

    @property
    def parameters(self) -> list[str]:
        """The names of the model's parameters."""
        with_bias = [
            [f"{at}.weight", f"{at}.bias"][: 1 + (at in self.biased)] for at in self.modules
        ]
        return [name for names in with_bias for name in names]


KINDS: dict[str, tuple[Callable[[Rng, Sequence[str], int], Config], str]] = {
    "list": (by_list, "a list of names, each for itself and for what ends with a dot and it"),
    "expression": (by_expression, "a regular expression for whole names"),
    "layers": (by_layers, "layers_to_transform and layers_pattern"),
    "exclude": (excluding, "exclude_modules, by names or by an expression"),
    "all-linear": (all_linear, "all linear layers but the head, and no embedding"),
    "modules-to-save": (saving, "what is saved in full has no adapter"),
    "many": (many, "very many whole names"),
    "patterns": (patterns, "rank_pattern and alpha_pattern, of which the first that fits counts"),
    "combined": (combined, "all of these together"),
}

TRAINED = {
    "plain": "A and B of linear layers and of embeddings, DoRA's magnitude, the bias of B",
    "bias": "the biases of bias all and lora_only",
    "modules-to-save": "modules that are saved in full",
    "combined": "all of these together",
}


def with_trained(rng: Rng, kind: str, config: Config, turn: int) -> Config:
    """The configuration with what is trained beside its adapters."""
    flags = ("use_dora", "lora_bias", "use_rslora")
    biases = ("all", "lora_only", "none")
    if kind in ("plain", "combined"):
        config[flags[turn % 3]] = True
    if kind in ("bias", "combined"):
        config["bias"] = biases[turn % (2 if kind == "bias" else 3)]
    if kind in ("modules-to-save", "combined"):
        config["modules_to_save"] = saved(rng)
    if config.get("lora_bias"):  # an embedding has none
        config["exclude_modules"] = ["embed_tokens"]
    return config


@lru_cache(maxsize=256)
def draw(kind: str, number: int, seed: int) -> Drawn:
    """A case: names, and a configuration that has a meaning for them."""
    rng = rng_of(Case("", "", number, seed), f"names.{kind}")
    question, _, kind = kind.partition(".")
    while True:
        names = modules_of(rng, range(12 if number == 0 else 82) if kind == "many" else NUMBERS)
        rule = KINDS[kind][0] if question == "targets" else by_list
        config = {"peft_type": "LORA", "r": int(rng.choice([4, 6, 7]))}
        config |= {"lora_alpha": float(rng.choice([4, 7.5, 9, -3]))} | rule(rng, names, number)
        if question == "trainable":
            config = with_trained(rng, kind, config, number)
        # The bias of a module to save stands in PEFT's files twice.
        may_have = [at for at in names if not at.endswith((*SAVED_IN_BLOCK, *SAVED_BESIDE))]
        biased = frozenset(some(rng, may_have, len(may_have) // 2))
        drawn = Drawn(config, names, biased)
        try:
            trained_names(config, drawn.parameters)
        except FormatError:  # nothing is adapted, or what is saved is adapted too
            continue
        return drawn


def asked(subject: GuardedImplementation, method: str, config: Config, names: Any) -> Any:
    """The answer for a configuration, which an error names."""
    try:
        return subject.call(method, config, names)
    except Fault as fault:
        said = json.dumps({name: _short(value) for name, value in config.items()})
        raise Fault(fault.kind, f"{fault.message}{ASKED}{said}") from None


def _short(value: Any) -> Any:
    """A setting, of a long list its beginning."""
    is_long = isinstance(value, list) and len(value) > MAX_SHOWN
    return [*value[:MAX_SHOWN], f"and {len(value) - MAX_SHOWN} more"] if is_long else value


def of_module(subject: GuardedImplementation, answer: Any, name: str) -> np.ndarray:
    """r and alpha of a module, as the implementation gives them. Raises Fault."""
    return subject.answer(subject.entry(answer, name), f"targets[{name!r}]", (2,))


def _targets(kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        drawn = draw(f"targets.{kind}", case.number, case.seed)
        got = asked(subject, "targets", drawn.config, drawn.modules)
        if not isinstance(got, Mapping):
            raise Fault("missing", f"targets gave {type_words(got)}, expected a dict")
        want = adapted_names(drawn.config, drawn.modules)
        yield same_names("adapted modules", got, want)
        both = [name for name in want if name in got]
        pairs = np.array([of_module(subject, got, name) for name in both]).reshape(-1, 2)
        for i, what in enumerate(("r", "alpha")):
            if both:
                wanted = np.asarray([float(want[name][i]) for name in both])
                off = [n for n, g, w in zip(both, pairs[:, i], wanted, strict=True) if g != w]
                of = f"of {off[0]}, of {len(off)} modules" if off else "of the modules"
                yield Comparison(f"{what} {of}", pairs[:, i], wanted)

    return run


def _trainable(kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        drawn = draw(f"trainable.{kind}", case.number, case.seed)
        got = asked(subject, "trainable", drawn.config, drawn.parameters)
        if isinstance(got, str) or not isinstance(got, Iterable):
            raise Fault("missing", f"trainable gave {type_words(got)}, expected names")
        want = trained_names(drawn.config, drawn.parameters)
        yield same_names("trained tensors", map(str, got), want)

    return run


MEANINGFUL: Config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}

MEANINGLESS: dict[str, Config] = {
    "names that match nothing": {"target_modules": ["proj_q", "_proj"]},
    "an expression that matches no whole name": {"target_modules": "q_proj"},
    "an expression that is none": {"target_modules": ".*(q_proj"},
    "all targets excluded": {"exclude_modules": ["eq_proj", "q_proj"]},
    "all targets saved in full": {"modules_to_save": ["q_proj"]},
    "no layer of these numbers": {"layers_to_transform": [7]},
    "blocks of another name": {"layers_to_transform": [1], "layers_pattern": "towers"},
    "layers beside an expression": {"target_modules": r".*\.q_proj", "layers_to_transform": [1]},
    "layers_pattern without layers": {"layers_pattern": "layers"},
    "a rank of 0": {"r": 0},
    "no such bias": {"bias": "some"},
    "DoRA with a bias of B": {"use_dora": True, "lora_bias": True},
}
"""Configurations that adapt nothing, or contradict themselves."""


def _refused(method: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        drawn = draw("targets.list", case.number, case.seed)
        names = drawn.modules if method == "targets" else drawn.parameters
        asked(subject, method, MEANINGFUL, names)  # this one is not refused
        for what, changes in MEANINGLESS.items():
            is_so = is_refused(subject, method, {**MEANINGFUL, **changes}, names)
            what = f"whether {method} refuses {what}"
            yield Comparison(what, np.asarray(float(is_so)), np.asarray(1.0))

    return run


def is_refused(subject: GuardedImplementation, method: str, *arguments: Any) -> bool:
    """Whether a call ends in an exception of the implementation."""
    try:
        subject.call(method, *arguments)
    except Skip:
        return True
    except Fault as fault:
        if fault.kind != "raises":
            raise
        return True
    return False


def _cases(profile: str, dtype: str) -> int:
    """Names have no dtype."""
    return CASES[profile] * (dtype == "float32")


def _many(profile: str, dtype: str) -> int:
    return MANY[profile] * (dtype == "float32")


def _once(profile: str, dtype: str) -> int:
    return int(dtype == "float32")


_CHECKS: tuple[Check, ...] = (
    *(
        Check(
            f"names.targets.{kind}",
            "names",
            ("targets",),
            f"The adapted modules, with their ranks and alphas: {words}.",
            _targets(kind),
            _many if kind == "many" else _cases,
        )
        for kind, (_, words) in KINDS.items()
    ),
    *(
        Check(
            f"names.trainable.{kind}",
            "names",
            ("trainable",),
            f"The tensors that are trained and saved: {words}.",
            _trainable(kind),
            _cases,
        )
        for kind, words in TRAINED.items()
    ),
    *(
        Check(
            f"names.refused.{method}",
            "names",
            (method,),
            f"{method} refuses a configuration without a meaning, by an exception.",
            _refused(method),
            _once,
        )
        for method in ("targets", "trainable")
    ),
)

LEVEL = Level(
    "names",
    _CHECKS,
    cases=None,
    has_exact_lane=False,
    vectors={"targets.many": (("float32", 0),), "t*": (("float32", 0), ("float32", 1))},
    no_vectors={"refused.*": "its configurations are vectors that are invalid"},
    exact=("*",),
)
