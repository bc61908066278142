"""Level ``optimizer``: parameters after each of several steps, from given gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache, lru_cache
from typing import Any

import numpy as np

from minilora.spec.optim import run
from minilora.verify.core.axes import Axis
from minilora.verify.core.combinations import Row, pairwise
from minilora.verify.core.dtypes import DTYPES, Precision
from minilora.verify.core.inputs import long
from minilora.verify.core.level import Level
from minilora.verify.core.tolerance import Rounding, noisy, spread, underflow, unit_roundoff
from minilora.verify.core.types import MONTE_CARLO, Case, Check, Comparison
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray
Gradients = list[Any]

CASES = {"quick": 1, "ci": 2, "nightly": 40}
STEPS = 8
MANY = {"adamw.defaults": 24}
"""How many steps the kinds have that have more: here the bias of m and v lasts."""

STILL = 3
"""The step in which the first parameter's gradient is 0: its decay, m and u still act."""

SAMPLES = 16

SHAPES: dict[str, tuple[int, ...]] = {
    "layers.0.q.A": (3, 7),
    "layers.0.q.B": (5, 3),
    "layers.0.v.A": (2, 7),
    "layers.0.v.B": (2, 2),
}
"""Factors of two modules; one of them is square."""

OTHERS: dict[str, tuple[int, ...]] = {
    "embed.A": (3, 7),
    "embed.B": (5, 3),
    "blocks.0.B.A": (2, 5),
    "blocks.0.b.bias": (4,),
    "head.weight": (6, 4),
}
"""Parameters of which most are no B, though B or b stands in their names."""

BASE: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    "sgd": {"momentum": 0.7, "weight_decay": 0.1},
}
"""Rates far from their defaults and from each other, so that none can stand for another."""


def _settings(kind: str, **more: Any) -> dict[str, Any]:
    return {"optimizer": kind, "lr": 0.03, **BASE[kind], **more}


KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "adamw": (_settings("adamw"), "AdamW with decoupled weight decay"),
    "adamw.defaults": (
        {"optimizer": "adamw", "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        "AdamW with the usual constants",
    ),
    "sgd": (_settings("sgd"), "SGD with momentum and coupled weight decay"),
    "clip": (
        _settings("sgd", max_grad_norm=6.0),
        "clipping: all gradients scaled to a maximum global norm, which half of the steps exceed",
    ),
    "linear-schedule": (
        _settings("adamw", schedule="linear", warmup_steps=3, total_steps=STEPS + 1),
        "a linear schedule: k / warmup_steps, then down to 0 at the last step",
    ),
    "cosine-schedule": (
        _settings("adamw", schedule="cosine", warmup_steps=2, total_steps=STEPS + 2),
        "a cosine schedule: k / warmup_steps, then (1 + cos πq) / 2",
    ),
    "cosine-schedule.past-end": (
        _settings("adamw", schedule="cosine", total_steps=STEPS - 3),
        "a cosine schedule without warmup that ends before the steps do: the rate stays 0",
    ),
    "loraplus": (
        _settings("adamw", loraplus_lr_ratio=5.0),
        "LoRA+: a higher learning rate for each B",
    ),
    "loraplus.other-params": (
        _settings("adamw", loraplus_lr_ratio=0.2),
        "LoRA+ with a lower rate for each B: a bias, a head and every A have the base rate",
    ),
    "sgd.linear-schedule": (
        _settings("sgd", schedule="linear", total_steps=STEPS - 2, loraplus_lr_ratio=3.0),
        "SGD with LoRA+ under a linear schedule without warmup that ends before the steps do",
    ),
    "combined": (
        _settings("adamw", warmup_steps=3, max_grad_norm=6.0, loraplus_lr_ratio=5.0),
        "AdamW with gradient accumulation, clipping, LoRA+ and warmup at once",
    ),
    "gradient-accumulation": (
        _settings("sgd", max_grad_norm=6.0),
        "micro-batches weighted by their number of labels",
    ),
}


ODD: dict[str, dict[str, Any]] = {
    "clip": _settings("adamw", max_grad_norm=6.0),
    "gradient-accumulation": {"optimizer": "sgd", "lr": 0.03, "max_grad_norm": 6.0},
}
"""Settings of the cases of odd numbers, where they are others."""


