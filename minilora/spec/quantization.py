"""QLoRA: a frozen weight in four or eight bits, and LoRA on the dequantized weight.

Each scheme has two functions: ``quantize`` makes codes and constants of W, ``dequantize`` makes
the weight W̃ of them. LoRA on W̃ is `lora.lora_linear`. Every rounding is specified: where a format
computes in float32, so does the code.
Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, equations 1 to 6.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from minilora.spec.lora import lora_linear, merge_weight
from minilora.spec.ops import Array, Back

F32 = np.float32
NARROW = tuple(np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16))
"""The dtypes of a weight that float32 holds without rounding."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized weight; its arrays are read-only.

    ``scheme``: a name in SCHEMES; ``shape``: of W; ``dtype``: of W̃; ``block``: how many entries
    share constants; ``codes``: packed as in the scheme; ``constants``: the scheme's scales and
    offsets.
    """

    scheme: str
    shape: tuple[int, int]
    dtype: Any
    block: int
    codes: Array
    constants: Mapping[str, Array]

    def __post_init__(self) -> None:
        def frozen(array: Array) -> Array:
            view = np.asarray(array).view()
            view.setflags(write=False)
            return view

        constants = {name: frozen(array) for name, array in self.constants.items()}
        object.__setattr__(self, "codes", frozen(self.codes))
        object.__setattr__(self, "constants", MappingProxyType(constants))

    @property
    def bits(self) -> float:
        """How many bits an entry of W takes, the constants included."""
        parts = (self.codes, *self.constants.values())
        return 8 * sum(part.nbytes for part in parts) / math.prod(self.shape)


def _checked(W: Array, block: int, multiple: int, whole: bool) -> None:
    """Refuse a block size that is no multiple of ``multiple``, and a W that cannot be quantized.

    ``whole``: a row must be a multiple of the block.
    """
    if block < 1 or block % multiple:
        raise ValueError(f"block of {block}: expected a positive multiple of {multiple}")
    if W.dtype not in NARROW and W.dtype.kind not in "fO":
        raise TypeError(f"W of dtype {W.dtype}: expected real numbers that are no integers")
    if W.ndim != 2 or not W.size:
        raise ValueError(f"W of shape {W.shape}: expected two dimensions, neither of them 0")
    if whole and W.shape[1] % block:
        raise ValueError(
            f"rows of {W.shape[1]} entries: expected a multiple of the block, {block}; choose "
            "another block or scheme, or leave this weight as it is"
        )
    if W.dtype != object:
        wrong = np.argwhere(~np.isfinite(W))
        if len(wrong):
            i, j = wrong[0]
            raise ValueError(
                f"W[{i}, {j}] is {W[i, j]}: expected finite numbers; one such entry changes its "
                "whole block: repair the weight first"
            )


def _float32(W: Array) -> Array:
    """W in float32, the format's dtype; float64 is rounded.

    Errors: TypeError for other numbers, ValueError for those beyond float32.
    """
    if W.dtype not in (*NARROW, np.float64):
        raise TypeError(f"W of dtype {W.dtype}: expected float16, bfloat16, float32 or float64")
    with np.errstate(over="ignore"):
        narrow = W.astype(F32)
    if not np.isfinite(narrow).all():
        raise ValueError(f"W reaches {abs(W).max()}: expected what float32 holds; scale it down")
    return narrow


def round_even(v: Array) -> Array:
    """Round to the nearest whole number, ties to even; floats or fractions."""
    rounded: Array = np.rint(v) if v.dtype.kind == "f" else np.frompyfunc(round, 1, 1)(v)
    return rounded


def pack(codes: Array) -> Array:
    """p = 16 q₀ + q₁: two neighbours in a byte, the first of them in its high half.

    Shapes: codes (2*k,) -> p (k,).
    """
    packed: Array = codes[::2] << 4 | codes[1::2]
    return packed


def unpack(p: Array) -> Array:
    """q₀ = ⌊p / 16⌋, q₁ = p mod 16: the codes that :func:`pack` has packed.

    Shapes: p (k,) -> codes (2*k,).
    """
    return np.stack([p >> 4, p & 15], -1).reshape(-1)


def quantize_affine(W: Array, bits: int, block: int = 64, symmetric: bool = False) -> Quantized:
    """q = clip(round(w / scale) + zero, 0, 2ᵇ - 1), with a scale and a zero for each group.

    A group is ``block`` neighbours along the input; ties go to the even number. Asymmetric:
    scale = (max - min) / (2ᵇ - 1), zero = round(-min / scale), the range widened to contain 0.
    Symmetric: scale = max |w| / (2ᵇ⁻¹ - 1), zero = 2ᵇ⁻¹. Where the scale would be 0 it is 1.
    Four-bit codes lie two in a byte, as :func:`pack` has them. Runs on fractions too, and then
    |w - w̃| ≤ scale / 2; in floats six roundings add 6 u (2ᵇ - 1) scale at most, and the one to W's
    dtype, if that has 16 bits.

    Shapes: W (m, n) -> codes (m*n*b/8,), scale and zero (m, n/block, 1).
    Errors: ValueError for other bits than 4 and 8; if a row is no multiple of the block, or its
    range is no number.
    Source: Jacob et al. 2018, equation 1; in groups, Frantar et al. 2022, "GPTQ".
    """
    if bits not in (4, 8):
        raise ValueError(f"bits {bits}: expected 4 or 8")
    _checked(W, block, 2, whole=True)
    m, n = W.shape
    wide = W.astype(F32) if W.dtype in NARROW else W
    groups = wide.reshape(m, n // block, block)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    with np.errstate(over="ignore"):
        if symmetric:
            scale = np.maximum(high, -low) / (2 ** (bits - 1) - 1)
        else:
            low, high = np.minimum(low, 0 * low), np.maximum(high, 0 * high)
            scale = (high - low) / (2**bits - 1)
    if W.dtype != object and not np.isfinite(scale).all():
        raise ValueError(f"W reaches {abs(W).max()}: max - min overflows {wide.dtype}; scale it")
    scale = scale + (scale == 0)
    zero = 2 ** (bits - 1) if symmetric else round_even(-low / scale)
    q = np.clip(round_even(groups / scale) + zero, 0, 2**bits - 1).astype(np.uint8).reshape(-1)
    name = f"int{bits}-symmetric" if symmetric else f"int{bits}"
    constants = {"scale": scale} if symmetric else {"scale": scale, "zero": zero.astype(np.uint8)}
    return Quantized(name, (m, n), W.dtype, block, pack(q) if bits == 4 else q, constants)


def dequantize_affine(q: Quantized) -> Array:
    """w̃ = scale (q - zero), in the scale's number system, then rounded to W's dtype.

    Shapes: -> W̃ (m, n).
    """
    m, n = q.shape
    bits = 4 if q.scheme.startswith("int4") else 8
    codes = unpack(q.codes) if bits == 4 else q.codes
    zero = q.constants.get("zero", 2 ** (bits - 1))
    steps = codes.reshape(m, n // q.block, q.block).astype(np.int16) - zero
    W: Array = (q.constants["scale"] * steps).reshape(m, n).astype(q.dtype)
    return W


def unpack_words(words: Array, bits: int) -> Array:
    """The codes in a row of 32-bit words: a stream of bits, the lowest first.

    Shapes: words (m, k) -> codes (m, 32*k/bits).
    Source: MLX's ``quantize``.
    """
    m = len(words)
    if 32 % bits == 0:
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        codes: Array = (words[..., None] >> shifts) & np.uint32(2**bits - 1)
        return codes.reshape(m, -1)
    stream = np.ascontiguousarray(words, "<u4").view(np.uint8)
    ones = np.unpackbits(stream, axis=-1, bitorder="little").reshape(m, -1, bits)
    return ones.astype(np.uint32) @ (1 << np.arange(bits, dtype=np.uint32))


def dequantize_words(words: Array, scales: Array, biases: Array, bits: int) -> Array:
    """w̃ = scale q + bias, a scale and a bias for each group of a row, in float32.

    Shapes: words (m, n*bits/32), scales and biases (m, n/group) -> W̃ (m, n).
    Source: MLX's ``dequantize``, mode "affine".
    """
    codes = unpack_words(words, bits).reshape(*scales.shape, -1).astype(F32)
    W: Array = scales[..., None].astype(F32) * codes + biases[..., None].astype(F32)
    return W.reshape(len(words), -1)


def _inverse(d: Array) -> Array:
    """1 / d, or 0 where 1 / d overflows: such a d is 0 in float16, too."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = 1 / d
    return np.where(np.isfinite(inverse), inverse, F32(0))


