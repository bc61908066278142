"""A layer whose adapters come and go, misread."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from minilora.verify.mutants.mutant import Mutant
from minilora.verify.mutants.reference import Array, Call, Plain, digits
from minilora.verify.mutants.transition import equivalents, family

Entries = Mapping[str, Sequence[tuple[Any, ...]]]
"""The check that shows each best, and what `family` takes of them."""


class Session:
    """A right session, written as libraries have it: a weight that is changed in place."""

    def __init__(self, my: Plain, layer: Mapping[str, Any]) -> None:
        self.kind = layer["kind"]
        self.my, self.layer, self.W = my, layer, self.read(layer["W"])
        self.original = self.W
        self.b = layer.get("bias", 0 * self.W[:, 0])
        self.known: dict[str, Mapping[str, Any]] = {}
        self.factor: dict[str, float] = {}
        self.active: list[str] = []
        self.added: dict[str, Array] = {}
        """What each merged adapter has added to the weight."""
        self.off = False
        self.training = False

    def read(self, W: Array) -> Any:
        """The matrix (m, n) of a weight as it is given: of a table its transpose."""
        return W.T if self.kind == "embedding" else W

    def parts(self, adapter: Mapping[str, Any]) -> list[tuple[slice, slice, slice]]:
        """Of a fused layer's adapter: the rows of W, of A and of B, part by part."""
        rows, r = self.layer["rows"], adapter["r"]
        found: list[tuple[slice, slice, slice]] = []
        ends, used = np.cumsum(rows), 0
        for end, size, on in zip(ends, rows, adapter["enable"], strict=True):
            if on:
                own = slice(len(found) * r, len(found) * r + r)
                found.append((slice(end - size, end), own, slice(used, used + size)))
                used += size
        return found

    def delta(self, name: str) -> Any:
        """factor · s B A, in its rows if the layer is fused; of DoRA and of a module W' - W."""
        adapter = self.known[name]
        if "W" in adapter:
            return adapter["W"] - self.original
        if self.kind == "fused":
            whole = 0 * self.W
            for rows, own, used in self.parts(adapter):
                part = {**self.bare(name), "A": adapter["A"][own], "B": adapter["B"][used]}
                whole[rows] = self.factor[name] * self.my.delta(self.my.adapter(part))
            return whole
        change = self.factor[name] * self.my.delta(self.my.adapter(self.bare(name)))
        if "magnitude" not in adapter:
            return change
        V = self.base() + change
        return adapter["magnitude"][:, None] / np.sqrt((V * V).sum(1, keepdims=True)) * V - (
            V - change
        )

    def bare(self, name: str) -> dict[str, Any]:
        """What is plain LoRA of an adapter."""
        return {
            k: v for k, v in self.known[name].items() if k in ("A", "B", "alpha", "r", "use_rslora")
        }

    def shift(self, name: str) -> Any:
        """The bias that an adapter brings along, less the base's."""
        return self.known[name].get("bias", self.b) - self.b

    def add(self, name: str, adapter: Mapping[str, Any]) -> None:
        """Known, and no more."""
        if name in self.known:
            raise ValueError(f"{name} is there")
        self.known[name], self.factor[name] = adapter, 1.0

    def activate(self, names: Sequence[str]) -> None:
        """Just these, and the switch on."""
        for name in [name for name in self.added if name not in names]:
            self.take_out(name)
        self.active, self.off = list(names), False

    def disable(self) -> None:
        """The switch off."""
        self.off = True

    def scale(self, name: str, factor: float) -> None:
        """Another factor; what is merged is exchanged."""
        merged = name in self.added
        if merged:
            self.take_out(name)
        self.factor[name] = factor
        if merged:
            self.put_in(name)

    def put_in(self, name: str) -> None:
        """Into the weight."""
        self.added[name] = self.delta(name)
        self.W = self.W + self.added[name]

    def take_out(self, name: str) -> None:
        """Out of the weight."""
        self.W = self.W - self.added.pop(name)

    def merge(self) -> None:
        """What is active and not merged."""
        for name in self.active:
            if name not in self.added:
                self.put_in(name)

    def unmerge(self) -> None:
        """All that is merged."""
        for name in list(self.added):
            self.take_out(name)

    def delete(self, name: str) -> None:
        """With all that it did."""
        if name in self.added:
            self.take_out(name)
        self.active = [other for other in self.active if other != name]
        del self.known[name], self.factor[name]

    def train(self) -> None:
        """Training."""
        self.training = True

    def eval(self) -> None:
        """Evaluation."""
        self.training = False

    def base(self) -> Any:
        """The weight without what is merged."""
        return self.W - sum(self.added.values(), start=0 * self.W)

    def acting(self) -> Any:
        """The weight that acts."""
        if self.off:
            return self.base()
        names = [name for name in self.active if name not in self.added]
        return sum((self.delta(name) for name in names), start=self.W)

    def forward(self, x: Array) -> Array:
        """y, tokens in rows."""
        if self.kind == "embedding":
            rows: Array = self.acting().T[x]
            return rows
        y: Array = (x @ self.acting().T + self.bias()).astype(x.dtype)
        return y

    def bias(self) -> Any:
        """The bias that acts."""
        return self.b + sum(self.shift(name) for name in ([] if self.off else self.active))

    def trained(self) -> list[str]:
        """What acts beside the weight."""
        return [] if self.off else [name for name in self.active if name not in self.added]

    def gradients(self, x: Array, dy: Array) -> dict[str, Array]:
        """dx, and those of A and B, of a bias, of a module."""
        answer = {} if self.kind == "embedding" else {"dx": dy @ self.acting()}
        dW = dy.T @ (np.eye(self.W.shape[1], dtype=dy.dtype)[x] if self.kind == "embedding" else x)
        for name in self.trained():
            own = self.gradients_of(name, dW, dy)
            answer |= {f"{name}.{part}": own[part].astype(dy.dtype) for part in own}
        return answer

    def gradients_of(self, name: str, dW: Array, dy: Array) -> dict[str, Any]:
        """Those of one adapter, of the weight's and the output's."""
        adapter = self.known[name]
        brought = {"bias": dy.sum(0)} if "bias" in adapter else {}
        if "W" in adapter:
            return {"W": dW, **brought}
        s = self.factor[name] * self.my.s(self.my.adapter(self.bare(name)))
        A, B = adapter["A"], adapter["B"]
        if "magnitude" in adapter:
            dW, brought["magnitude"] = self.rescaled(name, dW)
        parts = self.parts(adapter) if self.kind == "fused" else [(slice(None),) * 3]
        dA = np.concatenate([s * B[used].T @ dW[rows] for rows, _, used in parts])
        dB = np.concatenate([s * dW[rows] @ A[own].T for rows, own, _ in parts])
        return {"A": dA, "B": dB, **brought}

    def rescaled(self, name: str, dW: Array) -> tuple[Any, Any]:
        """Under DoRA, those of V = W + s B A and of the magnitude; the norm is held."""
        V = self.base() + self.factor[name] * self.my.delta(self.my.adapter(self.bare(name)))
        norm = np.sqrt((V * V).sum(1))
        dm = (dW * V).sum(1) / norm
        return (self.known[name]["magnitude"] / norm)[:, None] * dW, dm

    def save(self, name: str, folder: str) -> None:
        """As it was given."""
        (Path(folder) / "adapter").write_bytes(pickle.dumps(self.stored(name)))

    def stored(self, name: str) -> Mapping[str, Any]:
        """What is saved of an adapter."""
        return self.known[name]

    def load(self, name: str, folder: str) -> None:
        """Added as it was saved."""
        self.add(name, pickle.loads((Path(folder) / "adapter").read_bytes()))

    def weight(self) -> Array:
        """The weight as it is stored."""
        W: Array = self.read(self.W)
        return W


