"""Level ``precision``: operands of several dtypes, as the implementation declares that it takes.

Each entry of ``mixed`` names the dtypes of x, of W and of the adapters, and what it declares of how
it computes (`core.mixture`). It is asked where x has the dtype under test. A gradient has the dtype
of its operand, and the bounds are those of each operand: on a half base the gradients of adapters
in float32 are those of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from minilora.verify.checks.linear import dbias, forward
from minilora.verify.checks.merge import merged
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import Skip
from minilora.verify.core.inputs import Layer, draw_layer, limits, wanted, wanted_merge
from minilora.verify.core.level import Level
from minilora.verify.core.mixture import Mixture
from minilora.verify.core.types import Case, Check, Comparison, counter
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray
Run = Callable[[GuardedImplementation, Case], Iterable[Comparison]]

CASES = {"quick": 2, "ci": 8, "nightly": 160}

KINDS: dict[str, dict[str, Any]] = {
    "": {},
    ".all": {"bias": True, "dropout": True, "use_rslora": True},
}

FINE = 2.0**-9
"""What the rows of A of a pair differ by: beside entries of 8 to 15 no half precision has it."""

MOST = 40
"""So many features and outputs at most, so that sums in float32 stay exact."""


def mixture_of(
    subject: GuardedImplementation, case: Case, fits: Callable[[Mixture], bool] = lambda m: True
) -> Mixture:
    """The mixture of a case. Raises Skip where none is declared."""
    declared = case.fixed.mixtures or subject.mixtures
    of_dtype = [m for m in declared if m.x == case.dtype]
    fitting = [m for m in of_dtype if fits(m)]
    if not fitting:
        which = "such operands" if of_dtype else "operands"
        raise Skip(f"not supported: it declares no {which} in 'mixed' with x in {case.dtype}")
    return fitting[case.number % len(fitting)]


def draw(case: Case, mixture: Mixture, kind: str) -> Layer:
    """A layer of the lane with σ, whose operands have their dtypes; every third W is 0."""
    drawn = replace(case, dtype="float32", number=2 * case.number + 1)
    layer, _ = draw_layer(drawn, **KINDS[kind])
    if case.number % 3 == 2:
        layer = replace(layer, W=np.zeros_like(layer.W))
    return mixture.cast(layer)


def pairs(case: Case, mixture: Mixture) -> Layer:
    """A layer without a base, whose ranks come in pairs that cancel but for `FINE`.

    A = [a + d; a] and B = [c, -c] with whole numbers a, c and d in ±`FINE`: y = s c d x and dx are
    whole multiples of `FINE` s, so small that every half precision has them; u = A x needs 19
    digits. Sums in float32 are exact in any order.
    """
    drawn = replace(case, dtype="float32", number=2 * case.number)
    rng, (layer, _) = case.rng(), draw_layer(drawn)
    (m, n), count = np.minimum(layer.W.shape, MOST), 2
    a = rng.choice([-1, 1], (count, n)) * rng.integers(8, 16, (count, n))
    d = rng.choice([-FINE, FINE], (count, n)) * (rng.random((count, n)) < 4 / n)
    c = rng.integers(-2, 3, (m, count))
    tokens = min(5, layer.x.size // n)
    x, dy = (v.reshape(-1, v.shape[-1])[:tokens] for v in (layer.x[..., :n], layer.dy[..., :m]))
    s = layer.s if case.fixed.alpha is not None else float(rng.choice([0.25, 1.0, 4.0]))
    r = 2 * count
    if (case.fixed.ranks and r not in case.fixed.ranks) or np.frexp(s)[0] != 0.5:
        raise Skip("not supported: the check has rank 4")
    arrays: dict[str, Any] = {"x": np.sign(x), "dy": np.sign(dy), "W": np.zeros((m, n))}
    arrays |= {"A": np.concatenate([a + d, a]), "B": np.concatenate([c, -c], 1)}
    alpha = case.fixed.alpha_of(s * r, r)
    return mixture.cast(replace(layer, **arrays, alpha=alpha, r=r, bias=None))


def _vjp(
    subject: GuardedImplementation, layer: Layer, mixture: Mixture
) -> Iterable[tuple[str, Array]]:
    """The implementation's y and gradients, each in the dtype of its operand."""
    arrays = [getattr(layer, name) for name in ("x", "W", "A", "B", "dy")]
    options = layer.options() | mixture.settings()
    answer = subject.call("lora_linear_vjp", *arrays, **options)
    shapes, dtypes = layer.shapes(), mixture.answers()
    for name in ("y", "dx", "dA", "dB", *dbias(subject, layer, answer)):
        got = subject.entry(answer, name)
        yield name, subject.answer(got, name, shapes[name], dtypes[name])


