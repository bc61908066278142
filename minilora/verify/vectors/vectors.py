"""Test vectors: the checks' cases as files, for implementations that no Python can call.

A set is a folder: ``manifest.json`` says what each vector asks and how far an answer may lie from
the true one, and safetensors files hold the inputs, the true answers in float64 and their standard
deviations of rounding in each dtype. Nothing of NumPy is needed to judge by it.

The bytes of a set are the same on every machine. Inputs are drawn from SHAKE-128 (`exact.Shake`),
true answers are computed in whole numbers and rounded once (`exact.Exact`), and a sigma, which is
computed in floating point, is kept to `SIGMA_BITS` digits; where floating point could decide how
one is rounded, nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from minilora.io import reference_models
from minilora.io.files import (
    FormatError,
    pack,
    pack_json,
    read_json,
    read_tensors,
    write_files,
)
from minilora.spec.optim import run as optimize
from minilora.spec.variants import DORA, DORA_FULL, LORA_BIAS
from minilora.verify import engine
from minilora.verify.checks.variants import PART, SAMPLES, specified
from minilora.verify.core.bigfloat import Shake, exact, rounded
from minilora.verify.core.dtypes import DTYPES, Precision
from minilora.verify.core.errors import UsageError, near, tidy
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
from minilora.verify.core.seeds import seed_text
from minilora.verify.core.tolerance import Draws, Rounding, noisy, rms, unit_roundoff
from minilora.verify.core.types import (
    CLOSED_FORM,
    MONTE_CARLO,
    Case,
    Check,
    Limits,
)
from minilora.verify.implementation.contract import CONVENTIONS, positional
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.protocol import RESULTS, _spread
from minilora.verify.vectors.tags import NOTES, flags

Array = np.ndarray

VERSION = 1
MANIFEST, SCHEMA = "manifest.json", "manifest.schema.json"

SIGMA_BITS = 8
MARGIN = 2.0**-33
"""How far a sigma's significand must lie from where its rounding turns: far above what the order of
a sum changes, which is some 2⁻⁵⁰ of a sigma in closed form and 2⁻³⁹ of a sampled one."""

FINE = 2.0**-14
"""The unit roundoff with which sigmas of float32 and float64 are sampled, to be scaled after. At
their own, float64's rounding would be as large as what is sampled."""

_SIZES = (
    *(("bfloat16", number) for number in (0, 3, 15)),
    *(("float32", number) for number in (4, 7)),
    ("float64", 9),
)
_SHAPES = tuple(("float32", number) for number in (6, 8, 11, 13))
"""One token, a batch of one, two axes of batches, and sides and a rank beyond a kernel's tiles,
with as many tokens as features. The number 20 has a B that is nearly 0."""

DRAWS: dict[str, tuple[tuple[str, int], ...]] = {
    "linear.forward": (*_SIZES, *_SHAPES, ("float32", 20)),
    "linear.vjp": (*_SIZES, *_SHAPES, ("float32", 20)),
    "linear.forward.bias": (*_SIZES, ("float32", 13)),
    "merge.weight": (*_SIZES, *_SHAPES[2:], ("float32", 9)),
    "linear.forward*": _SIZES,
    "linear.vjp*": _SIZES,
    "linear.evaluation": _SIZES[1:2] + _SIZES[4:],
    "linear.zero-B": _SIZES[1:2] + _SIZES[4:5],
    "merge.weight*": _SIZES,
    "merge.unmerge*": _SIZES,
    "variants.*.forward*": (("bfloat16", 0), ("float32", 2), ("float64", 3)),
    "variants.*.vjp*": (("bfloat16", 0), ("bfloat16", 1), ("float32", 2), ("float64", 3)),
    "variants.*.merge*": (("bfloat16", 0), ("float32", 2), ("float64", 3)),
    "variants.dora.unbatched*": (("bfloat16", 0), ("float64", 3)),
    "combine.weighted": _SIZES,
    "combine.single": _SIZES[1:2] + _SIZES[4:],
    "combine.zero-weight": (("bfloat16", 0), ("float32", 1)),
    "combine.halves": (("bfloat16", 0), ("float32", 1)),
    "multi.forward": _SIZES,
    "multi.single": (("bfloat16", 0), ("float32", 1)),
    "optimizer.*": (("bfloat16", 0), ("float32", 1)),
    "linear.evaluation-vjp": _SIZES[1:2] + _SIZES[4:5],
}
"""The cases of each check that become vectors: the dtype that they are drawn in, and a number.
The first pattern that fits counts.

Even numbers are of the exact lane. Entries are added at the end of a line; none is changed."""

