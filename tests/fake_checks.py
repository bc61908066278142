"""A small registry of checks and implementations of them, right and wrong, for the engine's tests.

The engine knows no mathematics of LoRA, so three small laws are enough: one in the exact lane,
one with a sigma, one whose answer is a dict, and one whose answer is a list.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.types import Case, Check, Comparison
from minilora.verify.implementation.guard import GuardedImplementation

ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
ALPHA, RANK = 7, 3


def operands(case: Case, whole: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = case.rng()
    shapes = ((4, 5), (RANK, 5), (4, RANK))
    draw = (lambda s: rng.integers(-2, 3, s)) if whole else rng.standard_normal
    return tuple(draw(shape).astype(DTYPES[case.dtype]) for shape in shapes)  # type: ignore[return-value]


def run_exact(subject: GuardedImplementation, case: Case) -> Iterator[Comparison]:
    W, A, B = operands(case, whole=True)
    answer = subject.call("merge", W, A, B, alpha=RANK, r=RANK)
    got = subject.answer(answer, "W'", W.shape, case.dtype)
    want = W.astype(float) + B.astype(float) @ A.astype(float)
    yield Comparison("W'", got, want)


def run_sigma(subject: GuardedImplementation, case: Case) -> Iterator[Comparison]:
    W, A, B = operands(case, whole=False)
    answer = subject.call("merge", W, A, B, alpha=ALPHA, r=RANK)
    got = subject.answer(answer, "W'", W.shape, case.dtype)
    want = W.astype(float) + ALPHA / RANK * (B.astype(float) @ A.astype(float))
    # Five roundings of terms no larger than these: generous, and proportional to u.
    sigma = ROUNDOFF[case.dtype] * 5 * (np.abs(W) + ALPHA * np.abs(B) @ np.abs(A)).astype(float)
    yield Comparison("W'", got, want, sigma)


def run_dict(subject: GuardedImplementation, case: Case) -> Iterator[Comparison]:
    W, A, B = operands(case, whole=True)
    x, dy = np.ones(5, W.dtype), np.ones(4, W.dtype)
    answer = subject.call("lora_linear_vjp", x, W, A, B, dy, alpha=RANK, r=RANK)
    dx = subject.answer(subject.entry(answer, "dx"), "dx", x.shape, case.dtype)
    yield Comparison("dx", dx, (W + B @ A).T.astype(float) @ dy.astype(float))


def run_list(subject: GuardedImplementation, case: Case) -> Iterator[Comparison]:
    params = {"a": np.ones(3, DTYPES[case.dtype])}
    steps = subject.call("optimizer_steps", params, [{"a": params["a"]}] * 2, {"lr": 0.5})
    for i, step in enumerate(subject.items(steps, 2)):
        a = subject.answer(subject.entry(step, "a", f"step {i}"), f"a after {i + 1}", (3,))
        yield Comparison(f"a after {i + 1}", a, np.full(3, 1 - (i + 1) / 2))


def smallest(subject: GuardedImplementation, dtype: str) -> dict[str, Any] | None:
    one = np.ones((1, 1), DTYPES[dtype])
    got = subject.answer(subject.call("merge", 0 * one, one, one, alpha=1, r=1), "W'")
    return {"W": 0 * one, "A": one, "B": one, "got": got[0, 0], "want": 1.0}


def few(profile: str, dtype: str) -> int:
    return {"quick": 2, "ci": 5, "nightly": 100}[profile]


def wide_only(profile: str, dtype: str) -> int:
    return few(profile, dtype) if dtype in ("float64", "float32") else 0


CHECKS = (
    Check("exact.merge", "merge", ("merge",), "W' = W + B A in integers", run_exact, few, smallest),
    Check("sigma.merge", "merge", ("merge",), "W' = W + s B A", run_sigma, wide_only),
    Check("dict.vjp", "linear", ("lora_linear_vjp",), "dx = W'ᵀ dy", run_dict, few),
    Check("list.steps", "optimizer", ("optimizer_steps",), "SGD's steps", run_list, few),
)


class Right:
    """Right in all four checks."""

    name = "right"
    version = "1.2"
    dtypes = tuple(DTYPES)

    def merge(self, W, A, B, *, alpha, r, **settings):  # type: ignore[no-untyped-def]
        s = np.asarray(alpha / r, W.dtype)
        return (W + s * (B @ A)).astype(W.dtype)

    def lora_linear_vjp(self, x, W, A, B, dy, *, alpha, r, **settings):  # type: ignore[no-untyped-def]
        dx = W.T @ dy + A.T @ (B.T @ dy)
        return {"y": (W @ x + B @ (A @ x)).astype(x.dtype), "dx": dx.astype(x.dtype)}

    def optimizer_steps(self, params, gradients, settings):  # type: ignore[no-untyped-def]
        steps = []
        for g in gradients:
            params = {"a": params["a"] - np.asarray(settings["lr"], params["a"].dtype) * g["a"]}
            steps.append(params)
        return steps


class WrongScale(Right):
    """Scales by alpha in place of alpha / r."""

    name = "wrong scale"

    def merge(self, W, A, B, *, alpha, r, **settings):  # type: ignore[no-untyped-def]
        return (W + alpha * (B @ A)).astype(W.dtype)


class OnlyMerge:
    """Supports one method only, in the two default dtypes."""

    merge = Right.merge


def factory() -> Right:
    return Right()


def needs_arguments(size: int) -> Right:
    return Right()


def raises() -> Right:
    raise RuntimeError("no device")


right = Right()
number = 3
