"""Level ``files``: adapters saved and loaded, and what is stored is enough for the same function.

The folders are those of PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``. What an
implementation loads is compared with what was written, by names and bits; what it saves is read by
this package's own reader, which takes the scale of each module from the settings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from minilora.io.atomic import write_files
from minilora.io.errors import FormatError
from minilora.io.files import pack_json, read_json, read_tensors
from minilora.io.formats.peft import CONFIG, WEIGHTS, read_adapter, write_adapter
from minilora.spec.lora import TrainableSpec, Weights
from minilora.spec.models import Batch, Config
from minilora.spec.target_modules import LoraConfig
from minilora.spec.variants import REGISTRY
from minilora.verify.checks import tiny_models
from minilora.verify.checks.model import _outside, answers, as_dict, visible
from minilora.verify.checks.tiny_models import Small, same_names
from minilora.verify.checks.train import SAMPLES, sigma_of
from minilora.verify.core.dtypes import DTYPES, Precision
from minilora.verify.core.errors import Fault, Skip
from minilora.verify.core.inputs import long
from minilora.verify.core.level import Level
from minilora.verify.core.tolerance import unit_roundoff
from minilora.verify.core.types import MONTE_CARLO, Case, Check, Comparison
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray

CASES = {"quick": 1, "ci": 1, "nightly": 20}

KINDS: dict[str, tuple[Config, LoraConfig, str]] = {
    "patterns": (
        tiny_models.DEEP,
        LoraConfig(
            r=3, lora_alpha=7.5, target_modules=("q", "v", "down"),
            rank_pattern={"layers.1.q": tiny_models.DEEP.d, "layers.0.down": 2},
            alpha_pattern={"layers.1.q": 4, "layers.1.v": 10},
        ),
        "rank_pattern and alpha_pattern, a fractional alpha and a square A",
    ),
    "rslora": (
        tiny_models.GPT_2,
        LoraConfig(
            r=3, lora_alpha=7, use_rslora=True, target_modules=("qkv", "o", "down"),
            rank_pattern={"o": 5},
        ),
        "rsLoRA on fused and transposed weights",
    ),
    "modules-to-save": (
        tiny_models.BERT,
        LoraConfig(
            r=3, lora_alpha=7, target_modules=("q", "o", "down"),
            alpha_pattern={"layers.0.down": 11}, bias="lora_only",
            modules_to_save=("head.weight", "head.bias"),
        ),
        "modules_to_save and biases, and a name that is the end of another",
    ),
    "dora": (
        tiny_models.DEEP,
        LoraConfig(r=3, lora_alpha=7, target_modules=("k", "o"), variant="dora"),
        "DoRA's magnitudes",
    ),
    "embedding": (
        tiny_models.LLAMA,
        LoraConfig(r=3, lora_alpha=7, target_modules=("embed", "q")),
        "an adapted embedding",
    ),
}  # fmt: skip
"""The model, its adapter, and what there is to store, in words. No α is a library's default."""


EXPRESSIONS = (
    tiny_models.DEEP,
    LoraConfig(
        r=3, lora_alpha=7, target_modules=("q", "v", "down"),
        rank_pattern={"layers.0.down": 2}, alpha_pattern={"layers.1.q": 4, "layers.0.v": 10},
    ),
)  # fmt: skip
"""Patterns that are written as regular expressions."""

MISSES = "proj"
"""A pattern that hits nothing: it is the end of names, and no part of one between dots."""


@dataclass(frozen=True)
class Stored:
    """An adapter as it lies in a folder: tensors by their names, and the settings."""

    small: Small
    base: Path
    folder: Path
    tensors: Weights
    settings: dict[str, Any]


@lru_cache(maxsize=64)
def drawn(kind: str, number: int, seed: int) -> tuple[Small, Batch]:
    """The model of a case and a batch for it, the same in every dtype."""
    rng = tiny_models.rng_of(Case("", "", number, seed), f"files.{kind}")
    if kind == "second-adapter":
        first, batch = drawn("patterns", number, seed)
        of = tiny_models.draw(
            first.c, LoraConfig(r=2, lora_alpha=9, target_modules=("k", "o")), rng
        )
        base = {name: first.W[name] for name in first.c.shapes()}
        return replace(of, W=of.W | base), batch
    c, lora, *_ = EXPRESSIONS if kind == "regex" else KINDS[kind]
    of = tiny_models.draw(c, lora, rng)
    if c.causal:
        return of, tiny_models.draw_batch(rng, c, 3, 7)
    ids, types = rng.integers(0, c.vocab, (3, 7)), rng.integers(0, 2, (3, 7))
    mask = np.arange(7) < np.array([[7], [5], [4]])
    return of, Batch(ids, rng.integers(0, 4, 3), mask, types=types)


