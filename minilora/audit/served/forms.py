"""The forms in which servers with OpenAI's interface take prompts and give log-probabilities.

What a server answers is checked before it is believed: how many tokens it read and which, that
log-probabilities are numbers of at most 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from minilora.audit.served.client import Client, Refused
from minilora.io.formats.tokenizers import Tokenizer
from minilora.spec.ops import Array

GENERATED = 16
"""So many tokens are generated for a prompt, where only those of an answer are scored."""

ABOVE_ZERO = 2.0**-6
"""Half precision may round log p of a certain token to so much above 0."""

IMPOSSIBLE = -1e3
"""A log-probability below this stands for "none": servers send -9999 and the like."""


@dataclass(frozen=True)
class Prompt:
    """Tokens to send; ``text``: the text of which the base's tokenizer makes just these, or None;
    ``message``: the user's message that the chat template makes them of.
    """

    ids: tuple[int, ...]
    text: str | None = None
    message: str | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """What a server says of tokens: its log-probabilities, NaN where it says none.

    ``chosen``: the text of the token that it takes to follow, where it gives no numbers.

    Shapes: logprobs (t,) for the t tokens of ``sequence``.
    """

    sequence: tuple[int, ...]
    logprobs: Array
    chosen: str | None = None
    model: str = ""


class OtherTokens(Refused):
    """The server reads other tokens than the base's tokenizer."""


class Texts:
    """The tokens' texts, and back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def prompt(self, ids: Sequence[int]) -> Prompt:
        """The prompt of these tokens, with its text if that makes them again."""
        text = self.tokenizer.decode(list(ids))
        try:
            same = self.tokenizer.encode(text) == list(ids)
        except ValueError:
            same = False
        return Prompt(tuple(ids), text if same and text.strip() else None)

    def chat(self, text: str) -> Prompt:
        """The prompt that the chat template makes of a user's message.

        Errors: ValueError as `Tokenizer.chat` has it.
        """
        rendered = self.tokenizer.chat([{"role": "user", "content": text}], generate=True)
        return Prompt(tuple(self.tokenizer.encode(rendered, special=False)), None, text)

    def is_text_of(self, shown: str, token: int) -> bool:
        """Whether a server may show the token so; bytes of a character are not compared."""
        if shown.startswith(("token_id:", "bytes:", "<0x")) or "\ufffd" in shown:
            return shown.removeprefix("token_id:") == str(token) or "token_id:" not in shown
        own = {self.tokenizer.decode([token], special=special) for special in (True, False)}
        own.add(self.tokenizer.token_text(token))
        return any("\ufffd" in text or _plain(text) == _plain(shown) for text in own)

    def token(self, entry: Mapping[str, Any]) -> int | None:
        """The token of an entry: its id, or the only one of its text; else None."""
        for key in ("id", "token_id"):
            if type(entry.get(key)) is int:
                return int(entry[key])
        shown = entry.get("token")
        if not isinstance(shown, str):
            return None
        if (number := shown.removeprefix("token_id:")) != shown and number.isdigit():
            return int(number)
        ids = self._by_text.get(shown, [])
        return ids[0] if len(ids) == 1 else None

    @cached_property
    def _by_text(self) -> dict[str, list[int]]:
        known: dict[str, list[int]] = {}
        for i in range(self.tokenizer.vocab):
            texts = {self.tokenizer.decode([i], special=True), self.tokenizer.token_text(i)}
            for text in texts:
                known.setdefault(text, []).append(i)
        return known


def _plain(text: str) -> str:
    for sign in "Ġ▁Ċĉ":
        text = text.replace(sign, " ")
    return text.strip()


@dataclass(frozen=True)
class Form:
    """One way to ask.

    ``scores``: "prompt", the prompt's own tokens; "answer", those that are generated; or "choice",
    the text of one generated token alone. ``prompt``: what is sent of it, ``ids``, ``text`` or
    ``message``.
    """

    name: str
    scores: str
    prompt: str
    settings: Mapping[str, Any]
    read: Callable[[Any, Prompt, Texts], Answer]

    def fits(self, prompt: Prompt) -> bool:
        """Whether the prompt has what this form sends."""
        return getattr(prompt, self.prompt) is not None

    def ask(self, client: Client, model: str, prompt: Prompt, texts: Texts) -> Answer:
        """The server's answer.

        Errors: Refused if it does not answer in this form; those of `Client.ask`.
        """
        body = {"model": model, "temperature": 0, **self.settings}
        if self.prompt == "message":
            path = "/chat/completions"
            body["messages"] = [{"role": "user", "content": prompt.message}]
        else:
            path = "/completions"
            body["prompt"] = list(prompt.ids) if self.prompt == "ids" else prompt.text
        answer = client.ask(path, body)
        _check_count(answer, prompt)
        read = self.read(answer, prompt, texts)
        if read.chosen is None and np.isnan(read.logprobs).all():
            raise Refused("an answer without log-probabilities")
        return read


def _choice(answer: Any) -> Mapping[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Refused("JSON without choices")
    return choices[0]


def _check_count(answer: Any, prompt: Prompt) -> None:
    """Errors: OtherTokens if the server counts other tokens of the prompt."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if type(count) is int and count not in (0, len(prompt.ids)):
        own = f"where the base's tokenizer has {len(prompt.ids)}"
        raise OtherTokens(f"{count} tokens in a prompt {own}")


