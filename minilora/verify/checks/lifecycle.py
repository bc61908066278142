"""Level ``lifecycle``: adapters are added, activated, merged, scaled, disabled, saved and deleted.

The expected state of a session is a `sessions.LayerState`: after each step the output is compared
with it by ==, in integers so small that merging and unmerging are exact. A step that is invalid in
a state (merging twice) may be refused or ignored by a session; it may not change the output. What a
session may refuse while something is merged stands in `SessionRun.may_refuse`, and on the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain

import numpy as np

from minilora.verify.checks.random_steps import draw_steps, fewest_steps
from minilora.verify.checks.session_dropout import CHECKS as DROPOUT
from minilora.verify.checks.session_inputs import BASIC_KINDS, EXCLUSIVE, KINDS, SPECIAL_KINDS
from minilora.verify.checks.session_rounding import cycles, rounding, save_rounding
from minilora.verify.checks.session_run import SessionRun, Step, fitting, follow, step_words
from minilora.verify.checks.session_scripts import (
    ONE_ADAPTER,
    ROWS_BETWEEN,
    SCRIPTS,
    SPECIAL_SCRIPTS,
    START,
    SUFFIXES,
    TRAINED_SCRIPTS,
    UNKNOWN,
    WITH_GRADIENTS,
)
from minilora.verify.core.errors import Skip
from minilora.verify.core.level import Level
from minilora.verify.core.shrinking import Smallest
from minilora.verify.core.types import Case, Check, Comparison, counter
from minilora.verify.implementation.guard import GuardedImplementation

CASES = {"quick": 4, "ci": 16, "nightly": 320}

CALLS = 1000
"""How often a session is asked in one case, and a little beyond buffers of 256 and 512."""


def _script(
    name: str, kind: str, steps: tuple[Step, ...]
) -> Callable[[GuardedImplementation, Case], Iterable[Comparison]]:
    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        session_run = SessionRun.of(subject, case, bias=case.number % 2 == 0, kind=kind)
        has_gradients = session_run.session.has("gradients")
        is_of_training = name.startswith("step") or session_run.session.has("step")
        asked = fitting([s for s in steps if is_of_training or s != ("step",)], subject)
        yield from follow(session_run, asked, name in WITH_GRADIENTS and has_gradients)
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
        yield run.compare(" ".join([*done, "gradients()"]))


def unknown(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """A step that names an adapter which there is not is refused, and changes nothing."""
    run, is_as_before = SessionRun.of(subject, case), False
    for step in UNKNOWN:
        if not run.session.has(step[0]):
            continue
        for earlier in fitting(() if is_as_before else (("anew",), *START), subject):
            run.take(earlier)
        words, is_as_before = step_words(step), run.refuses(step)
        refused = np.asarray(float(is_as_before))
        yield Comparison(f"whether {words} is refused", refused, np.ones(()))
        if is_as_before:
            yield run.compare(words)


def rows(subject: GuardedImplementation, case: Case, kind: str = "linear") -> Iterable[Comparison]:
    """A batch in which each row names its adapter, or none, changes nothing of the session."""
    run, rng = SessionRun.of(subject, case, kind=kind), case.rng()
    if not run.session.has("rows"):
        raise Skip("no rows")
    evaluation: list[Step] = [("eval",)] if run.session.has("eval") else []
    added: tuple[Step, ...] = (*START[:2], ("add", "onetwo"), *evaluation, *START[2:])
    for step in fitting(added, subject):
        run.take(step)
    count = len(run.inputs.x)
    for step in fitting(ROWS_BETWEEN, subject):
        names = ["", *run.state.adapters]
        words = step_words(step)
        for order in (names[:2], np.resize(names, count), rng.permutation(np.resize(names, count))):
            yield run.rows([str(name) for name in order], words)
        yield run.compare(f"a batch of rows, before {words}")
        run.take(step)


def calls(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """After a thousand calls, with merging in between, nothing has moved."""
    run = SessionRun.of(subject, case)
    steps: list[Step] = [("activate", ["two"]), ("merge",), ("unmerge",), ("activate", ["one"])]
    for step in fitting([*START, *steps], subject):
        run.take(step)
    x = run.inputs.x
    first = run.compare("four steps")
    for i in range(CALLS):
        if i % 50 == 0:
            for step in fitting(steps, subject):
                run.take(step)
        run.session.call("forward", x[: 1 + i % len(x)])
    yield first
    yield run.compare(f"{CALLS} calls")
    run.take(("activate", []))
    yield run.compare(f"{CALLS} calls activate([])")


def isolation(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Two sessions at once do not affect each other."""
    runs = {
        "the first": SessionRun.of(subject, case),
        "the second": SessionRun.of(subject, replace(case, seed=case.seed + 1)),
    }
    done: list[str] = []
    after: tuple[Step, ...] = (("scale", "one", 2.0), ("train",), ("disable",))
    has = runs["the first"].session.has
    for step in [step for step in (*ONE_ADAPTER[:3], ("unmerge",), *after) if has(step[0])]:
        for name, run in runs.items():
            words = step_words(step)
            done.append(f"{name}'s {words if run.take(step) else f'{words} refused'}")
            for other, other_run in runs.items():
                yield other_run.compare(f"{', '.join(done)}, of {other}")


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
    low_precision: bool = False,
    most: int = 1000,
    once: bool = False,
) -> Check:
    """With a share below a quarter a check has one case in the profile quick.

    With ``once`` it has one in float64 in the profile ci, too: integers show there what they do in
    float32.
    """
    counted = counter(CASES, share, low_precision=low_precision)

    def cases(profile: str, dtype: str) -> int:
        count = min(counted(profile, dtype), most)
        is_shown = profile == "quick" or (once and (profile, dtype) == ("ci", "float64"))
        return min(count, 1) if is_shown and share < 0.25 else count

    return Check(
        f"lifecycle.{name}",
        "lifecycle",
        ("session",),
        law.splitlines()[0],
        run,
        cases,
        smallest,
        bool(smallest),
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
        _check(name, law, _script(name, "linear", steps), 0.125, once=True)
        for name, (law, steps) in SCRIPTS.items()
    ),
    *(check for kind in BASIC_KINDS for check in (*_of_kinds(weight, 0.25, [kind]),
                                            *_of_kinds(random_steps, 1.0, [kind]))),
    *(
        _check(name, law, _script(name, kind, steps), 0.125)
        for name, (kind, law, steps) in SPECIAL_SCRIPTS.items()
    ),
    *(
        _check(name, law, _script(name, kind, steps), 0.125, once=True)
        for name, (kind, law, steps) in TRAINED_SCRIPTS.items()
    ),
    *(_check(name, law, run, 0.125) for name, (law, run) in DROPOUT.items()),
    *_of_kinds(weight, 0.125, ("bias", "dora", "lora-bias")),
    *_of_kinds(gradients, 0.125, KINDS),
    _check("unknown", unknown.__doc__ or "", unknown, 0.125),
    *_of_kinds(rows, 0.125, ("linear", "embedding")),
    _check("calls", calls.__doc__ or "", calls, 0.125, most=1),
    _check("cycles", cycles.__doc__ or "", cycles, 0.25, low_precision=True),
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

_CHANCE = "what dropout draws has no one answer"
_ROUNDS = "what merging may lose depends on how often, and is a bound of the check's"

LEVEL = Level(
    "lifecycle",
    _CHECKS,
    chance=("dropout*",),
    is_history=True,
    quick=r"(\w|-)+",
    vectors={"*": (("float32", 0),)},
    no_vectors={
        **dict.fromkeys(DROPOUT, _CHANCE),
        **dict.fromkeys(("cycles", "rounding", "save.rounding"), _ROUNDS),
        "calls": "a thousand calls are no vector",
        "isolation": "two sessions at once are two vectors",
        "step-while-merged": "what is merged where it is trained depends on the session",
        **dict.fromkeys(
            ("gradients.bias", "gradients.modules-to-save"),
            "what is brought may be trained on while an adapter is merged",
        ),
        "step.dora": "the norm may be held or differentiated in each step",
        "gradients.dora": "the norm may be held or differentiated after each step",
    },
    exact=("*",),
)
