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
        ["variants.dora.*.all", "variants.dora.init"],
        ("lycoris.dora-epsilon",),
        {"arrays": ["y", "dB", "dmagnitude", "merged W", "y against the base"]},
    ),
)