@lru_cache(maxsize=64)
def stored(kind: str, dtype: str, number: int, seed: int) -> Stored:
    """The folders of a case. Patterns name the dotted ends of modules, as one writes them."""
    of, _ = drawn(kind, number, seed)
    base, folder = tiny_models.folders((f"files-{kind}", number, seed), dtype, lambda: of)
    settings = read_json(folder / CONFIG)
    for pattern in ("rank_pattern", "alpha_pattern"):
        short = {name.partition(".")[2]: value for name, value in settings[pattern].items()}
        if kind == "regex":
            short = {re.sub(r"\.[a-z_]+\.", r"\\..*\\.", name): v for name, v in short.items()}
            short[MISSES] = 30
        settings[pattern] = short
    write_files(folder, {CONFIG: partial(pack_json, settings)})
    return Stored(of, base, folder, read_tensors(folder / WEIGHTS), settings)


def _of(kind: str, case: Case) -> Stored:
    return stored(kind, case.dtype, case.number, case.seed)


def arrays(got: Any) -> dict[str, Any]:
    """What load gave, by names. Raises Fault."""
    if not isinstance(got, Mapping):
        raise Fault("missing", f"load gave a {type(got).__name__}, expected a dict of arrays")
    return {str(name): array for name, array in got.items()}


def contents(folder: Path) -> tuple[Weights, dict[str, Any]]:
    """The tensors and the settings that save left. Raises Fault where they cannot be read."""
    try:
        return read_tensors(folder / WEIGHTS), read_json(folder / CONFIG)
    except FormatError as error:
        raise Fault("missing", f"what save left: {error}".replace(str(folder), "")) from None


def same_tensors(
    subject: GuardedImplementation, what: str, got: Mapping[str, Any], want: Weights, dtype: str
) -> Iterable[Comparison]:
    """The same names, and under each the same bits."""
    yield same_names(f"names {what}", got, want)
    for name, array in want.items():
        if name in got:
            there = subject.answer(got[name], f"{name} {what}", array.shape, dtype)
            yield Comparison(f"{name} {what}", there, array)


