"""The primitive equations, each a function that gives its value and its transpose: ``y, back``.

Activations lie (features, tokens), a column per token, as the LoRA paper writes h = W x. ``back``
takes the gradient of the loss by y, named dy, to the gradients by the arguments that may vary.
Every function runs on any number system that has its operations: float32, float64, long double,
complex numbers (for derivatives by a complex step), exact rationals, rounding noise.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray
Back = Callable[..., Any]
IGNORED = -100
"""The label of a token that does not count, as in PyTorch and Hugging Face data."""


def linear(x: Array, W: Array, b: Array | None = None) -> tuple[Array, Back]:
    """y = W x + b, with W and b constant.

    With dy given:   dx = Wᵀ dy.
    Where W or b is trained, `lora.project` adds dW = dy xᵀ and db = dy 1.

    Shapes: x (n, t), W (m, n), b (m, 1) -> y (m, t).
    """
    y = W @ x if b is None else W @ x + b

    def back(dy: Array) -> Array:
        dx: Array = W.T @ dy
        return dx

    return y, back


def dropout(x: Array, K: Array | None) -> tuple[Array, Back]:
    """y = K ∘ x, where K = keep / (1 - p) is drawn beforehand; no K, no dropout.

    With dy given:   dx = K ∘ dy.

    Shapes: x (n, t), K (n, t) -> y (n, t).
    Source: Srivastava et al. 2014, in the inverted form.
    """
    y = x if K is None else K * x

    def back(dy: Array) -> Array:
        return dy if K is None else K * dy

    return y, back


def embedding(ids: Array, E: Array) -> tuple[Array, Back]:
    """y_j = E[ids_j]: column j is the row of E that token j names.

    With dy given:   dE[i] = the sum of dy_j over all j with ids_j = i.

    Shapes: ids (t,), E (v, d) -> y (d, t).
    """
    y = E[ids].T.copy()  # columns beside one another, as all activations lie

    def back(dy: Array) -> Array:
        dE = np.zeros_like(E, dtype=dy.dtype)
        np.add.at(dE, ids, dy.T)
        return dE

    return y, back


def with_tokens(E: Array, ids: Array, rows: Array) -> tuple[Array, Back]:
    """E' = E but for E'[ids] = rows: some tokens of a constant embedding are trained.

    With dE' given:   drows = dE'[ids]. It gathers all uses of E', a tied head's among them.
    The rows are the embedding's own, E[ids] to begin with, and no difference from them; PEFT's
    ``trainable_tokens_delta`` holds the same, whatever its name says.

    Shapes: E (v, d), ids (k,), rows (k, d) -> E' (v, d).
    Errors: ValueError for no token of E, or one that comes twice: which of its rows would count?
    And for rows that are not one for each.
    """
    if rows.shape != (len(ids), E.shape[1]):
        raise ValueError(f"rows {rows.shape}: expected {(len(ids), E.shape[1])}, one for each id")
    if len(set(ids.tolist()).intersection(range(len(E)))) < len(ids):
        raise ValueError(f"ids {ids.tolist()}: expected tokens from 0 to {len(E) - 1}, each once")
    changed = E.astype(np.result_type(E, rows))
    changed[ids] = rows

    def back(dE: Array) -> Array:
        drows: Array = dE[ids]
        return drows

    return changed, back


def _mean(x: Array) -> Array:
    """The mean over the features of each token; NumPy's own takes twice as long to begin."""
    total: Array = np.add.reduce(x)
    return total / len(x)


def rmsnorm(x: Array, w: Array, eps: float) -> tuple[Array, Back]:
    """y = w ∘ h, h = x / √(mean(x²) + eps), the mean over the features of a token.

    With dh = w ∘ dy and ρ = 1 / √(mean(x²) + eps):
    dx = ρ (dh - h mean(h ∘ dh)),   dw = the sum over tokens of h ∘ dy, unless w is ``frozen``.

    Shapes: x (n, t), w (n, 1) -> y (n, t).
    Source: Zhang and Sennrich 2019, equation 4.
    """
    rho = 1 / np.sqrt(_mean(x * x) + eps)
    h = x * rho
    y = w * h

    def back(dy: Array, frozen: bool = False) -> tuple[Array, ...]:
        dh = w * dy
        dx = rho * (dh - h * _mean(h * dh))
        return (dx,) if frozen else (dx, (h * dy).sum(1, keepdims=True))

    return y, back


