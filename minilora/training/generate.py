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
    """How a token is drawn from its logits: from softmax(z / temperature), or the most probable.

    Temperature 0 takes the most probable token, the first of equals. ``top_k`` keeps the k most
    probable tokens, 0 all. ``top_p`` keeps the most probable tokens until their probabilities sum
    to p. ``repetition_penalty`` θ lowers the logits of tokens that stand in the prompt or in the
    answer already: z / θ where z > 0, and else z θ. All may be combined; the penalty comes first.

    Errors: ValueError for a number out of range.
    Source: Fan, Lewis and Dauphin 2018 for top_k; Holtzman et al. 2020 for top_p; Keskar et al.
    2019, section 4.1, for the penalty, with the sign as transformers has it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < np.inf:
            raise ValueError(f"temperature {self.temperature}: expected 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: expected 0, for all tokens, or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: expected more than 0, at most 1")
        if not 0 < self.repetition_penalty < np.inf:
            found = f"repetition_penalty {self.repetition_penalty}"
            raise ValueError(f"{found}: expected more than 0; 1 changes nothing")


def probabilities(z: Array, sampling: Sampling, seen: Collection[int] = ()) -> Array:
    """The probability of each token, from its logits; ``seen`` are the tokens so far.

    Shapes: z (v,) -> p (v,).
    Errors: ValueError for logits that are not finite.
    """
    if not np.isfinite(z).all():
        raise ValueError("the logits are not finite: expected weights of a trained model")
    if sampling.repetition_penalty != 1 and seen:
        z, at, theta = z.copy(), np.unique([*seen]), sampling.repetition_penalty
        z[at] = np.where(z[at] > 0, z[at] / theta, z[at] * theta)
    p = np.zeros(len(z))
    if sampling.temperature == 0:
        p[z.argmax()] = 1
        return p
    # Only the tokens that may be kept are sorted.
    k = min(sampling.top_k or len(z), len(z))
    likely = np.flatnonzero(z >= np.partition(z, -k)[-k])  # and those equal to the k-th
    order = likely[np.argsort(-z[likely], kind="stable")][:k]
    wide = z[order].astype(np.float64)
    with np.errstate(over="ignore"):  # -∞ / temperature near 0
        e = np.exp((wide - wide[0]) / sampling.temperature)
    # A token is kept if those before it do not sum to p; the first always is.
    left = np.concatenate([[0.0], np.cumsum(e)[:-1]]) < sampling.top_p * e.sum()
    p[order] = e * left
    p /= p.sum()
    return p


def draw(
    z: Array,
    sampling: Sampling,
    seed: int,
    step: int,
    row: int = 0,
    seen: Collection[int] = (),
) -> int:
    """A token drawn from the logits z. The same arguments give the same token.

    Shapes: z (v,).
    Errors: those of `probabilities`.
    """
    p = probabilities(z, sampling, seen)
    if sampling.temperature == 0:
        return int(p.argmax())
    u = np.random.default_rng((seed, step, row)).random()
    # The last possible token, if the sum rounds to less than u.
    return int(min(np.searchsorted(np.cumsum(p), u, side="right"), np.flatnonzero(p)[-1]))


def last(b: int) -> Op:
    """A head that computes the logits of the last token of each of b sequences only."""

    def head(x: Array, at: str, W: Params, tuning: TrainableSpec) -> tuple[Array, Back]:
        return project(x.reshape(len(x), b, -1)[:, :, -1], at, W, tuning)

    return head


def fitting(c: Config, prompt: int, max_new_tokens: int) -> int:
    """As many new tokens as the model has positions for, at least 1, after ``prompt`` tokens."""
    read = prompt + max_new_tokens - 1  # the last new token is not read
    return max(1, max_new_tokens - max(0, read - c.tables().get("positions", read)))


def _check_fits(prompts: Sequence[Sequence[int]], c: Config, max_new_tokens: int) -> None:
    """Refuse no prompt, an empty one, and more tokens than the model has positions."""
    if not prompts or not all(prompts):
        raise ValueError("an empty prompt: expected at least one token")
    longest = max(map(len, prompts))
    read = longest + max_new_tokens - 1  # the last new token is not read
    positions = c.tables().get("positions", read)
    if read > positions:
        raise ValueError(
            f"max_new_tokens {max_new_tokens} after {longest} tokens: expected at most "
            f"{positions + 1} in all, as the model has {positions} positions"
        )


def padded_left(prompts: Sequence[Sequence[int]]) -> tuple[Array, Array, Array]:
    """ids, mask and positions (b, t) of the prompts, padded on the left to the longest."""
    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), int)
    real = np.arange(longest) >= longest - np.array([[len(prompt)] for prompt in prompts])
    ids[real] = [token for prompt in prompts for token in prompt]
    return ids, real, np.maximum(real.cumsum(1) - 1, 0)


def generate(
    prompts: Sequence[Sequence[int]],
    W: Params,
    c: Config,
    tuning: TrainableSpec,
    *,
    max_new_tokens: int = 64,
    stop: Collection[int] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
    cache: KVCache | None = None,
    cached: int = 0,
) -> Iterator[list[int | None]]:
    """The next token of each prompt, step by step, until all have drawn a token of ``stop``.

    A row that has drawn one gives None from then on. Prompts are padded on the left, which does not
    change their logits. ``cache`` holds the first ``cached`` columns of the prompts already, at
    most all but one, and then all tokens that are read: they may be the beginning of a next prompt.

    Errors: ValueError without prompts, for an empty one, for a model that is not causal, or if the
    model lacks positions; those of `logits`.
    """
    _check_fits(prompts, c, max_new_tokens)
    sampling = sampling or Sampling()
    cache = KVCache() if cache is None else cache
    ids, real, position_ids = (array[:, cached:] for array in padded_left(prompts))
    frozen = replace(tuning, trained=frozenset(), dropout_scale={})
    weights = prepared(W, c, frozen)
    ended, seen = np.zeros(len(prompts), bool), [set(prompt) for prompt in prompts]
    for step in range(max_new_tokens):
        batch = Batch(ids, mask=real, positions=position_ids)
        z = next_logits(batch, weights, c, frozen, cache, last(len(ids)))
        drawn = [
            draw(z[:, row], sampling, seed, step, row, so_far) for row, so_far in enumerate(seen)
        ]
        for so_far, token in zip(seen, drawn, strict=True):
            so_far.add(token)
        yield [None if end else token for end, token in zip(ended, drawn, strict=True)]
        ended = ended | np.isin(drawn, list(stop))
        if ended.all():
            return
        ids, real = np.array(drawn)[:, None], np.ones((len(prompts), 1), bool)
        position_ids = position_ids[:, -1:] + 1
