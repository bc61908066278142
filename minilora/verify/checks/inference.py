"""Level ``inference``: a stored adapter has its whole effect, without a gradient being asked.

A model is a Hugging Face folder, an adapter a PEFT folder, as a serving engine is given them. The
answers are log-probabilities, or what the adapter adds to each parameter. Architecture, variant,
scale, patterns, tables, what is trained in full, shards and dtype are drawn together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from minilora.io.architectures import architecture_of
from minilora.io.atomic import write_files, write_tensors
from minilora.io.files import pack_json, read_json, read_tensors
from minilora.io.formats.huggingface import read_model
from minilora.io.formats.peft import CONFIG, WEIGHTS, read_adapter
from minilora.spec.lora import TrainableSpec, Weights, merge
from minilora.spec.models import Batch, Config, logits
from minilora.spec.target_modules import LoraConfig
from minilora.verify.checks import tiny_models
from minilora.verify.checks.model_answers import SAMPLES, temporary_folder
from minilora.verify.core.dtypes import Precision
from minilora.verify.core.errors import Fault, type_words
from minilora.verify.core.inputs import long
from minilora.verify.core.level import Level
from minilora.verify.core.tolerance import Draws, Rounding, noisy, spread
from minilora.verify.core.types import MONTE_CARLO, Case, Check, Comparison
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray
Rng = np.random.Generator
Choice = tuple[Config, dict[str, Any]]
"""The model, and the fields of `LoraConfig`."""

CASES = {"quick": 1, "ci": 1, "nightly": 12}

LLAMA = tiny_models.DEEP
QWEN2 = replace(tiny_models.QWEN2, layers=2)
GPT_2 = replace(tiny_models.GPT_2, layers=2)
ARCHITECTURES: tuple[Config, ...] = (LLAMA, GPT_2, QWEN2)
TIED: tuple[Config, ...] = (replace(LLAMA, tied=True), GPT_2, replace(QWEN2, tied=True))

SHARD_BYTES = 2500
"""So small that a model is several files."""


def projections(c: Config) -> list[str]:
    """The kinds of projections in a layer, by their names."""
    return sorted({at.rpartition(".")[2] for at in c.linears() if at.startswith("layers.")})


def targets_of(c: Config, rng: Rng) -> tuple[str, ...]:
    """Two or three kinds of projections; ``o`` has as many rows as columns."""
    others = [name for name in projections(c) if name != "o"]
    chosen = rng.choice(others, int(rng.integers(1, 3)), replace=False)
    return ("o", *(str(name) for name in chosen))


def plain(c: Config, rng: Rng) -> Choice:
    """One rank and one alpha for all."""
    alpha = float(rng.choice([7.0, 7.5, 2.0, -5.0]))
    return c, {"r": 3, "lora_alpha": alpha, "target_modules": targets_of(c, rng)}


def with_patterns(c: Config, rng: Rng) -> Choice:
    """Every projection, each with an alpha of its own in one layer; one rank is the whole side.

    Kernels pack q, k and v, and gate and up, which then must not share a scale.
    """
    _, chosen = plain(c, rng)
    names, other = projections(c), chosen["target_modules"][-1]
    ranks = {"layers.1.o": c.d, f"layers.0.{other}": 2}
    alphas = {f"layers.{i % 2}.{name}": 4.0 + 1.5 * i for i, name in enumerate(names)}
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
    return c, chosen | {"target_modules": tuple(names), **patterns}


def with_rslora(c: Config, rng: Rng) -> Choice:
    """α/√r, of unequal ranks."""
    _, chosen = plain(c, rng)
    return c, chosen | {"use_rslora": True, "rank_pattern": {"layers.0.o": 5}}


def of_variant(variant: str) -> Callable[[Config, Rng], Choice]:
    """Another variant than LoRA."""

    def choose(c: Config, rng: Rng) -> Choice:
        _, chosen = plain(c, rng)
        return c, chosen | {"variant": variant}

    return choose


def with_saved(c: Config, rng: Rng) -> Choice:
    """Modules that are saved in full: the head, or positions where it is tied, and a norm.

    In the base's folder both are another, their negatives. Not the last norm: two signs before the
    logits would be none.
    """
    _, chosen = plain(c, rng)
    head = ("head.weight",) if "head" in c.linears() else ("positions.weight",)
    norm = (name for name in c.shapes() if name.startswith("layers.0.norm1."))
    return c, chosen | {"modules_to_save": (*head, *norm)}


def with_biases(c: Config, rng: Rng) -> Choice:
    """Trained biases, which Qwen2 has of q, k and v, and GPT-2 of everything."""
    c = QWEN2 if c == LLAMA else c
    _, chosen = plain(c, rng)
    biased = "qkv" if c == GPT_2 else "q"
    targets = tuple(dict.fromkeys((*chosen["target_modules"], biased)))
    return c, chosen | {"bias": str(rng.choice(["lora_only", "all"])), "target_modules": targets}


def of_embedding(c: Config, rng: Rng) -> Choice:
    """An adapted embedding, which is not tied."""
    c = LLAMA if c == GPT_2 else c
    _, chosen = plain(c, rng)
    return c, chosen | {"target_modules": ("embed", *chosen["target_modules"])}


def of_head(c: Config, rng: Rng) -> Choice:
    """An adapted output head, which is not tied."""
    c = LLAMA if c == GPT_2 else c
    _, chosen = plain(c, rng)
    return c, chosen | {"target_modules": ("head", *chosen["target_modules"])}


def of_tied(c: Config, rng: Rng) -> Choice:
    """One adapter of an embedding and a head that are tied: it acts in its own use alone."""
    c = TIED[ARCHITECTURES.index(c)]
    _, chosen = plain(c, rng)
    return c, chosen | {
        "target_modules": (str(rng.choice(["embed", "head"])), *chosen["target_modules"])
    }


def combined(c: Config, rng: Rng) -> Choice:
    """Several of these together."""
    _, chosen = with_patterns(c, rng)
    chosen |= {"use_rslora": True} if rng.integers(2) else {"variant": "dora"}
    beside = str(rng.choice(["embed", "head", "saved", "bias"]))
    if beside == "embed" and "head" in c.linears():
        chosen["target_modules"] = ("embed", *chosen["target_modules"])
    elif beside == "bias" and c != LLAMA:
        chosen["bias"] = "all"
    elif beside == "head" and "head" in c.linears():
        chosen["target_modules"] = ("head", *chosen["target_modules"])
    else:
        chosen["modules_to_save"] = with_saved(c, rng)[1]["modules_to_save"]
    return c, chosen


def dora_of_gpt2(c: Config, rng: Rng) -> Choice:
    """DoRA of weights that lie (in, out): that of ``o`` is square, so that no shape tells."""
    return of_variant("dora")(GPT_2, rng)


def misfitting(c: Config, rng: Rng) -> Choice:
    """Attention in both layers of a Llama, whose names are then changed."""
    return LLAMA, {"r": 3, "lora_alpha": 7.5, "target_modules": ("q", "o")}


KINDS: dict[str, tuple[Callable[[Config, Rng], Choice], str]] = {
    "plain": (plain, "LoRA with an alpha that is not the rank"),
    "rslora": (with_rslora, "rsLoRA"),
    "patterns": (with_patterns, "rank_pattern and alpha_pattern, and a square A"),
    "dora": (of_variant("dora"), "DoRA"),
    "lora-bias": (of_variant("lora-bias"), "a trained bias of B"),
    "modules-to-save": (with_saved, "modules that are saved in full"),
    "bias": (with_biases, "trained biases of the base"),
    "embedding": (of_embedding, "an adapted embedding"),
    "head": (of_head, "an adapted output head"),
    "combined": (combined, "several of these together"),
    "tied": (of_tied, "the embedding or the head of a tied pair"),
    "dora-conv1d": (dora_of_gpt2, "DoRA on weights stored (in, out)"),
}

CHOICES = {kind: choose for kind, (choose, _) in KINDS.items()} | {
    "misfits": misfitting,
    "halved": misfitting,
}

HALVED = "layers.1.o.A"
"""The factor that the file of the kind ``halved`` lacks. Without it the module has no change."""


@dataclass(frozen=True)
class Stored:
    """The folders of a case, and what is in them: in long double, as read from the files."""

    base: Path
    folder: Path
    c: Config
    W: Weights
    adapted: Weights
    spec: TrainableSpec
    ids: Array


@lru_cache(maxsize=128)
def stored(kind: str, dtype: str, number: int, seed: int) -> Stored:
    """The folders of a case. Patterns name the dotted ends of modules, as users write them."""
    rng = tiny_models.rng_of(Case("", "", number, seed), f"inference.{kind}")
    start = [*CHOICES].index(kind) + number
    c, chosen = CHOICES[kind](ARCHITECTURES[start % len(ARCHITECTURES)], rng)
    model = tiny_models.draw(c, LoraConfig(**chosen), rng)
    at = temporary_folder() / f"inference-{kind}-{dtype}-{number}-{seed}"
    base, folder = model.write(at, dtype, SHARD_BYTES if start % 2 else None)
    settings = read_json(folder / CONFIG)
    for pattern in ("rank_pattern", "alpha_pattern"):
        settings[pattern] = tiny_models.dotted_ends(settings[pattern])
    write_files(folder, {CONFIG: partial(pack_json, settings)})
    c, W = read_model(base, np.float64)
    factors, spec = read_adapter(folder, c, np.float64, base=W)
    if kind == "halved":
        tensors = read_tensors(folder / WEIGHTS)
        del tensors[model.names()[HALVED]]
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
        factors[HALVED] = np.zeros_like(factors[HALVED])
    adapted = {name: long(array) for name, array in (W | factors).items()}
    ids = rng.integers(0, c.vocab, (int(rng.integers(1, 4)), int(rng.integers(5, 9))))
    return Stored(base, folder, c, {n: long(w) for n, w in W.items()}, adapted, spec, ids)


def _of(kind: str, case: Case) -> Stored:
    return stored(kind, case.dtype, case.number, case.seed)


def log_probabilities(z: Any) -> Any:
    """log p = z - c - log Σ exp(z - c), down each column."""
    z = z - z.max(0)
    return z - np.log(np.exp(z).sum(0))


def wanted_logits(it: Stored, W: Mapping[str, Any]) -> dict[str, Any]:
    """The log-probabilities, over any number system."""
    z, _ = logits(Batch(it.ids), W, it.c, it.spec)
    return {"log-probabilities": log_probabilities(z)}


def by_merged_weights(it: Stored, W: Mapping[str, Any]) -> dict[str, Any]:
    """The same by way of merged weights, whose rounding is another."""
    z, _ = logits(Batch(it.ids), merge(dict(W), it.spec), it.c, TrainableSpec())
    return {"log-probabilities": log_probabilities(z)}


def wanted_deltas(it: Stored, W: Mapping[str, Any]) -> dict[str, Any]:
    """What the adapter adds to each parameter, over any number system."""
    merged, start = merge(dict(W), it.spec), dict(it.W)
    if "head.weight" in merged:  # of a tied head that has an adapter
        start.setdefault("head.weight", start["embed.weight"])
    changed = {name: w - start[name] if name in start else w for name, w in merged.items()}
    kept = {name for name, w in merged.items() if w is W.get(name) and name not in it.spec.trained}
    return {name: delta for name, delta in changed.items() if name not in kept}


Way = Callable[[Stored, Mapping[str, Any]], dict[str, Any]]


WAYS: dict[str, tuple[Way, ...]] = {
    "logits": (wanted_logits, by_merged_weights),
    "deltas": (wanted_deltas,),
}


@lru_cache(maxsize=128)
def expected(
    ways: tuple[Way, ...], kind: str, dtype: str, number: int, seed: int, precision: Precision
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The true answers, and σ of each element: by noisy runs, and by storing the answer.

    There are several ways to a right answer, of which each rounds otherwise: the greatest σ counts.
    """
    it = stored(kind, dtype, number, seed)
    want, rounding = ways[0](it, it.adapted), Rounding(precision)
    sigma = {name: np.sqrt(rounding.stored(v.astype(np.float64))) for name, v in want.items()}
    for way in ways:

        def run(draws: Draws, way: Way = way) -> dict[str, Any]:
            W: dict[str, Any] = {n: noisy(w, precision, draws) for n, w in it.adapted.items()}
            return way(it, W)

        sampled = spread(run, want, SAMPLES, [SAMPLES, number, seed])
        sigma = {name: np.maximum(sigma[name], sampled[name]) for name in want}
    return want, sigma


