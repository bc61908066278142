"""Several adapters, combined into one change or mixed in one batch, misread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import numpy as np

from minilora.verify.mutants.mutant import Mutant, equivalents, family
from minilora.verify.mutants.reference import (
    Array,
    Call,
    Plain,
    but,
    coarse,
    digits,
    from_call_before,
    from_first_call,
    reads,
    then,
    wide,
)

Given = Mapping[str, Any]


def _each(change: Any) -> Any:
    """`Plain` with other weights: a function of (weights, calls)."""
    return but(change=lambda my, calls, w: Plain.change(my, calls, change(w, calls)))


def _padded(factors: Sequence[Array], axis: int) -> Any:
    """The sum of factors of unequal ranks, each padded with zeros."""
    r = max(v.shape[axis] for v in factors)
    missing = [[(0, r - v.shape[axis]) if i == axis else (0, 0) for i in (0, 1)] for v in factors]
    return sum(np.pad(v, pad) for v, pad in zip(factors, missing, strict=True))


def _cross_terms(my: Plain, calls: list[Call], w: list[float]) -> Any:
    scaled = [wi * my.s(c) * c.B for c, wi in zip(calls, w, strict=True)]
    return _padded(scaled, 1) @ _padded([c.A for c in calls], 0)


def _roots(my: Plain, calls: list[Call], w: list[float]) -> Any:
    roots = [abs(wi * my.s(c)) ** 0.5 for c, wi in zip(calls, w, strict=True)]
    signs = [np.sign(wi) for wi in w]
    B = _padded([root * c.B for c, root in zip(calls, roots, strict=True)], 1)
    pairs = zip(calls, roots, signs, strict=True)
    return B @ _padded([sign * root * c.A for c, root, sign in pairs], 0)


def _scaled(s: Any) -> Any:
    """`Plain` whose combination takes another scale: a function of (call, all calls)."""

    def change(my: Plain, calls: list[Call], w: list[float]) -> Any:
        return sum(wi * s(c, calls) * (c.B @ c.A) for c, wi in zip(calls, w, strict=True))

    return but(change=change)


def _rslora(c: Call, root: float) -> float:
    """The scale with another root of the rank."""
    return float(c.alpha / (root if c.rslora else c.r))


def _right(c: Call) -> float:
    return float(c.alpha / (c.r**0.5 if c.rslora else c.r))


def _first_factors(my: Plain, calls: list[Call], w: list[float]) -> Any:
    """B of each with A of the first, as far as the ranks go."""
    r = min(c.r for c in calls)
    first = calls[0].A[:r]
    return sum(wi * my.s(c) * (c.B[:, :r] @ first) for c, wi in zip(calls, w, strict=True))


def _equal_ranks(my: Plain, calls: list[Call], w: list[float]) -> Any:
    if len({c.r for c in calls}) > 1 or len(calls) == 1:
        return Plain.change(my, calls, w)
    B = sum(wi * my.s(c) * c.B for c, wi in zip(calls, w, strict=True))
    return B @ (sum(c.A for c in calls) / len(calls))


def _by_shape(my: Plain, calls: list[Call], w: list[float]) -> Any:
    """Adapters in a table by what they are called with: the last of a rank and an alpha."""
    table: dict[Any, tuple[Call, float]] = {}
    for c, wi in zip(calls, w, strict=True):
        table[c.r, c.alpha] = c, wi + table.get((c.r, c.alpha), (c, 0.0))[1]
    return Plain.change(my, [c for c, _ in table.values()], [wi for _, wi in table.values()])


def _sigma(change: Any) -> Any:
    """`Plain` whose SVD keeps other singular values: a function of (σ, rank)."""

    def best(my: Plain, delta: Array, rank: int) -> Any:
        U, sigma, Vt = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
        return (U * change(sigma, rank)) @ Vt

    return but(best=best)


def _projected(my: Plain, delta: Array, rank: int) -> Any:
    start = np.random.default_rng(0).standard_normal((delta.shape[1], rank + 2))
    Q, _ = np.linalg.qr(delta.astype(np.float64) @ start)
    return Q @ Plain.best(my, Q.T @ delta, rank)


def _first(sigma: Array, rank: int) -> Any:
    return np.where(np.arange(len(sigma)) < rank, sigma, 0)


COMBINE = (
    *family(
        "COMBINE",
        "combine.weighted",
        ("cross-terms", "(Σ w s B)(Σ A)", but(change=_cross_terms), "peft 3013", "peft 1155"),
        ("roots", "(Σ √|w s| B)(Σ ±√|w s| A)", but(change=_roots)),
        ("first-A", "Σ w s B A₁", but(change=_first_factors)),
        ("mean-A", "(Σ w s B)(Σ A / count) of equal ranks", but(change=_equal_ranks)),
        ("same-shape", "the last of those that agree in r and α", but(change=_by_shape)),
        ("eight-ranks", "all ranks but eight are lost", reads(
            A=lambda c: c.A[:8], B=lambda c: c.B[:, :8])),
        ("weight-squared", "Σ w² s B A", _each(lambda w, _: [abs(v) * v for v in w])),
        ("sign-lost", "Σ |w| s B A", _each(lambda w, _: [abs(v) for v in w]), "peft 2918"),
        ("weights-ignored", "Σ s B A", _each(lambda w, _: [1.0] * len(w))),
        ("averaged", "Σ w s B A / count", _each(lambda w, _: [v / len(w) for v in w])),
        (
            "normalised",
            "Σ w s B A / Σ |w|",
            _each(lambda w, _: [v / sum(map(abs, w)) for v in w]),
        ),
        ("weights-reversed", "the last weight first", _each(lambda w, _: w[::-1])),
        ("weights-shifted", "each the next one's weight", _each(lambda w, _: w[1:] + w[:1])),
        ("first-weight", "Σ w₁ s B A", _each(lambda w, _: [w[0]] * len(w))),
        ("negative-dropped", "only w > 0", _each(lambda w, _: [max(v, 0) for v in w])),
        ("first-only", "w₁ s₁ B₁ A₁", _each(lambda w, _: [w[0]] + [0.0] * (len(w) - 1))),
        ("last-only", "the last adapter alone", _each(lambda w, _: [0.0] * (len(w) - 1) + [w[-1]])),
        ("last-lost", "without the last adapter", _each(lambda w, _: [*w[:-1], 0.0])),
        ("no-scale", "Σ w B A", _scaled(lambda c, _: 1.0)),
        ("alpha", "Σ w α B A", _scaled(lambda c, _: c.alpha)),
        ("first-scale", "Σ w s₁ B A", _scaled(lambda c, calls: _right(calls[0]))),
        ("last-scale", "s of the last for all", _scaled(lambda c, calls: _right(calls[-1]))),
        (
            "summed-rank",
            "α / Σ r, the rank of the concatenation",
            _scaled(lambda c, calls: c.alpha / sum(each.r for each in calls)),
        ),
        (
            "greatest-rank",
            "α / max r",
            _scaled(lambda c, calls: c.alpha / max(each.r for each in calls)),
        ),
        ("rslora-lost", "α/r with rsLoRA", _scaled(lambda c, _: c.alpha / c.r)),
        (
            "rslora-all",
            "α/√r for all, if one is rsLoRA's",
            _scaled(lambda c, calls: c.alpha / c.r**0.5),
        ),
        (
            "overscaled",
            "s √r with rsLoRA: the rank is divided out twice",
            _scaled(lambda c, _: _right(c) * (c.r**0.5 if c.rslora else 1)),
            "peft 3449",
            "peft 3761",
        ),
        ("root-cut", "α / ⌊√r⌋ with rsLoRA", _scaled(lambda c, _: _rslora(c, isqrt(c.r)))),
        ("half-rank", "α / (r / 2) with rsLoRA", _scaled(lambda c, _: _rslora(c, c.r / 2))),
        ("sum-0", "1 / 16 more of each weight where their sum is 0",
         _each(lambda w, _: [v + 0.0625 for v in w] if abs(sum(w)) < 1e-6 else w)),
        ("scale-squared", "Σ w s² B A", _scaled(lambda c, _: _right(c) ** 2)),
        (
            "smallest-rank",
            "all truncated to the smallest rank",
            but(
                change=lambda my, calls, w: Plain.change(
                    my, [_cut(c, min(each.r for each in calls)) for c in calls], w
                )
            ),
        ),
        (
            "turned",
            "Σ w s (B A)ᵀ where m = n",
            then(delta=lambda v, c: v.T if v.shape[0] == v.shape[1] else v),
        ),
        ("coarse", "each s B A kept in half of the digits", then(delta=coarse)),
        ("bfloat16", "each s B A rounded to bfloat16", then(delta=lambda v, c: digits(v, 8))),
        (
            "first-call-weights",
            "the weights of the first call for all",
            but(
                change=lambda my, calls, w: Plain.change(
                    my, calls, list(from_first_call(my, "w", np.array(w)))
                )
            ),
        ),
    ),
    *family(
        "COMBINE",
        "combine.single",
        ("one-merged", "B A of one adapter alone, its scale folded in twice",
         but(change=lambda my, calls, w: Plain.change(my, calls, w)
             * (my.s(calls[0]) if len(calls) == 1 else 1))),
    ),
    *family(
        "COMBINE",
        "combine.negative-weight",
        ("negative-absolute", "|w| where there is one adapter",
         _each(lambda w, calls: [abs(v) for v in w] if len(w) == 1 else w)),
    ),
    *family(
        "COMBINE",
        "combine.zero-weight",
        ("zero-is-one", "w = 0 taken for 1", _each(lambda w, _: [v or 1.0 for v in w])),
        ("all-zero", "weights that are all 0 taken for none: the mean of all adapters",
         _each(lambda w, _: w if any(w) else [1 / len(w)] * len(w))),
    ),
    *family(
        "COMBINE",
        "combine.halves",
        ("same-once", "an adapter that is given twice counts once", but(
            change=lambda my, calls, w: (
                Plain.change(my, calls[:1], w[:1])
                if np.array_equal(calls[0].A, calls[-1].A)
                else Plain.change(my, calls, w)
            ))),
    ),
    *family(
        "COMBINE",
        "combine.order",
        ("sorted", "adapters sorted by rank, weights not", but(
            change=lambda my, calls, w: Plain.change(my, sorted(calls, key=lambda c: c.r), w))),
    ),
    *family(
        "COMBINE",
        "combine.svd",
        ("smallest-values", "the smallest singular values", _sigma(
            lambda v, rank: np.where(np.arange(len(v)) >= len(v) - rank, v, 0))),
        ("values-lost", "U Vᵀ", _sigma(lambda v, rank: _first(v, rank) > 0)),
        ("values-squared", "U σ² Vᵀ", _sigma(lambda v, rank: _first(v, rank) ** 2)),
        ("values-rooted", "U √σ Vᵀ", _sigma(lambda v, rank: _first(v, rank) ** 0.5)),
        ("one-value-less", "rank - 1", _sigma(lambda v, rank: _first(v, rank - 1))),
        ("rank-one", "the greatest singular value alone", _sigma(lambda v, rank: _first(v, 1))),
        ("rank-four", "rank 4 at least", _sigma(lambda v, rank: _first(v, max(4, rank)))),
        ("one-projection", "ΔW on the image of rank + 2 random vectors, truncated: a randomised "
         "SVD without iterations", but(best=_projected)),
    ),
)  # fmt: skip


def _cut(c: Call, r: int) -> Call:
    return Call(**vars(c) | {"A": c.A[:r], "B": c.B[:, :r]})


def _slots(change: Any) -> Any:
    """`Plain` that reads another index: a function of (slots, adapters)."""
    return but(slots=lambda my, index, adapters: change([int(i) for i in index], adapters))


def _turned_base(slots: list[int], count: int) -> list[int]:
    return [i if i < count else -1 for i in slots]


def _stale(my: Plain, adapters: Sequence[Given], i: int) -> Given:
    """A buffer of the greatest rank, in which rows beyond the rank hold the next adapter's."""
    own, other = adapters[i], adapters[(i + 1) % len(adapters)]
    r, more = len(own["A"]), len(other["A"]) - len(own["A"])
    if i < 0 or more <= 0:
        return own
    A = np.concatenate([own["A"], other["A"][r:]])
    B = np.concatenate([own["B"], other["B"][:, r:]], axis=1)
    return {**own, "A": A, "B": B}


