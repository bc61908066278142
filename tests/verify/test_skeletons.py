"""`minilora init-adapter`: its files put a library under verification."""

import json
import subprocess
import sys

import pytest
from extras import needs

from minilora.cli.main import main
from minilora.verify.skeletons import KINDS, skeleton

LAYERS = """
import torch


class Plain(torch.nn.Module):
    def __init__(self, in_features, out_features, rank, alpha, bias=True):
        super().__init__()
        self.scale = alpha / rank
        self.weight = torch.nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = torch.nn.Parameter(torch.ones(out_features)) if bias else None
        self.down = torch.nn.Parameter(torch.zeros(in_features, rank))
        self.up = torch.nn.Parameter(torch.zeros(rank, out_features))

    def forward(self, x):
        y = torch.nn.functional.linear(x, self.weight, self.bias)
        return y + self.scale * (x @ self.down @ self.up)

    def merge(self):
        self.weight.data += self.scale * (self.down @ self.up).T


class Wrong(Plain):
    def __init__(self, in_features, out_features, rank, alpha, bias=True):
        super().__init__(in_features, out_features, rank, alpha * rank, bias)


class Wrapping(torch.nn.Module):
    def __init__(self, linear, r=8, lora_alpha=16, lora_dropout=0.0):
        super().__init__()
        self.linear, self.s = linear, lora_alpha / r
        self.A = torch.nn.Linear(linear.in_features, r, bias=False)
        self.B = torch.nn.Linear(r, linear.out_features, bias=False)

    def forward(self, x):
        return self.linear(x) + self.s * self.B(self.A(x))


class Odd(Plain):
    def __init__(self, in_features, out_features, rank, alpha, flavour):
        super().__init__(in_features, out_features, rank, alpha)
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mylib.py").write_text(LAYERS)
    yield tmp_path
    sys.modules.pop("mylib", None)


def verified(target, *options):
    """What `minilora verify` says of it, in a process of its own."""
    command = [sys.executable, "-m", "minilora", "verify", *target, "--profile", "quick", *options]
    ran = subprocess.run([*command, "--json", "-"], capture_output=True, text=True)
    return json.loads(ran.stdout)["summary"]


@pytest.mark.slow
@needs("torch")
@pytest.mark.parametrize(
    ("layer", "status"), [("Plain", 0), ("Wrapping", 0), ("Wrong", 1), ("Odd", 3)]
)
def test_a_layer_of_torch_is_verified_without_writing_a_line(library, capsys, layer, status):
    assert main(["init-adapter", "mylib", "--layer", f"mylib:{layer}"]) == 0
    printed = capsys.readouterr().out
    assert ("the argument flavour was not found out" in printed) == (layer == "Odd")
    summary = verified(["tests/lora_adapter.py:Adapter"], "--level", "linear,merge")
    assert summary["exit_status"] == status
    assert (summary["ran"] > 20) == (layer != "Odd")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "target"),
    [
        pytest.param("jax", ["tests/lora_adapter.py:Adapter"], marks=needs("jax")),
        ("cmd", ["--cmd", f"{sys.executable} tests/lora_driver.py"]),
    ],
)
def test_the_other_skeletons_answer_as_they_are(library, capsys, kind, target):
    assert main(["init-adapter", "mylib", "--kind", kind]) == 0
    summary = verified(target, "--level", "linear")
    assert summary["exit_status"] == 0
    assert summary["ran"] > 8


@pytest.mark.slow
@needs("torch")
def test_the_test_that_is_written_runs(library, capsys):
    assert main(["init-adapter", "mylib", "--layer", "mylib:Wrong"]) == 0
    command = [sys.executable, "-m", "pytest", "tests/test_lora.py", "-q", "-p", "no:xdist"]
    ran = subprocess.run([*command, "-k", "merge and float64"], capture_output=True, text=True)
    assert ran.returncode == 1
    assert "merge.weight" in ran.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kind", "torch"], "--layer is missing"),
        (["--kind", "jax", "--layer", "a:b"], "expected --kind torch"),
        (["--layer", "mylib"], "expected module:Class"),
    ],
)
def test_what_cannot_be_meant_is_refused(library, capsys, options, words):
    assert main(["init-adapter", "mylib", *options]) == 2
    assert words in capsys.readouterr().err


def test_no_file_is_overwritten(library, capsys):
    assert main(["init-adapter", "mylib", "--kind", "cmd"]) == 0
    (library / "tests/lora_driver.py").write_text("mine")
    assert main(["init-adapter", "mylib", "--kind", "cmd"]) == 2
    assert (library / "tests/lora_driver.py").read_text() == "mine"


@pytest.mark.parametrize("kind", KINDS)
def test_every_skeleton_compiles_and_names_the_library(kind):
    made = skeleton(kind, "some-library", "tests", "some.module:Layer")
    for name, text in made.items():
        if name.endswith(".py"):
            compile(text, name, "exec")
            assert "some-library" in text
    assert json.loads(made["lora_known.json"]) == []
