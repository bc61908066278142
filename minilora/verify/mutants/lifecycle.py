"""Mutants of a layer whose adapters are added, activated, merged, saved and deleted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import ml_dtypes
import numpy as np

from minilora.verify.mutants.mutant import Mutant, Reference, Same, Table, equivalents, mutants
from minilora.verify.mutants.references.helpers import Array
from minilora.verify.mutants.references.lifecycle import Lifecycle, Pair, Session
from minilora.verify.mutants.references.linear import Linear

Adapter = Mapping[str, Any]


def last_output(session: Session, y: Array) -> Array:
    """The output of the last forward, while nothing has happened but that x is another."""
    names = tuple(session.active), tuple(session.merged), session.off
    now = (names, tuple(session.factor.items()), session.W.tobytes())
    before, last = vars(session).get("last", (None, None))
    vars(session)["last"] = (now, last if now == before else y)
    answer: Array = vars(session)["last"][1]
    return answer


def interleaved(adapter: Adapter) -> Adapter:
    """A's blocks of r rows taken for rows in turn."""
    count = sum(adapter["enable"])
    return {**adapter, "A": np.concatenate([adapter["A"][i::count] for i in range(count)])}


def shared_A(adapter: Adapter) -> Adapter:
    """The first part's A for all parts."""
    first = adapter["A"][: adapter["r"]]
    return {**adapter, "A": np.tile(first, (sum(adapter["enable"]), 1))}


def next_rows(parts: Sequence[tuple[slice, slice, slice]]) -> list[tuple[slice, slice, slice]]:
    """The parts that are on, without those that are off between them."""
    ends = np.cumsum([rows.stop - rows.start for rows, _, _ in parts])
    pairs = zip(ends, parts, strict=True)
    return [(slice(e - rows.stop + rows.start, e), of_A, of_B) for e, (rows, of_A, of_B) in pairs]


def outlive(module: Session, name: str) -> None:
    """The deleted adapter's module is the base's from then on."""
    module.W, module.b = (module.known[name][part] for part in ("W", "bias"))
    module.original, module.active = module.W, []


def scale_module(module: Session, name: str, factor: float, W: Array) -> None:
    """The module's weight is multiplied by the adapter's factor."""
    module.known[name] = {**module.known[name], "W": (factor * W).astype(W.dtype)}


def at_once(module: Session, name: str) -> None:
    """What is loaded takes the module's place."""
    module.active, module.merged, module.W = [name], {}, module.original


def instead_of_base(module: Session, name: str) -> None:
    """What is loaded takes the place of the base's module, under what is merged."""
    new = module.known[name]
    merged = {each: change + module.original - new["W"] for each, change in module.merged.items()}
    module.W = module.W if merged else new["W"]
    module.merged, module.original, module.b = merged, new["W"], new["bias"]


def last_uses(x: Array) -> Array:
    """Which look-ups of a row are its last."""
    return np.array([row not in x[i + 1 :] for i, row in enumerate(x)])


def one_layer(maths: Linear, layer: Mapping[str, Any]) -> Session:
    """One object for all layers: the next takes the place of the last."""
    one: Session = maths.memory.setdefault("layer", object.__new__(Session))
    one.__init__(maths, layer)  # type: ignore[misc]
    return one


def stored_as(adapter: Adapter, dtype: Any) -> Adapter:
    """Every array by way of a dtype."""
    return {
        key: value.astype(dtype).astype(value.dtype) if hasattr(value, "astype") else value
        for key, value in adapter.items()
    }


class Shared(Pair):
    """A table that stays one when it is merged, as where the parameter itself is changed."""

    which = ("embedding", "head", "both")

    def merge(self) -> None:
        self.unmerge()
        super().merge()
        for a, b in ((self.first, self.second), (self.second, self.first)):
            for name, change in a.merged.items():
                if self.kind == "tied" and self.known[name]["on"] in self.which:
                    b.W = b.W + change.T

    def unmerge(self) -> None:
        for a, b in ((self.first, self.second), (self.second, self.first)):
            for name, change in a.merged.items():
                if self.kind == "tied" and self.known[name]["on"] in self.which:
                    b.W = b.W - change.T
        super().unmerge()

    def activate(self, names: Sequence[str]) -> None:
        self.unmerge()
        super().activate(names)

    def delete(self, name: str) -> None:
        self.unmerge()
        super().delete(name)

    def scale(self, name: str, factor: float) -> None:
        self.unmerge()
        super().scale(name, factor)


