"""The four-bit linear of bitsandbytes (NF4) as a frozen weight with PEFT's adapters on it."""

from minilora.verify.peers.known import entries
from minilora.verify.peers.peer import Peer


def _in_half(checks: str) -> list[str]:
    return [f"{checks}:{dtype}" for dtype in ("bfloat16", "float16")]


PEER = Peer(
    name="bitsandbytes",
    implementation="minilora.verify.peers.implementations.bitsandbytes:Bitsandbytes",
    packages=("bitsandbytes", "peft", "torch"),
    extra="peers,libraries",
    levels=("linear", "merge", "variants", "multi", "quantized"),
    dtypes=("float32", "bfloat16", "float16"),
    conventions={"dora_norm": "detached"},
    known={
        **entries(
            ["variants.dora.unbatched"],
            ("peft.dora-vector",),
            {"error": "shape: y has shape (1, *"},
        ),
        **entries(
            ["variants.dora.unbatched-vjp"],
            ("peft.dora-vector",),
            {"error": "raises: RuntimeError: Mismatch in shape: grad_output*"},
        ),
        **entries(
            [
                "linear.vjp.bias",
                "linear.vjp.all",
                "linear.gradcheck",
                "linear.evaluation-vjp",
                "variants.lora-bias.vjp.all",
            ],
            ("bitsandbytes.bias-gradient",),
            {"arrays": "dbias"},
            {"error": "raises: RuntimeError: Function MatMul4BitBackward returned an invalid*"},
        ),
        **entries(
            ["merge.bias-of-B"], ("peft.few-bits-bias",), {"mutant": "merge-bias-of-B-unscaled"}
        ),
        **entries(
            ["quantized.forward"],
            ("bitsandbytes.packed-rounding", "bitsandbytes.eight-bits"),
            {"after": ["eval", "forward"]},
            {"error": "raises: RuntimeError*"},
        ),
        **entries(
            ["quantized.gradients"],
            ("bitsandbytes.packed-gradient", "bitsandbytes.packed-rounding"),
            {"after": "train"},
            {"error": "raises: RuntimeError*"},
        ),
        **entries(
            ["quantized.merge-after-forward"],
            ("peft.packed-merge", "bitsandbytes.packed-rounding"),
            {"after": "merge"},
            {"error": "raises: RuntimeError*"},
        ),
        **entries(
            _in_half("variants.lora-bias.vjp*"),
            ("bitsandbytes.bias-gradient",),
            {"arrays": "dbias"},
        ),
        **entries(
            _in_half("variants.dora.vjp*"),
            ("bitsandbytes.bias-gradient",),
            {"arrays": "dbias"},
        ),
        **entries(
            ["variants.dora.bias-gradient"],
            ("peft.dora-bias-gradient", "bitsandbytes.bias-gradient"),
            {"arrays": "dbias"},
        ),
    },
)