HOLD = {
    "bfloat16": ("float64", "float32", "bfloat16", "float16"),
    "float32": ("float64", "float32"),
    "float64": ("float64",),
}
"""The dtypes that inputs drawn in one of them are put to: those that hold them exactly."""

SAMPLED = ("variants", "optimizer")
"""The levels whose sigmas are sampled; they have no exact lane."""

WHOLE = ("combine.zero-weight", "combine.halves", "multi.single")
"""The checks whose cases are all of small whole numbers."""

ABSENT = {
    "optimizer.cosine-schedule": "the last bit of a cosine depends on the library of mathematics",
    "optimizer.cosine-schedule.past-end": "the same",
    "optimizer.sgd-balance": "a law of the answers, which the other checks imply",
}
"""Checks that a pattern above names and no vector is made of, and why."""


@dataclass(frozen=True)
class Output:
    """A true answer, its sigma in each dtype (none in the exact lane), and the limits."""

    want: Array
    sigma: dict[str, Array]
    max_z: float = 0.0
    rms_z: float = 0.0
    optional: bool = False


@dataclass(frozen=True)
class Vector:
    """One question and its answers.

    ``drawn`` is the dtype that its inputs are drawn in, ``dtypes`` are those that it may be put to.
    ``alternatives`` holds, for another convention, the outputs that differ under it. ``result`` is
    valid, acceptable (where there are alternatives) or invalid (whatever is answered is wrong).
    """

    id: str
    check: str
    level: str
    method: str
    settings: dict[str, Any]
    inputs: dict[str, Array]
    drawn: str
    lane: str
    dtypes: tuple[str, ...]
    outputs: dict[str, Output]
    flags: tuple[str, ...] = ()
    result: str = "valid"
    alternatives: dict[str, dict[str, Output]] = field(default_factory=dict)

    def expected(self, conventions: Mapping[str, str]) -> dict[str, Output]:
        """The outputs under these conventions."""
        return self.outputs | self.alternatives.get(conventions["dora_norm"], {})


@dataclass(frozen=True)
class Drawn(Case):
    """A case whose draws are the same on every machine and with every version of NumPy."""

    def rng(self) -> Any:
        """A generator with a stream of its own."""
        return Shake(
            f"minilora vectors/{seed_text(self.check)}/{self.dtype}/{self.number}/{self.seed}"
        )


class _Asked(Exception):
    """What a check asks first."""


class _Recorder(GuardedImplementation):
    """A subject that answers nothing and tells what it was asked."""

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        raise _Asked(method, args, kwargs)


def asked(check: Check, case: Case) -> tuple[str, dict[str, Any]]:
    """The method that a check calls in a case, and its arguments by name; arrays in float64."""
    try:
        next(iter(check.run(_Recorder(object()), case)))
    except _Asked as call:
        method, args, kwargs = call.args
    arguments = dict(zip(positional(method), args, strict=False)) | kwargs
    if (method, check.needs) == ("merge", ("merge", "unmerge")):
        method = "unmerge"  # of a weight that is as good as a merged one
        arguments["W_merged"] = arguments.pop("W")
    if method == "optimizer_steps":
        arguments |= arguments.pop("settings")
    return method, _each_array(arguments, lambda v: v if v.dtype.kind in "bi" else _wide(v))


def _wide(array: Array) -> Array:
    return array.astype(np.float64)


def _each_array(value: Any, turn: Callable[[Array], Any]) -> Any:
    if isinstance(value, np.ndarray):
        return turn(value)
    if isinstance(value, dict):
        return {key: _each_array(entry, turn) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_each_array(entry, turn) for entry in value]
    return value


