"""An adapter's settings against its tensors: what one says and the other lacks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from minilora.audit.adapter_settings_peft import CHECKS as _PEFT
from minilora.audit.adapter_settings_peft import Check
from minilora.audit.result import Entry
from minilora.audit.stored.module import OpenAdapter
from minilora.io.errors import listed
from minilora.io.formats.mlx import INERT


def _ranks(adapter: OpenAdapter) -> Iterator[Entry]:
    """The one rank of mlx-lm is that of all tensors."""
    told = _parameters(adapter).get("rank")
    for module in adapter.adapted:
        if module.rank != told:
            text = f"a has rank {module.rank}, and lora_parameters says {told}: mlx-lm refuses it"
            yield Entry(module.name, "wrong", text, {"module": module.name}, "rank")


def _parameters(adapter: OpenAdapter) -> Mapping[str, Any]:
    return adapter.settings.get("lora_parameters") or {}


def _kind(adapter: OpenAdapter) -> Iterator[Entry]:
    """DoRA has magnitudes, and LoRA has none."""
    kind = adapter.settings.get("fine_tune_type") or "lora"
    with_m = [module.name for module in adapter.modules if "magnitude" in module.parts]
    if (kind == "dora") != bool(with_m) and adapter.adapted:
        text = f"fine_tune_type is {kind}, and {len(with_m)} modules have a magnitude m"
        yield Entry("fine_tune_type", "wrong", text, mistake="variant")


def _keys(adapter: OpenAdapter) -> Iterator[Entry]:
    """The keys name the modules that have tensors."""
    keys = _parameters(adapter).get("keys")
    if keys is None:
        return
    names = [module.name for module in adapter.modules]
    missed = [name for name in names if not any(_is_end(key, name) for key in keys)]
    unused = [key for key in keys if not any(_is_end(key, name) for name in names)]
    if missed:
        text = f"keys do not select {listed(missed)}: mlx-lm refuses these tensors"
        yield Entry("keys", "wrong", text, {"modules": len(missed)}, "not-targeted")
    if unused:
        text = f"{listed(unused)} of keys fit no module that has tensors"
        yield Entry("keys", "doubtful", text, mistake="target-fits-nothing")


def _is_end(key: str, name: str) -> bool:
    return name == key or name.endswith(f".{key}")


def _unknown(adapter: OpenAdapter) -> Iterator[Entry]:
    """Settings that are not known."""
    known = {"fine_tune_type", "num_layers", "lora_parameters", "use_dora", *INERT.split()}
    for key in adapter.settings.keys() - known:
        text = f"{key} is {json.dumps(adapter.settings[key])}: a setting that is not known here"
        yield Entry(key, "told", text, mistake="unknown-setting")


_MLX: tuple[Check, ...] = (_ranks, _kind, _keys, _unknown)


def _alphas(adapter: OpenAdapter) -> Iterator[Entry]:
    """Modules without an alpha, beside others that have one."""
    without = [m.name for m in adapter.adapted if "alpha" not in m.parts]
    if without:
        text = f"{listed(without)} have no alpha: their scale is 1 for sd-scripts"
        verdict = "doubtful" if len(without) < len(adapter.adapted) else "told"
        yield Entry("alpha", verdict, text, {"modules": len(without)}, "no-alpha")


_KOHYA: tuple[Check, ...] = (_alphas,)


def _no_alpha(adapter: OpenAdapter) -> Iterator[Entry]:
    """The scale is in no file of loralib's."""
    text = "a state dict of loralib's has no lora_alpha: the scale is that of the training's code"
    yield Entry("lora_alpha", "told", text, mistake="no-alpha")
    merged = [m.name for m in adapter.modules if {"A", "weight"} <= m.parts.keys()]
    if merged:
        text = (
            f"it holds the base's weights of {listed(merged)}: saved after eval() they are merged"
        )
        yield Entry("base weights", "doubtful", text, mistake="copies")


_LORALIB: tuple[Check, ...] = (_no_alpha,)

_CHECKS = {"peft": _PEFT, "mlx": _MLX, "kohya": _KOHYA, "loralib": _LORALIB}


def settings_entries(adapter: OpenAdapter) -> Iterator[Entry]:
    """What of the settings contradicts the tensors."""
    for check in _CHECKS.get(adapter.format, ()):
        yield from check(adapter)
