"""The pattern of a deviation that no mutant of the catalogue explains.

Nothing is guessed. A sentence is said of an array only if the array agrees, within the rounding of
both sides, once what the sentence says is taken into account (a factor, a transpose, another order,
another scale), or if it counts where the deviation lies: rows, columns, rank, steps, digits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import nan, sqrt

import numpy as np

from minilora.verify.core.inputs import Layer
from minilora.verify.core.level import Level
from minilora.verify.core.tolerance import digits, unit_roundoff
from minilora.verify.core.types import STRUCTURE, Case, Comparison, Diagnosis
from minilora.verify.diagnosis.composition import compositions
from minilora.verify.diagnosis.fit import Fit, agreeing, fit, sigma_of

Array = np.ndarray

Answers = Sequence[Mapping[str, Comparison]]
"""The comparisons of each case, by the array's name."""

Named = list[tuple[str, Comparison]]
"""The comparisons of one array, each with the id of its case."""

Triple = tuple[Array, Array, Array]
"""An array that was got, the one that was wanted, and σ of their difference."""

Finding = tuple[str, str]
"""The kind of a pattern, and its sentence."""

MAX_FINDINGS = 3
"""The greatest number of patterns that are told of a check."""

MAX_PERMUTED = 12
"""The longest axis whose order is looked for."""


def failing_arrays(cases: Sequence[Case], answers: Answers) -> dict[str, Named]:
    """Every array that deviates in some case, with its comparisons of all cases that have it."""
    names = dict.fromkeys(
        name
        for answer in answers
        for name, comparison in answer.items()
        if comparison.judge().verdict == "fail"
    )
    pairs = list(zip(cases, answers, strict=True))
    return {
        name: [(case.id, answer[name]) for case, answer in pairs if name in answer]
        for name in names
    }


def array_patterns(comparisons: Named) -> Iterator[Finding]:
    """The patterns of one array in several cases, the strongest first."""
    triples = [
        (np.asarray(c.got, float), np.asarray(c.want, float), sigma_of(c)) for _, c in comparisons
    ]
    fits = [fit(got, want, 0 * want, sigma) for got, want, sigma in triples]
    if all(agreeing(z) for _, z in fits):
        yield from _factor([f for f, _ in fits], [want for _, want, _ in triples])
        return
    if _is_transposed(triples):
        yield "transposed", "is the transpose of the correct array, where it is square"
    for axis, word in ((0, "rows"), (-1, "columns")):
        orders = [_order(*triple, axis) for triple in triples]
        if all(order is not None for order in orders):
            yield f"permuted-{word}", f"has its {word} in another order: {orders[0]}"
            return
    # Of the largest, which need not be the one that is shown.
    (case, _), largest = max(zip(comparisons, triples, strict=True), key=lambda p: p[1][1].size)
    for kind, sentence in _places(*largest):
        yield kind, f"{sentence}, in {case}"


def _factor(fits: Sequence[Fit], wants: Sequence[Array]) -> Iterator[Finding]:
    """The factor between an array and the correct one, in each case."""
    if len(np.unique(np.concatenate([want[want != 0] for want in wants]))) < 2:
        return  # one number is a multiple of any other
    if all(f.value == 0 for f in fits):
        yield "zero", "is 0"
    elif all(f.agrees(1.0) for f in fits):
        return  # it is the correct value as far as this tells
    elif all(fits[0].agrees(f.value) for f in fits):
        yield "factor", f"is {fits[0]} times the correct value, in every case"
    else:
        values = ", ".join(sorted({f"{f}" for f in fits}))
        yield "factor", f"is a multiple of the correct value: {values}"


def _is_transposed(triples: Sequence[Triple]) -> bool:
    """Whether every square array, and there is one, is the transpose of the correct one."""
    square = [
        triple
        for triple in triples
        if triple[1].ndim == 2 and triple[1].shape[0] == triple[1].shape[1] > 1
    ]
    return bool(square) and all(agreeing((got - want.T) / sigma) for got, want, sigma in square)


