"""mlx-lm's folders: a = Aᵀ, b = Bᵀ, and ``scale`` is the whole factor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minilora.audit.adapters.factors import Factors, Found, checked
from minilora.audit.change import Change
from minilora.audit.result import Entry
from minilora.audit.stored.mlx import open_mlx
from minilora.audit.stored.module import Held, OpenModule
from minilora.audit.tensors import TensorStore
from minilora.io.errors import FormatError
from minilora.io.formats.mlx import CONFIG, KINDS
from minilora.io.formats.values import is_integer, is_number
from minilora.io.lazy_weights import Expanded
from minilora.spec.lora import LORA
from minilora.spec.ops import Array


def read(folder: Path, base: TensorStore) -> Found:
    """The adapter in a folder of mlx-lm's; of full fine-tuning the tensors that it trained.

    Errors: FormatError for damaged files, and for settings that say no scale.
    """
    opened = open_mlx(folder)
    settings, found = opened.settings, Found(opened.settings)
    kind = settings.get("fine_tune_type") or "lora"
    if not isinstance(kind, str) or kind not in KINDS:
        raise FormatError(folder / CONFIG, "fine_tune_type", kind, ", ".join(KINDS), "is it MLX's?")
    full = KINDS[kind] is None
    for name in opened.tensors if full else opened.others:
        _whole(found, folder, opened.tensors[name], base)
    if full:
        return found
    scale, rank = _scale(folder / CONFIG, settings)
    for module in opened.modules:
        _add(found, folder, module, scale, rank, base)
    if "alpha" in settings["lora_parameters"]:
        text = "alpha is said: mlx-lm before 0.20 multiplied scale by it, newer ones do not"
        found.entries.append(Entry("alpha", "doubtful", text))
    return found


def _scale(path: Path, settings: Mapping[str, Any]) -> tuple[float, Any]:
    """The factor, and the rank that the settings say."""
    parameters = settings.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    scale, rank = parameters.get("scale"), parameters.get("rank")
    if not isinstance(scale, int | float) or not is_number(scale) or not is_integer(1)(rank):
        found = json.dumps({"scale": scale, "rank": rank})
        remedy = "mlx-lm takes no default for it: write what it was trained with"
        raise FormatError(path, "lora_parameters", found, "a number and a whole number", remedy)
    return float(scale), rank


def _add(
    found: Found, folder: Path, opened: OpenModule, scale: float, rank: Any, base: TensorStore
) -> None:
    module, parts = opened.name, opened.parts
    shapes = {part: held.shape for part, held in parts.items()}
    config = {"r": rank, "scale": scale, "peft_type": "mlx"}
    if not {"A", "B"} <= shapes.keys():
        text = f"found {', '.join(shapes)}, expected lora_a and lora_b"
        found.entries.append(Entry(module, "wrong", text, {"module": module}))
        return
    if len(shapes["A"]) == 3:
        _experts(found, folder, opened, scale, config, base)
        return
    turned = {part: shapes[part][::-1] for part in shapes}
    if turned["A"][:1] != (rank,):
        text = f"lora_a has rank {turned['A'][:1]}, and the settings say {rank}"
        found.entries.append(Entry(module, "wrong", text, {"module": module}))
    variant = KINDS["dora"] if "magnitude" in parts else LORA
    assert variant is not None
    read_parts = {part: _transposed(checked(folder, held)) for part, held in parts.items()}
    found.factors.append(Factors(module, read_parts, turned, scale, variant, config=config))


def _transposed(read: Callable[[], Array]) -> Callable[[], Array]:
    return lambda: read().T


def _experts(
    found: Found, folder: Path, opened: OpenModule, scale: float, config: Any, base: TensorStore
) -> None:
    """Experts, each with its factors: a (experts, r, n) and b (experts, m, r)."""
    module, parts = opened.name, opened.parts
    tensor = base.weight_of(module)
    (e, r, n), B = parts["A"].shape, parts["B"].shape
    if tensor is None or len(B) != 3 or base[tensor].shape != (e, B[1], n) or B[::2] != (e, r):
        text = f"factors {parts['A'].shape} and {B} fit no experts of the base"
        found.entries.append(Entry(module, "wrong", text, {"module": module}))
        return
    for i in range(e):
        entries: dict[str, Any] = {p: _one(checked(folder, h), i) for p, h in parts.items()}
        change = Change(tensor, module, Expanded(entries), "expert", scale=scale, index=i,
                        config=config)  # fmt: skip
        found.whole.append(change)


def _one(read: Callable[[], Array], index: int) -> Callable[[], Array]:
    return lambda: read()[index]


def _whole(found: Found, folder: Path, held: Held, base: TensorStore) -> None:
    """A tensor that was trained itself."""
    name = held.name
    tensor = base.find(name)
    if tensor is None:
        text = "the base has no such tensor: mlx-lm passes it over without a word"
        found.entries.append(Entry(name, "wrong", text))
        return
    parts = Expanded({"weight": checked(folder, held)})
    found.whole.append(Change(tensor, name.rpartition(".")[0], parts, "saved"))
