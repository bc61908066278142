"""The peers on PyTorch, peft and loralib: what they refuse, and that they hold; `verify` has all.

Only what they need is installed is run.
"""

import importlib
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from extras import optional

from minilora.io.reference_models import folder
from minilora.verify import check
from minilora.verify.peers import PEERS

torch = optional("torch")
optional("transformers")
optional("peft")
optional("loralib")
shared = importlib.import_module("minilora.verify.peers._torch")
models = importlib.import_module("minilora.verify.peers._transformers")
files_of = importlib.import_module("safetensors.torch")
load_file, save_file = files_of.load_file, files_of.save_file

DTYPES = ("float64", "float32", "bfloat16", "float16")
BASE, ADAPTER = folder() / "llama" / "base", folder() / "llama" / "adapter"


@pytest.fixture(params=["loralib", "peft"])
def library(request):
    return PEERS[request.param].load()


CASES = (
    *(f"linear.vjp.all:{dtype}:{number}" for dtype in DTYPES for number in (0, 1)),
    *(f"merge.{what}.all:{dtype}:0" for what in ("weight", "unmerge") for dtype in DTYPES),
    *("linear.vjp.conv1d:bfloat16:1", "linear.vjp.dropout:float16:1"),
    *("linear.accumulation:bfloat16:0", "linear.accumulation:float16:0"),
    *("model.llama:float32:0", "model.bert:float64:0", "train.clip:float32:0"),
    *("optimizer.sgd:float64:0", "optimizer.adamw:float64:0", "optimizer.clip:float64:0"),
    *("init.reproducible:float32:0", "init.olora:float32:0"),
    *("files.load.patterns:float32:0", "files.save.patterns:float32:0"),
)


@pytest.mark.slow
def test_some_cases_of_each_level_hold(library):
    found = Counter(r.status for case in CASES for r in check(library, case=case).results)
    assert found.keys() <= {"pass", "known", "skip"}
    assert found["pass"] >= len(CASES) // 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_given_mask_rounds_as_the_librarys_dropout_does(dtype):
    torch.manual_seed(0)
    dropout = torch.nn.Dropout(0.3)
    x = 1 + torch.rand(64, 65, dtype=getattr(torch, dtype))
    dropped = dropout(x)
    given = shared.GivenMask((dropped != 0).numpy(), 0.3, dropout)
    assert torch.equal(given(x), dropped)
    assert not torch.equal(given(x), x * (dropped != 0))
    assert torch.equal(given.eval()(x), x)


def test_a_mask_for_another_rate_than_configured_is_refused():
    with pytest.raises(ValueError, match=r"p = 0\.5, expected 0\.25"):
        shared.GivenMask(np.ones(3), 0.25, torch.nn.Dropout(0.5))


X, W, A, B = (np.ones(shape) for shape in ((6, 7), (5, 7), (3, 7), (5, 3)))


def test_arrays_that_torch_would_broadcast_or_cast_are_refused(library):
    with pytest.raises(ValueError, match=r"shape \(5, 1\), expected .* shape \(5, 3\)"):
        library.lora_linear(X, W, A, B[:, :1], alpha=7, r=3)
    with pytest.raises(ValueError, match=r"found torch\.float32 .* expected torch\.float64"):
        library.lora_linear(X, W, A.astype(np.float32), B, alpha=7, r=3)


def test_settings_that_a_library_lacks_are_not_supported(library):
    with pytest.raises(NotImplementedError, match="use_unicorns"):
        library.lora_linear(X, W, A, B, alpha=7, r=3, use_unicorns=True)
    with pytest.raises(NotImplementedError, match="use_rslora"):
        PEERS["loralib"].load().merge(W, A, B, alpha=7, r=3, use_rslora=True)


@pytest.mark.parametrize(("setting", "value"), [("optimizer", "lion"), ("nesterov", True)])
def test_optimizer_settings_that_the_peer_lacks_are_not_supported(setting, value):
    with pytest.raises(NotImplementedError, match=r"lion|nesterov"):
        PEERS["peft"].load().optimizer_steps({"A": A}, [], {"optimizer": "sgd", setting: value})


BATCH = {"input_ids": np.array([[3, 4, 5]]), "attention_mask": np.ones((1, 3), int)}
BATCH |= {"labels": BATCH["input_ids"]}


@pytest.mark.parametrize(
    ("field", "value"), [("use_rslora", True), ("bias", "all"), ("init_lora_weights", "pissa")]
)
def test_loralib_refuses_an_adapter_that_it_would_compute_otherwise(tmp_path, field, value):
    shutil.copytree(ADAPTER, tmp_path, dirs_exist_ok=True)
    config = json.loads((ADAPTER / "adapter_config.json").read_text()) | {"use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(NotImplementedError, match=field):
        PEERS["loralib"].load().model_loss(BASE, tmp_path, BATCH)


def test_files_of_two_dtypes_are_refused(tmp_path):
    shutil.copytree(ADAPTER, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: w.bfloat16() for name, w in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"torch\.bfloat16, expected torch\.float"):
        PEERS["peft"].load().model_loss(BASE, tmp_path, BATCH)
    save_file({"a": torch.zeros(1), "b": torch.zeros(1).double()}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"found .*F32, F64"):
        models.stored_dtype(tmp_path)
