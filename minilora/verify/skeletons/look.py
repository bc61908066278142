"""Looking at a library's LoRA layer: how it is built, and where its parts lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from minilora.verify.skeletons.build import build, form, has_factors, lines
from minilora.verify.skeletons.calls import Call, calls, factories, modules
from minilora.verify.skeletons.guess import Guess, Merge, R
from minilora.verify.skeletons.merging import merging, unmerging
from minilora.verify.skeletons.names import ARGUMENTS
from minilora.verify.skeletons.scale import of_layer, scale_of


def look(layer: Any, module: str, name: str) -> Guess:
    """Look at a class of torch.nn.Module, or at a function that makes or changes a module.

    Layers are built of small sizes, and their forward and their merge are called.
    """
    best = None
    for called, target in factories(layer, f"{module}.{name}"):
        found = _of_callable(called, target)
        if found is not None and not found.missing:
            return found
        best = best or found
    unknown = Guess((f"layer = {module}.{name}(...)",), (module,), missing=("how it is called",))
    return best or unknown


def _of_callable(called: Callable[..., Any], target: str) -> Guess | None:
    """The first call that makes a layer all of whose parts are found, or else the first."""
    first = None
    try:
        for call in calls(called, target, ARGUMENTS):
            found = _of_call(call)
            if not found.missing:
                return found
            first = first or found
    except (TypeError, ValueError):  # it has no signature
        return None
    return first


def _of_call(call: Call) -> Guess:
    start = Guess(lines(call, False), tuple(modules(str(call))))
    if call.unknown:
        return replace(start, missing=tuple(f"the argument {name}" for name in call.unknown))
    try:
        built = build(call)
    except Exception as error:
        why = f"{call} raises {type(error).__name__}: {error}"
        return replace(start, missing=(why.partition("\n")[0],))
    places = built.places()
    start = replace(start, build=lines(call, built.is_in_place), places=places)
    if not has_factors(built):
        lost = [f"the parameter of {part}" for part in ("A", "B") if part not in places]
        return replace(start, missing=tuple(lost))
    found = form(built, places)
    if not found:
        return replace(start, missing=("what its forward takes and gives",))
    return _whole(replace(start, form=found), call, built.r, built.is_in_place)


def _whole(start: Guess, call: Call, r: int, is_in_place: bool) -> Guess:
    """The guess with what is fixed, with the scale and with merging."""
    fixed: dict[str, Any] = {}
    said = []
    if start.form == "layer" and "bias" not in start.places:
        fixed["bias"] = False
    if r != R:
        fixed["r"] = r
        said.append(f"no argument sets the rank, which is {r}")
    measured = of_layer(start.places, start.form)
    call, found, says = scale_of(call, r, measured)
    fixed |= found
    said += says
    said += [f"{name} is given {call.given[name]}" for name in call.tried if name not in str(said)]
    merge: Merge | None
    unmerge, raised = "", list[str]()
    if start.form == "weight":
        merge = Merge('layer(own["W"])', "merged", ("", False))
    else:
        merge, raised = merging(call, start.places)
        unmerge = unmerging(call, start.places, merge) if merge else ""
    return replace(
        start,
        build=lines(call, is_in_place),
        fixed=fixed,
        merge=merge,
        unmerge=unmerge,
        has_rslora=call.gives("use_rslora"),
        said=(*said, *raised),
    )
