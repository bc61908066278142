"""Keras: its Dense layer with the constructor's `lora_rank` and `lora_alpha`."""

from dataclasses import replace

from minilora.verify.peers import keras
from minilora.verify.peers.known import entries

_LOST = (
    "build() calls enable_lora(self.lora_rank) without lora_alpha, so s = 1 whatever alpha is "
    "(layers/core/dense.py)"
)

PEER = replace(
    keras.PEER,
    name="keras-constructor",
    implementation="minilora.verify.peers.implementations.keras:KerasConstructor",
    known=entries(
        (
            "linear.forward*",
            "linear.vjp*",
            "linear.evaluation*",
            "linear.zero-B",
            "merge.weight*",
            "merge.bias",
        ),
        _LOST,
        {"mutant": "scale-one"},
    )
    | entries(["linear.balance"], _LOST, {"arrays": ["Bᵀ dB against dA Aᵀ"]})
    | entries(["merge.full-digits"], _LOST, {"arrays": ["merged W"]}),
)
