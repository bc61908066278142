# With rsLoRA s = alpha / sqrt(r), and alpha_pattern says alpha = 16 of q: 16 / sqrt(4) = 8.
import peft
import torch

base = torch.nn.ModuleDict({"q": torch.nn.Linear(1, 1, bias=False)})
settings = {"init_r": 4, "total_step": 100, "use_rslora": True, "alpha_pattern": {"q": 16}}
model = peft.get_peft_model(base, peft.AdaLoraConfig(target_modules=["q"], **settings))
layer = model.base_model.model.q
print("got     ", layer.scaling["default"] / layer.ranknum["default"].item())
print("expected", 8.0)
