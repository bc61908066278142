"""Findings in transformers."""

from minilora.findings.conditions import not_in_base, parts
from minilora.findings.finding import Finding, Library, Stored
from minilora.findings.shared import FACTOR_AS_DRAWN, FUNCTION_OF_FILE

SEEN = "5.24.0"

FINDINGS = (
    Finding(
        id="transformers.names-fit-nothing",
        title="The base answers where the names of an adapter fit nothing",
        severity="silent",
        seen=SEEN,
        code="transformers/integrations/peft.py:244 PeftAdapterMixin.load_adapter",
        cause=(
            "load_adapter (integrations/peft.py) logs which tensors are missing and which are left "
            "over, and goes on"
        ),
        fix=(
            "Raise where no tensor of the file fits, and where some are left over, unless asked "
            "not to"
        ),
        right="""
            An adapter that does not fit is refused, or has its effect.
            """,
        consequence="""
            A file with other names (without the prefix, of another version of the model) answers
            as the base does. Look at what `load_adapter` returns: it lists the names.
            """,
        found_by=("transformers", "inference.names.misspelt", "inference.names.other-model"),
        stored=Stored(
            not_in_base,
            "dropped",
            "the base has no module of these names: their tensors are passed over",
        ),
    ),
    Finding(
        id="transformers.missing-factor",
        title="load_adapter leaves a missing factor A as it was drawn",
        severity="silent",
        seen=SEEN,
        code="transformers/integrations/peft.py:342 PeftAdapterMixin.load_adapter",
        cause=(
            "load_adapter (integrations/peft.py) logs which tensors are missing, and goes on with "
            "what the adapter was initialized with: an A that is drawn"
        ),
        fix="Raise where a factor of a module that the file names is missing",
        right=FUNCTION_OF_FILE,
        consequence="""
            A file that was cut is another function in each process. Look at what `load_adapter`
            returns: it lists the names.
            """,
        found_by=("transformers", "inference.names.missing-factor"),
        stored=FACTOR_AS_DRAWN,
    ),
    Finding(
        id="transformers.float64-loss",
        title="The loss of a float64 model is computed in float32",
        severity="rounding",
        seen=SEEN,
        code="transformers/loss/loss_utils.py:61 ForCausalLMLoss",
        cause=(
            "ForCausalLMLoss (loss/loss_utils.py) starts with `logits.float()`, so loss and "
            "gradients carry float32 rounding"
        ),
        does="""
            `ForCausalLMLoss` starts with `logits.float()`, whatever the model's dtype.
            """,
        fix=(
            "Cast logits up to float32 only where they are narrower: "
            "torch.promote_types(logits.dtype, torch.float32)"
        ),
        right="""
            The losses of two labels share the logarithm of the sum, so that $L_i - L_j = z_j -
            z_i$. Logits that float32 cannot tell apart get the same loss.
            """,
        consequence="""
            For half precision the cast is a gain. In float64, finite differences, `gradcheck` and
            reference values that pass through `.loss` have float32's accuracy. Take the logits, and
            compute the loss from them.
            """,
        found_by=("peft", "model.gpt2", "model.llama", "train.prompt"),
    ),
    Finding(
        id="transformers.float64-rmsnorm",
        title="A float64 Llama computes RMSNorm in float32",
        severity="rounding",
        seen=SEEN,
        code="transformers/models/llama/modeling_llama.py:64 LlamaRMSNorm.forward",
        cause=(
            "RMSNorm (models/llama/modeling_llama.py, qwen2 alike) casts its input to "
            "float32, so the logits carry it too"
        ),
        does="""
            RMSNorm casts its input to float32, RoPE its angles and tables, and the eager attention
            its softmax. The maintainers give the reason, the stability of half precision, in issues
            [24519](https://github.com/huggingface/transformers/issues/24519) and
            [30186](https://github.com/huggingface/transformers/issues/30186).
            """,
        fix="Compute in torch.promote_types(hidden_states.dtype, torch.float32)",
        right="""
            RMSNorm divides a token's features by one number, so it keeps their order.
            """,
        consequence="""
            A Llama in float64 is no reference for another one: its logits and gradients carry
            float32's rounding. minilora's own comparison replaces the casts
            (`tests/test_against_transformers.py`), and `minilora verify` counts them as known.
            """,
        found_by=("peft", "model.llama", "grad-flow.first-layer"),
    ),
    Finding(
        id="transformers.float64-rope",
        title="A float64 Llama computes RoPE in float32",
        severity="rounding",
        seen=SEEN,
        code="transformers/models/llama/modeling_llama.py:111 LlamaRotaryEmbedding.forward",
        cause="RoPE (models/llama/modeling_llama.py) casts its angles and tables to float32",
        does="""
            RoPE casts its angles and tables to float32.
            """,
        fix="Compute the angles in torch.promote_types(x.dtype, torch.float32)",
        right=r"""
            RoPE's matrix is orthogonal: $\cos^2 + \sin^2 = 1$.
            """,
        found_by=("peft", "model.llama", "grad-flow.first-layer"),
    ),
    Finding(
        id="transformers.float64-softmax",
        title="A float64 Llama computes its softmax in float32",
        severity="rounding",
        seen=SEEN,
        code="transformers/models/llama/modeling_llama.py:197 eager_attention_forward",
        cause=(
            "eager_attention_forward (models/llama/modeling_llama.py) casts its scores to float32"
        ),
        does="""
            The eager attention casts its scores to float32.
            """,
        fix="Ask softmax for torch.promote_types(query.dtype, torch.float32)",
        right="""
            Of two keys, softmax gives the one with the higher score more than half of the weight.
            """,
        found_by=("peft", "model.llama", "grad-flow.first-layer"),
    ),
    Finding(
        id="transformers.float64-padding",
        title="Padding on the left makes a float64 Llama NaN",
        severity="silent",
        seen=SEEN,
        code="transformers/masking_utils.py:615 eager_mask",
        cause=(
            "the least float64, which fills the mask, is -inf in that softmax: a row without any "
            "key (padding on the left) is NaN"
        ),
        does="""
            With eager attention the mask is filled with the least number of the model's dtype, and
            float64's is −∞ in the float32 softmax. A padding query at the left has no key besides,
            and its softmax is 0/0.
            """,
        fix=(
            "Take the least number of the dtype in which softmax computes, or compute it in float64"
        ),
        right=r"""
            No real token attends to padding, so any finite answer for it is right. NaN is not: in
            the next layer the padding's value is NaN and its weight 0, and $0 \cdot \text{NaN} =
            \text{NaN}$.
            """,
        consequence="""
            From the second layer on, every token of such a sequence is NaN, and so is the batch's
            loss, which it is not in float32. Use `attn_implementation="sdpa"`, or pad on the right.
            """,
        found_by=("peft", "model.llama.padding", "train.labels"),
    ),
    Finding(
        id="transformers.constant-warmup",
        title="The warm-up of a constant schedule is ignored",
        severity="training",
        seen=SEEN,
        code="transformers/optimization.py:1015 get_scheduler",
        cause=(
            "get_scheduler (optimization.py) calls get_constant_schedule without num_warmup_steps"
        ),
        does="""
            `get_scheduler("constant", …)` takes `num_warmup_steps` and drops it without a word. The
            library has another name for what is meant, `constant_with_warmup`.
            """,
        fix="Pass num_warmup_steps on, as constant_with_warmup, or refuse it",
        right=r"""
            A warm-up multiplies the rate of step $k$ by $k / \text{warmup}$, whatever follows.
            """,
        consequence="""
            Training starts at the full rate. The trainer's `lr_scheduler_type="constant"` with
            `warmup_steps` comes to the same function.
            """,
        found_by=("peft", "optimizer.all", "train.loraplus"),
    ),
    Finding(
        id="transformers.cosine-end",
        title="A cosine schedule rises again after its end",
        severity="training",
        seen=SEEN,
        code="transformers/optimization.py:140 _get_cosine_schedule_with_warmup_lr_lambda",
        cause=(
            "get_cosine_schedule_with_warmup (optimization.py) takes the cosine of the "
            "progress without bounding it by 1: beyond total_steps the rate rises from 0 "
            "again"
        ),
        does=r"""
            `get_cosine_schedule_with_warmup` takes the progress $q = k / \text{total}$ as it is:
            beyond the last step, where $q > 1$, the rate goes up again, to the full one at twice
            the steps.
            """,
        fix="Bound the progress by 1, as the other schedules do: min(1.0, progress)",
        right=r"""
            The rate falls over the steps that were announced, and has then fallen: $q = \min(1, k /
            \text{total})$, as the linear schedule of the same library has it.
            """,
        consequence="""
            A run that goes on for longer than its schedule was made for trains at a growing rate.
            """,
        found_by=("peft", "optimizer.cosine-schedule.past-end"),
    ),
    Finding(
        id="transformers.dora-magnitude",
        title="DoRA is loaded without its magnitude",
        severity="silent",
        seen=SEEN,
        code="transformers/integrations/peft.py:240 PeftAdapterMixin.load_adapter",
        cause=(
            "load_adapter (integrations/peft.py) renames the file's lora_magnitude_vector to "
            "one without the parameter's .weight: DoRA's magnitude is not loaded, and stays "
            "the norm of the base"
        ),
        does="""
            `model.load_adapter` renames the file's `lora_magnitude_vector` to
            `lora_magnitude_vector.default`; the parameter is called `….default.weight`. A report
            that is logged names the one as unexpected and the other as missing, and the magnitude
            stays the norm of the base's rows.
            """,
        fix=(
            "Rename lora_magnitude_vector to lora_magnitude_vector.{adapter_name}.weight, as PEFT"
            " does"
        ),
        right=r"""
            $W' = m\, (W + s B A) / \lVert W + s B A \rVert$ with the magnitude in the file.
            """,
        consequence="""
            The model computes with untrained magnitudes. Load with `PeftModel.from_pretrained`.
            """,
        found_by=("transformers", "inference.logits.dora"),
        stored=Stored(
            parts("magnitude"),
            "other",
            "load_adapter leaves DoRA's magnitudes at the norms of the base",
        ),
    ),
    Finding(
        id="transformers.classifier-batches",
        title="A classifier is trained by the sum of its micro-batches' losses",
        severity="training",
        seen=SEEN,
        code="transformers/trainer.py:2167 Trainer.compute_loss",
        cause=(
            "Trainer.compute_loss (trainer.py) divides the losses of micro-batches by their "
            "number only where the model takes no further keyword arguments: a classifier "
            "takes them, and its own loss is the mean of each micro-batch"
        ),
        does="""
            `Trainer` divides a loss by the number of micro-batches of a step, unless the model's
            forward takes further keyword arguments: then it hands it `num_items_in_batch`, and
            expects a loss that is divided by it. The forward of a classifier takes them, and its
            loss is the mean of the micro-batch as before.
            """,
        fix=(
            "Divide by the number of micro-batches unless the model's own loss takes "
            "num_items_in_batch"
        ),
        right=r"""
            Two equal micro-batches have the gradient of one, $\nabla \tfrac12 (L + L) = \nabla L$.
            """,
        consequence="""
            With `gradient_accumulation_steps=k` a classifier's gradient is k times as large:
            clipping acts, or the rate is in fact k times as high.
            """,
        found_by=("trainer", "train.classifier"),
    ),
)

LIBRARY = Library(
    "transformers",
    "transformers",
    "transformers",
    FINDINGS,
    release=SEEN,
    reads=("peft",),
    files="https://github.com/huggingface/transformers/blob/v{release}/src/{file}#L{line}",
)
