"""Reading data: the examples of a file, a folder or a built-in task.

An invalid line is refused by its file and number.
"""

import datetime
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilora.io import synthetic_data
from minilora.io.errors import FormatError, listed
from minilora.io.formats.tokenizers import Tokenizer
from minilora.training.batching import shuffle_keys
from minilora.training.encoding import Encoder, date_of
from minilora.training.example import SPLITS, Data, Example, InvalidLine, Skipped
from minilora.training.line_shapes import SHAPES, TASKS, label_of
from minilora.training.rows import READERS, without_bom

SYNTHETIC_SIZES = {"train": 4096, "valid": 512, "test": 512}
"""The number of examples that are drawn of a built-in task."""

BUILT_IN = "task:"
"""The prefix of a built-in task's name."""


class _Row(NamedTuple):
    """The examples of a line, and whether an end was cut off."""

    path: Path
    line: int
    examples: list[Example]
    truncated: bool = False
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
    numeric_labels: bool = False,
    date: str | None = None,
) -> Data:
    """The examples of a file, a folder or a built-in task, none longer than ``max_length`` tokens.

    ``task`` is one of `TASKS`; `SHAPES` lists what its lines may look like. A file has JSON lines
    (``.jsonl``), a JSON array, CSV, parquet, or, for ``lm``, plain text (``.txt``). A folder has a
    file for each of `SPLITS`, of which only train is required; or, for ``lm``, texts of any names.
    ``task:NAME`` draws from `synthetic_data`, with ``seed``. Without a file for validation, the
    fraction ``val_fraction`` of the training lines is held out, drawn with ``seed``.
    ``train_on_prompt`` predicts prompts, too. ``skip_invalid`` skips invalid lines.
    ``classes`` are those of a trained model; by default they are the sorted labels of the training
    lines. With ``numeric_labels`` a number that is not the name of a class is its index, as in
    ``id2label``. ``date`` is the date that a chat template sees, YYYY-MM-DD; by default today.

    A text that is too long is cut into pieces that together predict each token once; a document is
    cut so that its summary is complete; everything else loses its end, and a line without a
    predicted token is invalid. The tokenizer may be None if the lines hold tokens.

    Errors: FormatError with file and line number; ValueError for an invalid setting.
    """
    _check_settings(task, max_length, val_fraction)
    if task == "chat" and tokenizer is not None:
        _ = tokenizer.render  # an error here if there is no chat template
    if str(path).startswith(BUILT_IN):
        return _synthetic(str(path)[len(BUILT_IN) :], task, tokenizer, max_length, seed)
    encoder = Encoder(tokenizer, max_length, train_on_prompt, _today(date))
    reader = _Reader(task, encoder, skip_invalid)
    files = _files(Path(path), task)
    rows = {split: reader.read(file) for split, file in files.items()}
    names: tuple[str, ...] = ()
    if task == "classify":
        names = tuple(classes) if classes is not None else reader.classes_of(rows["train"])
        by_index = numeric_labels and classes is not None
        by_index = by_index and not any(name.isdecimal() for name in names)
        rows = {split: reader.labelled(lines, names, by_index) for split, lines in rows.items()}
    _check_not_empty(files, rows, reader.skipped)
    if "valid" not in rows and val_fraction:
        rows |= _held_out(rows["train"], val_fraction, seed)
    train, valid, test = (
        [e for row in rows.get(split, []) for e in row.examples] for split in SPLITS
    )
    truncated = sum(row.truncated for row in rows["train"])
    skipped, digest = tuple(reader.skipped), _digest(reader.digests)
    return Data(train, valid, test, skipped, digest, names, truncated, encoder.date_of(task))


def _today(date: str | None) -> datetime.date:
    return datetime.date.today() if date is None else date_of(date)


def _check_settings(task: str, max_length: int, val_fraction: float) -> None:
    if task not in TASKS:
        raise ValueError(f"task {task!r}: expected one of {', '.join(TASKS)}")
    if max_length < 2:
        raise ValueError(f"max_length {max_length}: expected at least 2 tokens")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction {val_fraction}: expected at least 0 and below 1")


def _check_not_empty(
    files: Mapping[str, Path], rows: Mapping[str, list[_Row]], skipped: Sequence[Skipped]
) -> None:
    """Errors: FormatError for a file without examples."""
    for split, lines in rows.items():
        if not lines:
            path = files[split]
            reasons = [line.reason for line in skipped if line.path == str(path)]
            found = "no example"
            if reasons:
                found += f", {len(reasons)} lines skipped, the first: {reasons[0]}"
            raise FormatError(path, "file", found, "at least one", "check the file")


