# PiSSA splits W = R + s B0 A0. An adapter (A, B) of it is right on that R alone, so R must be
# the same at each load; svd_lowrank draws it anew.
import tempfile

import peft
import torch

torch.manual_seed(0)
W, x = torch.randn(8, 8), torch.eye(8)


def base():
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(8, 8, bias=False)})
    model.q.weight.data = W.clone()
    return model


config = peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights="pissa_niter_1")
model = peft.get_peft_model(base(), config)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(base(), folder)
off = (model.base_model.model.q(x) - loaded.base_model.model.q(x)).abs().max().item()
print("got     ", "the same function" if off < 1e-5 else "another function")
print("expected", "the same function")
