"""What a session's layer and its adapters mean: a `multi_adapter.AdaptedLayer`, or two.

A fused projection is one state, its adapters' blocks those of `layers.fuse`. A tied
table is two, that of the embedding and that of the head, and ends to be one weight where only one
of them is merged. A bias or a module that an adapter brings along stands in the base's place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from minilora.spec.layers import fuse
from minilora.spec.lora import Variant, scale, sum_gradients, twin
from minilora.spec.multi_adapter import AdaptedLayer, Adapter
from minilora.spec.ops import Back, OneHot, linear
from minilora.spec.variants import DORA

Array = np.ndarray
Given = Mapping[str, Any]

KINDS = ("linear", "conv1d", "embedding", "fused", "tied", "bias", "full")
"""The kinds of layers that `minilora.verify.implementation.contract` speaks of."""

PLACES: dict[str, tuple[str, ...]] = {
    "embedding": ("embedding",),
    "head": ("head",),
    "both": ("embedding", "head"),
}
"""Where in a tied layer an adapter may be."""


def blocks(adapter: Given, rows: Sequence[int]) -> list[tuple[slice, slice, slice]]:
    """For each part of a fused layer that the adapter is on: the rows of W, of A and of B."""
    found: list[tuple[slice, slice, slice]] = []
    row = used = 0
    for size, on in zip(rows, adapter["enable"], strict=True):
        if on:
            r = adapter["r"]
            ranks = slice(len(found) * r, (len(found) + 1) * r)
            found.append((slice(row, row + size), ranks, slice(used, used + size)))
            used += size
        row += size
    return found


def whole(adapter: Given, rows: Sequence[int]) -> tuple[Array, Array]:
    """A and B of a fused layer's adapter as those of its whole weight: B's blocks apart."""
    of = {part.start: (ranks, own) for part, ranks, own in blocks(adapter, rows)}
    starts = np.cumsum([0, *rows[:-1]])
    parts = []
    for start, size in zip(starts, rows, strict=True):
        if int(start) in of:
            ranks, own = of[int(start)]
            parts.append((adapter["A"][ranks], adapter["B"][own]))
        else:
            parts.append((adapter["A"][:0], np.zeros((size, 0), adapter["B"].dtype)))
    return fuse(parts)


@dataclass(frozen=True, eq=False)
class LayerState:
    """A layer of the contract with its adapters; each method gives another one or an answer.

    ``given`` are the adapters as they came, ``active`` those that act where nothing is disabled;
    ``dora`` is DoRA with its norm differentiated or not.
    """

    kind: str
    base: Given
    states: Mapping[str, AdaptedLayer]
    given: Mapping[str, Given] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    disabled: bool = False
    dora: Variant = DORA

    @classmethod
    def of(cls, layer: Given, dora: Variant = DORA) -> LayerState:
        """The layer without adapters. Raises NotImplementedError for an unknown kind."""
        kind, W = layer["kind"], layer["W"]
        if kind not in KINDS:
            raise NotImplementedError(f"no layer of kind {kind}")
        if kind == "tied":
            return cls(
                kind, layer, {"embedding": AdaptedLayer(W.T), "head": AdaptedLayer(W)}, dora=dora
            )
        b = None if kind == "bias" else layer.get("bias")
        state = AdaptedLayer(W.T if kind == "embedding" else W, None if b is None else b[:, None])
        return cls(kind, layer, {"": state}, dora=dora)

    def _adapters(self, adapter: Given) -> dict[str, Adapter]:
        """The adapter in each of the states that it is in."""
        A, B = adapter["A"], adapter["B"]
        s = scale(adapter["alpha"], adapter["r"], adapter.get("use_rslora", False))
        if self.kind == "fused":
            return {"": Adapter(whole(adapter, self.base["rows"]), s)}
        if self.kind == "tied":
            on = adapter["on"]
            head = twin(A, B) if on == "both" else (A, B)
            pairs = {"embedding": (A, B), "head": head}
            return {place: Adapter(pairs[place], s) for place in PLACES[on]}
        if adapter.get("use_dora", False):
            return {"": Adapter((A, B, adapter["magnitude"][:, None]), s, self.dora)}
        return {"": Adapter((A, B), s)}

    def _each(self, change: Callable[[AdaptedLayer], AdaptedLayer]) -> LayerState:
        return replace(self, states={place: change(s) for place, s in self.states.items()})

    def _there(self, *names: str) -> None:
        for name in names:
            if name not in self.given:
                raise ValueError(f"no adapter {name!r}: expected one of {', '.join(self.given)}")

    def add(self, name: str, adapter: Given) -> LayerState:
        """Another adapter, which does not act yet."""
        if name in self.given:
            raise ValueError(f"there is an adapter {name!r} already")
        own = self._adapters(adapter)
        states = {
            place: state.add(name, own[place]) if place in own else state
            for place, state in self.states.items()
        }
        return replace(self, states=states, given={**self.given, name: adapter})

    def activate(self, names: Sequence[str]) -> LayerState:
        """Just these act, and nothing is disabled."""
        self._there(*names)
        active = replace(self, active=tuple(names), disabled=False)
        return active._each(
            lambda state: state.enable().activate(*(n for n in names if n in state.adapters))
        )

    def disable(self) -> LayerState:
        """The base alone acts."""
        return replace(self, disabled=True)._each(AdaptedLayer.disable)

    def scale(self, name: str, factor: float) -> LayerState:
        """s is factor · alpha / r: of the factors, not of a bias or a module."""
        self._there(name)
        own = {place: factor * a.s for place, a in self._adapters(self.given[name]).items()}
        return replace(
            self,
            states={
                place: state.set_scale(name, own[place]) if place in own else state
                for place, state in self.states.items()
            },
        )

    @property
    def merged(self) -> bool:
        """Whether anything is."""
        return any(state.merged for state in self.states.values())

    def _some(self, change: Callable[[AdaptedLayer], AdaptedLayer]) -> LayerState:
        """The change in each state that does not refuse it. Raises ValueError where all do."""
        states, refused = dict(self.states), []
        for place, state in self.states.items():
            try:
                states[place] = change(state)
            except ValueError as error:
                refused.append(error)
        if len(refused) == len(states):
            raise refused[0]
        return replace(self, states=states)

    def merge(self) -> LayerState:
        """What is active goes into the weights."""
        return self._some(AdaptedLayer.merge)

    def unmerge(self) -> LayerState:
        """And out of them."""
        return self._some(AdaptedLayer.unmerge)

    def delete(self, name: str) -> LayerState:
        """Without the adapter."""
        self._there(name)
        rest = self._each(lambda state: state.delete(name) if name in state.adapters else state)
        return replace(
            rest,
            given={other: a for other, a in self.given.items() if other != name},
            active=tuple(other for other in self.active if other != name),
        )

    def own(self, part: str) -> tuple[str, Any]:
        """The acting adapter that has this part, and the part; of the base, where none has one."""
        names = [name for name in self.active if part in self.given[name] and not self.disabled]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} each bring {part}: expected one of them")
        return (names[0], self.given[names[0]][part]) if names else ("", self.base[part])

    def forward(self, x: Array) -> tuple[Array, Back]:
        """y (t, m), and ``back(dy)``: dx, and the gradients of what acts beside the weight.

        Their names are ``one.A`` and so on; what is merged has none.
        """
        if self.kind == "tied":
            return self._tied(x)
        (state,) = self.states.values()
        table = self.kind == "embedding"
        columns: Any = OneHot(x, state.W.shape[1]) if table else x.T
        h, back_h = state.forward(columns)
        after, back_after = self._after(h)

        def back(dy: Array) -> dict[str, Array]:
            dh, others = back_after(dy.T)
            dx, parts = back_h(dh)
            answer: dict[str, Array] = {} if table else {"dx": dx.T}
            answer |= self._named(parts) | others
            return answer

        return after.T, back

    def _after(self, h: Array) -> tuple[Array, Back]:
        """A bias, or a module, that an adapter may bring along."""
        if self.kind == "bias":
            name, b = self.own("bias")
            y = h + b[:, None]
            return y, lambda dy: (dy, {f"{name}.bias": dy.sum(1)} if name else {})
        if self.kind == "full":
            name, head = self.own("head")
            y, back_y = linear(h, head["W"], head["bias"][:, None])

            def back(dy: Array) -> tuple[Array, dict[str, Array]]:
                own = {f"{name}.head.W": dy @ h.T, f"{name}.head.bias": dy.sum(1)}
                return back_y(dy), own if name else {}

            return y, back
        return h, lambda dy: (dy, {})

    def _tied(self, x: Array) -> tuple[Array, Back]:
        columns: Any = OneHot(x, len(self.base["W"]))
        h, back_h = self.states["embedding"].forward(columns)
        y, back_y = self.states["head"].forward(h)

        def back(dy: Array) -> dict[str, Array]:
            dh, of_head = back_y(dy.T)
            _, of_table = back_h(dh)
            turned = {
                name: twin(*parts) if self.given[name]["on"] == "both" else parts
                for name, parts in of_head.items()
            }
            return sum_gradients(self._named(of_table), self._named(turned))

        return y.T, back

    def _named(self, gradients: Mapping[str, tuple[Array, ...]]) -> dict[str, Array]:
        """The gradients under the names of an adapter's parts, in the shapes that it came in."""
        named: dict[str, Array] = {}
        for name, (dA, dB, *others) in gradients.items():
            adapter = self.given[name]
            if self.kind == "fused":
                parts = blocks(adapter, self.base["rows"])
                dB = np.concatenate([dB[rows, ranks] for rows, ranks, _ in parts])
            named |= {f"{name}.A": dA, f"{name}.B": dB}
            named |= {f"{name}.magnitude": dm[:, 0] for dm in others}
        return named

    def stored(self) -> Array:
        """The weight that is held, as the layer has it, where the layer has one."""
        (state,) = self.states.values()
        W, _ = state.stored()
        return W.T if self.kind == "embedding" else W
