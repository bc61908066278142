"""What the recipes of docs/contributing.md add, added: each in as few places as they say."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest

from minilora.cli.main import main
from minilora.verify import engine, mutants, selftest
from minilora.verify.checks import registry
from minilora.verify.core.errors import LoadError
from minilora.verify.core.inputs import draw_layer, limits, sigmas, wanted
from minilora.verify.core.level import Level
from minilora.verify.core.types import Case, Check, Comparison, counter
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.minilora_impl import Minilora
from minilora.verify.loading import load
from minilora.verify.mutants import mutant
from minilora.verify.mutants.linear import LINEAR
from minilora.verify.mutants.mutant import Mutant
from minilora.verify.peers import PEERS
from minilora.verify.peers.peer import Peer
from minilora.verify.plan import levels_of
from minilora.verify.vectors import files, vectors

# A level: its module (here these lines), its place in LEVELS, and a mutant.


def doubled(subject: GuardedImplementation, case: Case) -> Iterator[Comparison]:
    """With s B doubled, what the adapter adds to y is doubled."""
    layer, exact = draw_layer(case)
    options = layer.options() | {"alpha": 2 * layer.alpha}
    answer = subject.call("lora_linear", layer.x, layer.W, layer.A, layer.B, **options)
    y = subject.answer(answer, "y", layer.shapes()["y"], case.dtype)
    base = layer.x.astype(float) @ layer.W.astype(float).T
    want = 2 * wanted(layer)["y"] - base
    sigma = None if exact else 2 * sigmas(layer, subject.precision(case.dtype))["y"]
    yield Comparison("y", y, want, sigma, limits(layer, "y"))


LEVEL = Level(
    "toy",
    (
        Check(
            "toy.doubled",
            "toy",
            ("lora_linear",),
            "With s doubled, what the adapter adds to y is doubled.",
            doubled,
            counter({"quick": 4, "ci": 8, "nightly": 16}),
        ),
    ),
    vectors={"doubled": (("bfloat16", 0), ("float32", 1))},
)


class Halved(Minilora):
    def lora_linear(self, *arrays: np.ndarray, alpha: float, **options: object) -> np.ndarray:
        return super().lora_linear(*arrays, alpha=alpha / 2, **options)


MUTANT = Mutant("toy-halved", "toy", "toy", "s/2", (), Halved, "toy.doubled")


def with_toy(monkeypatch) -> list[Check]:
    """The checks, with those of the toy level."""
    checks = [*registry.CHECKS, *registry.assembled([LEVEL])]
    monkeypatch.setattr(registry, "CHECKS", tuple(checks))
    monkeypatch.setattr(mutants, "MUTANTS", (*mutants.MUTANTS, MUTANT))
    for module in (registry, vectors, files):
        monkeypatch.setattr(module, "LEVELS", (*registry.LEVELS, LEVEL))
    monkeypatch.setattr(vectors, "CHECKS", tuple(checks))
    return checks


def test_a_level_is_one_value_that_run_diagnosis_and_report_read(monkeypatch):
    checks = with_toy(monkeypatch)
    assert levels_of(checks)[-1] == "toy"
    report = engine.run(checks, Minilora(), levels=["toy"], dtypes=["float64", "float32"])
    assert [(r.check, r.level, r.status) for r in report.results] == 2 * [
        ("toy.doubled", "toy", "pass")
    ]
    (result,) = engine.run(checks, Halved(), levels=["toy"], dtypes=["float32"]).results
    assert result.status == "fail"
    assert [d.id for d in result.diagnosis] == ["toy-halved"]


def test_a_level_has_a_profile_and_a_case_of_each_lane(monkeypatch):
    (check,) = registry.assembled([LEVEL])
    assert [check.cases("quick", d) for d in ("float64", "float32")] == [0, 4]
    assert check.cases("ci", "float64") == 8
    assert LEVEL.is_exact(check.id, 0)
    assert not LEVEL.is_exact(check.id, 1)


def test_a_level_has_vectors(monkeypatch):
    with_toy(monkeypatch)
    made = vectors.vectors(levels=["toy"])
    assert [vector.id for vector in made] == ["toy.doubled-bfloat16-0", "toy.doubled-float32-1"]
    assert all(vector.method == "lora_linear" and vector.outputs for vector in made)


def test_the_self_test_puts_the_mutants_of_a_level_to_it(monkeypatch):
    checks = with_toy(monkeypatch)
    monkeypatch.setattr(selftest, "_checks", lambda: {check.id: check for check in checks})
    assert selftest.catch(MUTANT, "float32") == ("toy.doubled", "")
    right = Mutant("toy-right", "toy", "toy", "s", (), Minilora, "toy.doubled", equivalent=True)
    assert selftest.catch(right, "float32") == ("", "")


# A mutant: a line of a table.

TABLE = {"linear.forward": [("scale-3", "s = 3", {"ds = s": "ds = s = 3.0"}, "toys 1")]}


@pytest.mark.slow
def test_a_mutant_is_one_line_that_selftest_and_diagnosis_read(monkeypatch):
    (m,) = mutant.mutants(LINEAR, "TOY", TABLE)
    assert (m.id, m.family, m.level, m.seen) == ("toy-scale-3", "TOY", "linear", ("toys 1",))
    assert selftest.catch(m, "float32") == ("linear.forward", "")
    monkeypatch.setattr(mutants, "MUTANTS", (*mutants.MUTANTS, m))
    assert selftest.names(m)[0] == m.id


# A peer: its value, and a class with the contract's methods (here this file's).


class ToyLibrary:
    def lora_linear(self, x, W, A, B, *, alpha, r, bias=None, **settings):
        if settings:
            raise NotImplementedError(f"no settings {', '.join(settings)}")
        return Minilora().lora_linear(x, W, A, B, alpha=alpha, r=r, bias=bias)


PEER = Peer("toy", f"{__name__}:ToyLibrary", ("numpy",), "toys", ("linear",), ("float32",))
PEER.describes(ToyLibrary)


def test_a_peer_is_one_value_that_verify_reads(monkeypatch, capsys):
    monkeypatch.setitem(PEERS, "toy", PEER)
    assert main(["verify", "toy", "--in-process", "--level", "linear", "--profile", "quick"]) == 0
    assert f"toy {version('numpy')}" in capsys.readouterr().out
    absent = replace(PEER, implementation="no_such_library:ToyLibrary")
    monkeypatch.setitem(PEERS, "toy", absent)
    with pytest.raises(LoadError, match=r"no_such_library .*minilora\[toys\]"):
        load("toy")
