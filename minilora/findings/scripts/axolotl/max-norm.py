# A forward changes no parameter: A = 2 before and after. The row W + s B A = 0 + 0.5 * 2 is
# within max_norm = 1.
import peft
import torch
from axolotl.kernels.lora import apply_lora_embedding

base = torch.nn.Sequential(torch.nn.Embedding(1, 1, max_norm=1.0))
config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
layer = peft.get_peft_model(base, config).base_model.model[0]
layer.weight.data.fill_(0)
layer.lora_embedding_A["default"].data.fill_(2)
layer.lora_embedding_B["default"].data.fill_(0.5)
y = apply_lora_embedding(layer, torch.tensor([[0]])).item()
print("got     ", "A", round(layer.lora_embedding_A["default"].item(), 3), "y", round(y, 3))
print("expected", "A", 2.0, "y", 1.0)
