"""Adapters on a weight in few bits: what each scheme loses, and the weight that is stood for."""

from __future__ import annotations

import numpy as np
import pytest

from minilora.spec.quantization import SCHEMES as SPECIFIED
from minilora.spec.quantization import dequantize, quantize
from minilora.verify import engine
from minilora.verify.checks.quantized import SCHEMES, Held
from minilora.verify.checks.registry import CHECKS
from minilora.verify.core.types import Case
from minilora.verify.diagnosis.answers import Direct
from minilora.verify.implementation.minilora_impl import Minilora
from minilora.verify.implementation.quantized import QuantizedSession


def statuses(target, *names):
    checks = [check for check in CHECKS if check.id in names]
    report = engine.run(checks, target, dtypes=["float32"], profile="quick")
    return [result.status for result in report.results]


@pytest.mark.parametrize("name", sorted(SCHEMES.keys() & SPECIFIED.keys()))
def test_a_scheme_loses_no_more_than_its_bound_and_much_of_it_at_times(name):
    held = Held.of(
        Direct(Minilora()), Case("quantized.weight", "float32", [*SCHEMES].index(name), 0)
    )
    W = np.random.default_rng(0).standard_normal((64, 192)).astype(np.float32)
    lost = np.abs(dequantize(quantize(W, name)).astype(float) - W) / held.lost(W)
    assert 0.4 < lost.max() <= 1


@pytest.mark.slow
def test_a_target_that_merges_into_the_weight_it_was_given_is_caught():
    class OntoOriginal(QuantizedSession):
        def __init__(self, layer):
            super().__init__(layer)
            self.original = layer["W"]

        def weight(self):
            return self.original

    class Wrong(Minilora):
        def session(self, layer):
            return OntoOriginal(layer)

    assert statuses(Wrong(), "quantized.weight", "quantized.forward") == ["fail", "fail"]
    assert statuses(Minilora(), "quantized.weight", "quantized.forward") == ["pass", "pass"]


def test_a_target_without_such_layers_is_not_asked():
    class Without(Minilora):
        def session(self, layer):
            raise NotImplementedError(layer["kind"])

    assert statuses(Without(), "quantized.merge") == ["skip"]
