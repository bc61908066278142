# y = g W x + b with x = 1, so db = dy = 1, whatever g is; here g = 512.
import peft
import torch

base = torch.nn.Sequential(torch.nn.Linear(1, 1, dtype=torch.bfloat16))
config = peft.LoraConfig(r=1, target_modules=["0"], use_dora=True, bias="all")
model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
layer = model.base_model.model[0]
layer.weight.data.fill_(1)
layer.lora_magnitude_vector["default"].weight.data.fill_(512)
model(torch.ones(1, 1, dtype=torch.bfloat16)).backward()
print("got     ", layer.base_layer.bias.grad.item())
print("expected", 1.0)
