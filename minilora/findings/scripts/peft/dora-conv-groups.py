# Each output has a group: V = [W0 + B0 A0, W1 + B1 A1] = [3 + 4, 3 + 0] by rows of its own block,
# (3, 4) and (0, 3) as a matrix. W' = m V / ||V|| with norms 5 and 3.
import peft
import torch

base = torch.nn.Sequential(torch.nn.Conv1d(2, 2, 1, groups=2, bias=False))
base[0].weight.data.fill_(3)
config = peft.LoraConfig(r=2, lora_alpha=2, use_dora=True, target_modules=["0"])
layer = peft.get_peft_model(base, config).base_model.model[0]
layer.lora_A["default"].weight.data = torch.tensor([[[0.0], [4]], [[0], [0]]])
layer.lora_B["default"].weight.data.fill_(1)
layer.lora_magnitude_vector["default"].weight.data = torch.tensor([[[15.0], [21]]])
print("got     ", layer(torch.ones(1, 2, 1)).ravel().tolist())
print("expected", [15 / 5 * (3 + 4.0), 21 / 3 * 3.0])
