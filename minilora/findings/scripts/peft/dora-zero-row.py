# At the start V = W and m = ||W||, so DoRA's W' = m V / ||V|| is W, also of a row of zeros.
import peft
import torch

base = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
base[0].weight.data = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
config = peft.LoraConfig(r=1, use_dora=True, target_modules=["0"])
print("got     ", peft.get_peft_model(base, config)(torch.ones(1, 2)).tolist())
print("expected", [[7.0, 0.0]])
