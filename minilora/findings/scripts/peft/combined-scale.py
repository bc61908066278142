# One adapter with weight 1 combined is the same adapter: s B A with s = alpha / sqrt(r) = 4, and
# B A = 4.
import peft
import torch

base = torch.nn.Sequential(torch.nn.Linear(1, 1))
config = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["0"])
model = peft.get_peft_model(base, config, "one")
layer = model.base_model.model[0]
layer.lora_A["one"].weight.data.fill_(1)
layer.lora_B["one"].weight.data.fill_(1)
model.add_weighted_adapter(["one"], [1.0], "all", combination_type="linear")
print("got     ", layer.get_delta_weight("all").item())
print("expected", layer.get_delta_weight("one").item())
