"""A deviation that the catalogue knows gets its name, and what it does not know gets none."""

import operator
import re
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest

from minilora.verify import engine, mutants
from minilora.verify.checks import linear
from minilora.verify.checks.registry import CHECKS
from minilora.verify.core.level import FIRST_CASES
from minilora.verify.core.types import STRUCTURE, Case
from minilora.verify.diagnosis import diagnose, investigation
from minilora.verify.diagnosis.answers import Direct, answers, explains
from minilora.verify.diagnosis.candidates import matched_filter
from minilora.verify.implementation.minilora_impl import Minilora
from minilora.verify.mutants import MUTANTS
from minilora.verify.mutants.linear import LINEAR
from minilora.verify.mutants.module import MODULES
from minilora.verify.mutants.mutant import Reference
from minilora.verify.mutants.references.linear import Linear
from minilora.verify.report.result import NOT_DIAGNOSED
from minilora.verify.selftest import names

BY_ID = {check.id: replace(check, smallest=None) for check in CHECKS}
CATALOGUE = {m.id: m for m in MUTANTS if not m.equivalent}

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


def wrong(old, new):
    """A layer with one edit of the reference's text."""
    return LINEAR.edited({old: new})


def only(check, make):
    """The status of one check, and the mutants that it is explained by."""
    (result,) = engine.run([BY_ID[check]], make(), profile="quick", dtypes=["float32"]).results
    return result.status, tuple(d for d in result.diagnosis if not d.id.startswith(STRUCTURE))


@pytest.mark.parametrize("id", SOME)
def test_a_mutant_is_named(id):
    assert names(CATALOGUE[id])[0] == id


def test_a_mutant_that_raises_explains_nothing_and_hinders_no_other(monkeypatch):
    raising = replace(CATALOGUE["scale-squared"], make=wrong("ds = s", "ds = s = no_such_name"))
    known = (raising, CATALOGUE["scale-alpha"])
    monkeypatch.setattr(mutants, "MUTANTS", known)
    assert names(CATALOGUE["scale-alpha"]) == ("scale-alpha",)
    assert names(raising) == ()


@pytest.mark.slow
def test_a_scale_far_too_great_is_named_though_it_rounds_more_than_what_is_right():
    """α instead of α / r, summed element by element in float32 as C and JavaScript do."""

    def product(x, W):
        y = np.zeros((len(x), len(W)), np.float32)
        for k in range(W.shape[1]):
            y += np.outer(x[:, k], W[:, k])
        return y

    make = Reference((Linear,), {"product": product}).edited(
        {
            "base = x @ W.T + b": "base = product(x, W) + b",
            "branch = s * (H @ B.T)": "branch = np.float32(alpha) * product(product(x, A), B)",
        }
    )
    check = BY_ID["linear.forward"]
    for seed in range(4):
        found = check.diagnose(Direct(make()), "float32", seed)
        assert [each.id for each in found] == ["scale-alpha"], seed


@pytest.mark.slow
@pytest.mark.parametrize(
    "id", ["precision-y-in-adapters-dtype", "precision-merge-dtype", "layout-batch-of-one",
           "state-x-overwritten", "optimizer-t-from-0"]
)  # fmt: skip
def test_an_answer_that_cannot_be_compared_is_named(id):
    """There are no numbers to compare: the same fault in the same cases names it."""
    assert names(CATALOGUE[id], "float32") == (id,)


@pytest.mark.slow
@pytest.mark.parametrize(
    "id",
    ["module-not-rescaled", "module-dropout-never", "module-dropout-on-base",
     "module-dropout-on-output", "module-dropout-of-samples", "module-dropout-shared",
     "module-dropout-in-evaluation", "lifecycle-dropout-not-scaled", "lifecycle-dropout-base",
     "lifecycle-replace-rate", "lifecycle-save-no-rate"],
)  # fmt: skip
def test_what_is_dropped_wrongly_is_named_whatever_the_masks_are(id):
    """Another generator draws other masks than the catalogue's mutant."""
    m = CATALOGUE[id]

    def other():
        made = m.make()
        if hasattr(made, "rng"):
            made.rng = np.random.default_rng(7)
        return made

    assert [d.id for d in found(m.caught_by, other, profile="ci")] == [id]


