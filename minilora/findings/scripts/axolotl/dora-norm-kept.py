# y = m (W + s B A) x / ||W + s B A|| with the B of now: 1 * (1 + 1) / 2.
import peft
import torch
from axolotl.kernels.lora import apply_lora_linear

base = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
base[0].weight.data.fill_(1)
config = peft.LoraConfig(r=1, lora_alpha=1, use_dora=True, target_modules=["0"])
layer = peft.get_peft_model(base, config).base_model.model[0]
layer.lora_A["default"].weight.data.fill_(1)
x = torch.ones(1, 1, 1)
apply_lora_linear(layer, x)
layer.lora_B["default"].weight.data.fill_(1)  # as optimizers do that write through .data
print("got     ", apply_lora_linear(layer, x).item())
print("expected", layer(x).item())
