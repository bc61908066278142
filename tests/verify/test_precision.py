"""Operands of several dtypes: what is declared, and how far rounding may carry each answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ml_dtypes import bfloat16

from minilora.verify import engine
from minilora.verify.checks.precision import draw, pairs
from minilora.verify.checks.registry import CHECKS
from minilora.verify.core.dtypes import Precision
from minilora.verify.core.errors import LoadError
from minilora.verify.core.fixed import FREE
from minilora.verify.core.inputs import sigmas, wanted
from minilora.verify.core.mixture import Mixture
from minilora.verify.core.types import Case
from minilora.verify.implementation.minilora_impl import Minilora

ON_HALF = {"x": "bfloat16", "W": "bfloat16", "adapters": "float32"}
CAST = {"x": "float32", "W": "float32", "adapters": "float32", "autocast": "bfloat16"}


def case(check="precision.vjp", number=0):
    return Case(check, "bfloat16", number, 0, FREE)


def statuses(target, *names):
    checks = [check for check in CHECKS if check.id in names]
    report = engine.run(checks, target, dtypes=["bfloat16"], profile="quick")
    return [result.status for result in report.results]


def test_who_declares_no_mixture_is_not_asked():
    class Plain(Minilora):
        mixed = ()

    assert statuses(Plain(), "precision.vjp", "precision.digits") == ["skip", "skip"]
    assert statuses(Minilora(), "precision.vjp", "precision.digits") == ["pass", "pass"]


def test_gradients_of_adapters_keep_their_digits_on_a_half_base():
    """The bounds of dA and dB are float32's, that of y is bfloat16's; under autocast all are."""
    for entry, fine in ((ON_HALF, True), (CAST, False)):
        mixture = Mixture.of(entry, "")
        layer = draw(case(), mixture, "")
        bounds, want = mixture.sigmas(layer), wanted(layer)
        whole = sigmas(layer, Precision("bfloat16", "float32"))
        for name in ("dA", "dB"):
            relative = np.median(bounds[name] / np.abs(want[name]))
            assert (relative < 2.0**-20) == fine
        assert np.median(bounds["y"] / whole["y"]) > 0.3


def test_rounding_adapters_to_the_base_s_dtype_changes_every_answer_that_cancels():
    """In float32 it is exact; in half of it, the pairs of ranks cancel altogether."""
    layer = pairs(case("precision.digits"), Mixture.of(ON_HALF, ""))
    y = np.float32(layer.alpha / layer.r) * (np.float32(layer.x) @ layer.A.T @ layer.B.T)
    assert (y == wanted(layer)["y"]).all()
    assert (y.astype(bfloat16) == y).all()
    assert y.any()
    A = layer.A.astype(bfloat16).astype(np.float32)
    assert not (np.float32(layer.x) @ A.T @ layer.B.T).any()


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ("bfloat16", "'mixed' is a str, expected a list"),
        ([{"x": "bfloat16"}], "expected a dict with x, W, adapters"),
        ([ON_HALF | {"y": "int8"}], "y = int8; expected some of"),
        ([ON_HALF | {"A": "float32"}], "A = float32; expected some of"),
    ],
)
def test_what_is_no_mixture_is_refused_in_plain_words(declared, says):
    class Declares(Minilora):
        mixed = declared

    with pytest.raises(LoadError, match=says):
        statuses(Declares(), "precision.vjp")


def test_a_cast_of_operands_counts_in_the_bound():
    """float32 numbers that are cast to bfloat16 first are off by its unit roundoff."""
    layer = draw(case(), Mixture.of(CAST, ""), "")
    given = Mixture.of(CAST, "").sigmas(layer)
    held = {n: getattr(layer, n).astype(bfloat16) for n in ("x", "W", "A", "B", "dy")}
    cast = Mixture.of(CAST, "").sigmas(replace(layer, **held))
    assert (given["dA"] > cast["dA"]).all()
