"""The true answers of a vector, and the standard deviation that rounding gives each.

True answers are computed in exact numbers and rounded once, or in whole numbers, which nothing
rounds; those of models in folders are in `file_truth`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from minilora.io.formats.peft import adapted_names, trained_names
from minilora.spec.optim import run as optimize
from minilora.spec.variants import DORA_FULL, LORA_BIAS
from minilora.verify.checks.module_inputs import ModuleInputs, wide
from minilora.verify.checks.module_layers import answers as answers_of_module
from minilora.verify.checks.module_layers import merged as merged_module
from minilora.verify.checks.variants import DORAS, PART, SAMPLES, specified
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
from minilora.verify.core.types import CLOSED_FORM, MONTE_CARLO
from minilora.verify.diagnosis.answers import Direct
from minilora.verify.implementation.contract import CONVENTIONS
from minilora.verify.implementation.messages import RESULTS
from minilora.verify.implementation.minilora_impl import Minilora
from minilora.verify.vectors.call import FINE, Answers, Call, rounding_of
from minilora.verify.vectors.file_truth import of_folders
from minilora.verify.vectors.recorded import replay_session
from minilora.verify.vectors.vector import Output, alternative, each_array

Array = np.ndarray

LAYER_ARGUMENTS = ("x", "W", "A", "B", "dy", "alpha", "r", "bias", "keep", "p")


def _layer(arguments: Mapping[str, Any]) -> Layer:
    """The layer of a call's arguments; a missing dy is 0."""
    known = {name: arguments[name] for name in LAYER_ARGUMENTS if name in arguments}
    known.setdefault("x", np.zeros((1, arguments["W"].shape[1])))
    known.setdefault("dy", np.zeros((*known["x"].shape[:-1], len(arguments["W"]))))
    settings = {name: v for name, v in arguments.items() if name not in LAYER_ARGUMENTS}
    return Layer(**known, settings=settings)


def _several(arguments: Mapping[str, Any]) -> Several:
    """The adapters of a call's arguments, with its weights or its index."""
    A, B = arguments["adapters"][0]["A"], arguments["adapters"][0]["B"]
    shared = {"W": arguments.get("W", np.zeros((len(B), A.shape[1])))}
    shared |= {"x": arguments["x"]} if "x" in arguments else {}
    layers = [_layer({**adapter, **shared}) for adapter in arguments["adapters"]]
    index = arguments.get("index", np.zeros(0, int))
    return Several(layers, arguments.get("weights", []), index)


def _sampled(
    call: Call,
    run: Callable[[Callable[[Array], Any]], dict[str, Any]],
    wanted: Mapping[str, Any],
) -> dict[str, dict[str, Array]]:
    """σ of each answer in each dtype, by noisy runs: at least that of storing the answer."""
    nearest = {name: rounded(value) for name, value in wanted.items()}

    @cache
    def sample(rounding: str) -> dict[str, Array]:
        runs = [Shake(f"minilora noise/{call.name}/{rounding}/{i}") for i in range(SAMPLES)]
        draws = Draws(runs, SAMPLES)
        return rms(run(lambda v: noisy(v, rounding_of(rounding), draws)), nearest)

    sigma = {}
    for dtype in call.dtypes:
        is_wide = dtype in ("float64", "float32")
        factor = unit_roundoff(dtype) / FINE if is_wide else 1.0
        sampled, rounding = sample("" if is_wide else dtype), Rounding(Precision(dtype, dtype))
        sigma[dtype] = {
            name: np.maximum(factor * sampled[name], np.sqrt(rounding.stored(value)))
            for name, value in nearest.items()
        }
    return sigma


def _of_layer(call: Call) -> Answers:
    """y and its gradients."""
    layer = _layer(call.arguments)
    want = wanted(layer, exact)
    sigma = call.sigma(lambda precision: sigmas(layer, precision))
    names = ["y"]
    if call.method == "lora_linear_vjp":
        names += ["dx", "dA", "dB"] if layer.bias is None else ["dx", "dA", "dB", "dbias"]
    return {
        name: call.output(
            want[name],
            {dtype: of_dtype[name] for dtype, of_dtype in sigma.items()},
            limits(layer, name),
            optional=name == "dbias",
        )
        for name in names
    }, {}


