# Saving and loading change no output: y = W x + s B E A x, with both triplets (4 and 1, one of
# them grown again since the last pruning) and s = alpha / (r + 1e-5) with r = 2.
import tempfile

import peft
import torch


def base():
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(1, 1, bias=False)})
    model.q.weight.data.fill_(1)
    return model


settings = {"init_r": 2, "target_r": 1, "total_step": 100, "deltaT": 2}
model = peft.get_peft_model(base(), peft.AdaLoraConfig(target_modules=["q"], **settings))
layer = model.base_model.model.q
factors = [getattr(layer, f"lora_{part}")["default"] for part in "AEB"]
for factor in factors:
    factor.data.fill_(1)
for step in (1, 2, 3):
    for factor in factors:
        factor.grad = torch.zeros_like(factor)
    factors[1].grad = torch.tensor([[2.0], [1.0]])
    factors[1].data += 1  # as an optimizer moves it
    model.base_model.update_and_allocate(step)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(base(), folder)
print("got     ", round(loaded.base_model.model.q(torch.ones(1, 1)).item(), 3))
print("expected", round(layer(torch.ones(1, 1)).item(), 3))