class Pair:
    """Two sessions one behind the other: a tied table's, and a layer's and a module's."""

    def __init__(self, kind: type[Session], my: Plain, layer: Mapping[str, Any]) -> None:
        self.kind = layer["kind"]
        if self.kind == "tied":
            inner = {"kind": "embedding", "W": layer["W"]}, {"kind": "linear", "W": layer["W"]}
        else:
            inner = {**layer, "kind": "linear"}, {"kind": "module", **layer["head"]}
        self.first, self.second = (kind(my, each) for each in inner)
        self.known: dict[str, Mapping[str, Any]] = {}

    def split(self, adapter: Mapping[str, Any]) -> list[Mapping[str, Any] | None]:
        """What of an adapter belongs to each of the two."""
        if self.kind == "full":
            return [{k: v for k, v in adapter.items() if k != "head"}, adapter.get("head")]
        turned = {**adapter, "A": adapter["B"].T, "B": adapter["A"].T}
        on = adapter["on"]
        return [
            None if on == "head" else adapter,
            {"embedding": None, "head": adapter, "both": turned}[on],
        ]

    def both(self, name: str) -> list[Session]:
        """Those that know the adapter."""
        return [each for each in (self.first, self.second) if name in each.known]

    def add(self, name: str, adapter: Mapping[str, Any]) -> None:
        """Where it has a part."""
        for each, own in zip((self.first, self.second), self.split(adapter), strict=True):
            if own is not None:
                each.add(name, own)
        self.known[name] = adapter

    def activate(self, names: Sequence[str]) -> None:
        """In both, of what is there."""
        if unknown := [name for name in names if name not in self.known]:
            raise ValueError(f"no {unknown[0]}")
        for each in (self.first, self.second):
            each.activate([name for name in names if name in each.known])

    def disable(self) -> None:
        """Both."""
        self.first.disable()
        self.second.disable()

    def scale(self, name: str, factor: float) -> None:
        """The factors; a module has none."""
        self.all(
            lambda each: each.scale(name, factor),
            [each for each in self.both(name) if "A" in each.known[name]],
        )

    def merge(self) -> None:
        """Both, or the one that can."""
        self.some(lambda each: each.merge())

    def unmerge(self) -> None:
        """Both, or the one that can."""
        self.some(lambda each: each.unmerge())

    def delete(self, name: str) -> None:
        """Where it is."""
        self.all(lambda each: each.delete(name), self.both(name))
        del self.known[name]

    def some(self, do: Callable[[Session], None]) -> None:
        """In both; refused where both refuse."""
        refused = []
        for each in (self.first, self.second):
            try:
                do(each)
            except RuntimeError as error:
                refused.append(error)
        if len(refused) == 2:
            raise refused[0]

    def all(self, do: Callable[[Session], None], where: Sequence[Session]) -> None:
        """In each of them, or in none."""
        before = [
            {k: v.copy() if isinstance(v, dict | list) else v for k, v in vars(each).items()}
            for each in where
        ]
        try:
            for each in where:
                do(each)
        except RuntimeError:
            for each, kept in zip(where, before, strict=True):
                vars(each).update(kept)
            raise

    def train(self) -> None:
        """Both."""
        self.first.train()
        self.second.train()

    def eval(self) -> None:
        """Both."""
        self.first.eval()
        self.second.eval()

    def forward(self, x: Array) -> Array:
        """The second of the first."""
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
                self.turn(answer, f"{name}.{'B' if part == 'A' else 'A'}", gradient)
            else:
                answer[key] = gradient
        return answer

    def turn(self, answer: dict[str, Array], key: str, gradient: Array) -> None:
        """What comes to a factor from its other use, added."""
        answer[key] = answer[key] + gradient.T

    def save(self, name: str, folder: str) -> None:
        """As it was given."""
        (Path(folder) / "adapter").write_bytes(pickle.dumps(self.stored(name)))

    def stored(self, name: str) -> Mapping[str, Any]:
        """What is saved of an adapter."""
        return self.known[name]

    def load(self, name: str, folder: str) -> None:
        """Added as it was saved."""
        self.add(name, pickle.loads((Path(folder) / "adapter").read_bytes()))


class Planned(Session):
    """The same from the original weight each time."""

    def put_in(self, name: str) -> None:
        """Noted."""
        self.added[name] = 0 * self.W

    def take_out(self, name: str) -> None:
        """Struck out."""
        del self.added[name]

    def base(self) -> Any:
        """The original."""
        return self.W

    def acting(self) -> Any:
        """The original and all that acts."""
        names = [] if self.off else self.active
        return sum((self.delta(name) for name in names), start=self.W)

    def weight(self) -> Array:
        """The original and what is merged."""
        total: Array = self.read(sum((self.delta(name) for name in self.added), start=self.W))
        return total


class Refusing(Session):
    """With errors where another passes over, or exchanges what is merged."""

    def merge(self) -> None:
        """Once."""
        if self.added or not self.active:
            raise RuntimeError("merged already, or nothing to merge")
        super().merge()

    def unmerge(self) -> None:
        """Once."""
        if not self.added:
            raise RuntimeError("not merged")
        super().unmerge()

    def delete(self, name: str) -> None:
        """Not while merged."""
        if name in self.added:
            raise RuntimeError("unmerge first")
        super().delete(name)

    def scale(self, name: str, factor: float) -> None:
        """Not while merged."""
        if name in self.added:
            raise RuntimeError("unmerge first")
        super().scale(name, factor)


