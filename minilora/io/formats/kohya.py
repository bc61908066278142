"""Adapters in one file as kohya's sd-scripts and LyCORIS write them: ``lora_down``, ``lora_up``.

A tensor's name is a prefix and the module's path with underscores for its dots, then a dot and the
parameter. A name is resolved by the model's modules, which have the dots. The
scale is ``alpha`` divided by the rank of the tensor, module by module.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minilora.io.architectures import architecture_of
from minilora.io.atomic import write_tensors
from minilora.io.errors import FormatError, listed
from minilora.io.files import read_tensors, to_dtype
from minilora.io.formats.factors import check_factors, parameter_shapes
from minilora.io.formats.format import AdapterWeights, Base, Format
from minilora.io.formats.tensors import to_internal
from minilora.spec.lora import LORA, TABLES, Params, TrainableSpec, Weights, scale
from minilora.spec.models import Config
from minilora.spec.ops import Array
from minilora.spec.variants import DORA_FULL

PREFIX = "lycoris"
"""LyCORIS's prefix of names; sd-scripts use lora_unet, and lora_te for text encoders."""

VARIANTS = (LORA, DORA_FULL)
"""What LyCORIS computes; its DoRA differentiates the norm."""

PARTS = {"A": "lora_down.weight", "B": "lora_up.weight", "magnitude": "dora_scale"}
"""Each parameter's name in the file, after the module's."""


def underscored(paths: Mapping[str, str]) -> dict[str, list[str]]:
    """Each path with underscores for its dots -> the internal names that it may stand for."""
    names: dict[str, list[str]] = {}
    for at, path in paths.items():
        names.setdefault(path.replace(".", "_"), []).append(at)
    return names


def matrices(down: Array, up: Array) -> tuple[Array, Array]:
    """A, B of a convolution's factors: kernels as matrices over patches.

    Shapes: down (r, c, …), up (m, r, 1, …) -> A (r, c*kernel), B (m, r).
    Errors: ValueError if ``up`` is no kernel of a single place over down's channels.
    """
    if up.shape[1:] != (len(down), *(1,) * (down.ndim - 2)):
        raise ValueError(f"up {up.shape} beside down {down.shape}: expected (m, r, 1, …)")
    return down.reshape(len(down), -1), up.reshape(len(up), -1)


def kernels(A: Array, B: Array, kernel: Sequence[int]) -> tuple[Array, Array]:
    """The factors of a convolution whose A and B act on patches: what :func:`matrices` undoes.

    Shapes: A (r, c*kernel), B (m, r) -> down (r, c, …), up (m, r, 1, …).
    """
    return A.reshape(len(A), -1, *kernel), B.reshape(*B.shape, *(1,) * len(kernel))


def _names(c: Config) -> dict[str, list[str]]:
    return underscored(architecture_of(c).paths(c))


def _module(path: Path, c: Config, key: str, prefix: str) -> str:
    """The module that the file's name is of."""
    name = key.partition(".")[0]
    if not name.startswith(f"{prefix}_"):
        remedy = "give the file's own prefix"
        raise FormatError(path, key, f"no prefix {prefix}", f"names from {prefix}_ on", remedy)
    known = _names(c)
    modules = known.get(name.removeprefix(f"{prefix}_"), [])
    if len(modules) != 1:
        found = f"a name of {' and '.join(modules)}" if modules else "no module's name"
        expected = f"the name of one, like {listed(known, 2)}"
        raise FormatError(path, key, found, expected, "is it another model's, or prefix?")
    [at] = modules
    if at in TABLES or at not in c.matrices():
        remedy = "sd-scripts and LyCORIS adapt projections and convolutions only"
        raise FormatError(path, key, f"an adapter of {at}", "a projection's", remedy)
    return at


