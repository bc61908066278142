# Merging changes no output: y = b + s c with x = 0, b = 0, s = 2 and c = 1.
import bitsandbytes
import peft
import torch

nn, W = bitsandbytes.nn, torch.zeros(1, 64)
layer = nn.Linear4bit(64, 1, compute_dtype=W.dtype, quant_type="nf4")
layer.weight = nn.Params4bit(W, quant_type="nf4", requires_grad=False).to("cpu")
layer.bias = torch.nn.Parameter(torch.zeros(1))
whole = torch.nn.Sequential(layer)
whole.is_loaded_in_4bit = True
config = peft.LoraConfig(r=1, lora_alpha=2, lora_bias=True, target_modules=["0"])
model = peft.get_peft_model(whole, config).train()
model.base_model.model[0].lora_B["default"].bias.data.fill_(1)
model.merge_adapter()
print("got     ", model(W).item())
print("expected", 2.0)
