"""Hugging Face PEFT, driven through get_peft_model, LoraConfig and PeftModel."""

from minilora.verify.peers.known import TRANSFORMERS, entries
from minilora.verify.peers.peer import Peer

_AT_RANDOM = {"after": ["scale", "unmerge", "delete", "disable"]}
_KEY_ERROR = {"error": "raises: KeyError: *"}
_ONE_BIAS = {"error": "raises: *ValueError: LoraModel supports only 1 adapter with bias*"}
_COMBINED_SCALE = (
    "add_weighted_adapter (tuners/lora/model.py) gives the combined adapter lora_alpha = r and the "
    "first adapter's use_rslora: with rsLoRA its scale is √r and not 1"
)
_SVD = (
    "add_weighted_adapter (tuners/lora/model.py) takes the SVD in float32, and of a half precision "
    "it leaves the combined factors in float32"
)
_FLOAT32_WEIGHTS = (
    'one adapter alone is combined as "linear", whatever was asked for: by √(w s) on both factors, '
    "which are rounded to float32"
)


VECTOR = "DoRA views its factor as (1, m) (tuners/lora/dora.py), so that a vector's output is a row"
_SCALED_LATE = (
    "set_scale does not reach a merged weight, and unmerging takes away what the adapter is by "
    "then and not what was added: the base weight is another one afterwards"
)
_DELETED = (
    "deleting the active adapter activates another one, and a model without adapters fails with a "
    "KeyError in its forward"
)

_ADDED_AFTER = (
    "; the module of the one that was activated so acts from when the next adapter is added, also "
    "while adapters are disabled"
)
_SHARED_TABLE = (
    "an adapter of one use of a tied table is merged into the table itself, and so acts in the "
    "other use too, and one of both uses (ensure_weight_tying) twice: the library warns of the "
    "former"
)
_BASE_BIAS = (
    "bias='lora_only' and 'all' train the base's own bias: it acts from when it is there, also "
    "while disabled, of which the library warns, and only one adapter may have one"
)
_DORA_BEHIND = (
    "DoRA (tuners/lora/dora.py) rescales what the adapters before it in the list have added, by "
    "a norm of W without them: the order of the active adapters matters, merged and not"
)

_NAMES_PASSED_OVER = (
    "LoraModel.set_adapter (tuners/tuners_utils.py), which takes several names, passes over those "
    "that it lacks, without a word: the others act, or the base alone"
)
_HOTSWAP_SIMILAR = (
    "hot-swapping (utils/hotswap.py) fills with 0 every adapter whose name contains the name of "
    "the replaced one"
)
_HOTSWAP_SCALE = (
    "hot-swapping sets the layers' scaling, and neither their r and lora_alpha nor the "
    "configuration: a scale that is set later and a file that is saved later have those of the "
    "replaced adapter"
)
_HOTSWAP_EMBEDDING = (
    "hot-swapping takes the last three words off the name of a tensor to find its layer; the name "
    "of an embedding's has no .weight, and the AttributeError is that of the layer above"
)

_BIAS_THRICE = (
    "DoRA takes the bias from the base's output and leaves it there (tuners/lora/dora.py): its "
    "gradient is sum dy + sum (g - 1) dy - sum (g - 1) dy, each rounded"
)

_COSINE_RISES = (
    "get_cosine_schedule_with_warmup (transformers, optimization.py) takes the cosine of the "
    "progress without bounding it by 1: beyond total_steps the rate rises from 0 again"
)

_LORAPLUS_GROUPS = (
    "create_loraplus_optimizer (optimizers/loraplus.py) gives the rate of B to every vector, and "
    "an embedding's adapter a rate of its own, 1e-6"
)

_NAMES_THAT_FIT_NOTHING = (
    "from_pretrained (peft_model.py, load_adapter) warns of tensors that are missing and says "
    "nothing of those left over: the base, or a part of the adapter, is served"
)

