"""Level ``quantized``: adapters on a weight that is held in four or eight bits.

A session with a layer of kind ``quantized`` says by ``weight()`` what its weight stands for. That
dequantized W̃ is the W of every law, so that the bounds are those of the computation; only where a
weight is quantized, at the start and by merging, is it off by what its scheme loses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minilora.spec.quantization import nf4_values
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import Skip
from minilora.verify.core.inputs import Layer, limits, long, sigma_merge, sigmas, wanted
from minilora.verify.core.level import Level
from minilora.verify.core.tolerance import Rounding, unit_roundoff
from minilora.verify.core.types import FIXED_BOUND, Case, Check, Comparison, counter
from minilora.verify.implementation.guard import GuardedImplementation

Array = np.ndarray


@dataclass(frozen=True)
class Scheme:
    """How many bits a number has, how many numbers share a scale, and the greatest loss.

    ``loss``: of a number, over the greatest of its block. A number goes to the nearest code, so
    that it loses half of the greatest gap between codes; a whole gap where the codes end before the
    greatest number, or their zero is rounded. A scale in half precision loses `HALF` besides.
    """

    bits: int
    block: int
    loss: float


SCHEMES = {
    "nf4": Scheme(4, 64, float(np.diff(nf4_values()).max()) / 2),
    "fp4": Scheme(4, 64, 1 / 6),
    "int8": Scheme(8, 0, 1 / 127),
    "int4": Scheme(4, 64, 2 / 15),
    "q4_0": Scheme(4, 32, 1 / 8),
    "q4_1": Scheme(4, 32, 2 / 15),
    "q8_0": Scheme(8, 32, 1 / 127),
}
"""bitsandbytes' NF4, FP4 and int8 (a row is a block), MLX's affine int4, and three of GGUF."""

HALF = 2.0**-11
"""The unit roundoff of float16."""

OUTPUTS = (32, 64, 8)
"""Of a layer: kernels cut them into pieces of 16 or 32, and the last has fewer."""

FEATURES = (64, 192)

CASES = {"quick": len(SCHEMES), "ci": 2 * len(SCHEMES), "nightly": 40 * len(SCHEMES)}


@dataclass(frozen=True)
class Held:
    """A session with a quantized layer and one adapter, and the layer with W̃ in the place of W."""

    subject: GuardedImplementation
    session: GuardedImplementation
    scheme: Scheme
    original: Layer
    layer: Layer
    dtype: str

    @classmethod
    def of(cls, subject: GuardedImplementation, case: Case) -> Held:
        """The session of a case, with its adapter active. Raises Skip."""
        name = list(SCHEMES)[case.number % len(SCHEMES)]
        layer = draw(case)
        given = {"kind": "quantized", "scheme": name, "W": layer.W}
        subject.traits.add(f"the scheme is {name}")
        session = subject.session(given | ({} if layer.bias is None else {"bias": layer.bias}))
        if absent := [m for m in ("weight", "activate") if not session.has(m)]:
            raise Skip(f"no {', '.join(absent)}")
        W = session.answer(session.call("weight"), "W", layer.W.shape, case.dtype)
        session.call("add", "one", {"A": layer.A, "B": layer.B, **layer.merge_options()})
        session.call("activate", ["one"])
        held = replace(layer, W=W)
        return cls(subject, session, SCHEMES[name], layer, held, case.dtype)

    def step(self, method: str) -> None:
        """Takes a step that this level cannot do without."""
        if not self.session.has(method):
            raise Skip(f"no {method}")
        self.session.call(method)

    def weight(self) -> Array:
        """What the weight stands for now."""
        return self.session.answer(self.session.call("weight"), "W", self.layer.W.shape, self.dtype)

    def sigmas(self, layer: Layer) -> dict[str, Array]:
        """Those of the answers; `weight` may round a W̃ that has more digits."""
        precision = self.subject.precision(self.dtype)
        found = sigmas(layer, precision)
        lost = Rounding(precision).stored(layer.W.astype(np.float64))
        for name, of, variance in (("y", layer.x, lost.T), ("dx", layer.dy, lost)):
            found[name] = np.sqrt(found[name] ** 2 + of.astype(np.float64) ** 2 @ variance)
        return found

    def output(self, layer: Layer, after: str) -> Comparison:
        """y beside what a layer gives."""
        want, sigma = wanted(layer)["y"], self.sigmas(layer)["y"]
        y = self.session.answer(self.session.call("forward", layer.x), "y", want.shape, self.dtype)
        return Comparison(f"y after {after}", y, want, sigma, limits(layer, "y"))

    def gradients(self, after: str) -> Iterable[Comparison]:
        """dx, dA and dB in training beside those of W̃."""
        if not self.session.has("gradients"):
            raise Skip("no gradients")
        if self.session.has("train"):
            self.step("train")
        layer, session = self.layer, self.session
        want, sigma = wanted(layer), self.sigmas(layer)
        answer = session.call("gradients", layer.x, layer.dy)
        for own, name in (("dx", "dx"), ("dA", "one.A"), ("dB", "one.B")):
            got = session.entry(answer, name, f"gradients after {after}")
            got = session.answer(got, name, want[own].shape, self.dtype)
            yield Comparison(f"{own} after {after}", got, want[own], sigma[own], limits(layer, own))

    def merged(self) -> Array:
        """W̃ + s B A, in long double."""
        layer = self.layer
        change: Array = long(layer.W) + layer.s * (long(layer.B) @ long(layer.A))
        return change

    def lost(self, W: Array) -> Array:
        """What quantizing W loses at most, with a scale in half precision and in the dtype."""
        m, n = W.shape
        size = np.abs(W.astype(np.float64))
        greatest = size.reshape(m, -1, self.scheme.block or n).max(2, keepdims=True)
        u = unit_roundoff(self.dtype)
        blocks = np.broadcast_to(greatest, (*greatest.shape[:2], self.scheme.block or n))
        bound: Array = blocks.reshape(m, n) * (self.scheme.loss * (1 + 8 * u) + HALF + 2 * u)
        return bound

    def on_a_grid(self, W: Array, after: str) -> Comparison:
        """How many values a block has: of no more can its bits tell the difference."""
        blocks = W.reshape(-1, self.scheme.block or W.shape[1])
        counts = np.array([len(np.unique(block)) for block in blocks])
        at_most = np.minimum(counts, 2**self.scheme.bits)
        return Comparison(f"the number of values in a block after {after}", counts, at_most)


def draw(case: Case) -> Layer:
    """A layer whose s B A is as large as W; every other one has a bias."""
    rng, group = case.rng(), case.number // len(SCHEMES)
    m, n, r, tokens = OUTPUTS[group % 3], FEATURES[group % 2], case.fixed.rank(4), 3
    shapes: dict[str, tuple[int, ...]] = {
        "x": (tokens, n),
        "W": (m, n),
        "A": (r, n),
        "B": (m, r),
        "dy": (tokens, m),
    }
    arrays: dict[str, Any] = {
        k: rng.standard_normal(v).astype(DTYPES[case.dtype]) for k, v in shapes.items()
    }
    alpha = case.fixed.alpha_of(float(rng.choice([1.5, 3.0, 7.0])), r)
    bias = rng.standard_normal(m).astype(DTYPES[case.dtype]) if case.number % 2 else None
    return Layer(**arrays, alpha=alpha, r=r, bias=bias)


def weight(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """A weight is held as near as its bits allow, and on their grid."""
    held = Held.of(subject, case)
    W, original = held.layer.W, held.original.W
    yield held.on_a_grid(W, "the start")
    same = np.asarray(float(np.array_equal(W, original)))
    yield Comparison("whether the weight has kept all its digits", same, np.zeros(()))
    yield Comparison("W̃ against W", W, long(original), held.lost(original), FIXED_BOUND)


def forward(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """y = W̃ x + b + s B A x in training and in evaluation, again and again; W̃ stays."""
    held = Held.of(subject, case)
    done = []
    for mode in ("train", "eval", "eval", "train"):
        if held.session.has(mode):
            held.step(mode)
            done.append(f"{mode}()")
        yield held.output(held.layer, " ".join(done) or "the start")
        yield Comparison(f"W̃ after {' '.join(done)} forward()", held.weight(), held.layer.W)


def gradients(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """dx, dA and dB are those of W̃, after an evaluation too."""
    held = Held.of(subject, case)
    yield from held.gradients("train()")
    if held.session.has("eval"):
        held.step("eval")
        held.session.call("forward", held.layer.x)
        yield from held.gradients("train() eval() forward() train()")


def merge(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """W' is W̃ + s B A as near as its bits allow, y that of W', and unmerging takes s B A out."""
    held = Held.of(subject, case)
    held.step("merge")
    W, want = held.weight(), held.merged()
    yield held.on_a_grid(W, "merge()")
    formed = sigma_merge(held.layer, subject.precision(case.dtype)) * 6
    yield Comparison("W' against W̃ + s B A", W, want, held.lost(want) + formed, FIXED_BOUND)
    of_merged = replace(held.layer, W=W, B=np.zeros_like(held.layer.B))
    yield held.output(of_merged, "merge()")
    if not held.session.has("unmerge"):
        return
    held.step("unmerge")
    back, change = held.weight(), want - long(held.layer.W)
    bound = held.lost(long(W) - change) + held.lost(want) + 2 * formed
    yield Comparison("W̃ after merge() unmerge()", back, long(held.layer.W), bound, FIXED_BOUND)
    yield held.output(replace(held.layer, W=back), "merge() unmerge()")


def merge_after_forward(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
    """A forward before the merge, in training or in evaluation, changes no bit of W'."""
    merged = {}
    for mode in ("", "train", "eval"):
        held = Held.of(subject, case)
        if mode and held.session.has(mode):
            held.step(mode)
        if mode:
            held.session.call("forward", held.layer.x)
        held.step("merge")
        merged[mode] = held.weight()
    for mode in ("train", "eval"):
        yield Comparison(f"W' after {mode}() forward() merge()", merged[mode], merged[""])


def _law(run: Callable[..., Iterable[Comparison]], share: float = 1.0) -> Check:
    name, title = run.__name__.replace("_", "-"), (run.__doc__ or "").splitlines()[0]
    return Check(f"quantized.{name}", "quantized", ("session",), title, run, _counted(share))


def _counted(share: float) -> Any:
    return counter(CASES, share)


_CHECKS: tuple[Check, ...] = tuple(
    map(_law, (weight, forward, gradients, merge, merge_after_forward))
)

LEVEL = Level(
    "quantized",
    _CHECKS,
    relations=("merge-after-forward",),
    has_exact_lane=False,
    cases=None,
    quick_dtypes=True,
    no_vectors={"*": "what a weight in few bits stands for, each library decides"},
)