def gathered(settings: Mapping[str, Any], arrays: Mapping[str, Array]) -> dict[str, Any]:
    """The arguments of a method: each array in the place of the settings that its name says."""
    arguments: dict[str, Any] = deepcopy(dict(settings))
    for path, array in arrays.items():
        _put(arguments, path, array)
    return arguments


def _put(tree: Any, path: str, array: Array) -> None:
    key, _, rest = path.partition(".")
    at: Any = int(key) if isinstance(tree, list) else key
    if rest and (isinstance(tree, list) or key in tree):
        _put(tree[at], rest, array)
    else:
        tree[at if isinstance(tree, list) else path] = array


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


def _of_variant(method: str, given: dict[str, Any], lane: str, dtypes: Any, name: str) -> Made:
    """What a layer of DoRA, or one whose B has a bias, answers; DoRA's gradients in two ways."""
    kind, own = next((k, part) for k, part in PART.items() if part in given)
    part = given[own]
    layer = _layer({k: v for k, v in given.items() if k not in (own, "use_dora")})
    answer = {"y": "y"} if method != "merge" else {"merged": RESULTS["merge"]}
    if method == "lora_linear_vjp":
        answer |= {"dx": "dx", "dA": "dA", "dB": "dB", "dpart": f"d{own}"}
        answer |= {} if layer.bias is None else {"dbias": "dbias"}

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
        params, gradients = (_each_array(given[name], number) for name in ("params", "gradients"))
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
    "linear": _of_layer,
    "merge": _of_merge,
    "variants": _of_variant,
    "combine": _of_combination,
    "multi": _of_rows,
    "optimizer": _of_steps,
}
"""What gives the true answers and sigmas of a level."""


def draws(check: str) -> tuple[tuple[str, int], ...]:
    """The cases of a check that become vectors."""
    matching = (cases for pattern, cases in DRAWS.items() if fnmatchcase(check, pattern))
    return () if check in ABSENT else next(matching, ())


def name_of(check: str, drawn: str, number: int, seed: int) -> str:
    """The id of the vector of a case."""
    return f"{check}-{drawn}-{number}" + (f"-seed{seed}" if seed else "")


def make(check: Check, drawn: str, number: int, seed: int) -> Vector:
    """The vector of a case."""
    name = name_of(check.id, drawn, number, seed)
    method, given = asked(check, Drawn(check.id, drawn, number, seed))
    exact_lane = check.id in WHOLE or (number % 2 == 0 and check.level not in SAMPLED)
    lane = "exact" if exact_lane else "rounding"
    settings_and_arrays = _flat(given)
    inputs = settings_and_arrays[1]
    dtypes = tuple(d for d in HOLD[drawn] if check.cases("ci", d) and _held(inputs, d))
    noise = name_of(seed_text(check.id), drawn, number, seed)
    outputs, alternatives = MAKERS[check.level](method, given, lane, dtypes, noise)
    return Vector(
        id=name,
        check=check.id,
        level=check.level,
        method=method,
        settings=settings_and_arrays[0],
        inputs=inputs,
        drawn=drawn,
        lane=lane,
        dtypes=dtypes,
        outputs=outputs,
        flags=flags(check.id, method, given, drawn, lane),
        result="acceptable" if alternatives else "valid",
        alternatives=alternatives,
    )


def _flat(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Array]]:
    arrays: dict[str, Array] = {}
    settings = _spread(given, (), arrays)
    return settings, {
        name: array.astype(np.uint8) if array.dtype == bool else array
        for name, array in arrays.items()
    }


def _held(arrays: Mapping[str, Array], dtype: str) -> bool:
    """Whether a dtype holds all of these numbers exactly."""
    floats = (v for v in arrays.values() if v.dtype.kind == "f")
    return all((v.astype(DTYPES[dtype]).astype(np.float64) == v).all() for v in floats)


