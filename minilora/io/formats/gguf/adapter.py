"""LoRA adapters in GGUF files, as llama.cpp applies them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from minilora.io.architectures import architecture_of
from minilora.io.errors import FormatError, listed
from minilora.io.files import check_settings, to_dtype, to_narrow_dtype
from minilora.io.formats.factors import check_factors, parameter_shapes
from minilora.io.formats.gguf.blocks import Blocks, check_tensor
from minilora.io.formats.gguf.contents import Contents
from minilora.io.formats.gguf.names import READER, places, row_order
from minilora.io.formats.gguf.write import gguf_writer, write_tensors
from minilora.spec.lora import LORA, TABLES, Params, TrainableSpec, Weights, scale
from minilora.spec.models import Config
from minilora.spec.ops import Array
from minilora.spec.quantization import F32
from minilora.spec.target_modules import ties_head

ALPHA = "adapter.lora.alpha"

VARIANTS = (LORA,)
"""What llama.cpp applies."""

OWN_DTYPES = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""The types of an adapter's tensors that come back in their own dtype; all others in float32."""


def write_adapter(
    path: Path | str, c: Config, W: Params, tuning: TrainableSpec, *, dtype: Any = None
) -> dict[str, float]:
    """Write the adapter of W, in ``dtype`` or its own, to the file ``path``; the folded factors.

    The file has one alpha, float32, and llama.cpp takes s = alpha / r with each tensor's own r.
    rsLoRA's √r and single alphas have no place: where one alpha does not give a module's scale, B
    is multiplied by s r / alpha, rounded once, and the factor is in what is returned. The rows of a
    Llama's q and k are in llama.cpp's order in B too; the embedding's A lies transposed.

    Errors: FormatError for what llama.cpp cannot say or do: variants other than LoRA; what is
    trained beside factors; a tied head or its embedding, a table of positions; float64; and as
    `factors.check_factors` has it.
    """
    ranks = check_factors(path, c, W, tuning, VARIANTS)
    module_names = places(c)
    for at in ranks:
        if reason := not_applied(c, at):
            remedy = "leave it out, merge it, or keep PEFT's"
            expected = "an adapter that it applies"
            raise FormatError(path, f"adapter of {at}", reason, expected, remedy)
    alpha, folded = _alpha(path, ranks, tuning)
    tensors: dict[str, Array] = {}
    for at in ranks:
        A, B = W[f"{at}.A"], W[f"{at}.B"]
        if at in folded:
            B = (np.asarray(B, np.float64) * folded[at]).astype(B.dtype)
        order = row_order(c, at, len(B))
        B = B if order is None else B[order]
        for part, array in (("a", A.T if at in TABLES else A), ("b", B)):
            place = f"{module_names[at]}.weight.lora_{part}"
            tensors[place] = to_narrow_dtype(path, place, array, dtype, READER)
    with gguf_writer(path, architecture_of(c).gguf_name) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32(ALPHA, alpha)
        write_tensors(writer, tensors, tensors.__getitem__)
    return folded


def not_applied(c: Config, at: str) -> str | None:
    """Why llama.cpp applies no adapter of this module, or None."""
    tied = ties_head(c)
    if at == "head" and tied:
        return "a tied head, which has no tensor of its own there"
    if at == "embed" and tied:
        return "an embedding that is the head too, where llama.cpp stops at its shape"
    if at in TABLES and at != "embed":
        return "a table that llama.cpp takes no adapter for"
    return None


def _alpha(
    path: Path | str, ranks: Mapping[str, int], tuning: TrainableSpec
) -> tuple[float, dict[str, float]]:
    """The alpha that most modules have, and the factor of those that have another."""
    with np.errstate(over="ignore", under="ignore"):
        alphas = {at: float(F32(tuning.scale[at] * r)) for at, r in ranks.items()}
    for at, alpha in alphas.items():
        if not math.isfinite(alpha) or (alpha == 0) != (tuning.scale[at] == 0):
            expected, remedy = "alpha in float32's range", "put a factor into B"
            raise FormatError(path, f"scale of {at}", repr(tuning.scale[at]), expected, remedy)
    # To llama.cpp an alpha of 0 is none, and s is 1.
    counted = [alpha for alpha in alphas.values() if alpha] or [1.0]
    most = max(counted, key=counted.count)
    return most, {
        at: float(tuning.scale[at]) * ranks[at] / most
        for at, alpha in alphas.items()
        if alpha != most
    }