def _order(got: Array, want: Array, sigma: Array, axis: int) -> list[int] | None:
    """The order in which want's rows or columns are got's, if there is one that is not theirs."""
    if want.ndim < 2 or not 1 < want.shape[axis] <= MAX_PERMUTED:
        return None
    g, w, s = (np.moveaxis(v, axis, 0).reshape(v.shape[axis], -1) for v in (got, want, sigma))
    order: list[int] = []
    for row in g:
        near = [k for k in range(len(w)) if k not in order and agreeing((row - w[k]) / s[k])]
        if not near:
            return None
        order.append(near[0])
    return order if order != sorted(order) else None


def _places(got: Array, want: Array, sigma: Array) -> Iterator[Finding]:
    """Where the deviation lies, and of which rank and how many digits it is."""
    off = np.abs(got - want) > 8 * sigma
    if off.ndim >= 2 and off.any():
        yield from _rows_and_columns(off)
        yield from _rank_of_difference(got, want, sigma)
    yield from _rounded_to(got, want, off)


def _rows_and_columns(off: Array) -> Iterator[Finding]:
    flat = off.reshape(-1, off.shape[-1])
    rows, columns = np.flatnonzero(flat.any(1)), np.flatnonzero(flat.any(0))
    if len(rows) < len(flat) or len(columns) < flat.shape[1]:
        yield (
            "place",
            f"differs in {len(rows)} of {len(flat)} rows ({_some(rows)}) and "
            f"{len(columns)} of {flat.shape[1]} columns ({_some(columns)})",
        )


def _rank_of_difference(got: Array, want: Array, sigma: Array) -> Iterator[Finding]:
    """The rank of the difference, where it is less than that of the correct array.

    That is the greatest that there could be: a layer's width bounds it, or the number of tokens,
    and not the sides of the array alone.
    """
    rank, most = _rank(got - want, sigma), _rank(want, sigma)
    if 0 < rank < most:
        yield "rank", f"differs by a matrix of rank {rank}, where {most} is possible"


def _rounded_to(got: Array, want: Array, off: Array) -> Iterator[Finding]:
    """The dtype that the array was rounded to.

    None of the numbers that deviate was one of this dtype before, as a small integer is.
    """
    relative = (np.abs(got - want) / np.maximum(np.abs(want), 1e-30))[off]
    for dtype in ("bfloat16", "float16", "float32"):
        rounded = off.any() and _holds(dtype, got).all() and not _holds(dtype, want[off]).any()
        if rounded and float(np.quantile(relative, 0.9)) <= 4 * unit_roundoff(dtype):
            yield "digits", f"holds {dtype} numbers: a step before rounds to {dtype}"
            return


def _rank(matrix: Array, sigma: Array) -> int:
    """The numerical rank above noise, the last axis against all others."""
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


