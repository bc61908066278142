"""The true answers of a vector, and the standard deviation that rounding gives each.

True answers are computed in exact numbers and rounded once; a sigma, which is computed in floating
point, is kept to `SIGMA_BITS` digits. Where floating point could decide how one is rounded, nothing
is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from minilora.spec.optim import run as optimize
from minilora.spec.variants import DORA, DORA_FULL, LORA_BIAS
from minilora.verify.checks.variants import PART, SAMPLES, specified
from minilora.verify.core.bigfloat import Shake, exact, rounded
from minilora.verify.core.dtypes import Precision
from minilora.verify.core.inputs import (
    Layer,
    Several,
    limits,
    sigma_change,
    sigma_merge,
    sigmas,
    sigmas_by_row,
    wanted,
    wanted_by_row,
    wanted_change,
    wanted_merge,
)
from minilora.verify.core.tolerance import Draws, Rounding, noisy, rms, unit_roundoff
from minilora.verify.core.types import CLOSED_FORM, MONTE_CARLO, Limits
from minilora.verify.implementation.messages import RESULTS
from minilora.verify.vectors.vector import Output, each_array

Array = np.ndarray

SIGMA_BITS = 8


MARGIN = 2.0**-33
"""How far a sigma's significand must lie from where its rounding turns: far above what the order of
a sum changes, which is some 2⁻⁵⁰ of a sigma in closed form and 2⁻³⁹ of a sampled one."""


FINE = 2.0**-14
"""The unit roundoff with which sigmas of float32 and float64 are sampled, to be scaled after. At
their own, float64's rounding would be as large as what is sampled."""


def _layer(given: Mapping[str, Any]) -> Layer:
    """The layer of a call's arguments; without dy, which then is 0."""
    own = ("x", "W", "A", "B", "dy", "alpha", "r", "bias", "keep", "p")
    known = {name: given[name] for name in own if name in given}
    known.setdefault("x", np.zeros((1, given["W"].shape[1])))
    known.setdefault("dy", np.zeros((*known["x"].shape[:-1], len(given["W"]))))
    return Layer(**known, settings={k: v for k, v in given.items() if k not in own})


def _several(given: Mapping[str, Any]) -> Several:
    """The adapters of a call's arguments, with its weights or its index."""
    A, B = given["adapters"][0]["A"], given["adapters"][0]["B"]
    shared = {"W": given.get("W", np.zeros((len(B), A.shape[1])))}
    shared |= {"x": given["x"]} if "x" in given else {}
    layers = [_layer({**adapter, **shared}) for adapter in given["adapters"]]
    return Several(layers, given.get("weights", []), given.get("index", np.zeros(0, int)))


def _output(
    want: Any, sigma: Mapping[str, Array], allowed: Limits, lane: str, optional: bool = False
) -> Output:
    """An answer from exact numbers. Where answers come in float64, it has been rounded, too."""
    nearest = rounded(want)
    if lane == "exact":
        return Output(nearest, {}, optional=optional)
    stored = Rounding(Precision("float64", "float64")).stored(nearest)
    wide = {d: np.sqrt(s**2 + stored) if d == "float64" else s for d, s in sigma.items()}
    return Output(
        nearest,
        {dtype: coarse(array) for dtype, array in wide.items()},
        allowed.max_z,
        round(allowed.rms(nearest.size), 4),
        optional,
    )


def coarse(sigma: Array) -> Array:
    """Rounded to `SIGMA_BITS` binary digits, as float32; what is less than any answer's is 0.

    ArithmeticError where the last bits of the floating-point sigma decide which way.
    """
    significand, exponent = np.frexp(sigma)
    scaled = significand * 2.0**SIGMA_BITS
    small = sigma < 2.0**-120
    near_turn = np.abs(scaled - np.floor(scaled) - 0.5) < 2.0**SIGMA_BITS * MARGIN
    if (near_turn & ~small).any():
        raise ArithmeticError("a sigma may be rounded otherwise on another machine: another seed?")
    kept = np.ldexp(np.rint(scaled), exponent - SIGMA_BITS)
    return np.where(small, 0.0, kept).astype(np.float32)


def _sampled(
    run: Callable[[Callable[[Array], Any]], dict[str, Any]],
    wanted: Mapping[str, Any],
    dtypes: Iterable[str],
    name: str,
) -> dict[str, dict[str, Array]]:
    """σ of each answer in each dtype, by noisy runs: at least that of storing the answer."""
    nearest = {what: rounded(value) for what, value in wanted.items()}

    @cache
    def of(rounding: str) -> dict[str, Array]:
        runs = [Shake(f"minilora noise/{name}/{rounding}/{i}") for i in range(SAMPLES)]
        draws = Draws(runs, SAMPLES)
        return rms(run(lambda v: noisy(v, _rounding(rounding), draws)), nearest)

    found = {}
    for dtype in dtypes:
        fine = dtype in ("float64", "float32")
        factor = unit_roundoff(dtype) / FINE if fine else 1.0
        sampled, rounding = of("" if fine else dtype), Rounding(Precision(dtype, dtype))
        found[dtype] = {
            what: np.maximum(factor * sampled[what], np.sqrt(rounding.stored(value)))
            for what, value in nearest.items()
        }
    return found


def _rounding(dtype: str) -> Rounding:
    """That of a dtype; without one, the unit roundoff `FINE` and no least number."""
    rounding = Rounding(Precision(dtype or "float32", dtype or "float32"))
    if not dtype:
        rounding.u = rounding.u_sum = FINE
        rounding.tiny = 0.0
    return rounding


Made = tuple[dict[str, Output], dict[str, dict[str, Output]]]
"""Outputs, and alternatives to some of them."""


