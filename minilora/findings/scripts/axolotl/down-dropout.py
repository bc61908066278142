# With p = 1/2 the branch of down_proj is dropped or doubled: y = s B A (K h) is 0 or 2 h, with
# W = 0 and s B A = 1. (The activation's kernel needs a GPU; PyTorch's own stands in.)
from unittest.mock import patch

import axolotl.kernels.lora as kernels
import peft
import torch

torch.manual_seed(0)
mlp, silu = torch.nn.Module(), torch.nn.functional.silu
config = peft.LoraConfig(r=1, lora_alpha=1, lora_dropout=0.5, target_modules=["0"])
for name in ("gate_proj", "up_proj", "down_proj"):
    base = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    setattr(mlp, name, peft.get_peft_model(base, config).base_model.model[0])
    getattr(mlp, name).weight.data.fill_(name != "down_proj")
mlp.down_proj.lora_A["default"].weight.data.fill_(1)
mlp.down_proj.lora_B["default"].weight.data.fill_(1)
x = torch.ones(1, 1, 1)
with patch.object(kernels, "swiglu_forward", lambda gate, up: silu(gate) * up):
    found = {round(kernels.apply_lora_mlp_swiglu(mlp, x).item(), 4) for _ in range(30)}
print("got     ", sorted(found), "in 30 forwards")
print("expected", [0.0, round(2 * silu(x).item(), 4)], "in 30 forwards")
