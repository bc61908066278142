"""Level ``lifecycle``: a layer whose adapters come, act, are merged, scaled, switched off and go.

A session's truth is a `multi_adapter.AdaptedLayer`: after each step the layer's output is
compared with it by ==, in whole numbers so small that merging and unmerging are exact. What a state
refuses (merging twice) a session may refuse as well, or pass over; it may not change the function.
What a state allows beside a merge (adding, scaling, activating, deleting) a session may refuse with
an error, and then nothing has happened.
"""

from __future__ import annotations

import contextlib
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, combinations
from tempfile import mkdtemp
from typing import Any

import numpy as np
from hypothesis import strategies as st

from minilora.spec.variants import DORA, DORA_FULL
from minilora.verify.core import inputs
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import Fault, Skip, tidy
from minilora.verify.core.inputs import RANKS, ROWS, SIZES, draw_several, in_exact_lane
from minilora.verify.core.level import Level
from minilora.verify.core.shrinking import Budget, Smallest, shrunk
from minilora.verify.core.types import Case, Check, Comparison, counter
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.sessions import LayerState

Array = np.ndarray
Step = tuple[Any, ...]
Given = dict[str, Any]

CASES = {"quick": 4, "ci": 16, "nightly": 320}
NAMES = ("one", "two", "onetwo")
"""The third begins and ends as the others: a name is all of a name."""

PLAIN = {
    "linear": "",
    "conv1d": ", stored (in, out)",
    "embedding": ", of an embedding",
}
FURTHER = {
    "fused": ", of projections fused in one weight",
    "tied": ", of a tied embedding and head",
    "bias": ", with a trained bias",
    "full": ", with modules_to_save",
    "dora": ", of DoRA beside LoRA",
}
KINDS = PLAIN | FURTHER
"""The kinds of layers and adapters, in words; a session may have no such layer."""

SUFFIXES = {kind: kind for kind in KINDS} | {"full": "modules-to-save"}
"""What the id of a check says of a kind."""

ALONE = ("bias", "full")
"""Where "one" and "two" bring what only one can: no two of them act at once."""

REFUSABLE = {"add", "activate", "scale", "delete", "train", "merge", "save", "load"}
"""What a session may refuse while something is merged, or it was told to merge nothing."""


FUSED = (
    ((3, 3, 3), ("101", "111", "010")),
    ((4, 2, 2), ("110", "111", "011")),
    ((3, 3), ("01", "11", "10")),
    ((4, 2), ("10", "11", "01")),
)
"""The rows of a fused layer's projections, and of which each adapter is on."""


@dataclass(frozen=True)
class Drawn:
    """A layer, the adapters by name, an input, and a gradient of the output, as a session has them.

    All are small whole numbers. With |W|, |A|, |B|, |x| ≤ 2, ranks and sides ≤ 5 and s ≤ 4, doubled
    by a factor, no sum of terms' absolute values reaches 2²¹, and all are multiples of ¼: each is a
    number of float32. The table that is multiplied by itself has entries of ±1.
    """

    layer: Given
    adapters: Mapping[str, Given]
    x: Array
    dy: Array


def drawn_layer(kind: str, case: Case, bias: bool) -> Drawn:
    """The layer of a case."""
    if kind in FURTHER:
        return _further(kind, case)
    several, _ = draw_several(in_exact_lane(case), SIZES[:5], RANKS[:1], ROWS[:1])
    first = several.adapters[0]
    b = case.rng().integers(-2, 3, len(first.W)) if bias and kind != "embedding" else None
    W = np.ascontiguousarray(first.W.T) if kind == "embedding" else first.W
    layer = {"kind": kind, "W": W}
    if b is not None:
        layer["bias"] = b.astype(first.W.dtype)
    x = np.arange(7) * 5 % len(W) if kind == "embedding" else first.x  # some rows twice
    adapters = {
        name: {"A": one.A, "B": one.B, **one.merge_options()}
        for name, one in zip(NAMES, several.adapters, strict=True)
    }
    return Drawn(layer, adapters, x, first.dy)