EXPRESSIONS: dict[str, Callable[[float, int], float]] = {
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
    "√(α/r)": lambda a, r: sqrt(a / r) if a >= 0 else nan,
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
"""What a scale may be instead; the first that fits all cases is named."""


def scale_patterns(layers: Sequence[Layer], answers: Answers) -> Iterator[Finding]:
    """The scale in each of y, dA and dB, where it is not s, and what it is in α and r.

    y - (x Wᵀ + b) = s H Bᵀ, and dA and dB are multiples of s.
    """
    for name in ("y", "dA", "dB"):
        comparisons = [answer[name] for answer in answers if name in answer]
        if len(comparisons) < len(answers):
            continue
        pairs = zip(layers, comparisons, strict=True)
        fits = [_scale_of(layer, comparison, name) for layer, comparison in pairs]
        scales = [f for f, _ in fits]
        if all(agreeing(z) for _, z in fits) and not _all_agree(scales, [v.s for v in layers]):
            yield f"scale-{name}", _scale_words(name, scales, layers)


def _scale_of(layer: Layer, comparison: Comparison, name: str) -> tuple[Fit, Array]:
    """The scale of one array of one case, and z of the residual."""
    got, want = np.asarray(comparison.got, float), np.asarray(comparison.want, float)
    rest = 0 * want
    if name == "y":
        rest = layer.x.astype(float) @ layer.W.astype(float).T
        rest = rest if layer.bias is None else rest + layer.bias.astype(float)
    return fit(got, (want - rest) / layer.s, rest, sigma_of(comparison))


def _all_agree(fits: Sequence[Fit], values: Sequence[float]) -> bool:
    return all(f.agrees(value) for f, value in zip(fits, values, strict=True))


def fitted_scales(
    layers: Sequence[Layer], answers: Answers
) -> Iterator[tuple[str, Callable[[float, float, int], float]]]:
    """What the branch's scale in y may be instead of s: in words, and as a function of s, α and r.

    A known expression, a multiple of s, or one number, whichever fits every case. A dropout rate
    may stand for a scale, and of one scale alone nothing follows: there it is not told.
    """
    comparisons = [answer["y"] for answer in answers if "y" in answer]
    if len({v.s for v in layers}) < 2 or len(comparisons) < len(answers):
        return
    if any(layer.p for layer in layers):
        return
    found = [_scale_of(v, c, "y") for v, c in zip(layers, comparisons, strict=True)]
    fits = [f for f, _ in found]
    if not all(agreeing(z) for _, z in found) or _all_agree(fits, [v.s for v in layers]):
        return
    for word, value in EXPRESSIONS.items():
        if _all_agree(fits, [value(v.alpha, v.r) for v in layers]):
            yield word, lambda s, a, r, value=value: value(a, r)  # type: ignore[misc]
    ratios = [Fit(f.value / v.s, f.error / abs(v.s)) for f, v in zip(fits, layers, strict=True)]
    if (c := _shortest(ratios)) is not None:
        yield f"{c:.9g} s", lambda s, a, r: c * s
    if (k := _shortest(fits)) is not None:
        yield f"{k:.9g}", lambda s, a, r: k


def _shortest(fits: Sequence[Fit]) -> float | None:
    """The number of the fewest digits that all of them agree with."""
    rounded = (float(f"{fits[0].value:.{places}g}") for places in range(1, 10))
    return next((v for v in rounded if all(f.agrees(v) for f in fits)), None)


def _scale_words(name: str, scales: Sequence[Fit], layers: Sequence[Layer]) -> str:
    known = [(layer.alpha, layer.r) for layer in layers]
    named = next(
        (
            word
            for word, value in EXPRESSIONS.items()
            if _all_agree(scales, [value(a, r) for a, r in known])
        ),
        None,
    )
    (alpha, r), right = known[0], layers[0].s
    ratio = Fit(scales[0].value / right, scales[0].error / abs(right))
    if named:
        words = f"that is {named}"
    elif len(scales) > 1 and all(scales[0].agrees(f.value) for f in scales):
        words = "the same in every case, whatever α and r"
    elif all(ratio.agrees(f.value / v.s) for f, v in zip(scales, layers, strict=True)):
        words = f"that is {ratio} times the correct one"
    else:
        words = "no simple expression of α and r"
    return (
        f"{name} has the scale {scales[0]} at α = {alpha:g} and r = {r}: {words}; "
        f"the correct scale is {right:.7g}"
    )


def step_patterns(answers: Answers) -> Iterator[Finding]:
    """Of parameters after each step: which step is the first wrong one, and how the error grows."""
    worst: dict[int, float] = {}
    parts: dict[int, float] = {}
    last = 0
    for name, comparison in (item for answer in answers for item in answer.items()):
        match = re.search(r"after step (\d+)$", name)
        if match is None:
            continue
        step = int(match[1])
        last = max(last, step)
        judged = comparison.judge()
        if judged.verdict == "fail":
            worst[step] = max(worst.get(step, 0.0), judged.z)
            parts[step] = max(parts.get(step, 0.0), _relative(comparison))
    if worst:
        by = f"by {parts[min(worst)]:.1g} of their values"
        yield "steps", f"The parameters are wrong {_when(worst, last)}, at first {by}"


def _relative(comparison: Comparison) -> float:
    """‖got - want‖ / ‖want‖."""
    got, want = (np.asarray(v, float) for v in (comparison.got, comparison.want))
    return float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-30))


