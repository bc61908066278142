"""Every variant on every kind of layer, forward and gradients, beside the library that defines it.

A case of `laws` is put into the library's own layer, in float64, dropout's multiplier
included. PEFT defines most variants and LyCORIS the DoRA whose norm is differentiated; loralib and
LyCORIS have their own plain LoRA besides. What a library refuses is told in its own words.
"""

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import loralib
import numpy as np
import peft
import torch
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from minilora.spec.adalora import adalora_scale
from minilora.spec.layers import Geometry
from minilora.spec.variants import ADALORA, REGISTRY, VERA
from minilora.verify.peers._torch import GivenMask, fill, plain_number, to_numpy, to_torch
from minilora.verify.properties.layer_kinds import LayerCase, answers, draw_case

Answers = tuple[np.ndarray, Any, list[dict[str, np.ndarray]]]
"""y, dx (None where x are row numbers), and the gradients of each matrix's parameters by name."""

Base = tuple[np.ndarray, np.ndarray | None]
"""W as the kind of layer stores it, and b (None without)."""

P = 0.25
"""The probability of dropout behind the multipliers that `laws` draws."""

PEFT, LORALIB = f"peft {version('peft')}", f"loralib {version('loralib')}"


class Unsupported(Exception):
    """A library has no such layer, or silently makes another one of it: the reason."""


@dataclass(frozen=True)
class Deviation:
    """How far minilora and the libraries are apart, relatively; None: no library has the cell.

    ``by``: the libraries with their versions and how they were asked, or why none could be.
    """

    worst: float | None
    by: str


@dataclass(frozen=True)
class Asked:
    """The case as a library can have it, and what the library makes of it.

    ``merged`` merges, and refuses with `Unsupported`; ``by`` says how the library was asked.
    """

    case: LayerCase
    answers: Answers
    merged: Callable[[], Base]
    by: str


Side = Callable[[LayerCase, np.random.Generator], Asked]


def deviation(
    entry: str,
    kind: str,
    seed: int = 0,
    square: bool = False,
    ours: Callable[[LayerCase], Answers] = answers,
) -> Deviation:
    """The greatest deviation of y, dx and every gradient, over all libraries that have the cell.

    Relative to the greatest entry of the array or, if that is more, of the inputs and dy. ``ours``
    answers in minilora's place: the place for something wrong. What is not the library's, dropout
    or a geometry, is left out on both sides, and ``by`` says so.
    """

    def error(asked: Asked) -> float:
        y, dx, dP = ours(asked.case)
        y2, dx2, dP2 = asked.answers
        pairs = [(y, y2), (dx, dx2)]
        for found, wanted in zip(dP, dP2, strict=True):
            pairs += [(found[name], wanted[name]) for name in wanted]
        return max(_error(asked.case, *pair) for pair in pairs)

    return _greatest(entry, kind, seed, square, error)


def merge_deviation(
    entry: str,
    kind: str,
    seed: int = 0,
    square: bool = False,
    ours: Callable[[LayerCase], LayerCase] = LayerCase.merged,
) -> Deviation:
    """The greatest deviation of the merged weight and bias, likewise."""

    def error(asked: Asked) -> float:
        W, b = asked.merged()
        merged = ours(asked.case.without_dropout())
        return max(_error(asked.case, merged.W, W), _error(asked.case, merged.b, b))

    return _greatest(entry, kind, seed, square, error)


def _greatest(
    entry: str, kind: str, seed: int, square: bool, error: Callable[[Asked], float]
) -> Deviation:
    worst, names, reasons = 0.0, [], []
    for side in _sides(entry, kind):
        rng = np.random.default_rng(seed)
        case = draw_case(entry, kind, rng, exact=False, square=square)
        try:
            asked = side(case, rng)
            worst = max(worst, error(asked))
        except Unsupported as reason:
            reasons.append(str(reason))
        else:
            names.append(asked.by)
    if names:
        return Deviation(worst, "; ".join(dict.fromkeys(names)))
    return Deviation(None, "; ".join(dict.fromkeys(reasons)))


def _sides(entry: str, kind: str) -> list[Side]:
    if entry == "dora-full":
        return [_lycoris]
    if entry != "lora":
        return _PEFT.get(kind, [_peft])
    second = {"experts": [], "tied": [], "conv1": [_lycoris], "conv2": [_lycoris]}
    return [*_PEFT.get(kind, [_peft]), *second.get(kind, [_loralib])]


