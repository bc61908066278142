"""What differs between two models' tokenizers, and what it changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minilora.audit.result import Entry
from minilora.audit.tensors import TensorStore
from minilora.io.errors import FormatError
from minilora.io.files import in_words, parse_json

FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
"""Files that say which tokens a text is."""

_PARTS = {
    "normalizer": "a text is normalized otherwise before it is split",
    "pre_tokenizer": "a text is split otherwise",
    "decoder": "tokens become another text",
}
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token")
_MOST = 2**28
"""A larger file is compared by its bytes alone."""


def compare_tokenizers(base: TensorStore, merged: TensorStore) -> Iterator[Entry]:
    """An entry for each difference between the tokenizers in two folders.

    Errors: FormatError for damaged files.
    """
    B, M = base.folder, merged.folder
    if B is None or M is None:
        if "gguf" in (base.container, merged.container) and base.container != merged.container:
            text = "a GGUF file has its own, which is not compared with the other model's"
            yield Entry("tokenizer", "told", text)
        return
    there = [name for name in FILES if (B / name).is_file()]
    if there and not any((M / name).is_file() for name in FILES):
        text = f"the merged model has no tokenizer: copy the base's ({', '.join(there)})"
        yield Entry("tokenizer", "told", text)
        return
    for name in there:
        if not (M / name).is_file() or _digest(B / name) == _digest(M / name):
            continue
        if name == "tokenizer.json":
            yield from _tokenizer_json(B / name, M / name)
        else:
            text = "it differs from the base's: a text becomes other tokens"
            yield Entry(name, "wrong", text)
    yield from _texts(B, M)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_bytes()) if path.stat().st_size <= _MOST else {}
    except (OSError, ValueError) as error:
        remedy = "fetch or write it again"
        raise FormatError(path, "file", in_words(error), "a JSON object", remedy) from None
    return value if isinstance(value, dict) else {}


def _tokenizer_json(one: Path, two: Path) -> Iterator[Entry]:
    B, M = _read(one), _read(two)
    a, b = _vocabulary(B), _vocabulary(M)
    moved = [token for token in a if token in b and a[token] != b[token]]
    gone, new = [t for t in a if t not in b], [t for t in b if t not in a]
    if moved:
        text = f"{len(moved)} tokens have other numbers, such as {moved[0]!r}: {a[moved[0]]}, now "
        yield Entry("tokenizer.json", "wrong", f"{text}{b[moved[0]]}: a text becomes other tokens")
    if gone:
        text = f"{len(gone)} tokens are missing, such as {gone[0]!r}: a text becomes other tokens"
        yield Entry("tokenizer.json", "wrong", text)
    if new:
        text = f"{len(new)} tokens more than the base's, such as {new[0]!r}"
        yield Entry("tokenizer.json", "told", text)
    if _merges(B) != _merges(M):
        yield Entry("tokenizer.json", "wrong", "other merges: a text becomes other tokens")
    for key, effect in _PARTS.items():
        if B.get(key) != M.get(key):
            yield Entry(f"tokenizer.json: {key}", "doubtful", f"it differs: {effect}")
    yield from _other_around(B.get("post_processor"), M.get("post_processor"))


def _other_around(base: Any, merged: Any) -> Iterator[Entry]:
    """An entry if the two post-processors put other special tokens around a text."""
    before, now = _around(base), _around(merged)
    if before != now or (now is None and base != merged):
        text = "it differs: other special tokens may be put around a text"
        if before is not None and now is not None:
            text = f"a text becomes {_shown(now)}, with the base's {_shown(before)}"
        yield Entry("tokenizer.json: post_processor", "doubtful", text)


def _shown(around: tuple[list[str], list[str]]) -> str:
    before, after = around
    return " ".join([*before, "TEXT", *after])


def _around(processor: Any) -> tuple[list[str], list[str]] | None:
    """The special tokens before and after a text; None of a processor that is not known."""
    if processor is None:
        return [], []
    kind = processor.get("type") if isinstance(processor, dict) else None
    if kind == "ByteLevel":  # moves places in the text, no tokens
        return [], []
    if kind == "Sequence" and isinstance(parts := processor.get("processors"), list):
        known = [found for part in parts if (found := _around(part)) is not None]
        adding = [found for found in known if found != ([], [])]
        if len(known) < len(parts) or len(adding) > 1:
            return None
        return adding[0] if adding else ([], [])
    if kind in ("BertProcessing", "RobertaProcessing"):
        names = [processor.get(end) for end in ("cls", "sep")]
        if all(isinstance(name, list) and name for name in names):
            return [str(names[0][0])], [str(names[1][0])]
    if kind == "TemplateProcessing" and isinstance(processor.get("single"), list):
        return _of_template(processor["single"])
    return None


def _of_template(pieces: list[Any]) -> tuple[list[str], list[str]] | None:
    """The special tokens before and after the one text of a template."""
    around: tuple[list[str], list[str]] = [], []
    texts = 0
    for piece in pieces:
        inner = piece.get("SpecialToken") if isinstance(piece, dict) else None
        if isinstance(inner, dict):
            around[min(texts, 1)].append(str(inner.get("id")))
        elif isinstance(piece, dict) and "Sequence" in piece:
            texts += 1
        else:
            return None
    return around if texts == 1 else None


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Each token's number."""
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    found: dict[str, Any] = {}
    if isinstance(vocab, dict):
        found = dict(vocab)
    elif isinstance(vocab, list):  # a unigram model: pairs of a token and its score
        pairs = (row for row in vocab if isinstance(row, list) and row)
        found = {str(row[0]): i for i, row in enumerate(pairs)}
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict):
            found[str(token.get("content"))] = token.get("id")
    return found


def _merges(tokenizer: Mapping[str, Any]) -> list[str]:
    """The merges, which two generations of tokenizers write as texts and as pairs."""
    model = tokenizer.get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    rows = merges if isinstance(merges, list) else []
    return [" ".join(map(str, row)) if isinstance(row, list) else str(row) for row in rows]


def _texts(B: Path, M: Path) -> Iterator[Entry]:
    """The chat template and the special tokens."""
    one, two = ({} if not (at / _CONFIG).is_file() else _read(at / _CONFIG) for at in (B, M))
    for key in _SPECIAL:
        a, b = (_content(settings.get(key)) for settings in (one, two))
        if key in one and key in two and a != b:
            text = f"{json.dumps(b)}, the base says {json.dumps(a)}"
            yield Entry(f"tokenizer: {key}", "doubtful", f"{text}: texts begin or end otherwise")
    a, b = _template(B, one), _template(M, two)
    if a and not b:
        text = "the base has one, the merged model has none: copy it, chats need it"
        yield Entry("chat template", "doubtful", text)
    elif b and a and a != b:
        text = f"{len(b)} characters, the base's has {len(a)}: a chat becomes another prompt"
        yield Entry("chat template", "doubtful", text)


_CONFIG = "tokenizer_config.json"


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _template(folder: Path, settings: Mapping[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(errors="replace").strip()
    stored = settings.get("chat_template")
    return stored.strip() if isinstance(stored, str) else json.dumps(stored) if stored else ""
