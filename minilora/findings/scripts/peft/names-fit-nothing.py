# The file has A = B = 1, so s B A = 1. A file none of whose names fits is another model's: an
# error, and not an adapter with B = 0.
import tempfile

import peft
import torch
from safetensors.torch import load_file, save_file


def base():
    return torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))


model = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["0"], r=1, lora_alpha=1))
for factor in (model.base_model.model[0].lora_A, model.base_model.model[0].lora_B):
    factor["default"].weight.data.fill_(1)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    file = f"{folder}/adapter_model.safetensors"
    save_file({n.removeprefix("base_model."): t for n, t in load_file(file).items()}, file)
    loaded = peft.PeftModel.from_pretrained(base(), folder)
print("got     ", loaded.base_model.model[0].get_delta_weight("default").item())
print("expected", 1.0, "or an error")
