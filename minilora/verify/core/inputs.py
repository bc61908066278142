"""The random inputs of a layer's checks: pure functions of a case, and deliberately not typical.

Sizes are all distinct (or square, where a transpose raises no error), alpha is not r, B and biases
are not zero, data have mean zero, the dropout rate is not one half. In half of the low precision
cases W = 0, so that the base does not hide the adapter. Typical inputs miss a fifth of the known
mutants; these do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import inf, prod, sqrt
from typing import Any
from zlib import crc32

import numpy as np

from minilora.spec.lora import lora_linear, merge_weight, scale
from minilora.spec.multi_adapter import combine
from minilora.verify.core.dtypes import DTYPES, Precision
from minilora.verify.core.errors import Skip
from minilora.verify.core.fixed import Fixed
from minilora.verify.core.tolerance import Rounding, Uncertain, digits, unit_roundoff
from minilora.verify.core.types import CLOSED_FORM, Case, Limits

Array = np.ndarray

SIZES = (
    (4, 7, 5, 3, 2),
    (5, 6, 6, 2, 4),
    (6, 4, 9, 4, 4),
    (3, 8, 8, 4, 4),
    (5, 4, 9, 1, 1),
    (2, 19, 6, 9, 4),
    (37, 35, 37, 17, 16),
)
"""Tokens, n, m, r, and r in the exact lane: distinct; square weights with another rank; a square A;
a rank of 1; sides beyond a kernel's tiles of 16 and 32, and no multiples of these. The last has as
many tokens as features, so that an axis may be mistaken for the other."""

BEYOND = (
    (5, 1100, 37, 3, 2),
    (700, 9, 11, 3, 4),
    (6, 37, 1030, 3, 2),
    (7, 131, 140, 5, 4),
    (9, 67, 70, 200, 256),
    (64, 63, 65, 2, 2),
    (3, 521, 530, 1, 1),
    (257, 10, 66, 129, 64),
    (127, 128, 9, 4, 16),
    (520, 5, 33, 3, 2),
    (2, 255, 256, 65, 128),
    (513, 14, 13, 65, 64),
    (4, 1024, 31, 2, 1),
    (32, 511, 8, 33, 32),
)
"""Likewise, one or two sides beyond a kernel's tiles of 64 to 1024, or a power of two or beside
one. The others are small, so that a case costs little."""

BEYOND_EVERY = ((12, 2), (12, 7))
"""In which cases of the exact lane and of the other they are drawn: every so many, from this on."""

LARGEST = 64
"""The greatest side of the exact lane that may be full of numbers in half precision."""

SPREAD = 11
"""So many places along each side are used there otherwise, and all others are 0."""

DROPOUT = ("none", "mask", "mask of ones", "mask without a rate", "rate without a mask")
"""What dropout a case has. Those with a mask are of training, the last is of evaluation."""

TINY = 2.0**-40
"""The factor on B of one case with W = 0: of the order of a first training step."""

LEADS: tuple[Callable[[int], tuple[int, ...]], ...] = (
    lambda tokens: (tokens,),
    lambda tokens: (2, tokens),
    lambda tokens: (),
    lambda tokens: (1,),
    lambda tokens: (1, tokens),
    lambda tokens: (2, 3, tokens),
)
"""The leading axes of x. One fewer than the sizes, so that each size meets each of them."""

SCALES = (0.25, 4.0)
"""Of the exact lane: powers of two, whose roots are powers of two as well."""

ALPHAS = (7.0, 5.0, 40.0, 1.5)
"""None is a rank of SIZES, with most of them alpha / r is a fraction, and one is large."""


@dataclass(frozen=True)
class Layer:
    """A LoRA linear layer with inputs in the dtype under test; x, keep and dy are (…, features)."""

    x: Array
    W: Array
    A: Array
    B: Array
    dy: Array
    alpha: float
    r: int
    bias: Array | None = None
    keep: Array | None = None
    p: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def s(self) -> float:
        """The scale by alpha, r and the settings."""
        return float(scale(self.alpha, self.r, self.settings.get("use_rslora", False)))

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the contract's methods that the case has."""
        options: dict[str, Any] = {"alpha": self.alpha, "r": self.r, **self.settings}
        if self.bias is not None:
            options["bias"] = self.bias
        if self.p:
            options["p"] = self.p
        if self.keep is not None:
            options["keep"] = self.keep
        return options

    def merge_options(self) -> dict[str, Any]:
        """The same for merge and unmerge, which have neither bias nor dropout."""
        return {"alpha": self.alpha, "r": self.r, **self.settings}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the answers of lora_linear_vjp."""
        m = len(self.W)
        shapes = {"y": (*self.x.shape[:-1], m), "dx": self.x.shape}
        return shapes | {"dA": self.A.shape, "dB": self.B.shape, "dbias": (m,)}


def columns(x: Array) -> Array:
    """(…, n), as in the contract, turned to (n, tokens)."""
    return x.reshape(-1, x.shape[-1]).T


def specified(
    layer: Layer, number: Callable[[Array], Any], scalable: Callable[[Array], Any]
) -> dict[str, Any]:
    """y, dx, dA, dB and dbias by the specification's own code over a number system.

    ``number`` turns an array into that system's: long double, or `Uncertain`; ``scalable`` does so
    for B and dy, to which an implementation may apply s first. Activations come back as (features,
    tokens).
    """
    K = None if layer.keep is None else number(columns(layer.keep) / (1 - layer.p))
    b = None if layer.bias is None else number(layer.bias[:, None])
    x, W, A = (number(v) for v in (columns(layer.x), layer.W, layer.A))
    dy = columns(layer.dy)
    y, back = lora_linear(x, W, b, A, scalable(layer.B), layer.s, K)
    dx, dA, dB = back(scalable(dy))
    dbias = number(dy) @ np.ones((dy.shape[1], 1))
    return {"y": y, "dx": dx, "dA": dA, "dB": dB, "dbias": dbias}


def long(array: Array) -> Array:
    """In long double: the correct answer is known to more digits than any answer has."""
    return np.asarray(array).astype(np.longdouble)


def _contract_shapes(layer: Layer, answers: dict[str, Array]) -> dict[str, Array]:
    """(features, tokens) turned back to the shapes of the contract."""
    turned = {name: v.T if name in ("y", "dx") else v for name, v in answers.items()}
    return {name: turned[name].reshape(shape) for name, shape in layer.shapes().items()}


def wanted(layer: Layer, number: Callable[[Array], Any] = long) -> dict[str, Array]:
    """The true answers to lora_linear_vjp, over a number system."""
    return _contract_shapes(layer, specified(layer, number, number))


def _numbers(
    layer: Layer, precision: Precision, cast: bool = False
) -> tuple[Callable[[Array], Uncertain], ...]:
    """Makers of uncertain inputs: unscaled ones, and ones that s may have been applied to first.

    With ``cast``, an input that has more digits than the storage is rounded first.
    """
    rounding = Rounding(precision)
    exact = np.frexp(abs(layer.s))[0] == 0.5  # a power of two rounds nothing

    def given(array: Array) -> Uncertain:
        lost = cast and has_more_digits(array, precision.storage)
        variance = rounding.stored(array.astype(np.float64)) if lost else 0.0
        return Uncertain(array, variance, rounding)

    def scalable(array: Array) -> Uncertain:
        value, known = array.astype(np.float64), given(array)
        lost = 0.0 if exact else rounding.stored(value)
        return Uncertain(value, known.variance + lost, rounding)

    return given, scalable


def has_more_digits(array: Array, dtype: str) -> bool:
    """Whether casting the array to a dtype rounds any of it."""
    name = str(array.dtype)
    return (
        name in DTYPES
        and digits(name) > digits(dtype)
        and bool((array.astype(DTYPES[dtype]).astype(array.dtype) != array).any())
    )


def by_weight_product(
    layer: Layer, number: Callable[[Array], Any], scalable: Callable[[Array], Any]
) -> dict[str, Any]:
    """The same by D = s B A and G = dy hᵀ, of the weight's size, as autograd computes it.

    y = (W + D) x + b, or W x + b + D h where h = K ∘ x, and dA = s Bᵀ G, dB = s G Aᵀ.
    """
    x, W, A, dy = (number(v) for v in (columns(layer.x), layer.W, layer.A, columns(layer.dy)))
    B = scalable(layer.B)
    D, h = (B @ A) * layer.s, x
    if layer.keep is None:
        y, dx = (W + D) @ x, (W + D).T @ dy
    else:
        K = columns(layer.keep) / (1 - layer.p)
        h = x * K
        y, dx = W @ x + D @ h, W.T @ dy + (D.T @ dy) * K
    G = dy @ h.T
    if layer.bias is not None:
        y = y + number(layer.bias[:, None])
    return {"y": y, "dx": dx, "dA": (B.T @ G) * layer.s, "dB": (G @ A.T) * layer.s}


def sigmas(layer: Layer, precision: Precision, cast: bool = False) -> dict[str, Array]:
    """The standard deviation that rounding gives each element of those answers.

    An implementation may apply the scale in s B, in s dy or in s u. Where that product is rounded,
    B and dy carry the rounding: the specification, which scales u, would lose less in a sum that
    cancels. It may also form the weight's product: the greater sigma of both ways counts. With
    ``cast``, operands of more digits are rounded first.
    """
    numbers = _numbers(layer, precision, cast)
    by_factors, by_product = specified(layer, *numbers), by_weight_product(layer, *numbers)
    sigma = {name: answer.sigma for name, answer in by_factors.items()}
    sigma |= {name: np.maximum(sigma[name], other.sigma) for name, other in by_product.items()}
    for name, variance in _joined(layer, precision).items():
        sigma[name] = np.hypot(sigma[name], np.sqrt(variance))
    return _contract_shapes(layer, sigma)


def _joined(layer: Layer, precision: Precision) -> dict[str, Array]:
    """The variance that one sum of base and branch has beside that of two sums, of y and dx.

    The branch may be the first term of the base's n, or the base that of the branch's r, before
    the bias or after it: each partial sum is larger by it, and rounded with the variance u_sum² / 3
    of its square.
    """
    W, A, B, x, dy = (
        v.astype(np.float64)
        for v in (layer.W, layer.A, layer.B, columns(layer.x), columns(layer.dy))
    )
    K = 1.0 if layer.keep is None else columns(layer.keep) / (1 - layer.p)
    b = 0.0 if layer.bias is None else layer.bias.astype(np.float64)[:, None]
    sums = {
        "y": (
            W.shape[1],
            np.maximum(np.abs(W @ x), np.abs(W @ x + b)),
            layer.s * (B @ (A @ (K * x))),
        ),
        "dx": (len(W), W.T @ dy, K * (layer.s * (A.T @ (B.T @ dy)))),
    }
    each = unit_roundoff(precision.accumulation) ** 2 / 3
    return {
        name: each * (layer.r * base**2 + terms * branch**2)
        for name, (terms, base, branch) in sums.items()
    }


def wanted_merge(layer: Layer, number: Callable[[Array], Any] = long) -> Array:
    """The true merged weight, over a number system."""
    return merge_weight(number(layer.W), number(layer.A), number(layer.B), layer.s)


def sigma_merge(layer: Layer, precision: Precision) -> Array:
    """The standard deviation of its elements."""
    number, scalable = _numbers(layer, precision)
    inputs: tuple[Any, Any, Any] = number(layer.W), number(layer.A), scalable(layer.B)
    merged: Any = merge_weight(*inputs, layer.s)
    sigma: Array = merged.sigma
    return sigma


def formed(layer: Layer) -> Array:
    """What forming W ± s B A loses at most, in u: (r + 3) (|W| + |s| |B| |A|).

    It is a sum of r + 1 terms, r of them products with a factor s, in whatever order (Higham 2002,
    section 3.1).
    """
    W, A, B = (np.abs(long(v)) for v in (layer.W, layer.A, layer.B))
    lost: Array = (layer.r + 3) * (W + abs(layer.s) * (B @ A))
    return lost


def full_digits(case: Case, precision: Precision, beyond: int = 0) -> Layer:
    """A layer in whole numbers whose W needs all digits but one of the declared precision.

    Its last digits are those that s B A, of small numbers, adds to; W' is a number of the dtype
    again, and merging and unmerging are exact. With ``beyond``, W needs the last digit too, and
    s B A, of one rank, so many more: one sum rounds.
    """
    layer, _ = draw_layer(in_exact_lane(case))
    kinds = (case.dtype, precision.storage, precision.accumulation)
    large = 2.0 ** (min(map(digits, kinds)) - (1 if beyond else 2))
    rng, shape = case.rng(), layer.W.shape
    W = rng.choice([-1.0, 1.0], shape) * (large + rng.integers(0, 2**16, shape) % large)
    A, B = (np.sign(array).astype(layer.W.dtype) for array in (layer.A, layer.B))
    if beyond:
        parts = rng.integers(-(2 ** (beyond + 1)), 2 ** (beyond + 1), A.shape) * 0.5**beyond
        A = np.where(np.arange(len(A))[:, None] == case.number % len(A), parts, 0.0)
        A = A.astype(layer.W.dtype)
        B = rng.choice([-1.0, 1.0], B.shape).astype(layer.W.dtype)
    return replace(layer, W=W.astype(layer.W.dtype), A=(A / layer.s).astype(A.dtype), B=B)


def sigmas_of_session(layer: Layer, precision: Precision) -> dict[str, Array]:
    """The same where s B A may be formed, added to W and subtracted again, as in a session.

    y and dx go through the merged weight, and dA and dB through dW = dyᵀ x. For each element, the
    greater of this and of `sigmas` counts.
    """
    number, scalable = _numbers(layer, precision)
    x, dy = number(columns(layer.x)), scalable(columns(layer.dy))
    A, B = number(layer.A), scalable(layer.B)
    delta = layer.s * (B @ A)
    W = number(layer.W) + delta - delta + delta
    y = W @ x if layer.bias is None else W @ x + number(layer.bias[:, None])
    dW = dy @ x.T
    answers = {"y": y, "dx": W.T @ dy, "dA": layer.s * (B.T @ dW), "dB": layer.s * (dW @ A.T)}
    answers["dbias"] = dy @ np.ones((dy.value.shape[1], 1))
    merged = _contract_shapes(layer, {name: answer.sigma for name, answer in answers.items()})
    unmerged = sigmas(layer, precision)
    return {name: np.maximum(sigma, unmerged[name]) for name, sigma in merged.items()}


def limits(layer: Layer, array: str) -> Limits:
    """The limits of a closed form, for the number of elements that err independently.

    All of y, dx, dA and dB err through u or du, which have r entries a token: no array holds more
    independent errors than that, and the rms of few is allowed to be larger.
    """
    independent = min(layer.r * columns(layer.x).shape[1], size := prod(layer.shapes()[array])) or 1
    return replace(CLOSED_FORM, rms_small=CLOSED_FORM.rms_small * (size / independent) ** 0.5)


@lru_cache(maxsize=16)
def draw_layer(
    case: Case,
    *,
    bias: bool = False,
    dropout: bool | str = False,
    beyond: Sequence[Sequence[int]] = BEYOND,
    **settings: Any,
) -> tuple[Layer, bool]:
    """The layer of a case, and whether it belongs to the exact lane, as the even numbers do.

    ``dropout`` is one of `DROPOUT`, or whether there is a mask. One alpha in four is negative.
    ``beyond`` are the sizes beyond tiles.
    """
    exact = case.number % 2 == 0
    group = case.number // 2
    rng = case.rng()
    every, first = BEYOND_EVERY[case.number % 2]
    is_beyond = case.number % every == first
    turn = case.number // every
    size = in_turn(beyond, case, turn) if is_beyond else SIZES[group % len(SIZES)]
    layer = draw_of_size(
        rng,
        case,
        size,
        LEADS[(1 - turn) % 2 if is_beyond and exact else group % len(LEADS)],
        bias=bias,
        dropout=dropout if isinstance(dropout, str) else DROPOUT[dropout],
        negative=group % 4 == 1,
        **settings,
    )
    none = np.zeros_like(layer.W)
    if exact and case.dtype != "float16" and size == SIZES[3] and group >= len(SIZES):
        b = None if layer.bias is None else np.zeros_like(layer.bias)
        B = (layer.B * TINY).astype(layer.B.dtype)
        layer = replace(layer, W=none, B=B, bias=b)
    elif case.dtype in ("bfloat16", "float16") and (group // len(SIZES)) % 2:
        layer = replace(layer, W=none)
    return layer, exact


def in_turn(sizes: Sequence[Any], case: Case, turn: int) -> Any:
    """One of the sizes after another, where each check, lane and seed begins with another one."""
    first = crc32(case.check.encode()) + case.seed + case.number % 2 * (len(sizes) // 2)
    return sizes[(first + turn) % len(sizes)]


def draw_of_size(
    rng: Any,
    case: Case,
    size: Sequence[int],
    lead: Callable[[int], tuple[int, ...]],
    *,
    negative: bool = False,
    **kind: Any,
) -> Layer:
    """A layer of these tokens, n, m, r, and r in the exact lane, in the lane of the case."""
    tokens, n, m, r, power = size
    asked = kind | {"dropout": kind["dropout"] != "none"}
    left = case.fixed.fitting(case.check, asked)
    left["dropout"] = kind["dropout"] if left.get("dropout") else "none"
    kind = {"bias": False, **left}
    if case.number % 2:
        layer = _draw_general(rng, case.dtype, (lead(tokens), n, m, r), case.fixed, **kind)
    else:
        # With rsLoRA, √r is a power of two as well.
        root = power > 1 and max(1, round(np.log2(power) / 2))
        r = 4**root if kind.get("use_rslora") else power
        layer = _draw_exact(rng, case.dtype, (lead(tokens), n, m, r), case.fixed, **kind)
    is_free = case.fixed.alpha is None
    return replace(layer, alpha=-layer.alpha) if negative and is_free else layer


def _keep(rng: Any, shape: tuple[int, ...], dropout: str, p: float) -> Array | None:
    """The mask of a kind of dropout; one feature in four is dropped where there is no rate."""
    if dropout == "mask of ones":
        return np.ones(shape, bool)
    if dropout == "mask without a rate":
        return np.asarray(rng.random(shape) >= 0.25)
    if dropout != "mask":
        return None
    keep = np.asarray(rng.random(shape) >= p)
    if keep.size and keep.all():
        keep.flat[0] = False  # or it would be a mask of ones
    return keep


def _draw_general(
    rng: Any,
    dtype: str,
    sizes: tuple[tuple[int, ...], int, int, int],
    fixed: Fixed,
    *,
    bias: bool,
    dropout: str,
    **settings: Any,
) -> Layer:
    lead, n, m, r = sizes
    r = fixed.rank(r)
    shapes = {"x": (*lead, n), "W": (m, n), "A": (r, n), "B": (m, r), "dy": (*lead, m)}
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    alphas = list(ALPHAS)
    arrays["W"] *= 1 / sqrt(n)  # ÷ and √ give the same bits everywhere; a power may not
    if max(*lead[-1:], n, m, r) > LARGEST:  # the branch is not to hide the base
        arrays["A"] *= 1 / sqrt(n)
        arrays["B"] *= 1 / sqrt(r)
        alphas = [alpha * r / 4 for alpha in ALPHAS]
    arrays = {name: array.astype(DTYPES[dtype]) for name, array in arrays.items()}
    has_rate = dropout not in ("none", "mask without a rate")
    p = float(rng.choice([0.1, 0.25, 0.3])) if has_rate else 0.0
    return Layer(
        **arrays,
        alpha=fixed.alpha_of(float(rng.choice(alphas)), r),
        r=r,
        bias=rng.standard_normal(m).astype(DTYPES[dtype]) if bias else None,
        keep=_keep(rng, (*lead, n), dropout, p),
        p=p,
        settings=settings,
    )


def _draw_exact(
    rng: Any,
    dtype: str,
    sizes: tuple[tuple[int, ...], int, int, int],
    fixed: Fixed,
    *,
    bias: bool,
    dropout: str,
    **settings: Any,
) -> Layer:
    """Integers so small that every order of summation gives the same bits: answers compare by ==.

    s, r, hence α, and K, which is 0 or 4, are powers of two: wherever they are applied, and √s on
    both factors too, they move the binary point and no digit. Only where the branch joins the base
    are multiples of s and whole numbers added. If the sum of the terms' absolute values stays
    within `whole_numbers` there and in the sums without s, each partial sum in each order is a
    number of the dtype. Sparser integers are drawn until so. Where sides are beyond tiles, half
    precisions have a small layer spread among zeros, of which the last row and column are a part.
    """
    lead, n, m, r = sizes
    r, only = fixed.exact(r, settings.get("use_rslora", False))
    p = 0.0 if dropout in ("none", "mask without a rate") else 0.75
    s = float(rng.choice(SCALES)) if only is None else only
    alpha = s * (r**0.5 if settings.get("use_rslora") else r)
    limit = whole_numbers(dtype) * min(s, 1.0)
    sizes_of_sides = dict(zip("nmrt", (n, m, r, *lead[-1:]), strict=False))
    is_large = max(sizes_of_sides.values()) > LARGEST
    few = is_large and limit < 1000
    used = {side: _places(size) for side, size in sizes_of_sides.items()} if few else {}
    shapes = {"x": (*lead, n), "W": (m, n), "A": (r, n), "B": (m, r), "dy": (*lead, m)}
    large = 5 if limit > 1000 and not is_large else 2
    density = 1.0
    while True:
        arrays = {
            name: _thinned(rng.integers(-large, large + 1, shape), SIDES[name], used)
            for name, shape in shapes.items()
        }
        if density < 1.0:
            arrays = {
                name: array * (rng.random(array.shape) < density) for name, array in arrays.items()
            }
        keep = _keep(rng, (*lead, n), dropout, p)
        b = rng.integers(-large, large + 1, m) if bias else None
        layer = Layer(**arrays, alpha=alpha, r=r, bias=b, keep=keep, p=p, settings=settings)
        has_effect = density < 0.4 or (layer.A.any() and layer.B.any())
        if has_effect and greatest_sum(layer, limit) <= limit:
            stored: dict[str, Any] = {n: array.astype(DTYPES[dtype]) for n, array in arrays.items()}
            return replace(layer, **stored, bias=None if b is None else b.astype(DTYPES[dtype]))
        density, large = max(0.2, density * 0.97), max(1, large - (density < 0.5))


SIDES = {"x": "tn", "W": "mn", "A": "rn", "B": "mr", "dy": "tm"}
"""What lies along the last two axes of each array: tokens, n, m or r."""


def _places(size: int) -> Array:
    """A few places along a side, the first and the last among them."""
    used = np.zeros(size, bool)
    used[np.rint(np.linspace(0, size - 1, SPREAD)).astype(int) if size > SPREAD else ...] = True
    return used


def _thinned(array: Array, sides: str, used: dict[str, Array]) -> Array:
    """The array with zeros wherever a side is not used."""
    if used and array.ndim > 1:
        array = array * used[sides[0]][:, None]
    thinned: Array = array * used[sides[1]] if used else array
    return thinned


def whole_numbers(dtype: str) -> float:
    """How far a dtype has every whole number; float64 as far as float32 with room to spare."""
    return 2.0 ** min(22, digits(dtype))


def greatest_sum(layer: Layer, limit: float = inf) -> float:
    """The greatest sum of absolute terms in any array that the layer's computation may form.

    A sum without s counts s times where s is less than 1: so do the numbers that there are. The
    first that is found above the limit will do.
    """
    greatest = 0.0
    for sums in _sums(layer):
        greatest = max(greatest, float(sums.max(initial=0.0)))
        if greatest > limit:
            break
    return greatest


def _sums(layer: Layer) -> Iterator[Array]:
    """The sums of absolute terms, those of dA and dB first: they are mostly the greatest."""
    absolute = {
        name: np.abs(getattr(layer, name).astype(np.float64)) for name in ("x", "W", "A", "B", "dy")
    }
    bias = None if layer.bias is None else abs(layer.bias)
    kept = Layer(**vars(layer) | absolute | {"bias": bias, "alpha": abs(layer.alpha)})
    A, B, x, dy = absolute["A"], absolute["B"], columns(absolute["x"]), columns(absolute["dy"])
    h = x if layer.keep is None else x * (columns(layer.keep) / (1 - layer.p))
    yield (kept.s * B.T @ dy) @ h.T
    yield dy @ (kept.s * A @ h).T
    s, K = min(kept.s, 1.0), 4.0 if layer.p and layer.keep is not None else 1.0
    yield from (s * x * K, s * A @ x * K, s * B.T @ dy, kept.s * B @ A + absolute["W"])
    yield from specified(kept, np.float64, np.float64).values()


@dataclass(frozen=True)
class Several:
    """Adapters of one weight, with weights, and an index of rows.

    x and W are those of the first, shared by all; ``index`` names each row's adapter, -1 for none.
    """

    adapters: list[Layer]
    weights: list[float]
    index: Array

    def of_rows(self, rows: slice, index: Array) -> Several:
        """These rows of x, with an index of their own."""
        parts = {name: getattr(self.adapters[0], name)[rows] for name in ("x", "dy")}
        return replace(self, adapters=[replace(a, **parts) for a in self.adapters], index=index)

    def longer(self, rng: np.random.Generator, index: Array) -> Several:
        """With so many rows as an index has, each one of these, perhaps negated.

        No sum of absolute terms of a row is greater than it was.
        """
        x, dy = self.adapters[0].x, self.adapters[0].dy
        rows, signs = rng.integers(0, len(x), len(index)), rng.choice([-1.0, 1.0], len(index))
        parts = {
            name: array[rows] * signs[:, None].astype(array.dtype)
            for name, array in (("x", x), ("dy", dy))
        }
        return replace(self, adapters=[replace(a, **parts) for a in self.adapters], index=index)

    def negated(self) -> Several:
        """With a negative alpha of every other adapter, the first among them."""
        signs = [1 if i % 2 else -1 for i in range(len(self.adapters))]
        pairs = zip(self.adapters, signs, strict=True)
        return replace(self, adapters=[replace(a, alpha=sign * a.alpha) for a, sign in pairs])

    def of_kind(self, kind: str) -> Several:
        """With another index: of no adapter, of the last alone, or without rows of none."""
        last = len(self.adapters) - 1
        index = {
            "none alone": np.full_like(self.index, -1),
            "one alone": np.full_like(self.index, last),
            "all have one": np.where(self.index < 0, last, self.index),
        }
        return replace(self, index=index.get(kind, self.index))

    def sharing(self, *names: str) -> Several:
        """With these arrays of the first adapter for all."""
        shared = {name: getattr(self.adapters[0], name) for name in names}
        return replace(self, adapters=[replace(a, **shared) for a in self.adapters])

    def sparser(self, rng: np.random.Generator) -> Several:
        """With a tenth of the entries of every array 0 instead."""

        def thinned(array: Array) -> Any:
            return array * (rng.random(array.shape) < 0.9).astype(array.dtype)

        names = ("x", "W", "A", "B", "dy")
        adapters = [
            replace(a, **{name: thinned(getattr(a, name)) for name in names}) for a in self.adapters
        ]
        return replace(self, adapters=adapters).sharing("x", "W", "dy")


RANKS = ((2, 4, 1), (2, 2, 2), (1, 4, 2, 16))
"""Of the adapters, in any place: 4 and 16, whose roots are powers of two, are rsLoRA's."""

