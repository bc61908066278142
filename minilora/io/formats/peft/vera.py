"""VeRA's A and B, which all modules share: as PEFT draws them, and each module's part of them."""

from pathlib import Path
from typing import Any

import numpy as np

from minilora.io.errors import FormatError
from minilora.spec.initialization import draw_vera
from minilora.spec.lora import Weights
from minilora.spec.ops import Array
from minilora.spec.target_modules import ResolvedTargets


class _TorchsDraws:
    """What PyTorch's generator on a CPU draws, in the one form that is needed of NumPy's."""

    def __init__(self, key: int) -> None:
        self.bits = np.random.RandomState(key % 2**32)

    def uniform(self, low: float, high: float, shape: tuple[int, int]) -> Array:
        """(hi - lo) u / 2²⁴ + lo, u the last 24 bits of 32 drawn; hi, lo, hi - lo in float32."""
        lo, hi = np.float32(low), np.float32(high)
        u = self.bits.randint(0, 2**32, shape, np.uint32) % 2**24 / 2**24
        drawn: Array = (u * np.float64(hi - lo) + np.float64(lo)).astype(np.float32)
        return drawn


def vera_projections(key: int, r: int, m: int, n: int) -> tuple[Array, Array]:
    """VeRA's A (r, n) and B (m, r) in float32, as PEFT draws them from ``projection_prng_key``.

    PyTorch seeds a Mersenne Twister, as NumPy's older generator does, by the key's last 32 bits.

    Source: PEFT 0.21, ``_init_vera_A_vera_B``, and PyTorch 2 on a CPU, whose order this is.
    """
    rng: Any = _TorchsDraws(key)
    return draw_vera(rng, r, m, n)


def shared_shape(targets: ResolvedTargets) -> tuple[int, int]:
    """The greatest m and n of the adapted modules."""
    m, n = (max(sizes) for sizes in zip(*targets.shape.values(), strict=True))
    return m, n


def split_projections(A: Array, B: Array, targets: ResolvedTargets) -> Weights:
    """Each module's part of the shared A and B."""
    return {
        name: part
        for at, (m, n) in targets.shape.items()
        for name, part in ((f"{at}.A", A[:, :n]), (f"{at}.B", B[:m]))
    }


def join_projections(folder: Path, W: Weights, targets: ResolvedTargets) -> Weights:
    """The shared A and B of which each module has a part.

    Errors: FormatError if a module has others.
    """
    wide = max(targets.shape, key=lambda at: targets.shape[at][1])
    high = max(targets.shape, key=lambda at: targets.shape[at][0])
    A, B = W[f"{wide}.A"], W[f"{high}.B"]
    for name, part in split_projections(A, B, targets).items():
        if not np.array_equal(W[name], part):
            remedy = "they are drawn once and stay as they are: adapt the base again"
            expected = f"parts of those of {wide} and {high}"
            at = name.rpartition(".")[0]
            raise FormatError(folder, f"A and B of {at}", "others", expected, remedy)
    return {"A": A, "B": B}
