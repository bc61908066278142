"""The primitive equations, each a function that returns its value and its backward: ``y, back``.

Activations have shape (features, tokens), a column per token, as the LoRA paper writes h = W x.
``back(dy)`` takes dy, the gradient of the loss with respect to y, and returns the gradients with
respect to the arguments that are not constant. Every function runs on any number system that has
its operations: float32, float64, long double, complex numbers (for derivatives by a complex step),
exact rationals, numbers that carry their rounding error.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
Back = Callable[..., Any]
IGNORED = -100
"""The label of a token that the loss ignores, as in PyTorch and Hugging Face data."""


def linear(x: Array, W: Array, b: Array | None = None) -> tuple[Array, Back]:
    """y = W x + b, with W and b constant.

    With dy given:   dx = Wᵀ dy.
    Where W or b is trained, `lora.project` adds dW = dy xᵀ and db = dy 1.

    Shapes: x (n, t), W (m, n), b (m, 1) -> y (m, t).
    """
    y = W @ x if b is None else W @ x + b
    return y, lambda dy: W.T @ dy


def outer(a: Array, b: Array) -> Array:
    """a bᵀ, computed as (b aᵀ)ᵀ if a has fewer rows: BLAS needs half the time for it.

    Shapes: a (m, t), b (n, t) -> a bᵀ (m, n).
    """
    return a @ b.T if a.shape[0] >= b.shape[0] else (b @ a.T).T


def dropout(x: Array, K: Array | None) -> tuple[Array, Back]:
    """y = K ∘ x, where K = keep / (1 - p) is drawn beforehand; no K, no dropout.

    With dy given:   dx = K ∘ dy.

    Shapes: x (n, t), K (n, t) -> y (n, t).
    Source: Srivastava et al. 2014, in the inverted form.
    """
    y = x if K is None else K * x
    return y, lambda dy: dy if K is None else K * dy


class OneHot:
    """The matrix (v, t) whose column j is 1 in row ids_j and 0 elsewhere, never formed.

    M @ OneHot takes columns of M, and OneHot @ N adds up rows of N: the products of an embedding
    and of its gradient, exact and cheap.
    """

    __array_ufunc__ = None  # NumPy leaves the products to this class

    def __init__(self, ids: Array, v: int, transposed: bool = False) -> None:
        self.ids, self.v, self.transposed = ids, v, transposed

    @property
    def shape(self) -> tuple[int, int]:
        """(v, t), or (t, v) of the transpose."""
        shape = self.v, len(self.ids)
        return shape[::-1] if self.transposed else shape

    @property
    def T(self) -> "OneHot":
        """The transpose."""
        return OneHot(self.ids, self.v, not self.transposed)

    def __rmatmul__(self, M: Array) -> Array:
        return self._sum(M.T).T if self.transposed else M[:, self.ids]

    def __matmul__(self, N: Array) -> Array:
        return N[self.ids] if self.transposed else self._sum(N)

    def _sum(self, N: Array) -> Array:
        """Row i: the sum of the rows j of N with ids_j = i."""
        total = np.zeros_like(N, shape=(self.v, N.shape[1]))
        np.add.at(total, self.ids, N)
        return total


def embedding(ids: Array, E: Array) -> tuple[Array, Back]:
    """y_j = E[ids_j]: column j is the row of E that token j names.

    With dy given:   dE[i] = the sum of dy_j over all j with ids_j = i.

    Shapes: ids (t,), E (v, d) -> y (d, t).
    """
    y = E[ids].T.copy()  # contiguous, as all activations are
    return y, lambda dy: OneHot(ids, len(E)) @ dy.T


def _mean(x: Array) -> Array:
    """The mean over the features of each token; np.mean has twice the overhead."""
    return np.add.reduce(x) / len(x)


def rmsnorm(x: Array, w: Array, eps: float) -> tuple[Array, Back]:
    """y = w ∘ h, h = x / √(mean(x²) + eps), the mean over the features of a token.

    With dh = w ∘ dy and ρ = 1 / √(mean(x²) + eps):
    dx = ρ (dh - h mean(h ∘ dh)),   dw = the sum over tokens of h ∘ dy; no dw if ``frozen``.

    Shapes: x (n, t), w (n, 1) -> y (n, t).
    Source: Zhang and Sennrich 2019, equation 4.
    """
    rho = 1 / np.sqrt(_mean(x * x) + eps)
    h = x * rho

    def back(dy: Array, frozen: bool = False) -> tuple[Array, ...]:
        dh = w * dy
        dx = rho * (dh - h * _mean(h * dh))
        return (dx,) if frozen else (dx, (h * dy).sum(1, keepdims=True))

    return w * h, back


def layernorm(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Back]:
    """y = w ∘ h + b, h = (x - mean(x)) / √(var(x) + eps), over the features of a token.

    With dh = w ∘ dy and ρ = 1 / √(var(x) + eps):
    dx = ρ (dh - mean(dh) - h mean(h ∘ dh)),   dw = sum of h ∘ dy,   db = sum of dy over tokens;
    no dw and db if ``frozen``.

    Shapes: x (n, t), w (n, 1), b (n, 1) -> y (n, t).
    Source: Ba, Kiros and Hinton 2016, equation 4.
    """
    centred = x - _mean(x)
    rho = 1 / np.sqrt(_mean(centred * centred) + eps)
    h = centred * rho

    def back(dy: Array, frozen: bool = False) -> tuple[Array, ...]:
        dh = w * dy
        dx = rho * (dh - _mean(dh) - h * _mean(h * dh))
        dw_db = () if frozen else ((h * dy).sum(1, keepdims=True), dy.sum(1, keepdims=True))
        return dx, *dw_db

    return w * h + b, back


def tanh(x: Array) -> tuple[Array, Back]:
    """y = tanh(x).

    With dy given:   dx = (1 - y²) ∘ dy.

    Shapes: x (n, t) -> y (n, t).
    """
    y = np.tanh(x)
    return y, lambda dy: (1 - y * y) * dy


def silu(x: Array) -> tuple[Array, Back]:
    """y = x σ(x), σ(x) = 1 / (1 + e⁻ˣ).

    With dy given:   dx = (σ + y (1 - σ)) ∘ dy.

    Shapes: x (n, t) -> y (n, t).
    Source: Elfwing, Uchibe and Doya 2018; the gate of SwiGLU, Shazeer 2020.
    """
    with np.errstate(over="ignore"):  # e⁻ˣ = ∞ makes σ = 0, the right limit
        sigma = 1 / (1 + np.exp(-x))
    y = x * sigma
    return y, lambda dy: (sigma + y * (1 - sigma)) * dy


def erf(x: Array) -> Array:
    """erf(x) = 2/√π ∫₀ˣ e^(-t²) dt, SciPy's: for float32, float64 and complex numbers.

    SciPy is imported here because that takes twice as long as importing NumPy.

    Shapes: x (n, t) -> y (n, t).
    """
    from scipy.special import erf

    return erf(x)


def gelu(x: Array) -> tuple[Array, Back]:
    """y = x Φ(x), Φ(x) = (1 + erf(x / √2)) / 2.

    With φ(x) = exp(-x² / 2) / √(2π):   dx = (Φ + x φ) ∘ dy.

    Shapes: x (n, t) -> y (n, t).
    Source: Hendrycks and Gimpel 2016, equation 1.
    """
    Phi = (1 + erf(x * 0.5**0.5)) * 0.5

    def back(dy: Array) -> Array:
        phi = np.exp(-(x * x) * 0.5) * (2 * np.pi) ** -0.5
        return (Phi + x * phi) * dy

    return x * Phi, back


def gelu_tanh(x: Array) -> tuple[Array, Back]:
    """y = x (1 + h) / 2, h = tanh(c (x + 0.044715 x³)), c = √(2/π).

    With dy given:   dx = ((1 + h) + x (1 - h²) c (1 + 3 · 0.044715 x²)) / 2 ∘ dy.

    Shapes: x (n, t) -> y (n, t).
    Source: Hendrycks and Gimpel 2016, section 2, the approximation that GPT-2 uses.
    """
    c = (2 / np.pi) ** 0.5
    h = np.tanh(c * (x + 0.044715 * (x * x * x)))

    def back(dy: Array) -> Array:
        dh: Array = (1 - h * h) * (c * (1 + 3 * 0.044715 * (x * x)))
        return ((1 + h) + x * dh) * 0.5 * dy

    return x * (1 + h) * 0.5, back


def rope_tables(positions: Array, d: int, theta: float, dtype: Any) -> tuple[Array, Array]:
    """The cosines and sines of RoPE's angles position · theta^(-2i/d), i = 0 … d/2 - 1.

    Angles are computed in float64 at least, whatever the dtype: they grow with the position.

    Shapes: positions (b, t) -> cos (b, 1, d/2, t), sin (b, 1, d/2, t).
    """
    real = np.empty(0, dtype).real.dtype
    wide = np.result_type(real, np.float64) if real.kind == "f" else np.dtype(np.float64)
    frequencies = theta ** (np.arange(0, d, 2, dtype=wide) * (-1 / wide.type(d)))
    angles = positions * frequencies[:, None, None]  # (d/2, b, t), the activations' memory order
    cos, sin = (f(angles).astype(real).swapaxes(0, 1)[:, None] for f in (np.cos, np.sin))
    return cos, sin


def rope(x: Array, cos: Array, sin: Array) -> tuple[Array, Back]:
    """y = R x: the pair (x₁, x₂) becomes (x₁ cos - x₂ sin, x₂ cos + x₁ sin).

    The two of a pair are d/2 rows apart, as in Llama's files; in the paper and GGUF, neighbours.
    With dy given:   dx = Rᵀ dy, the inverse rotation, since R is orthogonal.

    Shapes: x (b, h, d, t), cos (b, 1, d/2, t), sin (b, 1, d/2, t) -> y (b, h, d, t).
    Source: Su et al. 2021, equations 15 and 34.
    """
    half = x.shape[2] // 2

    def turn(v: Array, sin: Array) -> Array:
        v1, v2 = v[:, :, :half], v[:, :, half:]
        return np.concatenate([v1 * cos - v2 * sin, v2 * cos + v1 * sin], axis=2)

    return turn(x, sin), lambda dy: turn(dy, -sin)


def split_heads(x: Array, b: int, h: int) -> Array:
    """The features of each token as h heads; its transpose is :func:`join_heads`.

    Shapes: x (h*d, b*t) -> y (b, h, d, t).
    """
    return x.reshape(h, x.shape[0] // h, b, -1).transpose(2, 0, 1, 3)


def join_heads(x: Array) -> Array:
    """The heads of each token as one column; its transpose is :func:`split_heads`.

    Shapes: x (b, h, d, t) -> y (h*d, b*t).
    """
    b, h, d, t = x.shape
    return x.transpose(1, 2, 0, 3).reshape(h * d, b * t)


def causal_mask(real: Array) -> Array:
    """Query t sees key s if s < t and s is a real token, and itself, even where it is padding.

    (A column without any key would have no softmax. Padding reaches no real token, and no loss,
    unless the first real token of a row has a label that counts: padding would have to predict it.)

    Shapes: real (b, t) -> mask (b, t, t), keys before queries.
    """
    t = np.arange(real.shape[1])
    s = t[:, None]
    return (s < t) & real[:, :, None] | (s == t)


def padding_mask(real: Array) -> Array:
    """Every query sees all real tokens; a padding query sees itself too.

    Shapes: real (b, t) -> mask (b, t, t), keys before queries.
    """
    return real[:, :, None] | np.eye(real.shape[1], dtype=bool)


def softmax(z: Array) -> tuple[Array, Back]:
    """p = exp(z - c) / the sum of exp(z - c), down each column, c its greatest real part.

    Any c cancels; this one avoids overflow.
    With dp given:   dz = p ∘ (dp - the sum of p ∘ dp).

    Shapes: z (b, m, t) -> p (b, m, t).
    """
    e = np.exp(z - z.real.max(-2, keepdims=True))
    p = e / e.sum(-2, keepdims=True)
    return p, lambda dp: p * (dp - (p * dp).sum(-2, keepdims=True))


def attention(
    q: Array, k: Array, v: Array, mask: Array, matmul: Callable[..., Array] = np.matmul
) -> tuple[Array, Back]:
    """o = v p, p = softmax(kᵀ q / √d), each query over the keys that its column of mask admits.

    With dp = vᵀ do and dz = softmax's back(dp):
    dq = k dz / √d,   dk = q dzᵀ / √d,   dv = do pᵀ.
    A key/value head serves h/g consecutive query heads and receives the sum of their gradients.
    ``matmul`` computes kᵀ q and vᵀ do.

    Shapes: q (b, h, d, t), k (b, g, d, s), v (b, g, d, s), mask (b, s, t) -> o (b, h, d, t).
    Source: Vaswani et al. 2017, equation 1; grouped heads, Ainslie et al. 2023.
    """
    b, h, d, t = q.shape
    grouped = (b, k.shape[1], h // k.shape[1], d, t)
    scale = d**-0.5
    Q, K, V = q.reshape(grouped) * scale, k[:, :, None], v[:, :, None]
    z = matmul(K.mT, Q)
    np.copyto(z, -np.inf, where=~mask[:, None, None])
    p, back_softmax = softmax(z)

    def back(do: Array) -> tuple[Array, Array, Array]:
        dO = do.reshape(grouped)
        dz = back_softmax(matmul(V.mT, dO))
        dq = (K @ dz * scale).reshape(b, h, d, t)
        return dq, (Q @ dz.mT).sum(2), (dO @ p.mT).sum(2)

    return (V @ p).reshape(b, h, d, t), back


def cross_entropy(z: Array, labels: Array, count: int | None = None) -> tuple[Array, Back]:
    """L = the mean of log Σᵢ exp(zᵢ) - z[label] over the tokens whose label counts.

    With p = softmax(z) and dL given:   dz = dL (p - onehot(label)) / count, and 0 where ignored.
    ``count`` divides the sum; by default the number of labels that are not ignored. For a
    micro-batch pass that of the whole batch, so that the parts add up.

    Shapes: z (v, t), labels (t,) -> L ().
    Errors: ValueError if there is not a label for each token, one is neither IGNORED nor in
    0 … v - 1, or if none counts.
    """
    if labels.shape != z.shape[1:]:
        raise ValueError(f"labels {labels.shape}: expected {z.shape[1:]}, one for each token")
    counted = labels != IGNORED
    wrong = labels[counted & ((labels < 0) | (labels >= len(z)))]
    if wrong.size:
        raise ValueError(f"label {wrong[0]}: expected 0 to {len(z) - 1}, or {IGNORED} to ignore")
    n = int(counted.sum()) if count is None else count
    if n < 1:
        raise ValueError(f"no label counts: each is {IGNORED}; leave this batch out")
    c = z.real.max(0)
    e = np.exp(z - c)
    total = e.sum(0)
    at = np.where(counted, labels, 0), np.arange(labels.size)
    each = counted.astype(total.dtype)  # 1 or 0, in the numbers of z
    L = ((np.log(total) + (c - z[at])) * each).sum() / n

    def back(dL: Array) -> Array:
        share = each * dL / n
        dz: Array = e * (share / total)
        dz[at] -= share
        return dz

    return L, back


def python_scalar(x: Any) -> Any:
    """x, with a NumPy scalar as a Python number: a NumPy float64 would widen float32 arrays.

    A long double, which Python lacks, stays as it is.
    """
    return x.item() if isinstance(x, np.generic) else x
