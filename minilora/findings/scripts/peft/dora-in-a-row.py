# A DoRA adapter changes W by g V - W, with V = W + s B A and g = m / ||V||. Two of them:
# 1 + (4 - 1) + (2 - 1) = 5, in either order.
import peft
import torch

base = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
config = peft.LoraConfig(r=1, lora_alpha=1, use_dora=True, target_modules=["0"])
model = peft.get_peft_model(base, config, "one").eval()
model.add_adapter("two", config)
layer, found = model.base_model.model[0], []
layer.weight.data.fill_(1)
for name, change, magnitude in (("one", 1, 4), ("two", 3, 2)):
    layer.lora_A[name].weight.data.fill_(1)
    layer.lora_B[name].weight.data.fill_(change)
    layer.lora_magnitude_vector[name].weight.data.fill_(magnitude)
for order in (["one", "two"], ["two", "one"]):
    model.base_model.set_adapter(order)
    found.append(model(torch.ones(1, 1)).item())
print("got     ", found)
print("expected", [5.0, 5.0])
