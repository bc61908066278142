"""A right layer whose adapters come and go, written as libraries have it: merged in place."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minilora.verify.mutants.references.helpers import Array
from minilora.verify.mutants.references.linear import Linear


class Session:
    """One layer: its weight holds what is merged, its other active adapters act beside it."""

    def __init__(self, maths: Linear, layer: Mapping[str, Any]) -> None:
        self.maths, self.layer, self.kind = maths, layer, layer["kind"]
        self.W = self.read(layer["W"])
        self.original = self.W
        self.b = layer.get("bias", 0 * self.W[:, 0])
        self.known: dict[str, Mapping[str, Any]] = {}
        self.factor: dict[str, float] = {}
        self.active: list[str] = []
        self.merged: dict[str, Any] = {}
        """What each merged adapter has added to the weight."""
        self.off = False
        self.training = False
        self.rng = np.random.default_rng(1)

    def read(self, W: Array) -> Any:
        """The matrix (m, n) of a weight as it is given: of a table its transpose."""
        return W.T if self.kind == "embedding" else W

    def parts(self, adapter: Mapping[str, Any]) -> list[tuple[slice, slice, slice]]:
        """Of a fused layer's adapter: the rows of W, of A and of B, part by part."""
        sizes, r, enable = self.layer["rows"], adapter["r"], adapter["enable"]
        # enabled
        parts: list[tuple[slice, slice, slice]] = []
        ends, used = np.cumsum(sizes), 0
        for end, size, on in zip(ends, sizes, enable, strict=True):
            if on:
                of_A = slice(len(parts) * r, len(parts) * r + r)
                parts.append((slice(end - size, end), of_A, slice(used, used + size)))
                used += size
        # parts
        return parts

    def bare(self, adapter: Mapping[str, Any]) -> dict[str, Any]:
        """What is LoRA of an adapter."""
        return {k: adapter[k] for k in ("A", "B", "alpha", "r", "use_rslora") if k in adapter}

    def delta(self, name: str) -> Any:
        """factor · s B A, in its rows if the layer is fused; of DoRA and of a module W' - W."""
        adapter = self.known[name]
        # of the adapter
        if "W" in adapter:
            change = adapter["W"] - self.original
        elif self.kind == "fused":
            change = 0 * self.W
            for rows, of_A, of_B in self.parts(adapter):
                part = {**self.bare(adapter), "A": adapter["A"][of_A], "B": adapter["B"][of_B]}
                change[rows] = self.factor[name] * self.maths.delta(part)
        else:
            change = self.factor[name] * self.maths.delta(self.bare(adapter))
        if "magnitude" in adapter:
            V = self.base() + change
            norm = np.sqrt((V * V).sum(1, keepdims=True))
            change = adapter["magnitude"][:, None] / norm * V - (V - change)
        # change
        return change

    def shift(self, name: str) -> Any:
        """What an adapter adds to the base's bias: its own less the base's, and s c of B's."""
        adapter = self.known[name]
        shift = self.known[name].get("bias", self.b) - self.b
        if "lora_bias" in adapter:
            c = self.maths.scale(**self.bare(adapter)) * adapter["lora_bias"]
            # bias of B
            shift = shift + self.factor[name] * c
        return shift

    def require(self, *names: str) -> None:
        """ValueError for the name of an adapter that is not there."""
        if unknown := [name for name in names if name not in self.known]:
            raise ValueError(f"no {unknown[0]}")

    def add(self, name: str, adapter: Mapping[str, Any]) -> None:
        if name in self.known:
            raise ValueError(f"{name} is there")
        self.known[name], self.factor[name] = adapter, 1.0
        # after adding

    def combine(self, name: str, names: Sequence[str], weights: Sequence[float]) -> None:
        """One more adapter: the weighted sum of others, their A stacked, their B side by side."""
        for each in names:
            self.require(each)
        others = [self.known[each] for each in names]
        s = [w * self.maths.scale(**self.bare(a)) for a, w in zip(others, weights, strict=True)]
        s = [self.factor[each] * f for each, f in zip(names, s, strict=True)]
        A = np.concatenate([a["A"] for a in others])
        B = np.concatenate([f * a["B"] for a, f in zip(others, s, strict=True)], 1)
        # combined
        self.add(name, {"A": A, "B": B.astype(A.dtype), "r": len(A), "alpha": len(A)})

    def replace(self, name: str, adapter: Mapping[str, Any]) -> None:
        """Another adapter; what is merged is exchanged."""
        self.require(name)
        # before replacing
        merged = name in self.merged
        if merged:
            self.take_out(name)
        self.known[name] = adapter
        self.factor[name] = 1.0
        if merged:
            self.put_in(name)
        # after replacing

    def activate(self, names: Sequence[str]) -> None:
        self.require(*names)
        # before activating
        for name in [name for name in self.merged if name not in names]:
            self.take_out(name)
        self.active, self.off = list(names), False

    def disable(self) -> None:
        self.off = True

    def scale(self, name: str, factor: float) -> None:
        """Another factor; what is merged is exchanged."""
        self.require(name)
        # before scaling
        merged = name in self.merged
        if merged:
            self.take_out(name)
        self.factor[name] = factor
        if merged:
            self.put_in(name)

    def put_in(self, name: str) -> None:
        self.merged[name] = self.delta(name)
        self.W = self.W + self.merged[name]
        # put in
        self.W = self.W.astype(self.layer["W"].dtype)

    def take_out(self, name: str) -> None:
        self.W = self.W - self.merged.pop(name)
        # taken out
        self.W = self.W.astype(self.layer["W"].dtype)

    def merge(self) -> None:
        # before merging
        for name in [name for name in self.active if name not in self.merged]:
            self.put_in(name)

    def unmerge(self) -> None:
        for name in list(self.merged):
            self.take_out(name)
        # after unmerging

    def delete(self, name: str) -> None:
        # before deleting
        if name in self.merged:
            self.take_out(name)
        self.active = [other for other in self.active if other != name]
        del self.known[name], self.factor[name]
        # after deleting

    def train(self) -> None:
        # before training
        self.training = True

    def eval(self) -> None:
        # before evaluation
        self.training = False

    def base(self) -> Any:
        """The weight without what is merged."""
        return self.W - sum(self.merged.values(), start=0 * self.W)

    def acting(self) -> Any:
        """The weight that acts."""
        W = self.base() if self.off else self.W
        names = [] if self.off else [name for name in self.active if name not in self.merged]
        # acting
        return sum((self.delta(name) for name in names), start=W)

    def forward(self, x: Array) -> Array:
        """y, tokens in rows."""
        W = self.acting()
        y: Array = W.T[x] if self.kind == "embedding" else (x @ W.T + self.bias()).astype(x.dtype)
        for name, K in self.masks(x).items():
            # dropout of y
            y = y + ((K - 1) * x @ self.delta(name).T).astype(x.dtype)
        # answered
        return y

    def bias(self) -> Any:
        """The bias that acts."""
        return self.b + sum(self.shift(name) for name in ([] if self.off else self.active))

    def trained(self) -> list[str]:
        """What acts beside the weight."""
        names = [] if self.off else [name for name in self.active if name not in self.merged]
        # trained
        return names

    def masks(self, x: Array) -> dict[str, Any]:
        """K of dropout of what acts beside the weight, drawn anew."""
        K = {}
        for name in self.trained() if self.training else ():
            p = self.known[name].get("p", 0.0)
            # rate
            if p:
                K[name] = (self.rng.random(x.shape) >= p) / (1 - p)
        # masks
        return K

    def rows(self, x: Array, names: Sequence[str]) -> Array:
        """y, each row with its own adapter, or none."""
        answers = []
        for row, name in zip(x, names, strict=True):
            W, b = self.original, self.b
            # row
            if name:
                W, b = W + self.delta(name), b + self.shift(name)
            answers.append(W.T[row] if self.kind == "embedding" else W @ row + b)
        # rows
        y: Array = np.stack(answers).astype(self.W.dtype)
        return y

    def step(self, x: Array, dy: Array, lr: float) -> None:
        """One step of gradient descent."""
        gradients = self.gradients(x, dy)
        # before stepping
        for key, gradient in gradients.items():
            name, _, part = key.partition(".")
            if part:
                stepped = self.known[name][part] - lr * gradient
                self.known[name] = {**self.known[name], part: stepped}

    def gradients(self, x: Array, dy: Array) -> dict[str, Array]:
        """dx, and those of A and B, of a bias, of a module."""
        # backward
        embedding = self.kind == "embedding"
        answer = {} if embedding else {"dx": dy @ self.acting()}
        dW = dy.T @ (np.eye(self.W.shape[1], dtype=dy.dtype)[x] if embedding else x)
        K = self.masks(x)
        for name in K:
            # dropout of dx
            answer["dx"] = answer["dx"] + ((K[name] - 1) * (dy @ self.delta(name))).astype(dy.dtype)
        # dropout of dA and dB
        for name in self.trained():
            parts = self.gradients_of(name, dy.T @ (K[name] * x) if name in K else dW, dy)
            answer |= {f"{name}.{part}": array.astype(dy.dtype) for part, array in parts.items()}
        return answer

    def gradients_of(self, name: str, dW: Array, dy: Array) -> dict[str, Any]:
        """Those of one adapter, of the weight's and the output's."""
        adapter = self.known[name]
        brought = {"bias": dy.sum(0)} if "bias" in adapter else {}
        if "W" in adapter:
            return {"W": dW, **brought}
        s = self.factor[name] * self.maths.scale(**self.bare(adapter))
        A, B = adapter["A"], adapter["B"]
        if "magnitude" in adapter:
            dW, brought["magnitude"] = self.rescaled(name, dW)
        parts = self.parts(adapter) if self.kind == "fused" else [(slice(None),) * 3]
        dA = np.concatenate([s * B[of_B].T @ dW[rows] for rows, _, of_B in parts])
        dB = np.concatenate([s * dW[rows] @ A[of_A].T for rows, of_A, _ in parts])
        if "lora_bias" in adapter:
            brought["lora_bias"] = s * dy.sum(0)
        # factors
        return {"A": dA, "B": dB, **brought}

    def rescaled(self, name: str, dW: Array) -> tuple[Any, Any]:
        """Under DoRA, those of V = W + s B A and of the magnitude; the norm is held."""
        adapter = self.known[name]
        V = self.base() + self.factor[name] * self.maths.delta(self.bare(adapter))
        norm = np.sqrt((V * V).sum(1))
        dm = (dW * V).sum(1) / norm
        return (adapter["magnitude"] / norm)[:, None] * dW, dm

    def save(self, name: str, folder: str) -> None:
        adapter: Any = self.known[name]
        # before saving
        (Path(folder) / "adapter").write_bytes(pickle.dumps(adapter))

    def load(self, name: str, folder: str) -> None:
        adapter = pickle.loads((Path(folder) / "adapter").read_bytes())
        self.add(name, adapter)
        # after loading

    def weight(self) -> Array:
        """The weight as it is stored."""
        W: Array = self.read(self.W)
        return W


