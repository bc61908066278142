"""PyTorch's autograd on the plain formula: what a textbook has, and no library of adapters."""

from minilora.verify.peers.peer import Peer

PEER = Peer(
    name="torch",
    implementation="minilora.verify.peers.implementations.torch:Torch",
    packages=("torch",),
    extra="peers",
    levels=("linear", "merge", "variants", "combine", "multi", "module"),
    conventions={"dora_norm": "differentiated"},
)
