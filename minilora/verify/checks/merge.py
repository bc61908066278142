"""Level ``merge``: the adapter added to the weight and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from minilora.spec.variants import merge_lora_bias
from minilora.verify.checks.linear import WORDS, forward
from minilora.verify.core import inputs
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.inputs import (
    Layer,
    draw_layer,
    formed,
    limits,
    long,
    sigma_merge,
    sigmas,
    wanted_merge,
)
from minilora.verify.core.layer_axes import LANE, WEIGHT, draw_combination, rows_of
from minilora.verify.core.level import VECTOR_SHAPES, VECTOR_SIZES, Level
from minilora.verify.core.shrinking import Difference, search
from minilora.verify.core.tolerance import Rounding, Uncertain, digits, unit_roundoff
from minilora.verify.core.types import BOUND, FIXED_BOUND, Case, Check, Comparison, counter
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray

CASES = {"quick": 4, "ci": 24, "nightly": 480}

KINDS: dict[str, dict[str, Any]] = {
    "": {},
    ".rslora": {"use_rslora": True},
    ".conv1d": {"fan_in_fan_out": True},
    ".all": dict.fromkeys(("use_rslora", "fan_in_fan_out")),
}


def draw(case: Case, kind: str) -> tuple[Layer, bool]:
    """A layer to be merged, and whether it belongs to the exact lane."""
    return draw_combination(case, WEIGHT) if kind == ".all" else draw_layer(case, **KINDS[kind])


def draw_merged(case: Case, kind: str) -> tuple[Layer, bool]:
    """The same for the merged weight.

    Of ten numbers, 9 an adapter so small that beside W, whose entries
    are large, s B A keeps five or six binary digits: what is near to nothing is not nothing.
    """
    layer, exact = draw(case, kind)
    if case.number % 10 == 9:
        layer = _small(layer, case.dtype)
    return layer, exact


def _small(layer: Layer, dtype: str) -> Layer:
    """With B so small that the greatest entry of s B A is 32 to 64 times u, and |W| at least ½."""
    W = np.copysign(0.5 + np.abs(long(layer.W)), layer.W).astype(layer.W.dtype)
    greatest = np.abs(layer.s * (long(layer.B) @ long(layer.A))).max()
    exponent = 6 - digits(dtype) - int(np.frexp(float(greatest))[1])
    return replace(layer, W=W, B=(long(layer.B) * 2.0**exponent).astype(layer.B.dtype))


def merged(subject: GuardedImplementation, layer: Layer, dtype: str, **changed: Any) -> Array:
    """The implementation's merged weight."""
    arrays = [changed.pop(name, getattr(layer, name)) for name in ("W", "A", "B")]
    W = subject.call("merge", *arrays, **layer.merge_options() | changed)
    return subject.answer(W, "merged W", layer.W.shape, dtype)


def unmerged(subject: GuardedImplementation, layer: Layer, W_merged: Array, dtype: str) -> Array:
    """The weight that the implementation takes the adapter out of."""
    W = subject.call("unmerge", W_merged, layer.A, layer.B, **layer.merge_options())
    return subject.answer(W, "unmerged W", layer.W.shape, dtype)


