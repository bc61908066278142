"""``minilora generate``: text after a prompt, or an answer to a message."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from minilora.cli.commands import computing_model
from minilora.cli.console import OK, say
from minilora.cli.options import add_command, add_model, at_least, kinds_of

if TYPE_CHECKING:
    from minilora.io.formats.tokenizers import Tokenizer

MAX_NEW_TOKENS = 64
"""The default of ``--max-new-tokens``, if the model has positions for them."""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "generate",
        "generate text from a prompt, or answer a message",
        "Print what a language model, with or without an adapter, generates after a prompt, or "
        "answers to a message in its chat template.",
        _run,
    )
    option = parser.add_argument
    add_model(option)
    whole, real, _ = kinds_of(option)
    option("--prompt", metavar="TEXT", help="the beginning of the text (default: empty)")
    option("--chat", metavar="TEXT", help="a message to answer")
    tokens = f"maximum tokens to generate (default: {MAX_NEW_TOKENS}, or as many as fit)"
    whole("--max-new-tokens", help=tokens)
    temperature = "sampling temperature; 0 takes the most probable token"
    real("--temperature", default=0.0, help=temperature)
    top_k = "sample from the K most probable tokens; 0 from all"
    whole("--top-k", default=0, metavar="K", help=top_k)
    top_p = "sample from the most probable tokens whose probabilities sum to P"
    real("--top-p", default=1.0, metavar="P", help=top_p)
    whole("--seed", default=0, help="seed of the samples")


def _run(arguments: argparse.Namespace) -> int:
    from minilora.training.generate import Sampling, fitting, generate

    if arguments.prompt is not None and arguments.chat is not None:
        raise ValueError("--prompt and --chat: expected one of the two")
    at_least(arguments, max_new_tokens=1, seed=0)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    model = computing_model(arguments)
    base, tokenizer = model.base, model.base.tokenizer
    if not base.config.causal:
        name = type(base.config).__name__
        raise ValueError(f"a {name} generates no text: expected a language model")
    prompt = _prompt_tokens(arguments, tokenizer)
    max_new_tokens = arguments.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = fitting(base.config, len(prompt), MAX_NEW_TOKENS)
    say(arguments.prompt or "")
    prompt_text = tokenizer.decode(prompt)
    generated: list[int] = []
    printed = ""
    for row in generate(
        [prompt], model.weights, base.config, model.tuning, max_new_tokens=max_new_tokens,
        stop=tokenizer.stop_ids, sampling=sampling, seed=arguments.seed,
    ):  # fmt: skip
        generated += [token for token in row if token is not None]
        text = tokenizer.decode([*prompt, *generated]).removeprefix(prompt_text)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a part of a character
            say(text.removeprefix(printed))
            printed = text
    say("\n")
    return OK


def _prompt_tokens(arguments: argparse.Namespace, tokenizer: Tokenizer) -> list[int]:
    """The tokens of the prompt or the chat; by default the token that begins a text."""
    if arguments.chat is not None:
        message = {"role": "user", "content": arguments.chat}
        return tokenizer.encode(tokenizer.chat([message], generate=True), special=False)
    prompt = [*tokenizer.prefix_ids, *tokenizer.encode(arguments.prompt or "", special=False)]
    first = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    return prompt or ([] if first is None else [first])
