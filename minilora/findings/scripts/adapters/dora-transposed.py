# Each of the 3 outputs has a norm, of W (2, 3) stored as (in, out) too.
from adapters import LoRAConfig, ModelAdaptersConfig
from adapters.methods.lora import LoRALinear
from transformers.pytorch_utils import Conv1D

config = ModelAdaptersConfig()
layer = LoRALinear.wrap(Conv1D(3, 2), "selfattn", None, config, fan_in_fan_out=True)
config.add("one", LoRAConfig(r=1, use_dora=True))
try:
    layer.add_adapter("one", 0)
    print("got     ", layer.loras["one"].m.weight.numel(), "norms")
except RuntimeError as error:
    print("got     ", type(error).__name__)
print("expected", "3 norms")
