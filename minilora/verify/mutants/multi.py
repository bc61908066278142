"""Mutants of several adapters, combined into one change or mixed in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import numpy as np

from minilora.verify.mutants.mutant import Mutant, Reference, Same, Table, equivalents, mutants
from minilora.verify.mutants.references.helpers import Array, wide
from minilora.verify.mutants.references.linear import Linear

Adapter = Mapping[str, Any]


def padded(factors: Sequence[Array], axis: int) -> Any:
    """The sum of factors of unequal ranks, each padded with zeros."""
    r = max(v.shape[axis] for v in factors)
    missing = [[(0, r - v.shape[axis]) if i == axis else (0, 0) for i in (0, 1)] for v in factors]
    return sum(np.pad(v, pad) for v, pad in zip(factors, missing, strict=True))


def cross_terms(layer: Linear, adapters: Sequence[Adapter], w: Sequence[float]) -> Any:
    """The weighted sum of the B times the sum of the A."""
    scaled = [wi * layer.scale(**a) * wide(a["B"]) for a, wi in zip(adapters, w, strict=True)]
    return padded(scaled, 1) @ padded([wide(a["A"]) for a in adapters], 0)


def roots(layer: Linear, adapters: Sequence[Adapter], w: Sequence[float]) -> Any:
    """The same with the root of each weight on both factors."""
    root = [abs(wi * layer.scale(**a)) ** 0.5 for a, wi in zip(adapters, w, strict=True)]
    B = [v * wide(a["B"]) for a, v in zip(adapters, root, strict=True)]
    A = [np.sign(wi) * v * wide(a["A"]) for a, wi, v in zip(adapters, w, root, strict=True)]
    return padded(B, 1) @ padded(A, 0)


def first_factors(layer: Linear, adapters: Sequence[Adapter], w: Sequence[float]) -> Any:
    """B of each with A of the first, as far as the ranks go."""
    r = min(a["r"] for a in adapters)
    first = wide(adapters[0]["A"])[:r]
    pairs = zip(adapters, w, strict=True)
    return sum(wi * layer.scale(**a) * (wide(a["B"])[:, :r] @ first) for a, wi in pairs)


def equal_ranks(layer: Linear, adapters: Sequence[Adapter], w: Sequence[float]) -> Any:
    """Where all ranks are equal, the weighted sum of the B times the mean of the A."""
    if len({a["r"] for a in adapters}) > 1 or len(adapters) == 1:
        return layer.weighted(adapters, w)
    return cross_terms(layer, adapters, w) / len(adapters)


def rank_for_alpha(
    layer: Linear, adapters: Sequence[Adapter], w: Sequence[float], settings: Mapping[str, Any]
) -> Any:
    """The sum as one adapter whose α is its rank, by the first one's rule; roots in float32.

    Of one adapter the factors are stored in their dtype before they are multiplied.
    """
    rank = settings.get("svd_rank") or sum(a["r"] for a in adapters)
    s = of_first(layer, adapters, {"svd_rank": rank})
    if len(adapters) > 1:
        return s * layer.weighted(adapters, w)
    A, B = wide(adapters[0]["A"]), wide(adapters[0]["B"])
    root = np.float32(abs(w[0] * layer.scale(**adapters[0])) ** 0.5).astype(A.dtype)
    kept = [(root * v).astype(adapters[0]["A"].dtype) for v in (B, np.sign(w[0]) * A)]
    return s * (wide(kept[0]) @ wide(kept[1]))


def of_first(layer: Linear, adapters: Sequence[Adapter], settings: Mapping[str, Any]) -> Any:
    """The scale of an adapter whose α is its rank, by the first one's rule."""
    rank = settings.get("svd_rank") or adapters[0]["r"]
    return layer.scale(alpha=rank, r=rank, use_rslora=adapters[0].get("use_rslora", False))


