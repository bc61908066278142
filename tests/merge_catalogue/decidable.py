"""What can be decided from a merged file: the tensors that no right merge gives, in any order.

A right merge rounds, each in one of a few ways, the factors' product, the change and the result.
Before its last rounding it is within ``slack`` of the exact sum; the last rounding is monotone, so
that what is outside of [round(exact - slack), round(exact + slack)] is no right merge.
"""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np

from merge_catalogue.variants import residual
from merge_catalogue.worlds import World


def unit(dtype):
    """The unit roundoff."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


def wide(t):
    """The site in float64."""
    return replace(
        t,
        A=t.A.astype(float),
        B=t.B.astype(float),
        extra={n: a.astype(float) for n, a in t.extra.items()},
    )


def slack(t, W, change, product, adapter, base):
    """How far from the exact result a right merge may be before it is rounded to be stored."""
    u, coarse = unit(np.float32), max(unit(adapter), unit(base))
    terms = t.r + 6
    # On GPUs the factors may be rounded to half precision first, and their products added in it.
    inner = terms * coarse * product
    error = inner + 3 * u * (abs(W) + abs(change)) + 4 * coarse * abs(change)
    if t.variant == "dora":  # the norm and the quotient are rounded too, in PEFT to the base's
        error = error + (12 * coarse + W.shape[1] * u) * abs(W + change)
    return error


def tensor_bounds(world: World, sites):
    """name -> (least, greatest) for each matrix that the adapter changes."""
    adapter = next(iter(world.adapter.values())).dtype
    exact, base = {}, world.residual
    for t in sites:
        W, room = exact.get(t.weight) or (np.asarray(base[t.weight]).astype(float), 0.0)
        V = W.T if t.transposed else W
        t = wide(t)
        merged = t.merged(V)
        change = merged - V
        product = abs(t.s) * (abs(t.B) @ abs(t.A))
        for column in ("lambda_b", "lambda_d", "E"):
            product = product * (1 + abs(t.extra[column]).max()) if column in t.extra else product
        room_here = slack(t, V, change, product, adapter, world.base[t.weight].dtype)
        if residual(world):
            room_here = room_here + 1e-3 * abs(V).max()
        flip = (lambda X: X.T) if t.transposed else (lambda X: X)
        exact[t.weight] = flip(merged), room + flip(room_here)
    return {name: (exact - room, exact + room) for name, (exact, room) in exact.items()}


def rounded(X, dtype):
    with np.errstate(over="ignore"):
        return X.astype(dtype)


class Right:
    """Every right merge of a world, and of others beside it: bounds and bits by name."""

    def __init__(self, world: World, *others: World) -> None:
        self.world = world
        sites = [t for w in (world, *others) for t in w.sites]
        self.bounds = {
            name: tuple(rounded(X, world.base[name].dtype) for X in pair)
            for name, pair in tensor_bounds(world, sites).items()
        }
        self.biases = {t.bias for t in sites if "c" in t.extra}

    def outside(self, M) -> set[str]:
        """The tensors of M, missing ones too, that no right merge has."""
        world = self.world
        found = set(M) - set(world.base) - self.biases
        if "lm_head.weight" not in world.base:  # tied: only a change of one of the two parts them
            table = M.get("model.embed_tokens.weight")
            head, wanted = M.get("lm_head.weight"), world.untied_head.get("lm_head.weight", table)
            if head is not None and head.tobytes() == wanted.tobytes():
                found.discard("lm_head.weight")
            elif head is None and world.untied_head:
                found.add("lm_head.weight")
        return found | {name for name in world.base if not self.holds(name, M.get(name))}

    def holds(self, name, stored) -> bool:
        """Whether a right merge may have this tensor under that name."""
        W = self.world.base[name]
        if stored is None or stored.shape != W.shape:
            return False
        if name in self.bounds and name not in self.world.saved:
            least, most = self.bounds[name]
            return bool(((least <= stored) & (stored <= most)).all())
        return stored.tobytes() == expected(self.world, name, W).tobytes()


def expected(world, name, W):
    """The right tensor where only rows of it, a bias or nothing is changed."""
    if name in world.saved:
        return world.saved[name].astype(W.dtype)
    if world.tokens and world.tokens[0] == name:
        W = W.copy()
        W[world.tokens[1]] = world.tokens[2].astype(W.dtype)
    for t in world.sites:
        if "c" in t.extra and t.bias == name:
            W = (W.astype(np.float32) + np.float32(t.s) * t.extra["c"][:, 0]).astype(W.dtype)
    return W
