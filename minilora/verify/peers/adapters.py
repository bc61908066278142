"""AdapterHub's adapters: its LoRALinear around a linear layer."""

from minilora.verify.peers.known import entries
from minilora.verify.peers.peer import Peer

_OF_DORA = ("adapters.dora-scale", "adapters.dora-bias")
_GRADIENTS = {"arrays": ["y", "dx", "dA", "dB", "dmagnitude", "dbias"]}
_SIZES = {"error": "raises: RuntimeError: The size of tensor *"}

PEER = Peer(
    name="adapters",
    implementation="minilora.verify.peers.implementations.adapters:Adapters",
    packages=("adapters", "torch", "transformers"),
    extra="adapters",
    levels=("linear", "merge", "variants", "init"),
    conventions={"dora_norm": "differentiated", "dora_dropout": "branch"},
    fixed={"use_rslora": False},
    known={
        **entries(
            [
                *(f"variants.dora.forward{kind}" for kind in ("", ".evaluation")),
                "variants.dora.unbatched",
            ],
            _OF_DORA,
            {"mutant": "dora-norm-unscaled + dora-bias-scaled"},
        ),
        **entries(
            [
                *(f"variants.dora.vjp{kind}" for kind in ("", ".dropout", ".evaluation")),
                "variants.dora.forward.dropout",
                "variants.dora.unbatched-vjp",
            ],
            _OF_DORA,
            _GRADIENTS,
        ),
        **entries(["variants.dora.bias-gradient"], ("adapters.dora-bias",), {"arrays": "dbias"}),
        **entries(["variants.dora.merge"], ("adapters.dora-scale",), {"arrays": "merged W"}),
        **entries(
            [
                *(f"variants.dora.{check}.all" for check in ("forward", "vjp", "merge")),
                *(f"variants.dora.{check}.conv1d" for check in ("forward", "vjp", "merge")),
            ],
            (*_OF_DORA, "adapters.dora-transposed"),
            {"arrays": [*_GRADIENTS["arrays"], "merged W"]},
            _SIZES,
        ),
    },
)
