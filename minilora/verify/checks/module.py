"""Level ``module``: any layer, given by its kind and geometry, adapted, trained and merged.

One law holds for all: the adapted layer is its base with W + s B A for W, the delta in the layout
of the layer's own weight. ``module(layer, adapter, x, mode=…)`` answers ``{"y"}``; with ``dy`` the
gradients besides; merged, the weight and the bias that are held. Whether the adapter of a
convolution in groups has the shape of the weight, or reads the channels of all groups, is declared:
``conventions = {"conv_groups": "weight"}``, which is taken where nothing is declared, or
``"blocks"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from minilora.spec.variants import DORA_FULL
from minilora.verify.checks.module_inputs import (
    ALMOST_NONE,
    DROPPED,
    KINDS,
    ROUNDED,
    ModuleInputs,
    draw_module,
    variant_of,
    wide,
)
from minilora.verify.checks.module_layers import (
    LAYERS,
    Answers,
    Product,
    answers,
    by_branch,
    by_substitution,
    merged,
)
from minilora.verify.checks.module_parts import (
    dropped_in_evaluation,
    dropped_wrongly,
    parts_of,
    undropped_of,
)
from minilora.verify.core.dtypes import Precision
from minilora.verify.core.errors import Fault, Skip
from minilora.verify.core.level import Level
from minilora.verify.core.tolerance import Draws, Rounding, noisy, spread
from minilora.verify.core.types import MONTE_CARLO, Case, Check, Comparison
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray
Run = Callable[[GuardedImplementation, Case], Iterable[Comparison]]

SAMPLES = 16

CASES = {"quick": 2, "ci": 6, "nightly": 120}

WORDS = {
    "linear": "a linear layer, stored either way",
    "conv": "a convolution of one to three dimensions, with stride and padding",
    "conv.padding-mode": "a convolution whose padding is reflected, repeated or circular",
    "conv.dilation": "a convolution with dilation",
    "conv.pointwise": "a convolution whose kernel has size 1",
    "conv.groups": "a convolution in groups",
    "conv.groups-dora": "a convolution in groups, with DoRA",
    "conv.all": "a convolution with stride, padding mode, dilation and groups at once",
    "embedding": "an embedding, with a scale and a padding row",
    "embedding.max-norm": "an embedding whose rows are within max_norm, adapted or not",
    "fused": "several projections in one weight, some adapted",
    "experts": "experts with one weight (e, m, n)",
    "experts.single": "one expert with a weight (1, m, n)",
    "attention": "attention that reads its weights itself, q, k and v in one",
    "attention.out": "attention whose output's projection is adapted too",
    "encoder": "a layer of an encoder whose first linear is adapted",
}
"""The kinds, in words."""

DROPOUT = ("linear", "conv", "conv.pointwise", "fused")
"""The kinds with dropout on the branch's input."""


@lru_cache(maxsize=256)
def drawn(case: Case, name: str, groups_as: str) -> ModuleInputs:
    """The inputs of a case: all checks of a kind ask for the same layers."""
    return draw_module(case, name, groups_as)


def ask(
    subject: GuardedImplementation, inputs: ModuleInputs, mode: str, **given: Any
) -> Mapping[str, Any]:
    """The implementation's answer. Raises Skip or Fault."""
    if inputs.index is not None:
        given["index"] = inputs.index
    try:
        answer = subject.call("module", inputs.layer, inputs.adapter, inputs.x, mode=mode, **given)
    except Fault as fault:
        if fault.kind == "raises" and mode == "merged" and _lacks_bias(inputs):
            raise Skip("no bias of B is merged where the layer has no bias") from None
        raise
    subject.traits.add(f"mode is {mode}")
    if not isinstance(answer, Mapping):
        raise Fault("missing", f"module answers a {type(answer).__name__}, expected a dict with y")
    return answer


def compared(
    subject: GuardedImplementation,
    inputs: ModuleInputs,
    answer: Mapping[str, Any],
    want: Answers,
    sigma: Mapping[str, Array],
    words: str = "",
) -> Iterable[Comparison]:
    """Each of these arrays; ``words`` follow its name.

    An adapter in blocks is another one than a mutant is asked for, and so are its answers' names.
    """
    groups_as = subject.conventions.get("conv_groups", "weight")
    if inputs.layer.get("groups", 1) > 1 and groups_as != "weight":
        words += f", adapted in {groups_as}"
    for name, array in want.items():
        dtype = str(inputs.dy.dtype)
        got = subject.answer(subject.entry(answer, name), name, np.shape(array), dtype)
        parts = parts_of(inputs, name, got)
        yield Comparison(name + words, got, array, sigma.get(name), MONTE_CARLO, parts)


