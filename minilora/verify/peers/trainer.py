"""The Trainer of transformers over PEFT's adapters."""

from minilora.verify.peers.known import TRANSFORMERS, entries
from minilora.verify.peers.peer import Peer
from minilora.verify.peers.peft import OF_LORAPLUS

_SPARED = "the Trainer decays no bias (get_decay_parameter_names)"

PEER = Peer(
    name="trainer",
    implementation="minilora.verify.peers.implementations.trainer:OfTransformers",
    packages=("transformers", "peft", "torch"),
    extra="peers",
    levels=("train",),
    dtypes=("float64", "float32"),
    known={
        **{name: why for name, why in TRANSFORMERS.items() if name.startswith("train")},
        **entries(["train.weight-decay"], _SPARED, {"mutant": "train-decay-biases-spared"}),
        **entries(
            ["train.classifier"],
            ("transformers.classifier-batches",),
            {"mutant": "train-sum-of-means"},
        ),
        **{name: why for name, why in OF_LORAPLUS.items() if name.startswith("train")},
    },
)
