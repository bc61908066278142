# The weight of the one expert is stored (in, out), so y = x W + s x A^T B^T. With A = [1, 0],
# B = [0; 1] and x = [1, 0] this is [0, 1].
import peft
import torch


class Experts(torch.nn.Module):
    is_transposed = True

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, 2, 2))

    def forward(self, x):
        return x @ self.weight[0]


base = torch.nn.ModuleDict({"q": Experts()})
settings = {"target_modules": [], "target_parameters": ["q.weight"]}
config = peft.LoraConfig(r=1, lora_alpha=1, **settings)
layer = peft.inject_adapter_in_model(config, base).q
layer.lora_A["default"].weight.data = torch.tensor([[1.0, 0]])
layer.lora_B["default"].weight.data = torch.tensor([[0.0], [1]])
print("got     ", layer(torch.tensor([[1.0, 0]])).tolist())
print("expected", [[0.0, 1.0]])
