"""What an adapter changes of a base's tensors, from the files of each library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from minilora.audit.adapters.factors import Found, changes_of
from minilora.audit.base import replaced
from minilora.audit.change import Change
from minilora.audit.result import Entry
from minilora.audit.stored.open import recognised
from minilora.audit.tensors import StoredTensor, TensorStore
from minilora.io.errors import FormatError
from minilora.io.files import read_json
from minilora.io.formats.peft.names import CONFIG
from minilora.io.formats.peft.settings import KINDS
from minilora.io.loading import adapter_path


@dataclass(frozen=True)
class AdapterChanges:
    """What an adapter changes of a base.

    ``name``: as it was given; ``format``: the library's; ``changes``: of each tensor, in the order
    of the file; ``entries``: what of it fits no tensor, and what its settings leave open;
    ``settings``: as they stand in its file; ``replaced``: tensors that stand in the place of the
    base's, as a resized table that PEFT saves with its adapter.
    """

    name: str
    format: str
    changes: tuple[Change, ...]
    entries: tuple[Entry, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    replaced: tuple[StoredTensor, ...] = ()

    def by_tensor(self) -> dict[str, list[Change]]:
        """The changes of each tensor, by its name in the base."""
        found: dict[str, list[Change]] = {}
        for change in self.changes:
            found.setdefault(change.tensor, []).append(change)
        return found


def read_changes(adapter: str | Path, base: TensorStore) -> AdapterChanges:
    """The changes that an adapter makes to the base, in whatever format it is.

    Errors: FormatError for what is no adapter, and for damaged files.
    """
    name = str(adapter)
    form, path = recognised(name)
    reading: Any = import_module(f"minilora.audit.adapters.{form}")
    found: Found = reading.read(path, base)
    if found.replaced:
        base = replaced(base, found.replaced)
    changes: list[Change] = list(found.whole)
    entries = list(found.entries)
    for factors in found.factors:
        made = changes_of(factors, base, name)
        if isinstance(made, Entry):
            entries.append(made)
        else:
            changes += made
    own = tuple(replace(change, adapter=name) for change in changes)
    rest = tuple(found.replaced)
    return AdapterChanges(name, form, own, tuple(entries), found.settings, rest)


def ranges_of(adapter: str | Path) -> list[list[int]]:
    """The ranges of layers that the adapter's model repeats; [] for almost all."""
    config = adapter_path(str(adapter)) / CONFIG
    if not config.is_file():
        return []
    ranges = read_json(config).get("layer_replication") or []
    fits = KINDS["LORA"].read["layer_replication"][1]
    if not fits(ranges):
        remedy = "write it as PEFT does"
        raise FormatError(config, "layer_replication", ranges, "pairs of whole numbers", remedy)
    return [list(pair) for pair in ranges]
