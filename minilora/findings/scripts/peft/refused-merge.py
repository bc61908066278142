# A merge that is refused changes nothing: y = W x + s (B A x + c) = 1 + 1 + 1.
import contextlib

import peft
import torch

base = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
config = peft.LoraConfig(r=1, lora_alpha=1, lora_bias=True, target_modules=["0"])
layer = peft.get_peft_model(base, config).base_model.model[0]
for parameter in layer.parameters():
    parameter.data.fill_(1)
with contextlib.suppress(RuntimeError):
    layer.merge()
print("got     ", layer(torch.ones(1, 1)).item())
print("expected", 3.0)
