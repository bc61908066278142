"""axolotl's hand-written LoRA functions (kernels/lora.py), in the place of PEFT's forwards."""

from minilora.verify.peers.known import entries
from minilora.verify.peers.peer import Peer

PEER = Peer(
    name="axolotl",
    implementation="minilora.verify.peers.implementations.axolotl:Axolotl",
    packages=("axolotl", "peft", "torch"),
    extra="axolotl",
    levels=("linear", "variants", "precision", "module"),
    dtypes=("float32", "bfloat16", "float16"),
    conventions={"dora_norm": "detached", "dora_dropout": "branch"},
    mixed=tuple(
        {"x": half, "W": half, "adapters": "float32", "branch": half}
        for half in ("bfloat16", "float16")
    ),
    fixed={"fan_in_fan_out": False},
    known={
        **entries(
            [
                "linear.vjp.bias",
                "linear.vjp.all",
                "linear.evaluation-vjp",
                "linear.accumulation-vjp",
                "variants.*.vjp*",
                "variants.dora.unbatched-vjp",
                "variants.dora.bias-gradient",
                "precision.vjp.all",
            ],
            ("axolotl.bias-gradient",),
            {"factor": 0, "arrays": ["dbias"]},
        ),
        **entries(
            ["module.embedding.forward", "module.embedding.merged"],
            ("axolotl.embed-scale",),
            {"arrays": ["y, train", "y, eval", "y"]},
        ),
        **entries(
            ["module.embedding.gradients"],
            ("axolotl.embed-scale",),
            {"arrays": ["y", "dA", "dB", "dmagnitude"]},
        ),
        **entries(
            ["module.embedding.max-norm.forward", "module.embedding.max-norm.gradients"],
            ("axolotl.max-norm",),
            {"arrays": ["y, train", "y, eval", "y", "dB"]},
        ),
    },
)
