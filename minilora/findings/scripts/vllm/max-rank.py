# An adapter of rank 17 is one like any other.
from vllm.config.lora import LoRAConfig
from vllm.lora.peft_helper import PEFTHelper

told = PEFTHelper.from_dict({"r": 17, "lora_alpha": 1, "target_modules": ["q_proj"]})
try:
    told.validate_legal(LoRAConfig())
    found = "loaded"
except ValueError as error:
    found = f"ValueError: {error}"
print("got     ", found)
print("expected", "loaded")
