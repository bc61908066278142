"""PEFT's AdaLoRA."""

from collections.abc import Sequence

from minilora.findings.conditions import settings
from minilora.findings.finding import Finding, Stored
from minilora.findings.peft.release import SEEN
from minilora.findings.stored import StoredAdapter


def _alpha_0(adapter: StoredAdapter) -> list[str]:
    is_one = adapter.config.get("peft_type") == "ADALORA" and adapter.config.get("lora_alpha") == 0
    return [m.name for m in adapter.adapted] if is_one else []


def _without_effect(adapter: StoredAdapter) -> Sequence[str]:
    is_one = adapter.config.get("peft_type") == "ADALORA"
    return settings("use_rslora", "alpha_pattern")(adapter) if is_one else []


FINDINGS = (
    Finding(
        id="peft.adalora-penalty",
        title="AdaLoRA's penalty is a mean of norms",
        severity="choice",
        seen=SEEN,
        since="0.9.0",
        cause="regu_loss is a mean of norms, and not of their squares (tuners/adalora/model.py)",
        code="peft/tuners/adalora/model.py:251 AdaLoraModel.forward",
        does=r"""
            The paper's term is $\gamma \sum_k R_k$ with $R = \lVert B^\top B - I \rVert_F^2 +
            \lVert A A^\top - I \rVert_F^2$. PEFT adds `orth_reg_weight` times the mean of the norms
            themselves over all $A$ and $B$; so does the code of the paper's authors.
            """,
        fix=(
            'Add the squares: regu_loss += torch.norm(P P^T - I, p="fro")**2, without dividing by'
            " their number"
        ),
        right=r"""
            With one row and one column, $R = (B^2 - 1)^2 + (A^2 - 1)^2$ and $\partial R / \partial
            A = 4 (A^2 - 1) A$. The gradient vanishes as $A$ becomes orthogonal; that of the norm,
            $2A$ here, does not.
            """,
        consequence=r"""
            The paper's $\gamma$ is not `orth_reg_weight`: the one's pull grows with the distance
            and the number of projections, the other's depends on neither.
            """,
        not_asked="no method has AdaLoRA",
    ),
    Finding(
        id="peft.adalora-penalty-where",
        title="AdaLoRA's penalty is in an evaluation's loss, and in none without a task type",
        severity="training",
        seen=SEEN,
        since="0.9.0",
        cause=(
            "the penalty is added to any loss of the outputs, in evaluation too, and a "
            "PeftModel without a task calls the model below (tuners/adalora/model.py)"
        ),
        code="peft/tuners/adalora/model.py:256 AdaLoraModel.forward",
        does="""
            `AdaLoraModel.forward` adds the penalty wherever the outputs have a loss. A `PeftModel`,
            which is what a configuration without `task_type` gives, calls the model below it and
            goes past that forward, as [PEFT 432](https://github.com/huggingface/peft/issues/432)
            found; its subclasses for the tasks do not.
            """,
        fix="Add the penalty in training alone, and in PeftModel.forward too",
        right="""
            The penalty belongs to the loss of training, and only there; it is above 0 unless $A$
            and $B$ are orthogonal.
            """,
        consequence="""
            Without `task_type` nothing keeps $A$ and $B$ orthogonal, and nothing says so. With it,
            losses and perplexities of evaluations are too high by the penalty; compute them from
            the logits.
            """,
        not_asked="no method has AdaLoRA",
    ),
    Finding(
        id="peft.adalora-saved-between",
        title="AdaLoRA's adapter is saved as another function between two prunings",
        severity="silent",
        seen=SEEN,
        since="0.21.0",
        cause=(
            "what the last pruning took away is left out, whatever it has become "
            "(tuners/adalora/model.py)"
        ),
        code="peft/tuners/adalora/model.py:314 AdaLoraModel._get_adapter_state_dict",
        does="""
            With `deltaT` above 1 a pruned singular value is trained on until the next pruning, and
            is no zero then. `save_pretrained` leaves out the triplets that the last pruning took
            away, whatever they have become.
            """,
        fix="Save every triplet that is not 0, and the ranks that they have",
        right="""
            What is saved and loaded is the same function, as it is right after a pruning.
            """,
        consequence="""
            A checkpoint from the middle of training computes something else than the model that was
            evaluated beside it. Save at steps that prune. (The warning on loading is beside the
            point: the rank pattern that it calls ignored is the one that gives the tensors their
            shapes.)
            """,
        not_asked="no method has AdaLoRA",
    ),
    Finding(
        id="peft.adalora-equal-scores",
        title="AdaLoRA prunes all triplets of one score",
        severity="training",
        seen=SEEN,
        since="0.9.0",
        cause="all scores that are not above the threshold are pruned (tuners/adalora/layer.py)",
        code="peft/tuners/adalora/layer.py:488 RankAllocator.mask_to_budget",
        does="""
            The threshold is the greatest score that is to go, and all that does not exceed it goes.
            """,
        fix=(
            "Keep the budget's number of triplets: take the first of topk, not all that are above"
            " a threshold"
        ),
        right="""
            The budget is the number of triplets that stay; of equal scores, some do.
            """,
        consequence="""
            Scores in floating point are seldom equal, but where gradients are zero, as in a
            projection that the batch does not reach, all are.
            """,
        not_asked="no method has AdaLoRA",
    ),
    Finding(
        id="peft.adalora-alpha-0",
        title="AdaLoRA's adapter of alpha 0 is loaded with another scale",
        severity="silent",
        seen=SEEN,
        since="0.21.0",
        cause=(
            "for an alpha of 0 the scale is the rank, the pruned one when an adapter is "
            "loaded (tuners/adalora/layer.py)"
        ),
        code="peft/tuners/adalora/layer.py:85 AdaLoraLayer.update_layer",
        does="""
            For `lora_alpha=0` the layer takes the rank in its place, so that the scale is about 1.
            When an adapter is loaded that has been pruned, it takes the pruned rank, and divides by
            the rank of the start.
            """,
        fix="Take lora_alpha as it is, or refuse 0; do not take the rank for it",
        right="""
            What is saved and loaded is the same function. With any other alpha it is: then the rank
            of the start, which is kept for the purpose, is the only rank in the scale.
            """,
        consequence="""
            The branch of each projection shrinks by the share of its triplets that stay. Write the
            initial rank as `lora_alpha`.
            """,
        not_asked="no method has AdaLoRA",
        stored=Stored(
            _alpha_0,
            "scaled",
            "it divides the rank that is left by the rank of the start",
        ),
    ),
    Finding(
        id="peft.adalora-ranknum",
        title="AdaLoRA's rank is trained where the base is in half precision",
        severity="silent",
        seen=SEEN,
        since="0.21.0",
        cause=(
            "ranknum is a parameter, which a move to another dtype makes anew with a gradient"
            " (tuners/adalora/layer.py)"
        ),
        code="peft/tuners/adalora/layer.py:84 AdaLoraLayer.update_layer",
        does="""
            The scale of AdaLoRA divides by the rank of the start, which the layer keeps as a
            parameter without a gradient. Moving it to where the base is makes a new parameter of
            it, with one, if that changes the dtype, as it does for a base in bfloat16: the
            optimizer then trains the rank. It is not saved.
            """,
        fix="Make ranknum a buffer, which no move to another dtype turns into a trained parameter",
        right=r"""
            The scale is a constant, $s = \alpha / (r + 10^{-5})$.
            """,
        consequence="""
            The scales drift apart from projection to projection as training goes on, and the saved
            adapter is loaded with the scale of the start: another function than the one that was
            evaluated. Set `requires_grad` of every `ranknum` to false before the optimizer is made.
            """,
        not_asked="no method has AdaLoRA",
    ),
    Finding(
        id="peft.adalora-scale",
        title="AdaLoRA ignores rsLoRA and the patterns of alpha",
        severity="silent",
        seen=SEEN,
        since="0.9.0",
        cause=(
            "the scale is alpha over ranknum, and no setting is asked for (tuners/adalora/layer.py)"
        ),
        code="peft/tuners/adalora/layer.py:85 AdaLoraLayer.update_layer",
        does="""
            `AdaLoraConfig` takes `use_rslora` and `alpha_pattern`, saves them and computes nothing
            by them.
            """,
        fix="Read use_rslora and alpha_pattern as LoraLayer.update_layer does, or refuse them",
        right=r"""
            A setting that is taken acts: with rsLoRA $s = \alpha / \sqrt{r}$, with a pattern the
            $\alpha$ of the projection.
            """,
        consequence="""
            The scale is not the one that was asked for. minilora's reader refuses the two by name.
            """,
        not_asked="no method has AdaLoRA",
        stored=Stored(
            _without_effect, "use", "it computes nothing by these settings, and did not in training"
        ),
    ),
    Finding(
        id="peft.adalora-whole-budget",
        title="AdaLoRA fails where the budget does not fall",
        severity="fails",
        seen=SEEN,
        since="0.9.0",
        cause="kthvalue is asked for the value 0 (tuners/adalora/layer.py)",
        code="peft/tuners/adalora/layer.py:478 RankAllocator.mask_to_budget",
        fix="Return without pruning where the budget is all triplets (k = 0)",
        right="""
            A budget of as many triplets as there are prunes none.
            """,
        consequence="""
            `target_r` equal to `init_r`, AdaLoRA without pruning, raises at the first step that
            would prune, with an error that names neither.
            """,
        not_asked="no method has AdaLoRA",
    ),
    Finding(
        id="peft.adalora-budget-rounded",
        title="AdaLoRA's budget is one triplet short where it is a whole number",
        severity="rounding",
        seen=SEEN,
        since="0.9.0",
        cause="the product is cut by int, and not rounded (tuners/adalora/layer.py)",
        code="peft/tuners/adalora/layer.py:405 RankAllocator.budget_schedule",
        does="""
            The cube is computed in floating point and its product cut to a whole number.
            """,
        fix="Compute the budget in whole numbers: (init - target) * left**3 // whole**3 + target",
        right=r"""
            $125 \, (1 - \tfrac45)^3 = 1$.
            """,
        consequence="""
            One triplet of a step, and at the last step none. Who compares two implementations step
            by step meets it.
            """,
        not_asked="no method has AdaLoRA",
    ),
)
