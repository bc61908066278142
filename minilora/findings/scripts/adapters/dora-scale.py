# y = m (W + s B A) x / ||W + s B A|| with s = alpha / r = 3: 1 * (1 + 3) / 4.
import torch
from adapters import LoRAConfig, ModelAdaptersConfig, Stack
from adapters.methods.lora import LoRALinear

config = ModelAdaptersConfig()
layer = LoRALinear.wrap(torch.nn.Linear(1, 1, bias=False), "selfattn", None, config)
config.add("one", LoRAConfig(r=1, alpha=3, use_dora=True))
layer.add_adapter("one", 0)
config.active_setup = Stack("one")
for parameter in layer.parameters():
    parameter.data.fill_(1)
print("got     ", layer(torch.ones(1, 1)).item())
print("expected", 1.0)