@lru_cache(maxsize=256)
def expected(
    of: tuple[Case, str, str], differentiated: bool, precision: Precision
) -> tuple[Answers, dict[str, Array]]:
    """The true y and gradients of the inputs `drawn` with ``of``, and their σ where they round.

    In float64, which holds whole numbers exactly; where the answer is rounded there too, both have
    rounded independently.
    """
    inputs = drawn(*of)
    variant, column = variant_of(inputs.adapter)
    variant = DORA_FULL if column == "magnitude" and differentiated else variant
    want = answers(inputs.module(wide, variant), wide(inputs.dy))
    if inputs.kind not in ROUNDED:
        return want, {}

    def sampled(way: Product) -> dict[str, Array]:
        def run(draws: Draws) -> Answers:
            def number(array: Array) -> Any:
                return noisy(array, precision, draws)

            return answers(inputs.module(number, variant), number(inputs.dy), way)

        return spread(run, want, SAMPLES, (of[0].number, of[0].seed))

    ways, rounding = [sampled(way) for way in (by_substitution, by_branch)], Rounding(precision)
    both = 2.0 if precision.accumulation == "float64" else 1.0
    sigma = {
        name: np.sqrt(both * (np.maximum(ways[0][name], ways[1][name]) ** 2 + rounding.stored(v)))
        for name, v in want.items()
    }
    return want, sigma


def _key(subject: GuardedImplementation, case: Case, name: str) -> tuple[Case, str, str]:
    of_kind = replace(case, check=f"module.{name}")
    return of_kind, name, subject.conventions.get("conv_groups", "weight")


def inputs_of(subject: GuardedImplementation, case: Case, name: str) -> ModuleInputs:
    """The inputs, as the implementation declares adapters in groups; tells what they are like."""
    inputs = drawn(*_key(subject, case, name))
    subject.traits |= {*inputs.traits}
    return inputs


def _expected(
    subject: GuardedImplementation, case: Case, name: str
) -> tuple[Answers, dict[str, Array]]:
    differentiated = subject.conventions.get("dora_norm") == "differentiated"
    return expected(_key(subject, case, name), differentiated, subject.precision(case.dtype))


def _forward(name: str) -> Run:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        inputs = inputs_of(subject, case, name)
        want, sigma = _expected(subject, case, name)
        for mode in ("train", "eval"):
            answer = ask(subject, inputs, mode)
            yield from compared(subject, inputs, answer, {"y": want["y"]}, sigma, f", {mode}")

    return run


def _gradients(name: str) -> Run:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        inputs = inputs_of(subject, case, name)
        want, sigma = _expected(subject, case, name)
        answer = ask(subject, inputs, ("train", "eval")[case.number % 2], dy=inputs.dy)
        yield from compared(subject, inputs, answer, want, sigma)

    return run


def _merged(name: str) -> Run:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        inputs = inputs_of(subject, case, name)
        want, sigma = _expected(subject, case, name)
        answer = ask(subject, inputs, "merged")
        yield from compared(subject, inputs, answer, {"y": want["y"]}, sigma)
        if inputs.kind in ROUNDED:
            return
        held = merged(inputs.module(wide))
        if held["W"].shape != inputs.layer["W"].shape:  # blocks of a weight without groups
            del held["W"]
        for part in held.keys() - answer.keys():
            subject.remark(f"module gives no {part} where it is merged: it is not judged")
        judged = {part: array for part, array in held.items() if part in answer}
        yield from compared(subject, inputs, answer, judged, {})

    return run


def _lacks_bias(inputs: ModuleInputs) -> bool:
    """Whether B has a bias and the layer none, to which it could be added."""
    return "lora_bias" in inputs.adapter and "bias" not in inputs.layer


def _without_column(inputs: ModuleInputs) -> ModuleInputs:
    """The case as LoRA: what dropout leaves of DoRA's base is another question."""
    own = ("magnitude", "use_dora", "lora_bias")
    adapter = {name: value for name, value in inputs.adapter.items() if name not in own}
    return ModuleInputs(**vars(inputs) | {"adapter": adapter})


