# dx = W^T dy = [2, 0, ..., 3, 0, ...] with dy = 1, before an evaluation and after it. (The packing
# is that of processors with AVX-512 for bfloat16.)
import bitsandbytes
import torch

nn, W = bitsandbytes.nn, torch.zeros(32, 128)
W[0, ::64] = torch.tensor([2.0, 3.0])
layer = nn.Linear4bit(128, 32, bias=False, compute_dtype=W.dtype, quant_type="nf4")
layer.weight = nn.Params4bit(W, quant_type="nf4", compress_statistics=False).to("cpu")
with torch.no_grad():
    layer.eval()(torch.zeros(1, 128))
x = torch.zeros(1, 128, requires_grad=True)
layer.train()(x).sum().backward()
print("got     ", x.grad if x.grad is None else x.grad[0, ::64].tolist())
print("expected", [2.0, 3.0])
