"""The structure of a deviation that no known mutant explains: what can be read off the numbers.

Nothing is guessed. A sentence is said of an array only if, with what it says taken into account,
the array agrees within the rounding of both sides: a factor, a transpose, another order, the scale
that acts; or if it is a count of where the deviation lies: rows, columns, rank, steps, digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from minilora.verify.checks.linear import KINDS
from minilora.verify.core.inputs import Layer, draw_layer
from minilora.verify.core.tolerance import digits, unit_roundoff
from minilora.verify.core.types import MONTE_CARLO, STRUCTURE, Case, Comparison, Diagnosis

Array = np.ndarray

Answers = Sequence[Mapping[str, Comparison]]


@dataclass(frozen=True)
class Fit:
    """A number that was fitted by weighted least squares, and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        """The value with as many digits as its error leaves."""
        if self.error == 0:
            return f"{self.value:.9g}"
        places = max(1, min(12, round(-np.log10(self.error / max(abs(self.value), 1e-30))) + 1))
        return f"{self.value:.{places}g} ± {self.error:.1g}"

    def agrees(self, other: float) -> bool:
        """Whether another number lies within six standard errors, or the digits of a float64."""
        return abs(self.value - other) <= 6 * self.error + 1e-12 * abs(other)


def fit(got: Array, part: Array, rest: Array, sigma: Array) -> tuple[Fit, Array]:
    """The c of got = rest + c · part by weighted least squares, and z of what it leaves."""
    sigma = np.where(sigma > 0, sigma, np.finfo(float).tiny ** 0.25)  # its inverse has a square
    weight = (part / sigma) ** 2
    total = float(weight.sum())
    if total == 0:
        return Fit(0.0, np.inf), np.full(np.shape(got), np.inf)
    c = float(((got - rest) * part / sigma**2).sum()) / total
    return Fit(c, 1 / sqrt(total)), (got - rest - c * part) / sigma


def sigma_of(each: Comparison) -> Array:
    """σ of got - want; where the lane is exact, half a unit in the last place of the greatest."""
    want = np.asarray(each.want, float)
    if each.sigma is not None:
        return np.broadcast_to(np.asarray(each.sigma, float), want.shape)
    return np.full(want.shape, unit_roundoff("float64") * max(float(np.abs(want).max()), 1e-30))


def agreeing(z: Array) -> bool:
    """Whether these z are no more than rounding."""
    rms = np.sqrt((z * z).mean())
    return bool(np.abs(z).max() <= MONTE_CARLO.max_z and rms <= MONTE_CARLO.rms(z.size))


Named = list[tuple[str, Comparison]]
"""The comparisons of one array, each with the id of its case."""


def _failing(cases: Sequence[Case], answers: Answers) -> dict[str, Named]:
    """Every array that deviates in some case, with its comparisons of all cases that have it."""
    names = dict.fromkeys(
        name
        for answer in answers
        for name, each in answer.items()
        if each.judge().verdict == "fail"
    )
    pairs = list(zip(cases, answers, strict=True))
    return {
        name: [(case.id, answer[name]) for case, answer in pairs if name in answer]
        for name in names
    }


def _sentences(each: Named) -> Iterator[tuple[str, str]]:
    """(what it is, what is said) of one array in several cases, the strongest first."""
    got = [np.asarray(c.got, float) for _, c in each]
    want = [np.asarray(c.want, float) for _, c in each]
    sigma = [sigma_of(c) for _, c in each]
    pairs = list(zip(got, want, sigma, strict=True))
    fits = [fit(g, w, 0 * w, s) for g, w, s in pairs]
    if all(agreeing(z) for _, z in fits):
        if len(np.unique(np.concatenate([w[w != 0] for w in want]))) < 2:
            return  # one number is a multiple of any other
        values = {f"{f}" for f, _ in fits}
        if all(f.value == 0 for f, _ in fits):
            yield "zero", "is 0"
        elif all(fits[0][0].agrees(f.value) for f, _ in fits):
            yield "factor", f"is {fits[0][0]} times what it should be, in every case"
        else:
            yield "factor", f"is a multiple of what it should be: {', '.join(sorted(values))}"
        return
    square = [w.ndim == 2 and w.shape[0] == w.shape[1] and len(w) > 1 for w in want]
    if any(square) and all(
        agreeing((g - w.T) / s) if q else True for (g, w, s), q in zip(pairs, square, strict=True)
    ):
        yield "transposed", "is the transpose of what it should be, where it is square"
    for axis, word in ((0, "rows"), (-1, "columns")):
        orders = [_order(g, w, s, axis) for g, w, s in pairs]
        if all(order is not None for order in orders):
            yield f"permuted-{word}", f"has its {word} in another order: {orders[0]}"
            return
    # Of the greatest, which need not be the one that is shown.
    (case, _), greatest = max(zip(each, pairs, strict=True), key=lambda p: p[1][1].size)
    for what, sentence in _places(*greatest):
        yield what, f"{sentence}, in {case}"


