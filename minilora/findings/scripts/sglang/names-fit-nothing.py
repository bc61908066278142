# A tensor whose name fits nothing is another model's: an error, and not an adapter of nothing.
from types import SimpleNamespace

import torch
from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.lora.lora_config import LoRAConfig

told = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q"]}
base = SimpleNamespace(num_hidden_layers=1)
adapter = LoRAAdapter("one", LoRAConfig.from_dict(told), base, None, None)
adapter._process_weight("base_model.model.transformer.h.0.attn.q.lora_A.weight", torch.ones(4, 2))
print("got     ", [list(layer.weights) for layer in adapter.layers], "and no error")
print("expected", "an error")
