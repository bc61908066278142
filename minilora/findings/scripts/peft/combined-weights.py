# w B A in float64, with w = (1 + 2^-26)^2 and B A = 1: w itself. The root rounded to float32 is 1.
import peft
import torch

base = torch.nn.Sequential(torch.nn.Linear(1, 1, dtype=torch.float64))
config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
model = peft.get_peft_model(base, config, "one", autocast_adapter_dtype=False)
layer, w = model.base_model.model[0], (1 + 2**-26) ** 2
layer.lora_A["one"].weight.data.fill_(1)
layer.lora_B["one"].weight.data.fill_(1)
model.add_weighted_adapter(["one"], [w], "all", combination_type="linear")
print("got     ", layer.get_delta_weight("all").item())
print("expected", w)
