# An orthogonal start has B A = 0 for each expert, so that training begins at the base; each of the
# 2 experts has rank r = 2, as with any other start.
import peft
import torch


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 3, 3))

    def forward(self, x):
        return sum(x @ w.T for w in self.weight)


torch.manual_seed(0)
base = torch.nn.ModuleDict({"q": Experts()})
settings = {"target_modules": [], "target_parameters": ["q.weight"]}
config = peft.LoraConfig(r=2, init_lora_weights="orthogonal", **settings)
layer = peft.inject_adapter_in_model(config, base).q
change = layer.get_delta_weight("default").abs().max().item()
rows = len(layer.lora_A["default"].weight)
print("got     ", rows, "rows of A, a change of", "0" if change < 1e-6 else "more than 0")
print("expected", 4, "rows of A, a change of 0")
