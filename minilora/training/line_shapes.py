"""The shapes that a line of data may have: its keys, and the examples made of them.

A new shape is a function from an encoder and a line to examples, and an entry in `SHAPES`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from minilora.io.errors import listed
from minilora.spec.ops import IGNORED
from minilora.training.encoding import Encoded, Encoder
from minilora.training.example import InvalidLine

INSTRUCTION = "### Instruction:\n{}\n\n"
INPUT = "### Input:\n{}\n\n"
RESPONSE = "### Response:\n"
"""How an instruction is written for a model without a chat template."""

SUMMARIZE = "Summarize this text.\n\n{}"
SUMMARY = "{}\n\nSummary:"
"""How a summary is asked for, with a chat template and without."""

Row = Mapping[str, Any]


def _string(row: Row, key: str, empty: bool = False) -> str:
    value = row.get(key, "") if empty else row[key]
    if not isinstance(value, str):
        raise InvalidLine(f"{key}: {value!r}", f"a text as {key}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidLine(f"{key} with half of a surrogate pair", "whole characters") from None
    if not empty and not value.strip():
        raise InvalidLine(f"an empty {key}", f"a {key} that is not blank")
    return value


def _integers(row: Row, key: str) -> list[int]:
    value = row[key]
    if not (
        isinstance(value, list)
        and value
        and all(type(i) is int and -(2**31) <= i < 2**31 for i in value)
    ):
        raise InvalidLine(f"{key}: {value!r}", f"a list of whole numbers as {key}, not empty")
    return value


def label_of(row: Row) -> str | int:
    """The line's label, a name or a number."""
    label = row["label"]
    if type(label) is int or (isinstance(label, str) and label.strip()):
        return label
    raise InvalidLine(f"label: {label!r}", "a whole number or a name as label")


def _text(encoder: Encoder, row: Row) -> Encoded:
    return encoder.pieces(encoder.encode(_string(row, "text")))


def _prompt(encoder: Encoder, row: Row) -> Encoded:
    return encoder.example(*encoder.completion(_string(row, "prompt"), _string(row, "completion")))


def _instruction(encoder: Encoder, row: Row) -> Encoded:
    instruction, given_input = _string(row, "instruction"), _string(row, "input", empty=True)
    prompt = INSTRUCTION.format(instruction)
    prompt += INPUT.format(given_input) if given_input.strip() else ""
    return encoder.example(*encoder.completion(prompt + RESPONSE, _string(row, "output")))


SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
"""The speakers of ShareGPT's conversations, and their roles."""


def _conversations(encoder: Encoder, row: Row) -> Encoded:
    """ShareGPT's form: a list of {"from", "value"}."""
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise InvalidLine(f"conversations: {turns!r}", "a list of turns, not empty")
    messages = []
    for i, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not turn.keys() >= {"from", "value"}:
            if isinstance(turn, dict) and turn.keys() >= {"role", "content"}:
                messages.append(turn)
                continue
            raise InvalidLine(f"turn {i}: {turn!r}", "an object with from and value")
        if turn["from"] not in SPEAKERS:
            raise InvalidLine(
                f"in turn {i} from: {turn['from']!r}", f"one of {listed(SPEAKERS, 20)}"
            )
        messages.append({"role": SPEAKERS[turn["from"]], "content": turn["value"]})
    return _messages(encoder, {"messages": messages})


