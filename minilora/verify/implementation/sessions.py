"""The expected state of a session: a `multi_adapter.AdaptedLayer`, or two.

A fused projection is one state, its adapters' blocks those of `layers.fuse`. A tied table is two,
that of the embedding and that of the head; it is no longer one weight where only one of them is
merged. A bias or a module that an adapter brings replaces the base's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from minilora.spec.layers import fuse
from minilora.spec.lora import Variant, scale, sum_gradients, twin
from minilora.spec.multi_adapter import AdaptedLayer, Adapter, combine
from minilora.spec.ops import Back, OneHot, linear
from minilora.spec.variants import DORA, LORA_BIAS

Array = np.ndarray
Entries = Mapping[str, Any]

KINDS = (
    "linear",
    "conv1d",
    "embedding",
    "fused",
    "tied",
    "bias",
    "full",
    "lora_bias",
    "dropout",
)
"""The kinds of layers that `minilora.verify.implementation.contract` speaks of."""

PLACES: dict[str, tuple[str, ...]] = {
    "embedding": ("embedding",),
    "head": ("head",),
    "both": ("embedding", "head"),
}
"""The uses of a tied table, by the adapter's entry ``on``."""


def blocks(adapter: Entries, rows: Sequence[int]) -> list[tuple[slice, slice, slice]]:
    """For each part of a fused layer that the adapter is on: the rows of W, of A and of B."""
    parts: list[tuple[slice, slice, slice]] = []
    row = used = 0
    for size, enabled in zip(rows, adapter["enable"], strict=True):
        if enabled:
            r = adapter["r"]
            ranks = slice(len(parts) * r, (len(parts) + 1) * r)
            parts.append((slice(row, row + size), ranks, slice(used, used + size)))
            used += size
        row += size
    return parts


def dense_factors(adapter: Entries, rows: Sequence[int]) -> tuple[Array, Array]:
    """A and B of a fused layer's adapter for the whole weight, with B block-diagonal."""
    by_start = {part.start: (ranks, columns) for part, ranks, columns in blocks(adapter, rows)}
    starts = np.cumsum([0, *rows[:-1]])
    parts = []
    for start, size in zip(starts, rows, strict=True):
        if int(start) in by_start:
            ranks, columns = by_start[int(start)]
            parts.append((adapter["A"][ranks], adapter["B"][columns]))
        else:
            parts.append((adapter["A"][:0], np.zeros((size, 0), adapter["B"].dtype)))
    return fuse(parts)


def _descended(
    entries: Entries, path: str, gradients: Mapping[str, Array], lr: float
) -> dict[str, Any]:
    """The entries less lr times their gradients, which are named by the path to each."""
    return {
        key: _descended(value, f"{path}{key}.", gradients, lr)
        if isinstance(value, Mapping)
        else value - lr * gradients[f"{path}{key}"]
        if f"{path}{key}" in gradients
        else value
        for key, value in entries.items()
    }


