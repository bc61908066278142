"""Text from a model, token by token: each is drawn from the logits of those before it.

The model runs once over the prompt and then over one token at a time, with the keys and values of
the earlier ones in a `KVCache`: by the code that trains it, since a block is written once.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from minilora.spec.blocks import Op
from minilora.spec.lora import Params, TrainableSpec, project
from minilora.spec.models import Batch, Config
from minilora.spec.ops import Array, Back
from minilora.training.checkpointing import prepared
from minilora.training.kv_cache import KVCache, next_logits


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from its logits: the most probable, or by softmax(z / temperature).

    At temperature 0 it is the most probable one, the first of equals. ``top_k`` leaves the k most
    probable tokens, 0 all; ``top_p`` those that are first in sum to reach p, the one that reaches
    it among them. Both take the tokens in the order of their logits, and both may act.

    Errors: ValueError for a number outside its range.
    Source: Fan, Lewis and Dauphin 2018 for top_k; Holtzman et al. 2020 for top_p.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < np.inf:
            raise ValueError(f"temperature {self.temperature}: expected 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: expected 0, for all tokens, or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: expected more than 0, at most 1")


def probabilities(z: Array, sampling: Sampling) -> Array:
    """The probability of each token, from its logits.

    Shapes: z (v,) -> p (v,).
    Errors: ValueError for logits that are not finite.
    """
    if not np.isfinite(z).all():
        raise ValueError("logits that are not finite: the weights are no usable ones")
    p = np.zeros(len(z))
    if sampling.temperature == 0:
        p[z.argmax()] = 1
        return p
    # Of a large vocabulary only those that may stay are sorted.
    k = min(sampling.top_k or len(z), len(z))
    likely = np.flatnonzero(z >= np.partition(z, -k)[-k])  # k, and what equals the last of them
    order = likely[np.argsort(-z[likely], kind="stable")][:k]
    wide = z[order].astype(np.float64)
    with np.errstate(over="ignore"):  # -∞ of what is out of reach, at a temperature near 0
        e = np.exp((wide - wide[0]) / sampling.temperature)
    # Those before a token have not reached p together: the first always stays.
    left = np.concatenate([[0.0], np.cumsum(e)[:-1]]) < sampling.top_p * e.sum()
    p[order] = e * left
    p /= p.sum()
    return p


def draw(z: Array, sampling: Sampling, seed: int, step: int, row: int = 0) -> int:
    """The token drawn from the logits z, a function of its arguments alone.

    Shapes: z (v,).
    Errors: those of `probabilities`.
    """
    p = probabilities(z, sampling)
    if sampling.temperature == 0:
        return int(p.argmax())
    u = np.random.default_rng((seed, step, row)).random()
    # The last with a probability, should the sum round to less than u.
    return int(min(np.searchsorted(np.cumsum(p), u, side="right"), np.flatnonzero(p)[-1]))


def last(b: int) -> Op:
    """The head of the last token of each of b sequences, the only one that is asked for."""

    def head(x: Array, at: str, W: Params, tuning: TrainableSpec) -> tuple[Array, Back]:
        return project(x.reshape(len(x), b, -1)[:, :, -1], at, W, tuning)

    return head


def fitting(c: Config, given: int, most: int) -> int:
    """How many tokens may follow so many, up to ``most``: one at least, as far as positions go."""
    read = given + most - 1  # the last one drawn is not
    return max(1, most - max(0, read - c.tables().get("positions", read)))


def generate(
    prompts: Sequence[Sequence[int]],
    W: Params,
    c: Config,
    tuning: TrainableSpec,
    *,
    most: int = 64,
    stop: Collection[int] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Iterator[list[int | None]]:
    """The next token of each prompt, again and again: up to ``most``, or until all have stopped.

    A row that has drawn one of ``stop`` gives that one and then None. Prompts of several lengths
    are padded on the left, which changes no logits of theirs. The tokens after a row's end go
    through the model and reach no other row.

    Errors: ValueError without prompts, for an empty one, for a model that is not causal, and if a
    table of positions has no row for what is asked; and those of `logits`.
    """
    sampling = sampling or Sampling()
    if not prompts or not all(prompts):
        raise ValueError("an empty prompt: expected a token at least, the beginning of a text")
    longest = max(map(len, prompts))
    read = longest + most - 1  # the last one drawn is not
    room = c.tables().get("positions", read)
    if read > room:
        found = f"{longest} tokens and {most} more"
        expected = f"{room + 1} in all: the model has {room} positions, and the last needs none"
        raise ValueError(f"found {found}, expected at most {expected}")
    ids = np.zeros((len(prompts), longest), int)
    real = np.arange(longest) >= longest - np.array([[len(prompt)] for prompt in prompts])
    ids[real] = [token for prompt in prompts for token in prompt]
    cache, positions = KVCache(), np.maximum(real.cumsum(1) - 1, 0)
    frozen = replace(tuning, trained=frozenset(), dropout_scale={})
    weights = prepared(W, c, frozen)
    ended = np.zeros(len(prompts), bool)
    for step in range(most):
        batch = Batch(ids, mask=real, positions=positions)
        z = next_logits(batch, weights, c, frozen, cache, last(len(ids)))
        drawn = [draw(z[:, row], sampling, seed, step, row) for row in range(len(prompts))]
        yield [None if end else token for end, token in zip(ended, drawn, strict=True)]
        ended = ended | np.isin(drawn, list(stop))
        if ended.all():
            return
        ids, real = np.array(drawn)[:, None], np.ones((len(prompts), 1), bool)
        positions = positions[:, -1:] + 1
