# LoRA+ gives B the rate ratio * lr = 4, and all else lr = 0.5, the base's bias among it.
import peft
import torch
from peft.optimizers import create_loraplus_optimizer

base = torch.nn.ModuleDict({"q": torch.nn.Linear(1, 1)})
model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q"], bias="lora_only"))
optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.5, loraplus_lr_ratio=8)
rate = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
print("got     ", rate[model.base_model.model.q.bias])
print("expected", 0.5)
