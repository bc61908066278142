"""The libraries that `minilora verify NAME` checks out of the box: one short file each.

A peer file is imported only when its name is asked for, because it imports its library. It holds
the implementation methods that the library supports and a factory `implementation()`. To add a
peer, write such a file and name its factory here.
"""

PEERS: dict[str, str] = {
    "loralib": "minilora.verify.peers.loralib:implementation",
    "peft": "minilora.verify.peers.peft:implementation",
}
