"""Microsoft's loralib: its Linear layer, alone and in the place of the layers of a model."""

from minilora.verify.peers.known import TRANSFORMERS
from minilora.verify.peers.peer import Peer

_MAX_NORM = "an embedding looks up the columns of lora_A with the max_norm of the table (layers.py)"

PEER = Peer(
    name="loralib",
    implementation="minilora.verify.peers.implementations.loralib:Loralib",
    packages=("loralib", "torch", "transformers"),
    extra="peers",
    levels=(
        "linear",
        "merge",
        "module",
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
        "module.embedding.max-norm.forward:*": _MAX_NORM,
        "module.embedding.max-norm.gradients:*": _MAX_NORM,
        "module.conv.pointwise.dropout:*": "convolutions build their dropout (layers.py) and never "
        "call it",
        "lifecycle.random-steps*": "eval() merges what there is, B = 0 at first, and an adapter "
        "that is loaded after it does not act; the next train() takes it out nevertheless",
    },
)
