"""A model of transformers: opened, its loss and gradients, and a training loop over it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open

from minilora.findings.versions import is_in_range
from minilora.verify.peers._torch import to_numpy

_STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}

_DTYPE = "torch_dtype" if is_in_range(transformers.__version__, "<4.56") else "dtype"
"""What from_pretrained calls the dtype to load."""

# Loading a few tensors needs no progress bar, and that GPT-2 has the default loss is no news.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The one floating dtype of the safetensors files in a folder, read from their headers."""
    found = set()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    floating = found & set(_STORED)
    if len(floating) != 1:
        raise ValueError(
            f"{folder}: safetensors files of one dtype out of {', '.join(_STORED)} expected, "
            f"found {', '.join(sorted(floating)) or 'none'}; store all tensors in one of them"
        )
    return _STORED[floating.pop()]


def load_base(model_dir: str | Path) -> Any:
    """The transformers model of a folder, in the dtype that its file stores, attention eager."""
    config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True)
    config.use_cache = False
    model_class = getattr(transformers, config.architectures[0])
    return model_class.from_pretrained(
        model_dir,
        config=config,
        **{_DTYPE: stored_dtype(model_dir)},
        attn_implementation="eager",
        local_files_only=True,
    )


def loss_and_gradients(
    model: Any, batch: Mapping[str, np.ndarray], trained: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """The library's loss and logits in evaluation mode (no dropout), and each ∂loss/∂trained."""
    model.eval()
    out = model(**{name: torch.from_numpy(np.array(ids)) for name, ids in batch.items()})
    gradients = torch.autograd.grad(out.loss, list(trained.values()))
    return {
        "loss": to_numpy(out.loss.to(out.logits.dtype)),
        "logits": to_numpy(out.logits),
        "grads": {name: to_numpy(g) for name, g in zip(trained, gradients, strict=True)},
    }


def logits_of(model: Any, input_ids: np.ndarray) -> np.ndarray:
    """The library's logits in evaluation mode, without gradients."""
    with torch.no_grad():
        return to_numpy(model.eval()(input_ids=torch.from_numpy(np.array(input_ids))).logits)


def enable_checkpointing(model: Any) -> None:
    """Gradient checkpointing, by the name that transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()


def train_steps(
    model: Any,
    trained: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    batches: Sequence[Sequence[Mapping[str, np.ndarray]]],
    max_grad_norm: float | None,
) -> list[dict[str, np.ndarray]]:
    """A training loop over the library's own loss: what is trained after each step.

    Each micro-batch's mean loss is scaled by its share of the labels that count in the step.
    """
    model.train()
    after = []
    for step in batches:
        optimizer.zero_grad()
        # The first label of a text is predicted by nothing.
        labels = [batch["labels"] for batch in step]
        counts = [int(((v[:, 1:] if v.ndim > 1 else v) != -100).sum()) for v in labels]
        for batch, count in zip(step, counts, strict=True):
            if not count:  # the library's mean of no labels is NaN
                continue
            given = {name: torch.from_numpy(np.array(ids)) for name, ids in batch.items()}
            (model(**given).loss * (count / sum(counts))).backward()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), max_grad_norm)
        optimizer.step()
        scheduler.step()
        after.append({name: to_numpy(tensor) for name, tensor in trained.items()})
    return after


def scheduler_of(
    optimizer: torch.optim.Optimizer, settings: Mapping[str, Any], steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """transformers' schedule that the settings name."""
    found: torch.optim.lr_scheduler.LRScheduler = transformers.get_scheduler(
        settings.get("schedule", "constant"),
        optimizer,
        settings.get("warmup_steps", 0),
        settings.get("total_steps", steps),
    )
    return found


OPTIMIZERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "adamw": (torch.optim.AdamW, ("betas", "eps")),
    "sgd": (torch.optim.SGD, ("momentum",)),
}
"""torch's optimizers, with the settings that each has of its own."""


def optimizer_of(
    tensors: Iterable[torch.Tensor], settings: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer of the settings with one rate and one decay for all tensors."""
    kind = settings.get("optimizer", "adamw")
    if kind not in OPTIMIZERS:
        raise NotImplementedError(f"no optimizer {kind!r}")
    if settings.get("loraplus_lr_ratio") is not None:
        raise NotImplementedError("no LoRA+")
    make, own = OPTIMIZERS[kind]
    given = {"lr": settings["lr"]} | {key: settings[key] for key in own if key in settings}
    made: torch.optim.Optimizer = make(
        list(tensors), weight_decay=settings.get("weight_decay", 0.0), **given
    )
    return made
