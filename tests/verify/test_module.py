"""Level module: what its cases hold, and that any way to compute a layer is as right as others."""

from collections import defaultdict

import numpy as np
import pytest

from minilora.verify import check
from minilora.verify.checks import module, module_inputs, module_layers
from minilora.verify.checks.module import expected
from minilora.verify.checks.module_inputs import KINDS, draw_module, wide
from minilora.verify.core.dtypes import Precision
from minilora.verify.core.errors import LoadError
from minilora.verify.core.types import MONTE_CARLO, Case, Comparison
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.minilora_impl import Minilora
from minilora.verify.mutants import MUTANTS
from minilora.verify.mutants.references.module import Modules

GROUPED = ("conv.groups", "conv.groups-dora", "conv.all")
DRAWN = [(name, "weight") for name in KINDS] + [(name, "blocks") for name in GROUPED]


def drawn(name, number, groups_as="weight", dtype="float32"):
    return draw_module(Case(f"module.{name}", dtype, number, 0), name, groups_as)


def agree(ours, theirs, sigma):
    """By ==, or within what rounding to float64 gives the answers where they round."""
    judged = [
        Comparison(key, ours[key], want, sigma.get(key), MONTE_CARLO).judge()
        for key, want in theirs.items()
    ]
    return ours.keys() == theirs.keys() and {each.verdict for each in judged} == {"pass"}


@pytest.mark.parametrize(("name", "groups_as"), DRAWN)
def test_a_branch_beside_the_base_is_the_base_with_another_weight(name, groups_as):
    """The variants' own equations agree with the law of substitution; with another scale not."""
    for number in range(2):
        inputs = drawn(name, number, groups_as)
        if inputs.layer.get("groups", 1) > 1 and groups_as == "weight":
            continue  # whose branch is the reference's, in the self-test
        dy = wide(inputs.dy)
        of = Case(f"module.{name}", "float32", number, 0), name, groups_as
        _, sigma = expected(of, False, Precision("float64", "float64"))
        branch = module_layers.answers(inputs.module(wide), dy, module_layers.by_branch)
        assert agree(branch, module_layers.answers(inputs.module(wide), dy), sigma)
        other = inputs.with_adapter(alpha=2 * inputs.adapter["alpha"])
        assert not agree(branch, module_layers.answers(other.module(wide), dy), sigma)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", [n for n, (kind, _) in KINDS.items() if kind not in ("attention", "encoder")]
)
def test_sums_are_so_small_that_nothing_is_rounded(name, dtype):
    limit = module_inputs.whole_numbers(dtype)
    for number in range(2):
        inputs = drawn(name, number, dtype=dtype)
        assert module_inputs.greatest_sum(inputs) <= limit
        larger = inputs.with_adapter(alpha=4 * limit * inputs.adapter["alpha"])
        assert module_inputs.greatest_sum(larger) > limit
        if "magnitude" in inputs.adapter:
            norms = np.log2(np.abs(inputs.adapter["magnitude"].astype(float)))
            assert (norms == np.round(norms)).all()


def met(name, numbers):
    """What was chosen of each setting in these cases."""
    found = defaultdict(set)
    for number in numbers:
        for trait in drawn(name, number).traits:
            found[trait.rpartition(" is ")[0] or trait].add(trait)
    return found


def test_every_padding_mode_dimension_stride_and_variant_is_met():
    found = met("conv.all", range(6))
    assert len(found["padding_mode"]) == 4
    assert len(found["dimensions"]) == len(found["stride"]) == len(found["variant"]) == 3
    assert len(met("conv.all", range(2))["dimensions"]) < 3


def test_settings_of_a_linear_layer_are_drawn_with_one_another():
    pairs = {
        (("lora_bias" in i.adapter, "magnitude" in i.adapter), i.layer.get("fan_in_fan_out", False))
        for i in (drawn("linear", number) for number in range(24))
    }
    assert len(pairs) == 6


