# Saving and loading change no scale. For an alpha of 0 PEFT takes the rank r, which is 2 when the
# adapter is made and 1 when it is loaded, pruned: s is halved.
import tempfile

import peft
import torch


def base():
    return torch.nn.ModuleDict({"q": torch.nn.Linear(1, 1, bias=False)})


settings = {"init_r": 2, "target_r": 1, "total_step": 100, "tfinal": 99, "lora_alpha": 0}
model = peft.get_peft_model(base(), peft.AdaLoraConfig(target_modules=["q"], **settings))
layer = model.base_model.model.q
for part in "AEB":
    factor = getattr(layer, f"lora_{part}")["default"]
    factor.data.fill_(1)
    factor.grad = torch.zeros_like(factor)
layer.lora_E["default"].grad = torch.tensor([[2.0], [1.0]])
for step in (0, 1):
    model.base_model.update_and_allocate(step)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(base(), folder).base_model.model.q
print("got     ", round(loaded.get_delta_weight("default").item(), 3))
print("expected", round(layer.get_delta_weight("default").item(), 3))