INVALID: tuple[tuple[str, str, Callable[[dict[str, Array]], dict[str, Array]]], ...] = (
    (
        "multi.forward",
        "IndexBeyond",
        lambda a: {"index": np.where(a["index"] == a["index"].max(), 3, a["index"])},
    ),
    ("linear.forward", "RanksDiffer", lambda a: {"B": a["B"][:, :1]}),
)
"""The check whose first vector is spoiled, the flag that says how, and the change of its inputs."""


def _spoiled(valid: Vector, flag: str, change: Any) -> Vector:
    return replace(
        valid,
        id=f"{valid.id}-{flag}",
        inputs=valid.inputs | change(valid.inputs),
        outputs={},
        flags=(flag,),
        result="invalid",
    )


def vectors(
    levels: Sequence[str] | None = None,
    checks: Sequence[str] | None = None,
    seed: int = 0,
    progress: engine.Progress | None = None,
) -> list[Vector]:
    """The vectors of these levels and checks (patterns), in the order of the checks.

    Raises UsageError where a level or a check has none.
    """
    from minilora.verify.checks.registry import CHECKS

    if seed < 0:
        raise UsageError(f"the seed is {seed}; expected 0 or more")
    with_vectors = [check for check in CHECKS if draws(check.id)]
    for level in levels or ():
        engine._one_of("level", level, engine.levels_of(with_vectors))
    for pattern in checks or ():
        if not any(fnmatchcase(check.id, pattern) for check in with_vectors):
            names = [check.id for check in with_vectors]
            there = f"there are: {', '.join(names)}"
            raise UsageError(f"no vectors of {pattern!r}{near(pattern, names)}; {there}")
    chosen = [
        (check, drawn, number)
        for check in with_vectors
        if not levels or check.level in levels
        if not checks or any(fnmatchcase(check.id, pattern) for pattern in checks)
        for drawn, number in draws(check.id)
    ]
    made: list[Vector] = []
    for behind, (check, drawn, number) in enumerate(chosen):
        if progress:
            progress(f"{check.id}:", behind, len(chosen))
        made.append(make(check, drawn, number, seed))
    firsts = {vector.check: vector for vector in reversed(made)}
    spoiled = [_spoiled(firsts[c], flag, change) for c, flag, change in INVALID if c in firsts]
    return made + spoiled


def chosen(
    given: Sequence[Vector],
    levels: Sequence[str] | None = None,
    checks: Sequence[str] | None = None,
    case: str | None = None,
) -> list[Vector]:
    """The vectors of these levels and checks (patterns), or the one of this id.

    Raises UsageError where there is none.
    """
    if case is not None:
        levels = checks = None
    found = [
        v
        for v in given
        if case in (None, v.id)
        if not levels or v.level in levels
        if not checks or any(fnmatchcase(v.check, pattern) for pattern in checks)
    ]
    if not found:
        asked = ", ".join([*(levels or ()), *(checks or ()), case or ""]).strip(", ")
        known = {name for v in given for name in (v.id, v.level, v.check)}
        raise UsageError(f"no vectors of {asked} in this set{near(asked, sorted(known))}")
    return found


def tensors(vector: Vector) -> dict[str, Array]:
    """The tensors of a vector: ID.in.NAME, ID.out.NAME, ID.sigma.DTYPE.NAME, and ID.alt.CONVENTION
    before the last two."""
    found = {f"{vector.id}.in.{name}": array for name, array in vector.inputs.items()}
    for at, outputs in (
        (vector.id, vector.outputs),
        *((f"{vector.id}.alt.{c}", outputs) for c, outputs in vector.alternatives.items()),
    ):
        for name, output in outputs.items():
            found[f"{at}.out.{name}"] = output.want
            found |= {f"{at}.sigma.{d}.{name}": sigma for d, sigma in output.sigma.items()}
    return found


