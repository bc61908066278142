"""Hugging Face PEFT by its default: adapters of a half base are kept in float32."""

from minilora.verify.peers.peer import Peer
from minilora.verify.peers.peft import OF_DORA

PEER = Peer(
    name="peft-default",
    implementation="minilora.verify.peers.implementations.peft_default:PeftDefault",
    packages=("peft", "torch"),
    extra="peers",
    levels=("linear", "merge", "variants", "precision", "multi"),
    conventions={"dora_norm": "detached"},
    known=OF_DORA,
    mixed=(
        *({"x": half, "W": half, "adapters": "float32"} for half in ("bfloat16", "float16")),
        *(
            {"x": x, "W": W, "adapters": "float32", "autocast": "bfloat16"}
            for x in ("float32", "bfloat16", "float16")
            for W in ("float32", "bfloat16")
        ),
    ),
)
