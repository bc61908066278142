"""The files of a skeleton: templates, filled with what is known of the library's layer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from minilora.verify.skeletons.guess import Guess

KINDS = ("torch", "jax", "cmd")
"""What a library is written with: PyTorch, JAX, or anything that a program can be made of."""


def skeleton(
    kind: str, name: str, folder: str, layer: str = "", guess: Guess | None = None
) -> dict[str, str]:
    """The files by name: the adapter and the known file, and but for cmd a test and a workflow.

    ``folder``: where they will lie, as the workflow names it; ``layer``: of torch, the class as
    module:Class; ``guess``: what was found out about it.
    """
    source = "lora_driver.py" if kind == "cmd" else "lora_adapter.py"
    values = {"name": name, **_of_torch(layer, guess or Guess("Layer(...)"))}
    made = {source: _filled(kind, values), "lora_known.json": json.dumps([]) + "\n"}
    if kind != "cmd":
        made["test_lora.py"] = _filled("test", values)
        where = {"target": f"{folder}/{source}:Adapter", "known": f"{folder}/lora_known.json"}
        made["lora_workflow.yml"] = _filled("workflow", where)
    return made


def _filled(template: str, values: Mapping[str, Any]) -> str:
    text = files(__package__).joinpath(f"{template}.txt").read_text("utf-8")
    return Template(text).substitute(values)


def _of_torch(layer: str, guess: Guess) -> dict[str, str]:
    module, _, cls = layer.partition(":")
    places = guess.places
    lines = [_copied(name, *places[name]) for name in ("W", "A", "B") if name in places]
    lines += _bias(places["bias"][0] if "bias" in places else "")
    lines += [f"# Not found out: {what}." for what in guess.missing]
    if guess.missing:
        lines.append('raise NotImplementedError("complete the method layer")')
    turned = [name for name in ("A", "B") if places.get(name, ("", False))[1]]
    bias = f'inputs["dbias"] = own["{places["bias"][0]}"]' if "bias" in places else ""
    return {
        "module": module,
        "layer": cls,
        "version": _version(module),
        "guessed": f" from {layer}; the places of the parameters\nwere found by their shapes",
        "construct": guess.construct,
        "fill": _indented(3, lines),
        "gradients": ", ".join(f'"d{n}": own["{places[n][0]}"]' for n in "AB" if n in places),
        "bias_gradient": _indented(2, ['if settings.get("bias") is not None:', f"    {bias}"])
        if bias
        else "",
        "transpose": _indented(2, [f'answers["d{n}"] = answers["d{n}"].T' for n in turned]),
        "merge": _merge(guess),
    }


def _bias(own: str) -> list[str]:
    """The lines that fill the bias, or refuse one."""
    refused = 'raise NotImplementedError("no bias")'
    if not own:
        return ["if bias is not None:", f"    {refused}"]
    return [
        f'if "{own}" in own:',
        f'    own["{own}"].copy_(tensor(np.zeros(m) if bias is None else bias))',
        "elif bias is not None:",
        f"    {refused}",
    ]


def _indented(depth: int, lines: Sequence[str]) -> str:
    return "".join(f"\n{'    ' * depth}{line}" for line in lines)


def _copied(name: str, own: str, turned: bool) -> str:
    return f'own["{own}"].copy_(tensor({name}){".T" if turned else ""})'


def _merge(guess: Guess) -> str:
    if not guess.merge or "W" not in guess.places:
        return ""
    weight, turned = guess.places["W"]
    values = {"merge_method": guess.merge, "weight": weight, "turned": ".T" if turned else ""}
    return _filled("torch_merge", values)


def _version(module: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module.partition(".")[0])
    except (PackageNotFoundError, ValueError):
        return ""
