# y = W x + s B1 A1 x + s B2 A2 x = 1 + 2 + 4, whichever of the two is merged.
import peft
import torch

base = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
model = peft.get_peft_model(base, config, "one").eval()
model.add_adapter("two", config)
layer = model.base_model.model[0]
layer.weight.data.fill_(1)
for name, change in {"one": 2, "two": 4}.items():
    layer.lora_A[name].weight.data.fill_(1)
    layer.lora_B[name].weight.data.fill_(change)
model.base_model.set_adapter(["one", "two"])
model.merge_adapter(["one"])
print("got     ", model(torch.ones(1, 1)).item())
print("expected", 7.0)
