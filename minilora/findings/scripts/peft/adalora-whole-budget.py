# A budget of 2 of 2 triplets keeps both.
import peft
import torch

base = torch.nn.ModuleDict({"q": torch.nn.Linear(1, 1, bias=False)})
settings = {"init_r": 2, "target_r": 2, "total_step": 100}
model = peft.get_peft_model(base, peft.AdaLoraConfig(target_modules=["q"], **settings))
layer = model.base_model.model.q
for part in "AEB":
    factor = getattr(layer, f"lora_{part}")["default"]
    factor.data.fill_(1)
    factor.grad = torch.ones_like(factor)
try:
    model.base_model.update_and_allocate(1)
    found = f"{layer.lora_E['default'].count_nonzero().item()} triplets"
except RuntimeError as error:
    found = f"RuntimeError: {error}"
print("got     ", found)
print("expected", "2 triplets")
