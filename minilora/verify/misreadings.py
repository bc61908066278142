"""How LoRA goes wrong: wrong implementations, each a few changed lines of one right one.

Each must be caught, so that the checks are known to see; each has a formula, so that a deviation
can be given its name. `Plain` is right and written unlike the specification: tokens in rows, in
another order of operations. A misreading replaces one or two of its methods, or an operation of a
model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

Array = np.ndarray
Call = SimpleNamespace
"""What one call is about: its arrays, options and intermediate state, by short names."""

HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Misreading:
    """One way to read the equations wrongly.

    ``formula`` is what is computed instead, in the notation y = x Wᵀ + b + s H Bᵀ, H = (K∘x) Aᵀ,
    G = ∂L/∂y. ``seen`` names public reports of it. ``make`` gives an implementation that reads so.
    ``caught_by`` is the lowest check that sees it. An ``equivalent`` only looks wrong: it is the
    same function, written differently, and passes all checks.
    """

    id: str
    family: str
    level: str
    formula: str
    seen: tuple[str, ...]
    make: Callable[[], object]
    caught_by: str = ""
    equivalent: bool = False


def _wide(array: Array) -> Array:
    """float16 and bfloat16 as float32."""
    return array.astype(np.float32) if array.dtype.name in HALVES else array


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


class Plain:
    """A right implementation, every quantity a method, so that each can be replaced by a wrong one.

    Half precisions are computed in float32 and rounded once, at the end.
    """

    name = "plain"
    dtypes: ClassVar = ("float64", "float32", *HALVES)
    precision: ClassVar = {h: {"storage": h, "accumulation": "float32"} for h in HALVES}

    def lora_linear(self, x: Array, W: Array, A: Array, B: Array, **options: Any) -> Array:
        """Y of shape (…, m)."""
        c = self.call(W, A, B, x, **options)
        return self.shaped(c, self.y(c)).astype(x.dtype)

    def lora_linear_vjp(
        self, x: Array, W: Array, A: Array, B: Array, dy: Array, **options: Any
    ) -> dict[str, Array]:
        """Y, dx, dA, dB, and dbias where there is a bias."""
        c = self.call(W, A, B, x, dy, **options)
        answer = {"y": self.shaped(c, self.y(c)), "dx": self.shaped(c, self.dx(c))}
        answer |= {"dA": self.dA(c), "dB": self.dB(c)}
        if options.get("bias") is not None:
            answer["dbias"] = self.dbias(c)
        return {name: array.astype(x.dtype) for name, array in answer.items()}

    def merge(self, W: Array, A: Array, B: Array, **options: Any) -> Array:
        """W + s B A."""
        return self.merged(self.call(W, A, B, **options)).astype(W.dtype)

    def unmerge(self, W_merged: Array, A: Array, B: Array, **options: Any) -> Array:
        """W' - s B A."""
        return self.unmerged(self.call(W_merged, A, B, **options)).astype(W_merged.dtype)

    def call(
        self,
        W: Array,
        A: Array,
        B: Array,
        x: Array | None = None,
        dy: Array | None = None,
        *,
        alpha: float,
        r: int,
        bias: Array | None = None,
        keep: Array | None = None,
        p: float = 0.0,
        use_rslora: bool = False,
        fan_in_fan_out: bool = False,
    ) -> Call:
        """The call's arrays with tokens in rows, in float32 at least; K is 1 without dropout."""
        c = Call(W=_wide(W), A=_wide(A), B=_wide(B), alpha=alpha, r=r, p=p, rslora=use_rslora)
        c.conv1d, c.dropout = fan_in_fan_out, keep is not None
        c.b = np.zeros(len(c.W), c.W.dtype) if bias is None else _wide(bias)
        if x is not None:
            c.lead, c.x = x.shape[:-1], self.rows(_wide(x))
            c.dy = None if dy is None else self.rows(_wide(dy))
            c.K = np.ones_like(c.x)
            if keep is not None:
                c.K = self.rows(keep).astype(c.x.dtype) / (1 - p)
        self.read(c)
        return c

    def read(self, c: Call) -> None:
        """Where a misreading changes an array before anything is computed."""

    def rows(self, x: Array) -> Array:
        """A row for each token: (…, n) as (t, n)."""
        return _rows(x)

    def shaped(self, c: Call, rows: Array) -> Array:
        """And back."""
        return rows.reshape(*c.lead, rows.shape[-1])

    def s(self, c: Call) -> Any:
        """The scale, forward."""
        return c.alpha * c.r**-0.5 if c.rslora else c.alpha / c.r

    def ds(self, c: Call) -> Any:
        """The scale, backward."""
        return self.s(c)

    def h(self, c: Call) -> Any:
        """The branch's input."""
        return c.x * c.K

    def u(self, c: Call) -> Any:
        """The branch in rank space."""
        return self.h(c) @ c.A.T

    def branch(self, c: Call) -> Any:
        """What the adapter adds."""
        return self.s(c) * (self.u(c) @ c.B.T)

    def base(self, c: Call) -> Any:
        """What the frozen layer gives."""
        return c.x @ c.W.T + c.b

    def y(self, c: Call) -> Any:
        """Both."""
        return self.base(c) + self.branch(c)

    def du(self, c: Call) -> Any:
        """The gradient by u."""
        return self.ds(c) * (c.dy @ c.B)

    def dA(self, c: Call) -> Any:
        """The gradient by A."""
        return self.du(c).T @ self.h(c)

    def dB(self, c: Call) -> Any:
        """The gradient by B."""
        return self.ds(c) * (c.dy.T @ self.u(c))

    def dx_base(self, c: Call) -> Any:
        """The gradient by x through the base."""
        return c.dy @ c.W

    def dx_branch(self, c: Call) -> Any:
        """The gradient by x through the branch."""
        return c.K * (self.du(c) @ c.A)

    def dx(self, c: Call) -> Any:
        """Both."""
        return self.dx_branch(c) + self.dx_base(c)

    def dbias(self, c: Call) -> Any:
        """The gradient by the bias."""
        return c.dy.sum(0)

    def delta(self, c: Call) -> Any:
        """What a merge adds."""
        return self.s(c) * (c.A.T @ c.B.T).T

    def merged(self, c: Call) -> Any:
        """The weight with the adapter."""
        return c.W + self.delta(c)

    def unmerged(self, c: Call) -> Any:
        """The weight without it again; c.W is the merged one here."""
        return c.W - self.delta(c)

    def optimizer_steps(
        self, params: Mapping[str, Array], gradients: Sequence[Any], settings: Mapping[str, Any]
    ) -> list[dict[str, Array]]:
        """The parameters after each step."""
        dtype = next(iter(params.values())).dtype
        p = {name: _wide(array) for name, array in params.items()}
        c = self.course(p, len(gradients), **settings)
        steps = []
        for k, item in enumerate(gradients):
            c.k, g = k, self.clipped(c, self.gathered(c, item))
            p = {name: self.stepped(c, name, p[name], g[name]) for name in p}
            steps.append({name: array.astype(dtype) for name, array in p.items()})
        return steps

    def course(
        self,
        p: Mapping[str, Array],
        steps: int,
        *,
        optimizer: str,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        max_grad_norm: float = float("inf"),
        schedule: str = "constant",
        warmup_steps: int = 0,
        total_steps: int | None = None,
        loraplus_lr_ratio: float = 1.0,
    ) -> Call:
        """The settings by short names, and the state of each parameter."""
        c = Call(kind=optimizer, lr=lr, betas=betas, eps=eps, mu=momentum, decay=weight_decay)
        c.most, c.schedule, c.warmup, c.ratio = (
            max_grad_norm,
            schedule,
            warmup_steps,
            loraplus_lr_ratio,
        )
        c.total = total_steps or steps
        c.m, c.v, c.u = ({name: np.zeros_like(array) for name, array in p.items()} for _ in "mvu")
        return c

    def gathered(self, c: Call, item: Any) -> Any:
        """The gradient of a step: of one batch, or the mean over all labels of its parts."""
        if isinstance(item, Mapping):
            return {name: _wide(g) for name, g in item.items()}
        parts = [(weight, {name: _wide(g) for name, g in part.items()}) for weight, part in item]
        return self.summed(c, parts)

    def summed(self, c: Call, parts: list[tuple[int, dict[str, Array]]]) -> Any:
        """Σ (nᵢ / N) gᵢ."""
        N = sum(n for n, _ in parts)
        return {name: sum((n / N) * g[name] for n, g in parts) for name in parts[0][1]}

    def norm(self, c: Call, g: Mapping[str, Array]) -> Any:
        """The length of all gradients together."""
        return sum((array**2).sum() for array in g.values()) ** 0.5

    def clipped(self, c: Call, g: dict[str, Array]) -> Any:
        """All gradients scaled alike to at most the greatest norm."""
        length = self.norm(c, g) + 1e-6
        return (
            {name: array * (c.most / length) for name, array in g.items()} if length > c.most else g
        )

    def factor(self, c: Call, k: int) -> Any:
        """The schedule."""
        if k < c.warmup:
            return k / c.warmup
        left = (c.total - k) / (c.total - c.warmup)
        return {"constant": 1.0, "linear": left, "cosine": np.sin(np.pi / 2 * left) ** 2}[
            c.schedule
        ]

    def rate(self, c: Call, name: str) -> Any:
        """The learning rate of a parameter in this step."""
        rate = c.lr * float(self.factor(c, c.k))
        return rate * c.ratio if name.endswith("B") else rate

    def decay(self, c: Call, name: str) -> Any:
        """λ of a parameter."""
        return c.decay

    def stepped(self, c: Call, name: str, p: Array, g: Array) -> Any:
        """A step of the optimizer that was asked for."""
        return self.sgd(c, name, p, g) if c.kind == "sgd" else self.adamw(c, name, p, g)

    def sgd(self, c: Call, name: str, p: Array, g: Array) -> Any:
        """SGD with momentum and coupled decay."""
        c.u[name] = c.mu * c.u[name] + (g + self.decay(c, name) * p)
        return p - self.rate(c, name) * c.u[name]

    def adamw(self, c: Call, name: str, p: Array, g: Array) -> Any:
        """AdamW: decay apart from the gradient."""
        m, v = self.corrected(c, self.first(c, name, g), self.second(c, name, g))
        return self.decayed(c, name, p) - self.rate(c, name) * self.direction(c, m, v)

    def decayed(self, c: Call, name: str, p: Array) -> Any:
        """The parameter after its decay."""
        return p * (1 - self.rate(c, name) * self.decay(c, name))

    def first(self, c: Call, name: str, g: Array) -> Any:
        """The running mean of g."""
        c.m[name] = c.betas[0] * c.m[name] + (1 - c.betas[0]) * g
        return c.m[name]

    def second(self, c: Call, name: str, g: Array) -> Any:
        """The running mean of g²."""
        c.v[name] = c.betas[1] * c.v[name] + (1 - c.betas[1]) * g**2
        return c.v[name]

    def t(self, c: Call) -> Any:
        """The number of the step, from 1."""
        return c.k + 1

    def corrected(self, c: Call, m: Array, v: Array) -> Any:
        """The running means without their bias towards 0."""
        return m / (1 - c.betas[0] ** self.t(c)), v / (1 - c.betas[1] ** self.t(c))

    def direction(self, c: Call, m: Array, v: Array) -> Any:
        """Adam's step before its rate."""
        return m / (v**0.5 + c.eps)


