"""Qwen3 in files."""

from dataclasses import replace

from minilora.io.architectures.llama import LLAMA, QWEN2
from minilora.spec.architectures import Qwen3

QWEN3 = replace(
    QWEN2,
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    config=Qwen3,
    constant={},
    block={
        **LLAMA.block,
        "norm_q": "self_attn.q_norm",
        "norm_k": "self_attn.k_norm",
    },
    # transformers would take 32 key/value heads and heads of 128 features, whatever the model
    absent={key: LLAMA.absent[key] for key in ("eps", "tied")},
    fixed={**QWEN2.fixed, "attention_bias": (False,)},
    written={**QWEN2.written, "attention_bias": False},
)
