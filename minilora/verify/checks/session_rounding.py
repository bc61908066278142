"""A session whose numbers use all their digits: what it may lose, once and in many cycles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minilora.verify.checks.session_inputs import SessionInputs
from minilora.verify.checks.session_run import SessionRun, Step, gradient_name, opened, step_words
from minilora.verify.checks.session_scripts import ONE_ADAPTER
from minilora.verify.core import inputs
from minilora.verify.core.errors import Skip
from minilora.verify.core.tolerance import unit_roundoff
from minilora.verify.core.types import BOUND, Case, Comparison
from minilora.verify.implementation.guard import GuardedImplementation


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


CYCLES = 12
"""How often an adapter is merged and unmerged."""


def cycles(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """Merging and unmerging again and again moves W by no more than the rounding of each time.

    With W of as many digits as the dtype has, and an adapter of whole numbers, nothing is rounded:
    W returns by ==. Otherwise each time stores W' and W anew, which loses u (|W'| + |W|) at most,
    and forms both from s B A, which loses what `inputs.formed` tells, each time.
    """
    precision = subject.precision(case.dtype)
    layer = inputs.full_digits(case, precision) if case.number % 2 == 0 else _general(case)
    adapter = {"A": layer.A, "B": layer.B, **layer.merge_options()}
    base = {"kind": "linear", "W": layer.W}
    given = SessionInputs(base, {"one": adapter}, layer.x, layer.dy)
    run = SessionRun(subject, given, *opened(subject, given), case.dtype)
    if not run.session.has("weight"):
        raise Skip("no weight")
    run.take(("add", "one"))
    run.take(("activate", ["one"]))
    merged = inputs.wanted_merge(layer)
    u = unit_roundoff(precision.storage)
    once = u * (np.abs(merged) + np.abs(inputs.long(layer.W)) + 2 * inputs.formed(layer))
    for i in range(1, CYCLES + 1):
        for step, want in ((("merge",), merged), (("unmerge",), layer.W)):
            run.take(step)
            if i in (1, CYCLES):
                W = run.session.call("weight")
                W = run.session.answer(W, "W", layer.W.shape, case.dtype)
                bound = None if case.number % 2 == 0 else (i * once).astype(np.float64)
                yield Comparison(f"W after {step[0]}() for the {i}. time", W, want, bound, BOUND)


def _general(case: Case) -> inputs.Layer:
    """Normal numbers; of rank 1 or 2 where any will do, so that the bound is tight."""
    layer, _ = inputs.draw_layer(replace(case, number=2 * case.number + 1))
    r = layer.r if case.fixed.ranks else min(layer.r, 1 + case.number // 2 % 2)
    alpha = case.fixed.alpha_of(layer.alpha, r)
    return replace(layer, A=layer.A[:r], B=layer.B[:, :r], r=r, alpha=alpha)
