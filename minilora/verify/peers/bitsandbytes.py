"""The four-bit linear of bitsandbytes (NF4) as a frozen weight with PEFT's adapters on it."""

from minilora.verify.peers.peer import Peer

_ONE_TOKEN = (
    "the gradient of a bias is the sum over dy's first axis (autograd/_functions.py): of one token "
    "without a batch a number, which autograd refuses; of a batch of sequences rounded before the "
    "sum over the rest"
)
_BIAS = f"{_ONE_TOKEN}; and DoRA of PEFT forms it as three sums, each rounded (tuners/lora/dora.py)"

PEER = Peer(
    name="bitsandbytes",
    implementation="minilora.verify.peers.implementations.bitsandbytes:Bitsandbytes",
    packages=("bitsandbytes", "peft", "torch"),
    extra="peers,libraries",
    levels=("linear", "merge", "variants", "multi"),
    dtypes=("float32", "bfloat16", "float16"),
    conventions={"dora_norm": "detached"},
    known={
        "variants.dora.unbatched*": "DoRA of PEFT views its factor as (1, m), so that a vector's "
        "output is a row (tuners/lora/dora.py)",
        "linear.vjp.bias:*": _ONE_TOKEN,
        "linear.vjp.all:*": _ONE_TOKEN,
        "linear.gradcheck:*": _ONE_TOKEN,
        "variants.lora-bias.vjp*:bfloat16": _ONE_TOKEN,
        "variants.lora-bias.vjp*:float16": _ONE_TOKEN,
        "variants.dora.vjp*:bfloat16": _BIAS,
        "variants.dora.vjp*:float16": _BIAS,
    },
)
