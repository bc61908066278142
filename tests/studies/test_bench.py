"""What a step costs: the arithmetic counted, the processes that do it, the command."""

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from minilora.cli.main import main
from minilora.io.errors import FormatError
from minilora.io.formats.huggingface import read_model
from minilora.studies.bench.cases import KINDS, NEW, SIZES, flops, write_case
from minilora.studies.bench.measure import measure
from minilora.studies.bench.minilora_side import MiniloraSide, products_of
from minilora.studies.bench.results import read_results, table, tables
from minilora.studies.bench.sides import SIDES, Missing, Side

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("case")
    write_case(at, SIZES["tiny"])
    return at


class Counted(np.ndarray):
    """Counts the multiplications and additions of matrix products of two axes or more."""

    done = 0
    __array_priority__ = 1  # so that np.concatenate gives this type, too

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        plain = [np.asarray(v) if isinstance(v, Counted) else v for v in inputs]
        if "out" in options:
            options["out"] = tuple(np.asarray(v) for v in options["out"])
        y = getattr(ufunc, method)(*plain, **options)
        if ufunc is np.matmul:
            Counted.done += 2 * y.size * plain[0].shape[-1]
        return y.view(Counted) if isinstance(y, np.ndarray) else y


def test_the_arithmetic_counted_is_what_the_products_do(folder):
    """All of it is done, and beyond it nothing but pairs that the mask hides."""
    size, own = SIZES["tiny"], MiniloraSide(str(folder), 1)
    W = {name: w.view(Counted) for name, w in (own.W | own.params).items()}
    own.W, own.params = W, {name: W[name] for name in own.params}
    Counted.done = 0
    own.forward()
    forward = Counted.done
    own.step()
    step = Counted.done - forward
    c, (b, t) = size.c, (size.b, size.t)
    hidden = b * c.layers * c.d * t * (t - 1) // 2
    cost = flops(c, b, t)
    assert forward == cost["forward"] + 4 * hidden
    assert step == cost["step"] + 12 * hidden


def test_every_side_reads_the_same_case(folder):
    c, W = read_model(folder / "model")
    assert c == SIZES["tiny"].c
    assert {name: w.shape for name, w in W.items()} == c.shapes()
    whole, quantized = MiniloraSide(str(folder), 1), MiniloraSide(str(folder), 1, quantized=True)
    again = MiniloraSide(str(folder), 1, gradient_checkpointing=True)
    losses = [side.step() for side in (whole, quantized, again)]
    assert losses[2] == losses[0] != losses[1]
    assert whole.step() < losses[0]


@pytest.mark.slow
def test_the_case_is_the_same_in_every_process(tmp_path):
    """The order of a set of names is not."""
    write = "import sys, pathlib, minilora.studies.bench.cases as b; " + (
        "b.write_case(pathlib.Path(sys.argv[1]), b.SIZES['tiny'], int(sys.argv[2]))"
    )
    for name, order, seed in (("first", "1", "0"), ("second", "2", "0"), ("other", "1", "1")):
        environment = {**os.environ, "PYTHONHASHSEED": order}
        (tmp_path / name).mkdir()
        command = [sys.executable, "-c", write, str(tmp_path / name), seed]
        subprocess.run(command, check=True, env=environment)
    files = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*")]
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == 4
    for file in weights:
        first, second, other = (
            (tmp_path / n / file).read_bytes() for n in ("first", "second", "other")
        )
        assert first == second != other


def test_a_side_works_in_a_process_of_its_own(folder):
    with Side("minilora", folder, threads=1) as side:
        assert side.versions.startswith("minilora ")
        first, later = side.run("step"), side.run("step", 3)
        assert first["value"] > later["value"] > 0
        assert later["seconds"] > 0
        assert side.run("memory")["value"] > 10**7
        assert side.kinds == list(KINDS)
        assert len(side.run("generate")["value"]) == NEW
        with pytest.raises(RuntimeError, match=r"minilora ended: [\s\S]*no attribute 'nothing'"):
            side.run("nothing")
    assert side.process.poll() is not None


