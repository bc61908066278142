# y = W x = 1 + 2^-9 with W = [1, 1], in training and in evaluation.
import bitsandbytes
import torch

nn, x = bitsandbytes.nn, torch.tensor([[1, 2.0**-9]])
layer = nn.Linear8bitLt(2, 1, bias=False, has_fp16_weights=False)
weight = nn.Int8Params(torch.ones(1, 2), requires_grad=False, has_fp16_weights=False)
layer.weight = weight.to("cpu")
with torch.no_grad():
    found = [layer.train()(x).item() > 1 + 2**-10, layer.eval()(x).item() > 1 + 2**-10]
print("got     ", found, "that the second feature counts, in training and in evaluation")
print("expected", [True, True], "that the second feature counts, in training and in evaluation")
