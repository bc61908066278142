# AdamW's decay: p <- p - lr decay p = 1 - 0.25 * 0.5 of A, whose gradient is 0.
import peft
import torch
from peft.optimizers import create_loraplus_optimizer

base = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
model = peft.get_peft_model(base, peft.LoraConfig(r=1, target_modules=["0"]))
A = model.base_model.model[0].lora_A["default"].weight
A.data.fill_(1)
optimizer = create_loraplus_optimizer(
    model, torch.optim.AdamW, lr=0.25, loraplus_lr_ratio=2, weight_decay=0.5
)
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
optimizer.step()
print("got     ", A.item())
print("expected", 1 - 0.25 * 0.5)