def _sessions(kind: type[Session], pair: type[Pair] = Pair, **own: Any) -> Callable[[], Plain]:
    def session(my: Plain, layer: Mapping[str, Any]) -> Session | Pair:
        if layer["kind"] in ("tied", "full"):
            return pair(kind, my, layer)
        return kind(my, layer)

    return type("Lived", (Plain,), {"session": session, **own})


def _but(**methods: Any) -> Callable[[], Plain]:
    """`Plain` whose session has other methods."""
    return _sessions(type("Wrong", (Session,), methods))


def _pairs(**methods: Any) -> Callable[[], Plain]:
    """`Plain` whose sessions of two layers have other methods."""
    return _sessions(Session, type("Wrong", (Pair,), methods))


def _merge_again(my: Session) -> None:
    for name in my.active:
        my.W = my.W + my.delta(name)
        my.added[name] = my.delta(name)


def _unmerge_again(my: Session) -> None:
    for name in my.active:
        my.W = my.W - my.delta(name)
        my.added.pop(name, None)


def _unmerge_anew(my: Session, name: str) -> None:
    my.added.pop(name)
    my.W = my.W - my.delta(name)


def _scale_alone(my: Session, name: str, factor: float) -> None:
    my.factor[name] = factor


def _scale_piled(my: Session, name: str, factor: float) -> None:
    Session.scale(my, name, my.factor[name] * factor)


def _scale_of_all(my: Session, name: str, factor: float) -> None:
    for each in my.known:
        Session.scale(my, each, factor)


def _add_active(my: Session, name: str, adapter: Mapping[str, Any]) -> None:
    Session.add(my, name, adapter)
    my.active.append(name)


def _add_into_merged(my: Session, name: str, adapter: Mapping[str, Any]) -> None:
    Session.add(my, name, adapter)
    if my.added:
        my.active.append(name)
        my.put_in(name)


def _add_forgets_merged(my: Session, name: str, adapter: Mapping[str, Any]) -> None:
    Session.add(my, name, adapter)
    my.added = {}


def _activate_more(my: Session, names: Sequence[str]) -> None:
    Session.activate(my, [*my.active, *(name for name in names if name not in my.active)])


def _activate_one(my: Session, names: Sequence[str]) -> None:
    Session.activate(my, names[:1])


def _activate_some(my: Session, names: Sequence[str]) -> None:
    Session.activate(my, names or my.active)


def _activate_over_merged(my: Session, names: Sequence[str]) -> None:
    my.active, my.off = list(names), False


def _activate_still_off(my: Session, names: Sequence[str]) -> None:
    off = my.off
    Session.activate(my, names)
    my.off = off


def _delete_leaves_merged(my: Session, name: str) -> None:
    my.added.pop(name, None)
    Session.delete(my, name)


def _delete_leaves_branch(my: Session, name: str) -> None:
    delta = my.delta(name) if name in my.active and name not in my.added else 0 * my.W
    Session.delete(my, name)
    my.W = my.W + delta


def _delete_all_rest(my: Session, name: str) -> None:
    Session.delete(my, name)
    my.active = []


def _delete_next(my: Session, name: str) -> None:
    acted = name in my.active
    Session.delete(my, name)
    if acted and not my.active:
        my.active = list(my.known)[:1]


def _merge_all(my: Session) -> None:
    my.active = list(my.known)
    Session.merge(my)


def _merge_first(my: Session) -> None:
    if my.active and my.active[0] not in my.added:
        my.put_in(my.active[0])
    my.active = my.active[:1]


def _merged_alone(my: Session) -> Any:
    """While something is merged no other adapter acts."""
    return my.base() if my.off else my.W if my.added else Session.acting(my)


def _off_but_merged(my: Session) -> Any:
    return my.W if my.off else Session.acting(my)


def _off_by_unmerging(my: Session) -> None:
    my.unmerge()


def _merged_twice(my: Session) -> Any:
    """The branch acts beside the merged weight."""
    if my.off:
        return my.base()
    return sum((my.delta(name) for name in my.active), start=my.W)


def _eval_merges(my: Session) -> None:
    Session.eval(my)
    my.merge()


def _train_forgets(my: Session) -> None:
    my.training = True
    my.added = {}


def _eval_adds(my: Session) -> None:
    if my.training:
        for name in my.active:
            my.W = my.W + my.delta(name)
    my.training = False


def _unmerge_first(my: Session) -> None:
    for name in list(my.added)[:1]:
        my.take_out(name)
    my.added = {}


PLAIN: Entries = {
    "lifecycle.add": [
        ("added-active", "a new adapter acts at once, beside the others", _but(add=_add_active))
    ],
    "lifecycle.several": [
        ("activate-adds", "activating leaves the others active", _but(activate=_activate_more)),
        ("activate-one", "only the first of several acts", _but(activate=_activate_one)),
        ("activate-none", "activating none leaves all as it was", _but(activate=_activate_some)),
    ],
    "lifecycle.disable": [
        ("disable-nothing", "disabling does nothing", _but(disable=lambda my: None)),
        ("disable-merged", "disabling leaves what is merged", _but(acting=_off_but_merged)),
        ("disable-for-ever", "activating does not end it", _but(activate=_activate_still_off)),
    ],
    "lifecycle.scale": [
        ("scale-piled", "each factor on the last one", _but(scale=_scale_piled)),
        ("scale-nothing", "a factor is ignored", _but(scale=lambda my, name, factor: None)),
        ("scale-of-all", "a factor for all adapters", _but(scale=_scale_of_all)),
    ],
    "lifecycle.merge-twice": [
        ("merge-twice", "merging twice adds twice", _but(merge=_merge_again)),
        ("unmerge-twice", "unmerging twice takes away twice", _but(unmerge=_unmerge_again)),
        (
            "merged-and-branch",
            "the branch acts beside the merged weight",
            _but(acting=_merged_twice),
        ),
        (
            "unmerge-nothing",
            "unmerging does nothing",
            _but(take_out=lambda my, name: my.added.pop(name)),
        ),
    ],
    "lifecycle.merge-several": [
        ("merge-all", "inactive adapters are merged too", _but(merge=_merge_all)),
        ("merge-first", "only the first active one is merged", _but(merge=_merge_first)),
        ("unmerge-first", "only the first merged one is unmerged", _but(unmerge=_unmerge_first)),
    ],
    "lifecycle.scale-while-merged": [
        (
            "scale-late",
            "a scale set while merged acts after unmerging only",
            _but(scale=_scale_alone),
        ),
        (
            "unmerge-anew",
            "unmerging takes away what the adapter is by then",
            _but(take_out=_unmerge_anew, scale=_scale_alone),
            "peft 0.21",
        ),
    ],
    "lifecycle.delete": [
        ("delete-all-rest", "deleting one silences the others", _but(delete=_delete_all_rest)),
        ("delete-branch", "a deleted active adapter goes on", _but(delete=_delete_leaves_branch)),
    ],
    "lifecycle.delete-while-merged": [
        (
            "delete-merged",
            "a deleted merged adapter stays in the weight",
            _but(delete=_delete_leaves_merged),
        ),
        ("delete-next", "the next adapter acts in its stead", _but(delete=_delete_next)),
    ],
    "lifecycle.activate-while-merged": [
        (
            "activate-merged",
            "what is merged goes on beside what is activated",
            _but(activate=_activate_over_merged),
        )
    ],
    "lifecycle.add-while-merged": [
        (
            "add-merged",
            "an adapter added beside a merged one is merged",
            _but(add=_add_into_merged),
        ),
        ("add-forgets", "adding forgets what is merged", _but(add=_add_forgets_merged)),
    ],
    "lifecycle.train-eval": [
        ("eval-adds", "each evaluation merges once more", _but(eval=_eval_adds)),
        (
            "train-forgets",
            "training forgets what is merged",
            _but(train=_train_forgets),
            "microsoft/LoRA 34",
        ),
    ],
    "lifecycle.weight": [
        (
            "weight-original",
            "the original weight while merged",
            _but(weight=lambda my: my.read(my.base())),
        ),
        ("weight-merged", "W' always", _but(weight=lambda my: my.read(my.acting()))),
    ],
    "lifecycle.random-steps": [
        (
            "merged-alone",
            "beside a merged adapter no other acts",
            _but(acting=_merged_alone),
            "peft 3756",
        ),
        (
            "disable-unmerges",
            "disabling unmerges and does no more",
            _but(disable=_off_by_unmerging),
        ),
    ],
}


