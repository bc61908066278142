# PiSSA of a table E = diag(4, 1) takes its greatest part, 4, out of it: R = diag(0, 1). As asked
# for, or an error.
import peft
import torch

base = torch.nn.Sequential(torch.nn.Embedding(2, 2))
base[0].weight.data = torch.diag(torch.tensor([4.0, 1]))
config = peft.LoraConfig(r=1, lora_alpha=1, init_lora_weights="pissa", target_modules=["0"])
layer = peft.get_peft_model(base, config).base_model.model[0]
print("got     ", layer.weight.tolist())
print("expected", [[0.0, 0.0], [0.0, 1.0]], "or an error")
