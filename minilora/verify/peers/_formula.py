"""LoRA, DoRA and a bias of B in a library of arrays with @, .T and torch's or NumPy's functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minilora.verify.peers.peer import refuse_settings

Tensor = Any


def scale(*, alpha: Any, r: Any, use_rslora: bool = False, **_: Any) -> Any:
    """α/r, or α/√r."""
    return alpha / r**0.5 if use_rslora else alpha / r


def refuse(unknown: Mapping[str, Any]) -> None:
    """NotImplementedError where there is a setting that the formula lacks."""
    refuse_settings("the formula", unknown)


def layer(
    row_norms: Callable[[Tensor], Tensor],
    *,
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: float,
    r: int,
    bias: Tensor = None,
    keep: Tensor = None,
    p: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    magnitude: Tensor = None,
    lora_bias: Tensor = None,
    **unknown: Any,
) -> Tensor:
    """y = x Wᵀ + b + s ((x ∘ K) Aᵀ Bᵀ + c), with DoRA x Wᵀ + b + (x ∘ K) (m ∘ V / ‖V‖ - W)ᵀ."""
    refuse(unknown)
    s = scale(alpha=alpha, r=r, use_rslora=use_rslora)
    h = x if keep is None else x * keep / (1 - p)
    branch = s * (h @ A.T @ B.T)
    if lora_bias is not None:
        branch = branch + s * lora_bias
    if use_dora:
        base = h @ W.T
        branch = magnitude / row_norms(W + s * B @ A) * (base + branch) - base
    y = x @ W.T + branch
    return y if bias is None else y + bias


def merged(
    row_norms: Callable[[Tensor], Tensor],
    *,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: float,
    r: int,
    use_rslora: bool = False,
    use_dora: bool = False,
    magnitude: Tensor = None,
    lora_bias: Tensor = None,
    bias: Tensor = None,
    **unknown: Any,
) -> Any:
    """W + s B A, with DoRA its rows rescaled; and b + s c where the layer has a bias b."""
    refuse(unknown)
    s = scale(alpha=alpha, r=r, use_rslora=use_rslora)
    V = W + s * B @ A
    V = V if magnitude is None else (magnitude / row_norms(V))[:, None] * V
    if bias is None:
        return V
    return V, bias if lora_bias is None else bias + s * lora_bias


def refuse_dora(settings: Mapping[str, Any]) -> None:
    """NotImplementedError where DoRA would have to be unmerged."""
    if "magnitude" in settings:
        raise NotImplementedError("a rescaled row does not say what its norm was")


def combined(
    library: Any, cast: Any, factors: Sequence[tuple[Tensor, Tensor]], rank: int | None
) -> Tensor:
    """[B …] [A; …] of scaled B, or the nearest change of a rank, for which halves are too few."""
    B = library.concatenate([B for _, B in factors], 1)
    change = B @ library.concatenate([A for A, _ in factors], 0)
    if rank is None:
        return change
    wide = cast(change, library.promote_types(change.dtype, library.float32))
    U, S, Vh = library.linalg.svd(wide, full_matrices=False)
    return cast((U * S)[:, :rank] @ Vh[:rank], change.dtype)
