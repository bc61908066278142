"""PEFT's DoRA."""

from minilora.findings.conditions import parts
from minilora.findings.finding import Finding, Stored
from minilora.findings.peft.release import SEEN

FINDINGS = (
    Finding(
        id="peft.dora-in-a-row",
        title="Several DoRA adapters act in a row, and side by side where they train with dropout",
        severity="silent",
        seen=SEEN,
        since="0.21.0",
        code="peft/tuners/lora/dora.py:158 DoraLinearLayer.forward",
        cause=(
            "DoRA (tuners/lora/dora.py) rescales what the adapters before it in the list have"
            " added, by a norm of W without them: the order of the active adapters matters, "
            "merged and not"
        ),
        does=r"""
            Each adapter rescales what the ones before it gave, by $g_i = m_i / \|W + \Delta_i\|$
            with the norm of its own sum with the base. So does the merge ([PEFT
            3609](https://github.com/huggingface/peft/pull/3609)). With dropout each computes the
            base's part from the dropped input itself, and so from the base alone.
            """,
        fix=(
            "Add each adapter's (g - 1) W x + g s B A x to the base's output, not to that of the "
            "ones before"
        ),
        right=r"""
            Neither is what the paper says, which has one adapter. But an adapter is trained on the
            base and on nothing else, $W + \sum_i (g_i (W + \Delta_i) - W)$ does not ask for an
            order, and with it one function is trained and evaluated. $g_2 (g_1 (W + \Delta_1) +
            \Delta_2)$ is another one in each order.
            """,
        consequence="""
            With `lora_dropout` several active DoRA adapters train as one function and answer as
            another, even if nothing is dropped. minilora adds the branches; with one active adapter
            nothing differs.
            """,
        found_by=("peft", "lifecycle.dora.several"),
        stored=Stored(
            parts("magnitude"),
            "use",
            "beside another active adapter, the order of the two matters",
        ),
    ),
    Finding(
        id="peft.dora-zero-row",
        title="A row of zeros becomes NaN under DoRA",
        severity="silent",
        seen=SEEN,
        since="0.9.0",
        cause="the magnitude is divided by the norm, whatever that is (tuners/lora/dora.py)",
        code="peft/tuners/lora/dora.py:153 DoraLinearLayer.forward",
        does="""
            Each row of the weight is divided by its norm, whatever that is.
            """,
        fix=(
            "Take the factor of a row whose norm is 0 for 1 (torch.where(weight_norm == 0, 1, "
            "magnitude / weight_norm))"
        ),
        right="""
            A row without a direction has none to rescale; with $m = 0$ and the norm taken for one
            it stays what it is, and so it starts as the base.
            """,
        consequence="""
            Pruned weights and vocabularies padded with rows of zeros are NaN from the first step
            on, and one such output makes the whole loss NaN. Leave these modules out.
            """,
        not_asked="no weight with a row of zeros is drawn for DoRA",
    ),
    Finding(
        id="peft.dora-conv-padding",
        title="A DoRA convolution pads its base with zeros where it trains with dropout",
        severity="training",
        seen=SEEN,
        since="0.16.0",
        cause=(
            "the base's part is computed by the function, which has no padding mode "
            "(tuners/lora/dora.py)"
        ),
        code="peft/tuners/lora/dora.py:248 _DoraConvNdLayer.forward",
        does="""
            With dropout PEFT computes the base's part of the branch anew, from what dropout leaves,
            and without the padding mode.
            """,
        fix="Compute the base's part by base_layer._conv_forward, which has the padding mode",
        right="""
            Where nothing is dropped, training and evaluation are one function: with $B = 0$ and
            twice the magnitude, twice the base.
            """,
        consequence="""
            Near the border training and evaluation differ, adapter or not.
            """,
        not_asked="dropout is asked of convolutions that pad with zeros",
    ),
    Finding(
        id="peft.dora-conv-groups",
        title="DoRA's norms in groups are those of another matrix",
        severity="silent",
        seen=SEEN,
        since="0.16.0",
        code="peft/tuners/lora/dora.py:220 _DoraConvNdLayer.get_lora_weight",
        cause=(
            "DoRA takes the norms of a convolution in groups (tuners/lora/dora.py) of another"
            " matrix"
        ),
        does="""
            In groups $B$ has $r/g$ columns, each row those of its group. For the norm PEFT reads
            its entries as if they had $r$, and lays the product over the weight, which happens to
            have as many entries. [PEFT 2567](https://github.com/huggingface/peft/pull/2567) made it
            so, where it was an error before.
            """,
        fix=(
            "Take the norms of W + s B A with B and A of each group alone, as the forward applies"
            " them"
        ),
        right="""
            The norms are those of the rows of $V = W + sBA$, both block-diagonal, over all
            channels: what the branch multiplies by.
            """,
        consequence="""
            What is trained is no DoRA: a row's norm depends on other rows' adapters. With $B = 0$,
            at the start, nothing shows.
            """,
        found_by=("peft", "module.conv.groups-dora.forward", "module.conv.groups-dora.gradients"),
    ),
    Finding(
        id="peft.dora-bias-gradient",
        title="A bias loses its gradient under DoRA in half precision",
        severity="rounding",
        seen=SEEN,
        since="0.14.0",
        code="peft/tuners/lora/dora.py:161 DoraLinearLayer.forward",
        cause=(
            "DoRA takes the bias from the base's output and leaves it there "
            "(tuners/lora/dora.py): its gradient is sum dy + sum (g - 1) dy - sum (g - 1) dy,"
            " each rounded"
        ),
        does=r"""
            With $g$ the magnitude over the norm, PEFT adds $(g - 1) (W x + b - b)$ to the base's
            output $W x + b$. The bias's gradient comes by three ways, $\sum \d y + (g - 1) \sum \d
            y - (g - 1) \sum \d y$, and each is rounded.
            """,
        fix="Compute the base's part without the bias, and add the bias once",
        right=r"""
            $\d b = \sum \d y$: DoRA rescales the weight, and not the bias.
            """,
        consequence="""
            Where $g$ is large, a bias that is trained beside DoRA in bfloat16 is trained by
            rounding errors, or not at all.
            """,
        found_by=("peft", "variants.dora.bias-gradient"),
    ),
    Finding(
        id="peft.dora-vector",
        title="DoRA makes a row of a vector",
        severity="fails",
        seen=SEEN,
        since="0.9.0",
        code="peft/tuners/lora/dora.py:153 DoraLinearLayer.forward",
        cause=(
            "DoRA views its factor as (1, m) (tuners/lora/dora.py), so that a vector's output"
            " is a row"
        ),
        does="""
            PyTorch's linear takes one vector without a batch. With DoRA on it the output is a row:
            the factor is viewed as a matrix of one row, and that is how the sum comes out.
            """,
        fix=(
            "Leave the factor a vector: mag_norm_scale = magnitude / weight_norm broadcasts over "
            "the last axis"
        ),
        right="""
            An adapter changes the values of a layer's output, never its shape.
            """,
        consequence="""
            What comes after the layer fails, or broadcasts without a word. Give a batch of one.
            """,
        found_by=("peft", "variants.dora.unbatched", "variants.dora.unbatched-vjp"),
    ),
)