def layernorm(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Back]:
    """y = w ∘ h + b, h = (x - mean(x)) / √(var(x) + eps), over the features of a token.

    With dh = w ∘ dy and ρ = 1 / √(var(x) + eps):
    dx = ρ (dh - mean(dh) - h mean(h ∘ dh)),   dw = sum of h ∘ dy,   db = sum of dy over tokens,
    both unless w and b are ``frozen``.

    Shapes: x (n, t), w (n, 1), b (n, 1) -> y (n, t).
    Source: Ba, Kiros and Hinton 2016, equation 4.
    """
    centred = x - _mean(x)
    rho = 1 / np.sqrt(_mean(centred * centred) + eps)
    h = centred * rho
    y = w * h + b

    def back(dy: Array, frozen: bool = False) -> tuple[Array, ...]:
        dh = w * dy
        dx = rho * (dh - _mean(dh) - h * _mean(h * dh))
        dw_db = () if frozen else ((h * dy).sum(1, keepdims=True), dy.sum(1, keepdims=True))
        return dx, *dw_db

    return y, back


def tanh(x: Array) -> tuple[Array, Back]:
    """y = tanh(x).

    With dy given:   dx = (1 - y²) ∘ dy.

    Shapes: x (n, t) -> y (n, t).
    """
    y = np.tanh(x)

    def back(dy: Array) -> Array:
        dx: Array = (1 - y * y) * dy
        return dx

    return y, back


def silu(x: Array) -> tuple[Array, Back]:
    """y = x σ(x), σ(x) = 1 / (1 + e⁻ˣ).

    With dy given:   dx = (σ + y (1 - σ)) ∘ dy.

    Shapes: x (n, t) -> y (n, t).
    Source: Elfwing, Uchibe and Doya 2018; the gate of SwiGLU, Shazeer 2020.
    """
    with np.errstate(over="ignore"):  # e⁻ˣ = ∞ makes σ = 0, the right limit
        sigma = 1 / (1 + np.exp(-x))
    y = x * sigma

    def back(dy: Array) -> Array:
        dx: Array = (sigma + y * (1 - sigma)) * dy
        return dx

    return y, back


def erf(x: Array) -> Array:
    """erf(x) = 2/√π ∫₀ˣ e^(-t²) dt, SciPy's: for float32, float64 and complex numbers.

    Imported where it is used, because that takes twice as long as importing NumPy.

    Shapes: x (n, t) -> y (n, t).
    """
    from scipy.special import erf

    y: Array = erf(x)
    return y


def gelu(x: Array) -> tuple[Array, Back]:
    """y = x Φ(x), Φ(x) = (1 + erf(x / √2)) / 2.

    With φ(x) = exp(-x² / 2) / √(2π):   dx = (Φ + x φ) ∘ dy.

    Shapes: x (n, t) -> y (n, t).
    Source: Hendrycks and Gimpel 2016, equation 1.
    """
    Phi = (1 + erf(x * 0.5**0.5)) * 0.5
    y = x * Phi

    def back(dy: Array) -> Array:
        phi = np.exp(-(x * x) * 0.5) * (2 * np.pi) ** -0.5
        dx: Array = (Phi + x * phi) * dy
        return dx

    return y, back


def gelu_tanh(x: Array) -> tuple[Array, Back]:
    """y = x (1 + h) / 2, h = tanh(c (x + 0.044715 x³)), c = √(2/π).

    With dy given:   dx = ((1 + h) + x (1 - h²) c (1 + 3 · 0.044715 x²)) / 2 ∘ dy.

    Shapes: x (n, t) -> y (n, t).
    Source: Hendrycks and Gimpel 2016, section 2, the approximation that GPT-2 uses.
    """
    c = (2 / np.pi) ** 0.5
    h = np.tanh(c * (x + 0.044715 * (x * x * x)))
    y = x * (1 + h) * 0.5

    def back(dy: Array) -> Array:
        dh: Array = (1 - h * h) * (c * (1 + 3 * 0.044715 * (x * x)))
        dx: Array = ((1 + h) + x * dh) * 0.5 * dy
        return dx

    return y, back


