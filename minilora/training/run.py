"""A training run before its first step: the model, its fresh adapters, the data, the settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from minilora.io.architectures import internal_targets
from minilora.io.errors import FormatError
from minilora.io.loading import AdaptedModel, Base, weights_with
from minilora.spec import adalora
from minilora.spec.initialization import INITIALIZATIONS
from minilora.spec.lora import Params, TrainableSpec, Weights, is_base
from minilora.spec.models import Config
from minilora.spec.optim import loraplus_rates
from minilora.spec.target_modules import LoraConfig, inject, resolve_targets
from minilora.training.batching import one_window, order
from minilora.training.config import TrainConfig
from minilora.training.example import SPLITS, Data, Example
from minilora.training.gradients import ExecutionPlan


@dataclass(frozen=True, eq=False)
class Run:
    """What a run works on and does not change: the model, the data, the settings.

    ``frozen`` are the base's weights, with those that the start of the adapters has changed;
    ``adapter`` all parameters of the adapters; ``initial`` the parameters that are trained, as
    they start; ``lora`` is None in full fine-tuning. ``source`` names the data. ``settings`` are
    recorded in the run's folder. ``plan`` says how a step is executed, and changes no result.
    """

    base: Base
    data: Data
    config: TrainConfig
    frozen: Params
    adapter: Weights
    initial: Weights
    spec: TrainableSpec
    lora: LoraConfig | None
    source: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    plan: ExecutionPlan = field(default_factory=ExecutionPlan)

    @property
    def c(self) -> Config:
        """The model's configuration."""
        return self.base.config

    @cached_property
    def pad(self) -> int:
        """The token that pads the shorter sequences of a batch; 0 if there is no tokenizer."""
        try:
            return self.base.tokenizer.pad
        except (FormatError, ImportError):
            return 0

    def weights(self, params: Params) -> Params:
        """All weights of the model, with these values of the trained parameters."""
        return weights_with(self.frozen, {**self.adapter, **params})

    def examples(self, split: str) -> Sequence[Example]:
        """The examples of a split: "train", "valid" or "test"."""
        examples: Sequence[Example] = getattr(self.data, split)
        return examples

    def micro_batches(self, epoch: int) -> list[list[int]]:
        """The indices of the training examples in each micro-batch of an epoch, in order."""
        return micro_batches(self.data.train, self.config, epoch)

    @cached_property
    def total_steps(self) -> int:
        """The number of optimizer steps."""
        return total_steps(self.data.train, self.config)

    @cached_property
    def learning_rates(self) -> dict[str, float]:
        """The learning rate of each parameter, before the scheduler."""
        config = self.config
        return loraplus_rates(sorted(self.initial), config.learning_rate, config.lr_ratio)

    @cached_property
    def adalora_plan(self) -> adalora.BudgetPlan | None:
        """When AdaLoRA prunes, and to which rank; None for other variants."""
        modules = sum(name.endswith(".E") for name in self.initial)
        return adalora.plan_budget(self.config.rank, modules, self.total_steps) if modules else None


def micro_batches(examples: Sequence[Example], config: TrainConfig, epoch: int) -> list[list[int]]:
    """The indices of the examples in each micro-batch of an epoch, in order."""
    return order(examples, config.batch_tokens, config.seed, epoch)


