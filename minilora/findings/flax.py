"""Findings in Flax NNX."""

from minilora.findings.finding import Finding, Library

SEEN = "0.12.8"

FINDINGS = (
    Finding(
        id="flax.fresh-a",
        title="A fresh A has six times the variance",
        severity="choice",
        seen=SEEN,
        cause=(
            "A is drawn by he_uniform, U(-√(6/n), √(6/n)), √6 times as wide (flax/nnx/nn/lora.py)"
        ),
        does=r"""
            `nnx.LoRA` draws $A$ by `he_uniform`, $U(-\sqrt{6/n}, \sqrt{6/n})$; and it has no scale.
            """,
        code="flax/nnx/nn/lora.py:98 LoRA.__init__",
        fix=(
            "Draw A from U(-1/sqrt(n), 1/sqrt(n)) as the LoRA paper's code does, or say that it "
            "is another choice"
        ),
        right=r"""
            loralib, PEFT and the others draw $U(-1/\sqrt n, 1/\sqrt n)$.
            """,
        consequence="""
            A learning rate that is carried over acts six times as strongly on $B$.
            """,
        found_by=("flax", "init.distribution"),
    ),
)

LIBRARY = Library(
    "flax",
    "Flax NNX",
    "flax",
    FINDINGS,
    files="https://github.com/google/flax/blob/v{release}/{file}#L{line}",
)
