"""Mutants of a layer whose adapters are trained, replaced, dropped out and merged for long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minilora.verify.mutants.lifecycle import SESSION
from minilora.verify.mutants.mutant import Mutant, Reference, Table, mutants
from minilora.verify.mutants.references.lifecycle import Session

Adapter = Mapping[str, Any]


def as_before(session: Session, name: str, adapter: Adapter) -> Adapter:
    """The adapter under the scale of the one whose place it takes."""
    s = session.maths.scale(**session.bare(session.known[name]))
    return {**adapter, "alpha": s * adapter["r"], "use_rslora": False}


def cut(session: Session, name: str, adapter: Adapter) -> Adapter:
    """The first ranks of the adapter, as many as the one has whose place it takes."""
    r = len(session.known[name]["A"])
    return {**adapter, "A": adapter["A"][:r], "B": adapter["B"][:, :r]}


def emptied(session: Session, name: str) -> None:
    """The adapters whose names contain this one have B = 0."""
    for other, adapter in session.known.items():
        if name in other and name != other:
            session.known[other] = {**adapter, "B": 0 * adapter["B"]}


def counted(session: Session) -> int:
    """How many outputs were asked for."""
    own = vars(session)
    own["count"] = own.get("count", 0) + 1
    return int(own["count"])


def kept(session: Session, name: str, key: Any, value: Any) -> Any:
    """What was first kept under a name and a key."""
    return vars(session).setdefault(name, {}).setdefault(key, value)


def one_layer_of(kind: str) -> str:
    """The condition, in the reference, that an adapter on its layer is of this kind."""
    if kind == "lora-bias":
        return 'any("lora_bias" in adapter for adapter in self.known.values())'
    if kind == "dora":
        return 'any("magnitude" in adapter for adapter in self.known.values())'
    return f'self.kind == "{kind}"'


WORDS = {
    "linear": "",
    "conv1d": " where the weight is stored (in, out)",
    "embedding": " of an embedding",
    "fused": " of a fused layer",
    "tied": " of a tied table",
    "bias": " beside a trained bias",
    "full": " beside modules_to_save",
    "dora": " of DoRA",
    "lora-bias": " with a bias of B",
}
SUFFIXES = {"linear": "", "full": ".modules-to-save"}
PAIRS = ("tied", "full")

LONG = Reference(
    SESSION.parts, {**SESSION.names, **{k: v for k, v in globals().items() if k[0].islower()}}
)

# fmt: off
SESSIONS: Table = {
    "lifecycle.delete-inactive": [
        ("delete-unmerges", "deleting an inactive adapter unmerges what is merged",
         {"Session: # before deleting": "self.unmerge()"}),
        ("delete-forgets", "after an inactive adapter is deleted, merged ones cannot be unmerged",
         {"# after deleting": "self.merged = {}"}),
    ],
    "lifecycle.delete-one-of-merged": [
        ("delete-of-several", "deleting one of several merged adapters deactivates all",
         {"Session: # before deleting": "several = name in self.merged and len(self.merged) > 1",
          "# after deleting": "if several: self.activate([])"}),
    ],
    "lifecycle.add-again": [
        ("change-by-name", "s B A is kept by the adapter's name, also of another one",
         {"# change": 'change = kept(self, "changes", (name, self.factor[name]), change)'}),
    ],
    "lifecycle.many": [
        ("four-slots", "there are four slots: a fifth adapter takes the place of the first",
         {"# after adding":
              "if len(self.known) > 4: self.known[next(iter(self.known))] = adapter"}),
        ("two-active", "of the active adapters only the first two act",
         {"Session: # before activating": "names = names[:2]"}),
        ("seven", "from the seventh adapter on, each is the sixth",
         {"# after adding":
              "if len(self.known) > 6: self.known[name] = self.known[list(self.known)[5]]"}),
    ],
    "lifecycle.save-then-scale": [
        ("save-shares", "a loaded adapter shares the factor of the one that was saved",
         {"Session: # before saving": 'vars(self)["saved"] = name',
          "Session: # after loading":
              'self.factor[name] = self.factor.get(vars(self).get("saved"), 1.0)'}),
    ],
    "lifecycle.lora-bias": [
        ("lora-bias-not-merged", "the bias of B does not act while its adapter is merged",
         {"# bias of B": "if name in self.merged: return shift"}),
        ("lora-bias-for-ever", "unmerging leaves the bias of B in the layer's",
         {"# taken out":
              'if "lora_bias" in self.known.get(name, {}): self.b = self.b + '
              'self.known[name]["lora_bias"]',
          "self.W = self.W - self.merged.pop(name)": "self.W = self.W - self.merged.pop(name)"}),
        ("lora-bias-unscaled", "the bias of B without s",
         {"self.factor[name] * c": 'self.factor[name] * adapter["lora_bias"]'}),
        ("lora-bias-disabled", "disable leaves the bias of B",
         {"[] if self.off else self.active)":
              '[n for n in self.active if not self.off or "lora_bias" in self.known[n]])'}),
        ("lora-bias-factor", "the bias of B without the factor of scale",
         {"self.factor[name] * c": "c"}),
    ],
    "lifecycle.random-steps.lora-bias": [
        ("lora-bias-twice", "the bias of B twice",
         {"self.factor[name] * c": "2 * self.factor[name] * c"}),
    ],
    "lifecycle.modules-to-save.scaled": [
        ("full-scaled", "scale multiplies a module of modules_to_save, too",
         {"# after scaling":
              'if self.kind == "full" and name in self.second.known: scale_module(self.second, '
              'name, factor, self.known[name]["head"]["W"])'}),
    ],
    "lifecycle.save.lora-bias": [
        ("save-no-lora-bias", "the bias of B is not saved",
         {"Session: # before saving":
              'adapter = {k: v for k, v in adapter.items() if k != "lora_bias"}'}),
    ],
    "lifecycle.weight.lora-bias": [
        ("weight-lora-bias", "weight returns W while merged, with a bias of B",
         {"self.read(self.W)":
              'self.read(self.base() if any("lora_bias" in self.known[n] for n in self.merged) '
              "else self.W)"}),
    ],
    "lifecycle.gradients.lora-bias": [
        ("gradients-lora-bias", "the bias of B gets Σ dy without s",
         {"Session: s * dy.sum(0)": "dy.sum(0)"}),
    ],
    "lifecycle.step": [
        ("step-nothing", "a step of training changes nothing",
         {"Session: # before stepping": "return"}),
        ("step-A-alone", "a step of training changes A alone",
         {"Session: # before stepping":
              'gradients = {k: g for k, g in gradients.items() if not k.endswith(".B")}'}),
        ("step-B-alone", "a step of training changes B alone",
         {"Session: # before stepping":
              'gradients = {k: g for k, g in gradients.items() if not k.endswith(".A")}'}),
        ("step-base", "a step of training changes the base's weight too",
         {"Session: # before stepping":
              'self.W = self.W - lr * dy.T @ x if self.kind == "linear" else self.W'}),
        ("step-normed", "a step of training is cut to the gradient's norm 1",
         {"Session: # before stepping":
              "norm = sum((g * g).sum() for k, g in gradients.items() if '.' in k) ** 0.5; "
              "gradients = {k: g / max(1, norm) for k, g in gradients.items()}"}),
    ],
    "lifecycle.combine": [
        ("combine-first", "combining scales the B of the first adapter itself",
         {"# combined":
              'self.known[names[0]] = {**others[0], "B": weights[0] * others[0]["B"]}'}),
        ("combine-alpha-of-first", "combining adapters sets the first one's α to its rank, saved",
         {"# combined": 'vars(self).setdefault("reset", set()).add(names[0])',
          "Session: # before saving":
              'adapter = {**adapter, "alpha": adapter["r"]} if name in vars(self).get("reset", ()) '
              "else adapter"}, "peft 654"),
        ("combine-active", "a combined adapter is active at once",
         {"# combined": "self.active.append(name)"}),
        ("combine-shared", "deleting an adapter empties what it was combined to",
         {"# after deleting":
              'for key in self.known if "four" in self.known else []: self.known[key] = '
              '{**self.known[key], "B": 0 * self.known[key]["B"]}'}),
        ("combine-unscaled", "adapters are combined without s",
         {"s = [w * self.maths.scale(**self.bare(a)) for": "s = [w for"}),
    ],
    "lifecycle.combine-scaled": [
        ("combine-factor", "adapters are combined without the factors of scale",
         {"s = [self.factor[each] * f for": "s = [f for"}),
        ("combine-factor-magnitude", "adapters are combined with the sizes of the factors of scale",
         {"s = [self.factor[each] * f for": "s = [abs(self.factor[each]) * f for"}),
        ("combine-factor-of-first", "a combined adapter has the first one's factor of scale too",
         {"# after adding": 'self.factor[name] = self.factor["one"] if name == "four" else 1.0'}),
        ("combine-factor-reset", "combining adapters sets their factors to 1",
         {"# combined": "self.factor |= dict.fromkeys(names, 1.0)"}),
    ],
    "lifecycle.step-several": [
        ("step-first", "a step of training changes the first active adapter alone",
         {"Session: # before stepping":
              'gradients = {k: g for k, g in gradients.items() if k.partition(".")[0] in '
              "self.active[:1]}"}),
    ],
    "lifecycle.step-scaled": [
        ("step-unscaled", "a step of training without the factor of scale",
         {"Session: # before stepping":
              'gradients = {k: g / (self.factor.get(k.partition(".")[0]) or 1) for k, g in '
              "gradients.items()}"}),
    ],
    "lifecycle.step-between-merges": [
        ("merged-change-kept", "each merge adds what the first merge added",
         {"self.merged[name] = self.delta(name)":
              'self.merged[name] = kept(self, "first", (name, self.factor[name], '
              'id(self.layer)), self.delta(name))'}),
    ],
    "lifecycle.step-while-merged": [
        ("step-merged", "a step of training changes merged adapters too",
         {"Session: # before stepping":
              "merged, self.merged = self.merged, {}; gradients = self.gradients(x, dy); "
              "self.merged = merged"}),
    ],
    "lifecycle.step.save": [
        ("save-as-added", "save stores the adapter as it was before it was trained",
         {"# after adding": 'kept(self, "added", name, adapter)',
          "Session: # before saving": 'adapter = vars(self).get("added", {}).get(name, adapter)'}),
    ],
    "lifecycle.step-after-load": [
        ("load-frozen", "a loaded adapter is not trained",
         {"Session: # after loading": 'kept(self, "frozen", name, True)',
          "# trained": 'names = [n for n in names if n not in vars(self).get("frozen", {})]'}),
        ("load-no-B", "a loaded adapter's B is not trained",
         {"Session: # after loading": 'kept(self, "frozen", name, True)',
          "# factors": 'dB = 0 * dB if name in vars(self).get("frozen", {}) else dB'}),
    ],
    "lifecycle.replace": [
        ("replace-nothing", "replacing an adapter does nothing",
         {"Session: # before replacing": "return"}),
        ("replace-cut", "a replaced adapter keeps its rank: further ranks are cut off",
         {"Session: # before replacing": "adapter = cut(self, name, adapter)"}),
        ("replace-scale", "a replaced adapter keeps α / r",
         {"Session: # before replacing": "adapter = as_before(self, name, adapter)"}),
        ("replace-off", "a replaced adapter is active no more",
         {"# after replacing":
              "self.active = [n for n in self.active if n != name or name in self.merged]"}),
        ("replace-A-alone", "A is replaced and B is not, where the ranks agree",
         {"Session: # before replacing":
              'adapter = {**adapter, "B": self.known[name]["B"]} if "B" in adapter and '
              'adapter["B"].shape == self.known[name]["B"].shape else adapter'}),
        ("replace-one-side", "a shorter adapter leaves the further ranks of the one before",
         {"Session: # before replacing":
              'old = self.known[name]; adapter = {**adapter, "A": np.concatenate([adapter["A"], '
              'old["A"][len(adapter["A"]):]]), "B": np.concatenate([adapter["B"], '
              'old["B"][:, len(adapter["A"]):]], 1)} if self.kind == "linear" and "A" in adapter '
              "else adapter"}),
    ],
    "lifecycle.replace-inactive": [
        ("replace-on", "a replaced adapter is active at once",
         {"# after replacing":
              "self.active += [name] if name not in self.active else []"}),
    ],
    "lifecycle.replace-similar": [
        ("replace-contained", "replacing an adapter empties those whose names contain its own",
         {"# after replacing": "emptied(self, name)"}, "peft 0.21"),
    ],
    "lifecycle.replace-scaled": [
        ("replace-factor", "a replaced adapter keeps the factor of scale",
         {"self.factor[name] = 1.0\n": "pass\n"}),
        ("scale-as-before", "scale takes α / r of the adapter that was replaced",
         {"Session: # before replacing":
              'kept(self, "scales", name, self.maths.scale(**self.bare(self.known[name])))',
          "# before scaling":
              'old = vars(self).get("scales", {}).get(name); factor = factor * old / '
              "self.maths.scale(**self.bare(self.known[name])) if old else factor"}, "peft 0.21"),
    ],
    "lifecycle.replace-while-merged": [
        ("replace-taken-out", "unmerging takes out what replaced the merged adapter",
         {"Session: # before replacing":
              "if name in self.merged: self.known[name] = adapter; self.merged[name] = "
              "self.delta(name); return"}),
        ("replace-not-merged", "a merged adapter that is replaced acts on in the weight",
         {"Session: # before replacing":
              "if name in self.merged: self.known[name] = adapter; return"}),
    ],
    "lifecycle.replace.save": [
        ("save-as-replaced", "save stores α and r of the adapter that was replaced",
         {"Session: # before replacing": 'kept(self, "alphas", name, self.known[name])',
          "Session: # before saving":
              'old = vars(self).get("alphas", {}).get(name, adapter); adapter = {**adapter, '
              '"alpha": old["alpha"] / old["r"] * adapter["r"]}'}, "peft 0.21"),
    ],
    "lifecycle.unknown": [
        ("unknown-passed-over", "activate passes over the names of unknown adapters",
         {"Session: self.require(*names)":
              "names = [name for name in names if name in self.known]"}, "peft 0.21"),
        ("unknown-scaled", "the scale of an unknown adapter is set for later",
         {"self.require(name)\n        # before scaling":
              "if name not in self.known: return\n        # before scaling"}),
        ("unknown-deleted", "deleting an unknown adapter is passed over",
         {"Session: # before deleting": "if name not in self.known: return"}),
        ("unknown-prefix", "a name that begins as an adapter's is taken for it",
         {"self.require(*names)\n":
              "names = [next((k for k in self.known if name and k.startswith(name)), name) for "
              "name in names]; self.require(*names)\n"}),
        ("unknown-case", "the case of names is ignored",
         {"self.require(*names)\n":
              "names = [name.lower() for name in names]; self.require(*names)\n"}),
        ("unknown-row", "a row that names an unknown adapter has the base's answer",
         {"# row\n": 'name = name if name in self.known else ""\n'}, "peft 2090"),
    ],
    "lifecycle.rows": [
        ("rows-leak", "after a batch of rows the last row's adapter is active",
         {"# rows": "self.active = [names[-1]] if names[-1] else self.active"}),
        ("rows-none-active", "a row without an adapter has the active ones",
         {"Session: # row\n": "W, b = self.acting(), self.bias()\n"}),
        ("rows-unscaled", "a row's adapter without the factor of scale",
         {"W + self.delta(name), b + self.shift(name)":
              "W + self.delta(name) / self.factor[name], b + self.shift(name)"}),
        ("rows-factor-of-active", "each row's adapter with the active one's factor of scale",
         {"W + self.delta(name), b + self.shift(name)":
              "W + self.delta(name) / self.factor[name] * self.factor[[*self.active, name][0]], "
              "b + self.shift(name)"}),
        ("rows-kept", "the names of the first batch of this length in every batch",
         {"# rows":
              'names = kept(self, "names", len(names), names); y = 0; answers = [(self.original + '
              "(self.delta(n) if n in self.known else 0)) @ row + self.b if self.kind == 'linear' "
              "else a for n, row, a in zip(names, x, answers)]"}),
    ],
    "lifecycle.rows.embedding": [
        ("rows-embedding", "an embedding's rows have no adapter",
         {"# row\n": 'name = "" if self.kind == "embedding" else name\n'}),
    ],
    "lifecycle.calls": [
        ("calls-256", "from the 257th output on, y is greater by 1",
         {"# answered": "y = y + (counted(self) > 256)"}),
        ("calls-drift", "each output moves W by 10⁻⁶",
         {"# answered": "self.W = (self.W * (1 + 1e-6)).astype(self.W.dtype)"}),
    ],
    "lifecycle.cycles": [
        ("cycle-coarse", "unmerging subtracts s B A rounded to half of the dtype's digits",
         {"self.W - self.merged.pop(name)":
              'self.W - coarse(self.merged.pop(name), self.layer["W"].dtype)'}),
        ("cycle-four-less", "the unmerged weight has four binary digits less than the dtype",
         {"# taken out": 'self.W = four_less(self.W, self.layer["W"].dtype)'}),
    ],
    "lifecycle.dropout": [
        ("dropout-never", "dropout never acts", {"# rate": "p = 0"}),
        ("dropout-always", "dropout acts in evaluation too",
         {"for name in self.trained() if self.training else ():": "for name in self.trained():"}),
        ("dropout-base", "dropout acts on the base's input too",
         {"# dropout of y": "y = (y + (K - 1) * x @ self.original.T).astype(x.dtype)"}),
        ("dropout-not-scaled", "what dropout keeps is not divided by 1 - p",
         {"/ (1 - p)\n": "\n"}),
        ("dropout-divided", "what dropout keeps is divided by p", {"/ (1 - p)\n": "/ p\n"}),
        ("dropout-turned", "dropout keeps with the probability p",
         {"(self.rng.random(x.shape) >= p)": "(self.rng.random(x.shape) < p)"}),
        ("dropout-fixed", "dropout's mask is always the same",
         {"self.rng.random(x.shape)": "np.random.default_rng(0).random(x.shape)"}),
        ("dropout-backward", "the backward draws a mask of its own for dA and dB",
         {"# dropout of dA and dB": "K = self.masks(x)"}),
        ("dropout-dx", "dx without the mask", {"# dropout of dx": "continue"}),
        ("dropout-dA", "dA and dB without the mask", {"# dropout of dA and dB": "K = {}"}),
        ("dropout-merged", "merging in training takes dropout's mask into the weight",
         {"self.merged[name] = self.delta(name)":
              "K = self.masks(self.W[:1]); self.merged[name] = self.delta(name) * K.get(name, 1)"}),
        ("dropout-until-evaluation", "after an evaluation dropout never acts again",
         {"# before evaluation":
              'self.known = {n: {**a, "p": 0.0} for n, a in self.known.items()}'},
         "Megatron-LM 411"),
        ("dropout-ends", "after merging, dropout never acts again",
         {"# put in": 'self.known[name] = {**self.known[name], "p": 0}'}),
    ],
    "lifecycle.dropout.several": [
        ("one-rate-for-all", "the rate of the last adapter for all",
         {"# rate": 'p = list(self.known.values())[-1].get("p", 0.0)'}),
        ("dropout-first-rate", "the rate of the first adapter for all",
         {"# rate": 'p = next(iter(self.known.values())).get("p", 0.0)'}),
    ],
    "lifecycle.dropout.added": [
        ("adding-trains", "an adapter that is added turns training on",
         {"# after adding": "self.training = True"}),
        ("loading-trains", "an adapter that is loaded turns training on",
         {"Session: # after loading": "self.training = True"}),
    ],
    "lifecycle.dropout.kept": [
        ("deleting-evaluates", "deleting an adapter turns training off",
         {"# after deleting": "self.training = False"}),
        ("scaling-evaluates", "scaling an adapter turns training off",
         {"# before scaling": "self.training = False"}),
    ],
    "lifecycle.dropout.loaded": [
        ("loading-evaluates", "an adapter that is loaded turns training off",
         {"Session: # after loading": "self.training = False"}),
    ],
    "lifecycle.dropout.replaced": [
        ("replace-rate", "a replaced adapter keeps its rate of dropout",
         {"Session: # before replacing":
              'adapter = {**adapter, "p": self.known[name].get("p", 0.0)}'}),
    ],
    "lifecycle.dropout.save": [
        ("save-no-rate", "the rate of dropout is not saved",
         {"Session: # before saving": 'adapter = {k: v for k, v in adapter.items() if k != "p"}'}),
    ],
}
STEPPED_DORA = (
    "step-no-magnitude", "a step of training leaves DoRA's magnitude as it is",
    {"Session: # before stepping":
         'gradients = {k: g for k, g in gradients.items() if not k.endswith(".magnitude")}'},
)
REPLACED_DORA = (
    "replace-magnitude", "a replaced adapter keeps DoRA's magnitude",
    {"Session: # before replacing":
         'old = self.known[name]; adapter = {**adapter, "magnitude": old["magnitude"]} if '
         '"magnitude" in old and "magnitude" in adapter else adapter'},
)
STEPPED: Table = {
    f"lifecycle.step{SUFFIXES.get(kind, f'.{kind}')}": [
        (f"step-ascends-{kind}", f"a step of training goes uphill{WORDS[kind]}",
         {f"{'Pair' if kind in PAIRS else 'Session'}: # before stepping":
              f"lr = -lr if {one_layer_of(kind)} else lr"}),
        *([STEPPED_DORA] if kind == "dora" else []),
    ]
    for kind in WORDS if kind != "linear"
}
REPLACED: Table = {
    f"lifecycle.replace{SUFFIXES.get(kind, f'.{kind}')}": [
        (f"replace-nothing-{kind}", f"replacing does nothing{WORDS[kind]}",
         {f"{'Pair' if kind in PAIRS else 'Session'}: # before replacing":
              f"if {one_layer_of(kind)}: return"}),
        *([REPLACED_DORA] if kind == "dora" else []),
    ]
    for kind in WORDS if kind != "linear"
}
# fmt: on

MUTANTS: tuple[Mutant, ...] = mutants(LONG, "LIFECYCLE", {**SESSIONS, **STEPPED, **REPLACED})
