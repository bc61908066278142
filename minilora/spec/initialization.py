"""What is drawn, and how A and B start beside the weight W: the output is the base's, or near it.

Where A is drawn and B = 0 (`draw_factors`), the frozen base is W itself, and so with
`orthogonal`, where B A = 0. `pissa`, `olora` and `loftq` take A and B out of W: the residual
becomes the frozen base, and the array W stays unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.spec.lora import Weights, merge_weight
from minilora.spec.models import Config, Shapes
from minilora.spec.ops import Array, python_scalar
from minilora.spec.quantization import dequantize, quantize


def _kaiming_uniform(rng: np.random.Generator, r: int, n: int) -> Array:
    return rng.uniform(-(n**-0.5), n**-0.5, (r, n))


def _gaussian(rng: np.random.Generator, r: int, n: int) -> Array:
    return rng.standard_normal((r, n)) / r


DRAW = {"kaiming": _kaiming_uniform, "gaussian": _gaussian}


def draw_factors(
    rng: np.random.Generator, init: str, r: int, m: int, n: int
) -> tuple[Array, Array]:
    """A drawn, B = 0, so that the adapted model starts as the base.

    "kaiming": A ~ U(-1/√n, 1/√n), which is kaiming-uniform with a = √5, as in the code of Hu et al.
    "gaussian": A ~ N(0, 1/r²), as PEFT reads the paper's "random Gaussian".

    Shapes: -> A (r, n), B (m, r).
    Errors: ValueError for another start.
    """
    if init not in DRAW:
        raise ValueError(f"init {init!r}: expected one of {', '.join(DRAW)}")
    return DRAW[init](rng, r, n), np.zeros((m, r))


def input_shapes(c: Config, b: int, t: int) -> Shapes:
    """What each projection reads of b rows of t tokens, (features, columns).

    Those above the blocks of a classifier read one token of each row.
    """
    matrices = {at: n for at, (_, n) in c.matrices().items() if at not in c.tables()}
    every = {at for at in matrices if c.causal or at.startswith("layers.")}
    return {at: (n, b * t if at in every else b) for at, n in matrices.items()}


def draw_dropout(
    rng: np.random.Generator, p: float, shapes: Mapping[str, tuple[int, int]], dtype: Any
) -> Weights:
    """K = keep / (1 - p) for each projection, keep ~ Bernoulli(1 - p) for each entry of its input.

    Shapes: shapes {name: (n, t)} -> {name: K (n, t)}.
    Errors: ValueError unless 0 ≤ p < 1.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout {p}: expected at least 0 and below 1")
    q = 1 - python_scalar(p)
    return {at: (rng.random(shape) >= p).astype(dtype) / q for at, shape in shapes.items()}


def draw_weights(c: Config, rng: np.random.Generator, std: float = 0.02) -> Weights:
    """Fresh weights in float64: matrices N(0, std²), norms' weights 1, biases 0."""

    def draw(name: str, shape: tuple[int, int]) -> Array:
        if shape[1] > 1:
            return std * rng.standard_normal(shape)
        return np.full(shape, 0.0 if name.endswith(".bias") else 1.0)

    return {name: draw(name, shape) for name, shape in c.shapes().items()}


def _check(W: Array, what: str) -> None:
    if np.iscomplexobj(W):
        raise TypeError(f"a weight of {W.dtype}: expected real numbers, which files have")
    if not np.isfinite(W).all():
        raise ValueError(f"the weight holds NaN or infinity: it has no {what}")


def _truncated(M: Array, r: int, s: Any) -> tuple[Array, Array]:
    """A, B of M's dtype with s B A the best approximation of M of rank r."""
    if not 1 <= r <= min(M.shape):
        raise ValueError(f"rank {r}: a weight {M.shape} has singular values 1 to {min(M.shape)}")
    if not s > 0:
        raise ValueError(f"scale {s}: expected more than 0, to divide the singular values by")
    _check(M, "singular values")
    U, S, Vh = np.linalg.svd(M.astype(np.float64), full_matrices=False)
    root = np.sqrt(S[:r] / s)
    return (root[:, None] * Vh[:r]).astype(M.dtype), (U[:, :r] * root).astype(M.dtype)


