# The rank in s = alpha / r is a number and no parameter.
import peft
import torch

base = torch.nn.ModuleDict({"q": torch.nn.Linear(1, 1, bias=False)}).to(torch.bfloat16)
settings = {"init_r": 2, "target_r": 1, "total_step": 100}
model = peft.get_peft_model(base, peft.AdaLoraConfig(target_modules=["q"], **settings))
print("got     ", "trained:", model.base_model.model.q.ranknum["default"].requires_grad)
print("expected", "trained:", False)
