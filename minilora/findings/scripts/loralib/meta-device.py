# Where a layer was built changes nothing of y = W x + s B A x = 1 + 1.
import loralib
import torch

how = {"r": 1, "enable_lora": [True], "bias": False}
layer = loralib.MergedLinear(1, 1, **how)
for parameter in layer.parameters():
    parameter.data.fill_(1)
later = loralib.MergedLinear(1, 1, **how, device="meta").to_empty(device="cpu")
later.load_state_dict(layer.state_dict())
print("got     ", later(torch.ones(1, 1)).item())
print("expected", layer(torch.ones(1, 1)).item())
