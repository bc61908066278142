# The active adapter is one. Once it is deleted nothing is active: y = W x = 1, and not
# W x + s B2 A2 x = 5.
import peft
import torch

base = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
model = peft.get_peft_model(base, config, "one")
model.add_adapter("two", config)
layer = model.base_model.model[0]
for weight, value in ((layer.weight, 1), (layer.lora_A["two"].weight, 1)):
    weight.data.fill_(value)
layer.lora_B["two"].weight.data.fill_(4)
model.delete_adapter("one")
print("got     ", model(torch.ones(1, 1)).item())
print("expected", 1.0)
