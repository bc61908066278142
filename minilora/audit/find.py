"""What was merged? From the base and the merged model alone: the rank of what differs in each
tensor; and which of some adapters it is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from minilora.audit.floats import format_of, spacing
from minilora.audit.low_rank import matrix
from minilora.audit.merged import merged as audit_merged
from minilora.audit.rank import Rank, rank
from minilora.audit.result import Entry, Report
from minilora.audit.tensors import StoredTensor, TensorStore, layer_of, open_tensors
from minilora.io.errors import FormatError
from minilora.io.loading import adapter_format, adapter_path
from minilora.spec.ops import Array

Progress = Callable[[int, int, str], None]

ROWS, COLUMNS = 512, 1024
"""So much of a tensor is looked at: a part of a matrix has its rank, if it is this large."""

PIECES = 8
"""The rows are of so many blocks, spread over the tensor."""


def find(
    base: str | Path,
    merged: str | Path,
    adapters: str | Path | Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> Report:
    """What the model ``merged`` differs from ``base`` by.

    Of each tensor the rank of its change, as `rank` finds it in a part of the tensor. ``adapters``:
    those that it may be, or the folder that they lie in; each is tried by `merged`.

    Errors: FormatError for files that cannot be read, and for a folder without adapters.
    """
    began = time.monotonic()
    B, M = open_tensors(base), open_tensors(merged)
    candidates = _candidates(adapters)
    tensors = list(_tensors(B, M, progress))
    differ = {entry.subject for entry in tensors if entry.verdict != "unchanged"}
    tried = [_try(base, candidate, merged, differ, progress) for candidate in candidates]
    fits = [entry.subject for entry in tried if entry.verdict == "fine"]
    entries = [*tried, *tensors]
    if fits:  # what cannot be decided from the tensors alone is, by the adapter
        entries = [replace(e, severity="note") if e.verdict == "undecided" else e for e in entries]
    inputs: dict[str, str | list[str]] = {"base": str(base), "merged": str(merged)}
    if candidates:
        inputs["find"] = [str(candidate) for candidate in candidates]
    seconds = time.monotonic() - began
    scaled = [f"{entry.subject} ({entry.mistake})" for entry in tried if entry.mistake]
    answer = _answer(entries, fits, scaled, len(candidates))
    return Report("find", inputs, tuple(entries), answer, "", seconds, B.nbytes + M.nbytes)


def _candidates(adapters: str | Path | Sequence[str | Path]) -> list[Path]:
    """The adapters, or those in the folder."""
    if not isinstance(adapters, str | Path):
        return [Path(adapter) for adapter in adapters]
    folder = adapter_path(str(adapters))
    if _is_adapter(folder):
        return [folder]
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    if not (found := [path for path in inside if _is_adapter(path)]):
        expected = "a folder of adapters, or an adapter"
        raise FormatError(folder, "adapters", "none", expected, "check the path")
    return found


def _is_adapter(path: Path) -> bool:
    try:
        adapter_format(path)
    except (FormatError, OSError):
        return False
    return True


def _try(
    base: str | Path,
    adapter: Path,
    merged: str | Path,
    differ: set[str],
    progress: Progress | None,
) -> Entry:
    """Whether it is this adapter: fine if nothing deviates, and it changes some that ``differ``."""
    try:
        report = audit_merged(base, adapter, merged, progress=progress)
    except (FormatError, ImportError) as error:
        return Entry(str(adapter), "told", f"it cannot be tried: {error}")
    changed = [e for e in report.entries if "module" in e.figures]
    right = [e for e in changed if e.severity in ("ok", "warning")]
    figures = {"right": len(right), "changed": len(changed)}
    said = f"{len(right)} of {len(changed)} tensors that it changes are as with it"
    if report.exit_status == 0 and any(entry.subject in differ for entry in changed):
        return Entry(str(adapter), "fine", f"it is this adapter: {said}", figures)
    scaled = [e for e in changed if e.verdict == "factor" and e.mistake]
    if len(scaled) == len(changed) > 0 and len({e.mistake for e in scaled}) == 1:
        text = f"it is this adapter by another factor: {report.cause}"
        return Entry(str(adapter), "told", text, figures, scaled[0].mistake)
    cause = f"; {report.cause}" if right and report.cause else ""
    return Entry(str(adapter), "told", f"it is not this adapter: {said}{cause}", figures)


def _tensors(base: TensorStore, merged: TensorStore, progress: Progress | None) -> Iterator[Entry]:
    """An entry for each tensor of both."""
    total, done, guess = base.nbytes + merged.nbytes, 0, 1
    for name, tensor in base.items():
        if progress is not None:
            progress(done, total, name)
        there = merged.find(name)
        figures = {} if (layer := layer_of(name)) is None else {"layer": layer}
        if there is None:
            yield Entry(name, "told", "the merged model has no such tensor", figures)
            continue
        done += tensor.nbytes + merged[there].nbytes
        entry, guess = _tensor(tensor, merged[there], guess)
        yield replace(entry, figures=figures | dict(entry.figures))
    known = {merged.find(name) for name in base}
    for name in merged:
        if name not in known:
            yield Entry(name, "told", "the base has no such tensor")


def _tensor(base: StoredTensor, merged: StoredTensor, guess: int) -> tuple[Entry, int]:
    """What a tensor differs by; and a guess for the next one, whose adapter may be the same."""
    name = base.name
    if base.shape != merged.shape:
        text = f"its shape is {merged.shape}, the base's {base.shape}"
        return Entry(name, "told", text), guess
    if all(np.array_equal(base.rows(*at), merged.rows(*at)) for at in base.blocks()):
        return Entry(name, "unchanged", "has the base's numbers"), guess
    if len(base.shape) < 2:
        return Entry(name, "told", "differs from the base's; a vector has no rank"), guess
    D, h, share = _part(base, merged)
    if not np.isfinite(D).all():
        return Entry(name, "corrupt", "it holds NaN or infinity, or the base does"), guess
    found = rank(D, h, guess)
    return _entry(name, found, share), max(found.r, 1)


def _part(base: StoredTensor, merged: StoredTensor) -> tuple[Array, Array, float]:
    """For a part of the matrix D, half a unit of the stored numbers there, and ‖D‖ / ‖W‖."""
    pieces = [_piece(base, merged, *at) for at in _spread(base)]
    w, m, gap = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    D = m - w
    # The change itself may have been rounded to half precision before it was added.
    u = 0.0 if merged.scheme else format_of(merged.dtype).u
    norm = float(np.linalg.norm(w))
    return D, gap / 2 + u * abs(D), float(np.linalg.norm(D)) / norm if norm else np.inf


def _spread(tensor: StoredTensor) -> list[tuple[int, int]]:
    """The rows that are looked at; of stacked experts the first of them."""
    if "expert" in tensor.name and len(tensor.shape) == 3:
        return [(0, 1)]
    rows = tensor.shape[0]
    step = -(-min(ROWS, rows) // PIECES)
    starts = {int(i) for i in np.linspace(0, max(rows - step, 0), PIECES)}
    return [(i, min(i + step, rows)) for i in sorted(starts)]


def _piece(base: StoredTensor, merged: StoredTensor, i: int, j: int) -> tuple[Array, Array, Array]:
    """Of rows i … j the base's and the merged numbers, and how far apart stored numbers lie."""

    def thinned(rows: Array) -> Array:
        M = matrix(rows[0] if (i, j) == (0, 1) and rows.ndim == 3 else rows)
        return M[:: -(-len(M) // ROWS), :: -(-M.shape[1] // COLUMNS)].astype(np.float64)

    w, m = thinned(base.rows(i, j)), thinned(merged.rows(i, j))
    gap = merged.spacing(i, j)
    if gap is None:
        return w, m, np.maximum(spacing(w, merged.dtype), spacing(m, merged.dtype))
    return w, m, thinned(np.broadcast_to(gap, merged.rows(i, j).shape))


def _entry(name: str, found: Rank, share: float) -> Entry:
    """A tensor's entry by what is known of the rank."""
    figures = {"share": share, "explained": found.explained, "least": found.least}
    size = f"the change has {share:.3g} of the weight's norm"
    if found.is_low:
        text = (
            f"rank {found.r}: the base and a matrix of this rank, rounded, give "
            f"{found.explained:.0%} of the changed numbers; {size}"
        )
        return Entry(name, "low-rank", text, figures | {"rank": found.r})
    if found.least > found.r:
        text = f"{found.least} directions stand out of rounding: no low rank explains it; {size}"
        return Entry(name, "full-rank", text, figures)
    text = f"the change is too small beside rounding to tell its rank; {size}"
    return Entry(name, "undecided", text, figures)


def _answer(
    entries: Sequence[Entry], fits: Sequence[str], scaled: Sequence[str], tried: int
) -> str:
    """What was found, in one sentence; ``scaled``: adapters that fit by another factor."""
    tensors = [entry for entry in entries if entry.verdict not in ("fine", "told")]
    if tensors and all(entry.verdict == "unchanged" for entry in tensors):
        return "every tensor has the base's numbers: nothing was merged"
    ranks = Counter(int(e.figures["rank"] or 0) for e in entries if e.verdict == "low-rank")
    others = sum(entry.verdict == "full-rank" for entry in entries)
    said = []
    if fits:
        said.append(f"it is the base with {' or '.join(fits)}")
    elif scaled:
        said.append(f"it is the base with {' or '.join(scaled)} by another factor")
    elif tried:
        said.append(f"it is none of the {tried} adapters")
    if ranks:
        each = [
            f"{r} ({count})" if len(ranks) > 1 else f"{r}" for r, count in sorted(ranks.items())
        ]
        changed = f"{ranks.total()} tensors differ from the base's by a change of rank"
        said.append(f"{changed} {', '.join(each)}")
    if others:
        said.append(f"{others} differ by more than a low rank")
    return "; ".join(said)