def _of_layer(method: str, given: dict[str, Any], lane: str, dtypes: Any, _: str) -> Made:
    """y and its gradients."""
    layer = _layer(given)
    want = wanted(layer, exact)
    sigma = {d: sigmas(layer, Precision(d, d)) for d in dtypes if lane != "exact"}
    names = ["y"] + (["dx", "dA", "dB"] if method == "lora_linear_vjp" else [])
    names += ["dbias"] if method == "lora_linear_vjp" and layer.bias is not None else []
    return {
        name: _output(
            want[name],
            {d: s[name] for d, s in sigma.items()},
            limits(layer, name),
            lane,
            name == "dbias",
        )
        for name in names
    }, {}


def _of_merge(method: str, given: dict[str, Any], lane: str, dtypes: Any, _: str) -> Made:
    """The merged weight, or the weight that the adapter is taken out of."""
    if method == "unmerge":
        given = given | {"W": given["W_merged"], "B": -given["B"]}
        given.pop("W_merged")
    layer = _layer(given)
    sigma = {d: sigma_merge(layer, Precision(d, d)) for d in dtypes if lane != "exact"}
    return {RESULTS[method]: _output(wanted_merge(layer, exact), sigma, CLOSED_FORM, lane)}, {}


def _of_combination(method: str, given: dict[str, Any], lane: str, dtypes: Any, _: str) -> Made:
    """The change of several adapters. A weight times a scale is exact, too."""
    several = _several(given)
    weights: list[Any] = [exact(w)[()] for w in several.weights]
    want = wanted_change(replace(several, weights=weights), exact)
    sigma = {d: sigma_change(several, Precision(d, d)) for d in dtypes if lane != "exact"}
    return {RESULTS[method]: _output(want, sigma, CLOSED_FORM, lane)}, {}


def _of_rows(method: str, given: dict[str, Any], lane: str, dtypes: Any, _: str) -> Made:
    """y of a batch, each row with an adapter of its own."""
    several = _several(given)
    sigma = {d: sigmas_by_row(several, Precision(d, d)) for d in dtypes if lane != "exact"}
    allowed = limits(several.adapters[0], "y")
    return {"y": _output(wanted_by_row(several, exact), sigma, allowed, lane)}, {}


def _names_of_variant(method: str, part: str, layer: Layer) -> dict[str, str]:
    """The specification's names of the answers to a call, and the contract's."""
    if method == "merge":
        return {"merged": RESULTS["merge"]}
    names = {"y": "y"}
    if method == "lora_linear_vjp":
        names |= {"dx": "dx", "dA": "dA", "dB": "dB", "dpart": f"d{part}"}
        names |= {} if layer.bias is None else {"dbias": "dbias"}
    return names


def _of_variant(method: str, given: dict[str, Any], lane: str, dtypes: Any, name: str) -> Made:
    """What a layer of DoRA, or one whose B has a bias, answers; DoRA's gradients in two ways."""
    kind, own = next((k, part) for k, part in PART.items() if part in given)
    part = given[own]
    layer = _layer({k: v for k, v in given.items() if k not in (own, "use_dora")})
    answer = _names_of_variant(method, own, layer)

    def outputs(of: Any) -> dict[str, Output]:
        want = specified(of, layer, part, exact)
        sigma = _sampled(lambda number: specified(of, layer, part, number), want, dtypes, name)
        return {
            theirs: _output(
                want[ours],
                {d: sigma[d][ours] for d in dtypes},
                MONTE_CARLO,
                lane,
                ours == "dbias",
            )
            for ours, theirs in answer.items()
        }

    if kind != "dora":
        return outputs(LORA_BIAS), {}
    made, other = outputs(DORA), {}
    if method == "lora_linear_vjp":
        other = {k: v for k, v in outputs(DORA_FULL).items() if (v.want != made[k].want).any()}
    return made, {"differentiated": other} if other else {}


def _of_steps(method: str, given: dict[str, Any], lane: str, dtypes: Any, name: str) -> Made:
    """Every parameter after each step, the steps stacked.

    Within a step the elements err independently, from step to step they do not.
    """
    settings = {k: v for k, v in given.items() if k not in ("params", "gradients")}

    def run(number: Callable[[Array], Any], **more: Any) -> dict[str, Any]:
        params, gradients = (each_array(given[name], number) for name in ("params", "gradients"))
        history = optimize(params, gradients, settings | more)
        return {name: np.stack([step[name] for step in history]) for name in given["params"]}

    powers = {"betas": tuple(exact(b)[()] for b in given["betas"])} if "betas" in given else {}
    want = run(exact, **powers)
    sigma = _sampled(run, want, dtypes, name)
    allowed = replace(MONTE_CARLO, rms_small=MONTE_CARLO.rms_small * len(given["gradients"]) ** 0.5)
    return {
        what: _output(value, {d: sigma[d][what] for d in dtypes}, allowed, lane)
        for what, value in want.items()
    }, {}


MAKERS: dict[str, Callable[[str, dict[str, Any], str, Any, str], Made]] = {
    "lora_linear": _of_layer,
    "lora_linear_vjp": _of_layer,
    "merge": _of_merge,
    "unmerge": _of_merge,
    "combine": _of_combination,
    "multi_adapter": _of_rows,
    "optimizer_steps": _of_steps,
}
"""What gives the true answers to a method's call, and their sigmas."""


def true_answers(method: str, given: dict[str, Any], lane: str, dtypes: Any, name: str) -> Made:
    """The true answers to a call, and alternatives to some of them; ``name`` seeds the noise."""
    is_variant = any(part in given for part in PART.values())
    return (_of_variant if is_variant else MAKERS[method])(method, given, lane, dtypes, name)