class WithoutGradients:
    def __init__(self, session):
        self._session = session

    def __getattr__(self, name):
        if name == "gradients":
            raise AttributeError(name)
        return getattr(self._session, name)


@pytest.mark.slow
def test_a_mutant_is_compared_by_the_methods_that_the_targets_sessions_have():
    m = CATALOGUE["lifecycle-dropout-never"]

    def other():
        made = m.make()
        opened = made.session
        made.session = lambda layer: WithoutGradients(opened(layer))
        return made

    assert [d.id for d in found("lifecycle.dropout", other, profile="ci")] == [m.id]


@pytest.mark.slow
def test_gradients_of_a_module_that_follow_from_its_forward_are_named():
    """Of an autograd library, and of one whose adapter acts by a factor that no table has."""
    from minilora.verify.mutants.derived_modules import differentiated_module

    m = CATALOGUE["module-values-lost"]
    names = [d.id for d in found("module.attention.gradients", differentiated_module(m, True).make)]
    assert names == [m.id]
    third = MODULES.edited({"Modules: # change": "change = change / 7"})
    said, *_ = found("module.experts.forward", third)
    assert "the adapter acts 0.142857 times, expected 1" in said.sentence


def test_a_fault_that_no_mutant_shows_gets_no_name():
    class Flat(Minilora):
        def merge(self, W, A, B, **options):
            return super().merge(W, A, B, **options).ravel()

    (result, *_) = engine.run([BY_ID["merge.weight"]], Flat(), profile="quick").results
    assert (result.status, result.diagnosis) == ("error", ())


def test_what_is_right_gets_no_name():
    assert only("linear.vjp", Linear) == ("pass", ())


@pytest.mark.slow
def test_a_deviation_that_is_not_in_the_catalogue_gets_no_name():
    assert only("linear.vjp", wrong("# branch", "branch = branch + x[:1, :1] ** 2")) == ("fail", ())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scale", "says"),
    [("1.37 * s", "s = 1.37 s."), ("2.0", "s = 2."), ("alpha / (r + 1)", "s = α/(r + 1).")],
)
def test_a_scale_that_no_table_has_is_fitted_and_explains_the_other_checks(scale, says):
    checks = "linear.forward", "linear.vjp.bias", "merge.weight", "multi.forward"
    report = report_of(wrong("ds = s", f"ds = s = {scale}"), *checks)
    (cause,) = report.causes
    assert (cause.sentence, cause.checks) == (says, list(checks))


def test_a_dropout_rate_is_not_taken_for_a_scale():
    without = wrong("# branch", "branch = branch * (1 - p) ** 3")
    assert not only("linear.forward.dropout", without)[1]


@pytest.mark.slow
def test_two_faults_at_once_get_no_name_of_one():
    both = LINEAR.edited({"ds = s": "ds = s = 1.37 * alpha", "# gradients": "dB = 0 * B"})
    assert only("linear.vjp", both) == ("fail", ())


def test_the_report_says_the_name_the_formula_and_where_it_was_seen():
    report = engine.run(
        [BY_ID["linear.forward"]], CATALOGUE["scale-alpha"].make(), dtypes=["float32"]
    )
    assert "DIAGNOSIS  scale-alpha: s = α. Seen in mlx-vlm 841" in report.text()
    (entry,) = report.to_json()["results"][0]["diagnosis"]
    assert entry.keys() == {"id", "sentence", "residual_z", "separating"}
    assert entry["id"] == "scale-alpha"
    right = engine.run([BY_ID["linear.forward"]], Linear(), dtypes=["float32"])
    assert "DIAGNOSIS" not in right.text()


def found(check, make, dtype="float32", profile="quick"):
    """All that is said of one check, structure included."""
    (result,) = engine.run([BY_ID[check]], make(), profile=profile, dtypes=[dtype]).results
    return result.diagnosis


@pytest.mark.slow
def test_mutants_that_answer_a_check_alike_are_told_apart_by_a_case_of_another():
    ours, other = CATALOGUE["form-no-bias-with-dropout"], CATALOGUE["form-no-bias"]
    check = BY_ID["linear.forward.all"]
    (named,) = found(check.id, ours.make)
    assert named.id == ours.id
    assert named.separating
    id, dtype, number = named.separating.split(":")
    case = Case(id, dtype, int(number), 0)
    first, second = (answers(BY_ID[id], Direct(m.make()), case) for m in (ours, other))
    assert explains([first], [second]) is None  # the case does separate them
    assert [d.id for d in found(check.id, other.make)] == [other.id]  # either way


