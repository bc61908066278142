"""Text for training: files to examples, examples to batches.

An example is a sequence of tokens and which of them are to be predicted. What is asked is not
counted unless wanted, only what is answered. A line that cannot be used is refused by its number.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilora.io import synthetic_data
from minilora.io.files import FormatError, listed, parse_json
from minilora.io.formats.tokenizers import Tokenizer
from minilora.spec.models import Batch
from minilora.spec.ops import IGNORED, Array

SPLITS = ("train", "valid", "test")
"""What a folder's files are called."""

DRAWN = {"train": 4096, "valid": 512, "test": 512}
"""How many examples of a built-in task are drawn."""

BUILT_IN = "task:"
"""What stands before a built-in task's name."""

WINDOW = 64
"""Of how many batches' examples at once :func:`order` sorts the lengths."""

INSTRUCTION = "### Instruction:\n{}\n\n"
INPUT = "### Input:\n{}\n\n"
RESPONSE = "### Response:\n"
"""How an instruction is written where no chat template writes it."""

SUMMARIZE = "Summarize this text.\n\n{}"
SUMMARY = "{}\n\nSummary:"
"""How a summary is asked for, of a model with a chat template and of one without."""


@dataclass(frozen=True, eq=False)
class Example:
    """A sequence of t tokens, and which are to be predicted; or its class, ``label``.

    ``counted`` is true where a token is to be predicted from those before it, so never at the
    first. ``types`` are BERT's. Shapes: ids (t,), counted (t,), types (t,).
    """

    ids: Array
    counted: Array
    label: int | None = None
    types: Array | None = None

    @property
    def parts(self) -> tuple[Array, Array]:
        """What is asked, and the last answer to it: the last run of tokens that are counted."""
        at = np.flatnonzero(self.counted)
        if not len(at):
            return self.ids, self.ids[:0]
        end = at[-1] + 1
        start = end - np.argmin(self.counted[:end][::-1])
        return self.ids[:start], self.ids[start:end]


class Skipped(NamedTuple):
    """A line that was left out."""

    path: str
    line: int
    why: str


@dataclass(frozen=True, eq=False)
class Data:
    """Examples to train on, to validate and to test with, and where they came from.

    ``skipped`` are the lines left out, ``cut`` is how many of those to train on were longer than
    the length and lost their end, ``digest`` identifies what was read, ``classes`` names the labels
    in order.
    """

    train: list[Example]
    valid: list[Example]
    test: list[Example]
    skipped: tuple[Skipped, ...] = ()
    digest: str = ""
    classes: tuple[str, ...] = ()
    cut: int = 0


class _Wrong(ValueError):
    """A line that cannot be used: what was found, what was expected, what to do."""

    def __init__(self, found: object, expected: object, remedy: str = "correct the line") -> None:
        super().__init__(found, expected, remedy)


class _Row(NamedTuple):
    """What a line makes, and whether that lost its end."""

    path: Path
    line: int
    examples: list[Example]
    cut: bool = False
    label: str | int | None = None


