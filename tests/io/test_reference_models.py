"""The reference models: files as the manifest says, and a script that makes the same again."""

import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
from extras import optional
from marks import others_slow
from safetensors.numpy import load_file

from minilora.io import reference_models
from minilora.io.formats.huggingface import read_model
from minilora.io.synthetic_data import TASKS, draw_batch, expected_loss, task
from minilora.spec.lora import TrainableSpec, disable
from minilora.verify.core.dtypes import Precision
from minilora.verify.core.tolerance import Rounding, noisy, spread
from minilora.verify.core.types import MONTE_CARLO

FOLDER = reference_models.folder()
SCRIPT = FOLDER / "build.py"
EVERY = pytest.mark.parametrize("name", reference_models.names())


def loaded(path=SCRIPT):
    """The script as a module; its folder is no package."""
    spec = importlib.util.spec_from_file_location("reference_models_build", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


build = loaded()


def differing(folder, files):
    """The files that are not as their hashes say, are missing, or are not named."""
    there = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".json", ".safetensors")
    }
    hashes = {
        path: hashlib.sha256((folder / path).read_bytes()).hexdigest()
        for path in there - {reference_models.MANIFEST}
    }
    return {path for path in files.keys() | hashes.keys() if files.get(path) != hashes.get(path)}


def test_every_file_is_as_its_hash_says(tmp_path):
    files = reference_models.manifest()["files"]
    assert not differing(FOLDER, files)
    copy = shutil.copytree(FOLDER, tmp_path / "copy")
    path = copy / "gpt2/base/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    (copy / "bert/adapter/adapter_config.json").unlink()
    (copy / "vectors/more.safetensors").touch()
    assert differing(copy, files) == {
        "gpt2/base/model.safetensors",
        "bert/adapter/adapter_config.json",
        "vectors/more.safetensors",
    }


def test_the_readme_is_what_the_script_writes():
    text = (FOLDER / "README.md").read_text("utf-8")
    manifest = json.loads((FOLDER / reference_models.MANIFEST).read_text("utf-8"))
    assert build.readme(FOLDER, manifest) == text
    manifest["models"]["bert"]["base_loss"][0] += 0.001
    assert build.readme(FOLDER, manifest) != text


def test_a_setting_without_a_meaning_stops_the_readme(tmp_path):
    path = tmp_path / "base/config.json"
    path.parent.mkdir()
    path.write_text('{"vocab_size": 5}')
    assert "| `vocab_size` | `5` | tokens |" in build.settings_table(path)
    path.write_text('{"vocab_size": 5, "sliding_window": 4}')
    with pytest.raises(KeyError, match="sliding_window"):
        build.settings_table(path)


def test_numpy_draws_the_numbers_that_the_models_were_made_from(monkeypatch):
    """If it does not, the script makes other bytes, and the files here stay as they are."""
    assert build.random_numbers() == reference_models.manifest()["random_numbers"]
    older = np.random.Generator(np.random.MT19937(0))
    monkeypatch.setattr(np.random, "default_rng", lambda seed: older)
    assert build.random_numbers() != reference_models.manifest()["random_numbers"]


@pytest.mark.parametrize("name", others_slow(reference_models.names(), "llama"))
def test_the_first_steps_of_both_trainings_give_the_same_bytes(name, monkeypatch):
    wanted = reference_models.manifest()["models"][name]["early"]
    assert build.digest(build.make(name, build.EARLY)[0]) == wanted
    monkeypatch.setattr(build, "portable", np.asarray)
    assert build.digest(build.make(name, build.EARLY)[0]) != wanted


