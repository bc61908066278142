"""What an implementation has fixed, and what it lacks: cases are drawn to fit."""

from __future__ import annotations

import numpy as np
import pytest

from minilora.verify import check, engine
from minilora.verify.checks.registry import CHECKS
from minilora.verify.core.errors import LoadError, Skip
from minilora.verify.core.fixed import FREE, Fixed
from minilora.verify.core.types import Case
from minilora.verify.diagnosis.answers import Direct
from minilora.verify.implementation.minilora_impl import Minilora, MiniloraSession

BY_ID = {each.id: each for each in CHECKS}


class WithoutScale:
    """y = W x + b + B A x, as a layer that takes neither alpha nor r."""

    fixed = {"alpha": "r"}  # noqa: RUF012
    factor = 1

    def lora_linear(self, x, W, A, B, *, bias=None):
        y = x @ W.T + self.factor * (x @ A.T @ B.T)
        return y if bias is None else y + bias

    def merge(self, W, A, B, *, fan_in_fan_out=False):
        return W + self.factor * (B @ A)


def statuses(target, *checks, **options):
    options = {"dtypes": ["float64"]} | options
    report = engine.run([BY_ID[name] for name in checks], target, **options)
    return [result.status for result in report.results]


SCALE_FREE = ("linear.forward", "linear.forward.bias", "linear.symmetry", "merge.weight.conv1d")


@pytest.mark.slow
def test_a_layer_without_a_scale_is_asked_all_that_it_has():
    assert statuses(WithoutScale(), *SCALE_FREE) == ["pass"] * 4
    lacking = ("linear.forward.dropout", "linear.forward.rslora", "merge.weight.rslora")
    assert statuses(WithoutScale(), *lacking) == ["skip"] * 3
    # Several settings at once are drawn without those that it lacks.
    assert statuses(WithoutScale(), "linear.forward.all") == ["pass"]
    wrong = WithoutScale()
    wrong.factor = 2
    assert statuses(wrong, *SCALE_FREE, "linear.forward.all") == [
        *("fail", "fail", "pass", "fail", "fail"),
    ]


@pytest.mark.slow
def test_a_layer_that_takes_no_alpha_has_to_say_so():
    class Silent(WithoutScale):
        fixed = {}  # noqa: RUF012

    report = check(Silent(), levels=["linear"], dtypes=["float64"])
    assert report.exit_status == 3
    assert all(
        'declare fixed = {"alpha": "r"}' in r.reason
        for r in report.results
        if "method" not in r.reason
    )


class Few(Minilora):
    """Two ranks, one alpha, one adapter; whatever else it is asked is an error."""

    fixed = {"alpha": 16, "r": [4, 8], "adapters": 1}  # noqa: RUF012
    dtypes = ("float64",)

    def _layer(self, x, W, A, B, *, alpha, r, **options):
        assert alpha == 16
        assert r in (4, 8)
        return super()._layer(x, W, A, B, alpha=alpha, r=r, **options)

    def combine(self, adapters, weights, **settings):
        (adapter,) = adapters
        assert adapter["alpha"] == 16
        return super().combine(adapters, weights, **settings)

    def multi_adapter(self, x, W, adapters, index):
        assert len(adapters) == 1
        assert set(index) <= {-1, 0}
        return super().multi_adapter(x, W, adapters, index)

    def session(self, layer):
        return OneAdapter(layer)

    def init(self, W, *, r, alpha, **settings):
        assert r in (4, 8)
        assert alpha == 16
        return super().init(W, r=r, alpha=alpha, **settings)


class OneAdapter(MiniloraSession):
    def add(self, name, adapter):
        assert not self.layer.adapters
        assert adapter["alpha"] == 16
        assert adapter["r"] in (4, 8)
        super().add(name, adapter)


@pytest.mark.slow
def test_cases_are_drawn_to_fit_ranks_an_alpha_and_one_adapter():
    checks = (
        *("linear.vjp", "linear.balance", "merge.unmerge", "variants.dora.vjp", "combine.single"),
        *("multi.forward", "multi.single", "init.distribution", "init.pissa", "init.zero-B"),
        *("lifecycle.random-steps", "lifecycle.scale", "lifecycle.weight", "lifecycle.gradients"),
        *("lifecycle.rounding", "lifecycle.save", "lifecycle.modules-to-save"),
    )
    assert set(statuses(Few(), *checks)) == {"pass"}
    assert statuses(Few(), "combine.order", "multi.unused-adapter") == ["skip"] * 2


def test_a_wrong_session_of_one_adapter_is_caught_and_shrunk():
    class MergesTwice(OneAdapter):
        def merge(self):
            super().merge()
            W = self.layer.stored()
            self.weight = lambda: W + 1

    class Wrong(Few):
        def session(self, layer):
            return MergesTwice(layer)

    assert statuses(Wrong(), "lifecycle.weight") == ["fail"]


def test_inputs_are_those_of_before_where_nothing_is_fixed():
    case = Case("linear.vjp", "float64", 3, 0)
    assert case == Case("linear.vjp", "float64", 3, 0, FREE)
    assert FREE.fitting("linear.forward.all", {"bias": True}) == {"bias": True}
    assert FREE.exact(5) == (5, None)


@pytest.mark.parametrize(
    ("declared", "wrong"),
    [
        ({"alpha": "s"}, "alpha"),
        ({"alpha": 0}, "alpha"),
        ({"r": []}, "r"),
        ({"r": 0}, "r"),
        ({"adapters": 2}, "adapters"),
        ({"bias": True}, "bias"),
        ({"rank": 4}, "rank"),
    ],
)
def test_what_cannot_be_fixed_is_refused_in_plain_words(declared, wrong):
    with pytest.raises(LoadError, match=rf"fixed\['{wrong}'\] is .*; expected"):
        Fixed.of(declared, "mine")


def test_a_rank_and_a_scale_of_the_exact_lane():
    assert Fixed.of({"alpha": "r"}, "").exact(5) == (4, 1.0)
    assert Fixed.of({"alpha": 16}, "").exact(2) == (4, 4.0)
    assert Fixed.of({"r": [6, 8]}, "").exact(2) == (8, None)
    with pytest.raises(Skip, match="r fixed to"):
        Fixed.of({"r": 6}, "").exact(2)


def test_a_call_beyond_what_is_fixed_is_a_skip():
    subject = Direct(Few())
    x = np.ones((1, 2))
    with pytest.raises(Skip, match="alpha is 3 with rank 4"):
        subject.call("lora_linear", x, x, np.ones((4, 2)), np.ones((1, 4)), alpha=3.0, r=4)
    with pytest.raises(Skip, match="the rank is 5"):
        subject.call("lora_linear", x, x, np.ones((5, 2)), np.ones((1, 5)), alpha=16.0, r=5)
