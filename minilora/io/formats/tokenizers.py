"""Text to tokens and back, and chats to text: the tokenizer in a Hugging Face model folder.

``tokenizer.json`` is read by the library ``tokenizers``, and a chat template rendered by
``jinja2``: both come with the extra ``text``. The tokenizers of `synthetic_data`, whose
symbols are words, need neither.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minilora.io.errors import FormatError, listed
from minilora.io.files import read_json
from minilora.io.synthetic_data import END, PAD, SPECIAL, START, Task

EXTRA = "python -m pip install 'minilora[text]'"
"""What installs ``tokenizers``, ``jinja2`` and ``rouge-score``."""

NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""The special tokens that a folder may name and a template may use, each as ``<name>_token``."""

OTHERS = ("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "tekken.json")
"""Files of vocabularies that are no ``tokenizer.json``."""


def missing_library(name: str, what: str) -> ImportError:
    """The error that the library ``name``, which ``what`` needs, is not installed."""
    return ImportError(f"{what} needs the library {name}: {EXTRA}")


class Tokenizer(ABC):
    """What turns text into the tokens of one model.

    ``bos`` begins a text and ``eos`` ends it, where there are such; ``stops`` are all that end what
    is generated. ``pad`` fills up a batch. Tokens are 0 … ``vocab`` - 1. ``head`` and ``tail`` are
    the special tokens that this tokenizer itself writes around a text, ``middle`` those between
    two, and ``second`` is the second one's type. ``named`` has the special tokens' texts by their
    names, ``template`` is that of chats.
    """

    bos: int | None = None
    eos: int | None = None
    stops: tuple[int, ...] = ()
    pad: int = 0
    vocab: int
    head: tuple[int, ...] = ()
    middle: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()
    second: int = 1
    named: Mapping[str, str] = {}
    template: str | None = None

    @abstractmethod
    def encode(self, text: str, special: bool = True) -> list[int]:
        """The text's tokens, between ``head`` and ``tail`` if ``special``.

        Errors: ValueError if it has no tokens for the text.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of these tokens; special ones are left out unless asked for."""

    @abstractmethod
    def piece(self, id: int) -> str:
        """How one token reads, a special one by its name."""

    def chat(self, messages: Sequence[Mapping[str, Any]], generate: bool = False) -> str:
        """The messages as the model's template writes them, special tokens included.

        ``generate`` adds what begins an answer. The template is a program from a file: it runs in
        ``jinja2``'s sandbox, and does not see the date, which would change the tokens overnight.

        Errors: ValueError without a template, or if it refuses the messages; ImportError without
        ``jinja2``.
        """
        values: dict[str, Any] = {f"{name}_token": text for name, text in self.named.items()}
        values |= {"messages": messages, "tools": None, "documents": None}
        try:
            return self.render(add_generation_prompt=generate, **values)
        except (ArithmeticError, LookupError, RuntimeError, TypeError) as error:
            raise ValueError(f"the chat template fails on these messages: {error}") from error

    @cached_property
    def render(self) -> Callable[..., str]:
        """The template's function. Errors: ValueError without a template."""
        if self.template is None:
            raise ValueError(
                "the model has no chat template: found neither chat_template in "
                "tokenizer_config.json nor chat_template.jinja; give prompt and completion with "
                "the task lm, or take a model that was tuned to chats"
            )
        return compile_template(self.template)


def compile_template(template: str) -> Callable[..., str]:
    """A chat template's function, in the environment that templates are written for.

    Errors: ValueError if it is no template; what it raises when it runs is one too. ImportError
    without ``jinja2``, or with one whose sandbox is known to leak.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise missing_library("jinja2", "a chat template") from error

    if tuple(int(part) for part in version("jinja2").split(".")[:3] if part.isdigit()) < (3, 1, 6):
        raise ImportError(f"jinja2 {version('jinja2')}: a chat template needs 3.1.6 or later")

    class Generation(Extension):  # type: ignore[misc]
        """``{% generation %} … {% endgeneration %}`` marks an answer; here it is only passed."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)  # jinja2's own is for HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse

    try:
        program = environment.from_string(template)
    except TemplateError as error:
        raise ValueError(f"the chat template is none: {error}") from error

    def render(**values: Any) -> str:
        try:
            return str(program.render(**values))
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error

    return render


class WordTokenizer(Tokenizer):
    """The symbols of a task of `synthetic_data`, written as words.

    A language begins with its start; two words of a class stand between a start and two ends.
    """

    def __init__(self, symbols: Sequence[str], language: bool) -> None:
        self.symbols = tuple(symbols)
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.bos, self.eos, self.pad, self.vocab = START, END, PAD, len(self.symbols)
        self.stops, self.head = (END,), (START,)
        self.middle = self.tail = () if language else (END,)
        self.named = {"bos": SPECIAL[START], "eos": SPECIAL[END], "pad": SPECIAL[PAD]}

    @classmethod
    def of(cls, task: Task) -> "WordTokenizer":
        """Those of a task."""
        return cls(task.symbols, task.causal)

    def encode(self, text: str, special: bool = True) -> list[int]:  # noqa: D102
        for name in SPECIAL:
            text = text.replace(name, f" {name} ")
        words = text.split()
        if unknown := [word for word in words if word not in self._ids]:
            raise ValueError(
                f"the word {unknown[0]!r}, none of {' '.join(self.symbols)} with blanks between"
            )
        ids = [self._ids[word] for word in words]
        return [*self.head, *ids, *self.tail] if special else ids

    def decode(self, ids: Sequence[int], special: bool = False) -> str:  # noqa: D102
        return " ".join(self.symbols[i] for i in ids if special or i >= len(SPECIAL))

    def piece(self, id: int) -> str:  # noqa: D102
        return self.symbols[id]

    def json(self) -> dict[str, Any]:
        """The ``tokenizer.json`` that makes the same of a text."""
        language = not self.tail

        def token(i: int, kind: int) -> dict[str, Any]:
            return {"SpecialToken": {"id": self.symbols[i], "type_id": kind}}

        def sequence(name: str, kind: int) -> dict[str, Any]:
            return {"Sequence": {"id": name, "type_id": kind}}

        one = [token(START, 0), sequence("A", 0)] + ([] if language else [token(END, 0)])
        two = [*one, sequence("B", 1)] + ([] if language else [token(END, 1)])
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": name, **flags, "special": True}
                for i, name in enumerate(SPECIAL)
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": one,
                "pair": two,
                "special_tokens": {
                    SPECIAL[i]: {"id": SPECIAL[i], "ids": [i], "tokens": [SPECIAL[i]]}
                    for i in ((START,) if language else (START, END))
                },
            },
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": self._ids, "unk_token": "<unknown>"},
        }

    def settings(self) -> dict[str, Any]:
        """The ``tokenizer_config.json`` beside it."""
        names = {f"{name}_token": text for name, text in self.named.items()}
        inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if self.tail else [])
        return {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs, **names}


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the library ``tokenizers``, and the special tokens by their names.

    It neither cuts nor pads, whatever its file says: that is the reader of the data's business.

    Errors: ValueError if a named token is not in the vocabulary, or no text has a token.
    """

    def __init__(
        self,
        backend: Any,
        named: Mapping[str, str],
        template: str | None = None,
        stops: Sequence[int] = (),
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.named, self.template = backend, dict(named), template
        self.vocab = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        ids = {name: backend.token_to_id(text) for name, text in self.named.items()}
        if missing := [
            f"{name}_token {self.named[name]!r}" for name, i in ids.items() if i is None
        ]:
            raise ValueError(f"{listed(missing)} not in the vocabulary")
        self.bos, self.eos = ids.get("bos"), ids.get("eos")
        own = [] if self.eos is None else [self.eos]
        self.stops = tuple(dict.fromkeys([*own, *stops]))
        self.pad = next((i for i in (ids.get("pad"), *self.stops) if i is not None), 0)
        self.head, self.middle, self.tail = self._around()

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The special tokens before, between and after two texts.

        They are tried with a text that has tokens: any will do.
        """
        for text in ("a", *self.backend.get_vocab(with_added_tokens=False)):
            try:
                both = self.backend.encode(text, text)
            except Exception:  # a word that it does not know
                continue
            if {0, 1} <= {*both.sequence_ids}:
                break
        else:
            raise ValueError("no text that has tokens")
        texts = [i for i, one in enumerate(both.sequence_ids) if one is not None]
        first = [i for i in texts if both.sequence_ids[i] == 0]
        a, b, c, d = first[0], first[-1] + 1, texts[len(first)], texts[-1] + 1
        self.second = both.type_ids[c]
        return tuple(both.ids[:a]), tuple(both.ids[b:c]), tuple(both.ids[d:])

    def encode(self, text: str, special: bool = True) -> list[int]:  # noqa: D102
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises no kinder one
            raise ValueError(f"the tokenizer refuses {text[:40]!r}: {error}") from error
        return [*self.head, *ids, *self.tail] if special else ids

    def decode(self, ids: Sequence[int], special: bool = False) -> str:  # noqa: D102
        return str(self.backend.decode(list(map(int, ids)), skip_special_tokens=not special))

    def files(self) -> dict[str, dict[str, Any]]:
        """The files of a Hugging Face folder that make the same tokenizer, by their names.

        Tokens that end what is generated beside ``eos`` have no place but in generation's own file.
        """
        inputs = ["input_ids", "attention_mask"]
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= {"model_input_names": inputs, "clean_up_tokenization_spaces": False}
        settings |= {f"{name}_token": text for name, text in self.named.items()}
        for name, around in (("bos", self.head), ("eos", self.tail)):
            settings[f"add_{name}_token"] = getattr(self, name) in around
        if self.template is not None:
            settings["chat_template"] = self.template
        files = {"tokenizer.json": json.loads(self.backend.to_str())}
        files["tokenizer_config.json"] = settings
        ids = {f"{name}_token_id": getattr(self, name) for name in ("bos", "pad")}
        ids = {key: id for key, id in ids.items() if key.removesuffix("_id") in settings}
        if self.stops:
            files["generation_config.json"] = {**ids, "eos_token_id": [*self.stops]}
        return files

    def piece(self, id: int) -> str:  # noqa: D102
        whole = self.backend.id_to_token(int(id))
        if whole is None:
            return f"<no token {id}>"
        read = str(self.backend.decode([int(id)], skip_special_tokens=False))
        if "▁" in whole:  # SentencePiece's blank, which decoding drops at the start
            return str(whole.replace("▁", " "))
        return read if read and "\N{REPLACEMENT CHARACTER}" not in read else str(whole)