def read_adapter(path: Path | str, c: Config, dtype: Any = None) -> tuple[Weights, TrainableSpec]:
    """The adapter's arrays under internal names, in ``dtype`` or the file's, and its
    `TrainableSpec`.

    An alpha that is absent or 0 means s = 1, as in llama.cpp.

    Errors: FormatError for a damaged file, another architecture, a setting that is not known (the
    invocation of an activated LoRA), a tensor of no module or of another shape, one factor without
    the other; and for what llama.cpp does not apply, as :func:`write_adapter` has it.
    """
    contents = Contents(path)
    alpha = _read_alpha(contents, c)
    names = _factor_names(contents, c)
    ranks = {
        name.removesuffix(".B"): contents.tensors[tensor].shape[-1]
        for name, tensor in names.items()
        if name.endswith(".B")
    }
    if not ranks or len(names) != 2 * len(ranks):
        pairs = {f"{at}.{part}" for at in ranks for part in "AB"}
        missing = listed(pairs ^ names.keys()) or "none"
        raise FormatError(path, "tensors", missing, "lora_a and lora_b of each", "write it again")
    W: Weights = {}
    for at, r in ranks.items():
        for name, shape in parameter_shapes(c, at, r).items():
            array = _read_factor(contents, c, name, names[name], shape)
            W[name] = to_dtype(path, name, array, dtype)
    s = {at: scale(alpha or float(r), r) for at, r in ranks.items()}
    return W, TrainableSpec(s, {}, frozenset(W))


def _read_alpha(contents: Contents, c: Config) -> float:
    """The file's alpha, once it is known to be an adapter of this model; 0 where it has none."""
    expected = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.architecture": architecture_of(c).gguf_name,
    }
    stored = {key: contents[key] for key in contents if key.startswith("adapter.")}
    stored |= {key: contents.get(key) for key in ("general.type", "general.architecture")}
    for key, value in expected.items():
        if stored.get(key) != value:
            remedy = "is it an adapter, and of this model?"
            raise FormatError(contents.path, key, stored.get(key), value, remedy)
    check_settings(contents.path, stored, {*expected, ALPHA}, {}, "")
    alpha = stored.get(ALPHA, 0.0)
    if type(alpha) is not float or not math.isfinite(alpha):
        raise FormatError(contents.path, ALPHA, alpha, "a number in float32", "write it again")
    return alpha


def _factor_names(contents: Contents, c: Config) -> dict[str, str]:
    """Internal parameter name -> the tensor that holds it.

    Errors: FormatError for a tensor of no module, or of one to which no adapter is applied.
    """
    module_of = {f"{name}.weight": at for at, name in places(c).items()}
    names = {}
    for tensor in contents.tensors:
        place, _, part = tensor.rpartition(".lora_")
        at = module_of.get(place, "")
        if part not in ("a", "b") or at not in c.matrices() or not_applied(c, at):
            found = not_applied(c, at) or "no factor of a module here"
            remedy = "it may change the function computed: it is not passed over"
            expected = "lora_a and lora_b of projections"
            raise FormatError(contents.path, tensor, found, expected, remedy)
        names[f"{at}.{part.upper()}"] = tensor
    return names


def _read_factor(
    contents: Contents, c: Config, name: str, tensor: str, shape: tuple[int, int]
) -> Array:
    """The factor in its own layout and row order, in float32 or its own half precision."""
    at, _, part = name.rpartition(".")
    transposed = at in TABLES and part == "A"
    stored_shape = shape[::-1] if transposed else shape
    check_tensor(contents, tensor, stored_shape)
    array = Blocks(contents, tensor, stored_shape, F32)()
    order = row_order(c, at, len(array)) if part == "B" else None
    array = array if order is None else array[np.argsort(order)]
    array = np.ascontiguousarray(array.T) if transposed else array
    return array.astype(OWN_DTYPES.get(contents.tensors[tensor].kind, np.dtype(F32)))
