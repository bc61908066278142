"""The settings that decide the result of a training run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minilora.spec import adalora
from minilora.spec.optim import schedule
from minilora.spec.target_modules import LoraConfig
from minilora.spec.variants import REGISTRY


@dataclass(frozen=True)
class TrainConfig:
    """The settings that decide the result of a run, beside the model and the data.

    Names are those of ``transformers.TrainingArguments`` and ``peft.LoraConfig`` where the meaning
    is the same. ``max_steps`` overrides ``num_train_epochs``. A step takes
    ``gradient_accumulation_steps`` micro-batches of at most ``batch_tokens`` tokens each, padding
    included. The learning rate rises over ``warmup_steps`` and then follows ``lr_scheduler``;
    that of B is ``loraplus_lr_ratio`` times as high (default: 16 with the variant "lora+", else 1).
    Gradients are clipped to the norm ``max_grad_norm``; 0 disables clipping. ``full`` trains all
    weights and no adapter. ``allow_high_rank`` takes a rank above the sides of a module. ``seed``
    decides the adapters' start, the order of the data and dropout.

    Errors: ValueError for a number out of range, or for a variant that cannot be trained.
    """

    task: str = "lm"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    layers_to_transform: Sequence[int] | None = None
    variant: str = "lora"
    full: bool = False
    allow_high_rank: bool = False
    learning_rate: float = 1e-3
    loraplus_lr_ratio: float | None = None
    lr_scheduler: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_steps: int | None = None
    num_train_epochs: int = 1
    batch_tokens: int = 1024
    gradient_accumulation_steps: int = 1
    max_length: int = 512
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype {self.dtype!r}: expected float32 or float64")
        schedule(self.lr_scheduler, 0, 1)
        entry = REGISTRY.get(self.variant)
        if entry is not None and entry.untrained and not self.full:
            raise ValueError(f"variant {self.variant!r}: {entry.untrained}")
        for name in ("target_modules", "layers_to_transform"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))  # hashable
        self.lora_config()

    def _check_numbers(self) -> None:
        for name, low in _LEAST.items():
            value = getattr(self, name)
            if value is None and name == "max_steps":
                continue
            if not isinstance(value, int | np.integer) or value < low:
                raise ValueError(f"{name} {value}: expected a whole number, {low} or more")
        for name in ("alpha", "learning_rate", "loraplus_lr_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} {value}: expected more than 0")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 or more")

    def lora_config(self) -> LoraConfig:
        """The adapters' configuration. AdaLoRA starts at a higher rank with the same scale."""
        entry = REGISTRY.get(self.variant)  # LoraConfig refuses an unknown variant
        r = adalora.initial_rank(self.rank) if entry and entry.pruned else self.rank
        return LoraConfig(
            r=r,
            lora_alpha=self.alpha * r / self.rank if r != self.rank else self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            layers_to_transform=self.layers_to_transform,
            variant=self.variant,
            modules_to_save=(r"head\..*",) if self.task == "classify" else (),
        )

    @property
    def lr_ratio(self) -> float:
        """The learning rate of B over that of the other parameters."""
        default = REGISTRY[self.variant].lr_ratio
        return default if self.loraplus_lr_ratio is None else self.loraplus_lr_ratio


_LEAST = {
    **dict.fromkeys(("rank", "num_train_epochs", "batch_tokens", "max_steps"), 1),
    "gradient_accumulation_steps": 1,
    **dict.fromkeys(("warmup_steps", "seed"), 0),
    "max_length": 2,
}
"""The least value of each whole number."""
