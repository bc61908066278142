"""`minilora init-adapter`: its files put a library under verification."""

import json
import subprocess
import sys

import pytest
from extras import needs

from minilora.cli.main import main
from minilora.verify.checks.registry import CHECKS
from minilora.verify.engine import run
from minilora.verify.skeletons import KINDS, skeleton

LAYERS = """
from dataclasses import dataclass

import torch
from torch.nn.utils import parametrize


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

    def unmerge(self):
        self.weight.data -= self.scale * (self.down @ self.up).T


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


class Branch(torch.nn.Module):
    def __init__(self, in_dim, out_dim, rank):
        super().__init__()
        self.in_proj = torch.nn.Parameter(torch.zeros(in_dim, rank))
        self.out_proj = torch.nn.Parameter(torch.zeros(rank, out_dim))

    def forward(self, x):
        return x @ self.in_proj @ self.out_proj

    def merge(self, module):
        module.weight.data += (self.in_proj @ self.out_proj).T
        return module


class Around(torch.nn.Module):
    def __init__(self, module, branch):
        super().__init__()
        self.module, self.branch = module, branch

    @classmethod
    def from_linear(cls, linear, rank):
        return cls(linear, Branch(linear.in_features, linear.out_features, rank))

    def forward(self, x):
        return self.module(x) + self.branch(x)


class OnWeight(torch.nn.Module):
    def __init__(self, fan_in, fan_out, rank=4, lora_alpha=1):
        super().__init__()
        self.lora_A = torch.nn.Parameter(torch.zeros(rank, fan_in))
        self.lora_B = torch.nn.Parameter(torch.zeros(fan_out, rank))
        self.scaling = lora_alpha / rank

    def forward(self, weight):
        return weight + self.scaling * self.lora_B @ self.lora_A


def add_lora(model):
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            added = OnWeight(layer.in_features, layer.out_features)
            parametrize.register_parametrization(layer, "weight", added)


@dataclass
class Settings:
    rank: int = 8
    alpha: float = 16


class Unusual(torch.nn.Module):
    def __init__(self, host, settings: Settings, gain=1.0):
        super().__init__()
        self.host, self.gain = host, gain * settings.alpha / settings.rank
        self.squeeze = torch.nn.Parameter(torch.zeros(settings.rank, host.in_features))
        self.expand = torch.nn.Parameter(torch.zeros(host.out_features, settings.rank))

    def forward(self, x):
        return self.host(x) + self.gain * (x @ self.squeeze.T @ self.expand.T)


class Nameless(Plain):
    def __init__(self, nin, nout, low, gain):
        super().__init__(nin, nout, low, gain * low)


def computed(x, weight, down, up, bias, scaling):
    return x @ weight.T + scaling * (x @ down @ up) + bias


class Odd(Plain):
    def __init__(self, in_features, out_features, rank, alpha, flavour):
        super().__init__(in_features, out_features, rank, alpha)
        flavour.upper()
"""
JAX_LAYERS = """
def adapted(inputs, frozen, squeeze, expand, gain=1.0):
    return inputs @ frozen + gain * ((inputs @ squeeze) @ expand)


def branch(x, lora_a, lora_b, alpha, rank):
    return alpha / rank * (x @ lora_a.T @ lora_b.T)
"""
FOUND = {
    "Wrapping": "linear=torch.nn.Linear(n, m, bias=bias is not None), r=r, lora_alpha=alpha",
    "Branch": "no argument sets the scale, which is 1 at rank 3",
    "Around": "built by: mylib.Around.from_linear(",
    "add_lora": "no argument sets the rank, which is 4",
    "Unusual": "settings=mylib.Settings(rank=r, alpha=alpha)",
    "Nameless": "gain is given alpha / r: the branch is scaled by it",
    "Odd": "complete it: mylib.Odd(",
}
"""What the command says of some of them."""


@pytest.fixture
def library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mylib.py").write_text(LAYERS)
    yield tmp_path
    sys.modules.pop("mylib", None)


def verified(target, *options):
    """What `minilora verify` says of it, in a process of its own."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "minilora",
        "verify",
        *target,
        "--profile",
        "quick",
        *("--time-limit", "600"),  # JAX compiles for long where others use the processors
        *options,
    ]
    ran = subprocess.run([*command, "--json", "-"], capture_output=True, text=True)
    return json.loads(ran.stdout)["summary"]


@pytest.mark.slow
@needs("torch")
@pytest.mark.parametrize(("layer", "status"), [("Plain", 0), ("Wrong", 1), ("Odd", 3)])
def test_a_layer_of_torch_is_verified_without_writing_a_line(library, capsys, layer, status):
    assert main(["init-adapter", "mylib", "--layer", f"mylib:{layer}"]) == 0
    assert FOUND.get(layer, "") in capsys.readouterr().out
    summary = verified(["tests/lora_adapter.py:Adapter"], "--level", "linear,merge")
    assert summary["exit_status"] == status
    assert (summary["ran"] > 20) == (layer != "Odd")


@pytest.mark.slow
@needs("torch")
@pytest.mark.parametrize(
    ("layer", "methods"),
    [
        ("Plain", "lora_linear, lora_linear_vjp, merge, unmerge"),
        ("Wrapping", "lora_linear, lora_linear_vjp"),
        ("Branch", "lora_linear, lora_linear_vjp, merge"),
        ("Around", "lora_linear, lora_linear_vjp"),
        ("Around.from_linear", "lora_linear, lora_linear_vjp"),
        ("OnWeight", "lora_linear, lora_linear_vjp, merge"),
        ("add_lora", "lora_linear, lora_linear_vjp"),
        ("Unusual", "lora_linear, lora_linear_vjp"),
        ("Nameless", "lora_linear, lora_linear_vjp, merge, unmerge"),
        ("computed", "lora_linear, lora_linear_vjp"),
        ("adapted", "lora_linear, lora_linear_vjp"),
        ("branch", "lora_linear, lora_linear_vjp"),
    ],
)
def test_adapters_that_are_written_agree(library, capsys, layer, methods):
    kind = "jax" if layer in ("adapted", "branch") else "torch"
    if kind == "jax":
        pytest.importorskip("jax")
        (library / "mylib.py").write_text(JAX_LAYERS)
    assert main(["init-adapter", "mylib", "--kind", kind, "--layer", f"mylib:{layer}"]) == 0
    printed = capsys.readouterr().out
    assert f"tried, and they answer: {methods}\n" in printed
    assert FOUND.get(layer, "") in printed
    names = {}
    exec((library / "tests/lora_adapter.py").read_text(), names)
    checks = [c for c in CHECKS if c.id in ("linear.forward", "linear.vjp", "merge.weight")]
    report = run(checks, names["Adapter"](), dtypes=["float64"], profile="quick")
    assert {result.status for result in report.results} <= {"pass", "skip"}
    assert report.ran == len({"lora_linear", "lora_linear_vjp", "merge"} & {*methods.split(", ")})


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
        (["--kind", "cmd", "--layer", "a:b"], "expected --kind torch or jax"),
        (["--layer", "mylib"], "expected module:Name"),
        (["--layer", "nolib:Layer"], "no module 'nolib'"),
        pytest.param(["--layer", "mylib:Plane"], "did you mean", marks=needs("torch")),
    ],
)
def test_what_cannot_be_meant_is_refused(library, capsys, options, words):
    assert main(["init-adapter", "mylib", *options]) in (2, 3)
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
