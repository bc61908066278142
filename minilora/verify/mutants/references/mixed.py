"""A right layer whose operands have several dtypes: the base's product in one, the branch's in
another."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from minilora.verify.mutants.references.helpers import HALVES, Array, rows, shaped


class Mixed:
    """Adapters in float32 on a half base, and everything cast to one half precision."""

    name = "reference"
    dtypes: ClassVar = ("float64", "float32", *HALVES)
    mixed: ClassVar = (
        *({"x": h, "W": h, "adapters": "float32"} for h in HALVES),
        {"x": "float32", "W": "float32", "adapters": "float32", "autocast": "bfloat16"},
        *({"x": x, "W": "bfloat16", "adapters": x} for x in ("float64", "float32")),
        {"x": "float64", "W": "bfloat16", "adapters": "float32"},
    )

    def lora_linear(self, x: Array, W: Array, A: Array, B: Array, **options: Any) -> Array:
        """The layer's output."""
        y: Array = self.layer(W, A, B, x, **options)["y"]
        return y

    def lora_linear_vjp(
        self, x: Array, W: Array, A: Array, B: Array, dy: Array, **options: Any
    ) -> dict[str, Array]:
        """The layer's output and gradients."""
        return self.layer(W, A, B, x, dy, **options)

    def merge(self, W: Array, A: Array, B: Array, *, alpha: float, r: int) -> Array:
        """W + s B A."""
        ours = A.dtype
        # factors
        delta = alpha / r * (B @ A)
        # delta
        merged: Array = (W.astype(ours) + delta).astype(W.dtype)
        return merged

    def layer(
        self,
        W: Array,
        A: Array,
        B: Array,
        x: Any,
        dy: Any = None,
        *,
        alpha: float,
        r: int,
        bias: Array | None = None,
        keep: Any = None,
        p: float = 0.0,
        use_rslora: bool = False,
        autocast: str | None = None,
    ) -> dict[str, Any]:
        """y and gradients: sums are those of the adapters' dtype, products are stored as cast."""
        theirs, ours, given, of_factors = W.dtype, A.dtype, x.dtype, A.dtype
        answer = np.dtype(autocast or given)
        if autocast:
            W, A, B, x = (v.astype(autocast) for v in (W, A, B, x))
            theirs = ours = W.dtype
        s: Any = alpha * r**-0.5 if use_rslora else alpha / r
        shape, X, G = np.shape(x)[:-1], rows(x), rows(dy)
        wide = np.promote_types(of_factors, np.float32)
        # operands
        base = (X.astype(wide) @ W.T.astype(wide)).astype(theirs)
        base = base if bias is None else (base.astype(wide) + bias.astype(wide)).astype(theirs)
        K = 1.0 if keep is None else rows(keep).astype(wide) / (1 - p)
        # mask
        h = (X.astype(wide) * K).astype(ours)
        # dropped
        H = (h.astype(wide) @ A.T.astype(wide)).astype(ours)
        # hidden
        branch = (s * (H.astype(wide) @ B.T.astype(wide))).astype(ours)
        # branch
        y = (base.astype(wide) + branch.astype(wide)).astype(answer)
        # output
        if dy is None:
            return {"y": shaped(y, shape)}
        G = G.astype(wide)
        dH = (s * (G @ B.astype(wide))).astype(ours)
        # through the branch
        dA = (dH.T.astype(wide) @ h.astype(wide)).astype(of_factors)
        dB = (s * (G.T @ H.astype(wide))).astype(of_factors)
        dx = (G @ W.astype(wide)).astype(theirs).astype(wide)
        dx = (dx + K * (dH.astype(wide) @ A.astype(wide)).astype(ours)).astype(given)
        # gradients
        found = {"y": shaped(y, shape), "dx": shaped(dx, shape), "dA": dA, "dB": dB}
        return found if bias is None else found | {"dbias": G.sum(0).astype(bias.dtype)}
