"""What a step costs: the arithmetic counted, the processes that do it, the command."""

import json
import re

import numpy as np
import pytest

from minilora import bench
from minilora.bench import SIDES, SIZES, Missing, Side, flops, measure, table, write_case
from minilora.bench.own import Own
from minilora.cli import main
from minilora.formats.huggingface import read_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("case")
    write_case(at, SIZES["tiny"])
    return at


class Counted(np.ndarray):
    """Counts the multiplications and additions of matrix products of two axes or more."""

    done = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        plain = [np.asarray(v) if isinstance(v, Counted) else v for v in inputs]
        if "out" in options:
            options["out"] = tuple(np.asarray(v) for v in options["out"])
        y = getattr(ufunc, method)(*plain, **options)
        if ufunc is np.matmul:
            Counted.done += 2 * y.size * plain[0].shape[-1]
        return y.view(Counted) if isinstance(y, np.ndarray) else y


def test_the_arithmetic_counted_is_what_the_products_do(folder):
    """All of it is done, and beyond it: hidden pairs, and gradients below the first adapter."""
    size, own = SIZES["tiny"], Own(str(folder), 1)
    W = {name: w.view(Counted) for name, w in (own.W | own.params).items()}
    own.W, own.params = W, {name: W[name] for name in own.params}
    Counted.done = 0
    own.forward()
    forward = Counted.done
    own.step()
    step = Counted.done - forward
    c, (b, t) = size.c, (size.b, size.t)
    hidden = b * c.layers * c.d * t * (t - 1) // 2
    first = 3 * c.d * c.d
    cost = flops(c, b, t)
    assert forward == cost["forward"] + 4 * hidden
    assert step == cost["step"] + 12 * hidden + 2 * b * t * first


def test_every_side_reads_the_same_case(folder):
    c, W = read_model(folder / "model")
    assert c == SIZES["tiny"].c
    assert {name: w.shape for name, w in W.items()} == c.shapes()
    whole, quantised = Own(str(folder), 1), Own(str(folder), 1, quantised=True)
    again = Own(str(folder), 1, recompute=True)
    losses = [side.step() for side in (whole, quantised, again)]
    assert losses[2] == losses[0] != losses[1]
    assert whole.step() < losses[0]


def test_a_side_works_in_a_process_of_its_own(folder):
    with Side("minilora", folder, threads=1) as side:
        assert side.versions.startswith("minilora ")
        first, later = side.run("step"), side.run("step", 3)
        assert first["value"] > later["value"] > 0
        assert later["seconds"] > 0
        assert side.run("memory")["value"] > 10**7
        with pytest.raises(RuntimeError, match=r"minilora ended: [\s\S]*no attribute 'nothing'"):
            side.run("nothing")
    assert side.process.poll() is not None


def test_a_library_that_is_missing_is_named_with_its_extra(folder, monkeypatch):
    monkeypatch.setitem(SIDES, "absent", "minilora_absent:Side")
    with pytest.raises(Missing, match=r"minilora_absent is not installed; pip install 'minilora\["):
        Side("absent", folder, threads=1)
    assert main(["bench", "--peer", "absent", "--size", "tiny", "--rounds", "1"]) == 3


def test_ratios_are_of_neighbours_and_their_median(folder, monkeypatch):
    """Two sides that take known times in turn."""
    own, other = iter([1.0, 9.0, 3.0]), iter([2.0, 3.0, 4.0])

    class Timed:
        def __init__(self, name, *_, **__):
            self.versions, self.times = name, own if name == "minilora" else other
            self.kind = {}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def run(self, what, times=1):
            if what == "products":
                return {"value": 1e9}
            if what == "memory":
                return {"value": 10 if self.versions == "minilora" else 40}
            if what == "step" and self.kind.setdefault("steps", 0) >= 2:
                return {"seconds": next(self.times), "cpu": 1.0, "value": 1.0}
            self.kind["steps"] = self.kind.get("steps", 0) + (what == "step")
            return {"seconds": 1.0, "cpu": 1.0, "value": 1.0}

    monkeypatch.setattr(bench, "Side", Timed)
    found = measure("tiny", folder, "peft", 1, rounds=3)
    assert found.ratio["step"] == 0.75  # of 1/2, 9/3 and 3/4
    assert found.spread["step"] == (0.625, 1.875)
    assert found.seconds["step"] == (3.0, 3.0)
    assert found.memory_ratio == 0.25
    cost = flops(SIZES["tiny"].c, 4, 32)["step"]
    assert found.share["step"] == cost / 3.0 / 1e9
    assert re.search(r"tiny +1 +0\.75 \(0\.62 to 1\.88\)", table([found]))


def test_the_command_prints_and_writes_what_it_measured(tmp_path, capsys):
    file = tmp_path / "bench.json"
    status = main(
        ["bench", "--peer", "minilora", "--size", "tiny", "--rounds", "1", "--json", str(file)]
    )
    assert status == 0
    (found,) = json.loads(file.read_text())
    assert found["size"] == "tiny"
    assert found["loss"][0] == found["loss"][1]
    assert "medians of 1 rounds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "huge"], "--size huge: expected some of tiny, small"),
        (["--peer", "jax"], "--peer jax: expected one of minilora, peft"),
        (["--threads", "1,0"], "--threads 0: expected numbers from 1"),
        (["--rounds", "-1"], "--rounds -1: expected at least 1"),
        (["--tokens", "0"], "--tokens 0: expected at least 1"),
        (["--json", "/no/such/folder/x"], "cannot write"),
    ],
)
def test_wrong_usage_is_status_2_and_says_what_was_expected(arguments, words, capsys):
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err
