"""The libraries that `minilora verify NAME` checks out of the box.

A module here describes one library as a value, `PEER`, without importing it; its module in
`implementations` drives the library. To add a peer, write both and name its module here.
"""

from minilora.verify.peers import (
    adapters,
    axolotl,
    bitsandbytes,
    flax,
    jax,
    keras,
    keras_constructor,
    litgpt,
    loralib,
    lycoris,
    mlx_lm,
    peft,
    peft_default,
    sglang,
    torch,
    trainer,
    transformers,
    unsloth,
    vllm,
)
from minilora.verify.peers.peer import Peer

PEERS: dict[str, Peer] = {
    module.PEER.name: module.PEER
    for module in (
        adapters,
        axolotl,
        bitsandbytes,
        flax,
        jax,
        keras,
        keras_constructor,
        litgpt,
        loralib,
        lycoris,
        mlx_lm,
        peft,
        peft_default,
        sglang,
        torch,
        trainer,
        transformers,
        unsloth,
        vllm,
    )
}
"""By their names."""