def model_patterns(answers: Answers) -> Iterator[Finding]:
    """Of a whole model: whether the forward is wrong, or else from which layer on its gradients."""
    wrong: set[str] = set()
    seen: set[str] = set()
    for answer in answers:
        seen |= answer.keys()
        wrong |= {name for name, c in answer.items() if c.judge().verdict == "fail"}
    forward = [name for name in ("logits", "loss") if name in wrong]
    gradients = {name for name in wrong if name.startswith("grads[")}
    if not gradients or not {"logits", "loss"} & seen:
        return
    if forward:
        yield "forward", f"The forward is wrong ({' and '.join(forward)}); gradients follow from it"
        return
    layers = {name: int(m[1]) for name in seen if (m := re.search(r"\.(\d+)\.", name))}
    of_wrong = [layers[name] for name in gradients if name in layers]
    if of_wrong:
        first = max(of_wrong)
        right = " and those of later layers are right" if first < max(layers.values()) else ""
        sites = sorted(name for name in gradients if layers.get(name) == first)
        yield (
            "backward",
            (
                f"The forward is right. Backwards, layer {first} is the first with wrong "
                f"gradients{right}: {', '.join(sites[:3])}"
            ),
        )


def _when(worst: Mapping[int, float], last: int) -> str:
    """From which step on, by the worst z of each wrong step, and how it goes on."""
    first = min(worst)
    when = "from the first step on" if first == 1 else f"from step {first} on, right before"
    if len(worst) == 1 and first < last:
        return f"{when} and right again afterwards"
    grows = all(worst[k] <= worst[k + 1] for k in worst if k + 1 in worst)
    return f"{when} and further off with every step" if grows and len(worst) > 2 else when


@np.errstate(all="ignore")  # what is wrong may be wrong beyond all bounds
def describe(level: Level, cases: Sequence[Case], answers: Answers) -> tuple[Diagnosis, ...]:
    """The patterns of the deviations in a check's cases; nothing where nothing is certain."""
    layers = [layer for case in cases if (layer := level.layer(case)) is not None]
    found = [
        *accepted(answers),
        *step_patterns(answers),
        *model_patterns(answers),
        *(scale_patterns(layers, answers) if layers else ()),
    ]
    if not found:
        found = list(_of_arrays(level, cases, answers))
    return tuple(
        Diagnosis(f"{STRUCTURE}{kind}", f"{sentence}.", 0.0)
        for kind, sentence in found[:MAX_FINDINGS]
    )


_REFUSED = re.compile(r"whether (?:\S+ refuses (?P<what>.+)|(?P<step>.+) is refused)")


def accepted(answers: Answers) -> Iterator[Finding]:
    """What is accepted and should be refused."""
    told = [
        found["what"] or found["step"]
        for name in failing_arrays([Case("", "", 0, 0)] * len(answers), answers)
        if (found := _REFUSED.fullmatch(name))
    ]
    if told:
        yield "accepted", f"It accepts what should be refused: {', '.join(told)}"


def _of_arrays(level: Level, cases: Sequence[Case], answers: Answers) -> Iterator[Finding]:
    """The patterns of each array that deviates.

    In a history a wrong state stays wrong: its first array tells. The rank is an adapter's there.
    """
    failing = list(failing_arrays(cases, answers).items())
    for name, comparisons in failing[: 1 if level.is_history else None]:
        if made := list(compositions(comparisons)):
            steps = name.count("(")
            shown = f"{name.partition(' after ')[0]} after {steps} steps" if steps else name
            yield from ((kind, f"{shown}: {sentence}") for kind, sentence in made)
            continue
        for kind, sentence in array_patterns(comparisons):
            if not (level.is_history and kind == "rank"):
                yield kind, f"{name} {sentence}"
