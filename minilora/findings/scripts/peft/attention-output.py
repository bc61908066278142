# One token attends to itself alone: the values are 1, and y = W v + s B A v = 1 + 1.
import peft
import torch

base = torch.nn.MultiheadAttention(1, 1, bias=False, batch_first=True)
base.in_proj_weight.data.fill_(1)
base.out_proj.weight.data.fill_(1)
config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["q"])
layer = peft.inject_adapter_in_model(config, torch.nn.ModuleDict({"q": base})).q
for factor in (layer.base_layer.out_proj.lora_A, layer.base_layer.out_proj.lora_B):
    factor["default"].weight.data.fill_(1)
x = torch.ones(1, 1, 1)
print("got     ", layer(x, x, x)[0].item())
print("expected", 2.0)
