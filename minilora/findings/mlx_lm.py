"""Findings in mlx-lm."""

from minilora.findings.finding import Finding, Library, Stored
from minilora.findings.shared import FACTOR_AS_DRAWN, FUNCTION_OF_FILE
from minilora.findings.stored import StoredAdapter, StoredModule

SEEN = "0.32.2"


def _rope(adapter: StoredAdapter) -> list[str]:
    """The base of RoPE, where config.json has it in rope_parameters alone."""
    base = adapter.base or {}
    inside = (base.get("rope_parameters") or {}).get("rope_theta")
    hidden = base.get("model_type") == "llama" and inside is not None and "rope_theta" not in base
    return [f"rope_theta {inside}"] if hidden and inside != _DEFAULT_THETA else []


_DEFAULT_THETA = 10000


def _old_alpha(adapter: StoredAdapter) -> list[str]:
    parameters = adapter.config.get("lora_parameters") or {}
    alpha, rank = parameters.get("alpha"), parameters.get("rank")
    return [m.name for m in adapter.adapted] if alpha and rank and alpha != rank else []


def _by_alpha(adapter: StoredAdapter, module: StoredModule) -> float:
    parameters = adapter.config["lora_parameters"]
    return float(parameters["rank"] / parameters["alpha"])


FINDINGS = (
    Finding(
        id="mlx-lm.alpha",
        title="The alpha of older releases is passed over",
        severity="silent",
        seen=SEEN,
        code="mlx_lm/tuner/utils.py:71 linear_to_lora_layers.to_lora",
        cause="linear_to_lora_layers (tuner/utils.py) reads scale, and no alpha beside it",
        does="""
            Older releases scaled by `scale * alpha / rank` and wrote all three into
            `lora_parameters`.
            """,
        fix="Read alpha where it is there (scale = scale * alpha / rank), or refuse it",
        right="""
            What is saved and loaded is the same function.
            """,
        consequence="""
            A folder of then acts rank / alpha times as strongly. Put the factor into `scale`, and
            take `alpha` out. minilora refuses to read such a folder.
            """,
        not_asked="the drawn folders are as this release writes them",
        stored=Stored(
            _old_alpha,
            "scaled",
            "it does not read the alpha by which older releases multiplied",
            _by_alpha,
        ),
    ),
    Finding(
        id="mlx-lm.missing-factor",
        title="A missing factor stays as it was drawn",
        severity="silent",
        seen=SEEN,
        code="mlx_lm/tuner/utils.py:172 load_adapters",
        cause=(
            "load_adapters (tuner/utils.py) compares the file's names with the model's, and "
            "not the model's with the file's; load_weights is not strict"
        ),
        does="""
            Loading refuses a tensor that has no place, but no place that has no tensor: A is then
            random.
            """,
        fix=(
            "Compare the adapter's names with the model's in both directions, and raise for a "
            "factor that is missing"
        ),
        right=FUNCTION_OF_FILE,
        consequence="""
            A file cut in two, or named by other rules in part, gives other answers in each process.
            minilora's reader refuses it by the name of the missing factor.
            """,
        found_by=("mlx-lm", "inference.names.missing-factor"),
        stored=FACTOR_AS_DRAWN,
    ),
    Finding(
        id="mlx-lm.no-layers",
        title="All layers are adapted where none is asked for",
        severity="silent",
        seen=SEEN,
        code="mlx_lm/tuner/utils.py:113 linear_to_lora_layers",
        cause=(
            "linear_to_lora_layers (tuner/utils.py) takes `layers[-max(num_layers, 0) :]`, "
            "which for 0 is all of them"
        ),
        does="""
            The last $k$ layers are `layers[-k:]`, which for 0 is all of them.
            """,
        fix="Return where num_layers is 0, and take -1 alone for all layers",
        right="""
            Of the last 0 layers there are none.
            """,
        consequence="""
            To adapt what lies outside the layers only, give whole names as keys; minilora's reader
            resolves 0 as it is resolved here.
            """,
        not_asked="no method has a number of layers",
    ),
    Finding(
        id="mlx-lm.rope",
        title="The base of RoPE is passed over in rope_parameters",
        severity="silent",
        seen=SEEN,
        code="mlx_lm/models/llama.py:30 ModelArgs",
        cause="ModelArgs (models/llama.py) has rope_theta with a default, and no rope_parameters",
        does="""
            transformers `5` writes RoPE's base inside `rope_parameters`. The Llama of mlx-lm reads
            `rope_theta` beside it and has a default.
            """,
        fix="Read rope_theta of rope_parameters where the configuration has it",
        right=r"""
            The pair $i$ of features turns by $\theta^{-2i/d}$ per token, with the $\theta$ that the
            model was trained with.
            """,
        consequence="""
            A model that transformers `5` saved computes something else in mlx-lm, and in
            transformers `4`, without a word, and so does its adapter. Write `rope_theta` into
            `config.json` too, as minilora does.
            """,
        not_asked="the files of the drawn models have RoPE's base in both places",
        stored=Stored(
            _rope, "other", "it does not read rope_parameters of this base, and takes its default"
        ),
    ),
    Finding(
        id="mlx-lm.quantized-sum",
        title="A product with a quantized weight is summed in half precision",
        severity="rounding",
        seen=SEEN,
        cause=(
            "quantized_matmul of MLX keeps its sums in the inputs' dtype on the CPU, the "
            "product with a dense weight in float32"
        ),
        does="""
            On the CPU `quantized_matmul` keeps its running sums in the inputs' dtype; the product
            with the same weight dequantized keeps them in float32.
            """,
        fix="Sum in float32 in quantized_matmul on the CPU, as the dense product does",
        right="""
            $y = W x$, here $256 + 1 + 1 = 258$, which bfloat16 has.
            """,
        consequence="""
            In bfloat16 the output of a quantized layer is off by several per cent, and its input's
            gradient too.
            """,
        found_by=("mlx-lm", "quantized.merge"),
    ),
    Finding(
        id="mlx-lm.dora-dropout",
        title="Nothing is dropped of the base that DoRA rescales",
        severity="choice",
        seen=SEEN,
        code="mlx_lm/tuner/dora.py:116 DoRALinear.__call__",
        cause="DoRALinear (tuner/dora.py) rescales the base's own output",
        does=r"""
            `DoRALinear` computes $g \circ (W x + s B A h)$ with $h = K \circ x$, the input that
            dropout has left. DoRA's authors, and PEFT after them, compute $W x + (g - 1) \circ W h
            + g \circ s B A h$: see [DoRA 2](https://github.com/nbasyl/DoRA/issues/2).
            """,
        fix=(
            "Say in the documentation that the base is rescaled without dropout, or follow PEFT's"
            " choice"
        ),
        right="""
            The paper's equation has no dropout. In the mean over masks both are the layer without
            one, so that this is a choice; but then a run is not the one that the paper's code
            makes.
            """,
        consequence="""
            With dropout, training differs from PEFT's, and the magnitude's gradient is less noisy.
            Without dropout, and in evaluation, the two are one function.
            """,
        not_asked="the peer declares it as its convention, `dora_dropout`",
    ),
)

LIBRARY = Library(
    "mlx-lm",
    "mlx-lm",
    "mlx-lm",
    FINDINGS,
    release=SEEN,
    reads=("mlx",),
    files="https://github.com/ml-explore/mlx-lm/blob/v{release}/{file}#L{line}",
)
