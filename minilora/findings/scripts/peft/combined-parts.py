# One adapter with weight 1 combined is the same adapter: y = W x + s (B A x + c) = 1 + 1 + 8.
import peft
import torch

base = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
config = peft.LoraConfig(r=1, lora_alpha=1, lora_bias=True, target_modules=["0"])
model = peft.get_peft_model(base, config, "one")
layer = model.base_model.model[0]
for parameter in layer.parameters():
    parameter.data.fill_(1)
layer.lora_B["one"].bias.data.fill_(8)
model.add_weighted_adapter(["one"], [1.0], "all", combination_type="linear")
model.set_adapter("all")
print("got     ", model(torch.ones(1, 1)).item())
print("expected", 10.0)