def total_steps(examples: Sequence[Example], config: TrainConfig) -> int:
    """The number of optimizer steps: ``max_steps``, or those of all epochs."""
    if config.max_steps is not None:
        return config.max_steps
    # If all examples are sorted at once, every epoch has batches of the same shapes.
    same = one_window(examples, config.batch_tokens)
    epochs = range(1 if same else config.num_train_epochs)
    counts = (len(micro_batches(examples, config, epoch)) for epoch in epochs)
    steps = sum(-(-n // config.gradient_accumulation_steps) for n in counts)
    return steps * (config.num_train_epochs if same else 1)


def prepare(
    base: Base,
    data: Data,
    config: TrainConfig,
    source: str = "",
    plan: ExecutionPlan = ExecutionPlan(),  # noqa: B008 - it is frozen
    adapter: AdaptedModel | None = None,
    **settings: Any,
) -> Run:
    """The run that trains fresh adapters on the model, or all of its weights if ``full``.

    With ``adapter`` it goes on from that one, whose rank, scale, variant and modules it has,
    whatever ``config`` says of them. An encoder without a classifier's head gets one. ``settings``
    are recorded beside those of ``config``, such as how the data was read.

    Errors: ValueError as `target_modules.inject` has it; for a task that does not fit the model;
    for a classifier with other classes than the data; for an example longer than the model's table
    of positions.
    """
    _check_lengths(base, data, config)
    _check_task(base, config)
    if not isinstance(config.target_modules, str):
        names = internal_targets(base.config, config.target_modules)
        config = replace(config, target_modules=names)
    W = base.weights
    if adapter is not None:
        config, W = _of_adapter(config, adapter), adapter.weights
    if config.task == "classify":
        base, W = _with_head(base, W, data, config)
    _check_classes(base, data, config)
    recorded = {**vars(config), **settings}
    if config.full:
        initial = {name: np.asarray(W[name]) for name in base.config.shapes()}
        spec = TrainableSpec(trained=frozenset(initial))
        return Run(base, data, config, W, {}, initial, spec, None, source, recorded, plan)
    if adapter is not None:
        assert adapter.config is not None  # or _of_adapter has refused it
        lora = replace(adapter.config, lora_dropout=config.dropout)
        parts = {name: w for name, w in adapter.changed.items() if not is_base(name)}
        initial = {name: np.asarray(W[name]) for name in adapter.tuning.trained}
        spec = adapter.tuning
        return Run(base, data, config, W, parts, initial, spec, lora, source, recorded, plan)
    frozen, parts, initial, spec = _injected(base.config, W, config)
    lora = config.lora_config()
    return Run(base, data, config, frozen, parts, initial, spec, lora, source, recorded, plan)


def _of_adapter(config: TrainConfig, adapter: AdaptedModel) -> TrainConfig:
    """The settings with those of the adapter.

    Errors: ValueError for an adapter that cannot be trained on: without a configuration, with
    another base than the model, or with a rank that was pruned.
    """
    lora = adapter.config
    if lora is None:
        raise ValueError(
            "the adapter's format has no configuration of PEFT's: convert it by minilora convert "
            "--to peft, and go on from that"
        )
    if lora.entry.pruned or lora.entry.untrained or lora.alora_invocation_tokens:
        raise ValueError(f"the adapter has the variant {lora.variant}: no training goes on from it")
    if INITIALIZATIONS[lora.init_lora_weights].base != "kept":
        raise ValueError(
            f"the adapter started as {lora.init_lora_weights}, on a base of its own: expected one "
            "that acts on the model as it is; convert it to an adapter that does"
        )
    targets = lora.target_modules
    return replace(
        config, rank=lora.r, alpha=lora.lora_alpha, variant=lora.variant, full=False,
        allow_high_rank=True, target_modules=targets if isinstance(targets, str) else [*targets],
    )  # fmt: skip


def _injected(
    c: Config, W: Params, config: TrainConfig
) -> tuple[Params, Weights, Weights, TrainableSpec]:
    """``Run``'s frozen, adapter, initial and spec, of the model with fresh adapters."""
    _check_rank(c, config)
    lora, rng = config.lora_config(), np.random.default_rng([config.seed, 2])
    # A lazy weight is not expanded where inject reads only its shape and dtype.
    weights = {name: W[name] for name in c.shapes()} if lora.reads_weights else _placeholders(W, c)
    adapted, spec = inject(weights, lora, c.linears(), rng)
    if config.task == "classify" and "head" in spec.scale:
        raise ValueError(
            f"target_modules {config.target_modules!r} match the head: expected other modules, as "
            "the classifier's head is trained in full"
        )
    adapter = {name: w for name, w in adapted.items() if not is_base(name)}
    changed = {n: w for n, w in adapted.items() if is_base(n) and w is not weights[n]}
    initial = {n: adapter[n] if n in adapter else W[n] for n in spec.trained}
    return weights_with(W, changed), adapter, initial, spec


def _check_rank(c: Config, config: TrainConfig) -> None:
    """Errors: ValueError for a rank above the sides of a module, unless it is allowed."""
    shapes = dict(resolve_targets(config.lora_config(), c.linears()).shape)
    if config.task == "classify":
        shapes.pop("head", None)  # which is refused for another reason
    if not shapes:
        return
    at = min(shapes, key=lambda at: min(shapes[at]))
    if config.rank > min(shapes[at]) and not config.allow_high_rank:
        m, n = shapes[at]
        raise ValueError(
            f"rank {config.rank}: found a module, {at}, of {m} x {n}, expected a rank of at most "
            f"{min(m, n)}: a higher one adds parameters and no function; use a smaller rank, or "
            "--allow-high-rank (allow_high_rank)"
        )


def _placeholders(W: Params, c: Config) -> Weights:
    """Arrays of the weights' shapes and dtype that take no memory."""
    dtype = W["norm.weight"].dtype  # not a matrix, which might have to be expanded
    return {name: np.broadcast_to(dtype.type(0), shape) for name, shape in c.shapes().items()}


def _check_lengths(base: Base, data: Data, config: TrainConfig) -> None:
    longest = max((len(e.ids) for split in SPLITS for e in getattr(data, split)), default=0)
    positions = base.config.tables().get("positions", longest)
    if longest > positions:
        raise ValueError(
            f"max_length {config.max_length}: found an example of {longest} tokens, expected at "
            f"most {positions}, the model's positions: use a smaller max_length"
        )


def _check_task(base: Base, config: TrainConfig) -> None:
    causal = base.config.causal
    if (config.task == "classify") == causal:
        expected = "lm, chat or summarize" if causal else "classify"
        name = type(base.config).__name__
        raise ValueError(f"task {config.task!r} with a {name}: expected {expected}")


def _with_head(base: Base, W: Params, data: Data, config: TrainConfig) -> tuple[Base, Params]:
    """The encoder and its weights W, with a fresh classifier's head if they have none."""
    if "head.weight" in W:
        return base, W
    shape = len(data.classes), base.config.d
    base = replace(base, config=replace(base.config, classes=shape[0]))  # type: ignore[call-arg]
    random = 0.02 * np.random.default_rng([config.seed, 3]).standard_normal(shape)
    head = {"head.weight": random, "head.bias": np.zeros((shape[0], 1))}
    head = {name: w.astype(config.dtype) for name, w in head.items()}
    return base, weights_with(W, head)


def _check_classes(base: Base, data: Data, config: TrainConfig) -> None:
    classes = getattr(base.config, "classes", None)
    if config.task == "classify" and len(data.classes) != classes:
        raise ValueError(
            f"found {len(data.classes)} classes in the data and {classes} in the model: expected "
            "as many; use another model, or data of the model's classes"
        )
    if base.classes not in (None, data.classes):
        raise ValueError(
            f"found the classes {', '.join(data.classes)} in the data, expected the model's, "
            f"{', '.join(base.classes or ())}, in this order: read the data with "
            "classes=base.classes"
        )
