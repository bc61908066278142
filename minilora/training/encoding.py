"""Text to tokens, with the tokens that are predicted, cut to the maximum length."""

from collections.abc import Callable, Sequence
from datetime import date
from itertools import pairwise
from typing import Any

import numpy as np

from minilora.io.formats.tokenizers import Tokenizer
from minilora.training.example import Example, InvalidLine

TokensAndMask = tuple[list[int], list[bool]]
"""Tokens, and which of them are predicted."""

Encoded = tuple[list[Example], bool]
"""The examples that a line makes, and whether an end was cut off."""


WITH_TEMPLATE = ("chat", "summarize")
"""The tasks whose lines the chat template writes."""


def date_of(text: str) -> date:
    """The date of a text. Errors: ValueError unless it is one, as YYYY-MM-DD."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"date {text!r}: expected a date, as YYYY-MM-DD") from None


class Encoder:
    """Makes examples of text, none longer than ``max_length`` tokens.

    ``tokenizer`` may be None where lines hold tokens. ``train_on_prompt`` predicts prompts, too.
    ``today`` is the date that the chat template sees, by default the clock's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        max_length: int,
        train_on_prompt: bool = False,
        today: date | None = None,
    ) -> None:
        self.tokenizer_or_none, self.today = tokenizer, today
        self.max_length, self.train_on_prompt = max_length, train_on_prompt

    @property
    def tokenizer(self) -> Tokenizer:
        """Errors: ValueError without a tokenizer."""
        if self.tokenizer_or_none is None:
            raise ValueError("no tokenizer: only lines of token ids need none")
        return self.tokenizer_or_none

    def date_of(self, task: str) -> str | None:
        """The date that the template sees in lines of the task, if it looks at the date there."""
        t = self.tokenizer_or_none
        sees = task in WITH_TEMPLATE and t is not None and t.sees_date and self.today is not None
        return str(self.today) if sees else None

    def encode(self, text: str) -> list[int]:
        """The text's tokens; no special tokens are added."""
        try:
            return self.tokenizer.encode(text, special=False)
        except ValueError as error:
            raise InvalidLine(error, "text that the tokenizer can encode") from None

    def encode_parts(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of consecutive texts.

        They are those of the joined text, if its tokens begin with those of the text before. If a
        token would span the border, or the joined text cannot be encoded, the next text is encoded
        alone: this is what a model sees that is asked the one and answers the other.
        """
        parts: list[list[int]] = []
        before, ids = "", list[int]()
        for text in texts:
            before += text
            try:
                joined = self.encode(before)
                continues = joined[: len(ids)] == ids
            except InvalidLine:  # such as two words that run together
                continues = False
            parts.append(joined[len(ids) :] if continues else self.encode(text))
            ids += parts[-1]
        return parts

    def _beginning(self, ids: Sequence[int]) -> list[int]:
        """The tokens that begin a text: the tokenizer's head, unless the text contains it."""
        head = [*self.tokenizer.prefix_ids]
        return [] if [*ids[: len(head)]] == head else head

    def _ending(self, ids: Sequence[int]) -> list[int]:
        """The tokens that end a text, unless it contains them: the tokenizer's tail, or its EOS."""
        t = self.tokenizer
        end = [*t.suffix_ids] or ([] if t.eos is None else [t.eos])
        return [] if end and [*ids[-len(end) :]] == end else end

    def pieces(self, ids: list[int]) -> Encoded:
        """A text in pieces of the maximum length, which together predict each token once.

        Each begins with the head and, but for the first, with the token before it.
        """
        head = [*self.tokenizer.prefix_ids]
        room = self.max_length - len(head)
        if room < 2:
            raise ValueError(
                f"max_length {self.max_length}: expected at least {len(head) + 2}, for the "
                f"{len(head)} tokens that begin a text and two of its own"
            )
        ids = (ids if self._beginning(ids) else ids[len(head) :]) + self._ending(ids)
        examples = []
        for start in range(0, max(1, len(ids) - 1), room - 1):
            piece = head + ids[start : start + room]
            context = len(head) + (start > 0)
            examples += self.example(piece, [i >= context for i in range(len(piece))])[0]
        return examples, False

    def example(self, ids: list[int], predicted: list[bool]) -> Encoded:
        """One example, cut to the maximum length."""
        loss_mask = np.array(predicted[: self.max_length], bool)
        loss_mask[:1] = False
        if not loss_mask.any():
            if len(ids) > self.max_length:
                found = f"{len(ids) - sum(predicted)} tokens before the first predicted one"
                expected = f"fewer than max_length, {self.max_length}"
                raise InvalidLine(found, expected, "shorten it or raise max_length")
            raise InvalidLine(f"{len(ids)} tokens, none of which is predicted", "at least one")
        example = Example(np.array(ids[: self.max_length], np.int64), loss_mask)
        return [example], len(ids) > self.max_length

    def classified(self, ids: list[int], types: list[int] | None) -> list[Example]:
        """An example of a class, of which no token is predicted."""
        type_ids = None if types is None else np.array(types[: len(ids)], np.int64)
        return [Example(np.array(ids, np.int64), np.zeros(len(ids), bool), None, type_ids)]

    def completion(self, prompt: str, completion: str) -> TokensAndMask:
        """The prompt, and its completion with the end, which is predicted."""
        prompt_ids, answer_ids = self.encode_parts([prompt, completion])
        prompt_ids = [*self._beginning(prompt_ids), *prompt_ids]
        answer_ids = answer_ids + self._ending(answer_ids)
        predicted = [self.train_on_prompt] * len(prompt_ids) + [True] * len(answer_ids)
        return prompt_ids + answer_ids, predicted

    def chat(self, messages: list[dict[str, Any]]) -> TokensAndMask:
        """A chat in the template, of which the assistant's turns are predicted, up to their end.

        What the template writes before an answer is what it writes to ask for one.
        """
        texts, is_answer = [""], []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                texts.append(self._rendered(messages[:i], True, texts[-1]))
                texts.append(self._rendered(messages[: i + 1], False, texts[-1]))
                is_answer += [False, True]
        texts.append(self._rendered(messages, False, texts[-1]))
        is_answer.append(False)
        parts = self.encode_parts([b[len(a) :] for a, b in pairwise(texts)])
        ids: list[int] = []
        predicted: list[bool] = []
        for part, answer in zip(parts, is_answer, strict=True):
            stops = [i for i, token in enumerate(part, 1) if token in self.tokenizer.stop_ids]
            end = stops[-1] if stops else len(part)  # a line feed after it is the template's own
            ids += part
            predicted += [self.train_on_prompt or (answer and i < end) for i in range(len(part))]
        return ids, predicted

    def _rendered(self, messages: list[dict[str, Any]], generate: bool, before: str) -> str:
        try:
            text = self.tokenizer.chat(messages, generate, self.today)
        except ValueError as error:
            raise InvalidLine(error, "messages that the model's template accepts") from None
        if not text.startswith(before):
            i = next(i for i, (a, b) in enumerate(zip(before, text + "\0", strict=False)) if a != b)
            raise InvalidLine(
                f"a chat template that changes {before[i:][:40]!r} to {text[i:][:40]!r} after "
                f"{len(messages)} messages",
                "one that only appends when a message is added",
                "end the chat at this answer, or use prompt and completion",
            )
        return text

    def longest(self, text: str, make: Callable[[str], TokensAndMask]) -> Encoded:
        """The example of the text, or of its longest beginning that leaves the answer whole."""
        ids, predicted = make(text)
        if len(ids) <= self.max_length:
            return self.example(ids, predicted)
        n = self._longest_beginning(text, lambda n: len(make(text[:n])[0]), len(ids))
        return self.example(*make(text[:n]))[0], True

    def _longest_beginning(self, text: str, tokens_of: Callable[[int], int], tokens: int) -> int:
        """The most characters of the text with which the example fits; the whole has ``tokens``.

        Tokens are about proportional to characters: interpolate, and halve every third time.
        """
        low, low_tokens = 0, tokens_of(0)
        high, high_tokens = len(text), tokens
        step = 0
        while high - low > 1 and low_tokens < self.max_length:
            step += 1
            share = (self.max_length - low_tokens) / (high_tokens - low_tokens)
            share = 0.5 if step % 3 == 0 else share
            n = min(max(low + 1, low + int(share * (high - low))), high - 1)
            if (count := tokens_of(n)) <= self.max_length:
                low, low_tokens = n, count
            else:
                high, high_tokens = n, count
        if low < 1 or low_tokens > self.max_length:
            expected = f"one that is shorter than max_length, {self.max_length}, with its prompt"
            raise InvalidLine(
                "a summary that leaves no room for its text", expected, "raise max_length"
            )
        return low
