# Unmerging restores W. W = 2^-30 and s B A = 1: the sum rounds to 1 in float32, and 1 - 1 = 0.
import peft
import torch

base = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
model = peft.get_peft_model(base, peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
layer = model.base_model.model[0]
layer.weight.data.fill_(2**-30)
layer.lora_A["default"].weight.data.fill_(1)
layer.lora_B["default"].weight.data.fill_(1)
model.merge_adapter()
model.unmerge_adapter()
print("got     ", layer.weight.item())
print("expected", 2**-30)