def _halves(**constants: Array) -> dict[str, Array]:
    """The constants in float16, as GGUF keeps them.

    Errors: ValueError if one overflows.
    """
    with np.errstate(over="ignore"):
        halves = {name: v.astype(np.float16) for name, v in constants.items()}
    for name, half in halves.items():
        if not np.isfinite(half).all():
            raise ValueError(
                f"{name} = {constants[name][~np.isfinite(half)][0]} in a block: expected what "
                "float16 holds; scale W down or take another scheme"
            )
    return halves


def _gguf_blocks(W: Array) -> Array:
    _checked(W, 32, 32, whole=True)
    return _float32(W).reshape(W.shape[0], W.shape[1] // 32, 32)


def _gguf(scheme: str, W: Array, codes: Array, halves: dict[str, Array]) -> Quantized:
    """Four-bit codes in GGUF's order: a byte holds entry j in its low half, j + 16 in its high."""
    if scheme != "q8_0":
        codes = codes[..., :16] | codes[..., 16:] << 4
    return Quantized(scheme, W.shape, np.dtype(F32), 32, codes, halves)


def _gguf_codes(q: Quantized) -> Array:
    return np.concatenate([q.codes & 15, q.codes >> 4], -1).astype(np.int16)


def quantize_q4_0(W: Array) -> Quantized:
    """q = min(⌊w / d + 8½⌋, 15), d = -w* / 8, w* the entry of 32 with the greatest modulus.

    Of equal moduli the first counts. In float32, as w times 1 / d; d is then kept in float16.
    With v = w / d in [-8, 8] and d' the kept scale: |w - w̃| ≤ max(½, v - 7) |d| + 8 |d - d'|, and
    34 u |d| of rounding: w* has code 0, and what lies opposite may miss by a whole step.

    Shapes: W (m, n) -> codes (m, n/32, 16), d (m, n/32, 1).
    Errors: ValueError if a row is no multiple of 32, or d is beyond float16.
    Source: GGML's Q4_0; gguf.quants 0.19 has the same bytes.
    """
    w = _gguf_blocks(W)
    d = np.take_along_axis(w, abs(w).argmax(-1)[..., None], -1) / F32(-8)
    halves = _halves(d=d)
    codes = np.minimum(np.trunc(w * _inverse(d) + F32(8.5)), 15).astype(np.uint8)
    return _gguf("q4_0", W, codes, halves)


def dequantize_q4_0(q: Quantized) -> Array:
    """w̃ = d (q - 8), which float32 holds without rounding.

    Shapes: -> W̃ (m, n).
    """
    W: Array = q.constants["d"].astype(F32) * (_gguf_codes(q) - 8).astype(F32)
    return W.reshape(q.shape)


def quantize_q4_1(W: Array) -> Quantized:
    """q = ⌊(w - m) / d + ½⌋, m = min w, d = (max w - m) / 15, of 32 entries.

    In float32, as (w - m) times 1 / d; d and m are then kept in float16, as d' and m'.
    |w - w̃| ≤ d / 2 + 15 |d - d'| + |m - m'|, and of rounding 62 u d and u |w̃|.

    Shapes: W (m, n) -> codes (m, n/32, 16), d and m (m, n/32, 1).
    Errors: ValueError if a row is no multiple of 32, or d or m is beyond float16.
    Source: GGML's Q4_1; gguf.quants 0.19 has the same bytes.
    """
    w = _gguf_blocks(W)
    m = w.min(-1, keepdims=True)
    with np.errstate(over="ignore"):
        d = (w.max(-1, keepdims=True) - m) / F32(15)
    halves = _halves(d=d, m=m)
    codes = np.minimum(np.trunc((w - m) * _inverse(d) + F32(0.5)), 15).astype(np.uint8)
    return _gguf("q4_1", W, codes, halves)


def dequantize_q4_1(q: Quantized) -> Array:
    """w̃ = d q + m, rounded once: float32 holds the product.

    Shapes: -> W̃ (m, n).
    """
    d, m = (q.constants[name].astype(F32) for name in "dm")
    W: Array = d * _gguf_codes(q).astype(F32) + m
    return W.reshape(q.shape)


def quantize_q8_0(W: Array) -> Quantized:
    """q = round(w / d), ties away from 0, d = max |w| / 127, of 32 entries.

    In float32, as w times 1 / d; d is then kept in float16, as d'.
    |w - w̃| ≤ d / 2 + 127 |d - d'|, and of rounding 255 u d.

    Shapes: W (m, n) -> codes (m, n/32, 32), d (m, n/32, 1).
    Errors: ValueError if a row is no multiple of 32, or d is beyond float16.
    Source: GGML's Q8_0; gguf.quants 0.19 has the same bytes.
    """
    w = _gguf_blocks(W)
    d = abs(w).max(-1, keepdims=True) / F32(127)
    halves = _halves(d=d)
    v = abs(w * _inverse(d))
    floor = np.floor(v)
    steps = floor + (v - floor >= 0.5)  # v - floor is exact, v + ½ would not be
    return _gguf("q8_0", W, (np.sign(w) * steps).astype(np.int8), halves)


def dequantize_q8_0(q: Quantized) -> Array:
    """w̃ = d q, which float32 holds without rounding.

    Shapes: -> W̃ (m, n).
    """
    W: Array = q.constants["d"].astype(F32) * q.codes.astype(F32)
    return W.reshape(q.shape)


def gguf_bytes(q: Quantized) -> Array:
    """The blocks as a GGUF file has them: the constants, d before m, little-endian, then the codes.

    Shapes: -> bytes (m, k), k = n/32 times 18, 20 or 34.
    """
    halves = [half.astype("<f2").view(np.uint8) for half in q.constants.values()]
    return np.concatenate([*halves, q.codes.view(np.uint8)], -1).reshape(q.shape[0], -1)


def from_gguf(data: Array, scheme: str) -> Quantized:
    """The quantized weight of a GGUF file's bytes, the inverse of :func:`gguf_bytes`.

    Shapes: data (m, k) -> Quantized, its W̃ (m, n).
    Errors: ValueError if the scheme is no GGUF type, or a row is no whole number of blocks.
    """
    if scheme not in ("q4_0", "q4_1", "q8_0"):
        raise ValueError(f"scheme {scheme!r}: expected q4_0, q4_1 or q8_0")
    names = "dm" if scheme == "q4_1" else "d"
    head = 2 * len(names)
    size = head + (32 if scheme == "q8_0" else 16)
    if data.ndim != 2 or data.dtype != np.uint8 or data.shape[1] % size or not data.size:
        raise ValueError(
            f"{data.dtype} of shape {data.shape}: expected rows of bytes, {size} for each block of "
            f"{scheme}"
        )
    m, blocks = data.shape[0], data.shape[1] // size
    parts = data.reshape(m, blocks, size)
    halves = np.ascontiguousarray(parts[..., :head]).view("<f2")
    constants = {name: halves[..., i : i + 1] for i, name in enumerate(names)}
    codes = parts[..., head:].view(np.int8 if scheme == "q8_0" else np.uint8)
    return Quantized(scheme, (m, 32 * blocks), np.dtype(F32), 32, codes, constants)


def _spaced(first: float, last: float, k: int) -> Array:
    """k evenly spaced points in float32, each rounded once, computed from the nearer end."""
    a, b = F32(first), F32(last)
    step = float((b - a) / F32(k - 1))
    i = np.arange(k)
    # Float64 holds these products and sums exactly: they are rounded by astype alone.
    return np.where(i < k // 2, float(a) + step * i, float(b) - step * (k - 1 - i)).astype(F32)


@cache
def nf4_values() -> Array:
    """t = sort(-Φ⁻¹(p⁻), 0, Φ⁻¹(p⁺)) / Φ⁻¹(δ), the 16 values of NF4: quantiles of N(0, 1).

    p⁺ are the first 8 of 9 points spaced evenly from δ = 0.9677083 to ½, p⁻ the first 7 of 8, both
    in float32; the quantiles are rounded to float32 and divided there. These are the float32
    numbers in bitsandbytes' table, bit for bit.

    Shapes: -> t (16,).
    Source: bitsandbytes' create_normal_map; Dettmers et al. 2023, appendix E, has its numbers,
    which are not those of the paper's equation 4, the means of neighbouring quantiles.
    """
    from scipy.special import ndtri  # where it is used: it takes longer to import than NumPy

    quantiles = [ndtri(_spaced(0.9677083, 0.5, k)[:-1].astype(np.float64)) for k in (8, 9)]
    values = np.sort(np.concatenate([-quantiles[0], [0], quantiles[1]])).astype(F32)
    values /= values[-1]
    values.setflags(write=False)
    return values


@cache
def dynamic_values() -> Array:
    """t = 0, 1 and ± 10ᵉ⁻⁶ cᵢ for e = 0 … 6, where c are the middles of 2ᵉ equal parts of [0.1, 1].

    256 values in order, all in float32: each decade has twice as many as the one below.

    Shapes: -> t (256,).
    Source: Dettmers 2015, "8-Bit Approximations for Parallelism in Deep Learning";
    bitsandbytes' create_dynamic_map.
    """
    decades = []
    for e in range(7):
        ends = _spaced(0.1, 1, 2**e + 1)
        decades.append(F32(10.0 ** (e - 6)) * ((ends[:-1] + ends[1:]) / F32(2)))
    c = np.concatenate(decades)
    values = np.sort(np.concatenate([-c, [F32(0)], c, [F32(1)]]))
    values.setflags(write=False)
    return values


def nearest(v: Array, t: Array) -> Array:
    """q = the number of midpoints of t below v: the nearest value's index, of two the lower.

    Shapes: v (k,), t (l,) -> q (k,).
    """
    q: Array = np.searchsorted((t[:-1] + t[1:]) / F32(2), v)
    return q.astype(np.uint8)


def quantize_dynamic(v: Array, block: int = 256, points: int | None = 2**16) -> tuple[Array, Array]:
    """q = nearest(g(v / absmax), t), t the dynamic values, g the nearest of equally spaced points.

    absmax = max |v| of a block; a block of zeros has code 0. bitsandbytes' CPU looks codes up in a
    table of 65,536 points from -1 to 1, and a value that lies nearer to 0 than half their distance
    is never found, 0 itself included. ``points=None`` takes the nearest value instead: g(z) = z.
    With Δ the widest gap of t: |v - ṽ| ≤ absmax (Δ/2 + 1 / (points - 1) + 12 u).

    Shapes: v (k,) -> q (k,), absmax (k/block,).
    """
    blocks = _padded(v, block)
    absmax = abs(blocks).max(-1)
    unit = (blocks * _inverse(absmax)[:, None]).clip(-1, 1)
    if points is not None:
        half = ((unit + F32(1)) * F32(0.5)).astype(np.float64)  # exact below, then rounded once
        i = (half * (points - 1) + 0.5).astype(F32).astype(np.int64)
        unit = F32(-1) + F32(2) * i.astype(F32) / F32(points - 1)
    q = np.where(absmax[:, None] == 0, 0, nearest(unit, dynamic_values()))
    return q.astype(np.uint8).reshape(-1)[: v.size], absmax


def dequantize_dynamic(q: Array, absmax: Array, block: int = 256) -> Array:
    """ṽ = t[q] absmax, in float32.

    Shapes: q (k,), absmax (k/block,) -> ṽ (k,).
    """
    v: Array = dynamic_values()[q] * absmax.repeat(block)[: q.size]
    return v


def _padded(v: Array, block: int) -> Array:
    """The numbers as rows of one block each, the last padded with zeros."""
    rows = np.zeros((-(-v.size // block), block), v.dtype)
    rows.reshape(-1)[: v.size] = v
    return rows


LEAST = F32(1e-38)
"""The least number that NF4 divides a block by."""


def quantize_nf4(
    W: Array, block: int = 64, double: bool = False, offset: Any = None, points: int | None = 2**16
) -> Quantized:
    """q = nearest(w / absmax, t), absmax = max |w| of a block, t the 16 values of NF4.

    Blocks run through the rows on end; the last may be short. In float32, as w times 1 / absmax,
    but in a short block w / absmax. Codes are packed by :func:`pack`, an odd last one with that of
    0. With Δ the widest gap of t: |w - w̃| ≤ absmax (Δ/2 + 4 u) before rounding to W's dtype.

    ``double``: absmax minus its mean, the ``offset``, goes through :func:`quantize_dynamic`.
    PyTorch sums that mean in float32, in an order that depends on how many threads it has: hand in
    its offset to have its bits. ``None`` is the mean rounded to float32. |w - w̃| grows by the error
    of absmax.

    Shapes: W (m, n) -> codes (m*n/2,), absmax (m*n/block,), nested (m*n/block/256,), offset ().
    Errors: ValueError or TypeError if W is no finite weight of floats, or the block is odd.
    Source: Dettmers et al. 2023, equations 1 and 2 and "double quantization", section 3.
    """
    _checked(W, block, 2, whole=False)
    w = _float32(W).reshape(-1)
    blocks = _padded(w, block)
    absmax = abs(blocks).max(-1)
    short = w.size % block > 0
    if short:
        absmax[-1] = max(absmax[-1], LEAST)
    divisor = np.maximum(absmax, LEAST)[:, None]
    unit = blocks * (1 / divisor)
    if short:
        unit[-1] = blocks[-1] / divisor[-1]
    codes = pack(nearest(unit.reshape(-1)[: w.size + w.size % 2], nf4_values()))
    dtype = W.dtype if W.dtype in NARROW else np.dtype(F32)
    if not double:
        return Quantized("nf4", W.shape, dtype, block, codes, {"absmax": absmax})
    mean = F32(math.fsum(absmax.tolist()) / absmax.size if offset is None else offset)
    small, nested = quantize_dynamic(absmax - mean, points=points)
    constants = {"absmax": small, "nested": nested, "offset": np.asarray(mean)}
    return Quantized("nf4-double", W.shape, dtype, block, codes, constants)


def nf4_absmax(q: Quantized) -> Array:
    """The absmax of each block: t[q] nested + offset with double quantization.

    Shapes: -> a (m*n/block,).
    """
    absmax = q.constants["absmax"]
    if q.scheme == "nf4":
        return absmax
    expanded: Array = dequantize_dynamic(absmax, q.constants["nested"]) + q.constants["offset"]
    return expanded


def dequantize_nf4(q: Quantized) -> Array:
    """w̃ = t[q] absmax, in float32, then rounded to W's dtype.

    Shapes: -> W̃ (m, n).
    Source: Dettmers et al. 2023, equation 6.
    """
    size = math.prod(q.shape)
    W: Array = nf4_values()[unpack(q.codes)[:size]] * nf4_absmax(q).repeat(q.block)[:size]
    return W.reshape(q.shape).astype(q.dtype)


@dataclass(frozen=True)
class Scheme:
    """How a weight is quantized and dequantized; ``block``: the format's fixed size, or None."""

    quantize: Callable[..., Quantized]
    dequantize: Callable[[Quantized], Array]
    block: int | None = None


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        f"int{bits}{name}": Scheme(
            partial(quantize_affine, bits=bits, symmetric=symmetric), dequantize_affine
        )
        for bits in (8, 4)
        for name, symmetric in (("", False), ("-symmetric", True))
    }
    | {
        "q8_0": Scheme(quantize_q8_0, dequantize_q8_0, 32),
        "q4_0": Scheme(quantize_q4_0, dequantize_q4_0, 32),
        "q4_1": Scheme(quantize_q4_1, dequantize_q4_1, 32),
        "nf4": Scheme(quantize_nf4, dequantize_nf4),
        "nf4-double": Scheme(partial(quantize_nf4, double=True), dequantize_nf4),
    }
)
"""Every scheme by its name."""


def quantize(W: Array, scheme: str, block: int | None = None) -> Quantized:
    """W quantized by the scheme of that name; the block size defaults to the scheme's.

    Shapes: W (m, n) -> Quantized.
    Errors: ValueError if the scheme is unknown, its block is another, or W is not what it takes.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r}: expected one of {', '.join(SCHEMES)}")
    how = SCHEMES[scheme]
    if how.block is None:
        return how.quantize(W) if block is None else how.quantize(W, block=block)
    if block not in (None, how.block):
        raise ValueError(f"block of {block}: expected {how.block}, which {scheme} fixes")
    return how.quantize(W)


def dequantize(q: Quantized) -> Array:
    """The weight W̃ of q.

    Shapes: -> W̃ (m, n).
    """
    return SCHEMES[q.scheme].dequantize(q)


def requantize(q: Quantized, W: Array) -> Quantized:
    """W rounded to q's dtype and quantized with q's scheme and block.

    Shapes: W (m, n) -> Quantized.
    """
    return quantize(W.astype(q.dtype), q.scheme, q.block)


def _expanded(q: Quantized, *others: Array) -> Array:
    """W̃ in the common dtype of it and the others, which holds the same numbers."""
    W = dequantize(q)
    return W.astype(np.result_type(W, *others))


def qlora_linear(
    x: Array, q: Quantized, b: Array | None, A: Array, B: Array, s: Any, K: Array | None = None
) -> tuple[Array, Back]:
    """y = W̃ x + b + s B A (K ∘ x), W̃ = dequantize(q): LoRA on the dequantized weight.

    dx, dA and dB are :func:`lora_linear`'s, bit for bit. ``back`` keeps q instead of W̃: it
    dequantizes q and runs forward again, so that no float array of W's size is kept in between.

    Shapes: x (n, t), q (m, n), b (m, 1), A (r, n), B (m, r), s (), K (n, t) -> y (m, t).
    Source: Dettmers et al. 2023, equation 5.
    """

    def run() -> tuple[Array, Back]:
        return lora_linear(x, _expanded(q, x, A), b, A, B, s, K)

    y, _ = run()

    def back(dy: Array) -> tuple[Array, Array, Array]:
        _, back_y = run()
        gradients: tuple[Array, Array, Array] = back_y(dy)
        return gradients

    return y, back


def merge_onto_original(W: Array, A: Array, B: Array, s: Any, dtype: Any) -> Array:
    """W' = W + s B A on the original weight, rounded once to ``dtype``.

    This is not the trained function: it differs by (W - W̃) x, which the adapter has learnt to
    compensate. In return the base has no quantization error.

    Shapes: W (m, n), A (r, n), B (m, r), s () -> W' (m, n).
    """
    return merge_weight(W.astype(np.result_type(W, A)), A, B, s).astype(dtype)


def merge_onto_dequantized(q: Quantized, A: Array, B: Array, s: Any) -> Array:
    """W' = W̃ + s B A on the dequantized weight: the function that was trained.

    It has the factors' dtype, and so takes the memory of the full weight.

    Shapes: q (m, n), A (r, n), B (m, r), s () -> W' (m, n).
    """
    return merge_weight(_expanded(q, A), A, B, s)


def norm(M: Array) -> float:
    """‖M‖, Frobenius, in float64.

    Shapes: M (m, n) -> ().
    """
    wide = M.astype(np.float64)
    return math.sqrt((wide * wide).sum())


def merge_errors(W: Array, q: Quantized, A: Array, B: Array, s: Any) -> dict[str, float]:
    """How far each way to merge is from the trained function T = W̃ + s B A, relative to ‖T‖.

    "adapter": ‖s B A‖, for comparison; "onto original": in W's dtype; "onto dequantized": in W's
    dtype, one rounding; "re-quantized": T in q's scheme again.

    Shapes: W (m, n), q (m, n), A (r, n), B (m, r), s () -> {name: ()}.
    """
    trained = merge_onto_dequantized(q, A.astype(np.float64), B.astype(np.float64), s)
    apart = {
        "adapter": _expanded(q, trained),
        "onto original": merge_onto_original(W, A, B, s, W.dtype),
        "onto dequantized": trained.astype(W.dtype),
        "re-quantized": dequantize(requantize(q, trained)),
    }
    return {name: norm(M - trained) / norm(trained) for name, M in apart.items()}
