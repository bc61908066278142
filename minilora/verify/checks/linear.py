"""Level ``linear``: one LoRA linear, forward and transpose, by the equation and with itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product
from typing import Any

import numpy as np

from minilora.verify.core.accumulation import draw_cancelling
from minilora.verify.core.dtypes import Precision
from minilora.verify.core.errors import Fault, Skip
from minilora.verify.core.inputs import (
    LEADS,
    Layer,
    draw_layer,
    in_exact_lane,
    limits,
    long,
    sigmas,
    wanted,
)
from minilora.verify.core.layer_axes import LANE, LAYER, draw_combination, is_possible, rows_of
from minilora.verify.core.level import VECTOR_SHAPES, VECTOR_SIZES, Level
from minilora.verify.core.shrinking import Difference, Differs, Smallest, search
from minilora.verify.core.tolerance import digits
from minilora.verify.core.types import Case, Check, Comparison, counter
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray
Run = Callable[[GuardedImplementation, Case], Iterable[Comparison]]
Draw = Callable[[Case], tuple[Layer, bool]]

CASES = {"quick": 6, "ci": 24, "nightly": 480}

KINDS: dict[str, dict[str, Any]] = {
    "": {},
    ".bias": {"bias": True},
    ".dropout": {"dropout": True},
    ".rslora": {"use_rslora": True},
    ".conv1d": {"fan_in_fan_out": True},
    ".all": dict.fromkeys(("bias", "dropout", "use_rslora", "fan_in_fan_out")),
}
"""The options of a case; conv1d is the storage (n, m) of GPT-2's weights. None is either."""

WORDS = {
    "": "",
    ".bias": ", with a bias",
    ".dropout": ", with a dropout mask on the branch's input",
    ".rslora": ", with rsLoRA's scale α/√r",
    ".conv1d": ", with the weight stored (in, out)",
    ".all": ", with combinations of options, shapes and batches",
}


def draw(case: Case, kind: str) -> tuple[Layer, bool]:
    """The layer of a case of a kind, and whether it belongs to the exact lane."""
    return draw_combination(case) if kind == ".all" else draw_layer(case, **KINDS[kind])


def compared(
    layer: Layer, name: str, got: Array, want: Array, sigma: Array | None
) -> Iterable[Comparison]:
    """An answer beside the true one; of an empty array there is the shape alone."""
    if np.size(want):
        yield Comparison(name, got, want, sigma, limits(layer, name))
    else:
        yield Comparison(f"shape of {name}", np.array(np.shape(got)), np.array(np.shape(want)))


def forward(subject: GuardedImplementation, layer: Layer, dtype: str, **changed: Any) -> Array:
    """The implementation's y, of the right shape and dtype; ``changed`` replaces arguments."""
    arrays = {name: changed.pop(name, getattr(layer, name)) for name in ("x", "W", "A", "B")}
    y = subject.call("lora_linear", *arrays.values(), **layer.options() | changed)
    return subject.answer(y, "y", (*arrays["x"].shape[:-1], len(layer.W)), dtype)


def vjp(
    subject: GuardedImplementation, layer: Layer, dtype: str, **changed: Any
) -> dict[str, Array]:
    """The implementation's y, dx, dA, dB, and dbias where it gives one."""
    arrays = {name: changed.pop(name, getattr(layer, name)) for name in ("x", "W", "A", "B", "dy")}
    answer = subject.call("lora_linear_vjp", *arrays.values(), **layer.options() | changed)
    names = ["y", "dx", "dA", "dB", *dbias(subject, layer, answer)]
    shapes = layer.shapes()
    return {
        name: subject.answer(subject.entry(answer, name), name, shapes[name], dtype)
        for name in names
    }


def dbias(subject: GuardedImplementation, layer: Layer, answer: Any) -> list[str]:
    """The bias's gradient by its name, where it is answered: it is optional, and its lack noted."""
    if layer.bias is None or not isinstance(answer, Mapping):
        return []
    if "dbias" not in answer:
        subject.remark("lora_linear_vjp gives no dbias where there is a bias: it is not judged")
        return []
    return ["dbias"]


@lru_cache(maxsize=256)
def expected(
    case: Case, draw: Draw, precision: Precision
) -> tuple[Layer, dict[str, Array], Mapping[str, Array]]:
    """The layer of a case, the true answers, and their σ: none in the exact lane."""
    layer, exact = draw(case)
    return layer, wanted(layer, number(exact)), {} if exact else sigmas(layer, precision)


def _expected(subject: GuardedImplementation, case: Case, name: str, draw: Draw) -> Any:
    """The same for the forward and the transpose of a kind: it is computed once."""
    return expected(replace(case, check=name), draw, subject.precision(case.dtype))