def shared(*which: str) -> type[Shared]:
    """`Shared` for the adapters in these places."""
    return type("Shared", (Shared,), {"which": which})


class OnSum(Session):
    """Each merged change is taken on what the others have left."""

    merging = False

    def base(self) -> Any:
        return self.W if self.merging else super().base()

    def put_in(self, name: str) -> None:
        self.merging = True
        super().put_in(name)
        self.merging = False


class InARow(Session):
    """Each adapter is applied to the weight that those before it have made."""

    def onto(self, W: Any, name: str) -> Any:
        adapter = self.known[name]
        if "magnitude" not in adapter:
            return W + self.delta(name)
        self.known[name] = self.bare(adapter)
        change = self.delta(name)
        self.known[name] = adapter
        V = self.original + change
        g = adapter["magnitude"][:, None] / np.sqrt((V * V).sum(1, keepdims=True))
        return g * (W + change)

    def put_in(self, name: str) -> None:
        W = self.onto(self.W, name)
        self.merged[name], self.W = W - self.W, W

    def acting(self) -> Any:
        if self.off:
            return self.base()
        W = self.W
        for name in self.active:
            W = W if name in self.merged else self.onto(W, name)
        return W


class Planned(Session):
    """The same from the original weight each time."""

    def put_in(self, name: str) -> None:
        self.merged[name] = 0 * self.W

    def take_out(self, name: str) -> None:
        del self.merged[name]

    def base(self) -> Any:
        return self.W

    def acting(self) -> Any:
        names = [] if self.off else self.active
        return sum((self.delta(name) for name in names), start=self.W)

    def weight(self) -> Array:
        total = sum((self.delta(name) for name in self.merged), start=self.W)
        W: Array = self.read(total).astype(self.layer["W"].dtype)
        return W


class Refusing(Session):
    """With errors where another passes over, or exchanges what is merged."""

    def merge(self) -> None:
        if self.merged or not self.active:
            raise RuntimeError("merged already, or nothing to merge")
        super().merge()

    def unmerge(self) -> None:
        if not self.merged:
            raise RuntimeError("not merged")
        super().unmerge()

    def delete(self, name: str) -> None:
        if name in self.merged:
            raise RuntimeError("unmerge first")
        super().delete(name)

    def scale(self, name: str, factor: float) -> None:
        if name in self.merged:
            raise RuntimeError("unmerge first")
        super().scale(name, factor)

    def replace(self, name: str, adapter: Mapping[str, Any]) -> None:
        if name in self.merged:
            raise RuntimeError("unmerge first")
        super().replace(name, adapter)


class Strict(Refusing):
    """A merge counts though nothing is active, is refused while disabled, and locks the rest."""

    locked = False

    def free(self) -> None:
        if self.locked:
            raise RuntimeError("unmerge first")

    def merge(self) -> None:
        self.free()
        if self.off:
            raise RuntimeError("disabled")
        Session.merge(self)
        self.locked = True

    def unmerge(self) -> None:
        if not self.locked:
            raise RuntimeError("not merged")
        Session.unmerge(self)
        self.locked = False

    def add(self, name: str, adapter: Mapping[str, Any]) -> None:
        self.free()
        super().add(name, adapter)

    def activate(self, names: Sequence[str]) -> None:
        self.free()
        super().activate(names)

    def replace(self, name: str, adapter: Mapping[str, Any]) -> None:
        self.free()
        super().replace(name, adapter)

    def step(self, x: Array, dy: Array, lr: float) -> None:
        self.free()
        super().step(x, dy, lr)

    def scale(self, name: str, factor: float) -> None:
        self.free()
        super().scale(name, factor)

    def delete(self, name: str) -> None:
        self.free()
        super().delete(name)


class Unmerging(Refusing):
    """What touches a merged adapter unmerges all of them first."""

    def activate(self, names: Sequence[str]) -> None:
        Session.unmerge(self)
        super().activate(names)

    def disable(self) -> None:
        Session.unmerge(self)
        super().disable()

    def scale(self, name: str, factor: float) -> None:
        if name in self.merged:
            Session.unmerge(self)
        super().scale(name, factor)

    def delete(self, name: str) -> None:
        if name in self.merged:
            Session.unmerge(self)
        super().delete(name)

    def add(self, name: str, adapter: Mapping[str, Any]) -> None:
        Session.unmerge(self)
        super().add(name, adapter)