def but(**methods: Any) -> Callable[[], Plain]:
    """`Plain` with these methods in the place of its own."""
    return type("Wrong", (Plain,), methods)


def _changed(my: Plain, c: Call, changes: Mapping[str, Any]) -> Call:
    return Call(**vars(c) | {name: change(my, c) for name, change in changes.items()})


def reads(**changes: Any) -> Callable[[], Plain]:
    """`Plain` that takes these arrays or options of a call for others."""
    return but(read=lambda my, c: c.__dict__.update(vars(_changed(my, c, changes))))


def backward(**changes: Any) -> Callable[[], Plain]:
    """`Plain` whose gradients alone take these arrays or options for others."""
    return but(
        dA=lambda my, c: Plain.dA(my, _changed(my, c, changes)),
        dB=lambda my, c: Plain.dB(my, _changed(my, c, changes)),
        dx_branch=lambda my, c: Plain.dx_branch(my, _changed(my, c, changes)),
    )


def _family(
    family: str, level: str, caught_by: str, *entries: tuple[Any, ...], equivalent: bool = False
) -> tuple[Misreading, ...]:
    """Misreadings from (name, formula, make), and where given: caught by, seen in …"""
    known = []
    for name, formula, make, *more in entries:
        by, *seen = more or ("",)
        at = f"{family.lower()}-{name}"
        by = by or caught_by
        known.append(Misreading(at, family, level, formula, tuple(seen), make, by, equivalent))
    return tuple(known)