def evaluation(name: str) -> Run:
    """In evaluation, and where the rate is almost 0, dropout changes nothing."""

    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        inputs = inputs_of(subject, case, name)
        want, _ = _expected(subject, case, name)
        if "dropout" in subject.fixed.lacking:
            raise Skip("not supported: there is no dropout")

        def output(mode: str, p: float) -> Array:
            answer = ask(subject, inputs.with_adapter(p=p), mode)
            return subject.answer(subject.entry(answer, "y"), "y", want["y"].shape, case.dtype)

        def varies() -> tuple[str, ...]:
            several = [output("eval", DROPPED) for _ in range(REPEATED)]
            alike = all(np.array_equal(several[0], y) for y in several)
            return () if alike else dropped_in_evaluation(inputs)

        for mode, p in (("eval", DROPPED), ("train", ALMOST_NONE), ("merged", DROPPED)):
            y = output(mode, p)
            parts, shows = parts_of(inputs, "y", y), varies if mode == "eval" else None
            yield Comparison(f"y, {mode}, p = {p:.2g}", y, want["y"], parts=parts, shows=shows)

    return run


REPEATED = 8
"""So many evaluations show whether dropout acts in them."""

TRIES = 60
"""Of so many trainings at p = ¾ one drops one number of two, but for a probability of (5/8)⁶⁰ at
most."""


def constant(names: tuple[str, ...]) -> Callable[[], tuple[str, ...]]:
    """What always gives these."""
    return lambda: names


def dropout(name: str) -> Run:
    """In training each number's branch is dropped by itself, or 1 / (1 - p) times itself.

    A sample has two numbers that are not 0, so that its branch is one of four, whatever else a mask
    shares. Each is there twice, so that a mask that samples share is seen. Projections in one
    weight may have a mask each.
    """

    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        inputs = _without_column(inputs_of(subject, case, name))
        one = _numbers(inputs)
        two = np.roll(one, 1, axis=0)
        branch = _branch(inputs, one)[1]
        base, both = _branch(inputs, one + two)
        masked = [_branch(inputs, each)[0] for each in (0 * one, one, two, one + two)]
        four = (0 * both, branch, np.roll(branch, 1, axis=0), both)
        branches = [np.concatenate([each, each]) for each in four]
        base = np.concatenate([base, base])
        ways = [base + each / (1 - DROPPED) for each in branches]
        axes = tuple(range(1, base.ndim))
        parts = _parts(inputs, base.shape[-1])
        can_tell = [(each != 0).any(axes) for each in branches]
        acts, apart = not can_tell[3].any(), not (can_tell[1] & can_tell[2]).any()
        alone, got, want = acts, [], []
        twice = np.concatenate([one + two, one + two]).astype(inputs.x.dtype)
        given = ModuleInputs(**vars(inputs) | {"x": twice})
        for _ in range(TRIES):
            answer = ask(subject, given.with_adapter(p=DROPPED), "train")
            y = subject.answer(subject.entry(answer, "y"), "y", base.shape, case.dtype)
            found = [_nearest(wide(y), ways, branches, part) for part in parts]
            acts |= any(each.acts for each in found)
            apart |= any(each.apart for each in found)
            got.append(y)
            alone |= any(each.alone for each in found)
            want.append(np.concatenate([each.want for each in found], axis=-1))
            if (acts and apart and alone) or not all(each.is_met for each in found):
                break

        def wrongly() -> tuple[str, ...]:
            bases = [np.concatenate([each, each]) for each in masked]
            return dropped_wrongly(inputs, wide(got[-1]), bases, branches, DROPPED)

        y, wanted = np.concatenate(got), np.concatenate(want)
        yield Comparison("y of samples in training", y, wanted, shows=wrongly)
        if not np.array_equal(y, wanted):
            return  # nothing is known of masks
        yield from _of_masks(inputs, acts, apart, alone)

    return run


def _parts(inputs: ModuleInputs, features: int) -> list[slice]:
    """The outputs of each projection in one weight: each has a mask of its own, or none."""
    rows = np.cumsum(inputs.layer.get("rows", ()))[:-1]
    ends = [0, *(int(row) for row in rows), features]
    return [slice(a, b) for a, b in pairwise(ends)]


