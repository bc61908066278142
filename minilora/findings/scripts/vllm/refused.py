# An adapter of DoRA has a function: m V / ||V|| x. It is refused.
from types import SimpleNamespace

from vllm.lora.peft_helper import PEFTHelper

told = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"], "use_dora": True}
try:
    PEFTHelper.from_dict(told).validate_legal(SimpleNamespace(max_lora_rank=16))
    found = "loaded"
except ValueError as error:
    found = f"ValueError: {error}"
print("got     ", found)
print("expected", "loaded")