@pytest.mark.slow
def test_what_cannot_be_asked_further_leaves_all_candidates_and_names_the_case():
    class DropoutOnly(CATALOGUE["form-no-bias-with-dropout"].make().__class__):
        def lora_linear(self, *arguments, **options):
            if options.get("keep") is None:
                raise NotImplementedError("no layer without dropout")
            return super().lora_linear(*arguments, **options)

        def lora_linear_vjp(self, *arguments, **options):
            raise NotImplementedError("no gradients")

    said = found("linear.forward.all", DropoutOnly)
    assert {"form-no-bias", "form-no-bias-with-dropout"} <= {d.id for d in said}
    assert all(d.separating for d in said)


@pytest.mark.slow
def test_a_part_of_a_mutant_is_described_as_such_and_named_as_none():
    (said, *_) = found("linear.forward.bias", wrong("# arrays", "b = 0.75 * b"))
    assert said.id == f"{STRUCTURE}part"
    assert "0.25" in said.sentence
    assert "form-no-bias" in said.sentence


def test_the_matched_filter_is_1_for_what_is_read_so_and_0_for_what_is_right():
    check, m = BY_ID["linear.vjp"], CATALOGUE["scale-off-10-ppm"]
    cases = [Case(check.id, "float32", number, 0) for number in FIRST_CASES]

    def given(make):
        return [answers(check, Direct(make()), case) for case in cases]

    ours = given(m.make)
    assert matched_filter(given(m.make), ours).agrees(1.0)
    assert matched_filter(given(Linear), ours).agrees(0.0)
    assert not matched_filter(given(Linear), ours).agrees(1.0)


def fewest(make, kind="linear"):
    """The fewest steps on which a session deviates, as the check of random steps finds them."""
    check = next(
        c
        for c in CHECKS
        if c.id == f"lifecycle.random-steps{'' if kind == 'linear' else '.' + kind}"
    )
    return check.smallest(Direct(make()), "float32")


@pytest.mark.slow
def test_the_smallest_counterexample_of_a_layer_s_life_is_the_fewest_steps():
    assert fewest(CATALOGUE["lifecycle-added-active"].make)["steps"] == "add('one')"
    assert fewest(CATALOGUE["lifecycle-merge-all"].make)["steps"] == "add('one') merge()"


@pytest.mark.slow
def test_a_session_that_raises_is_told_by_the_steps_before_it():
    class Raising:
        def session(self, layer):
            of = Minilora().session(layer)

            def delete(name):
                raise KeyError(name)

            of.delete = delete
            return of

    found = fewest(Raising)
    assert found["steps"] in [
        f"add('{name}') delete('{name}')" for name in ("one", "two", "onetwo")
    ]
    assert "KeyError" in found["got"]


@pytest.mark.slow
def test_an_error_in_a_layer_s_life_says_the_step_and_has_the_fewest_steps():
    class Raising(Minilora):
        def session(self, layer):
            of = super().session(layer)
            right = of.activate

            def activate(names):
                if names == ["onetwo"]:
                    raise KeyError(names)
                right(names)

            of.activate = activate
            return of

    machine = next(check for check in CHECKS if check.id == "lifecycle.random-steps")
    (result,) = engine.run([machine], Raising(), dtypes=["float64"]).results
    assert result.status == "error"
    assert result.faults[0].message.startswith("activate(['onetwo']): KeyError")
    assert result.smallest["steps"] == "add('onetwo') activate(['onetwo'])"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "tied", "modules-to-save"])
def test_a_right_session_has_no_such_steps(kind):
    assert fewest(Minilora, kind) is None


@pytest.mark.slow
def test_a_case_that_holds_refutes_a_mutant():
    class MergesTwice(Minilora):
        """merge adds 2 s B A, unmerge is right: together they are as if unmerge did nothing."""

        def merge(self, W, A, B, *, alpha, **settings):
            return super().merge(W, A, B, alpha=2 * alpha, **settings)

    def ids(check, make):
        return {d.id for d in found(check, make, "float64")}

    assert "unmerge-nothing" not in ids("merge.unmerge", MergesTwice)
    assert "unmerge-nothing" in ids("merge.unmerge", CATALOGUE["unmerge-nothing"].make)
    assert "merge-twice" in ids("merge.weight", MergesTwice)


