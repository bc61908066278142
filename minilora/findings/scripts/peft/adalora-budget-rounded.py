# b(t) = target + (init - target) (1 - t / T)^3 = 125 / 5^3 = 1 at t = 4 of T = 5, a whole number.
import peft
import torch

base = torch.nn.ModuleDict({"q": torch.nn.Linear(1, 1, bias=False)})
settings = {"init_r": 125, "target_r": 0, "total_step": 5}
model = peft.get_peft_model(base, peft.AdaLoraConfig(target_modules=["q"], **settings))
print("got     ", model.base_model.rankallocator.budget_schedule(4)[0])
print("expected", 1)
