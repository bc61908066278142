"""Is this model the base with these adapters? A verdict on every tensor, and the cause."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from minilora.audit.adapters.factors import with_most_slack
from minilora.audit.base import HEAD, is_head, replaced, replicated, tied_table, with_head
from minilora.audit.beside import beside
from minilora.audit.cause import cause_of
from minilora.audit.change import Around, Change
from minilora.audit.changes import AdapterChanges, ranges_of, read_changes
from minilora.audit.containers.names import VERBATIM
from minilora.audit.exchanged import exchanged
from minilora.audit.judge import base_again, judge
from minilora.audit.result import Entry, Report
from minilora.audit.settings import compare_settings
from minilora.audit.stored.peft import split_name
from minilora.audit.tensors import StoredTensor, TensorStore, layer_of, open_tensors
from minilora.audit.tokenizer import compare_tokenizers
from minilora.audit.untouched import untouched
from minilora.io.formats.peft.settings import NOT_REPRODUCIBLE
from minilora.spec.lora import twin
from minilora.spec.ops import Array
from minilora.training.threads import in_order

THREADS = min(4, os.cpu_count() or 1)
"""So many tensors are compared at a time; each takes a few blocks of rows, of 20 MB at most."""

Progress = Callable[[int, int, str], None]
"""Told as the audit goes: the bytes that were read, of how many, and the tensor's name."""


