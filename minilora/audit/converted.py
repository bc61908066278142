"""``minilora audit converted``: do two files hold one adapter, or one model?"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from minilora.audit.converted_adapters import adapter_entries
from minilora.audit.converted_models import model_entries
from minilora.audit.result import Entry, Report
from minilora.audit.stored.module import OpenAdapter
from minilora.audit.stored.open import open_adapter
from minilora.audit.tensors import TensorStore, open_tensors
from minilora.io.errors import FormatError
from minilora.io.loading import REFERENCE

CAUSES: Mapping[str, tuple[str, str]] = {
    "rows-not-permuted": (
        "the rows of q and k lie in Hugging Face's order, and llama.cpp takes them in its own",
        "convert it by llama.cpp's script or by minilora convert, which put them in order",
    ),
    "transposed": (
        "changes are transposed: A and B were exchanged",
        "exchange and transpose the factors of these modules",
    ),
    "norm-not-applied": (
        "DoRA's magnitudes are lost: what is left is not the adapter",
        "merge the adapter, or convert it to a format that has magnitudes",
    ),
}
"""What explains deviations with this mistake, and what to do."""


def converted(
    a: str | Path,
    b: str | Path,
    progress: Callable[[int, int, str], object] | None = None,
) -> Report:
    """Whether two files hold one adapter, or one model, module by module.

    ``a`` is what was converted, ``b`` what came of it, in whatever formats: PEFT, mlx-lm, GGUF,
    kohya, loralib; or models as Hugging Face folders, safetensors, GGUF, mlx-lm's folders.
    ``progress`` is told the bytes that were read, of how many, and of what.

    Errors: FormatError for what cannot be read, and for an adapter beside a model.
    """
    start = time.perf_counter()
    one, other = _opened(a), _opened(b)
    if isinstance(one, OpenAdapter) != isinstance(other, OpenAdapter):
        one, other = _as_model(a, one), _as_model(b, other)
    told = progress or (lambda read, total, name: None)
    if isinstance(one, OpenAdapter) and isinstance(other, OpenAdapter):
        entries = list(adapter_entries(one, other, told))
        formats = one.format, other.format
    elif isinstance(one, TensorStore) and isinstance(other, TensorStore):
        entries = list(model_entries(one, other, told))
        formats = one.container, other.container
    else:
        adapter, model = (a, b) if isinstance(one, OpenAdapter) else (b, a)
        remedy = "minilora audit merged compares a model with a base and an adapter"
        raise FormatError(adapter, "adapter", f"an adapter beside {model}", "two of a kind", remedy)
    cause, remedy = cause_of(entries)
    inputs: dict[str, str | list[str]] = {"from": str(a), "to": str(b)}
    inputs["formats"] = " -> ".join(formats)
    took = time.perf_counter() - start
    return Report(
        "converted", inputs, tuple(entries), cause, remedy, took, one.nbytes + other.nbytes
    )


def _opened(name: str | Path) -> OpenAdapter | TensorStore:
    """An adapter, or else a model.

    Errors: FormatError of the adapter's reader, if it is neither.
    """
    try:
        return open_adapter(name)
    except FormatError as error:
        try:
            return open_tensors(name)
        except FormatError:
            if _is_adapter(Path(name)):
                raise error from None
            raise


def _as_model(name: str | Path, opened: OpenAdapter | TensorStore) -> OpenAdapter | TensorStore:
    """The model of this name where there is one too, as of reference:NAME."""
    if not str(name).startswith(REFERENCE):
        return opened
    return open_tensors(name)


def _is_adapter(path: Path) -> bool:
    """Whether a folder is an adapter's by its files."""
    return path.is_dir() and any(path.glob("adapter*"))


def cause_of(entries: Sequence[Entry]) -> tuple[str, str]:
    """What explains most of what deviates, and what to do; "" where nothing does."""
    wrong = [entry for entry in entries if entry.severity == "deviation"]
    if not wrong:
        return "", ""
    (mistake, count), *_ = Counter(entry.mistake for entry in wrong).most_common()
    first = next(entry for entry in wrong if entry.mistake == mistake)
    share = f"{count} of {len(wrong)} deviations" if len(wrong) > 1 else "the only deviation"
    cause, remedy = CAUSES.get(mistake, (f"{first.subject}: {first.text}", ""))
    return f"{cause} ({share})", remedy
