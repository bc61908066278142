"""Operands of several dtypes: adapters of float32 on a half base, activations in a third, autocast.

A mixture says the dtype of each operand, in which the base's product and the branch are stored, in
which sums are accumulated, and in which dtype the answer comes. From these alone follows how far
rounding may carry each answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minilora.verify.core.dtypes import DTYPES, Precision
from minilora.verify.core.errors import LoadError, tidy
from minilora.verify.core.inputs import Layer, long, sigma_merge, sigmas, wanted
from minilora.verify.core.tolerance import Rounding, digits

Array = np.ndarray

OPERANDS = ("x", "W", "adapters")
CHOSEN = ("y", "base", "branch", "accumulation", "autocast")


@dataclass(frozen=True)
class Mixture:
    """The dtypes of x, of W and its bias, of A and B, of the answer y; and how it is computed.

    ``base``: what W x + b is stored in; ``branch``: what s B A x is; ``accumulation``: what sums
    are. With ``autocast`` operands are cast to it before each product.
    """

    x: str
    W: str
    adapters: str
    y: str
    base: str
    branch: str
    accumulation: str
    autocast: str | None = None

    @classmethod
    def of(cls, declared: Any, target: str) -> Mixture:
        """An entry of what a target declares as ``mixed``. Raises LoadError."""
        shown = f"{target}: an entry of 'mixed' is {tidy(repr(declared), 120)}"
        if not isinstance(declared, Mapping) or not {*OPERANDS} <= declared.keys():
            raise LoadError(f"{shown}; expected a dict with {', '.join(OPERANDS)}, each a dtype")
        for name, dtype in declared.items():
            if name not in (*OPERANDS, *CHOSEN) or dtype not in DTYPES:
                raise LoadError(
                    f"{shown}, with {tidy(name)} = {tidy(dtype)}; expected some of "
                    f"{', '.join((*OPERANDS, *CHOSEN))}, each one of {', '.join(DTYPES)}"
                )
        x, W, adapters = (declared[name] for name in OPERANDS)
        autocast = declared.get("autocast")
        usual = {
            "y": autocast or x,
            "base": autocast or W,
            "branch": autocast or adapters,
            "accumulation": widest("float32", W, adapters),
        }
        return cls(
            x, W, adapters, autocast=autocast, **{k: declared.get(k, usual[k]) for k in usual}
        )

    @property
    def words(self) -> str:
        """The dtypes in words."""
        cast = f", autocast to {self.autocast}" if self.autocast else ""
        return f"x {self.x}, W {self.W}, A and B {self.adapters}{cast}"

    @property
    def keeps_digits(self) -> bool:
        """Whether A and B have more digits than W, and the branch is computed with them."""
        return digits(self.branch) >= digits(self.adapters) > digits(self.W)

    def settings(self) -> dict[str, Any]:
        """What a call has besides its arrays."""
        return {"autocast": self.autocast} if self.autocast else {}

    def cast(self, layer: Layer) -> Layer:
        """The layer with each operand in its dtype."""
        to = {"x": self.x, "W": self.W, "bias": self.W, "dy": self.y}
        to |= dict.fromkeys("AB", self.adapters)
        arrays: dict[str, Any] = {name: getattr(layer, name) for name in to}
        cast = {n: None if v is None else v.astype(DTYPES[to[n]]) for n, v in arrays.items()}
        return Layer(**vars(layer) | cast)

    def answers(self) -> dict[str, str]:
        """The dtype of each answer: a gradient has that of its operand."""
        of_adapters = dict.fromkeys(("dA", "dB"), self.adapters)
        return {"y": self.y, "dx": self.x, "dbias": self.W, **of_adapters}

    def sigmas(self, layer: Layer) -> dict[str, Array]:
        """The standard deviation that rounding gives each answer.

        The base's product carries the rounding of ``base``, the branch that of ``branch``: of its
        operands, where they are cast to fewer digits, of each product and of the sums. Of y and dx
        both parts are stored once more, and so is their sum, in the narrower of the answer's dtype
        and the base's; dA, dB and dbias are stored.
        """
        only_base = replace(layer, B=np.zeros_like(layer.B))
        only_branch = replace(layer, W=np.zeros_like(layer.W), bias=None)
        base = sigmas(only_base, Precision(self.base, self.accumulation), cast=True)
        branch = sigmas(only_branch, Precision(self.branch, self.accumulation), cast=True)
        whole, part, rest = (wanted(of) for of in (layer, only_branch, only_base))
        stored = self.answers()
        found = {}
        for name in ("y", "dx"):
            at = _storage(narrowest(stored[name], self.base))
            values = (whole[name], part[name], rest[name])
            lost = sum(at.stored(v.astype(np.float64)) for v in values)
            found[name] = np.sqrt(base[name] ** 2 + branch[name] ** 2 + lost)
        for name, of in (("dA", branch), ("dB", branch), ("dbias", base)):
            if name in whole and name in of:
                lost = _storage(stored[name]).stored(whole[name].astype(np.float64))
                found[name] = np.sqrt(of[name] ** 2 + lost)
        return found

    def sigma_merge(self, layer: Layer) -> Array:
        """The same of W' = W + s B A: s B A is formed as the branch is, stored as W is, and added.

        s B A may be stored as W is before the sum.
        """
        only_branch = replace(layer, W=np.zeros_like(layer.W))
        change = long(layer.s * (long(layer.B) @ long(layer.A)))
        formed = sigma_merge(only_branch, Precision(self.branch, self.accumulation))
        at = _storage(self.W)
        lost = at.stored(change.astype(np.float64))
        lost = lost + at.stored((long(layer.W) + change).astype(np.float64))
        sigma: Array = np.sqrt(formed**2 + lost)
        return sigma


def _storage(dtype: str) -> Rounding:
    return Rounding(Precision(dtype, dtype))


def widest(*dtypes: str) -> str:
    """The dtype with the most digits."""
    return max(dtypes, key=digits)


def narrowest(*dtypes: str) -> str:
    """The dtype with the fewest digits."""
    return min(dtypes, key=digits)