_FLOAT32_START = (
    "the orthogonal start (tuners/lora/layer.py) is drawn and multiplied in float32, whatever the "
    "layer's dtype: B A is 0 within float32's rounding"
)

_CONVOLUTION = (
    "the A of a convolution (tuners/lora/layer.py) has the kernel, the stride and the padding of "
    "the base, and neither its dilation nor its padding mode"
)
_NORMS_IN_GROUPS = (
    "DoRA takes the norms of a convolution in groups (tuners/lora/dora.py) of another matrix"
)
_POINTWISE = (
    "get_delta_weight (tuners/lora/layer.py) takes a kernel of three dimensions of which the first "
    "two are 1 for one of two dimensions, and fails"
)
_MAX_NORM = (
    "an embedding looks up the columns of A with the max_norm of the table (tuners/lora/layer.py)"
)
_SINGLE_EXPERT = (
    "the one expert of a weight (1, in, out) is taken for a matrix (tuners/lora/layer.py), and "
    "gets the transpose of its change"
)
_OUT_TWICE = (
    "MultiheadAttention.merge (tuners/lora/layer.py), which the forward calls too, adds the change "
    "of out_proj to its weight, and merges out_proj itself besides: the change is added twice"
)
_FAST_PATH = (
    "torch.nn.TransformerEncoderLayer reads the weights of linear1 and linear2 itself in "
    "evaluation, and the layer that PEFT puts there shows it the base's"
)

_OLORA_STORED = (
    "olora_init (tuners/lora/layer.py) factors the weight as it is stored: of a Conv1D, which has "
    "(in, out), A and B get each other's sides, and the first forward fails"
)

OF_A_VECTOR = {
    **entries(["variants.dora.unbatched"], VECTOR, {"error": "shape: y has shape (1, *"}),
    **entries(
        ["variants.dora.unbatched-vjp"],
        VECTOR,
        {"error": "raises: RuntimeError: Mismatch in shape: grad_output*"},
    ),
}
"""What DoRA makes of one vector."""

_OF_BIAS = ("bias", "bias.scaled", "save.bias", "gradients.bias", "step.bias", "replace.bias")

