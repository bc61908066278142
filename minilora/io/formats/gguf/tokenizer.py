"""The tokenizer that a GGUF model has in its metadata."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.io.errors import FormatError, listed
from minilora.io.formats.gguf.contents import Contents
from minilora.io.formats.gguf.names import TOKENS
from minilora.io.formats.tokenizers import LibraryTokenizer, missing_library

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 and Qwen2 cut a text before pairs are merged, with so many digits at most in one."""

LONGEST = 1024
"""Characters in a token by score: each may be cut anywhere, so their number counts squared."""

ELSEWHERE = "take the tokenizer.json of the model's own folder"

_CONTROL, _USER_DEFINED = 3, 4
"""Two of the types of tokens: special ones, and words that are kept whole."""


def read_tokenizer(path: Path | str) -> LibraryTokenizer:
    """The tokenizer that a GGUF model has in its metadata, with its chat template.

    Byte-level pairs (GPT-2's, SmolLM's, Qwen2's and Llama 3's, by ``tokenizer.ggml.pre``), and
    SentencePiece's pairs by score, as Llama 2 has them. Qwen2's texts are normalised (NFC) as its
    own tokenizer does, and llama.cpp does not.

    Errors: FormatError for another kind of tokenizer, or metadata that contradict one another;
    ImportError without ``tokenizers``.
    """
    contents = Contents(path)
    make = {"gpt2": _byte_level, "llama": _by_score}
    kind = contents.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in make:
        expected = f"one of {', '.join(make)}"
        raise FormatError(path, "tokenizer.ggml.model", kind, expected, ELSEWHERE)
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise missing_library("tokenizers", str(path)) from error
    tokens = _array(contents, "tokens", str)
    types = _array(contents, "token_type", int, len(tokens))
    if twice := [token for token, n in Counter(tokens).items() if n > 1]:
        raise FormatError(path, "tokenizer.ggml.tokens", listed(twice), "each once", ELSEWHERE)
    named = _special_tokens(contents, tokens)
    stops = [tokens.index(named.pop(name)) for name in ("eot", "eom") if name in named]
    template = contents.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        found = type(template).__name__
        raise FormatError(path, "tokenizer.chat_template", found, "a text", ELSEWHERE)
    expected = "one whose parts agree"
    try:
        backend, begins = make[kind](contents, tokens, types)
        _add_tokens(backend, tokens, types)
    except FormatError:
        raise
    except Exception as error:  # the library raises no kinder one
        raise FormatError(path, "tokenizer", error, expected, ELSEWHERE) from None
    _add_ends(backend, contents, named, begins)
    try:
        return LibraryTokenizer(backend, named, template, stops)
    except ValueError as error:
        raise FormatError(path, "tokenizer", error, expected, ELSEWHERE) from None


def _special_tokens(contents: Contents, tokens: list[str]) -> dict[str, str]:
    """The special tokens' texts by their names."""
    named = {}
    for name, key in TOKENS.items():
        field = f"tokenizer.ggml.{key}_token_id"
        number = contents.get(field)
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < len(tokens):
            expected = f"a token's number, below {len(tokens)}"
            raise FormatError(contents.path, field, number, expected, ELSEWHERE)
        named[name] = tokens[number]
    return named


def _add_tokens(backend: Any, tokens: list[str], types: list[int]) -> None:
    from tokenizers import AddedToken

    for number, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == number
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)


def _add_ends(backend: Any, contents: Contents, named: Mapping[str, str], begins: bool) -> None:
    """Put ``bos`` before a text and ``eos`` after it, as the metadata say, or else ``begins``."""
    from tokenizers.processors import TemplateProcessing

    around = {
        name: contents[f"tokenizer.ggml.{name}_token_id"]
        for name, default in (("bos", begins), ("eos", False))
        if name in named and contents.get(f"tokenizer.ggml.add_{name}_token", default)
    }
    if not around:
        return
    before, after = ([name] * (name in around) for name in ("bos", "eos"))
    first, second = [*before, "$A", *after], [*before, "$B", *after]
    special = [{"id": name, "ids": [i], "tokens": [named[name]]} for name, i in around.items()]
    backend.post_processor = TemplateProcessing(
        single=first, pair=first + second, special_tokens=special
    )


def _array(contents: Contents, name: str, kind: type, count: int | None = None) -> list[Any]:
    """The array of the tokenizer's metadata, of that kind, and of as many as there are tokens."""
    value = contents.get(f"tokenizer.ggml.{name}")
    array = value if isinstance(value, list) else []
    kinds = {*map(type, array)}
    if not array or kinds != {kind} or len(array) != (count or len(array)):
        found = f"{len(array)} of {listed(k.__name__ for k in kinds)}" if array else "none"
        expected = f"{count or 'some'} of {kind.__name__}"
        raise FormatError(contents.path, f"tokenizer.ggml.{name}", found, expected, ELSEWHERE)
    return array


def _byte_level(contents: Contents, tokens: list[str], types: list[int]) -> tuple[Any, bool]:
    """Pairs of bytes, and whether a text begins with ``bos`` where the file does not say."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = contents.get("tokenizer.ggml.pre")
    cuts: dict[str, Any] = {
        "gpt-2": None,
        "smollm": pre_tokenizers.Digits(individual_digits=True),
        "qwen2": pre_tokenizers.Split(Regex(WORDS % 1), "isolated"),
        "llama-bpe": pre_tokenizers.Split(Regex(WORDS % 3), "isolated"),
    }
    if not isinstance(name, str) or name not in cuts:
        expected = f"one of {', '.join(cuts)}"
        raise FormatError(contents.path, "tokenizer.ggml.pre", name, expected, ELSEWHERE)
    merges = [tuple(merge.split(" ", 1)) for merge in _array(contents, "merges", str)]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=name == "llama-bpe"))
    already_cut = name in ("qwen2", "llama-bpe")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not already_cut)
    cut = [] if cuts[name] is None else [cuts[name]]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cut, letters])
    backend.decoder = decoders.ByteLevel()
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend, name == "llama-bpe"


def _by_score(contents: Contents, tokens: list[str], types: list[int]) -> tuple[Any, bool]:
    """SentencePiece's pairs: of those that make a token, the one of the best score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _array(contents, "scores", float, len(tokens))
    vocab = {token: i for i, token in enumerate(tokens)}
    if (longest := max(map(len, tokens))) > LONGEST:
        found, expected = f"a token of {longest} characters", f"{LONGEST} at most"
        raise FormatError(contents.path, "tokenizer.ggml.tokens", found, expected, ELSEWHERE)
    ranked = sorted(range(len(tokens)), key=lambda i: -scores[i])
    merges = [
        (tokens[i][:cut], tokens[i][cut:])
        for i in ranked
        if types[i] == 1
        for cut in range(1, len(tokens[i]))
        if tokens[i][:cut] in vocab and tokens[i][cut:] in vocab
    ]
    unknown = tokens[contents.get("tokenizer.ggml.unknown_token_id", 0)]
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = bool(contents.get("tokenizer.ggml.add_space_prefix", True))
    before = [normalizers.Prepend("▁")] * prefix
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    after = [decoders.Strip(" ", 1, 0)] * prefix
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return backend, True
