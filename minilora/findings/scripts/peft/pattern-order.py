# The first pattern that fits counts: alpha = 1 for q, s = alpha / r = 1 / 2. Saving and loading
# change no scale.
import tempfile

import peft
import torch


def base():
    return torch.nn.ModuleDict({"q": torch.nn.Linear(1, 1)})


config = peft.LoraConfig(r=2, target_modules=["q"], alpha_pattern={"q": 1, ".*": 64})
trained = peft.get_peft_model(base(), config)
with tempfile.TemporaryDirectory() as folder:
    trained.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(base(), folder)
print("got     ", loaded.base_model.model.q.scaling["default"])
print("expected", trained.base_model.model.q.scaling["default"])
