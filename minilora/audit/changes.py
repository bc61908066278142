"""What an adapter changes of a base's tensors, from the files of each library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilora.audit.adapters.factors import changes_of
from minilora.audit.change import Change
from minilora.audit.result import Entry
from minilora.audit.tensors import TensorStore
from minilora.io.loading import adapter_format, adapter_path


@dataclass(frozen=True)
class AdapterChanges:
    """What an adapter changes of a base.

    ``name``: as it was given; ``format``: the library's; ``changes``: of each tensor, in the order
    of the file; ``entries``: what of it fits no tensor, and what its settings leave open;
    ``settings``: as they stand in its file.
    """

    name: str
    format: str
    changes: tuple[Change, ...]
    entries: tuple[Entry, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

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
    path = adapter_path(name)
    form = adapter_format(path).name
    if form == "peft":
        from minilora.audit.adapters.peft import read
    else:
        raise NotImplementedError(form)
    found = read(path, base)
    changes: list[Change] = list(found.whole)
    entries = list(found.entries)
    for factors in found.factors:
        made = changes_of(factors, base, name)
        if isinstance(made, Entry):
            entries.append(made)
        else:
            changes += made
    return AdapterChanges(name, form, tuple(changes), tuple(entries), found.settings)
