"""mlx-lm's LoRALinear and DoRALinear, on the CPU build of MLX."""

from minilora.verify.peers.known import entries
from minilora.verify.peers.peer import Peer

_SUMMED = (
    "quantized_matmul of MLX keeps its sums in the inputs' dtype on the CPU, the product with a "
    "dense weight in float32"
)

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
        _SUMMED,
        {"after": ["train", "eval", "merge"]},
    ),
)
