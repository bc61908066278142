"""vLLM's reader of PEFT's adapters, and its LoRA kernels for the CPU."""

from minilora.verify.peers.peer import Peer

PEER = Peer(
    name="vllm",
    implementation="minilora.verify.peers.implementations.vllm:Vllm",
    packages=("vllm", "torch"),
    extra="vllm",
    levels=("multi", "inference"),
)
