# A forward changes no parameter: A = 2 before and after. The row W + s B A = 0 + 0.5 * 2 is
# within max_norm = 1.
import loralib
import torch

layer = loralib.Embedding(1, 1, r=1, max_norm=1.0)
for name, value in {"weight": 0.0, "lora_A": 2.0, "lora_B": 0.5}.items():
    layer.get_parameter(name).data.fill_(value)
y = layer(torch.tensor([0])).item()
print("got     ", "A", round(layer.lora_A.item(), 3), "y", round(y, 3))
print("expected", "A", 2.0, "y", 1.0)
