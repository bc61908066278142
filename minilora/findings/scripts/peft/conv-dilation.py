# The change s B A has the base's geometry: dilation 2, kernel [1, 0, 0], so y[t] = x[t - 2];
# with W = 0 nothing else is left.
import peft
import torch

base = torch.nn.Sequential(torch.nn.Conv1d(1, 1, 3, dilation=2, padding="same", bias=False))
config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
layer = peft.get_peft_model(base, config).base_model.model[0]
layer.weight.data.fill_(0)
layer.lora_A["default"].weight.data = torch.tensor([[[1.0, 0, 0]]])
layer.lora_B["default"].weight.data.fill_(1)
print("got     ", layer(torch.tensor([[[1.0, 2, 3, 4, 5]]])).tolist())
print("expected", [[[0.0, 0.0, 1.0, 2.0, 3.0]]])
