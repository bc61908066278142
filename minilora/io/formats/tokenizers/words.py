"""The tokenizer of `synthetic_data`, whose symbols are words; it needs no library."""

from collections.abc import Sequence
from typing import Any

from minilora.io.formats.tokenizers.base import Tokenizer
from minilora.io.synthetic_data import END, PAD, SPECIAL, START, Task


class WordTokenizer(Tokenizer):
    """The symbols of a task of `synthetic_data`, written as words.

    A language begins with its start; two words of a class stand between a start and two ends.
    """

    def __init__(self, symbols: Sequence[str], language: bool) -> None:
        self.symbols = tuple(symbols)
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.bos, self.eos, self.pad, self.vocab = START, END, PAD, len(self.symbols)
        self.stop_ids, self.prefix_ids = (END,), (START,)
        self.separator_ids = self.suffix_ids = () if language else (END,)
        self.special_tokens = {"bos": SPECIAL[START], "eos": SPECIAL[END], "pad": SPECIAL[PAD]}

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
        return [*self.prefix_ids, *ids, *self.suffix_ids] if special else ids

    def decode(self, ids: Sequence[int], special: bool = False) -> str:  # noqa: D102
        return " ".join(self.symbols[i] for i in ids if special or i >= len(SPECIAL))

    def token_text(self, id: int) -> str:  # noqa: D102
        return self.symbols[id]

    def json(self) -> dict[str, Any]:
        """The ``tokenizer.json`` that makes the same of a text."""
        language = not self.suffix_ids

        def token(i: int, kind: int) -> dict[str, Any]:
            return {"SpecialToken": {"id": self.symbols[i], "type_id": kind}}

        def sequence(name: str, kind: int) -> dict[str, Any]:
            return {"Sequence": {"id": name, "type_id": kind}}

        single = [token(START, 0), sequence("A", 0)] + ([] if language else [token(END, 0)])
        pair = [*single, sequence("B", 1)] + ([] if language else [token(END, 1)])
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
                "single": single,
                "pair": pair,
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
        names = {f"{name}_token": text for name, text in self.special_tokens.items()}
        inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if self.suffix_ids else [])
        return {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs, **names}
