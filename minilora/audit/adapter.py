"""``minilora audit adapter``: is an adapter whole, and does it mean the same everywhere?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from minilora.audit.adapter_base import Base, base_entries, share
from minilora.audit.adapter_libraries import library_entries, library_of
from minilora.audit.adapter_settings import settings_entries
from minilora.audit.adapter_tensors import tensor_entries
from minilora.audit.base import replicated
from minilora.audit.result import Entry, Report
from minilora.audit.stored.module import OpenAdapter
from minilora.audit.stored.open import open_adapter
from minilora.audit.tensors import TensorStore, open_tensors
from minilora.findings import FINDINGS

CAUSES = {
    "other-model": (
        "none of its names fits the base: it is another model's adapter, or was renamed",
        "compare the names with the base's, and give the base that it was trained on",
    ),
    "empty": ("it holds no parameter of an adapter", "save it again"),
    "prefix": (
        "its tensors are not named as PEFT names them: PEFT serves the base, without a word",
        "save it by save_pretrained, or rename the tensors",
    ),
    "adapter-name": (
        "its tensors hold an adapter's name, as a state dict does: PEFT serves the base",
        "save it by save_pretrained, or take the name out of the tensors' names",
    ),
    "wrapped": (
        "its tensors have the names of a wrapped module: PEFT serves the base, without a word",
        "save the module inside the wrapper, or take the wrapper's part out of the names",
    ),
    "one-shard": (
        "it is the part of one process: the rows of all others are 0",
        "save it again, all processes gathered",
    ),
    "incomplete": (
        "a factor is missing, or its shape is wrong: the file was cut in two or written by halves",
        "save it again, all processes gathered",
    ),
    "rank": (
        "its settings and its tensors have other ranks: one of the two files is another adapter's",
        "take both files from the same training step",
    ),
    "partly-saved": (
        "it is a part of an adapter: modules that its settings select have no tensors",
        "save it again, all processes gathered; or name the layers in layers_to_transform",
    ),
    "untrained": (
        "it is untrained: its changes are 0, and what serves it serves the base",
        "look whether the training has saved what it trained",
    ),
}
"""What explains entries with this mistake, and what to do, where most of an adapter has it."""


def adapter(
    path: str | Path,
    base: str | Path | None = None,
    libraries: Sequence[str] = (),
    progress: Callable[[int, int, str], object] | None = None,
) -> Report:
    """Whether an adapter is whole, and what libraries and servers compute of its files.

    ``base``: the model that it is for; ``libraries``: names, as ``sglang`` or ``vllm==0.33.0``, of
    which a deviation counts as one; without them all that read the format are told of, and a
    deviation is a warning. ``progress`` is told the bytes that were read, of how many, and of what.

    Errors: FormatError for what cannot be read; ValueError for a library that is not known.
    """
    start = time.perf_counter()
    for name in libraries:
        library_of(name)
    opened = open_adapter(path)
    beside = None if base is None else Base(opened, _base_of(opened, base))
    entries = [*settings_entries(opened)]
    read = 0
    for entry in tensor_entries(opened):
        entries.append(_beside(entry, opened, beside))
        read += _size(opened, entry)
        if progress is not None:
            progress(read, opened.nbytes, entry.subject)
    if beside is not None:
        entries += base_entries(beside)
    facts = opened.facts() if beside is None else beside.facts()
    entries += library_entries(facts, libraries)
    cause, remedy = cause_of(entries)
    inputs: dict[str, str | list[str]] = {"adapter": str(path), "format": opened.format}
    inputs |= {} if base is None else {"base": str(base)}
    inputs |= {"for": list(libraries)} if libraries else {}
    took = time.perf_counter() - start
    return Report("adapter", inputs, tuple(entries), cause, remedy, took, read)


def _base_of(opened: OpenAdapter, base: str | Path) -> TensorStore:
    """The base, with its layers repeated where the adapter's model repeats them."""
    store = open_tensors(base)
    ranges = opened.settings.get("layer_replication") if opened.format == "peft" else None
    return replicated(store, ranges) if ranges else store


def _size(opened: OpenAdapter, entry: Entry) -> int:
    module = opened.by_name.get(entry.subject)
    return 0 if module is None else sum(held.nbytes for held in module.parts.values())


def _beside(entry: Entry, opened: OpenAdapter, base: Base | None) -> Entry:
    """The entry with the share of the base's norm, if it has a norm."""
    norm = entry.figures.get("norm")
    if base is None or not isinstance(norm, float):
        return entry
    of = share(base, opened.by_name[entry.subject], norm)
    if of is None:
        return entry
    text = f"{entry.text}, {100 * of:.3g}% of the weight's norm"
    return replace(entry, text=text, figures={**entry.figures, "share": of})


def cause_of(entries: Sequence[Entry]) -> tuple[str, str]:
    """What explains most of what deviates, and what to do; "" where nothing does."""
    for mistake, (cause, remedy) in CAUSES.items():
        of = [entry for entry in entries if entry.mistake == mistake]
        if of and (mistake != "untrained" or _is_most(of, entries)):
            return cause, remedy
    return next(_first(entries), ("", ""))


def _is_most(of: Sequence[Entry], entries: Sequence[Entry]) -> bool:
    """Whether they are at least half of the modules."""
    return 2 * len(of) >= sum("rank" in entry.figures for entry in entries)


def _first(entries: Sequence[Entry]) -> Iterator[tuple[str, str]]:
    """The first deviation, in its own words, and what its finding says to do."""
    for entry in entries:
        if entry.severity == "deviation":
            finding = FINDINGS.get(entry.mistake)
            remedy = "" if finding is None else " ".join(finding.consequence.split())
            yield f"{entry.subject}: {entry.text}", remedy.replace("`", "")