def _expected(method: str, subject: GuardedImplementation, kind: str, case: Case) -> Any:
    precision = subject.precision(case.dtype)
    return expected(WAYS[method], kind, case.dtype, case.number, case.seed, precision)


def compared_logits(
    subject: GuardedImplementation, kind: str, case: Case, folder: Path, words: str = ""
) -> Iterable[Comparison]:
    """The implementation's log-probabilities of a folder, beside those of the case's adapter."""
    it = _of(kind, case)
    want, sigma = _expected("logits", subject, kind, case)
    answer = subject.call("logits", str(it.base), str(folder), it.ids)
    z = subject.answer(answer, "logits", (*it.ids.shape, it.c.vocab))
    got = log_probabilities(z.reshape(-1, it.c.vocab).T.astype(np.longdouble))
    for name, array in want.items():
        yield Comparison(f"{name}{words}", got, array, sigma[name], MONTE_CARLO)


def delta_name(c: Config, name: str) -> str:
    """The key of a parameter's change: its module's path, and ``.bias`` of a bias."""
    at, _, part = name.rpartition(".")
    return architecture_of(c).paths(c)[at] + (".bias" if part == "bias" else "")


def compared_deltas(
    subject: GuardedImplementation,
    kind: str,
    case: Case,
    folder: Path,
    words: str = "",
    renamed: Callable[[str], str] = str,
) -> Iterable[Comparison]:
    """What the implementation adds for a folder, beside what the case's adapter adds.

    What stands under the folder's own names, ``renamed``, has not been left out in silence.
    """
    it = _of(kind, case)
    want, sigma = _expected("deltas", subject, kind, case)
    answer = subject.call("deltas", str(it.base), str(folder))
    if not isinstance(answer, Mapping):
        raise Fault("missing", f"deltas gave {type_words(answer)}, expected a dict")
    names = {delta_name(it.c, name): name for name in want}
    fitting = {renamed(shown): shown for shown in names}
    answer = {fitting.get(str(key), str(key)): value for key, value in answer.items()}
    for shown, name in names.items():
        flat = 1 if want[name].shape[1] == 1 else 2
        shape = want[name].shape[:flat]
        value = answer.get(shown, np.zeros(shape))  # what is left out is not changed
        got = subject.answer(value, f"deltas[{shown!r}]", shape).reshape(want[name].shape)
        label = f"the change of {shown}{words}"
        yield Comparison(label, got, want[name], sigma[name], MONTE_CARLO)
    for shown in sorted(answer.keys() - names.keys()):
        got = subject.answer(answer[shown], f"deltas[{shown!r}]")
        if got.any():
            label = f"the change of {shown}, not adapted{words}"
            yield Comparison(label, got, np.zeros_like(got))