ONE: dict[str, tuple[int, ...]] = {"layers.0.q.B": (5, 3)}
LARGE: dict[str, tuple[int, ...]] = {
    "layers.0.q.A": (3, 401),
    "layers.0.q.B": (67, 1),
    "layers.0.v.A": (1, 65),
}
"""A single parameter, and sizes beyond a kernel's pieces of 64 and of 1024 numbers."""

PARAMETERS: dict[str, dict[str, tuple[int, ...]]] = {"one": ONE, "several": SHAPES, "large": LARGE}
MAX_NORMS = {"one": 1.5, "several": 6.0, "large": 16.0}
"""A maximum of the global norm that about half of the steps exceed."""

LONG = 34
"""The steps of a long run."""


def _tensors(given: Mapping[str, Any]) -> str:
    params = given["params"]
    is_large = any(np.size(array) > 1024 for array in params.values())
    return "large" if is_large else "one" if len(params) == 1 else "several"


def _of(name: str, default: Any) -> Callable[[Mapping[str, Any]], Any]:
    return lambda given: given["settings"].get(name, default)


def _ratio(given: Mapping[str, Any]) -> str:
    ratio = given["settings"].get("loraplus_lr_ratio", 1.0)
    return "none" if ratio == 1 else "> 1" if ratio > 1 else "< 1"


AXES = (
    Axis("optimizer", ("adamw", "sgd"), _of("optimizer", "adamw")),
    Axis("schedule", ("constant", "linear", "cosine"), _of("schedule", "constant")),
    Axis("warmup", (False, True), lambda given: bool(given["settings"].get("warmup_steps"))),
    Axis("clipping", (False, True), lambda given: "max_grad_norm" in given["settings"]),
    Axis("decay", (False, True), lambda given: bool(given["settings"].get("weight_decay"))),
    Axis("LoRA+", ("none", "> 1", "< 1"), _ratio),
    Axis("micro-batches", (False, True), lambda given: isinstance(given["gradients"][0], list)),
    Axis("parameters", tuple(PARAMETERS), _tensors),
    Axis("steps", ("few", "many"), lambda given: ("few", "many")[len(given["gradients"]) > 32]),
)


def is_possible(row: Mapping[str, Any]) -> bool:
    """Many steps of large parameters take long to sample."""
    return row.get("parameters") != "large" or row.get("steps") != "many"


@cache
def rows_of_axes() -> tuple[Row, ...]:
    """All pairs of the axes' values."""
    return tuple(pairwise({axis.name: axis.values for axis in AXES}, is_possible))


def row_of(number: int) -> Row:
    """The row of a case of the kind ``all``."""
    return rows_of_axes()[number % len(rows_of_axes())]


def _settings_of_row(row: Row) -> dict[str, Any]:
    """The settings of a row. A schedule ends a step after the last; a linear one perhaps before."""
    steps = LONG if row["steps"] == "many" else STEPS
    ends_before = row["schedule"] == "linear" and not row["warmup"]
    chosen = {
        "schedule": (row["schedule"], row["schedule"] != "constant"),
        "total_steps": (steps - 2 if ends_before else steps + 1, row["schedule"] != "constant"),
        "warmup_steps": (3, row["warmup"]),
        "max_grad_norm": (MAX_NORMS[row["parameters"]], row["clipping"]),
        "loraplus_lr_ratio": (5.0 if row["LoRA+"] == "> 1" else 0.2, row["LoRA+"] != "none"),
        "weight_decay": (0.0, not row["decay"]),
    }
    more = {name: value for name, (value, is_on) in chosen.items() if is_on}
    return _settings(row["optimizer"], **more)


def settings_of(kind: str, number: int) -> dict[str, Any]:
    """The settings of a case of a kind."""
    if kind == "all":
        return _settings_of_row(row_of(number))
    settings = ODD.get(kind) if number % 2 else None
    return dict(KINDS[kind][0] if settings is None else settings)


def shapes_of(kind: str, number: int) -> Mapping[str, tuple[int, ...]]:
    """The parameters of a case of a kind, by their names."""
    if kind == "all":
        return PARAMETERS[row_of(number)["parameters"]]
    return OTHERS if kind == "loraplus.other-params" else SHAPES