def _order(got: Array, want: Array, sigma: Array, axis: int) -> list[int] | None:
    """The order in which want's rows or columns are got's, if there is one that is not theirs."""
    if want.ndim < 2 or not 1 < want.shape[axis] <= 12:
        return None
    g, w, s = (np.moveaxis(v, axis, 0).reshape(v.shape[axis], -1) for v in (got, want, sigma))
    order: list[int] = []
    for row in g:
        near = [k for k in range(len(w)) if k not in order and agreeing((row - w[k]) / s[k])]
        if not near:
            return None
        order.append(near[0])
    return order if order != sorted(order) else None


def _places(got: Array, want: Array, sigma: Array) -> Iterator[tuple[str, str]]:
    """Where the deviation lies, and of which rank and how many digits it is."""
    off = np.abs(got - want) > 8 * sigma
    if off.ndim >= 2 and off.any():
        flat = off.reshape(-1, off.shape[-1])
        rows, columns = np.flatnonzero(flat.any(1)), np.flatnonzero(flat.any(0))
        if len(rows) < len(flat) or len(columns) < flat.shape[1]:
            yield (
                "place",
                f"differs in {len(rows)} of {len(flat)} rows ({_some(rows)}) and "
                f"{len(columns)} of {flat.shape[1]} columns ({_some(columns)})",
            )
        # What is right has the greatest rank that there could be: a layer's width bounds it, or the
        # number of tokens, and not only the sides of the array.
        rank, most = _rank(got - want, sigma), _rank(want, sigma)
        if 0 < rank < most:
            yield (
                "rank",
                f"differs by a matrix of rank {rank}, where {most} could be",
            )
    relative = (np.abs(got - want) / np.maximum(np.abs(want), 1e-30))[off]
    for dtype in ("bfloat16", "float16", "float32"):
        # Of those that deviate none was a number of this dtype before, as a small whole one is.
        rounded = off.any() and _holds(dtype, got).all() and not _holds(dtype, want[off]).any()
        if rounded and float(np.quantile(relative, 0.9)) <= 4 * unit_roundoff(dtype):
            yield "digits", f"holds {dtype} numbers: it was rounded to {dtype} on the way"
            break


def _rank(matrix: Array, sigma: Array) -> int:
    """The rank, its last axis against all others, but for noise."""
    values = np.linalg.svd(matrix.reshape(-1, matrix.shape[-1]), compute_uv=False)
    noise = float(np.sqrt((sigma * sigma).sum()))
    return int((values > max(8 * noise, 1e-12 * values[0])).sum())


def _holds(dtype: str, array: Array) -> Array:
    """Which numbers have no more digits than the dtype has."""
    fraction, _ = np.frexp(array)
    grid = np.ldexp(fraction, digits(dtype))
    held: Array = grid == np.round(grid)
    return held


def _some(numbers: Array) -> str:
    shown = ", ".join(map(str, numbers[:4]))
    return shown + (", …" if len(numbers) > 4 else "")


