"""What was merged, found from the base and the merged model alone."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import minilora.audit
from minilora.audit.find import find
from minilora.audit.floats import rounded, spacing
from minilora.audit.rank import floor, rank
from minilora.audit.report.text import text
from minilora.cli.main import main
from minilora.io import reference_models
from minilora.io.atomic import write_tensors
from minilora.io.errors import FormatError
from minilora.io.files import read_tensors

RNG = np.random.default_rng
BF16 = ml_dtypes.bfloat16


def merge(m, n, r, size, dtype, seed=0):
    """D and h of a weight with a change of rank r, whose entries are ``size`` of a weight's."""
    rng = RNG(seed)
    W = (0.05 * rng.normal(size=(m, n))).astype(dtype).astype(float)
    delta = rng.normal(size=(m, r)) @ rng.normal(size=(r, n))
    M = rounded(W + delta * (0.05 * size / delta.std()), dtype)
    h = np.maximum(spacing(W, dtype), spacing(M, dtype)) / 2
    return M - W, h


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize(("r", "guess"), [(1, 1), (3, 8), (16, 1)])
def test_the_rank_of_a_change_is_found_again(dtype, r, guess):
    found = rank(*merge(96, 160, r, 0.1, dtype), guess=guess)
    assert (found.r, found.least, found.is_low) == (r, r, True)


def test_the_rank_is_found_where_most_numbers_have_stayed():
    D, h = merge(256, 320, 4, 0.2 * 2.0**-8, BF16)
    assert np.mean(D == 0) > 0.7, "the change is a fifth of a unit"
    found = rank(D, h)
    assert (found.r, found.is_low) == (4, True)
    assert found.least < 4, "the singular values alone do not show it"


@pytest.mark.parametrize("size", [2.0**-4, 2.0**-8, 2.0**-12])
def test_a_change_of_full_rank_is_not_low(size):
    assert not rank(*merge(96, 160, 96, size, BF16)).is_low


def test_no_change_has_rank_0():
    assert rank(np.zeros((4, 5)), np.ones((4, 5))).r == 0


@pytest.mark.parametrize("seed", range(5))
def test_rounding_errors_stay_below_the_floor(seed):
    exact = RNG(seed).normal(size=(200, 300))
    h = spacing(exact, BF16) / 2
    error = rounded(exact, BF16) - exact
    greatest = np.linalg.svd(error, compute_uv=False)[0]
    assert greatest < floor(h)
    assert greatest > floor(h / 3), "so that the floor is no higher than it has to be"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The reference model, its merge, and a folder of three adapters: the first is merged."""
    folder = tmp_path_factory.mktemp("files")
    base, adapter = (reference_models.folder() / "llama" / name for name in ("base", "adapter"))
    for name in ("right", "scaled", "untrained"):
        shutil.copytree(adapter, folder / "adapters" / name)
    config = folder / "adapters/scaled/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 21}))
    path = folder / "adapters/untrained/adapter_model.safetensors"
    tensors = {k: v * ("lora_A" in k) for k, v in read_tensors(path).items()}
    write_tensors(path, tensors)
    words = ["merge", "--model", str(base), "--adapter", str(adapter)]
    assert main([*words, "--output", str(folder / "merged")]) == 0
    return folder, base


def test_the_adapter_and_its_rank_are_found(files):
    folder, base = files
    report = find(base, folder / "merged", folder / "adapters")
    found = {entry.subject.rpartition("/")[2]: entry.verdict for entry in report.entries[:3]}
    assert found == {"right": "fine", "scaled": "told", "untrained": "told"}
    ranks = {entry.figures["rank"] for entry in report.entries if entry.verdict == "low-rank"}
    assert ranks == {3}
    assert report.exit_status == 0
    assert text(report, width=200).splitlines()[1].startswith("ANSWER  it is the base with ")


@pytest.mark.slow
def test_other_adapters_are_not_taken_for_it(files):
    folder, base = files
    others = [folder / "adapters/scaled", folder / "adapters/untrained"]
    report = minilora.audit.find(base, folder / "merged", others)
    assert report.cause.startswith(f"it is the base with {others[0]} (")
    assert "by another factor; 14 tensors differ" in report.cause
    alone = minilora.audit.find(base, folder / "merged", others[1:])
    assert alone.cause.startswith("it is none of the 1 adapters; 14 tensors differ")


def test_an_adapter_may_be_named_in_place_of_a_folder(files):
    folder, base = files
    report = find(base, folder / "merged", "reference:llama")
    assert report.entries[0].verdict == "fine"


def test_nothing_was_merged(files):
    folder, base = files
    report = find(base, base, folder / "adapters/untrained")
    assert report.entries[0].verdict == "told", "an adapter that changes nothing is not found"
    assert {entry.verdict for entry in report.entries[1:]} == {"unchanged"}
    assert "nothing was merged" in report.cause
    assert "nothing was merged" in find(base, base).cause


def test_a_full_fine_tuning_is_no_adapter(files, tmp_path):
    _, base = files
    shutil.copytree(base, tmp_path / "tuned")
    path = tmp_path / "tuned/model.safetensors"
    drawn = RNG(0)
    tensors = {k: v + np.float32(0.01) * drawn.normal(size=v.shape).astype(np.float32)
               for k, v in read_tensors(path).items()}  # fmt: skip
    write_tensors(path, tensors)
    report = find(base, tmp_path / "tuned")
    assert {e.verdict for e in report.entries} == {"full-rank", "told"}  # told: vectors


def test_a_number_that_is_none_is_told(files, tmp_path):
    _, base = files
    shutil.copytree(base, tmp_path / "broken")
    path = tmp_path / "broken/model.safetensors"
    tensors = {k: v.copy() for k, v in read_tensors(path).items()}
    tensors["lm_head.weight"][3, 4] = np.nan
    save_file(tensors, path)
    report = find(base, tmp_path / "broken")
    assert [e.subject for e in report.entries if e.verdict == "corrupt"] == ["lm_head.weight"]


def test_of_stacked_experts_the_rank_of_one_is_told(tmp_path):
    draw = RNG(0).standard_normal
    W = draw((4, 40, 60)).astype(np.float32)
    M = W + np.einsum("eir,erj->eij", draw((4, 40, 2)), draw((4, 2, 60))).astype(np.float32)
    for name, tensor in (("base", W), ("merged", M)):
        write_tensors(tmp_path / f"{name}.safetensors", {"layers.0.experts.up": tensor})
    (entry,) = find(tmp_path / "base.safetensors", tmp_path / "merged.safetensors").entries
    assert (entry.verdict, entry.figures["rank"]) == ("low-rank", 2)


def test_a_folder_without_adapters_is_refused(files, tmp_path):
    folder, base = files
    with pytest.raises(FormatError, match="expected a folder of adapters"):
        find(base, folder / "merged", tmp_path)


def test_find_and_adapter_are_not_asked_together(files, capsys):
    folder, base = files
    words = ["audit", "merged", "--base", str(base), "--merged", str(folder / "merged")]
    assert main(words) == 2
    assert "expected --adapter, or --find" in capsys.readouterr().err
    assert main([*words, "--find", "--weight", "1"]) == 2
    assert main([*words, "--find"]) == 0
    assert "14 tensors differ from the base's by a change of rank 3" in capsys.readouterr().out
    assert main([*words, "--find", str(folder)]) == 3


def test_each_audit_is_a_function_of_the_package_whatever_was_imported_before():
    import minilora.audit.merged  # a module of the same name

    for name in minilora.audit.__all__:
        assert callable(getattr(minilora.audit, name)), name