class EvalMerges(Refusing):
    """Evaluation merges and training unmerges; a second merge is an error."""

    def eval(self) -> None:
        super().eval()
        Session.merge(self)

    def train(self) -> None:
        super().train()
        Session.unmerge(self)


class Differentiated(Session):
    """DoRA whose norm is differentiated too, as it declares."""

    def rescaled(self, name: str, dW: Array) -> tuple[Any, Any]:
        V = self.base() + self.factor[name] * self.maths.delta(self.bare(self.known[name]))
        dV, dm = super().rescaled(name, dW)
        return dV - (dV * V).sum(1, keepdims=True) / (V * V).sum(1, keepdims=True) * V, dm


NAMES = {**globals(), "isqrt": isqrt, "ml_dtypes": ml_dtypes}
SESSION = Reference((Linear, Session, Pair, Lifecycle), NAMES)

# fmt: off
LIFECYCLE: Table = {
    "lifecycle.add": [
        ("added-active", "a new adapter is active at once",
         {"# after adding": "self.active.append(name)"}),
    ],
    "lifecycle.several": [
        ("activate-adds", "activate leaves the other adapters active",
         {"Session: # before activating":
              "names = [*self.active, *(name for name in names if name not in self.active)]"}),
        ("activate-one", "activate takes only the first of several adapters",
         {"Session: # before activating": "names = names[:1]"}),
        ("activate-none", "activate([]) changes nothing",
         {"Session: # before activating": "names = names or self.active"}),
    ],
    "lifecycle.disable": [
        ("disable-nothing", "disable does nothing", {"self.off = True": "pass"}),
        ("disable-merged", "disable leaves merged adapters in the output",
         {"self.base() if self.off else self.W": "self.W"}),
        ("disable-for-ever", "activate does not enable again",
         {"self.active, self.off = list(names), False": "self.active = list(names)"}),
    ],
    "lifecycle.scale": [
        ("scale-piled", "scale multiplies the previous factor",
         {"# before scaling": "factor = self.factor[name] * factor"}),
        ("scale-nothing", "scale does nothing", {"# before scaling": "return"}),
        ("scale-of-all", "scale sets the factor of all adapters",
         {"Session: def scale(self, name: str, factor: float) -> None:":
              "def scale(self, name, factor):\n        for each in self.known: "
              "self.scale_one(each, factor)\n\n    def scale_one(self, name, factor):"}),
        ("scale-or-1", "a factor of 0 taken for 1", {"# before scaling": "factor = factor or 1.0"}),
        ("scale-absolute", "the factor's sign is ignored",
         {"# before scaling": "factor = abs(factor)"}),
        ("scale-or-as-before", "a factor of 0 is passed over",
         {"# before scaling": "if factor == 0: return"}),
        ("scale-until-activated", "activate sets all factors to 1",
         {"Session: # before activating": "self.factor = dict.fromkeys(self.factor, 1.0)"}),
        ("scale-classic", "a factor set for an adapter with rsLoRA is one of α/r",
         {"# before scaling":
              'a = self.known[name]; factor /= a["r"] ** 0.5 if a.get("use_rslora") else 1'},
         "peft 2733"),
        ("scale-given", "scale multiplies the caller's B",
         {"# before scaling": 'self.known[name]["B"][...] *= factor; return'}),
    ],
    "lifecycle.merge-twice": [
        ("merge-twice", "a second merge adds the adapter again",
         {"for name in [name for name in self.active if name not in self.merged]":
              "for name in self.active"}),
        ("unmerge-twice", "a second unmerge subtracts the adapter again",
         {"for name in list(self.merged):":
              "for name in self.active:\n            self.merged.setdefault(name, "
              "self.delta(name))"}),
        ("merged-and-branch", "a merged adapter's branch is still added",
         {"# acting": "names = [] if self.off else self.active"}),
        ("unmerge-nothing", "unmerge does nothing",
         {"self.W = self.W - self.merged.pop(name)": "self.merged.pop(name)"}),
    ],
    "lifecycle.merge-several": [
        ("merge-all", "merge takes inactive adapters, too",
         {"# before merging": "self.active = list(self.known)"}),
        ("merge-first", "merge takes only the first active adapter",
         {"# before merging": "self.active = self.active[:1]"}),
        ("unmerge-first", "unmerge takes out only the first merged adapter",
         {"in list(self.merged):": "in list(self.merged)[:1]:",
          "# after unmerging": "self.merged = {}"}),
    ],
    "lifecycle.scale-while-merged": [
        ("scale-late", "a factor set while merged has no effect until unmerge",
         {"# before scaling": "self.factor[name] = factor; return"}),
        ("unmerge-anew", "unmerge subtracts the adapter as it is by then, not what was added",
         {"self.W = self.W - self.merged.pop(name)":
              "self.merged.pop(name); self.W = self.W - self.delta(name)",
          "# before scaling": "self.factor[name] = factor; return"}, "peft 0.21"),
    ],
    "lifecycle.delete": [
        ("delete-all-rest", "delete deactivates the other adapters",
         {"# after deleting": "self.active = []"}),
        ("delete-branch", "a deleted active adapter still acts",
         {"Session: # before deleting":
              "delta = self.delta(name) if name in self.active and name not in self.merged else "
              "0 * self.W",
          "# after deleting": "self.W = self.W + delta"}),
        ("delete-beginning", "delete takes every adapter whose name begins so",
         {"Session: def delete(self, name: str) -> None:":
              "def delete(self, name):\n        for each in [each for each in self.known if "
              "each.startswith(name)]: self.delete_one(each)\n\n    def delete_one(self, name):"}),
    ],
    "lifecycle.delete-while-merged": [
        ("delete-merged", "a deleted merged adapter stays in the weight",
         {"Session: # before deleting": "self.merged.pop(name, None)"}),
        ("delete-next", "delete activates the next adapter",
         {"Session: # before deleting": "acted = name in self.active",
          "# after deleting":
              "self.active = list(self.known)[:1] if acted and not self.active else self.active"}),
    ],
    "lifecycle.activate-while-merged": [
        ("activate-merged", "activate leaves merged adapters in the output",
         {"Session: # before activating": "self.active, self.off = list(names), False; return"}),
    ],
    "lifecycle.add-while-merged": [
        ("add-merged", "an adapter that is added while merged is merged, too",
         {"# after adding": "if self.merged: self.active.append(name); self.put_in(name)"}),
        ("add-forgets", "after add, merged adapters cannot be unmerged",
         {"# after adding": "self.merged = {}"}),
    ],
    "lifecycle.train-eval": [
        ("eval-adds", "each eval merges again",
         {"# before evaluation":
              "for name in self.active if self.training else []: self.W = self.W + "
              "self.delta(name)"}),
        ("train-forgets", "after train, merged adapters cannot be unmerged",
         {"# before training": "self.merged = {}"}, "microsoft/LoRA 34"),
        ("output-kept", "the last output is returned for another x",
         {"# answered": "y = last_output(self, y)"}),
    ],
    "lifecycle.weight": [
        ("weight-original", "weight returns W while merged",
         {"self.read(self.W)": "self.read(self.base())"}),
        ("weight-merged", "weight returns W' while not merged",
         {"self.read(self.W)": "self.read(self.acting())"}),
    ],
    "lifecycle.random-steps": [
        ("merged-alone", "while one adapter is merged, no other acts",
         {"# acting": "names = [] if self.merged else names"}, "peft 3756"),
        ("disable-unmerges", "disable only unmerges", {"self.off = True": "self.unmerge()"}),
    ],
    "lifecycle.save-scaled": [
        ("save-factor-in-B", "save multiplies B by the factor",
         {"Session: # before saving":
              'adapter = {**adapter, "B": (self.factor[name] * '
              'adapter["B"]).astype(adapter["B"].dtype)}'}),
        ("save-factor-in-alpha", "save multiplies α by the factor",
         {"Session: # before saving":
              'adapter = {**adapter, "alpha": self.factor[name] * adapter["alpha"]}'}),
        ("save-factor", "save stores the factor, load restores it",
         {"Session: # before saving": "adapter = adapter, self.factor[name]",
          "Session: self.add(name, adapter)":
              "adapter, factor = adapter; self.add(name, adapter); self.factor[name] = factor"}),
    ],
    "lifecycle.random-steps.conv1d": [
        ("conv1d-twice", "2 s B A where the weight is stored (in, out)",
         {"# change": 'change = 2 * change if self.kind == "conv1d" else change'}),
    ],
    "lifecycle.weight.conv1d": [
        ("conv1d-unmerge-nothing", "unmerging does nothing where the weight is stored (in, out)",
         {"self.W = self.W - self.merged.pop(name)":
              'change = self.merged.pop(name); self.W = self.W if self.kind == "conv1d" else '
              "self.W - change"}),
    ],
    "lifecycle.random-steps.embedding": [
        ("embedding-disable", "an embedding's adapter is not disabled",
         {"self.off = True": 'self.off = self.kind != "embedding"'}),
        ("embedding-merged-twice", "an embedding's branch acts beside its merged table",
         {"# acting":
              'names = self.active if self.kind == "embedding" and not self.off else names'},
         "candle-lora 26"),
        ("embedding-classic", "use_rslora is ignored for an embedding",
         {'"use_rslora") if k in adapter':
              '"use_rslora") if k in adapter and (k != "use_rslora" or self.kind != "embedding")'}),
    ],
    "lifecycle.weight.embedding": [
        ("embedding-never-merged", "an embedding's table is never merged",
         {"self.read(self.W)": 'self.read(self.base() if self.kind == "embedding" else self.W)'}),
    ],
    "lifecycle.single-adapter": [
        ("merged-forgotten", "after a second merge, merged adapters cannot be unmerged",
         {"# before merging": "if self.merged: self.merged = {}; return"}),
        ("merge-given", "merge overwrites the caller's W",
         {"# put in": 'self.layer["W"][...] = self.read(self.W)'}),
        ("one-token", "y of one token has shape (m,)",
         {"# answered": "y = y[0] if len(y) == 1 else y"}),
    ],
    "lifecycle.single-adapter.conv1d": [
        ("conv1d-unmerge-adds", "unmerge has no effect where the weight is stored (in, out)",
         {"self.W - self.merged.pop(name)":
              "self.W - self.merged.pop(name); self.W = self.W + self.delta(name) if self.kind "
              '== "conv1d" else self.W'}),
    ],
    "lifecycle.single-adapter.embedding": [
        ("embedding-eval-adds", "each eval merges an embedding's adapter again",
         {"# before evaluation":
              'for name in self.active if self.training and self.kind == "embedding" else []: '
              "self.W = self.W + self.delta(name)"}),
    ],
    "lifecycle.single-adapter.fused": [
        ("fused-interleaved", "A's rows belong to the fused parts in turn",
         {"# of the adapter":
              'adapter = interleaved(adapter) if self.kind == "fused" else adapter'}),
        ("fused-shared-A", "the first part's A for all fused parts",
         {"# of the adapter": 'adapter = shared_A(adapter) if self.kind == "fused" else adapter'}),
        ("fused-outer", "adapters of q and k taken for q and v in a fused layer",
         {"# enabled":
              "enable = [True, False, True] if enable == [True, True, False] else enable"}),
    ],
    "lifecycle.random-steps.fused": [
        ("fused-next-rows", "a disabled part of a fused layer is not skipped",
         {"# parts": "parts = next_rows(parts)"}),
    ],
    "lifecycle.tied.embedding": [
        ("tied-embedding-merged", "merging an embedding's adapter changes the tied head",
         {"Session, Pair": 'Session, shared("embedding")'}, "peft 0.21"),
    ],
    "lifecycle.tied.head": [
        ("tied-head-merged", "merging a tied head's adapter changes the embedding",
         {"Session, Pair": 'Session, shared("head")'}, "peft 2018"),
        ("tied-head-on", "disable leaves the tied head's adapter on",
         {"self.second.disable()": 'if self.kind == "full": self.second.disable()'}),
    ],
    "lifecycle.tied.both": [
        ("tied-both-merged", "an adapter of both uses of a table is merged twice",
         {"Session, Pair": 'Session, shared("both")'}, "peft 0.21"),
        ("tied-both-embedding", "an adapter of both uses of a table acts in the embedding alone",
         {"# split": 'second = None if adapter.get("on") == "both" else second'}),
    ],
    "lifecycle.random-steps.tied": [
        ("tied-one-use", "while an embedding's adapter is active, none of the tied head acts",
         {"Pair: # before activating":
              'uses = [n for n in names if n in self.first.known] if self.kind == "tied" else '
              "[]; names = uses or names",
          "# after activating": "if uses: self.second.activate([])"}),
    ],
    "lifecycle.bias": [
        ("bias-added", "a trained bias is added to the base's instead of replacing it",
         {'self.known[name].get("bias", self.b) - self.b':
              'self.known[name].get("bias", 0 * self.b)'}),
        ("bias-at-once", "a trained bias replaces the base's when it is added",
         {"# after adding":
              'self.b = adapter["bias"] if "bias" in adapter and "W" not in adapter else self.b'},
         "peft 0.21"),
        ("bias-for-ever", "disable leaves the trained bias",
         {"[] if self.off else self.active)": "self.active)"}, "peft 0.21"),
        ("bias-not-merged", "a merged adapter's trained bias does not act",
         {"[] if self.off else self.active)":
              "[] if self.off else [n for n in self.active if n not in self.merged])"}),
    ],
    "lifecycle.bias.scaled": [
        ("bias-scaled", "scale multiplies the trained bias, too",
         {'self.known[name].get("bias", self.b) - self.b':
              'self.factor[name] * (self.known[name].get("bias", self.b) - self.b)'}),
    ],
    "lifecycle.random-steps.bias": [
        ("bias-twice", "a trained bias is added twice",
         {'self.known[name].get("bias", self.b) - self.b':
              '2 * (self.known[name].get("bias", self.b) - self.b)'}),
    ],
    "lifecycle.modules-to-save": [
        ("full-ignored", "modules_to_save are not used",
         {"# split": 'second = second if self.kind == "tied" else None'}),
        ("full-added", "a module of modules_to_save is added to the base's",
         {'adapter["W"] - self.original': 'adapter["W"]'}),
        ("full-stays", "a module of modules_to_save stays when the next adapter has none",
         {"Pair: # before activating": 'stays = [] if self.kind == "tied" else self.second.active',
          "# after activating":
              "if stays and names and not self.second.active and stays[0] in self.second.known: "
              "self.second.activate(stays)"}),
        ("full-not-off", "disable leaves a module of modules_to_save",
         {"self.second.disable()": 'if self.kind == "tied": self.second.disable()'}, "peft 493"),
    ],
    "lifecycle.modules-to-save.delete": [
        ("full-outlives", "delete leaves the adapter's module of modules_to_save",
         {"Pair: # before deleting":
              'if self.kind == "full" and name in self.second.active: outlive(self.second, name)'}),
    ],
    "lifecycle.random-steps.modules-to-save": [
        ("full-no-bias", "a module of modules_to_save has the base's bias",
         {'self.known[name].get("bias", self.b) - self.b':
              '(self.b if "W" in self.known[name] else self.known[name].get("bias", self.b)) - '
              "self.b"}),
    ],
    "lifecycle.dora": [
        ("dora-ignored", "DoRA is taken for LoRA",
         {"# of the adapter": 'adapter = {k: v for k, v in adapter.items() if k != "magnitude"}'}),
        ("dora-norm-of-base", "DoRA is divided by the norm of W, without its change",
         {"norm = np.sqrt((V * V).sum(1, keepdims=True))":
              "norm = np.sqrt((self.base() * self.base()).sum(1, keepdims=True))"}),
    ],
    "lifecycle.random-steps.dora": [
        ("dora-no-norm", "m ∘ V: DoRA is not divided by ‖V‖",
         {"np.sqrt((V * V).sum(1, keepdims=True))": "1"}),
    ],
    "lifecycle.dora.several": [
        ("dora-on-sum", "DoRA is merged into W with the other merged adapters",
         {"Session, Pair": "OnSum, Pair"}),
        ("dora-in-a-row", "DoRA rescales what the adapters before it added, by W's own norm",
         {"Session, Pair": "InARow, Pair"}, "peft 0.21"),
    ],
    "lifecycle.save": [
        ("save-classic", "use_rslora is not saved",
         {"Session: # before saving":
              'adapter = {k: v for k, v in adapter.items() if k != "use_rslora"}'}),
        ("save-active", "save takes the active adapter, not the one that is named",
         {"Session: # before saving":
              "adapter = self.known[self.active[0] if self.active else name]"}),
    ],
    "lifecycle.save.fused": [
        ("save-fused-first", "save stores how many fused parts are adapted, not which",
         {"Session: # before saving":
              'adapter = {**adapter, "enable": sorted(adapter["enable"], reverse=True)} if '
              '"enable" in adapter else adapter'}),
    ],
    "lifecycle.save.tied": [
        ("save-tied-embedding", "a tied head's adapter is saved as the embedding's",
         {"Pair: # before saving":
              'adapter = {**adapter, "A": adapter["B"].T, "B": adapter["A"].T, "on": '
              '"embedding"} if adapter.get("on") == "head" else adapter'}),
    ],
    "lifecycle.save.tied.both": [
        ("save-tied-half", "an adapter of both uses of a table is saved as the embedding's",
         {"Pair: # before saving":
              'adapter = {**adapter, "on": "embedding"} if adapter.get("on") == "both" else '
              "adapter"}, "peft 0.21"),
    ],
    "lifecycle.save.bias": [
        ("save-no-bias", "the trained bias is not saved",
         {"Session: # before saving":
              'adapter = {k: v for k, v in adapter.items() if k != "bias"}'}),
    ],
    "lifecycle.save.modules-to-save": [
        ("save-no-head", "modules_to_save are not saved",
         {"Pair: # before saving": 'adapter = {k: v for k, v in adapter.items() if k != "head"}'}),
    ],
    "lifecycle.save.dora": [
        ("save-no-magnitude", "DoRA's magnitude is not saved",
         {"Session: # before saving":
              'adapter = {k: v for k, v in adapter.items() if k not in ("use_dora", '
              '"magnitude")}'}),
    ],
    "lifecycle.save-while-merged": [
        ("save-merged", "B = 0 is saved while merged",
         {"Session: # before saving":
              'adapter = {**adapter, "B": 0 * adapter["B"]} if name in self.merged else adapter'}),
    ],
    "lifecycle.load-while-merged": [
        ("load-merged", "an adapter that is loaded while merged is merged, too",
         {"Session: # after loading":
              "if self.merged: self.active.append(name); self.put_in(name)"}),
    ],
    "lifecycle.load-while-merged.modules-to-save": [
        ("load-full-at-once", "a module of modules_to_save acts when it is loaded while merged",
         {"Pair: # after loading":
              'if self.kind == "full" and self.first.merged and name in self.second.known: '
              "at_once(self.second, name)"}),
        ("load-full-of-base", "a module of modules_to_save that is loaded while merged takes the "
         "base's place",
         {"Pair: # after loading":
              'if self.kind == "full" and self.first.merged and name in self.second.known: '
              "instead_of_base(self.second, name)"}),
    ],
    "lifecycle.random-steps.files": [
        ("load-active", "a loaded adapter is active at once",
         {"Session: # after loading": "self.active.append(name)"}),
    ],
    "lifecycle.gradients": [
        ("gradients-all", "inactive adapters get a gradient",
         {"# trained": "names = [] if self.off else list(self.known)"}),
        ("gradients-merged", "merged adapters get a gradient",
         {"# trained": "names = [] if self.off else list(self.active)"}),
        ("gradients-unscaled", "dA and dB without the factor of scale",
         {"s = self.factor[name] *": "s ="}),
    ],
    "lifecycle.gradients.conv1d": [
        ("gradients-off", "a disabled adapter gets a gradient where the weight is stored (in, out)",
         {"# trained":
              "names = [n for n in self.active if n not in self.merged] if self.kind == "
              '"conv1d" else names'}),
    ],
    "lifecycle.gradients.embedding": [
        ("gradients-last-use", "a row that is looked up twice gets the last use's gradient alone",
         {"# backward":
              'if self.kind == "embedding": last = last_uses(x); x, dy = x[last], dy[last]'}),
    ],
    "lifecycle.gradients.fused": [
        ("gradients-fused-order", "dA's fused parts are reversed",
         {"# factors":
              'dA = np.concatenate(np.split(dA, len(dA) // adapter["r"])[::-1]) if self.kind == '
              '"fused" else dA'}),
    ],
    "lifecycle.gradients.tied": [
        ("gradients-tied-head", "an adapter of both uses gets the head's gradient alone",
         {"answer[turned] + gradient.T": "gradient.T"}),
        ("gradients-tied-embedding", "an adapter of both uses gets the embedding's gradient alone",
         {"answer[turned] = answer[turned] + gradient.T": "pass"}),
    ],
    "lifecycle.gradients.bias": [
        ("gradients-bias-mean", "the trained bias gets the mean of dy over tokens",
         {'{"bias": dy.sum(0)}': '{"bias": dy.mean(0)}'}),
    ],
    "lifecycle.gradients.modules-to-save": [
        ("gradients-full-sign", "a module of modules_to_save gets -dW",
         {'{"W": dW, **brought}': '{"W": -dW, **brought}'}),
    ],
    "lifecycle.isolation": [
        ("one-layer", "a second layer replaces the first",
         {"kind, pair = Session, Pair": "return one_layer(self, layer)"}),
        ("shared-factor", "layers share the factor of an adapter's name",
         {"self.factor: dict[str, float] = {}":
              'self.factor: dict[str, float] = maths.memory.setdefault("factor", {})'}),
        ("shared-active", "layers share the list of active adapters",
         {"self.merged: dict[str, Any] = {}":
              'self.active, self.merged = maths.memory.setdefault("active", []), {}',
          "self.active, self.off = list(names), False":
              "self.active[:], self.off = list(names), False"}),
    ],
    "lifecycle.rounding": [
        ("root-whole", "α/⌊√r⌋ for α/√r", {"alpha * r**-0.5": "alpha / isqrt(r)"}),
        ("merge-coarse", "the merged weight is rounded to 16 binary digits",
         {"self.merged[name] = self.delta(name)":
              "self.merged[name] = digits(self.W + self.delta(name), 16) - self.W"}),
    ],
    "lifecycle.save.rounding": [
        ("save-float16", "arrays are saved in float16",
         {"Session: # before saving": "adapter = stored_as(adapter, np.float16)"}),
        ("save-bfloat16", "arrays are saved in bfloat16",
         {"Session: # before saving": "adapter = stored_as(adapter, ml_dtypes.bfloat16)"}),
    ],
    "lifecycle.load-after-delete": [
        ("load-again", "a loaded adapter is active if its name was when it was deleted",
         {"Session: # before deleting":
              'self.maths.memory["acted"] = name if name in self.active else ""',
          "Session: # after loading":
              'if name == self.maths.memory.get("acted"): self.active.append(name)'}),
    ],
    "lifecycle.weight.bias": [
        ("weight-bias", "weight returns W while merged, beside a trained bias",
         {"self.read(self.W)": 'self.read(self.base() if self.kind == "bias" else self.W)'}),
    ],
    "lifecycle.weight.dora": [
        ("weight-dora", "weight returns W + s B A while DoRA is merged",
         {"self.read(self.W)":
              "self.read(sum((self.factor[n] * self.maths.delta(self.bare(self.known[n])) for n "
              "in self.merged), start=self.base()))"}),
    ],
    "lifecycle.gradients.dora": [
        ("gradients-dora-unscaled", "dA and dB without m/‖V‖",
         {'dW, brought["magnitude"] =': '_, brought["magnitude"] ='}),
        ("gradients-dora-magnitude", "dm without 1/‖V‖",
         {"(dW * V).sum(1) / norm": "(dW * V).sum(1)"}),
    ],
}
SAME: Same = [
    ("strict", "merging nothing counts, merging while disabled is refused",
     {"Session, Pair": "Strict, Pair"}),
    ("differentiated", "DoRA's norm is differentiated, as declared",
     {"Session, Pair": "Differentiated, Pair",
      "precision: ClassVar =":
          'conventions: ClassVar = {"dora_norm": "differentiated"}; precision: ClassVar ='}),
    ("in-place", "the reference: the weight is changed in place", {}),
    ("planned", "formed from the original weight at each call", {"Session, Pair": "Planned, Pair"}),
    ("refusing", "errors where the reference does nothing", {"Session, Pair": "Refusing, Pair"}),
    ("unmerging", "what touches a merged adapter unmerges first",
     {"Session, Pair": "Unmerging, Pair"}),
    ("eval-refuses", "eval merges, and merging again is an error",
     {"Session, Pair": "EvalMerges, Pair"}),
    ("eval-merges", "eval merges", {"# before evaluation": "self.merge()"}),
]
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *mutants(SESSION, "LIFECYCLE", LIFECYCLE),
    *equivalents(SESSION, "lifecycle", SAME),
)
