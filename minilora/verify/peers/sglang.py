"""SGLang's reader of PEFT's adapters, and its LoRA operations in PyTorch."""

from minilora.verify.peers.known import entries
from minilora.verify.peers.peer import Peer

_SCALE = (
    "LoRAAdapter (srt/lora/lora.py) has one scale lora_alpha / r: use_rslora, rank_pattern and "
    "alpha_pattern are not read"
)
_DROPPED = (
    "LoRAAdapter (srt/lora/lora.py) takes the factors A and B alone: modules_to_save, trained "
    "biases and the bias of B are left out without a word"
)
_CHANGES = {"arrays": "the change of *"}

PEER = Peer(
    name="sglang",
    implementation="minilora.verify.peers.implementations.sglang:Sglang",
    packages=("sglang", "torch"),
    extra="sglang",
    levels=("multi", "inference"),
    known={
        **entries(["inference.deltas.rslora", "inference.deltas.patterns"], _SCALE, _CHANGES),
        **entries(
            [f"inference.deltas.{kind}" for kind in ("lora-bias", "bias", "modules-to-save")],
            _DROPPED,
            _CHANGES,
        ),
        **entries(["inference.deltas.combined"], f"{_SCALE}; {_DROPPED}", _CHANGES),
    },
)
