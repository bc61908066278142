"""State dicts of loralib, the code of Hu et al.: ``<path>.lora_A`` and ``<path>.lora_B``.

They are read, and not written. A pickle can run code and is left to PyTorch: give the arrays, or a
safetensors file of them. A state dict has neither the scale nor ``enable_lora``: pass them.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minilora.io.architectures import architecture_of, tensor_names
from minilora.io.errors import FormatError, listed
from minilora.io.files import NOT_FINITE, check_finite, read_tensors, to_dtype
from minilora.io.formats.format import AdapterWeights, Format
from minilora.io.formats.tensors import drop_tied_head, to_internal
from minilora.spec.layers import fuse
from minilora.spec.lora import LORA, Params, TrainableSpec, Weights, merge, scale
from minilora.spec.models import Config
from minilora.spec.ops import Array

ENDS = ("lora_A", "lora_B")
"""The ends of the factors' names after the module's path."""

SOURCE = "state dict"
"""The source in error messages, where there is no file."""


def merged_linear_factors(
    A: Array, B: Array, m: int, enabled: Sequence[bool]
) -> tuple[Array, Array]:
    """A, B of a MergedLinear as one LoRA: B's blocks on the rows of the parts that are enabled.

    The weight has m rows in len(enabled) parts of one size; the k enabled ones have factors, and
    the rows of the others are 0. s = alpha / r, r that of one part.

    Shapes: A (r*k, n), B (m/parts*k, r) -> A (r*k, n), B (m, r*k).
    Errors: ValueError if the factors are not of that shape.
    """
    k, r = sum(map(bool, enabled)), B.shape[1]
    rows = m // max(len(enabled), 1)
    if not k or m % len(enabled) or A.shape[0] != r * k or B.shape[0] != rows * k:
        raise ValueError(
            f"A {A.shape}, B {B.shape} for {m} rows in {len(enabled)} parts, {k} of them enabled"
        )
    _, blocks = fuse([(A[r * i : r * (i + 1)], B[rows * i : rows * (i + 1)]) for i in range(k)])
    all_rows = np.zeros((m, r * k), B.dtype)
    all_rows[np.repeat(np.asarray(enabled, bool), rows)] = blocks
    return A, all_rows


def conv_factors(A: Array, B: Array, kernel: int, groups: int = 1) -> tuple[Array, Array]:
    """A', B' with s B' A' the change of the Conv2d's weight as a matrix over patches, exactly.

    loralib reshapes the product: k/g rows of B A, one after another, are an output channel's. So
    B' has that many rows of B side by side and A' has A as often on its diagonal: the rank is
    r k²/g. s = alpha / r.

    Shapes: A (r*k, c*k), B (m/groups*k, r*k) -> A' (r*k*k/groups, c/groups*k*k), B' (m, r*k*k/g).
    Errors: ValueError if the kernel's size is no multiple of the groups: a row is then split
    between channels, and no such B' exists; merge with loralib.
    """
    if kernel % groups:
        raise ValueError(f"kernel {kernel}, groups {groups}: expected a multiple; merge instead")
    q = kernel // groups
    if len(B) % q:
        raise ValueError(f"B {B.shape}: expected a multiple of {q} rows")
    stretched = np.zeros((q, A.shape[0], q, A.shape[1]), A.dtype)
    stretched[np.arange(q), :, np.arange(q)] = A
    return stretched.reshape(q * A.shape[0], -1), B.reshape(len(B) // q, -1)


def _read(source: Path | str | Mapping[str, Array], ignore: str | None) -> tuple[Path, Weights]:
    if isinstance(source, Mapping):
        path, tensors = Path(SOURCE), {}
        for name, array in source.items():
            if ignore and re.search(ignore, name):
                continue
            if not isinstance(array, np.ndarray):
                remedy = "give tensor.numpy(), float32 where it is bfloat16"
                raise FormatError(path, name, type(array).__name__, "a NumPy array", remedy)
            tensors[name] = check_finite(path, name, array, NOT_FINITE)
        return path, tensors
    path = Path(source)
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:
        start = b""  # read_tensors reports the error
    if start.startswith((b"PK\x03\x04", b"\x80")) and path.suffix != ".safetensors":
        remedy = "it can run code: torch.load(…, weights_only=True) it, and give the arrays"
        raise FormatError(path, "file", "a pickle", "a safetensors file, or arrays", remedy)
    return path, read_tensors(path, ignore)


def read_adapter(
    source: Path | str | Mapping[str, Array],
    c: Config,
    *,
    alpha: Any = None,
    enabled: Sequence[bool] | None = None,
    base: Weights | None = None,
    dtype: Any = None,
) -> tuple[Weights, TrainableSpec]:
    """The adapter's arrays under internal names, in ``dtype`` or their own, and its
    `TrainableSpec`.

    ``alpha`` is lora_alpha, and ``enabled`` the MergedLinears' enable_lora, needed where a part is
    left out. Biases come as trained. A whole model's state dict is read beside the ``base`` only:
    saved in eval mode its weights are merged, and nothing but the base tells. What differs from the
    base beside the adapted weights comes as trained.

    Errors: FormatError as `files.read_tensors` and
    `tensors.to_internal` have it; without alpha; for a pickle; for a name
    that is no parameter's, a factor alone or of another shape; for an adapted weight that is not
    the base's.
    """
    a = architecture_of(c)
    path, tensors = _read(source, a.buffers)
    if alpha is None:
        remedy = "give the lora_alpha of the training: no file of loralib's has it"
        raise FormatError(path, "alpha", "none", "a number", remedy)
    factors: Weights = {}
    s = {}
    for at, module_path in a.paths(c).items():
        names = [f"{module_path}.lora_A", f"{module_path}.lora_B"]
        if not tensors.keys() & set(names):
            continue
        A, B, r = _factors(path, c, at, names, tensors, enabled)
        s[at] = scale(alpha, r)
        for part, array, name in (("A", A, names[0]), ("B", B, names[1])):
            factors[f"{at}.{part}"] = to_dtype(path, name, array, dtype)
    if not factors:
        found, expected = listed(tensors) or "none", "<path>.lora_A and <path>.lora_B"
        raise FormatError(path, "tensors", found, expected, "is it loralib's?")
    tuning = TrainableSpec(s, trained=frozenset(factors))
    beside = _trained_beside(path, c, tensors, factors, tuning, base, dtype)
    return factors | beside, TrainableSpec(s, trained=frozenset(factors) | beside.keys())


def _factors(
    path: Path,
    c: Config,
    at: str,
    names: list[str],
    tensors: Weights,
    enabled: Sequence[bool] | None,
) -> tuple[Array, Array, int]:
    """A and B of the module, taken out of ``tensors``, and the rank that alpha is divided by."""
    for name in names:
        if name not in tensors or tensors[name].ndim != 2:
            found = f"shape {tensors[name].shape}" if name in tensors else "none"
            raise FormatError(path, name, found, "both factors, matrices", "save it again")
    A, B = (tensors.pop(name) for name in names)
    m, n = c.matrices()[at]
    r = B.shape[1]
    if A.shape == (r, n) and B.shape == (m, r):
        return A, B, r
    parts = [True] * (len(A) // r) if len(B) == m else enabled
    shapes = f"shapes {A.shape} and {B.shape}"
    if parts is None and A.shape[1] == n and len(A) % r == 0:
        remedy = "give enabled, the enable_lora of its MergedLinear: it is in no file"
        raise FormatError(path, names[0], shapes, "all parts of the weight", remedy)
    try:
        if A.shape[1] != n:
            raise ValueError(f"{A.shape[1]} columns")
        return *merged_linear_factors(A, B, m, parts or ()), r
    except ValueError as error:
        expected = f"(r, {n}) and ({m}, r), or a MergedLinear's; {error}"
        remedy = "is it another model's, or a convolution's?"
        raise FormatError(path, names[0], shapes, expected, remedy) from None


def _trained_beside(
    path: Path,
    c: Config,
    tensors: Weights,
    factors: Weights,
    tuning: TrainableSpec,
    base: Weights | None,
    dtype: Any,
) -> Weights:
    """What the state dict holds beside the factors and is no copy of the base's."""
    names = tensor_names(c)
    drop_tied_head(dict.fromkeys(tensors, path), tensors, names, architecture_of(c))
    stored = {name: place for name, place in names.items() if place[0] in tensors}
    W = to_internal(path, tensors, stored, c.shapes(), dtype)
    if base is None:
        if weights := [name for name in W if not name.endswith(".bias")]:
            remedy = (
                "saved in eval mode it is merged, which nothing in it tells: give base, the weights"
                " before training, or take lora.lora_state_dict(model)"
            )
            found = listed(stored[name][0] for name in weights)
            raise FormatError(path, "tensors", found, "factors and biases only", remedy)
        return W
    if missing := [name for name in W if name not in base]:
        found, remedy = f"no {listed(missing)}", "give them all"
        raise FormatError(path, "base", found, "all of the weights", remedy)
    changed = {name: w for name, w in W.items() if not np.array_equal(w, base[name])}
    adapted = [name for name in changed if f"{name.removesuffix('.weight')}.A" in factors]
    if adapted:
        remedy = "it was saved in eval mode, or has another base: model.train() before saving"
        field = listed(stored[name][0] for name in adapted)
        found = "other weights than the base's"
        if _nearer_merged({name: W[name] for name in adapted}, base, factors, tuning):
            found += ", near the merged ones"
        raise FormatError(path, field, found, "W", remedy)
    return changed


def _nearer_merged(W: Weights, base: Weights, factors: Weights, tuning: TrainableSpec) -> bool:
    """Whether these weights are nearer to the merged ones than to the base's."""
    merged = merge({**base, **factors}, tuning)
    off_base = max(_distance(w, base[name]) for name, w in W.items())
    return max(_distance(w, merged[name]) for name, w in W.items()) < off_base


def _distance(x: Array, y: Array) -> float:
    return float(np.max(np.abs(np.asarray(x, float) - np.asarray(y, float))))


def _read_adapter(path: Path, c: Config, dtype: Any, base: Params) -> AdapterWeights:
    return AdapterWeights(*read_adapter(path, c, base={**base}, dtype=dtype))


FORMAT = Format(name="loralib", library="loralib", read_adapter=_read_adapter, variants=(LORA,))
"""Not recognised by a file: none has the scale, which :func:`read_adapter` has to be given."""