def pissa(W: Array, r: int, s: Any) -> tuple[Array, Array, Array]:
    """W = R + s B A with s B A the part of the r greatest singular values; returns R, A, B.

    With U Σ Vᵀ = W:   A = √(Σ_r / s) V_rᵀ,   B = U_r √(Σ_r / s),   R = W - s B A.
    The SVD is in float64, whatever W's dtype; A and B have W's dtype.

    Shapes: W (m, n), r (), s () -> R (m, n), A (r, n), B (m, r).
    Errors: ValueError if r is above min(m, n), s not above 0, or W not finite; TypeError if W is
    complex.
    Source: Meng, Wang and Zhang 2024, "PiSSA", equations 2 to 4; the scale as PEFT divides it out.
    """
    A, B = _truncated(W, r, s)
    return merge_weight(W, A, B, -s), A, B


def olora(W: Array, r: int, s: Any) -> tuple[Array, Array, Array]:
    """W = R + s B A, B the first r columns of Q, A the first r rows of R', Q R' = W: R, A, B.

    The QR factorization is in float64, whatever W's dtype; A and B have W's dtype.

    Shapes: W (m, n), r (), s () -> R (m, n), A (r, n), B (m, r).
    Errors: ValueError if r is above min(m, n) or W is not finite; TypeError if W is complex.
    Source: Büyükakyüz 2024, "OLoRA", algorithm 1.
    """
    if not 1 <= r <= min(W.shape):
        raise ValueError(f"rank {r}: a weight {W.shape} has 1 to {min(W.shape)} orthogonal columns")
    _check(W, "orthogonal factor")
    Q, triangle = np.linalg.qr(W.astype(np.float64))
    A, B = triangle[:r].astype(W.dtype), Q[:, :r].astype(W.dtype)
    return merge_weight(W, A, B, -s), A, B


