"""AdamW over joined arrays: the bits of each array alone."""

import numpy as np
import pytest
from calculus import same_bits

from minilora.spec import optim
from minilora.training import fused_adamw

SHAPES = {"a.A": (3, 3), "a.B": (3, 3)}


def reals(rng):
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("most", [1, 7, 9, 2**16])
def test_adamw_of_joined_arrays_has_the_bits_of_each_alone(most, monkeypatch):
    """Whatever the rates, the layouts, the dtypes, and what the state holds already."""
    monkeypatch.setattr(fused_adamw, "JOINED", most)
    rng = np.random.default_rng(most)
    params = reals(rng) | {"b.A": reals(rng)["a.A"].astype(np.float32), "b.B": np.ones((3, 3))}
    rates = dict.fromkeys(params, 0.1) | {"a.B": 0.3}
    alone = {name: ({name: p}, optim.AdamState()) for name, p in params.items()}
    state = optim.AdamState()
    for k in range(3):
        g = {
            name: rng.standard_normal(p.shape[::-1]).T.astype(p.dtype) for name, p in params.items()
        }
        if k == 1:  # a parameter that is trained from here on
            params["c.A"], g["c.A"], rates["c.A"] = np.ones((2, 2)), np.eye(2), 0.1
            alone["c.A"] = {"c.A": params["c.A"]}, optim.AdamState(state.t)
        given = {name: p.copy() for name, p in params.items()}
        new, state = fused_adamw.fused_adamw(params, g, state, rates)
        assert all(same_bits(params[name], p) for name, p in given.items())
        for name, (p, own) in alone.items():
            alone[name] = optim.adamw(p, {name: g[name]}, own, rates[name])
            assert same_bits(new[name], alone[name][0][name])
            assert same_bits(state.m[name], alone[name][1].m[name])
            assert same_bits(state.v[name], alone[name][1].v[name])
        assert new.keys() == params.keys()
        for mean in (state.m, state.v):
            assert list(mean) == list(params)
            assert len(mean) == len(params)
            assert "d.A" not in mean
            with pytest.raises(KeyError, match=r"d\.A"):
                mean["d.A"]
        params = new


@pytest.mark.parametrize(
    ("most", "runs"),
    [
        (9, ["a", "bc", "d", "ef"]),
        (8, ["a", "b", "c", "d", "ef"]),
        (14, ["ab", "c", "d", "ef"]),
        (18, ["abc", "d", "ef"]),
        (19, ["abc", "d", "ef"]),
        (10**6, ["abcd", "ef"]),
    ],
)
def test_arrays_are_joined_to_so_many_entries_and_at_their_rate(most, runs, monkeypatch):
    monkeypatch.setattr(fused_adamw, "JOINED", most)
    sizes = {"a": 9, "b": 4, "c": 5, "d": 20, "e": 1, "f": 2}
    params = {name: np.ones(size) for name, size in sizes.items()}
    rates = dict.fromkeys("abcd", 0.1) | dict.fromkeys("ef", 0.2)
    found = list(fused_adamw._alike(params, params, optim.AdamState(), rates))
    assert ["".join(run) for run in found] == runs