def _error(case: LayerCase, found: Any, wanted: Any) -> float:
    """The greatest difference, relative to the greatest entry of ``wanted`` or of the case."""
    if found is None and wanted is None:
        return 0.0
    if found.shape != wanted.shape:
        raise ValueError(f"found shape {found.shape}, the library's is {wanted.shape}")
    arrays = [wanted, case.W, case.dy, *(p for part in case.P for p in part)]
    arrays += [case.x] if case.x.dtype.kind == "f" else []
    error = float(abs(found - wanted).max() / max(float(abs(array).max()) for array in arrays))
    return error if np.isfinite(error) else np.inf


@contextmanager
def _asking(library: str) -> Iterator[None]:
    """What the library refuses while it builds a layer, in the first line of its own words."""
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


def _model(case: LayerCase, transposed: bool) -> torch.nn.ModuleDict:
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


def _fill_base(case: LayerCase, layer: torch.nn.Module) -> None:
    W = case.W.transpose(0, 2, 1) if getattr(layer, "is_transposed", False) else case.W
    fill(layer.weight, to_torch(W))
    if case.b is not None:
        fill(layer.bias, to_torch(case.b.reshape(layer.bias.shape)))


def _base(case: LayerCase, layer: torch.nn.Module) -> Base:
    """What `_fill_base` puts in, taken out again."""
    W, b = to_numpy(layer.weight), getattr(layer, "bias", None)
    W = W.transpose(0, 2, 1) if getattr(layer, "is_transposed", False) else W
    return W, None if b is None or case.b is None else to_numpy(b).reshape(case.b.shape)


