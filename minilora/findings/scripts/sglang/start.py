# Of PiSSA the base is R = W - s B0 A0: on W the adapter is another function. Its setting is read,
# or it is an error.
from types import SimpleNamespace

from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.lora.lora_config import LoRAConfig

told = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q"]}
config = LoRAConfig.from_dict(told | {"init_lora_weights": "pissa"})
adapter = LoRAAdapter("one", config, SimpleNamespace(num_hidden_layers=1), None, None)
print("got     ", "loaded, with scale", adapter.scaling)
print("expected", "an error, or W - s B0 A0 for the base")