def read_adapter(
    path: Path | str, c: Config, *, prefix: str = PREFIX, dtype: Any = None
) -> tuple[Weights, TrainableSpec]:
    """The adapter's arrays under internal names, in ``dtype`` or the file's, and its
    `TrainableSpec`.

    An alpha that is absent or 0 counts as the rank: s = 1. With ``dora_scale`` (m, 1) the adapter
    is DoRA with its norm differentiated, as LyCORIS trains it.

    Errors: FormatError as `files.read_tensors` has it; for a name that is no
    module's, or several modules'; for parts that compute another function (``lora_mid`` of Tucker's
    decomposition, ``hada_…``, ``lokr_…``, ``diff``, …); for a ``dora_scale`` over the columns.
    """
    path = Path(path)
    tensors = read_tensors(path)
    modules = _parts(path, c, tensors, prefix)
    names: dict[str, tuple[str, bool]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    s, variants = {}, {}
    for at, keys in modules.items():
        module_name = next(iter(keys.values())).partition(".")[0]
        variant = DORA_FULL if PARTS["magnitude"] in keys else LORA
        down = tensors.get(keys.get(PARTS["A"], ""))
        r = 1 if down is None else len(down) if down.ndim else 0
        shapes |= parameter_shapes(c, at, r, variant)
        names |= {f"{at}.{part}": (f"{module_name}.{PARTS[part]}", False) for part in variant.parts}
        s[at] = _scale(path, tensors, keys.get("alpha"), r)
        if variant != LORA:
            variants[at] = variant
            _check_magnitude(path, c, at, keys[PARTS["magnitude"]], tensors)
    W = to_internal(path, tensors, names, shapes, dtype)
    return W, TrainableSpec(s, {}, frozenset(W), variants)


def _parts(path: Path, c: Config, tensors: Weights, prefix: str) -> dict[str, dict[str, str]]:
    """The tensors' names by module and part.

    Errors: FormatError for a name of no module, another part, and a file without tensors.
    """
    modules: dict[str, dict[str, str]] = {}
    for key in tensors:
        part = key.partition(".")[2]
        at = _module(path, c, key, prefix)
        if part not in (*PARTS.values(), "alpha"):
            remedy = "it computes another function, which is not implemented here"
            if part == "lora_mid.weight":
                remedy = f"Tucker's decomposition: {remedy}"
            expected = f"one of {', '.join(PARTS.values())}, alpha"
            raise FormatError(path, key, f"the part {part!r}", expected, remedy)
        modules.setdefault(at, {})[part] = key
    if not modules:
        raise FormatError(path, "tensors", "none", "an adapter's", "is it the right file?")
    return modules


def _scale(path: Path, tensors: Weights, key: str | None, r: int) -> Any:
    """alpha / r, the alpha taken out of ``tensors``; without one, or with 0, it is r."""
    alpha = np.zeros(()) if key is None else tensors.pop(key)
    if alpha.size != 1:
        remedy = "write it as sd-scripts do"
        raise FormatError(path, str(key), f"shape {alpha.shape}", "one number", remedy)
    return scale(float(alpha.reshape(())) or r, max(r, 1))


def _check_magnitude(path: Path, c: Config, at: str, key: str, tensors: Weights) -> None:
    m, n = c.matrices()[at]
    if tensors[key].shape == (1, n) != (m, 1):
        remedy = "LyCORIS wrote it with wd_on_output off: norms of columns, not implemented here"
        raise FormatError(path, key, f"shape {(1, n)}", f"shape {(m, 1)}", remedy)


def write_adapter(
    path: Path | str,
    c: Config,
    W: Weights,
    tuning: TrainableSpec,
    *,
    prefix: str = PREFIX,
    dtype: Any = None,
) -> None:
    """Write the adapter of W, in ``dtype`` or its own, to the file ``path``.

    Alphas are float32, as both libraries read them. The same input gives the same bytes.

    Errors: FormatError for what the format cannot say: an adapter of an embedding; a scale that is
    not alpha / r of a float32 alpha, or 0, since an alpha of 0 is the rank; DoRA with the norm held
    constant, which LyCORIS differentiates; and as
    `factors.check_factors` has it.
    """
    path = Path(path)
    ranks = check_factors(path, c, W, tuning, VARIANTS)
    names = {at: name for name, modules in _names(c).items() for at in modules}
    tensors: Weights = {}
    for at, r in ranks.items():
        name, s = f"{prefix}_{names[at]}", tuning.scale[at]
        _module(path, c, name, prefix)
        with np.errstate(over="ignore"):
            alpha = np.asarray(float(s) * r, np.float32)
        if not alpha or float(s) != s or scale(float(alpha), r) != float(s):
            remedy = "put a factor into B, so that the rest is one"
            expected = f"not 0, and alpha / {r} of a float32 alpha"
            raise FormatError(path, f"scale of {at}", repr(s), expected, remedy)
        tensors[f"{name}.alpha"] = alpha
        for part in tuning.variant.get(at, LORA).parts:
            place = f"{name}.{PARTS[part]}"
            tensors[place] = to_dtype(path, place, W[f"{at}.{part}"], dtype)
    write_tensors(path, tensors, {"format": "pt"})


def _read(path: Path, c: Config, dtype: Any, base: Params) -> AdapterWeights:
    return AdapterWeights(*read_adapter(path, c, dtype=dtype))


def _write(path: Path, c: Config, adapter: AdapterWeights, base: Base) -> list[str]:
    write_adapter(path, c, adapter.weights, adapter.tuning)
    return []


FORMAT = Format(
    name="kohya",
    library="sd-scripts and LyCORIS",
    read_adapter=_read,
    write_adapter=_write,
    variants=VARIANTS,
    scaling="alpha / r: {scales}",
)
"""Not recognised by a file: any safetensors file may be one, and its prefix is the user's."""
