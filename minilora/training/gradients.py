"""The gradients of a batch, group by group: in threads, and with little memory.

The loss and the gradients of a batch are sums over its sequences. They are computed in groups, each
divided by the labels of the whole batch, and added in the order of the groups: with groups of the
same size, the number of threads and gradient checkpointing change no bit. With fewer groups than
threads, the BLAS runs the products in parallel, and its sums may differ.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from minilora.spec.lora import Params, TrainableSpec, Weights
from minilora.spec.models import Batch, Config, shifted_labels
from minilora.spec.ops import IGNORED, Array
from minilora.training.checkpointing import prepared
from minilora.training.dropout import Dropout
from minilora.training.frozen_prefix import FrozenPrefix
from minilora.training.kernels import loss
from minilora.training.memory import return_freed_memory
from minilora.training.team import ALONE, Alone
from minilora.training.threads import in_order


@dataclass(frozen=True)
class ExecutionPlan:
    """How a step is executed; the result does not depend on it, but for the order of sums.

    ``threads`` groups run at a time. A group has about ``tokens`` tokens (default: :meth:`size`),
    in whole sequences, at least one. ``gradient_checkpointing`` recomputes the activations of a
    block in its backward pass instead of keeping them. With ``prefix`` the blocks below the lowest
    trained one run once for each sequence. ``team``: the processes that share the groups.
    Errors: ValueError for less than one thread or token, or more threads than a system can have.
    """

    threads: int = 1
    tokens: int | None = None
    gradient_checkpointing: bool = False
    prefix: FrozenPrefix | None = None
    team: Alone = ALONE

    def __post_init__(self) -> None:
        for name in ("threads", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: expected at least 1")
        if self.threads > MAX_THREADS:
            raise ValueError(f"threads {self.threads}: expected at most {MAX_THREADS}")

    def entering(
        self, batch: Batch, W: Params, c: Config, tuning: TrainableSpec
    ) -> tuple[int, Array] | None:
        """The lowest block that is run, and what enters it; None if all blocks are run."""
        if self.prefix is None:
            return None
        return self.prefix.depth, self.prefix.of(batch, W, c, tuning)

    def size(self, d: int) -> int:
        """The number of tokens of a group, for a model of width d."""
        return self.tokens or max(TOKENS, (ENTRIES if self.threads == 1 else SHARED) // d)


MAX_THREADS = 2**22
"""PID_MAX_LIMIT of Linux; other systems allow fewer."""

TOKENS, ENTRIES, SHARED = 256, 3 * 2**14, 2**16
"""A group has at least so many tokens that arithmetic outweighs calls, and otherwise this many
entries of an activation, which fit into the cache; `SHARED` with several threads."""


def which_count(batch: Batch, c: Config) -> Array:
    """Which labels count: those that are not -100. Shapes: -> (b*t,) of tokens, (b,) of classes."""
    return np.asarray(shifted_labels(batch, c) != IGNORED)


def counted(batch: Batch, c: Config) -> int:
    """The number of labels that count, by which the mean loss divides."""
    return int(which_count(batch, c).sum())


def groups(
    batch: Batch, c: Config, plan: ExecutionPlan, counts: Array | None = None
) -> list[slice]:
    """The rows of the batch in groups of the plan's size, in their order.

    A group without labels that count is left out; ``counts``: which do, if known.
    """
    counts = which_count(batch, c) if counts is None else counts
    b, t = batch.ids.shape
    size = max(1, plan.size(c.d) // t)
    n = -(-b // size)
    by_rows = counts.reshape(b, -1)
    all_groups = (slice(b * i // n, b * (i + 1) // n) for i in range(n))
    return [rows for rows in all_groups if by_rows[rows].any()]


def part(batch: Batch, tuning: TrainableSpec, rows: slice) -> tuple[Batch, TrainableSpec]:
    """These rows of the batch, and their columns of the dropout masks."""
    b = len(batch.ids)
    if rows.indices(b) == (0, b, 1):
        return batch, tuning
    arrays = {f.name: getattr(batch, f.name) for f in fields(batch)}
    group = replace(batch, **{name: a[rows] for name, a in arrays.items() if a is not None})
    start, stop, _ = rows.indices(b)

    def columns(K: Array) -> Array:
        per_row = K.shape[1] // b  # t columns, or the one that a classifier pools
        return K[:, start * per_row : stop * per_row]

    scale = tuning.dropout_scale
    if isinstance(scale, Dropout):
        return group, replace(tuning, dropout_scale=scale.of(rows))
    return group, replace(tuning, dropout_scale={at: columns(K) for at, K in scale.items()})


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

    ``count``: the number of labels to divide by, if the batch is a part of a larger one;
    ``counts``: which labels count, if known.

    Errors: ValueError if no label counts; those of ``loss``.
    """
    counts = which_count(batch, c) if counts is None else counts
    in_batch = int(counts.sum())
    n = in_batch if count is None else count
    if min(in_batch, n) < 1:
        raise ValueError(f"no label counts in {len(batch.ids)} rows; expected at least one")

    if plan.gradient_checkpointing:  # memory matters more than time
        return_freed_memory()
    weights = prepared(W, c, tuning)

    def work(rows: slice) -> tuple[Any, Weights]:
        group, spec = part(batch, tuning, rows)
        prefix = plan.entering(group, weights, c, spec)
        L, back = loss(group, weights, c, spec, n, plan.gradient_checkpointing, prefix)
        return L, back(1.0)

    parts = groups(batch, c, plan, counts)
    done = in_order(work, plan.team.own(parts), plan.threads)
    L, sums = plan.team.sum_gradients(done, len(parts))
    return L, sums


def evaluate(
    batch: Batch,
    W: Params,
    c: Config,
    tuning: TrainableSpec,
    plan: ExecutionPlan = ExecutionPlan(),
) -> tuple[Any, int]:
    """The sum of the negative log-likelihoods of the labels that count, and their number.

    Without gradients and dropout, so no activation is kept after its block.

    Errors: those of ``loss``.
    """
    frozen = replace(tuning, trained=frozenset(), dropout_scale={})
    weights = prepared(W, c, frozen)

    def work(rows: slice) -> Any:
        group, spec = part(batch, frozen, rows)
        return loss(group, weights, c, spec, 1, prefix=plan.entering(group, weights, c, spec))[0]

    counts = which_count(batch, c)
    parts = groups(batch, c, plan, counts)
    done = in_order(work, plan.team.own(parts), plan.threads)
    return plan.team.sum_losses(done, len(parts)), int(counts.sum())
