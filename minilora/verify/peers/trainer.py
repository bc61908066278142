"""The Trainer of transformers over PEFT's adapters."""

from minilora.verify.peers.known import TRANSFORMERS, entries
from minilora.verify.peers.peer import Peer

_SPARED = "the Trainer decays no bias (get_decay_parameter_names)"
_SUMMED = (
    "the Trainer divides the losses of micro-batches by their number only where the model takes no "
    "further keyword arguments (trainer.py, compute_loss): a classifier takes them, and its own "
    "loss is the mean of each micro-batch"
)

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
        **entries(["train.classifier"], _SUMMED, {"mutant": "train-sum-of-means"}),
    },
)