def _files(path: Path, task: str) -> dict[str, Path]:
    """The files by their split."""
    if not path.exists():
        raise FormatError(path, "file", "nothing", "a file or a folder", "check the path")
    suffixes = (*READERS, ".txt") if task == "lm" else (*READERS,)
    expected = " or ".join(suffixes)
    if path.is_dir():
        if task == "lm" and _holds_texts(path, suffixes):
            return {"train": path}
        return _files_of_folder(path, suffixes)
    if path.suffix not in suffixes:
        remedy = "write one JSON object per line, or name a folder"
        raise FormatError(path, "file", f"the suffix {path.suffix!r}", expected, remedy)
    return {"train": path}


def _holds_texts(path: Path, suffixes: Sequence[str]) -> bool:
    """Whether all data in the folder are texts, and none has a split's name."""
    files = [file for file in path.iterdir() if file.suffix in suffixes]
    return bool(files) and all(f.suffix == ".txt" and f.stem not in SPLITS for f in files)


def _files_of_folder(path: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    existing = sorted(file for file in path.iterdir() if file.suffix in suffixes)
    files = {file.stem: file for file in existing}
    if "train" not in files or len(files) < len(existing) or files.keys() - set(SPLITS):
        kinds = " or ".join(suffixes)
        expected = f"one file for train, and optionally for valid and test, each {kinds}"
        found = listed(file.name for file in existing) or f"no {kinds}"
        remedy = "rename or remove files" if existing else "put them there, or name a file"
        raise FormatError(path, "folder", found, expected, remedy)
    return {split: files[split] for split in SPLITS if split in files}


def _digest(digests: Mapping[str, str]) -> str:
    """A file's SHA-256; a folder's is that of the lines that ``sha256sum`` prints for its files."""
    if len(digests) == 1:
        return next(iter(digests.values()))
    text = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    return hashlib.sha256(text.encode()).hexdigest()


def _held_out(rows: list[_Row], fraction: float, seed: int) -> dict[str, list[_Row]]:
    """The lines divided into train and valid, at least one of each, in their order."""
    n = max(1, round(fraction * len(rows)))
    if n >= len(rows):
        raise ValueError(
            f"val_fraction {fraction}: found {len(rows)} lines, none of which is left to train on"
        )
    chosen = set(np.argsort(shuffle_keys([seed, 1], len(rows)), kind="stable")[:n].tolist())
    return {
        "train": [row for i, row in enumerate(rows) if i not in chosen],
        "valid": [row for i, row in enumerate(rows) if i in chosen],
    }


def _synthetic(
    name: str, task: str, tokenizer: Tokenizer | None, max_length: int, seed: int
) -> Data:
    """Examples of a built-in task, drawn with their probabilities."""
    synthetic = synthetic_data.task(name)
    _check_synthetic(name, synthetic, task, tokenizer, max_length)

    def example(row: int) -> Example:
        e = synthetic.examples[row]
        ids = np.array(e.ids)
        loss_mask = np.arange(len(ids)) > 0 if synthetic.causal else np.zeros(len(ids), bool)
        return Example(ids, loss_mask, e.label, None if e.types is None else np.array(e.types))

    train, valid, test = (
        [example(row) for row in synthetic.draw_rows(np.random.default_rng([seed, i]), n)]
        for i, n in enumerate(SYNTHETIC_SIZES.values())
    )
    labels = sorted({e.label for e in synthetic.examples if e.label is not None})
    digest = hashlib.sha256(f"{BUILT_IN}{name} {seed}\n".encode()).hexdigest()
    return Data(train, valid, test, digest=digest, classes=tuple(map(str, labels)))


def _check_synthetic(
    name: str,
    synthetic: synthetic_data.Task,
    task: str,
    tokenizer: Tokenizer | None,
    max_length: int,
) -> None:
    expected = "lm" if synthetic.causal else "classify"
    if task != expected:
        raise ValueError(f"{BUILT_IN}{name} with the task {task}: expected {expected}")
    symbols = [*synthetic.symbols]
    if tokenizer is not None and (
        tokenizer.vocab != len(symbols)
        or [*map(tokenizer.token_text, range(len(symbols)))] != symbols
    ):
        raise ValueError(
            f"{BUILT_IN}{name}: found a model with {tokenizer.vocab} tokens, expected one whose "
            f"tokens are {' '.join(symbols)}: use a reference model that has them"
        )
    longest = max(len(e.ids) for e in synthetic.examples)
    if max_length < longest:
        raise ValueError(
            f"max_length {max_length}: {BUILT_IN}{name} has sequences of up to {longest} tokens"
        )


class _Reader:
    """Reads the lines of files for a task; skips invalid lines, or refuses them."""

    def __init__(self, task: str, encoder: Encoder, skip_invalid: bool) -> None:
        self.task, self.encoder, self.skip_invalid = task, encoder, skip_invalid
        self.skipped: list[Skipped] = []
        self.digests: dict[str, str] = {}

    def read(self, path: Path) -> list[_Row]:
        """The valid lines of a file, or the pieces of a text or of a folder of texts."""
        try:
            if path.is_dir():
                texts = sorted(path.glob("*.txt"))
                return [row for text in texts for row in self._text(text)]
            return self._text(path) if path.suffix == ".txt" else [*self._lines(path)]
        except OSError as error:
            raise FormatError(path, "file", error, "a readable file", "check it") from error

    def _refuse(self, path: Path, line: int, error: InvalidLine) -> None:
        """Raise FormatError, or record the line as skipped."""
        found, expected, remedy = error.args
        if not self.skip_invalid:
            remedy = f"{remedy}, or skip invalid lines with --skip-invalid"
            where = "line" if path.suffix in (".jsonl", ".csv") else "entry"
            raise FormatError(path, f"{where} {line}", found, expected, remedy) from None
        self.skipped.append(Skipped(str(path), line, f"found {found}, expected {expected}"))

    def _lines(self, path: Path) -> Iterator[_Row]:
        sha = hashlib.sha256()
        for number, value in READERS[path.suffix](path, sha):
            try:
                if isinstance(value, InvalidLine):
                    raise value
                yield self._row(path, number, value)
            except InvalidLine as error:
                self._refuse(path, number, error)
        self.digests[path.name] = sha.hexdigest()

    def _row(self, path: Path, line: int, value: Any) -> _Row:
        if not isinstance(value, dict):
            raise InvalidLine(f"a JSON {type(value).__name__}", "a JSON object, in { }")
        make = SHAPES[self.task][self._keys(value)]
        label = label_of(value) if self.task == "classify" else None
        examples, truncated = make(self.encoder, value)
        return _Row(path, line, examples, truncated, label)

    def _keys(self, value: Mapping[str, Any]) -> tuple[str, ...]:
        """The only shape of the task whose keys the line has."""
        shapes = SHAPES[self.task]
        fitting = [keys for keys in shapes if value.keys() >= set(keys)]
        if len(fitting) == 1:
            return fitting[0]
        found = f"the keys {listed(value, 10)}" if value else "no keys"
        known = "; or ".join(" and ".join(keys) for keys in shapes)
        keys = "the keys of only one of" if fitting else "the keys"
        remedy = "rename or remove keys, or use another task"
        raise InvalidLine(found, f"for the task {self.task} {keys}: {known}", remedy)

    def _text(self, path: Path) -> list[_Row]:
        """Plain text in pieces, each as if it were a line."""
        raw = path.read_bytes()
        self.digests[path.name] = hashlib.sha256(raw).hexdigest()
        try:
            text = without_bom(raw).decode().replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            remedy = "write the file in UTF-8"
            raise FormatError(path, f"line {line}", error, "UTF-8", remedy) from None
        if not text.strip():
            raise FormatError(path, "file", "no text", "text", "check the file")
        try:
            examples, _ = self.encoder.pieces(self.encoder.encode(text))
        except InvalidLine as error:
            raise FormatError(path, "file", *error.args) from None
        return [_Row(path, i, [e]) for i, e in enumerate(examples, 1)]

    def classes_of(self, rows: list[_Row]) -> tuple[str, ...]:
        """The classes, sorted, numbers by size; lines with another type of label are removed."""
        kind = type(rows[0].label) if rows else None
        for row in rows:
            if type(row.label) is not kind:
                expected = f"a label of the same type as the first, {rows[0].label!r}"
                self._refuse(row.path, row.line, InvalidLine(f"label {row.label!r}", expected))
        rows[:] = [row for row in rows if type(row.label) is kind]
        labels: set[Any] = {row.label for row in rows}
        if len(labels) == 1:
            found, expected = f"one class, {labels.pop()!r}", "at least two"
            raise FormatError(rows[0].path, "labels", found, expected, "check the file")
        return tuple(map(str, sorted(labels)))

    def labelled(self, rows: list[_Row], classes: tuple[str, ...], by_index: bool) -> list[_Row]:
        """The lines with the indices of their classes, found by name or, if ``by_index``, number.

        Classes that were learned from labels are found by name only: a number is a name, too.
        """
        index = {name: i for i, name in enumerate(classes)}
        labelled = []
        for row in rows:
            i = index.get(str(row.label))
            if i is None and by_index and type(row.label) is int and 0 <= row.label < len(classes):
                i = row.label
            if i is None:
                expected = f"one of the classes trained on, {listed(classes, 20)}"
                self._refuse(row.path, row.line, InvalidLine(f"label {row.label!r}", expected))
                continue
            labelled.append(row._replace(examples=[replace(e, label=i) for e in row.examples]))
        return labelled
