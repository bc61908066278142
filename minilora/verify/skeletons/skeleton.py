"""The files of a skeleton: templates, filled with what is known of the library's layer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from minilora.verify.skeletons.guess import Guess, Merge

KINDS = ("torch", "jax", "cmd")
"""What a library is written with: PyTorch, JAX, or anything that a program can be made of."""

FORWARDS = {
    "layer": "layer(x)",
    "branch": 'torch.nn.functional.linear(x, own["W"], own.get("bias")) + layer(x)',
    "weight": 'torch.nn.functional.linear(x, layer(own["W"]), own.get("bias"))',
}
FORMULA = Guess(("x @ W.T + alpha / r * (x @ A.T @ B.T) + (0 if bias is None else bias)",))
"""What stands in a skeleton in the place of the library's own function."""


def skeleton(
    kind: str, name: str, folder: str, layer: str = "", guess: Guess | None = None
) -> dict[str, str]:
    """The files by name: the adapter and the known file, and but for cmd a test and a workflow.

    ``folder``: where they will lie, as the workflow names it; ``layer``: the class or function as
    module:name; ``guess``: what was found out about it.
    """
    source = "lora_driver.py" if kind == "cmd" else "lora_adapter.py"
    made = {source: _adapter(kind, name, layer, guess), "lora_known.json": json.dumps([]) + "\n"}
    if kind != "cmd":
        made["test_lora.py"] = _filled("test", {"name": name})
        where = {"target": f"{folder}/{source}:Adapter", "known": f"{folder}/lora_known.json"}
        made["lora_workflow.yml"] = _filled("workflow", where)
    return made


def _filled(template: str, values: Mapping[str, Any]) -> str:
    text = files(__package__).joinpath(f"{template}.txt").read_text("utf-8")
    return Template(text).substitute(values)


def _adapter(kind: str, name: str, layer: str, guess: Guess | None) -> str:
    if kind == "cmd":
        return _filled(kind, {"name": name})
    known = guess or (FORMULA if kind == "jax" else Guess(("layer = ...",), missing=("the layer",)))
    values = {
        "name": name,
        "layer": layer,
        "version": _version(layer.partition(":")[0]),
        "imports": "".join(f"import {module}\n" for module in known.modules).rstrip("\n"),
        "fixed": f"\n    fixed = {_literal(known.fixed)}" if known.fixed else "",
        "rslora": "use_rslora=False, " if known.has_rslora else "",
    }
    if kind == "torch" and known.form != "function":
        return _filled(kind, values | _of_layer(known))
    refused = ["if bias is not None:", '    raise NotImplementedError("no bias")']
    values |= {
        "expression": known.build[0],
        "refuse_bias": _indented(2, refused) if "bias" in known.fixed else "",
        "written": f" from {layer}" if layer else "; call the library in forward",
    }
    if kind == "jax" and values["imports"]:
        values["imports"] += "\n"
    return _filled("torch_function" if kind == "torch" else kind, values)


def _of_layer(known: Guess) -> dict[str, str]:
    missing = [f"# Not found out: {what}." for what in known.missing]
    if missing:
        missing.append('raise NotImplementedError("complete the method layer")')
    turned = [name for name in ("A", "B") if known.places.get(name, ("", False))[1]]
    return {
        "build": _indented(2, [*missing, *known.build]),
        "own": _indented(2, _own(known)),
        "forward": FORWARDS.get(known.form, "layer(x)"),
        "transpose": _indented(2, [f'answers["d{n}"] = answers["d{n}"].T' for n in turned]),
        "merge": _indented(1, [*_merge(known), *_unmerge(known)]),
    }


def _own(known: Guess) -> list[str]:
    """The lines that name the parts of the layer, and what is written to them."""
    turns = {name: ".T" if turned else "" for name, (_, turned) in known.places.items()}
    listed = [name for name in ("W", "A", "B") if name in known.places]
    own = ", ".join(f'"{name}": found["{known.places[name][0]}"]' for name in listed)
    values = ", ".join(f'"{name}": {name}{turns[name]}' for name in listed)
    if known.form in ("branch", "weight"):
        given = ['own |= {"W": tensor(W)} | ({} if bias is None else {"bias": tensor(bias)})']
        given.append('values |= {"W": W, "bias": bias}')
        return [f"own = {{{own}}}", f"values = {{{values}}}", *given]
    if "bias" not in known.places:
        refused = ["if bias is not None:", '    raise NotImplementedError("no bias")']
        return [f"own = {{{own}}}", f"values = {{{values}}}", *refused]
    place = known.places["bias"][0]
    return [
        f"own = {{{own}}}",
        f'values = {{{values}, "bias": bias}}',
        "if bias is not None:",
        f'    own["bias"] = found["{place}"]',
        f'elif "{place}" in found:',
        f'    torch.nn.init.zeros_(found["{place}"])',
    ]


def _merge(known: Guess) -> list[str]:
    """The method merge, which takes the merged weight, and the bias, from where they lie."""
    if known.merge is None:
        return []
    lines = ["", "def merge(self, W, A, B, **settings):"]
    lines.append("    layer, own = self.layer(W, A, B, **settings)")
    if "(base)" in known.merge.expression:
        lines.append("    base = torch.nn.Linear(*W.shape[::-1])")
        lines.append('    base.weight.data = own["W"]')
        lines.append('    base.bias = torch.nn.Parameter(own["bias"]) if "bias" in own else None')
    begin = "merged = " if known.merge.holder == "merged" else ""
    lines.append(f"    {begin}{known.merge.expression}")
    if not known.merge.bias:
        return [*lines, f"    return {_weight(known.merge)}.numpy()"]
    lines.append(f"    weight = {_weight(known.merge)}.numpy()")
    bias = f'parts({known.merge.holder})["{known.merge.bias}"].detach().numpy()'
    return [*lines, f'    return (weight, {bias}) if "bias" in own else weight']


def _unmerge(known: Guess) -> list[str]:
    """The method unmerge: the layer is merged, and W put in the place of what that gave."""
    if known.merge is None or not known.unmerge:
        return []
    return [
        "",
        "def unmerge(self, W_merged, A, B, **settings):",
        "    layer, own = self.layer(W_merged, A, B, **settings)",
        f"    {known.merge.expression}",
        f"    {_weight(known.merge)}.copy_(tensor(W_merged))",
        f"    layer.{known.unmerge}()",
        f"    return {_weight(known.merge)}.numpy()",
    ]


def _weight(merge: Merge) -> str:
    """The merged weight where it lies."""
    name, turned = merge.place
    held = f'parts({merge.holder})["{name}"]' if name else merge.holder
    return f"{held}.detach(){'.T' if turned else ''}"


def _indented(depth: int, lines: Sequence[str]) -> str:
    return "".join(f"\n{'    ' * depth}{line}" if line else "\n" for line in lines)


def _literal(fixed: Mapping[str, Any]) -> str:
    return repr(dict(fixed)).replace("'", '"')


def _version(module: str) -> str:
    """The installed version of the distribution that a module is of, or what the module says."""
    import sys
    from importlib.metadata import packages_distributions, version

    root = module.partition(".")[0]
    for distribution in packages_distributions().get(root, ()):
        return version(distribution)
    return str(getattr(sys.modules.get(root), "__version__", ""))