def _saved_scaled(part: str) -> Callable[[Session, str], Mapping[str, Any]]:
    """An adapter whose factor has gone into one of its parts."""

    def stored(my: Session, name: str) -> Mapping[str, Any]:
        adapter = my.known[name]
        scaled: Any = my.factor[name] * adapter[part]
        return {**adapter, part: scaled.astype(adapter[part].dtype) if part == "B" else scaled}

    return stored


def _save_with_factor(my: Session, name: str, folder: str) -> None:
    saved = my.known[name], my.factor[name]
    (Path(folder) / "adapter").write_bytes(pickle.dumps(saved))


def _load_with_factor(my: Session, name: str, folder: str) -> None:
    adapter, factor = pickle.loads((Path(folder) / "adapter").read_bytes())
    my.add(name, adapter)
    my.factor[name] = factor


def _last_output(my: Session, x: Array) -> Array:
    """The output of the last forward, while nothing has happened but that x is another."""
    now = (tuple(my.active), tuple(my.added), my.off, tuple(my.factor.items()), my.W.tobytes())
    before, y = vars(my).get("last", (None, None))
    my.last = (now, y if now == before else Session.forward(my, x))  # type: ignore[attr-defined]
    answer: Array = my.last[1]  # type: ignore[attr-defined]
    return answer


KEPT: Entries = {
    "lifecycle.save-scaled": [
        ("save-factor-in-B", "B times its factor is saved", _but(stored=_saved_scaled("B"))),
        (
            "save-factor-in-alpha",
            "α times its factor is saved",
            _but(stored=_saved_scaled("alpha")),
        ),
        (
            "save-factor",
            "the factor is saved too",
            _but(save=_save_with_factor, load=_load_with_factor),
        ),
    ],
    "lifecycle.train-eval": [
        ("output-kept", "the last output for whatever x", _but(forward=_last_output))
    ],
}


def _of_kind(kind: str, **methods: Any) -> Callable[[], Plain]:
    """`Plain` whose session has other methods for one kind of layer."""

    def only(name: str, wrong: Callable[..., Any]) -> Any:
        right = getattr(Session, name)
        return lambda my, *given: (wrong if my.kind == kind else right)(my, *given)

    return _but(**{name: only(name, wrong) for name, wrong in methods.items()})


TURNED: Entries = {
    "lifecycle.random-steps.conv1d": [
        (
            "conv1d-twice",
            "2 s B A where the weight is stored (in, out)",
            _of_kind("conv1d", delta=lambda my, name: 2 * Session.delta(my, name)),
        )
    ],
    "lifecycle.weight.conv1d": [
        (
            "conv1d-unmerge-nothing",
            "unmerging does nothing where the weight is stored (in, out)",
            _of_kind("conv1d", take_out=lambda my, name: my.added.pop(name)),
        )
    ],
    "lifecycle.random-steps.embedding": [
        (
            "embedding-disable",
            "an embedding's adapter is not disabled",
            _of_kind("embedding", disable=lambda my: None),
        ),
        (
            "embedding-merged-twice",
            "an embedding's branch acts beside its merged table",
            _of_kind("embedding", acting=_merged_twice),
        ),
    ],
    "lifecycle.weight.embedding": [
        (
            "embedding-never-merged",
            "an embedding's table is never merged",
            _of_kind("embedding", weight=lambda my: my.read(my.base())),
        )
    ],
}


def _interleaved(my: Session, name: str) -> Any:
    """The blocks of A in turn, r rows by r rows, are taken as rows in turn."""
    adapter = my.known[name]
    if my.kind != "fused":
        return Session.delta(my, name)
    count = sum(adapter["enable"])
    own = np.concatenate([adapter["A"][i::count] for i in range(count)])
    my.known[name] = {**adapter, "A": own}
    try:
        return Session.delta(my, name)
    finally:
        my.known[name] = adapter


def _next_rows(my: Session, adapter: Mapping[str, Any]) -> list[tuple[slice, slice, slice]]:
    """The parts that are on, without those that are off between them."""
    right, row, found = Session.parts(my, adapter), 0, []
    for rows, own, used in right:
        size = rows.stop - rows.start
        found.append((slice(row, row + size), own, used))
        row += size
    return found


def _shared_factors(my: Session, name: str) -> Any:
    """The first part's A for all."""
    adapter, r = my.known[name], my.known[name]["r"]
    if my.kind != "fused":
        return Session.delta(my, name)
    my.known[name] = {**adapter, "A": np.tile(adapter["A"][:r], (sum(adapter["enable"]), 1))}
    try:
        return Session.delta(my, name)
    finally:
        my.known[name] = adapter