class Pair:
    """Two sessions one behind the other: a tied table's, and a layer's and a module's."""

    def __init__(self, kind: type[Session], maths: Linear, layer: Mapping[str, Any]) -> None:
        self.kind = layer["kind"]
        if self.kind == "tied":
            inner = {"kind": "embedding", "W": layer["W"]}, {"kind": "linear", "W": layer["W"]}
        else:
            inner = {**layer, "kind": "linear"}, {"kind": "module", **layer["head"]}
        self.first, self.second = (kind(maths, one) for one in inner)
        self.known: dict[str, Mapping[str, Any]] = {}
        self.active: list[str] = []

    def split(self, adapter: Mapping[str, Any]) -> list[Mapping[str, Any] | None]:
        """What of an adapter belongs to each of the two."""
        first: Any = adapter
        if self.kind == "full":
            first, second = {k: v for k, v in adapter.items() if k != "head"}, adapter.get("head")
        else:
            first = None if adapter["on"] == "head" else adapter
            turned = {**adapter, "A": adapter["B"].T, "B": adapter["A"].T}
            second = {"embedding": None, "head": adapter, "both": turned}[adapter["on"]]
        # split
        return [first, second]

    def both(self, name: str) -> list[Session]:
        """Those that know the adapter."""
        return [one for one in (self.first, self.second) if name in one.known]

    def add(self, name: str, adapter: Mapping[str, Any]) -> None:
        for one, part in zip((self.first, self.second), self.split(adapter), strict=True):
            if part is not None:
                one.add(name, part)
        self.known[name] = adapter

    def replace(self, name: str, adapter: Mapping[str, Any]) -> None:
        """In those where it is now, and out of the other."""
        # before replacing
        for one, part in zip((self.first, self.second), self.split(adapter), strict=True):
            if part is None and name in one.known:
                one.delete(name)
            elif part is not None and name in one.known:
                one.replace(name, part)
            elif part is not None:
                one.add(name, part)
                one.active += [name] if name in self.active else []
        self.known[name] = adapter

    def step(self, x: Array, dy: Array, lr: float) -> None:
        """One step of gradient descent, in both."""
        gradients = self.gradients(x, dy)
        # before stepping
        for key, gradient in gradients.items():
            name, *path = key.split(".")
            if path:
                self.known[name] = self.lessened(self.known[name], path, lr * gradient)
        for name, adapter in self.known.items():
            for one, part in zip((self.first, self.second), self.split(adapter), strict=True):
                if part is not None:
                    one.known[name] = part

    def lessened(self, entries: Any, path: list[str], change: Array) -> dict[str, Any]:
        """The entries with the array at this path less a change."""
        first, *rest = path
        value = self.lessened(entries[first], rest, change) if rest else entries[first] - change
        return {**entries, first: value}

    def activate(self, names: Sequence[str]) -> None:
        """In both, of the adapters that are there."""
        # before activating
        if unknown := [name for name in names if name not in self.known]:
            raise ValueError(f"no {unknown[0]}")
        for one in (self.first, self.second):
            one.activate([name for name in names if name in one.known])
        self.active = list(names)
        # after activating

    def disable(self) -> None:
        self.first.disable()
        self.second.disable()

    def scale(self, name: str, factor: float) -> None:
        """The factors; a module has none."""
        where = [one for one in self.both(name) if "A" in one.known[name]]
        self.all(lambda one: one.scale(name, factor), where)
        # after scaling

    def merge(self) -> None:
        self.some(lambda one: one.merge())

    def unmerge(self) -> None:
        self.some(lambda one: one.unmerge())

    def delete(self, name: str) -> None:
        # before deleting
        self.all(lambda one: one.delete(name), self.both(name))
        del self.known[name]
        self.active = [other for other in self.active if other != name]

    def some(self, do: Callable[[Session], None]) -> None:
        """In both; refused where both refuse."""
        refused = []
        for one in (self.first, self.second):
            try:
                do(one)
            except RuntimeError as error:
                refused.append(error)
        if len(refused) == 2:
            raise refused[0]

    def all(self, do: Callable[[Session], None], where: Sequence[Session]) -> None:
        """In each of them, or in none."""
        before = [
            {k: v.copy() if isinstance(v, dict | list) else v for k, v in vars(one).items()}
            for one in where
        ]
        try:
            for one in where:
                do(one)
        except RuntimeError:
            for one, kept in zip(where, before, strict=True):
                vars(one).update(kept)
            raise

    def train(self) -> None:
        self.first.train()
        self.second.train()

    def eval(self) -> None:
        self.first.eval()
        self.second.eval()

    def forward(self, x: Array) -> Array:
        return self.second.forward(self.first.forward(x))

    def gradients(self, x: Array, dy: Array) -> dict[str, Array]:
        """The second's, and the first's from its dx."""
        of_second = self.second.gradients(self.first.forward(x), dy)
        answer = self.first.gradients(x, of_second.pop("dx"))
        for key, gradient in of_second.items():
            name, _, part = key.partition(".")
            if self.kind == "full":
                answer[f"{name}.head.{part}"] = gradient
            elif self.known[name]["on"] == "both":
                turned = f"{name}.{'B' if part == 'A' else 'A'}"
                answer[turned] = answer[turned] + gradient.T
            else:
                answer[key] = gradient
        return answer

    def save(self, name: str, folder: str) -> None:
        adapter = self.known[name]
        # before saving
        (Path(folder) / "adapter").write_bytes(pickle.dumps(adapter))

    def load(self, name: str, folder: str) -> None:
        adapter = pickle.loads((Path(folder) / "adapter").read_bytes())
        self.add(name, adapter)
        # after loading


class Lifecycle(Linear):
    def session(self, layer: Mapping[str, Any]) -> Session | Pair:
        """A layer of the contract."""
        kind, pair = Session, Pair
        if layer["kind"] in ("tied", "full"):
            return pair(kind, self, layer)
        return kind(self, layer)
