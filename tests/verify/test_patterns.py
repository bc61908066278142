"""What is said of a deviation that no known mutant explains, and that nothing is invented."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest

from minilora.verify import engine, mutants
from minilora.verify.checks.registry import CHECKS, LEVELS
from minilora.verify.core.types import Case, Comparison
from minilora.verify.diagnosis import patterns
from minilora.verify.diagnosis.answers import Direct, answers
from minilora.verify.mutants.linear import LINEAR
from minilora.verify.mutants.mutant import Reference
from minilora.verify.mutants.optimizer import OPTIMIZER
from minilora.verify.mutants.references.helpers import digits
from minilora.verify.mutants.references.linear import Linear
from minilora.verify.report.words import only_words


def level_of(check_id):
    return next(level for level in LEVELS if check_id.startswith(f"{level.name}."))


def said(make, check_id, dtype="float32"):
    """The sentences of the structure of one check's cases."""
    check = BY_ID[check_id]
    level = level_of(check_id)
    numbers = level.cases or range(check.cases("ci", dtype))
    cases = [Case(check_id, dtype, number, 0) for number in numbers]
    subject = Direct(make())
    found = patterns.describe(level, cases, [answers(check, subject, case) for case in cases])
    assert all(each.id.startswith("structure-") for each in found)
    return [each.sentence for each in found]


def added(f):
    return Reference((Linear,), {"f": f}).edited({"# output": "y = y + f(x, W)"})


def one_row_more(x, W):
    return np.outer(np.arange(len(x)) > 1, np.ones(len(W))) * 0.1


def rank_two(x, W):
    rows = np.arange(1.0, len(x) + 1)
    columns = np.arange(1.0, len(W) + 1)
    return 0.1 * (np.outer(rows, columns) + np.outer(rows**2, columns**0.5))


BY_ID = {check.id: check for check in CHECKS}
ROWS = {
    "a scale": (
        LINEAR.edited({"ds = s": "ds = s = alpha / (r + 1)"}),
        "linear.forward",
        [r"y has the scale .*α/\(r \+ 1\)"],
    ),
    "a scale that is off": (
        LINEAR.edited({"ds = s": "ds = s = 1.03 * s"}),
        "linear.forward",
        [r"y has the scale .* 1\.03\d* ± "],
    ),
    "a scale of one gradient": (
        LINEAR.edited({"# gradients": "dB = dB * 1.3"}),
        "linear.vjp",
        [r"dB has the scale .*: that is 1\.[23]\d* ± .* times the correct one"],
    ),
    "columns in another order": (
        LINEAR.edited({"# gradients": "dA = dA[:, np.r_[1, 0, 2 : dA.shape[1]]]"}),
        "linear.vjp",
        [r"dA has its columns in another order: \[1, 0, 2"],
    ),
    "some rows": (
        added(one_row_more),
        "linear.forward",
        [r"y differs in \d+ of \d+ rows \(2, 3.*\) and (\d+) of \1 columns", r"of rank 1, where"],
    ),
    "a rank": (added(rank_two), "linear.forward", [r"differs by a matrix of rank 2, where \d"]),
    "digits": (
        LINEAR.edited({"# output": "y = digits(y, 8)"}),
        "linear.forward",
        [r"y holds bfloat16 numbers: a step before rounds to bfloat16"],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_structure_is_said(name):
    make, at, wanted = ROWS[name]
    sentences = " ".join(said(make, at))
    for pattern in wanted:
        assert re.search(pattern, sentences), sentences


def test_the_first_wrong_step_is_said():
    late = OPTIMIZER.edited({"* direction": "* direction * (1 + 0.001 * (k >= 3))"})
    assert said(late, "optimizer.adamw")[0].startswith("The parameters are wrong from step 4 on")
    early = OPTIMIZER.edited({"* direction": "* direction * 1.0003"})
    assert "from the first step on" in said(early, "optimizer.adamw")[0]


def model_answer(*wrong):
    """A model's answer in which these arrays are wrong."""
    names = ["loss", "logits", *(f"grads['layers.{i}.q.A']" for i in range(3))]
    right = np.arange(4.0)
    return {n: Comparison(n, right + (n in wrong), right, np.full(4, 1e-9)) for n in names}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (("logits", "loss", "grads['layers.0.q.A']"), "The forward is wrong (logits and loss)"),
        (("grads['layers.0.q.A']", "grads['layers.1.q.A']"), "layer 1 is the first with wrong"),
        (("loss",), ""),
        ((), ""),
    ],
)
def test_of_a_model_it_is_said_whether_the_forward_is_wrong_or_which_layer_first(wrong, says):
    found = [sentence for _, sentence in patterns.model_patterns([model_answer(*wrong)])]
    assert (says in found[0]) if says else found == []


def test_how_far_a_step_is_off_is_said_in_parts_of_the_values():
    late = OPTIMIZER.edited({"* direction": "* direction * (1 + 0.001 * (k >= 3))"})
    assert re.search(r"at first by \de-0[56] of their values", said(late, "optimizer.adamw")[0])


def test_what_is_right_has_no_structure():
    assert said(Linear, "linear.vjp") == []


