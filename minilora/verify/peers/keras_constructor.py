"""Keras: its Dense layer with the constructor's `lora_rank` and `lora_alpha`."""

from dataclasses import replace

from minilora.verify.peers import keras

PEER = replace(
    keras.PEER,
    name="keras-constructor",
    implementation="minilora.verify.peers.implementations.keras:KerasConstructor",
    known=dict.fromkeys(
        ("linear.*", "merge.*"),
        "build() calls enable_lora(self.lora_rank) without lora_alpha, so s = 1 whatever alpha is "
        "(layers/core/dense.py)",
    ),
)