def _entry(vector: Vector) -> dict[str, Any]:
    """A vector in the manifest."""

    def stated(outputs: Mapping[str, Output]) -> dict[str, Any]:
        return {
            name: {
                "shape": list(output.want.shape),
                "max_z": output.max_z,
                "rms_z": output.rms_z,
                "optional": output.optional,
            }
            for name, output in outputs.items()
        }

    return {
        "id": vector.id,
        "check": vector.check,
        "level": vector.level,
        "file": f"{vector.level}.safetensors",
        "method": vector.method,
        "settings": vector.settings,
        "inputs": list(vector.inputs),
        "drawn": vector.drawn,
        "lane": vector.lane,
        "dtypes": list(vector.dtypes),
        "flags": list(vector.flags),
        "result": vector.result,
        "outputs": stated(vector.outputs),
        "alternatives": {c: stated(outputs) for c, outputs in vector.alternatives.items()},
    }


MEANING = (
    *("check", "method", "settings", "inputs", "drawn", "lane", "dtypes", "result"),
    *("outputs", "alternatives"),
)
"""What of a vector's entry in the manifest never changes, beside its tensors."""


def fingerprint(vector: Vector) -> str:
    """A hash of all that a vector asks and expects."""
    entry = _entry(vector)
    meaning = _canonical({key: entry[key] for key in MEANING})
    for name, array in sorted(tensors(vector).items()):
        meaning += f"{name} {array.dtype} {array.shape}".encode() + array.tobytes()
    return sha256(meaning).hexdigest()


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _beside(name: str) -> dict[str, Any]:
    """A JSON file of this package."""
    return read_json(Path(__file__).parent / name)


def schema() -> dict[str, Any]:
    """The JSON Schema of a manifest."""
    return _beside("schema.json")


def frozen() -> dict[str, str]:
    """The fingerprint of every vector that was ever made with the seed 0."""
    return _beside("frozen.json")


def files(made: Sequence[Vector], seed: int = 0) -> dict[str, bytes]:
    """The files of a set. Raises ArithmeticError where a vector is not what it was frozen as."""
    known = frozen() if seed == 0 else {}
    for vector in made:
        if known and known.get(vector.id, fingerprint(vector)) != fingerprint(vector):
            raise ArithmeticError(f"{vector.id} comes out otherwise here than it was frozen")
    found = {SCHEMA: pack_json(schema())}
    for level in dict.fromkeys(vector.level for vector in made):
        name = f"{level}.safetensors"
        arrays: dict[str, Array] = {}
        for vector in made:
            arrays |= tensors(vector) if vector.level == level else {}
        found[name] = pack(name, arrays)
    manifest: dict[str, Any] = {
        "$schema": SCHEMA,
        "format": "minilora vectors",
        "version": VERSION,
        "seed": seed,
        "judge": "An answer passes if |got - out| <= max_z * sigma for each element, and the root "
        "of the mean of ((got - out) / sigma)^2 is at most rms_z. Without a sigma, and where it is "
        "0, got == out.",
        "conventions": {name: list(values) for name, values in CONVENTIONS.items()},
        "notes": {f: NOTES[f] for f in NOTES if any(f in vector.flags for vector in made)},
        "vectors": [_entry(vector) for vector in made],
        "references": [
            {"check": f"model.{name}.vector", "file": file, "sha256": digest}
            for name in reference_models.names()
            for file, digest in reference_models.manifest()["files"].items()
            if file == f"vectors/{name}.safetensors"
        ],
        "absent": ABSENT,
        "files": {name: sha256(data).hexdigest() for name, data in found.items()},
    }
    manifest["hash"] = sha256(_canonical(manifest)).hexdigest()
    return {**found, MANIFEST: pack_json(manifest)}


def write(folder: Path | str, made: Sequence[Vector], seed: int = 0) -> dict[str, bytes]:
    """Writes a set, whole or not at all, and gives its files.

    Raises FormatError, OSError, and the ArithmeticError of `files`.
    """
    written = files(made, seed)
    contents = {name: (lambda data=data: data) for name, data in written.items()}
    write_files(folder, contents, r".*\.safetensors")
    return written


