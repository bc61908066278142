"""Microsoft's loralib: its Linear layer, alone and in the place of the layers of a model."""

from minilora.verify.peers.known import TRANSFORMERS
from minilora.verify.peers.peer import Peer

PEER = Peer(
    name="loralib",
    implementation="minilora.verify.peers.implementations.loralib:Loralib",
    packages=("loralib", "torch", "transformers"),
    extra="peers",
    levels=(
        "linear",
        "merge",
        "init",
        "lifecycle",
        "model",
        "train",
        "grad-flow",
        "files",
        "inference",
    ),
    known=TRANSFORMERS
    | {
        "lifecycle.random-steps*": "eval() merges what there is, B = 0 at first, and an adapter "
        "that is loaded after it does not act; the next train() takes it out nevertheless"
    },
)
