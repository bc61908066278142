# modules_to_save=["q"] names q, as target_modules=["q"] does: a name matches if it is q or
# ends in ".q". seq is another module.
import peft
import torch

base = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1, bias=False) for name in ("k", "q", "seq")})
config = peft.LoraConfig(target_modules=["k"], modules_to_save=["q"])
model = peft.get_peft_model(base, config).base_model.model
trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
print("got     ", sorted(trained))
print("expected", ["k", "q"])