@contextlib.contextmanager
def _empty_may_be_refused(layer: Layer) -> Iterator[None]:
    """An exception is a refusal where there is no token, and raises Skip. An answer is judged."""
    try:
        yield
    except Fault as fault:
        if layer.x.size or fault.kind != "raises":
            raise
        raise Skip(f"an empty batch is refused: {fault.message}") from None


def _forward_check(name: str, draw: Draw) -> Run:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        layer, want, sigma = _expected(subject, case, name, draw)
        with _empty_may_be_refused(layer):
            y = forward(subject, layer, case.dtype)
        yield from compared(layer, "y", y, want["y"], sigma.get("y"))

    return run


def _vjp_check(name: str, draw: Draw) -> Run:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        layer, want, sigma = _expected(subject, case, name, draw)
        with _empty_may_be_refused(layer):
            answers = vjp(subject, layer, case.dtype)
        for array, got in answers.items():
            yield from compared(layer, array, got, want[array], sigma.get(array))

    return run


def number(exact: bool) -> Any:
    """The numbers of the true answers: of the exact lane, float64 has them all."""
    return np.float64 if exact else long


def _draw_evaluation(case: Case) -> tuple[Layer, bool]:
    """A rate without a mask, every other case with a bias, with rsLoRA, stored (in, out)."""
    bias, *others = (bool(case.number // 2 >> i & 1) for i in range(3))
    named = zip(("use_rslora", "fan_in_fan_out"), others, strict=True)
    settings: dict[str, Any] = {name: True for name, is_on in named if is_on}
    return draw_layer(case, bias=bias, dropout="rate without a mask", **settings)


EVALUATION = "linear.evaluation"


def evaluation(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Without a mask, as in evaluation, the dropout rate changes nothing."""
    return _forward_check(EVALUATION, _draw_evaluation)(subject, case)


def evaluation_vjp(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Without a mask, as in evaluation, the dropout rate changes no gradient."""
    return _vjp_check(EVALUATION, _draw_evaluation)(subject, case)


def _accumulates(subject: GuardedImplementation, dtype: str) -> None:
    """Raises Skip where sums have no more digits than storage, as declared."""
    precision = subject.precision(dtype)
    if digits(precision.accumulation) < digits("float32"):
        raise Skip(f"not supported: it declares accumulation in {precision.accumulation}")


def accumulation(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Sums over many features or ranks keep the digits of the accumulation that is declared."""
    _accumulates(subject, case.dtype)
    layer = draw_cancelling(case, "nr"[case.number % 2])
    y = forward(subject, layer, case.dtype)
    yield Comparison("y", y, wanted(layer, np.float64)["y"])


def accumulation_vjp(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """The same of gradients: sums over many features, ranks, tokens or outputs."""
    _accumulates(subject, case.dtype)
    layer = draw_cancelling(case, "tmnr"[case.number % 4])
    got, want = vjp(subject, layer, case.dtype), wanted(layer, np.float64)
    for name, array in got.items():
        yield Comparison(name, array, want[name])


def balance(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Bᵀ dB = dA Aᵀ, for every loss that depends on A and B through B A alone."""
    layer, exact = draw_layer(case, dropout=case.number % 4 > 1)
    got = vjp(subject, layer, case.dtype)
    A, B, dA, dB = (long(v) for v in (layer.A, layer.B, got["dA"], got["dB"]))
    sigma = None
    if not exact:
        s = sigmas(layer, subject.precision(case.dtype))
        sigma = np.sqrt(np.float64((B * B).T @ s["dB"] ** 2 + s["dA"] ** 2 @ (A * A).T))
    yield Comparison("Bᵀ dB against dA Aᵀ", B.T @ dB, dA @ A.T, sigma, limits(layer, "dA"))


def symmetry(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Factors of -1 and powers of two pass through the layer without rounding; compared by ==."""
    layer, _ = draw_layer(case)
    y = forward(subject, layer, case.dtype)
    yield Comparison("y(-x) against -y(x)", forward(subject, layer, case.dtype, x=-layer.x), -y)
    signs = np.where(case.rng().random(layer.r) < 0.5, -1, 1).astype(layer.A.dtype)
    flipped = forward(subject, layer, case.dtype, A=signs[:, None] * layer.A, B=layer.B * signs)
    yield Comparison("y with rows of A and columns of B negated", flipped, y)
    if case.dtype != "float16":  # whose subnormal numbers are too near for powers of two
        four = layer.x.dtype.type(4)
        yield Comparison(
            "y(4x) against 4 y(x)", forward(subject, layer, case.dtype, x=four * layer.x), four * y
        )
        half = layer.x.dtype.type(0.5)
        scaled = forward(subject, layer, case.dtype, A=layer.A / half, B=layer.B * half)
        yield Comparison("y with A doubled and B halved", scaled, y)


def zero_B(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """With B = 0, y does not depend on A, dA is exactly 0, and dx and dB are correct."""
    layer, exact = draw_layer(case, bias=case.number % 4 > 1)
    layer = Layer(**vars(layer) | {"B": np.zeros_like(layer.B)})
    got, want = vjp(subject, layer, case.dtype), wanted(layer)
    other = vjp(subject, layer, case.dtype, A=-layer.A[::-1] - layer.A)
    yield Comparison("y with another A", other["y"], got["y"])
    yield Comparison("dA", got["dA"], np.zeros_like(got["dA"]))
    sigma = {} if exact else sigmas(layer, subject.precision(case.dtype))
    for name in ("dx", "dB"):
        yield Comparison(name, got[name], want[name], sigma.get(name), limits(layer, name))


def gradcheck(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """The gradients are the derivatives of the implementation's own forward.

    y is affine in each of x, A and B, so that the central difference along an integer direction E
    is the derivative itself, without a rest: ⟨dy, y(A + E) - y(A - E)⟩ / 2 = ⟨dA, E⟩.
    """
    even = in_exact_lane(case)
    layer, _ = draw_layer(even, bias=case.number % 2 > 0, dropout=case.number % 4 > 1)
    got, rng = vjp(subject, layer, case.dtype), case.rng()
    dy = long(layer.dy)
    for name in ("x", "A", "B"):
        array = getattr(layer, name)
        E = rng.integers(-1, 2, array.shape).astype(array.dtype)
        up, down = (
            forward(subject, layer, case.dtype, **{name: v}) for v in (array + E, array - E)
        )
        slope = (dy * (long(up) - long(down))).sum() / 2
        yield Comparison(f"⟨d{name}, E⟩", (long(got[f"d{name}"]) * E).sum(), slope)


def basis_change(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """A → R A, B → B R⁻¹ changes neither y nor dx; dA → R⁻ᵀ dA, dB → dB Rᵀ; by ==."""
    even = in_exact_lane(case)
    layer, _ = draw_layer(even)
    R = np.eye(layer.r, dtype=layer.A.dtype)
    R[0, 1:] = 1
    inverse = 2 * np.eye(layer.r, dtype=layer.A.dtype) - R
    a = vjp(subject, layer, case.dtype)
    b = vjp(subject, layer, case.dtype, A=R @ layer.A, B=layer.B @ inverse)
    want = {"y": a["y"], "dx": a["dx"], "dA": inverse.T @ a["dA"], "dB": a["dB"] @ R.T}
    for name, array in want.items():
        yield Comparison(f"{name} after a change of basis", b[name], array)


def dropout_mean(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """The mean of y over all 2ⁿ dropout masks at p = ½ is y without dropout."""
    even = in_exact_lane(case)
    layer, _ = draw_layer(even)
    narrow = {"x": layer.x.reshape(-1, layer.x.shape[-1])[:2, :4], "W": layer.W[:, :4]}
    layer = Layer(**vars(layer) | narrow | {"A": layer.A[:, :4]})
    total = np.zeros((len(layer.x), len(layer.W)), np.longdouble)
    for bits in product((True, False), repeat=4):
        keep = np.broadcast_to(np.array(bits), layer.x.shape)
        total += long(forward(subject, layer, case.dtype, keep=keep, p=0.5))
    y = forward(subject, layer, case.dtype)
    yield Comparison("mean of y over all masks", total / 16, y)


def token_independence(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """A token's y and dx do not depend on other tokens: one by one against all at once; by ==."""
    even = replace(case, number=case.number * 2 * len(LEADS))  # x (tokens, n)
    layer, _ = draw_layer(even)
    whole = vjp(subject, layer, case.dtype)
    parts = [
        vjp(subject, Layer(**vars(layer) | {"x": layer.x[i], "dy": layer.dy[i]}), case.dtype)
        for i in range(len(layer.x))
    ]
    for name in ("y", "dx"):
        yield Comparison(f"{name} token by token", np.stack([p[name] for p in parts]), whole[name])
    for name in ("dA", "dB"):
        summed = np.sum([long(p[name]) for p in parts], axis=0)
        yield Comparison(f"{name} summed over tokens", summed, whole[name])


def first_difference(subject: GuardedImplementation, layer: Layer, dtype: str) -> Difference | None:
    """The first of y, dx, dA, dB that is not what the equation gives, compared by ==."""
    want = wanted(layer)
    if subject.has("lora_linear_vjp"):
        got = vjp(subject, layer, dtype)
    else:
        got = {"y": forward(subject, layer, dtype)}
    return next(((n, v, want[n]) for n, v in got.items() if (v != want[n]).any()), None)


def forward_difference(
    subject: GuardedImplementation, layer: Layer, dtype: str
) -> Difference | None:
    """The same for the forward alone."""
    y, want = forward(subject, layer, dtype), wanted(layer)["y"]
    return ("y", y, want) if (y != want).any() else None


def layer_of(case: Case) -> Layer | None:
    """The layer of a case of a check of the forward or the transpose; None for any other check."""
    kind = case.check.removeprefix("linear.forward").removeprefix("linear.vjp")
    return DRAWS[kind](replace(case, check=f"linear{kind}"))[0] if kind in KINDS else None


def _half_precision(profile: str, dtype: str) -> int:
    """Float32 and float64 have nothing wider to accumulate in."""
    return 0 if dtype in ("float64", "float32") else max(2, CASES[profile] // 3)


def _smallest(kind: Mapping[str, bool | None], differs: Differs) -> Smallest:
    return lambda subject, dtype: search(subject, dtype, kind, differs)


def _law(run: Run, needs: tuple[str, ...], share: float, low_precision: bool = True) -> Check:
    title = (run.__doc__ or "").splitlines()[0]
    name = run.__name__.replace("_", "-")
    differs = first_difference if "lora_linear_vjp" in needs else forward_difference
    smallest = _smallest({}, differs)
    return Check(
        f"linear.{name}",
        "linear",
        needs,
        title,
        run,
        counter(CASES, share, low_precision),
        smallest,
    )


def _cases(kind: str) -> Callable[[str, str], int]:
    """The number of cases of a kind: of the combinations, each at least once in the profile ci."""
    return counter({**CASES, "ci": len(rows_of(LAYER))} if kind == ".all" else CASES)


_FORWARD, _VJP = ("lora_linear",), ("lora_linear_vjp",)

DRAWS: dict[str, Draw] = {kind: partial(draw, kind=kind) for kind in KINDS}


def _kind(kind: str) -> Iterable[Check]:
    """The forward and the transpose of a kind."""
    formulas: dict[str, tuple[str, Any, Any, Differs]] = {
        "forward": ("y = W x + b + s B A x", _FORWARD, _forward_check, forward_difference),
        "vjp": (
            "dx = Wᵀ dy + Aᵀ du, dA = du xᵀ, dB = s dy uᵀ", _VJP, _vjp_check, first_difference
        ),
    }  # fmt: skip
    for what, (formula, needs, check, differs) in formulas.items():
        yield Check(
            f"linear.{what}{kind}",
            "linear",
            needs,
            f"{formula}{WORDS[kind]}.",
            check(f"linear{kind}", DRAWS[kind]),
            _cases(kind),
            _smallest(KINDS[kind], differs),
        )


_CHECKS: tuple[Check, ...] = (
    *(check for kind in KINDS for check in _kind(kind)),
    _law(evaluation, _FORWARD, 0.5),
    _law(evaluation_vjp, _VJP, 0.25),
    replace(_law(accumulation, _FORWARD, 1.0), cases=_half_precision, smallest=None),
    replace(_law(accumulation_vjp, _VJP, 1.0), cases=_half_precision, smallest=None),
    _law(balance, _VJP, 0.5),
    _law(symmetry, _FORWARD, 0.25),
    _law(zero_B, _VJP, 0.25),
    _law(gradcheck, _FORWARD + _VJP, 0.25, low_precision=False),
    _law(basis_change, _VJP, 0.25, low_precision=False),
    _law(dropout_mean, _FORWARD, 0.1, low_precision=False),
    _law(token_independence, _VJP, 0.1),
)

LEVEL = Level(
    "linear",
    _CHECKS,
    answers=("forward*", "vjp*", "evaluation*", "zero-B*"),
    relations=("symmetry", "basis-change", "dropout-mean", "token-independence", "gradcheck"),
    layer=layer_of,
    axes=(*LAYER, LANE),
    is_possible=is_possible,
    quick_dtypes=True,
    vectors={
        "forward": (*VECTOR_SIZES, *VECTOR_SHAPES, ("float32", 20)),
        "vjp": (*VECTOR_SIZES, *VECTOR_SHAPES, ("float32", 20)),
        "forward.bias": (*VECTOR_SIZES, ("float32", 13)),
        "forward*": VECTOR_SIZES,
        "vjp*": VECTOR_SIZES,
        "evaluation": VECTOR_SIZES[1:2] + VECTOR_SIZES[4:],
        "zero-B": VECTOR_SIZES[1:2] + VECTOR_SIZES[4:5],
        "evaluation-vjp": VECTOR_SIZES[1:2] + VECTOR_SIZES[4:5],
    },
)
