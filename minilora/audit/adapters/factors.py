"""One module's adapter as a file has it -> the changes of the base's tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from minilora.audit.adapters.experts import expert_changes
from minilora.audit.change import Change
from minilora.audit.result import Entry
from minilora.audit.stored.module import Held
from minilora.audit.tensors import StoredTensor, TensorStore
from minilora.io.architectures import ARCHITECTURES
from minilora.io.files import NOT_FINITE, check_finite
from minilora.io.header import Place
from minilora.io.lazy_weights import Expanded
from minilora.spec.initialization import INITIALIZATIONS
from minilora.spec.lora import LORA, Variant
from minilora.spec.ops import Array
from minilora.spec.variants import part_shapes

Read = Callable[[], Array]

_CONV1D = {a.model_type for a in ARCHITECTURES.values() if a.transposed} | {
    *("openai-gpt", "imagegpt", "decision_transformer")
}
"""The model types whose projections lie (in, out), as transformers' Conv1D has them."""


@dataclass(frozen=True)
class Factors:
    """One module's adapter.

    ``module``: its path in the base; ``parts``: the variant's parameters by name, each read when it
    is called; ``shapes``: theirs in the file; ``table``: A and B are of an embedding, whose weight
    is the transpose; ``start``: the initialization that took them out of the base's weight, and
    left it changed.
    """

    module: str
    parts: Mapping[str, Read]
    shapes: Mapping[str, tuple[int, ...]]
    scale: float
    variant: Variant = LORA
    table: bool = False
    start: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The rank of A."""
        return self.shapes["A"][0]


@dataclass
class Found:
    """What a file holds: factors, whole tensors and rows, and what is to be said of it.

    ``replaced``: tensors that came with the adapter in place of the base's, as a resized table
    does, or beside them, as a classifier's head.
    """

    settings: Mapping[str, Any]
    replaced: list[StoredTensor] = field(default_factory=list)
    factors: list[Factors] = field(default_factory=list)
    whole: list[Change] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)


def reader(place: Place) -> Any:
    """What reads a small tensor whole.

    Errors, when it is called: FormatError if an entry is not finite.
    """

    def read_whole() -> Array:
        array = place.rows(0, place.shape[0] if place.shape else 1).reshape(place.shape)
        return check_finite(place.path, place.name, array, NOT_FINITE)

    return read_whole


def checked(path: Path, held: Held) -> Read:
    """What reads a tensor of an opened adapter whole.

    Errors, when it is called: FormatError if an entry is not finite.
    """
    return lambda: check_finite(path, held.name, held.read(), NOT_FINITE)


def changes_of(factors: Factors, base: TensorStore, name: str) -> list[Change] | Entry:
    """What the adapter ``name`` changes of the module's tensors; an entry if nothing fits."""
    tensor = base.weight_of(factors.module)
    if tensor is None:
        found = expert_changes(factors, base, name) or _fused(factors, base, name)
        return found if found else _no_module(factors)
    shape = base[tensor].shape
    if len(shape) < 2 or (factors.table and len(shape) != 2):
        return _wrong(factors, f"{tensor} has the shape {shape}, which takes no such adapter")
    transposed = factors.table or lies_transposed(factors.module, _rows(factors), base, tensor)
    m, n = shape[0], math.prod(shape[1:])
    if transposed:
        m, n = n, m
    parts = _flat_parts(factors, m, n)
    if isinstance(parts, str):
        text = (
            _GROUPED if _is_grouped(factors, shape) else f"{parts}; {tensor} has the shape {shape}"
        )
        return _wrong(factors, text)
    kind = "embedding" if factors.table else "conv" if len(shape) > 2 else "linear"
    change = Change(
        tensor, factors.module, parts, kind, factors.variant, float(factors.scale),
        transposed=transposed, adapter=name, config=factors.config,
    )  # fmt: skip
    start = [_start(factors, change, base)] if factors.start and not factors.table else []
    return [*start, *with_bias(change)]


_FUSED = {
    "q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 2), "v_proj": ("qkv_proj", 1),
    "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1),
}  # fmt: skip
"""The fused projection that a module is a part of, and how many parts of its length before the end
of the rows it begins; 0: at the first row."""


def _fused(factors: Factors, base: TensorStore, name: str) -> list[Change]:
    """The change of some rows of a fused projection, whose parts the adapter has one by one."""
    above, _, own = factors.module.rpartition(".")
    whole, back = _FUSED.get(own, ("", 0))
    tensor = base.weight_of(f"{above}.{whole}") if whole and factors.variant is LORA else None
    if tensor is None or len(base[tensor].shape) != 2:
        return []
    rows, (m, n) = _rows(factors), base[tensor].shape
    parts = _flat_parts(factors, rows, n)
    if isinstance(parts, str) or rows * max(back, 1) > m:
        return []
    first = m - back * rows if back else 0
    return [
        Change(
            tensor, factors.module, parts, "linear", LORA, float(factors.scale),
            rows=(first, first + rows), adapter=name, config=factors.config,
        )
    ]  # fmt: skip