@dataclass(frozen=True, eq=False)
class LayerState:
    """A layer of the contract with its adapters; each method gives another state or an answer.

    ``adapters`` are the entries that were added, ``active`` the names of those that apply unless
    disabled; ``dora`` is DoRA with its norm differentiated or not.
    """

    kind: str
    base: Entries
    states: Mapping[str, AdaptedLayer]
    adapters: Mapping[str, Entries] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    disabled: bool = False
    dora: Variant = DORA

    @classmethod
    def of(cls, layer: Entries, dora: Variant = DORA) -> LayerState:
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

    def _adapters(self, adapter: Entries) -> dict[str, Adapter]:
        """The adapter in each of the states that it is in."""
        A, B = adapter["A"], adapter["B"]
        s = scale(adapter["alpha"], adapter["r"], adapter.get("use_rslora", False))
        if self.kind == "fused":
            return {"": Adapter(dense_factors(adapter, self.base["rows"]), s)}
        if self.kind == "tied":
            uses = adapter["on"]
            head = twin(A, B) if uses == "both" else (A, B)
            pairs = {"embedding": (A, B), "head": head}
            return {place: Adapter(pairs[place], s) for place in PLACES[uses]}
        if adapter.get("use_dora", False):
            return {"": Adapter((A, B, adapter["magnitude"][:, None]), s, self.dora)}
        if "lora_bias" in adapter:
            return {"": Adapter((A, B, adapter["lora_bias"][:, None]), s, LORA_BIAS)}
        return {"": Adapter((A, B), s)}

    def _each(self, change: Callable[[AdaptedLayer], AdaptedLayer]) -> LayerState:
        return replace(self, states={place: change(s) for place, s in self.states.items()})

    def _require(self, *names: str) -> None:
        for name in names:
            if name not in self.adapters:
                raise ValueError(f"no adapter {name!r}: expected one of {', '.join(self.adapters)}")

    def add(self, name: str, adapter: Entries) -> LayerState:
        """With another adapter, not active yet."""
        if name in self.adapters:
            raise ValueError(f"adapter {name!r} exists already: choose another name")
        brought = self._adapters(adapter)
        states = {
            place: state.add(name, brought[place]) if place in brought else state
            for place, state in self.states.items()
        }
        return replace(self, states=states, adapters={**self.adapters, name: adapter})

    def activate(self, names: Sequence[str]) -> LayerState:
        """With these adapters active and no others, and nothing disabled."""
        self._require(*names)
        active = replace(self, active=tuple(names), disabled=False)
        return active._each(
            lambda state: state.enable().activate(*(n for n in names if n in state.adapters))
        )

    def disable(self) -> LayerState:
        """With the base alone applied."""
        return replace(self, disabled=True)._each(AdaptedLayer.disable)

    def scale(self, name: str, factor: float) -> LayerState:
        """With s = factor · alpha / r; a bias or a module that the adapter brings is not scaled."""
        self._require(name)
        brought = {place: factor * a.s for place, a in self._adapters(self.adapters[name]).items()}
        return replace(
            self,
            states={
                place: state.set_scale(name, brought[place]) if place in brought else state
                for place, state in self.states.items()
            },
        )

    def swap(self, name: str, adapter: Entries) -> LayerState:
        """With another adapter under this name, active and merged as it was; its factor is 1."""
        self._require(name)
        return self._swapped(name, adapter, self._adapters(adapter))

    def combine(self, name: str, names: Sequence[str], weights: Sequence[float]) -> LayerState:
        """With one more adapter, not active: the weighted sum of others, as they act by then."""
        self._require(*names)
        others = [self.states[""].adapters[each] for each in names]
        triples = [(one.parts[0], one.parts[1], one.s) for one in others]
        A, B = combine(triples, weights)
        return self.add(name, {"A": A, "B": B, "r": len(A), "alpha": float(len(A))})

    def _swapped(self, name: str, adapter: Entries, brought: Mapping[str, Adapter]) -> LayerState:
        states = {}
        for place, state in self.states.items():
            if place in brought and name in state.adapters:
                state = state.swap(name, brought[place])
            elif place in brought:
                state = state.add(name, brought[place])
                state = state.activate(*(n for n in self.active if n in state.adapters))
            elif name in state.adapters:
                state = state.delete(name)
            states[place] = state
        return replace(self, states=states, adapters={**self.adapters, name: adapter})

    def step(self, x: Array, dy: Array, lr: float) -> LayerState:
        """After a step of gradient descent on ⟨dy, y⟩: P - lr dP for each P that has a gradient."""
        _, back = self.forward(x)
        gradients, stepped = back(dy), self
        for name, adapter in self.adapters.items():
            after = _descended(adapter, f"{name}.", gradients, lr)
            brought = {
                place: replace(new, s=self.states[place].adapters[name].s)
                for place, new in self._adapters(after).items()
            }
            stepped = stepped._swapped(name, after, brought)
        return stepped

    @property
    def merged(self) -> bool:
        """Whether anything is merged."""
        return any(state.merged for state in self.states.values())

    def _where_valid(self, change: Callable[[AdaptedLayer], AdaptedLayer]) -> LayerState:
        """With the change in each state where it is valid. Raises ValueError if it is in none."""
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
        """With the active adapters merged into the weights."""
        return self._where_valid(AdaptedLayer.merge)

    def unmerge(self) -> LayerState:
        """With the merged adapters taken out again."""
        return self._where_valid(AdaptedLayer.unmerge)

    def delete(self, name: str) -> LayerState:
        """Without this adapter."""
        self._require(name)
        rest = self._each(lambda state: state.delete(name) if name in state.adapters else state)
        return replace(
            rest,
            adapters={other: a for other, a in self.adapters.items() if other != name},
            active=tuple(other for other in self.active if other != name),
        )

    def brought(self, part: str) -> tuple[str, Any]:
        """The active adapter that brings this part, and the part; by default, the base's."""
        names = [name for name in self.active if part in self.adapters[name] and not self.disabled]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} each bring {part}: expected one of them")
        return (names[0], self.adapters[names[0]][part]) if names else ("", self.base[part])

    def forward(self, x: Array, keep: Mapping[str, Array] | None = None) -> tuple[Array, Back]:
        """y (t, m), and ``back(dy)``: dx, and the gradients of active adapters that are not merged.

        Their names are ``one.A`` and so on. ``keep`` has dropout's K (t, n) by an adapter's name.
        """
        if self.kind == "tied":
            return self._tied(x)
        (state,) = self.states.values()
        table = self.kind == "embedding"
        columns: Any = OneHot(x, state.W.shape[1]) if table else x.T
        h, back_h = state.forward(columns, {name: K.T for name, K in (keep or {}).items()})
        after, back_after = self._after_layer(h)

        def back(dy: Array) -> dict[str, Array]:
            dh, others = back_after(dy.T)
            dx, parts = back_h(dh)
            answer: dict[str, Array] = {} if table else {"dx": dx.T}
            answer |= self._named_gradients(parts) | others
            return answer

        return after.T, back

    def _after_layer(self, h: Array) -> tuple[Array, Back]:
        """Adds a bias or applies a head, which an adapter may bring."""
        if self.kind == "bias":
            name, b = self.brought("bias")
            y = h + b[:, None]
            return y, lambda dy: (dy, {f"{name}.bias": dy.sum(1)} if name else {})
        if self.kind == "full":
            name, head = self.brought("head")
            y, back_y = linear(h, head["W"], head["bias"][:, None])

            def back(dy: Array) -> tuple[Array, dict[str, Array]]:
                brought = {f"{name}.head.W": dy @ h.T, f"{name}.head.bias": dy.sum(1)}
                return back_y(dy), brought if name else {}

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
                name: twin(*parts) if self.adapters[name]["on"] == "both" else parts
                for name, parts in of_head.items()
            }
            return sum_gradients(self._named_gradients(of_table), self._named_gradients(turned))

        return y.T, back

    def _named_gradients(self, gradients: Mapping[str, tuple[Array, ...]]) -> dict[str, Array]:
        """The gradients under the names of an adapter's parts, in the shapes that were added."""
        named: dict[str, Array] = {}
        for name, (dA, dB, *others) in gradients.items():
            adapter = self.adapters[name]
            if self.kind == "fused":
                parts = blocks(adapter, self.base["rows"])
                dB = np.concatenate([dB[rows, ranks] for rows, ranks, _ in parts])
            named |= {f"{name}.A": dA, f"{name}.B": dB}
            further = "lora_bias" if "lora_bias" in adapter else "magnitude"
            named |= {f"{name}.{further}": gradient[:, 0] for gradient in others}
        return named

    def stored(self) -> Array:
        """The weight that is held, as the layer has it, where the layer has one."""
        (state,) = self.states.values()
        W, _ = state.stored()
        return W.T if self.kind == "embedding" else W
