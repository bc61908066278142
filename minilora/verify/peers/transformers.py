"""transformers' own reader of PEFT's adapters, load_adapter, without PEFT's model around it."""

from minilora.verify.peers.known import entries
from minilora.verify.peers.peer import Peer

PEER = Peer(
    name="transformers",
    implementation="minilora.verify.peers.implementations.transformers:Transformers",
    packages=("transformers", "peft", "torch"),
    extra="peers",
    levels=("inference",),
    known={
        **entries(
            ["inference.logits.dora", "inference.logits.combined"],
            ("transformers.dora-magnitude",),
            {"arrays": "log-probabilities"},
        ),
        **entries(
            ["inference.names.*"],
            ("transformers.names-fit-nothing",),
            {"arrays": "log-probabilities of *"},
        ),
        **entries(
            ["inference.names.missing-factor"],
            ("transformers.missing-factor",),
            {"arrays": "log-probabilities without a factor"},
        ),
    },
)
