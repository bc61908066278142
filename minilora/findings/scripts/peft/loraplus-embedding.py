# LoRA+ gives B the rate ratio * lr = 4 and A the rate lr = 0.5, in an embedding as elsewhere.
import peft
import torch
from peft.optimizers import create_loraplus_optimizer

base = torch.nn.ModuleDict({"embed": torch.nn.Embedding(1, 1)})
model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["embed"]))
optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.5, loraplus_lr_ratio=8)
rate = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
embed = model.base_model.model.embed
factors = embed.lora_embedding_A["default"], embed.lora_embedding_B["default"]
print("got     ", [rate[factor] for factor in factors])
print("expected", [0.5, 4.0])
