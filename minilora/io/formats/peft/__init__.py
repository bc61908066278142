"""PEFT adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors``.

Which modules an adapter has, its variant, its ranks and its scales follow from the settings as PEFT
0.21 resolves them when it loads the folder; the tensors must agree with that, and none is ignored.
"""

from minilora.io.formats.peft.config import read_lora_config
from minilora.io.formats.peft.format import FORMAT
from minilora.io.formats.peft.names import CONFIG, PREFIX, WEIGHTS, adapter_names
from minilora.io.formats.peft.read import read_adapter
from minilora.io.formats.peft.sets import adapted_names, trained_names
from minilora.io.formats.peft.settings import FIXED, INERT, KINDS, READ
from minilora.io.formats.peft.starts import INIT_FROM_BASE
from minilora.io.formats.peft.vera import vera_projections
from minilora.io.formats.peft.write import write_adapter

__all__ = [
    "CONFIG",
    "FIXED",
    "FORMAT",
    "INERT",
    "INIT_FROM_BASE",
    "KINDS",
    "PREFIX",
    "READ",
    "WEIGHTS",
    "adapted_names",
    "adapter_names",
    "read_adapter",
    "read_lora_config",
    "trained_names",
    "vera_projections",
    "write_adapter",
]
