"""The four-bit linear of bitsandbytes (NF4) as a frozen weight with PEFT's adapters on it."""

from minilora.verify.peers.peer import Peer

_ONE_TOKEN = (
    "the gradient of a bias is the sum over dy's first axis (autograd/_functions.py): of one token "
    "without a batch a number, which autograd refuses; of a batch of sequences rounded before the "
    "sum over the rest"
)
_BIAS = f"{_ONE_TOKEN}; and DoRA of PEFT forms it as three sums, each rounded (tuners/lora/dora.py)"

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
        "variants.dora.unbatched*": "DoRA of PEFT views its factor as (1, m), so that a vector's "
        "output is a row (tuners/lora/dora.py)",
        "quantized.forward:*": f"{_PACKED}; {_EIGHT_BITS}",
        "quantized.gradients:*": _PACKED,
        "quantized.merge-after-forward:*": _PACKED,
        "merge.bias-of-B:*": _BIAS_OF_B,
        "linear.evaluation-vjp:*": _ONE_TOKEN,
        "linear.vjp.bias:*": _ONE_TOKEN,
        "linear.vjp.all:*": _ONE_TOKEN,
        "linear.gradcheck:*": _ONE_TOKEN,
        "variants.lora-bias.vjp*:bfloat16": _ONE_TOKEN,
        "variants.lora-bias.vjp*:float16": _ONE_TOKEN,
        "variants.dora.vjp*:bfloat16": _BIAS,
        "variants.dora.vjp*:float16": _BIAS,
    },
)
