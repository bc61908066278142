"""Level ``variants``: a layer of DoRA, and one whose B has a bias: forward, transpose and merge.

Settings: ``use_dora=True`` with ``magnitude`` (m,), and ``lora_bias`` (m,). The answers of
``lora_linear_vjp`` have ``dmagnitude`` or ``dlora_bias`` besides. Two conventions of DoRA are
declared, the first of each is taken where nothing is: ``dora_norm``, whether the norm is
``"detached"`` in the gradients or ``"differentiated"``; and ``dora_dropout``, whether dropout acts
on all that DoRA adds to W x, the ``"difference"``, or on the input of B A, the ``"branch"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from itertools import combinations, product
from math import sqrt
from typing import Any

import numpy as np

from minilora.spec.lora import Variant
from minilora.spec.variants import (
    DORA,
    DORA_FULL,
    LORA_BIAS,
    rescaled_linear,
    rescaled_lora_linear,
    row_norm,
)
from minilora.verify.checks.linear import dbias
from minilora.verify.checks.merge import merged_with_bias
from minilora.verify.core import inputs
from minilora.verify.core.axes import Axis
from minilora.verify.core.dtypes import DTYPES, Precision
from minilora.verify.core.errors import Skip
from minilora.verify.core.inputs import Layer, columns, draw_layer, long
from minilora.verify.core.layer_axes import VARIANT, draw_row, rows_of
from minilora.verify.core.level import Level
from minilora.verify.core.tolerance import Draws, Rounding, noisy, spread, unit_roundoff
from minilora.verify.core.types import MONTE_CARLO, Case, Check, Comparison, counter
from minilora.verify.implementation.contract import CONVENTIONS
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray

CASES = {"quick": 2, "ci": 8, "nightly": 160}
SAMPLES = 16

PART = {"dora": "magnitude", "lora-bias": "lora_bias"}
"""The setting that holds the variant's own parameter (m,); its gradient's name has a d before."""

WORDS = {
    "dora": "DoRA, the rows of V = W + s B A rescaled to the magnitude",
    "lora-bias": "lora_bias, a trained bias c of B in s (B A x + c)",
}

KINDS: dict[str, dict[str, Any]] = {
    "": {"bias": True},
    ".dropout": {"bias": True, "dropout": True},
    ".rslora": {"use_rslora": True},
    ".evaluation": {"bias": True, "dropout": "rate without a mask"},
    ".conv1d": {"fan_in_fan_out": True},
    ".unbatched": {"bias": True},
    ".all": {},
}
"""What a case has beside the variant; what one of ``.all`` has, its row says (`VARIANT`)."""

ASKED = {
    "dora": ("", ".dropout", ".rslora", ".evaluation", ".conv1d", ".all"),
    "lora-bias": ("", ".dropout", ".rslora", ".evaluation", ".all"),
}
"""The kinds of each variant, forward and backward."""

MERGED = {"dora": ("", ".conv1d", ".all"), "lora-bias": ("", ".all")}
"""The kinds of each variant, merged. How W is stored matters to DoRA, whose norm is that
of an output's row."""

SQUARE = 64
"""The greatest number of outputs of which there are as many tokens."""

SMALL = 20
"""A row of DoRA's V is 2⁻²⁰ as long as the others, and its magnitude as small: no norm may be cut
off before. float16 ends so early that its row is 2⁻⁴ as long. There is none beside a bias: to take
the base from an output with its bias is a way to write DoRA, and rounds it by the bias's size."""


LARGE = 256
"""About so many times V's norm is a magnitude that shows what is added and taken out again."""


BEYOND = tuple(size for size in inputs.BEYOND if max(a * b for a, b in combinations(size, 2)) < 2e4)
"""Sizes beyond tiles of which sixteen noisy runs cost little."""


