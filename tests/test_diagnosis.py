"""A deviation that the catalogue knows gets its name, and what it does not know gets none."""

from dataclasses import replace

import pytest

from minilora.verify import engine, misreadings
from minilora.verify.checks import CHECKS
from minilora.verify.misreadings import MISREADINGS
from minilora.verify.misreadings.plain import Plain, but, then
from minilora.verify.selftest import names
from minilora.verify.terms import STRUCTURE

BY_ID = {check.id: replace(check, smallest=None) for check in CHECKS}
CATALOGUE = {m.id: m for m in MISREADINGS if not m.equivalent}

# One of each level and family; the self-test takes all.
SOME = (
    "scale-alpha",
    "scale-off-10-ppm",
    "dropout-on-base",
    "merge-no-scale",
    "unmerge-nothing",
    "optimizer-betas-swapped",
    pytest.param("block-no-types", marks=pytest.mark.slow),  # of whole models
)


def only(check, make):
    """The status of one check, and the misreadings that it is explained by."""
    (result,) = engine.run([BY_ID[check]], make(), profile="quick", dtypes=["float32"]).results
    return result.status, tuple(d for d in result.diagnosis if not d.id.startswith(STRUCTURE))


@pytest.mark.parametrize("id", SOME)
def test_a_misreading_is_named(id):
    assert names(CATALOGUE[id])[0] == id


def test_a_misreading_that_raises_explains_nothing_and_hinders_no_other(monkeypatch):
    raising = replace(CATALOGUE["scale-squared"], make=but(s=lambda my, c: c.no_such_name))
    known = (raising, CATALOGUE["scale-alpha"])
    monkeypatch.setattr(misreadings, "MISREADINGS", known)
    assert names(CATALOGUE["scale-alpha"]) == ("scale-alpha",)
    assert names(raising) == ()


def test_what_is_right_gets_no_name():
    assert only("linear.vjp", Plain) == ("pass", ())


def test_a_deviation_that_is_not_in_the_catalogue_gets_no_name():
    assert only("linear.vjp", then(s=lambda s, c: 1.37 * s)) == ("fail", ())


def test_two_faults_at_once_get_no_name_of_one():
    both = but(s=lambda my, c: 1.37 * c.alpha, dB=lambda my, c: 0 * c.B)
    assert only("linear.vjp", both) == ("fail", ())


def test_the_report_says_the_name_the_formula_and_where_it_was_seen():
    report = engine.run(
        [BY_ID["linear.forward"]], CATALOGUE["scale-alpha"].make(), dtypes=["float32"]
    )
    assert "DIAGNOSIS  scale-alpha: s = α. Seen in mlx-vlm 841" in report.text()
    (entry,) = report.to_json()["results"][0]["diagnosis"]
    assert entry.keys() == {"id", "sentence", "residual_z"}
    assert entry["id"] == "scale-alpha"
    right = engine.run([BY_ID["linear.forward"]], Plain(), dtypes=["float32"])
    assert "DIAGNOSIS" not in right.text()