def by_shape(adapters: Sequence[Adapter], w: Sequence[float]) -> tuple[list[Adapter], list[float]]:
    """Adapters in a table by what they are called with: the last of a rank and an alpha."""
    table: dict[Any, tuple[Adapter, float]] = {}
    for a, wi in zip(adapters, w, strict=True):
        key = a["r"], a["alpha"]
        table[key] = a, wi + table.get(key, (a, 0.0))[1]
    return [a for a, _ in table.values()], [wi for _, wi in table.values()]


def projected(change: Array, rank: int) -> Any:
    """The truncated SVD of a change's projection on the image of random vectors."""
    start = np.random.default_rng(0).standard_normal((change.shape[1], rank + 2))
    Q, _ = np.linalg.qr(change.astype(np.float64) @ start)
    U, sigma, Vt = np.linalg.svd(Q.T @ change, full_matrices=False)
    return Q @ ((U[:, :rank] * sigma[:rank]) @ Vt[:rank])


def cut(adapter: Adapter, r: int) -> Adapter:
    """The first ranks of an adapter, under the scale of all."""
    return {**adapter, "A": adapter["A"][:r], "B": adapter["B"][:, :r]}


def stale(adapters: Sequence[Adapter], i: int) -> Adapter:
    """A buffer of the greatest rank, in which rows beyond the rank hold the next adapter's."""
    one, other = adapters[i], adapters[(i + 1) % len(adapters)]
    r, more = len(one["A"]), len(other["A"]) - len(one["A"])
    if i < 0 or more <= 0:
        return one
    A = np.concatenate([one["A"], other["A"][r:]])
    B = np.concatenate([one["B"], other["B"][:, r:]], axis=1)
    return {**one, "A": A, "B": B}


def clipped(B: Array, A: Array) -> Any:
    """B A, the entries of both cut off at the 0.99 quantile of all of them."""
    most = np.quantile(np.concatenate([B.ravel(), A.ravel()]), 0.99)
    return np.clip(B, -most, most) @ np.clip(A, -most, most)


MULTI_ADAPTER = Reference((Linear,), {**globals(), "isqrt": isqrt})

CLASSIC = (
    'products = np.array([wi * self.scale(**{{**a, "use_rslora": False}}) for a, wi in '
    'zip(adapters, w, strict=True)]) if kind == "{}" else products; of_B = abs(products) ** 0.5; '
    "of_A = np.sign(products) * of_B"
)
"""The roots of α/r for every adapter, in one way to combine."""