def _digits(array: Any, digits: int) -> Any:
    """Rounded to so many binary digits, in the dtype that it has."""
    fraction, exponent = np.frexp(array)
    return np.ldexp(np.round(fraction * 2.0**digits) * 0.5**digits, exponent)


def _coarse(array: Array) -> Array:
    """Rounded to half of the digits that it has."""
    return np.asarray(_digits(array, (np.finfo(array.dtype).nmant + 1) // 2))


def _square(c: Call) -> bool:
    return bool(c.W.shape[0] == c.W.shape[1])


def _first(my: Plain, name: str, value: Any) -> Any:
    """What the first call had under this name, as long as its shape fits."""
    kept = my.__dict__.setdefault(name, value)
    return kept if np.shape(kept) == np.shape(value) else value


def _before(my: Plain, name: str, value: Any) -> Any:
    """What the call before had under this name, if its shape fits."""
    kept = my.__dict__.get(name, value)
    my.__dict__[name] = value
    return kept if np.shape(kept) == np.shape(value) else value


def _piled(my: Plain, name: str, value: Array) -> Any:
    """Added to what the calls before gave under this name, if its shape fits."""
    kept = my.__dict__.get(name)
    my.__dict__[name] = value if kept is None or kept.shape != value.shape else kept + value
    return my.__dict__[name]


SCALE = _family(
    "SCALE",
    "linear",
    "linear.forward",
    ("alpha", "s = α", but(s=lambda my, c: c.alpha), "", "mlx-vlm 841", "mlx-vlm 845"),
    ("root", "s = α/√r, unasked", but(s=lambda my, c: c.alpha / c.r**0.5)),
    (
        "rslora-ignored",
        "s = α/r with rsLoRA",
        but(s=lambda my, c: c.alpha / c.r),
        "linear.forward.rslora",
        "TensorRT-LLM 1668",
        "peft 2733",
    ),
    ("inverse", "s = r/α", but(s=lambda my, c: c.r / c.alpha)),
    ("of-rank-alone", "s = 1/r", but(s=lambda my, c: 1 / c.r)),
    ("one", "s = 1", but(s=lambda my, c: 1.0)),
    ("zero", "s = 0: the adapter is never applied", but(s=lambda my, c: 0.0)),
    ("squared", "s = (α/r)²", but(s=lambda my, c: Plain.s(my, c) ** 2), "", "peft 3111"),
    ("floor", "s = ⌊α/r⌋", but(s=lambda my, c: c.alpha // c.r)),
    ("integer-alpha", "s = ⌊α⌋/r", but(s=lambda my, c: int(c.alpha) / c.r)),
    ("bfloat16", "s = α/r rounded to bfloat16", but(s=lambda my, c: _digits(Plain.s(my, c), 8))),
    ("off-10-ppm", "s = 1.00001 α/r", but(s=lambda my, c: 1.00001 * Plain.s(my, c))),
    ("off-1-percent", "s = 1.01 α/r", but(s=lambda my, c: 1.01 * Plain.s(my, c))),
    ("negative", "s = -α/r", but(s=lambda my, c: -Plain.s(my, c))),
    (
        "of-three-ranks",
        "s = α/(3 r): the rank of stacked A",
        but(s=lambda my, c: c.alpha / 3 / c.r),
    ),
    ("rank-from-B", "s = α/m: r from B's wrong axis", but(s=lambda my, c: c.alpha / len(c.B))),
    ("rank-from-A", "s = α/n: r from A's wrong axis", but(s=lambda my, c: c.alpha / c.A.shape[1])),
    (
        "first-call",
        "s of the first call for all adapters",
        but(s=lambda my, c: _first(my, "s0", Plain.s(my, c))),
        "",
        "diffusers 14409",
    ),
    ("of-base", "y = s (x Wᵀ + b + H Bᵀ)", but(base=lambda my, c: my.s(c) * Plain.base(my, c))),
    (
        "of-bias",
        "y = x Wᵀ + s b + s H Bᵀ",
        reads(b=lambda my, c: c.b * my.s(c)),
        "linear.forward.bias",
    ),
    ("backward-squared", "s² in all gradients", but(ds=lambda my, c: my.s(c) ** 2), "linear.vjp"),
    ("backward-one", "no s in any gradient", but(ds=lambda my, c: 1.0), "linear.balance"),
    (
        "backward-rslora-ignored",
        "s = α/r in the gradients with rsLoRA",
        but(ds=lambda my, c: c.alpha / c.r),
        "linear.vjp.rslora",
    ),
)


def _batch_swapped(my: Plain, x: Array) -> Array:
    return _rows(x.swapaxes(0, 1) if x.ndim > 2 else x)


def _first_batch(my: Plain, c: Call, rows: Array) -> Array:
    y = Plain.shaped(my, c, rows)
    return y * (np.arange(len(y)) < 1)[:, None, None] if y.ndim > 2 else y


LAYOUT = _family(
    "LAYOUT",
    "linear",
    "linear.forward",
    ("A-reshaped", "A.reshape(n, r) for Aᵀ", reads(A=lambda my, c: c.A.reshape(-1, c.r).T)),
    ("B-reshaped", "B.reshape(r, m) for Bᵀ", reads(B=lambda my, c: c.B.reshape(c.r, -1).T)),
    (
        "file-transposed",
        "A (n, r) and B (r, m) expected: both reshaped",
        reads(A=lambda my, c: c.A.reshape(-1, c.r).T, B=lambda my, c: c.B.reshape(c.r, -1).T),
        "",
        "vmlx-swift 320",
    ),
    (
        "A-for-B",
        "A and Bᵀ swapped, that is (B A)ᵀ, where m = n",
        reads(
            A=lambda my, c: c.B.T if _square(c) else c.A,
            B=lambda my, c: c.A.T if _square(c) else c.B,
        ),
    ),
    ("W-turned", "x W where m = n", reads(W=lambda my, c: c.W.T if _square(c) else c.W)),
    ("B-shifted", "row i of B for row i + 1", reads(B=lambda my, c: np.roll(c.B, 1, 0))),
    ("A-shifted", "column j of A for column j + 1", reads(A=lambda my, c: np.roll(c.A, 1, 1))),
    ("rank-reversed", "A's rows from the last, B's columns not", reads(A=lambda my, c: c.A[::-1])),
    (
        "x-reshaped",
        "x.reshape(n, t) for xᵀ",
        but(rows=lambda my, x: x.reshape(x.shape[-1], -1).T),
    ),
    (
        "y-reshaped",
        "y of shape (m, t) reshaped, not turned",
        but(shaped=lambda my, c, rows: Plain.shaped(my, c, rows.T.reshape(rows.shape))),
    ),
    ("batch-swapped", "x (b, t, n) read as (t, b, n)", but(rows=_batch_swapped)),
    ("batch-first", "only the first sequence of a batch is computed", but(shaped=_first_batch)),
    (
        "vector-batched",
        "x (n,) answered with (1, m)",
        but(shaped=lambda my, c, rows: Plain.shaped(my, c, rows) if c.lead else rows),
    ),
    (
        "last-token",
        "y = 0 at the last token",
        but(y=lambda my, c: Plain.y(my, c) * (np.arange(len(c.x)) < len(c.x) - 1)[:, None]),
        "linear.tokens-apart",
    ),
    (
        "first-token",
        "the branch of the first token at all",
        but(u=lambda my, c: Plain.u(my, c)[:1] + 0 * Plain.u(my, c)),
    ),
    (
        "tail-of-features",
        "the sum over features ends at a multiple of 4",
        but(h=lambda my, c: Plain.h(my, c) * (np.arange(c.x.shape[1]) < c.x.shape[1] // 4 * 4)),
    ),
    (
        "tail-of-ranks",
        "the sum over ranks ends at a multiple of 2",
        but(u=lambda my, c: Plain.u(my, c) * (np.arange(c.r) < c.r // 2 * 2)),
    ),
    (
        "tail-of-outputs",
        "only a multiple of 4 outputs have the branch",
        but(branch=lambda my, c: Plain.branch(my, c) * (np.arange(len(c.B)) < len(c.B) // 4 * 4)),
    ),
    (
        "one-component",
        "rank 1: all components but the first are lost",
        but(u=lambda my, c: Plain.u(my, c) * (np.arange(c.r) < 1)),
    ),
    (
        "conv1d-turned",
        "W turned again with fan_in_fan_out, where m = n",
        reads(W=lambda my, c: c.W.T if c.conv1d and _square(c) else c.W),
        "linear.forward.conv1d",
    ),
    (
        "conv1d-reshaped",
        "W.reshape(n, m).T with fan_in_fan_out",
        reads(W=lambda my, c: c.W.reshape(c.W.shape[::-1]).T if c.conv1d else c.W),
        "linear.forward.conv1d",
    ),
)

FORM = _family(
    "FORM",
    "linear",
    "linear.forward",
    ("no-base", "y = s H Bᵀ", but(base=lambda my, c: 0 * Plain.base(my, c))),
    ("base-twice", "y = 2 (x Wᵀ + b) + s H Bᵀ", but(base=lambda my, c: 2 * Plain.base(my, c))),
    ("branch-twice", "y = x Wᵀ + b + 2 s H Bᵀ", but(branch=lambda my, c: 2 * Plain.branch(my, c))),
    ("no-bias", "b forgotten", reads(b=lambda my, c: 0 * c.b), "linear.forward.bias"),
    ("bias-twice", "2 b", reads(b=lambda my, c: 2 * c.b), "linear.forward.bias"),
    ("bias-negative", "-b", reads(b=lambda my, c: -c.b), "linear.forward.bias"),
    (
        "base-of-sum",
        "y = (x + s H Bᵀ) Wᵀ + b where m = n",
        but(y=lambda my, c: (c.x + my.branch(c)) @ c.W.T + c.b if _square(c) else Plain.y(my, c)),
    ),
    (
        "branch-of-base",
        "the branch on the base's output, where m = n",
        but(h=lambda my, c: my.base(c) if _square(c) else Plain.h(my, c)),
    ),
    (
        "residual",
        "y + x where m = n",
        but(base=lambda my, c: Plain.base(my, c) + (c.x if _square(c) else 0)),
    ),
    ("relu", "relu(H)", but(u=lambda my, c: np.maximum(Plain.u(my, c), 0)), "linear.symmetry"),
    ("tanh", "tanh(H)", but(u=lambda my, c: np.tanh(Plain.u(my, c))), "linear.rank-space"),
    ("softsign", "H / (1 + |H|)", but(u=lambda my, c: Plain.u(my, c) / (1 + abs(Plain.u(my, c))))),
    ("absolute-B", "|B|", reads(B=lambda my, c: abs(c.B)), "linear.symmetry"),
    (
        "unit-A",
        "rows of A divided by their lengths",
        reads(A=lambda my, c: c.A / ((c.A**2).sum(1, keepdims=True) ** 0.5 + 1e-9)),
    ),
    (
        "rank-mean",
        "the mean over the ranks for the sum",
        but(branch=lambda my, c: Plain.branch(my, c) / c.r),
    ),
    (
        "clamped",
        "the branch between -6 and 6",
        but(branch=lambda my, c: Plain.branch(my, c).clip(-6, 6)),
    ),
    ("hidden-bfloat16", "H rounded to bfloat16", but(u=lambda my, c: _digits(Plain.u(my, c), 8))),
    ("hidden-coarse", "H kept in half of the digits", but(u=lambda my, c: _coarse(Plain.u(my, c)))),
    (
        "branch-coarse",
        "s H Bᵀ kept in half of the digits",
        but(branch=lambda my, c: _coarse(Plain.branch(my, c))),
    ),
    (
        "base-coarse",
        "x Wᵀ kept in half of the digits",
        but(base=lambda my, c: _coarse(Plain.base(my, c))),
    ),
    (
        "tf32",
        "x with 11 binary digits in products",
        but(h=lambda my, c: _digits(Plain.h(my, c), 11)),
    ),
)

DROPOUT = _family(
    "DROPOUT",
    "linear",
    "linear.forward.dropout",
    ("on-base", "(K∘x) Wᵀ too", but(base=lambda my, c: my.h(c) @ c.W.T + c.b)),
    (
        "base-only",
        "(K∘x) Wᵀ, and x Aᵀ",
        but(base=lambda my, c: Plain.h(my, c) @ c.W.T + c.b, h=lambda my, c: c.x),
    ),
    (
        "on-hidden",
        "K on H",
        but(h=lambda my, c: c.x, u=lambda my, c: Plain.u(my, c) * c.K[:, : c.r]),
    ),
    (
        "on-branch",
        "K on H Bᵀ",
        but(h=lambda my, c: c.x, branch=lambda my, c: Plain.branch(my, c) * c.K[:, : len(c.B)]),
    ),
    (
        "on-y",
        "K on y",
        but(h=lambda my, c: c.x, y=lambda my, c: Plain.y(my, c) * c.K[:, : len(c.W)]),
    ),
    (
        "not-divided",
        "K = keep",
        reads(K=lambda my, c: (c.K > 0).astype(c.K.dtype)),
        "linear.mean-of-masks",
    ),
    ("by-p", "K = keep / p", reads(K=lambda my, c: c.K * ((1 - c.p) / c.p) if c.dropout else c.K)),
    (
        "times-rate",
        "K = keep (1 - p)",
        reads(K=lambda my, c: c.K * (1 - c.p) ** 2 if c.dropout else c.K),
    ),
    (
        "by-count",
        "K = keep / the share kept in fact",
        reads(K=lambda my, c: c.K / c.K.mean() if c.K.any() else c.K),
    ),
    ("twice", "K²∘x", reads(K=lambda my, c: c.K**2)),
    ("never", "K = 1", reads(K=lambda my, c: np.ones_like(c.K))),
    (
        "inverted",
        "keep read as what to drop",
        reads(K=lambda my, c: 1 / (1 - c.p) - c.K if c.dropout else c.K),
    ),
    ("one-token", "the first token's mask for all", reads(K=lambda my, c: c.K[:1] + 0 * c.K)),
    (
        "whole-tokens",
        "the first feature's mask for all",
        reads(K=lambda my, c: c.K[:, :1] + 0 * c.K),
    ),
    ("first-call", "the first call's mask for all", reads(K=lambda my, c: _first(my, "K", c.K))),
    (
        "in-evaluation",
        "the branch times 1 - p without a mask",
        reads(K=lambda my, c: c.K if c.dropout else c.K * (1 - c.p)),
        "linear.evaluation",
    ),
    (
        "drawn-in-evaluation",
        "a mask of its own where none is given",
        reads(
            K=lambda my, c: (
                c.K
                if c.dropout or not c.p
                else (np.random.default_rng(0).random(c.x.shape) >= c.p) / (1 - c.p)
            )
        ),
        "linear.evaluation",
    ),
    (
        "fresh-in-backward",
        "another mask in the gradients",
        backward(K=lambda my, c: c.K[:, ::-1]),
        "linear.vjp.dropout",
    ),
    (
        "none-in-backward",
        "no mask in the gradients",
        backward(K=lambda my, c: np.ones_like(c.K)),
        "linear.vjp.dropout",
    ),
    (
        "not-divided-in-backward",
        "K = keep in the gradients",
        backward(K=lambda my, c: (c.K > 0).astype(c.K.dtype)),
        "linear.vjp.dropout",
    ),
    ("dA-undropped", "dA = duᵀ x", but(dA=lambda my, c: my.du(c).T @ c.x), "linear.vjp.dropout"),
    (
        "dB-undropped",
        "dB = s Gᵀ (x Aᵀ)",
        but(dB=lambda my, c: my.ds(c) * c.dy.T @ (c.x @ c.A.T)),
        "linear.vjp.dropout",
    ),
    (
        "dx-undropped",
        "dx = G W + du A",
        but(dx_branch=lambda my, c: my.du(c) @ c.A),
        "linear.vjp.dropout",
    ),
    (
        "dx-all-dropped",
        "dx = K∘(G W + du A)",
        but(dx_base=lambda my, c: c.K * (c.dy @ c.W)),
        "linear.vjp.dropout",
    ),
)


def _dA_after_B(my: Plain, c: Call) -> Array:
    return Plain.dA(my, _changed(my, c, {"B": lambda my, c: c.B - 0.01 * my.dB(c)}))


BACKWARD = _family(
    "BACKWARD",
    "linear",
    "linear.vjp",
    (
        "dA-not-scaled",
        "dA / s",
        but(dA=lambda my, c: Plain.dA(my, c) / my.s(c)),
        "linear.derivative",
    ),
    ("dB-not-scaled", "dB / s", but(dB=lambda my, c: Plain.dB(my, c) / my.s(c)), "linear.balance"),
    (
        "factors-scaled-twice",
        "s dA, s dB",
        but(dA=lambda my, c: Plain.dA(my, c) * my.s(c), dB=lambda my, c: Plain.dB(my, c) * my.s(c)),
    ),
    ("dA-zero", "dA = 0", but(dA=lambda my, c: 0 * c.A)),
    ("dB-zero", "dB = 0", but(dB=lambda my, c: 0 * c.B)),
    (
        "all-zero",
        "no gradient reaches the adapter",
        but(dA=lambda my, c: 0 * c.A, dB=lambda my, c: 0 * c.B),
        "",
        "transformers 26221",
        "microsoft/LoRA 120",
        "peft 1142",
    ),
    ("dA-negative", "-dA", but(dA=lambda my, c: -Plain.dA(my, c))),
    ("dx-negative", "-dx", but(dx=lambda my, c: -Plain.dx(my, c))),
    (
        "twice",
        "2 dA, 2 dB",
        but(dA=lambda my, c: 2 * Plain.dA(my, c), dB=lambda my, c: 2 * Plain.dB(my, c)),
    ),
    ("dA-mean", "dA / t", but(dA=lambda my, c: Plain.dA(my, c) / len(c.x)), "linear.tokens-apart"),
    (
        "mean-over-tokens",
        "dA / t, dB / t",
        but(
            dA=lambda my, c: Plain.dA(my, c) / len(c.x), dB=lambda my, c: Plain.dB(my, c) / len(c.x)
        ),
        "linear.tokens-apart",
    ),
    (
        "first-token",
        "dA, dB of the first token alone",
        backward(x=lambda my, c: c.x[:1], dy=lambda my, c: c.dy[:1], K=lambda my, c: c.K[:1]),
    ),
    (
        "last-token-dropped",
        "without the last token's gradients",
        backward(dy=lambda my, c: c.dy * (np.arange(len(c.dy)) < len(c.dy) - 1)[:, None]),
    ),
    ("dx-without-branch", "dx = G W", but(dx_branch=lambda my, c: 0 * c.x)),
    ("dx-without-base", "dx = K∘(du A)", but(dx_base=lambda my, c: 0 * c.x)),
    (
        "dx-not-scaled",
        "dx = G W + K∘(G B A)",
        but(dx_branch=lambda my, c: c.K * (c.dy @ c.B @ c.A)),
    ),
    (
        "dx-scaled-whole",
        "dx = s (G W + K∘(G B A))",
        but(dx_base=lambda my, c: my.s(c) * (c.dy @ c.W)),
    ),
    (
        "dx-W-turned",
        "dx = G Wᵀ + …, where m = n",
        but(dx_base=lambda my, c: c.dy @ (c.W.T if _square(c) else c.W)),
    ),
    (
        "dx-conv1d-turned",
        "dx = G Wᵀ + … with fan_in_fan_out, where m = n",
        but(dx_base=lambda my, c: c.dy @ (c.W.T if _square(c) and c.conv1d else c.W)),
        "linear.vjp.conv1d",
    ),
    (
        "dA-reshaped",
        "(Hᵀ du).reshape(r, n) for its transpose",
        but(dA=lambda my, c: Plain.dA(my, c).T.reshape(c.A.shape)),
    ),
    (
        "dB-reshaped",
        "(uᵀ G).reshape(m, r) for its transpose",
        but(dB=lambda my, c: Plain.dB(my, c).T.reshape(c.B.shape)),
    ),
    (
        "dA-rows-shifted",
        "row i of dA for row i + 1",
        but(dA=lambda my, c: np.roll(Plain.dA(my, c), 1, 0)),
        "linear.rank-space",
    ),
    (
        "dA-from-A",
        "du = s G Bᵀ… by A: A and B taken for each other where m = n",
        but(dA=lambda my, c: (my.ds(c) * (c.dy @ (c.A.T if _square(c) else c.B))).T @ my.h(c)),
    ),
    (
        "dA-coarse",
        "dA summed in half of the digits",
        but(dA=lambda my, c: _coarse(Plain.dA(my, c))),
    ),
    ("du-coarse", "du kept in half of the digits", but(du=lambda my, c: _coarse(Plain.du(my, c)))),
    (
        "clipped",
        "dA, dB between -1 and 1",
        but(
            dA=lambda my, c: Plain.dA(my, c).clip(-1, 1),
            dB=lambda my, c: Plain.dB(my, c).clip(-1, 1),
        ),
    ),
    ("dA-after-step", "dA with B after its step", but(dA=_dA_after_B), "linear.zero-B"),
    (
        "dB-zero-at-zero-B",
        "dB = 0 while B = 0",
        but(dB=lambda my, c: Plain.dB(my, c) * c.B.any()),
        "linear.zero-B",
    ),
    (
        "decay-inside",
        "dA + 0.01 A",
        but(dA=lambda my, c: Plain.dA(my, c) + 0.01 * c.A),
        "linear.zero-B",
    ),
    (
        "y-without-branch",
        "y of the base where gradients are asked for",
        but(y=lambda my, c: Plain.y(my, c) if c.dy is None else my.base(c)),
    ),
    ("dbias-zero", "db = 0", but(dbias=lambda my, c: 0 * c.b), "linear.vjp.bias"),
    ("dbias-mean", "db / t", but(dbias=lambda my, c: c.dy.mean(0)), "linear.vjp.bias"),
    ("dbias-scaled", "s db", but(dbias=lambda my, c: my.s(c) * c.dy.sum(0)), "linear.vjp.bias"),
    (
        "dbias-first-token",
        "db of the first token",
        but(dbias=lambda my, c: c.dy[0]),
        "linear.vjp.bias",
    ),
)


def _overwriting(argument: int) -> Any:
    """`Plain` that leaves the argument of this number halved."""

    def lora_linear(my: Plain, *arrays: Array, **options: Any) -> Array:
        y = Plain.lora_linear(my, *arrays, **options)
        arrays[argument][...] = 0.5 * _wide(arrays[argument])
        return y

    return lora_linear


def _other_call(my: Plain, c: Call) -> Array:
    my.__dict__["calls"] = my.__dict__.get("calls", 0) + 1
    return Plain.branch(my, c) * (my.__dict__["calls"] % 2)


STATE = _family(
    "STATE",
    "linear",
    "linear.forward",
    ("A-cached", "A of the first call for all", reads(A=lambda my, c: _first(my, "A", c.A))),
    ("B-before", "B of the call before", reads(B=lambda my, c: _before(my, "B", c.B))),
    ("W-cached", "W of the first call for all", reads(W=lambda my, c: _first(my, "W", c.W))),
    (
        "bias-cached",
        "b of the first call for all",
        reads(b=lambda my, c: _first(my, "b", c.b)),
        "linear.forward.bias",
    ),
    (
        "output-not-cleared",
        "y is added to the y before",
        but(branch=lambda my, c: _piled(my, "y", Plain.branch(my, c))),
    ),
    (
        "hidden-before",
        "dB with H of the call before",
        but(dB=lambda my, c: my.ds(c) * c.dy.T @ _before(my, "u", my.u(c))),
        "linear.vjp",
    ),
    (
        "gradients-pile-up",
        "dA is added to the dA before",
        but(dA=lambda my, c: _piled(my, "dA", Plain.dA(my, c))),
        "linear.vjp",
    ),
    ("every-other-call", "the branch in every other call only", but(branch=_other_call)),
    ("x-overwritten", "x is changed in place", but(lora_linear=_overwriting(0))),
    ("W-overwritten", "W is changed in place", but(lora_linear=_overwriting(1))),
    ("B-overwritten", "B is changed in place", but(lora_linear=_overwriting(3))),
)


def _quantised(W: Array) -> Any:
    """W on a grid of 255 points, as after a trip through 8 bits."""
    step = abs(W).max() / 127 + 1e-30
    return np.round(W / step) * step


def _merge_in_place(my: Plain, W: Array, A: Array, B: Array, **options: Any) -> Array:
    W[...] = Plain.merge(my, W, A, B, **options)
    return W


MERGE = _family(
    "MERGE",
    "merge",
    "merge.weight",
    ("no-scale", "W + B A", but(delta=lambda my, c: c.B @ c.A)),
    ("scale-squared", "W + s² B A", but(delta=lambda my, c: my.s(c) * Plain.delta(my, c))),
    ("twice", "W + 2 s B A", but(delta=lambda my, c: 2 * Plain.delta(my, c)), "", "candle-lora 26"),
    ("subtracted", "W - s B A", but(delta=lambda my, c: -Plain.delta(my, c))),
    ("delta-alone", "s B A", but(merged=lambda my, c: my.delta(c))),
    (
        "never",
        "W: evaluation does not merge",
        but(merged=lambda my, c: c.W),
        "merge.function",
        "microsoft/LoRA 34",
        "microsoft/LoRA 61",
    ),
    (
        "turned",
        "W + s (B A)ᵀ where m = n",
        but(delta=lambda my, c: Plain.delta(my, c).T if _square(c) else Plain.delta(my, c)),
    ),
    (
        "reshaped",
        "s (B A)ᵀ reshaped to (m, n)",
        but(delta=lambda my, c: Plain.delta(my, c).T.reshape(c.W.shape)),
    ),
    ("A-reshaped", "A.reshape(n, r) for Aᵀ", reads(A=lambda my, c: c.A.reshape(-1, c.r).T)),
    (
        "conv1d-turned",
        "W + s (B A)ᵀ with fan_in_fan_out, where m = n",
        but(
            delta=lambda my, c: (
                Plain.delta(my, c).T if c.conv1d and _square(c) else Plain.delta(my, c)
            )
        ),
        "merge.weight.conv1d",
    ),
    (
        "conv1d-reshaped",
        "s (B A)ᵀ reshaped to (m, n) with fan_in_fan_out",
        but(
            delta=lambda my, c: (
                Plain.delta(my, c).T.reshape(c.W.shape) if c.conv1d else Plain.delta(my, c)
            )
        ),
        "merge.weight.conv1d",
    ),
    (
        "rslora-ignored",
        "s = α/r with rsLoRA",
        but(s=lambda my, c: c.alpha / c.r),
        "merge.weight.rslora",
    ),
    (
        "bfloat16",
        "W' rounded to bfloat16",
        but(merged=lambda my, c: _digits(Plain.merged(my, c), 8)),
        "",
        "peft 1388",
        "peft 2502",
        "torchtune 1101",
        "unsloth 3091",
    ),
    (
        "delta-coarse",
        "s B A kept in half of the digits",
        but(delta=lambda my, c: _coarse(Plain.delta(my, c))),
    ),
    (
        "W-coarse",
        "W kept in half of the digits",
        but(merged=lambda my, c: _coarse(c.W) + my.delta(c)),
        "merge.zero-B",
    ),
    (
        "quantised",
        "W on a grid of 8 bits",
        but(merged=lambda my, c: _quantised(c.W) + my.delta(c)),
        "merge.zero-B",
    ),
    (
        "one-component",
        "the first component alone",
        but(delta=lambda my, c: my.s(c) * c.B[:, :1] @ c.A[:1]),
    ),
    ("rank-mean", "W + s B A / r", but(delta=lambda my, c: Plain.delta(my, c) / c.r)),
    (
        "last-row",
        "the last row of W is left out",
        but(delta=lambda my, c: Plain.delta(my, c) * (np.arange(len(c.W)) < len(c.W) - 1)[:, None]),
    ),
    ("absolute", "W + |s B A|", but(delta=lambda my, c: abs(Plain.delta(my, c))), "merge.negative"),
    ("clamped", "s B A between -2 and 2", but(delta=lambda my, c: Plain.delta(my, c).clip(-2, 2))),
    ("blended", "(W + W') / 2", but(merged=lambda my, c: (c.W + Plain.merged(my, c)) / 2)),
    (
        "norm-kept",
        "rows of W' with the lengths of W's",
        but(
            merged=lambda my, c: (
                Plain.merged(my, c)
                * (
                    ((c.W**2).sum(1, keepdims=True) + 1e-9)
                    / ((Plain.merged(my, c) ** 2).sum(1, keepdims=True) + 1e-9)
                )
                ** 0.5
            )
        ),
        "merge.function",
    ),
    (
        "piled-up",
        "the adapters of all calls are added",
        but(delta=lambda my, c: _piled(my, "delta", Plain.delta(my, c))),
    ),
    (
        "alpha-of-first-call",
        "s of the first merge for all",
        but(s=lambda my, c: _first(my, "s0", Plain.s(my, c))),
    ),
    ("into-first-W", "into the W of the first call", reads(W=lambda my, c: _first(my, "W", c.W))),
    ("in-place", "W itself is changed", but(merge=_merge_in_place)),
    (
        "other-than-forward",
        "s in the merge, s² in the layer",
        but(branch=lambda my, c: my.s(c) * Plain.branch(my, c)),
        "merge.function",
    ),
)

UNMERGE = _family(
    "UNMERGE",
    "merge",
    "merge.unmerge",
    ("nothing", "W' stays", but(unmerged=lambda my, c: c.W)),
    ("no-scale", "W' - B A", but(unmerged=lambda my, c: c.W - c.B @ c.A)),
    ("twice", "W' - 2 s B A", but(unmerged=lambda my, c: c.W - 2 * my.delta(c))),
    ("added", "W' + s B A", but(unmerged=lambda my, c: c.W + my.delta(c))),
    (
        "turned",
        "W' - s (B A)ᵀ where m = n",
        but(unmerged=lambda my, c: c.W - (my.delta(c).T if _square(c) else my.delta(c))),
    ),
    (
        "cached",
        "the first W whatever W' is",
        but(
            merged=lambda my, c: _first(my, "W", c.W) + my.delta(c),
            unmerged=lambda my, c: _first(my, "W", c.W),
        ),
    ),
    (
        "alpha-of-first-call",
        "s of the first call for all",
        but(unmerged=lambda my, c: c.W - _first(my, "s0", my.s(c)) / my.s(c) * my.delta(c)),
    ),
    (
        "coarse",
        "W kept in half of the digits",
        but(unmerged=lambda my, c: _coarse(Plain.unmerged(my, c))),
    ),
    (
        "delta-coarse",
        "s B A kept in half of the digits",
        but(unmerged=lambda my, c: c.W - _coarse(my.delta(c))),
    ),
    (
        "last-row",
        "the last row stays merged",
        but(
            unmerged=lambda my, c: c.W - my.delta(c) * (np.arange(len(c.W)) < len(c.W) - 1)[:, None]
        ),
    ),
)
