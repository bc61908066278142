"""Microsoft's loralib: its Linear layer, alone and in the place of the layers of a model."""

from minilora.verify.peers.known import TRANSFORMERS, entries
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
    known={
        **TRANSFORMERS,
        **entries(
            ["module.embedding.max-norm.forward", "module.embedding.max-norm.gradients"],
            _MAX_NORM,
            {"arrays": ["y, eval", "y, train", "y", "dB"]},
        ),
        **entries(
            ["module.conv.pointwise.dropout"],
            "convolutions build their dropout (layers.py) and never call it",
            {"arrays": "y of samples in training"},
        ),
        **entries(
            ["lifecycle.random-steps*"],
            "eval() merges what there is, B = 0 at first, and an adapter that is loaded after it "
            "does not act; the next train() takes it out nevertheless",
            {"after": ["add", "load", "train", "activate"]},
        ),
    },
)