def _further(kind: str, case: Case) -> Drawn:
    """Those of the kinds that are more than a weight and A and B."""
    rng, dtype = case.rng(), DTYPES[case.dtype]
    most = 1 if kind == "tied" else 2

    def whole(*shape: int) -> Array:
        signs = rng.choice([-1, 1], shape)
        return (signs * rng.integers(1, most + 1, shape)).astype(dtype)

    def factors(n: int, m: int, r: int, times: int = 1) -> Given:
        """Those of a scale that is a power of two, by rsLoRA where r is 4."""
        s = float(rng.choice([0.5, 1.0] if kind == "tied" else [0.5, 2.0, 4.0]))
        given = {"A": whole(times * r, n), "B": whole(m, r), "r": r}
        rslora: Given = {"use_rslora": True, "alpha": 2 * s} if r == 4 else {"alpha": s * r}
        return given | rslora

    if kind == "fused":
        (rows, on), n = FUSED[case.number % len(FUSED)], 5
        layer = {"kind": kind, "W": whole(sum(rows), n), "rows": list(rows)}
        adapters = {}
        for name, digits, r in zip(NAMES, on, (2, 4, 1), strict=True):
            enable = [digit == "1" for digit in digits]
            m = sum(size for size, each in zip(rows, enable, strict=True) if each)
            adapters[name] = factors(n, m, r, sum(enable)) | {"enable": enable}
        return Drawn(layer, adapters, whole(6, n), whole(6, sum(rows)))
    if kind == "tied":
        v, d = 6, 4
        layer = {"kind": kind, "W": whole(v, d)}
        adapters = {
            "one": factors(v, d, 2) | {"on": "embedding"},
            "two": factors(d, v, 4) | {"on": "head"},
            "onetwo": factors(v, d, 1) | {"on": "both"},
        }
        return Drawn(layer, adapters, np.arange(7) * 5 % v, whole(7, v))
    if kind == "dora":
        return _dora(rng, whole, factors)
    n, m, out = 5, 4, 3
    layer = {"kind": kind, "W": whole(m, n), "bias": whole(m)}
    adapters = {name: factors(n, m, r) for name, r in zip(NAMES, (2, 4, 1), strict=True)}
    if kind == "full":
        layer["head"] = {"W": whole(out, m), "bias": whole(out)}
    for name in ("one", "two"):
        own = {"W": whole(out, m), "bias": whole(out)} if kind == "full" else whole(m)
        adapters[name] |= {"head" if kind == "full" else "bias": own}
    return Drawn(layer, adapters, whole(6, n), whole(6, out if kind == "full" else m))


def _dora(
    rng: np.random.Generator, whole: Callable[..., Array], factors: Callable[..., Given]
) -> Drawn:
    """LoRA as "one", and two of DoRA, whose V = W + s B A has rows of norm 2 as W has.

    Every entry of W is ±1 in rows of four, and s B A turns the signs of r columns: B's columns are
    -2/s times those of W, A's rows name them, and a whole matrix of determinant 1 mixes the ranks.
    """
    m, n = 5, 4
    W = np.sign(whole(m, n))
    adapters = {"one": factors(n, m, 2)}
    for name, r in (("two", 1), ("onetwo", 2)):
        s = float(rng.choice([0.5, 2.0]))
        columns = rng.permutation(n)[:r]
        mixed = np.eye(r, dtype=W.dtype) + np.triu(np.ones((r, r), W.dtype), 1)
        A = mixed @ np.eye(n, dtype=W.dtype)[columns]
        B = (-2 / s * W[:, columns] @ np.linalg.inv(mixed).round()).astype(W.dtype)
        magnitude = rng.choice([1, 2, 8], m).astype(W.dtype)
        own = {"A": A, "B": B, "r": r, "alpha": s * r, "use_dora": True, "magnitude": magnitude}
        adapters[name] = own
    layer = {"kind": "linear", "W": W, "bias": whole(m)}
    return Drawn(layer, adapters, whole(6, n), whole(6, m))


def wide(given: Any) -> Any:
    """The same with its arrays of numbers in float64."""
    if isinstance(given, Mapping):
        return {key: wide(entry) for key, entry in given.items()}
    floats = isinstance(given, np.ndarray) and given.dtype.kind == "f"
    return given.astype(np.float64) if floats else given


