"""What a side costs: parameters, products one by one, seconds, bytes by part and on disk."""

import math
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from minilora.spec.lora import TrainableSpec, Weights, merge
from minilora.spec.models import Batch, logits
from minilora.spec.ops import Array
from minilora.studies.claims.study import Side, Study, run_of, sides_of, size, studied_model
from minilora.training.batching import batches_of
from minilora.training.checkpointing import prepared
from minilora.training.checkpoints import TrainState
from minilora.training.kernels import forward_kernels, loss
from minilora.training.loop import train_steps
from minilora.training.result import write_result
from minilora.training.run import Run
from minilora.training.threads import blas_threads


class Counted(Array):
    """An array that notes the shapes of every matrix product that it comes into."""

    products: ClassVar[list[tuple[int, ...]]] = []
    __array_priority__ = 1  # so that np.concatenate gives this type, too

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [np.asarray(v) if isinstance(v, Counted) else v for v in inputs]
        if "out" in options:
            options["out"] = tuple(np.asarray(v) for v in options["out"])
        y = getattr(ufunc, method)(*plain, **options)
        if ufunc is np.matmul:
            Counted.products.append((*y.shape, plain[0].shape[-1]))
        return y.view(Counted) if isinstance(y, np.ndarray) else y


def products_of(work: Callable[[Weights], Any], W: Mapping[str, Array]) -> list[tuple[int, ...]]:
    """The shapes of every matrix product in ``work``, of the weights as arrays that note them.

    Each is the result's shape and, last, how many products each entry sums.
    """
    Counted.products.clear()
    with blas_threads(1):
        work({name: np.asarray(w).view(Counted) for name, w in W.items()})
    return list(Counted.products)


def flops_of(products: Iterable[tuple[int, ...]]) -> int:
    """Their multiplications and additions."""
    return sum(2 * math.prod(shape) for shape in products)


@dataclass(frozen=True)
class Cost:
    """What a side costs on a model.

    ``trained`` of ``whole`` parameters; ``flops`` of a step's products, counted; ``seconds`` of
    each round's step, in turn with full fine-tuning's; ``memory`` in bytes by part: weights,
    gradients and optimizer by their arrays' sizes, activations as traced between the forward and
    the backward; ``disk``: bytes of the result's files. ``forward``: FLOPs of the base's forward,
    of the adapted model's and of the merged one's. ``other``: how many of the merged model's
    products and weights are not those of the base in number, shape and dtype, and of its logits'
    entries have other bits than those of a model that never had an adapter and has its weights.
    """

    model: str
    side: Side
    trained: int
    whole: int
    flops: int
    seconds: tuple[float, ...]
    memory: Mapping[str, int]
    disk: int
    forward: tuple[int, int, int]
    other: int


PARTS = ("weights", "gradients", "optimizer", "activations")
"""Of the memory."""


def memory_of(run: Run, batch: Batch) -> dict[str, int]:
    """The bytes of each of `PARTS` in a step."""
    c, W = run.base.config, run.weights(run.initial)
    own = sum(w.nbytes for w in run.initial.values())
    unchanged = sum(W[name].nbytes for name in W if name not in run.initial)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        held = loss(batch, prepared(W, c, run.spec), c, run.spec)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del held
    sizes = (unchanged + own, own, 2 * own, max(0, after - before))
    return dict(zip(PARTS, sizes, strict=True))


def inference_of(run: Run, batch: Batch) -> tuple[tuple[int, int, int], int]:
    """``Cost.forward`` and ``Cost.other``, with an adapter whose B is not zero."""
    c, base = run.base.config, {name: np.asarray(w) for name, w in run.base.weights.items()}
    still = replace(run.spec, trained=frozenset(), dropout_scale={})
    rng = np.random.default_rng(0)
    moved = {
        name: w + np.asarray(0.01 * rng.standard_normal(w.shape), w.dtype)
        for name, w in run.initial.items()
    }
    W = {name: np.asarray(w) for name, w in run.weights(moved).items()}
    merged: Weights = dict(merge(W, run.spec)) if run.lora is not None else W

    def forward(tuning: TrainableSpec) -> Callable[[Weights], Any]:
        return lambda held: logits(batch, held, c, tuning, forward_kernels(c))

    plain, adapted, one = (
        products_of(forward(tuning), held)
        for held, tuning in ((base, TrainableSpec()), (W, still), (merged, TrainableSpec()))
    )
    kinds = [{n: (w.shape, w.dtype) for n, w in held.items()} for held in (base, merged)]
    names = kinds[0].keys() | kinds[1].keys()
    differ = sum(kinds[0].get(name) != kinds[1].get(name) for name in names)
    differ += sum(a != b for a, b in zip(plain, one, strict=False))
    copies = {name: w.copy() for name, w in merged.items()}
    z, again = (
        np.ascontiguousarray(forward(TrainableSpec())(held)[0]).view(np.uint8)
        for held in (merged, copies)
    )
    differ += abs(len(plain) - len(one)) + int((z != again).sum())
    return (flops_of(plain), flops_of(adapted), flops_of(one)), differ


def timed(runs: Sequence[Run], rounds: int) -> list[list[float]]:
    """The seconds of each run's steps, in turn, after one to warm up."""
    following = [train_steps(run, TrainState(run.initial)) for run in runs]
    taken: list[list[float]] = [[] for _ in runs]
    for i in range(rounds + 1):
        for own, steps in zip(taken, following, strict=True):
            started = time.perf_counter()
            next(steps)
            if i:
                own.append(time.perf_counter() - started)
    return taken


def costs_of(study: Study, model: str) -> list[Cost]:
    """What each side costs on the study's model."""
    studied = studied_model(study, model)
    sides = sides_of(study, studied.base.config)
    runs = [run_of(studied, study, side) for side in sides]
    longer = [replace(run, config=replace(run.config, max_steps=study.rounds + 1)) for run in runs]
    taken = timed(longer, study.rounds)
    batches = [batches_of(run.data.train, study.tokens, 0)[0] for run in runs]
    return [_cost(model, *one) for one in zip(sides, runs, batches, taken, strict=True)]


def _cost(model: str, side: Side, run: Run, batch: Batch, seconds: Sequence[float]) -> Cost:
    c, whole = run.base.config, size(run.base.weights.values())
    W = dict(run.weights(run.initial).items())

    def step(held: Weights) -> Any:
        return loss(batch, prepared(held, c, run.spec), c, run.spec)[1](1.0)

    flops = flops_of(products_of(step, W))
    forward, other = inference_of(run, batch)
    return Cost(
        model, side, size(run.initial.values()), whole, flops, tuple(seconds),
        memory_of(run, batch), disk_of(run), forward, other,
    )  # fmt: skip


def disk_of(run: Run) -> int:
    """The bytes of the result's files; of a large model, which is not written, its weights'."""
    if run.lora is None and run.base.reference is None:
        return sum(w.nbytes for w in run.initial.values())
    with tempfile.TemporaryDirectory() as folder:
        write_result(folder, run, run.initial)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
