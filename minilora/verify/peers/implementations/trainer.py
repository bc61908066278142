"""The Trainer of transformers: its accumulation, clipping, decay, schedule and checkpointing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers

from minilora.verify.peers._torch import to_numpy
from minilora.verify.peers.implementations.peft import opened, optimizer_for, trained_of
from minilora.verify.peers.peer import refuse_settings
from minilora.verify.peers.trainer import PEER

_SETTINGS = {
    "optimizer", "lr", "betas", "eps", "weight_decay", "max_grad_norm", "schedule",
    "warmup_steps", "total_steps", "gradient_checkpointing",
    "loraplus_lr_ratio",
}  # fmt: skip

_OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd"}


class _InOrder(transformers.Trainer):
    """Micro-batches in the order that they are given in."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class _Watch(transformers.TrainerCallback):
    """Keeps what is trained after each step, and ends after the last."""

    def __init__(self, trained: Mapping[str, torch.Tensor], steps: int) -> None:
        self.trained, self.steps = trained, steps
        self.after: list[dict[str, np.ndarray]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.after.append({name: to_numpy(tensor) for name, tensor in self.trained.items()})
        control.should_training_stop = len(self.after) == self.steps


def _arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as the Trainer has them, and what keeps it from writing and reporting."""
    beta1, beta2 = settings.get("betas", (0.9, 0.999))
    return {
        "max_steps": settings["total_steps"],
        "per_device_train_batch_size": 1,
        "learning_rate": settings["lr"],
        "weight_decay": settings.get("weight_decay", 0.0),
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        "adam_epsilon": settings.get("eps", 1e-8),
        "max_grad_norm": settings.get("max_grad_norm") or 0.0,
        "lr_scheduler_type": settings.get("schedule", "constant"),
        "warmup_steps": settings.get("warmup_steps", 0),
        "optim": _OPTIMIZERS[settings.get("optimizer", "adamw")],
        "gradient_checkpointing": settings.get("gradient_checkpointing", False),
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


@PEER.describes
class OfTransformers:
    """A run of the Trainer; each micro-batch comes as it is, and no file is left."""

    def train(
        self,
        model_dir: str | Path,
        adapter_dir: str | Path,
        batches: Sequence[Sequence[Mapping[str, np.ndarray]]],
        settings: Mapping[str, Any],
    ) -> list[dict[str, np.ndarray]]:
        """What is trained after each step of Trainer.train()."""
        asked = {name for name, value in settings.items() if (name, value) != ("momentum", 0.0)}
        refuse_settings("the trainer peer", sorted(asked - _SETTINGS))
        counts = [len(step) for step in batches]
        if {*counts[:-1]} - {counts[0]} or counts[-1] > counts[0]:
            raise NotImplementedError("steps of unequal numbers of micro-batches")
        model = opened(model_dir, adapter_dir)
        trained = trained_of(model, adapter_dir)
        watch = _Watch(trained, len(batches))
        # The Trainer takes LoRA+ as an optimizer that PEFT's factory has made of the model.
        own = None
        if "loraplus_lr_ratio" in settings:
            of_optimizer = {n: v for n, v in settings.items() if n != "gradient_checkpointing"}
            own = optimizer_for(trained, of_optimizer, model)
        examples = [
            {name: torch.from_numpy(np.array(ids)) for name, ids in batch.items()}
            for step in batches
            for batch in step
        ]
        with TemporaryDirectory(prefix="minilora-") as folder:
            arguments = transformers.TrainingArguments(
                output_dir=folder,
                gradient_accumulation_steps=counts[0],
                **_arguments({"total_steps": len(batches), **settings}),
            )
            trainer = _InOrder(
                model=model,
                args=arguments,
                train_dataset=examples,
                data_collator=lambda items: items[0],
                callbacks=[watch],
                optimizers=(own, None),
            )
            trainer.train()
        return watch.after
