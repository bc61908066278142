"""A right implementation written unlike the specification, and how to make it wrong.

Tokens lie in rows, the order of operations is another, and every quantity is a method. A mutant
replaces one or two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from minilora.verify.core.tolerance import unit_roundoff

Array = np.ndarray
Call = SimpleNamespace
"""What one call is about: arrays, options and state, by short names."""

HALVES = ("bfloat16", "float16")


def _wide(array: Array) -> Array:
    """float16 and bfloat16 as float32."""
    return array.astype(np.float32) if array.dtype.name in HALVES else array


class Plain:
    """A right implementation, every quantity a method, so that each can be replaced by a wrong one.

    Half precisions are computed in float32 and rounded once, at the end.
    """

    name = "plain"
    dtypes: ClassVar = ("float64", "float32", *HALVES)
    precision: ClassVar = {h: {"storage": h, "accumulation": "float32"} for h in HALVES}

    def __init__(self) -> None:
        self.memory: dict[str, Any] = {}
        """What mutants keep from call to call; a right one keeps nothing."""

    def lora_linear(self, x: Array, W: Array, A: Array, B: Array, **options: Any) -> Array:
        """The layer's output."""
        c = self.call(W, A, B, x, **options)
        return self.shaped(c, self.y(c)).astype(x.dtype)

    def lora_linear_vjp(
        self, x: Array, W: Array, A: Array, B: Array, dy: Array, **options: Any
    ) -> dict[str, Array]:
        """The layer's output and gradients."""
        c = self.call(W, A, B, x, dy, **options)
        answer = {"y": self.shaped(c, self.y(c)), "dx": self.shaped(c, self.dx(c))}
        answer |= {"dA": self.dA(c), "dB": self.dB(c)}
        if options.get("bias") is not None:
            answer["dbias"] = self.dbias(c)
        if c.kind is not None:
            answer[f"d{c.kind}"] = self.dpart(c)
        return {name: array.astype(x.dtype) for name, array in answer.items()}

    def merge(self, W: Array, A: Array, B: Array, **options: Any) -> Array:
        """W + s B A."""
        merged: Array = self.merged(self.call(W, A, B, **options)).astype(W.dtype)
        return merged

    def unmerge(self, W_merged: Array, A: Array, B: Array, **options: Any) -> Array:
        """W' - s B A."""
        W: Array = self.unmerged(self.call(W_merged, A, B, **options)).astype(W_merged.dtype)
        return W

    def combine(
        self, adapters: Sequence[Mapping[str, Any]], weights: Sequence[float], **settings: Any
    ) -> Array:
        """Σ w s B A, or the best change of a rank."""
        calls = [self.adapter(adapter) for adapter in adapters]
        change = self.change(calls, list(weights))
        if settings.get("combination_type") == "svd":
            change = self.best(change, settings["svd_rank"])
        answer: Array = change.astype(calls[0].dtype)
        return answer

    def multi_adapter(
        self, x: Array, W: Array, adapters: Sequence[Mapping[str, Any]], index: Array
    ) -> Array:
        """Each row with its own adapter."""
        slots = self.slots(index, adapters)
        rows = [self.row(x[j : j + 1], W, adapters, i) for j, i in enumerate(slots)]
        y: Array = self.gathered_rows(np.concatenate(rows), index).astype(x.dtype)
        return y

    def adapter(
        self, given: Mapping[str, Any], W: Array | None = None, x: Array | None = None
    ) -> Call:
        """An adapter of the contract as a call; W is 0 if there is none."""
        options = {name: value for name, value in given.items() if name not in ("A", "B")}
        A, B = given["A"], given["B"]
        return self.call(
            np.zeros((len(B), A.shape[1]), A.dtype) if W is None else W, A, B, x, **options
        )

    def change(self, calls: list[Call], weights: list[float]) -> Any:
        """What several adapters change together."""
        return sum(w * self.delta(c) for c, w in zip(calls, weights, strict=True))

    def best(self, change: Array, rank: int) -> Any:
        """The nearest change of a rank."""
        U, sigma, Vt = np.linalg.svd(change.astype(np.float64), full_matrices=False)
        return (U[:, :rank] * sigma[:rank]) @ Vt[:rank]

    def slots(self, index: Array, adapters: Sequence[Mapping[str, Any]]) -> list[int]:
        """The adapter of each row, -1 for none."""
        return [int(i) for i in index]

    def row(self, x: Array, W: Array, adapters: Sequence[Mapping[str, Any]], i: int) -> Any:
        """One row with the adapter i."""
        c = self.adapter(self.slot(adapters, i), W, x)
        return self.none(c) if i < 0 else self.y(c)

    def slot(self, adapters: Sequence[Mapping[str, Any]], i: int) -> Mapping[str, Any]:
        """The adapter i of them."""
        return adapters[i]

    def none(self, c: Call) -> Any:
        """A row without an adapter."""
        return self.base(c)

    def gathered_rows(self, rows: Array, index: Array) -> Any:
        """The rows in their order."""
        return rows

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
        use_dora: bool = False,
        magnitude: Array | None = None,
        lora_bias: Array | None = None,
        **settings: Any,
    ) -> Call:
        """The call's arrays with tokens in rows, in float32 at least; K is 1 without dropout."""
        if settings:
            raise NotImplementedError(", ".join(settings))
        c = Call(W=_wide(W), A=_wide(A), B=_wide(B), alpha=alpha, r=r, p=p, rslora=use_rslora)
        c.conv1d, c.dropout, c.dtype = fan_in_fan_out, keep is not None, W.dtype
        parts = {"magnitude": magnitude, "lora_bias": lora_bias}
        c.kind = next((name for name, part in parts.items() if part is not None), None)
        part = None if c.kind is None else parts[c.kind]
        c.part = None if part is None else _wide(part)
        if use_dora != (c.kind == "magnitude"):
            raise NotImplementedError("use_dora goes with a magnitude")
        c.b = np.zeros(len(c.W), c.W.dtype) if bias is None else _wide(bias)
        if x is not None:
            c.lead, c.x = x.shape[:-1], self.rows(_wide(x))
            c.dy = None if dy is None else self.rows(_wide(dy))
            c.K = np.ones_like(c.x)
            if keep is not None:
                c.K = self.rows(keep).astype(c.x.dtype) / (1 - p)
        return self.read(c)

    def read(self, c: Call) -> Call:
        """The place to take an array, an option or a setting for another."""
        return c

    def rows(self, x: Array) -> Array:
        """A row for each token: (…, n) as (t, n)."""
        return x.reshape(-1, x.shape[-1])

    def shaped(self, c: Call, rows: Array) -> Array:
        """Rows of tokens in the shape of x again."""
        return rows.reshape(*c.lead, rows.shape[-1])

    def s(self, c: Call) -> Any:
        """The scale, forward."""
        return c.alpha * c.r**-0.5 if c.rslora else c.alpha / c.r

    def ds(self, c: Call) -> Any:
        """The scale, backward."""
        return self.s(c)

    def kept(self, c: Call) -> Any:
        """The branch's input."""
        return c.x * c.K

    def H(self, c: Call) -> Any:
        """The branch in rank space."""
        return self.kept(c) @ c.A.T

    def branch(self, c: Call) -> Any:
        """What the adapter adds."""
        if c.kind == "magnitude":
            return self.turned(c) - self.kept(c) @ c.W.T
        added = self.s(c) * (self.H(c) @ c.B.T)
        return added + self.s(c) * c.part if c.kind == "lora_bias" else added

    def V(self, c: Call) -> Any:
        """DoRA's W + s B A."""
        return c.W + self.delta(c)

    def length(self, c: Call) -> Any:
        """The norm of V's rows."""
        return (self.V(c) ** 2).sum(1) ** 0.5

    def g(self, c: Call) -> Any:
        """What a row is multiplied by."""
        return c.part / self.length(c)

    def turned(self, c: Call) -> Any:
        """The rescaled layer on the branch's input."""
        return (self.kept(c) @ c.W.T + self.s(c) * (self.H(c) @ c.B.T)) * self.g(c)

    def dz(self, c: Call) -> Any:
        """The gradient by the branch before its rows are rescaled."""
        return c.dy * self.g(c) if c.kind == "magnitude" else c.dy

    def dpart(self, c: Call) -> Any:
        """The gradient by the magnitude, or by B's bias."""
        if c.kind == "lora_bias":
            return self.ds(c) * c.dy.sum(0)
        return (c.dy * self.turned(c)).sum(0) / c.part

    def base(self, c: Call) -> Any:
        """What the frozen layer gives."""
        return c.x @ c.W.T + c.b

    def y(self, c: Call) -> Any:
        """Both."""
        return self.base(c) + self.branch(c)

    def dH(self, c: Call) -> Any:
        """The gradient by u."""
        return self.ds(c) * (self.dz(c) @ c.B)

    def dA(self, c: Call) -> Any:
        """The gradient by A."""
        return self.dH(c).T @ self.kept(c)

    def dB(self, c: Call) -> Any:
        """The gradient by B."""
        return self.ds(c) * (self.dz(c).T @ self.H(c))

    def dx_base(self, c: Call) -> Any:
        """The gradient by x through the base."""
        return c.dy @ c.W

    def dx_branch(self, c: Call) -> Any:
        """The gradient by x through the branch."""
        through = self.dH(c) @ c.A
        if c.kind == "magnitude":
            through = through + (self.dz(c) - c.dy) @ c.W
        return c.K * through

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
        return self.V(c) * (self.g(c)[:, None] if c.kind == "magnitude" else 1)

    def unmerged(self, c: Call) -> Any:
        """The weight without it again; c.W is the merged one here."""
        return c.W - self.delta(c)

    def optimizer_steps(
        self, params: Mapping[str, Array], gradients: Sequence[Any], settings: Mapping[str, Any]
    ) -> list[dict[str, Array]]:
        """The parameters after each step."""
        p = {name: _wide(array) for name, array in params.items()}
        c = Call(
            optimizer=settings["optimizer"],
            lr=settings["lr"],
            betas=settings.get("betas", (0.9, 0.999)),
            eps=settings.get("eps", 1e-8),
            momentum=settings.get("momentum", 0.0),
            decay=settings.get("weight_decay", 0.0),
            greatest=settings.get("max_grad_norm", float("inf")),
            schedule=settings.get("schedule", "constant"),
            warmup=settings.get("warmup_steps", 0),
            total=settings.get("total_steps", len(gradients)),
            ratio=settings.get("loraplus_lr_ratio", 1.0),
            dtype=next(iter(params.values())).dtype,
            **{state: {name: 0 * array for name, array in p.items()} for state in "muv"},
        )
        c, steps = self.read(c), []
        for c.k, item in enumerate(gradients):
            g = self.clipped(c, self.gathered(c, item))
            p = {name: self.stepped(c, name, p[name], g[name]) for name in p}
            steps.append({name: array.astype(c.dtype) for name, array in p.items()})
        return steps

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
        factor = min(1.0, c.greatest / (self.norm(c, g) + 1e-6))
        return {name: array * factor for name, array in g.items()}

    def factor(self, c: Call, k: int) -> Any:
        """The schedule."""
        if k < c.warmup:
            return k / c.warmup
        left = max(0, c.total - k) / (c.total - c.warmup)
        curves = {"constant": 1.0, "linear": left, "cosine": np.sin(np.pi / 2 * left) ** 2}
        return curves[c.schedule]

    def rate(self, c: Call, name: str) -> Any:
        """The learning rate of a parameter in this step."""
        rate = c.lr * float(self.factor(c, c.k))
        return rate * c.ratio if name.endswith("B") else rate

    def decay(self, c: Call, name: str) -> Any:
        """λ of a parameter."""
        return c.decay

    def stepped(self, c: Call, name: str, p: Array, g: Array) -> Any:
        """A step of the optimizer that was asked for."""
        return self.sgd(c, name, p, g) if c.optimizer == "sgd" else self.adamw(c, name, p, g)

    def sgd(self, c: Call, name: str, p: Array, g: Array) -> Any:
        """SGD with momentum and coupled decay."""
        c.u[name] = c.momentum * c.u[name] + (g + self.decay(c, name) * p)
        return p - self.rate(c, name) * c.u[name]

    def adamw(self, c: Call, name: str, p: Array, g: Array) -> Any:
        """AdamW: decay apart from the gradient."""
        return self.decayed(c, name, p) - self.update(c, name, g)

    def update(self, c: Call, name: str, g: Array) -> Any:
        """What Adam takes away."""
        m, v = self.corrected(c, self.first(c, name, g), self.second(c, name, g))
        return self.rate(c, name) * self.direction(c, m, v)

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