def _of_masks(inputs: ModuleInputs, acts: bool, apart: bool, alone: bool) -> Iterator[Comparison]:
    """Whether dropout acts, on each number, and on each sample, by itself."""
    for label, holds, shows in (
        ("whether dropout acts", acts, undropped_of(inputs)),
        (
            "whether numbers of a sample are dropped apart",
            apart or not acts,
            ("module-dropout-of-samples",),
        ),
        ("whether equal samples are dropped apart", alone or not apart, ("module-dropout-shared",)),
    ):
        held = np.asarray(float(holds))
        yield Comparison(label, held, np.asarray(1.0), shows=constant(shows))


@dataclass(frozen=True)
class _Nearest:
    """Of each sample the nearest way to answer a part of y; what it tells where it is met."""

    want: Array
    is_met: bool
    acts: bool
    apart: bool
    alone: bool


def _nearest(y: Array, ways: list[Array], branches: list[Array], part: slice) -> _Nearest:
    axes = tuple(range(1, y.ndim))
    off = np.stack([np.abs(y - way)[..., part].max(axes) for way in ways])
    nearest, is_one = off.argmin(0), off.min(0) == 0
    tells = [is_one & (each[..., part] != 0).any(axes) for each in branches]
    return _Nearest(
        np.stack([ways[way][i, ..., part] for i, way in enumerate(nearest)]),
        bool(is_one.all()),
        bool((tells[3] & (nearest != 3)).any()),
        bool((tells[1] & tells[2] & (nearest % 3 != 0)).any()),
        bool(np.not_equal(*np.split(nearest, 2)).any()),
    )


def _numbers(inputs: ModuleInputs) -> Array:
    """As many samples as a sample has numbers, each with one of them, a 1."""
    shape = inputs.x.shape[1:] if inputs.kind == "conv" else inputs.x.shape[-1:]
    size = int(np.prod(shape))
    return np.eye(size, dtype=inputs.x.dtype).reshape(size, *shape)


def _branch(inputs: ModuleInputs, x: Array) -> tuple[Array, Array]:
    """y without the adapter's branch, and what that adds."""
    given = ModuleInputs(**vars(inputs) | {"x": x})
    whole, base = (
        LAYERS[given.kind](each.module(wide), by_substitution)[0]
        for each in (given, given.with_adapter(B=np.zeros_like(given.adapter["B"])))
    )
    return base, whole - base


CHEAP = ("linear", "experts.single")
"""Kinds of which twice as many cases are drawn: they cost little, and settings meet more often."""


def _cases(name: str, is_dropout: bool = False) -> Callable[[str, str], int]:
    def count(profile: str, dtype: str) -> int:
        half = dtype not in ("float64", "float32")
        if half and is_dropout:  # four times a number may be rounded there
            return 0
        share = {"float32": 1, "float64": 2}.get(dtype, 3)  # the settings are those of float32
        cases = max(2, CASES[profile] // share)
        return 2 * cases if name in CHEAP else cases

    return count


def _checks() -> Iterable[Check]:
    def check(name: str, what: str, title: str, run: Run) -> Check:
        cases = _cases(name, what == "dropout")
        return Check(f"module.{name}.{what}", "module", ("module",), title, run, cases)

    for name, words in WORDS.items():
        yield check(name, "forward", f"Output of {words}.", _forward(name))
        yield check(name, "gradients", f"Gradients of {words}.", _gradients(name))
        yield check(name, "merged", f"Output and weight of {words}, merged.", _merged(name))
    for name in DROPOUT:
        for law in (evaluation, dropout):
            title = (law.__doc__ or "").splitlines()[0]
            yield check(name, law.__name__, f"{title[:-1]}: {WORDS[name]}.", law(name))


_CHECKS: tuple[Check, ...] = tuple(_checks())

assert [*WORDS] == [*KINDS]

LEVEL = Level(
    "module",
    _CHECKS,
    laws=("*.dropout",),
    chance=("*.dropout", "*.evaluation"),
    has_exact_lane=False,
    quick="(linear|conv.all|embedding|experts|attention|encoder).*",
    vectors={
        "embedding*": (("float32", 0), ("float32", 1)),
        "*.gradients": (("bfloat16", 0), ("float32", 1), ("float32", 2)),
        "*": (("float32", 1),),
    },
    no_vectors={
        **{
            f"{name}.*": "the last bit of an exponential depends on the machine" for name in ROUNDED
        },
        "attention.*": "the same",
        "*.dropout": "what dropout draws has no one answer",
        "embedding.max-norm.*": "rows within the norm are those of the other embeddings",
    },
    exact=tuple(f"{name}.*" for name in WORDS if name not in ROUNDED),
)
