"""LyCORIS: its LoConModule around a linear layer."""

from minilora.verify.peers.known import entries
from minilora.verify.peers.peer import Peer

PEER = Peer(
    name="lycoris",
    implementation="minilora.verify.peers.implementations.lycoris:Lycoris",
    packages=("lycoris-lora", "torch"),
    extra="libraries",
    levels=("linear", "merge", "variants"),
    conventions={"dora_norm": "differentiated"},
    fixed={"dropout": False, "fan_in_fan_out": False},
    known=entries(
        ["variants.dora.*.all"],
        "the norm of each row is ‖V‖ + ε with ε = finfo.eps (_weight_decompose in "
        "functional/general.py), so rows of small norm come out too small",
        {"arrays": ["y", "dB", "dmagnitude", "merged W"]},
    )
    | entries(
        ["variants.dora.init:float16"],
        "the norm of each row is ‖V‖ + ε, so DoRA starts as another function",
        {"factor": 0.999, "arrays": ["y against the base"]},
    ),
)
