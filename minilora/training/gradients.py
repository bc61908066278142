"""A step of training on whatever machine there is: groups of sequences, threads, little memory.

A batch is a sum over its sequences, and so are its loss and its gradients. They are formed group by
group, each divided by what the whole batch counts, and added up in the groups' order: of groups of
one size, how many threads work on them changes no bit, nor does it whether activations are kept or
formed again. Where there are fewer groups than threads, the products run on several, and their bits
are the library's affair.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import numpy as np

from minilora.spec.initialization import draw_dropout, input_shapes
from minilora.spec.lora import Params, TrainableSpec, Weights, sum_gradients
from minilora.spec.models import Batch, Config, shifted_labels
from minilora.spec.ops import IGNORED, Array
from minilora.training.checkpointing import prepared
from minilora.training.kernels import loss
from minilora.training.memory import return_freed_memory


@dataclass(frozen=True)
class ExecutionPlan:
    """How a step is cut up; the mathematics does not depend on it.

    ``threads``: how many groups run at a time; ``tokens``: about how many a group has, of whole
    sequences and at least one, those of :meth:`size` unless given;
    ``gradient_checkpointing``: whether a block's activations are formed again for its backward,
    from its input alone, rather than kept.
    Errors: ValueError if there is no thread, more than a system can have, or no token.
    """

    threads: int = 1
    tokens: int | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("threads", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: expected at least 1")
        if self.threads > MOST:
            raise ValueError(f"threads is {self.threads}: expected {MOST} at most")

    def size(self, d: int) -> int:
        """How many tokens a group has, of a model that is d wide."""
        return self.tokens or max(TOKENS, (ENTRIES if self.threads == 1 else SHARED) // d)


MOST = 2**22
"""Threads that there can be at a time, PID_MAX_LIMIT in Linux; elsewhere there are fewer."""

TOKENS, ENTRIES, SHARED = 256, 3 * 2**14, 2**16
"""Of a group, so many tokens at least, as its calls would cost more than its arithmetic; if these
are fewer, so many entries of an activation, as more would leave the processor's cache. Threads call
in turn, and so with more entries."""


def which_count(batch: Batch, c: Config) -> Array:
    """Which labels of the batch count: those that are not -100. Shapes: -> (b * t,) or (b,)."""
    return np.asarray(shifted_labels(batch, c) != IGNORED)


def counted(batch: Batch, c: Config) -> int:
    """How many labels of the batch count: what its mean loss is divided by."""
    return int(which_count(batch, c).sum())


def groups(
    batch: Batch, c: Config, plan: ExecutionPlan, counts: Array | None = None
) -> list[slice]:
    """The batch's rows in groups of about so many tokens as the plan says, in their order.

    A group none of whose labels counts is left out; ``counts``: which do, where that is known.
    """
    counts = which_count(batch, c) if counts is None else counts
    b, t = batch.ids.shape
    size = max(1, plan.size(c.d) // t)
    n = -(-b // size)
    by_rows = counts.reshape(b, -1)
    every = (slice(b * i // n, b * (i + 1) // n) for i in range(n))
    return [rows for rows in every if by_rows[rows].any()]


@dataclass(frozen=True)
class Dropout(Mapping[str, Array]):
    """K of each module, drawn when it is asked for: the same bits each time, and none is held.

    Every sequence of every step has masks of its own, seeded by (``seed``, ``step``, its row, the
    module's name), so that they do not depend on how a batch is cut up or resumed. ``inputs``: of
    each module the features of its input and its columns for each row; ``rows``: of the batch.
    """

    seed: int
    step: int
    p: float
    inputs: Mapping[str, tuple[int, int]]
    rows: range
    dtype: Any

    def __getitem__(self, at: str) -> Array:
        shape = {at: self.inputs[at]}
        seeds = ([self.seed, self.step, row, *at.encode()] for row in self.rows)
        rngs = map(np.random.default_rng, seeds)
        drawn = [draw_dropout(rng, self.p, shape, self.dtype)[at] for rng in rngs]
        return np.concatenate(drawn, axis=1)

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    def __contains__(self, at: object) -> bool:
        return at in self.inputs

    def of(self, rows: slice) -> "Dropout":
        """That of some rows."""
        return replace(self, rows=self.rows[rows])


def drawn_dropout(
    seed: int, step: int, p: float, batch: Batch, c: Config, tuning: TrainableSpec, dtype: Any
) -> Mapping[str, Array]:
    """``TrainableSpec.keep`` of a step: a K for each adapted projection; nothing where p is 0.

    Errors: ValueError unless 0 ≤ p < 1, and neither seed nor step is negative.
    """
    if not 0 <= p < 1 or min(seed, step) < 0:
        expected = "a rate from 0 and below 1, and both others from 0"
        raise ValueError(f"dropout {p} with seed {seed} at step {step}: expected {expected}")
    b, t = batch.ids.shape
    inputs = {at: shape for at, shape in input_shapes(c, 1, t).items() if at in tuning.scale}
    return Dropout(seed, step, p, inputs, range(b), dtype) if p else {}


def part(batch: Batch, tuning: TrainableSpec, rows: slice) -> tuple[Batch, TrainableSpec]:
    """These rows of the batch, and their columns of the dropout multipliers."""
    b = len(batch.ids)
    if rows.indices(b) == (0, b, 1):
        return batch, tuning
    arrays = {f.name: getattr(batch, f.name) for f in fields(batch)}
    own = replace(batch, **{name: a[rows] for name, a in arrays.items() if a is not None})
    start, stop, _ = rows.indices(b)

    def columns(K: Array) -> Array:
        each = K.shape[1] // b  # t columns for each row, or the one that a classifier pools
        return K[:, start * each : stop * each]

    whole = tuning.dropout_scale
    if isinstance(whole, Dropout):
        return own, replace(tuning, dropout_scale=whole.of(rows))
    return own, replace(tuning, dropout_scale={at: columns(K) for at, K in whole.items()})


@cache
def _pools(scipy: bool) -> Any:
    """The pools of threads of the linear algebra libraries: NumPy's and, once loaded, SciPy's."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def blas_threads(n: int) -> AbstractContextManager[Any]:
    """Matrix products use n threads from here on, and as many as before after a ``with`` of this.

    Where they do already, nothing is set: that takes longer than to ask.
    """
    pools = _pools("scipy.special" in sys.modules)
    already = all(pool.num_threads == n for pool in pools.lib_controllers)
    return nullcontext() if already else pools.limit(limits=n)


def in_order(work: Callable[[slice], Any], parts: list[slice], threads: int) -> Iterator[Any]:
    """``work`` of each part, given in their order, so many at a time.

    Each thread's products run on that one thread: pools inside a pool would wait for one another.
    What NumPy was told to do about overflows holds in each. Where there are fewer parts than
    threads, they run one by one and the products in parallel.
    """
    if len(parts) < threads or threads == 1:
        with blas_threads(threads):
            yield from map(work, parts)
        return
    contexts = [copy_context() for _ in parts]
    with blas_threads(1), ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda own, rows: own.run(work, rows), contexts, parts)


