"""RoPE's scaling in GGUF files: a factor for each pair, by which its frequency is divided."""

import math

import numpy as np

from minilora.io.errors import FormatError
from minilora.io.formats.gguf.blocks import Blocks, check_tensor
from minilora.io.formats.gguf.contents import Contents
from minilora.spec.architectures import Llama3, RopeScaling
from minilora.spec.architectures.llama3 import frequencies
from minilora.spec.models import Config
from minilora.spec.ops import Array
from minilora.spec.quantization import F32

FACTORS = "rope_freqs.weight"
"""The tensor of the factors."""

LOW, HIGH, LENGTH = 1.0, 4.0, 8192
"""Llama 3's own numbers, which the factors alone do not tell."""


def scaling_factors(c: Config) -> Array | None:
    """ω / ω' for each pair, or None where RoPE is not scaled.

    Shapes: -> (head_dim/2,).
    """
    if not isinstance(c, Llama3):
        return None
    omega = frequencies(c.head_dim, c.theta)
    factors: Array = (omega / c.scaling.slowed(omega)).astype(F32)
    return factors


def read_scaling(contents: Contents, theta: float, head_dim: int) -> RopeScaling | None:
    """The `RopeScaling` that has the file's factors, or None where it has none.

    The largest factor is `RopeScaling.factor`. The others follow from the length: Llama 3's, or the
    one that the pair nearest to half way tells.

    Errors: FormatError for factors that are not those of a `RopeScaling` with Llama 3's low and
    high, to the rounding of llama.cpp's converter.
    """
    if FACTORS not in contents.tensors:
        return None
    check_tensor(contents, FACTORS, (head_dim // 2,))
    stored = Blocks(contents, FACTORS, (head_dim // 2, 1), np.float64)()[:, 0]
    omega, factor = frequencies(head_dim, theta), float(stored.max())
    if stored.min() >= 1:
        for length in (LENGTH, _length(stored, omega)):
            scaling = RopeScaling(factor, LOW, HIGH, length)
            off = abs(omega / scaling.slowed(omega) - stored)
            if (off <= _rounding(scaling, omega, theta)).all():
                return scaling
    expected = f"those of Llama 3's scaling, with low {LOW:g} and high {HIGH:g}"
    remedy = "no other scaling is read from GGUF: take the model's own folder"
    found = f"factors from {stored.min():g} to {factor:g}"
    raise FormatError(contents.path, FACTORS, found, expected, remedy)


def _length(stored: Array, omega: Array) -> int:
    """What `RopeScaling.slowed` solved for the length, at the pair with m nearest to 1/2.

    Where no pair is between, any length will do that makes the others slow, or leaves them.
    """
    least = min(1 / stored.max(), 0.5)  # factors that are all 1 say nothing of it
    m = (1 / stored - least) / (1 - least)
    lengths = 2 * np.pi * (LOW + m * (HIGH - LOW)) / omega
    between = (m > 0) & (m < 1)
    if between.any():
        return max(1, round(float(lengths[abs(m - 0.5).argmin()])))
    fast, slow = lengths[m >= 1].max(initial=1), lengths[m <= 0].min(initial=2**40)
    return max(1, round(math.sqrt(fast * slow)))


def _rounding(scaling: RopeScaling, omega: Array, theta: float) -> Array:
    """How far the converter's factors, computed in float32, may be from the equation's.

    With unit roundoff u: θ^e has e's rounding, magnified by ln θ, and two more; its inverse, the
    turns and m add one for each operation, m's errors are those of the turns over high - low; and a
    factor f = 1 / ((1 - m) / factor + m) has f times m's, and five more.

    Shapes: ω (d/2,) -> (d/2,).
    """
    u = 2.0**-24
    f = omega / scaling.slowed(omega)
    turns = np.minimum(omega * scaling.length / (2 * np.pi), scaling.high)
    of_turns = turns * (np.log(max(theta, 2.0)) + 6) * u
    of_m = of_turns / (scaling.high - scaling.low) + 2 * u
    bound: Array = f * (f * of_m + 5 * u)
    return bound
