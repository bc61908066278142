"""A toy format and a toy architecture, in the number of files that `docs/contributing.md` says."""

import importlib
import json
import pkgutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from minilora import LoraConfig, TrainableSpec, inject, logits
from minilora.cli.main import main
from minilora.io import architectures
from minilora.io.architectures import ARCHITECTURES
from minilora.io.architectures.gpt2 import GPT_2
from minilora.io.atomic import write_files
from minilora.io.errors import FormatError
from minilora.io.files import pack_json, read_json
from minilora.io.formats import huggingface, mlx, peft, registry
from minilora.io.formats.factors import check_factors
from minilora.io.formats.format import AdapterWeights, Format
from minilora.io.loading import open_adapted, open_base
from minilora.spec import models
from minilora.spec.initialization import draw_weights
from minilora.spec.lora import LORA
from minilora.spec.models import GPT2, Batch

# The file of the toy format: JSON, with each factor as a list of rows.


def read_toy(path, c, dtype, base):
    stored = read_json(path)
    weights = {name: np.array(rows, dtype) for name, rows in stored["factors"].items()}
    return AdapterWeights(weights, TrainableSpec(stored["scale"], trained=frozenset(weights)))


def write_toy(path, c, adapter, base):
    weights, tuning, _ = adapter
    check_factors(path, c, weights, tuning, (LORA,))
    stored = {
        "scale": {at: float(s) for at, s in tuning.scale.items()},
        "factors": {name: array.tolist() for name, array in weights.items()},
    }
    write_files(path.parent, {path.name: lambda: pack_json(stored)})
    return ["written as a toy"]


TOY = Format(
    name="toy",
    library="a toy",
    suffix=".toy",
    read_adapter=read_toy,
    write_adapter=write_toy,
    scaling="the scale itself: {scales}",
)


@pytest.fixture
def toy_format(monkeypatch):
    monkeypatch.setitem(registry.FORMATS, "toy", TOY)  # the line in the registry


def test_a_format_in_two_files_is_converted_to_and_from(toy_format, tmp_path, capsys):
    out = str(tmp_path / "a.toy")
    assert main(["convert", "reference:llama", "--to", "toy", "--output", out]) == 0
    assert "written as a toy" in capsys.readouterr().out
    base = open_base("reference:llama")
    first, second = (open_adapted(base, name) for name in ("reference:llama", out))
    assert second.format is TOY
    assert first.tuning.scale == second.tuning.scale
    assert first.changed.keys() == second.changed.keys()
    assert all((first.changed[name] == second.changed[name]).all() for name in first.changed)
    assert main(["convert", out, "--model", "reference:llama", "--to", "mlx", "--output",
                 str(tmp_path / "mlx")]) == 0  # fmt: skip
    assert main(["inspect", out, "--model", "reference:llama"]) == 0
    assert "toy   the scale itself: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "toy" in capsys.readouterr().out


def test_a_format_that_is_not_in_the_registry_is_not_known(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["convert", "reference:llama", "--to", "toy", "--output", str(tmp_path / "a.toy")])
    assert "invalid choice: 'toy'" in capsys.readouterr().err
    (tmp_path / "a.toy").write_text("{}")
    with pytest.raises(FormatError, match="another file"):
        open_adapted(open_base("reference:llama"), str(tmp_path / "a.toy"))


def test_the_registry_has_every_format_and_every_architecture():
    for package, values, registered in (
        ("minilora.io.formats", Format, registry.FORMATS.values()),
        ("minilora.io.architectures", architectures.Architecture, ARCHITECTURES.values()),
    ):
        modules = pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}.")
        names = [name for _, name, _ in modules]
        found = [v for name in names for v in vars(importlib.import_module(name)).values()]
        assert {id(v) for v in found if isinstance(v, values)} == {id(v) for v in registered}


# The files of the toy architecture: GPT-2's equations under other names, its weights (out, in).


@dataclass(frozen=True)
class Toy(GPT2):
    pass


TOY_ARCHITECTURE = replace(
    GPT_2,
    name="ToyLMHeadModel",
    model_type="toy",
    config=Toy,
    block={**GPT_2.block, "qkv": "attention.query_key_value"},
    transposed=False,
    gguf=None,
    mlx_prefix=None,
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(models.FORWARD, Toy, models.gpt2)
    monkeypatch.setitem(architectures.ARCHITECTURES, "ToyLMHeadModel", TOY_ARCHITECTURE)
    return Toy(vocab=11, d=8, layers=2, heads=2, ffn=12, positions=9)


def adapted_toy(c):
    rng = np.random.default_rng(0)
    base = draw_weights(c, rng)
    lora = LoraConfig(r=2, target_modules=["qkv", "down"])
    W, tuning = inject(base, lora, c.matrices(), rng)
    return base, W | {name: W[name] + 0.1 for name in tuning.trained}, tuning, lora


def test_an_architecture_in_three_files_is_read_and_written(toy, tmp_path):
    base, W, tuning, lora = adapted_toy(toy)
    huggingface.write_model(tmp_path / "model", toy, base)
    peft.write_adapter(tmp_path / "adapter", toy, W, tuning, lora)
    opened = open_base(str(tmp_path / "model"), np.float64)
    assert opened.config == toy
    adapted = open_adapted(opened, str(tmp_path / "adapter"), np.float64)
    batch = Batch(np.array([[3, 1, 4, 1, 5]]))
    z, _ = logits(batch, adapted.weights, toy, adapted.tuning)
    assert (z == logits(batch, W, toy, tuning)[0]).all()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["ToyLMHeadModel"]
    assert not json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())["fan_in_fan_out"]


def test_a_format_without_the_architecture_refuses_it(toy, tmp_path):
    _, W, tuning, _ = adapted_toy(toy)
    with pytest.raises(FormatError, match="architecture: found toy"):
        mlx.write_adapter(Path(tmp_path), toy, W, tuning)


def test_an_architecture_that_is_not_in_the_registry_is_not_known():
    c = Toy(vocab=11, d=8, layers=2, heads=2, ffn=12, positions=9)
    with pytest.raises(TypeError, match="expected a configuration of LlamaForCausalLM"):
        architectures.module_paths(c)