class Shared(Pair):
    """A table that stays one when it is merged, as where the parameter itself is changed."""

    which = ("embedding", "head", "both")

    def merge(self) -> None:
        """Into the one table."""
        self.unmerge()
        super().merge()
        for a, b in ((self.first, self.second), (self.second, self.first)):
            for name, change in a.added.items():
                if self.kind == "tied" and self.known[name]["on"] in self.which:
                    b.W = b.W + change.T

    def unmerge(self) -> None:
        """Out of it."""
        for a, b in ((self.first, self.second), (self.second, self.first)):
            for name, change in a.added.items():
                if self.kind == "tied" and self.known[name]["on"] in self.which:
                    b.W = b.W - change.T
        super().unmerge()

    def activate(self, names: Sequence[str]) -> None:
        """Out of the table first."""
        self.unmerge()
        super().activate(names)

    def delete(self, name: str) -> None:
        """Out of the table first."""
        self.unmerge()
        super().delete(name)

    def scale(self, name: str, factor: float) -> None:
        """Out of the table first."""
        self.unmerge()
        super().scale(name, factor)


def _shared(*which: str) -> Callable[[], Plain]:
    """`Plain` whose tied table stays one, for the adapters in these places."""
    return _sessions(Session, type("Wrong", (Shared,), {"which": which}))


def _split_untied(my: Pair, adapter: Mapping[str, Any]) -> Any:
    first, second = Pair.split(my, adapter)
    return [first, None] if adapter.get("on") == "both" else [first, second]


def _split_without_module(my: Pair, adapter: Mapping[str, Any]) -> Any:
    first, second = Pair.split(my, adapter)
    return [first, second if my.kind == "tied" else None]


def _module_stays(my: Pair, names: Sequence[str]) -> None:
    """Where no adapter brings a module, the last one stays."""
    stays = [] if my.kind == "tied" else my.second.active
    Pair.activate(my, names)
    if stays and names and not my.second.active and stays[0] in my.second.known:
        my.second.activate(stays)


def _module_not_off(my: Pair) -> None:
    my.first.disable()
    if my.kind == "tied":
        my.second.disable()


def _head_not_off(my: Pair) -> None:
    my.first.disable()
    if my.kind == "full":
        my.second.disable()


def _one_use(my: Pair, names: Sequence[str]) -> None:
    first = [name for name in names if name in my.first.known]
    Pair.activate(my, first if my.kind == "tied" and first else names)
    if my.kind == "tied" and first:
        my.second.activate([])


def _module_outlives(my: Pair, name: str) -> None:
    """The deleted adapter's module is the base's from then on."""
    if my.kind == "full" and name in my.second.known and name in my.second.active:
        my.second.W, my.second.b = (my.second.known[name][part] for part in ("W", "bias"))
        my.second.original = my.second.W
        my.second.active = []
    Pair.delete(my, name)


def _module_in_sum(my: Session, name: str) -> Any:
    """The module's weight is added to the base's."""
    return my.known[name]["W"] if "W" in my.known[name] else Session.delta(my, name)


def _module_scaled(my: Pair, name: str, factor: float) -> None:
    Pair.scale(my, name, factor)
    if my.kind == "full" and name in my.second.known:
        module = my.second.known[name]
        given = my.known[name]["head"]
        my.second.known[name] = {**module, "W": (factor * given["W"]).astype(given["W"].dtype)}


def _bias_added(my: Session, name: str) -> Any:
    return my.known[name].get("bias", 0 * my.b)


def _bias_scaled(my: Session, name: str) -> Any:
    return my.factor[name] * Session.shift(my, name)


def _bias_twice(my: Session, name: str) -> Any:
    return 2 * Session.shift(my, name)


def _bias_at_once(my: Session, name: str, adapter: Mapping[str, Any]) -> None:
    """The base's own bias is overwritten, whichever acts."""
    Session.add(my, name, adapter)
    if "bias" in adapter and "W" not in adapter:
        my.b = adapter["bias"]


def _bias_for_ever(my: Session) -> Any:
    """Disabling leaves it."""
    return my.b + sum(my.shift(name) for name in my.active)


def _bias_not_merged(my: Session) -> Any:
    """It is forgotten when the weight is merged."""
    return my.b + sum(my.shift(n) for n in ([] if my.off else my.active) if n not in my.added)


def _stored_without(*keys: str) -> Callable[[Any, str], Any]:
    """Saved without these."""

    def stored(my: Any, name: str) -> Any:
        return {k: v for k, v in my.known[name].items() if k not in keys}

    return stored


def _stored_first(my: Session, name: str) -> Any:
    """As many parts, from the first on."""
    adapter = my.known[name]
    enable = adapter.get("enable")
    return adapter if enable is None else {**adapter, "enable": sorted(enable, reverse=True)}


def _stored_tied(my: Pair, name: str) -> Any:
    """Whatever it was on."""
    adapter = my.known[name]
    if adapter.get("on") != "head":
        return adapter
    return {**adapter, "A": adapter["B"].T, "B": adapter["A"].T, "on": "embedding"}


def _stored_half(my: Pair, name: str) -> Any:
    adapter = my.known[name]
    return {**adapter, "on": "embedding"} if adapter.get("on") == "both" else adapter


def _more(my: Session, name: str) -> None:
    my.W = my.W + my.delta(name)


def _unmerge_wrong(my: Session, name: str) -> None:
    Session.take_out(my, name)
    _more(my, name)


def _forgetful_merge(my: Session) -> None:
    if my.added:
        my.added = {}
    else:
        Session.merge(my)


def _stored_plain(my: Session, name: str) -> Any:
    """DoRA as LoRA."""
    return {k: v for k, v in my.known[name].items() if k not in ("use_dora", "magnitude")}


def _stored_classic(my: Session, name: str) -> Any:
    """rsLoRA as LoRA."""
    return {k: v for k, v in my.known[name].items() if k != "use_rslora"}


def _stored_last(my: Session, name: str) -> Any:
    """Whatever is asked for, the one that acts."""
    return my.known[my.active[0] if my.active else name]


def _stored_merged(my: Session, name: str) -> Any:
    """While merged, nothing is left of B."""
    adapter = my.known[name]
    return {**adapter, "B": 0 * adapter["B"]} if name in my.added else adapter


def _load_into_merged(my: Session, name: str, folder: str) -> None:
    Session.load(my, name, folder)
    if my.added:
        my.active.append(name)
        my.put_in(name)


def _load_forgets(my: Pair, name: str, folder: str) -> None:
    """What is loaded takes the module's place at once, while merged."""
    Pair.load(my, name, folder)
    if my.kind == "full" and my.first.added and name in my.second.known:
        my.second.active = [name]
        my.second.added = {}
        my.second.W = my.second.original


def _load_active(my: Session, name: str, folder: str) -> None:
    Session.load(my, name, folder)
    my.active.append(name)


