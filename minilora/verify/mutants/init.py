"""Starts, misread: what A is drawn from, what B is, and what is taken out of W."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.verify.core import tolerance
from minilora.verify.mutants.mutant import Mutant
from minilora.verify.mutants.reference import Array, Plain, digits
from minilora.verify.mutants.transition import equivalents, family

Rng = np.random.Generator


class Starter(Plain):
    """Right starts, every part of them a method."""

    def init(
        self, W: Array, *, r: int, alpha: float, seed: int, use_rslora: bool = False, **own: Any
    ) -> dict[str, Array]:
        """A, B and the weight beside them."""
        kind = own.pop("init_lora_weights", True)
        if own:
            raise NotImplementedError(", ".join(own))
        rng, (m, n) = self.rng(seed), W.shape
        s = self.scale(alpha, r, use_rslora)
        if kind in ("pissa", "olora"):
            wide = W.astype(np.float64)
            A, B = self.parts(kind, wide, r, s)
            held = self.left(wide, A, B, s)
        elif kind == "orthogonal":
            (A, B), held = self.apart(rng, m, n, r), W
        else:
            A = self.gaussian(rng, r, n) if kind == "gaussian" else self.uniform(rng, r, m, n)
            B, held = self.zero(rng, r, m, n), self.beside(W)
        arrays = {"A": A, "B": B, "W": held}
        return {name: np.asarray(array).astype(W.dtype) for name, array in arrays.items()}

    def rng(self, seed: int) -> Rng:
        """The generator of a seed."""
        return np.random.default_rng([seed, 7])

    def scale(self, alpha: float, r: int, rslora: bool) -> Any:
        """s."""
        return alpha * r**-0.5 if rslora else alpha / r

    def uniform(self, rng: Rng, r: int, m: int, n: int) -> Any:
        """A, as the code of LoRA draws it."""
        return (2 * rng.random((r, n)) - 1) / n**0.5

    def gaussian(self, rng: Rng, r: int, n: int) -> Any:
        """A, normal."""
        return rng.normal(0, 1 / r, (r, n))

    def zero(self, rng: Rng, r: int, m: int, n: int) -> Any:
        """B."""
        return np.zeros((m, r))

    def beside(self, W: Array) -> Any:
        """The weight beside a product that is 0."""
        return W

    def parts(self, kind: str, W: Array, r: int, s: float) -> Any:
        """A and B of what is taken out of W."""
        return self.pissa(W, r, s) if kind == "pissa" else self.olora(W, r, s)

    def pissa(self, W: Array, r: int, s: float) -> Any:
        """From its singular values."""
        U, values, Vh = np.linalg.svd(W, full_matrices=False)
        root = (values[:r] / s) ** 0.5
        return root[:, None] * Vh[:r], U[:, :r] * root

    def olora(self, W: Array, r: int, s: float) -> Any:
        """From its columns."""
        Q, R = np.linalg.qr(W)
        return R[:r], Q[:, :r]

    def left(self, W: Array, A: Array, B: Array, s: float) -> Any:
        """What remains of W."""
        return W - s * (B @ A)

    def apart(self, rng: Rng, m: int, n: int, r: int) -> Any:
        """A and B with B A = 0."""
        Q, _ = np.linalg.qr(rng.standard_normal((r, r)))
        half = r // 2
        A = Q[:half].T @ rng.standard_normal((half, n)) / 10
        return A, rng.standard_normal((m, half)) @ Q[half:] / 10


def starts(**methods: Any) -> Callable[[], Starter]:
    """`Starter` with these methods in the place of its own."""
    return type("Wrong", (Starter,), methods)


def _draws(draw: Callable[[Rng, int, int, int], Any]) -> Callable[[], Starter]:
    return starts(uniform=lambda my, rng, r, m, n: draw(rng, r, m, n))


def _within(bound: Callable[[int, int, int], float]) -> Callable[[], Starter]:
    """A uniform between ± a function of r, m, n."""
    return _draws(lambda rng, r, m, n: rng.uniform(-1, 1, (r, n)) * bound(r, m, n))


def _normal(deviation: Callable[[int, int], float]) -> Callable[[], Starter]:
    """A normal with a standard deviation that is a function of r, n."""
    return _draws(lambda rng, r, m, n: rng.standard_normal((r, n)) * deviation(r, n))


def _factored(factor: Callable[..., float]) -> Callable[[], Starter]:
    """A multiplied by a function of the settings: r, alpha, use_rslora, init_lora_weights."""

    def init(my: Starter, W: Array, **how: Any) -> Any:
        answer = Starter.init(my, W, **how)
        return answer | {"A": (answer["A"] * factor(**how)).astype(W.dtype)}

    return starts(init=init)


def _rolled(row: Array, r: int) -> Array:
    """A row r times, each time one further."""
    return np.stack([np.roll(row, i) for i in range(r)])


def _of_pissa(change: Callable[[Array, Array, Array, int, float], Any]) -> Callable[[], Starter]:
    """PiSSA whose A and B are a function of U, the singular values, Vᵀ, r and s."""
    return starts(pissa=lambda my, W, r, s: change(*np.linalg.svd(W, full_matrices=False), r, s))


def _least(U: Array, values: Array, Vh: Array, r: int, s: float) -> Any:
    root = (values[-r:] / s) ** 0.5
    return root[:, None] * Vh[-r:], U[:, -r:] * root


def _one_sided(U: Array, values: Array, Vh: Array, r: int, s: float) -> Any:
    return Vh[:r], U[:, :r] * values[:r] / s


def _unscaled(U: Array, values: Array, Vh: Array, r: int, s: float) -> Any:
    root = values[:r] ** 0.5
    return root[:, None] * Vh[:r], U[:, :r] * root


def _not_rooted(U: Array, values: Array, Vh: Array, r: int, s: float) -> Any:
    return values[:r, None] / s * Vh[:r], U[:, :r] * values[:r]


def _one_sided_left(U: Array, values: Array, Vh: Array, r: int) -> Any:
    return values[:r, None] * Vh[:r], U[:, :r]


def _again(my: Starter, seed: int) -> Rng:
    """One generator that goes on from call to call."""
    kept: Rng = my.memory.setdefault("rng", np.random.default_rng(0))
    return kept


def _coarse(W: Array) -> Any:
    return digits(W.astype(np.float64), tolerance.digits(W.dtype.name) // 2)


def _gaussian(how: dict[str, Any]) -> bool:
    return how.get("init_lora_weights") == "gaussian"


B_ZERO = family(
    "INIT",
    "init.zero-B",
    ("B-random", "B ~ U(-1/√r, 1/√r) too", starts(
        zero=lambda my, rng, r, m, n: rng.uniform(-1, 1, (m, r)) / r**0.5)),
    ("B-random-A-0", "A = 0, B ~ U(-1/√r, 1/√r)", starts(
        uniform=lambda my, rng, r, m, n: np.zeros((r, n)),
        zero=lambda my, rng, r, m, n: rng.uniform(-1, 1, (m, r)) / r**0.5)),
    ("B-small", "B ~ N(0, 10⁻¹²)", starts(
        zero=lambda my, rng, r, m, n: 1e-6 * rng.standard_normal((m, r)))),
    ("B-eps", "B = 10⁻⁷ for 0", starts(
        zero=lambda my, rng, r, m, n: np.full((m, r), 1e-7))),
    ("B-gaussian", "B ~ N(0, 1/r²) too, where it is asked of A", starts(
        init=lambda my, W, **how: (a := Starter.init(my, W, **how)) | (
            {"B": a["A"][:, :1].T.repeat(len(W), 0)} if _gaussian(how) else {}))),
    ("B-one", "B = 1", starts(zero=lambda my, rng, r, m, n: np.ones((m, r)))),
)  # fmt: skip

UNIFORM = family(
    "INIT",
    "init.distribution",
    ("both-0", "A = 0 and B = 0: no gradient ever", _draws(lambda rng, r, m, n: np.zeros((r, n)))),
    ("normal-r", "A ~ N(0, 1/r)", _normal(lambda r, n: r**-0.5)),
    ("normal-n", "A ~ N(0, 1/n)", _normal(lambda r, n: n**-0.5)),
    (
        "normal-same-variance",
        "A ~ N(0, 1/(3 n)): mean and variance are right",
        _normal(lambda r, n: (3 * n) ** -0.5),
    ),
    ("normal-1", "A ~ N(0, 1)", _normal(lambda r, n: 1.0)),
    ("normal-0.02", "A ~ N(0, 0.02²)", _normal(lambda r, n: 0.02)),
    ("normal-r-squared", "A ~ N(0, 1/r²) unasked", _normal(lambda r, n: 1 / r)),
    ("uniform-r", "A ~ U(-1/√r, 1/√r)", _within(lambda r, m, n: r**-0.5)),
    ("uniform-m", "the fan of the output, U(-1/√m, 1/√m)", _within(lambda r, m, n: m**-0.5)),
    (
        "kaiming-a-0",
        "kaiming with a = 0, U(-√(6/n), √(6/n))",
        _within(lambda r, m, n: (6 / n) ** 0.5),
    ),
    ("kaiming-a-1", "kaiming with a = 1, U(-√(3/n), √(3/n))",
     _within(lambda r, m, n: (3 / n) ** 0.5)),
    ("xavier", "U(-√(6/(n + r)), √(6/(n + r)))", _within(lambda r, m, n: (6 / (n + r)) ** 0.5)),
    ("half", "U(-1/(2√n), 1/(2√n))", _within(lambda r, m, n: 0.5 * n**-0.5)),
    ("double", "U(-2/√n, 2/√n)", _within(lambda r, m, n: 2 * n**-0.5)),
    ("over-n", "U(-1/n, 1/n)", _within(lambda r, m, n: 1 / n)),
    ("not-centred", "U(0, 1/√n)", _draws(lambda rng, r, m, n: rng.random((r, n)) / n**0.5)),
    (
        "not-centred-wide",
        "U(0, 2/√n)",
        _draws(lambda rng, r, m, n: 2 * rng.random((r, n)) / n**0.5),
    ),
    (
        "signs",
        "± 1/√n",
        _draws(lambda rng, r, m, n: rng.choice([-1.0, 1.0], (r, n)) / n**0.5),
    ),
    (
        "uniform-greatest",
        "the greater fan, U(-1/√max(m, n), 1/√max(m, n))",
        _within(lambda r, m, n: max(m, n) ** -0.5),
    ),
    (
        "uniform-tall",
        "the fan of the output where m > n",
        _within(lambda r, m, n: (m if m > n else n) ** -0.5),
    ),
    (
        "uniform-rank-1",
        "U(0, 1/√n) where r = 1",
        _draws(lambda rng, r, m, n: rng.uniform(-(r > 1), 1, (r, n)) / n**0.5),
    ),
    (
        "uniform-alpha",
        "A times α/r where α < r",
        _factored(lambda alpha, r, **how: min(1, alpha / r)),
    ),
    (
        "uniform-rslora",
        "A over r to the fourth part with rsLoRA",
        _factored(lambda r, use_rslora=False, **how: r**-0.25 if use_rslora else 1),
    ),
    (
        "tenth-wider",
        "U(-1.1/√n, 1.1/√n)",
        _within(lambda r, m, n: 1.1 * n**-0.5),
    ),
    (
        "rows-normed",
        "rows of length 1",
        _draws(lambda rng, r, m, n: (
            lambda a: a / np.linalg.norm(a, axis=1, keepdims=True))(rng.standard_normal((r, n)))),
    ),
)  # fmt: skip

GAUSSIAN = family(
    "INIT",
    "init.distribution.gaussian",
    (
        "gaussian-ignored",
        "U(-1/√n, 1/√n) where N(0, 1/r²) is asked for",
        starts(gaussian=lambda my, rng, r, n: my.uniform(rng, r, 1, n)),
    ),
    (
        "gaussian-variance",
        "N(0, 1/r): 1/r taken for the variance",
        starts(gaussian=lambda my, rng, r, n: rng.normal(0, r**-0.5, (r, n))),
    ),
    (
        "gaussian-cut",
        "N(0, 1/r²) cut off at 1/r",
        starts(gaussian=lambda my, rng, r, n: rng.normal(0, 1 / r, (r, n)).clip(-1 / r, 1 / r)),
    ),
    (
        "gaussian-rslora",
        "N(0, 1/r) with rsLoRA",
        _factored(
            lambda r, use_rslora=False, **how: r**0.5 if use_rslora and _gaussian(how) else 1
        ),
    ),
)

SEEDS = (
    *family(
        "INIT",
        "init.independent",
        (
            "one-A",
            "the same A whatever the seed and the module",
            starts(rng=lambda my, seed: np.random.default_rng(0)),
        ),
        (
            "rows-alike",
            "one row of A, r times",
            _draws(lambda rng, r, m, n: np.tile(rng.uniform(-1, 1, (1, n)) / n**0.5, (r, 1))),
        ),
        (
            "rows-in-pairs",
            "each row of A twice",
            _draws(lambda rng, r, m, n: np.repeat(rng.uniform(-1, 1, (r, n)), 2, 0)[:r] / n**0.5),
        ),
        (
            "seeds-in-pairs",
            "neighbouring seeds alike",
            starts(rng=lambda my, seed: np.random.default_rng(seed // 2)),
        ),
        (
            "columns-tiled",
            "64 columns of A, again and again",
            _draws(lambda rng, r, m, n: np.resize(rng.uniform(-1, 1, (64, r)), (n, r)).T / n**0.5),
        ),
        (
            "rows-overlap",
            "A[i, j] = u[i + j]",
            _draws(
                lambda rng, r, m, n: (
                    rng.uniform(-1, 1, n + r)[np.add.outer(np.arange(r), np.arange(n))] / n**0.5
                )
            ),
        ),
        (
            "rows-rolled",
            "one row of A, each time one further",
            _draws(lambda rng, r, m, n: _rolled(rng.uniform(-1, 1, n), r) / n**0.5),
        ),
        (
            "rows-rolled-gaussian",
            "one normal row of A, each time one further",
            starts(gaussian=lambda my, rng, r, n: _rolled(rng.normal(0, 1 / r, n), r)),
        ),
        (
            "rows-signed",
            "one row of |A|, the signs drawn",
            _draws(lambda rng, r, m, n: rng.random(n) * rng.choice([-1, 1], (r, n)) / n**0.5),
        ),
        (
            "seeds-overlap",
            "one stream of numbers, from the place on that the seed says",
            starts(rng=lambda my, seed: np.random.Generator(np.random.PCG64(0).advance(int(seed)))),
        ),
        (
            "seeds-mirrored",
            "of neighbouring seeds one has the columns of the other, turned round",
            starts(
                init=lambda my, W, *, seed, **how: (
                    (a := Starter.init(my, W, seed=seed // 2, **how))
                    | {"A": a["A"][:, :: (-1) ** seed]}
                )
            ),
        ),
        (
            "seeds-byte",
            "the last 8 bits of the seed",
            starts(rng=lambda my, seed: np.random.default_rng(seed % 256)),
        ),
        (
            "entries-of-8-bits",
            "256 numbers between ± 1/√n",
            _draws(lambda rng, r, m, n: (rng.integers(0, 256, (r, n)) / 127.5 - 1) / n**0.5),
        ),
    ),
    *family(
        "INIT",
        "init.reproducible",
        ("seed-ignored", "a generator that goes on from call to call", starts(rng=_again)),
        (
            "seed-gaussian",
            "N(0, 1/r²) of seed 0 whatever the seed",
            starts(
                gaussian=lambda my, rng, r, n: np.random.default_rng(0).normal(0, 1 / r, (r, n))
            ),
        ),
        (
            "seed-gaussian-again",
            "N(0, 1/r²) of a generator that goes on from call to call",
            starts(gaussian=lambda my, rng, r, n: _again(my, 0).normal(0, 1 / r, (r, n))),
        ),
        (
            "orthogonal-seed",
            "the orthogonal start of seed 0 whatever the seed",
            starts(
                apart=lambda my, rng, m, n, r: Starter.apart(my, np.random.default_rng(0), m, n, r)
            ),
        ),
        (
            "seed-rank-1",
            "one A for all seeds where r = 1",
            _draws(
                lambda rng, r, m, n: (
                    (np.random.default_rng(n) if r == 1 else rng).uniform(-1, 1, (r, n)) / n**0.5
                )
            ),
        ),
    ),
    *family(
        "INIT",
        "init.base-unchanged",
        (
            "base-rounded",
            "W rounded to half of its digits",
            starts(beside=lambda my, W: _coarse(W)),
        ),
        (
            "base-rounded-tall",
            "W rounded to half of its digits where m > n",
            starts(beside=lambda my, W: _coarse(W) if len(W) > len(W.T) else W),
        ),
        (
            "base-doubled-gaussian",
            "2 W beside the gaussian start",
            starts(
                init=lambda my, W, **how: (
                    Starter.init(my, W, **how)
                    | ({"W": (2 * W).astype(W.dtype)} if _gaussian(how) else {})
                )
            ),
        ),
        (
            "base-zeroed",
            "W = 0 beside the adapter",
            starts(beside=lambda my, W: 0 * W),
        ),
        (
            "base-drawn",
            "W drawn anew",
            starts(beside=lambda my, W: np.random.default_rng(0).standard_normal(W.shape)),
        ),
    ),
)


PARTS = (
    *family(
        "INIT",
        "init.pissa",
        ("pissa-base-kept", "W + s B A: nothing is taken out of W", starts(
            left=lambda my, W, A, B, s: W)),
        ("pissa-least", "the least singular values", _of_pissa(_least)),
        ("pissa-scale-kept", "√Σ for √(Σ / s): W' = W - s B A", _of_pissa(_unscaled)),
        ("pissa-not-rooted", "Σ for √Σ in both", _of_pissa(_not_rooted)),
        ("pissa-one-sided", "A = Vᵀ, B = U Σ / s", _of_pissa(_one_sided)),
        ("pissa-scale-forgotten", "W' = W - B A", starts(
            left=lambda my, W, A, B, s: W - B @ A)),
        ("pissa-rslora-whole-root", "s = α / ⌊√r⌋ with rsLoRA", starts(
            scale=lambda my, a, r, rslora: a / int(r**0.5) if rslora else a / r)),
        ("pissa-greatest-rank-kept", "W' = W where r = min(m, n)", starts(
            left=lambda my, W, A, B, s: (
                W if len(A) == min(W.shape) else Starter.left(my, W, A, B, s)))),
        ("pissa-added", "W' = W + s B A", starts(left=lambda my, W, A, B, s: W + s * (B @ A))),
        ("pissa-coarse", "W' rounded to half of its digits", starts(
            left=lambda my, W, A, B, s: _coarse((W - s * (B @ A)).astype(np.float32)))),
    ),
    *family(
        "INIT",
        "init.olora",
        ("olora-transposed", "Q R of Wᵀ", starts(
            olora=lambda my, W, r, s: [part.T for part in Starter.olora(my, W.T, r, s)[::-1]])),
        ("olora-not-orthogonal", "the first columns of W itself, and their coordinates", starts(
            olora=lambda my, W, r, s: (np.linalg.lstsq(W[:, :r], W, rcond=None)[0], W[:, :r]))),
        ("olora-scale-halved", "B and A each over √s", starts(
            olora=lambda my, W, r, s: tuple(
                part / s**0.5 for part in Starter.olora(my, W, r, s)))),
        ("olora-rslora-ignored", "s = α/r where rsLoRA is asked for", starts(
            scale=lambda my, a, r, rslora: a / r)),
        ("olora-as-pissa", "singular vectors", starts(
            olora=lambda my, W, r, s: _one_sided_left(*np.linalg.svd(W, full_matrices=False), r))),
    ),
    *family(
        "INIT",
        "init.orthogonal",
        ("orthogonal-ignored", "U(-1/√n, 1/√n) and B = 0", starts(
            apart=lambda my, rng, m, n, r: (my.uniform(rng, r, m, n), np.zeros((m, r))))),
        ("orthogonal-same-half", "A and B in one half: B A ≠ 0", starts(
            apart=lambda my, rng, m, n, r: (lambda Q, h: (
                Q[:h].T @ rng.standard_normal((h, n)), rng.standard_normal((m, h)) @ Q[:h]))(
                np.linalg.qr(rng.standard_normal((r, r)))[0], r // 2))),
        ("orthogonal-not", "halves of what is not orthogonal", starts(
            apart=lambda my, rng, m, n, r: (lambda Q, h: (
                Q[:h].T @ rng.standard_normal((h, n)), rng.standard_normal((m, h)) @ Q[h:]))(
                rng.standard_normal((r, r)), r // 2))),
    ),
)  # fmt: skip

SAME = equivalents(
    "init",
    ("plain", "drawn otherwise", Starter),
    (
        "kaiming",
        "kaiming with a = √5, √(6 / ((1 + a²) n))",
        _within(lambda r, m, n: (6 / ((1 + 5) * n)) ** 0.5),
    ),
    (
        "pissa-signs",
        "singular vectors of the other sign",
        starts(pissa=lambda my, W, r, s: tuple(-part for part in Starter.pissa(my, W, r, s))),
    ),
    (
        "23-bits",
        "A of 23 random bits, as in float32",
        _draws(lambda rng, r, m, n: (rng.integers(0, 2**23, (r, n)) / 2**22 - 1) / n**0.5),
    ),
    (
        "two-uniform",
        "normal numbers out of two uniform ones, √(-2 log u) cos 2πv",
        starts(
            gaussian=lambda my, rng, r, n: (
                (-2 * np.log(1 - rng.random((r, n), np.float32))) ** 0.5
                * np.cos(2 * np.pi * rng.random((r, n), np.float32))
                / r
            )
        ),
    ),
    (
        "columns-first",
        "A drawn as its transpose",
        _draws(lambda rng, r, m, n: rng.uniform(-1, 1, (n, r)).T / n**0.5),
    ),
)

MUTANTS: tuple[Mutant, ...] = B_ZERO + UNIFORM + GAUSSIAN + SEEDS + PARTS + SAME