@dataclass
class Run:
    """A session beside its true state."""

    subject: GuardedImplementation
    drawn: Drawn
    session: GuardedImplementation
    state: LayerState
    dtype: str
    kind: str = "linear"
    saved: dict[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    asked: int = 0
    holds: bool = False
    """Whether the session took a merge of nothing, after which it may go on as merged."""
    _folder: str = ""

    @classmethod
    def of(
        cls, subject: GuardedImplementation, case: Case, bias: bool = True, kind: str = "linear"
    ) -> Run:
        """A session of a layer in small whole numbers, without adapters."""
        drawn = drawn_layer(kind, case, bias)
        session, state = _opened(subject, drawn)
        return cls(subject, drawn, session, state, case.dtype, kind)

    def may_refuse(self, what: str, means_something: bool) -> bool:
        """Whether the contract lets a session refuse this step."""
        if what == "merge" and self.state.disabled:
            return True
        return not means_something or ((self.state.merged or self.holds) and what in REFUSABLE)

    def take(self, step: Step) -> bool:
        """The step on both sides; False if the session refused it, as it may."""
        what, *arguments = step
        if what == "anew":
            self.session, self.state = _opened(self.subject, self.drawn)
            self.holds = False
            return True
        if what == "load" and arguments[1] not in self.saved:
            return False  # saving it was refused
        given, next_state = list(arguments), moved(self.state, self.drawn, self.saved, step)
        if not self.session.has(what):
            raise Skip(f"no {what}")
        if what == "add":
            given.append(self.drawn.adapters[arguments[0]])
        elif what == "save":
            given.append(self._empty())
        elif what == "load":
            given[1] = self.saved[arguments[1]][0]
        try:
            self.session.call(what, *given)
        except Fault as fault:
            if fault.kind == "raises" and self.may_refuse(what, next_state is not None):
                return False
            raise Fault(fault.kind, f"{told(step)}: {fault.message}") from None
        self.holds = (what == "merge" and next_state is None) or (self.holds and what != "unmerge")
        if what == "save":
            self.saved[arguments[0]] = given[1], self.state.given[arguments[0]]
        if next_state is not None:
            self.state = next_state
        return True

    def _empty(self) -> str:
        """A new folder, which goes when the run does."""
        if not self._folder:
            self._folder = mkdtemp(prefix="minilora-")
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return mkdtemp(dir=self._folder)

    def compare(self, after: str) -> Comparison:
        """The layer's output against the state's: other rows each time, every third time one."""
        self.asked += 1
        x = np.roll(self.drawn.x, self.asked, 0)[: 1 if self.asked % 3 == 2 else None]
        y, _ = self.state.forward(wide(x))
        got = self.session.answer(self.session.call("forward", x), "y", y.shape, self.dtype)
        return Comparison(f"y after {after}", got, y)

    def gradients(self, after: str) -> Iterator[Comparison]:
        """The gradients of ⟨dy, y⟩ against the state's; what is not answered is 0.

        Of what an adapter brings along, none while anything is merged: a library may go on then.
        """
        x, dy = self.drawn.x, self.drawn.dy
        if not self.session.has("gradients"):
            raise Skip("no gradients")
        _, back = self.state.forward(wide(x))
        wanted = back(wide(dy))
        answered = self.session.call("gradients", x, dy)
        if not isinstance(answered, Mapping):
            self.session.entry(answered, "dx", "gradients")
        for name in sorted({*wanted, *answered}):
            if self.state.merged and name.partition(".")[2] in ("bias", "head.W", "head.bias"):
                continue
            shape = np.shape(wanted[name]) if name in wanted else None
            got = (
                self.session.answer(answered[name], _gradient(name), shape, self.dtype)
                if name in answered
                else np.zeros(shape or ())
            )
            want = wanted.get(name, np.zeros_like(got))
            yield Comparison(f"{_gradient(name)} after {after}", got, want)

    def weight(self, after: str) -> Comparison:
        """The weight that the layer holds against the base's, where nothing is merged."""
        stored = self.state.stored()
        W = self.session.answer(self.session.call("weight"), "W", stored.shape, self.dtype)
        return Comparison(f"W after {after}", W, stored)


def moved(
    state: LayerState, drawn: Drawn, saved: Mapping[str, tuple[str, Mapping[str, Any]]], step: Step
) -> LayerState | None:
    """The state after the step; None if it refuses."""
    moves: dict[str, Callable[..., LayerState]] = {
        "add": lambda name: state.add(name, wide(drawn.adapters[name])),
        "load": lambda name, of: state.add(name, saved[of][1]),
        "save": lambda name: state,
        "activate": state.activate,
        "disable": state.disable,
        "scale": state.scale,
        "merge": state.merge,
        "unmerge": state.unmerge,
        "delete": state.delete,
        "train": lambda: state,
        "eval": lambda: state,
    }
    what, *arguments = step
    try:
        return moves[what](*arguments)
    except ValueError:
        return None


def _gradient(name: str) -> str:
    """What is answered under a name, in words: dx, or d(one.A)."""
    return name if name == "dx" else f"d({name})"


def _opened(
    subject: GuardedImplementation, drawn: Drawn
) -> tuple[GuardedImplementation, LayerState]:
    """A new session, and the state of its layer."""
    full = subject.conventions.get("dora_norm") == "differentiated"
    state = LayerState.of(wide(drawn.layer), DORA_FULL if full else DORA)
    return subject.session(drawn.layer), state


def told(step: Step) -> str:
    """The step in words: merge(), activate(['one'])."""
    what, *arguments = step
    return f"{what}({', '.join(map(repr, arguments))})"


def follow(run: Run, steps: Iterable[Step]) -> Iterator[Comparison]:
    """Every step, and the output after each; the name says all that was done before."""
    done: list[str] = []
    for step in steps:
        words = told(step)
        done.append(words if run.take(step) else f"{words} refused")
        yield run.compare(" ".join(done))


START: tuple[Step, ...] = (("add", "one"), ("add", "two"), ("activate", ["one"]))

SCRIPTS: dict[str, tuple[str, tuple[Step, ...]]] = {
    "add": (
        "Adding an adapter changes no output; activating it does.",
        (("add", "one"), ("activate", ["one"]), ("add", "two"), ("activate", ["two"])),
    ),
    "several": (
        "Several active adapters add up, in any order; with none active, the base applies.",
        (*START, ("activate", ["one", "two"]), ("activate", ["two", "one"]), ("activate", [])),
    ),
    "disable": (
        "While disabled, only the base applies, merged or not; activating ends it.",
        (*START, ("disable",), ("activate", ["one"]), ("merge",), ("disable",),
         ("activate", ["one"])),
    ),
    "scale": (
        "Setting an adapter's scale replaces the factor that was set before.",
        (*START, ("scale", "one", 2.0), ("scale", "one", 2.0), ("scale", "one", 0.5),
         ("scale", "one", -1.0), ("scale", "one", 0.0), ("scale", "two", 4.0)),
    ),
    "merge-twice": (
        "A second merge or a second unmerge changes nothing.",
        (*START, ("merge",), ("merge",), ("unmerge",), ("unmerge",)),
    ),
    "merge-several": (
        "Merging merges all active adapters and no other.",
        (*START, ("activate", ["two"]), ("merge",), ("unmerge",), ("activate", ["one", "two"]),
         ("merge",), ("unmerge",)),
    ),
    "scale-while-merged": (
        "A scale set while merged takes effect, and unmerging removes it.",
        (*START, ("merge",), ("scale", "one", 2.0), ("unmerge",), ("activate", ["two"])),
    ),
    "delete": (
        "A deleted adapter no longer applies, even if it was active.",
        (*START, ("add", "onetwo"), ("activate", ["one", "onetwo"]), ("delete", "one"),
         ("add", "one"), ("activate", ["one"]), ("activate", ["two"])),
    ),
    "delete-while-merged": (
        "Deleting a merged adapter removes its change from the weight.",
        (*START, ("merge",), ("delete", "one"), ("activate", ["two"])),
    ),
    "activate-while-merged": (
        "Activating another adapter while one is merged applies the new one alone.",
        (*START, ("merge",), ("activate", ["two"]), ("activate", ["one"])),
    ),
    "add-while-merged": (
        "Adding an adapter while another is merged changes no output.",
        (*START, ("merge",), ("add", "onetwo"), ("unmerge",), ("activate", ["onetwo"])),
    ),
    "train-eval": (
        "Without dropout, train and eval mode give the same output, merged or not.",
        (*START, ("train",), ("eval",), ("train",), ("merge",), ("eval",), ("train",), ("eval",),
         ("unmerge",)),
    ),
}  # fmt: skip
"""What happens to many layers one day, a check each: its law and its steps."""


SINGLE: tuple[Step, ...] = (
    ("add", "one"), ("activate", ["one"]), ("merge",), ("merge",), ("unmerge",), ("unmerge",),
    ("train",), ("eval",), ("merge",), ("eval",), ("train",), ("eval",),
)  # fmt: skip
"""What is asked of a layer that has one adapter for ever, too."""

BROUGHT: tuple[Step, ...] = (
    ("add", "one"), ("add", "onetwo"), ("activate", ["one"]), ("activate", ["onetwo"]),
    ("activate", ["one", "onetwo"]), ("disable",), ("activate", ["one"]), ("merge",), ("unmerge",),
    ("add", "two"), ("activate", ["two"]), ("activate", []),
)  # fmt: skip
SAVED: tuple[Step, ...] = (
    *START, ("save", "one"), ("save", "two"), ("anew",), ("load", "two", "two"),
    ("load", "one", "one"), ("activate", ["one"]), ("activate", ["two"]),
)  # fmt: skip


def _tied(name: str) -> tuple[Step, ...]:
    return (("add", name), ("activate", [name]), ("merge",), ("unmerge",), ("merge",), ("disable",),
            ("activate", [name]))  # fmt: skip


BESIDE: dict[str, tuple[str, str, tuple[Step, ...]]] = {
    "single-adapter": (
        "linear",
        "One adapter is added, activated, merged and unmerged.",
        SINGLE,
    ),
    **{
        f"single-adapter.{kind}": (
            kind,
            f"One adapter is added, activated, merged and unmerged{KINDS[kind]}.",
            SINGLE,
        )
        for kind in ("conv1d", "embedding", "fused")
    },
    "tied.embedding": (
        "tied",
        "Merging an adapter of the embedding leaves the tied head unchanged.",
        _tied("one"),
    ),
    "tied.head": (
        "tied",
        "Merging an adapter of the tied head leaves the embedding unchanged.",
        _tied("two"),
    ),
    "tied.both": (
        "tied",
        "One adapter of both uses of a tied table applies once to each.",
        _tied("onetwo"),
    ),
    "bias": ("bias", "A trained bias applies while its adapter is active, and only then.", BROUGHT),
    "bias.scaled": (
        "bias",
        "Scaling an adapter scales its change, and not its trained bias.",
        (("add", "one"), ("activate", ["one"]), ("scale", "one", 2.0), ("scale", "one", 0.5)),
    ),
    "modules-to-save": (
        "full",
        "A module of modules_to_save applies while its adapter is active, and only then.",
        BROUGHT,
    ),
    "modules-to-save.delete": (
        "full",
        "Deleting an adapter removes its modules_to_save.",
        (*START, ("delete", "two"), ("delete", "one"), ("add", "two"), ("activate", ["two"])),
    ),
    "dora": (
        "dora",
        "DoRA beside LoRA: each with its own options, summed, and merged one at a time.",
        (*START, ("activate", ["two"]), ("merge",), ("unmerge",), ("add", "onetwo"),
         ("activate", ["onetwo"]), ("merge",), ("unmerge",)),
    ),
    "dora.several": (
        "dora",
        "DoRA rescales the base and not another adapter's change, in any order, merged or not.",
        (*START, ("activate", ["one", "two"]), ("merge",), ("unmerge",),
         ("activate", ["two", "one"]), ("merge",), ("unmerge",)),
    ),
    "save": ("linear", "A saved adapter is the same in another session.", SAVED),
    **{
        f"save.{SUFFIXES[kind]}": (
            kind,
            f"A saved adapter is the same in another session{KINDS[kind]}.",
            SAVED,
        )
        for kind in FURTHER
    },
    "save.tied.both": (
        "tied",
        "A saved adapter of both uses of a tied table is the same in another session.",
        (("add", "onetwo"), ("activate", ["onetwo"]), ("save", "onetwo"), ("anew",),
         ("load", "onetwo", "onetwo"), ("activate", ["onetwo"])),
    ),
    "save-while-merged": (
        "linear",
        "Saving while merged saves the adapter itself.",
        (*START, ("merge",), ("save", "one"), ("unmerge",), ("anew",), ("load", "one", "one"),
         ("activate", ["one"])),
    ),
    "save-scaled": (
        "linear",
        "Saving a scaled adapter saves it as it was added.",
        (*START, ("scale", "one", 2.0), ("save", "one"), ("load", "onetwo", "one"),
         ("activate", ["onetwo"]), ("activate", ["one"]), ("anew",), ("load", "one", "one"),
         ("activate", ["one"])),
    ),
    "load-after-delete": (
        "linear",
        "A loaded adapter is inactive, even if one of its name was active when it was deleted.",
        (*START, ("save", "one"), ("activate", ["one", "two"]), ("delete", "one"),
         ("load", "one", "one"), ("activate", ["one"])),
    ),
    "load-while-merged": (
        "linear",
        "Loading an adapter while another is merged changes no output.",
        (*START, ("save", "two"), ("delete", "two"), ("merge",), ("load", "onetwo", "two"),
         ("unmerge",), ("activate", ["onetwo"])),
    ),
    "load-while-merged.modules-to-save": (
        "full",
        "Loading an adapter with modules_to_save while another is merged changes no output.",
        (*START, ("save", "two"), ("delete", "two"), ("merge",), ("load", "two", "two"),
         ("unmerge",), ("activate", ["two"])),
    ),
}  # fmt: skip
"""The same for further kinds of layers, and what not every session can: kind, law and steps."""


def _script(
    name: str, kind: str, steps: tuple[Step, ...]
) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        it = Run.of(subject, case, bias=case.number % 2 == 0, kind=kind)
        yield from follow(it, steps)
        if name.startswith("single-adapter") and it.session.has("weight"):
            it = Run.of(subject, case, kind=kind)
            for i, step in enumerate(SINGLE[:5]):
                if it.take(step) and i:
                    yield it.weight(told(step))

    return run


def weight(
    subject: GuardedImplementation, case: Case, kind: str = "linear"
) -> Iterable[Comparison]:
    """The stored weight is W' while merged, and W bit for bit after unmerging."""
    run = Run.of(subject, case, kind=kind)
    steps: list[Step] = [*START, ("scale", "one", 2.0)]
    if kind == "dora":
        steps.append(("activate", ["two"]))
    for step in steps:
        if kind not in ALONE or step != ("add", "two"):
            run.take(step)
    yield run.weight("activating")
    run.take(("merge",))
    yield run.weight("merge()")
    run.take(("unmerge",))
    yield run.weight("merge() unmerge()")


def gradients(
    subject: GuardedImplementation, case: Case, kind: str = "linear"
) -> Iterable[Comparison]:
    """Active adapters have gradients; merged, disabled or inactive ones have none."""
    run = Run.of(subject, case, kind=kind)
    done: list[str] = []
    steps: list[Step] = [*START, ("activate", []), ("activate", ["two"])]
    if kind == "tied":
        steps += [("add", "onetwo"), ("activate", ["onetwo"])]
    if kind not in ALONE:
        steps += [("activate", ["two", "one"])]
    steps += [("disable",), ("activate", ["one"]), ("merge",), ("unmerge",), ("scale", "one", 2.0)]
    for step in steps:
        words = told(step)
        done.append(words if run.take(step) else f"{words} refused")
        yield from run.gradients(" ".join(done))


def isolation(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Two sessions at once do not affect each other."""
    lives = Run.of(subject, case), Run.of(subject, replace(case, seed=case.seed + 1))
    done: list[str] = []
    for step in SINGLE[:3]:
        for it, which in zip(lives, ("the first", "the second"), strict=True):
            words = told(step)
            done.append(f"{which}'s {words if it.take(step) else f'{words} refused'}")
            for other, name in zip(lives, ("the first", "the second"), strict=True):
                yield other.compare(f"{', '.join(done)}, of {name}")


@dataclass
class Numbers:
    """A session whose numbers have all their digits, so that it rounds: what it answers has a σ.

    Whole numbers pass through a half precision, and no root of theirs is a fraction. Every rank but
    4 and 9 has one here, in the cases that are rsLoRA's.
    """

    run: Run
    layer: inputs.Layer

    @classmethod
    def of(cls, subject: GuardedImplementation, case: Case) -> Numbers:
        """One of the lane with σ, with a bias."""
        rslora: Given = {"use_rslora": True} if case.number % 2 == 0 else {}
        general = replace(case, number=2 * case.number + 1)
        layer, _ = inputs.draw_layer(general, bias=True, **rslora)
        given = {"kind": "linear", "W": layer.W, "bias": layer.bias}
        adapter = {"A": layer.A, "B": layer.B, **layer.merge_options()}
        x, dy = (inputs.columns(v).T for v in (layer.x, layer.dy))
        drawn = Drawn(given, {"one": adapter}, x, dy)
        return cls(Run(subject, drawn, *_opened(subject, drawn), case.dtype), layer)

    def compare(self, after: str, gradients: bool = False) -> Iterator[Comparison]:
        """The output, or the gradients, against what they should be."""
        run, layer, drawn = self.run, self.layer, self.run.drawn
        wanted = inputs.wanted(layer)
        sigma = inputs.sigmas_of_session(layer, run.subject.precision(run.dtype))
        names = {"y": "y"}
        if gradients:
            answered = run.session.call("gradients", drawn.x, drawn.dy)
            names = {"dx": "dx", "dA": "one.A", "dB": "one.B"}
        else:
            answered = {"y": run.session.call("forward", drawn.x)}
        for array, name in names.items():
            want, s = wanted[array], np.broadcast_to(sigma[array], wanted[array].shape)
            if array in ("y", "dx"):
                want, s = (v.reshape(-1, v.shape[-1]) for v in (want, s))
            label = _gradient(name) if gradients else name
            got = run.session.entry(answered, name, "gradients")
            got = run.session.answer(got, label, want.shape, run.dtype)
            yield Comparison(f"{label} after {after}", got, want, s, inputs.limits(layer, array))


def rounding(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """With full-precision values of any rank, the deviation is within rounding."""
    it = Numbers.of(subject, case)
    done: list[str] = []
    for step in SINGLE[:3] + SINGLE[4:5]:
        done.append(told(step) if it.run.take(step) else f"{told(step)} refused")
        if step[0] != "add":
            yield from it.compare(" ".join(done))
        if step[0] == "activate" and it.run.session.has("gradients"):
            yield from it.compare(" ".join(done), gradients=True)


def save_rounding(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """A saved adapter keeps all digits of its values."""
    it = Numbers.of(subject, case)
    steps: list[Step] = [("add", "one"), ("save", "one"), ("anew",), ("load", "one", "one")]
    for step in [*steps, ("activate", ["one"])]:
        it.run.take(step)
    yield from it.compare(" ".join(map(told, [*steps, ("activate", ["one"])])))


def random_steps(
    subject: GuardedImplementation, case: Case, kind: str = "linear", files: bool = False
) -> Iterable[Comparison]:
    """After each of twelve random steps the output is that of the expected state."""
    run, rng = Run.of(subject, case, kind=kind), case.rng()
    opening: list[Step] = [("add", "one"), ("save", "one"), ("load", "two", "one")] if files else []
    yield from follow(run, chain(opening, drawn(run, rng, 12, files)))


def drawn(run: Run, rng: np.random.Generator, count: int, files: bool = False) -> Iterator[Step]:
    """Steps as they may come: half of them touch what is there."""
    for _ in range(count):
        known = list(run.state.given)
        new = [name for name in NAMES if name not in known]
        if not known or (new and rng.random() < 0.2):
            name = str(rng.choice(new))
            of = [str(rng.choice([*run.saved]))] if run.saved and rng.random() < 0.7 else []
            yield ("load", name, *of) if of else ("add", name)
            continue
        some = [name for name in known if rng.random() < 0.6]
        if run.kind in ALONE and {"one", "two"} <= {*some}:
            some.remove(str(rng.choice(["one", "two"])))
        one = str(rng.choice(known))
        factor = float(rng.choice([0.5, 2.0, -1.0]))
        steps: list[Step] = [("activate", some)] * 4 + [("merge",)] * 3 + [("unmerge",)] * 3
        steps += [("disable",), ("train",), ("eval",), ("delete", one)]
        # Of DoRA another scale is another norm, which is no whole number.
        steps += [("merge",) if run.kind == "dora" and one != "one" else ("scale", one, factor)]
        steps += [("save", one)] * 4 + [("delete", one)] * 2 if files else []
        yield steps[rng.integers(len(steps))]


def possible(state: LayerState, kind: str) -> list[Step]:
    """Every step that means something in a state, the plainest first."""
    known = list(state.given)
    steps: list[Step] = [("add", name) for name in NAMES if name not in known]
    for size in range(len(known) + 1):
        for some in combinations(known, size):
            if not (kind in ALONE and {"one", "two"} <= {*some}):
                steps += [("activate", list(some))]
    steps += [("merge",), ("unmerge",), ("disable",), ("train",), ("eval",)]
    steps += [("delete", name) for name in known]
    if kind != "dora":
        steps += [("scale", name, factor) for name in known for factor in (2.0, 0.5, -1.0)]
    return steps


@st.composite
def walks(draw: st.DrawFn, kind: str) -> list[Step]:
    """Up to twelve steps, each of them possible where it is taken."""
    given = drawn_layer(kind, Case("lifecycle.random-steps", "float64", 1, 0), bias=True)
    state, steps = LayerState.of(wide(given.layer)), list[Step]()
    for _ in range(draw(st.integers(1, 12))):
        steps.append(draw(st.sampled_from(possible(state, kind))))
        state = moved(state, given, {}, steps[-1]) or state
    return steps


MAX_WALKS = 400
"""How many walks the search for the shortest one takes, at most."""


def _fewest_steps(kind: str) -> Smallest:
    """The shortest way to an output that is not the state's, or to an error."""

    def smallest(subject: GuardedImplementation, dtype: str) -> dict[str, Any] | None:
        budget = Budget(MAX_WALKS)
        found: list[tuple[list[Step], dict[str, Any]]] = []
        case = Case("lifecycle.random-steps", dtype, 1, 0)

        def fails(steps: list[Step]) -> bool:
            if not budget.spend():
                return False
            shown = _deviation(Run.of(subject, case, kind=kind), steps)
            if shown:
                found.append((steps[: shown.pop("count")], shown))
            return bool(shown)

        def shortest() -> tuple[list[Step], dict[str, Any]]:
            return min(found, key=lambda each: len(each[0]))

        with contextlib.suppress(Skip):
            shrunk(walks(kind), fails)
        if not found:
            return None
        # A step may have been drawn for no more than what it makes possible afterwards.
        while any(fails(steps) for steps in _without_one(kind, shortest()[0])):
            pass
        return shortest()[1]

    return smallest


def _deviation(run: Run, steps: Sequence[Step]) -> dict[str, Any]:
    """The first step after which the output is another, and how many they are; or nothing."""
    done: list[str] = []
    for count, step in enumerate(steps, 1):
        words = told(step)
        try:
            done.append(words if run.take(step) else f"{words} refused")
            judged = run.compare("").judge()
        except Fault as fault:
            steps_told = " ".join([*done, words][:count])
            return {"count": count, "steps": steps_told, "got": tidy(str(fault))}
        if judged.verdict == "fail":
            at = f"y{list(judged.index)}"
            shown = {"count": count, "steps": " ".join(done), "array": at, "got": judged.got}
            return shown | {"want": judged.want}
    return {}


def _without_one(kind: str, steps: list[Step]) -> Iterator[list[Step]]:
    """The steps without one of them, the last first, where the others are possible still."""
    given = drawn_layer(kind, Case("lifecycle.random-steps", "float64", 1, 0), bias=True)
    for i in reversed(range(len(steps))):
        fewer, state = steps[:i] + steps[i + 1 :], LayerState.of(wide(given.layer))
        for step in fewer:
            if step not in possible(state, kind):
                break
            state = moved(state, given, {}, step) or state
        else:
            yield fewer


def _check(
    name: str,
    law: str,
    run: Callable[..., Iterable[Comparison]],
    share: float,
    smallest: Smallest | None = None,
) -> Check:
    """With a share below a quarter a check has one case in the profile quick."""
    counted = counter(CASES, share, low_precision=False)

    def cases(profile: str, dtype: str) -> int:
        count = counted(profile, dtype)
        return min(count, 1) if profile == "quick" and share < 0.25 else count

    return Check(
        f"lifecycle.{name}", "lifecycle", ("session",), law, run, cases, smallest, bool(smallest)
    )


def _of_kinds(
    run: Callable[..., Iterable[Comparison]], share: float, kinds: Iterable[str]
) -> Iterator[Check]:
    law = (run.__doc__ or "").splitlines()[0].rstrip(".")
    for kind in kinds:
        name = run.__name__.replace("_", "-")
        name += "" if kind == "linear" else f".{SUFFIXES[kind]}"
        smallest = _fewest_steps(kind) if run is random_steps else None
        yield _check(name, f"{law}{KINDS[kind]}.", partial(run, kind=kind), share, smallest)


_CHECKS: tuple[Check, ...] = (
    *(
        _check(name, law, _script(name, "linear", steps), 0.25)
        for name, (law, steps) in SCRIPTS.items()
    ),
    *(check for kind in PLAIN for check in (*_of_kinds(weight, 0.25, [kind]),
                                            *_of_kinds(random_steps, 1.0, [kind]))),
    *(
        _check(name, law, _script(name, kind, steps), 0.125)
        for name, (kind, law, steps) in BESIDE.items()
    ),
    *_of_kinds(weight, 0.125, ("bias", "dora")),
    *_of_kinds(gradients, 0.25, KINDS),
    _check("isolation", isolation.__doc__ or "", isolation, 0.125),
    _check("rounding", rounding.__doc__ or "", rounding, 0.25),
    _check("save.rounding", save_rounding.__doc__ or "", save_rounding, 0.125),
    *_of_kinds(random_steps, 0.25, FURTHER),
    _check(
        "random-steps.files",
        "The same with saving and loading among the random steps.",
        partial(random_steps, files=True),
        0.25,
    ),
)  # fmt: skip

LEVEL = Level("lifecycle", _CHECKS, is_history=True, quick=r"(\w|-)+")