def _of_merge(call: Call) -> Answers:
    """The merged weight, or the weight after unmerging."""
    arguments = dict(call.arguments)
    if call.method == "unmerge":
        arguments |= {"W": arguments.pop("W_merged"), "B": -arguments["B"]}
    layer = _layer(arguments)
    sigma = call.sigma(lambda precision: sigma_merge(layer, precision))
    output = call.output(wanted_merge(layer, exact), sigma, CLOSED_FORM)
    return {RESULTS[call.method]: output}, {}


def _of_combination(call: Call) -> Answers:
    """The change of several adapters. A weight times a scale is exact, too."""
    several = _several(call.arguments)
    weights: list[Any] = [exact(w)[()] for w in several.weights]
    want = wanted_change(replace(several, weights=weights), exact)
    sigma = call.sigma(lambda precision: sigma_change(several, precision))
    return {RESULTS[call.method]: call.output(want, sigma, CLOSED_FORM)}, {}


def _of_rows(call: Call) -> Answers:
    """y of a batch, each row with its own adapter."""
    several = _several(call.arguments)
    sigma = call.sigma(lambda precision: sigmas_by_row(several, precision))
    allowed = limits(several.adapters[0], "y")
    return {"y": call.output(wanted_by_row(several, exact), sigma, allowed)}, {}


def _names_of_variant(method: str, part: str, layer: Layer) -> dict[str, str]:
    """The specification's names of the answers to a call, and the contract's."""
    if method == "merge":
        return {"merged": RESULTS["merge"]}
    names = {"y": "y"}
    if method == "lora_linear_vjp":
        names |= {"dx": "dx", "dA": "dA", "dB": "dB", "dpart": f"d{part}"}
        names |= {} if layer.bias is None else {"dbias": "dbias"}
    return names


def _same(one: Mapping[str, Output], other: Mapping[str, Output]) -> bool:
    """Whether two choices of conventions give the same answers."""
    return one.keys() == other.keys() and all(
        (v.want == other[k].want).all() for k, v in one.items()
    )


def _of_variant(call: Call) -> Answers:
    """The answers of DoRA, or of a layer with lora_bias; DoRA's by each choice of conventions."""
    kind, part_name = next((k, part) for k, part in PART.items() if part in call.arguments)
    arguments = {k: v for k, v in call.arguments.items() if k != "use_dora"}
    part = arguments.pop(part_name)
    layer = _layer(arguments)
    names = _names_of_variant(call.method, part_name, layer)

    def outputs(variant: Any) -> dict[str, Output]:
        want = specified(variant, layer, part, exact)
        sigma = _sampled(call, lambda number: specified(variant, layer, part, number), want)
        return {
            name: call.output(
                want[ours],
                {dtype: sigma[dtype][ours] for dtype in call.dtypes},
                MONTE_CARLO,
                optional=ours == "dbias",
            )
            for ours, name in names.items()
        }

    if kind != "dora":
        return outputs(LORA_BIAS), {}
    usual, *others = DORAS.items()
    taken, alternatives = outputs(usual[1]), dict[str, dict[str, Output]]()
    for choice, of in others if call.method != "merge" else ():
        chosen = dict(zip(CONVENTIONS, choice, strict=True))
        if layer.keep is None and chosen["dora_dropout"] != CONVENTIONS["dora_dropout"][0]:
            continue  # one function
        wanted = outputs(of)
        differing = {k: v for k, v in wanted.items() if (v.want != taken[k].want).any()}
        is_new = not any(_same(differing, known) for known in alternatives.values())
        if differing and is_new:
            alternatives[alternative(chosen)] = differing
    return taken, alternatives