@pytest.mark.parametrize(
    ("declared", "says"),
    [("differentiated", "dora_norm = 'detached'"), ("detached", ""), (None, "")],
)
def test_another_convention_than_the_declared_one_is_told(declared, says):
    class Detached(Linear):
        conventions = {} if declared is None else {"dora_norm": declared}

    said = found("variants.dora.vjp", Detached)
    assert [d.id for d in said] == ([f"{STRUCTURE}convention"] if says else [])
    assert all(says in d.sentence for d in said)


def report_of(make, *checks, **options):
    return engine.run([BY_ID[check] for check in checks], make(), dtypes=["float64"], **options)


class Remembers(Linear):
    """Each forward's scale grows: the first alone is right."""

    grown = 1.0

    def scale(self, *settings, **options):
        self.grown *= 1.01
        return super().scale(*settings, **options) * self.grown / 1.01


def keeps_its_buffer():
    """Its output goes into an array of the first call's shape."""
    into = 'y = np.copyto(self.memory.setdefault("buffer", y), y) or self.memory["buffer"]'
    return wrong("# output", into)()


class RemembersElsewhere(Remembers):
    """What it remembers lies in its class, where a new instance finds it."""

    def scale(self, *settings, **options):
        RemembersElsewhere.grown *= 1.01
        return Linear.scale(self, *settings, **options) * RemembersElsewhere.grown


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Remembers, "the same case passes"),
        (RemembersElsewhere, "asked twice"),
        (lambda: Remembers.__new__(Remembers), "the same case passes"),
        (keeps_its_buffer, "the same case passes"),
        (CATALOGUE["scale-alpha"].make, ""),
        (wrong("# output", "no_such_name"), ""),
    ],
)
def test_what_depends_on_earlier_calls_is_told_with_a_command_that_repeats_it(make, says):
    report = report_of(make, "linear.forward", command=["minilora", "verify", "it"])
    (result,) = report.results
    ids = [each.id for each in result.diagnosis]
    assert (ids == [f"{STRUCTURE}earlier-calls"]) == bool(says)
    assert says in (result.diagnosis[0].sentence if says else "")
    whole = "minilora verify it --level linear --dtype float64 --profile ci --seed 0"
    assert (result.reproduce == whole) == bool(says)


def test_an_object_made_with_other_settings_is_not_compared_with_what_its_class_makes():
    class Chosen(Linear):
        def __init__(self):
            super().__init__()
            self.wrong = False

        def scale(self, *settings, **options):
            return super().scale(*settings, **options) * (2 if self.wrong else 1)

    def chosen():
        it = Chosen()
        it.wrong = True
        return it

    (result,) = report_of(chosen, "linear.forward").results
    assert f"{STRUCTURE}earlier-calls" not in [each.id for each in result.diagnosis]


@pytest.mark.slow
def test_what_all_cases_that_deviate_have_in_common_is_told():
    only_rank_1 = wrong("ds = s", "ds = s = 1.0 if r == 1 else alpha / r")
    report = report_of(only_rank_1, "linear.forward")
    assert report.results[0].only == ("r = 1",)
    assert "  only where r = 1\n" in report.text()
    # With r = 1, α and α / r are the same.
    only = report_of(CATALOGUE["scale-alpha"].make, "linear.forward").results[0].only
    assert only in ((), ("there are 2 or more ranks (it passes up to 1)",))
    assert report_of(Linear, "linear.forward").results[0].only == ()


@pytest.mark.slow
def test_that_a_rank_is_greater_than_a_side_is_told():
    small = wrong("ds = s", "ds = s = alpha / min(r, *W.shape)")
    (result,) = report_of(small, "linear.forward").results
    assert result.only == ("r is greater than a side of W",)


@pytest.mark.slow
def test_a_case_that_deviates_and_then_asks_for_what_is_not_there_counts_once():
    class Lone(CATALOGUE["lifecycle-merge-twice"].make().__class__):
        def session(self, layer):
            of = super().session(layer)

            def delete(name):
                raise NotImplementedError("it stays")

            of.delete = delete
            return of

    (result,) = engine.run([BY_ID["lifecycle.random-steps"]], Lone(), dtypes=["float64"]).results
    assert (result.status, result.only) == ("fail", ())
    assert result.skipped_cases