def merged(
    base: str | Path,
    adapters: str | Path | Sequence[str | Path],
    merged: str | Path,
    weights: Sequence[float] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Whether the model ``merged`` is ``base`` with the adapters: a verdict on every tensor.

    ``weights``: what each adapter is multiplied with, 1 unless given; several adapters add up.
    Nothing is read whole but the adapter's factors: pairs of tensors are compared a block of rows
    at a time.

    Errors: FormatError for files that cannot be read; ValueError for weights that are not one for
    each adapter.
    """
    began = time.monotonic()
    names = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    factors = [1.0] * len(names) if weights is None else [float(w) for w in weights]
    if len(factors) != len(names):
        raise ValueError(f"{len(factors)} weights for {len(names)} adapters: give one for each")
    B, M = open_tensors(base), open_tensors(merged)
    ranges = [found for name in names if (found := ranges_of(name))]
    plain = replicated(B, ranges[0]) if ranges else B
    whole, table = with_head(plain)
    changes = [read_changes(name, whole) for name in names]
    for adapter in changes:
        whole = replaced(whole, adapter.replaced)
    walk = Walk(whole, M, changes, factors, table, progress)
    entries = [*walk.settings(), *exchanged(walk, [*walk.run()])]
    inputs: dict[str, Any] = {
        "base": str(base), "adapter": [str(name) for name in names], "merged": str(merged)
    }  # fmt: skip
    if weights is not None:
        inputs["weight"] = [str(w) for w in factors]
    cause, remedy = cause_of(entries, walk.changed)
    seconds = time.monotonic() - began
    return Report("merged", inputs, tuple(entries), cause, remedy, seconds, B.nbytes + M.nbytes)


_NOT_KEPT = {start: text for start, text in NOT_REPRODUCIBLE.items() if start != "mica"}
"""Initializations that change the base, as no other loading of it does."""


@dataclass
class Walk:
    """The walk over all tensors of the base and of the merged model.

    ``table``: the table that the base's head is tied to, if it is.
    """

    base: TensorStore
    merged: TensorStore
    adapters: Sequence[AdapterChanges]
    weights: Sequence[float]
    table: str | None = None
    progress: Progress | None = None

    def settings(self) -> Iterator[Entry]:
        """What the settings and the adapters' files say before a tensor is read."""
        for adapter in self.adapters:
            yield from adapter.entries
        yield from compare_settings(self.base, self.merged)
        yield from compare_tokenizers(self.base, self.merged)
        yield from beside(self.merged)

    def run(self) -> Iterator[Entry]:
        """A verdict on every tensor of the two."""
        places = {name: self.place_of(name) for name in self.base}
        asked = [name for name, there in places.items() if there != ""]
        done, total = 0, self.base.nbytes + self.merged.nbytes
        _keep_pages()

        def judged(name: str) -> Entry:
            with np.errstate(all="ignore"):  # overflow shows in the verdict
                return self._of(name, places[name])

        entries = in_order(judged, asked, THREADS)
        for name, entry in zip(asked, entries, strict=True):
            there = places[name]
            done += self.base[name].nbytes + (0 if there is None else self.merged[there].nbytes)
            if self.progress is not None:
                self.progress(min(done, total), total, name)
            yield entry
        yield from self._biases()
        found = {*places.values(), *self.changed}
        yield from (_extra(name) for name in self.merged if name not in found)
        yield from _wrapped_names(self.base, self.merged)
        if self.progress is not None:
            self.progress(total, total, "")

    def _biases(self) -> Iterator[Entry]:
        """The verdict on the adapter's biases of modules that have none in the base."""
        for name, changes in self.changed.items():
            if name in self.base or any(change.kind != "bias" for change in changes):
                continue
            figures = _place(name, changes)
            if (there := self.merged.find(name)) is None:
                text = "the base has no such bias, and the adapter's is merged nowhere"
                yield Entry(name, "missing", text, figures, "lora-bias-lost")
            else:
                other = self.merged[there]
                zeros = replace(other, name=name, read=partial(_zeros, other), scheme=None)
                entry = judge(zeros, other, changes)
                yield replace(entry, figures={**figures, **entry.figures})

    def place_of(self, name: str) -> str | None:
        """The tensor's name in the merged model; None where it is missing.

        A head that is tied in the merged model, and so has no tensor there, is its table. A base's
        tied head is asked only where it or its table is changed: "" is not to be asked.
        """
        there = self.merged.find(name)
        if there is not None or not is_head(name):
            return there
        if name == HEAD and self.table and not {HEAD, self.table} & self.changed.keys():
            return ""
        return tied_table(self.merged)

    @cached_property
    def changed(self) -> dict[str, list[Change]]:
        """The changes of each tensor, each with its adapter's weight."""
        changed: dict[str, list[Change]] = {}
        for adapter, weight in zip(self.adapters, self.weights, strict=True):
            for change in adapter.changes:
                # PiSSA's start lies in the base that it trained beside, whatever the weight.
                counts = 1.0 if change.slack else weight
                changed.setdefault(change.tensor, []).append(replace(change, weight=counts))
        if self.table is not None and HEAD not in changed:
            # Rows of a table that are trained alone are those of the head that is tied to it; in
            # mlx-lm all of the table's changes are.
            both = {a.name for a in self.adapters if a.format == "mlx"}
            changes = changed.get(self.table, [])
            rows = [c for c in changes if c.kind == "tokens" or c.adapter in both]
            if rows:
                changed[HEAD] = [replace(change, tensor=HEAD) for change in rows]
        return changed

    def _of(self, name: str, there: str | None) -> Entry:
        """The verdict on one tensor of the base, which is ``there`` in the merged model."""
        tensor, changes = self.base[name], self.changed.get(name, [])
        figures = _place(name, changes)
        if there is None:
            if _BUFFERS.search(name):
                return Entry(name, "told", "a buffer that older releases wrote, left out")
            return Entry(name, "missing", "the merged model has no such tensor", figures)
        other = self.merged[there]
        if self._sharded:
            figures["file"] = other.file
        if changes:
            entry = base_again(tensor, other, changes)
            entry = entry or judge(tensor, other, changes, self._around(changes))
            if entry.severity == "deviation" and any(change.slack for change in changes):
                entry = _beside_start(entry, judge(tensor, other, with_most_slack(changes)))
            entry = _with_start(self._doubted(entry, changes), changes)
        else:
            entry = self._unchanged(tensor, other)
        entry = self._converted(entry)
        entry = replace(entry, subject=name, figures={**figures, **entry.figures})
        if self._is_tied(name) and entry.severity == "deviation":
            text = (
                "the merged model's head is tied to its table, and with the adapter the two "
                "differ: untie it, with a head of its own and tie_word_embeddings false"
            )
            return replace(entry, text=f"{text} ({entry.text})", mistake="tied-head")
        return entry

    def _converted(self, entry: Entry) -> Entry:
        """The entry, undecided where a converter may have changed what a tensor holds.

        llama.cpp's adds 1 to the weights of some norms, and orders some projections otherwise.
        """
        kinds = {self.base.container, self.merged.container}
        if len(kinds) == 1 or "gguf" not in kinds or entry.severity != "deviation":
            return entry
        file = self.merged if self.merged.container == "gguf" else self.base
        architecture = file.settings.get("model_type")
        if architecture in VERBATIM or entry.verdict == "corrupt":
            return entry
        text = f"llama.cpp's converter may change this tensor of {architecture}: {entry.text}"
        return replace(entry, verdict="undecided", text=text, severity="undecided", mistake="")

    def _unchanged(self, tensor: StoredTensor, other: StoredTensor) -> Entry:
        """The verdict on a tensor that is to stay as it is: the base's, or what an adapter holds.

        What is not may be a change that was applied here too, as by names that only end alike.
        """
        own = any(own.name == tensor.name for a in self.adapters for own in a.replaced)
        entry = untouched(tensor, other, own)
        if entry.verdict != "changed" or entry.mistake or tensor.shape != other.shape:
            return entry
        end, layer = tensor.name.split(".")[-2:], layer_of(tensor.name)
        for name, changes in self.changed.items():
            if name.split(".")[-2:] == end and layer_of(name) == layer and name in self.base:
                here = [replace(change, tensor=tensor.name) for change in changes]
                if self.base[name].shape != tensor.shape:
                    continue
                if judge(tensor, other, here).verdict in ("exact", "within"):
                    text = f"the change of {name} is applied to it, and no adapter is meant for it"
                    return replace(entry, text=text, mistake="applied-elsewhere")
        return entry

    def _doubted(self, entry: Entry, changes: Sequence[Change]) -> Entry:
        """The entry, undecided where the files do not hold all that the merge is made of."""
        if entry.severity != "deviation" or entry.verdict in ("not-applied", "corrupt"):
            return entry
        for change in changes:
            init = change.config.get("init")
            for start, remedy in _NOT_KEPT.items():
                if isinstance(init, str) and init.startswith(start):
                    text = f"init_lora_weights is {init}, and the base given may be another: "
                    text += f"{remedy} ({entry.text})"
                    return replace(entry, verdict="undecided", text=text, severity="undecided")
        return entry

    def _is_tied(self, name: str) -> bool:
        """Whether it is one of a tied pair, which the merged model has tied too."""
        if self.merged.find(HEAD) is not None or self._twins:
            return False
        return is_head(name) or (self.table == name and HEAD in self.changed)

    @cached_property
    def _sharded(self) -> bool:
        """Whether the merged model lies in several files."""
        return len({tensor.file for tensor in self.merged.values()}) > 1

    @cached_property
    def _twins(self) -> bool:
        """Whether head and table are changed alike, so that they may stay tied."""
        head, table = (self.changed.get(name or "", []) for name in (HEAD, self.table))
        return len(head) == len(table) > 0 and all(map(_are_twins, head, table))

    def _around(self, changes: Sequence[Change]) -> Around:
        """The other changes of the adapters, of which a wrong merge may have taken one."""
        others = _Others(self.adapters[0].changes, changes[0].tensor)
        heads = self.base.settings.get("num_attention_heads")
        keys = self.base.settings.get("num_key_value_heads", heads)
        if type(heads) is not int or type(keys) is not int:
            return Around(modules=others)
        return Around(modules=others, heads=(heads, keys))


def _keep_pages() -> None:
    """Let the C library keep the memory of one block of rows for the next.

    glibc gives blocks back to the system and gets them anew, page by page, until it has seen a
    large one freed: this one, of which no page is touched.
    """
    np.empty(2**25 - 2**16, np.uint8)


def _with_start(entry: Entry, changes: Sequence[Change]) -> Entry:
    """The entry, with what it means where PiSSA's or OLoRA's start is one of the changes."""
    if entry.mistake != "some-of-several" or not any(change.slack for change in changes):
        return entry
    text = (
        "the adapter was trained beside the base less its start (PiSSA, OLoRA), and one of the two "
        "steps is missing: the start was not taken out of the base, or the adapter not added"
    )
    return replace(entry, text=text, mistake="start-left-in")


def _beside_start(entry: Entry, most: Entry) -> Entry:
    """The entry, undecided if an error of PiSSA's or OLoRA's start may explain it.

    ``most``: the verdict where the start may be off by the most that is proven.
    """
    if most.severity not in ("ok", "warning"):
        return entry
    text = (
        "beyond what roundings leave of the start that is found again (PiSSA, OLoRA) if they are "
        "independent, but within what is proven: merge an adapter that was converted to LoRA"
    )
    return replace(entry, verdict="undecided", text=f"{text} ({entry.text})", mistake="",
                   severity="undecided")  # fmt: skip


def _zeros(like: StoredTensor, start: int, stop: int) -> Array:
    """Rows of zeros: the bias of a module that has none."""
    return np.zeros((stop - start, *like.shape[1:]), like.dtype)


_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
"""What names begin with in a module that DataParallel, torch.compile or PEFT has wrapped."""


def _wrapped_names(base: TensorStore, merged: TensorStore) -> Iterator[Entry]:
    """An entry where a wrapper's name was written before the names, which then nothing loads."""
    for start in _WRAPPERS:
        wrapped = [name for name in merged if name.startswith(start) and name not in base]
        if wrapped:
            text = (
                f"{len(wrapped)} of {len(merged)} tensors' names begin with {start!r}, as in a "
                f"wrapped module: a loader finds none of them; take it off"
            )
            yield Entry("names of tensors", "wrong", text, mistake="wrapped-names")


def _are_twins(head: Change, table: Change) -> bool:
    """Whether the two change a head and the table that it is tied to alike."""
    if head.kind == table.kind == "tokens":
        return True
    if not {"A", "B"} <= {*head.parts} & {*table.parts} or head.s != table.s:
        return False
    A, B = twin(table.parts["A"], table.parts["B"])
    if table.transposed == head.transposed:  # one change of the stored tensor, in both places
        A, B = table.parts["A"], table.parts["B"]
    return np.array_equal(A, head.parts["A"]) and np.array_equal(B, head.parts["B"])


def _extra(name: str) -> Entry:
    """The verdict on a tensor that the base has not."""
    if split_name(name)[1] or ".base_layer." in name:
        text = "it is a parameter of an adapter beside its base: nothing is merged here"
        return Entry(name, "extra", text, _place(name, []), "not-merged")
    if _BUFFERS.search(name):
        return Entry(name, "told", "a buffer that older releases wrote: nothing reads it")
    text = "the base has no such tensor"
    return Entry(name, "extra", text, _place(name, []))


_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|position_ids$")
"""Tensors of older files that are no parameters."""


@dataclass(frozen=True, eq=False)
class _Others(Sequence[Change]):
    """The changes of other tensors, and of this one's matrices, chosen when they are asked for."""

    every: Sequence[Change]
    tensor: str

    @cached_property
    def _chosen(self) -> list[Change]:
        return [c for c in self.every if c.tensor != self.tensor or c.index is not None]

    def __getitem__(self, at: Any) -> Any:
        return self._chosen[at]

    def __len__(self) -> int:
        return len(self._chosen)


def _place(name: str, changes: Sequence[Change]) -> dict[str, Any]:
    """Where the tensor lies, for tables and pictures."""
    figures: dict[str, Any] = {}
    if (layer := layer_of(name)) is not None:
        figures["layer"] = layer
    if changes:
        figures["module"] = changes[0].module
    return figures
