# W' = round(W + s B A), rounded once: 1 + (2^-8 + 2^-18) lies above the middle between the
# neighbours 1 and 1 + 2^-7 of bfloat16. Rounding s B A first puts it on the middle.
import peft
import torch

base = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16))
model = peft.get_peft_model(base, peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
layer = model.base_model.model[0]
layer.weight.data.fill_(1)
layer.lora_A["default"].weight.data.fill_(1)
layer.lora_B["default"].weight.data.fill_(2**-8 + 2**-18)
model.merge_adapter(safe_merge=True)
print("got     ", layer.weight.item())
print("expected", 1 + 2**-7)
