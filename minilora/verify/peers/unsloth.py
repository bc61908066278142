"""unsloth's hand-written LoRA functions (kernels/fast_lora.py), in the place of PEFT's forwards."""

from minilora.verify.peers.peer import Peer

PEER = Peer(
    name="unsloth",
    implementation="minilora.verify.peers.implementations.unsloth:Unsloth",
    packages=("unsloth", "unsloth_zoo", "peft", "torch"),
    extra="unsloth",
    levels=("linear", "variants", "precision", "module"),
    dtypes=("float32", "bfloat16", "float16"),
    conventions={"dora_norm": "detached"},
    mixed=tuple(
        {"x": half, "W": half, "adapters": "float32", "branch": half}
        for half in ("bfloat16", "float16")
    ),
    fixed={"bias": False, "fan_in_fan_out": False},
)