def _weight(kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        layer, exact = draw_merged(case, kind)
        W, want = merged(subject, layer, case.dtype), wanted_merge(layer)
        precision = subject.precision(case.dtype)
        if case.number % 10 == 9:  # summed into W rank by rank, each sum is rounded as W is
            loss = unit_roundoff(precision.storage) * (formed(layer) + np.abs(want))
            yield Comparison("merged W", W, want, loss.astype(np.float64), BOUND)
            return
        yield Comparison("merged W", W, want, None if exact else sigma_merge(layer, precision))

    return run


def forward_of_merged(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """The merged weight gives the output of the adapted layer: x W'ᵀ = y."""
    layer, exact = draw_layer(case)
    y, W = forward(subject, layer, case.dtype), merged(subject, layer, case.dtype)
    sigma = None
    if not exact:
        precision = subject.precision(case.dtype)
        carried = np.float64(layer.x) ** 2 @ sigma_merge(layer, precision).T ** 2
        sigma = np.sqrt(sigmas(layer, precision)["y"] ** 2 + carried)
    yield Comparison("x W'ᵀ against y", long(layer.x) @ long(W).T, y, sigma, limits(layer, "y"))


def full_digits(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Merging and unmerging keep all digits: W has nearly as many as the dtype; compared by ==."""
    layer = inputs.full_digits(case, subject.precision(case.dtype))
    W_merged = wanted_merge(layer)
    yield Comparison("merged W", merged(subject, layer, case.dtype), W_merged)
    if subject.has("unmerge"):
        W = unmerged(subject, layer, W_merged.astype(layer.W.dtype), case.dtype)
        yield Comparison("unmerged W", W, layer.W)


def rounding(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """What rounds in the last sum alone is stored as a nearest number.

    W has all digits of the storage and s B A, of one rank, goes beyond them by two: no order of
    sums rounds more than once. Of two numbers that are as near, either may be stored.
    """
    layer = inputs.full_digits(case, subject.precision(case.dtype), beyond=2)
    want = wanted_merge(layer)
    dtype = DTYPES[subject.precision(case.dtype).storage]
    nearest = np.abs(long(want.astype(dtype)) - want)
    W = merged(subject, layer, case.dtype)
    yield Comparison("merged W", W, want, nearest.astype(np.float64), FIXED_BOUND)


def zero_B(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """With B = 0, merging changes no bit of W."""
    layer, _ = draw_layer(case)
    W = merged(subject, layer, case.dtype, B=np.zeros_like(layer.B))
    yield Comparison("merged W", W, layer.W)


def negative(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Merging the negated adapter subtracts what merging the adapter adds."""
    layer, exact = draw_layer(case)
    there = long(merged(subject, layer, case.dtype)) - long(layer.W)
    back = long(layer.W) - long(merged(subject, layer, case.dtype, B=-layer.B))
    sigma = None if exact else sigma_merge(layer, subject.precision(case.dtype)) * 2**0.5
    yield Comparison("W'(B) - W against W - W'(-B)", there, back, sigma)


def _unmerge(
    kind: str,
) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    """Unmerging restores W within u (|W| + |W'|) and what two sums lose, exactly without rounding.

    Storing W' loses at most u |W'|, and storing W at most u |W|; what forming them loses is told by
    `formed`, and merging and unmerging may differ in the order.
    """

    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        layer, exact = draw(case, kind)
        if exact:
            W_merged = wanted_merge(layer).astype(layer.W.dtype)
            W = unmerged(subject, layer, W_merged, case.dtype)
            yield Comparison("unmerged W", W, layer.W)
            return
        W_merged = merged(subject, layer, case.dtype)
        W = unmerged(subject, layer, W_merged, case.dtype)
        sizes = np.abs(long(layer.W)) + np.abs(long(W_merged)) + 2 * formed(layer)
        u = unit_roundoff(subject.precision(case.dtype).storage)
        yield Comparison("unmerged W", W, layer.W, (u * sizes).astype(np.float64), BOUND)

    return run


def merge_difference(subject: GuardedImplementation, layer: Layer, dtype: str) -> Difference | None:
    """Whether the merged weight is not what the equation gives, compared by ==."""
    W, want = merged(subject, layer, dtype), wanted_merge(layer)
    return ("merged W", W, want) if (want != W).any() else None


def unmerge_difference(
    subject: GuardedImplementation, layer: Layer, dtype: str
) -> Difference | None:
    """Whether unmerging the exact merged weight does not give W, compared by ==."""
    W = unmerged(subject, layer, wanted_merge(layer).astype(layer.W.dtype), dtype)
    return ("unmerged W", W, layer.W) if (W != layer.W).any() else None


def merged_with_bias(
    subject: GuardedImplementation, layer: Layer, dtype: str, **settings: Any
) -> tuple[Array, Array | None]:
    """The merged weight and bias; None where the implementation answers the weight alone."""
    arrays = layer.W, layer.A, layer.B
    options = layer.merge_options() | {"bias": layer.bias} | settings
    answer = subject.call("merge", *arrays, **options)
    W, b = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, None)
    W = subject.answer(W, "merged W", layer.W.shape, dtype)
    if b is None:
        subject.remark("merge answers no bias where there is one: it is not judged")
        return W, None
    return W, subject.answer(b, "merged bias", (len(W),), dtype)


def _with_bias(of_B: bool) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    """W', and b' = b + s c, where c is the bias of B, or 0."""

    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        more: dict[str, Any] = {
            "use_rslora": case.number // 2 % 2 > 0,
            "fan_in_fan_out": case.number % 3 > 1,
        }
        more = subject.fixed.fitting(case.check, {name: True for name in more if more[name]})
        layer, exact = draw_layer(case, bias=True, **more)
        bias: Any = layer.bias
        c = case.rng().integers(-2, 3, len(bias)).astype(bias.dtype) if of_B else 0 * bias
        W, b = merged_with_bias(subject, layer, case.dtype, **({"lora_bias": c} if of_B else {}))
        precision = subject.precision(case.dtype)
        sigma = None if exact else sigma_merge(layer, precision)
        yield Comparison("merged W", W, wanted_merge(layer), sigma)
        if b is not None:
            rounding = Rounding(precision)

            def shifted(number: Callable[[Array], Any]) -> Any:
                W, b, A, B, of_B = map(number, (layer.W, bias, layer.A, layer.B, c))
                return merge_lora_bias(W, b, A, B, of_B, layer.s)[1]

            of: Any = shifted(lambda array: Uncertain(array, 0.0, rounding))
            yield Comparison(
                "merged bias", b, shifted(long), of.sigma if of_B and not exact else None
            )

    return run


def _law(run: Any, needs: tuple[str, ...], share: float) -> Check:
    title = (run.__doc__ or "").splitlines()[0]
    name = run.__name__.removesuffix("_of_merged").replace("_", "-")
    return Check(
        f"merge.{name}",
        "merge",
        needs,
        title,
        run,
        counter(CASES, share),
        lambda subject, dtype: search(subject, dtype, {}, merge_difference),
    )


def _cases(kind: str) -> Callable[[str, str], int]:
    """The number of cases of a kind: of the combinations, each in both lanes in the profile ci."""
    return counter({**CASES, "ci": 2 * len(rows_of(WEIGHT))} if kind == ".all" else CASES)


def _weight_check(kind: str) -> Check:
    return Check(
        f"merge.weight{kind}",
        "merge",
        ("merge",),
        f"W' = W + s B A{WORDS[kind]}.",
        _weight(kind),
        _cases(kind),
        lambda subject, dtype: search(subject, dtype, KINDS[kind], merge_difference),
    )


def _unmerge_check(kind: str) -> Check:
    return Check(
        f"merge.unmerge{kind}",
        "merge",
        ("merge", "unmerge"),
        f"Unmerging restores W within the rounding of merging and unmerging{WORDS[kind]}.",
        _unmerge(kind),
        _cases(kind),
        lambda subject, dtype: search(subject, dtype, KINDS[kind], unmerge_difference),
    )


BIASES = {
    "bias": "Merging leaves the layer's bias as it is.",
    "bias-of-B": "Merging adds s c to the layer's bias, where c is the bias of B.",
}


def _bias_check(id: str) -> Check:
    run = _with_bias(id == "bias-of-B")
    return Check(f"merge.{id}", "merge", ("merge",), BIASES[id], run, counter(CASES, 0.25))


_CHECKS: tuple[Check, ...] = (
    *(_weight_check(kind) for kind in KINDS),
    _law(forward_of_merged, ("merge", "lora_linear"), 0.5),
    _law(full_digits, ("merge",), 0.25),
    _law(rounding, ("merge",), 0.25),
    _law(zero_B, ("merge",), 0.25),
    _law(negative, ("merge",), 0.25),
    *(_unmerge_check(kind) for kind in KINDS),
    *(_bias_check(id) for id in BIASES),
)

LEVEL = Level(
    "merge",
    _CHECKS,
    answers=("weight*", "unmerge*", "bias*", "rounding"),
    relations=("negative",),
    quick_dtypes=True,
    axes=(*WEIGHT, LANE),
    vectors={
        "weight": (*VECTOR_SIZES, *VECTOR_SHAPES[2:], ("float32", 9)),
        "weight.all": VECTOR_SIZES[:2] + VECTOR_SIZES[4:],
        "weight*": VECTOR_SIZES,
        "unmerge.all": VECTOR_SIZES[:2] + VECTOR_SIZES[4:],
        "unmerge*": VECTOR_SIZES,
    },
)
