"""Findings in axolotl."""

from minilora.findings.finding import Finding, Library

SEEN = "0.19.0"

FINDINGS = (
    Finding(
        id="axolotl.embed-scale",
        title="The kernel of an embedding leaves out the embedding's scale",
        severity="silent",
        seen=SEEN,
        code="axolotl/kernels/lora.py:2197 apply_lora_embedding",
        cause=(
            "apply_lora_embedding (kernels/lora.py) looks the rows up itself, and has no "
            "embed_scale, by which the embedding's own forward multiplies"
        ),
        does=r"""
            With `lora_embedding_kernel` the forward of an adapted embedding is replaced. The base's
            is called no more: that of Gemma multiplies its rows by $\sqrt{d}$.
            """,
        fix="Multiply the result by the layer's embed_scale where it has one",
        right=r"""
            $y = c\,(W + sBA)_{\cdot, t}$ for an embedding with the scale $c$, as PEFT has it.
            """,
        consequence=r"""
            A Gemma whose `embed_tokens` is adapted is trained on rows that are $\sqrt{d}$ times too
            small, and is another model without the kernel. Set `lora_embedding_kernel: false`.
            """,
        found_by=("axolotl", "module.embedding.forward", "module.embedding.gradients"),
    ),
    Finding(
        id="axolotl.max-norm",
        title="The kernel of an embedding with max_norm shortens lora_A",
        severity="silent",
        seen=SEEN,
        code="axolotl/kernels/lora.py:2067 LoRA_Embedding.forward",
        cause="it looks up the columns of lora_A with the max_norm of the table (kernels/lora.py)",
        does="""
            `max_norm` bounds the rows of an embedding, and PyTorch shortens in place what it looks
            up. The kernel looks up the columns of $A$ with the same bound.
            """,
        fix="Look up the columns of A without max_norm",
        right="""
            The bound is one of the table's rows, $W$; $A$ has none.
            """,
        consequence="""
            A forward changes what is trained. Few language models have such a table.
            """,
        found_by=(
            "axolotl",
            "module.embedding.max-norm.forward",
            "module.embedding.max-norm.gradients",
        ),
    ),
    Finding(
        id="axolotl.down-dropout",
        title="The kernel of an MLP drops nothing of its down projection's branch",
        severity="training",
        seen=SEEN,
        code="axolotl/kernels/lora.py:397 LoRA_MLP.forward",
        cause=(
            "LoRA_MLP (kernels/lora.py) hands the input of down_proj on as it is: the dropout of "
            "that projection is never called"
        ),
        does="""
            The docstring says so: the input is "an intermediate".
            """,
        fix="Apply down_proj's own dropout to what its branch sees, in both directions",
        right=r"""
            $y = W h + s B A (K \circ h)$ in training, for each projection that has `lora_dropout`.
            """,
        consequence="""
            With `lora_mlp_kernel` and `lora_dropout` the adapters of `down_proj` train without the
            regularisation that was asked for.
            """,
        not_asked="no layer of `module` is a whole MLP",
    ),
    Finding(
        id="axolotl.dora-norm-kept",
        title="The kernels of DoRA keep a norm after A and B have changed through .data",
        severity="silent",
        seen=SEEN,
        code="axolotl/kernels/lora.py:170 _compute_dora_scale",
        cause=(
            "_compute_dora_scale (kernels/lora.py) keeps the norm as long as PyTorch's counter of "
            "A and B stands, which a change through .data or a change of W does not move"
        ),
        does="""
            The norm is kept beside the magnitude. It is computed anew when `A._version` or
            `B._version` is another one. An optimizer that writes `p.data.add_(…)` moves neither,
            and a base that was changed, by a merge for instance, is not looked at.
            """,
        fix="Compute the norm in each forward, as PEFT does, or compare what A, B and W hold",
        right=r"""
            $y = m \circ (W + sBA)\,x / \lVert W + sBA \rVert$ with the $A$ and $B$ of now.
            """,
        consequence="""
            With optimizers that write through `.data`, as CAME and others do, DoRA trains with the
            norm of the first step, and the saved adapter is another function. Set
            `lora_qkv_kernel`, `lora_o_kernel` and `lora_mlp_kernel` to false.
            """,
        not_asked="each call of a method builds its layer anew",
    ),
    Finding(
        id="axolotl.bias-gradient",
        title="The kernels have no gradient of the base's bias",
        severity="training",
        seen=SEEN,
        code="axolotl/kernels/lora.py:1755 LoRA_O.backward",
        cause="the backwards (kernels/lora.py) return None for the base's bias",
        does="""
            With `bias="all"` PEFT trains the base's biases, and `apply_lora_kernel_patches` logs
            that it has them enabled. All backwards return `None` for them.
            """,
        fix="Return the sum of dy over the tokens for a bias that is trained, or refuse it",
        right=r"""
            $\d b = \sum_t \d y_t$.
            """,
        consequence="""
            Such a bias stays as it was, and no error tells. axolotl's own configuration trains no
            biases: this is met by who applies the kernels to a model of PEFT's.
            """,
        found_by=("axolotl", "linear.vjp.bias", "variants.lora-bias.vjp"),
    ),
)

LIBRARY = Library(
    "axolotl",
    "axolotl",
    "axolotl",
    FINDINGS,
    files="https://github.com/axolotl-ai-cloud/axolotl/blob/v{release}/src/{file}#L{line}",
)