def gradients(
    batch: Batch,
    W: Params,
    c: Config,
    tuning: TrainableSpec,
    plan: ExecutionPlan = ExecutionPlan(),
    count: int | None = None,
    counts: Array | None = None,
) -> tuple[Any, Weights]:
    """L and {name: dL} of the batch, as `models.loss` has them, group by group.

    ``count``: what the sum is divided by, if the batch is a part of a larger one; ``counts``: which
    labels count, if that is known.

    Errors: ValueError if no label counts; those of ``loss``.
    """
    counts = which_count(batch, c) if counts is None else counts
    in_batch = int(counts.sum())
    n = in_batch if count is None else count
    if min(in_batch, n) < 1:
        raise ValueError(f"no label counts in {len(batch.ids)} rows; leave this batch out")

    if plan.gradient_checkpointing:  # memory is dearer than time
        return_freed_memory()
    weights = prepared(W, c, tuning)

    def work(rows: slice) -> tuple[Any, Weights]:
        group, spec = part(batch, tuning, rows)
        L, back = loss(group, weights, c, spec, n, plan.gradient_checkpointing)
        return L, back(1.0)

    L: Any = None
    sums: Weights = {}
    parts = groups(batch, c, plan, counts)
    for L_group, gradients_of_group in in_order(work, parts, plan.threads):
        L = L_group if L is None else L + L_group
        sums = sum_gradients(sums, gradients_of_group) if sums else gradients_of_group
    return L, sums


def evaluate(
    batch: Batch,
    W: Params,
    c: Config,
    tuning: TrainableSpec,
    plan: ExecutionPlan = ExecutionPlan(),
) -> tuple[Any, int]:
    """The sum of the negative log-likelihoods of the labels that count, and their number.

    Nothing is trained and nothing dropped, so no activation outlives its block.

    Errors: those of ``loss``.
    """
    frozen = replace(tuning, trained=frozenset(), dropout_scale={})
    weights = prepared(W, c, frozen)

    def work(rows: slice) -> Any:
        group, spec = part(batch, frozen, rows)
        return loss(group, weights, c, spec, 1)[0]

    counts = which_count(batch, c)
    return sum(in_order(work, groups(batch, c, plan, counts), plan.threads)), int(counts.sum())
