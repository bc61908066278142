"""litgpt: its LoRALinear."""

from minilora.verify.peers.peer import Peer

PEER = Peer(
    name="litgpt",
    implementation="minilora.verify.peers.implementations.litgpt:Litgpt",
    packages=("litgpt", "torch"),
    extra="frameworks",
    levels=("linear", "merge", "init"),
    fixed={"use_rslora": False, "fan_in_fan_out": False},
)
