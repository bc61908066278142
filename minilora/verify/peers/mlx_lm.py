"""mlx-lm's LoRALinear and DoRALinear, on the CPU build of MLX."""

from minilora.verify.peers.peer import Peer

_DROPOUT = (
    "DoRALinear (tuner/dora.py) rescales W x whole; DoRA's authors, and PEFT after them, rescale "
    "what is left of it by dropout"
)

PEER = Peer(
    name="mlx-lm",
    implementation="minilora.verify.peers.implementations.mlx_lm:MlxLm",
    packages=("mlx-lm", "mlx"),
    extra="libraries",
    levels=("linear", "merge", "variants"),
    conventions={"dora_norm": "detached"},
    known={
        f"variants.dora.{check}:*": _DROPOUT
        for check in ("forward.dropout", "vjp.dropout", "forward.all", "vjp.all")
    },
)
