"""What every tokenizer does: text to tokens and back, chats to text."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time
from functools import cached_property
from typing import Any

from minilora.io.formats.tokenizers.chat import compile_template


class Tokenizer(ABC):
    """What turns text into the tokens of one model.

    Tokens are 0 … ``vocab`` - 1. ``bos`` begins a text and ``eos`` ends it, where there are such;
    ``stop_ids`` end what is generated; ``pad`` fills up a batch. ``prefix_ids`` and ``suffix_ids``
    are the special tokens that the tokenizer writes around a text, ``separator_ids`` those between
    two texts; ``second_type`` is the token type of the second. ``special_tokens`` has the special
    tokens' texts by their names.
    """

    bos: int | None = None
    eos: int | None = None
    stop_ids: tuple[int, ...] = ()
    pad: int = 0
    vocab: int
    prefix_ids: tuple[int, ...] = ()
    separator_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    second_type: int = 1
    special_tokens: Mapping[str, str] = {}
    chat_template: str | None = None

    @abstractmethod
    def encode(self, text: str, special: bool = True) -> list[int]:
        """The text's tokens, with ``prefix_ids`` and ``suffix_ids`` if ``special``.

        Errors: ValueError if it has no tokens for the text.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of these tokens; special ones are left out unless asked for."""

    @abstractmethod
    def token_text(self, id: int) -> str:
        """The text of one token, of a special one its name."""

    @property
    def sees_date(self) -> bool:
        """Whether the chat template asks for the date, so that its text changes overnight."""
        return "strftime_now" in (self.chat_template or "")

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        generate: bool = False,
        today: date | None = None,
    ) -> str:
        """The messages as the model's template writes them, special tokens included.

        ``generate`` adds what begins an answer. ``today`` is the date that the template sees; by
        default it is the clock's, as in transformers. The template is a program from a file: it
        runs in ``jinja2``'s sandbox.

        Errors: ValueError without a template, or if it refuses the messages; ImportError without
        ``jinja2``.
        """
        values: dict[str, Any] = {
            f"{name}_token": text for name, text in self.special_tokens.items()
        }
        values |= {"messages": messages, "tools": None, "documents": None}

        def strftime_now(format: str) -> str:
            now = datetime.now() if today is None else datetime.combine(today, time.min)
            return now.strftime(format)

        values["strftime_now"] = strftime_now
        try:
            return self.render(add_generation_prompt=generate, **values)
        except (ArithmeticError, LookupError, RuntimeError, TypeError) as error:
            raise ValueError(f"the chat template fails on these messages: {error}") from error

    @cached_property
    def render(self) -> Callable[..., str]:
        """The template's function. Errors: ValueError without a template."""
        if self.chat_template is None:
            raise ValueError(
                "the model has no chat template: found neither chat_template in "
                "tokenizer_config.json nor chat_template.jinja; give prompt and completion with "
                "the task lm, or take a model that was tuned to chats"
            )
        return compile_template(self.chat_template)
