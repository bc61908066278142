# The new adapter has alpha 8 and r 1, so set_scale(1) means s = 1 * alpha / r = 8.
import peft
import torch
from peft.utils.hotswap import hotswap_adapter_from_state_dict

base = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
old, new = (peft.LoraConfig(r=1, lora_alpha=a, target_modules=["0"]) for a in (1, 8))
model = peft.get_peft_model(base, old, "one")
state = {f"base_model.model.0.lora_{part}.one.weight": torch.ones(1, 1) for part in "AB"}
hotswap_adapter_from_state_dict(model, state, "one", new)
layer = model.base_model.model[0]
layer.set_scale("one", 1.0)
print("got     ", layer.scaling["one"], "and saved alpha", model.peft_config["one"].lora_alpha)
print("expected", 8.0, "and saved alpha", 8)
