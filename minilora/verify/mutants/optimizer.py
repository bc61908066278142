"""Optimizers, clipping, schedules and accumulation, misread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minilora.verify.mutants.mutant import Mutant
from minilora.verify.mutants.reference import (
    Array,
    Call,
    Plain,
    but,
    coarse,
    digits,
    narrow,
    reads,
    then,
)
from minilora.verify.mutants.transition import equivalents, family


def _rate_of(A: float, B: float) -> Callable[[], Plain]:
    """`Plain` whose rates of A and B are multiplied by these."""
    return but(rate=lambda my, c, name: Plain.rate(my, c, name) * (A if name.endswith("A") else B))


def _moments(g: Callable[[Array, Call, str], Any]) -> Any:
    """For `but`, ``second``: v of another quantity than the gradient."""
    return lambda my, c, name, gradient: Plain.second(my, c, name, g(gradient, c, name))


def _coupled(my: Plain, c: Call, name: str, p: Array, g: Array) -> Any:
    return Plain.adamw(my, c, name, p, g + c.decay * p)


def _greatest_so_far(my: Plain, c: Call, name: str, g: Array) -> Any:
    c.u[name] = np.maximum(c.u[name], Plain.second(my, c, name, g))
    return c.u[name]


def _nesterov_m(my: Plain, c: Call, name: str, g: Array) -> Any:
    return c.betas[0] * Plain.first(my, c, name, g) + (1 - c.betas[0]) * g


def _eps_before_correction(my: Plain, c: Call, m: Array, v: Array) -> Any:
    return m / (v**0.5 + c.eps / (1 - c.betas[1] ** my.t(c)) ** 0.5)


def _steps(change: Callable[[Any, Any], Any]) -> Callable[[], Plain]:
    """`Plain` whose list of steps is changed by a function of (steps, params)."""
    return but(
        optimizer_steps=lambda my, params, *given: change(
            Plain.optimizer_steps(my, params, *given), params
        )
    )


def _overwritten(steps: Any, params: Any) -> Any:
    for name, p in params.items():
        p[...] = steps[-1][name]
    return steps


ADAMW = (
    *family(
        "OPTIMIZER",
        "optimizer.adamw",
        ("betas-swapped", "β₂, β₁ for β₁, β₂", reads(betas=lambda c: c.betas[::-1])),
        ("beta1-fixed", "β₁ = 0.9", reads(betas=lambda c: (0.9, c.betas[1]))),
        ("beta2-fixed", "β₂ = 0.999", reads(betas=lambda c: (c.betas[0], 0.999))),
        ("one-beta", "β₁ for β₂ too", reads(betas=lambda c: (c.betas[0], c.betas[0]))),
        ("eps-fixed", "ε = 1e-8", reads(eps=lambda c: 1e-8)),
        ("rate-fixed", "η = 1e-3", reads(lr=lambda c: 1e-3)),
        ("decay-none", "λ = 0", reads(decay=lambda c: 0.0)),
        (
            "decay-coupled",
            "g + λ p in m and v",
            but(adamw=_coupled, decayed=lambda my, c, name, p: p),
        ),
        ("decay-without-rate", "(1 - λ) p", but(decayed=lambda my, c, name, p: p * (1 - c.decay))),
        (
            "decay-after",
            "(1 - ηλ) (p - η m̂ / (√v̂ + ε))",
            but(adamw=lambda my, c, name, p, g: my.decayed(c, name, p - my.update(c, name, g))),
        ),
        ("decay-added", "(1 + ηλ) p", reads(decay=lambda c: -c.decay)),
        ("eps-in-root", "m̂ / √(v̂ + ε)", but(direction=lambda my, c, m, v: m / (v + c.eps) ** 0.5)),
        (
            "eps-squared-in-root",
            "m̂ / √(v̂ + ε²)",
            but(direction=lambda my, c, m, v: m / (v + c.eps**2) ** 0.5),
        ),
        (
            "eps-before-correction",
            "m̂ / ((√v + ε) / √(1 - β₂ᵗ))",
            but(direction=_eps_before_correction),
        ),
        ("eps-none", "m̂ / √v̂", reads(eps=lambda c: 0.0)),
        ("no-root", "m̂ / (v̂ + ε)", but(direction=lambda my, c, m, v: m / (v + c.eps))),
        ("sign", "sign(m̂)", but(direction=lambda my, c, m, v: np.sign(m))),
        ("m-alone", "(1 - ηλ) p - η m̂", but(direction=lambda my, c, m, v: m)),
        (
            "sgd",
            "(1 - ηλ) p - η g",
            but(update=lambda my, c, name, g: my.rate(c, name) * g),
        ),
        ("t-from-0", "1 - β⁰ at the first step", but(t=lambda my, c: c.k)),
        ("t-from-2", "1 - β² at the first step", but(t=lambda my, c: c.k + 2)),
        (
            "t-of-parameters",
            "t counts parameters, not steps",
            but(t=lambda my, c: c.k * len(c.m) + 1),
        ),
        (
            "m-undamped",
            "m = β₁ m + g",
            but(first=lambda my, c, name, g: Plain.first(my, c, name, g / (1 - c.betas[0]))),
        ),
        (
            "v-undamped",
            "v = β₂ v + g²",
            but(second=_moments(lambda g, c, name: g / (1 - c.betas[1]) ** 0.5)),
        ),
        (
            "v-of-tensor",
            "v of the mean of g² over a tensor",
            but(second=_moments(lambda g, c, name: 0 * g + (g**2).mean() ** 0.5)),
        ),
        ("v-absolute", "v of |g|", but(second=_moments(lambda g, c, name: abs(g) ** 0.5))),
        ("v-centred", "v of (g - m)²", but(second=_moments(lambda g, c, name: g - c.m[name]))),
        (
            "v-squared-late",
            "(the mean of |g|)² for the mean of g²",
            but(second=lambda my, c, name, g: Plain.second(my, c, name, abs(g) ** 0.5) ** 2),
        ),
        ("v-coarse", "v rounded to half of the digits", then(second=coarse)),
        ("amsgrad", "the greatest v so far", but(second=_greatest_so_far)),
        ("nesterov", "β₁ m + (1 - β₁) g for m", but(first=_nesterov_m)),
        (
            "state-lost",
            "m and v from 0 in every step",
            but(
                first=lambda my, c, name, g: g,
                second=lambda my, c, name, g: g**2,
                corrected=lambda my, c, m, v: (m, v),
            ),
        ),
        ("weights-bfloat16", "p kept in bfloat16", then(stepped=lambda p, c: digits(p, 8))),
        ("weights-coarse", "p kept in half of the digits", then(stepped=coarse)),
        ("ascent", "p + η m̂ / (√v̂ + ε)", then(direction=lambda d, c: -d)),
        (
            "still-skipped",
            "nothing is done where all of a gradient is 0: no decay, no step along m",
            but(
                stepped=lambda my, c, name, p, g: Plain.stepped(my, c, name, p, g) if g.any() else p
            ),
        ),
        (
            "first-step-skipped",
            "no step at k = 0",
            but(stepped=lambda my, c, name, p, g: Plain.stepped(my, c, name, p, g) if c.k else p),
        ),
        (
            "steps-shared",
            "the last step in every entry",
            _steps(lambda steps, params: steps[-1:] * len(steps)),
        ),
        (
            "steps-late",
            "the parameters before each step",
            _steps(lambda steps, params: [params, *steps[:-1]]),
        ),
        ("params-overwritten", "the parameters are changed in place", _steps(_overwritten)),
    ),
    *family(
        "OPTIMIZER",
        "optimizer.adamw.defaults",
        ("decay-default", "λ = 0.01 where 0 is asked for", reads(decay=lambda c: c.decay or 0.01)),
        ("not-corrected", "m / (√v + ε)", but(corrected=lambda my, c, m, v: (m, v))),
        (
            "m-not-corrected",
            "m / (√v̂ + ε)",
            but(corrected=lambda my, c, m, v: (m, Plain.corrected(my, c, m, v)[1])),
        ),
        (
            "v-not-corrected",
            "m̂ / (√v + ε)",
            but(corrected=lambda my, c, m, v: (Plain.corrected(my, c, m, v)[0], v)),
        ),
        (
            "correction-ends",
            "m / (√v + ε) from the eleventh step on",
            but(corrected=lambda my, c, m, v: Plain.corrected(my, c, m, v) if c.k < 10 else (m, v)),
        ),
    ),
)


def _nesterov(my: Plain, c: Call, name: str, p: Array, g: Array) -> Any:
    Plain.sgd(my, c, name, p, g)
    return p - my.rate(c, name) * (g + my.decay(c, name) * p + c.momentum * c.u[name])


def _damped(my: Plain, c: Call, name: str, p: Array, g: Array) -> Any:
    g = g + my.decay(c, name) * p
    c.u[name] = c.momentum * c.u[name] + (1 - c.momentum) * g
    return p - my.rate(c, name) * c.u[name]


def _apart(my: Plain, c: Call, name: str, p: Array, g: Array) -> Any:
    c.u[name] = c.momentum * c.u[name] + g
    return my.decayed(c, name, p) - my.rate(c, name) * c.u[name]


SGD = (
    *family(
        "OPTIMIZER",
        "optimizer.sgd",
        ("sgd-no-momentum", "u = g + λ p", reads(momentum=lambda c: 0.0)),
        ("sgd-damped", "u = μ u + (1 - μ) (g + λ p)", but(sgd=_damped)),
        ("sgd-nesterov", "p - η (g + λ p + μ u)", but(sgd=_nesterov)),
        ("sgd-decay-apart", "(1 - ηλ) p - η u, no λ p in u", but(sgd=_apart)),
    ),
    *family(
        "OPTIMIZER",
        "optimizer.sgd-balance",
        ("decay-on-A", "λ = 0 for B", but(decay=lambda my, c, name: c.decay * name.endswith("A"))),
        ("decay-on-B", "λ = 0 for A", but(decay=lambda my, c, name: c.decay * name.endswith("B"))),
        ("A-frozen", "A stays", _rate_of(A=0, B=1)),
        ("B-frozen", "B stays", _rate_of(A=1, B=0)),
    ),
)

CLIP = family(
    "OPTIMIZER",
    "optimizer.clip",
    ("clip-none", "g", but(clipped=lambda my, c, g: g)),
    (
        "clip-none-adamw",
        "g under AdamW",
        reads(greatest=lambda c: float("inf") if c.optimizer == "adamw" else c.greatest),
    ),
    (
        "clip-per-tensor",
        "each gradient clipped by itself",
        but(clipped=lambda my, c, g: {n: Plain.clipped(my, c, {n: v})[n] for n, v in g.items()}),
    ),
    (
        "clip-by-value",
        "g between -max and max",
        but(clipped=lambda my, c, g: {n: v.clip(-c.greatest, c.greatest) for n, v in g.items()}),
    ),
    (
        "clip-always",
        "g max / ‖g‖ below the maximum too",
        but(
            clipped=lambda my, c, g: {
                n: v * min(9.0, c.greatest / my.norm(c, g)) for n, v in g.items()
            }
        ),
    ),
    ("clip-L1", "‖g‖ = Σ |g|", but(norm=lambda my, c, g: sum(abs(v).sum() for v in g.values()))),
    (
        "clip-largest",
        "‖g‖ = max |g|",
        but(norm=lambda my, c, g: max(abs(v).max() for v in g.values())),
    ),
    ("clip-squared", "‖g‖²", then(norm=lambda v, c: v**2)),
    (
        "clip-sum-of-norms",
        "the sum of the gradients' norms",
        but(norm=lambda my, c, g: sum((v**2).sum() ** 0.5 for v in g.values())),
    ),
    (
        "clip-root-mean-square",
        "‖g‖ / √(the number of entries)",
        but(norm=lambda my, c, g: Plain.norm(my, c, g) / sum(v.size for v in g.values()) ** 0.5),
    ),
    (
        "clip-last-tensor",
        "the last gradient's norm",
        but(norm=lambda my, c, g: (list(g.values())[-1] ** 2).sum() ** 0.5),
    ),
    (
        "clip-A-alone",
        "the norm of A's gradients",
        but(
            norm=lambda my, c, g: Plain.norm(my, c, {n: v for n, v in g.items() if n.endswith("A")})
        ),
    ),
    (
        "clip-B-not-scaled",
        "B's gradients as they are",
        but(
            clipped=lambda my, c, g: (
                Plain.clipped(my, c, g) | {n: v for n, v in g.items() if n.endswith("B")}
            )
        ),
    ),
)

SCHEDULE = (
    *family(
        "OPTIMIZER",
        "optimizer.linear-schedule",
        ("schedule-none", "η", but(factor=lambda my, c, k: 1.0)),
        (
            "schedule-one-ahead",
            "the factor of step k + 1",
            but(factor=lambda my, c, k: Plain.factor(my, c, k + 1)),
        ),
        (
            "schedule-one-behind",
            "the factor of step k - 1",
            but(factor=lambda my, c, k: Plain.factor(my, c, max(0, k - 1))),
        ),
        (
            "schedule-warmup-from-1",
            "(k + 1) / warmup",
            but(factor=lambda my, c, k: Plain.factor(my, c, k + (k < c.warmup))),
        ),
        (
            "schedule-no-warmup",
            "the factor of the warm-up's end before it",
            but(factor=lambda my, c, k: Plain.factor(my, c, max(k, c.warmup))),
        ),
        (
            "schedule-warmup-counted",
            "1 - k / total",
            but(
                factor=lambda my, c, k: (
                    1 - k / c.total
                    if c.schedule == "linear" and k >= c.warmup
                    else Plain.factor(my, c, k)
                )
            ),
        ),
        (
            "schedule-one-step-shorter",
            "total - 1 for total",
            reads(total=lambda c: max(1, c.total - 1)),
        ),
        (
            "schedule-cosine-for-linear",
            "(1 + cos πq) / 2",
            reads(schedule=lambda c: "cosine" if c.schedule == "linear" else c.schedule),
        ),
        (
            "schedule-A-alone",
            "B without schedule",
            but(
                rate=lambda my, c, name: (
                    Plain.rate(my, c, name) if name.endswith("A") else c.lr * c.ratio
                )
            ),
        ),
        (
            "schedule-decay-alone-constant",
            "λ times the rate before its schedule",
            but(decayed=lambda my, c, name, p: p * (1 - c.lr * c.decay)),
        ),
    ),
    *family(
        "OPTIMIZER",
        "optimizer.cosine-schedule",
        (
            "schedule-linear-for-cosine",
            "1 - q",
            reads(schedule=lambda c: "linear" if c.schedule == "cosine" else c.schedule),
        ),
        (
            "schedule-cosine-not-halved",
            "1 + cos πq",
            but(
                factor=lambda my, c, k: (
                    Plain.factor(my, c, k) * (2 if c.schedule == "cosine" and k >= c.warmup else 1)
                )
            ),
        ),
        (
            "schedule-cosine-not-squared",
            "cos (πq/2)",
            but(
                factor=lambda my, c, k: (
                    Plain.factor(my, c, k)
                    ** (0.5 if c.schedule == "cosine" and k >= c.warmup else 1)
                )
            ),
        ),
    ),
)

SCHEDULE += family(
    "OPTIMIZER",
    "optimizer.cosine-schedule.past-end",
    (
        "schedule-cosine-rises-again",
        "(1 + cos πq) / 2 with q beyond 1",
        but(
            factor=lambda my, c, k: (
                (1 + np.cos(np.pi * (k - c.warmup) / (c.total - c.warmup))) / 2
                if c.schedule == "cosine" and k >= c.warmup
                else Plain.factor(my, c, k)
            )
        ),
        "transformers",
    ),
)


def _greater(is_B: Callable[[str], bool]) -> Callable[[], Plain]:
    """`Plain` whose B are those of these names."""
    return but(rate=lambda my, c, name: Plain.rate(my, c, "B" if is_B(name) else "A"))


LORAPLUS = family(
    "OPTIMIZER",
    "optimizer.loraplus.other-params",
    ("loraplus-not-A", "η ratio for all but A", _greater(lambda name: not name.endswith(".A"))),
    (
        "loraplus-vectors",
        "η ratio for B and for biases",
        _greater(lambda name: name.endswith((".B", "bias"))),
        "peft 0.21",
    ),
    (
        "loraplus-capital-in-name",
        "η ratio where the name has a B",
        _greater(lambda name: "B" in name),
    ),
    (
        "loraplus-at-least-1",
        "η max(1, ratio) for B",
        reads(ratio=lambda c: max(1.0, c.ratio)),
    ),
    (
        "loraplus-b-in-name",
        "η ratio where the name has a b",
        _greater(lambda name: "b" in name.lower()),
    ),
    (
        "loraplus-no-embedding",
        "η for the B of an embedding",
        _greater(lambda name: name.endswith(".B") and not name.startswith("embed")),
    ),
) + family(
    "OPTIMIZER",
    "optimizer.loraplus",
    ("loraplus-ignored", "η for B", reads(ratio=lambda c: 1.0)),
    (
        "loraplus-on-A",
        "η ratio for A, η for B",
        but(rate=lambda my, c, name: c.lr * (c.ratio if name.endswith("A") else 1)),
    ),
    ("loraplus-on-both", "η ratio for A too", but(rate=lambda my, c, name: c.lr * c.ratio)),
    (
        "loraplus-A-divided",
        "η / ratio for A, η for B",
        but(rate=lambda my, c, name: c.lr / (c.ratio if name.endswith("A") else 1)),
    ),
    (
        "loraplus-not-in-decay",
        "ηλ for B's decay too",
        but(decayed=lambda my, c, name, p: p * (1 - c.lr * my.factor(c, c.k) * c.decay)),
    ),
)


def _weighted(weights: Callable[[Sequence[int]], Sequence[float]]) -> Callable[[], Plain]:
    """`Plain` with other weights of the micro-batches, a function of their numbers of labels."""

    def summed(my: Plain, c: Call, parts: list[Any]) -> Any:
        factors = weights([n for n, _ in parts])
        return {
            name: sum(w * g[name] for w, (_, g) in zip(factors, parts, strict=True))
            for name in parts[0][1]
        }

    return but(summed=summed)


ACCUMULATE = family(
    "OPTIMIZER",
    "optimizer.gradient-accumulation",
    (
        "accumulate-mean-of-means",
        "the mean of the gᵢ",
        _weighted(lambda n: [1 / len(n)] * len(n)),
        "transformers 34191",
        "mlx-lm 1413",
    ),
    ("accumulate-sum", "Σ gᵢ", _weighted(lambda n: [1] * len(n))),
    ("accumulate-sum-over-labels", "Σ nᵢ gᵢ", _weighted(lambda n: n)),
    (
        "accumulate-by-parts",
        "Σ nᵢ gᵢ / the number of parts",
        _weighted(lambda n: [v / len(n) for v in n]),
    ),
    (
        "accumulate-by-both",
        "Σ nᵢ gᵢ / (N times the number of parts)",
        _weighted(lambda n: [v / sum(n) / len(n) for v in n]),
    ),
    (
        "accumulate-one-at-least",
        "a micro-batch in which no label counts taken for one of one label",
        _weighted(lambda n: [max(v, 1) / sum(max(v, 1) for v in n) for v in n]),
    ),
    (
        "accumulate-labels-of-a-byte",
        "N in 8 bits",
        _weighted(lambda n: [v / (sum(n) % 256) for v in n]),
    ),
    (
        "accumulate-momentum-default",
        "μ = 0.9 where none is asked for",
        reads(momentum=lambda c: c.momentum or 0.9),
    ),
    (
        "accumulate-last-part",
        "g of the last micro-batch",
        _weighted(lambda n: [0] * (len(n) - 1) + [1]),
    ),
    (
        "accumulate-first-part",
        "g of the first micro-batch",
        _weighted(lambda n: [1] + [0] * (len(n) - 1)),
    ),
    (
        "accumulate-last-part-lost",
        "all micro-batches but the last",
        _weighted(lambda n: [v / sum(n) for v in n[:-1]] + [0]),
    ),
    (
        "accumulate-weights-turned",
        "nᵢ of another micro-batch",
        _weighted(lambda n: [v / sum(n) for v in n[::-1]]),
    ),
    (
        "accumulate-each-part-clipped",
        "every gᵢ clipped, then the mean",
        but(
            summed=lambda my, c, parts: Plain.summed(
                my, c, [(n, Plain.clipped(my, c, g)) for n, g in parts]
            )
        ),
    ),
)


def _one_rate(my: Plain, c: Call, name: str, g: Array) -> Any:
    m, v = my.first(c, name, g), my.second(c, name, g)
    first, second = 1 - c.betas[0] ** my.t(c), (1 - c.betas[1] ** my.t(c)) ** 0.5
    return my.rate(c, name) / first * m / (v**0.5 / second + c.eps)


def _towards(mean: str, beta: int, power: int) -> Any:
    """A running mean as m + (1 - β) (g - m)."""

    def moved(my: Plain, c: Call, name: str, g: Array) -> Any:
        state = getattr(c, mean)
        state[name] = state[name] + (1 - c.betas[beta]) * (g**power - state[name])
        return state[name]

    return moved


def _rate_in_velocity(my: Plain, c: Call, name: str, p: Array, g: Array) -> Any:
    c.u[name] = c.momentum * c.u[name] + my.rate(c, name) * (g + my.decay(c, name) * p)
    return p - c.u[name]


def _stored(state: str, method: str) -> Any:
    """A running mean kept in the dtype under test from step to step."""

    def moved(my: Plain, c: Call, name: str, g: Array) -> Any:
        getattr(c, state)[name] = narrow(getattr(Plain, method)(my, c, name, g), c)
        return getattr(c, state)[name]

    return moved


SAME = equivalents(
    "optimizer",
    ("rows", "as it is", Plain),
    ("one-rate", "η / (1 - β₁ᵗ) m / (√v / √(1 - β₂ᵗ) + ε)", but(update=_one_rate)),
    (
        "towards",
        "m + (1 - β₁) (g - m), v + (1 - β₂) (g² - v)",
        but(first=_towards("m", 0, 1), second=_towards("v", 1, 2)),
    ),
    (
        "decay-subtracted",
        "p - ηλ p",
        but(decayed=lambda my, c, name, p: p - my.rate(c, name) * my.decay(c, name) * p),
    ),
    (
        "labels-last",
        "(Σ nᵢ gᵢ) / N",
        but(
            summed=lambda my, c, parts: {
                name: sum(n * g[name] for n, g in parts) / sum(n for n, _ in parts)
                for name in parts[0][1]
            }
        ),
    ),
    (
        "clip-divided",
        "g / max(1, ‖g‖ / max)",
        but(
            clipped=lambda my, c, g: {
                n: v / max(1.0, (my.norm(c, g) + 1e-6) / c.greatest) for n, v in g.items()
            }
        ),
    ),
    (
        "cosine",
        "(1 + cos πq) / 2",
        but(
            factor=lambda my, c, k: (
                (1 + np.cos(np.pi * (min(k, c.total) - c.warmup) / (c.total - c.warmup))) / 2
                if c.schedule == "cosine" and k >= c.warmup
                else Plain.factor(my, c, k)
            )
        ),
    ),
    (
        "stored",
        "parameters and running means kept in the dtype",
        but(
            stepped=lambda my, c, name, p, g: narrow(Plain.stepped(my, c, name, p, g), c),
            first=_stored("m", "first"),
            second=_stored("v", "second"),
        ),
    ),
)

TOGETHER = (
    *family(
        "OPTIMIZER",
        "optimizer.sgd.linear-schedule",
        (
            "schedule-in-velocity",
            "u = μ u + η (g + λ p), equal only while η is constant",
            but(sgd=_rate_in_velocity),
        ),
        (
            "schedule-ahead-without-warmup",
            "the factor of step k + 1 where there is no warm-up",
            but(
                factor=lambda my, c, k: Plain.factor(
                    my, c, k + (not c.warmup and c.schedule != "constant")
                )
            ),
        ),
        (
            "schedule-none-without-warmup",
            "η where there is no warm-up",
            reads(schedule=lambda c: c.schedule if c.warmup else "constant"),
        ),
        (
            "schedule-below-0",
            "a negative η beyond the last step",
            but(
                factor=lambda my, c, k: (
                    (c.total - k) / (c.total - c.warmup) if k > c.total else Plain.factor(my, c, k)
                )
            ),
        ),
    ),
    *family(
        "OPTIMIZER",
        "optimizer.combined",
        (
            "schedule-constant-without-warmup",
            "no warm-up where the schedule is constant",
            but(
                factor=lambda my, c, k: 1.0 if c.schedule == "constant" else Plain.factor(my, c, k)
            ),
            "transformers get_scheduler",
        ),
    ),
)


MUTANTS: tuple[Mutant, ...] = (
    ADAMW + SGD + CLIP + SCHEDULE + LORAPLUS + ACCUMULATE + TOGETHER + SAME
)
