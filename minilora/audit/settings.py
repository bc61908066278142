"""What differs between two models' settings and tokenizers, and what it changes."""

from __future__ import annotations

from collections.abc import Iterator

from minilora.audit.result import Entry
from minilora.audit.tensors import TensorStore


def compare_settings(base: TensorStore, merged: TensorStore) -> Iterator[Entry]:
    """An entry for each difference."""
    yield from ()