ROOTS = (3, 5, 8)
"""Ranks of which one stands in the place of 4 where there is rounding: no square is among them."""

ROWS = (7, 19, 11, 131)
"""How many rows an index has; the last has more than a kernel's tiles of 64 and of 128."""

FEW = 19
"""The greatest number of rows that are drawn; of more, the rest are made of these."""


@lru_cache(maxsize=16)
def draw_several(
    case: Case,
    sizes: Sequence[Sequence[int]] = SIZES,
    kinds: Sequence[Sequence[int]] = RANKS,
    counts: Sequence[int] = ROWS,
    combined: bool = True,
) -> tuple[Several, bool]:
    """Adapters of one weight, and whether the case belongs to the exact lane.

    There are three of unequal ranks, or of equal ranks and other factors, or four. One is rsLoRA's,
    unless the ranks are equal; the scales are not all the same. The weights have both signs and are
    not 1, and of four every other time their sum is 0; the index holds -1 and every adapter, and is
    not monotone. In the exact lane the weights are powers of two as the scales are, and all so
    small that any sum of them is exact, too, if they are to be ``combined``.
    """
    exact = case.number % 2 == 0
    group = case.number // 2
    rng = case.rng()
    _, n, m, *_ = sizes[group % len(sizes)]
    draw = _draw_exact if exact else _draw_general
    ranks = np.roll(kinds[group % len(kinds)], group // len(kinds))[: case.fixed.adapters]
    rows = counts[group % len(counts)]

    def adapter(r: int) -> Layer:
        rank = r if exact or r != 4 else int(rng.choice(ROOTS))
        scaled = case.fixed.alpha is None and (r == 4 or (exact and r == 16))
        settings = case.fixed.fitting(case.check, {"use_rslora": True}) if scaled else {}
        sizes = ((min(rows, FEW),), n, m, rank)
        return draw(rng, case.dtype, sizes, case.fixed, bias=False, dropout="none", **settings)

    while True:
        layers = [adapter(int(r)) for r in ranks]
        signs = rng.choice([-1.0, 1.0], len(ranks))
        weights = signs * rng.choice(SCALES if exact else [0.3, 0.7, 1.7], len(ranks))
        if len(ranks) == 4 and group // len(kinds) % 2 == 0:
            weights[2:] = -weights[:2]
        index = np.resize(np.arange(-1, len(ranks)), rows)[rng.permutation(rows)]
        several = Several(layers, [float(w) for w in weights], index).sharing("x", "W", "dy")
        while exact and too_large(several, case.dtype, combined):
            several = several.sparser(rng)
        if rows > FEW:
            several = several.longer(rng, index)
        if _is_telling(several.adapters, case.fixed):
            return several, exact


def _is_telling(adapters: Sequence[Layer], fixed: Fixed) -> bool:
    """Whether the scales are not all the same, unless they are fixed, and no adapter is 0."""
    differ = len({a.s for a in adapters}) > 1 or len(adapters) == 1 or fixed.alpha is not None
    return differ and all(a.A.any() and a.B.any() for a in adapters)


def require_several(several: Several) -> None:
    """Raises Skip where there is one adapter alone."""
    if len(several.adapters) < 2:
        raise Skip("it has one adapter at a time")


def in_exact_lane(case: Case) -> Case:
    """The case of this number among those of the exact lane, whose numbers are even."""
    return replace(case, number=case.number * 2)


def too_large(several: Several, dtype: str, combined: bool = True) -> bool:
    """Whether a sum of absolute terms of the rows, or of the combined change, may be rounded."""
    limit = whole_numbers(dtype)
    bounds = [limit * min(abs(a.s), 1.0) for a in several.adapters]
    if any(greatest_sum(a, b) > b for a, b in zip(several.adapters, bounds, strict=True)):
        return True
    if not combined:
        return False
    absolute = [
        replace(a, A=abs(a.A.astype(float)), B=abs(a.B.astype(float)), alpha=abs(a.alpha))
        for a in several.adapters
    ]
    weights = [abs(w) for w in several.weights]
    unit = min(w * a.s for w, a in zip(weights, absolute, strict=True))
    change = wanted_change(Several(absolute, weights, several.index), np.float64)
    return float(change.max()) > limit * unit


def wanted_change(several: Several, number: Callable[[Array], Any] = long) -> Array:
    """The true Σ w s B A, over a number system."""
    triples = [(number(a.A), number(a.B), a.s) for a in several.adapters]
    A, B = combine(triples, several.weights)
    change: Array = B @ A
    return change


def sigma_change(several: Several, precision: Precision) -> Array:
    """The standard deviation of its elements: each w s B A rounded, and their sum.

    W is 0 in each; w counts with the scale, wherever it is put.
    """
    rounding = Rounding(precision)
    variance = np.zeros(several.adapters[0].W.shape)
    modulus = np.zeros_like(variance)
    for a, w in zip(several.adapters, several.weights, strict=True):
        scaled = replace(a, W=np.zeros_like(a.W), alpha=abs(w) * a.alpha)
        number, scalable = _numbers(scaled, precision)
        inputs: tuple[Any, Any, Any] = number(scaled.W), number(a.A), scalable(a.B)
        change: Any = merge_weight(*inputs, scaled.s)
        variance = variance + change.variance + rounding.stored(change.value)
        modulus = modulus + change.value**2
    sigma: Array = np.sqrt(variance + rounding.summed(len(several.adapters) + 1, modulus))
    return sigma


def wanted_by_row(several: Several, number: Callable[[Array], Any] = long) -> Array:
    """The true y of each row with its own adapter, over a number system."""
    return _by_row(several, lambda layer: wanted(layer, number)["y"])


def sigmas_by_row(several: Several, precision: Precision) -> Array:
    """The standard deviation of its elements."""
    return _by_row(several, lambda layer: sigmas(layer, precision)["y"])


def _by_row(several: Several, answer: Callable[[Layer], Array]) -> Array:
    """Each row from the layer that its index names; for -1, from one whose B is 0."""
    first = several.adapters[0]
    layers = [*several.adapters, replace(first, B=np.zeros_like(first.B))]
    rows: list[Any] = [None] * len(several.index)
    for i, layer in enumerate(layers):
        own = np.flatnonzero(several.index == (i if i < len(several.adapters) else -1))
        if own.size:
            answers = answer(replace(layer, x=layer.x[own], dy=layer.dy[own]))
            for j, row in zip(own, answers, strict=True):
                rows[j] = row
    return np.stack(rows)