def _forward(kind: str) -> Run:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        mixture = mixture_of(subject, case)
        layer = draw(case, mixture, kind)
        y = forward(subject, layer, mixture.y, **mixture.settings())
        sigma = mixture.sigmas(layer)["y"]
        yield Comparison("y", y, wanted(layer)["y"], sigma, limits(layer, "y"))

    return run


def _gradients(kind: str) -> Run:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        mixture = mixture_of(subject, case)
        layer = draw(case, mixture, kind)
        want, sigma = wanted(layer), mixture.sigmas(layer)
        for name, array in _vjp(subject, layer, mixture):
            yield Comparison(name, array, want[name], sigma[name], limits(layer, name))

    return run


def merge(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """W' = W + s B A, formed with the digits of A and B, and stored as W is."""
    mixture = mixture_of(subject, case, lambda m: m.autocast is None)
    layer = draw(case, mixture, "")
    got = merged(subject, layer, mixture.W)
    yield Comparison("merged W", got, wanted_merge(layer), mixture.sigma_merge(layer))


def digits(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """A and B keep digits that the base has not: what cancels but for the last is exact; by ==."""
    mixture = mixture_of(subject, case, lambda m: m.keeps_digits)
    layer = pairs(case, mixture)
    y = forward(subject, layer, mixture.y, **mixture.settings())
    yield Comparison("y", y, wanted(layer)["y"])


def digits_vjp(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Gradients keep the digits of A and B: what cancels but for the last is exact; by ==."""
    mixture = mixture_of(subject, case, lambda m: m.keeps_digits)
    layer = pairs(case, mixture)
    want = wanted(layer)
    for name, array in _vjp(subject, layer, mixture):
        yield Comparison(name, array, want[name])


def digits_merge(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Merging forms s B A with the digits of A and B; by == where W is 0."""
    mixture = mixture_of(subject, case, lambda m: m.keeps_digits and m.autocast is None)
    layer = pairs(case, mixture)
    yield Comparison("merged W", merged(subject, layer, mixture.W), wanted_merge(layer))


def zero_B(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """With B = 0, y does not depend on A, whatever its dtype, and dA is exactly 0."""
    mixture = mixture_of(subject, case)
    layer = draw(case, mixture, "")
    layer = replace(layer, B=np.zeros_like(layer.B))
    got = dict(_vjp(subject, layer, mixture))
    other = dict(_vjp(subject, replace(layer, A=-layer.A[::-1]), mixture))
    yield Comparison("y with another A", other["y"], got["y"])
    yield Comparison("dA", got["dA"], np.zeros(layer.A.shape, DTYPES[mixture.adapters]))


def _check(name: str, needs: str, title: str, run: Any) -> Check:
    return Check(f"precision.{name}", "precision", (needs,), title, run, counter(CASES))


def _law(run: Any, needs: str) -> Check:
    return _check(run.__name__.replace("_", "-"), needs, (run.__doc__ or "").splitlines()[0], run)


_WORDS = {"": "", ".all": ", with bias, dropout and rsLoRA at once"}

_CHECKS: tuple[Check, ...] = (
    *(
        _check(
            f"{name}{kind}",
            needs,
            f"{law} of operands of several dtypes{_WORDS[kind]}.",
            run(kind),
        )
        for kind in KINDS
        for name, needs, law, run in (
            ("forward", "lora_linear", "y", _forward),
            ("vjp", "lora_linear_vjp", "y and gradients", _gradients),
        )
    ),
    _law(merge, "merge"),
    _law(digits, "lora_linear"),
    _law(digits_vjp, "lora_linear_vjp"),
    _law(digits_merge, "merge"),
    _law(zero_B, "lora_linear_vjp"),
)

LEVEL = Level(
    "precision",
    _CHECKS,
    relations=("zero-B",),
    has_exact_lane=False,
    quick_dtypes=True,
    cases=None,
    no_vectors={"*": "which operands of several dtypes it takes, an implementation declares"},
)
