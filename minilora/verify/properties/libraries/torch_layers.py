"""A case of the laws as a layer in PyTorch: the base, its input, dropout's mask, the answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from minilora.spec.layers import Geometry
from minilora.verify.peers._torch import fill, to_numpy, to_torch
from minilora.verify.properties.layer_kinds import LayerCase

Answers = tuple[np.ndarray, Any, list[dict[str, np.ndarray]]]
"""y, dx (None where x are row numbers), and the gradients of each matrix's parameters by name."""


Base = tuple[np.ndarray, np.ndarray | None]
"""W as the kind of layer stores it, and b (None without)."""


P = 0.25
"""The probability of dropout behind the multipliers that `laws` draws."""


class Unsupported(Exception):
    """A library has no such layer, or silently makes another one; its text is the reason."""


@dataclass(frozen=True)
class LibraryAnswer:
    """The case as the library supports it, and the library's answers.

    ``merged()`` returns the merged weight and bias, or raises `Unsupported`; ``by`` names the
    library and what was left out.
    """

    case: LayerCase
    answers: Answers
    merged: Callable[[], Base]
    by: str


AskLibrary = Callable[[LayerCase, np.random.Generator], LibraryAnswer]


@contextmanager
def refusals(library: str) -> Iterator[None]:
    """Turn an error of the library into `Unsupported`, with the first line of its message."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        line = str(error).partition("\n")[0]
        raise Unsupported(f"{library} refuses: {type(error).__name__}: {line}") from error


class ScaledEmbedding(torch.nn.Embedding):
    """y = factor · table[ids], as Gemma's: PEFT knows the factor by the attribute's name."""

    def __init__(self, v: int, d: int, factor: float) -> None:
        super().__init__(v, d)
        self.embed_scale = factor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table, times the factor."""
        y: torch.Tensor = super().forward(ids) * self.embed_scale
        return y