def draw(case: Case, kind: str, name: str) -> tuple[Layer, Array]:
    """A layer, never of the exact lane, and the variant's parameter away from its start.

    W is not 0: a row of V needs a direction, whatever B A. x has rows, but for
    ``.unbatched``, and for ``.all`` of a bias of B.
    """
    odd, rows = replace(case, number=case.number * 2 + 1), rows_of(VARIANT)
    row = rows[case.number % len(rows)]
    if kind == ".all":
        layer = draw_row(odd, row, BEYOND)
    else:
        layer, _ = draw_layer(odd, beyond=BEYOND, **KINDS[kind])
    rng = case.rng()
    W = rng.standard_normal(layer.W.shape) / sqrt(layer.W.shape[1])
    arrays = {name: getattr(layer, name) for name in ("x", "dy", "keep")}
    if name == "dora" or kind != ".all":
        arrays = {name: v if v is None or v.ndim > 1 else v[None] for name, v in arrays.items()}
    if kind == ".unbatched":
        arrays = {
            name: v if v is None else v.reshape(-1, v.shape[-1])[0] for name, v in arrays.items()
        }
    layer = replace(layer, W=W.astype(layer.W.dtype), **arrays)
    part = rng.standard_normal(len(W))
    if name == "dora":
        part = row_norm(W)[0][:, 0] * rng.uniform(0.6, 1.6, len(W))
    if kind == ".all":
        square = row["x"] == "(t,)" and row["dropout"] in ("none", "mask")
        layer, part = _unusual(layer, part, name, rng, square)
    return layer, part.astype(layer.W.dtype)


def _unusual(
    layer: Layer, part: Array, name: str, rng: np.random.Generator, square: bool
) -> tuple[Layer, Array]:
    """As many tokens as outputs, if ``square``; of DoRA, negative magnitudes and a small row."""
    dtype = layer.W.dtype
    m, n = layer.W.shape
    if square and m < SQUARE:
        keep = None if layer.keep is None else rng.random((m, n)) >= layer.p
        x, dy = (rng.standard_normal((m, width)).astype(dtype) for width in (n, m))
        layer = replace(layer, x=x, dy=dy, keep=keep)
    if name == "dora":
        small = np.ones((len(part), 1), dtype)
        if layer.bias is None:
            small[-1] = 2.0 ** -(4 if dtype == np.float16 else SMALL)
        layer = replace(layer, W=layer.W * small, B=layer.B * small)
        part = part * small[:, 0] * np.where(rng.random(len(part)) < 0.5, -1, 1)
    return layer, part


def _settings(name: str, part: Array) -> dict[str, Any]:
    return {PART[name]: part} | ({"use_dora": True} if name == "dora" else {})


def _dora(norm: str, dropout: str) -> Variant:
    """DoRA under two conventions."""
    of = {"detached": DORA, "differentiated": DORA_FULL}[norm]
    rescaled = {"difference": rescaled_linear, "branch": rescaled_lora_linear}[dropout]
    return replace(of, linear=partial(of.linear, rescaled=rescaled))


DORAS: dict[tuple[str, ...], Variant] = {
    choice: _dora(*choice) for choice in product(*CONVENTIONS.values())
}
"""DoRA by the values of `CONVENTIONS`."""


def variant(name: str, subject: GuardedImplementation) -> Variant:
    """The variant's equation under the conventions that the implementation declares."""
    if name == "lora-bias":
        return LORA_BIAS
    return DORAS[tuple(subject.conventions.get(k, v[0]) for k, v in CONVENTIONS.items())]


def specified(
    of: Variant, layer: Layer, part: Array, number: Callable[[Array], Any]
) -> dict[str, Any]:
    """All answers by the specification over a number system.

    An implementation may apply s to B and dy first. Multiplied by 1 they carry that rounding, where
    the numbers round.
    """
    K = None if layer.keep is None else number(columns(layer.keep) / (1 - layer.p))
    b = None if layer.bias is None else number(layer.bias[:, None])
    x, W, A, c = (number(v) for v in (columns(layer.x), layer.W, layer.A, part[:, None]))
    B, dy = (number(v) * 1.0 for v in (layer.B, columns(layer.dy)))
    y, back = of.linear(x, W, b, A, B, c, layer.s, K)
    dx, dA, dB, dc = back(dy)
    merged, _ = of.merge(W, b, A, B, c, layer.s)
    db = number(columns(layer.dy)) @ np.ones((dy.shape[1], 1))
    answers = {"y": y.T, "dx": dx.T, "dA": dA, "dB": dB, "dpart": dc[:, 0], "merged": merged}
    answers["dbias"] = db
    shapes = layer.shapes()
    return {name: v.reshape(shapes.get(name, np.shape(v))) for name, v in answers.items()}


