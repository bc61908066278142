# Both names say that block.inner is trained: its weight has a gradient, dW = dy x^T, which is
# not 0 here.
from collections import OrderedDict

import peft
import torch

block = torch.nn.Sequential(OrderedDict(inner=torch.nn.Linear(2, 2, bias=False)))
base = torch.nn.Sequential(OrderedDict(q=torch.nn.Linear(2, 2), block=block))
config = peft.LoraConfig(r=1, target_modules=["q"], modules_to_save=["block", "inner"])
model = peft.get_peft_model(base, config)
model(torch.ones(1, 2)).sum().backward()
moved = [n for n, p in model.named_parameters() if p.grad is not None and "inner" in n]
print("got     ", len(moved), "trained weight of block.inner")
print("expected", 1, "trained weight of block.inner")
