"""Files with other bytes than they should have: a report or a FormatError, and nothing else."""

import json
import shutil

import numpy as np
import pytest
from extras import needs
from safetensors.numpy import load_file, save_file

from minilora.audit.merged import merged
from minilora.audit.result import Report
from minilora.cli.main import main
from minilora.io.errors import FormatError
from minilora.io.reference_models import folder

LLAMA = "reference:llama"
VALUES = [
    *(None, 3, -1, 0, 2**70, 1.5, 1e308, "x", "", "pissa", "(", True, [], [1], [[1, 2]]),
    *(["a"], {}, {"a": 1}, {"(": 2}, [[0, 2**60]]),
]


def bytes_changed(rng, data):
    """Cut off, or with a few bytes changed: in the header, or anywhere."""
    kind = rng.integers(3)
    if kind == 0:
        return data[: rng.integers(len(data))]
    changed, most = bytearray(data), len(data) if kind == 1 else min(len(data), 4000)
    for _ in range(rng.integers(1, 4)):
        changed[rng.integers(most)] = rng.integers(256)
    return bytes(changed)


def settings_changed(rng, data):
    """A JSON file with some other values."""
    settings = json.loads(data)
    names = sorted(settings)
    for _ in range(rng.integers(1, 4)):
        settings[names[rng.integers(len(names))]] = VALUES[rng.integers(len(VALUES))]
    return json.dumps(settings).encode()


def convert(path, form):
    names = [LLAMA, "--model", LLAMA, "--to", form, "--output", str(path)]
    assert main(["convert", *names]) == 0


def peft_folder(path):
    shutil.copytree(folder() / "llama" / "adapter", path)


def merged_model(path):
    assert main(["merge", "--model", LLAMA, "--adapter", LLAMA, "--output", str(path)]) == 0


def loralib_file(path):
    tensors = load_file(folder() / "llama" / "adapter" / "adapter_model.safetensors")
    short = {name.removeprefix("base_model.model."): array for name, array in tensors.items()}
    save_file({name.removesuffix(".weight"): array for name, array in short.items()}, path)


def kohya_file(path):
    tensors = load_file(folder() / "llama" / "adapter" / "adapter_model.safetensors")
    renamed = {}
    for name, array in tensors.items():
        module, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        part = {"A": "lora_down.weight", "B": "lora_up.weight"}[part[0]]
        renamed[f"lora_unet_{module.replace('.', '_')}.{part}"] = array
    save_file(renamed, path)


gguf = needs("gguf")
FILES = {  # the name, what makes it, the file that is changed, and whether it is the merged model
    "PEFT's tensors": ("a", peft_folder, "adapter_model.safetensors", False),
    "PEFT's settings": ("a", peft_folder, "adapter_config.json", False),
    "MLX's tensors": ("a", lambda path: convert(path, "mlx"), "adapters.safetensors", False),
    "MLX's settings": ("a", lambda path: convert(path, "mlx"), "adapter_config.json", False),
    "a GGUF adapter": ("a.gguf", lambda path: convert(path, "gguf"), "", False),
    "kohya's file": ("a.safetensors", kohya_file, "", False),
    "loralib's file": ("a.safetensors", loralib_file, "", False),
    "a GGUF model": ("m.gguf", merged_model, "", True),
    "a model's tensors": ("m", merged_model, "model.safetensors", True),
    "a model's settings": ("m", merged_model, "config.json", True),
}
PARAMETERS = [
    pytest.param(name, marks=gguf) if "GGUF" in name else name for name in FILES
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each file or folder; made once."""
    out, there = tmp_path_factory.mktemp("made"), {}

    def make(name):
        if name not in there:
            there[name] = out / str(len(there)) / FILES[name][0]
            there[name].parent.mkdir()
            FILES[name][1](there[name])
        return there[name]

    return make


def reports(made, tmp_path, name, seeds):
    """What becomes of a file with other bytes: the exit status, or FormatError."""
    source, (_, _, inner, is_model) = made(name), FILES[name]
    found = []
    for seed in seeds:
        rng, path = np.random.default_rng(seed), tmp_path / f"{seed}{source.suffix}"
        (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
        file = path / inner if inner else path
        change = settings_changed if file.suffix == ".json" else bytes_changed
        file.write_bytes(change(rng, file.read_bytes()))
        try:
            report = merged(LLAMA, LLAMA if is_model else path, path if is_model else LLAMA)
        except FormatError:
            found.append(FormatError)
        else:
            assert isinstance(report, Report)
            found.append(report.exit_status)
    return found


@pytest.mark.parametrize("name", PARAMETERS)
def test_other_bytes_are_reported_or_refused(made, tmp_path, name):
    assert {*reports(made, tmp_path, name, range(6))} <= {FormatError, 0, 1, 4}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_many_other_bytes_are_reported_or_refused(made, tmp_path, name):
    found = reports(made, tmp_path, name, range(100, 200))
    assert {*found} <= {FormatError, 0, 1, 4}
    assert FormatError in found or name == "a model's settings"
