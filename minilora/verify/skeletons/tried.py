"""Trying an adapter that was written: which of its methods answer."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.verify.core.errors import describe
from minilora.verify.skeletons.guess import ALPHA, Guess, M, R, T, values


def tried(text: str, guess: Guess) -> tuple[list[str], list[str]]:
    """The methods of an adapter's text that answer arrays, and what the others raise."""
    names: dict[str, Any] = {"__name__": "lora_adapter"}
    try:
        exec(compile(text, "lora_adapter.py", "exec"), names)
        adapter = names["Adapter"]()
    except Exception as error:
        return [], [describe(error)]
    r = guess.fixed.get("r", R)
    fixed = guess.fixed.get("alpha", ALPHA)
    alpha = r if fixed == "r" else fixed
    parts = values(r)
    weights = [parts[name] for name in ("W", "A", "B")]
    given = {
        "lora_linear": [parts["x"], *weights],
        "lora_linear_vjp": [parts["x"], *weights, np.ones((T, M))],
        "merge": weights,
        "unmerge": weights,
    }
    answer, raised = [], []
    for method, arrays in given.items():
        if not hasattr(adapter, method):
            continue
        try:
            getattr(adapter, method)(*arrays, alpha=alpha, r=r)
            answer.append(method)
        except Exception as error:
            raised.append(f"{method} raises {describe(error)}")
    return answer, raised
