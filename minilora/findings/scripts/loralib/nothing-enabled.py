# Without an adapter y = W x, with ones everywhere 1.
import loralib
import torch

layer = loralib.MergedLinear(1, 1, r=1, bias=False)
layer.weight.data.fill_(1)
try:
    found = layer(torch.ones(1, 1)).item()
except AttributeError as error:
    found = f"AttributeError: {error}"
print("got     ", found)
print("expected", 1.0)
