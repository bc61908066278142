"""PEFT's optimizers, and what it trains otherwise than asked."""

from minilora.findings.finding import Finding
from minilora.findings.peft.release import SEEN

FINDINGS = (
    Finding(
        id="peft.loraplus-decay",
        title="A weight decay given for LoRA+ becomes zero",
        severity="training",
        seen=SEEN,
        since="0.13.2",
        code="peft/optimizers/loraplus.py:90 create_loraplus_optimizer",
        cause=(
            "create_loraplus_optimizer (optimizers/loraplus.py) gives each group "
            "loraplus_weight_decay, whatever weight_decay is"
        ),
        does="""
            `create_loraplus_optimizer` passes `weight_decay` on as the optimizer's default, but
            gives each group of parameters a decay of its own, `loraplus_weight_decay`, which is 0
            unless given. The review of [PEFT 1915](https://github.com/huggingface/peft/pull/1915),
            which added the function, discusses what an ordinary `weight_decay` should do.
            """,
        fix="Take weight_decay where loraplus_weight_decay is not given",
        right=r"""
            Without gradients AdamW is its decay alone, $p \leftarrow (1 - \eta\lambda)\,p$, each
            parameter with its own rate $\eta$.
            """,
        consequence="""
            Nothing decays, and nothing says so. Write `loraplus_weight_decay`; in [axolotl
            4010](https://github.com/axolotl-ai-cloud/axolotl/issues/4010) a trainer did not.
            """,
        found_by=("peft", "optimizer.loraplus", "train.combined"),
    ),
    Finding(
        id="peft.loraplus-vectors",
        title="Trained vectors have the rate of B with LoRA+",
        severity="choice",
        seen=SEEN,
        since="0.13.2",
        code="peft/optimizers/loraplus.py:81 create_loraplus_optimizer",
        cause=(
            "create_loraplus_optimizer (optimizers/loraplus.py) gives the rate of B to every vector"
        ),
        does="""
            `create_loraplus_optimizer` gives the greater rate to every parameter of one dimension:
            biases, norms, DoRA's magnitudes. So does the code of the paper's authors.
            """,
        fix="Give a vector the rate of B only where its name holds lora_B",
        right=r"""
            LoRA+ says what the rates of $A$ and $B$ are, $\eta_A = \eta$ and $\eta_B =
            \lambda\eta$, for factors of which one starts at zero; of a bias it says nothing. That
            is a choice, then, and the pages of `optim` make the other one: whatever is no $B$ keeps
            $\eta$.
            """,
        consequence="""
            With `bias="lora_only"` the base's biases learn by the ratio faster than they would with
            the plain optimizer.
            """,
        found_by=("peft", "optimizer.loraplus.other-params", "train.loraplus.other-params"),
    ),
    Finding(
        id="peft.loraplus-embedding",
        title="The adapter of an embedding has a rate of its own with LoRA+",
        severity="training",
        seen=SEEN,
        since="0.21.0",
        code="peft/optimizers/loraplus.py:91 create_loraplus_optimizer",
        cause=(
            "create_loraplus_optimizer (optimizers/loraplus.py) gives an embedding's adapter "
            "a rate of its own, 1e-6"
        ),
        does="""
            It is `loraplus_lr_embedding`, whose default is fixed, for $A$ and $B$ alike; neither
            `lr` nor the ratio acts on it.
            """,
        fix=(
            "Give an embedding's A the rate lr and its B the rate ratio * lr unless "
            "loraplus_lr_embedding is given"
        ),
        right=r"""
            $\eta_A = \eta$ and $\eta_B = \lambda\eta$.
            """,
        consequence="""
            With usual rates an embedding's adapter hardly moves, and nothing says so. Give
            `loraplus_lr_embedding`.
            """,
        found_by=("peft", "train.loraplus.other-params"),
    ),
    Finding(
        id="peft.tied-factors",
        title="Tied factors are trained by two optimizers",
        severity="training",
        seen=SEEN,
        since="0.19.1",
        cause=(
            "the head's factors are parameters of their own, on the embedding's memory "
            "(tuners/lora/layer.py)"
        ),
        code="peft/tuners/lora/layer.py:273 LoraLayer.update_layer",
        does="""
            With `ensure_weight_tying` the head's A and B are parameters of their own that share the
            embedding's memory. Each has its own gradient and its own state in the optimizer, and
            both write to the same numbers. Moving the model to another dtype or device unties them.
            """,
        fix=(
            "Register the embedding's factors at the head as the same parameters, transposed "
            "where they are used"
        ),
        right="""
            One factor that is used twice has one gradient, the sum of the two. Only an optimizer
            that is linear in the gradient, plain SGD, gives the same by two steps.
            """,
        consequence="""
            With Adam the tied factors move up to twice as far as the rate says. What is saved after
            a move holds two adapters that are no longer each other's transpose.
            """,
        not_asked="a session's step is plain SGD, of which two steps are one of the sum",
    ),
    Finding(
        id="peft.lorafa-bfloat16",
        title="LoRA-FA's gradient is rounded to bfloat16",
        severity="rounding",
        seen=SEEN,
        since="0.16.0",
        cause="the gradient of B is computed under autocast to bfloat16 (optimizers/lorafa.py)",
        code="peft/optimizers/lorafa.py:170 LoraFAOptimizer.step",
        does="""
            The optimizer of `create_lorafa_optimizer` computes its gradient of $B$ under `autocast`
            to bfloat16 wherever the device has bfloat16, a CPU included, whatever the parameters'
            dtype and whether or not the training uses autocast.
            """,
        fix="Compute the gradient in its own dtype, without autocast",
        right=r"""
            The gradient is $g = \d B \, (A A^\top)^{-1} / s^2$ (`lorafa_gradient` in `optim`), in
            the dtype of the parameters: float32 training keeps its digits everywhere else.
            """,
        consequence="""
            Float32 training has gradients of eight bits. The decay, too, differs from AdamW's: it
            acts after the step, on what the step has made.
            """,
        not_asked="no method has LoRA-FA",
    ),
)
