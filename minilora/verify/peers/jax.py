"""JAX on the plain formula, compiled by jit for the CPU, with the gradients of its vjp."""

from itertools import product

from minilora.verify.peers.known import entries
from minilora.verify.peers.peer import Peer

_CHECKS = ("linear.vjp.bias", "linear.vjp.all", "variants.*.vjp*")

PEER = Peer(
    name="jax",
    implementation="minilora.verify.peers.implementations.jax:Jax",
    packages=("jax",),
    extra="jax",
    levels=("linear", "merge", "variants", "combine", "multi"),
    conventions={"dora_norm": "detached"},
    known=entries(
        [f"{check}:{dtype}" for check, dtype in product(_CHECKS, ("bfloat16", "float16"))],
        ("jax.bias-gradient",),
        {"arrays": ["dbias", "dlora_bias", "dmagnitude"]},
    ),
)
