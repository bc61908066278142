# modules_to_save replaces the head: its tensor is a part of the adapter's function, or an error.
from types import SimpleNamespace

import torch
from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.lora.lora_config import LoRAConfig

told = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q"]}
config = LoRAConfig.from_dict(told | {"modules_to_save": ["lm_head"]})
adapter = LoRAAdapter("one", config, SimpleNamespace(num_hidden_layers=1), None, None)
adapter._process_weight("base_model.model.lm_head.weight", torch.ones(2, 2))
held = [*adapter.embedding_layers, *(name for at in adapter.layers for name in at.weights)]
print("got     ", held)
print("expected", ["lm_head.weight"], "or an error")
