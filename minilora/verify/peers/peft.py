"""Hugging Face PEFT, driven through get_peft_model, LoraConfig and PeftModel."""

from minilora.verify.peers.known import TRANSFORMERS, entries
from minilora.verify.peers.peer import Peer

_AT_RANDOM = {"after": ["scale", "unmerge", "delete", "disable"]}
_KEY_ERROR = {"error": "raises: KeyError: *"}
_ONE_BIAS = {"error": "raises: *ValueError: LoraModel supports only 1 adapter with bias*"}


_NOT_DECAYED = "optimizer-loraplus-not-decayed"
_NO_WARMUP = "optimizer-schedule-constant-without-warmup"

_FLOAT32_START = (
    "the orthogonal start (tuners/lora/layer.py) is drawn and multiplied in float32, whatever the "
    "layer's dtype: B A is 0 within float32's rounding"
)


OF_DORA = {
    **entries(
        ["variants.dora.unbatched"], ("peft.dora-vector",), {"error": "shape: y has shape (1, *"}
    ),
    **entries(
        ["variants.dora.unbatched-vjp"],
        ("peft.dora-vector",),
        {"error": "raises: RuntimeError: Mismatch in shape: grad_output*"},
    ),
    **entries(
        ["variants.dora.bias-gradient"],
        ("peft.dora-bias-gradient",),
        {"mutant": "dora-dbias-in-parts"},
        {"arrays": "dbias"},
    ),
}
"""What DoRA makes of one vector, and of a bias."""

_OF_BIAS = ("bias", "bias.scaled", "save.bias", "gradients.bias", "step.bias", "replace.bias")

OF_LORAPLUS = {
    **entries(
        ["train.loraplus:float32"],
        ("peft.loraplus-decay", "transformers.constant-warmup"),
        # AdamW's first step of rate 0 rounds nothing, theirs of the whole rate does.
        {"arrays": "*.lora_*.weight after step *"},
    ),
    **entries(
        ["train.combined:float32"],
        ("peft.loraplus-decay",),
        {"mutant": "train-loraplus-not-decayed"},
    ),
    **entries(
        ["train.loraplus.other-params"],
        ("peft.loraplus-vectors", "peft.loraplus-embedding"),
        {"arrays": "*after step *"},
        {"error": "nan: *after step *"},
    ),
}
"""What LoRA+ by PEFT's factory makes of a training."""

