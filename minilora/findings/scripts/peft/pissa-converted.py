# PiSSA's W = R + s B0 A0 makes the adapter (A, B) on R one of rank 2r on W, [A; A0] and
# [B, -B0]; what else the adapter trains (an embedding, a module to save) stays as it is.
import tempfile
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file

base = torch.nn.ModuleDict({"q": torch.nn.Linear(2, 2), "k": torch.nn.Linear(2, 2)})
settings = {"r": 1, "target_modules": ["q"], "modules_to_save": ["k"]}
config = peft.LoraConfig(init_lora_weights="pissa", **settings)
model = peft.get_peft_model(base, config)
with tempfile.TemporaryDirectory() as folder:
    config.init_lora_weights = True
    model.save_pretrained(f"{folder}/start")
    config.init_lora_weights = "pissa"
    start = f"{folder}/start"
    model.save_pretrained(f"{folder}/lora", path_initial_model_for_weight_conversion=start)
    names = load_file(Path(folder, "lora", "adapter_model.safetensors"))
print("got     ", sorted(name.removeprefix("base_model.model.") for name in names))
print("expected", ["k.bias", "k.weight", "q.lora_A.weight", "q.lora_B.weight"])
