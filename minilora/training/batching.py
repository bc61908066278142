"""Examples to batches: their order in an epoch, padding, and how a batch reads."""

from collections.abc import Sequence

import numpy as np

from minilora.io.formats.tokenizers import Tokenizer
from minilora.spec.models import Batch
from minilora.spec.ops import IGNORED, Array
from minilora.training.example import Example

WINDOW = 64
"""The number of batches whose examples :func:`order` sorts by length at once."""


def shuffle_keys(seed: Sequence[int], n: int) -> Array:
    """Integers whose order is a shuffle: raw bits, which no version of NumPy changes."""
    return np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n)


def _width(lengths: Array, tokens: int) -> int:
    """The number of examples in a window: those of `WINDOW` batches of the mean length."""
    return WINDOW * max(1, tokens * len(lengths) // int(lengths.sum()))


def one_window(examples: Sequence[Example], tokens: int) -> bool:
    """Whether :func:`order` sorts all examples at once: every epoch has batches of equal shapes."""
    lengths = np.array([len(e.ids) for e in examples], int)
    return len(lengths) <= _width(lengths, tokens)


def order(examples: Sequence[Example], tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch, as indices of examples: each example once, in a shuffled order.

    No batch has more than ``tokens`` tokens, padding included. The examples are shuffled, sorted by
    length within windows and cut into batches, which are shuffled. Both shuffles depend only on
    ``seed`` and ``epoch``, and are the same on every machine.

    Errors: ValueError for an example with more tokens.
    """
    lengths = np.array([len(e.ids) for e in examples], int)
    if len(lengths) and lengths.max() > tokens:
        raise ValueError(
            f"example {lengths.argmax()}: found {lengths.max()} tokens, expected at most {tokens}: "
            "raise batch_tokens or lower max_length"
        )
    if not len(lengths):
        return []
    shuffled = np.argsort(shuffle_keys([seed, 2, epoch], len(lengths)), kind="stable")
    width = _width(lengths, tokens)
    batches: list[list[int]] = []
    for start in range(0, len(shuffled), width):
        window = shuffled[start : start + width]
        rows: list[int] = []
        for i in window[np.argsort(lengths[window], kind="stable")].tolist():
            if (len(rows) + 1) * lengths[i] > tokens:  # it would be the longest
                batches.append(rows)
                rows = []
            rows.append(i)
        batches.append(rows)
    keys = shuffle_keys([seed, 3, epoch], len(batches))
    return [batches[i] for i in np.argsort(keys, kind="stable")]


def batch(examples: Sequence[Example], pad: int) -> Batch:
    """The examples side by side, padded on the right with the token ``pad``.

    Shapes: -> ids (b, t), labels (b, t), -100 where nothing is predicted, or (b,) of classes, mask
    (b, t), types (b, t) or None.
    Errors: ValueError for no example, or if some have a class and others have none.
    """
    if not examples or len({e.label is None for e in examples}) > 1:
        raise ValueError("expected one example or more, all with a class or all without")
    lengths = np.array([len(e.ids) for e in examples])
    mask = np.arange(lengths.max()) < lengths[:, None]

    def padded(rows: Sequence[Array], value: int) -> Array:
        array = np.full(mask.shape, value, np.int64)
        array[mask] = np.concatenate(rows)
        return array

    ids, types = padded([e.ids for e in examples], pad), None
    if any(e.types is not None for e in examples):
        types = padded([e.ids * 0 if e.types is None else e.types for e in examples], 0)
    if examples[0].label is not None:
        labels = np.array([e.label for e in examples], np.int64)
    else:
        labels = padded([np.where(e.loss_mask, e.ids, IGNORED) for e in examples], IGNORED)
    return Batch(ids, labels, mask, types=types)


def batches_of(examples: Sequence[Example], tokens: int, pad: int) -> list[Batch]:
    """All examples in batches of at most ``tokens`` tokens."""
    if not examples:
        return []
    return [batch([examples[i] for i in rows], pad) for rows in order(examples, tokens, 0, 0)]


def shown(batch: Batch, tokenizer: Tokenizer | None) -> str:
    """A batch token by token: its position, its id, its text, and whether it is predicted.

    Control characters are escaped.
    """
    lines = []
    classes = batch.labels if batch.labels is not None and batch.labels.ndim == 1 else None
    for row, (ids, real) in enumerate(zip(batch.ids, batch.real, strict=True)):
        predicted = np.zeros(len(ids), bool)
        if batch.labels is not None and classes is None:
            predicted = batch.labels[row] != IGNORED
        task = f"{predicted.sum()} to predict" if classes is None else f"class {classes[row]}"
        lines.append(
            f"sequence {row + 1} of {len(batch.ids)}: {real.sum()} tokens, {task}, "
            f"{(~real).sum()} of padding"
        )
        for i, token in enumerate(ids):
            role = "padding" if not real[i] else "predict" if predicted[i] else "given"
            piece = "" if tokenizer is None else f"  {_visible(tokenizer.token_text(int(token)))}"
            kind = "" if batch.types is None else f"  type {batch.types[row, i]}"
            lines.append(f"{i:6}  {role:7}{kind}  {token:7}{piece}")
    return "\n".join(lines) + "\n"


def _visible(text: str) -> str:
    """The text in quotes, so that blanks are seen, with unprintable characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"“{text}”")