def _sorted_rows(my: Plain, rows: Array, index: Array) -> Any:
    return rows[np.argsort(index, kind="stable")]


def _all_none(slots: list[int], adapters: Sequence[Given]) -> list[int]:
    return [-1] * len(slots) if slots[0] < 0 else slots


def _segments(slots: list[int], adapters: Sequence[Given]) -> list[int]:
    """Runs of one adapter, each begun a row too late."""
    return [slots[max(0, j - 1)] for j in range(len(slots))]


def _with_slot(**changes: Any) -> Any:
    """`Plain` with entries of each row's adapter changed: functions of (adapters, i)."""
    return but(
        slot=lambda my, adapters, i: {
            **adapters[i], **{name: f(adapters, i) for name, f in changes.items()}
        }
    )  # fmt: skip


def _mixed(my: Plain, index: Array, adapters: Sequence[Given]) -> list[int]:
    my.memory["mixed"] = bool((index >= 0).any())
    return Plain.slots(my, index, adapters)


def _loaded_once(my: Plain, x: Array, W: Array, adapters: Sequence[Given], index: Array) -> Array:
    loaded = my.memory.setdefault(f"slots of {W.shape} {x.dtype}", adapters)
    return Plain.multi_adapter(my, x, W, loaded, index)


MULTI = (
    *family(
        "MULTI",
        "multi.forward",
        ("index-less-one", "the adapter before", _slots(
            lambda v, a: [i if i < 0 else (i - 1) % len(a) for i in v])),
        ("index-more-one", "the adapter after", _slots(
            lambda v, a: [i if i < 0 else (i + 1) % len(a) for i in v])),
        ("first-row", "the first row's adapter for all", _slots(lambda v, a: [v[0]] * len(v))),
        ("last-row", "the last row's adapter for all", _slots(lambda v, a: [v[-1]] * len(v))),
        ("sorted", "a sorted index", _slots(lambda v, a: sorted(v))),
        ("reversed", "a reversed index", _slots(lambda v, a: v[::-1])),
        ("segments", "runs that begin a row too late", _slots(_segments)),
        ("slot-0", "slot 0 for all", _slots(lambda v, a: [i if i < 0 else 0 for i in v])),
        ("slot-0-none", "slot 0 is none", _slots(lambda v, a: [-1 if i == 0 else i for i in v])),
        ("last-slot-none", "the last slot is none", _slots(
            lambda v, a: _turned_base(v, len(a) - 1))),
        ("none-last", "-1 is the last adapter", _slots(
            lambda v, a: [len(a) - 1 if i < 0 else i for i in v])),
        ("none-first", "-1 is slot 0", _slots(lambda v, a: [max(i, 0) for i in v])),
        ("stale", "rows beyond the rank hold another adapter's", but(slot=_stale)),
        ("slot-0-scale", "s of slot 0 for all", _with_slot(
            alpha=lambda a, i: a[0]["alpha"] / a[0]["r"] * a[i]["r"],
            use_rslora=lambda a, i: False)),
        ("no-scale", "s = 1", _with_slot(
            alpha=lambda a, i: a[i]["r"], use_rslora=lambda a, i: False)),
        ("greatest-rank", "α / max r", _with_slot(
            alpha=lambda a, i: a[i]["alpha"] / max(v["r"] for v in a) * a[i]["r"],
            use_rslora=lambda a, i: False)),
        ("rslora-lost", "α/r with rsLoRA", _with_slot(use_rslora=lambda a, i: False)),
        ("smallest-rank", "the ranks that all have", _with_slot(
            A=lambda a, i: a[i]["A"][: min(v["r"] for v in a)],
            B=lambda a, i: a[i]["B"][:, : min(v["r"] for v in a)])),
        ("other-B", "A of one adapter, B of the next of its rank", _with_slot(
            B=lambda a, i: np.roll(a[i]["B"], 1, axis=0))),
        ("branch-twice", "the branch twice", then(branch=lambda v, c: 2 * v)),
        ("branch-alone", "without the base where there is an adapter", but(
            y=lambda my, c: my.branch(c))),
        ("rows-sorted", "rows come back in the order of their adapters",
         but(gathered_rows=_sorted_rows)),
        ("all-adapters", "every row with all adapters", but(
            row=lambda my, x, W, adapters, i: Plain.row(my, x, W, adapters, i)
            + (sum(my.branch(my.adapter(a, W, x)) for k, a in enumerate(adapters) if k != i)
               if i >= 0 else 0))),
        ("first-call-index", "the index of the first call for all", but(
            slots=lambda my, index, a: [
                min(int(i), len(a) - 1) for i in from_first_call(my, "index", index)])),
        ("call-before", "the index of the call before", but(
            slots=lambda my, index, a: [
                min(int(i), len(a) - 1) for i in from_call_before(my, "index", index)])),
        ("coarse", "the branch kept in half of the digits", then(branch=coarse)),
        ("none-zeroed", "0 where there is no adapter", but(none=lambda my, c: 0 * my.base(c))),
        ("root-cut", "α / ⌊√r⌋ with rsLoRA", _with_slot(
            alpha=lambda a, i: a[i]["alpha"] * (
                a[i]["r"] ** 0.5 / isqrt(a[i]["r"]) if a[i].get("use_rslora") else 1))),
        ("half-rank", "α / (r / 2) with rsLoRA", _with_slot(
            alpha=lambda a, i: a[i]["alpha"] * (
                2 / a[i]["r"] ** 0.5 if a[i].get("use_rslora") else 1))),
        ("sixty-four-rows", "the rows from the 65th on have the adapters of the first", _slots(
            lambda v, a: [v[j % 64] for j in range(len(v))])),
        ("fourth", "slots for three: a fourth is slot 0", _slots(
            lambda v, a: [0 if i > 2 else i for i in v])),
        ("eight-rows", "the rows beyond the eighth have none", _slots(
            lambda v, a: [i if j < 8 else -1 for j, i in enumerate(v)])),
        ("equal-ranks", "s of slot 0 for all of equal ranks", _with_slot(
            alpha=lambda a, i: a[0 if len({v["r"] for v in a}) == 1 else i]["alpha"])),
    ),
    *family(
        "MULTI",
        "multi.base-rows",
        ("none-off", "rows without an adapter off by 2⁻⁷ where others have one", but(
            slots=_mixed, none=lambda my, c: my.base(c) * (1 + 2.0**-7 * my.memory["mixed"]))),
    ),
    *family(
        "MULTI",
        "multi.row-order",
        ("by-place", "the adapter of a row's place", _slots(
            lambda v, a: [j % len(a) if i >= 0 else i for j, i in enumerate(v)])),
    ),
    *family(
        "MULTI",
        "multi.adapter-order",
        ("remembered", "the adapters of the first call stay loaded",
         but(multi_adapter=_loaded_once)),
    ),
    *family(
        "MULTI",
        "multi.unused-adapter",
        ("unused-added", "unused adapters are added to slot 0", but(
            row=lambda my, x, W, adapters, i: Plain.row(my, x, W, adapters, i)
            + (my.branch(my.adapter(adapters[1], W, x)) * 2.0**-3 if i == 0 else 0))),
    ),
    *family(
        "MULTI",
        "multi.single",
        ("all-zero", "the base alone where no index is true: all rows have slot 0", _slots(
            lambda v, a: v if any(v) else [-1] * len(v))),
        ("one-row", "y of one row is a vector (m,)", but(
            gathered_rows=lambda my, rows, index: rows[0] if len(rows) == 1 else rows)),
        ("one-adapter", "the base alone in a batch of one adapter", but(
            slots=lambda my, index, a: [
                -1 if len(set(index.tolist())) == 1 else int(i) for i in index])),
    ),
    *family(
        "MULTI",
        "multi.base-row-first",
        ("none-and-one", "none for all rows if the first has none",
         _slots(_all_none), "sglang 5928"),
    ),
)  # fmt: skip

