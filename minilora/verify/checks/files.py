"""Level ``files``: adapters are saved and loaded without loss.

The folders are PEFT's: ``adapter_config.json`` and ``adapter_model.safetensors``. Loaded tensors
are compared with the written ones by name and bits; saved ones are read by minilora's reader, which
takes the scale of each module from the settings.
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
from minilora.verify.checks.model_answers import (
    as_dict,
    loss_and_logits,
    parameter,
    sigma_of,
    visible_answers,
    wanted_and_sigma,
)
from minilora.verify.checks.tiny_models import TinyModel, same_names
from minilora.verify.core.dtypes import DTYPES, Precision
from minilora.verify.core.errors import Fault, Skip
from minilora.verify.core.level import Level
from minilora.verify.core.types import MONTE_CARLO, Case, Check, Comparison
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray

CASES = {"quick": 1, "ci": 1, "nightly": 20}

ALIKE = replace(tiny_models.DEEP, kv_heads=tiny_models.DEEP.heads)
"""Of which q, k and v have one shape, and gate and up: no shape tells which is which."""

KINDS: dict[str, tuple[Config, LoraConfig, str]] = {
    "patterns": (
        ALIKE,
        LoraConfig(
            r=3, lora_alpha=7.5, target_modules=("q", "k", "v", "gate", "up", "down"),
            rank_pattern={"layers.1.q": ALIKE.d, "layers.0.down": 2},
            alpha_pattern={
                "layers.1.q": 4, "layers.1.v": 10, "layers.1.k": 5, "layers.0.gate": 6,
                "layers.0.up": 9,
            },
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
    "tables-to-save": (
        tiny_models.LLAMA,
        LoraConfig(
            r=3, lora_alpha=7, target_modules=("v", "gate"),
            modules_to_save=("head.weight", "embed.weight", "layers.0.norm1.weight"),
        ),
        "a language model's embedding, head and a norm, saved in full",
    ),
    "dora": (
        tiny_models.DEEP,
        LoraConfig(r=3, lora_alpha=7, target_modules=("k", "o"), variant="dora"),
        "DoRA's magnitudes, of either sign",
    ),
    "dora-conv1d": (
        tiny_models.GPT_2,
        LoraConfig(r=3, lora_alpha=7, target_modules=("o", "down"), variant="dora"),
        "DoRA on weights stored (in, out), one of them square",
    ),
    "embedding": (
        tiny_models.LLAMA,
        LoraConfig(r=3, lora_alpha=7, target_modules=("embed", "q")),
        "an adapted embedding",
    ),
}  # fmt: skip
"""The model, its adapter, and its settings in words. No alpha is a library's default."""


REGEX = (
    tiny_models.DEEP,
    LoraConfig(
        r=3, lora_alpha=7, target_modules=("q", "v", "down"),
        rank_pattern={"layers.0.down": 2}, alpha_pattern={"layers.1.q": 4, "layers.0.v": 10},
    ),
)  # fmt: skip
"""Patterns that are written as regular expressions."""

MATCHES_NOTHING = "proj"
"""A pattern that matches no module: it ends names, but is no whole part between dots."""


@dataclass(frozen=True)
class Stored:
    """An adapter in a folder: tensors by their names, and the settings."""

    model: TinyModel
    base: Path
    folder: Path
    tensors: Weights
    settings: dict[str, Any]


@lru_cache(maxsize=64)
def draw_case(kind: str, number: int, seed: int) -> tuple[TinyModel, Batch]:
    """The model of a case and a batch for it, the same in every dtype."""
    rng = tiny_models.rng_of(Case("", "", number, seed), f"files.{kind}")
    if kind == "second-adapter":
        first, batch = draw_case("patterns", number, seed)
        model = tiny_models.draw(
            first.c, LoraConfig(r=2, lora_alpha=9, target_modules=("k", "o")), rng
        )
        base = {name: first.W[name] for name in first.c.shapes()}
        return replace(model, W=model.W | base), batch
    c, lora, *_ = REGEX if kind == "regex" else KINDS[kind]
    model = tiny_models.draw(c, lora, rng)
    magnitudes = [name for name in model.W if name.endswith(".magnitude")]
    signed = {name: model.W[name] * rng.choice([-1, 1], model.W[name].shape) for name in magnitudes}
    model = replace(model, W=model.W | signed)
    if c.causal:
        return model, tiny_models.draw_batch(rng, c, 3, 7)
    ids, types = rng.integers(0, c.vocab, (3, 7)), rng.integers(0, 2, (3, 7))
    mask = np.arange(7) < np.array([[7], [5], [4]])
    return model, Batch(ids, rng.integers(0, 4, 3), mask, types=types)