_KNOWN = {
    **TRANSFORMERS,
    **OF_LORAPLUS,
    **entries(
        [
            f"combine.{check}"
            for check in ("weighted", "order", "cat", "many", "linear", "ties", "magnitude-prune")
        ]
        + ["combine.dare-linear", "combine.dare-ties", "combine.*-svd"],
        ("peft.combined-scale",),
        {"mutant": "combine-rank-for-alpha"},
    ),
    **entries(["combine.svd:float64"], ("peft.combined-weights",), {"rounded_to": "float32"}),
    **entries(
        ["combine.svd:bfloat16", "combine.svd:float16"],
        ("peft.combined-weights",),
        {"error": "dtype: ΔW is float32, expected *"},
    ),
    **entries(
        [f"combine.{check}" for check in ("single", "zero-weight", "split-weight")],
        ("peft.combined-scale", "peft.combined-weights"),
        {"mutant": "combine-rank-for-alpha"},
    ),
    **OF_DORA,
    **entries(
        ["init.orthogonal:float64", "init.fresh.orthogonal:float64"],
        _FLOAT32_START,
        {"rounded_to": "float32"},
    ),
    **entries(
        ["init.fresh.olora:float32"], ("peft.olora-transposed",), {"error": "shape: A has shape *"}
    ),
    **entries(
        ["optimizer.loraplus", "optimizer.sgd.linear-schedule"],
        ("peft.loraplus-decay",),
        {"mutant": _NOT_DECAYED},
    ),
    **entries(
        ["optimizer.combined"],
        ("peft.loraplus-decay", "transformers.constant-warmup"),
        {"mutant": f"{_NOT_DECAYED} + {_NO_WARMUP}"},
    ),
    **entries(
        ["optimizer.combined:float16"],
        ("peft.loraplus-decay", "transformers.constant-warmup"),
        {"arrays": "layers.* after step *"},
    ),
    **entries(
        ["optimizer.all"],
        ("peft.loraplus-decay", "transformers.constant-warmup"),
        {"mutant": _NOT_DECAYED},
        {"mutant": _NO_WARMUP},
        {"mutant": f"{_NOT_DECAYED} + {_NO_WARMUP}"},
    ),
    **entries(
        ["optimizer.loraplus.other-params"],
        ("peft.loraplus-decay", "peft.loraplus-vectors"),
        {"mutant": f"{_NOT_DECAYED} + optimizer-loraplus-vectors"},
    ),
    **entries(
        ["files.save.modules-to-save", "files.resave"],
        ("peft.heads-listed-again",),
        {"error": "changes its inputs: settings['modules_to_save'] had *"},
    ),
    **entries(
        ["optimizer.cosine-schedule.past-end"],
        ("transformers.cosine-end",),
        {"mutant": "optimizer-schedule-cosine-rises-again"},
    ),
    **entries(
        ["lifecycle.scale-while-merged"],
        ("peft.unmerge-anew",),
        {"mutant": "lifecycle-unmerge-anew"},
    ),
    **entries(
        ["lifecycle.modules-to-save.delete"],
        ("peft.deleted-activates", "peft.last-deleted"),
        _KEY_ERROR,
    ),
    **entries(
        ["lifecycle.gradients.tied"],
        ("peft.tied-merge",),
        {"mutant": "lifecycle-tied-embedding-merged"},
    ),
    **entries(
        ["lifecycle.unknown"],
        ("peft.unknown-adapter",),
        {"arrays": ["whether activate(*) is refused", "whether scale(*) is refused"]},
    ),
    **entries(
        ["lifecycle.dropout.added"],
        ("peft.added-drops",),
        {"arrays": ["y after add(*activate(*", "y after *load(*activate(*"]},
    ),
    **entries(
        ["lifecycle.replace-similar"],
        ("peft.hotswap-similar",),
        {"mutant": "lifecycle-replace-contained"},
    ),
    **entries(
        ["lifecycle.replace-scaled"],
        ("peft.hotswap-scale",),
        {"mutant": "lifecycle-scale-as-before"},
    ),
    **entries(
        ["lifecycle.replace.save"],
        ("peft.hotswap-scale",),
        {"after": "activate"},
        {"error": "raises: load('one', 'one'): RuntimeError*"},
    ),
    **entries(
        ["lifecycle.replace.embedding"],
        ("peft.hotswap-embedding",),
        {"error": "raises: replace('one', onetwo's): AttributeError*"},
    ),
    **entries(["lifecycle.tied.*"], ("peft.tied-merge",), {"after": ["merge", "disable"]}),
    **entries(["inference.deltas.tied"], ("peft.tied-merge",), {"arrays": "the change of lm_head"}),
    **entries(
        ["inference.names.*", "inference.deltas.names.*"],
        ("peft.names-fit-nothing",),
        {"mutant": "serve-misfit-ignored"},
        {"mutant": "serve-misfit-partial"},
        {"mutant": "serve-deltas-misfit-partial"},
    ),
    **entries(
        ["inference.names.missing-factor"],
        ("peft.missing-factor",),
        {"arrays": "log-probabilities without a factor"},
    ),
    **entries(
        ["lifecycle.dora.several"], ("peft.dora-in-a-row",), {"mutant": "lifecycle-dora-in-a-row"}
    ),
    **entries(
        [f"lifecycle.{check}" for check in _OF_BIAS],
        ("peft.trained-bias",),
        {"after": "add"},
        _ONE_BIAS,
    ),
}
_KNOWN |= {
    key: entry
    for kinds, more, *seen in (
        (("", ".conv1d", ".embedding", ".lora-bias", ".files"), ()),
        ((".modules-to-save",), (), {"after": "add"}),
        ((".tied",), ("peft.tied-merge",), {"after": "merge"}),
        ((".bias",), ("peft.trained-bias",), {"after": "add"}, _ONE_BIAS),
        ((".dora",), ("peft.dora-in-a-row",), {"after": ["activate", "merge"]}),
    )
    for key, entry in entries(
        [f"lifecycle.random-steps{kind}" for kind in kinds],
        ("peft.unmerge-anew", "peft.deleted-activates", "peft.last-deleted", *more),
        _AT_RANDOM,
        _KEY_ERROR,
        *seen,
    ).items()
}
_OUTPUTS = {"arrays": ["y, eval*", "y, train*"]}
_GRADIENTS = {"arrays": ["dA*", "dB*", "dmagnitude*", "dx*", "y*"]}
_OTHER_SIZE = ({"error": ["raises: RuntimeError*", "shape: y has shape *"]},)

_KNOWN |= {
    f"module.{check}": entry
    for checks, about, *seen in (
        (("conv.padding-mode",), ("peft.conv-padding",), *_OTHER_SIZE),
        (("conv.dilation",), ("peft.conv-dilation",), *_OTHER_SIZE),
        (
            ("conv.all",),
            ("peft.conv-dilation", "peft.conv-padding", "peft.dora-conv-groups"),
            *_OTHER_SIZE,
        ),
        (("conv.groups-dora",), ("peft.dora-conv-groups",)),
        (("embedding.max-norm",), ("peft.max-norm",)),
        (("experts.single",), ("peft.single-expert",), {"error": "raises: RuntimeError*"}),
        (("attention.out",), ("peft.attention-output",)),
    )
    for each, arrays in (("forward", _OUTPUTS), ("gradients", _GRADIENTS))
    for check, entry in entries([f"{c}.{each}" for c in checks], about, arrays, *seen).items()
}
_KNOWN |= {
    **entries(
        ["module.experts.single.merged"],
        ("peft.single-expert",),
        {"arrays": ["W", "y"]},
        {"error": "raises: RuntimeError*"},
    ),
    **entries(["module.attention.out.merged"], ("peft.attention-output",), {"arrays": "y"}),
    **entries(["module.encoder.forward"], ("peft.encoder-fast-path",), {"arrays": "y, eval"}),
    **entries(
        ["module.conv.pointwise.merged", "module.conv.pointwise.evaluation"],
        ("peft.pointwise-merge",),
        {"error": "raises: RuntimeError*"},
    ),
}


PEER = Peer(
    name="peft",
    implementation="minilora.verify.peers.implementations.peft:Peft",
    packages=("peft", "torch", "transformers"),
    extra="peers",
    levels=(
        "linear",
        "merge",
        "variants",
        "combine",
        "multi",
        "module",
        "init",
        "lifecycle",
        "model",
        "optimizer",
        "train",
        "grad-flow",
        "files",
        "inference",
        "names",
    ),
    conventions={"dora_norm": "detached", "conv_groups": "blocks"},
    known=_KNOWN,
)