def test_a_report_says_it_where_no_mutant_has_a_name_for_it(monkeypatch):
    monkeypatch.setattr(mutants, "MUTANTS", ())
    make, at, (pattern, *_) = ROWS["some rows"]
    report = engine.run([replace(BY_ID[at], smallest=None)], make(), dtypes=["float32"])
    assert re.search(pattern.replace(" ", r"\s+"), report.text())
    assert "STRUCTURE" in report.text()


def test_of_noise_nothing_is_said():
    def noise(v):
        rng = np.random.default_rng(v.size)
        return v + 0.1 * rng.standard_normal(v.shape)

    make = Reference((Linear,), {"noise": noise}).edited({"# output": "y = noise(y)"})
    assert said(make, "linear.forward") == []


def compared(got, want, sigma=1e-6):
    return Comparison("y", np.asarray(got), np.asarray(want), np.full(np.shape(want), sigma))


def described(*pairs, check_id="merge.weight"):
    answers = [{"y": compared(got, want)} for got, want in pairs]
    cases = [Case(check_id, "float32", i, 0) for i in range(len(pairs))]
    return [(d.id, d.sentence) for d in patterns.describe(level_of(check_id), cases, answers)]


def test_a_factor_is_said_of_all_cases_or_of_each():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 4, 5))
    ((what, sentence),) = described((7 * a, a), (7 * b, b))
    assert what == "structure-factor"
    assert sentence.endswith("times the correct value, in every case.")
    ((_, sentence),) = described((7 * a, a), (3 * b, b))
    assert sentence.startswith("y is a multiple of the correct value: ")
    assert described((0 * a, a), (0 * b, b)) == [("structure-zero", "y is 0.")]


def test_a_transpose_and_an_order_of_rows_are_said():
    a = np.random.default_rng(0).standard_normal((4, 4))
    whats = {what for what, _ in described((a.T, a))}
    assert "structure-transposed" in whats
    ((what, sentence),) = described((a[[2, 0, 1, 3]], a))
    assert (what, sentence) == ("structure-permuted-rows",
                                "y has its rows in another order: [2, 0, 1, 3].")  # fmt: skip
    assert described((a, a)) == []


def test_one_number_has_no_factor_and_truth_values_have_none():
    loss = np.asarray(2.0)
    assert described((22.75 * loss, loss)) == []
    assert described((0 * loss, loss)) == []
    ((what, _),) = described((3 * loss, loss), (3 * np.asarray(5.0), np.asarray(5.0)))
    assert what == "structure-factor"  # two numbers, and the same factor
    assert described((np.zeros(4), np.ones(4))) == []  # names that are not there


def test_the_rank_of_what_is_right_is_the_greatest_that_is_spoken_of():
    rng = np.random.default_rng(0)
    one_token = np.outer(rng.standard_normal(5), rng.standard_normal(7))
    other = np.outer(rng.standard_normal(5), rng.standard_normal(7))
    assert described((one_token + other, one_token)) == []
    full = rng.standard_normal((5, 7))
    assert described((full + other, full)) == [
        (
            "structure-rank",
            "y differs by a matrix of rank 1, where 5 is possible, in merge.weight:float32:0.",
        )
    ]


def test_whole_numbers_that_any_dtype_holds_were_not_rounded():
    want = np.arange(1.0, 101).reshape(4, 25)
    got = want.copy()
    got[2, 3] += 1
    assert not [what for what, _ in described((got, want)) if what == "structure-digits"]
    fine = np.random.default_rng(0).standard_normal((4, 25))
    coarse = digits(fine, 8)
    assert "structure-digits" in {what for what, _ in described((coarse, fine))}


def test_what_is_wrong_beyond_all_bounds_is_no_fault_of_this_package():
    rng = np.random.default_rng(0)
    got, want = rng.standard_normal((2, 4, 5))
    each = compared(1e200 * got, want, sigma=1e-200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patterns.describe(
            level_of("merge.weight"), [Case("merge.weight", "float32", 0, 0)], [{"y": each}]
        )


def test_what_is_accepted_and_should_be_refused_is_told():
    from minilora.verify.mutants.names import NAMES

    lenient = NAMES.edited({'raise ValueError("no such bias")': "pass"})
    assert said(lenient, "names.refused.targets") == [
        "It accepts what should be refused: no such bias."
    ]
    assert said(NAMES.edited({}), "names.refused.targets") == []


def test_what_does_not_act_is_told_to_act_0_times():
    rng = np.random.default_rng(0)
    base, one = rng.standard_normal((2, 5, 4)) * np.array([1.0, 1e-3])[:, None, None]
    wrong = Comparison("y", base, base + one, parts=lambda: {"the base": base, "one": one})
    told = [sentence for _, sentence in patterns.compositions([("case", wrong)])]
    assert told == ["one acts 0 times, expected 1, in case"]


def test_of_many_traits_that_cases_have_in_common_the_first_are_told():
    assert only_words(("a", "b")) == "only where a and b"
    assert only_words(tuple("abcde")) == "what deviates alone has a, b, c and 2 more"
