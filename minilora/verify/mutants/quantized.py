"""Mutants of adapters on a weight that is held in few bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from minilora.spec.quantization import Quantized
from minilora.verify.implementation.quantized import QuantizedSession
from minilora.verify.mutants.mutant import Mutant, Reference, Same, Table, equivalents, mutants
from minilora.verify.mutants.references.quantized import QuantizedLayer


def rolled(q: Quantized) -> Quantized:
    """Its codes in another order, as a kernel packs them."""
    return replace(q, codes=np.roll(q.codes, 1, -1))


def in_eval(session: Any, value: Any, other: Any) -> Any:
    """The other in evaluation."""
    return other if getattr(session, "evaluated", False) else value


QUANTIZED = Reference((QuantizedSession, QuantizedLayer), globals())

EVAL = {"def eval(self) -> None:": "def eval(self) -> None:\n        self.evaluated = True"}
"""Remembers that it is in evaluation."""

# fmt: off
TABLE: Table = {
    "quantized.weight": [
        ("eight-bits", "eight bits, whatever was asked for",
         {"quantize(widened(W), scheme)": 'quantize(widened(W), "int8")'}),
        ("never", "a weight that keeps its digits",
         {"return dequantize(self._held).astype(self._dtype)": "return self.kept",
          "self._active = False": "self._active, self.kept = False, W"}),
        ("scale-twice", "blocks scaled by 2",
         {"return dequantize(self._held).astype(self._dtype)":
              "return (2 * dequantize(self._held)).astype(self._dtype)"}),
    ],
    "quantized.forward": [
        ("eval-coarse", "x rounded to half of its digits in evaluation", EVAL |
         {"return self._layer(x)[0]":
              "return self._layer(in_eval(self, x, coarse(x, x.dtype)))[0]"},
         "bitsandbytes 0.50"),
        ("eval-without", "no adapter in evaluation", EVAL |
         {"B if acts else 0 * B": "in_eval(self, B, 0 * B) if acts else 0 * B"}),
        ("bias-lost", "no bias",
         {"widened(self._bias)[:, None]": "0 * widened(self._bias)[:, None]"}),
        ("packed-by-eval", "a forward in evaluation packs the weight in another order", EVAL |
         {"return self._layer(x)[0]":
              "y = self._layer(x)[0]; "
              "self._held = in_eval(self, self._held, rolled(self._held)); return y"},
         "bitsandbytes 0.50"),
    ],
    "quantized.gradients": [
        ("dx-of-base", "dx without the branch",
         {'"dx": dx.T': '"dx": widened(dy) @ dequantize(self._held)'}),
        ("dx-of-codes", "dx by another weight than the forward's",
         {'"dx": dx.T': '"dx": dx.T + widened(dy) @ (dequantize(rolled(self._held)) - '
                        'dequantize(self._held))'}),
        ("dA-zero", "dA = 0", {'"one.A": dA': '"one.A": 0 * dA'}),
        ("dB-unscaled", "dB without s", {'"one.B": dB': '"one.B": dB / s',
                                         "dx, dA, dB = ": "s = self._adapter[2]; dx, dA, dB = "}),
    ],
    "quantized.merge": [
        ("merge-twice", "W̃ + 2 s B A", {"+ s * (B @ A)": "+ 2 * s * (B @ A)"}),
        ("merge-before-quantized", "W + s B A of the weight from before it was quantized",
         {"merged = dequantize(self._held)": "merged = self.kept",
          "self._active = False": "self._active, self.kept = False, widened(W).copy()"},
         "unsloth-zoo 810"),
        ("merge-unscaled", "W̃ + B A", {"+ s * (B @ A)": "+ B @ A"}),
        ("merge-nothing", "W̃", {"+ s * (B @ A)": "+ 0 * (B @ A)"}),
        ("merged-acts-twice", "s B A x beside the merged weight",
         {"acts = self._active and self._held is self._original": "acts = self._active"}),
        ("unmerge-nothing", "unmerging does nothing",
         {'"""The weight that there was."""\n        self._held = self._original':
              '"""The weight that there was."""'}),
    ],
    "quantized.merge-after-forward": [
        ("packed-by-forward", "a forward packs the weight, of which merging knows nothing",
         {"return self._layer(x)[0]":
              "y = self._layer(x)[0]; self.packed = True; return y",
          "merged = dequantize(self._held)":
              'merged = dequantize(rolled(self._held) if hasattr(self, "packed") else self._held)'},
         "bitsandbytes 0.50"),
    ],
}
SAME: Same = [
    ("reference", "minilora's own", {}),
    ("unmerge-by-subtraction", "W' - s B A quantized anew",
     {'"""The weight that there was."""\n        self._held = self._original':
          'A, B, s = self._adapter; back = dequantize(self._held) - s * (B @ A); '
          'self._held = self._original = requantize(self._held, back)'}),
]
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *mutants(QUANTIZED, "QUANTIZED", TABLE),
    *equivalents(QUANTIZED, "quantized", SAME),
)
