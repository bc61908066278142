# cos^2 + sin^2 = 1 within the rounding of the dtype, 6 * 2^-53.
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

size = {"vocab_size": 5, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
tables = LlamaRotaryEmbedding(transformers.LlamaConfig(**size)).double()
cos, sin = tables(torch.zeros(1, dtype=torch.float64), torch.tensor([[1, 2, 3]]))
off = (cos * cos + sin * sin - 1).abs().max().item()
print("got     ", "within float64's rounding:", off <= 6 * 2.0**-53)
print("expected", "within float64's rounding:", True)