_KNOWN = {
    **TRANSFORMERS,
    **entries(
        [f"combine.{check}" for check in ("weighted", "order", "cat", "many")],
        _COMBINED_SCALE,
        {"mutant": "combine-rank-for-alpha"},
    ),
    **entries(["combine.svd:float64"], _SVD, {"rounded_to": "float32"}),
    **entries(
        ["combine.svd:bfloat16", "combine.svd:float16"],
        _SVD,
        {"error": "dtype: ΔW is float32, expected *"},
    ),
    **entries(
        [f"combine.{check}" for check in ("single", "zero-weight", "split-weight")],
        f"{_COMBINED_SCALE}; {_FLOAT32_WEIGHTS}",
        {"mutant": "combine-rank-for-alpha"},
    ),
    **OF_A_VECTOR,
    **entries(
        ["init.orthogonal:float64", "init.fresh.orthogonal:float64"],
        _FLOAT32_START,
        {"rounded_to": "float32"},
    ),
    **entries(
        ["train.loraplus.other-params"],
        _LORAPLUS_GROUPS,
        {"arrays": "*after step *"},
        {"error": "nan: *after step *"},
    ),
    **entries(["init.fresh.olora:float32"], _OLORA_STORED, {"error": "shape: A has shape *"}),
    **entries(
        ["optimizer.cosine-schedule.past-end"],
        _COSINE_RISES,
        {"mutant": "optimizer-schedule-cosine-rises-again"},
    ),
    **entries(
        [f"variants.dora.vjp*:{dtype}" for dtype in ("bfloat16", "float16")],
        _BIAS_THRICE,
        {"arrays": "dbias"},
    ),
    **entries(["lifecycle.scale-while-merged"], _SCALED_LATE, {"mutant": "lifecycle-unmerge-anew"}),
    **entries(["lifecycle.modules-to-save.delete"], _DELETED, _KEY_ERROR),
    **entries(
        ["lifecycle.gradients.tied"], _SHARED_TABLE, {"mutant": "lifecycle-tied-embedding-merged"}
    ),
    **entries(
        ["lifecycle.unknown"],
        _NAMES_PASSED_OVER,
        {"arrays": ["whether activate(*) is refused", "whether scale(*) is refused"]},
    ),
    **entries(
        ["lifecycle.replace-similar"], _HOTSWAP_SIMILAR, {"mutant": "lifecycle-replace-contained"}
    ),
    **entries(
        ["lifecycle.replace-scaled"], _HOTSWAP_SCALE, {"mutant": "lifecycle-scale-as-before"}
    ),
    **entries(
        ["lifecycle.replace.save"],
        _HOTSWAP_SCALE,
        {"after": "activate"},
        {"error": "raises: load('one', 'one'): RuntimeError*"},
    ),
    **entries(
        ["lifecycle.replace.embedding"],
        _HOTSWAP_EMBEDDING,
        {"error": "raises: replace('one', onetwo's): AttributeError*"},
    ),
    **entries(["lifecycle.tied.*"], _SHARED_TABLE, {"after": ["merge", "disable"]}),
    **entries(["inference.deltas.tied"], _SHARED_TABLE, {"arrays": "the change of lm_head"}),
    **entries(
        ["inference.names.*"],
        _NAMES_THAT_FIT_NOTHING,
        {"mutant": "serve-misfit-ignored"},
        {"arrays": "log-probabilities of some names of a layer that is not there"},
    ),
    **entries(["lifecycle.dora.several"], _DORA_BEHIND, {"mutant": "lifecycle-dora-in-a-row"}),
    **entries(
        [f"lifecycle.{check}" for check in _OF_BIAS],
        _BASE_BIAS,
        {"after": "add"},
        _ONE_BIAS,
    ),
}
_KNOWN |= {
    key: entry
    for kinds, more, *seen in (
        (("", ".conv1d", ".embedding", ".lora-bias", ".files"), ""),
        ((".modules-to-save",), _ADDED_AFTER, {"after": "add"}),
        ((".tied",), f"; {_SHARED_TABLE}", {"after": "merge"}),
        ((".bias",), f"; {_BASE_BIAS}", {"after": "add"}, _ONE_BIAS),
        ((".dora",), f"; {_DORA_BEHIND}", {"after": ["activate", "merge"]}),
    )
    for key, entry in entries(
        [f"lifecycle.random-steps{kind}" for kind in kinds],
        f"{_SCALED_LATE}; {_DELETED}{more}",
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
    for checks, reason, *seen in (
        (("conv.padding-mode", "conv.dilation"), _CONVOLUTION, *_OTHER_SIZE),
        (("conv.all",), f"{_CONVOLUTION}; {_NORMS_IN_GROUPS}", *_OTHER_SIZE),
        (("conv.groups-dora",), _NORMS_IN_GROUPS),
        (("embedding.max-norm",), _MAX_NORM),
        (("experts.single",), _SINGLE_EXPERT, {"error": "raises: RuntimeError*"}),
        (("attention.out",), _OUT_TWICE),
    )
    for each, arrays in (("forward", _OUTPUTS), ("gradients", _GRADIENTS))
    for check, entry in entries([f"{c}.{each}" for c in checks], reason, arrays, *seen).items()
}
_KNOWN |= {
    **entries(
        ["module.experts.single.merged"],
        _SINGLE_EXPERT,
        {"arrays": ["W", "y"]},
        {"error": "raises: RuntimeError*"},
    ),
    **entries(["module.attention.out.merged"], _OUT_TWICE, {"arrays": "y"}),
    **entries(["module.encoder.forward"], _FAST_PATH, {"arrays": "y, eval"}),
    **entries(
        ["module.conv.pointwise.merged", "module.conv.pointwise.evaluation"],
        _POINTWISE,
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