def by_weight_product(
    of: Variant, layer: Layer, part: Array, number: Callable[[Array], Any]
) -> dict[str, Any]:
    """The same answers by way of the weight V' = m ∘ V / ‖V‖ and of G = dy hᵀ, as autograd has it.

    y = V' h + W (x - h) + b,   dm = ⟨G_i, V_i⟩ / ‖V_i‖,   dA = s Bᵀ dV,   dB = s dV Aᵀ with
    dV = m / ‖V‖ ∘ G, less its part along each row of V where the norm is differentiated. Where
    dropout acts on the branch alone, W (x - h) is rescaled too, and so counts in dm and the norm.
    Of an output that takes the base's part from one with its bias, y = z + (g - 1) (z - b) + …, z =
    W x + b, a sum for each way back to b: db = Σ (dy + (g - 1) dy) - Σ (g - 1) dy; dm has z - b.
    That is fair as long as g is no large number, which `bias_gradient` asks.
    """
    norm, dropout = next(choice for choice, each in DORAS.items() if each is of)
    x, W, A, m = (number(v) for v in (columns(layer.x), layer.W, layer.A, part[:, None]))
    B, dy = (number(v) * 1.0 for v in (layer.B, columns(layer.dy)))
    K = 1.0 if layer.keep is None else columns(layer.keep) / (1 - layer.p)
    V = W + (B @ A) * layer.s
    length = row_norm(V)[0]
    g = m / length
    turned, h = V * g, x * K
    y, dx = turned @ h, (turned.T @ dy) * K
    G = dy @ h.T
    along = (G * V).sum(1, keepdims=True)
    if layer.keep is not None:
        whole = W * g if dropout == "branch" else W
        y, dx = y + whole @ (x - h), dx + (whole.T @ dy) * (1 - K)
        if dropout == "branch":
            along = along + ((dy @ (x - h).T) * W).sum(1, keepdims=True)
    if layer.bias is not None:
        b, z = number(layer.bias[:, None]), V @ h
        y = y + b
        along = along + (dy * ((z + b) - b - z)).sum(1, keepdims=True)
    dV = G * g
    if norm == "differentiated":
        dV = dV - V * (along * g / (length * length))
    dm = along / length
    answers = {"y": y.T, "dx": dx.T, "dA": (B.T @ dV) * layer.s, "dB": (dV @ A.T) * layer.s}
    rescaled, ones = dy * (g - 1.0), np.ones((dy.shape[1], 1))
    answers |= {"dbias": (dy + rescaled) @ ones - rescaled @ ones}
    answers |= {"dpart": dm[:, 0], "merged": turned}
    shapes = layer.shapes()
    return {name: v.reshape(shapes.get(name, np.shape(v))) for name, v in answers.items()}


def sigmas(
    of: Variant,
    layer: Layer,
    part: Array,
    precision: Precision,
    seed: tuple[int, ...],
    way: Callable[..., dict[str, Any]] = specified,
) -> dict[str, Array]:
    """The standard deviation that rounding gives each element: at least that of storing it."""
    wanted = way(of, layer, part, long)

    def run(draws: Draws) -> dict[str, Any]:
        return way(of, layer, part, lambda v: noisy(v, precision, draws))

    sigma, rounding = spread(run, wanted, SAMPLES, seed), Rounding(precision)
    return {
        name: np.maximum(sigma[name], np.sqrt(rounding.stored(array.astype(float))))
        for name, array in wanted.items()
    }


def _compared(
    subject: GuardedImplementation,
    case: Case,
    name: str,
    kind: str,
    got: Callable[[Layer, Array], Any],
) -> Iterable[Comparison]:
    # The same layer forward, backward and merged: what is wanted of it is computed once.
    shared = replace(case, check=f"variants.{name}{kind}")
    asked = shared, kind, name, variant(name, subject), subject.precision(case.dtype)
    layer, part, wanted, sigma = expected(*asked)
    for what, shown, array in got(layer, part):
        found = Comparison(shown, array, wanted[what], sigma[what], MONTE_CARLO)
        if name == "dora" and found.judge().verdict != "pass":
            # Another way is as fair, and is looked at where the first one has not the room.
            other = expected(*asked, by_weight_product)[-1][what]
            found = replace(found, sigma=np.maximum(sigma[what], other))
        yield found


