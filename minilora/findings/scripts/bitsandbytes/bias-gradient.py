# y = W x + b, so db is the sum of dy over all tokens: of one token dy itself, [1, 2].
import bitsandbytes
import torch

nn, W = bitsandbytes.nn, torch.zeros(2, 64)
layer = nn.Linear4bit(64, 2, compute_dtype=W.dtype, quant_type="nf4")
layer.weight = nn.Params4bit(W, quant_type="nf4", requires_grad=False).to("cpu")
layer.bias = torch.nn.Parameter(torch.zeros(2))
try:
    found = torch.autograd.grad(layer(torch.zeros(64)), layer.bias, torch.tensor([1.0, 2.0]))
    found = found[0].tolist()
except RuntimeError as error:
    found = f"RuntimeError: {error}"
print("got     ", found)
print("expected", [1.0, 2.0])