def _of_steps(call: Call) -> Answers:
    """Every parameter after each step, the steps stacked.

    Within a step the elements err independently, from step to step they do not.
    """
    arguments = call.arguments
    settings = {k: v for k, v in arguments.items() if k not in ("params", "gradients")}

    def run(number: Callable[[Array], Any], **more: Any) -> dict[str, Any]:
        params, gradients = (each_array(arguments[k], number) for k in ("params", "gradients"))
        history = optimize(params, gradients, settings | more)
        return {name: np.stack([step[name] for step in history]) for name in arguments["params"]}

    exact_betas = {}
    if "betas" in arguments:
        exact_betas = {"betas": tuple(exact(beta)[()] for beta in arguments["betas"])}
    want = run(exact, **exact_betas)
    sigma = _sampled(call, run, want)
    steps = len(arguments["gradients"])
    allowed = replace(MONTE_CARLO, rms_small=MONTE_CARLO.rms_small * steps**0.5)
    return {
        name: call.output(value, {d: sigma[d][name] for d in call.dtypes}, allowed)
        for name, value in want.items()
    }, {}


def _of_module(call: Call) -> Answers:
    """y, the gradients, or what is held where it is merged: whole numbers, which nothing rounds."""
    names = ("layer", "adapter", "x", "dy", "index")
    of: dict[str, Any] = {name: call.arguments.get(name) for name in names}
    inputs = ModuleInputs(of["layer"]["kind"], **of, traits=())
    module, dy = inputs.module(wide), call.arguments.get("dy")
    found = {name: Output(v, {}) for name, v in answers_of_module(module, dy).items()}
    if call.arguments["mode"] == "merged":
        held = merged_module(module)
        found |= {name: Output(v, {}, optional=True) for name, v in held.items()}
    if dy is None or "magnitude" not in of["adapter"]:
        return found, {}
    other = answers_of_module(inputs.module(wide, DORA_FULL), dy)
    differing = {n: Output(v, {}) for n, v in other.items() if (v != found[n].want).any()}
    return found, {"differentiated": differing} if differing else {}


def _of_session(call: Call) -> Answers:
    """The answers of minilora's own session, which holds in the check that asks these steps."""
    found = replay_session(Direct(Minilora()), call.arguments)
    steps = call.arguments["steps"]
    outputs = {}
    for name, array in found.items():
        is_gradient = steps[int(name.partition(".")[0])]["do"] == "gradients"
        may_be_left_out = is_gradient and not array.any()
        outputs[name] = Output(np.asarray(array, np.float64), {}, optional=may_be_left_out)
    return outputs, {}


def _of_targets(call: Call) -> Answers:
    """r and alpha of each adapted module."""
    found = adapted_names(call.arguments["config"], call.arguments["names"])
    return {name: Output(np.asarray(pair, np.float64), {}) for name, pair in found.items()}, {}


def _of_trainable(call: Call) -> Answers:
    """A 1 for each tensor that is trained."""
    found = trained_names(call.arguments["config"], call.arguments["names"])
    return {name: Output(np.ones(()), {}) for name in found}, {}


def _of_init(call: Call) -> Answers:
    """What does not depend on chance: B is 0, and the base is what it was."""
    W = call.arguments["W"]
    B = np.zeros((len(W), call.arguments["r"]))
    return {"B": Output(B, {}), "W": Output(W, {}, optional=True)}, {}


MAKERS: dict[str, Callable[[Call], Answers]] = {
    "lora_linear": _of_layer,
    "lora_linear_vjp": _of_layer,
    "merge": _of_merge,
    "unmerge": _of_merge,
    "combine": _of_combination,
    "multi_adapter": _of_rows,
    "optimizer_steps": _of_steps,
    "module": _of_module,
    "session": _of_session,
    "targets": _of_targets,
    "trainable": _of_trainable,
    "init": _of_init,
    **dict.fromkeys(("model_loss", "train", "logits", "deltas", "load"), of_folders),
}
"""The makers of the true answers to a method's call, and of their sigmas."""


def true_answers(call: Call) -> Answers:
    """The true answers to a call, and alternatives to some of them."""
    is_variant = any(part in call.arguments for part in PART.values())
    return (_of_variant if is_variant else MAKERS[call.method])(call)