@lru_cache(maxsize=64)
def stored(kind: str, dtype: str, number: int, seed: int) -> Stored:
    """The folders of a case. Patterns name the dotted ends of modules, as users write them."""
    model, _ = draw_case(kind, number, seed)
    base, folder = tiny_models.folders((f"files-{kind}", number, seed), dtype, lambda: model)
    settings = read_json(folder / CONFIG)
    for pattern in ("rank_pattern", "alpha_pattern"):
        short = tiny_models.dotted_ends(settings[pattern])
        if kind == "regex":
            short = {re.sub(r"\.[a-z_]+\.", r"\\..*\\.", name): v for name, v in short.items()}
            short[MATCHES_NOTHING] = 30
        settings[pattern] = short
    write_files(folder, {CONFIG: partial(pack_json, settings)})
    return Stored(model, base, folder, read_tensors(folder / WEIGHTS), settings)


def _of(kind: str, case: Case) -> Stored:
    return stored(kind, case.dtype, case.number, case.seed)


def arrays(got: Any) -> dict[str, Any]:
    """The answer of load, by names. Raises Fault."""
    if not isinstance(got, Mapping):
        raise Fault("missing", f"load gave a {type(got).__name__}, expected a dict of arrays")
    return {str(name): array for name, array in got.items()}


def saved_files(folder: Path) -> tuple[Weights, dict[str, Any]]:
    """The tensors and the settings that were saved. Raises Fault where they cannot be read."""
    try:
        return read_tensors(folder / WEIGHTS), read_json(folder / CONFIG)
    except FormatError as error:
        raise Fault("missing", f"the saved files: {error}".replace(str(folder), "")) from None


def same_tensors(
    subject: GuardedImplementation, what: str, got: Mapping[str, Any], want: Weights, dtype: str
) -> Iterable[Comparison]:
    """The same names, and under each the same bits."""
    yield same_names(f"names {what}", got, want)
    for name, array in want.items():
        if name in got:
            tensor = subject.answer(got[name], f"{name} {what}", array.shape, dtype)
            yield Comparison(f"{name} {what}", tensor, array)


