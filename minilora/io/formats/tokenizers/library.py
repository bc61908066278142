"""A tokenizer of the library ``tokenizers``."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from minilora.io.errors import listed
from minilora.io.formats.tokenizers.base import Tokenizer


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the library ``tokenizers``, and the special tokens by their names.

    It neither truncates nor pads, whatever its file says: the reader of the data does.

    Errors: ValueError if a named token is not in the vocabulary, or no text has a token.
    """

    def __init__(
        self,
        backend: Any,
        special_tokens: Mapping[str, str],
        chat_template: str | None = None,
        stop_ids: Sequence[int] = (),
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens, self.chat_template = dict(special_tokens), chat_template
        self.vocab = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        ids = {name: backend.token_to_id(text) for name, text in self.special_tokens.items()}
        if missing := [
            f"{name}_token {self.special_tokens[name]!r}" for name, i in ids.items() if i is None
        ]:
            raise ValueError(f"{listed(missing)} not in the vocabulary")
        self.bos, self.eos = ids.get("bos"), ids.get("eos")
        eos = [] if self.eos is None else [self.eos]
        self.stop_ids = tuple(dict.fromkeys([*eos, *stop_ids]))
        self.pad = next((i for i in (ids.get("pad"), *self.stop_ids) if i is not None), 0)
        self.prefix_ids, self.separator_ids, self.suffix_ids = self._around()

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The special tokens before, between and after two texts.

        Found by encoding a text that has tokens; any will do.
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
        texts = [i for i, text in enumerate(both.sequence_ids) if text is not None]
        first = [i for i in texts if both.sequence_ids[i] == 0]
        a, b, c, d = first[0], first[-1] + 1, texts[len(first)], texts[-1] + 1
        self.second_type = both.type_ids[c]
        return tuple(both.ids[:a]), tuple(both.ids[b:c]), tuple(both.ids[d:])

    def encode(self, text: str, special: bool = True) -> list[int]:  # noqa: D102
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises no kinder one
            raise ValueError(f"the tokenizer refuses {text[:40]!r}: {error}") from error
        return [*self.prefix_ids, *ids, *self.suffix_ids] if special else ids

    def decode(self, ids: Sequence[int], special: bool = False) -> str:  # noqa: D102
        return str(self.backend.decode(list(map(int, ids)), skip_special_tokens=not special))

    def files(self) -> dict[str, dict[str, Any]]:
        """The files of a Hugging Face folder that make the same tokenizer, by their names.

        Stop tokens other than ``eos`` can only be said in ``generation_config.json``.
        """
        inputs = ["input_ids", "attention_mask"]
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= {"model_input_names": inputs, "clean_up_tokenization_spaces": False}
        settings |= {f"{name}_token": text for name, text in self.special_tokens.items()}
        for name, around in (("bos", self.prefix_ids), ("eos", self.suffix_ids)):
            settings[f"add_{name}_token"] = getattr(self, name) in around
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        files = {"tokenizer.json": json.loads(self.backend.to_str())}
        files["tokenizer_config.json"] = settings
        ids = {f"{name}_token_id": getattr(self, name) for name in ("bos", "pad")}
        ids = {key: id for key, id in ids.items() if key.removesuffix("_id") in settings}
        if self.stop_ids:
            files["generation_config.json"] = {**ids, "eos_token_id": [*self.stop_ids]}
        return files

    def token_text(self, id: int) -> str:  # noqa: D102
        token = self.backend.id_to_token(int(id))
        if token is None:
            return f"<no token {id}>"
        text = str(self.backend.decode([int(id)], skip_special_tokens=False))
        if "▁" in token:  # SentencePiece's blank, which decoding drops at the start
            return str(token.replace("▁", " "))
        return text if text and "\N{REPLACEMENT CHARACTER}" not in text else str(token)