def read(folder: Path | str) -> tuple[dict[str, Any], list[Vector]]:
    """The manifest of a set and its vectors. Raises UsageError where it is not what was written."""
    folder = Path(folder)
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest.get("version") != VERSION:
            says = f"version {manifest.get('version')!r}, expected {VERSION}"
            raise UsageError(f"{folder / MANIFEST}: {says}; another minilora wrote it")
        if wrong := problems(manifest, schema()):
            raise UsageError(f"{folder / MANIFEST}: {wrong[0]}; write the set again")
        _unspoiled(folder, manifest)
        by_file = {
            name: read_tensors(folder / name) for name in manifest["files"] if name != SCHEMA
        }
        return manifest, [_read(entry, by_file[entry["file"]]) for entry in manifest["vectors"]]
    except FormatError as error:
        raise UsageError(str(error)) from None


def _unspoiled(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UsageError where a file is missing or is not the one that was written."""
    stated = {key: value for key, value in manifest.items() if key != "hash"}
    found = {MANIFEST: (manifest["hash"], sha256(_canonical(stated)).hexdigest())}
    for name, digest in manifest["files"].items():
        try:
            found[name] = (digest, sha256((folder / name).read_bytes()).hexdigest())
        except OSError as error:
            raise UsageError(f"{folder / name}: {error.strerror}; write the set again") from None
    for name, (written, now) in found.items():
        if written != now:
            says = f"its hash is {now[:12]}…, and {written[:12]}… was written"
            raise UsageError(f"{folder / name} was changed: {says}; write the set again")


def _read(entry: Mapping[str, Any], arrays: Mapping[str, Array]) -> Vector:
    own, dtypes = entry["id"], entry["dtypes"]

    def outputs(at: str, stated: Mapping[str, Any]) -> dict[str, Output]:
        sigma = {
            name: {d: arrays[at_d] for d in dtypes if (at_d := f"{at}.sigma.{d}.{name}") in arrays}
            for name in stated
        }
        return {
            name: Output(
                arrays[f"{at}.out.{name}"], sigma[name], v["max_z"], v["rms_z"], v["optional"]
            )
            for name, v in stated.items()
        }

    alternatives = entry["alternatives"]
    return Vector(
        **{k: entry[k] for k in ("id", "check", "level", "method", "settings", "drawn", "lane")},
        inputs={name: arrays[f"{own}.in.{name}"] for name in entry["inputs"]},
        dtypes=tuple(dtypes),
        outputs=outputs(own, entry["outputs"]),
        flags=tuple(entry["flags"]),
        result=entry["result"],
        alternatives={c: outputs(f"{own}.alt.{c}", v) for c, v in alternatives.items()},
    )


_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
}


def problems(document: Any, schema: Mapping[str, Any], at: str = "$") -> list[str]:
    """Where a document breaks a JSON Schema that has only the keywords of this package's."""
    kind = schema.get("type")
    if kind and not isinstance(document, _TYPES[kind]):
        return [f"{at} is {tidy(document, 40)}, expected a value of type {kind}"]
    found = []
    if "const" in schema and document != schema["const"]:
        found.append(f"{at} is {tidy(document, 40)}, expected {schema['const']}")
    if "enum" in schema and document not in schema["enum"]:
        found.append(f"{at} is {tidy(document, 40)}, expected one of {schema['enum']}")
    if isinstance(document, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        found += [
            f"{at} has no {name!r}" for name in schema.get("required", ()) if name not in document
        ]
        for name, value in document.items():
            inner = known.get(name, others)
            found += (
                [f"{at} has an unknown {name!r}"]
                if inner is False
                else problems(value, inner, f"{at}.{name}")
            )
    if isinstance(document, list):
        for i, value in enumerate(document):
            found += problems(value, schema.get("items", {}), f"{at}[{i}]")
    return found


def freeze(anew: bool = False) -> None:
    """Adds the vectors that are new to the frozen list; one that changed is an error.

    ``anew`` forgets the list first, which nobody may who has published a set.
    """
    made, known = vectors(), {} if anew else frozen()
    if not anew:
        files(made)
    now = {vector.id: fingerprint(vector) for vector in made}
    list_ = {"frozen.json": lambda: pack_json({**now, **known})}
    write_files(Path(__file__).parent, list_)