def _plain_content(message: Any) -> Any:
    """The message with a content of text parts as one text; any other as it is."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    parts = [part.get("text") if isinstance(part, dict) else None for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    return {**message, "content": "".join(texts)} if len(texts) == len(content) > 0 else message


def _messages(encoder: Encoder, row: Row) -> Encoded:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise InvalidLine(f"messages: {messages!r}", "a list of messages, not empty")
    messages = [_plain_content(message) for message in messages]
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not message.keys() >= {"role", "content"}:
            raise InvalidLine(f"message {i}: {message!r}", "an object with role and content")
        try:
            _string(message, "role")
            _string(message, "content", empty=message["role"] != "assistant")
        except InvalidLine as error:
            raise InvalidLine(f"in message {i} {error.args[0]}", *error.args[1:]) from None
    if all(message["role"] != "assistant" for message in messages):
        roles = listed({message["role"] for message in messages})
        raise InvalidLine(f"messages of {roles}", "at least one of the assistant")
    return encoder.example(*encoder.chat(messages))


def _turns(prompt: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _prompt_as_chat(encoder: Encoder, row: Row) -> Encoded:
    turns = _turns(_string(row, "prompt"), _string(row, "completion"))
    return encoder.example(*encoder.chat(turns))


def _instruction_as_chat(encoder: Encoder, row: Row) -> Encoded:
    prompt, given_input = _string(row, "instruction"), _string(row, "input", empty=True)
    prompt += f"\n\n{given_input}" if given_input.strip() else ""
    return encoder.example(*encoder.chat(_turns(prompt, _string(row, "output"))))


def _summary(encoder: Encoder, row: Row, key: str) -> Encoded:
    text, summary = _string(row, key), _string(row, "summary")
    if encoder.tokenizer.chat_template is not None:
        return encoder.longest(
            text, lambda part: encoder.chat(_turns(SUMMARIZE.format(part), summary))
        )
    answer = f" {summary.lstrip()}"
    return encoder.longest(text, lambda part: encoder.completion(SUMMARY.format(part), answer))


def _ids(encoder: Encoder, row: Row) -> Encoded:
    ids = _token_ids(encoder, row)
    labels = _integers(row, "labels") if "labels" in row else ids
    if len(labels) != len(ids):
        raise InvalidLine(f"{len(labels)} labels of {len(ids)} ids", "as many of both")
    for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (token, IGNORED):
            expected = f"the token itself, {token}, or {IGNORED}: the model shifts them"
            raise InvalidLine(f"labels[{i}]: {label}", expected)
    return encoder.example(ids, [label != IGNORED for label in labels])


def _token_ids(encoder: Encoder, row: Row) -> list[int]:
    ids = _integers(row, "ids")
    low, high = min(ids), max(ids)
    tokenizer = encoder.tokenizer_or_none
    vocab = None if tokenizer is None else tokenizer.vocab
    if low < 0 or (vocab is not None and high >= vocab):
        expected = "token ids from 0" + ("" if vocab is None else f" to {vocab - 1}")
        raise InvalidLine(f"ids from {low} to {high}", expected, "use this model's tokenizer")
    return ids


def _class_of_ids(encoder: Encoder, row: Row) -> Encoded:
    ids = _token_ids(encoder, row)
    types = _integers(row, "types") if "types" in row else None
    if types is not None and len(types) != len(ids):
        raise InvalidLine(f"{len(types)} types of {len(ids)} ids", "as many of both")
    return encoder.classified(ids[: encoder.max_length], types), len(ids) > encoder.max_length


def _class_of_text(encoder: Encoder, row: Row) -> Encoded:
    t = encoder.tokenizer
    parts = [encoder.encode(_string(row, key)) for key in ("text", "text_pair") if key in row]
    special = (
        [t.prefix_ids, t.suffix_ids]
        if len(parts) == 1
        else [t.prefix_ids, t.separator_ids, t.suffix_ids]
    )
    room = encoder.max_length - sum(map(len, special))
    if room < len(parts):
        least = encoder.max_length + len(parts) - room
        raise ValueError(f"max_length {encoder.max_length}: expected at least {least}")
    cut = sum(map(len, parts)) > room
    if cut and len(parts) == 2:  # cut the longer one, and both if neither fits into half
        shorter = min(*map(len, parts), room // 2)
        first = room - shorter if len(parts[0]) > len(parts[1]) else shorter
        parts = [parts[0][:first], parts[1][: room - first]]
    ids = [*special[0], *parts[0][:room], *special[1]]
    if len(parts) == 1:
        return encoder.classified(ids, None), cut
    second = [*parts[1], *special[2]]
    types = [0] * len(ids) + [t.second_type] * len(second)
    return encoder.classified(ids + second, types), cut


Shape = Callable[[Encoder, Row], Encoded]
_OF_IDS: dict[tuple[str, ...], Shape] = {("ids",): _ids}
SHAPES: dict[str, dict[tuple[str, ...], Shape]] = {
    "lm": {
        ("text",): _text,
        ("prompt", "completion"): _prompt,
        ("instruction", "output"): _instruction,
    }
    | _OF_IDS,
    "chat": {
        ("messages",): _messages,
        ("conversations",): _conversations,
        ("prompt", "completion"): _prompt_as_chat,
        ("instruction", "output"): _instruction_as_chat,
    }
    | _OF_IDS,
    "classify": {("text", "label"): _class_of_text, ("ids", "label"): _class_of_ids},
    "summarize": {
        ("document", "summary"): partial(_summary, key="document"),
        ("text", "summary"): partial(_summary, key="text"),
    }
    | _OF_IDS,
}
"""For each task the shapes of a line: its keys, and the function that makes examples of it.

``instruction`` may have an ``input`` beside it, a classified ``text`` a second one, ``text_pair``,
``ids`` their ``labels`` or ``types``. Other keys are ignored.
"""

TASKS = tuple(SHAPES)
"""Continue a text, answer in a chat, classify a text, summarize it."""
