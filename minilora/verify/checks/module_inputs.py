"""The inputs of level ``module``: kinds of layers with all their settings, drawn together.

Settings are drawn by `Axes`: of so many values each comes once in as many cases, and which values
of two settings meet is chance. Numbers are small integers, and rows that DoRA takes a norm of have
one that is a power of two, so that nothing is rounded and answers compare by ``==``; attention, and
an encoder with it, has other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import prod
from typing import Any, TypeVar

import numpy as np

from minilora.spec.layers import block_diagonal
from minilora.spec.lora import LORA, Variant, scale
from minilora.spec.variants import DORA, LORA_BIAS
from minilora.verify.checks.module_layers import (
    FROZEN,
    Module,
    answers,
    merged,
)
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.inputs import whole_numbers
from minilora.verify.core.types import Case

Array = np.ndarray
Entries = dict[str, Any]
T = TypeVar("T")

ROUNDED = ("attention", "encoder")
"""Kinds whose numbers are rounded: exponentials are."""

DROPPED = 0.75
"""The rate of dropout: 1 / (1 - p) is 4, and 1 / p another number."""

ALMOST_NONE = 2.0**-60
"""A rate so small that 1 - p is 1 in every dtype and nothing is dropped: training is evaluation."""


class Axes:
    """What is chosen of each setting in a case, each setting by a permutation of its own."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.chosen: dict[str, Any] = {}

    def __call__(self, name: str, values: Sequence[T]) -> T:
        """The value of a setting: in ``len(values)`` cases each of them comes once."""
        block, place = divmod(self.case.number, len(values))
        own = replace(self.case, check=f"{self.case.check}.{name}", number=block)
        value = values[int(own.rng().permutation(len(values))[place])]
        self.chosen[name] = value
        return value


@dataclass(frozen=True)
class ModuleInputs:
    """A layer, its adapter and input as the contract has them, in the dtype under test.

    ``p`` is the adapter's dropout; ``traits`` say in words what is particular.
    """

    kind: str
    layer: Entries
    adapter: Entries
    x: Array
    dy: Array
    index: Array | None
    traits: tuple[str, ...]

    def module(self, number: Callable[[Array], Any], variant: Variant | None = None) -> Module:
        """The same over a number system; row numbers stay."""
        of, column = variant_of(self.adapter)
        s = scale(self.adapter["alpha"], self.adapter["r"], self.adapter.get("use_rslora", False))
        layer, adapter = (each_array(given, number) for given in (self.layer, self.adapter))
        x = self.x if self.x.dtype.kind == "i" else number(self.x)
        return Module(self.kind, layer, adapter, x, variant or of, column, s, self.index)

    def with_adapter(self, **changed: Any) -> ModuleInputs:
        """With other entries of the adapter."""
        return replace(self, adapter=self.adapter | changed)


def each_array(given: Mapping[str, Any], number: Callable[[Array], Any]) -> Entries:
    """The entries with their floating arrays in another number system."""

    def turned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return each_array(value, number)
        return number(value) if isinstance(value, np.ndarray) else value

    return {name: turned(value) for name, value in given.items()}


def variant_of(adapter: Mapping[str, Any]) -> tuple[Variant, str]:
    """The variant of an adapter, and the name of its parameter beside A and B."""
    if "magnitude" in adapter:
        return DORA, "magnitude"
    return (LORA_BIAS, "lora_bias") if "lora_bias" in adapter else (LORA, "")


