"""Level ``lifecycle``: adapters are added, activated, merged, scaled, disabled, saved and deleted.

The expected state of a session is a `sessions.LayerState`: after each step the output is compared
with it by ==, in integers so small that merging and unmerging are exact. A step that is invalid in
a state (merging twice) may be refused or ignored by a session; it may not change the output. A step
that is valid while something is merged (adding, scaling, activating, deleting) may be refused with
an error, and then nothing has happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from minilora.verify.checks.random_steps import draw_steps, fewest_steps
from minilora.verify.checks.session_inputs import (
    BASIC_KINDS,
    EXCLUSIVE,
    KINDS,
    SPECIAL_KINDS,
    SessionInputs,
)
from minilora.verify.checks.session_run import (
    SessionRun,
    Step,
    fitting,
    follow,
    gradient_name,
    opened,
    step_words,
)
from minilora.verify.core import inputs
from minilora.verify.core.level import Level
from minilora.verify.core.shrinking import Smallest
from minilora.verify.core.types import Case, Check, Comparison, counter
from minilora.verify.implementation.guard import GuardedImplementation

CASES = {"quick": 4, "ci": 16, "nightly": 320}

SUFFIXES = {kind: kind for kind in KINDS} | {"full": "modules-to-save"}
"""The suffix of a check's id for each kind."""

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
"""Steps of a linear layer, a check each: its law and its steps."""


ONE_ADAPTER: tuple[Step, ...] = (
    ("add", "one"), ("activate", ["one"]), ("merge",), ("merge",), ("unmerge",), ("unmerge",),
    ("train",), ("eval",), ("merge",), ("eval",), ("train",), ("eval",),
)  # fmt: skip
"""Steps of a layer that never has another adapter."""