def read_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a Hugging Face model folder.

    From ``tokenizer.json``, with the special tokens and the chat template that
    ``tokenizer_config.json``, ``special_tokens_map.json``, ``chat_template.jinja`` and
    ``generation_config.json`` name. What stands around a text is what ``tokenizer.json`` says:
    ``add_bos_token`` and the like are instructions for making one, as in transformers.

    Errors: FormatError if a file is missing or damaged, or the files contradict each other;
    ImportError without ``tokenizers``, unless the symbols are words of a task.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        there = [name for name in OTHERS if (folder / name).is_file()]
        remedy = (
            "let transformers write it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW)"
            if there
            else "fetch it too, or name the model's own folder"
        )
        raise FormatError(folder, "tokenizer", listed(there) or "none", "tokenizer.json", remedy)
    whole = read_json(path)
    if (words := _words(whole)) is not None:
        return words
    config = folder / "tokenizer_config.json"
    settings = read_json(config) if config.is_file() else {}
    backend = _backend(path)
    named = _named(folder, settings)
    stops = _numbers(folder, "eos")
    if "eos" not in named and stops:
        named["eos"] = _read(folder, backend, stops[0])
    if "bos" not in named and (first := _numbers(folder, "bos")):
        named["bos"] = _read(folder, backend, first[0])
    template = _template(folder, settings)
    try:
        return LibraryTokenizer(backend, named, template, stops)
    except ValueError as error:
        remedy = "take both files from one model"
        raise FormatError(config, "special tokens", error, f"those of {path}", remedy) from None


