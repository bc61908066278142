"""``minilora generate``: text after a prompt, an answer to a message, or a chat."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from minilora.cli.commands import computing_model
from minilora.cli.console import INTERRUPTED, OK, say
from minilora.cli.options import add_command, add_model, at_least, kinds_of

if TYPE_CHECKING:
    from minilora.io.formats.tokenizers import Tokenizer
    from minilora.io.loading import AdaptedModel
    from minilora.training.streaming import Chat, Settings, Writing

MAX_NEW_TOKENS, MAX_ANSWER = 64, 512
"""The defaults of ``--max-new-tokens``, of a text and in a chat, if the model has positions for
them."""

STDIN = "-"
"""Standard input, in the place of a text."""

HELP = "/reset begins anew, /exit or Ctrl-D ends; Ctrl-C ends an answer"


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "generate",
        "generate text from a prompt, answer a message, or chat",
        "Print what a language model, with or without an adapter, generates after a prompt, or "
        "answers to a message in its chat template. --chat without a text is a chat with a "
        f"history, a message a line: {HELP}.",
        _run,
    )
    option = parser.add_argument
    add_model(option)
    whole, real, _ = kinds_of(option)
    prompt = "the beginning of the text; - reads standard input (default: empty)"
    option("--prompt", metavar="TEXT", help=prompt)
    message = "a message to answer; - reads standard input; without TEXT, a chat"
    option("--chat", metavar="TEXT", nargs="?", const=True, help=message)
    option("--system", metavar="TEXT", help="the system prompt, before the messages")
    date = "the date that the chat template sees, YYYY-MM-DD (default: today)"
    option("--date", metavar="DATE", help=date)
    tokens = f"maximum tokens to generate (default: {MAX_NEW_TOKENS}, in a chat {MAX_ANSWER}, "
    whole("--max-new-tokens", help=tokens + "or as many as fit)")
    ends = "end before this text; may be repeated"
    option("--stop", metavar="TEXT", action="append", default=[], help=ends)
    temperature = "sampling temperature; 0 takes the most probable token"
    real("--temperature", default=0.0, help=temperature)
    top_k = "sample from the K most probable tokens; 0 from all"
    whole("--top-k", default=0, metavar="K", help=top_k)
    top_p = "sample from the most probable tokens whose probabilities sum to P"
    real("--top-p", default=1.0, metavar="P", help=top_p)
    penalty = "make tokens that have occurred less probable, such as 1.1"
    real("--repetition-penalty", default=1.0, help=penalty)
    whole("--seed", default=0, help="seed of the samples")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.prompt is not None and arguments.chat is not None:
        raise ValueError("--prompt and --chat: expected one of the two")
    if arguments.system is not None and arguments.chat is None:
        raise ValueError("--system: found no --chat, whose messages it stands before")
    if arguments.date is not None and arguments.chat is None:
        raise ValueError("--date: found no --chat, whose template sees it")
    at_least(arguments, max_new_tokens=1, seed=0)
    settings = _settings(arguments)
    model = computing_model(arguments)
    base = model.base
    if not base.config.causal:
        name = type(base.config).__name__
        raise ValueError(f"a {name} generates no text: expected a language model")
    if arguments.chat is not None:
        from minilora.training.streaming import Chat

        chat = Chat(model, settings, arguments.system, arguments.date)
        if arguments.chat is True:
            return _converse(chat)
        return _say_all(chat.ask(_text(arguments.chat)))
    prompt = _text(arguments.prompt or "")
    say(prompt)
    return _say_all(_written(model, _prompt_tokens(prompt, base.tokenizer), settings))


def _settings(arguments: argparse.Namespace) -> Settings:
    from minilora.training.generate import Sampling
    from minilora.training.streaming import Settings

    sampling = Sampling(
        arguments.temperature, arguments.top_k, arguments.top_p, arguments.repetition_penalty
    )
    usual = MAX_ANSWER if arguments.chat is True else MAX_NEW_TOKENS
    stop = tuple(arguments.stop)
    return Settings(sampling, arguments.max_new_tokens, usual, stop, arguments.seed)


def _text(given: str) -> str:
    """The text, or what stands on standard input. Errors: ValueError unless it is UTF-8."""
    if given != STDIN:
        return given
    raw = getattr(sys.stdin, "buffer", None)
    try:
        return raw.read().decode() if raw is not None else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: {error}; expected a text in UTF-8") from None


def _written(model: AdaptedModel, prompt: list[int], settings: Settings) -> Writing:
    from minilora.training.streaming import Writing

    return Writing(model, prompt, settings)


def _prompt_tokens(text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of the prompt; by default the token that begins a text."""
    prompt = [*tokenizer.prefix_ids, *tokenizer.encode(text, special=False)]
    first = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    return prompt or ([] if first is None else [first])


def _say_all(writing: Writing) -> int:
    for piece in writing:
        say(piece)
    say("\n")
    if sys.stderr.isatty():
        _say_speed(writing)
    return OK


def _say_speed(writing: Writing) -> None:
    """Print tokens per second on standard error, and whether the text was cut off."""
    tokens = f"{writing.tokens} token{'s' * (writing.tokens != 1)}"
    speed = f"{tokens}, {writing.tokens / (writing.seconds or 1e-9):.1f} tokens/s"
    cut = "; cut off: --max-new-tokens allows more" if writing.cut else ""
    print(f"[{speed}{cut}]", file=sys.stderr, flush=True)


def _messages() -> Iterator[str]:
    """The lines of a chat, until its end; at a terminal they are asked for."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with suppress(ImportError):  # Windows
        import readline  # noqa: F401 - lines can be edited, and earlier ones found
    print(HELP, file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except EOFError:
            say("\n")
            return


def _converse(chat: Chat) -> int:
    """Answer message after message. What cannot be answered is told, and the chat goes on."""
    chat.model.base.tokenizer.render  # noqa: B018 - a model without a template is refused here
    try:
        for text in _messages():
            if text.strip() == "/exit":
                break
            if text.strip() == "/reset":
                chat.reset()
            elif text.strip():
                _answer(chat, text)
    except KeyboardInterrupt:
        say("\n")
        return INTERRUPTED
    return OK


def _answer(chat: Chat, text: str) -> None:
    try:
        answer = chat.ask(text)
    except ValueError as error:
        print(f"minilora generate: {error}", file=sys.stderr)
        return
    try:
        for piece in answer:
            say(piece)
    except KeyboardInterrupt:
        if not answer.text:
            say("\n")
            chat.forget()
            return
    except ValueError as error:
        print(f"minilora generate: {error}; /reset begins anew", file=sys.stderr)
        chat.forget()
        return
    say("\n")
    chat.keep(answer)
    _say_speed(answer)