def read(
    path: Path | str,
    task: str,
    tokenizer: Tokenizer | None,
    max_length: int,
    *,
    skip_invalid: bool = False,
    train_on_prompt: bool = False,
    val_fraction: float = 0.0,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    by_place: bool = False,
) -> Data:
    """The examples of a file, a folder or a built-in task, none longer than ``max_length`` tokens.

    ``task`` is one of `TASKS`, and says what lines may look like, as `SHAPES` lists them. A file
    is one of JSON lines (``.jsonl``), or for ``lm`` plain text (``.txt``); a folder has a file for
    each of `SPLITS`, of which only that to train on must be there; ``task:NAME`` draws from
    `synthetic_data`. Where there is no file to validate with, the share ``val_fraction`` of the
    lines is taken, drawn from ``seed``. ``train_on_prompt`` computes the loss on prompt tokens,
    too. ``skip_invalid`` leaves out
    lines that cannot be used instead of refusing them. ``classes`` are those of a model that is
    already trained; they are learned from the lines to train on, and sorted, unless given. With
    ``by_place`` a number that is no class's name means the one at its place among them, as
    ``id2label`` of a pretrained model counts them.

    What is too long: a text is cut into pieces that together predict each token once; a document is
    cut so that its summary is whole; all else loses its end, and a line none of whose tokens would
    be left to predict cannot be used. Only tokens are needed where lines hold tokens.

    Errors: FormatError with file and line number; ValueError for a setting that cannot be.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r}: expected one of {', '.join(TASKS)}")
    if max_length < 2:
        raise ValueError(
            f"max_length {max_length}: expected at least 2 tokens, one to predict the other"
        )
    if not 0 <= val_fraction < 1:
        raise ValueError(
            f"val_fraction {val_fraction}: expected a share of the lines, at least 0 and below 1"
        )
    if task == "chat" and tokenizer is not None:
        _ = tokenizer.render  # without a template it says so before any line is read
    if str(path).startswith(BUILT_IN):
        return _drawn(str(path)[len(BUILT_IN) :], task, tokenizer, max_length, seed)
    reader = _Reader(task, tokenizer, max_length, skip_invalid, not train_on_prompt)
    files = _files(Path(path), task)
    rows = {split: reader.read(file) for split, file in files.items()}
    if task == "classify":
        learned = tuple(classes) if classes is not None else reader.learn(rows["train"])
        named = classes is None or not by_place or any(name.isdecimal() for name in learned)
        rows = {split: reader.label(some, learned, not named) for split, some in rows.items()}
    else:
        learned = ()
    for split, some in rows.items():
        if not some:
            out = [each.why for each in reader.skipped if each.path == str(files[split])]
            more = f", {len(out)} lines left out, the first: {out[0]}" if out else ""
            nothing = f"no example{more}"
            raise FormatError(files[split], "file", nothing, "one at least", "is it the right one?")
    if "valid" not in rows and val_fraction:
        rows |= _divided(rows["train"], val_fraction, seed)
    found = {split: [e for row in rows.get(split, []) for e in row.examples] for split in SPLITS}
    cut = sum(row.cut for row in rows["train"])
    digest = _digest(reader.digests)
    return Data(
        found["train"], found["valid"], found["test"], tuple(reader.skipped), digest, learned, cut
    )


def _files(path: Path, task: str) -> dict[str, Path]:
    """The files by their split."""
    if not path.exists():
        raise FormatError(path, "file", "nothing there", "a file or a folder", "correct the path")
    endings = (".jsonl", ".txt") if task == "lm" else (".jsonl",)
    kinds = " or ".join(endings)
    if path.is_dir():
        there = sorted(file for file in path.iterdir() if file.suffix in endings)
        files = {file.stem: file for file in there}
        if "train" not in files or len(files) < len(there) or files.keys() - set(SPLITS):
            expected = f"one file for train, and if wanted for valid and test, each {kinds}"
            found = listed(file.name for file in there) or f"no {kinds}"
            raise FormatError(path, "folder", found, expected, "rename or remove files")
        return {split: files[split] for split in SPLITS if split in files}
    if path.suffix not in endings:
        remedy = "write one JSON object a line, or name a folder"
        raise FormatError(path, "file", f"the ending {path.suffix!r}", kinds, remedy)
    return {"train": path}


def _digest(digests: Mapping[str, str]) -> str:
    """A file's SHA-256; a folder's is that of the lines that ``sha256sum`` prints for its files."""
    if len(digests) == 1:
        return next(iter(digests.values()))
    text = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    return hashlib.sha256(text.encode()).hexdigest()


def _keys(seed: Sequence[int], n: int) -> Array:
    """Whole numbers whose order is a shuffle: raw bits, which no version of NumPy changes."""
    return np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n)


def _divided(rows: list[_Row], share: float, seed: int) -> dict[str, list[_Row]]:
    """The share of the lines, at least one, to validate with; each stays in its order."""
    n = max(1, round(share * len(rows)))
    if n >= len(rows):
        raise ValueError(
            f"{len(rows)} lines: a share of {share} to validate with leaves none to train on"
        )
    chosen = set(np.argsort(_keys([seed, 1], len(rows)), kind="stable")[:n].tolist())
    return {
        "train": [row for i, row in enumerate(rows) if i not in chosen],
        "valid": [row for i, row in enumerate(rows) if i in chosen],
    }


def _drawn(name: str, task: str, tokenizer: Tokenizer | None, max_length: int, seed: int) -> Data:
    """Examples of a built-in task, drawn by their probabilities."""
    chosen = synthetic_data.task(name)
    fits = "lm" if chosen.causal else "classify"
    if task != fits:
        raise ValueError(f"{BUILT_IN}{name} with the task {task}: expected {fits}")
    symbols = chosen.symbols
    if tokenizer is not None and (
        tokenizer.vocab != len(symbols)
        or [*map(tokenizer.piece, range(len(symbols)))] != [*symbols]
    ):
        raise ValueError(
            f"{BUILT_IN}{name}: found a model with {tokenizer.vocab} tokens, expected one whose "
            f"tokens are {' '.join(symbols)}: take a reference model that has them"
        )
    longest = max(len(e.ids) for e in chosen.examples)
    if max_length < longest:
        raise ValueError(
            f"max_length {max_length}: {BUILT_IN}{name} has sequences of up to {longest}"
        )

    def example(row: int) -> Example:
        e = chosen.examples[row]
        ids = np.array(e.ids)
        counted = np.arange(len(ids)) > 0 if chosen.causal else np.zeros(len(ids), bool)
        return Example(ids, counted, e.label, None if e.types is None else np.array(e.types))

    train, valid, test = (
        [example(row) for row in chosen.draw_rows(np.random.default_rng([seed, i]), n)]
        for i, n in enumerate(DRAWN.values())
    )
    labels = sorted({e.label for e in chosen.examples if e.label is not None})
    digest = hashlib.sha256(f"{BUILT_IN}{name} {seed}\n".encode()).hexdigest()
    return Data(train, valid, test, digest=digest, classes=tuple(map(str, labels)))


def _string(row: Mapping[str, Any], key: str, empty: bool = False) -> str:
    value = row.get(key, "") if empty else row[key]
    if not isinstance(value, str):
        raise _Wrong(f"{key}: {value!r}", f"a text as {key}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Wrong(f"{key} with half of a surrogate pair", "whole characters") from None
    if not empty and not value.strip():
        raise _Wrong(f"an empty {key}", f"a {key} that is not blank")
    return value


def _whole(row: Mapping[str, Any], key: str) -> list[int]:
    value = row[key]
    if not (
        isinstance(value, list)
        and value
        and all(type(i) is int and -(2**31) <= i < 2**31 for i in value)
    ):
        raise _Wrong(f"{key}: {value!r}", f"a list of whole numbers as {key}, not empty")
    return value


_Sequence = tuple[list[int], list[bool]]
"""Tokens, and which are counted."""

_Made = tuple[list[Example], bool]
"""The examples that a line makes, and whether they lost an end."""


class _Reader:
    """Lines to examples, for one task, tokenizer and length."""

    def __init__(
        self,
        task: str,
        tokenizer: Tokenizer | None,
        max_length: int,
        skip_invalid: bool,
        masked: bool,
    ) -> None:
        self.task, self.max_length, self.skip_invalid, self.masked = (
            task,
            max_length,
            skip_invalid,
            masked,
        )
        self.given = tokenizer
        self.skipped: list[Skipped] = []
        self.digests: dict[str, str] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        if self.given is None:
            raise ValueError("a tokenizer is needed: only lines of ids do without one")
        return self.given

    def read(self, path: Path) -> list[_Row]:
        """The lines of a file that can be used."""
        try:
            return self._text(path) if path.suffix == ".txt" else [*self._lines(path)]
        except OSError as error:
            raise FormatError(path, "file", error, "a readable file", "see to it") from error

    def _refuse(self, path: Path, line: int, wrong: _Wrong) -> None:
        """An error, or with ``skip_invalid`` an entry in the list of what was left out."""
        found, expected, remedy = wrong.args
        if not self.skip_invalid:
            advice = f"{remedy}, or leave such lines out with --skip-invalid"
            raise FormatError(path, f"line {line}", found, expected, advice) from None
        self.skipped.append(Skipped(str(path), line, f"found {found}, expected {expected}"))

    def _lines(self, path: Path) -> Iterator[_Row]:
        hashed = hashlib.sha256()
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                hashed.update(raw)
                try:
                    yield self._row(path, number, _no_mark(raw) if number == 1 else raw)
                except _Wrong as wrong:
                    self._refuse(path, number, wrong)
        self.digests[path.name] = hashed.hexdigest()

    def _row(self, path: Path, line: int, raw: bytes) -> _Row:
        try:
            value = parse_json(raw)
        except ValueError as error:
            found = error if raw.strip() else "an empty line"
            raise _Wrong(found, "a JSON object on one line, in UTF-8") from None
        if not isinstance(value, dict):
            raise _Wrong(f"a JSON {type(value).__name__}", "a JSON object, in { }")
        shapes = SHAPES[self.task]
        fitting = [keys for keys in shapes if value.keys() >= set(keys)]
        if len(fitting) != 1:
            found = f"the keys {listed(value, 10)}" if value else "no keys"
            known = "; or ".join(" and ".join(keys) for keys in shapes)
            few = "the keys of just one of" if fitting else "the keys"
            remedy = "rename or remove keys, or choose another task"
            raise _Wrong(found, f"for the task {self.task} {few}: {known}", remedy)
        label = _label(value) if self.task == "classify" else None
        examples, cut = shapes[fitting[0]](self, value)
        return _Row(path, line, examples, cut, label)

    def _text(self, path: Path) -> list[_Row]:
        """Plain text in pieces, each as if it were a line."""
        data = path.read_bytes()
        self.digests[path.name] = hashlib.sha256(data).hexdigest()
        try:
            text = _no_mark(data).decode()
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            remedy = "write the file in UTF-8"
            raise FormatError(path, f"line {line}", error, "UTF-8", remedy) from None
        if not text.strip():
            raise FormatError(path, "file", "no text", "text", "is it the right file?")
        try:
            examples, _ = self.pieces(self.encode(text))
        except _Wrong as wrong:
            raise FormatError(path, "file", *wrong.args) from None
        return [_Row(path, i, [e]) for i, e in enumerate(examples, 1)]

    def learn(self, rows: list[_Row]) -> tuple[str, ...]:
        """The classes, sorted, numbers by size; lines with another kind of label are removed."""
        kind = type(rows[0].label) if rows else None
        for row in rows:
            if type(row.label) is not kind:
                expected = f"a label of the same kind as the first one, {rows[0].label!r}"
                self._refuse(row.path, row.line, _Wrong(f"label {row.label!r}", expected))
        rows[:] = [row for row in rows if type(row.label) is kind]
        labels: set[Any] = {row.label for row in rows}
        if len(labels) == 1:
            found, expected = f"one class, {labels.pop()!r}", "two at least"
            raise FormatError(rows[0].path, "labels", found, expected, "is it the right file?")
        return tuple(map(str, sorted(labels)))

    def label(self, rows: list[_Row], classes: tuple[str, ...], places: bool) -> list[_Row]:
        """The lines with their classes' numbers, found by name, or else by their ``places``.

        A number is a name too: of classes that were learned from labels, where none is called so,
        nothing says which one it means.
        """
        numbers = {name: i for i, name in enumerate(classes)}
        labelled = []
        for row in rows:
            number = numbers.get(str(row.label))
            if number is None and places and type(row.label) is int:
                number = row.label if 0 <= row.label < len(classes) else None
            if number is None:
                expected = f"one of the classes trained on, {listed(classes, 20)}"
                self._refuse(row.path, row.line, _Wrong(f"label {row.label!r}", expected))
                continue
            examples = [replace(e, label=number) for e in row.examples]
            labelled.append(row._replace(examples=examples))
        return labelled

    def encode(self, text: str) -> list[int]:
        """The text's tokens, none special but those that it spells."""
        try:
            return self.tokenizer.encode(text, special=False)
        except ValueError as error:
            raise _Wrong(error, "what the tokenizer has tokens for") from None

    def follow(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts that follow one another, none special but those that they spell.

        As those of one text if these begin with the tokens of what stands before. Where a token
        would lie across the border, or the one text has none, the texts are taken apart: that is
        what a model meets that is asked the one and answers the other.
        """
        parts: list[list[int]] = []
        before, ids = "", list[int]()
        for text in texts:
            before += text
            try:
                both = self.encode(before)
                joined = both[: len(ids)] == ids
            except _Wrong:  # as where two words without a blank between them are none
                joined = False
            parts.append(both[len(ids) :] if joined else self.encode(text))
            ids += parts[-1]
        return parts

    def _beginning(self, ids: Sequence[int]) -> list[int]:
        """What begins a text: the tokenizer's head, unless the text spells it itself."""
        head = [*self.tokenizer.head]
        return [] if [*ids[: len(head)]] == head else head

    def _ending(self, ids: Sequence[int]) -> list[int]:
        """What ends a text, unless it spells it itself: the tokenizer's tail, or else its end."""
        t = self.tokenizer
        end = [*t.tail] or ([] if t.eos is None else [t.eos])
        return [] if end and [*ids[-len(end) :]] == end else end

    def pieces(self, ids: list[int]) -> _Made:
        """A text in pieces of the length, which together predict each of its tokens once.

        Each begins with the head, and then but for the first with the token before it.
        """
        head = [*self.tokenizer.head]
        room = self.max_length - len(head)
        if room < 2:
            raise ValueError(
                f"max_length {self.max_length}: expected {len(head) + 2} at least, for the "
                f"{len(head)} tokens that begin a text and two of its own"
            )
        ids = (ids if self._beginning(ids) else ids[len(head) :]) + self._ending(ids)
        examples = []
        for start in range(0, max(1, len(ids) - 1), room - 1):
            taken = head + ids[start : start + room]
            given = len(head) + (start > 0)
            examples.append(self.example(taken, [i >= given for i in range(len(taken))])[0][0])
        return examples, False

    def example(self, ids: list[int], counted: list[bool]) -> _Made:
        """One example, cut to the length."""
        kept = np.array(counted[: self.max_length], bool)
        kept[:1] = False
        if not kept.any():
            n = len(ids) - sum(counted)
            if len(ids) > self.max_length:
                found = f"{n} tokens before the first that is to be predicted"
                expected = f"fewer than the length, {self.max_length}"
                raise _Wrong(found, expected, "shorten it or raise the length")
            raise _Wrong(f"{len(ids)} tokens, none to predict from one before", "one at least")
        cut = len(ids) > self.max_length
        return [Example(np.array(ids[: self.max_length], np.int64), kept)], cut

    def whole(self, ids: list[int], types: list[int] | None) -> list[Example]:
        """An example of a class, of which no token is predicted."""
        kinds = None if types is None else np.array(types[: len(ids)], np.int64)
        return [Example(np.array(ids, np.int64), np.zeros(len(ids), bool), None, kinds)]

    def answer(self, prompt: str, completion: str) -> _Sequence:
        """What is asked, and the answer with its end."""
        asked, answered = self.follow([prompt, completion])
        asked = [*self._beginning(asked), *asked]
        answered = answered + self._ending(answered)
        return asked + answered, [not self.masked] * len(asked) + [True] * len(answered)

    def chat(self, messages: list[dict[str, Any]]) -> _Sequence:
        """A chat by the template, of which the assistant's turns count, up to their end.

        What the template writes before an answer is what it writes to ask for one.
        """
        texts, turns = [""], [False]
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                for upto, generate in ((i, True), (i + 1, False)):
                    texts.append(self._rendered(messages[:upto], generate, texts[-1]))
                    turns.append(not generate)
        texts.append(self._rendered(messages, False, texts[-1]))
        turns.append(False)
        steps = [b[len(a) :] for a, b in pairwise(texts)]
        ids: list[int] = []
        counted: list[bool] = []
        for part, turn in zip(self.follow(steps), turns[1:], strict=True):
            ends = [i for i, token in enumerate(part, 1) if token in self.tokenizer.stops]
            last = ends[-1] if ends else len(part)  # a line feed after it is the template's own
            ids += part
            counted += [not self.masked or (turn and i < last) for i in range(len(part))]
        return ids, counted

    def _rendered(self, messages: list[dict[str, Any]], generate: bool, before: str) -> str:
        try:
            text = self.tokenizer.chat(messages, generate)
        except ValueError as error:
            raise _Wrong(error, "messages that the model's template takes") from None
        if not text.startswith(before):
            same = next(
                i for i, (a, b) in enumerate(zip(before, text + "\0", strict=False)) if a != b
            )
            raise _Wrong(
                f"a chat template that writes {before[same:][:40]!r} anew as {text[same:][:40]!r} "
                f"after {len(messages)} messages",
                "one that only adds to what it wrote before the next message",
                "end the chat at this answer, or give prompt and completion",
            )
        return text

    def longest(self, text: str, make: Callable[[str], _Sequence]) -> _Made:
        """The example of the text, or of as much of its beginning as leaves the answer whole."""
        whole = make(text)
        if len(whole[0]) <= self.max_length:
            return self.example(*whole)
        high, many = len(text), len(whole[0])
        low, few = 0, len(make("")[0])
        step = 0
        while (
            high - low > 1 and few < self.max_length
        ):  # tokens are about proportional to characters
            step += 1  # and where they are not, every third step halves what is left
            share = 0.5 if step % 3 == 0 else (self.max_length - few) / (many - few)
            n = min(max(low + 1, low + int(share * (high - low))), high - 1)
            count = len(make(text[:n])[0])
            low, few, high, many = (
                (n, count, high, many) if count <= self.max_length else (low, few, n, count)
            )
        if low < 1 or few > self.max_length:
            expected = f"shorter by more than what asks for it than the length, {self.max_length}"
            raise _Wrong("a summary that leaves no room for its text", expected, "raise the length")
        return self.example(*make(text[:low]))[0], True


def _no_mark(data: bytes) -> bytes:
    """Without the mark that some editors write at the start of a file."""
    return data.removeprefix(b"\xef\xbb\xbf")


def _label(row: Mapping[str, Any]) -> str | int:
    label = row["label"]
    if type(label) is int or (isinstance(label, str) and label.strip()):
        return label
    raise _Wrong(f"label: {label!r}", "a whole number or a name as label")


def _of_text(reader: _Reader, row: Mapping[str, Any]) -> _Made:
    return reader.pieces(reader.encode(_string(row, "text")))


def _of_prompt(reader: _Reader, row: Mapping[str, Any]) -> _Made:
    return reader.example(*reader.answer(_string(row, "prompt"), _string(row, "completion")))


def _of_instruction(reader: _Reader, row: Mapping[str, Any]) -> _Made:
    asked, given = _string(row, "instruction"), _string(row, "input", empty=True)
    prompt = INSTRUCTION.format(asked) + (INPUT.format(given) if given.strip() else "") + RESPONSE
    return reader.example(*reader.answer(prompt, _string(row, "output")))


def _of_messages(reader: _Reader, row: Mapping[str, Any]) -> _Made:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise _Wrong(f"messages: {messages!r}", "a list of messages, not empty")
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not message.keys() >= {"role", "content"}:
            raise _Wrong(f"message {i}: {message!r}", "an object with role and content")
        try:
            _string(message, "role")
            _string(message, "content", empty=message["role"] != "assistant")
        except _Wrong as wrong:
            raise _Wrong(f"in message {i} {wrong.args[0]}", *wrong.args[1:]) from None
    if all(message["role"] != "assistant" for message in messages):
        roles = listed({message["role"] for message in messages})
        raise _Wrong(f"messages of {roles}", "one of the assistant, which is to be learned")
    return reader.example(*reader.chat(messages))


def _turns(asked: str, answered: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _chat_of_prompt(reader: _Reader, row: Mapping[str, Any]) -> _Made:
    turns = _turns(_string(row, "prompt"), _string(row, "completion"))
    return reader.example(*reader.chat(turns))


def _chat_of_instruction(reader: _Reader, row: Mapping[str, Any]) -> _Made:
    asked, given = _string(row, "instruction"), _string(row, "input", empty=True)
    asked += f"\n\n{given}" if given.strip() else ""
    return reader.example(*reader.chat(_turns(asked, _string(row, "output"))))


def _summary(reader: _Reader, row: Mapping[str, Any], key: str) -> _Made:
    text, summary = _string(row, key), _string(row, "summary")
    if reader.tokenizer.template is not None:
        return reader.longest(
            text, lambda part: reader.chat(_turns(SUMMARIZE.format(part), summary))
        )
    answered = f" {summary.lstrip()}"
    return reader.longest(text, lambda part: reader.answer(SUMMARY.format(part), answered))


def _of_ids(reader: _Reader, row: Mapping[str, Any]) -> _Made:
    ids = _tokens(reader, row)
    labels = _whole(row, "labels") if "labels" in row else ids
    if len(labels) != len(ids):
        raise _Wrong(f"{len(labels)} labels of {len(ids)} ids", "as many of both")
    for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (token, IGNORED):
            expected = f"the token itself, {token}, or {IGNORED}: the model shifts them"
            raise _Wrong(f"labels[{i}]: {label}", expected)
    return reader.example(ids, [label != IGNORED for label in labels])


def _tokens(reader: _Reader, row: Mapping[str, Any]) -> list[int]:
    ids = _whole(row, "ids")
    least, most = min(ids), max(ids)
    end = None if reader.given is None else reader.given.vocab
    if least < 0 or (end is not None and most >= end):
        expected = "tokens' numbers from 0" + ("" if end is None else f" to {end - 1}")
        raise _Wrong(f"ids from {least} to {most}", expected, "tokenise with this model")
    return ids


def _class_of_ids(reader: _Reader, row: Mapping[str, Any]) -> _Made:
    ids = _tokens(reader, row)
    types = _whole(row, "types") if "types" in row else None
    if types is not None and len(types) != len(ids):
        raise _Wrong(f"{len(types)} types of {len(ids)} ids", "as many of both")
    return reader.whole(ids[: reader.max_length], types), len(ids) > reader.max_length


def _class_of_text(reader: _Reader, row: Mapping[str, Any]) -> _Made:
    t = reader.tokenizer
    parts = [reader.encode(_string(row, key)) for key in ("text", "text_pair") if key in row]
    around = [t.head, t.tail] if len(parts) == 1 else [t.head, t.middle, t.tail]
    room = reader.max_length - sum(map(len, around))
    if room < len(parts):
        raise ValueError(
            f"max_length {reader.max_length}: expected {len(parts) - room} more at least"
        )
    cut = sum(map(len, parts)) > room
    if cut and len(parts) == 2:  # the longer one gives way, and both if neither fits into half
        least = min(*map(len, parts), room // 2)
        first_is_longer = len(parts[0]) > len(parts[1])
        first = room - least if first_is_longer else least
        parts = [parts[0][:first], parts[1][: room - first]]
    ids = [*around[0], *parts[0][:room], *around[1]]
    if len(parts) == 1:
        return reader.whole(ids, None), cut
    second = [*parts[1], *around[2]]
    types = [0] * len(ids) + [t.second] * len(second)
    return reader.whole(ids + second, types), cut


_Shape = Callable[[_Reader, Mapping[str, Any]], _Made]
_IDS: dict[tuple[str, ...], _Shape] = {("ids",): _of_ids}
SHAPES: dict[str, dict[tuple[str, ...], _Shape]] = {
    "lm": {
        ("text",): _of_text,
        ("prompt", "completion"): _of_prompt,
        ("instruction", "output"): _of_instruction,
    }
    | _IDS,
    "chat": {
        ("messages",): _of_messages,
        ("prompt", "completion"): _chat_of_prompt,
        ("instruction", "output"): _chat_of_instruction,
    }
    | _IDS,
    "classify": {("text", "label"): _class_of_text, ("ids", "label"): _class_of_ids},
    "summarize": {
        ("document", "summary"): partial(_summary, key="document"),
        ("text", "summary"): partial(_summary, key="text"),
    }
    | _IDS,
}
"""What a line of a task may look like: its keys, and what makes an example of them.

``instruction`` may have an ``input`` beside it, a ``text`` of a class a second one, ``text_pair``,
``ids`` their ``labels`` or ``types``; other keys are passed over.
"""

TASKS = tuple(SHAPES)
"""To go on with a text, to answer in a chat, to name a text's class, to sum it up."""


def _width(lengths: Array, tokens: int) -> int:
    """How many examples make a window: those of so many batches of the mean length."""
    return WINDOW * max(1, tokens * len(lengths) // int(lengths.sum()))


def one_window(examples: Sequence[Example], tokens: int) -> bool:
    """Whether :func:`order` sorts all examples at once: each epoch has batches of one shape."""
    lengths = np.array([len(e.ids) for e in examples], int)
    return len(lengths) <= _width(lengths, tokens)


def order(examples: Sequence[Example], tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch, as numbers of examples: each example once, in a shuffled order.

    No batch has more than ``tokens`` tokens with its padding. The examples are shuffled, sorted by
    length within windows, cut into batches, and the batches shuffled. Both shuffles depend on
    ``seed`` and ``epoch`` alone, and are the same on every machine.

    Errors: ValueError if an example alone has more tokens.
    """
    lengths = np.array([len(e.ids) for e in examples], int)
    if len(lengths) and lengths.max() > tokens:
        raise ValueError(
            f"example {lengths.argmax()}: {lengths.max()} tokens, expected {tokens} at most, a "
            "batch's: raise the batch's tokens or lower the length"
        )
    if not len(lengths):
        return []
    shuffled = np.argsort(_keys([seed, 2, epoch], len(lengths)), kind="stable")
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
    keys = _keys([seed, 3, epoch], len(batches))
    return [batches[i] for i in np.argsort(keys, kind="stable")]


def batch(examples: Sequence[Example], pad: int) -> Batch:
    """The examples side by side, filled up on the right with ``pad``.

    Shapes: -> ids (b, t), labels (b, t), -100 where nothing counts, or (b,) of classes, mask
    (b, t), types (b, t) or None.
    Errors: ValueError for no example, or if some have a class and others have none.
    """
    if not examples or len({e.label is None for e in examples}) > 1:
        raise ValueError("expected one example or more, all with a class or all without")
    lengths = np.array([len(e.ids) for e in examples])
    mask = np.arange(lengths.max()) < lengths[:, None]

    def filled(rows: Sequence[Array], value: int) -> Array:
        whole = np.full(mask.shape, value, np.int64)
        whole[mask] = np.concatenate(rows)
        return whole

    ids = filled([e.ids for e in examples], pad)
    if any(e.types is not None for e in examples):
        types = filled([e.ids * 0 if e.types is None else e.types for e in examples], 0)
    else:
        types = None
    if examples[0].label is not None:
        labels = np.array([e.label for e in examples], np.int64)
    else:
        labels = filled([np.where(e.counted, e.ids, IGNORED) for e in examples], IGNORED)
    return Batch(ids, labels, mask, types=types)


def batches_of(examples: Sequence[Example], tokens: int, pad: int) -> list[Batch]:
    """All examples in batches of at most ``tokens`` tokens."""
    if not examples:
        return []
    return [batch([examples[i] for i in rows], pad) for rows in order(examples, tokens, 0, 0)]


def shown(batch: Batch, tokenizer: Tokenizer | None) -> str:
    """A batch token by token: its place, its number, how it reads, and whether it is predicted.

    Characters that a terminal would obey are written as escapes.
    """
    lines = []
    labels = batch.labels
    for row, (ids, real) in enumerate(zip(batch.ids, batch.real, strict=True)):
        of_class = labels is not None and labels.ndim == 1
        counted = np.zeros(len(ids), bool)
        if labels is not None and not of_class:
            counted = labels[row] != IGNORED
        head = f"sequence {row + 1} of {len(batch.ids)}: {real.sum()} tokens"
        if labels is not None and of_class:
            lines.append(f"{head}, class {labels[row]}, {(~real).sum()} of padding")
        else:
            lines.append(f"{head}, {counted.sum()} to predict, {(~real).sum()} of padding")
        for i, token in enumerate(ids):
            said = "padding" if not real[i] else "predict" if counted[i] else "given"
            piece = "" if tokenizer is None else f"  {_visible(tokenizer.piece(int(token)))}"
            kind = "" if batch.types is None else f"  type {batch.types[row, i]}"
            lines.append(f"{i:6}  {said:7}{kind}  {token:7}{piece}")
    return "\n".join(lines) + "\n"


def _visible(text: str) -> str:
    """The text between marks, unprintable characters as escapes, so that blanks are seen."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"“{text}”")
