"""A right layer whose weight is held in few bits: minilora's own session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from minilora.verify.implementation.quantized import QuantizedSession
from minilora.verify.mutants.references.helpers import HALVES


class QuantizedLayer:
    """It has nothing but sessions with such a layer."""

    name = "reference"
    dtypes: ClassVar = ("float64", "float32", *HALVES)
    precision: ClassVar = {h: {"storage": h, "accumulation": "float32"} for h in HALVES}

    def session(self, layer: Mapping[str, Any]) -> QuantizedSession:
        """A session."""
        if layer["kind"] != "quantized":
            raise NotImplementedError(layer["kind"])
        return QuantizedSession(layer)
