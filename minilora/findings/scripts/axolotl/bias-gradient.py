# y = W x + b + s B A x, so db = dy = 1.
import peft
import torch
from axolotl.kernels.lora import apply_lora_linear

base = torch.nn.Sequential(torch.nn.Linear(1, 1))
config = peft.LoraConfig(r=1, lora_alpha=1, bias="all", target_modules=["0"])
layer = peft.get_peft_model(base, config).base_model.model[0]
apply_lora_linear(layer, torch.ones(1, 1, 1)).sum().backward()
print("got     ", layer.base_layer.bias.grad)
print("expected", torch.ones(1))
