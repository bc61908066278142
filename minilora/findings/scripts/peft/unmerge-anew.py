# Unmerging undoes merging: (W + s B A) - s B A = W, with the s that was merged. W = 1, B A = 2.
import peft
import torch

base = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
model = peft.get_peft_model(base, peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
layer = model.base_model.model[0]
for weight, value in ((layer.weight, 1), (layer.lora_A["default"].weight, 1)):
    weight.data.fill_(value)
layer.lora_B["default"].weight.data.fill_(2)
model.merge_adapter()
layer.set_scale("default", 3)
model.unmerge_adapter()
print("got     ", layer.weight.item())
print("expected", 1.0)
