"""The four-bit linear of bitsandbytes (NF4) as a frozen weight with PEFT's adapters on it."""

from minilora.verify.peers.known import entries
from minilora.verify.peers.peer import Peer

_ONE_TOKEN = (
    "the gradient of a bias is the sum over dy's first axis (autograd/_functions.py): of one token "
    "without a batch a number, which autograd refuses; of a batch of sequences rounded before the "
    "sum over the rest"
)
_BIAS = f"{_ONE_TOKEN}; and DoRA of PEFT forms it as three sums, each rounded (tuners/lora/dora.py)"
_VECTOR = "DoRA of PEFT views its factor as (1, m), so that a vector's output is a row"


def _in_half(checks: str) -> list[str]:
    return [f"{checks}:{dtype}" for dtype in ("bfloat16", "float16")]


_PACKED = (
    "on a processor with AVX-512 for bfloat16 Linear4bit packs its weight anew in its first "
    "evaluation (nn/modules.py): from then on it rounds to bfloat16 and has no gradient of x, a "
    "side that is no multiple of 32 is refused, and PEFT unpacks another weight when it merges"
)
_BIAS_OF_B = (
    "merging into few bits adds the bias of B without its scale (tuners/lora/bnb.py of PEFT)"
)
_EIGHT_BITS = "Linear8bitLt rounds its inputs to eight bits in evaluation, and not in training"

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
            f"{_VECTOR} (tuners/lora/dora.py)",
            {"error": "shape: y has shape (1, *"},
        ),
        **entries(
            ["variants.dora.unbatched-vjp"],
            f"{_VECTOR} (tuners/lora/dora.py)",
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
            _ONE_TOKEN,
            {"arrays": "dbias"},
            {"error": "raises: RuntimeError: Function MatMul4BitBackward returned an invalid*"},
        ),
        **entries(["merge.bias-of-B"], _BIAS_OF_B, {"mutant": "merge-bias-of-B-unscaled"}),
        **entries(
            ["quantized.forward"],
            f"{_PACKED}; {_EIGHT_BITS}",
            {"after": ["eval", "forward"]},
            {"error": "raises: RuntimeError*"},
        ),
        **entries(
            ["quantized.gradients"], _PACKED, {"after": "train"}, {"error": "raises: RuntimeError*"}
        ),
        **entries(
            ["quantized.merge-after-forward"],
            _PACKED,
            {"after": "merge"},
            {"error": "raises: RuntimeError*"},
        ),
        **entries(_in_half("variants.lora-bias.vjp*"), _ONE_TOKEN, {"arrays": "dbias"}),
        **entries(_in_half("variants.dora.vjp*"), _BIAS, {"arrays": "dbias"}),
    },
)