def summed_in_tiles(step):
    """W x summed over tiles of 16 features; ``step`` takes each into the sum."""

    def product(x, W):
        tiles = range(0, x.shape[1], 16)
        return reduce(step, [x[:, k : k + 16] @ W[:, k : k + 16].T for k in tiles])

    reference = Reference((Linear,), {"product": product})
    return reference.edited({"base = x @ W.T + b": "base = product(x, W) + b"})


@pytest.mark.slow
def test_a_kernel_that_is_wrong_in_its_second_tile_is_told_from_where_on():
    def last(total, part):
        return part

    result, *_ = report_of(summed_in_tiles(last), "linear.forward").results
    (said,) = result.only
    least, most = map(int, re.findall(r"\d+", said))
    assert most <= 16 < least
    assert "columns of W" in said
    right, *_ = report_of(summed_in_tiles(operator.add), "linear.forward").results
    assert (right.status, right.only) == ("pass", ())


def test_a_mutant_of_rare_cases_alone_is_named_by_those():
    m = CATALOGUE["layout-one-token"]
    wrong = Direct(m.make())
    (named,) = BY_ID["linear.forward"].diagnose(wrong, "float32", 0)
    assert named.id == m.id
    check = replace(BY_ID["linear.forward"], cases=lambda profile, dtype: max(FIRST_CASES) + 1)
    assert diagnose.Diagnoser(
        linear.LEVEL, check, Direct(m.make()), "float32", 0
    ).telling_cases() == ((), [])


def test_of_two_answers_that_disagree_none_is_called_wanted():
    class Unscaled(Minilora):
        def lora_linear(self, *arrays, alpha, r, **options):
            return super().lora_linear(*arrays, alpha=r, r=r, **options)

    words = report_of(Unscaled, "merge.forward").text()
    assert "they disagree: x W'ᵀ is " in words
    assert "want" not in words

    class ByPlace(Minilora):
        def multi_adapter(self, *arrays):
            y = super().multi_adapter(*arrays)
            return y + np.arange(len(y)).reshape(-1, 1).astype(y.dtype)

    words = report_of(ByPlace, "multi.row-order").text()
    assert "one of its answers is " in words
    assert "want" not in words


class TrainsOff:
    """Disabled, a session has the gradients that it has otherwise; its outputs are right."""

    def session(self, layer):
        of = Minilora().session(layer)
        right = of.gradients

        def gradients(x, dy):
            now, of.layer = of.layer, of.layer.activate(of.layer.active)
            try:
                return right(x, dy)
            finally:
                of.layer = now

        of.gradients = gradients
        return of


@pytest.mark.slow
def test_what_is_called_a_disabling_that_does_nothing_does_nothing_in_the_output_too():
    ids = {d.id for d in found("lifecycle.gradients", TrainsOff)}
    assert not {id for id in ids if "disable" in id}
    wrong = CATALOGUE["lifecycle-disable-nothing"].make
    assert "lifecycle-disable-nothing" in {d.id for d in found("lifecycle.gradients", wrong)}


@pytest.mark.slow
def test_what_is_merged_and_has_a_gradient_is_not_taken_for_what_is_inactive():
    wrong = CATALOGUE["lifecycle-gradients-merged"]
    assert [d.id for d in found("lifecycle.gradients", wrong.make)] == [wrong.id]
    assert [d.id for d in found("lifecycle.gradients", CATALOGUE["lifecycle-gradients-all"].make)]


@pytest.mark.slow
def test_of_a_layer_s_life_the_first_wrong_step_is_described_and_no_rank():
    class OneMore(Minilora):
        def session(self, layer):
            of = super().session(layer)
            right, one = of.forward, np.eye(1, len(layer["W"]), dtype=layer["W"].dtype)
            of.forward = lambda x: right(x) + 3 * len(of.layer.active) * one
            return of

    said = found("lifecycle.several", OneMore)
    assert [d.id for d in said] == [f"{STRUCTURE}place"]
    first = r"y after add\('one'\) add\('two'\) activate\(\['one'\]\) differs in 7 of 7 rows "
    where = r".* and 1 of \d columns \(0\), in lifecycle.several:float32:\d\."
    assert re.fullmatch(first + where, said[0].sentence)