def then(**changes: Callable[[Any, Call], Any]) -> Callable[[], Plain]:
    """`Plain` with the results of these methods changed, each by a function of (result, call)."""

    def changed(right: Callable[..., Any], change: Callable[[Any, Call], Any]) -> Any:
        return lambda my, c, *more: change(right(my, c, *more), c)

    return but(**{name: changed(getattr(Plain, name), f) for name, f in changes.items()})


def with_(c: Call, **changes: Callable[[Call], Any]) -> Call:
    """The call with these arrays or options taken for others."""
    return Call(**vars(c) | {name: change(c) for name, change in changes.items()})


def reads(**changes: Callable[[Call], Any]) -> Callable[[], Plain]:
    """`Plain` that takes these arrays, options or settings for others."""
    return then(read=lambda c, _: with_(c, **changes))


def backward(**changes: Callable[[Call], Any]) -> Callable[[], Plain]:
    """`Plain` whose gradients alone take these arrays or options for others."""
    names = ("dA", "dB", "dx_branch")
    right = {name: getattr(Plain, name) for name in names}
    return but(
        **{name: (lambda my, c, f=f: f(my, with_(c, **changes))) for name, f in right.items()}
    )


def upto(stop: int, length: int) -> Array:
    """1 at the first ``stop`` of ``length`` places, and 0 beyond."""
    return np.arange(length) < stop


