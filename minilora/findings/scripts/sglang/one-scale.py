# rsLoRA: s = alpha / sqrt(r) = 16 / 2 = 8.
from types import SimpleNamespace

from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.lora.lora_config import LoRAConfig

told = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q"], "use_rslora": True}
base = SimpleNamespace(num_hidden_layers=1)
print("got     ", LoRAAdapter("one", LoRAConfig.from_dict(told), base, None, None).scaling)
print("expected", 8.0)
