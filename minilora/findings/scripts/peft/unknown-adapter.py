# A name that does not exist is an error in a list, too, as it is for one alone.
import peft
import torch

base = torch.nn.Sequential(torch.nn.Linear(1, 1))
model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"]), "one")
try:
    model.base_model.set_adapter(["one", "three"])
    found = f"active: {model.base_model.model[0].active_adapters}"
except ValueError:
    found = "ValueError"
print("got     ", found)
print("expected", "ValueError")