@pytest.mark.slow
def test_a_mutant_of_one_setting_is_named_though_another_setting_is_right():
    class PissaAlone(Minilora):
        def init(self, W, **settings):
            given = super().init(W, **settings)
            return given | ({"W": W} if settings.get("init_lora_weights") == "pissa" else {})

    assert "init-pissa-base-kept" in {d.id for d in found("init.pissa", PissaAlone)}


def test_of_many_checks_that_no_known_cause_explains_the_first_are_looked_into(monkeypatch):
    monkeypatch.setattr(investigation, "MAX_DIAGNOSED", 0)
    kinds = [c for c in BY_ID if c in ("linear.forward", "linear.forward.bias")]
    report = report_of(wrong("# branch", "branch = branch + x[:1, :1] ** 2"), *kinds)
    assert [each.note == NOT_DIAGNOSED for each in report.results] == [True, True]
    listed = "2 more, not diagnosed: linear.forward, linear.forward.bias"
    assert f"FAIL  linear   {listed}" in folded(report)
    assert "FAIL  linear.forward.bias " in report.text(verbose=True)
    monkeypatch.setattr(investigation, "MAX_DIAGNOSED", 1)
    named = report_of(CATALOGUE["scale-alpha"].make, *kinds)
    assert [[d.id for d in r.diagnosis] for r in named.results] == [["scale-alpha"]] * 2


def folded(report, **how):
    """Its text, what is wrapped in one line."""
    return re.sub(r"\n  +", " ", report.text(**how))


def autograd(id):
    """A target whose gradients are those of a mutant's own forward, as an autograd library's are.

    They are central differences in long double, which are exact where y is affine, and not the
    complex steps that the diagnosis takes.
    """

    class Autograd(CATALOGUE[id].make().__class__):
        def lora_linear_vjp(self, x, W, A, B, dy, **options):
            if x.size > 300:
                raise NotImplementedError("so large an x")
            names = ["x", "A", "B", *(["bias"] if options.get("bias") is not None else [])]
            given = {"x": x, "W": W, "A": A, "B": B, **options}
            answer = {"y": self.lora_linear(**given)}
            longs = {
                name: v.astype(np.longdouble) if hasattr(v, "astype") and name != "keep" else v
                for name, v in given.items()
            }
            for name in names:
                gradient = np.empty(given[name].shape)
                for i in np.ndindex(gradient.shape):
                    step = np.zeros_like(longs[name])
                    step[i] = 1
                    up, down = (
                        self.layer(**{**longs, name: v})["y"]
                        for v in (longs[name] + step, longs[name] - step)
                    )
                    gradient[i] = (dy * (up - down) / 2).sum()
                answer[f"d{name}"] = gradient.astype(x.dtype)
            return answer

    return Autograd


@pytest.mark.slow
@pytest.mark.parametrize(
    ("id", "check"),
    [
        ("form-no-weight", "linear.vjp"),
        ("form-no-bias", "linear.vjp.bias"),
        ("dropout-on-base", "linear.vjp.dropout"),
    ],
)
def test_a_wrong_forward_is_named_by_the_gradients_that_follow_from_it(id, check):
    (said,) = found(check, autograd(id), "float64")
    assert said.id == id
    assert said.sentence.endswith("The gradients are those of this forward.")


@pytest.mark.slow
def test_a_wrong_forward_is_named_beside_gradients_that_are_right():
    class RightBackwards(CATALOGUE["dropout-on-hidden"].make().__class__):
        def lora_linear_vjp(self, *arrays, **options):
            right = Linear().lora_linear_vjp(*arrays, **options)
            return right | {"y": self.lora_linear(*arrays[:4], **options)}

    (said,) = found("linear.vjp.dropout", RightBackwards)
    assert said.id == "dropout-on-hidden"
    assert said.sentence.endswith("The gradients are those of the right forward.")


@pytest.mark.slow
def test_gradients_that_follow_from_nothing_wrong_and_others_get_no_such_name():
    assert only("linear.vjp.rslora", autograd("form-no-bias")) == ("pass", ())

    class Other(autograd("form-no-bias")):
        def lora_linear_vjp(self, *arrays, **options):
            answer = super().lora_linear_vjp(*arrays, **options)
            return answer | {"dA": answer["dA"] * 1.25}

    assert "form-no-bias" not in {d.id for d in found("linear.vjp.bias", Other, "float64")}


