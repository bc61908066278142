"""minilora: the executable specification of LoRA, and the oracle that checks implementations.

The names below are imported when they are first used, so that a program that only loads the pytest
plugin does not load NumPy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minilora.spec.initialization import draw_weights
    from minilora.spec.layers import fuse
    from minilora.spec.lora import (
        Merged,
        TrainableSpec,
        Variant,
        disable,
        lora_linear,
        merge,
        project,
        scale,
        unmerge,
    )
    from minilora.spec.models import GPT2, Batch, Bert, Llama, logits, loss
    from minilora.spec.multi_adapter import AdaptedLayer, Adapter, combine
    from minilora.spec.target_modules import LoraConfig, ResolvedTargets, inject, resolve_targets
    from minilora.spec.variants import REGISTRY

__version__ = "0.1.0"

__all__ = [
    "GPT2",
    "REGISTRY",
    "AdaptedLayer",
    "Adapter",
    "Batch",
    "Bert",
    "Llama",
    "LoraConfig",
    "Merged",
    "ResolvedTargets",
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

_MODULES = (
    "lora", "models", "multi_adapter", "target_modules", "variants", "initialization", "layers"
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name from the module of `minilora.spec` that defines it."""
    if name in __all__:
        for module in map(import_module, (f"minilora.spec.{module}" for module in _MODULES)):
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module 'minilora' has no attribute {name!r}", name=name, obj=__name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