EXCLUSIVE_STEPS: tuple[Step, ...] = (
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


SPECIAL_SCRIPTS: dict[str, tuple[str, str, tuple[Step, ...]]] = {
    "single-adapter": (
        "linear",
        "One adapter is added, activated, merged and unmerged.",
        ONE_ADAPTER,
    ),
    **{
        f"single-adapter.{kind}": (
            kind,
            f"One adapter is added, activated, merged and unmerged{KINDS[kind]}.",
            ONE_ADAPTER,
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
    "bias": (
        "bias",
        "A trained bias applies while its adapter is active, and only then.",
        EXCLUSIVE_STEPS,
    ),
    "bias.scaled": (
        "bias",
        "Scaling an adapter scales its change, and not its trained bias.",
        (("add", "one"), ("activate", ["one"]), ("scale", "one", 2.0), ("scale", "one", 0.5)),
    ),
    "modules-to-save": (
        "full",
        "A module of modules_to_save applies while its adapter is active, and only then.",
        EXCLUSIVE_STEPS,
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
        for kind in SPECIAL_KINDS
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
"""Steps of special kinds, and of what not every session can do: kind, law and steps."""


def _script(
    name: str, kind: str, steps: tuple[Step, ...]
) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        session_run = SessionRun.of(subject, case, bias=case.number % 2 == 0, kind=kind)
        yield from follow(session_run, fitting(steps, subject))
        if name.startswith("single-adapter") and session_run.session.has("weight"):
            session_run = SessionRun.of(subject, case, kind=kind)
            for i, step in enumerate(ONE_ADAPTER[:5]):
                if session_run.take(step) and i:
                    yield session_run.weight(step_words(step))

    return run


def weight(
    subject: GuardedImplementation, case: Case, kind: str = "linear"
) -> Iterable[Comparison]:
    """The stored weight is W' while merged, and W bit for bit after unmerging."""
    run = SessionRun.of(subject, case, kind=kind)
    steps: list[Step] = [*START, ("scale", "one", 2.0)]
    if kind == "dora":
        steps.append(("activate", ["two"]))
    for step in fitting(steps, subject):
        if kind not in EXCLUSIVE or step != ("add", "two"):
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
    run = SessionRun.of(subject, case, kind=kind)
    done: list[str] = []
    steps: list[Step] = [*START, ("activate", []), ("activate", ["two"])]
    if kind == "tied":
        steps += [("add", "onetwo"), ("activate", ["onetwo"])]
    if kind not in EXCLUSIVE:
        steps += [("activate", ["two", "one"])]
    steps += [("disable",), ("activate", ["one"]), ("merge",), ("unmerge",), ("scale", "one", 2.0)]
    for step in fitting(steps, subject):
        words = step_words(step)
        done.append(words if run.take(step) else f"{words} refused")
        yield from run.gradients(" ".join(done))


def isolation(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Two sessions at once do not affect each other."""
    runs = {
        "the first": SessionRun.of(subject, case),
        "the second": SessionRun.of(subject, replace(case, seed=case.seed + 1)),
    }
    done: list[str] = []
    for step in ONE_ADAPTER[:3]:
        for name, run in runs.items():
            words = step_words(step)
            done.append(f"{name}'s {words if run.take(step) else f'{words} refused'}")
            for other, other_run in runs.items():
                yield other_run.compare(f"{', '.join(done)}, of {other}")


@dataclass
class FullPrecision:
    """A session whose values use all their digits, so that its answers have a σ.

    Integers pass through a half precision, and their roots are no fractions. Every rank but 4 and 9
    has a fraction here, in the cases of rsLoRA.
    """

    run: SessionRun
    layer: inputs.Layer

    @classmethod
    def of(cls, subject: GuardedImplementation, case: Case) -> FullPrecision:
        """One of the lane with σ, with a bias."""
        rslora: dict[str, Any] = {"use_rslora": True} if case.number % 2 == 0 else {}
        general = replace(case, number=2 * case.number + 1)
        layer, _ = inputs.draw_layer(general, bias=True, **rslora)
        base = {"kind": "linear", "W": layer.W, "bias": layer.bias}
        adapter = {"A": layer.A, "B": layer.B, **layer.merge_options()}
        x, dy = (inputs.columns(v).T for v in (layer.x, layer.dy))
        of_session = SessionInputs(base, {"one": adapter}, x, dy)
        return cls(SessionRun(subject, of_session, *opened(subject, of_session), case.dtype), layer)

    def compare(self, after: str, gradients: bool = False) -> Iterator[Comparison]:
        """The output, or the gradients, against what they should be."""
        run, layer, given = self.run, self.layer, self.run.inputs
        wanted = inputs.wanted(layer)
        sigma = inputs.sigmas_of_session(layer, run.subject.precision(run.dtype))
        names = {"y": "y"}
        if gradients:
            answered = run.session.call("gradients", given.x, given.dy)
            names = {"dx": "dx", "dA": "one.A", "dB": "one.B"}
        else:
            answered = {"y": run.session.call("forward", given.x)}
        for array, name in names.items():
            want, s = wanted[array], np.broadcast_to(sigma[array], wanted[array].shape)
            if array in ("y", "dx"):
                want, s = (v.reshape(-1, v.shape[-1]) for v in (want, s))
            label = gradient_name(name) if gradients else name
            got = run.session.entry(answered, name, "gradients")
            got = run.session.answer(got, label, want.shape, run.dtype)
            yield Comparison(f"{label} after {after}", got, want, s, inputs.limits(layer, array))


def rounding(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """With full-precision values of any rank, the deviation is within rounding."""
    session = FullPrecision.of(subject, case)
    done: list[str] = []
    for step in ONE_ADAPTER[:3] + ONE_ADAPTER[4:5]:
        done.append(step_words(step) if session.run.take(step) else f"{step_words(step)} refused")
        if step[0] != "add":
            yield from session.compare(" ".join(done))
        if step[0] == "activate" and session.run.session.has("gradients"):
            yield from session.compare(" ".join(done), gradients=True)


def save_rounding(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """A saved adapter keeps all digits of its values."""
    session = FullPrecision.of(subject, case)
    steps: list[Step] = [("add", "one"), ("save", "one"), ("anew",), ("load", "one", "one")]
    for step in [*steps, ("activate", ["one"])]:
        session.run.take(step)
    yield from session.compare(" ".join(map(step_words, [*steps, ("activate", ["one"])])))


def random_steps(
    subject: GuardedImplementation, case: Case, kind: str = "linear", files: bool = False
) -> Iterable[Comparison]:
    """After each of twelve random steps the output is that of the expected state."""
    run, rng = SessionRun.of(subject, case, kind=kind), case.rng()
    opening: list[Step] = [("add", "one"), ("save", "one"), ("load", "two", "one")] if files else []
    opening = [*fitting(opening, subject)]
    yield from follow(run, chain(opening, draw_steps(run, kind, rng, files)))


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
        smallest = fewest_steps(kind) if run is random_steps else None
        yield _check(name, f"{law}{KINDS[kind]}.", partial(run, kind=kind), share, smallest)


_CHECKS: tuple[Check, ...] = (
    *(
        _check(name, law, _script(name, "linear", steps), 0.25)
        for name, (law, steps) in SCRIPTS.items()
    ),
    *(check for kind in BASIC_KINDS for check in (*_of_kinds(weight, 0.25, [kind]),
                                            *_of_kinds(random_steps, 1.0, [kind]))),
    *(
        _check(name, law, _script(name, kind, steps), 0.125)
        for name, (kind, law, steps) in SPECIAL_SCRIPTS.items()
    ),
    *_of_kinds(weight, 0.125, ("bias", "dora")),
    *_of_kinds(gradients, 0.25, KINDS),
    _check("isolation", isolation.__doc__ or "", isolation, 0.125),
    _check("rounding", rounding.__doc__ or "", rounding, 0.25),
    _check("save.rounding", save_rounding.__doc__ or "", save_rounding, 0.125),
    *_of_kinds(random_steps, 0.25, SPECIAL_KINDS),
    _check(
        "random-steps.files",
        "The same with saving and loading among the random steps.",
        partial(random_steps, files=True),
        0.25,
    ),
)  # fmt: skip

LEVEL = Level("lifecycle", _CHECKS, is_history=True, quick=r"(\w|-)+")
