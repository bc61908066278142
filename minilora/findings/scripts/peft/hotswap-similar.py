# Swapping one leaves two others as they are: y = W x + s B A x = 1 + 4 with "onetwo" active.
import peft
import torch
from peft.utils.hotswap import hotswap_adapter_from_state_dict

base = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
model = peft.get_peft_model(base, config, "one")
model.add_adapter("onetwo", config)
layer = model.base_model.model[0]
for weight, value in ((layer.weight, 1), (layer.lora_A["onetwo"].weight, 1)):
    weight.data.fill_(value)
layer.lora_B["onetwo"].weight.data.fill_(4)
state = {f"base_model.model.0.lora_{part}.one.weight": torch.ones(1, 1) for part in "AB"}
hotswap_adapter_from_state_dict(model, state, "one", config)
model.set_adapter("onetwo")
print("got     ", model(torch.ones(1, 1)).item())
print("expected", 5.0)
