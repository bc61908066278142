"""Findings in bitsandbytes."""

from minilora.findings.finding import Finding, Library

SEEN = "0.50.2"

FINDINGS = (
    Finding(
        id="bitsandbytes.rows-no-blocks",
        title="Weights whose rows are no whole blocks are dequantized with other scales",
        severity="silent",
        seen=SEEN,
        cause="the kernel counts the blocks of each row anew (backends/cpu/ops.py)",
        code="bitsandbytes/backends/cpu/ops.py:153",
        does="""
            NF4's blocks run through the rows on end, so that a row of another length than a
            multiple of the block shares some with its neighbours. That is how `quantize_4bit` makes
            them. On processors with AVX-512, `dequantize_4bit` counts the blocks anew in each row
            wherever the row's length is a multiple of its registers', and takes the first scales
            again and again. FP4 goes through the same lines.
            """,
        fix="Count blocks over the whole tensor: entry i has the scale of block i // blocksize",
        right=r"""
            The entry $i$ of all, counted through the rows, has the scale of block $\lfloor i / 64
            \rfloor$. The same bytes and scales give the weight back as soon as the rows are as long
            as a block.
            """,
        consequence="""
            The base is another one, without a word, and by as much as scales of blocks differ. An
            adapter that is trained beside it computes something else on any other machine.
            `Linear4bit` is hit where its input features are no multiple of its block, as in a model
            that [bitsandbytes
            1628](https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1628) names. Blocks
            longer than most rows have been kept from this path since
            [1828](https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1828), as inaccurate
            there. Choose a block that divides the rows.
            """,
        not_asked="quantized weights are drawn with rows of whole blocks",
    ),
    Finding(
        id="bitsandbytes.zero",
        title="Zero is not found in a map that has it",
        severity="rounding",
        seen=SEEN,
        cause=(
            "codes are looked up in a table of equally spaced points, between two of which "
            "zero lies (backends/cpu/ops.py)"
        ),
        code="bitsandbytes/backends/cpu/ops.py:39",
        does="""
            `quantize_blockwise` looks its codes up in a table of equally spaced points between -1
            and 1. Zero lies between two of them, and the point that it is rounded to is nearer to
            another value. Double quantization goes this way with the constants of NF4.
            """,
        fix=(
            "Compare with the middles between neighbours of the map (searchsorted), not with a "
            "table of equal steps"
        ),
        right="""
            The map contains zero, and zero is nearest to itself.
            """,
        consequence="""
            Slight: of each block's greatest modulus, what the page of
            [`quantize_dynamic`](spec/quantization.md#quantize_dynamic) prints. But what is zero
            does not stay so.
            """,
        not_asked="a quantized weight may lose what its scheme loses, which is more",
    ),
    Finding(
        id="bitsandbytes.bias-gradient",
        title="The gradient of a bias is summed over the first axis",
        severity="fails",
        seen=SEEN,
        code="bitsandbytes/autograd/_functions.py:377 MatMul4Bit.backward",
        cause=(
            "the gradient of a bias is the sum over dy's first axis (autograd/_functions.py):"
            " of one token without a batch a number, which autograd refuses; of a batch of "
            "sequences rounded before the sum over the rest"
        ),
        does="""
            `Linear4bit` sums dy over its first axis alone, and rounds. What remains of a batch of
            sequences autograd sums; of one token without a batch a number remains, and it fails.
            """,
        fix="Sum over all axes but the last: grad_output.sum(tuple(range(grad_output.ndim - 1)))",
        right=r"""
            $\partial L / \partial b = \sum_t dy_t$ over all tokens, one or many.
            """,
        consequence="""
            For biases that are trained beside a four-bit weight, one rounding more. Give a single
            token its batch.
            """,
        found_by=("bitsandbytes", "linear.vjp.bias", "linear.vjp.all"),
    ),
    Finding(
        id="bitsandbytes.packed-gradient",
        title="The gradient of a layer that was evaluated is lost",
        severity="training",
        seen=SEEN,
        code="bitsandbytes/nn/modules.py:620 Linear4bit.forward",
        cause=(
            "on a processor with AVX-512 for bfloat16 Linear4bit packs its weight anew in its"
            " first evaluation (nn/modules.py), and has no gradient of x from then on"
        ),
        does="""
            On a processor with AVX-512 for bfloat16, a `Linear4bit` packs its weight anew in its
            first evaluation, for a kernel that came with [bitsandbytes
            1804](https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1804). Back in
            training it goes on with that kernel, which has no gradient. PyTorch warns; a layer with
            a bias fails.
            """,
        fix="Pack into a second buffer, and keep the first one for training",
        right=r"""
            $\d x = W^\top \d y$, whatever was computed before.
            """,
        consequence="""
            A training run that evaluates in between goes on with other gradients: through the
            adapters and around the layers alone, no longer through the frozen weights. Put the
            model together again after an evaluation, or keep its four-bit layers in training.
            """,
        found_by=("bitsandbytes", "quantized.gradients"),
    ),
    Finding(
        id="bitsandbytes.packed-rounding",
        title="A layer that was evaluated rounds to bfloat16",
        severity="rounding",
        seen=SEEN,
        code="bitsandbytes/nn/modules.py:620 Linear4bit.forward",
        cause=(
            "the kernel for what Linear4bit has packed (nn/modules.py) rounds to bfloat16, "
            "and refuses a side that is no multiple of 32"
        ),
        does="""
            The same packing rounds the constants of the blocks to bfloat16, and its kernel the
            inputs, in a float32 model as well. It refuses layers whose output features are no
            multiple of 32.
            """,
        fix="Use the packed kernel where compute_dtype is bfloat16 alone",
        right="""
            Packing is another order of the same numbers.
            """,
        consequence="""
            Evaluation and training are two functions, and what is trained after an evaluation is
            another function than before. `minilora verify bitsandbytes` keeps the frozen layer in
            training.
            """,
        found_by=("bitsandbytes", "quantized.forward"),
    ),
    Finding(
        id="bitsandbytes.eight-bits",
        title="A layer in eight bits rounds its inputs too, in evaluation alone",
        severity="rounding",
        seen=SEEN,
        code="bitsandbytes/autograd/_functions.py:140 MatMul8bitLt.forward",
        cause=(
            "Linear8bitLt (autograd/_functions.py) rounds its inputs to eight bits in "
            "evaluation, and not in training"
        ),
        does="""
            On a CPU `Linear8bitLt` multiplies by the dequantized weight in training. In evaluation
            it quantizes each row of x to eight bits first, as LLM.int8 does on a GPU in both.
            """,
        fix=(
            "Say in the documentation that evaluation rounds the inputs, or do the same in both "
            "modes"
        ),
        right="""
            Without dropout evaluation is the function that was trained.
            """,
        consequence="""
            What is small beside the greatest input of a token is lost in evaluation: 0.4 % of it
            and less. An adapter is trained beside another base than it is used with.
            """,
        found_by=("bitsandbytes", "quantized.forward"),
    ),
)

LIBRARY = Library(
    "bitsandbytes",
    "bitsandbytes",
    "bitsandbytes",
    FINDINGS,
    files="https://github.com/bitsandbytes-foundation/bitsandbytes/blob/{release}/{file}#L{line}",
)
