"""Reading the tokenizer of a Hugging Face model folder."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minilora.io.errors import FormatError, listed
from minilora.io.files import read_json
from minilora.io.formats.tokenizers.base import Tokenizer
from minilora.io.formats.tokenizers.chat import missing_library
from minilora.io.formats.tokenizers.library import LibraryTokenizer
from minilora.io.formats.tokenizers.words import WordTokenizer
from minilora.io.synthetic_data import SPECIAL

NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""The special tokens that a folder may name and a template may use, each as ``<name>_token``."""

OTHERS = ("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "tekken.json")
"""Files of vocabularies that are no ``tokenizer.json``."""


def read_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a Hugging Face model folder.

    From ``tokenizer.json``, with the special tokens and the chat template that
    ``tokenizer_config.json``, ``special_tokens_map.json``, ``chat_template.jinja`` and
    ``generation_config.json`` name. What stands around a text is what ``tokenizer.json`` says:
    ``add_bos_token`` and the like are instructions for making one, as in transformers.

    Errors: FormatError if a file is missing or damaged, or the files contradict each other;
    ImportError without ``tokenizers``, unless its symbols are words of a task.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        vocabularies = listed(name for name in OTHERS if (folder / name).is_file())
        remedy = "fetch it too, or name the model's own folder"
        if vocabularies:
            new = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW)"
            remedy = f"let transformers write it: {new}"
        raise FormatError(folder, "tokenizer", vocabularies or "none", "tokenizer.json", remedy)
    if (words := _words(read_json(path))) is not None:
        return words
    config = folder / "tokenizer_config.json"
    settings = read_json(config) if config.is_file() else {}
    backend = _backend(path)
    special_tokens = _special_tokens(folder, settings)
    stop_ids = _token_ids(folder, "eos")
    for name in ("eos", "bos"):
        if name not in special_tokens and (ids := _token_ids(folder, name)):
            special_tokens[name] = _token(folder, backend, ids[0])
    template = _chat_template(folder, settings)
    try:
        return LibraryTokenizer(backend, special_tokens, template, stop_ids)
    except ValueError as error:
        remedy = "take both files from one model"
        raise FormatError(config, "special tokens", error, f"those of {path}", remedy) from None


def _words(stored: Mapping[str, Any]) -> WordTokenizer | None:
    """The tokenizer of words that would write this very file, if there is one."""
    vocab = (
        (stored.get("model") or {}).get("vocab") if isinstance(stored.get("model"), dict) else None
    )
    if not isinstance(vocab, dict) or sorted(vocab.values(), key=str) != sorted(
        range(len(vocab)), key=str
    ):
        return None
    for language in (True, False):
        words = WordTokenizer(sorted(vocab, key=lambda word: vocab[word]), language)
        if words.symbols[: len(SPECIAL)] == SPECIAL and words.json() == stored:
            return words
    return None


def _backend(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise missing_library("tokenizers", str(path)) from error
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises no kinder one
        expected = f"a tokenizer that tokenizers {version('tokenizers')} reads"
        raise FormatError(path, "file", error, expected, "fetch it again, or update it") from None


def _special_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by name; an older folder has them in a file of their own."""
    path = folder / "special_tokens_map.json"
    older = read_json(path) if path.is_file() else {}
    named = {}
    for name in NAMED:
        token = settings.get(f"{name}_token", older.get(f"{name}_token"))
        if isinstance(token, dict):
            token = token.get("content")
        if token is None:
            continue
        if not isinstance(token, str):
            remedy = "correct it, or fetch it again"
            raise FormatError(folder, f"{name}_token", token, "a token's text", remedy)
        named[name] = token
    return named


def _token_ids(folder: Path, name: str) -> list[int]:
    """The tokens of ``<name>_token_id``: of generation's own file, or else of the model's."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        value = read_json(path).get(f"{name}_token_id") if path.is_file() else None
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            remedy = "correct it, or fetch it again"
            raise FormatError(path, f"{name}_token_id", value, "tokens' numbers", remedy)
        if ids:
            return ids
    return []


def _token(folder: Path, backend: Any, i: int) -> str:
    token = backend.id_to_token(i)
    if token is None:
        remedy = "take both files from one model"
        raise FormatError(folder, f"token {i}", "none in tokenizer.json", "one", remedy)
    return str(token)


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template: its own file before the settings, and of several the default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_bytes().decode()
        except (OSError, ValueError) as error:
            raise FormatError(path, "file", error, "text in UTF-8", "fetch it again") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        by_name = {entry.get("name"): entry.get("template") for entry in entries}
        template = by_name.get("default")
    if not isinstance(template, str | None):
        config, found = folder / "tokenizer_config.json", type(template).__name__
        raise FormatError(config, "chat_template", found, "a text", "correct it")
    return template
