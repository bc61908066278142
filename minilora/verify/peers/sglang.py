"""SGLang's reader of PEFT's adapters, and its LoRA operations in PyTorch."""

from minilora.verify.peers.peer import Peer

_SCALE = (
    "LoRAAdapter (srt/lora/lora.py) has one scale lora_alpha / r: use_rslora, rank_pattern and "
    "alpha_pattern are not read"
)
_DROPPED = (
    "LoRAAdapter (srt/lora/lora.py) takes the factors A and B alone: modules_to_save, trained "
    "biases and the bias of B are left out without a word"
)

PEER = Peer(
    name="sglang",
    implementation="minilora.verify.peers.implementations.sglang:Sglang",
    packages=("sglang", "torch"),
    extra="sglang",
    levels=("multi", "inference"),
    known={
        "inference.deltas.rslora:*": _SCALE,
        "inference.deltas.patterns:*": _SCALE,
        "inference.deltas.lora-bias:*": _DROPPED,
        "inference.deltas.bias:*": _DROPPED,
        "inference.deltas.modules-to-save:*": _DROPPED,
        "inference.deltas.combined:*": f"{_SCALE}; {_DROPPED}",
    },
)
