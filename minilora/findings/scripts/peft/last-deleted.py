# Without adapters y = W x, which is 1.
import peft
import torch

base = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
base[0].weight.data.fill_(1)
model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"]), "one")
model.delete_adapter("one")
try:
    found = model(torch.ones(1, 1)).item()
except KeyError as error:
    found = f"KeyError: {error}"
print("got     ", found)
print("expected", 1.0)
