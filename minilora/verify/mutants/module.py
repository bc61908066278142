"""Mutants of layers of every kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minilora.verify.mutants.mutant import Mutant, Reference, Same, Table, equivalents, mutants
from minilora.verify.mutants.references.helpers import Array
from minilora.verify.mutants.references.module import (
    Modules,
    Window,
    apply,
    attend,
    change_of,
    encode,
    factor_gradients,
    of_rows,
    pairs,
    transposed,
)


def moved(layer: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """A convolution with other settings, of each dimension the same; others stay as they are."""
    if layer["kind"] != "conv":
        return dict(layer)
    each = {
        name: [value] * len(layer["stride"]) if isinstance(value, int) and name != "groups"
        else value
        for name, value in settings.items()
    }  # fmt: skip
    return dict(layer) | each


def fitted(y: Array, shape: tuple[int, ...]) -> Array:
    """Cut off, or filled up with 0, to a shape."""
    whole = np.zeros(shape, y.dtype)
    common = tuple(slice(min(a, b)) for a, b in zip(y.shape, shape, strict=True))
    whole[common] = y[common]
    return whole


def flipped(W: Array) -> Array:
    """A kernel turned round, as mathematics has a convolution; others stay as they are."""
    return np.flip(W, tuple(range(2, W.ndim))) if W.ndim > 2 else W


def kernel_turned(change: Array) -> Array:
    """A kernel with its axes reversed, where it stays as it is by its shape."""
    axes = tuple(range(2, change.ndim))
    is_alike = change.shape[2:] == change.shape[:1:-1]
    return change.transpose(0, 1, *axes[::-1]) if len(axes) > 1 and is_alike else change


def of_kind(layer: Mapping[str, Any], *kinds: str) -> bool:
    """Whether the layer is one of these."""
    return layer["kind"] in kinds


def groups_turned(layer: Mapping[str, Any], W: Array) -> Array:
    """Each group's kernels for those of the group before."""
    return np.roll(W, len(W) // layer["groups"], 0) if layer.get("groups", 1) > 1 else W


def short(layer: Mapping[str, Any], A: Array) -> Any:
    """A's columns at most as long as a table's rows may be."""
    if "max_norm" not in layer:
        return A
    power = layer["norm_type"]
    norms = (abs(A) ** power).sum(0) ** (1 / power)
    return A * np.minimum(1, layer["max_norm"] / np.maximum(norms, 1e-9)).astype(A.dtype)


def across(layer: Mapping[str, Any], change: Array) -> Array:
    """The change transposed where its last two sides are equal, where no shape tells."""
    square = change.ndim > 1 and change.shape[-1] == change.shape[-2]
    return change.swapaxes(-1, -2) if square and layer["kind"] != "conv" else change


def adapted_rows(layer: Mapping[str, Any], adapter: Mapping[str, Any]) -> list[int]:
    """The rows of a fused layer's adapted projections."""
    places = pairs(layer, adapter) if of_kind(layer, "fused") else []
    return [row for rows, *_ in places for row in range(rows.start, rows.stop)]


def packed(layer: Mapping[str, Any], adapter: Mapping[str, Any], change: Array) -> Array:
    """A fused layer's change with what is adapted on top."""
    rows = adapted_rows(layer, adapter)
    below = np.zeros_like(change[len(rows) :])
    return np.concatenate([change[rows], below]) if rows else change


def unpacked(layer: Mapping[str, Any], adapter: Mapping[str, Any], dV: Array) -> Array:
    """The gradient of that."""
    rows, dchange = adapted_rows(layer, adapter), np.zeros_like(dV)
    dchange[rows] = dV[: len(rows)]
    return dchange if rows else dV


def closed(layer: Mapping[str, Any], adapter: Mapping[str, Any], change: Array) -> Array:
    """A fused layer's change with each adapted projection right after the one before."""
    rows = adapted_rows(layer, adapter)
    moved_up = np.zeros_like(change)
    moved_up[rows[0] : rows[0] + len(rows)] = change[rows] if rows else 0
    return moved_up


def opened(layer: Mapping[str, Any], adapter: Mapping[str, Any], dV: Array) -> Array:
    """The gradient of that."""
    rows, dchange = adapted_rows(layer, adapter), np.zeros_like(dV)
    dchange[rows] = dV[rows[0] : rows[0] + len(rows)]
    return dchange


def repacked(B: Array, back: bool = False) -> Array:
    """Experts' B (e, m, r) as (m, r e) is taken for (m, e r); or the inverse."""
    e, m, r = B.shape
    if back:
        return B.transpose(1, 0, 2).reshape(m, r, e).transpose(2, 0, 1)
    return B.transpose(1, 2, 0).reshape(m, e, r).transpose(1, 0, 2)


def last_kept(layer: Mapping[str, Any]) -> Any:
    """1 for each row of a weight, and 0 for those of a last projection that is smaller."""
    rows = layer.get("rows", (0,))
    kept = np.ones((len(layer["W"]),) + (1,) * (layer["W"].ndim - 1), layer["W"].dtype)
    kept[len(kept) - rows[-1] if rows[-1] < rows[0] else len(kept) :] = 0
    return kept


def put_back(layer: Mapping[str, Any], index: Any, y: Array, back: bool = False) -> Array:
    """Rows sorted by expert, and put back by that sort and not by its inverse; or the transpose."""
    if not of_kind(layer, "experts"):
        return y
    order = np.argsort(index, kind="stable")
    twice = order[order]
    return y[np.argsort(twice)] if back else y[twice]


def single(layer: Mapping[str, Any]) -> bool:
    """Whether there is one expert."""
    return bool(of_kind(layer, "experts") and len(layer["W"]) == 1)


def alone(layer: Mapping[str, Any], array: Array, e: int) -> Array:
    """One expert's entry, and 0 for the others."""
    kept = np.zeros_like(array)
    kept[e] = array[e]
    return kept if of_kind(layer, "experts") else array


def over_root(layer: Mapping[str, Any], W: Array, V: Array) -> Any:
    """The weight whose change of q is divided by √(d / heads)."""
    d = len(W) // 3
    factor = np.where(np.arange(len(W)) < d, (d // layer["heads"]) ** -0.5, 1.0)
    return W + factor[:, None] * (V - W)


def heads_first(layer: Mapping[str, Any], change: Array) -> Array:
    """Rows taken for those of head after head, each with q, k and v, in the weight's order."""
    by_head = change.reshape(layer["heads"], 3, -1, change.shape[-1])
    return by_head.swapaxes(0, 1).reshape(change.shape)


PARTS = (
    pairs, of_rows, change_of, factor_gradients, Window, apply, transposed, attend, encode, Modules,
)  # fmt: skip
MODULES = Reference(PARTS, globals())

_CHANGE = "Modules: # change"
_GRADIENTS = "Modules: # gradients"
_BRANCH = "apply(layer, h, V - W, index)"
_BACK = "dx_branch, dV = transposed(layer, h, V - W, dy, index)"
_MERGED = "y = apply(layer, x, V, index) + shift"


def _branch(how: str) -> dict[str, str]:
    """The branch of a convolution that moves otherwise than the base, forward and backward."""
    return {
        "# branch": f"branch = fitted(apply({how}, h, V - W, index), base.shape)",
        _BACK: f"room = apply({how}, h, V - W, index).shape; dx_branch, dV = transposed({how}, h, "
        "V - W, fitted(dy, room), index)",
    }


# fmt: off
MODULE: Table = {
    "module.linear.forward": [
        ("no-scale", "s = 1", {"Modules: # scale": "s = 1.0"}),
        ("alpha", "s = α", {"Modules: # scale": "s = alpha"}),
        ("rslora-ignored", "s = α/r with rsLoRA", {"Modules: # scale": "s = alpha / r"}),
        ("scale-of-magnitude", "|s|, where α is negative", {"Modules: # scale": "s = abs(s)"}),
        ("adapter-ignored", "the base alone", {_CHANGE: "change = 0 * change"}),
        ("adapter-ignored-in-evaluation", "the base alone in evaluation",
         {_CHANGE: 'change = change * (mode != "eval")'}),
        ("twice-in-training", "2 s B A in training", {_CHANGE: "change = change * (1 + training)"}),
        ("turned", "(B A)ᵀ for B A where m = n",
         {_CHANGE: "change = across(layer, change)"}),
        ("in-out-turned", "(B A)ᵀ for B A with fan_in_fan_out, where m = n",
         {_CHANGE: "change = across(layer, change) if fan_in_fan_out else change"}),
        ("in-out-bias-lost", "no bias with fan_in_fan_out",
         {"# whole output": "y = y - shift if fan_in_fan_out else y"}),
        ("bias-lost", "no bias", {"# whole output": "y = y - shift"}),
        ("bias-scaled", "s b for b", {"# whole output": "y = y + (s - 1) * shift"}),
        ("bias-twice", "the bias in the branch too", {"# whole output": "y = y + shift"}),
        ("norm-of-base", "DoRA's norms of W",
         {"# norm": "norm = (of_rows(kind, W) ** 2).sum(1) ** 0.5; norm = norm + (norm == 0)"}),
        ("magnitude-alone", "m ∘ V: not divided by ‖V‖", {"m / norm, V": "m, V"}),
        ("bias-of-B-unscaled", "c for s c", {"b + s * c": "b + c"}),
        ("bias-of-B-ignored", "no bias of B", {"b + s * c": "b"}),
    ],
    "module.linear.gradients": [
        ("dA-unscaled", "dA without s", {"# answers": "dA = dA / s"}),
        ("dB-unscaled", "dB without s", {"# answers": "dB = dB / s"}),
        ("dA-zero", "dA = 0", {"# answers": "dA = 0 * dA"}),
        ("dB-negative", "-dB", {"# answers": "dB = -dB"}),
        ("dx-of-base", "dx without the branch", {"dx = dx + K * dx_branch": "pass"}),
        ("dx-of-branch", "dx of the branch alone", {"dx = dx + K * dx_branch": "dx = dx_branch"}),
        ("mean", "dA and dB over the number of samples",
         {"# answers": "dA, dB = dA / len(x), dB / len(x)"}),
        ("dm-undivided", "dm without 1 / ‖V‖", {"of_rows(kind, V)).sum(1) / m":
                                               "of_rows(kind, V)).sum(1) / given.g.ravel()"}),
        ("dz-unscaled", "dA and dB without m / ‖V‖", {"dV = dV * given.g": "pass"}),
        ("dc-unscaled", "the gradient of B's bias without s", {"s * dy.sum(axes)": "dy.sum(axes)"}),
        ("gradients-of-evaluation", "no gradients in evaluation: 0",
         {"# answers": "dA, dB = dA * training, dB * training"}),
    ],
    "module.linear.merged": [
        ("merged-twice", "W + 2 s B A, merged", {_CHANGE: "change = change * (1 + merging)"}),
        ("not-merged", "W, merged", {_CHANGE: "change = change * (not merging)"}),
        ("merged-acts-too", "the adapter acts beside the merged weight",
         {"# merged": "y = y + apply(layer, x, V - W, index)"}),
        ("merged-bias-lost", "no bias, merged", {"# merged": "y = y - shift"}),
        ("merged-bias-of-B-lost", "b for b + s c, merged",
         {"b + s * c": "b + (not merging) * s * c"}),
        ("merged-bias-of-B-alone-lost", "no bias of B where the layer has none, merged",
         {"b + s * c": "b + (not merging or 'bias' in layer) * s * c"}),
        ("merged-unscaled", "W + B A, merged",
         {_CHANGE: "change = change / s if merging else change"}),
        ("merged-turned", "W + s (B A)ᵀ where m = n, merged",
         {_CHANGE: "change = across(layer, change) if merging else change"}),
        ("merged-in-out-turned", "W + s (B A)ᵀ with fan_in_fan_out where m = n, merged",
         {_CHANGE: "change = across(layer, change) if merging and fan_in_fan_out else change"}),
        ("merged-norm-of-base", "merged with DoRA's norms of 1",
         {"m / norm, V": "m / (1 if merging else norm), V"}),
    ],
    "module.linear.evaluation": [
        ("dropout-in-evaluation", "dropout in evaluation", {"if training and p:": "if p:"}),
        ("one-over-p", "1 / p for 1 / (1 - p)", {"W.dtype.type(1 - p)": "W.dtype.type(p)"}),
        ("evaluation-shrunk", "(1 - p) s B A x in evaluation",
         {"# branch": 'branch = branch * W.dtype.type(1 - p if mode == "eval" else 1)'}),
        ("merged-rescaled", "s B A / (1 - p), merged",
         {"# merged": "y = y + (1 / W.dtype.type(1 - p) - 1) * apply(layer, x, V - W, index)"}),
    ],
    "module.linear.dropout": [
        ("not-rescaled", "kept features without 1 / (1 - p)", {" / W.dtype.type(1 - p)": " * 1"}),
        ("dropout-never", "no dropout in training", {"if training and p:": "if False:"}),
        ("dropout-on-base", "dropout on the base's input too",
         {"base, branch = apply(layer, x, W, index)": "base, branch = apply(layer, h, W, index)"}),
        ("dropout-shared", "all samples of a batch share one mask",
         {"self.rng.random(x.shape) >= p":
              "np.broadcast_to(self.rng.random(x.shape[-1:]) >= p, x.shape)"}),
        ("dropout-of-samples", "the numbers of a sample are dropped together",
         {"self.rng.random(x.shape) >= p":
              "self.rng.random((len(x),) + (1,) * (x.ndim - 1)) >= p"}),
        ("dropout-on-output", "dropout on the branch's output",
         {"h = x if kind == \"embedding\" else x * K": "h = x",
          "# branch": "branch = branch * (self.rng.random(base.shape) >= p) / (1 - p) if training "
                      "and p else branch"}),
    ],
    "module.conv.forward": [
        ("stride-ignored", "the branch moves by 1", _branch("moved(layer, stride=1)")),
        ("padding-ignored", "the branch without padding", _branch("moved(layer, padding=0)")),
        ("kernel-flipped", "the branch's kernel turned round",
         {_BRANCH: "apply(layer, h, flipped(V - W), index)"}),
        ("kernel-turned", "the axes of the branch's kernel reversed, where that keeps its shape",
         {_CHANGE: "change = kernel_turned(change)"}),
        ("kernel-reshaped", "B A reshaped as (kernel, c) for (c, kernel)",
         {"# product":
              "if layer['kind'] == 'conv': return np.moveaxis((B @ A).reshape(len(W), "
              "*W.shape[2:], W.shape[1]), -1, 1)"}),
        ("kernel-axes-exchanged", "B A read as a kernel with its axes in the other order",
         {"# product": "if layer['kind'] == 'conv': return (B @ A).reshape(*W.shape[:2], "
                       "*W.shape[:1:-1]).transpose(0, 1, *range(W.ndim - 1, 1, -1))"}),
        ("in-1d-ignored", "no adapter in convolutions of one dimension",
         {_CHANGE: "change = change * (W.ndim != 3)"}),
        ("in-3d-ignored", "no adapter in convolutions of three dimensions",
         {_CHANGE: "change = change * (W.ndim != 5)"}),
    ],
    "module.conv.gradients": [
        ("conv-dx-of-base", "dx of a convolution without the branch",
         {"dx = dx + K * dx_branch": "dx = dx + (kind != 'conv') * K * dx_branch"}),
        ("conv-first-sample", "dA and dB of the first sample",
         {_GRADIENTS: "dV = transposed(layer, h[:1], V - W, dy[:1], index)[1] if kind == 'conv' "
                      "and m is None else dV"}),
        ("conv-dA-flipped", "dA of a kernel turned round",
         {_GRADIENTS: "dV = flipped(dV)"}),
    ],
    "module.conv.merged": [
        ("merged-kernel-flipped", "a merged kernel turned round",
         {_CHANGE: "change = flipped(change) if merging else change"}),
    ],
    "module.conv.evaluation": [
        ("conv-dropout-in-evaluation", "dropout in evaluation, of convolutions",
         {"if training and p:": "if p and (training or kind == 'conv'):"}),
    ],
    "module.conv.dropout": [
        ("conv-without-dropout", "no dropout in convolutions",
         {"if training and p:": "if training and p and kind != 'conv':"}, "loralib 0.1.2"),
        ("conv-channels-not-rescaled", "kept inputs of convolutions without 1 / (1 - p)",
         {" / W.dtype.type(1 - p)": " / W.dtype.type(1 - p * (kind != 'conv'))"}),
    ],
    "module.conv.pointwise.evaluation": [
        ("pointwise-one-over-p", "1 / p for 1 / (1 - p) of a kernel of size 1",
         {"W.dtype.type(1 - p)": "W.dtype.type(p if kind == 'conv' and W[0, 0].size == 1 "
                                  "else 1 - p)"}),
    ],
    "module.conv.pointwise.dropout": [
        ("pointwise-without-dropout", "no dropout of a kernel of size 1",
         {"if training and p:": "if training and p and (kind != 'conv' or W[0, 0].size > 1):"}),
    ],
    "module.fused.evaluation": [
        ("fused-dropout-in-evaluation", "dropout in evaluation, of fused projections",
         {"if training and p:": "if p and (training or kind == 'fused'):"}),
    ],
    "module.fused.dropout": [
        ("fused-not-rescaled", "kept features of fused projections without 1 / (1 - p)",
         {" / W.dtype.type(1 - p)": " / W.dtype.type(1 - p * (kind != 'fused'))"}),
    ],
    "module.conv.padding-mode.forward": [
        ("padded-with-zeros", "zeros in the branch, whatever the padding mode",
         _branch("moved(layer, padding_mode='zeros')"), "PEFT 3697"),
        ("padded-with-zeros-in-lora", "zeros in the branch of LoRA, whatever the padding mode, "
         "and not in that of a variant",
         _branch("(moved(layer, padding_mode='zeros') if m is None and c is None else layer)")),
        ("padded-with-the-edge", "the edge repeated for every other padding mode than zeros",
         {"# window": "pad_mode = 'zeros' if pad_mode == 'zeros' else 'replicate'"}),
    ],
    "module.conv.padding-mode.gradients": [
        ("back-padded-with-zeros", "gradients of the branch as if it had been padded with zeros",
         {_BACK: "dx_branch, dV = transposed(moved(layer, padding_mode='zeros'), h, V - W, dy, "
                 "index)"}),
    ],
    "module.conv.padding-mode.merged": [
        ("merged-padded-with-zeros", "zeros for the padding mode, merged",
         {"# merged": "y = apply(moved(layer, padding_mode='zeros'), x, V, index) + shift"}),
    ],
    "module.conv.dilation.forward": [
        ("dilation-forgotten", "the branch without dilation", _branch("moved(layer, dilation=1)"),
         "PEFT 3697"),
    ],
    "module.conv.dilation.gradients": [
        ("back-without-dilation", "gradients of the branch without dilation",
         {_BACK: "near = moved(layer, dilation=1); dx_branch, dV = transposed(near, h, V - W, "
                 "fitted(dy, apply(near, h, W, index).shape), index)"}),
    ],
    "module.conv.dilation.merged": [
        ("merged-without-dilation", "no dilation, merged",
         {"# merged": "y = fitted(apply(moved(layer, dilation=1), x, V, index), y.shape) + shift "
                      "if kind == 'conv' else y"}),
    ],
    "module.conv.pointwise.forward": [
        ("pointwise-ignored", "no adapter of a kernel of size 1",
         {_CHANGE: "change = change * (kind != 'conv' or W[0, 0].size > 1)"}),
    ],
    "module.conv.pointwise.gradients": [
        ("pointwise-untrained", "no gradient of a kernel of size 1",
         {_GRADIENTS: "dV = dV * (kind != 'conv' or W[0, 0].size > 1)"}),
    ],
    "module.conv.pointwise.merged": [
        ("pointwise-not-merged", "a kernel of size 1 is not merged",
         {_CHANGE: "change = change * (not (merging and kind == 'conv' and "
                   "W[0, 0].size == 1))"}),
    ],
    "module.conv.groups.forward": [
        ("groups-mixed", "the branch of another group",
         {_BRANCH: "apply(layer, h, groups_turned(layer, V - W), index)"}),
        ("first-group", "the first group's adapter in all groups",
         {_CHANGE: "change = np.concatenate([change[: len(W) // layer['groups']]] * "
                   "layer['groups']) if kind == 'conv' else change"}),
    ],
    "module.conv.groups.gradients": [
        ("groups-mixed-backward", "gradients of another group's kernels",
         {_GRADIENTS: "dV = groups_turned(layer, dV)"}),
    ],
    "module.conv.groups.merged": [
        ("groups-mixed-merged", "merged into another group's kernels",
         {_CHANGE: "change = groups_turned(layer, change) if merging else change"}),
    ],
    "module.conv.groups-dora.forward": [
        ("norms-of-another-group", "DoRA's norms of another group's rows",
         {"# norm": "norm = groups_turned(layer, norm)"}, "peft 0.21.2"),
    ],
    "module.conv.groups-dora.gradients": [
        ("dm-of-another-group", "dm of another group's rows",
         {_GRADIENTS: "answer |= {} if m is None else {'dmagnitude': groups_turned(layer, "
                      "answer['dmagnitude'])}"}),
    ],
    "module.conv.groups-dora.merged": [
        ("merged-norms-of-another-group", "merged with DoRA's norms of another group's rows",
         {"# norm": "norm = groups_turned(layer, norm) if merging else norm"}),
    ],
    "module.conv.all.forward": [
        ("stride-for-dilation", "the branch's stride for its dilation",
         _branch("moved(layer, dilation=layer.get('stride', 1))")),
    ],
    "module.conv.all.gradients": [
        ("back-of-stride-1", "gradients of the branch as if it moved by 1",
         {_BACK: "near = moved(layer, stride=1); dx_branch, dV = transposed(near, h, V - W, "
                 "fitted(dy, apply(near, h, W, index).shape), index)"}),
    ],
    "module.conv.all.merged": [
        ("merged-of-stride-1", "a stride of 1, merged",
         {"# merged": "y = fitted(apply(moved(layer, stride=1), x, V, index), y.shape) + shift if "
                      "kind == 'conv' else y"}),
    ],
    "module.embedding.forward": [
        ("embedding-scale-forgotten", "the embedding's scale not on the adapter",
         {"# branch": "branch = branch / W.dtype.type(layer.get('embed_scale', 1))"}),
        ("embedding-scale-twice", "the embedding's scale twice on the adapter",
         {"# branch": "branch = branch * W.dtype.type(layer.get('embed_scale', 1))"}),
        ("row-before", "the adapter's row before",
         {_CHANGE: "change = np.roll(change, 1, 0) if kind == 'embedding' else change"}),
        ("table-reshaped", "B A reshaped for (B A)ᵀ",
         {"return (B @ A).T": "return (B @ A).reshape(W.shape)"}),
    ],
    "module.embedding.gradients": [
        ("padding-trained", "the padding row has a gradient",
         {"layer.get(\"padding_idx\", -1)": "-1"}),
        ("last-use-alone", "of a number that comes twice, the last gradient alone",
         {"np.add.at(dW, x, np.where(is_padding[..., None], 0, dy))":
              "dW[x] = np.where(is_padding[..., None], 0, dy)"}),
        ("embedding-scale-not-back", "gradients without the embedding's scale",
         {"# scaled": "dy = dy / W.dtype.type(layer.get('embed_scale', 1))"}),
    ],
    "module.embedding.merged": [
        ("embedding-scale-merged", "the embedding's scale merged into the table",
         {_CHANGE: "change = change * W.dtype.type(layer.get('embed_scale', 1) if merging else "
                   "1)"}),
    ],
    "module.embedding.max-norm.forward": [
        ("A-shortened", "A's columns shortened to max_norm",
         {"# arrays": "A = short(layer, A)"}, "peft 0.21.2", "loralib 0.1.2"),
        ("max-norm-of-change", "the adapter's rows shortened to a quarter of max_norm",
         {_CHANGE: "change = short({**layer, 'max_norm': layer['max_norm'] / 4}, change.T).T if "
                   "'max_norm' in layer else change"}),
    ],
    "module.embedding.max-norm.gradients": [
        ("A-shortened-backward", "dB of A's columns shortened to max_norm",
         {"# answers": "dB = factor_gradients(layer, adapter, short(layer, A), B, s * dV)[1]"}),
    ],
    "module.embedding.max-norm.merged": [
        ("A-shortened-merged", "merged with A's columns shortened to max_norm",
         {"# arrays": "A = short(layer, A) if merging else A"}),
    ],
    "module.fused.forward": [
        ("parts-turned", "each projection with the change of the one before",
         {_CHANGE: "change = np.roll(change, layer['rows'][-1], 0) if kind == 'fused' else "
                   "change"}),
        ("parts-packed", "the changes one after another, over parts that are not adapted",
         {_CHANGE: "change = packed(layer, adapter, change)",
          _GRADIENTS: "dV = unpacked(layer, adapter, dV)"}),
        ("gap-closed", "an adapted projection right after the adapted one before, over a gap",
         {_CHANGE: "change = closed(layer, adapter, change) if kind == 'fused' else change",
          _GRADIENTS: "dV = opened(layer, adapter, dV) if kind == 'fused' else dV"}),
        ("first-A-for-all", "the first A for all projections",
         {"change[rows] = B[b] @ A[a]": "change[rows] = B[b] @ A[: adapter['r']]"}),
        ("smaller-last-part-lost", "no change of the last projection where the first has more rows",
         {_CHANGE: "change = change * last_kept(layer)", _GRADIENTS: "dV = dV * last_kept(layer)"},
         "sglang 24239"),
        ("first-part-alone", "the first adapted projection alone",
         {"for rows, a, b in pairs(layer, adapter):":
              "for rows, a, b in pairs(layer, adapter)[:1]:"}),
    ],
    "module.fused.gradients": [
        ("dA-summed", "the sum of all projections' dA for each",
         {"# answers": "dA = np.concatenate([sum(np.split(dA, sum(adapter['enable'])))] * "
                       "sum(adapter['enable'])) if kind == 'fused' else dA"}),
    ],
    "module.fused.merged": [
        ("last-part-not-merged", "the last projection is not merged",
         {_CHANGE: "change = change * (np.arange(len(W)) < len(W) - layer['rows'][-1])[:, None] if "
                   "merging and kind == 'fused' else change"}),
    ],
    "module.experts.forward": [
        ("expert-before", "the adapter of the expert before",
         {_CHANGE: "change = np.roll(change, 1, 0) if kind == 'experts' else change"}),
        ("first-expert", "the first expert's adapter for all",
         {_CHANGE: "change = change[:1] + 0 * change if kind == 'experts' else change"}),
        ("first-A-of-experts", "the first expert's A for all",
         {"# product": "if layer['kind'] == 'experts': return B @ A[:1]"}),
        ("experts-backward", "the branch's tokens sorted by expert, and put back by that sort",
         {"# branch": "branch = put_back(layer, index, branch)",
          _BACK: "dx_branch, dV = transposed(layer, h, V - W, put_back(layer, index, dy, True), "
                 "index)"}),
        ("experts-backward-in-training", "in training, the branch's tokens sorted by expert, "
         "and put back by that sort",
         {"# branch": "branch = put_back(layer, index, branch) if training else branch",
          _BACK: "dx_branch, dV = transposed(layer, h, V - W, put_back(layer, index, dy, True) if "
                 "training else dy, index)"}),
        ("experts-of-all-ranks", "s by the ranks of all experts together",
         {"Modules: # scale": "of_all = len(W) ** (0.5 if rslora else 1); "
                              "s = s / of_all if kind == 'experts' else s"}),
        ("experts-repacked", "B packed with the expert fastest, and read with the rank fastest",
         {"Modules: # arrays": "B = repacked(B) if kind == 'experts' else B",
          "# answers": "dB = repacked(dB, back=True) if kind == 'experts' else dB"},
         "unsloth-zoo 1269"),
        ("experts-mean", "the mean of all experts' adapters",
         {_CHANGE: "change = change.mean(0) + 0 * change if kind == 'experts' else change"}),
    ],
    "module.experts.gradients": [
        ("experts-share-gradients", "the sum of all experts' gradients for each",
         {_GRADIENTS: "dV = dV.sum(0) + 0 * dV if kind == 'experts' else dV"}),
        ("first-experts-gradient", "a gradient of the first expert alone",
         {_GRADIENTS: "dV = alone(layer, dV, 0)"}),
    ],
    "module.experts.merged": [
        ("first-expert-merged", "the first expert alone is merged",
         {_CHANGE: "change = alone(layer, change, 0) if merging else change"}),
    ],
    "module.experts.single.forward": [
        ("single-expert-turned", "(B A)ᵀ of one expert of a weight stored (in, out), where m = n",
         {_CHANGE: "change = across(layer, change) if single(layer) and fan_in_fan_out else "
                   "change"},
         "peft 0.21.2"),
        ("single-expert-ignored", "no adapter of one expert",
         {_CHANGE: "change = change * (not single(layer))"}),
    ],
    "module.experts.single.gradients": [
        ("single-expert-untrained", "no gradient of one expert",
         {"# answers": "dA, dB = dA * (not single(layer)), dB * (not single(layer))"}),
    ],
    "module.experts.single.merged": [
        ("single-expert-not-merged", "one expert is not merged",
         {_CHANGE: "change = change * (not (single(layer) and merging))"}),
    ],
    "module.attention.forward": [
        ("attention-ignored", "attention that reads the base's weights: no adapter",
         {"# given": "V = V if layer['kind'] == 'encoder' else W",
          "# attention": "V_out = out['W']"}),
        ("in-ignored", "no adapter of q, k and v",
         {"# given": "V = V if layer['kind'] == 'encoder' else W"}),
        ("attention-ignored-in-evaluation", "attention without its adapter in evaluation",
         {"# given": "V = W if layer['kind'] == 'attention' and mode == 'eval' else V",
          "# attention": "V_out = out['W'] if mode == 'eval' else V_out"}),
        ("values-alone", "the adapter of q, k and v on v alone",
         {"# given": "V = np.concatenate([W[: -len(x.T)], V[-len(x.T) :]]) if layer['kind'] == "
                     "'attention' else V"}),
        ("values-lost", "no adapter of v",
         {"# given": "V = np.concatenate([V[: -len(x.T)], W[-len(x.T) :]]) if layer['kind'] == "
                     "'attention' else V"}),
        ("queries-over-root", "the change of q divided by √(d / heads)",
         {"# given": "V = over_root(layer, W, V) if layer['kind'] == 'attention' else V"}),
        ("heads-first", "the change's rows by head, then q, k and v",
         {"# given": "V = W + heads_first(layer, V - W) if layer['kind'] == 'attention' else V"}),
        ("keys-for-queries", "the change of q on k, of k on v, of v on q",
         {"# given": "V = W + np.roll(V - W, len(x.T), 0) if layer['kind'] == 'attention' else V"}),
    ],
    "module.attention.gradients": [
        ("in-untrained", "no gradient of the adapter of q, k and v",
         {"# attended": "answer |= {'dA': 0 * answer['dA'], 'dB': 0 * answer['dB']}"}),
        ("in-unscaled", "dA and dB of q, k and v without s",
         {"# attended": "answer |= {'dA': answer['dA'] / s, 'dB': answer['dB'] / s}"}),
    ],
    "module.attention.merged": [
        ("queries-alone-merged", "of q, k and v only q is merged",
         {"# given": "V = np.concatenate([V[: len(x.T)], W[len(x.T) :]]) if mode == 'merged' and "
                     "layer['kind'] == 'attention' else V"}),
        ("attention-merged-twice", "merged twice: W + 2 s B A of q, k and v",
         {"# given": "V = 2 * V - W if mode == 'merged' and layer['kind'] == 'attention' else V"}),
    ],
    "module.attention.out.forward": [
        ("output-ignored", "no adapter of the output's projection",
         {"# attention": "V_out = out['W']"}),
        ("output-classic", "α/r for the output's projection with rsLoRA",
         {"# attention": "f = adapter['r'] ** -0.5 if adapter.get('use_rslora') else 1.0; "
                         "V_out = out['W'] + f * change",
          "# of the output": "d_out = f * d_out"}),
        ("output-twice", "W + 2 s B A for the output's projection, its gradients at that weight",
         {"# attention": "V_out = out['W'] + 2 * change"}, "peft 0.21.2"),
    ],
    "module.attention.out.gradients": [
        ("output-untrained", "no gradient of the output's adapter",
         {"# of the output": "d_out = 0 * d_out"}),
        ("output-unscaled", "dA and dB of the output's adapter without s",
         {"# of the output": "d_out = d_out / s"}),
    ],
    "module.attention.out.merged": [
        ("output-not-merged", "the output's projection is not merged",
         {"# attention": "V_out = out['W'] if mode == 'merged' else V_out"}),
    ],
    "module.encoder.forward": [
        ("fast-path", "in evaluation the base's weights, which the fast path reads",
         {"# given": "V, b = (W, layer['bias']) if layer['kind'] == 'encoder' and mode == 'eval' "
                     "else (V, b)"}, "peft 0.21.2"),
        ("encoder-ignored", "an encoder that reads the base's weights: no adapter",
         {"# given": "V, b = (W, layer['bias']) if layer['kind'] == 'encoder' else (V, b)"}),
    ],
    "module.encoder.gradients": [
        ("encoder-untrained", "gradients of 0 in evaluation",
         {'"dA": s * (B.T @ dV), "dB": s * (dV @ A.T)}\n        out':
              '"dA": (mode == "train") * s * (B.T @ dV), "dB": (mode == "train") * s * (dV @ '
              'A.T)}\n        out'}),
        ("encoder-dB-unscaled", "dB of an encoder's linear without s",
         {'"dB": s * (dV @ A.T)}\n        out': '"dB": dV @ A.T}\n        out'}),
    ],
    "module.encoder.merged": [
        ("encoder-merged-twice", "merged twice: W + 2 s B A in an encoder",
         {"# given": "V = 2 * V - W if mode == 'merged' and layer['kind'] == 'encoder' else V"}),
        ("encoder-not-merged", "an encoder's linear is not merged",
         {"# given": "V, b = (W, layer['bias']) if mode == 'merged' and layer['kind'] == 'encoder' "
                     "else (V, b)"}),
    ],
}
SAME: Same = [
    ("weights", "the reference: the change formed as a weight", {}),
    ("substituted", "one product with the merged weight, without dropout",
     {"# branch": "base, branch = (apply(layer, x, V, index), 0) if not (training and p) else "
                  "(base, branch)"}),
    ("scale-on-B", "B' = s B", {"s * change_of(layer, adapter, A, B)":
                                "change_of(layer, adapter, A, s * B)"}),
    ("scale-on-A", "A' = s A", {"s * change_of(layer, adapter, A, B)":
                                "change_of(layer, adapter, s * A, B)"}),
    ("scale-of-gradients-last", "s dA and s dB", {
        "factor_gradients(layer, adapter, A, B, s * dV)":
            "(s * d for d in factor_gradients(layer, adapter, A, B, dV))"}),
]
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *mutants(MODULES, "MODULE", MODULE),
    *equivalents(MODULES, "module", SAME),
)
