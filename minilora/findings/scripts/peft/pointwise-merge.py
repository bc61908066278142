# The delta of a convolution with kernel 1 is B A, in the shape of its weight, in three
# dimensions as in two: all entries 1.
import peft
import torch

base = torch.nn.Sequential(torch.nn.Conv3d(2, 3, (1, 1, 1), bias=False))
config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
layer = peft.get_peft_model(base, config).base_model.model[0]
for parameter, value in zip(layer.parameters(), (0, 1, 1), strict=True):
    parameter.data.fill_(value)
try:
    layer.merge()
    found = layer.weight.unique().tolist()
except RuntimeError as error:
    found = f"RuntimeError: {error}"
print("got     ", found)
print("expected", [1.0])
