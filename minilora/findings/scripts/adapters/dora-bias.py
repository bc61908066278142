# y = m (W + s B A) x / ||W + s B A|| + b: 1 * (1 + 1) / 2 + 1, as after merging.
import torch
from adapters import LoRAConfig, ModelAdaptersConfig, Stack
from adapters.methods.lora import LoRALinear

config = ModelAdaptersConfig()
layer = LoRALinear.wrap(torch.nn.Linear(1, 1), "selfattn", None, config)
config.add("one", LoRAConfig(r=1, alpha=1, use_dora=True))
layer.add_adapter("one", 0)
config.active_setup = Stack("one")
for parameter in layer.parameters():
    parameter.data.fill_(1)
print("got     ", layer(torch.ones(1, 1)).item())
layer.merge_adapter("one")
print("expected", layer(torch.ones(1, 1)).item())