def rope_tables(positions: Array, d: int, theta: float, dtype: Any) -> tuple[Array, Array]:
    """The cosines and sines of RoPE's angles position · theta^(-2i/d), i = 0 … d/2 - 1.

    Angles are formed in float64 at least, whatever the model's dtype: they grow with the position.

    Shapes: positions (b, t) -> cos (b, 1, d/2, t), sin (b, 1, d/2, t).
    """
    real = np.empty(0, dtype).real.dtype
    wide = np.result_type(real, np.float64) if real.kind == "f" else np.dtype(np.float64)
    frequencies = theta ** (np.arange(0, d, 2, dtype=wide) * (-1 / wide.type(d)))
    angles = positions * frequencies[:, None, None]  # in memory as the activations lie: (d/2, b, t)
    cos, sin = (f(angles).astype(real).swapaxes(0, 1)[:, None] for f in (np.cos, np.sin))
    return cos, sin


@cache
def _signs(dtype: Any) -> Array:
    """-1 for x₁ and 1 for x₂ of `rope`'s pairs: (2, 1, 1)."""
    signs = np.array([-1, 1], dtype)[:, None, None]
    signs.setflags(write=False)
    return signs


def rope(x: Array, cos: Array, sin: Array, interleaved: bool = False) -> tuple[Array, Back]:
    """y = R x: the pair (x₁, x₂) becomes (x₁ cos - x₂ sin, x₂ cos + x₁ sin).

    Partners are d/2 apart (half, Llama's files) or neighbours (interleaved, the paper and GGUF).
    With dy given:   dx = Rᵀ dy, the turn back, since R is orthogonal.

    Shapes: x (b, h, d, t), cos (b, 1, d/2, t), sin (b, 1, d/2, t) -> y (b, h, d, t).
    Source: Su et al. 2021, equations 15 and 34.
    """
    b, h, d, t = x.shape
    # What each of a pair is multiplied by, and what its partner is: (b, 1, 1 or 2, d/2, t).
    own, other = cos[:, :, None], _signs(sin.dtype) * sin[:, :, None]

    def turn(v: Array, plus: Callable[..., Array]) -> Array:
        if interleaved:
            pairs = v.reshape(b, h, d // 2, 2, t).swapaxes(2, 3)
        else:
            pairs = v.reshape(b, h, 2, d // 2, t)
        turned: Array = plus(pairs * own, pairs[:, :, ::-1] * other)
        return (turned.swapaxes(2, 3) if interleaved else turned).reshape(b, h, d, t)

    def back(dy: Array) -> Array:
        return turn(dy, np.subtract)

    return turn(x, np.add), back


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
    past = (s < t) & real[:, :, None]
    mask: Array = past | (s == t)
    return mask


def padding_mask(real: Array) -> Array:
    """Every query sees all real tokens; a padding query sees itself too.

    Shapes: real (b, t) -> mask (b, t, t), keys before queries.
    """
    return real[:, :, None] | np.eye(real.shape[1], dtype=bool)


def _exponentials(z: Array) -> tuple[Array, Array, Array]:
    """exp(z - c), its sum and c, the greatest real part of each column: nothing overflows."""
    c = z.real.max(-2, keepdims=True)
    e = z - c
    e = np.exp(e, out=e)  # in its place: these arrays are the largest of all
    return e, e.sum(-2, keepdims=True), c


def softmax(z: Array) -> tuple[Array, Back]:
    """p = exp(z) / the sum of exp(z), down each column.

    With dp given:   dz = p ∘ (dp - the sum of p ∘ dp).

    Shapes: z (b, m, t) -> p (b, m, t).
    """
    e, total, _ = _exponentials(z)
    p = np.divide(e, total, out=e)

    def back(dp: Array) -> Array:
        dz: Array = p * (dp - (p * dp).sum(-2, keepdims=True))
        return dz

    return p, back


def _by_keys(K: Array, Q: Array) -> Array:
    """Kᵀ Q, the keys' axis outermost in memory: what goes down the keys, as softmax does, is quick.

    Shapes: K (b, g, 1, d, s), Q (b, g, n, d, t) -> z (b, g, n, s, t).
    """
    (b, g, n, _, t), s = Q.shape, K.shape[-1]
    z = np.empty_like(Q, dtype=np.result_type(K, Q), order="C", shape=(s, b, g, n, t))
    z = z.transpose(1, 2, 3, 0, 4)
    return np.matmul(K.mT, Q, out=z)


def attention(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Back]:
    """o = v p, p = softmax(kᵀ q / √d), each query over the keys that its column of mask admits.

    With dp = vᵀ do and dz = softmax's back(dp):
    dq = k dz / √d,   dk = q dzᵀ / √d,   dv = do pᵀ.
    A key/value head serves h/g query heads in a row and receives the sum of their gradients.

    Shapes: q (b, h, d, t), k (b, g, d, s), v (b, g, d, s), mask (b, s, t) -> o (b, h, d, t).
    Source: Vaswani et al. 2017, equation 1; grouped heads, Ainslie et al. 2023.
    """
    b, h, d, t = q.shape
    grouped = (b, k.shape[1], h // k.shape[1], d, t)
    scale = d**-0.5
    Q, K, V = q.reshape(grouped) * scale, k[:, :, None], v[:, :, None]
    z = _by_keys(K, Q)
    np.copyto(z, -np.inf, where=~mask[:, None, None])
    p, back_softmax = softmax(z)
    o = (V @ p).reshape(b, h, d, t)

    def back(do: Array) -> tuple[Array, Array, Array]:
        dO = do.reshape(grouped)
        dz = back_softmax(_by_keys(V, dO))
        dq = (K @ dz * scale).reshape(b, h, d, t)
        return dq, (Q @ dz.mT).sum(2), (dO @ p.mT).sum(2)

    return o, back


QUERIES = 64
"""So many queries attend at a time."""


def by_queries(
    attend: Callable[..., tuple[Array, Back]], q: Array, k: Array, v: Array, mask: Array
) -> tuple[Array, Back]:
    """attend(q, k, v, mask), `QUERIES` at a time, over the keys up to the last that one may see.

    Beyond so many tokens no score is formed that a causal mask hides from a whole block of queries,
    and no matrix of all by all. dk and dv are the sums of the blocks'.

    Shapes: q (b, h, d, t), k (b, g, d, s), v (b, g, d, s), mask (b, s, t) -> o (b, h, d, t).
    """
    t = q.shape[-1]
    if t <= QUERIES:
        return attend(q, k, v, mask)
    dtype, backs = np.result_type(q, k, v), []
    o = np.empty_like(q, dtype=dtype)
    for start in range(0, t, QUERIES):
        queries = slice(start, start + QUERIES)
        keys = slice(np.flatnonzero(mask[:, :, queries].any((0, 2)))[-1] + 1)
        own = q[..., queries], k[..., keys], v[..., keys], mask[:, keys, queries]
        o[..., queries], back_o = attend(*own)
        backs.append((queries, keys, back_o))

    def back(do: Array) -> tuple[Array, Array, Array]:
        dq, dk, dv = (np.zeros_like(x, dtype=np.result_type(dtype, do)) for x in (do, k, v))
        for queries, keys, back_o in backs:
            dq[..., queries], dk_part, dv_part = back_o(do[..., queries])
            dk[..., keys] += dk_part
            dv[..., keys] += dv_part
        return dq, dk, dv

    return o, back


def cross_entropy(z: Array, labels: Array, count: int | None = None) -> tuple[Array, Back]:
    """L = the mean of log Σᵢ exp(zᵢ) - z[label] over the tokens whose label counts.

    With p = softmax(z) and dL given:   dz = dL (p - onehot(label)) / count, and 0 where ignored.
    ``count`` is what the sum is divided by: the labels that count, if not given; for a micro-batch,
    those of the whole batch, so that the parts add up.

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
    e, total, c = _exponentials(z)
    at = np.where(counted, labels, 0), np.arange(labels.size)
    each = counted.astype(total.dtype)  # 1 or 0, in the numbers of z
    L = ((np.log(total[0]) + (c[0] - z[at])) * each).sum() / n

    def back(dL: Array) -> Array:
        share = each * dL / n
        dz: Array = e * (share / total)
        dz[at] -= share
        return dz

    return L, back
