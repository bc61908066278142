"""minilora: the executable specification of LoRA, and the oracle that checks implementations.

The names below are imported when they are first used, so that a program that only loads the pytest
plugin does not load NumPy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minilora.spec.checked import draw_weights, logits, lora_linear, loss, merge, project
    from minilora.spec.layers import fuse
    from minilora.spec.lora import Merged, TrainableSpec, Variant, disable, scale, unmerge
    from minilora.spec.models import GPT2, Batch, Bert, Llama
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
    *("checked", "lora", "models", "multi_adapter", "target_modules"),
    *("variants", "initialization", "layers"),
)


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