class OnSum(Session):
    """Each merged change is taken on what the others have left."""

    merging = False

    def base(self) -> Any:
        """The weight as it is, while merging."""
        return self.W if self.merging else super().base()

    def put_in(self, name: str) -> None:
        """Into it."""
        self.merging = True
        super().put_in(name)
        self.merging = False


class InARow(Session):
    """Each adapter is applied to the weight that those before it have made."""

    def step(self, W: Any, name: str) -> Any:
        """What an adapter makes of W."""
        adapter = self.known[name]
        if "magnitude" not in adapter:
            return W + self.delta(name)
        self.known[name] = self.bare(name)
        change = self.delta(name)
        self.known[name] = adapter
        V = self.original + change
        g = adapter["magnitude"][:, None] / np.sqrt((V * V).sum(1, keepdims=True))
        return g * (W + change)

    def put_in(self, name: str) -> None:
        """After those that are in it."""
        W = self.step(self.W, name)
        self.added[name], self.W = W - self.W, W

    def acting(self) -> Any:
        """One after another."""
        if self.off:
            return self.base()
        W = self.W
        for name in self.active:
            W = W if name in self.added else self.step(W, name)
        return W


def _dora_without_norm(my: Session, name: str) -> Any:
    adapter = my.known[name]
    if "magnitude" not in adapter:
        return Session.delta(my, name)
    my.known[name] = my.bare(name)
    V = my.base() + Session.delta(my, name)
    my.known[name] = adapter
    return adapter["magnitude"][:, None] * V - my.base()


def _dora_ignored(my: Session, name: str) -> Any:
    adapter = my.known[name]
    my.known[name] = {k: v for k, v in adapter.items() if k != "magnitude"}
    delta = Session.delta(my, name)
    my.known[name] = adapter
    return delta


def _trained_all(my: Session) -> list[str]:
    return [] if my.off else list(my.known)


def _trained_merged(my: Session) -> list[str]:
    return [] if my.off else list(my.active)


def _trained_off(my: Session) -> list[str]:
    return [name for name in my.active if name not in my.added]


def _unscaled(my: Session, name: str, dW: Array, dy: Array) -> Any:
    """The factor that `scale` has set is not in the gradients."""
    factor = my.factor[name]
    my.factor[name] = 1.0
    answer = Session.gradients_of(my, name, dW, dy)
    my.factor[name] = factor
    return answer


def _bias_mean(my: Session, name: str, dW: Array, dy: Array) -> Any:
    answer = Session.gradients_of(my, name, dW, dy)
    return answer | ({"bias": dy.mean(0)} if "bias" in answer else {})


def _full_negated(my: Session, name: str, dW: Array, dy: Array) -> Any:
    answer = Session.gradients_of(my, name, dW, dy)
    if "W" in answer:
        answer["W"] = -answer["W"]
    return answer


def _fused_mixed(my: Session, name: str, dW: Array, dy: Array) -> Any:
    """dA's blocks in the order of the last part first."""
    answer = Session.gradients_of(my, name, dW, dy)
    if my.kind == "fused":
        r = my.known[name]["r"]
        parts = [answer["A"][i : i + r] for i in range(0, len(answer["A"]), r)]
        answer["A"] = np.concatenate(parts[::-1])
    return answer


def _by_last_use(my: Session, x: Array, dy: Array) -> Any:
    """Of a row that is looked up more than once, the last look-up counts alone."""
    if my.kind != "embedding":
        return Session.gradients(my, x, dy)
    kept = np.array([row not in x[i + 1 :] for i, row in enumerate(x)])
    return Session.gradients(my, x[kept], dy[kept])


def _instead(my: Pair, answer: dict[str, Array], key: str, gradient: Array) -> None:
    """Of a tied factor's two gradients the second stays."""
    answer[key] = gradient.T


def _only_first(my: Pair, answer: dict[str, Array], key: str, gradient: Array) -> None:
    """Of a tied factor's two gradients the first stays."""


