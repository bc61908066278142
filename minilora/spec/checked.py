"""The public entry to the equations: it checks the arguments by name, and then calls them.

The equations themselves take what they are given: they read as on paper, run on any number system,
and cost no check in a training step. ``from minilora import logits`` is the checked one,
``from minilora.spec.models import logits`` the equation alone.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import wraps
from typing import Any

import numpy as np

from minilora.spec import lora, models
from minilora.spec.lora import LORA, TIE, Merged, Params, TrainableSpec, Weights, weight_of
from minilora.spec.models import Batch, Config, Kernels
from minilora.spec.ops import Array, Back

_EQUATIONS = Kernels()
"""Nothing replaced."""

_Axis = tuple[str, int | None, str]
"""A letter, its size if that is known, and where the size is from."""


def _check_array(name: str, x: Any, *axes: _Axis, hint: str = "is it transposed?") -> None:
    """Errors: ValueError unless x is an array of these axes; ``hint`` if its axes are swapped."""
    if not hasattr(x, "shape"):
        kind = type(x).__name__
        raise ValueError(f"{name} is a {kind}: expected an array; use np.array({name})")
    sizes = [n for _, n, _ in axes]

    def fits(shape: tuple[int, ...]) -> bool:
        pairs = zip(shape, sizes, strict=False)
        return len(shape) == len(sizes) and all(n in (None, size) for size, n in pairs)

    if fits(x.shape):
        return
    letters = ", ".join(letter for letter, _, _ in axes)
    letters = f"({letters},)" if len(axes) == 1 else f"({letters})"
    known = [f"{letter} = {n} as in {of}" for letter, n, of in axes if n is not None and of]
    text = f"{name} is {x.shape}: expected {letters}"
    text += f" with {' and '.join(known)}" if known else ""
    swapped = len(x.shape) == 2 and fits(x.shape[::-1])
    raise ValueError(text + (f"; {hint}" if swapped else ""))


def _check_dtypes(arrays: Mapping[str, Any]) -> None:
    """Errors: ValueError for floating-point numbers of several widths, of which NumPy takes one."""
    first: dict[Any, str] = {}
    for name, x in arrays.items():
        dtype = getattr(x, "dtype", None)
        # A complex number's parts: a derivative by a complex step is taken at real weights.
        if dtype is not None and dtype.kind in "fcV":
            first.setdefault(np.empty(0, dtype).real.dtype, name)
    if len(first) > 1:
        (one, a), (other, b), *_ = first.items()
        raise ValueError(
            f"{a} is {one} and {b} {other}: expected one dtype; use {b}.astype({a}.dtype)"
        )


def _check_scale(name: str, s: Any) -> None:
    if isinstance(s, str | bytes) or s is None:
        raise ValueError(f"{name} is {s!r}: expected a number, such as alpha / r")
    if np.ndim(s):
        raise ValueError(f"{name} is {np.shape(s)}: expected a number, such as alpha / r")


@wraps(lora.lora_linear)
def lora_linear(  # noqa: D103 - the equation's
    x: Array, W: Array, b: Array | None, A: Array, B: Array, s: Any, K: Array | None = None
) -> tuple[Array, Back]:
    _check_array("W", W, ("m", None, ""), ("n", None, ""))
    m, n = W.shape
    rows = "are tokens in rows?"
    _check_array("x", x, ("n", n, "W"), ("tokens", None, ""), hint=rows)
    if b is not None:
        _check_array("b", b, ("m", m, "W"), ("1", 1, ""))
    _check_factors(A, B, (m, n))
    if K is not None:
        _check_array("K", K, ("n", n, "x"), ("tokens", x.shape[1], "x"), hint=rows)
    _check_scale("s", s)
    _check_dtypes({"W": W, "x": x, "b": b, "A": A, "B": B})
    return lora.lora_linear(x, W, b, A, B, s, K)


def _check_factors(A: Array, B: Array, shape: tuple[int, ...], at: str = "", of: str = "W") -> None:
    m, n = shape
    _check_array(f"{at}A", A, ("r", None, ""), ("n", n, of))
    _check_array(f"{at}B", B, ("m", m, of), ("r", A.shape[0], f"{at}A"))


@wraps(lora.project)
def project(  # noqa: D103 - the equation's
    x: Array, at: str, W: Params, tuning: TrainableSpec
) -> tuple[Array, Back]:
    weight = weight_of(at, W)
    if weight not in W:
        raise ValueError(f"{weight} is missing in W{_meant(weight, W)}")
    w = W[weight]
    _check_array(weight, w, ("m", None, ""), ("n", None, ""))
    rows = "are tokens in rows?"
    _check_array("x", x, ("n", w.shape[1], weight), ("tokens", None, ""), hint=rows)
    _check_adapter(at, W, tuning, w.shape)
    _check_dtypes({weight: w, "x": x})
    return lora.project(x, at, W, tuning)


def _meant(name: str, names: Iterable[str]) -> str:
    close = get_close_matches(name, names, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _check_adapter(at: str, W: Params, tuning: TrainableSpec, shape: tuple[int, ...]) -> None:
    """Errors: ValueError for an adapter without its scale or a part, or one that does not fit."""
    variant = tuning.variant.get(at, LORA)
    names = [f"{at}.{part}" for part in variant.parts]
    there = [name for name in names if name in W]
    if not there:
        return
    for name in names:
        if name not in W:
            raise ValueError(f"{name} is missing in W: found {', '.join(there)}")
    if at not in tuning.scale:
        raise ValueError(f"scale has no {at!r}: expected a number for it, as W has {there[0]}")
    _check_scale(f"scale[{at!r}]", tuning.scale[at])
    if variant == LORA:
        A, B = (W[name] for name in names)
        _check_factors(A, B, shape, at=f"{at}.", of="its weight")


@wraps(models.logits)
def logits(  # noqa: D103 - the equation's
    batch: Batch, W: Params, c: Config, tuning: TrainableSpec, kernels: Kernels = _EQUATIONS
) -> tuple[Array, Back]:
    _check_model(batch, W, c, tuning)
    return models.logits(batch, W, c, tuning, kernels)


@wraps(models.loss)
def loss(  # noqa: D103 - the equation's
    batch: Batch, W: Params, c: Config, tuning: TrainableSpec, count: int | None = None
) -> tuple[Array, Back]:
    _check_model(batch, W, c, tuning)
    if batch.labels is not None:
        b, t = batch.ids.shape
        rows: tuple[_Axis, ...] = (("b", b, "ids"), ("t", t, "ids"))
        _check_numbers("labels", batch.labels, *rows[: 2 if c.causal else 1])
    return models.loss(batch, W, c, tuning, count)


def _check_model(batch: Batch, W: Params, c: Config, tuning: TrainableSpec) -> None:
    check_config(c)
    _check_batch(batch)
    _check_weights(W, c, tuning)


def check_config(c: Config) -> None:
    """Errors: ValueError for sizes that no model has, such as heads that do not divide d."""
    sizes = ("vocab", "d", "layers", "heads", "ffn", *c.tables(), "kv_heads", "head_dim", "classes")
    for name in dict.fromkeys(sizes):
        n = getattr(c, name, 1)
        if not isinstance(n, int | np.integer) or n < (0 if name == "layers" else 1):
            raise ValueError(f"{name} is {n}: expected a whole number, at least 1")
    if isinstance(c, models.Llama):
        if c.heads % c.kv_heads:
            raise ValueError(
                f"heads is {c.heads} and kv_heads {c.kv_heads}: expected a multiple, as each "
                "key/value head serves as many query heads"
            )
        if c.head_dim % 2:
            raise ValueError(f"head_dim is {c.head_dim}: expected an even number, as RoPE pairs")
    elif c.d % c.heads:
        raise ValueError(f"d is {c.d} and heads {c.heads}: expected a multiple")


def _check_numbers(name: str, x: Any, *axes: _Axis) -> None:
    _check_array(name, x, *axes)
    if x.dtype.kind not in "iu":
        raise ValueError(f"{name} are {x.dtype}: expected whole numbers; use {name}.astype(int)")


def _check_batch(batch: Batch) -> None:
    """Errors: ValueError for ids, a mask, positions or types of other shapes or numbers."""
    ids = batch.ids
    if getattr(ids, "ndim", 2) == 1:
        raise ValueError(f"ids is {ids.shape}: expected (b, t); use ids[None] for one sequence")
    _check_numbers("ids", ids, ("b", None, ""), ("t", None, ""))
    if not ids.size:
        raise ValueError(f"ids is {ids.shape}: expected at least one token")
    b, t = ids.shape
    axes = ("b", b, "ids"), ("t", t, "ids")
    for name in ("positions", "types"):
        if (x := getattr(batch, name)) is not None:
            _check_numbers(name, x, *axes)
    if batch.mask is not None:
        _check_array("mask", batch.mask, *axes)
        empty = np.flatnonzero(~(np.asarray(batch.mask) != 0).any(1))
        if empty.size:
            raise ValueError(
                f"mask: row {empty[0]} is 0 everywhere; expected 1 for a token and 0 for padding"
            )


def _check_weights(W: Params, c: Config, tuning: TrainableSpec) -> None:
    """Errors: ValueError for a weight that is missing, unknown, or of another shape or dtype.

    The arrays of weights that are made on demand are not asked for.
    """
    shapes, matrices = c.shapes(), c.matrices()
    for name in shapes:
        at, _, part = name.rpartition(".")
        if name not in W and not (part == "weight" and at in TIE and weight_of(at, W) in W):
            raise ValueError(f"{name} is missing in W{_meant(name, W.keys() - shapes.keys())}")
    if not isinstance(W, dict):
        return
    _check_known(W, c, tuning)
    for name in [name for name in shapes if name in W]:
        m, n = shapes[name]
        _check_array(name, W[name], (str(m), m, ""), (str(n), n, ""))
    for at, shape in matrices.items():
        _check_adapter(at, W, tuning, shape)
    _check_dtypes({name: W[name] for name in W if name in shapes})
    if unknown := sorted(tuning.trained - W.keys()):
        raise ValueError(f"trained has {unknown[0]}, which W has not{_meant(unknown[0], W)}")


def _check_known(W: Params, c: Config, tuning: TrainableSpec) -> None:
    """Errors: ValueError for a weight that the model has not."""
    shapes, matrices = c.shapes(), c.matrices()
    parts = {f"{at}.{p}" for at in matrices for p in tuning.variant.get(at, LORA).parts}
    tied = {f"{at}.{part}" for at in TIE if at in matrices for part in ("weight", "bias")}
    known = shapes.keys() | parts | tied
    for name in W:
        if name not in known:
            raise ValueError(f"{name} is no weight of this model{_meant(name, known)}")


@wraps(lora.merge)
def merge(W: Weights, tuning: TrainableSpec) -> Merged:  # noqa: D103 - the equation's
    for at in lora.adapted_in(W):
        if (weight := weight_of(at, W)) not in W:
            raise ValueError(f"{weight} is missing in W, which has {at}.A")
        _check_array(weight, W[weight], ("m", None, ""), ("n", None, ""))
        shape = W[weight].shape
        _check_adapter(at, W, tuning, shape[::-1] if at in lora.TABLES else shape)
    return lora.merge(W, tuning)


def draw_weights(c: Config, rng: np.random.Generator, std: float = 0.02) -> Weights:
    """Fresh weights in float64: matrices N(0, std²), norms' weights 1, biases 0.

    Errors: those of `check_config`.
    """
    from minilora.spec.initialization import draw_weights  # which loads more

    check_config(c)
    if not hasattr(rng, "standard_normal"):
        kind = type(rng).__name__
        raise ValueError(
            f"rng is of type {kind}: expected a generator; use np.random.default_rng(0)"
        )
    return draw_weights(c, rng, std)
