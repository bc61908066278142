"""SGLang's reader of PEFT's adapters, and its LoRA operations in PyTorch."""

from minilora.verify.peers.known import entries
from minilora.verify.peers.peer import Peer

_CHANGES = {"arrays": "the change of *"}

PEER = Peer(
    name="sglang",
    implementation="minilora.verify.peers.implementations.sglang:Sglang",
    packages=("sglang", "torch"),
    extra="sglang",
    levels=("multi", "inference"),
    known={
        **entries(
            ["inference.deltas.rslora", "inference.deltas.patterns"],
            ("sglang.one-scale",),
            _CHANGES,
        ),
        **entries(
            [f"inference.deltas.{kind}" for kind in ("lora-bias", "bias", "modules-to-save")],
            ("sglang.left-out",),
            _CHANGES,
        ),
        **entries(
            ["inference.deltas.names.other-model"],
            ("sglang.names-fit-nothing",),
            {"mutant": "serve-deltas-misfit-other-model"},
        ),
        **entries(["inference.deltas.combined"], ("sglang.one-scale", "sglang.left-out"), _CHANGES),
    },
)
