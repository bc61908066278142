"""Findings in Keras."""

from minilora.findings.finding import Finding, Library

SEEN = "3.15.1"

FINDINGS = (
    Finding(
        id="keras.constructor-alpha",
        title="The constructor's `lora_alpha` is lost",
        severity="silent",
        seen=SEEN,
        cause=(
            "build() calls enable_lora(self.lora_rank) without lora_alpha, so s = 1 whatever "
            "alpha is (layers/core/dense.py)"
        ),
        does="""
            `build` calls `enable_lora(self.lora_rank)` without it, and `enable_lora` then sets
            alpha to the rank.
            """,
        code="keras/src/layers/core/dense.py:156 Dense.build",
        fix="Call self.enable_lora(self.lora_rank, lora_alpha=self.lora_alpha) in build()",
        right="""
            `Dense(…, lora_rank=r, lora_alpha=alpha)` has $s = alpha / r$, as `enable_lora(r,
            lora_alpha=alpha)` has.
            """,
        consequence="""
            A layer made by the constructor trains and acts with $s = 1$.
            """,
        found_by=("keras-constructor", "linear.forward", "linear.vjp", "merge.weight"),
    ),
)

LIBRARY = Library(
    "keras",
    "Keras",
    "keras",
    FINDINGS,
    files="https://github.com/keras-team/keras/blob/v{release}/{file}#L{line}",
)