SAME = (
    *equivalents(
        "combine",
        ("sum", "one after another", Plain),
        ("concatenated", "[w s B …] [A; …]", but(
            change=lambda my, calls, w: np.concatenate(
                [wi * my.s(c) * c.B for c, wi in zip(calls, w, strict=True)], axis=1)
            @ np.concatenate([c.A for c in calls]))),
        ("weight-on-A", "Σ B (w s A)", but(
            change=lambda my, calls, w: sum(
                c.B @ (wi * my.s(c) * c.A) for c, wi in zip(calls, w, strict=True)))),
        ("roots", "Σ (√|w s| B) (±√|w s| A)", but(
            change=lambda my, calls, w: sum(
                ((root := abs(wi * my.s(c)) ** 0.5) * c.B) @ (np.sign(wi) * root * c.A)
                for c, wi in zip(calls, w, strict=True)))),
        ("reversed", "from the last to the first", but(
            change=lambda my, calls, w: Plain.change(my, calls[::-1], w[::-1]))),
        ("wide", "in float64, rounded at the end", reads(**wide("W", "A", "B"))),
    ),
    *equivalents(
        "multi",
        ("rows", "row by row", Plain),
        ("masked", "every adapter on all rows, masked", but(
            row=lambda my, x, W, adapters, i: my.base(my.adapter(adapters[0], W, x))
            + sum(my.branch(my.adapter(a, W, x)) * (k == i) for k, a in enumerate(adapters)))),
        ("root-on-both", "(x (√s A)ᵀ) (√s B)ᵀ", but(
            branch=lambda my, c: c.x @ (my.s(c) ** 0.5 * c.A).T @ (my.s(c) ** 0.5 * c.B).T)),
        ("wide", "in float64, rounded at the end", reads(**wide("W", "A", "B", "x"))),
    ),
)  # fmt: skip

MUTANTS: tuple[Mutant, ...] = COMBINE + MULTI + SAME
