"""Tiny models: no two sizes that could be mistaken for one another are equal."""

from minilora.spec.architectures import DistilBert, Gemma3, Llama3, Qwen3, RopeScaling, SmolLM3
from minilora.spec.models import GPT2, Bert, Llama

MODELS = {
    "Llama": Llama(vocab=11, d=5, layers=2, heads=2, ffn=7, kv_heads=1, head_dim=4, eps=0.1),
    "Llama, tied": Llama(
        vocab=9, d=5, layers=2, heads=3, ffn=7, kv_heads=1, head_dim=2, tied=True, theta=100.0
    ),
    "Qwen2": Llama(vocab=11, d=5, layers=2, heads=4, ffn=7, kv_heads=2, head_dim=2, qkv_bias=True),
    "GPT-2": GPT2(vocab=11, d=6, layers=2, heads=3, ffn=7, positions=9, eps=0.1),
    "BERT": Bert(vocab=11, d=6, layers=2, heads=3, ffn=7, positions=9, types=2, classes=4),
}

_LLAMA = {"vocab": 11, "d": 8, "ffn": 7, "heads": 4, "kv_heads": 2, "head_dim": 6, "eps": 0.1}
MORE_MODELS = {
    "Llama 3": Llama3(**_LLAMA, layers=2, scaling=RopeScaling(8.0, 1.0, 4.0, 16), theta=100.0),
    "Qwen3": Qwen3(**_LLAMA, layers=2),
    "SmolLM3": SmolLM3(**_LLAMA, layers=3, without_positions=(1,), tied=True),
    "Gemma 3": Gemma3(
        **_LLAMA,
        layers=3,
        tied=True,
        window=(2, None, 2),
        theta=1e3,
        local_theta=50.0,
        score_scale=7,
    ),
    "DistilBERT": DistilBert(vocab=11, d=6, layers=2, heads=3, ffn=7, positions=9, classes=4),
}
"""Models of `minilora.spec.architectures`."""
