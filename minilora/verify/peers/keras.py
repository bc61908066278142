"""Keras: its Dense layer, on PyTorch; `enable_lora` gives it an adapter."""

from minilora.verify.peers.peer import Peer

PEER = Peer(
    name="keras",
    implementation="minilora.verify.peers.implementations.keras:Keras",
    packages=("keras", "torch"),
    extra="frameworks",
    levels=("linear", "merge"),
    dtypes=("float32",),  # that of A and B in every layer
    fixed={"dropout": False, "use_rslora": False, "fan_in_fan_out": False},
)
