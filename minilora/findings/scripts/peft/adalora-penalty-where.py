# The penalty belongs to the training loss: in training the loss has it, in evaluation it has not.
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
for factor in (model.base_model.model.q.lora_A, model.base_model.model.q.lora_B):
    factor["default"].data.fill_(2)
print("got     ", model.train()().loss.item() > 0, "in training,", end=" ")
print(model.eval().base_model().loss.item() > 0, "in evaluation")
print("expected", True, "in training,", False, "in evaluation")