class Draw:
    """Draws the arrays of a case: integers that become smaller and sparser until all sums fit."""

    def __init__(self, case: Case, kind: str, axes: Axes, groups_as: str) -> None:
        self.kind, self.axes, self.groups_as, self.fixed = kind, axes, groups_as, case.fixed
        self.rng, self.dtype = case.rng(), case.dtype
        self.limit = whole_numbers(case.dtype)
        small = (1, 0.5) if kind == "conv" else (2, 0.8)
        self.large, self.density = (12, 1.0) if self.limit > 1e5 else small

    def __call__(self, *shape: int) -> Array:
        """Whole numbers; of a rounded kind normal ones."""
        if self.kind in ROUNDED:
            return self.rng.standard_normal(shape) / (shape[-1] ** 0.5 if len(shape) > 1 else 1.0)
        drawn = self.rng.integers(-self.large, self.large + 1, shape)
        return drawn * (self.rng.random(shape) < self.density) * 1.0

    def sparser(self) -> None:
        """Smaller numbers, then fewer."""
        self.large = max(1, self.large * 3 // 4)
        self.density = max(0.08, self.density * (0.96 if self.large == 1 else 1.0))

    def bias(self, layer: Entries, *shape: int) -> Entries:
        """The layer with a bias, or without."""
        return layer | ({"bias": self(*shape)} if self.chosen("bias", (True, False)) else {})

    def chosen(self, setting: str, values: Sequence[T]) -> T:
        """The value of a setting; the last, which is to be without it, where it is lacking."""
        return self.axes(setting, values[-1:] if setting in self.fixed.lacking else values)

    def rank(self, at_least: int = 1) -> Entries:
        """r, and a scale of either sign that is a power of two, by rsLoRA or not."""
        rslora = self.chosen("use_rslora", (True, False, False))
        r = 4 if rslora else self.axes("r", tuple(r for r in (2, 1, 4) if r >= at_least))
        r, only = self.fixed.exact(r, rslora)
        s = self.axes("s", (0.25, 4.0, -0.5, 2.0)) if only is None else only
        if self.kind in ROUNDED and only is None:
            s = 7 / 3 if s > 0 else -1.25
        return {"r": r, "alpha": s * (r**0.5 if rslora else r)} | (
            {"use_rslora": True} if rslora else {}
        )


def rows_of_simple_norm(rng: np.random.Generator, m: int, n: int) -> Array:
    """Rows of norms 4, 2, 2 in turn: four entries of one size, or one where there is no room."""
    V = np.zeros((m, n))
    for i, row in enumerate(V):
        at = rng.permutation(n)[: 4 if n > 3 else 1]
        row[at] = rng.choice([-1.0, 1.0], len(at)) * (2 if i % 3 else 4) / len(at) ** 0.5
    return V


def completed(rng: np.random.Generator, outside: Array, n: int) -> Array:
    """Rows (m, n) that with the few ±u beside each have four of them: their norm is 2 u."""
    size = np.abs(outside).max() or 1.0
    V = np.zeros((len(outside), n))
    for row, beside in zip(V, outside, strict=True):
        at = rng.permutation(n)[: 4 - np.count_nonzero(beside)]
        row[at] = size * rng.choice([-1.0, 1.0], len(at))
    return V


def _single_entries(rng: np.random.Generator, adapter: Entries) -> Entries:
    """The adapter with one number in each row of A, and no 0 in B, all of the same size."""
    A, B = np.zeros_like(adapter["A"]), rng.choice([-1.0, 1.0], adapter["B"].shape)
    columns = rng.permutation(A.shape[1])[: len(A)]
    A[np.arange(len(A)), columns] = 2 * rng.choice([-1.0, 1.0], len(A))
    return adapter | {"A": A, "B": B}


def _dora_weight(
    rng: np.random.Generator, layer: Entries, adapter: Entries, table: bool
) -> tuple[Array, Array]:
    """A weight with which rows of V have norms that are powers of two; and the norms."""
    s = scale(adapter["alpha"], adapter["r"], adapter.get("use_rslora", False))
    A, B = adapter["A"], adapter["B"]
    W = layer["W"].T if table else layer["W"].reshape(len(layer["W"]), -1)
    outside = np.zeros((len(W), 1))
    if A.shape[1] == W.shape[1]:
        V, own = rows_of_simple_norm(rng, *W.shape), s * B @ A
    else:  # of a convolution in groups, where A reads the channels of all
        groups = layer["groups"]
        whole = s * block_diagonal(B, groups)[0] @ A
        (ones, back) = block_diagonal(np.ones_like(W), groups)
        own, outside = back(whole), whole * (1 - ones)
        V = completed(rng, outside, W.shape[1])
    norms = np.sqrt((V * V).sum(1) + (outside * outside).sum(1))
    return (V - own).T if table else (V - own).reshape(layer["W"].shape), norms


def _with_variant(draw: Draw, layer: Entries, adapter: Entries) -> tuple[Entries, Entries]:
    """The layer and its adapter as the variant has them."""
    table = draw.kind == "embedding"
    m = layer["W"].shape[1] if table else len(layer["W"])
    variant = draw.axes.chosen["variant"]
    if variant == "lora-bias":
        return layer, adapter | {"lora_bias": draw(m)}
    if variant == "lora":
        return layer, adapter
    if draw.kind in ROUNDED:
        norms = np.sqrt((layer["W"] ** 2).sum(1))
        magnitude = norms * draw.rng.uniform(0.6, 1.6, m)
    else:
        W, norms = _dora_weight(draw.rng, layer, adapter, table)
        layer = layer | {"W": W}
        magnitude = norms * draw.rng.choice([-1.0, 0.5, 2.0, 1.0], m)
    return layer, adapter | {"use_dora": True, "magnitude": magnitude}


Drawn = tuple[Entries, Entries, Array, Array | None]
"""A layer, its adapter, x, and the index of experts."""

VARIANTS = ("lora", "dora", "lora-bias")

SIDES = ((5, 7), (6, 6), (9, 4))
"""m and n of a matrix: with a square one a transpose is not seen by its shape."""


def _factors(draw: Draw, n: int, m: int, at_least: int = 1) -> Entries:
    of = draw.rank(at_least)
    return of | {"A": draw(of["r"], n), "B": draw(m, of["r"])}


def _storage(draw: Draw) -> Entries:
    """The weight is to be stored (in, out), or not: it is given as (m, n) either way."""
    return {"fan_in_fan_out": True} if draw.chosen("fan_in_fan_out", (True, False)) else {}


PAIRS = "sides and storage"


def _sides_and_storage(draw: Draw) -> tuple[int, int, Entries]:
    """m, n and the storage, of which each pair comes once in as many cases."""
    pairs = [*product(SIDES, (True, False))]
    if "fan_in_fan_out" in draw.fixed.lacking:
        pairs = [(sides, False) for sides in SIDES]
    (m, n), across = draw.axes(PAIRS, pairs)
    return m, n, {"fan_in_fan_out": True} if across else {}


def _linear(draw: Draw) -> Drawn:
    """A linear layer, stored either way."""
    draw.axes("variant", VARIANTS)
    m, n, storage = _sides_and_storage(draw)
    lead = draw.axes("lead", ((4,), (2, 3), (1,)))
    layer = draw.bias({"W": draw(m, n)} | storage, m)
    return (*_with_variant(draw, layer, _factors(draw, n, m)), draw(*lead, n), None)


KERNELS = {1: ((3,), (2,)), 2: ((3, 2), (2, 2), (1, 3)), 3: ((2, 1, 3), (2, 1, 2))}
"""By dimensions. Two sides are equal in some, where no shape tells them apart."""
SPACE = (5, 4, 5)


def _conv(
    draw: Draw,
    modes: Sequence[str] = ("zeros",),
    dilated: bool = False,
    grouped: bool = False,
    pointwise: bool = False,
    variants: Sequence[str] = VARIANTS,
) -> Drawn:
    """A convolution of one to three dimensions; ``pointwise``: a kernel of size 1."""
    axes = draw.axes
    axes("variant", variants)
    dimensions = axes("dimensions", (1, 2, 3))
    kernels = ((1,) * dimensions,) if pointwise else KERNELS[dimensions]
    kernel = axes("kernel", kernels[: 1 if dilated or grouped else None])
    groups, mode = 2 if grouped else 1, axes("padding_mode", modes)
    moves = {
        "stride": axes("stride", ((1, 2, 1), (2, 1, 2), (1, 1, 1))),
        "padding": (1, 1, 1) if mode != "zeros" else axes("padding", ((1, 0, 1), (0, 1, 0))),
        "dilation": axes("dilation", ((2, 1, 1), (1, 2, 2))) if dilated else (1, 1, 1),
    }
    channels, m = axes("channels", (2, 3, 4)) if not grouped else 2, 4
    layer: Entries = {name: list(of[:dimensions]) for name, of in moves.items()}
    layer |= {"W": draw(m, channels, *kernel), "groups": groups, "padding_mode": mode}
    whole = grouped and draw.groups_as == "blocks"
    n = channels * prod(kernel) * (groups if whole else 1)
    adapter = _factors(draw, n, m, groups)
    if whole:
        adapter["B"] = adapter["B"][:, : adapter["r"] // groups]
        if axes.chosen["variant"] == "dora":
            adapter = _single_entries(draw.rng, adapter)
    layer, adapter = _with_variant(draw, draw.bias(layer, m), adapter)
    return layer, adapter, draw(2, channels * groups, *SPACE[:dimensions]), None


def _embedding(draw: Draw) -> Drawn:
    """A table, with Gemma's factor, and a padding row whose column of A is 0."""
    pairs = (("lora", True), ("dora", False), ("lora", False))  # a padding row has no magnitude
    draw.axes.chosen["variant"], padded = draw.axes("variant and padding row", pairs)
    v, d = draw.axes("sides", ((8, 5), (6, 6), (5, 9)))
    layer: Entries = {"W": draw(v, d)}
    adapter = _factors(draw, v, d)
    if factor := draw.axes("embed_scale", (None, 3.0, 0.5)):
        layer["embed_scale"] = factor
    if padded:
        layer["padding_idx"] = pad = int(draw.rng.integers(v))
        adapter["A"][:, pad] = 0
    ids = np.concatenate([draw.rng.permutation(v), draw.rng.integers(0, v, 4)])
    shape = draw.axes("lead", ((-1,), (2, -1)))
    ids = ids[: len(ids) // 2 * 2].reshape(shape)
    return (*_with_variant(draw, layer, adapter), ids, None)


def _max_norm(draw: Draw) -> Drawn:
    """A table whose rows are within max_norm, adapted or not, where A's columns are not."""
    draw.axes("variant", ("lora",))
    norm_type = draw.axes("norm_type", (2.0, 1.0))
    v, d = 7, 5
    of = draw.rank() | {"A": np.zeros((1, 1)), "B": np.zeros((1, 1))}
    s = scale(of["alpha"], of["r"], of.get("use_rslora", False))
    W = draw.rng.integers(-1, 2, (v, d)) * 1.0
    A = draw.rng.integers(-1, 2, (of["r"], v)) * 8.0
    A[0] = 8.0
    B = draw.rng.integers(-1, 2, (d, of["r"])) * (1 / 8 / abs(s))
    tables = [W, W + s * (B @ A).T]
    norms = [(abs(table) ** norm_type).sum(1) ** (1 / norm_type) for table in tables]
    bound = min(7.0, float(np.ceil(np.max(norms))) + 1.0)
    layer = {"W": W, "max_norm": bound, "norm_type": norm_type}
    if np.max(norms) >= bound:
        layer["W"], B = W * 0, B * 0
    return layer, of | {"A": A, "B": B}, draw.rng.permutation(np.arange(10) % v), None


def _fused(draw: Draw) -> Drawn:
    """Several projections in one weight, some of them adapted."""
    draw.axes("variant", ("lora",))
    rows = draw.axes("rows", ((4, 4, 4), (6, 3, 3), (4, 4)))
    masks = ((True, False, True), (True, True, True), (False, True, True))
    enable = list(draw.axes("enable", masks)[: len(rows)])
    n, of = draw.axes("width", (5, 12)), draw.rank()
    layer = draw.bias({"W": draw(sum(rows), n), "rows": list(rows)} | _storage(draw), sum(rows))
    height = sum(size for size, on in zip(rows, enable, strict=True) if on)
    factors = {"A": draw(of["r"] * sum(enable), n), "B": draw(height, of["r"])}
    return layer, of | factors | {"enable": enable}, draw(2, 3, n), None


def _experts(draw: Draw, count: int = 3) -> Drawn:
    """A weight for each expert; one of several has no rows."""
    draw.axes("variant", ("lora",))
    m, n, storage = _sides_and_storage(draw)
    of = draw.rank()
    factors = {"A": draw(count, of["r"], n), "B": draw(count, m, of["r"])}
    layer = draw.bias({"W": draw(count, m, n)} | storage, count, m)
    index = np.array([2, 0, 2, 0, 2, 0]) % count
    return layer, of | factors, draw(len(index), n), index


def _attention(draw: Draw, out: bool = False) -> Drawn:
    """q, k and v in one weight, adapted, and the output's beside, adapted too with ``out``."""
    draw.axes("variant", ("lora",))
    d, heads = 6, 2
    layer = draw.bias({"W": draw(3 * d, d), "heads": heads}, 3 * d)
    layer["out"] = {"W": draw(d, d)} | ({"bias": draw(d)} if "bias" in layer else {})
    of = draw.rank()
    of |= {"A": draw(of["r"], d), "B": draw(3 * d, of["r"])}
    if out:
        of["out"] = {"A": draw(of["r"], d), "B": draw(d, of["r"])}
    return layer, of, draw(2, 5, d), None


def _encoder(draw: Draw) -> Drawn:
    """A layer of an encoder, of which `linear1` is adapted."""
    draw.axes("variant", VARIANTS)
    d, wide, heads = 6, 10, 2
    sizes = dict(zip(FROZEN, ((d, d), (d, wide), (d,), (d,)), strict=True))
    weights: Entries = {f"{path}.weight": draw(*size) for path, size in sizes.items()}
    weights |= {f"{path}.bias": draw(d) for path in sizes}
    weights |= {f"self_attn.in_proj_{part}": draw(*size) for part, size in
                (("weight", (3 * d, d)), ("bias", (3 * d,)))}  # fmt: skip
    layer: Entries = {"W": draw(wide, d), "bias": draw(wide), "heads": heads, "weights": weights}
    return (*_with_variant(draw, layer, _factors(draw, d, wide)), draw(2, 5, d), None)


MODES = ("reflect", "replicate", "circular")

KINDS: dict[str, tuple[str, Callable[[Draw], Drawn]]] = {
    "linear": ("linear", _linear),
    "conv": ("conv", _conv),
    "conv.padding-mode": ("conv", partial(_conv, modes=MODES)),
    "conv.dilation": ("conv", partial(_conv, dilated=True)),
    "conv.pointwise": ("conv", partial(_conv, pointwise=True)),
    "conv.groups": ("conv", partial(_conv, grouped=True, variants=("lora", "lora-bias"))),
    "conv.groups-dora": ("conv", partial(_conv, grouped=True, variants=("dora",))),
    "conv.all": ("conv", partial(_conv, modes=(*MODES, "zeros"), dilated=True, grouped=True)),
    "embedding": ("embedding", _embedding),
    "embedding.max-norm": ("embedding", _max_norm),
    "fused": ("fused", _fused),
    "experts": ("experts", _experts),
    "experts.single": ("experts", partial(_experts, count=1)),
    "attention": ("attention", _attention),
    "attention.out": ("attention", partial(_attention, out=True)),
    "encoder": ("encoder", _encoder),
}
"""What a check asks of: the kind of the layer, and how it is drawn."""


def draw_module(case: Case, name: str, groups_as: str) -> ModuleInputs:
    """The inputs of a case. ``groups_as`` is the convention ``conv_groups``."""
    kind, drawn_by = KINDS[name]
    axes = Axes(case)
    draw = Draw(case, kind, axes, groups_as)
    dtype = DTYPES[case.dtype]

    def stored(array: Array) -> Array:
        return array.astype(dtype)

    while True:
        layer, adapter, x, index = drawn_by(draw)
        inputs = ModuleInputs(
            kind,
            {"kind": kind} | each_array(layer, stored),
            each_array(adapter, stored),
            x if x.dtype.kind == "i" else stored(x),
            np.zeros(0),
            index,
            tuple(_words(axes.chosen)),
        )
        y = answers(inputs.module(wide))["y"]
        inputs = replace(inputs, dy=stored(draw(*y.shape)))
        if kind in ROUNDED or (_has_effect(inputs) and greatest_sum(inputs) <= draw.limit):
            return inputs
        draw.sparser()


IN_WORDS: dict[str, Callable[[Any], str]] = {
    "fan_in_fan_out": lambda across: f"W is stored {'(in, out)' if across else '(out, in)'}",
    "square": lambda square: f"W is {'' if square else 'not '}square",
    "bias": lambda bias: f"there is {'a' if bias else 'no'} bias",
    "use_rslora": lambda rslora: f"the scale is alpha/{'√r' if rslora else 'r'}",
}
"""What some settings mean."""


def _words(chosen: Mapping[str, Any]) -> Iterator[str]:
    """What was chosen, in words."""
    for setting, value in chosen.items():
        if setting == PAIRS:
            yield IN_WORDS["square"](len({*value[0]}) == 1)
            yield IN_WORDS["fan_in_fan_out"](value[1])
        else:
            of = IN_WORDS.get(setting)
            yield of(value) if of else f"{setting} is {value}"


def wide(array: Array) -> Array:
    """In float64, which has all these whole numbers."""
    return array.astype(np.float64)


def _has_effect(inputs: ModuleInputs) -> bool:
    """Whether the adapter is not 0, nor what reaches it."""
    return bool(inputs.adapter["A"].any() and inputs.adapter["B"].any() and inputs.dy.any())


def greatest_sum(inputs: ModuleInputs) -> float:
    """The greatest sum of absolute terms in any array that a computation of the layer may form.

    In units of the least fraction that there is of a whole number, as by a scale below 1.
    """
    adapter = {k: v for k, v in inputs.adapter.items() if k not in ("magnitude", "use_dora")}
    adapter["alpha"] = abs(adapter["alpha"])
    plain = replace(inputs, adapter=adapter)

    def absolute(array: Array) -> Array:
        return np.abs(array.astype(np.float64))

    module, dy = plain.module(absolute), absolute(inputs.dy)
    # With B, or A, in the place of a unit matrix the output is u, and dx is du.
    bare = replace(plain, layer=each_array(plain.layer, np.zeros_like))
    u = bare.with_adapter(B=_unit(adapter["B"])).module(absolute)
    du = bare.with_adapter(A=_unit(adapter["A"])).module(absolute)
    sums = [answers(module, dy), merged(module), answers(u), answers(du, dy)]
    names = [("dA", "dB", "y", "dx"), ("W", "bias"), ("y",), ("dx",)]
    greatest = max(
        float(np.max(array))
        for each, some in zip(sums, names, strict=True)
        for name, array in each.items()
        if name in some
    )
    least = min(1.0, module.s) * min(1.0, inputs.layer.get("embed_scale", 1.0))
    return greatest * _rescaled(inputs) / float(least)


def _rescaled(inputs: ModuleInputs) -> float:
    """What DoRA multiplies sums by at most, and what fractions of a whole number it makes.

    Rows of V are multiplied by g = m / ‖V‖, and by V / ‖V‖ twice where gradients go through ‖V‖.
    """
    if "magnitude" not in inputs.adapter:
        return 1.0
    adapter = {k: v for k, v in inputs.adapter.items() if k not in ("magnitude", "use_dora")}
    V = merged(replace(inputs, adapter=adapter).module(wide))["W"]
    rows = V.T if inputs.kind == "embedding" else V.reshape(len(V), -1)
    norms = np.sqrt((rows * rows).sum(1))
    g = np.abs(wide(inputs.adapter["magnitude"])) / norms
    least = float(np.abs(rows / norms[:, None])[rows != 0].min())
    return float(max(1.0, g.max()) / min(1.0, g.min()) / least**2)


def _unit(factor: Array) -> Array:
    """Ones on the diagonal of its last two axes."""
    return np.broadcast_to(np.eye(*factor.shape[-2:]), factor.shape)
