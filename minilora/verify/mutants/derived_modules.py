"""Mutants of modules with the gradients of their own forward, as an autograd library has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from minilora.verify.mutants.derived import STEP, OfMutant, joined
from minilora.verify.mutants.module import MODULES
from minilora.verify.mutants.mutant import Mutant
from minilora.verify.mutants.references.helpers import Array
from minilora.verify.mutants.references.module import Modules

OF_ADAPTER = ("A", "B", "magnitude", "lora_bias")

MAX_ENTRIES = 2000
"""So many entries of all operands are differentiated, one forward each."""

PADDING = {
    "# looked up": "looked_up = np.where((x == layer.get('padding_idx', -1))[..., None], "
    "looked_up.real, looked_up)"
}
"""The padding row has no gradient."""

HELD = {"# norm": "norm = self.memory.setdefault('norm', norm)"}
"""DoRA's norm is that of the first call, a constant of the others."""


class DifferentiatedModule(OfMutant):
    """A mutant of `Modules` whose gradients are its forward's.

    ∂⟨dy, y⟩/∂v = ⟨dy, Im y(v + i h)⟩ / h for each entry v, which has no
    difference that could cancel. NotImplementedError for
    more than `MAX_ENTRIES` entries.
    """

    def module(
        self, layer: Mapping[str, Any], adapter: Mapping[str, Any], x: Array, **options: Any
    ) -> dict[str, Array]:
        """The forward's output, and its derivatives."""
        dy = options.pop("dy", None)
        answer: dict[str, Array] = self.mutant.module(layer, adapter, x, **options)
        if dy is None:
            return answer
        given = {"layer": _wide(layer), "adapter": _wide(adapter), "x": _wide(x)}
        places = list(_differentiated(given))
        if sum(array.size for *_, array in places) > MAX_ENTRIES:
            raise NotImplementedError("too many entries")
        dtype, before = layer["W"].dtype, dict(self.mutant.memory)
        self._output(given, options)  # which norms are held
        for name, holder, key, array in places:
            gradient, moved = np.empty(array.shape), array.astype(complex)
            holder[key] = moved
            for i in np.ndindex(array.shape):
                moved[i] += 1j * STEP
                y = self._output(given, options)
                gradient[i] = (dy.astype(np.float64) * np.asarray(y).imag / STEP).sum()
                moved[i] = array[i]
            holder[key] = array
            answer[name] = gradient.astype(dtype)
        self.mutant.memory = before
        return answer

    def _output(self, given: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        layer, adapter, x = given["layer"], given["adapter"], given["x"]
        mode, index = options["mode"], options.get("index")
        return self.mutant.answer(layer, adapter, x, mode, None, index)["y"]


def _differentiated(given: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str, Array]]:
    """Of each array that has a gradient: the gradient's name, the array's dict and key, itself."""
    adapter = given["adapter"]
    if given["x"].dtype.kind == "f":
        yield "dx", given, "x", given["x"]
    for name in OF_ADAPTER:
        if adapter.get(name) is not None:
            yield f"d{name}", adapter, name, adapter[name]
    for name in "AB" if isinstance(adapter.get("out"), dict) else "":
        yield f"out.d{name}", adapter["out"], name, adapter["out"][name]


def _wide(value: Any) -> Any:
    """Arrays of real numbers in float64, in dicts of their own."""
    if isinstance(value, Mapping):
        return {name: _wide(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biu":
        return value.astype(np.float64)
    return value


def of_modules(m: Mutant) -> bool:
    """Whether a mutant is an edit of the layers of every kind."""
    return m.reference is not None and m.reference.parts == MODULES.parts


@cache
def differentiated_module(m: Mutant, holds_norm: bool) -> Mutant:
    """The mutant with the gradients of its forward; with DoRA's norm held constant in them."""
    assert m.reference is not None
    held = joined(m.edits, PADDING | (HELD if holds_norm else {}))
    if held is None:
        raise ValueError(f"{m.id} has another text in the place of the norm")
    make = m.reference.edited(held)
    return replace(m, make=lambda: DifferentiatedModule(make()))


class RightGradients(OfMutant):
    """A mutant of `Modules` whose gradients are those of the right forward."""

    def module(
        self, layer: Mapping[str, Any], adapter: Mapping[str, Any], x: Array, **options: Any
    ) -> dict[str, Array]:
        """The wrong output, and the right gradients."""
        right = Modules().module(layer, adapter, x, **options)
        dy = options.pop("dy", None)
        wrong: dict[str, Array] = self.mutant.module(layer, adapter, x, **options)
        return wrong if dy is None else right | {"y": wrong["y"]}


@cache
def right_gradients(m: Mutant) -> Mutant:
    """The mutant with right gradients."""
    return replace(m, make=lambda: RightGradients(m.make()))
