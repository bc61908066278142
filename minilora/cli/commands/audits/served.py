"""``minilora audit served``: does a running server serve the base with this adapter?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from minilora.cli.commands.audits import add_audit
from minilora.cli.options import at_least, kinds_of
from minilora.cli.progress import BytesRead

if TYPE_CHECKING:
    from minilora.audit.result import Report


def add(audits: Any) -> None:
    """Add the audit."""
    parser = add_audit(
        audits,
        "served",
        "does a running server serve the base with this adapter?",
        "Ask a server with OpenAI's interface for log-probabilities, compare them with those of "
        "the base and of the base with the adapter, and decide by a sequential test which of them "
        "it serves, or at what scale. Nothing is sent to any other address.",
        _run,
        unit=" tokens",
    )
    add = parser.add_argument
    add("--url", required=True, metavar="URL", help="the server, as http://127.0.0.1:8000")
    add("--model", required=True, metavar="NAME", help="the name of the model on the server")
    add("--base", required=True, metavar="B", help="the model that it is to serve, here on disk")
    add("--adapter", metavar="A", help="the adapter that it is to serve (default: none)")
    add(
        "--text",
        metavar="FILE",
        help="texts to ask for, one a line; the audit takes those on which base and adapter "
        "differ most (default: texts that the two draw)",
    )
    whole, real, _ = kinds_of(add)
    whole("--tokens", default=2000, help="maximum tokens to score")
    real("--error", default=1e-3, help="the probability with which the verdict may be wrong")
    real("--timeout", default=60.0, help="seconds that one request may take")
    add("--api-key-env", metavar="VAR", help="the environment variable that holds the server's key")
    whole("--seed", default=0, help="seed of the texts that are drawn")


def _run(arguments: argparse.Namespace, progress: BytesRead | None) -> Report:
    from minilora.audit.served import served
    from minilora.audit.served.client import key_of
    from minilora.audit.served.prompts import read_texts

    at_least(arguments, tokens=1, seed=0)
    if not 0 < arguments.timeout <= 86400:
        raise ValueError(f"--timeout {arguments.timeout:g}: expected more than 0, at most 86400")

    def asked(tokens: int) -> None:
        if progress is not None:
            progress(min(tokens, arguments.tokens), arguments.tokens, "at most")

    return served(
        arguments.url,
        arguments.model,
        arguments.base,
        arguments.adapter,
        read_texts(arguments.text) if arguments.text else None,
        error=arguments.error,
        tokens=arguments.tokens,
        timeout=arguments.timeout,
        key=key_of(arguments.api_key_env),
        seed=arguments.seed,
        progress=asked,
    )