def _model(answer: Any) -> str:
    name = answer.get("model")
    return name if isinstance(name, str) else ""


def _number(value: Any) -> float:
    """A log-probability; NaN where there is none.

    Errors: Refused for what is none.
    """
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise Refused(f"{str(value)[:40]} for a log-probability")
    if value > ABOVE_ZERO:
        raise Refused(f"a log-probability of {value:g}, which is above 0")
    return math.nan if value < IMPOSSIBLE else min(float(value), 0.0)


def _entries(choice: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """An entry for each token, in the old shape (lists) or the new one (``content``)."""
    found = choice.get("logprobs")
    if not isinstance(found, dict):
        raise Refused("an answer without log-probabilities")
    if isinstance(content := found.get("content"), list):
        return [entry if isinstance(entry, dict) else {} for entry in content]
    numbers, tokens = found.get("token_logprobs"), found.get("tokens")
    if not isinstance(numbers, list):
        raise Refused("log-probabilities in an unknown shape")
    if not isinstance(tokens, list) or len(tokens) != len(numbers):
        tokens = [None] * len(numbers)
    return [{"token": t, "logprob": p} for t, p in zip(tokens, numbers, strict=True)]


def _echoed(answer: Any, prompt: Prompt, texts: Texts) -> Answer:
    entries = _entries(_choice(answer))
    n = len(prompt.ids)
    if len(entries) < n:
        raise Refused(f"log-probabilities of {len(entries)} tokens, not of the prompt's {n}")
    for entry, token in zip(entries, prompt.ids, strict=False):
        shown = entry.get("token")
        if isinstance(shown, str) and not texts.is_text_of(shown, token):
            own = texts.tokenizer.token_text(token)
            raise OtherTokens(f"the token {shown[:40]!r} where the base's tokenizer has {own!r}")
    numbers = [_number(entry.get("logprob")) for entry in entries[:n]]
    return Answer(prompt.ids, np.array([math.nan, *numbers[1:]]), None, _model(answer))


def _of_prompt(answer: Any, prompt: Prompt, texts: Texts) -> Answer:
    """vLLM's own field: for each token of the prompt an entry by the number of the token."""
    found = _choice(answer).get("prompt_logprobs", answer.get("prompt_logprobs"))
    if not isinstance(found, list):
        raise Refused("an answer without prompt_logprobs")
    if len(found) != len(prompt.ids):
        raise OtherTokens(f"prompt_logprobs of {len(found)} tokens, not of {len(prompt.ids)}")
    numbers = [math.nan]
    for entry, token in zip(found[1:], prompt.ids[1:], strict=True):
        if not isinstance(entry, dict) or not isinstance(entry.get(str(token)), dict):
            raise OtherTokens(f"no log-probability of the token {token} at its own place")
        numbers.append(_number(entry[str(token)].get("logprob")))
    return Answer(prompt.ids, np.array(numbers), None, _model(answer))


def _generated(answer: Any, prompt: Prompt, texts: Texts) -> Answer:
    ids, numbers = list(prompt.ids), [math.nan] * len(prompt.ids)
    for entry in _entries(_choice(answer)):
        number, token = _number(entry.get("logprob")), texts.token(entry)
        if token is None or not 0 <= token < texts.tokenizer.vocab:
            break  # what follows it cannot be scored
        ids.append(token)
        numbers.append(number)
    if len(ids) == len(prompt.ids):
        raise Refused("generated tokens whose numbers cannot be told by their texts")
    return Answer(tuple(ids), np.array(numbers), None, _model(answer))


def _chosen(answer: Any, prompt: Prompt, texts: Texts) -> Answer:
    choice = _choice(answer)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    if not isinstance(text, str):  # that of a special token is empty
        raise Refused("an answer without a text")
    if prompt.text and text.startswith(prompt.text):
        text = text[len(prompt.text) :]  # a server that always echoes
    return Answer(prompt.ids, np.full(len(prompt.ids), math.nan), text, _model(answer))


def _forms() -> Iterator[Form]:
    for kind, what in (("ids", "token ids"), ("text", "a text")):
        echo = {"max_tokens": 1, "echo": True, "logprobs": 1}
        yield Form(f"echo of {what}", "prompt", kind, echo, _echoed)
        field = {"max_tokens": 1, "prompt_logprobs": 0}
        yield Form(f"prompt_logprobs of {what}", "prompt", kind, field, _of_prompt)
    for kind, what in (("ids", "token ids"), ("text", "a text")):
        for logprobs in (1, True):
            settings = {"max_tokens": GENERATED, "logprobs": logprobs}
            name = f"logprobs {logprobs} of what follows {what}"
            yield Form(name, "answer", kind, settings, _generated)
    chat = {"max_tokens": GENERATED, "logprobs": True}
    yield Form("logprobs of a chat's answer", "answer", "message", chat, _generated)
    for kind, what in (("ids", "token ids"), ("text", "a text"), ("message", "a chat")):
        yield Form(f"the token that follows {what}", "choice", kind, {"max_tokens": 1}, _chosen)


FORMS = tuple(_forms())
"""The forms, those that say most first."""