@lru_cache(maxsize=256)
def expected(
    case: Case,
    kind: str,
    name: str,
    of: Variant,
    precision: Precision,
    way: Callable[..., dict[str, Any]] | None = None,
) -> tuple[Layer, Array, dict[str, Array], dict[str, Array]]:
    """The layer of a case, its variant's parameter, the true answers, and their σ."""
    layer, part = draw(case, kind, name)
    sigma = sigmas(of, layer, part, precision, (case.seed, case.number), way or specified)
    return layer, part, specified(of, layer, part, long), sigma


def _forward(name: str, kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        def got(layer: Layer, part: Array) -> Iterable[tuple[str, str, Array]]:
            y = subject.call(
                "lora_linear",
                *(layer.x, layer.W, layer.A, layer.B),
                **layer.options() | _settings(name, part),
            )
            yield "y", "y", subject.answer(y, "y", layer.shapes()["y"], case.dtype)

        yield from _compared(subject, case, name, kind, got)

    return run


def _vjp(name: str, kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        def got(layer: Layer, part: Array) -> Iterable[tuple[str, str, Array]]:
            answer = subject.call(
                "lora_linear_vjp",
                *(layer.x, layer.W, layer.A, layer.B, layer.dy),
                **layer.options() | _settings(name, part),
            )
            shapes = layer.shapes() | {f"d{PART[name]}": part.shape}
            more = dbias(subject, layer, answer)
            for own in ("y", "dx", "dA", "dB", f"d{PART[name]}", *more):
                array = subject.answer(subject.entry(answer, own), own, shapes[own], case.dtype)
                yield "dpart" if own == f"d{PART[name]}" else own, own, array

        yield from _compared(subject, case, name, kind, got)

    return run


def _merge(name: str, kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        def got(layer: Layer, part: Array) -> Iterable[tuple[str, str, Array]]:
            W = subject.call(
                "merge",
                *(layer.W, layer.A, layer.B),
                **layer.merge_options() | _settings(name, part),
            )
            yield "merged", "merged W", subject.answer(W, "merged W", layer.W.shape, case.dtype)

        yield from _compared(subject, case, name, kind, got)

    return run


def initialized(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """DoRA with B = 0 and the magnitude at the row norms of W gives the base's output."""
    layer, _ = draw(case, "", "dora")
    layer = replace(layer, B=np.zeros_like(layer.B))
    part = row_norm(long(layer.W))[0][:, 0].astype(DTYPES[case.dtype])
    of = variant("dora", subject)
    y = subject.call(
        "lora_linear",
        *(layer.x, layer.W, layer.A, layer.B),
        **layer.options() | _settings("dora", part),
    )
    y = subject.answer(y, "y", layer.shapes()["y"], case.dtype)
    precision = subject.precision(case.dtype)
    sigma = sigmas(of, layer, part, precision, (case.seed, case.number))["y"]
    base = long(layer.x) @ long(layer.W).T
    base = base if layer.bias is None else base + long(layer.bias)
    # The magnitude is rounded too, once: that is worth u / √3 of each row's output.
    rounded = np.abs(long(y)).astype(float) * unit_roundoff(precision.storage) / 3**0.5
    yield Comparison("y against the base", y, base, np.hypot(sigma, rounded), MONTE_CARLO)


def bias_gradient(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """DoRA does not rescale a bias: its gradient is Σ dy, however long the magnitude is."""
    layer, part = draw(case, "", "dora")
    V = long(layer.W) + layer.s * (long(layer.B) @ long(layer.A))
    grown = LARGE * row_norm(V)[0] / row_norm(long(layer.W))[0]
    part = (part * grown[:, 0]).astype(part.dtype)
    answer = subject.call(
        "lora_linear_vjp",
        *(layer.x, layer.W, layer.A, layer.B, layer.dy),
        **layer.options() | _settings("dora", part),
    )
    dy, ones = columns(layer.dy), np.ones((columns(layer.dy).shape[1], 1))
    wanted = {"dbias": long(dy) @ ones}
    precision = subject.precision(case.dtype)

    def run(draws: Draws) -> dict[str, Any]:
        return {"dbias": noisy(dy, precision, draws) @ ones}

    sigma = spread(run, wanted, SAMPLES, (case.seed, case.number))["dbias"]
    sigma = np.maximum(sigma, np.sqrt(Rounding(precision).stored(wanted["dbias"].astype(float))))
    if not dbias(subject, layer, answer):
        raise Skip("lora_linear_vjp gives no dbias")
    got = subject.answer(answer["dbias"], "dbias", layer.shapes()["dbias"], case.dtype)
    yield Comparison("dbias", got, wanted["dbias"][:, 0], sigma[:, 0], MONTE_CARLO)


def merged_bias(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """DoRA does not rescale a bias: merging leaves the layer's as it is."""
    layer, part = draw(case, "", "dora")
    bias = case.rng().standard_normal(len(layer.W)).astype(layer.W.dtype)
    layer = replace(layer, bias=bias)
    _, b = merged_with_bias(subject, layer, case.dtype, **_settings("dora", part))
    if b is not None:
        yield Comparison("merged bias", b, bias)


def _checks(name: str) -> Iterable[Check]:
    def check(what: str, needs: str, words: str, run: Any, kind: str) -> Check:
        title = f"{words} of {WORDS[name]}{_more(kind)}."
        share = counter({**CASES, "ci": len(rows_of(VARIANT))} if kind == ".all" else CASES)
        return Check(f"variants.{name}.{what}{kind}", "variants", (needs,), title, run, share)

    for kind in ASKED[name]:
        yield check("forward", "lora_linear", "Output", _forward(name, kind), kind)
        yield check("vjp", "lora_linear_vjp", "Gradients", _vjp(name, kind), kind)
    for kind in MERGED[name]:
        yield check("merge", "merge", "Merged weight", _merge(name, kind), kind)


def _unbatched(id: str, needs: str, words: str, run: Any) -> Check:
    title = f"DoRA on one token without a batch, x (n,): {words}."
    return Check(f"variants.dora.{id}", "variants", (needs,), title, run, counter(CASES, 0.5))


def _more(kind: str) -> str:
    return {
        "": "",
        ".dropout": ", with dropout",
        ".rslora": ", with rsLoRA's scale",
        ".evaluation": ", in evaluation: a dropout rate and no mask",
        ".conv1d": ", with the weight stored (in, out)",
        ".all": ", with combinations of options, shapes and batches",
    }[kind]


def _variant_of(given: Mapping[str, Any]) -> str:
    return "dora" if "magnitude" in given else "lora-bias"


_CHECKS: tuple[Check, ...] = (
    *_checks("dora"),
    Check(
        "variants.dora.init",
        "variants",
        ("lora_linear",),
        (initialized.__doc__ or "").splitlines()[0],
        initialized,
        counter(CASES, 0.5),
    ),
    Check(
        "variants.dora.bias-gradient",
        "variants",
        ("lora_linear_vjp",),
        (bias_gradient.__doc__ or "").splitlines()[0],
        bias_gradient,
        counter(CASES, 0.5),
    ),
    Check(
        "variants.dora.bias-merged",
        "variants",
        ("merge",),
        (merged_bias.__doc__ or "").splitlines()[0],
        merged_bias,
        counter(CASES, 0.25),
    ),
    _unbatched(
        "unbatched",
        "lora_linear",
        "y (m,), as of a linear",
        _forward("dora", ".unbatched"),
    ),
    _unbatched(
        "unbatched-vjp",
        "lora_linear_vjp",
        "dx (n,) and the magnitude's gradient (m,)",
        _vjp("dora", ".unbatched"),
    ),
    *_checks("lora-bias"),
)

LEVEL = Level(
    "variants",
    _CHECKS,
    laws=("dora.init", "dora.unbatched"),
    has_exact_lane=False,
    axes=(*VARIANT, Axis("variant", ("dora", "lora-bias"), _variant_of)),
    vectors={
        "*.forward*": (("bfloat16", 0), ("float32", 2), ("float64", 3)),
        "*.vjp*": (("bfloat16", 0), ("bfloat16", 1), ("float32", 2), ("float64", 3)),
        "*.merge*": (("bfloat16", 0), ("float32", 2), ("float64", 3)),
        "dora.unbatched*": (("bfloat16", 0), ("float64", 3)),
    },
)