def _whole(
    compared: Callable[..., Iterable[Comparison]], kind: str
) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        return compared(subject, kind, case, _of(kind, case).folder)

    return run


def _renamed(old: str, new: str) -> Callable[[str], str]:
    return lambda name: name.replace(old, new)


MISFITS: dict[str, tuple[Callable[[str], str], str]] = {
    "prefix": (lambda n: n.removeprefix("base_model.model."), "names without base_model.model."),
    "adapter-name": (_renamed(".weight", ".other.weight"), "names with an adapter's name in them"),
    "misspelt": (_renamed("self_attn.", "attention."), "names that no module has"),
    "other-model": (_renamed("model.layers.", "transformer.h."), "names of another architecture"),
    "partial": (_renamed("layers.1.", "layers.7."), "some names of a layer that is not there"),
}
"""Tensors' names that do not fit the model as they stand."""


def _misfit(
    compared: Callable[..., Iterable[Comparison]], name: str
) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    rename, words = MISFITS[name]

    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        it = _of("misfits", case)
        with TemporaryDirectory(prefix="minilora-") as other:
            folder = Path(other)
            tensors = {rename(n): array for n, array in read_tensors(it.folder / WEIGHTS).items()}
            write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
            write_files(folder, {CONFIG: (it.folder / CONFIG).read_bytes})
            yield from _or_refused(compared, subject, "misfits", case, folder, f" of {words}")

    return run


