"""Keras: its Dense layer with the constructor's `lora_rank` and `lora_alpha`."""

from dataclasses import replace

from minilora.verify.peers import keras
from minilora.verify.peers.known import entries

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
        ("keras.constructor-alpha",),
        {"mutant": "scale-one"},
    )
    | entries(["linear.balance"], ("keras.constructor-alpha",), {"arrays": ["Bᵀ dB against dA Aᵀ"]})
    | entries(
        ["merge.full-digits", "merge.rounding"],
        ("keras.constructor-alpha",),
        {"arrays": ["merged W"]},
    ),
)
