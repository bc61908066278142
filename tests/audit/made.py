"""Tensors in memory, changes drawn at random, and merges of them: right ones and others."""

import numpy as np

from minilora.audit.change import Change
from minilora.audit.floats import BF16, F16, F32, rounded

DTYPES = (F32, F16, BF16)


class Stored:
    """An array as a tensor of a file."""

    def __init__(self, array, name="t", scheme=None, spacing=None):
        self.array, self.name, self.scheme, self.gap = np.asarray(array), name, scheme, spacing

    @property
    def dtype(self):
        return self.array.dtype

    @property
    def shape(self):
        return self.array.shape

    def rows(self, start, stop):
        return self.array[start:stop]

    def spacing(self, start, stop):
        return None if self.gap is None else self.gap[start:stop]


def cast(x, dtype):
    """x in float64 or float32, rounded to the dtype once."""
    return rounded(np.asarray(x, np.float64), dtype).astype(F32).astype(dtype)


def narrow(x, dtype):
    """The same, still in float32."""
    return np.asarray(x, F32).astype(dtype).astype(F32)


def weight(rng, m, n, dtype, size=0.02):
    return (rng.normal(size=(m, n)) * size).astype(dtype)


def change(rng, m, n, r=8, dtype=F32, size=1e-2, s=2.0, **fields):
    """LoRA's change with entries of about ``size`` times s."""
    A = rng.normal(size=(r, n)).astype(dtype)
    B = (rng.normal(size=(m, r)) * size / r**0.5).astype(dtype)
    config = {"r": r, "lora_alpha": s * r, "use_rslora": False}
    given = {"tensor": "t", "module": "own", "adapter": "A", "scale": s, "config": config}
    return Change(**{**given, "parts": {"A": A, "B": B}, **fields})


def wide(*arrays):
    return [np.asarray(array).astype(np.float64) for array in arrays]


def delta(change):
    """s B A in float64."""
    A, B = wide(change.parts["A"], change.parts["B"])
    return change.s * (B @ A)
