"""minilora: the executable specification of LoRA, and the oracle that checks implementations."""

from minilora.spec.lora import (
    Merged,
    TrainableSpec,
    Variant,
    combine,
    disable,
    fuse,
    lora_linear,
    merge,
    project,
    scale,
    unmerge,
)
from minilora.spec.models import GPT2, Batch, Bert, Llama, draw_weights, logits, loss
from minilora.spec.multi_adapter import Adapter, State
from minilora.spec.target_modules import LoraConfig, ResolvedTargets, inject, resolve_targets
from minilora.spec.variants import REGISTRY

__version__ = "0.1.0"

__all__ = [
    "GPT2",
    "REGISTRY",
    "Adapter",
    "Batch",
    "Bert",
    "Llama",
    "LoraConfig",
    "Merged",
    "ResolvedTargets",
    "State",
    "TrainableSpec",
    "Variant",
    "__version__",
    "combine",
    "disable",
    "draw_weights",
    "fuse",
    "inject",
    "logits",
    "lora_linear",
    "loss",
    "merge",
    "project",
    "resolve_targets",
    "scale",
    "unmerge",
]