def test_rows_are_within_max_norm_and_columns_of_A_are_not():
    for number in range(4):
        inputs = drawn("embedding.max-norm", number)
        layer, power = inputs.layer, inputs.layer["norm_type"]
        whole = module_layers.merged(inputs.module(wide))["W"]
        for table in (layer["W"], whole):
            assert ((np.abs(table) ** power).sum(1) ** (1 / power)).max() < layer["max_norm"]
        columns = (np.abs(inputs.adapter["A"]) ** power).sum(0) ** (1 / power)
        assert columns.max() > layer["max_norm"]


def test_a_layout_that_there_is_not_is_refused():
    class Other(Modules):
        conventions = {"conv_groups": "channels"}  # noqa: RUF012

    with pytest.raises(LoadError, match="expected one of weight, blocks"):
        check(Other(), levels=["module"])


def test_minilora_takes_an_adapter_in_blocks_and_refuses_another_by_name():
    def answer(groups_as):
        inputs = drawn("conv.groups", 0, groups_as)
        return Minilora().module(inputs.layer, inputs.adapter, inputs.x, mode="eval")["y"]

    want = module_layers.answers(drawn("conv.groups", 0, "blocks").module(wide))["y"]
    assert np.array_equal(answer("blocks"), want)
    with pytest.raises(NotImplementedError, match="blocks"):
        answer("weight")


class Forward(Modules):
    """It answers outputs alone, of linear layers alone."""

    def module(self, layer, adapter, x, *, mode, dy=None, index=None):
        if layer["kind"] != "linear" or dy is not None or mode == "merged":
            raise NotImplementedError("outputs of linear layers")
        return {"y": super().module(layer, adapter, x, mode=mode)["y"]}


def test_what_an_implementation_lacks_is_skipped_and_the_rest_is_asked():
    report = check(Forward(), levels=["module"], dtypes=["float32"], profile="quick")
    status = {result.check: result.status for result in report.results}
    assert status.pop("module.linear.forward") == status.pop("module.linear.dropout") == "pass"
    assert {*status.values()} == {"skip"}


def test_a_layer_without_a_scale_is_asked_with_alpha_r():
    class Unscaled(Modules):
        fixed = {"alpha": "r", "bias": False}  # noqa: RUF012

        def module(self, layer, adapter, x, **given):
            assert adapter["alpha"] == adapter["r"]
            assert "use_rslora" not in adapter
            return super().module(layer, adapter, x, **given)

    for id in ("module.linear.gradients", "module.experts.forward"):
        result = check(Unscaled(), case=f"{id}:float32:1").results[0]
        assert result.status == "pass"


def test_what_is_particular_of_a_case_is_told():
    subject = GuardedImplementation(Modules())
    for number in range(6):
        case = Case("module.linear.forward", "float32", number, 0)
        subject.traits = set()
        inputs = module.inputs_of(subject, case, "linear")
        stored = "(in, out)" if "fan_in_fan_out" in inputs.layer else "(out, in)"
        told = {trait for trait in subject.traits if trait.startswith("W is stored")}
        assert told == {f"W is stored {stored}"}


def test_an_answer_that_is_no_dict_is_the_implementations_fault():
    class Bare(Modules):
        def module(self, *given, **settings):
            return super().module(*given, **settings)["y"]

    result = check(Bare(), case="module.linear.forward:float32:0").results[0]
    assert (result.status, result.faults[0].kind) == ("error", "missing")
    assert check(Modules(), case="module.linear.forward:float32:0").results[0].status == "pass"


@pytest.mark.slow
def test_dropout_is_seen_on_inputs_with_two_numbers():
    inputs = drawn("linear", 0)
    one = module._numbers(inputs)
    assert (np.count_nonzero(one, axis=-1) == 1).all()
    assert one.any(0).all()
    assert len(one) == inputs.layer["W"].shape[1]
    case = "module.linear.dropout:float32:0"
    whole = next(m for m in MUTANTS if m.id == "module-dropout-of-samples")
    wrong = {
        a.array for a in check(whole.make(), case=case).results[0].arrays if a.verdict != "pass"
    }
    assert wrong == {"whether numbers of a sample are dropped apart"}
    assert check(Modules(), case=case).results[0].status == "pass"