def digits(number: Any, count: int) -> Any:
    """Rounded to so many binary digits: an array in the dtype that it has, or a float."""
    fraction, exponent = np.frexp(number)
    rounded = np.ldexp(np.round(fraction * 2.0**count) * 0.5**count, exponent)
    return rounded.astype(number.dtype) if isinstance(number, np.ndarray) else float(rounded)


def coarse(array: Array, c: Call) -> Any:
    """Rounded to half of the digits of the dtype under test."""
    return digits(array, round(-np.log2(unit_roundoff(str(c.dtype)))) // 2)


def narrow(array: Array, c: Call) -> Any:
    """Rounded to the dtype under test, as an array that is stored on the way is."""
    return array.astype(c.dtype).astype(array.dtype)


def wide(*names: str) -> dict[str, Callable[[Call], Any]]:
    """For `reads`: these arrays in float64."""

    def widened(name: str) -> Callable[[Call], Any]:
        return lambda c: None if getattr(c, name, None) is None else np.float64(getattr(c, name))

    return {name: widened(name) for name in names}


def square(c: Call) -> bool:
    """Whether m = n, where a transpose is not noticed by its shape."""
    return bool(c.W.shape[0] == c.W.shape[1])


def from_first_call(my: Plain, name: str, value: Any) -> Any:
    """What the first call had under this name, as long as its shape fits."""
    kept = my.memory.setdefault(name, value)
    return kept if np.shape(kept) == np.shape(value) else value


def from_call_before(my: Plain, name: str, value: Any) -> Any:
    """What the call before had under this name, if its shape fits."""
    kept, my.memory[name] = my.memory.get(name, value), value
    return kept if np.shape(kept) == np.shape(value) else value


def piled_up(my: Plain, name: str, value: Array) -> Any:
    """Added to what the calls before gave under this name, if its shape fits."""
    kept = my.memory.get(name, value * 0)
    my.memory[name] = kept + value if kept.shape == value.shape else value
    return my.memory[name]