def _or_refused(
    compared: Callable[..., Iterable[Comparison]],
    subject: GuardedImplementation,
    kind: str,
    case: Case,
    folder: Path,
    words: str,
) -> Iterable[Comparison]:
    """The answers to a folder; where it is refused, those to one that may not be."""
    try:
        yield from compared(subject, kind, case, folder, words)
        return
    except Fault as fault:
        if fault.kind != "raises":
            raise
    yield from compared(subject, "misfits", case, _of("misfits", case).folder)


def missing_factor(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """An adapter whose file lacks a factor is refused, or that module is not adapted."""
    folder = _of("halved", case).folder
    return _or_refused(compared_logits, subject, "halved", case, folder, " without a factor")


def _cases(kind: str) -> Callable[[str, str], int]:
    """Half precisions have the combination alone: what else they show is the other levels'."""
    return lambda profile, dtype: CASES[profile] * (kind == "combined" or dtype == "float32")


_NEEDS = {"logits": compared_logits, "deltas": compared_deltas}
_TITLES = {
    "logits": "The log-probabilities under a stored adapter: {}.",
    "deltas": "What a stored adapter adds to each weight and bias: {}.",
}

_CHECKS: tuple[Check, ...] = (
    *(
        Check(
            f"inference.{method}.{kind}",
            "inference",
            (method,),
            _TITLES[method].format(words),
            _whole(compared, kind),
            _cases(kind),
        )
        for method, compared in _NEEDS.items()
        for kind, (_, words) in KINDS.items()
    ),
    *(
        Check(
            f"inference.{beginning}.{name}",
            "inference",
            (method,),
            f"{title}: {words}.",
            _misfit(compared, name),
            _cases("names"),
        )
        for name, (rename, words) in MISFITS.items()
        for beginning, method, compared, title in (
            (
                "names",
                "logits",
                compared_logits,
                "An adapter that does not fit is refused, or has its effect",
            ),
            (
                "deltas.names",
                "deltas",
                partial(compared_deltas, renamed=rename),
                "What does not fit is refused, or adds its whole change",
            ),
        )
    ),
    Check(
        "inference.names.missing-factor",
        "inference",
        ("logits",),
        missing_factor.__doc__ or "",
        missing_factor,
        _cases("names"),
    ),
)

LEVEL = Level(
    "inference",
    _CHECKS,
    cases=None,
    quick="(logits|deltas)\\.combined|names\\.partial",
    vectors={"logits.*": (("float32", 0),), "deltas.*": (("float32", 0),)},
    no_vectors={"*names.*": "it may be refused, or have its effect"},
)