def draw_steps(case: Case, kind: str) -> tuple[dict[str, Array], Gradients]:
    """Parameters and the gradients of each step, in the dtype under test.

    The gradients' sizes go up and down by a factor of 4, across the clipping threshold, and each
    parameter has a size of its own, so that no norm or mean can stand for another. A micro-batch in
    which no label counts has the gradient 0.
    """
    rng, dtype, shapes = case.rng(), DTYPES[case.dtype], shapes_of(kind, case.number)
    params = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}

    def gradients(k: int, n: int = 1) -> dict[str, Array]:
        own = np.linspace(0.5, 1.5, len(shapes)) * (0.4 * 4 ** (k % 2) if n else 0.0)
        own[0] = 0.0 if k == STILL else own[0]
        return {
            name: (f * rng.standard_normal(shape)).astype(dtype)
            for f, (name, shape) in zip(own, shapes.items(), strict=True)
        }

    row = row_of(case.number) if kind == "all" else {}
    steps = range(LONG if row.get("steps") == "many" else MANY.get(kind, STEPS))
    if not row.get("micro-batches", kind in ("gradient-accumulation", "combined")):
        return params, [gradients(k) for k in steps]
    counts = [(500, 200, 1100), (3, 0, 1), (7,)]
    return params, [[(n, gradients(k, n)) for n in counts[k % 3]] for k in steps]


def _each(gradients: Gradients, turn: Callable[[Array], Any]) -> Gradients:
    def turned(g: dict[str, Array]) -> dict[str, Any]:
        return {name: turn(array) for name, array in g.items()}

    return [
        turned(g) if isinstance(g, dict) else [(n, turned(part)) for n, part in g]
        for g in gradients
    ]


def history(
    params: Any, gradients: Gradients, settings: dict[str, Any], turn: Any
) -> dict[str, Any]:
    """Every parameter after every step, as ``name after step k``, over a number system."""
    steps = run(
        {name: turn(array) for name, array in params.items()}, _each(gradients, turn), settings
    )
    return {
        f"{name} after step {k}": array
        for k, after in enumerate(steps, 1)
        for name, array in after.items()
    }


