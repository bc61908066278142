"""A right layer, written unlike the specification: tokens in rows, every step a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from minilora.verify.mutants.references.helpers import HALVES, Array, refuse, rows, shaped, wide


class Linear:
    """LoRA, DoRA and LoRA with a bias of B: forward, backward, merged, combined, mixed in a batch.

    Half precisions are computed in float32 and rounded once, at the end.
    """

    name = "reference"
    dtypes: ClassVar = ("float64", "float32", *HALVES)
    precision: ClassVar = {h: {"storage": h, "accumulation": "float32"} for h in HALVES}

    def __init__(self) -> None:
        self.memory: dict[str, Any] = {}
        """What mutants keep from call to call; a right implementation keeps nothing."""

    def lora_linear(self, x: Array, W: Array, A: Array, B: Array, **options: Any) -> Array:
        """The layer's output."""
        y: Array = self.layer(W, A, B, x, **options)["y"].astype(x.dtype)
        return y

    def lora_linear_vjp(
        self, x: Array, W: Array, A: Array, B: Array, dy: Array, **options: Any
    ) -> dict[str, Array]:
        """The layer's output and gradients."""
        answer = self.layer(W, A, B, x, dy, **options)
        return {name: array.astype(x.dtype) for name, array in answer.items()}

    def merge(self, W: Array, A: Array, B: Array, **options: Any) -> Any:
        """W + s B A, and b + s c where there is a bias b."""
        of = self.layer(W, A, B, **options)
        merged: Array = of["merged"].astype(W.dtype)
        if options.get("bias") is not None:
            shifted = of["bias"].astype(W.dtype)
            # both
            return self.pair(merged, shifted)
        return merged

    def pair(self, W: Array, b: Array) -> tuple[Array, Array]:
        """The weight and the bias."""
        return W, b

    def unmerge(self, W_merged: Array, A: Array, B: Array, **options: Any) -> Array:
        """W' - s B A."""
        W: Array = self.layer(W_merged, A, B, **options)["unmerged"].astype(W_merged.dtype)
        return W

    def scale(self, alpha: float, r: int, use_rslora: bool = False, **factors: Array) -> float:
        """s."""
        return alpha * r**-0.5 if use_rslora else alpha / r

    def layer(
        self,
        W: Array,
        A: Array,
        B: Array,
        x: Any = None,
        dy: Any = None,
        *,
        alpha: float,
        r: int,
        bias: Array | None = None,
        keep: Any = None,
        p: float = 0.0,
        use_rslora: bool = False,
        fan_in_fan_out: bool = False,
        use_dora: bool = False,
        magnitude: Any = None,
        lora_bias: Any = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """The layer's quantities, in float32 at least: of weights alone if x is None."""
        refuse(settings, use_dora, magnitude)
        dtype, dora = W.dtype, use_dora
        W, A, B = wide(W), wide(A), wide(B)
        b = np.zeros(len(W), W.dtype) if bias is None else wide(bias)
        m, c = wide(magnitude), wide(lora_bias)
        shape, dropout = np.shape(x)[:-1], keep is not None
        if x is not None:
            x, dy = rows(wide(x)), rows(wide(dy))
            K = rows(keep).astype(x.dtype) / (1 - p) if dropout else np.ones_like(x)
            # inputs
        # arrays
        s: Any = self.scale(alpha, r, use_rslora)
        ds = s
        if x is None or dora:
            delta = s * (A.T @ B.T).T
            V = W + delta
            norm = (V**2).sum(1) ** 0.5
            # held constant
            g = m / norm if dora else m
        if x is None:
            merged = V * g[:, None] if dora else V
            unmerged = W - delta
            # merged
            b = b if c is None else b + s * c
            # bias
            return {"merged": merged, "unmerged": unmerged, "delta": delta, "bias": b}
        h = x * K
        H = h @ A.T
        branch = s * (H @ B.T)
        if c is not None:
            branch = branch + s * c
        if dora:
            turned = (h @ W.T + branch) * g
            branch = turned - h @ W.T
        # branch
        base = x @ W.T + b
        y = base + branch
        # output
        if dy is None:
            return {"y": shaped(y, shape), "base": base, "branch": branch}
        dbias = dy.sum(0)
        dx_base = dy @ W
        # through the branch
        dz = dy * g if dora else dy
        dH = ds * (dz @ B)
        dA = dH.T @ h
        dB = ds * (dz.T @ H)
        dx_branch = dH @ A
        if dora:
            dx_branch = dx_branch + (dz - dy) @ W
        dx_branch = K * dx_branch
        dx = dx_branch + dx_base
        if dora:
            dm = (dy * turned).sum(0) / m
        if c is not None:
            dc = ds * dy.sum(0)
        # gradients
        answer = {"y": shaped(y, shape), "dx": shaped(dx, shape), "dA": dA, "dB": dB}
        answer |= {"dbias": dbias} if bias is not None else {}
        answer |= {"dmagnitude": dm} if dora else {}
        return answer | ({"dlora_bias": dc} if c is not None else {})

    def delta(self, adapter: Mapping[str, Any]) -> Any:
        """s B A of an adapter."""
        W = np.zeros((len(adapter["B"]), adapter["A"].shape[1]), adapter["A"].dtype)
        return self.layer(W, **adapter)["delta"]

    def weighted(self, adapters: Sequence[Mapping[str, Any]], w: Sequence[float]) -> Any:
        """Σ w s B A."""
        return sum(wi * self.delta(a) for a, wi in zip(adapters, w, strict=True))

    def combine(
        self, adapters: Sequence[Mapping[str, Any]], weights: Sequence[float], **settings: Any
    ) -> Array:
        """Σ w s B A, or the nearest change of a rank."""
        w, dtype = list(weights), adapters[0]["A"].dtype
        # combine
        kind = settings.get("combination_type", "cat")
        if kind in ("cat", "svd"):
            change = self.weighted(adapters, w)
        elif kind.endswith("svd"):
            changes = [self.delta(one) for one in adapters]
            # of changes
            change = self.merged(kind.removesuffix("_svd"), changes, w, settings["density"])
        else:
            products = np.array([wi * self.scale(**a) for a, wi in zip(adapters, w, strict=True)])
            of_B = abs(products) ** 0.5
            of_A = np.sign(products) * of_B
            # roots
            A = self.merged(kind, [wide(a["A"]) for a in adapters], of_A, settings.get("density"))
            B = self.merged(kind, [wide(a["B"]) for a in adapters], of_B, settings.get("density"))
            change = B @ A
        if kind.endswith("svd"):
            U, sigma, Vt = np.linalg.svd(change.astype(np.float64), full_matrices=False)
            rank = settings["svd_rank"]
            change = (U[:, :rank] * sigma[:rank]) @ Vt[:rank]
        # rounded
        answer: Array = change.astype(dtype)
        return answer

    def merged(self, kind: str, arrays: Sequence[Array], w: Any, density: Any) -> Any:
        """Arrays in one: linearly, or trimmed, drawn by chance, with elected signs."""
        D, v = np.stack(arrays), np.array(w)[:, None, None]
        # stacked
        if kind.startswith("dare"):
            rng = self.memory.setdefault("dare", np.random.default_rng(0))
            # dare
            D = D * (rng.random(D.shape) < density) / density
        elif kind != "linear":
            count = round(density * D[0].size)
            # trim
            least = np.sort(abs(D).reshape(len(D), -1), axis=1)[:, -count, None, None]
            D = D * (abs(D) >= least)
        if kind.endswith("ties"):
            elected = np.where(D.sum(0) >= 0, 1, -1)
            # elected
            agree = np.sign(D) == elected
            return (v * D * agree).sum(0) / np.maximum(agree.sum(0), 1)
        return (v * D).sum(0)

    def multi_adapter(
        self, x: Array, W: Array, adapters: Sequence[Mapping[str, Any]], index: Array
    ) -> Array:
        """Each row with its own adapter, or with none where its index is -1."""
        slots = [int(i) for i in index]
        # slots
        answers = []
        for j, i in enumerate(slots):
            adapter = adapters[i]
            # adapter
            row = self.layer(W, x=x[j : j + 1], **adapter)
            answers.append(row["base"] if i < 0 else row["y"])
        y: Array = np.concatenate(answers)
        # answers
        return y.astype(x.dtype)