EXPRESSIONS: dict[str, Any] = {
    "α/r": lambda a, r: a / r,
    "α/√r": lambda a, r: a / sqrt(r),
    "α": lambda a, r: a,
    "1": lambda a, r: 1.0,
    "0": lambda a, r: 0.0,
    "1/r": lambda a, r: 1 / r,
    "1/√r": lambda a, r: 1 / sqrt(r),
    "r/α": lambda a, r: r / a,
    "1/α": lambda a, r: 1 / a,
    "(α/r)²": lambda a, r: (a / r) ** 2,
    "√(α/r)": lambda a, r: sqrt(a / r),
    "α²/r": lambda a, r: a * a / r,
    "α/r²": lambda a, r: a / r**2,
    "α/(r + 1)": lambda a, r: a / (r + 1),
    "α/(2r)": lambda a, r: a / (2 * r),
    "2α/r": lambda a, r: 2 * a / r,
    "-α/r": lambda a, r: -a / r,
    "α r": lambda a, r: a * r,
    "⌊α/r⌋": lambda a, r: float(a // r),
    "α/(r + 1e-5)": lambda a, r: a / (r + 1e-5),
}
"""What a scale may have been taken for; the first that fits all cases is named."""


def scale_that_acts(layers: Sequence[Layer], answers: Answers) -> Iterator[tuple[str, str]]:
    """s as the arrays y, dA and dB have it, each by itself, and what it is in α and r.

    y - (x Wᵀ + b) = s H Bᵀ, and dA and dB are multiples of s.
    """
    for name in ("y", "dA", "dB"):
        each = [answer.get(name) for answer in answers]
        if any(c is None for c in each):
            continue
        fits = []
        for layer, c in zip(layers, each, strict=True):
            assert c is not None
            got, want, sigma = np.asarray(c.got, float), np.asarray(c.want, float), sigma_of(c)
            rest = 0 * want
            if name == "y":
                x = layer.x.astype(float)
                rest = x @ layer.W.astype(float).T
                rest = rest if layer.bias is None else rest + layer.bias.astype(float)
            fits.append(fit(got, (want - rest) / layer.s, rest, sigma))
        if not all(agreeing(z) for _, z in fits):
            continue
        known = [(layer.alpha, layer.r) for layer in layers]
        right = [f.agrees(layer.s) for (f, _), layer in zip(fits, layers, strict=True)]
        if all(right):
            continue
        named = next(
            (
                word
                for word, value in EXPRESSIONS.items()
                if all(f.agrees(value(a, r)) for (f, _), (a, r) in zip(fits, known, strict=True))
            ),
            None,
        )
        (first, _), (alpha, r) = fits[0], known[0]
        ratio = Fit(first.value / layers[0].s, first.error / abs(layers[0].s))
        multiples = [ratio.agrees(f.value / v.s) for (f, _), v in zip(fits, layers, strict=True)]
        what = f"that is {named}" if named else "which is no simple expression of α and r"
        what = f"that is {ratio} times the right one" if not named and all(multiples) else what
        yield (
            f"scale-{name}",
            f"{name} has the scale {first} where α = {alpha:g} and r = {r}: {what}; "
            f"it should be {layers[0].s:.7g}",
        )


def steps(answers: Answers) -> Iterator[tuple[str, str]]:
    """Of parameters after each step: which step is the first that is wrong, and how it grows."""
    first: dict[str, int] = {}
    worst: dict[int, float] = {}
    last = 0
    for answer in answers:
        for name, each in answer.items():
            match = re.search(r"after step (\d+)$", name)
            if match is None:
                continue
            step = int(match[1])
            last = max(last, step)
            judged = each.judge()
            if judged.verdict == "fail":
                worst[step] = max(worst.get(step, 0.0), judged.z)
                first[name[: match.start()]] = min(first.get(name[: match.start()], step), step)
    if worst:
        start = min(worst)
        grows = all(worst[k] <= worst[k + 1] for k in worst if k + 1 in worst)
        more = " and grows with every step" if grows and len(worst) > 2 else ""
        if len(worst) == 1 and start < last:
            more = " and is right again afterwards"
        when = "from the first step on" if start == 1 else f"from step {start} on, right before"
        yield "steps", f"The parameters are wrong {when}{more}"


@np.errstate(all="ignore")  # what is wrong may be wrong beyond all bounds
def describe(check: str, cases: Sequence[Case], answers: Answers) -> tuple[Diagnosis, ...]:
    """What can be said of the deviations of a check's cases; nothing, if nothing is certain."""
    kind = check.removeprefix("linear.forward").removeprefix("linear.vjp")
    layers = [draw_layer(case, **KINDS[kind])[0] for case in cases] if kind in KINDS else []
    said = [(f"{STRUCTURE}{what}", sentence) for what, sentence in steps(answers)]
    if layers:
        said += [(f"{STRUCTURE}{what}", s) for what, s in scale_that_acts(layers, answers)]
    if not said:
        failing = list(_failing(cases, answers).items())
        lives = check.startswith("lifecycle.")
        # What a life has made wrong stays so: its first step says it. The rank is an adapter's.
        for name, each in failing[: 1 if lives else None]:
            said += [
                (f"{STRUCTURE}{what}", f"{name} {s}")
                for what, s in _sentences(each)
                if not (lives and what == "rank")
            ]
    return tuple(Diagnosis(name, f"{sentence}.", 0.0) for name, sentence in said[:3])
