# B (m, r) has two dimensions, its bias (m,) has one: a bias of one dimension is whole.
import warnings

import peft
import torch

base = torch.nn.Sequential(torch.nn.Linear(4, 3))
model = peft.get_peft_model(base, peft.LoraConfig(r=1, lora_bias=True, target_modules=["0"]))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    peft.get_peft_model_state_dict(model)
print("got     ", sum("invalid shape" in str(each.message) for each in said), "warning of a shape")
print("expected", 0, "warning of a shape")
