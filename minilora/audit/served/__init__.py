"""Does a running server serve the base with the adapter? Asked by log-probabilities.

The oracle computes what the base and the base with the adapter give for the prompts on which they
differ most, and `sequential` says what follows from the server's answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from minilora.audit.result import Report
from minilora.audit.served.client import Client, ServerError
from minilora.audit.served.forms import Texts
from minilora.audit.served.prompts import Prompts, candidates
from minilora.audit.served.reference import Oracle
from minilora.audit.served.report import REMEDIES, of_interface, of_prompts, summary
from minilora.audit.served.session import Session
from minilora.io.errors import FormatError
from minilora.io.loading import open_adapted, open_base

__all__ = ["ServerError", "served"]


def served(
    url: str,
    model: str,
    base: str,
    adapter: str | None = None,
    texts: Sequence[str] | None = None,
    *,
    error: float = 1e-3,
    tokens: int = 2000,
    timeout: float = 60.0,
    key: str = "",
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Report:
    """Audit the model of this name on the server at ``url``.

    ``texts``: prompts, of which those are asked on which base and adapter differ most; texts that
    the models draw themselves if None. ``error``: the probability with which a verdict may be
    wrong; ``tokens``: how many are scored at most; ``key``: the server's, sent to it alone.

    Errors: ServerError if the server cannot be reached or its answers cannot be used; FormatError
    and ImportError as `open_base` and `open_adapted` have them; ValueError for an argument out of
    range, or a model that has no next tokens.
    """
    started = time.monotonic()
    if not 0 < error < 0.5:
        raise ValueError(f"--error {error}: expected more than 0 and less than 0.5")
    client = Client(url, timeout, key)
    listed = Session.listed_by(client)
    opened = open_base(base, np.float32)
    adapted = open_adapted(opened, adapter, np.float32)
    if not opened.config.causal:
        raise FormatError(base, "model", "an encoder", "a language model", "name another model")
    if adapted.config is not None and adapted.config.alora_invocation_tokens:
        expected = "an adapter that acts on every token"
        raise FormatError(str(adapter), "adapter", "an aLoRA", expected, "audit its files instead")
    oracle = Oracle(adapted)
    sequences, raw = candidates(oracle, texts, seed)
    prompts = Prompts(oracle, Texts(opened.tokenizer), sequences, raw)
    session = Session(client, model, oracle, prompts)
    asked, decision, evidence = session.confirmed(error, tokens, progress)
    found = summary(decision, evidence, session, error)
    wrong, right = found.severity == "deviation", found.severity == "ok"
    interface = of_interface(asked, session, listed, right)
    entries = (found, *interface, *of_prompts(asked, session))
    inputs = {"url": url, "model": model, "base": base} | ({"adapter": adapter} if adapter else {})
    return Report(
        "served",
        inputs,
        entries,
        cause=f"the server {found.text}" if wrong else "",
        remedy=REMEDIES.get(decision.serves, "") if not right else "",
        seconds=time.monotonic() - started,
    )
