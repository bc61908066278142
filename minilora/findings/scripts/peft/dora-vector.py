# Linear(2, 3) takes x (2,) to y (3,), with an adapter as without.
import peft
import torch

config = peft.LoraConfig(r=1, use_dora=True, target_modules=["0"])
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 3)), config)
print("got     ", tuple(model(torch.ones(2)).shape))
print("expected", (3,))
