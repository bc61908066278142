"""The dtypes under test, and how an implementation computes in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""The dtypes under test, widest first."""


@dataclass(frozen=True)
class Precision:
    """How an implementation computes: the dtype of what it stores and of its running sums."""

    storage: str
    accumulation: str
