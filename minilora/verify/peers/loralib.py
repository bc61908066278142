"""Microsoft's loralib: its Linear layer, alone and in the place of the layers of a model."""

from minilora.verify.peers.known import TRANSFORMERS, entries
from minilora.verify.peers.peer import Peer

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
            ("loralib.max-norm",),
            {"arrays": ["y, eval", "y, train", "y", "dB"]},
        ),
        **entries(
            ["module.conv.pointwise.dropout"],
            ("loralib.conv-dropout",),
            {
                "arrays": [
                    "y of samples in training",
                    "whether *dropped apart",
                    "whether dropout acts",
                ]
            },
        ),
        **entries(
            ["lifecycle.random-steps*"],
            ("loralib.loaded-after-eval",),
            {"after": ["add", "load", "train", "activate"]},
        ),
    },
)
