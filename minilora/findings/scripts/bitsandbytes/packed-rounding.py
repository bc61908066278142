# y = W x = 1 + 2^-20, which NF4 holds as the scale of its block and float32 as a number. (The
# packing is that of processors with AVX-512 for bfloat16.)
import bitsandbytes
import torch

nn, W = bitsandbytes.nn, torch.zeros(32, 64)
W[:, 0] = 1 + 2**-20
layer = nn.Linear4bit(64, 32, bias=False, compute_dtype=W.dtype, quant_type="nf4")
layer.weight = nn.Params4bit(W, quant_type="nf4", compress_statistics=False).to("cpu")
with torch.no_grad():
    found = [layer.train()(torch.ones(1, 64))[0, 0], layer.eval()(torch.ones(1, 64))[0, 0]]
print("got     ", [each.item() for each in found], "in training and in evaluation")
print("expected", [1 + 2**-20] * 2, "in training and in evaluation")