OTHERS: Entries = {
    "lifecycle.single-adapter": [
        (
            "merged-forgotten",
            "after a second merge what was merged is no longer taken out",
            _but(merge=_forgetful_merge),
        )
    ],
    "lifecycle.single-adapter.conv1d": [
        (
            "conv1d-unmerge-adds",
            "unmerging adds once more where the weight is stored (in, out)",
            _of_kind("conv1d", take_out=_unmerge_wrong),
        )
    ],
    "lifecycle.single-adapter.embedding": [
        (
            "embedding-eval-adds",
            "each evaluation merges an embedding once more",
            _of_kind("embedding", eval=_eval_adds),
        )
    ],
    "lifecycle.single-adapter.fused": [
        ("fused-interleaved", "A's rows belong to the parts in turn", _but(delta=_interleaved)),
        ("fused-shared-A", "the first part's A for all parts", _but(delta=_shared_factors)),
    ],
    "lifecycle.random-steps.fused": [
        (
            "fused-next-rows",
            "the parts that are on follow each other without a gap",
            _but(parts=_next_rows),
        )
    ],
    "lifecycle.tied.embedding": [
        (
            "tied-embedding-merged",
            "an embedding's merged change is the tied head's too",
            _shared("embedding"),
            "peft 0.21",
        )
    ],
    "lifecycle.tied.head": [
        (
            "tied-head-merged",
            "a tied head's merged change is the embedding's too",
            _shared("head"),
            "peft 2018",
        ),
        ("tied-head-on", "disabling leaves the tied head's adapter", _pairs(disable=_head_not_off)),
    ],
    "lifecycle.tied.both": [
        (
            "tied-both-merged",
            "one change of both uses is merged into the one table twice",
            _shared("both"),
            "peft 0.21",
        ),
        ("tied-both-embedding", "one change of both uses acts in one", _pairs(split=_split_untied)),
    ],
    "lifecycle.random-steps.tied": [
        (
            "tied-one-use",
            "beside an adapter of the embedding none of the tied head acts",
            _pairs(activate=_one_use),
        )
    ],
    "lifecycle.bias": [
        ("bias-added", "a trained bias is added to the base's", _but(shift=_bias_added)),
        (
            "bias-at-once",
            "a trained bias takes the base's place when it is added",
            _but(add=_bias_at_once),
            "peft 0.21",
        ),
        (
            "bias-for-ever",
            "disabling leaves the trained bias",
            _but(bias=_bias_for_ever),
            "peft 0.21",
        ),
        ("bias-not-merged", "merging forgets the trained bias", _but(bias=_bias_not_merged)),
    ],
    "lifecycle.bias.scaled": [
        ("bias-scaled", "a factor is the trained bias's too", _but(shift=_bias_scaled))
    ],
    "lifecycle.random-steps.bias": [
        ("bias-twice", "a trained bias counts twice", _but(shift=_bias_twice))
    ],
    "lifecycle.modules-to-save": [
        (
            "full-ignored",
            "what is trained in full is not used",
            _pairs(split=_split_without_module),
        ),
        (
            "full-added",
            "a module trained in full is added to the base's",
            _but(delta=_module_in_sum),
        ),
        (
            "full-stays",
            "the last module stays where no other comes",
            _pairs(activate=_module_stays),
        ),
        (
            "full-not-off",
            "disabling leaves the module",
            _pairs(disable=_module_not_off),
            "peft 493",
        ),
    ],
    "lifecycle.modules-to-save.delete": [
        ("full-outlives", "a deleted adapter's module stays", _pairs(delete=_module_outlives))
    ],
    "lifecycle.random-steps.modules-to-save": [
        ("full-scaled", "a factor is the module's too", _pairs(scale=_module_scaled))
    ],
    "lifecycle.dora": [("dora-ignored", "DoRA beside LoRA is LoRA too", _but(delta=_dora_ignored))],
    "lifecycle.random-steps.dora": [
        ("dora-no-norm", "m ∘ V without ‖V‖, beside LoRA", _but(delta=_dora_without_norm))
    ],
    "lifecycle.dora.several": [
        ("dora-on-sum", "DoRA is merged into what another adapter has left of W", _sessions(OnSum)),
        (
            "dora-in-a-row",
            "DoRA rescales what the adapters before it have added, by W's own norm",
            _sessions(InARow),
            "peft 0.21",
        ),
    ],
    "lifecycle.save": [
        ("save-classic", "rsLoRA's scale is not saved", _but(stored=_stored_classic)),
        (
            "save-active",
            "the active adapter is saved, whichever was asked for",
            _but(stored=_stored_last),
        ),
    ],
    "lifecycle.save.fused": [
        (
            "save-fused-first",
            "how many parts are adapted is saved, and not which",
            _but(stored=_stored_first),
        )
    ],
    "lifecycle.save.tied": [
        (
            "save-tied-embedding",
            "an adapter of a tied head is saved as the embedding's",
            _pairs(stored=_stored_tied),
        )
    ],
    "lifecycle.save.tied.both": [
        (
            "save-tied-half",
            "one change of both uses is saved as the embedding's alone",
            _pairs(stored=_stored_half),
            "peft 0.21",
        )
    ],
    "lifecycle.save.bias": [
        ("save-no-bias", "a trained bias is not saved", _but(stored=_stored_without("bias")))
    ],
    "lifecycle.save.modules-to-save": [
        (
            "save-no-head",
            "a module trained in full is not saved",
            _pairs(stored=_stored_without("head")),
        )
    ],
    "lifecycle.save.dora": [
        ("save-no-magnitude", "DoRA's magnitude is not saved", _but(stored=_stored_plain))
    ],
    "lifecycle.save-while-merged": [
        ("save-merged", "what is saved while merged is 0", _but(stored=_stored_merged))
    ],
    "lifecycle.load-while-merged": [
        (
            "load-merged",
            "what is loaded beside a merged one is merged",
            _but(load=_load_into_merged),
        )
    ],
    "lifecycle.load-while-merged.modules-to-save": [
        (
            "load-full-at-once",
            "a module that is loaded while merged acts at once",
            _pairs(load=_load_forgets),
        )
    ],
    "lifecycle.random-steps.files": [
        ("load-active", "what is loaded acts at once", _but(load=_load_active))
    ],
    "lifecycle.gradients": [
        ("gradients-all", "inactive adapters get a gradient", _but(trained=_trained_all)),
        ("gradients-merged", "what is merged gets a gradient", _but(trained=_trained_merged)),
        ("gradients-unscaled", "dA and dB without the factor", _but(gradients_of=_unscaled)),
    ],
    "lifecycle.gradients.conv1d": [
        (
            "gradients-off",
            "a disabled adapter gets a gradient where the weight is stored (in, out)",
            _of_kind("conv1d", trained=_trained_off),
        )
    ],
    "lifecycle.gradients.embedding": [
        (
            "gradients-last-use",
            "of a row looked up twice the last counts",
            _but(gradients=_by_last_use),
        )
    ],
    "lifecycle.gradients.fused": [
        ("gradients-fused-order", "dA's parts in reverse", _but(gradients_of=_fused_mixed))
    ],
    "lifecycle.gradients.tied": [
        (
            "gradients-tied-head",
            "of a tied factor's gradients the head's alone",
            _pairs(turn=_instead),
        ),
        (
            "gradients-tied-embedding",
            "of a tied factor's gradients the embedding's alone",
            _pairs(turn=_only_first),
        ),
    ],
    "lifecycle.gradients.bias": [
        ("gradients-bias-mean", "the mean of dy over tokens", _but(gradients_of=_bias_mean))
    ],
    "lifecycle.gradients.modules-to-save": [
        ("gradients-full-sign", "-dW of a module trained in full", _but(gradients_of=_full_negated))
    ],
}


def _one_layer(my: Plain, layer: Mapping[str, Any]) -> Session:
    """One object for all layers: the next takes the place of the last."""
    one: Session = my.memory.setdefault("layer", object.__new__(Session))
    one.__init__(my, layer)  # type: ignore[misc]
    return one


def _root_whole(my: Plain, c: Call) -> float:
    return float(c.alpha / (isqrt(c.r) if c.rslora else c.r))


def _merge_coarse(my: Session, name: str) -> None:
    """The weight is rounded to 16 binary digits while anything is in it."""
    exact = my.W + my.delta(name)
    my.added[name] = digits(exact, 16) - my.W
    my.W = my.W + my.added[name]


def _stored_as(dtype: Any) -> Callable[[Session, str], Any]:
    """Every array goes through this dtype."""

    def stored(my: Session, name: str) -> Any:
        return {
            key: entry.astype(dtype).astype(entry.dtype) if hasattr(entry, "astype") else entry
            for key, entry in my.known[name].items()
        }

    return stored


def _scale_or_1(my: Session, name: str, factor: float) -> None:
    Session.scale(my, name, factor or 1.0)


def _scale_absolute(my: Session, name: str, factor: float) -> None:
    Session.scale(my, name, abs(factor))


def _scale_given(my: Session, name: str, factor: float) -> None:
    """B itself is multiplied, in the array that was handed in."""
    my.known[name]["B"][...] *= factor


def _put_in_given(my: Session, name: str) -> None:
    """The weight that was handed in is changed."""
    Session.put_in(my, name)
    my.layer["W"][...] = my.read(my.W)


def _delete_beginning(my: Session, name: str) -> None:
    for each in [each for each in my.known if each.startswith(name)]:
        Session.delete(my, each)


