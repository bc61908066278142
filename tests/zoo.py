"""Tiny models: no two sizes that could be mistaken for one another are equal."""

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