class Experts(torch.nn.Module):
    """One weight (e, m, n), or (e, n, m) where ``is_transposed``, and a bias for each expert."""

    def __init__(self, e: int, m: int, n: int, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shape = (e, n, m) if is_transposed else (e, m, n)
        self.weight = torch.nn.Parameter(torch.randn(shape))
        self.bias = torch.nn.Parameter(torch.zeros(e, m))

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Each row of x through the expert that it is sent to."""
        W = self.weight if self.is_transposed else self.weight.mT
        return torch.einsum("tn,tnm->tm", x, W[index]) + self.bias[index]


def _convolution(m: int, n: int, geometry: Geometry, groups: int) -> torch.nn.Module:
    kinds: dict[int, Any] = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d}
    layer: torch.nn.Module = kinds[len(geometry.kernel)](
        n * groups,
        m,
        geometry.kernel,
        geometry.stride,
        dilation=geometry.dilation,
        groups=groups,
    )
    return layer


def base_model(case: LayerCase, transposed: bool = False) -> torch.nn.ModuleDict:
    """The layer of the case without its adapter, in PyTorch's own modules and float32."""
    *e, m, n = case.W.shape[:3] if case.kind == "experts" else case.W.shape[:2]
    layer: torch.nn.Module
    if case.kind in ("linear", "tied"):
        layer = torch.nn.Linear(n, m, bias=case.b is not None)
    elif case.kind == "transposed":
        layer = Conv1D(n, m)
    elif case.kind == "embedding":
        factor = case.extra["factor"]
        layer = torch.nn.Embedding(m, n) if factor == 1 else ScaledEmbedding(m, n, factor)
    elif case.kind == "experts":
        layer = Experts(e[0], m, n, transposed)
    else:
        layer = _convolution(m, n, **case.extra)
    model = torch.nn.ModuleDict({"layer": layer})
    if case.kind == "tied":
        model["embed"] = torch.nn.Embedding(*case.W.shape)
        model["embed"].weight = layer.weight
    return model


def fill_base(case: LayerCase, layer: torch.nn.Module) -> None:
    """Put the case's W and b into the layer."""
    W = case.W.transpose(0, 2, 1) if getattr(layer, "is_transposed", False) else case.W
    fill(layer.weight, to_torch(W))
    if case.b is not None:
        fill(layer.bias, to_torch(case.b.reshape(layer.bias.shape)))


def read_base(case: LayerCase, layer: torch.nn.Module) -> Base:
    """W and b of the layer, as `fill_base` puts them in."""
    W, b = to_numpy(layer.weight), getattr(layer, "bias", None)
    W = W.transpose(0, 2, 1) if getattr(layer, "is_transposed", False) else W
    return W, None if b is None or case.b is None else to_numpy(b).reshape(case.b.shape)


def padded(x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """x (b, c, …) padded: PyTorch's layers pad both sides equally."""
    sizes = [size for pair in reversed(geometry.padding) for size in pair]
    mode = {"zeros": "constant"}.get(geometry.mode, geometry.mode)
    return F.pad(x, sizes, mode)


def _layer_input(case: LayerCase, model: torch.nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    """x in the layout that the layer takes."""
    if case.kind == "embedding":
        return x
    if case.kind == "tied":
        h: torch.Tensor = model["embed"](x)
        return h
    return padded(x.transpose(0, 1), case.extra["geometry"]) if "geometry" in case.extra else x.mT


def _layer_output(case: LayerCase, layer: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    """The layer's y in minilora's layout."""
    if case.kind == "experts":
        y = layer(x, torch.from_numpy(case.extra["index"]))
    elif case.on is not None:
        y = layer(x[None], alora_offsets=[int(case.on[0].sum())])[0]
    else:
        y = layer(x)
    return torch.transpose(y, 0, 1)


def dropout_mask(case: LayerCase) -> np.ndarray:
    """True where dropout keeps an entry, in the layout of the layer's input."""
    kept = to_torch(np.asarray(case.K != 0, float)).transpose(0, 1)
    if "geometry" in case.extra:
        kept = padded(kept, case.extra["geometry"])
    elif case.on is not None:  # the branch takes the tokens from the invocation on
        kept = kept[torch.from_numpy(case.on[0] != 0)]
    return np.asarray(kept != 0)


def layer_answers(
    case: LayerCase,
    model: torch.nn.ModuleDict,
    layer: Callable[..., Any],
    tensors: dict[str, torch.Tensor],
    unpack: Callable[[str, np.ndarray], list[np.ndarray]],
) -> Answers:
    """The layer's answers by autograd; ``unpack`` splits a gradient by matrix."""
    x = to_torch(case.x)
    whole = x.dtype == torch.int64
    leaves = [*([] if whole else [x.requires_grad_()]), *tensors.values()]
    y = _layer_output(case, layer, _layer_input(case, model, x))
    gradients = [to_numpy(g) for g in torch.autograd.grad(y, leaves, to_torch(case.dy))]
    dx = None if whole else gradients.pop(0)
    per_matrix: list[dict[str, np.ndarray]] = [{} for _ in case.P]
    for name, gradient in zip(tensors, gradients, strict=True):
        for into, own in zip(per_matrix, unpack(name, gradient), strict=True):
            into[name] = own
    return to_numpy(y), dx, per_matrix


def named_parts(case: LayerCase) -> list[dict[str, np.ndarray]]:
    """Each matrix's parameters by name."""
    return [dict(zip(case.variant.parts, part, strict=True)) for part in case.P]


def fill_parts(
    case: LayerCase, tensors: dict[str, torch.Tensor], library: str
) -> Callable[[str, np.ndarray], list[np.ndarray]]:
    """Put the parameters of the case's only matrix into the tensors."""
    (named,) = named_parts(case)
    for name, tensor in tensors.items():
        if tensor.numel() != named[name].size:
            found, wanted = tuple(tensor.shape), named[name].shape
            raise Unsupported(f"{library} makes {name} {found} where it needs {wanted}")
        fill(tensor, to_torch(named[name].reshape(tensor.shape)))
    return lambda name, gradient: [gradient.reshape(named[name].shape)]


def fused_as_parts(case: LayerCase, rng: np.random.Generator, side: AskLibrary) -> LibraryAnswer:
    """Q, K and V as three layers, since no library has a fused layer with Q and V adapted."""
    q, k, _ = case.extra["rows"]
    rows = [slice(q), slice(q, q + k), slice(q + k, None)]
    biases = [None if case.b is None else case.b[i] for i in rows]
    parts = []
    for i, P_i in zip((0, 2), case.P, strict=True):
        own: dict[str, Any] = {
            "W": case.W[rows[i]],
            "b": biases[i],
            "P": (P_i,),
            "dy": case.dy[rows[i]],
        }
        part = replace(case, kind="linear", extra={}, **own)
        parts.append(side(part, rng))
    (yq, dxq, dq), (yv, dxv, dv) = (part.answers for part in parts)
    W, dy = to_torch(case.W[rows[1]]), to_torch(case.dy[rows[1]])
    yk = to_numpy(W @ to_torch(case.x)) + (0 if biases[1] is None else biases[1])
    answers = np.concatenate([yq, yk, yv]), dxq + to_numpy(W.mT @ dy) + dxv, dq + dv

    def merged() -> Base:
        (Wq, bq), (Wv, bv) = (part.merged() for part in parts)
        W = np.concatenate([Wq, case.W[rows[1]], Wv])
        if bq is None or bv is None or biases[1] is None:
            return W, None
        return W, np.concatenate([bq, biases[1], bv])

    case = replace(case, s=parts[0].case.s, K=parts[0].case.K)
    return LibraryAnswer(case, answers, merged, f"{parts[0].by}, each part a layer of its own")


def moved_convolution(
    case: LayerCase, rng: np.random.Generator, plain: bool, groups: bool
) -> LayerCase:
    """The convolution that a library supports; ``plain``: no dilation; ``groups``: with groups."""
    if not groups and case.extra["groups"] > 1:
        case = case.with_matrices([(W, b) for W, b, _ in case.matrices()])
    geometry = case.extra["geometry"]
    if plain:
        geometry = replace(geometry, dilation=(1,) * len(geometry.kernel))
    sizes, _ = geometry.places(case.x.shape[2:])
    dy = rng.standard_normal((len(case.W), case.x.shape[1], *sizes))
    return replace(case, dy=dy, extra=case.extra | {"geometry": geometry})