def _words(whole: Mapping[str, Any]) -> WordTokenizer | None:
    """The tokenizer of words that would write this very file, if there is one."""
    vocab = (
        (whole.get("model") or {}).get("vocab") if isinstance(whole.get("model"), dict) else None
    )
    if not isinstance(vocab, dict) or sorted(vocab.values(), key=str) != sorted(
        range(len(vocab)), key=str
    ):
        return None
    for language in (True, False):
        words = WordTokenizer(sorted(vocab, key=lambda word: vocab[word]), language)
        if words.symbols[: len(SPECIAL)] == SPECIAL and words.json() == whole:
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


def _named(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
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


def _numbers(folder: Path, name: str) -> list[int]:
    """The tokens of ``<name>_token_id``: of generation's own file, or else of the model's."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        found = read_json(path).get(f"{name}_token_id") if path.is_file() else None
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(i) is int and i >= 0 for i in ids):
            remedy = "correct it, or fetch it again"
            raise FormatError(path, f"{name}_token_id", found, "tokens' numbers", remedy)
        if ids:
            return ids
    return []


def _read(folder: Path, backend: Any, i: int) -> str:
    token = backend.id_to_token(i)
    if token is None:
        remedy = "take both files from one model"
        raise FormatError(folder, f"token {i}", "none in tokenizer.json", "one", remedy)
    return str(token)


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template: its own file before the settings, and of several the default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_bytes().decode()
        except (OSError, ValueError) as error:
            raise FormatError(path, "file", error, "text in UTF-8", "fetch it again") from None
    found = settings.get("chat_template")
    if isinstance(found, list):
        several = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = several.get("default")
    if not isinstance(found, str | None):
        config = folder / "tokenizer_config.json"
        raise FormatError(config, "chat_template", type(found).__name__, "a text", "correct it")
    return found