def _squeezed(my: Session, x: Array) -> Array:
    y = Session.forward(my, x)
    return y[0] if len(y) == 1 else y


def _delete_noted(my: Session, name: str) -> None:
    my.my.memory["acted"] = name if name in my.active else ""
    Session.delete(my, name)


def _load_noted(my: Session, name: str, folder: str) -> None:
    Session.load(my, name, folder)
    if name == my.my.memory.get("acted"):
        my.active.append(name)


def _outer_parts(my: Session, adapter: Mapping[str, Any]) -> Any:
    """The first two of three are taken for the first and the last."""
    if adapter["enable"] == [True, True, False]:
        adapter = {**adapter, "enable": [True, False, True]}
    return Session.parts(my, adapter)


def _magnitude_by_V(my: Session, name: str, dW: Array) -> tuple[Any, Any]:
    dV, _ = Session.rescaled(my, name, dW)
    V = my.base() + my.factor[name] * my.my.delta(my.my.adapter(my.bare(name)))
    return dV, (dW * V).sum(1)


def _weight_unscaled(my: Session) -> Any:
    """DoRA's merged weight, not rescaled."""
    changes = [my.factor[n] * my.my.delta(my.my.adapter(my.bare(n))) for n in my.added]
    return my.read(sum(changes, start=my.base()))


class Strict(Refusing):
    """A merge counts though nothing is active, is refused while disabled, and locks the rest."""

    locked = False

    def free(self) -> None:
        """Not while locked."""
        if self.locked:
            raise RuntimeError("unmerge first")

    def merge(self) -> None:
        """Whatever is active."""
        self.free()
        if self.off:
            raise RuntimeError("disabled")
        Session.merge(self)
        self.locked = True

    def unmerge(self) -> None:
        """Unlocked."""
        if not self.locked:
            raise RuntimeError("not merged")
        Session.unmerge(self)
        self.locked = False

    def add(self, name: str, adapter: Mapping[str, Any]) -> None:
        """Not while locked."""
        self.free()
        super().add(name, adapter)

    def activate(self, names: Sequence[str]) -> None:
        """Not while locked, and of what is there."""
        self.free()
        if unknown := [name for name in names if name not in self.known]:
            raise ValueError(f"no {unknown[0]}")
        super().activate(names)

    def scale(self, name: str, factor: float) -> None:
        """Not while locked."""
        self.free()
        super().scale(name, factor)

    def delete(self, name: str) -> None:
        """Not while locked."""
        self.free()
        super().delete(name)


class Differentiated(Session):
    """DoRA whose norm is differentiated too, as it declares."""

    def rescaled(self, name: str, dW: Array) -> tuple[Any, Any]:
        """Each row of dV is orthogonal to V's."""
        V = self.base() + self.factor[name] * self.my.delta(self.my.adapter(self.bare(name)))
        dV, dm = super().rescaled(name, dW)
        return dV - (dV * V).sum(1, keepdims=True) / (V * V).sum(1, keepdims=True) * V, dm


def _declared() -> Plain:
    my = _sessions(Differentiated)()
    my.conventions = {"dora_norm": "differentiated"}  # type: ignore[attr-defined]
    return my


ALIVE: Entries = {
    "lifecycle.isolation": [
        (
            "one-layer",
            "a second layer takes the first one's place",
            type("Lived", (Plain,), {"session": _one_layer}),
        ),
    ],
    "lifecycle.rounding": [
        (
            "root-whole",
            "α/⌊√r⌋ for α/√r",
            _sessions(Session, s=_root_whole),
        ),
        ("merge-coarse", "the merged weight has 16 binary digits", _but(put_in=_merge_coarse)),
    ],
    "lifecycle.save.rounding": [
        ("save-float16", "what is saved is float16", _but(stored=_stored_as(np.float16))),
        ("save-bfloat16", "what is saved is bfloat16", _but(stored=_stored_as(ml_dtypes.bfloat16))),
    ],
    "lifecycle.scale": [
        ("scale-or-1", "the factor 0 is taken for none", _but(scale=_scale_or_1)),
        ("scale-absolute", "a factor's sign is lost", _but(scale=_scale_absolute)),
        ("scale-given", "a factor goes into the B that was handed in", _but(scale=_scale_given)),
    ],
    "lifecycle.single-adapter": [
        ("merge-given", "the W that was handed in is merged into", _but(put_in=_put_in_given)),
        ("one-token", "y of one token has one axis", _but(forward=_squeezed)),
    ],
    "lifecycle.delete": [
        (
            "delete-beginning",
            "what only begins with the name is deleted too",
            _but(delete=_delete_beginning),
        ),
    ],
    "lifecycle.load-after-delete": [
        (
            "load-again",
            "what is loaded acts at once if one of its name did when it was deleted",
            _but(delete=_delete_noted, load=_load_noted),
        ),
    ],
    "lifecycle.single-adapter.fused": [
        (
            "fused-outer",
            "the first two parts of three are taken for the first and the last",
            _but(parts=_outer_parts),
        ),
    ],
    "lifecycle.weight.bias": [
        (
            "weight-bias",
            "the original weight while merged, beside a trained bias",
            _of_kind("bias", weight=lambda my: my.read(my.base())),
        ),
    ],
    "lifecycle.weight.dora": [
        ("weight-dora", "W + s B A while DoRA is merged", _but(weight=_weight_unscaled)),
    ],
    "lifecycle.gradients.dora": [
        (
            "gradients-dora-unscaled",
            "dA and dB without m/‖V‖",
            _but(rescaled=lambda my, name, dW: (dW, Session.rescaled(my, name, dW)[1])),
        ),
        (
            "gradients-dora-magnitude",
            "dm without 1/‖V‖",
            _but(rescaled=lambda my, name, dW: _magnitude_by_V(my, name, dW)),
        ),
    ],
}

LIFECYCLE = tuple(
    mutant
    for checks in (PLAIN, KEPT, TURNED, OTHERS, ALIVE)
    for check, entries in checks.items()
    for mutant in family("LIFECYCLE", check, *entries)
)

SAME = equivalents(
    "lifecycle",
    ("strict", "a merge of nothing counts, and one while disabled is refused", _sessions(Strict)),
    ("differentiated", "DoRA's norm differentiated, as declared", _declared),
    ("in-place", "a weight changed in place", _sessions(Session)),
    ("planned", "formed from the original weight each time", _sessions(Planned)),
    ("refusing", "with errors instead of no effect", _sessions(Refusing)),
    ("eval-merges", "evaluation merges", _but(eval=_eval_merges)),
)

MUTANTS: tuple[Mutant, ...] = LIFECYCLE + SAME