def orthogonal(rng: np.random.Generator, r: int, m: int, n: int) -> tuple[Array, Array]:
    """B A = 0 with A ≠ 0 and B ≠ 0: A spans half of an orthonormal basis, B the other half.

    With Q orthogonal (r, r), its even rows P and odd rows P':   A = Pᵀ N / 10,   B = N' P' / 10,
    N and N' standard normal; P' Pᵀ = 0.

    Shapes: -> A (r, n), B (m, r).
    Errors: ValueError if r is odd.
    Source: ``init_lora_weights="orthogonal"`` of PEFT.
    """
    if r % 2 or r < 2:
        raise ValueError(f"rank {r}: expected an even rank, of which A and B take one half each")
    Q, _ = np.linalg.qr(rng.standard_normal((r, r)))
    A = Q[0::2].T @ rng.standard_normal((r // 2, n)) / 10
    return A, rng.standard_normal((m, r // 2)) @ Q[1::2] / 10


def loftq(
    W: Array, r: int, s: Any, quantize: Callable[[Array], Array], steps: int = 1
) -> tuple[Array, Array, Array]:
    """W ≈ Q + s B A with Q quantized: Q ← quantize(W - s B A), s B A ← the best for W - Q, in turn.

    ``quantize`` returns the dequantized weight. Q + s B A is nearer to W than Q alone, but is not
    W. The scale counts: the adapter adds s B A.

    Shapes: W (m, n), r (), s () -> Q (m, n), A (r, n), B (m, r).
    Errors: those of `pissa`; ValueError if ``steps`` is below 1.
    Source: Li et al. 2023, "LoftQ", algorithm 1, there with s = 1.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps: expected at least 1")
    left = W
    for _ in range(steps):
        Q = quantize(left)
        A, B = _truncated(W - Q, r, s)
        left = merge_weight(W, A, B, -s)
    return Q, A, B


Split = tuple[Array, Array, Array]
"""The frozen base (m, n), A (r, n) and B (m, r)."""


@dataclass(frozen=True)
class Initialization:
    """How A and B start, and the frozen weight beside them.

    ``start(rng, W, r, s)`` returns the frozen weight, A and B. ``base`` is the frozen weight:
    "kept" (W itself, of which only the shape and the dtype are read), "residual" (W - s B A) or
    "quantized". ``rounded``: A ≠ 0 and B ≠ 0, and B A is 0 except for rounding. ``shared``: A and
    B are drawn once, for the greatest height and width of all adapted weights; each takes its part
    by `shared_part`. ``general``: every variant may start so, not only the one that names it.
    ``in_peft``: it is a value of PEFT's ``init_lora_weights``.
    """

    start: Callable[[np.random.Generator, Array, int, Any], Split]
    base: str = "kept"
    rounded: bool = False
    shared: bool = False
    general: bool = True
    in_peft: bool = False


def _drawn(init: str) -> Callable[[np.random.Generator, Array, int, Any], Split]:
    def start(rng: np.random.Generator, W: Array, r: int, s: Any) -> Split:
        return W, *draw_factors(rng, init, r, *W.shape)

    return start


def _orthogonal(rng: np.random.Generator, W: Array, r: int, s: Any) -> Split:
    return W, *orthogonal(rng, r, *W.shape)


def _pissa(rng: np.random.Generator, W: Array, r: int, s: Any) -> Split:
    return pissa(W, r, s)


def _olora(rng: np.random.Generator, W: Array, r: int, s: Any) -> Split:
    return olora(W, r, s)


def _loftq(rng: np.random.Generator, W: Array, r: int, s: Any) -> Split:
    def nf4(V: Array) -> Array:
        return dequantize(quantize(V.astype(np.float32), "nf4")).astype(V.dtype)

    return loftq(W, r, s, nf4)


def _embedding(rng: np.random.Generator, W: Array, r: int, s: Any) -> Split:
    m, n = W.shape
    return W, np.zeros((r, n)), rng.standard_normal((m, r))


def _vera(rng: np.random.Generator, W: Array, r: int, s: Any) -> Split:
    return W, *draw_vera(rng, r, *W.shape)


def _adalora(rng: np.random.Generator, W: Array, r: int, s: Any) -> Split:
    m, n = W.shape
    return W, 0.02 * rng.standard_normal((r, n)), 0.02 * rng.standard_normal((m, r))


INITIALIZATIONS: dict[str, Initialization] = {
    "kaiming": Initialization(_drawn("kaiming")),
    "gaussian": Initialization(_drawn("gaussian"), in_peft=True),
    "orthogonal": Initialization(_orthogonal, rounded=True, in_peft=True),
    "pissa": Initialization(_pissa, base="residual", in_peft=True),
    "olora": Initialization(_olora, base="residual", in_peft=True),
    "loftq": Initialization(_loftq, base="quantized"),
    "embedding": Initialization(_embedding),
    "vera": Initialization(_vera, shared=True, general=False),
    "adalora": Initialization(_adalora, general=False),
}
"""How A and B start, by name.

"embedding": A = 0 and B normal, as loralib and PEFT start a table's; "vera": `draw_vera` (its
vectors make the product 0); "adalora": both N(0, 0.02²) (its singular values are 0); "loftq": one
step with NF4. With another quantizer or more steps, call `loftq`.
"""


def convert_to_lora(A: Array, B: Array, A0: Array, B0: Array) -> tuple[Array, Array]:
    """B₂ A₂ = B A - B₀ A₀: an adapter that started as A₀, B₀, as one on the original weight W.

    R + s B A = W + s (B A - B₀ A₀), at the same scale s and the doubled rank; `converted_alpha`
    gives its alpha.

    Shapes: A (r, n), B (m, r), A0 (q, n), B0 (m, q) -> A₂ (r+q, n), B₂ (m, r+q).
    Source: Meng, Wang and Zhang 2024, "PiSSA", appendix on the conversion to LoRA.
    """
    return np.concatenate([A, A0]), np.concatenate([B, -B0], axis=1)


def converted_alpha(alpha: Any, rslora: bool = False) -> Any:
    """The alpha with which rank 2 r has the scale of rank r: 2 α, or √2 α with rsLoRA."""
    return alpha * math.sqrt(2) if rslora else 2 * alpha


def draw_vera(rng: np.random.Generator, r: int, m: int, n: int) -> tuple[Array, Array]:
    """A ~ U(-√(6/n), √(6/n)) and B ~ U(-√(6/r), √(6/r)), once for all projections of a model.

    m and n are the greatest height and width of the projections; each takes its part by
    `shared_part`. The bounds are those of kaiming-uniform for these shapes.

    Shapes: -> A (r, n), B (m, r).
    Source: Kopiczko, Blankevoort and Asano 2023, "VeRA", section 3.3; drawn in PEFT's order.
    """
    A = rng.uniform(-((6 / n) ** 0.5), (6 / n) ** 0.5, (r, n))
    return A, rng.uniform(-((6 / r) ** 0.5), (6 / r) ** 0.5, (m, r))


def shared_part(A: Array, B: Array, m: int, n: int) -> tuple[Array, Array]:
    """One weight's part of shared factors: the first n columns of A, the first m rows of B.

    Shapes: A (r, n'), B (m', r) -> A (r, n), B (m, r).
    Errors: ValueError if the shared A or B is smaller than the weight.
    Source: PEFT's VeRA.
    """
    if m > len(B) or n > A.shape[1]:
        raise ValueError(
            f"shared A {A.shape} and B {B.shape} are too small for a weight {(m, n)}: draw them "
            "for the greatest sizes"
        )
    return A[:, :n], B[:m]
