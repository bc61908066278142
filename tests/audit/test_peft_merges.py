"""Models that PEFT has merged, audited: each is right, and wrong when something is left out."""

import shutil

import pytest
from extras import needs, optional
from peft_merges import causal_model, merge_by_peft
from safetensors.numpy import load_file, save_file

from minilora.audit.merged import merged
from minilora.io.reference_models import folder

pytestmark = [needs("peft", "transformers"), pytest.mark.slow]


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def made(request, tmp_path_factory):
    peft = optional("peft")
    model = causal_model(folder() / "llama" / "base", request.param)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")
    return merge_by_peft(tmp_path_factory.mktemp(request.param), model, config)


def test_what_peft_merges_is_right(made):
    report = merged(made / "base", made / "adapter", made / "merged")
    assert report.exit_status == 0
    assert {entry.verdict for entry in report.entries} == {"exact", "unchanged"}


def test_a_tensor_left_out_is_named(made, tmp_path):
    shutil.copytree(made / "merged", tmp_path / "merged")
    file = tmp_path / "merged" / "model.safetensors"
    tensors, base = load_file(file), load_file(made / "base" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: base[name]}, file, {"format": "pt"})
    report = merged(made / "base", made / "adapter", tmp_path / "merged")
    assert report.exit_status == 1
    wrong = [entry for entry in report.entries if entry.severity == "deviation"]
    assert [(entry.subject, entry.verdict) for entry in wrong] == [(name, "not-applied")]
    assert name in report.cause