def _load(kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        stored_case = _of(kind, case)
        got = arrays(subject.call("load", str(stored_case.base), str(stored_case.folder)))
        yield from same_tensors(subject, "loaded", got, stored_case.tensors, case.dtype)

    return run


def save_adapter(
    subject: GuardedImplementation,
    base: Path,
    tensors: Weights,
    settings: dict[str, Any],
    folder: Path,
) -> None:
    """Saves an adapter by the implementation. Raises Fault where a file is missing afterwards."""
    subject.call("save", str(base), tensors, settings, str(folder))
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        files = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise Fault("missing", f"save wrote no {' and no '.join(missing)}, but {files}")


def scales_and_variants(stored_case: Stored, folder: Path) -> Iterable[Comparison]:
    """The scale and the variant of each module, by the settings in a folder."""
    try:
        _, spec = read_adapter(folder, stored_case.model.c)
    except FormatError as error:
        what = f"whether the folder can be read: {error}".replace(str(folder), "")
        yield Comparison(what, np.asarray(0.0), np.asarray(1.0))
        return
    wanted = stored_case.model.spec
    yield same_names("adapted modules", spec.scale, wanted.scale)
    at = sorted(spec.scale.keys() & wanted.scale.keys())
    got, want = (np.asarray([float(t.scale[name]) for name in at]) for t in (spec, wanted))
    yield Comparison(f"s of {', '.join(at)}", got, want)
    got, want = (np.asarray([_number(t, name) for name in at]) for t in (spec, wanted))
    yield Comparison("the equation of each module, by its number", got, want)


def saved_in_full(stored_case: Stored, settings: Mapping[str, Any]) -> Iterable[Comparison]:
    """Whether modules_to_save of the settings names each module that the file has in full."""
    names = stored_case.model.names()
    modules = {names[name].rpartition(".")[0] for name in stored_case.model.lora.modules_to_save}
    said = settings.get("modules_to_save") or []
    named = {at for at in modules if any(f".{at}".endswith(f".{end}") for end in said)}
    if modules:
        yield same_names("modules that modules_to_save names", named, modules)


def _number(spec: TrainableSpec, at: str) -> int:
    """The number of a module's variant; 0 is LoRA itself."""
    known = [entry.variant for entry in REGISTRY.values()]
    return known.index(spec.variant[at]) + 1 if at in spec.variant else 0


def _save(kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        stored_case = _of(kind, case)
        with TemporaryDirectory(prefix="minilora-") as name:
            folder = Path(name)
            save_adapter(
                subject, stored_case.base, stored_case.tensors, stored_case.settings, folder
            )
            got, settings = saved_files(folder)
            yield from same_tensors(subject, "saved", got, stored_case.tensors, case.dtype)
            yield from scales_and_variants(stored_case, folder)
            yield from saved_in_full(stored_case, settings)

    return run


def resave(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Saving, loading and saving again keeps the tensors and the scales."""
    reasons = []
    for kind in KINDS:
        stored_case = _of(kind, case)
        with TemporaryDirectory(prefix="minilora-") as name:
            first, second = Path(name) / "first", Path(name) / "second"
            first.mkdir()
            second.mkdir()
            try:
                save_adapter(
                    subject, stored_case.base, stored_case.tensors, stored_case.settings, first
                )
                want, settings = saved_files(first)
                loaded = arrays(subject.call("load", str(stored_case.base), str(first)))
                save_adapter(subject, stored_case.base, loaded, settings, second)
            except Skip as skip:
                reasons.append(skip.reason)
                continue
            got, _ = saved_files(second)
            what = f"saved again ({kind})"
            yield from same_tensors(subject, what, got, want, case.dtype)
            yield from scales_and_variants(stored_case, second)
    if len(reasons) == len(KINDS):
        raise Skip(reasons[0])


@lru_cache(maxsize=64)
def expected(kind: str, number: int, seed: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Loss, logits and gradients in long double, and their σ in float32."""
    model, batch = draw_case(kind, number, seed)
    run = partial(visible_answers, batch, model.c, model.spec)
    return wanted_and_sigma(run, model.W, model.c.causal, (number, seed))


def ask(subject: GuardedImplementation, kind: str, stored_case: Stored, case: Case) -> Any:
    """The implementation's answer for a folder."""
    _, batch = draw_case(kind, case.number, case.seed)
    return subject.call(
        "model_loss", str(stored_case.base), str(stored_case.folder), as_dict(batch)
    )


def compared(
    kind: str, case: Case, got: Mapping[str, Array], precision: Precision
) -> Iterable[Comparison]:
    """Answers by the specification's names, beside the true ones."""
    want, sampled = expected(kind, case.number, case.seed)
    names = draw_case(kind, case.number, case.seed)[0].names()
    for name, array in got.items():
        sigma = sigma_of(sampled[name], want[name], precision)
        yield Comparison(names.get(name, name), array, want[name], sigma, MONTE_CARLO)


def _of_answer(
    subject: GuardedImplementation, kind: str, stored_case: Stored, case: Case, answer: Any
) -> Iterable[Comparison]:
    """Loss and logits."""
    model, batch = draw_case(kind, case.number, case.seed)
    classes = expected(kind, case.number, case.seed)[0]["logits"].shape[-1]
    got = loss_and_logits(subject, answer, batch, classes, model.c.causal, case.dtype)
    yield from compared(kind, case, got, subject.precision(case.dtype))


def _outputs(kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        stored_case = _of(kind, case)
        yield from _of_answer(
            subject, kind, stored_case, case, ask(subject, kind, stored_case, case)
        )

    return run


def _gradients(kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        stored_case = _of(kind, case)
        gradients = subject.entry(ask(subject, kind, stored_case, case), "grads")
        got = {}
        for name, file_name in stored_case.model.names().items():
            value, shape = (
                subject.entry(gradients, file_name, "grads"),
                stored_case.model.W[name].shape,
            )
            got[name] = parameter(subject, value, file_name, name, shape, case.dtype)
        yield from compared(kind, case, got, subject.precision(case.dtype))

    return run


def second_adapter(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """One model with one adapter and then another: each gives its own loss and logits."""
    first, (model, _) = _of("patterns", case), draw_case("second-adapter", case.number, case.seed)
    W = {name: array.astype(DTYPES[case.dtype]) for name, array in model.W.items()}
    with TemporaryDirectory(prefix="minilora-") as folder:
        write_adapter(folder, model.c, W, model.spec, model.lora)
        second = replace(first, model=model, folder=Path(folder))
        for when, kind, stored_case in (
            ("the first", "patterns", first),
            ("another", "second-adapter", second),
            ("the first again", "patterns", first),
        ):
            for comparison in _of_answer(
                subject, kind, stored_case, case, ask(subject, kind, stored_case, case)
            ):
                yield replace(comparison, array=f"{comparison.array} with {when}")


def _cases(profile: str, dtype: str) -> int:
    return CASES[profile] * (dtype in ("float64", "float32"))


LAWS: tuple[tuple[str, str, Any, tuple[str, ...]], ...] = (
    ("load", "Loading gives each tensor under its name, bit for bit: {}.", _load, ("load",)),
    ("outputs", "The stored adapter gives the correct loss and logits: {}.", _outputs,
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
        _outputs("regex"),
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

LEVEL = Level(
    "files",
    _CHECKS,
    cases=None,
    vectors={"load.*": (("float32", 0),), "outputs.*": (("float32", 0),)},
    no_vectors={
        "gradients.*": "the vectors of the outputs have the gradients",
        "save.*": "the answer is a folder: load it, and compare with the vector of loading",
        "resave": "the same",
        "second-adapter": "two vectors, one after the other",
    },
)
