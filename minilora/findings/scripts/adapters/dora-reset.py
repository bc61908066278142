# Merging and taking out again leaves W = 3.
import torch
from adapters import LoRAConfig, ModelAdaptersConfig, Stack
from adapters.methods.lora import LoRALinear

config = ModelAdaptersConfig()
layer = LoRALinear.wrap(torch.nn.Linear(1, 1, bias=False), "selfattn", None, config)
config.add("one", LoRAConfig(r=1, alpha=1, use_dora=True))
layer.add_adapter("one", 0)
config.active_setup = Stack("one")
for parameter in layer.parameters():
    parameter.data.fill_(1)
layer.weight.data.fill_(3)
layer.merge_adapter("one")
layer.reset_adapter()
print("got     ", layer.weight.item())
print("expected", 3.0)