@pytest.mark.slow
def test_two_mistakes_at_once_are_named_together():
    both = LINEAR.edited({"ds = s": "ds = s = alpha", "# gradients": "dA = 0 * dA"})
    report = report_of(both, "linear.forward", "linear.vjp")
    assert [[d.id for d in r.diagnosis] for r in report.results] == [
        ["scale-alpha"], ["scale-alpha + backward-dA-zero"]
    ]  # fmt: skip
    (cause,) = report.causes
    assert (cause.id, cause.checks) == (
        "scale-alpha + backward-dA-zero", ["linear.forward", "linear.vjp"]
    )  # fmt: skip


@pytest.mark.slow
def test_a_scale_is_fitted_beside_any_other_mistake():
    both = LINEAR.edited({"ds = s": "ds = s = alpha", "# arrays": "A = np.roll(A, 1, 1)"})
    assert [d.id for d in found("linear.forward", both, "float64")] == [
        "scale-alpha + layout-A-shifted"
    ]


@pytest.mark.slow
def test_one_cause_explains_the_checks_of_all_levels_and_stands_first():
    checks = ("linear.forward", "linear.symmetry", "merge.weight", "multi.forward")
    report = report_of(CATALOGUE["scale-alpha"].make, *checks)
    (cause,) = report.causes
    assert (cause.id, cause.checks) == ("scale-alpha", [checks[0], *checks[2:]])
    assert cause.sureness().startswith("Sure: it alone gives the answers of 3 of 3")
    text = report.text()
    assert text.index("PROBABLE CAUSE  scale-alpha") < text.index(" linear.forward ")
    assert "The same cause in 2 more checks: merge.weight, multi.forward" in text
    assert not report_of(Linear, *checks).causes


@pytest.mark.slow
def test_a_mistake_in_one_setting_is_told_by_what_its_checks_share():
    report = report_of(
        CATALOGUE["scale-rslora-ignored"].make,
        "linear.forward", "linear.vjp", "linear.forward.rslora", "linear.vjp.rslora",
    )  # fmt: skip
    (cause,) = report.causes
    assert cause.only == ("rslora",)
    assert "only in checks of rslora" in folded(report)


def test_a_case_that_raises_does_not_hide_what_the_others_show():
    class Sometimes(CATALOGUE["scale-alpha"].make().__class__):
        def lora_linear(self, x, *arrays, **options):
            if x.shape == (2, 5, 6):  # the third case
                raise KeyError("here")
            return super().lora_linear(x, *arrays, **options)

    assert [d.id for d in found("linear.forward", Sometimes)] == ["scale-alpha"]


@pytest.mark.slow
def test_a_row_that_has_another_adapter_is_told():
    class Swapped(Minilora):
        def multi_adapter(self, x, W, adapters, index):
            y = super().multi_adapter(x, W, adapters, index)
            first = index.copy()
            first[0] = (index[0] + 2) % len(adapters) if index[0] else -1
            y[:1] = super().multi_adapter(x[:1], W, adapters, first[:1])
            return y

    said, *_ = found("multi.forward", Swapped)
    assert said.id == f"{STRUCTURE}composition"
    assert re.search(r"row 0 has (the base|adapter \d) and should have ", said.sentence)
    check = next(c for c in CHECKS if c.id == "multi.forward")
    assert check.smallest(Direct(Swapped()), "float64")["x"].shape == (1, 1)
    assert check.smallest(Direct(Minilora()), "float64") is None


@pytest.mark.slow
def test_how_often_an_adapter_acts_is_told_with_the_steps_numbered():
    class Twice(Minilora):
        def session(self, layer):
            of, base = super().session(layer), super().session(layer)
            right = of.forward

            def forward(x):
                y = right(x)
                return y + (y - base.forward(x)) * (len(of.layer.active) == 2)

            of.forward = forward
            return of

    report = report_of(Twice, "lifecycle.several")
    text = folded(report)
    assert "one, two act 2 times, expected 1" in text
    assert "STEPS  1 add('one')  2 add('two')  3 activate(['one'])  4 activate(" in text
