"""Flax NNX: its LoRALinear, which has no scale."""

from minilora.verify.peers.known import entries
from minilora.verify.peers.peer import Peer

PEER = Peer(
    name="flax",
    implementation="minilora.verify.peers.implementations.flax:Flax",
    packages=("flax", "jax"),
    extra="frameworks",
    levels=("linear", "init"),
    fixed={"alpha": "r", "dropout": False, "use_rslora": False, "fan_in_fan_out": False},
    known=entries(
        ["init.distribution"],
        ("flax.fresh-a",),
        {"arrays": ["the part of √n A up to each point*"]},
    ),
)
