# An adapter is both of its factors: a file with B alone is an error, and not a change B A whose A
# is drawn anew at each start.
import tempfile

import peft
import torch
from safetensors.torch import load_file, save_file


def base():
    return torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))


drawn = []
with tempfile.TemporaryDirectory() as folder:
    peft.get_peft_model(base(), peft.LoraConfig(target_modules=["0"], r=1)).save_pretrained(folder)
    file = f"{folder}/adapter_model.safetensors"
    save_file({n: torch.ones_like(t) for n, t in load_file(file).items() if "lora_B" in n}, file)
    for seed in (0, 1):
        torch.manual_seed(seed)
        layer = peft.PeftModel.from_pretrained(base(), folder).base_model.model[0]
        drawn.append(layer.get_delta_weight("default"))
same = torch.equal(*drawn)
print("got     ", "the same change" if same else "another change at each start")
print("expected", "an error")
