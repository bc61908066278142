"""An adapter beside its base: what fits nothing, what is tied, and how large its changes are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from minilora.audit.result import Entry
from minilora.audit.stored.match import matches
from minilora.audit.stored.module import OpenAdapter, OpenModule
from minilora.audit.tensors import TensorStore
from minilora.findings.stored import StoredAdapter
from minilora.io.errors import listed
from minilora.spec.target_modules import is_target

TABLES = ("embed_tokens", "lm_head", "wte")


@dataclass
class Base:
    """A base, and which of its modules an adapter's are."""

    adapter: OpenAdapter
    store: TensorStore
    path_of: Mapping[str, str | None] = field(init=False)

    def __post_init__(self) -> None:
        self.path_of = matches(self.adapter, self.paths)

    @property
    def paths(self) -> list[str]:
        """The modules that have a weight, those that contain them, and a tied head."""
        own = [name.removesuffix(".weight") for name in self.store if name.endswith(".weight")]
        inner = [name.rpartition(".")[0] for name in self.store]
        head = ["lm_head"] if self.tied else []
        return [*own, *inner, *head]

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        said = self.store.settings.get("tie_word_embeddings")
        return bool(said) and "lm_head.weight" not in self.store

    def weight(self, module: OpenModule) -> str | None:
        """The name of the module's weight."""
        path = self.path_of.get(module.name)
        return f"{path}.weight" if path is not None and f"{path}.weight" in self.store else None

    def facts(self) -> StoredAdapter:
        """What findings ask of the adapter beside this base."""
        found = {name for name, path in self.path_of.items() if path is not None}
        return self.adapter.facts(self.store.settings, frozenset({*self.paths, *found}))


def base_entries(base: Base) -> Iterator[Entry]:
    """What does not fit the base; nothing of what does."""
    adapter = base.adapter
    lacking = [module for module in adapter.modules if base.path_of.get(module.name, "") is None]
    for module in lacking:
        all_of = len(lacking) == len(base.path_of)
        text = "the base has no such module: the adapter acts nowhere in it"
        mistake = "other-model" if all_of else "no-module"
        yield Entry(module.name, "wrong", text, {"module": module.name}, mistake)
    renamed = [n for n, path in base.path_of.items() if path is not None and _other(n, path)]
    if renamed and adapter.format in ("peft", "mlx"):
        path = base.path_of[renamed[0]]
        text = f"{len(renamed)} modules, as {renamed[0]}, are {path} in the base's files: the "
        text += "adapter fits a model whose class names them as it does"
        yield Entry("names", "told", text, {"modules": len(renamed)}, "prefix-of-base")
    for module in adapter.modules:
        if wrong := _misfit(base, module):
            yield Entry(module.name, "wrong", wrong, {"module": module.name}, "shape")
    yield from _partly_saved(base)
    tied = [m.name for m in adapter.modules if m.name.rpartition(".")[2] in TABLES]
    if base.store.settings.get("tie_word_embeddings") and tied:
        text = f"{listed(tied)}: the base has one table for embedding and head. An adapter of one "
        text += "use is no adapter of the other; merged into the table, it acts in both"
        kept = adapter.settings.get("ensure_weight_tying") or all(
            module.kind == "tokens" for module in adapter.modules if module.name in tied
        )
        yield Entry("tie_word_embeddings", "told" if kept else "doubtful", text, mistake="tied")


def _partly_saved(base: Base) -> Iterator[Entry]:
    """Whether the settings select modules of the base, in other layers, that have no tensors."""
    settings, adapter = base.adapter.settings, base.adapter
    wanted = settings.get("target_modules")
    if adapter.format != "peft" or not wanted or str(wanted).lower() == "all-linear":
        return
    others = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    beside = {key: settings.get(key) or () for key in others}
    found = {path for path in base.path_of.values() if path is not None}
    matrices = [n.removesuffix(".weight") for n in base.store if n.endswith(".weight")]
    try:
        selected = [path for path in matrices if is_target(path, wanted, **beside)]
    except (re.error, RecursionError, ValueError):
        return  # told of the settings
    kinds = {_of_any_layer(path) for path in found}
    lacking = [p for p in selected if p not in found and _of_any_layer(p) in kinds]
    if lacking and found:
        text = (
            f"target_modules selects {len(lacking)} modules of the base that have no tensors here, "
            f"as {lacking[0]}, beside {len(found)} that have: a part of what was trained?"
        )
        figures = {"modules": len(lacking)}
        yield Entry("target_modules", "doubtful", text, figures, "partly-saved")


def _of_any_layer(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", path)


def _other(name: str, path: str) -> bool:
    return name.replace(".base_layer", "") != path


def _misfit(base: Base, module: OpenModule) -> str:
    """What of the module's shapes does not fit the base's tensor, or nothing."""
    if module.kind in ("saved", "tokens"):
        return _other_shape(base, module)
    tensor = base.weight(module)
    if tensor is None or not module.is_adapted or module.kind == "expert":
        return ""
    shape = base.store[tensor].shape
    stored = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    if module.shape in (stored, stored[::-1]):
        return ""
    m, n = module.shape
    return f"B A has the shape ({m}, {n}), and {tensor} of the base {shape}"


def _other_shape(base: Base, module: OpenModule) -> str:
    path = base.path_of.get(module.name)
    for part in ("weight", "bias"):
        tensor = f"{path}.{part}"
        if part in module.parts and tensor in base.store:
            shape, own = base.store[tensor].shape, module.parts[part].shape
            if own != shape:
                return f"{part} has the shape {own}, and {tensor} of the base {shape}"
    return ""


def share(base: Base, module: OpenModule, norm: float) -> float | None:
    """The norm of the module's change as a share of its weight's, which is read once, in blocks."""
    tensor = base.weight(module)
    if tensor is None:
        return None
    stored, total = base.store[tensor], 0.0
    for start, stop in stored.blocks():
        rows = np.asarray(stored.rows(start, stop), np.float64).ravel()
        total += float(rows @ rows)
    return norm / math.sqrt(total) if total > 0 else None
