# The bias 8 belongs to adapter two: while one is active, and B = 0, y = W x + b = 1 + 1.
import tempfile

import peft
import torch


def base(bias):
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    model[0].weight.data.fill_(1)
    model[0].bias.data.fill_(bias)
    return model


trained = peft.get_peft_model(base(8), peft.LoraConfig(target_modules=["0"], bias="lora_only"))
model = peft.get_peft_model(base(1), peft.LoraConfig(target_modules=["0"]), "one")
with tempfile.TemporaryDirectory() as folder:
    trained.save_pretrained(folder)
    model.load_adapter(folder, "two")
print("got     ", model(torch.ones(1, 1)).item(), "with", model.active_adapters)
print("expected", 2.0, "with", ["one"])
