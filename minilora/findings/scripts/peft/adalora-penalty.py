# AdaLoRA, equation 4: R = ||P^T P - I||^2 + ||Q Q^T - I||^2, squared Frobenius norms. P = 3, Q = 2:
# (9 - 1)^2 + (4 - 1)^2 = 73.
from types import SimpleNamespace

import peft
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(1, 1, bias=False)

    def forward(self):
        return SimpleNamespace(loss=torch.zeros(()))


settings = {"init_r": 1, "target_r": 1, "total_step": 100, "orth_reg_weight": 1.0}
model = peft.get_peft_model(Model(), peft.AdaLoraConfig(target_modules=["q"], **settings))
layer = model.base_model.model.q
layer.lora_A["default"].data.fill_(2)
layer.lora_B["default"].data.fill_(3)
print("got     ", model.base_model().loss.item())
print("expected", 73.0)
