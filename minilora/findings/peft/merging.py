"""Merges and unmerges of PEFT."""

from minilora.findings.conditions import settings
from minilora.findings.finding import Finding, Stored
from minilora.findings.peft.release import SEEN
from minilora.findings.stored import StoredAdapter


def _tied(adapter: StoredAdapter) -> list[str]:
    """The adapted embedding or head of a base that ties the two."""
    tied = (adapter.base or {}).get("tie_word_embeddings")
    ends = ("lm_head", "embed_tokens", "wte")
    return [m.name for m in adapter.adapted if tied and m.name.rpartition(".")[2] in ends]


def _bias_in_few_bits(adapter: StoredAdapter) -> list[str]:
    quantized = (adapter.base or {}).get("quantization_config") is not None
    return adapter.having("lora_bias") if quantized else []


FINDINGS = (
    Finding(
        id="peft.safe-merge",
        title="A safe merge rounds twice",
        severity="rounding",
        seen=SEEN,
        since="0.16.0",
        code="peft/tuners/lora/layer.py:980 Linear.merge",
        cause=(
            "merge with safe_merge (tuners/lora/layer.py) adds a delta that is cast to the "
            "weight's dtype"
        ),
        does="""
            Beside a base in half precision, PEFT keeps adapters in float32. `merge_adapter()` adds
            the float32 delta and rounds the sum; with `safe_merge=True` the delta is rounded first,
            and then the sum. [PEFT 3396](https://github.com/huggingface/peft/pull/3396) describes
            the difference.
            """,
        fix=(
            "Add the delta to the weight in the wider dtype and round once, as the merge without "
            "safe_merge does"
        ),
        right="""
            The merged weight is the number nearest to $W + sBA$, and rounding once gives it.
            """,
        consequence="""
            "Safe" means checked for NaN and infinity. It is the less accurate of the two, in the
            last place of some weights.
            """,
        not_asked="the contract has no word for a safe merge, and the peer asks for none",
    ),
    Finding(
        id="peft.tied-merge",
        title="A tied head's adapter is merged into the embedding, and tied factors twice",
        severity="silent",
        seen=SEEN,
        since="0.19.1",
        code="peft/tuners/lora/layer.py:1371 Embedding.merge",
        cause=(
            "an adapter of one use of a tied table is merged into the table itself, and so "
            "acts in the other use too, and one of both uses (ensure_weight_tying) twice: the"
            " library warns of the former"
        ),
        does="""
            A merge adds to the parameter, which head and embedding share. An adapter of one use
            then acts in both; one of both uses, with `ensure_weight_tying`, is added once by each.
            The library warns of the former, [PEFT
            2018](https://github.com/huggingface/peft/issues/2018), and not of the latter.
            """,
        fix=(
            "Untie the table before merging an adapter of one of its uses, and merge one of both "
            "uses once"
        ),
        right="""
            Merging changes no output. Where one use alone changes, the tie ends; where both change
            by one matrix and its transpose, the table takes it once.
            """,
        consequence="""
            The merged model is another one than was trained, and disabling does not hide it for the
            use whose layer has no adapter. Untie the weights before merging.
            """,
        found_by=(
            "peft",
            "lifecycle.tied.embedding",
            "lifecycle.tied.head",
            "lifecycle.tied.both",
            "lifecycle.gradients.tied",
            "inference.deltas.tied",
        ),
        stored=Stored(
            _tied,
            "use",
            "the table of this base is its head too: merged, an adapter of one acts in both",
        ),
    ),
    Finding(
        id="peft.replicated-merge",
        title="The adapters of a layer's copies are merged into one weight",
        severity="silent",
        seen=SEEN,
        cause=(
            "replicate_layers (tuners/tuners_utils.py) has the copies share their weights, and the "
            "merge of each adapter adds to them"
        ),
        code="peft/tuners/tuners_utils.py:2574 replicate_layers",
        fix=(
            "Give each copy a weight of its own before the first merge, or refuse to merge "
            "replicated layers"
        ),
        right="""
            With `layer_replication` each copy computes $W x + s B_i A_i x$ with its own adapter.
            Merged, each has a weight of its own, $W + s B_i A_i$.
            """,
        consequence=r"""
            After merging every copy computes $W + \sum_i s B_i A_i$. Do not merge such a model:
            keep the adapter beside it.
            """,
        not_asked="no session has layers that share their weights by replication",
        stored=Stored(
            settings("layer_replication"),
            "use",
            "merged, each copy of a layer gets the changes of all its copies",
        ),
    ),
    Finding(
        id="peft.unmerge-anew",
        title="Unmerging takes away what the adapter is by then",
        severity="silent",
        seen=SEEN,
        since="0.19.1",
        code="peft/tuners/lora/layer.py:1035 Linear.unmerge",
        cause=(
            "set_scale does not reach a merged weight, and unmerging (tuners/lora/layer.py) takes "
            "away what the adapter is by then and not what was added"
        ),
        does="""
            A merge adds $sBA$, an unmerge subtracts the $sBA$ of its own time. Deleting and
            hot-swapping what is merged are refused; `set_scale` is not.
            """,
        fix="Keep the delta (or the scale) that was added, and subtract that",
        right="""
            What is unmerged is the weight that was merged. Subtraction would have to remember $s$,
            $A$ and $B$, and [would still
            round](#unmerging-does-not-restore-the-weight-loralib-too).
            """,
        consequence="""
            The base weight is another one afterwards, for every adapter. Unmerge before a scale is
            set.
            """,
        found_by=("peft", "lifecycle.scale-while-merged", "lifecycle.random-steps"),
    ),
    Finding(
        id="peft.refused-merge",
        title="A merge that is refused leaves the weight merged",
        severity="silent",
        seen=SEEN,
        since="0.21.0",
        cause="the weight is changed before it is asked for the bias (tuners/lora/layer.py)",
        code="peft/tuners/lora/layer.py:1008 Linear.merge",
        does="""
            A trained bias of $B$ needs a bias of the base to be merged into. PEFT finds that there
            is none after it has added $sBA$.
            """,
        fix="Check for the bias before the weight is changed",
        right="""
            What is refused changes nothing. (minilora's merge gives the layer a bias.)
            """,
        consequence="""
            Who catches the error goes on with a model that has its adapter twice. With
            `safe_merge=True` the weight stays.
            """,
        not_asked=(
            "beside a bias of B the layer has a bias in every case, so that no merge is refused"
        ),
    ),
    Finding(
        id="peft.pointwise-merge",
        title="A convolution of three dimensions and kernel 1 cannot be merged",
        severity="fails",
        seen=SEEN,
        since="0.14.0",
        code="peft/tuners/lora/layer.py:1779 _ConvNd.get_delta_weight",
        cause=(
            "get_delta_weight (tuners/lora/layer.py) takes a kernel of three dimensions of "
            "which the first two are 1 for one of two dimensions, and fails"
        ),
        does="""
            `get_delta_weight` knows a kernel of one entry by the sizes of two dimensions, and
            multiplies the factors as matrices, from which it has taken these two. The third one is
            still there.
            """,
        fix=(
            "Ask for the number of dimensions (weight.ndim == 4) beside the two sides of the kernel"
        ),
        right="""
            A kernel of one entry is a matrix, whatever the dimensions: $W + sBA$.
            """,
        consequence="""
            Merging fails, also with a kernel such as $(1, 1, 3)$; the forward is right.
            """,
        found_by=("peft", "module.conv.pointwise.merged", "module.conv.pointwise.evaluation"),
    ),
    Finding(
        id="peft.unmerge-rounds",
        title="Unmerging does not restore the weight (loralib too)",
        severity="rounding",
        seen=SEEN,
        since="0.9.0",
        cause="unmerge subtracts the delta from the rounded sum (tuners/lora/layer.py)",
        code="peft/tuners/lora/layer.py:1036 Linear.unmerge",
        also={"loralib": "0.1.2"},
        does="""
            Both libraries unmerge by subtraction.
            """,
        fix=(
            "Keep the weight as it was while an adapter is merged, or say in unmerge's "
            "documentation that it rounds"
        ),
        right="""
            The sum $W + sBA$ is rounded to its own spacing. What $W$ has below that is gone, and no
            subtraction brings it back, as a maintainer remarks in [PEFT
            3166](https://github.com/huggingface/peft/pull/3166) of another method. It needs the old
            array, which minilora's [`merge`](spec/lora.md#merge) keeps.
            """,
        consequence="""
            The frozen base changes with every merge and unmerge, in half precision visibly; loralib
            does one at each `eval()` and `train()`. Keep a copy of the base, or give loralib's
            layers `merge_weights=False`.
            """,
        not_asked="`unmerge` may differ from the old weight by the rounding of the merged one",
    ),
    Finding(
        id="peft.packed-merge",
        title="An evaluated layer in four bits is merged into another weight",
        severity="silent",
        seen=SEEN,
        since="0.15.2",
        code="peft/tuners/lora/bnb.py:384 Linear4bit.merge",
        cause=(
            "merge (tuners/lora/bnb.py) unpacks by dequantize_4bit what Linear4bit has packed"
            " in another order"
        ),
        does="""
            On a processor with AVX-512 for bfloat16, `Linear4bit` packs its weight anew in its
            first evaluation, in an order that its `quant_state` does not tell. PEFT's merge unpacks
            it by `dequantize_4bit`, in the order that it had.
            """,
        fix=(
            "Unpack by the layer's own order (bitsandbytes' unpack) where quant_state says that "
            "it is packed"
        ),
        right=r"""
            The merged weight is $\tilde W + s B A$, whatever was computed before; with $B = 0$ it
            is $\tilde W$.
            """,
        consequence="""
            Evaluate, then merge, and the model is destroyed, without an error. Merge before the
            first evaluation, or in a model that was loaded anew.
            """,
        found_by=("bitsandbytes", "quantized.merge-after-forward"),
    ),
    Finding(
        id="peft.few-bits-bias",
        title="A bias of B is merged without its scale into a layer in four or eight bits",
        severity="silent",
        seen=SEEN,
        since="0.15.2",
        code="peft/tuners/lora/bnb.py:405 Linear4bit.merge",
        cause="merging into few bits adds the bias of B without its scale (tuners/lora/bnb.py)",
        does="""
            `merge` of `tuners/lora/bnb.py` adds the bias of B to the layer's bias as it is. In the
            forward it is scaled with the branch, and so it is when a dense layer is merged.
            """,
        fix="Add lora_B's bias times the scaling, as Linear.merge does",
        right="""
            $y = W x + b + s (B A x + c)$, so that the merged bias is $b + s c$.
            """,
        consequence=r"""
            With `lora_bias=True` and $\alpha \neq r$ a merged model in few bits is another one,
            without an error.
            """,
        found_by=("bitsandbytes", "merge.bias-of-B"),
        stored=Stored(
            _bias_in_few_bits,
            "use",
            "merged into this base in few bits, the bias of B is added without its scale",
        ),
    ),
)
