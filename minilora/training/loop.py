"""The training loop: a sequence of states, each a function of the one before.

Nothing is changed in place and nothing is written: `fit` does that around it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minilora.spec import adalora
from minilora.spec.lora import Weights, sum_gradients
from minilora.spec.models import Batch, Config
from minilora.spec.ops import Array
from minilora.spec.optim import clip, schedule
from minilora.training.batching import batch as padded
from minilora.training.checkpoints import TrainState
from minilora.training.dropout import drawn_dropout
from minilora.training.fused_adamw import fused_adamw
from minilora.training.gradients import gradients, which_count
from minilora.training.run import Run

STILL = 3
"""So many gradients of exactly 0 in a row mean that the output depends on nothing trained."""

DIVERGED = 3.0
"""The loss has diverged if it is this many times the first loss, or the loss of a uniform guess if
that is greater."""


class Diverged(ArithmeticError):
    """The loss, its gradient or a parameter is not finite, or the loss is far above the first.

    ``args``: the step, and what was found.
    """

    def __str__(self) -> str:
        step, found = self.args
        return f"step {step}: {found}"


@dataclass(frozen=True)
class Record:
    """What is logged of a step."""

    step: int
    epoch: int
    loss: float
    tokens: int
    labels: int
    learning_rate: float
    grad_norm: float


def train_steps(run: Run, state: TrainState) -> Iterator[tuple[TrainState, Record]]:
    """The states after ``state`` up to the last step, each with its record.

    A step takes the next micro-batches of its epoch, fewer at the epoch's end.

    Errors: those of :func:`train_step`; Diverged after `STILL` gradients of 0.
    """
    rows, epoch, still = run.micro_batches(state.epoch), state.epoch, 0
    while state.step < run.total_steps:
        if state.position >= len(rows):  # the batches have changed since the checkpoint
            state = replace(state, epoch=state.epoch + 1, position=0)
        if state.epoch != epoch:
            rows, epoch = run.micro_batches(state.epoch), state.epoch
        chosen = rows[state.position : state.position + run.config.gradient_accumulation_steps]
        batches = [padded([run.data.train[i] for i in row], run.pad) for row in chosen]
        state, record = train_step(run, state, batches)
        still = still + 1 if record.grad_norm == 0 and record.loss > 0 else 0
        if still == STILL:
            raise Diverged(
                record.step,
                f"the gradient is 0 in {STILL} steps, the loss {record.loss:.4g}: the output no "
                "longer depends on what is trained",
            )
        position = state.position + len(chosen)
        next_epoch, position = (epoch + 1, 0) if position >= len(rows) else (epoch, position)
        state = replace(state, epoch=next_epoch, position=position)
        yield state, record


# Overflow shows in the results, and is reported as divergence.
@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def train_step(run: Run, state: TrainState, batches: Sequence[Batch]) -> tuple[TrainState, Record]:
    """One step of AdamW on the mean loss over all labels of all micro-batches.

    Gradients are clipped to ``max_grad_norm``. With AdaLoRA they include those of its
    orthogonality penalty, which the logged loss does not, and singular values are pruned.

    Errors: ValueError if no label counts; Diverged; those of `gradients.gradients`.
    """
    config, step = run.config, state.step + 1
    labels = [which_count(batch, run.c) for batch in batches]
    loss, g = _accumulated(run, state, batches, labels)
    g, norm = clip(adalora.add_orthogonality(state.params, g), config.max_grad_norm or np.inf)
    if not (np.isfinite(loss) and np.isfinite(norm)):
        raise Diverged(step, f"the loss is {loss:g}, its gradient's norm {norm:g}")
    factor = schedule(config.lr_scheduler, state.step, run.total_steps, config.warmup_steps)
    lr = {name: rate * factor for name, rate in run.learning_rates.items()}
    params, adam = fused_adamw(state.params, g, state.adam, lr, weight_decay=config.weight_decay)
    if not all(np.isfinite(p).all() for p in params.values()):
        raise Diverged(step, "a parameter is not finite")
    params, importance = _pruned(run, state, params, g)
    loss = float(loss)
    first_loss = loss if state.first_loss is None else state.first_loss
    check_loss(step, loss, first_loss, run.c)
    tokens = sum(int(batch.real.sum()) for batch in batches)
    count = sum(int(mask.sum()) for mask in labels)
    lr_now = config.learning_rate * factor
    record = Record(step, state.epoch, loss, tokens, count, lr_now, float(norm))
    after = replace(
        state, params=params, adam=adam, step=step, tokens=state.tokens + tokens,
        first_loss=first_loss, importance=importance,
    )  # fmt: skip
    return after, record


def _pruned(
    run: Run, state: TrainState, params: Weights, g: Weights
) -> tuple[Weights, adalora.Importance]:
    """The parameters after AdaLoRA has pruned them, and the importance of its triplets."""
    if run.adalora_plan is None:
        return params, state.importance
    factors = {name: p for name, p in params.items() if name.endswith((".A", ".B", ".E"))}
    step = state.step + 1
    pruned, importance = adalora.advance(factors, g, state.importance, step, run.adalora_plan)
    return params | pruned, importance


def check_loss(step: int, loss: float, first_loss: float, c: Config) -> None:
    """Errors: Diverged if the loss is not finite or too far above the first, as `DIVERGED` says."""
    uniform_guess = math.log(getattr(c, "classes", c.vocab))
    if not loss <= DIVERGED * max(first_loss, uniform_guess):
        raise Diverged(step, f"the loss is {loss:.4g}, at first it was {first_loss:.4g}")


def _accumulated(
    run: Run, state: TrainState, batches: Sequence[Batch], labels: Sequence[Array]
) -> tuple[Any, Weights]:
    """L and {name: dL} summed over the micro-batches, each divided by the labels of all.

    ``labels``: which labels of each micro-batch count.
    """
    count = int(sum(mask.sum() for mask in labels))
    if not count:
        raise ValueError(f"step {state.step + 1}: no label counts in any of its examples")
    config, W = run.config, run.weights(state.params)
    p = 0.0 if config.full else config.dropout
    loss: Any = 0.0
    g: Weights = {}
    for i, (batch, mask) in enumerate(zip(batches, labels, strict=True)):
        if mask.any():
            draw = state.step * config.gradient_accumulation_steps + i
            scale = drawn_dropout(config.seed, draw, p, batch, run.c, run.spec, config.dtype)
            spec = replace(run.spec, dropout_scale=scale)
            loss_i, g_i = gradients(batch, W, run.c, spec, run.plan, count, mask)
            loss, g = loss + loss_i, sum_gradients(g, g_i)
    return loss, g
