"""Deviations of real libraries from the algebra: versions, conditions, effects, sources.

A module a library. The pages of the documentation, what `minilora verify` knows of its peers, and
`minilora audit adapter` read them here; `tests/peers/test_finding_scripts.py` runs their scripts.
"""

from minilora.findings import (
    adapters,
    axolotl,
    bitsandbytes,
    flax,
    jax,
    keras,
    llama_cpp,
    loralib,
    lycoris,
    mlx_lm,
    peft,
    sglang,
    tensorrt_llm,
    transformers,
    vllm,
)
from minilora.findings.finding import Finding, Library

LIBRARIES: dict[str, Library] = {
    module.LIBRARY.name: module.LIBRARY
    for module in (
        transformers,
        peft,
        loralib,
        bitsandbytes,
        lycoris,
        axolotl,
        adapters,
        mlx_lm,
        jax,
        keras,
        flax,
        vllm,
        sglang,
        llama_cpp,
        tensorrt_llm,
    )
}
"""By their names, in the order of the pages."""

FINDINGS: dict[str, Finding] = {
    finding.id: finding for library in LIBRARIES.values() for finding in library.findings
}
"""By their ids."""
