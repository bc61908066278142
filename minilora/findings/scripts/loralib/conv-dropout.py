# With p = 1 all of the branch is dropped: y = W x = 1.
import loralib
import torch

layer = loralib.Conv2d(1, 1, kernel_size=1, r=1, lora_dropout=1.0, bias=False)
for parameter in layer.parameters():
    parameter.data.fill_(1)
print("got     ", layer(torch.ones(1, 1, 1, 1)).item())
print("expected", 1.0)
