"""``minilora generate``: text that goes on from a prompt, or answers."""

from __future__ import annotations

import argparse
from typing import Any

from minilora.cli.commands import computing_model
from minilora.cli.console import OK, add_command, add_model, at_least, say

TOKENS = 64
"""How many are written, if nobody says and the model has positions for them."""


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "generate",
        "let a model go on from a prompt, or answer",
        "Prints what a language model, with an adapter or without, writes after a prompt, or "
        "answers to a message by its chat template. Without a prompt it begins a text.",
        _run,
    )
    option = parser.add_argument
    add_model(option)
    option("--prompt", metavar="TEXT", help="what the text begins with")
    option("--chat", metavar="TEXT", help="a message to answer")
    option(
        "--max-new-tokens", type=int, metavar="N", help=f"at most (default: {TOKENS}, or what fits)"
    )
    option("--temperature", type=float, default=0.0, metavar="X", help="0: the most probable")
    option("--top-k", type=int, default=0, metavar="K", help="of the K most probable; 0: of all")
    option("--top-p", type=float, default=1.0, metavar="P", help="of those that reach P")
    option("--seed", type=int, default=0, metavar="N", help="of what is drawn")


def _run(arguments: argparse.Namespace) -> int:

    from minilora.training.generate import Sampling, fitting, generate

    if arguments.prompt is not None and arguments.chat is not None:
        raise ValueError("--prompt and --chat both; give one of them")
    at_least(arguments, max_new_tokens=1, seed=0)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    model = computing_model(arguments)
    base, tokenizer = model.base, model.base.tokenizer
    if not base.config.causal:
        name = type(base.config).__name__
        raise ValueError(f"a {name} writes no text; expected a language model")
    if arguments.chat is not None:
        asked = tokenizer.chat([{"role": "user", "content": arguments.chat}], generate=True)
        prompt, shown = tokenizer.encode(asked, special=False), ""
    else:
        shown = arguments.prompt or ""
        first = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
        prompt = [*tokenizer.head, *tokenizer.encode(shown, special=False)]
        prompt = prompt or ([] if first is None else [first])
    most = arguments.max_new_tokens
    if most is None:
        most = fitting(base.config, len(prompt), TOKENS)
    drawn: list[int] = []
    written = ""
    say(shown)
    before = tokenizer.decode(prompt)
    for row in generate(
        [prompt], model.weights, base.config, model.tuning, most=most,
        stop=tokenizer.stops, sampling=sampling, seed=arguments.seed,
    ):  # fmt: skip
        drawn += [token for token in row if token is not None]
        text = tokenizer.decode([*prompt, *drawn]).removeprefix(before)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character
            say(text.removeprefix(written))
            written = text
    say("\n")
    return OK