_GROUPED = (
    "its convolution has groups, and the adapter's A takes the channels of all: no kernel of the "
    "base's shape holds that change (PEFT refuses to merge it)"
)


def _is_grouped(factors: Factors, shape: tuple[int, ...]) -> bool:
    """Whether the weight is of a convolution with groups, and A and B are PEFT's for it."""
    A, B = factors.shapes.get("A", ()), factors.shapes.get("B", ())
    if len(shape) < 3 or len(A) != len(shape) or len(B) != len(shape) or not B[1] or A[0] % B[1]:
        return False
    return A[0] // B[1] > 1 and A[1] == A[0] // B[1] * shape[1]


def with_bias(change: Change) -> list[Change]:
    """The change of the weight, and that of the bias where the variant has one."""
    if "c" not in change.variant.parts:
        return [change]
    bias = change.tensor.removesuffix("weight") + "bias"
    entries: dict[str, Any] = {part: _reader(change.parts, part) for part in ("A", "B")}
    weight = replace(change, variant=LORA, parts=Expanded(entries))
    parts = Expanded({"c": _reader(change.parts, "c")})
    return [weight, replace(change, tensor=bias, kind="bias", parts=parts, transposed=False)]


def _start(factors: Factors, change: Change, base: TensorStore) -> Change:
    """What the start took out of the base's weight, and so has to be taken out again: -s B₀ A₀.

    PEFT finds it by an SVD or a QR in float32, whenever it loads the adapter. An SVD misses the
    part of the r greatest singular values by ‖E‖ (1 + 4 σ_r / (σ_r - σ_r+1)), where ‖E‖ is its own
    error: √n u σ₁ where roundings are independent of each other, as the slack has it; n u σ₁ in the
    worst case (`with_most_slack`): what lies between the two cannot be decided.
    Source: Higham, "Accuracy and Stability of Numerical Algorithms", section 2.8; Wedin 1972.
    """
    stored = base[change.tensor]
    W = stored.rows(0, stored.length).reshape(stored.length, -1).astype(np.float64)
    W = W.T if change.transposed else W
    first = INITIALIZATIONS[factors.start].start
    _, A, B = first(np.random.default_rng(0), W, factors.rank, change.scale)
    σ = np.linalg.svd(W, compute_uv=False)
    r = factors.rank
    gap = σ[r - 1] - (σ[r] if r < len(σ) else 0.0)
    off = np.sqrt(max(W.shape)) * 2.0**-24 * σ[0]
    slack = float(off * (1 + 4 * σ[r - 1] / max(gap, off)))
    parts = Expanded({"A": A, "B": B})
    return replace(change, variant=LORA, parts=parts, scale=-change.scale, slack=slack)


def with_most_slack(changes: Sequence[Change]) -> list[Change]:
    """The changes, of which a start may be off by all that its roundings can do together."""
    return [
        replace(c, slack=c.slack * math.sqrt(max(len(c.parts["B"]), np.shape(c.parts["A"])[1])))
        if c.slack
        else c
        for c in changes
    ]


def _reader(parts: Mapping[str, Array], name: str) -> Read:
    return lambda: parts[name]


def _rows(factors: Factors) -> int:
    """m of the matrix: B's rows."""
    return factors.shapes["B"][0]


def _flat_parts(factors: Factors, m: int, n: int) -> Expanded | str:
    """The parts as the equation takes them; what does not fit, in words."""
    r = factors.rank
    wanted = part_shapes(factors.variant, r, m, n)
    if wanted.keys() != factors.shapes.keys():
        return f"found {', '.join(factors.shapes)}, expected {', '.join(wanted)}"
    entries: dict[str, Any] = {}
    for part, shape in wanted.items():
        stored = factors.shapes[part]
        fits = stored[:1] == shape[:1] or part not in ("A", "B")
        if math.prod(stored) != math.prod(shape) or not fits:
            return f"{part} has the shape {stored}, expected {shape} at rank {r}"
        entries[part] = shaped(factors.parts[part], shape)
    return Expanded(entries)


def shaped(read: Read, shape: tuple[int, ...]) -> Read:
    """What reads the array in another shape."""
    return lambda: read().reshape(shape)


def lies_transposed(module: str, rows: int, base: TensorStore, tensor: str) -> bool:
    """Whether a weight of so many rows lies (in, out): by its shape, or if square by the model."""
    shape = base[tensor].shape
    if len(shape) != 2:
        return False
    if shape[0] != shape[1]:
        return bool(shape[1] == rows)
    return base.settings.get("model_type") in _CONV1D and not module.endswith("lm_head")


def _no_module(factors: Factors) -> Entry:
    text = f"the base has no {factors.module}.weight: this part of the adapter is applied nowhere"
    return Entry(factors.module, "wrong", text, {"module": factors.module})


def _wrong(factors: Factors, text: str) -> Entry:
    text = f"it does not fit the base: {text}"
    return Entry(factors.module, "wrong", text, {"module": factors.module})
