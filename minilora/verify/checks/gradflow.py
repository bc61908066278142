"""Level ``grad-flow``: gradients reach every adapter and nothing else, whatever lies in between.

They are seen through ``train``: a step of SGD takes a parameter's gradient away from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from minilora.spec.models import Batch
from minilora.spec.target_modules import LoraConfig
from minilora.verify.checks import tiny_models
from minilora.verify.checks.model_answers import as_dict
from minilora.verify.checks.tiny_models import TinyModel
from minilora.verify.checks.train import SGD, ask, compared, wanted
from minilora.verify.core.errors import Fault
from minilora.verify.core.level import Level
from minilora.verify.core.types import Case, Check, Comparison
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray

CASES = {"quick": 1, "ci": 1, "nightly": 20}

ALL_LINEAR = LoraConfig(r=3, lora_alpha=7)
"""Every projection of every layer except the head."""

KINDS: dict[str, tuple[LoraConfig, dict[str, Any], int]] = {
    "all-layers": (ALL_LINEAR, {}, 1),
    "checkpointing": (ALL_LINEAR, {"gradient_checkpointing": True}, 2),
    "first-layer": (replace(ALL_LINEAR, layers_to_transform=(0,)), {}, 3),
    "last-layer": (replace(ALL_LINEAR, layers_to_transform=(1,)), {}, 3),
    "first-layer-checkpointing": (
        replace(ALL_LINEAR, layers_to_transform=(0,)),
        {"gradient_checkpointing": True},
        2,
    ),
    "zero-B": (ALL_LINEAR, {}, 1),
    "dropout": (replace(ALL_LINEAR, lora_dropout=0.25), {}, 1),
    "frozen": (ALL_LINEAR, {}, 2),
}
"""What is adapted, the settings beside SGD's, and the number of steps."""

WORDS = {
    "all-layers": "Every A and B of two layers has its gradient.",
    "checkpointing": "Gradient checkpointing changes no gradient.",
    "first-layer": "Gradients reach the first layer through a frozen one above it.",
    "last-layer": "Gradients reach the last layer; the frozen one below it is unchanged.",
    "first-layer-checkpointing": "With checkpointing, gradients reach it through a frozen one.",
}


@lru_cache(maxsize=64)
def draw_case(kind: str, number: int, seed: int) -> tuple[TinyModel, list[list[Batch]]]:
    """The model of two layers of a case, and a batch for each step."""
    lora, _, count = KINDS[kind]
    rng = tiny_models.rng_of(Case("", "", number, seed), f"grad-flow.{kind}")
    model = tiny_models.draw(tiny_models.DEEP, lora, rng)
    if kind == "zero-B":
        model = tiny_models.at_start(model)
    kinds = ((3, "right"), (1, "none"), (2, "left"))
    return model, [
        [tiny_models.draw_padded(rng, model.c, b, 6 + k, side, True)]
        for k, (b, side) in enumerate(kinds[:count])
    ]


@lru_cache(maxsize=64)
def expected(kind: str, number: int, seed: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """The true answers without dropout, and their σ in float32."""
    return wanted(*draw_case(kind, number, seed), SGD, (number, seed))


def _trained_steps(subject: GuardedImplementation, case: Case, kind: str) -> list[Any]:
    """The adapter after each step."""
    model, steps = draw_case(kind, case.number, case.seed)
    key = (f"grad-flow-{kind}", case.number, case.seed)
    paths = tiny_models.folders(key, case.dtype, partial(_small, kind, case.number, case.seed))
    return list(ask(subject, model, paths, steps, {**SGD, **KINDS[kind][1]}, case.dtype))


def _small(kind: str, number: int, seed: int) -> TinyModel:
    return draw_case(kind, number, seed)[0]


def _flow(kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        got = _trained_steps(subject, case, kind)
        yield from compared(subject, case.dtype, got, *expected(kind, case.number, case.seed))

    return run


def zero_B(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """With B = 0, the first step changes no bit of A, and every B has its gradient."""
    model, _ = draw_case("zero-B", case.number, case.seed)
    got = _trained_steps(subject, case, "zero-B")
    for file_name, name, k, array in got:
        if name.endswith(".A"):
            yield Comparison(
                f"{file_name} after step {k}", array, model.W[name].astype(array.dtype)
            )
    B = [each for each in got if each[1].endswith(".B")]
    yield from compared(subject, case.dtype, B, *expected("zero-B", case.number, case.seed))


def dropout(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """With dropout, every A and B has a gradient, different from that without."""
    model, _ = draw_case("dropout", case.number, case.seed)
    got = _trained_steps(subject, case, "dropout")
    moved = [float((array != model.W[name]).any()) for _, name, _, array in got]
    yield Comparison("whether A and B move", np.asarray(moved), np.ones(len(moved)))
    plain = compared(subject, case.dtype, got, *expected("dropout", case.number, case.seed))
    other = [float(each.judge().verdict == "fail") for each in plain]
    yield Comparison("whether dropout acts", np.asarray(other), np.ones(len(other)))


def frozen(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Training returns the adapter's tensors and no others, and changes no file."""
    model, steps = draw_case("frozen", case.number, case.seed)
    with TemporaryDirectory(prefix="minilora-") as folder:
        paths = model.write(Path(folder), case.dtype)
        before = _file_hashes(Path(folder))
        given = [[as_dict(batch) for batch in step] for step in steps]
        answer = subject.call("train", *map(str, paths), given, SGD)
        after = _file_hashes(Path(folder))
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    label = "files that changed" + "".join(f", {name}" for name in changed)
    yield Comparison(label, np.asarray(float(len(changed))), np.asarray(0.0))
    for k, step in enumerate(subject.items(answer, len(steps), "the list of steps"), 1):
        if not isinstance(step, Mapping):
            raise Fault("missing", f"step {k} is a {type(step).__name__}, expected a dict")
        yield tiny_models.same_names(
            f"names after step {k}", map(str, step), model.names().values()
        )


def _file_hashes(folder: Path) -> dict[str, str]:
    """A hash of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _cases(profile: str, dtype: str) -> int:
    return CASES[profile] * (dtype in ("float64", "float32"))


def _check(name: str, title: str, run: Any) -> Check:
    return Check(f"grad-flow.{name}", "grad-flow", ("train",), title, run, _cases)


_CHECKS: tuple[Check, ...] = (
    *(_check(kind, words, _flow(kind)) for kind, words in WORDS.items()),
    *(
        _check(run.__name__.replace("_", "-"), (run.__doc__ or "").splitlines()[0], run)
        for run in (zero_B, dropout, frozen)
    ),
)

LEVEL = Level(
    "grad-flow",
    _CHECKS,
    cases=None,
    quick="all-layers|dropout|zero-B",
    vectors={"*": (("float32", 0),)},
    no_vectors={
        "dropout": "what dropout draws has no one answer",
        "frozen": "which files a training changed, no answer tells",
    },
)