@lru_cache(maxsize=128)
def expected(
    kind: str, case: Case, precision: Precision
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Every parameter after every step, and its σ: at least that of storing it."""
    (params, gradients), settings = draw_steps(case, kind), settings_of(kind, case.number)
    want = history(params, gradients, settings, long)
    sigma = spread(
        lambda draws: history(params, gradients, settings, lambda v: noisy(v, precision, draws)),
        want,
        SAMPLES,
        [case.number, case.seed],
    )
    rounding = Rounding(precision)
    last = {what: np.sqrt(rounding.stored(array)) for what, array in want.items()}
    decay = _of_decay(params, want, settings, precision)
    return want, {what: np.hypot(np.maximum(sigma[what], last[what]), decay[what]) for what in want}


def _of_decay(
    params: dict[str, Array], want: dict[str, Any], settings: dict[str, Any], precision: Precision
) -> dict[str, Any]:
    """σ that rounding the factor 1 - ηλ gives each parameter after each step of AdamW.

    The factor, which lies between ½ and 1, is rounded by an e of at most u / 2, by the same e in
    every step: errors that are not independent. After step k they are |e (p₀ + … + p_k₋₁)|, since
    no factor is greater than 1. e is uniform. Where p - ηλ p is formed instead, e is the oracle's.
    """
    u = unit_roundoff(precision.accumulation)
    decays = settings["optimizer"] == "adamw" and settings["weight_decay"]
    each = u / 2 / 3**0.5 if decays else 0.0
    sigma, sums = {}, {name: array.astype(np.float64) for name, array in params.items()}
    for what, array in want.items():
        name = what.partition(" after step ")[0]
        sigma[what] = each * np.abs(sums[name])
        sums[name] = sums[name] + array.astype(np.float64)
    return sigma


def _steps(kind: str) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def check(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        params, gradients = draw_steps(case, kind)
        answer = subject.call("optimizer_steps", params, gradients, settings_of(kind, case.number))
        steps = subject.items(answer, len(gradients), "the list of steps")
        want, sigma = expected(kind, case, subject.precision(case.dtype))
        for k, after in enumerate(steps, 1):
            for name, shape in shapes_of(kind, case.number).items():
                what = f"{name} after step {k}"
                entry = subject.entry(after, name, f"step {k}")
                got = subject.answer(entry, what, shape, case.dtype)
                yield Comparison(what, got, want[what], sigma[what], MONTE_CARLO)

    return check


def sgd_balance(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """A step of SGD keeps A Aᵀ - Bᵀ B up to weight decay and η² (dA dAᵀ - dBᵀ dB).

    A' A'ᵀ - B'ᵀ B' = (1 - ηλ)² (A Aᵀ - Bᵀ B) + η² (dA dAᵀ - dBᵀ dB), if Bᵀ dB = dA Aᵀ.
    """
    rng, dtype = case.rng(), DTYPES[case.dtype]
    eta, decay = 0.125, 0.25
    A, B, G = (rng.standard_normal(shape).astype(dtype) for shape in ((3, 7), (5, 3), (5, 7)))
    dA, dB = (B.T @ G).astype(dtype), (G @ A.T).astype(dtype)
    settings = {"optimizer": "sgd", "lr": eta, "weight_decay": decay}  # and hence no momentum
    params = {"layers.0.q.A": A, "layers.0.q.B": B}
    gradients = {"layers.0.q.A": dA, "layers.0.q.B": dB}
    answer = subject.call("optimizer_steps", params, [gradients], settings)
    after = subject.items(answer, 1, "the list of steps")[0]
    A2, B2 = (
        subject.answer(subject.entry(after, name), name, array.shape, case.dtype)
        for name, array in params.items()
    )
    got = long(A2) @ long(A2).T - long(B2).T @ long(B2)
    A, B, dA, dB = (long(v) for v in (A, B, dA, dB))
    cross = (dA @ A.T - B.T @ dB) + (dA @ A.T - B.T @ dB).T  # what rounding left of Bᵀ dB = dA Aᵀ
    want = (1 - eta * decay) ** 2 * (A @ A.T - B.T @ B) + eta**2 * (dA @ dA.T - dB.T @ dB)
    want -= eta * (1 - eta * decay) * cross
    # Three roundings an entry (λ p + g, η u, p - η u) of at most u each times what they round.
    u = Rounding(subject.precision(case.dtype)).u
    sizes = [
        (np.abs(p) + eta * np.abs(decay * p + g) + eta * (np.abs(g) + decay * np.abs(p)), np.abs(q))
        for p, g, q in ((A, dA, long(A2)), (B, dB, long(B2)))
    ]
    (eA, A3), (eB, B3) = sizes
    variance = 4 * (eA**2 @ (A3**2).T + (eB**2).T @ B3**2) * u**2 / 3
    yield Comparison("A Aᵀ - Bᵀ B after a step", got, want, np.sqrt(np.float64(variance)))


def _cases(profile: str, dtype: str) -> int:
    return CASES[profile]


def _cases_of(kind: str) -> Callable[[str, str], int]:
    """As many, or all rows of the axes; none where ε lies below the dtype's numbers."""
    if kind == "all":
        counts = {"quick": 1, "ci": len(rows_of_axes()), "nightly": 4 * len(rows_of_axes())}
        return lambda profile, dtype: counts[profile]
    eps = KINDS[kind][0].get("eps", 1.0)
    return lambda profile, dtype: CASES[profile] * (eps > underflow(dtype))


ALL = "combinations of settings, one parameter, several or large ones, and many steps"

_CHECKS: tuple[Check, ...] = (
    *(
        Check(
            f"optimizer.{kind}",
            "optimizer",
            ("optimizer_steps",),
            f"{words[0].upper()}{words[1:]}.",
            _steps(kind),
            _cases_of(kind),
        )
        for kind, words in (*((kind, words) for kind, (_, words) in KINDS.items()), ("all", ALL))
    ),
    Check(
        "optimizer.sgd-balance",
        "optimizer",
        ("optimizer_steps",),
        (sgd_balance.__doc__ or "").splitlines()[0],
        sgd_balance,
        _cases,
    ),
)

LEVEL = Level(
    "optimizer",
    _CHECKS,
    laws=("sgd-balance",),
    cases=None,
    has_exact_lane=False,
    axes=AXES,
    is_possible=is_possible,
    vectors={"*": (("bfloat16", 0), ("float32", 1))},
    no_vectors={
        "cosine-schedule": "the last bit of a cosine depends on the library of mathematics",
        "cosine-schedule.past-end": "the same",
        "all": "the same steps as of the others, of more and larger parameters",
        "sgd-balance": "a law of the answers, which the other checks imply",
    },
)