@pytest.mark.slow
def test_a_library_that_is_missing_is_named_with_its_extra(folder, monkeypatch):
    monkeypatch.setitem(SIDES, "absent", "minilora_absent:Side")
    with pytest.raises(Missing, match=r"minilora_absent is not installed.*'minilora.peers.'"):
        Side("absent", folder, threads=1)
    monkeypatch.setitem(SIDES, "jax", "jax_absent:Side")
    with pytest.raises(Missing, match=r"jax_absent is not installed.*'minilora.jax.'"):
        Side("jax", folder, threads=1)
    assert main(["bench", "--peer", "absent", "--size", "tiny", "--rounds", "1"]) == 3


@pytest.mark.slow
def test_what_is_missing_gives_up_nothing_of_the_others(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(SIDES, "absent", "minilora_absent:Side")
    kept = tmp_path / "results.json"
    command = ["bench", "--peer", "absent,minilora", "--size", "tiny", "--rounds", "1"]
    assert main([*command, "--kind", "step", "--json", str(kept)]) == 3
    out, err = capsys.readouterr()
    assert err.count("minilora_absent is not installed") == 1
    assert [each.peer for each in read_results(kept)] == ["minilora"]
    assert "over minilora" in out


class Timed:
    """A side that has run as long as it says, in turn with the other."""

    seconds: ClassVar = {"own": [1.0, 9.0, 3.0], "other": [2.0, 3.0, 4.0]}
    tokens: ClassVar = {"own": [7, 8, 9, 9], "other": [7, 8, 5, 9]}
    warming = 3

    def __init__(self, name, *_, **__):
        self.own, self.versions, self.steps = name == "minilora", name, 0
        self.who = "own" if self.own else "other"
        self.kinds = list(KINDS) if name != "torch" else ["step", "forward"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, what, times=1):
        seconds = 1.0
        if what == "step":
            self.steps += 1
            if self.steps > self.warming:
                seconds = self.seconds[self.who][self.steps - self.warming - 1]
        value = {
            "products": 1e9,
            "memory": 10 if self.own else 40,
            "generate": self.tokens[self.who],
        }.get(what, 1.0)
        return {"seconds": seconds, "cpu": 1.0, "value": value}


@pytest.mark.slow
def test_ratios_are_of_neighbours_and_their_median(folder, monkeypatch):
    """Two sides that take known times in turn."""
    monkeypatch.setattr("minilora.studies.bench.measure.Side", Timed)
    found = measure("tiny", folder, "peft", 1, rounds=3)
    assert found.ratio["step"] == 0.75  # of 1/2, 9/3 and 3/4
    assert found.spread["step"] == (0.625, 1.875)
    assert found.seconds["step"] == (3.0, 3.0)
    assert found.memory_ratio == 0.25
    cost = flops(SIZES["tiny"].c, 4, 32)["step"]
    assert found.share["step"] == cost / 3.0 / 1e9
    assert found.share.keys() == {"step", "forward"}
    assert re.search(r"tiny +1 +0\.75 \(0\.62 to 1\.88\)", table([found]))


@pytest.mark.slow
def test_tokens_are_alike_up_to_the_first_that_differs(folder, monkeypatch):
    monkeypatch.setattr("minilora.studies.bench.measure.Side", Timed)
    found = measure("tiny", folder, "peft", 1, rounds=1)
    assert found.alike == (2, 4)
    assert "2 of 4" in table([found])
    monkeypatch.setitem(Timed.tokens, "other", Timed.tokens["own"])
    assert measure("tiny", folder, "peft", 1, rounds=1).alike == (4, 4)


@pytest.mark.parametrize(
    ("size", "peer", "kinds", "left"),
    [
        ("tiny", "torch", KINDS, ["step", "forward"]),
        ("smollm2-512", "peft", KINDS, ["step", "forward"]),
        ("tiny", "peft", ["generate"], ["generate"]),
        ("tiny", "torch", ["generate"], []),
    ],
)
def test_only_what_both_can_do_and_what_is_asked_for_is_measured(
    size, peer, kinds, left, folder, monkeypatch
):
    monkeypatch.setattr("minilora.studies.bench.measure.Side", Timed)
    found = measure(size, folder, peer, 1, rounds=1, kinds=kinds)
    assert list(found.ratio) == left
    heads, cells = (re.split("  +", line.strip()) for line in table([found]).splitlines())
    row = dict(zip(heads, cells, strict=True))
    assert [kind for kind in KINDS if row[kind] == "-"] == [k for k in KINDS if k not in left]
    assert (row["ms"] == "-") == ("step" not in left)


@pytest.mark.slow
def test_the_command_prints_and_writes_what_it_measured(tmp_path, capsys):
    file = tmp_path / "bench.json"
    status = main(
        ["bench", "--peer", "minilora", "--size", "tiny", "--rounds", "1", "--json", str(file)]
    )
    assert status == 0
    (found,) = json.loads(file.read_text())
    assert found["size"] == "tiny"
    assert found["loss"][0] == found["loss"][1]
    assert found["alike"] == [NEW, NEW]
    (read,) = read_results(file)
    assert json.loads(json.dumps(read.json())) == found
    printed = capsys.readouterr().out
    assert "medians of 1 rounds" in printed
    assert tables([read]) in printed
    heads = tables([read, replace(read, peer="another")]).splitlines()[::4]
    assert [re.search("over ([a-z]*)", head)[1] for head in heads] == ["minilora", "another"]
    file.write_text(json.dumps([{**found, "ratio": 1}]).replace('"ratio"', '"ratios"'))
    with pytest.raises(FormatError, match="expected results of minilora bench --json"):
        read_results(file)


@pytest.mark.slow
def test_the_own_side_says_whose_products_it_uses_and_who_chose_them(folder, monkeypatch):
    if "openblas" not in products_of():
        pytest.skip(f"no OpenBLAS: {products_of()}")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("Nehalem is an x86-64 processor")
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Nehalem")
    with Side("minilora", folder, threads=1) as side:
        assert side.versions.endswith(", openblas for Nehalem by OPENBLAS_CORETYPE")
    monkeypatch.delenv("OPENBLAS_CORETYPE")
    with Side("minilora", folder, threads=1) as side:
        assert "CORETYPE" not in side.versions


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "huge"], "--size huge: expected one or more of tiny, small"),
        (["--peer", "mlx"], "--peer mlx: expected one or more of minilora, peft"),
        (["--kind", "steps"], "--kind steps: expected one or more of step, forward, generate"),
        (["--threads", "1,0"], "--threads 0: expected numbers from 1"),
        (["--rounds", "-1"], "--rounds -1: expected at least 1"),
        (["--rounds", "0"], "--rounds 0: expected at least 1"),
        (["--json", ""], "--json '': expected a value"),
        (["--group-tokens", "0"], "--group-tokens 0: expected at least 1"),
        (["--json", "/no/such/folder/x"], "cannot write"),
    ],
)
def test_wrong_usage_is_status_2_and_says_what_was_expected(arguments, words, capsys):
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_side_that_cannot_begin_leaves_no_process(folder, monkeypatch):
    begun, right = [], subprocess.Popen

    def watched(*arguments, **settings):
        begun.append(right(*arguments, **settings))
        return begun[-1]

    monkeypatch.setattr(subprocess, "Popen", watched)
    monkeypatch.setitem(SIDES, "broken", "minilora.studies.bench.cases:nothing")
    with pytest.raises(RuntimeError, match="broken ended"):
        Side("broken", folder, threads=1)
    (process,) = begun
    assert process.poll() is not None
    assert process.stdin.closed
    assert process.stdout.closed
