# y = x / sqrt(mean x^2): 1 + 2^-40 is greater than 1 after it, too.
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

x = torch.tensor([1, 1 + 2**-40], dtype=torch.float64)
first, second = LlamaRMSNorm(2).double()(x)
print("got     ", "greater:", (second > first).item())
print("expected", "greater:", True)
