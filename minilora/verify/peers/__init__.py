"""The libraries that `minilora verify NAME` checks out of the box: one short file each.

A peer file is imported only when its name is asked for, because it imports its library. It holds
the implementation methods that the library supports and a factory `implementation()`. To add a
peer, write such a file and name its factory here.
"""

PEERS: dict[str, str] = {
    "bitsandbytes": "minilora.verify.peers.bitsandbytes:implementation",
    "jax": "minilora.verify.peers.jax:implementation",
    "loralib": "minilora.verify.peers.loralib:implementation",
    "mlx-lm": "minilora.verify.peers.mlx_lm:implementation",
    "peft": "minilora.verify.peers.peft:implementation",
    "torch": "minilora.verify.peers.torch:implementation",
}

EXTRAS: dict[str, str] = {
    "bitsandbytes": "peers,libraries",
    "jax": "jax",
    "mlx-lm": "libraries",
}
"""The extras of this package that install what a peer needs, where that is not `peers`."""