def _padded(x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """x (b, c, …) with what stands beside it: PyTorch's layers have as much on both sides only."""
    sizes = [size for pair in reversed(geometry.padding) for size in pair]
    mode = {"zeros": "constant"}.get(geometry.mode, geometry.mode)
    return F.pad(x, sizes, mode)


def _enter(case: LayerCase, model: torch.nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    """x in the layout that the layer takes."""
    if case.kind == "embedding":
        return x
    if case.kind == "tied":
        h: torch.Tensor = model["embed"](x)
        return h
    return _padded(x.transpose(0, 1), case.extra["geometry"]) if "geometry" in case.extra else x.mT


def _run(case: LayerCase, layer: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    """The layer's y in minilora's layout."""
    if case.kind == "experts":
        y = layer(x, torch.from_numpy(case.extra["index"]))
    elif case.on is not None:
        y = layer(x[None], alora_offsets=[int(case.on[0].sum())])[0]
    else:
        y = layer(x)
    return torch.transpose(y, 0, 1)


def _keep(case: LayerCase) -> np.ndarray:
    """What dropout keeps, in the layout that it sees."""
    kept = to_torch(np.asarray(case.K != 0, float)).transpose(0, 1)
    if "geometry" in case.extra:
        kept = _padded(kept, case.extra["geometry"])
    elif case.on is not None:  # the branch takes the tokens from the invocation on
        kept = kept[torch.from_numpy(case.on[0] != 0)]
    return np.asarray(kept != 0)


def _answers(
    case: LayerCase,
    model: torch.nn.ModuleDict,
    layer: Callable[..., Any],
    tensors: dict[str, torch.Tensor],
    unpack: Callable[[str, np.ndarray], list[np.ndarray]],
) -> Answers:
    """The layer's answers by autograd; ``unpack`` gives each matrix its own of a gradient."""
    x = to_torch(case.x)
    whole = x.dtype == torch.int64
    leaves = [*([] if whole else [x.requires_grad_()]), *tensors.values()]
    y = _run(case, layer, _enter(case, model, x))
    gradients = [to_numpy(g) for g in torch.autograd.grad(y, leaves, to_torch(case.dy))]
    dx = None if whole else gradients.pop(0)
    per_matrix: list[dict[str, np.ndarray]] = [{} for _ in case.P]
    for name, gradient in zip(tensors, gradients, strict=True):
        for into, own in zip(per_matrix, unpack(name, gradient), strict=True):
            into[name] = own
    return to_numpy(y), dx, per_matrix


def _named(case: LayerCase) -> list[dict[str, np.ndarray]]:
    return [dict(zip(case.variant.parts, part, strict=True)) for part in case.P]


def _fill_parts(
    case: LayerCase, tensors: dict[str, torch.Tensor]
) -> Callable[..., list[np.ndarray]]:
    """Put the case's only matrix's parameters into tensors of as many entries in the same order."""
    (named,) = _named(case)
    for name, tensor in tensors.items():
        if tensor.numel() != named[name].size:
            found, wanted = tuple(tensor.shape), named[name].shape
            raise Unsupported(f"{PEFT} makes {name} {found} where it needs {wanted}")
        fill(tensor, to_torch(named[name].reshape(tensor.shape)))
    return lambda name, gradient: [gradient.reshape(named[name].shape)]


def _fill_experts(
    case: LayerCase, tensors: dict[str, torch.Tensor]
) -> Callable[..., list[np.ndarray]]:
    """PEFT's layout: the rows of A (e·r, n) by the expert, the columns of B (m, r·e) by the rank.

    So the columns of expert i are i, i + e, i + 2 e, …
    """
    A, B = (np.stack([named[name] for named in _named(case)]) for name in "AB")
    e, r, n = A.shape
    if tensors["A"].shape != (e * r, n):
        found = tuple(tensors["A"].shape)
        raise Unsupported(f"{PEFT} makes A {found} where it needs {(e * r, n)}")
    fill(tensors["A"], to_torch(A.reshape(e * r, n)))
    fill(tensors["B"], to_torch(B.transpose(1, 2, 0).reshape(-1, r * e)))

    def unpack(name: str, gradient: np.ndarray) -> list[np.ndarray]:
        if name == "A":
            return list(gradient.reshape(e, r, n))
        return list(gradient.reshape(-1, r, e).transpose(2, 0, 1))

    return unpack


def _config(case: LayerCase, p: float) -> peft.PeftConfig:
    """PEFT's configuration of the variant on the module or the parameter."""
    entry, alpha = REGISTRY[case.entry], plain_number(case.alpha)
    at: dict[str, Any] = {"target_modules": ["layer"]}
    if case.kind == "experts":
        at = {"target_modules": [], "target_parameters": ["layer.weight"]}
    if entry.variant is VERA:
        return peft.VeraConfig(r=case.r, vera_dropout=p, **at)
    if entry.variant is ADALORA:
        ranks = {"init_r": case.r, "target_r": 1, "total_step": 9}
        return peft.AdaLoraConfig(lora_alpha=alpha, lora_dropout=p, **ranks, **at)
    if case.on is not None:
        at |= {"alora_invocation_tokens": [0], "task_type": "CAUSAL_LM"}
    if entry.init == "loftq":
        at["loftq_config"] = peft.LoftQConfig()
    return peft.LoraConfig(
        r=case.r,
        lora_alpha=alpha,
        lora_dropout=p,
        use_rslora=entry.rslora,
        use_dora="magnitude" in entry.variant.parts,
        lora_bias="c" in entry.variant.parts,
        init_lora_weights=True if entry.init == "kaiming" else entry.init,
        **at,
    )


def _default(parts: Any) -> torch.Tensor:
    """The default adapter's tensor in one of PEFT's dictionaries of modules or parameters."""
    part = parts["default"]
    tensor: torch.Tensor = getattr(part, "weight", part)
    return tensor


def _peft_tensors(case: LayerCase, layer: Any) -> dict[str, torch.Tensor]:
    find: dict[str, Callable[[], torch.Tensor]] = {
        "A": lambda: _default(layer.lora_A),
        "B": lambda: _default(layer.lora_B),
        "c": lambda: layer.lora_B["default"].bias,
        "magnitude": lambda: _default(layer.lora_magnitude_vector),
        "E": lambda: _default(layer.lora_E),
    }
    if case.kind == "embedding":
        find |= {
            "A": lambda: _default(layer.lora_embedding_A),
            "B": lambda: _default(layer.lora_embedding_B),
        }
    if case.variant is VERA:
        return {name: _default(getattr(layer, f"vera_{name}")) for name in case.variant.parts}
    return {name: find[name]() for name in case.variant.parts}


def _injected(case: LayerCase, model: torch.nn.ModuleDict, p: float) -> tuple[Any, str]:
    """The layer that PEFT puts into the model, started as the variant starts, and what is not so.

    PiSSA and OLoRA refuse float64: the model is of float32 here.
    """
    entry = REGISTRY[case.entry]
    layer, note = model["layer"], ""
    before = layer.weight.detach().clone()
    config = _config(case, p)
    if entry.variant is VERA:
        peft.get_peft_model(model, config)
    else:
        try:
            peft.inject_adapter_in_model(config, model)
        except (AssertionError, RuntimeError, ValueError) as error:
            if not any(word in str(error) for word in ("CUDA", "NVIDIA", "bitsandbytes")):
                raise
            if isinstance(layer, Conv1D) and layer.nf != layer.nx:  # what it would come to
                found, wanted = (case.r, layer.nf), (case.r, layer.nx)
                raise Unsupported(f"{PEFT} makes A {found} where it needs {wanted}") from error
            note = ", after its start, which needs a GPU"  # LoftQ's; what follows is LoRA
            config.init_lora_weights = True
            model["layer"] = layer
            peft.inject_adapter_in_model(config, model)
    injected = model["layer"]
    if entry.init in ("pissa", "olora") and torch.equal(layer.weight, before):
        raise Unsupported(f"{PEFT} makes it plain LoRA's start, without a word")
    if entry.init in ("gaussian", "orthogonal") and not _peft_tensors(case, injected)["A"].any():
        raise Unsupported(f"{PEFT} makes it plain LoRA's start, without a word")
    return injected, note


def _peft(case: LayerCase, rng: np.random.Generator, transposed: bool = False) -> Asked:
    if case.kind == "fused":
        return _apart(case, rng)
    if case.variant is VERA:
        case = replace(case, s=1.0)
    if case.variant is ADALORA:
        case = replace(case, s=adalora_scale(case.alpha, case.r))
    p = 0.0 if case.K is None else P
    with _asking(PEFT):
        model = _model(case, transposed)
        layer, how = _injected(case, model, p)
    model.double()
    tensors = _peft_tensors(case, layer)
    _fill_base(case, layer.get_base_layer())
    fill_parts = _fill_experts if case.kind == "experts" else _fill_parts
    unpack = fill_parts(case, tensors)
    if case.K is not None:
        dropouts = layer.vera_dropout if case.variant is VERA else layer.lora_dropout
        dropouts["default"] = GivenMask(_keep(case), p, dropouts["default"])
    model.train()
    if case.entry == "lora-fa":
        tensors.pop("A").requires_grad_(False)
    for tensor in tensors.values():
        tensor.requires_grad_()  # VeRA's A and B are buffers
    if case.variant in (VERA, ADALORA):
        how = ", s = 1" if case.variant is VERA else ", s = alpha/(r + 1e-5)"
    if case.kind == "experts":
        how += " (experts, in, out)" if transposed else " (experts, out, in)"

    def merged() -> Base:
        with _asking(PEFT):
            layer.merge()
        return _base(case, layer.get_base_layer())

    return Asked(case, _answers(case, model, layer, tensors, unpack), merged, PEFT + how)


def _peft_transposed(case: LayerCase, rng: np.random.Generator) -> Asked:
    return _peft(case, rng, transposed=True)


def _peft_unscaled(case: LayerCase, rng: np.random.Generator) -> Asked:
    return _peft(replace(case, extra={"factor": 1.0}), rng)


def _apart(case: LayerCase, rng: np.random.Generator, side: Side | None = None) -> Asked:
    """The fused layer's parts as layers of their own, Q and V adapted: no library has it fused."""
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
        parts.append((side or _peft)(part, rng))
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
    return Asked(case, answers, merged, f"{parts[0].by}, each part a layer of its own")


def _moved(case: LayerCase, rng: np.random.Generator, plain: bool, groups: bool) -> LayerCase:
    """The convolution as a library has it: ``plain`` without dilation; out of groups if not."""
    if not groups and case.extra["groups"] > 1:
        case = case.with_matrices([(W, b) for W, b, _ in case.matrices()])
    geometry = case.extra["geometry"]
    if plain:
        geometry = replace(geometry, dilation=(1,) * len(geometry.kernel))
    sizes, _ = geometry.places(case.x.shape[2:])
    dy = rng.standard_normal((len(case.W), case.x.shape[1], *sizes))
    return replace(case, dy=dy, extra=case.extra | {"geometry": geometry})


def _peft_conv(case: LayerCase, rng: np.random.Generator, groups: bool = True) -> Asked:
    """Padding stands before the layer: PEFT's A knows no padding mode, and nothing of dilation."""
    lora = case.variant is not ADALORA
    # In groups AdaLoRA fails, and DoRA takes the norms of another matrix.
    groups = groups and lora and "magnitude" not in case.variant.parts
    asked = _peft(_moved(case, rng, plain=lora, groups=groups), rng)
    left_out = [*(["dilation"] if lora else []), *([] if groups else ["groups"])]
    return replace(asked, by=f"{asked.by}, without {' and '.join(left_out)}")


def _peft_whole_conv(case: LayerCase, rng: np.random.Generator) -> Asked:
    return _peft_conv(case, rng, groups=False)


def _loralib(case: LayerCase, rng: np.random.Generator) -> Asked:
    ranks: dict[str, Any] = {"r": case.r, "lora_alpha": plain_number(case.alpha)}
    ranks["merge_weights"] = False
    name = LORALIB
    if case.kind == "embedding":
        layer = loralib.Embedding(*case.W.shape, **ranks)
        case, name = replace(case, extra={"factor": 1.0}), f"{LORALIB}, without the factor"
    elif case.kind == "fused":
        if len(set(case.extra["rows"])) > 1:
            raise Unsupported(f"{LORALIB} has parts of one size only")
        m, n = case.W.shape
        enabled = [True, False, True]
        layer = loralib.MergedLinear(n, m, lora_dropout=P, enable_lora=enabled, **ranks)
    else:
        across = case.kind == "transposed"
        m, n = case.W.shape[::-1] if across else case.W.shape
        layer = loralib.Linear(n, m, lora_dropout=P, fan_in_fan_out=across, **ranks)
    model = torch.nn.ModuleDict({"layer": layer}).double()
    _fill_base(case, layer)
    tensors = {"A": layer.lora_A, "B": layer.lora_B}
    for part, tensor in tensors.items():  # one matrix's rows after another's
        fill(tensor, to_torch(np.concatenate([named[part] for named in _named(case)])))
    if case.K is not None:
        layer.lora_dropout = GivenMask(_keep(case), P, layer.lora_dropout)

    def unpack(name: str, gradient: np.ndarray) -> list[np.ndarray]:
        return np.split(gradient, len(case.P))

    def merged() -> Base:
        layer.merge_weights = True
        layer.eval()
        return _base(case, layer)

    return Asked(case, _answers(case, model, layer, tensors, unpack), merged, name)


def _lycoris(case: LayerCase, rng: np.random.Generator) -> Asked:
    """LyCORIS rebuilds W' in each forward; what it drops is no input, so nothing is dropped."""
    if case.kind == "fused":
        return _apart(case, rng, _lycoris)
    case = case.without_dropout()
    if "geometry" in case.extra:  # in groups its A sees its own channels only
        case = _moved(case, rng, plain=False, groups=False)
    try:
        locon = importlib.import_module("lycoris.modules.locon")
    except ImportError as error:
        raise Unsupported("lycoris-lora is not installed") from error
    library = f"lycoris {version('lycoris-lora')}"
    decomposed = "magnitude" in case.variant.parts
    with _asking(library):
        model = _model(case, transposed=False).double()
        _fill_base(case, model["layer"])
        layer = locon.LoConModule(
            "layer",
            model["layer"],
            lora_dim=case.r,
            alpha=case.alpha,
            weight_decompose=decomposed,
            wd_on_out=True,
        ).double()
    tensors = {"A": layer.lora_down.weight, "B": layer.lora_up.weight}
    tensors |= {"magnitude": layer.dora_scale} if decomposed else {}
    unpack = _fill_parts(case, tensors)
    groups = " and groups" if "geometry" in case.extra else ""

    def merged() -> Base:
        layer.merge_to()
        return _base(case, model["layer"])

    how = f"{library}, without dropout{groups}"
    return Asked(case, _answers(case, model, layer, tensors, unpack), merged, how)


def peft_start(
    init: str, W: np.ndarray, r: int, alpha: float, across: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The base's weight, A and B that PEFT starts a projection of weight W (m, n) from.

    ``across``: of a Conv1D, which stores the weight (in, out); all that is returned lies as ever.
    """
    m, n = W.shape
    base = Conv1D(m, n) if across else torch.nn.Linear(n, m)
    base.to(to_torch(W).dtype)
    fill(base.weight, to_torch(W.T if across else W))
    model = torch.nn.ModuleDict({"layer": base})
    quantised = {"loftq_config": peft.LoftQConfig()} if init == "loftq" else {}
    config = peft.LoraConfig(
        r=r,
        lora_alpha=plain_number(alpha),
        init_lora_weights=init,
        fan_in_fan_out=across,
        target_modules=["layer"],
        **quantised,
    )
    peft.inject_adapter_in_model(config, model)
    R = to_numpy(base.weight)
    A, B = (to_numpy(_default(part)) for part in (model["layer"].lora_A, model["layer"].lora_B))
    return R.T if across else R, A, B


_PEFT: dict[str, list[Side]] = {
    "embedding": [_peft, _peft_unscaled],
    "experts": [_peft, _peft_transposed],
    "conv1": [_peft_conv, _peft_whole_conv],
    "conv2": [_peft_conv, _peft_whole_conv],
}
"""How PEFT is asked about a kind, where it is not plainly."""
