"""Levels train, grad-flow, files and init: what their cases hold, and what they say of nonsense."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import kstwo, poisson

from minilora.io.formats.huggingface import read_model
from minilora.io.formats.peft import adapted_names, read_lora_config
from minilora.spec.layers import adapted_fused
from minilora.spec.lora import TrainableSpec, lora_linear, merge_weight, scale
from minilora.spec.models import shifted_labels
from minilora.spec.multi_adapter import AdaptedLayer
from minilora.spec.ops import IGNORED
from minilora.verify import check
from minilora.verify.checks import (
    files,
    inference,
    init,
    names,
    session_inputs,
    tiny_models,
    train,
    variants,
)
from minilora.verify.checks.model import as_dict
from minilora.verify.checks.session_run import LEARNING_RATE
from minilora.verify.core import inputs
from minilora.verify.core.dtypes import Precision
from minilora.verify.core.types import MONTE_CARLO, Case, Comparison
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.minilora_impl import Minilora, trained
from minilora.verify.implementation.sessions import LayerState, dense_factors
from minilora.verify.mutants import MUTANTS
from minilora.verify.mutants.files import FILES
from minilora.verify.mutants.references.files import Files

SEEDS = range(3)


def crossed(norms, greatest):
    """Whether some of the norms are clipped and some are not."""
    return min(norms) < greatest < max(norms)


@pytest.mark.parametrize(("kind", "seeds"), [("clip", SEEDS), ("combined", [0])])
def test_clipping_is_crossed_in_both_directions(kind, seeds):
    for seed in seeds:
        of, steps = train.draw_case(kind, 0, seed)
        settings = train.numerical_settings(train.settings_of(kind, 0, seed))
        norms = train.norms(of, steps, trained(of.c, of.W, of.spec, steps, settings))
        assert crossed(norms, settings["max_grad_norm"])
        assert not crossed(norms, 2 * max(norms))


def test_micro_batches_have_unequal_counts_and_every_batch_has_all_kinds_of_labels():
    for seed in SEEDS:
        of, steps = train.draw_case("gradient-accumulation", 0, seed)
        unequal = []
        steps = [[*step] for step in steps]  # the case's own are kept
        silent = steps[train.SILENT].pop(1)
        assert (shifted_labels(silent, of.c) == IGNORED).all()
        assert (silent.labels != IGNORED).any()
        for step in steps:
            counts = {int((shifted_labels(batch, of.c) != IGNORED).sum()) for batch in step}
            unequal.append(len(counts) > 1)
            for batch in step:
                assert not batch.real.all()
                assert (batch.labels[~batch.real] == IGNORED).all()
                assert (
                    ((shifted_labels(batch, of.c) != IGNORED).reshape(batch.ids.shape)).any(1).all()
                )
        assert sum(unequal) > len(steps) / 2
        every = [batch for step in steps for batch in step]
        assert any((batch.labels[batch.real] == IGNORED).any() for batch in every)


def test_padding_lies_on_either_side_and_nothing_that_it_predicts_counts():
    of, steps = train.draw_case("labels", 0, 0)
    sides = [batch.real[:, 0].all() for (batch,) in steps]
    assert {*sides} == {True, False}
    full = [batch for (batch,) in steps if batch.real.all()]
    assert 0 < len(full) < len(steps)
    assert any(batch.ids.shape[0] == 1 and batch.ids.shape[1] > 32 for batch in full)
    for (batch,) in steps:
        counts = (shifted_labels(batch, of.c) != IGNORED).reshape(batch.ids.shape)
        assert counts.any(1).all()
        assert not counts[~batch.real].any()


def test_prompts_are_ignored_and_answers_have_more_than_one_token():
    _, steps = train.draw_case("prompt", 0, 0)
    for (batch,) in steps:
        learned = batch.labels != IGNORED
        assert (learned.sum(1) > 1).all()
        assert not learned[:, 0].any()
        assert (np.diff((learned | ~batch.real).astype(int), axis=1) >= 0).all()


def test_what_is_trained_of_the_base_is_another_in_the_models_folder(tmp_path):
    of, _ = train.draw_case("weight-decay", 0, 0)
    base, _ = of.write(tmp_path, "float64")
    _, W = read_model(base)
    for name, array in W.items():
        assert np.array_equal(array, -of.W[name] if name in of.spec.trained else of.W[name])
    assert {name.rpartition(".")[2] for name in of.spec.trained} >= {"bias", "weight", "A"}


@pytest.mark.parametrize("kind", [*train.KINDS])
def test_both_dtypes_are_given_the_same_numbers(kind):
    of, _ = train.draw_case(kind, 0, 0)
    assert all(np.array_equal(v, v.astype(np.float32)) for v in of.W.values())


def rate(greatest, count):
    """The probability that count draws differ by more from their distribution."""
    return kstwo.sf(greatest, count)


@pytest.mark.slow
def test_the_error_rate_of_a_distribution_is_what_it_says():
    found = [
        *init._distribution("")(
            GuardedImplementation(Minilora()), Case("init.distribution", "float64", 0, 0)
        )
    ]
    counts = [init.SEEDS * r * n for _, n, r, *_ in init.MODULES]
    counts.append(sum(counts))
    for each, count in zip(found, counts, strict=True):
        assert 0 < rate(each.sigma[0], count) <= init.FALSE_ALARM / len(found)
        assert rate(each.sigma[0] / 2, count) > init.FALSE_ALARM


def test_the_error_rate_of_products_is_what_it_says():
    """Of sums of products of two uniform numbers none comes near the bound, and half would."""
    found, *_ = init.independent(
        GuardedImplementation(Minilora()), Case("init.independent", "float64", 0, 0)
    )
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, (2, 4000, 1024)).astype(np.float32)
    sums = 3 * np.abs((a * b).mean(1))
    assert sums.max() < found.sigma[0]
    assert sums.max() > found.sigma[0] / 4


def test_the_error_rate_of_repeated_entries_is_what_it_says():
    """Of as few different numbers as there may be, repeats are as many as are expected."""
    count, size = 24576, 2**22
    bound = init.allowed_repeats(count, init.FALSE_ALARM)
    expected = count * (count - 1) / 2 * init.MAX_PROBABILITY
    assert 0 < poisson.sf(bound, expected) <= init.FALSE_ALARM
    assert poisson.sf((bound + expected) / 2, expected) > init.FALSE_ALARM
    drawn = np.random.default_rng(0).integers(0, size, count)
    repeated = count - np.unique(drawn).size
    assert expected / 2 < repeated < bound
    assert count - np.unique(drawn // 4).size > bound


class Nothing(Files):
    def load(self, *given):
        return None

    def save(self, *given):
        return None

    def train(self, model, adapter, batches, settings):
        return [None] * len(batches)

    def model_loss(self, *given):
        return None

    def init(self, W, **given):
        return [W]


class Garbage(Files):
    def save(self, model, arrays, settings, folder):
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            with open(f"{folder}/{name}", "w") as file:
                file.write("?")


def kinds(target, level):
    report = check(target(), levels=[level], dtypes=["float32"], profile="quick")
    return {r.check: (r.status, *(f.kind for f in r.faults)) for r in report.results}


@pytest.mark.slow
@pytest.mark.parametrize("level", ["train", "grad-flow", "files", "init"])
def test_an_answer_that_is_none_is_the_implementations_fault(level):
    found = kinds(Nothing, level)
    assert set(found.values()) == {("error", "missing")}
    control = check(Files(), case=f"{next(iter(found))}:float32:0").results[0]
    assert control.status == "pass"


@pytest.mark.slow
def test_a_file_that_cannot_be_read_is_the_implementations_fault():
    found = kinds(Garbage, "files")
    wrong = {v for k, v in found.items() if k.startswith(("files.save", "files.resave"))}
    assert wrong == {("error", "missing")}


@pytest.mark.slow
def test_a_folder_that_says_another_scale_is_shown_by_its_modules():
    other = FILES.edited({"# saved": 'c |= {"lora_alpha": 9, "use_rslora": not c["use_rslora"]}'})
    result = check(other(), case="files.save.patterns:float32:0").results[0]
    assert result.status == "fail"
    assert result.worst.array.startswith("s of layers.0.down, layers.0.")
    assert check(Files(), case="files.save.patterns:float32:0").results[0].status == "pass"


def test_patterns_are_the_dotted_ends_of_names_and_read_as_they_are_meant():
    it = files.stored("patterns", "float32", 0, 0)
    lora = read_lora_config(it.folder, it.model.c)
    for name, internal in (
        ("rank_pattern", lora.rank_pattern),
        ("alpha_pattern", lora.alpha_pattern),
    ):
        assert len(it.settings[name]) == len(internal) > 1
        assert not any(end.startswith("model.") for end in it.settings[name])


@pytest.mark.slow
def test_stored_adapters_are_of_all_architectures_and_change_what_they_say():
    """Each adapter changes the output, in files of one and of several; its settings matter."""
    cases = [inference.stored(kind, "float32", n, 0) for kind in inference.CHOICES for n in (0, 1)]
    assert {type(it.c).__name__ for it in cases} == {"Llama", "GPT2"}
    assert {it.c.qkv_bias for it in cases if hasattr(it.c, "qkv_bias")} == {True, False}
    assert {len([*it.base.glob("*.safetensors")]) > 1 for it in cases} == {True, False}
    for it in cases:
        (want,) = inference.wanted_logits(it, it.adapted).values()
        (base,) = inference.wanted_logits(replace(it, spec=TrainableSpec()), it.W).values()
        assert np.abs(want - base).max() > 0.1
        assert np.allclose(np.exp(want).sum(0).astype(float), 1)
        (merged,) = inference.by_merged_weights(it, it.adapted).values()
        assert np.abs(want - merged).max() < 1e-15


@pytest.mark.slow
def test_what_is_no_answer_of_a_server_is_its_fault():
    class Wrong:
        def logits(self, model_dir, adapter_dir, input_ids):
            return np.zeros((2, 3), np.float32)

        def deltas(self, model_dir, adapter_dir):
            return [1.0]

    found = kinds(Wrong, "inference")
    assert found["inference.logits.combined"] == ("error", "shape")
    assert found["inference.deltas.combined"] == ("error", "missing")


def test_a_server_that_refuses_everything_does_not_pass():
    """That what fits nothing is refused says nothing if the right names are refused, too."""

    class Refusing:
        def logits(self, model_dir, adapter_dir, input_ids):
            raise RuntimeError("no")

    assert kinds(Refusing, "inference")["inference.names.partial"] == ("error", "raises")


def test_names_are_confusable_and_each_feature_matters():
    """Of drawn names some end others, some numbers begin others; each field changes what is hit."""
    seen = set()
    for number in range(4):
        for kind, field in (
            ("layers", "layers_to_transform"),
            ("exclude", "exclude_modules"),
            ("modules-to-save", "modules_to_save"),
            ("patterns", "rank_pattern"),
            ("patterns", "alpha_pattern"),
        ):
            drawn = names.draw(f"targets.{kind}", number, 0)
            parts = [name.split(".") for name in drawn.modules]
            assert {"q_proj", "eq_proj", "1", "11"} <= {part for each in parts for part in each}
            without = {**drawn.config}
            if without.pop(field, None) is None:
                assert field == "alpha_pattern"  # ranks may have a pattern alone
                continue
            seen.add(field)
            if field == "layers_to_transform":
                without.pop("layers_pattern", None)
            hit = adapted_names(drawn.config, drawn.modules)
            assert hit != adapted_names(without, drawn.modules)
    assert "alpha_pattern" in seen


@pytest.mark.slow
def test_names_that_cannot_be_read_are_the_implementations_fault():
    class Wrong:
        def targets(self, config, names):
            return [*names]

        def trainable(self, config, names):
            return "all"

    found = kinds(Wrong, "names")
    asked = {found[f"names.{method}"] for method in ("targets.list", "trainable.plain")}
    assert asked == {("error", "missing")}
    assert {v[0] for v in kinds(Minilora, "names").values()} == {"pass"}


def test_the_names_that_differ_are_said():
    same = tiny_models.same_names("names", ["a", "b"], ["b", "a"])
    other = tiny_models.same_names("names", ["a", "c"], ["b", "a"])
    assert same.judge().verdict == "pass"
    assert other.judge().verdict == "fail"
    assert other.array == "names, without b, beside them c"


@pytest.mark.slow
def test_a_frozen_file_that_changes_is_named():
    wrong = next(m for m in MUTANTS if m.id == "flow-base-file-changed")
    result = check(wrong.make(), case="grad-flow.frozen:float32:0").results[0]
    assert result.worst.array == "files that changed, base/config.json"
    assert check(Minilora(), case="grad-flow.frozen:float32:0").results[0].status == "pass"


def lived(kind, number, seed=0):
    case = Case(f"lifecycle.{kind}", "float64", number, seed)
    return session_inputs.draw_inputs(kind, case, True)


def absolute(given):
    if isinstance(given, dict):
        return {name: absolute(entry) for name, entry in given.items()}
    return abs(given) if isinstance(given, np.ndarray) else given


@pytest.mark.parametrize("kind", [kind for kind in session_inputs.SPECIAL_KINDS if kind != "dora"])
def test_a_sessions_numbers_are_so_small_that_float32_has_every_partial_sum(kind):
    """All are multiples of 1/16 at least, and no sum of absolute terms reaches 2^24 of them."""
    for number in range(4):
        drawn = lived(kind, number)
        layer = LayerState.of(absolute(drawn.layer))
        names = [n for n in drawn.adapters if n != "two" or kind not in session_inputs.EXCLUSIVE]
        for name in names:
            layer = layer.add(name, absolute(drawn.adapters[name])).scale(name, 2.0)
        y, back = layer.activate(names).forward(absolute(drawn.x))
        arrays = [y, *back(absolute(drawn.dy)).values()]
        assert max(array.max() for array in arrays) < 2.0**24 / 16
        assert all((array * 16 % 1 == 0).all() for array in arrays)
        halved = layer.scale("one", 0.5).activate(["one"]).forward(drawn.x)[0]
        assert (halved * 16 % 1 == 0).all()


@pytest.mark.parametrize("kind", [kind for kind in session_inputs.KINDS if kind != "dora"])
def test_training_leaves_a_sessions_numbers_so_small_that_float32_has_them(kind):
    """With -lr for lr and absolute numbers every step is a sum of absolute terms."""
    steps = 2 if kind == "linear" else 1
    for number in range(4):
        drawn = lived(kind, number)
        layer = LayerState.of(absolute(drawn.layer)).add("one", absolute(drawn.adapters["one"]))
        layer = layer.activate(["one"])
        for _ in range(steps):
            layer = layer.step(*map(abs, drawn.one_token()), -LEARNING_RATE)
        y, back = layer.forward(absolute(drawn.x))
        arrays = [y, *back(absolute(drawn.dy)).values()]
        unit = next(u for u in 2.0 ** -np.arange(30) if all((v % u == 0).all() for v in arrays))
        assert max(array.max() for array in arrays) / unit < 2.0**24


def test_rows_under_dora_have_a_norm_that_is_a_power_of_two():
    for number in range(4):
        drawn = lived("dora", number)
        assert drawn.adapters["one"].get("use_dora") is None
        for name in ("two", "onetwo"):
            own = drawn.adapters[name]
            V = merge_weight(drawn.layer["W"], own["A"], own["B"], own["alpha"] / own["r"])
            of_W, of_V = ((w * w).sum(1) for w in (drawn.layer["W"], V))
            assert (of_W == 16).all()
            assert {*of_V.tolist()} == {16, 64}  # the norm of W is another in some rows


@pytest.mark.parametrize("number", [0, 1])
def test_a_fused_layers_adapter_is_that_of_its_parts(number):
    drawn = lived("fused", number)
    rows, W = drawn.layer["rows"], drawn.layer["W"]
    for own in drawn.adapters.values():
        s = scale(own["alpha"], own["r"], own.get("use_rslora", False))
        A, B = dense_factors(own, rows)
        found, _ = lora_linear(drawn.x.T, W, None, A, B, s)
        count = sum(own["enable"])
        sizes = np.cumsum([size for size, on in zip(rows, own["enable"], strict=True) if on])
        pairs = zip(np.split(own["A"], count), np.split(own["B"], sizes[:-1]), strict=True)
        parts = [next(pairs) if on else None for on in own["enable"]]
        wanted, _ = adapted_fused(lora_linear, drawn.x.T, W, None, parts, rows, s)
        assert np.array_equal(found, wanted)


def test_a_layer_of_one_weight_is_its_state():
    drawn = lived("linear", 0)
    layer = LayerState.of(drawn.layer)
    y, back = layer.forward(drawn.x)
    wanted, back_wanted = AdaptedLayer(drawn.layer["W"], drawn.layer["bias"][:, None]).forward(
        drawn.x.T
    )
    assert np.array_equal(y, wanted.T)
    assert np.array_equal(back(drawn.dy)["dx"], back_wanted(drawn.dy.T)[0].T)


def test_what_a_layer_refuses_is_said():
    layer = LayerState.of(lived("full", 0).layer)
    adapters = lived("full", 0).adapters
    with pytest.raises(NotImplementedError, match="no layer of kind cubic"):
        LayerState.of({"kind": "cubic", "W": np.eye(2)})
    with pytest.raises(ValueError, match="no adapter 'one'"):
        layer.activate(["one"])
    two = layer.add("one", adapters["one"]).add("two", adapters["two"])
    with pytest.raises(ValueError, match="adapter 'one'"):
        two.add("one", adapters["one"])
    with pytest.raises(ValueError, match="one and two each bring head"):
        two.activate(["one", "two"]).forward(lived("full", 0).x)
    with pytest.raises(ValueError, match="no adapter to merge"):
        layer.merge()


class WeightAlone(Minilora):
    """A merge that answers the weight alone, as one without a bias does."""

    def merge(self, W, A, B, *, bias=None, **options):
        return super().merge(W, A, B, **options)


@pytest.mark.slow
@pytest.mark.parametrize("id", ["merge.bias", "merge.bias-of-B"])
def test_a_merge_may_answer_the_weight_alone_and_it_is_said(id):
    both, alone = (check(it(), case=f"{id}:float32:2") for it in (Minilora, WeightAlone))
    assert both.results[0].status == alone.results[0].status == "pass"
    said = "merge answers no bias where there is one: it is not judged"
    assert said in alone.notes
    assert said not in both.notes


def test_a_micro_batch_in_which_no_label_counts_is_worth_nothing(tmp_path):
    of, steps = train.draw_case("gradient-accumulation", 0, 0)
    folders = tuple(map(str, of.write(tmp_path, "float64")))
    given = [[as_dict(batch) for batch in step] for step in steps]
    silent = given[0][0] | {"labels": np.full_like(given[0][0]["labels"], IGNORED)}
    more = [[silent, *step, silent] for step in given]
    settings = train.settings_of("gradient-accumulation", 0, 0)
    for one, other in zip(
        *(Minilora().train(*folders, each, settings) for each in (given, more)), strict=True
    ):
        assert all(np.array_equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match="labels that count"):
        Minilora().train(*folders, [[silent]], settings)


@pytest.mark.parametrize("kind", [{}, {"bias": True}, {"dropout": True}])
def test_the_way_over_the_weight_is_the_specifications(kind):
    """In whole numbers, where both are exact; with a wrong scale it is not."""
    layer, exact = inputs.draw_layer(Case("linear.vjp", "float64", 0, 0), **kind)
    assert exact
    plain = (lambda array: np.asarray(array, float),) * 2
    found, wanted = inputs.by_weight_product(layer, *plain), inputs.specified(layer, *plain)
    doubled = replace(layer, alpha=2 * layer.alpha)
    wrong = inputs.by_weight_product(doubled, *plain)
    assert found.keys() == wanted.keys() - {"dbias"}
    for name in found:
        assert np.array_equal(found[name], wanted[name])
        assert not np.array_equal(wrong[name], wanted[name])


@pytest.mark.parametrize("of", variants.DORAS.values(), ids=map("-".join, variants.DORAS))
@pytest.mark.parametrize("number", [0, 1, 3, 5])
def test_doras_way_over_the_weight_is_the_specifications(of, number):
    """In long double they agree as far as float64 could ask for; with a wrong scale they do not."""
    case = Case("variants.dora.vjp.all", "float64", number, 0)
    layer, part = variants.draw(case, ".all", "dora")
    wanted = variants.specified(of, layer, part, inputs.long)
    sigma = variants.sigmas(of, layer, part, Precision("float64", "float64"), (0, number))

    def verdicts(layer):
        found = variants.by_weight_product(of, layer, part, inputs.long)
        return {
            name: Comparison(name, array, wanted[name], sigma[name], MONTE_CARLO).judge().verdict
            for name, array in found.items()
        }

    assert set(verdicts(layer).values()) == {"pass"}
    doubled = verdicts(replace(layer, alpha=2 * layer.alpha))
    assert doubled.pop("dbias") == "pass"  # which no scale is in
    assert set(doubled.values()) == {"fail"}