# fmt: off
COMBINE: Table = {
    "combine.weighted": [
        ("cross-terms", "(Σ w s B)(Σ A)",
         {"self.weighted(adapters, w)":
              "cross_terms(self, adapters, w)"}, "peft 3013", "peft 1155"),
        ("roots", "(Σ √|w s| B)(Σ ±√|w s| A)",
         {"self.weighted(adapters, w)": "roots(self, adapters, w)"}),
        ("first-A", "Σ w s B A₁",
         {"self.weighted(adapters, w)": "first_factors(self, adapters, w)"}),
        ("mean-A", "(Σ w s B)(Σ A / count) of equal ranks",
         {"self.weighted(adapters, w)": "equal_ranks(self, adapters, w)"}),
        ("same-shape", "adapters that agree in r and α counted as the last of them",
         {"# combine": "adapters, w = by_shape(adapters, w)"}),
        ("eight-ranks", "only the first 8 ranks are used", {"# arrays": "A, B = A[:8], B[:, :8]"}),
        ("weight-squared", "Σ w² s B A", {"# combine": "w = [abs(v) * v for v in w]"}),
        ("sign-lost", "Σ |w| s B A", {"# combine": "w = [abs(v) for v in w]"}, "peft 2918"),
        ("weights-ignored", "Σ s B A", {"# combine": "w = [1.0] * len(w)"}),
        ("averaged", "Σ w s B A / count", {"# combine": "w = [v / len(w) for v in w]"}),
        ("normalised", "Σ w s B A / Σ |w|", {"# combine": "w = [v / sum(map(abs, w)) for v in w]"}),
        ("weights-reversed", "the weights reversed", {"# combine": "w = w[::-1]"}),
        ("weights-shifted", "each adapter with the next one's weight",
         {"# combine": "w = w[1:] + w[:1]"}),
        ("first-weight", "Σ w₁ s B A", {"# combine": "w = w[:1] * len(w)"}),
        ("negative-dropped", "negative weights taken for 0",
         {"# combine": "w = [max(v, 0) for v in w]"}),
        ("first-only", "the first adapter alone",
         {"# combine": "w = w[:1] + [0.0] * (len(w) - 1)"}),
        ("last-only", "the last adapter alone", {"# combine": "w = [0.0] * (len(w) - 1) + w[-1:]"}),
        ("last-lost", "all adapters except the last", {"# combine": "w = w[:-1] + [0.0]"}),
        ("no-scale", "Σ w B A", {"ds = s": "ds = s = 1.0"}),
        ("alpha", "Σ w α B A", {"ds = s": "ds = s = alpha"}),
        ("first-scale", "Σ w s₁ B A", {"self.delta(a)": "self.scale(**adapters[0]) * product(a)"}),
        ("last-scale", "the last adapter's s for all",
         {"self.delta(a)": "self.scale(**adapters[-1]) * product(a)"}),
        ("summed-rank", "α / Σ r, the rank of the concatenation",
         {"self.delta(a)": 'a["alpha"] / sum(v["r"] for v in adapters) * product(a)'}),
        ("greatest-rank", "α / max r",
         {"self.delta(a)": 'a["alpha"] / max(v["r"] for v in adapters) * product(a)'}),
        ("rslora-lost", "α/r with rsLoRA", {"ds = s": "ds = s = alpha / r"}),
        ("rslora-all", "α/√r for all", {"ds = s": "ds = s = alpha / r**0.5"}),
        ("overscaled", "s √r with rsLoRA: the rank is divided out twice",
         {"ds = s": "ds = s = s * r**0.5 if use_rslora else s"}, "peft 3449", "peft 3761"),
        ("root-cut", "α / ⌊√r⌋ with rsLoRA",
         {"ds = s": "ds = s = alpha / (isqrt(r) if use_rslora else r)"}),
        ("half-rank", "α / (r / 2) with rsLoRA",
         {"ds = s": "ds = s = alpha / (r / 2 if use_rslora else r)"}),
        ("sum-0", "each weight 1/16 greater where they sum to 0",
         {"# combine": "w = [v + 0.0625 for v in w] if abs(sum(w)) < 1e-6 else w"}),
        ("rank-for-alpha", "√r Σ w s B A where the first has rsLoRA: α = r of the sum, whose rule "
         "is the first one's; of one adapter by √s in float32 on both factors",
         {"self.weighted(adapters, w)": "rank_for_alpha(self, adapters, w, settings)",
          "# rounded": "change = change if kind in ('cat', 'svd') else change * of_first(self, "
                      "adapters, settings)"},
         "peft 0.21"),
        ("scale-squared", "Σ w s² B A", {"ds = s": "ds = s = s**2"}),
        ("smallest-rank", "every adapter truncated to the smallest rank",
         {"# combine": 'adapters = [cut(a, min(v["r"] for v in adapters)) for a in adapters]'}),
        ("turned", "Σ w s (B A)ᵀ where m = n",
         {"V = W + delta": "delta = delta.T if square(W) else delta; V = W + delta"}),
        ("coarse", "each s B A rounded to half of the dtype's digits",
         {"V = W + delta": "delta = coarse(delta, dtype); V = W + delta"}),
        ("bfloat16", "each s B A rounded to bfloat16",
         {"V = W + delta": "delta = digits(delta, 8); V = W + delta"}),
        ("first-call-weights", "the first call's weights in every call",
         {"# combine": 'w = list(first_call(self.memory, "w", w))'}),
    ],
    "combine.single": [
        ("one-merged", "a single adapter's scale applied twice",
         {"self.weighted(adapters, w)":
              "self.weighted(adapters, w) * (self.scale(**adapters[0]) if len(w) == 1 else 1)"}),
    ],
    "combine.negative-weight": [
        ("negative-absolute", "|w| where there is a single adapter",
         {"# combine": "w = [abs(v) for v in w] if len(w) == 1 else w"}, "peft 3004"),
    ],
    "combine.zero-weight": [
        ("zero-is-one", "w = 0 taken for 1", {"# combine": "w = [v or 1.0 for v in w]"}),
        ("all-zero", "the mean of the adapters where all weights are 0",
         {"# combine": "w = w if any(w) else [1 / len(w)] * len(w)"}),
    ],
    "combine.split-weight": [
        ("same-once", "an adapter that is given twice counts once",
         {"# combine":
              'n = 1 if np.array_equal(adapters[0]["A"], adapters[-1]["A"]) else None; '
              "adapters, w = adapters[:n], w[:n]"}),
        ("averaged-from-four", "Σ w s B A / count where there are more than three adapters",
         {"# combine": "w = [v / len(w) for v in w] if len(w) > 3 else w"}),
    ],
    "combine.order": [
        ("sorted", "the adapters sorted by rank, their weights not",
         {"# combine": 'adapters = sorted(adapters, key=lambda a: a["r"])'}),
    ],
    "combine.svd": [
        ("smallest-values", "the smallest singular values instead of the greatest",
         {"(U[:, :rank] * sigma[:rank]) @ Vt[:rank]":
              "(U[:, -rank:] * sigma[-rank:]) @ Vt[-rank:]"}),
        ("values-lost", "singular values taken for 1: U Vᵀ",
         {"* sigma[:rank]": "* (sigma[:rank] > 0)"}),
        ("values-squared", "U σ² Vᵀ", {"* sigma[:rank]": "* sigma[:rank] ** 2"}),
        ("values-rooted", "U √σ Vᵀ", {"* sigma[:rank]": "* sigma[:rank] ** 0.5"}),
        ("one-value-less", "rank - 1 singular values",
         {'settings["svd_rank"]': 'settings["svd_rank"] - 1'}),
        ("rank-one", "the greatest singular value alone", {'settings["svd_rank"]': "1"}),
        ("rank-four", "at least 4 singular values",
         {'settings["svd_rank"]': 'max(4, settings["svd_rank"])'}),
        ("values-clipped", "the SVD's factors cut off at the 0.99 quantile of their entries",
         {"change = (U[:, :rank] * sigma[:rank]) @ Vt[:rank]":
              "change = clipped(U[:, :rank] * sigma[:rank], Vt[:rank])"},
         "peft's extract_lora, svd_clamp"),
        ("one-projection",
         "ΔW on the image of rank + 2 random vectors, truncated: a randomised SVD without "
         "iterations",
         {"(U[:, :rank] * sigma[:rank]) @ Vt[:rank]": "projected(change, rank)"}),
    ],
    "combine.cat": [
        ("cat-unweighted", "Σ s B A where the concatenation is asked for by its name",
         {"# combine": 'w = [1.0] * len(w) if settings.get("combination_type") == "cat" else w'}),
    ],
    "combine.many": [
        ("eight-adapters", "the first eight adapters alone",
         {"# combine": "w = w[:8] + [0.0] * (len(w) - 8)"}),
    ],
    "combine.linear": [
        ("linear-sum", "Σ w s B A where the linear combination is asked for",
         {'kind in ("cat", "svd")': 'kind in ("cat", "svd", "linear")'}),
        ("linear-signs", "the sign of w s on both factors, where it is lost",
         {"# roots": 'of_B = of_A if kind == "linear" else of_B'}, "peft 3004"),
        ("linear-weighted-A", "w s on A, and B without",
         {"# roots":
              'of_A, of_B = (products, products**0) if kind == "linear" else (of_A, of_B)'}),
        ("linear-scale-on-B", "√|w| on both factors, and s on B alone",
         {"# roots":
              'root, of_w = np.abs(w) ** 0.5, [self.scale(**a) for a in adapters]; of_A, of_B = '
              '(np.sign(products) * root, root * of_w) if kind == "linear" else (of_A, of_B)'}),
        ("linear-classic", "√|w α/r| with rsLoRA",
         {"products = np.array([wi * self.scale(**a)":
              "products = np.array([wi * self.scale(**{**a, 'use_rslora': False})"}),
        ("linear-classic-alone", "√|w α/r| with rsLoRA in the linear combination alone",
         {"# roots": CLASSIC.format("linear")}),
        ("linear-unscaled", "the linear combination without s",
         {"# roots":
              'root = np.sqrt(np.abs(w)); of_A, of_B = (np.sign(w) * root, root) if kind == '
              '"linear" else (of_A, of_B)'}),
    ],
    "combine.ties": [
        ("ties-classic-alone", "√|w α/r| with rsLoRA in TIES alone",
         {"# roots": CLASSIC.format("ties")}),
        ("ties-not-trimmed", "TIES without trimming",
         {"# trim": 'count = D[0].size if kind == "ties" else count'}),
        ("ties-mean-of-all", "TIES: the mean over all adapters, agreeing or not",
         {"np.maximum(agree.sum(0), 1)": "len(D)"}),
        ("ties-sum", "TIES: the sum of the entries that agree, and no mean",
         {"np.maximum(agree.sum(0), 1)": "1"}),
        ("ties-all-signs", "TIES elects no sign",
         {"agree = np.sign(D) == elected": "agree = D != 0"}),
        ("ties-other-signs", "TIES keeps what disagrees with the elected sign",
         {"agree = np.sign(D) == elected": "agree = np.sign(D) == -elected"}),
        ("ties-per-row", "TIES keeps half of each row",
         {"# trim":
              'if kind == "ties": D = D * (abs(D) >= np.median(abs(D), axis=2, keepdims=True)); '
              "count = D[0].size"}),
        ("ties-most-signs", "TIES elects the sign of most entries, not of their sum",
         {"np.where(D.sum(0) >= 0, 1, -1)": "np.where(np.sign(D).sum(0) >= 0, 1, -1)"},
         "the frequency method, unasked"),
        ("ties-weighted-first", "TIES of w D for D: the weights' signs vote, and are voted on",
         {"# stacked": "D, v = (v * D, 1) if kind.endswith('ties') else (D, v)"}),
        ("ties-weights-elect", "TIES elects with the weights applied",
         {"np.where(D.sum(0) >= 0, 1, -1)": "np.where((v * D).sum(0) >= 0, 1, -1)"}),
    ],
    "combine.magnitude-prune": [
        ("magnitude-prune-classic-alone", "√|w α/r| with rsLoRA in magnitude pruning alone",
         {"# roots": CLASSIC.format("magnitude_prune")}),
        ("prune-least", "magnitude pruning keeps the smallest entries",
         {"abs(D) >= least": 'abs(D) < least if kind == "magnitude_prune" else abs(D) >= least'}),
        ("prune-divided", "magnitude pruning divides by the density",
         {"# trim": 'D = D / density if kind == "magnitude_prune" else D'}),
        ("prune-per-row", "magnitude pruning keeps half of each row",
         {"# trim":
              'if kind == "magnitude_prune": return (v * D * (abs(D) >= np.median(abs(D), axis=2, '
              "keepdims=True))).sum(0)"}),
    ],
    "combine.dare-linear": [
        ("dare-mean", "the mean of adapters for DARE's sum",
         {"# dare": 'v = v / len(D) if kind == "dare_linear" else v'}),
    ],
    "combine.dare-ties": [
        ("dare-no-ties", "DARE with TIES elects no sign",
         {'kind.endswith("ties")': 'kind == "ties"'}),
    ],
    "combine.ties-svd": [
        ("ties-unscaled", "TIES of the changes without s",
         {"# of changes":
              'changes = [product(a) for a in adapters] if kind == "ties_svd" else changes'}),
    ],
    "combine.magnitude-prune-svd": [
        ("prune-after", "magnitude pruning of the sum, and not of each change",
         {"# of changes":
              'total = sum(wi * D for D, wi in zip(changes, w)); changes, w = ([total], [1.0]) if '
              'kind == "magnitude_prune_svd" else (changes, w)'}),
    ],
    "combine.dare-linear-svd": [
        ("dare-unweighted", "DARE of the changes without the weights",
         {"# of changes": 'w = [1.0] * len(w) if kind == "dare_linear_svd" else w'}),
    ],
    "combine.dare-ties-svd": [
        ("dare-ties-unweighted", "DARE with TIES of the changes without the weights",
         {"# of changes": 'w = [1.0] * len(w) if kind == "dare_ties_svd" else w'}),
    ],
    "combine.dare-by-chance": [
        ("dare-not-divided", "what DARE keeps is not divided by the density",
         {"(rng.random(D.shape) < density) / density": "(rng.random(D.shape) < density)"}),
        ("dare-turned", "DARE drops with the density's probability",
         {"rng.random(D.shape) < density": "rng.random(D.shape) >= density"}),
        ("dare-fixed", "DARE's mask is always the same",
         {"# dare": "rng = np.random.default_rng(0)"}),
        ("dare-one-mask", "DARE has one mask for all adapters",
         {"rng.random(D.shape)": "rng.random(D[:1].shape)"}),
        ("dare-none", "DARE keeps everything", {"# dare": "density = 1"}),
    ],
}
MULTI: Table = {
    "multi.forward": [
        ("index-less-one", "index - 1: the adapter before",
         {"# slots": "slots = [i if i < 0 else (i - 1) % len(adapters) for i in slots]"}),
        ("index-more-one", "index + 1: the adapter after",
         {"# slots": "slots = [i if i < 0 else (i + 1) % len(adapters) for i in slots]"}),
        ("first-row", "the first row's adapter for all",
         {"# slots": "slots = slots[:1] * len(slots)"}),
        ("last-row", "the last row's adapter for all",
         {"# slots": "slots = slots[-1:] * len(slots)"}),
        ("sorted", "the index is sorted, the rows are not", {"# slots": "slots = sorted(slots)"}),
        ("reversed", "the index is reversed", {"# slots": "slots = slots[::-1]"}),
        ("segments", "a run of equal indices begins a row too late",
         {"# slots": "slots = slots[:1] + slots[:-1]"}),
        ("slot-0", "adapter 0 for all rows that have one",
         {"# slots": "slots = [min(i, 0) for i in slots]"}),
        ("slot-0-none", "index 0 taken for no adapter",
         {"# slots": "slots = [i or -1 for i in slots]"}),
        ("last-slot-none", "the last index taken for no adapter",
         {"# slots": "slots = [i if i < len(adapters) - 1 else -1 for i in slots]"}),
        ("none-last", "index -1 taken for the last adapter",
         {"# slots": "slots = [len(adapters) - 1 if i < 0 else i for i in slots]"}),
        ("none-first", "index -1 taken for adapter 0",
         {"# slots": "slots = [max(i, 0) for i in slots]"}),
        ("stale", "a padded buffer holds another adapter's rows beyond the rank",
         {"# adapter": "adapter = stale(adapters, i)"}),
        ("slot-0-scale", "adapter 0's s for all",
         {"# adapter":
              'adapter = {**adapter, "alpha": self.scale(**adapters[0]) * adapter["r"], '
              '"use_rslora": False}'}),
        ("no-scale", "s = 1", {"ds = s": "ds = s = 1.0"}),
        ("greatest-rank", "α / max r",
         {"# adapter":
              'adapter = {**adapter, "alpha": adapter["alpha"] / max(v["r"] for v in adapters) '
              '* adapter["r"], "use_rslora": False}'}),
        ("greatest-rank-by-rule", "α / max r, and α / √max r with rsLoRA",
         {"# adapter":
              'adapter = {**adapter, "alpha": self.scale(**{**adapter, "r": max(v["r"] for v in '
              'adapters)}) * adapter["r"], "use_rslora": False}'}),
        ("rslora-lost", "α/r with rsLoRA", {"ds = s": "ds = s = alpha / r"}),
        ("smallest-rank", "every adapter truncated to the smallest rank",
         {"# adapter": 'adapter = cut(adapter, min(v["r"] for v in adapters))'}),
        ("other-B", "B's rows shifted by one",
         {"# adapter": 'adapter = {**adapter, "B": np.roll(adapter["B"], 1, axis=0)}'}),
        ("branch-twice", "the branch twice", {"# branch": "branch = 2 * branch"}),
        ("branch-alone", "no base where there is an adapter", {"base + branch": "branch"}),
        ("rows-sorted", "the rows come back in the order of their adapters",
         {"# answers": 'y = y[np.argsort(index, kind="stable")]'}),
        ("all-adapters", "every adapter is applied to every row that has one",
         {'else row["y"]':
              'else row["y"] + sum(self.layer(W, x=x[j : j + 1], **a)["branch"] for k, a in '
              "enumerate(adapters) if k != i)"}),
        ("first-call-index", "the first call's index in every call",
         {"# slots":
              "slots = [min(int(i), len(adapters) - 1) for i in first_call(self.memory, "
              '"index", index)]'}),
        ("call-before", "the previous call's index",
         {"# slots":
              "slots = [min(int(i), len(adapters) - 1) for i in call_before(self.memory, "
              '"index", index)]'}),
        ("coarse", "the branch rounded to half of the dtype's digits",
         {"# branch": "branch = coarse(branch, dtype)"}),
        ("none-zeroed", "y = 0 for rows without an adapter", {'row["base"]': '0 * row["base"]'}),
        ("root-cut", "α / ⌊√r⌋ with rsLoRA",
         {"ds = s": "ds = s = alpha / (isqrt(r) if use_rslora else r)"}),
        ("half-rank", "α / (r / 2) with rsLoRA",
         {"ds = s": "ds = s = alpha / (r / 2 if use_rslora else r)"}),
        ("sixty-four-rows", "rows from the 65th on have the adapters of the first",
         {"# slots": "slots = [slots[j % 64] for j in range(len(slots))]"}),
        ("fourth", "an index above 2 taken for 0",
         {"# slots": "slots = [0 if i > 2 else i for i in slots]"}),
        ("eight-rows", "no adapter for rows beyond the eighth",
         {"# slots": "slots = [i if j < 8 else -1 for j, i in enumerate(slots)]"}),
        ("equal-ranks", "adapter 0's α for all where all ranks are equal",
         {"# adapter":
              'adapter = {**adapter, "alpha": adapters[0 if len({v["r"] for v in adapters}) == '
              '1 else i]["alpha"]}'}),
        ("fifth-is-first", "adapter 4 and later are taken modulo 4",
         {"# slots": "slots = [i if i < 4 else i % 4 for i in slots]"}),
        ("rows-beyond-256", "no adapter for rows beyond 256",
         {"# slots": "slots = [i if j < 256 else -1 for j, i in enumerate(slots)]"}),
        ("alpha-absolute", "|α| for α",
         {"# slots": 'adapters = [{**a, "alpha": abs(a["alpha"])} for a in adapters]'}),
    ],
    "multi.again": [
        ("last-of-call", "a row without an adapter has that of the last row of the call before",
         {"# slots":
              'last = self.memory.get("last", -1); self.memory["last"] = slots[-1]; slots = '
              '[last if i < 0 and last < len(adapters) else i for i in slots]'}),
        ("none-once", "rows without an adapter are left out in the first call alone",
         {"# slots":
              'seen = self.memory.get("seen"); self.memory["seen"] = True; slots = [max(i, 0) '
              'if seen else i for i in slots]'}),
    ],
    "multi.base-rows": [
        ("none-off", "rows without an adapter are off by 2⁻⁷ where others have one",
         {'row["base"]': 'row["base"] * (1 + 2.0**-7 * (max(slots) >= 0))'}),
    ],
    "multi.row-order": [
        ("by-place", "a row's position in the batch taken for its index",
         {"# slots": "slots = [j % len(adapters) if i >= 0 else i for j, i in enumerate(slots)]"}),
    ],
    "multi.adapter-order": [
        ("remembered", "the first call's adapters in every call",
         {"# slots": 'adapters = self.memory.setdefault(f"{W.shape} {x.dtype}", adapters)'}),
    ],
    "multi.unused-adapter": [
        ("unused-added", "adapter 1 is added to adapter 0's rows",
         {'else row["y"]':
              'else row["y"] + (self.layer(W, x=x[j : j + 1], **adapters[1])["branch"] * '
              "2.0**-3 if i == 0 else 0)"}),
    ],
    "multi.single": [
        ("all-zero", "no adapter for any row where every index is 0",
         {"# slots": "slots = slots if any(slots) else [-1] * len(slots)"}),
        ("one-row", "y of one row has shape (m,)", {"# answers": "y = y[0] if len(y) == 1 else y"}),
        ("one-adapter", "no adapter for any row where all rows have the same",
         {"# slots": "slots = [-1] * len(slots) if len(set(slots)) == 1 else slots"}),
    ],
    "multi.base-row-first": [
        ("none-and-one", "no adapter for any row where the first has none",
         {"# slots": "slots = [-1] * len(slots) if slots[0] < 0 else slots"}, "sglang 5928"),
    ],
}
SAME_COMBINE: Same = [
    ("sum", "one after another", {}),
    ("concatenated", "[w s B …] [A; …]",
     {"self.weighted(adapters, w)":
          'np.concatenate([wi * self.scale(**a) * wide(a["B"]) for a, wi in zip(adapters, w, '
          'strict=True)], axis=1) @ np.concatenate([wide(a["A"]) for a in adapters])'}),
    ("weight-on-A", "Σ B (w s A)",
     {"self.weighted(adapters, w)":
          'sum(wide(a["B"]) @ (wi * self.scale(**a) * wide(a["A"])) for a, wi in zip(adapters, '
          "w, strict=True))"}),
    ("roots", "Σ (√|w s| B) (±√|w s| A)",
     {"self.weighted(adapters, w)":
          'sum(((root := abs(wi * self.scale(**a)) ** 0.5) * wide(a["B"])) @ (np.sign(wi) * '
          'root * wide(a["A"])) for a, wi in zip(adapters, w, strict=True))'}),
    ("reversed", "from the last to the first",
     {"# combine": "adapters, w = adapters[::-1], w[::-1]"}),
    ("wide", "in float64, rounded at the end", {"# arrays": "W, A, B = doubled(W, A, B)"}),
]
SAME_MULTI: Same = [
    ("rows", "row by row", {}),
    ("masked", "every adapter on all rows, masked",
     {'row["base"] if i < 0 else row["y"]':
          'row["base"] + sum(self.layer(W, x=x[j : j + 1], **a)["branch"] * (k == i) for k, a '
          "in enumerate(adapters))"}),
    ("root-on-both", "(x (√s A)ᵀ) (√s B)ᵀ",
     {"s * (H @ B.T)": "x @ (abs(s) ** 0.5 * A).T @ (np.sign(s) * abs(s) ** 0.5 * B).T"}),
    ("wide", "in float64, rounded at the end",
     {"# inputs": "x = np.float64(x)", "# arrays": "W, A, B = doubled(W, A, B)"}),
]
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *mutants(MULTI_ADAPTER, "COMBINE", COMBINE),
    *mutants(MULTI_ADAPTER, "MULTI", MULTI),
    *equivalents(MULTI_ADAPTER, "combine", SAME_COMBINE),
    *equivalents(MULTI_ADAPTER, "multi", SAME_MULTI),
)
