# y = (m / ||V||) W * x with V = W = [1, 0, 0], m = 2 and circular padding: y[t] = 2 x[t - 1], so
# y[0] = 2 x[-1] = 6.
import peft
import torch

base = torch.nn.Sequential(torch.nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular", bias=False))
base[0].weight.data = torch.tensor([[[1.0, 0, 0]]])
config = peft.LoraConfig(r=1, use_dora=True, lora_dropout=0.5, target_modules=["0"])
layer = peft.get_peft_model(base, config).base_model.model[0].train()
layer.lora_magnitude_vector["default"].weight.data.fill_(2)
layer.lora_dropout["default"].p = 0.0  # nothing is dropped, but the layer trains
print("got     ", layer(torch.tensor([[[1.0, 2, 3]]])).tolist())
print("expected", [[[6.0, 2.0, 4.0]]])