PLAIN = """
import hashlib
import numpy as np
x = np.random.default_rng(0).standard_normal((50, 300))
plain = hashlib.sha256((x @ x.T).tobytes() + np.exp(x).tobytes()).hexdigest()
"""
ELSEWHERE = f"""{PLAIN}
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("build", {str(SCRIPT)!r})
build = sys.modules["build"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
early = {{name: build.digest(build.make(name, build.EARLY)[0]) for name in build.RECIPES}}
print(json.dumps([plain, early]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="there is no older code to choose"
)
def test_code_for_an_older_processor_gives_the_same_bytes():
    """OpenBLAS and NumPy choose their code by the processor, and can be told to choose another."""
    newer = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    environment = os.environ | {
        "OPENBLAS_CORETYPE": "Nehalem",
        "OPENBLAS_NUM_THREADS": "1",
        "NPY_DISABLE_CPU_FEATURES": " ".join(newer),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", ELSEWHERE]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    plain, early = json.loads(result.stdout)
    models = reference_models.manifest()["models"]
    assert early == {name: model["early"] for name, model in models.items()}
    here = {}
    exec(PLAIN, here)
    assert plain != here["plain"] or not newer


@pytest.mark.very_slow
def test_the_script_makes_the_same_bytes_again(tmp_path):
    """All but the vectors, whose float64 sums are in the machine's own order; see the test of
    these."""
    build.build(tmp_path)
    old, new = (
        json.loads((folder / reference_models.MANIFEST).read_text("utf-8"))
        for folder in (FOLDER, tmp_path)
    )
    assert new["models"] == old["models"]
    assert new["files"].keys() == old["files"].keys()
    again = differing(tmp_path, old["files"])
    assert {path for path in again if not path.startswith("vectors/")} == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", others_slow(reference_models.names(), "llama"))
def test_each_has_learned_its_task_and_not_the_other(name):
    """The manifest says what the files give; off its own task a model loses a hundred times more
    beyond the entropy."""
    c, W, tuning = build.opened(FOLDER / name)
    tasks = [task(one) for one in reference_models.tasks(name)]
    found = {
        "base_loss": [expected_loss(one, disable(W), c, TrainableSpec()) for one in tasks],
        "adapter_loss": [expected_loss(one, W, c, tuning) for one in tasks],
        "entropy": [one.entropy for one in tasks],
    }
    rounded = {key: [round(x, build.DIGITS) for x in figures] for key, figures in found.items()}
    said = reference_models.manifest()["models"][name]
    assert rounded == {key: said[key] for key in rounded}
    excess = np.array([found["base_loss"], found["adapter_loss"]]) - found["entropy"]
    assert (excess > 0).all()
    assert (100 * excess.diagonal() < excess[::-1].diagonal()).all()


FLOAT64 = Precision("float64", "float64")


@functools.cache
def expected(name):
    """What is expected of the vector's batch, computed here, and the sigma of a difference.

    Both sides of a comparison round, independently: by √2 more than one.
    """
    c, W, tuning = build.opened(FOLDER / name)
    batch, _ = reference_models.vector(name)
    want = build.expected(batch, W, c, tuning)

    def run(rng):
        noise = {key: noisy(array, FLOAT64, rng) for key, array in W.items()}
        return build.expected(batch, noise, c, tuning)

    sigma = spread(run, want, samples=16, seed=[0])
    stored = {key: np.sqrt(Rounding(FLOAT64).stored(value)) for key, value in want.items()}
    return want, {key: 2**0.5 * np.maximum(sigma[key], stored[key]) for key in want}


def verdict(got, want, sigma):
    """``pass`` if they differ by rounding alone; where sigma is 0, by nothing."""
    exact = sigma == 0
    if (got[exact] != want[exact]).any():
        return "fail"
    z = abs(got - want)[~exact] / sigma[~exact]
    return MONTE_CARLO.verdict(z.max(), np.sqrt((z * z).mean()), z.size)


@EVERY
def test_the_vectors_hold_what_is_computed_here(name):
    want, sigma = expected(name)
    batch, stored = reference_models.vector(name)
    drawn = draw_batch(reference_models.tasks(name)[1], np.random.default_rng(build.VECTOR_SEED))
    again = build.given(drawn)
    assert all(np.array_equal(array, again[key]) for key, array in build.given(batch).items())
    assert stored.keys() == want.keys()
    assert {array.dtype for array in stored.values()} == {np.dtype(np.float64)}
    for key, array in stored.items():
        assert verdict(array, want[key], sigma[key]) == "pass"
        assert verdict(array * (1 + 1e-9), want[key], sigma[key]) == "fail"


@EVERY
def test_a_vector_has_a_gradient_for_every_tensor_of_the_adapter(name):
    _, stored = reference_models.vector(name)
    tensors = load_file(FOLDER / name / "adapter/adapter_model.safetensors")
    shapes = {f"grads.{key}": tensor.shape for key, tensor in tensors.items()}
    found = {key: array.shape for key, array in stored.items() if key.startswith("grads.")}
    assert found == shapes
    assert all(stored[key].any() for key in shapes)


def in_transformers(name, monkeypatch):
    """The model in float64 by transformers and peft, from the same files.

    transformers casts three of Llama's values to float32 whatever the model's dtype: the norms'
    input, RoPE's angles, the attention's softmax. Here they stay in float64.
    """
    torch = optional("torch")
    transformers = optional("transformers")
    peft = optional("peft")
    from transformers.models.llama import modeling_llama

    def norm(self, x):
        mean = (x * x).mean(-1, keepdim=True)
        return self.weight * (x / torch.sqrt(mean + self.variance_epsilon))

    def tables(self, x, position_ids):
        d = torch.arange(0, self.config.head_dim, 2, dtype=x.dtype) / self.config.head_dim
        frequencies = self.config.rope_parameters["rope_theta"] ** -d
        angles = torch.cat(2 * [position_ids[..., None] * frequencies], -1)
        return angles.cos(), angles.sin()

    def attention(module, query, key, value, mask, scaling, **_):
        key, value = (
            torch.repeat_interleave(x, module.num_key_value_groups, 1) for x in (key, value)
        )
        p = torch.softmax(query @ key.mT * scaling + mask, -1)
        return (p @ value).transpose(1, 2), p

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", tables)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", attention)
    transformers.utils.logging.disable_progress_bar()
    config = json.loads((FOLDER / name / "base/config.json").read_text())
    base = getattr(transformers, config["architectures"][0]).from_pretrained(
        FOLDER / name / "base", attn_implementation="eager", local_files_only=True
    )
    with warnings.catch_warnings():
        # PEFT 0.21 asks for an attribute by the name that it had before transformers 5.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = peft.PeftModel.from_pretrained(base, FOLDER / name / "adapter")
    return model.double().eval()


@EVERY
def test_transformers_and_peft_give_the_same_logits_from_the_files(name, monkeypatch):
    torch = optional("torch")
    model = in_transformers(name, monkeypatch)
    batch, stored = reference_models.vector(name)
    _, sigma = expected(name)
    inputs = {key: torch.from_numpy(array) for key, array in build.given(batch).items()}
    del inputs["labels"]
    seen = batch.mask if batch.labels.ndim == 2 else slice(None)

    def judged():
        with torch.no_grad():
            z = model(**inputs).logits.numpy()
        return verdict(z[seen], stored["logits"][seen], sigma["logits"][seen])

    assert judged() == "pass"
    with model.disable_adapter():
        assert judged() == "fail"


def test_the_folder_is_found_beside_the_package_and_in_an_installation(tmp_path, monkeypatch):
    assert {"manifest.json", "README.md", "build.py"} <= {p.name for p in FOLDER.iterdir()}
    package = tmp_path / "minilora"
    (package / "reference_models").mkdir(parents=True)
    monkeypatch.setattr(reference_models, "__file__", str(package / "io" / "reference_models.py"))
    reference_models.folder.cache_clear()
    try:
        with pytest.raises(FileNotFoundError, match=r"found manifest\.json in neither"):
            reference_models.folder()
        (package / "reference_models" / reference_models.MANIFEST).touch()
        assert reference_models.folder() == package / "reference_models"
    finally:
        reference_models.folder.cache_clear()


def test_models_and_their_tasks_are_known_by_name():
    assert set(reference_models.names()) == set(build.RECIPES)
    for name in reference_models.names():
        assert reference_models.tasks(name) == build.RECIPES[name].tasks
        assert set(reference_models.tasks(name)) <= set(TASKS)
    with pytest.raises(ValueError, match="reference model 'gpt3': expected one of"):
        reference_models.tasks("gpt3")


def test_a_models_sizes_are_all_different_and_its_scale_is_a_fraction():
    """Those that differ by more than a name: a transposed or swapped array has another shape."""
    for name, recipe in build.RECIPES.items():
        c, _ = read_model(FOLDER / name / "base")
        assert c == recipe.config
        counts = [n for n in vars(c).values() if type(n) is int]
        heads = [c.d // c.heads] if not hasattr(c, "head_dim") else [c.heads * c.head_dim]
        sizes = [*counts, *heads, recipe.lora.r]
        repeated = {n for n in sizes if sizes.count(n) > 1}
        assert repeated <= ({2} if name == "bert" else set())  # two blocks, two types
        assert recipe.lora.lora_alpha % recipe.lora.r


def test_the_folder_is_small():
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size < 2e6
