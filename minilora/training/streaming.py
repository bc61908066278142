"""Generated text, piece by piece as it becomes certain; and chats with a history."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from minilora.io.loading import AdaptedModel
from minilora.training.encoding import date_of
from minilora.training.generate import Sampling, fitting, generate
from minilora.training.kv_cache import KVCache

PART = "\N{REPLACEMENT CHARACTER}"
"""What a part of a character decodes to: its other bytes are in later tokens."""


@dataclass(frozen=True)
class Settings:
    """How text is generated: at most ``max_new_tokens``, or else ``usual``, if there is room.

    It ends at a token that ends a text, or before one of the texts ``stop``.

    Errors: ValueError for an empty text in ``stop``.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    usual: int = 64
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if "" in self.stop:
            raise ValueError("stop '': expected a text, at which the answer ends")


class Writing:
    """The text that a model writes after the tokens ``prompt``, as an iterator of its pieces.

    A piece is given once it is certain: nothing of a stop text, no part of a character. Afterwards
    ``tokens`` and ``seconds`` say what it took; ``cut``: it ended for want of new tokens.
    ``cache`` and ``cached`` are those of `generate.generate`.

    Errors: those of `generate.generate`, at the first piece.
    """

    def __init__(
        self,
        model: AdaptedModel,
        prompt: Sequence[int],
        settings: Settings,
        cache: KVCache | None = None,
        cached: int = 0,
    ) -> None:
        self.model, self.prompt, self.settings = model, prompt, settings
        self.cache, self.cached = cache, cached
        self.ids: list[int] = []
        self.seconds, self.cut, self.text = 0.0, False, ""

    @property
    def tokens(self) -> int:
        """How many were drawn."""
        return len(self.ids)

    @property
    def read(self) -> list[int]:
        """The tokens that the cache holds: the last one drawn has not been read."""
        return [*self.prompt, *self.ids[:-1]] if self.ids else []

    def __iter__(self) -> Iterator[str]:
        started, before = time.perf_counter(), ""
        try:
            for text in self._texts():
                self.text = text
                if text != before:
                    yield text[len(before) :]
                before = text
        finally:
            self.seconds = time.perf_counter() - started

    def _texts(self) -> Iterator[str]:
        """What is certain of the text, after each token."""
        model, prompt, settings = self.model, [*self.prompt], self.settings
        c, tokenizer = model.base.config, model.base.tokenizer
        most = settings.max_new_tokens
        if most is None:
            most = fitting(c, len(prompt), settings.usual)
        before, text, ids = tokenizer.decode(prompt), "", self.ids
        for (token,) in generate(
            [prompt], model.weights, c, model.tuning, max_new_tokens=most,
            stop=tokenizer.stop_ids, sampling=settings.sampling, seed=settings.seed,
            cache=self.cache, cached=self.cached,
        ):  # fmt: skip
            assert token is not None  # a single row ends with its first stop
            ids.append(token)
            text = tokenizer.decode([*prompt, *ids]).removeprefix(before).rstrip(PART)
            ends = [at for stop in settings.stop if (at := text.find(stop)) >= 0]
            if ends:
                yield text[: min(ends)]
                return
            yield text[: len(text) - _held(text, settings.stop)]
        self.cut = ids[-1] not in tokenizer.stop_ids
        yield text


def _held(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of the text may begin a stop text."""
    ends = (n for one in stop for n in range(1, len(one)) if text.endswith(one[:n]))
    return max(ends, default=0)


class Chat:
    """A chat with a model: ``messages`` so far, each answer one of them.

    ``system`` is the system prompt, which stays when the chat is `reset`. What a prompt has in
    common with the one before is not read again. ``date`` is the date that the template sees,
    YYYY-MM-DD; by default it is the clock's.

    Errors: ValueError without a chat template, and for a date that is none.
    """

    def __init__(
        self,
        model: AdaptedModel,
        settings: Settings,
        system: str | None = None,
        date: str | None = None,
    ) -> None:
        self.model, self.settings, self.system = model, settings, system
        self.today = None if date is None else date_of(date)
        self.messages: list[Mapping[str, str]]
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the system prompt."""
        self.messages, self.cache = [], KVCache()
        self.read: list[int] = []
        if self.system is not None:
            self.messages = [{"role": "system", "content": self.system}]

    def prompt(self) -> list[int]:
        """The tokens of the messages, and of what begins an answer."""
        tokenizer = self.model.base.tokenizer
        return tokenizer.encode(tokenizer.chat(self.messages, True, self.today), special=False)

    def ask(self, text: str) -> Writing:
        """The answer to a message; `keep` takes it into the history.

        Errors: ValueError if the template refuses the messages; the message is then forgotten.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self.prompt()
        except ValueError:
            self.forget()
            raise
        alike = (a == b for a, b in zip(self.read, prompt[:-1], strict=False))
        cached = sum(takewhile(bool, alike))
        self.cache.cut(cached)
        self.read = prompt[:cached]
        return Writing(self.model, prompt, self.settings, self.cache, cached)

    def keep(self, answer: Writing) -> None:
        """Take the answer, or what there is of it, into the history, without blanks around it."""
        self.read = answer.read
        self.messages.append({"role": "assistant", "content": answer.text.strip()})

    def forget(self) -> None:
        """Take back the last message, which has no answer."""
        self.messages.pop()
