"""mlx-lm's LoRALinear and DoRALinear, on the CPU build of MLX."""

from minilora.verify.peers.known import entries
from minilora.verify.peers.peer import Peer

PEER = Peer(
    name="mlx-lm",
    implementation="minilora.verify.peers.implementations.mlx_lm:MlxLm",
    packages=("mlx-lm", "mlx"),
    extra="libraries",
    levels=("linear", "merge", "variants", "inference", "quantized"),
    conventions={"dora_norm": "detached", "dora_dropout": "branch"},
    fixed={"fan_in_fan_out": False},
    known=entries(
        [
            f"quantized.{check}:{half}"
            for check in ("forward", "gradients", "merge")
            for half in ("bfloat16", "float16")
        ],
        ("mlx-lm.quantized-sum",),
        {"after": ["train", "eval", "merge"]},
    )
    | entries(
        ["inference.names.missing-factor"],
        ("mlx-lm.missing-factor",),
        {"arrays": "log-probabilities without a factor"},
    ),
)