def _load(kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        it = _of(kind, case)
        got = arrays(subject.call("load", str(it.base), str(it.folder)))
        yield from same_tensors(subject, "loaded", got, it.tensors, case.dtype)

    return run


def saved(
    subject: GuardedImplementation,
    base: Path,
    tensors: Weights,
    settings: dict[str, Any],
    folder: Path,
) -> None:
    """An adapter saved by the implementation. Raises Fault where no file is there after."""
    subject.call("save", str(base), tensors, settings, str(folder))
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise Fault("missing", f"save left no {' and no '.join(missing)}, but {there}")


def understood(it: Stored, folder: Path) -> Iterable[Comparison]:
    """What the settings in a folder mean: s of each module, and the equation."""
    try:
        _, tuning = read_adapter(folder, it.small.c)
    except FormatError as error:
        what = f"whether the folder can be read: {error}".replace(str(folder), "")
        yield Comparison(what, np.asarray(0.0), np.asarray(1.0))
        return
    wanted = it.small.tuning
    yield same_names("adapted modules", tuning.scale, wanted.scale)
    at = sorted(tuning.scale.keys() & wanted.scale.keys())
    got, want = (np.asarray([float(t.scale[name]) for name in at]) for t in (tuning, wanted))
    yield Comparison(f"s of {', '.join(at)}", got, want)
    got, want = (np.asarray([_number(t, name) for name in at]) for t in (tuning, wanted))
    yield Comparison("the equation of each module, by its number", got, want)


def _number(tuning: TrainableSpec, at: str) -> int:
    """Which of the variants a module has; 0 is LoRA itself."""
    known = [entry.variant for entry in REGISTRY.values()]
    return known.index(tuning.variant[at]) + 1 if at in tuning.variant else 0


def _save(kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        it = _of(kind, case)
        with TemporaryDirectory(prefix="minilora-") as name:
            folder = Path(name)
            saved(subject, it.base, it.tensors, it.settings, folder)
            got, _ = contents(folder)
            yield from same_tensors(subject, "saved", got, it.tensors, case.dtype)
            yield from understood(it, folder)

    return run


def resave(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Saving, loading and saving again keeps the tensors and the scales."""
    reasons = []
    for kind in KINDS:
        it = _of(kind, case)
        with TemporaryDirectory(prefix="minilora-") as name:
            first, second = Path(name) / "first", Path(name) / "second"
            first.mkdir()
            second.mkdir()
            try:
                saved(subject, it.base, it.tensors, it.settings, first)
                want, settings = contents(first)
                loaded = arrays(subject.call("load", str(it.base), str(first)))
                saved(subject, it.base, loaded, settings, second)
            except Skip as skip:
                reasons.append(skip.reason)
                continue
            got, _ = contents(second)
            what = f"saved again ({kind})"
            yield from same_tensors(subject, what, got, want, case.dtype)
            yield from understood(it, second)
    if len(reasons) == len(KINDS):
        raise Skip(reasons[0])


@lru_cache(maxsize=64)
def expected(kind: str, number: int, seed: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Loss, logits and gradients in long double, and their σ in float32, sampled as in level train.

    BERT's erf has no long double: what is wanted has rounded too then, as float64 does.
    """
    of, batch = drawn(kind, number, seed)

    def run(W: Weights) -> dict[str, Array]:
        return _outside(batch, answers(batch, W, of.c, of.tuning), of.c.causal)

    both = 1.0 if of.c.causal else 2**0.5
    want = run({name: long(v) if of.c.causal else v for name, v in of.W.items()})
    rng = np.random.default_rng([number, seed])
    u, squares = unit_roundoff("float32"), {name: np.zeros(v.shape) for name, v in want.items()}
    for _ in range(SAMPLES):
        W = {n: (v * (1 + u * rng.uniform(-1, 1, v.shape))).astype("f") for n, v in of.W.items()}
        for name, array in run(W).items():
            squares[name] += (array - want[name].astype(np.float64)) ** 2
    return want, {name: both * np.sqrt(v / SAMPLES) for name, v in squares.items()}


def ask(subject: GuardedImplementation, kind: str, it: Stored, case: Case) -> Any:
    """What an implementation answers of a folder."""
    _, batch = drawn(kind, case.number, case.seed)
    return subject.call("model_loss", str(it.base), str(it.folder), as_dict(batch))


def compared(
    kind: str, case: Case, got: Mapping[str, Array], precision: Precision
) -> Iterable[Comparison]:
    """Some of the answers, by the specification's names, beside what is wanted."""
    want, sampled = expected(kind, case.number, case.seed)
    names = drawn(kind, case.number, case.seed)[0].names()
    for name, array in got.items():
        sigma = sigma_of(sampled[name], want[name], precision)
        yield Comparison(names.get(name, name), array, want[name], sigma, MONTE_CARLO)


def _of_answer(
    subject: GuardedImplementation, kind: str, it: Stored, case: Case, answer: Any
) -> Iterable[Comparison]:
    """Loss and logits."""
    _, batch = drawn(kind, case.number, case.seed)
    classes = expected(kind, case.number, case.seed)[0]["logits"].shape[-1]
    shape = (*batch.ids.shape, classes) if it.small.c.causal else (len(batch.ids), classes)
    loss = subject.answer(subject.entry(answer, "loss"), "loss", (), case.dtype)
    z = subject.answer(subject.entry(answer, "logits"), "logits", shape, case.dtype)
    got = {"loss": loss, "logits": visible(batch, z)}
    yield from compared(kind, case, got, subject.precision(case.dtype))


def _function(kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        it = _of(kind, case)
        yield from _of_answer(subject, kind, it, case, ask(subject, kind, it, case))

    return run


def _gradients(kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        it = _of(kind, case)
        there = subject.entry(ask(subject, kind, it, case), "grads")
        got = {}
        for name, theirs in it.small.names().items():
            shape = it.small.W[name].shape
            flat = shape if shape[1] > 1 or name.endswith((".A", ".B")) else shape[:1]
            g = subject.answer(subject.entry(there, theirs, "grads"), theirs, flat, case.dtype)
            got[name] = g.reshape(shape)
        yield from compared(kind, case, got, subject.precision(case.dtype))

    return run


def second_adapter(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """One model with one adapter and then another: each gives its own loss and logits."""
    first, (of, _) = _of("patterns", case), drawn("second-adapter", case.number, case.seed)
    W = {name: array.astype(DTYPES[case.dtype]) for name, array in of.W.items()}
    with TemporaryDirectory(prefix="minilora-") as folder:
        write_adapter(folder, of.c, W, of.tuning, of.lora)
        second = replace(first, small=of, folder=Path(folder))
        for which, kind, it in (
            ("the first", "patterns", first),
            ("another", "second-adapter", second),
            ("the first again", "patterns", first),
        ):
            for each in _of_answer(subject, kind, it, case, ask(subject, kind, it, case)):
                yield replace(each, array=f"{each.array} with {which}")


def _cases(profile: str, dtype: str) -> int:
    return CASES[profile] * (dtype in ("float64", "float32"))


LAWS: tuple[tuple[str, str, Any, tuple[str, ...]], ...] = (
    ("load", "Loading gives each tensor under its name, bit for bit: {}.", _load, ("load",)),
    ("outputs", "The stored adapter gives the correct loss and logits: {}.", _function,
     ("model_loss",)),
    ("save", "Saving keeps each tensor under its name, bit for bit, and each scale: {}.", _save,
     ("save",)),
    ("gradients", "Every tensor of the stored adapter has its gradient: {}.", _gradients,
     ("model_loss",)),
)  # fmt: skip

_CHECKS: tuple[Check, ...] = (
    *(
        Check(f"files.{law}.{kind}", "files", needs, title.format(words), make(kind), _cases)
        for law, title, make, needs in LAWS
        for kind, (_, _, words) in KINDS.items()
    ),
    Check(
        "files.outputs.regex",
        "files",
        ("model_loss",),
        "The stored adapter gives the correct loss and logits: patterns as regular expressions.",
        _function("regex"),
        _cases,
    ),
    Check(
        "files.second-adapter",
        "files",
        ("model_loss",),
        second_adapter.__doc__ or "",
        second_adapter,
        _cases,
    ),
    Check(
        "files.resave",
        "files",
        ("save", "load"),
        (resave.__doc__ or "").splitlines()[0],
        resave,
        _cases,
    ),
)

LEVEL = Level("files", _CHECKS, cases=None)
