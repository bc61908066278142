"""Which prompts to ask: those on which the base and the base with the adapter differ most."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np

from minilora.audit.served.forms import Form, Prompt, Texts
from minilora.audit.served.reference import BASE, Oracle, Setting
from minilora.io.errors import FormatError
from minilora.io.formats.tokenizers import Tokenizer

LONGEST = 48
"""A text is cut to so many tokens."""

DRAWN = 16
"""So many texts are drawn from the models, where none are given."""

ROUNDS = 10
"""So often are they drawn again, while they have fewer than half of those tokens."""

CHOICES = 100
"""So many beginnings are kept for each pair of models."""

MOST_TEXTS = 200
"""So many texts of a file are looked at."""


def read_texts(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank, at most `MOST_TEXTS`.

    Errors: FormatError if there are none, or it is no text in UTF-8.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(2**22)
        lines = data.decode(errors="ignore" if len(data) == 2**22 else "strict").splitlines()
    except (OSError, ValueError) as error:
        raise FormatError(path, "file", error, "text in UTF-8", "name another file") from None
    texts = [line for line in lines if line.strip()][:MOST_TEXTS]
    if not texts:
        raise FormatError(path, "file", "no text", "a text a line", "name another file")
    return texts


def candidates(
    oracle: Oracle, texts: Sequence[str] | None, seed: int
) -> tuple[list[tuple[int, ...]], list[str]]:
    """Sequences of tokens, and their texts: of the texts given, or that the models write.

    Errors: FormatError if the tokenizer has no tokens for any of the texts.
    """
    tokenizer = oracle.base.tokenizer
    if texts is None:
        start = list(tokenizer.prefix_ids)
        sequences: list[tuple[int, ...]] = []
        for again in range(ROUNDS):  # texts of some models are short
            drawn = oracle.drawn(DRAWN, LONGEST, start, seed + 2 * again)
            again_read = [_read_again(tokenizer, ids) for ids in drawn]
            sequences += [tuple(ids[:LONGEST]) for ids in again_read if len(ids) > 2]
            if sum(map(len, sequences)) > DRAWN * LONGEST / 2:
                break
        return sequences, [tokenizer.decode(list(ids)) for ids in sequences]
    sequences, error = [], ValueError("fewer than two tokens")
    for text in texts:
        try:
            ids = tokenizer.encode(text)[:LONGEST]
        except ValueError as why:
            error = why
            continue
        sequences += [tuple(ids)] * (len(ids) > 1)
    if not sequences:
        remedy = "give texts in the model's language"
        raise FormatError("--text", "texts", error, "texts of two tokens or more", remedy)
    return sequences, list(texts)


def _read_again(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The tokens that the tokenizer makes of their text: what a model draws may be none of it."""
    text = tokenizer.decode(ids).replace("\ufffd", "")
    try:
        return tokenizer.encode(text)
    except ValueError:
        return ids


class Prompts:
    """The prompts for each form, those on which the two models differ most first."""

    def __init__(
        self, oracle: Oracle, texts: Texts, sequences: Sequence[tuple[int, ...]], raw: Sequence[str]
    ) -> None:
        self.oracle, self.texts, self.raw = oracle, texts, raw
        self.sequences = list(dict.fromkeys(sequences))
        self.base = oracle.score(self.sequences, BASE)
        adapted = Setting(1.0) if oracle.has_adapter else BASE
        self.adapted = oracle.score(self.sequences, adapted)
        pairs = zip(self.base, self.adapted, strict=True)
        self.difference = [abs(b.logprobs - a.logprobs) for b, a in pairs]

    @property
    def greatest(self) -> float:
        """The greatest difference of a token's log-probability, in nats."""
        return float(max(np.nanmax(difference) for difference in self.difference))

    def of(self, form: Form) -> list[Prompt]:
        """The prompts in this form."""
        if form.prompt == "message":
            found = self._chats()
        elif form.scores == "choice":
            found = self._choices()
        else:
            found = [self.texts.prompt(ids) for ids in self._ranked(form.scores == "answer")]
        return [prompt for prompt in dict.fromkeys(found) if form.fits(prompt)]

    def _ranked(self, halves: bool) -> list[tuple[int, ...]]:
        """The sequences by their mean difference, or their first halves by that of the others."""
        starts = [len(s) // 2 if halves else 1 for s in self.sequences]
        parts = zip(self.difference, starts, strict=True)
        means = [float(difference[start:].mean()) for difference, start in parts]
        order = np.argsort(-np.array(means), kind="stable")
        return [self.sequences[i][: starts[i] if halves else None] for i in order if starts[i]]

    def _choices(self) -> list[Prompt]:
        """Beginnings after which the models' most probable tokens differ, the clearest first.

        Of the adapter against the base, half the adapter and twice the adapter in turn.
        """
        rivals = [self.base]
        if self.oracle.has_adapter:
            rivals += [self.oracle.score(self.sequences, Setting(f)) for f in (0.5, 2.0)]
        chosen: list[list[tuple[float, tuple[int, ...]]]] = []
        for rival in rivals:
            found = []
            for ids, own, other in zip(self.sequences, self.adapted, rival, strict=True):
                clear = np.minimum(own.margin, other.margin)
                differ = own.best != other.best
                asked = np.flatnonzero(differ) if self.oracle.has_adapter else np.arange(len(ids))
                found += [(-float(clear[t]), ids[:t]) for t in asked if t]
            chosen.append(sorted(set(found))[:CHOICES])
        mixed = chain.from_iterable(zip_longest(*chosen))
        return [self.texts.prompt(one[1]) for one in mixed if one is not None]

    def _chats(self) -> list[Prompt]:
        try:
            return [self.texts.chat(text) for text in self.raw if text.strip()]
        except (ValueError, ImportError):  # no chat template
            return []
